"""Prompt and output lengths: marginal laws and their dependence.

Every law is a tabulated quantile function, so all are drawn, truncated and joined (by a Gaussian copula) in one way.
Draws are rounded to whole tokens and clipped to [1, max_tokens].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.trace import FloatArray, Int32Array

MAX_TOKENS = 10_000_000
"""Nothing longer is accepted: it would be a mistake of unit, and int32 arithmetic on single requests stays safe."""

_NORMAL_GRID = np.linspace(-5.5, 5.5, 221)


@dataclass(frozen=True, slots=True, eq=False)
class LengthLaw:
    """A marginal law of token counts.

    Attributes:
        probability: shape (K,), float64, strictly increasing from 0 to 1.
        tokens: shape (K,), float64, non-decreasing: the quantile at each probability, linear in between.

    Raises:
        SpecError: when any of this does not hold or a quantile leaves [0, `MAX_TOKENS`].
    """

    probability: FloatArray
    tokens: FloatArray

    def __post_init__(self) -> None:
        """Check shapes, order and range."""
        probability, tokens = np.asarray(self.probability, np.float64), np.asarray(self.tokens, np.float64)
        object.__setattr__(self, "probability", probability)
        object.__setattr__(self, "tokens", tokens)
        if probability.ndim != 1 or probability.size < 2 or tokens.shape != probability.shape:
            raise SpecError(
                f"length law: {probability.size} probabilities and {tokens.size} quantiles; give two or more of each"
            )
        if probability[0] != 0 or probability[-1] != 1 or not (np.diff(probability) > 0).all():
            raise SpecError("length law: probabilities must rise strictly from 0 to 1")
        if not (
            np.isfinite(tokens).all() and (np.diff(tokens) >= 0).all() and tokens[0] >= 0 and tokens[-1] <= MAX_TOKENS
        ):
            raise SpecError(f"length law: quantiles must not decrease and must stay within 0..{MAX_TOKENS:,} tokens")

    def at(self, probability: FloatArray) -> Int32Array:
        """Quantiles at probabilities in [0, 1], as whole tokens >= 1; same shape."""
        values = np.interp(probability, self.probability, self.tokens)
        return np.maximum(np.rint(values), 1).astype(np.int32)

    @property
    def mean_tokens(self) -> float:
        """Mean before rounding."""
        return float(np.sum(np.diff(self.probability) * (self.tokens[1:] + self.tokens[:-1]) / 2))


@dataclass(frozen=True, slots=True)
class LengthModel:
    """Joint law of prompt and output lengths.

    Attributes:
        prompt: law of prompt tokens.
        output: law of output tokens.
        correlation: of the Gaussian copula, in (-1, 1); close to the correlation of the log lengths.
        source: where the numbers come from.

    Raises:
        SpecError: when the correlation is out of range.
    """

    prompt: LengthLaw
    output: LengthLaw
    correlation: float = 0.0
    source: str = "user"

    def __post_init__(self) -> None:
        """Check the correlation."""
        if not -1 < self.correlation < 1:
            raise SpecError(f"lengths: correlation={self.correlation} must lie strictly between -1 and 1")


def sample_lengths(rng: np.random.Generator, model: LengthModel, size: int) -> tuple[Int32Array, Int32Array]:
    """Draw prompt and output tokens of `size` requests; two int32 arrays of shape (size,), >= 1."""
    if model.correlation == 0:
        return model.prompt.at(rng.random(size)), model.output.at(rng.random(size))
    first = rng.standard_normal(size)
    second = model.correlation * first + math.sqrt(1 - model.correlation**2) * rng.standard_normal(size)
    return model.prompt.at(ndtr(first)), model.output.at(ndtr(second))


def constant(tokens: int) -> LengthLaw:
    """Every request has the same length."""
    check_tokens("tokens", tokens)
    return LengthLaw(np.array([0.0, 1.0]), np.array([tokens, tokens], dtype=np.float64))


def uniform(low: int, high: int) -> LengthLaw:
    """Every whole number from low to high, equally likely."""
    check_tokens("low", low)
    check_tokens("high", high)
    if low > high:
        raise SpecError(f"lengths: low={low} exceeds high={high}")
    # half a token beyond both ends, so that rounding gives the end values their full share, and never passes them
    return LengthLaw(np.array([0.0, 1.0]), np.array([low - 0.499999, high + 0.499999]))


def lognormal_mixture(
    weights: Sequence[float], mus: Sequence[float], sigmas: Sequence[float], max_tokens: int = MAX_TOKENS
) -> LengthLaw:
    """A mixture of lognormals; one component is the plain lognormal.

    Args:
        weights: shares of the components, > 0; divided by their sum.
        mus: means of the natural logarithm of the tokens.
        sigmas: standard deviations of that logarithm, >= 0; 0 is a point.
        max_tokens: longer draws are clipped to this.
    """
    if not len(weights) == len(mus) == len(sigmas) > 0:
        raise SpecError(
            f"lengths: {len(weights)} weights, {len(mus)} mus, {len(sigmas)} sigmas; give one of each per component"
        )
    if not (min(weights) > 0 and min(sigmas) >= 0 and all(map(math.isfinite, (*weights, *mus, *sigmas)))):
        raise SpecError("lengths: mixture weights must be > 0, sigmas >= 0 and all numbers finite")
    check_tokens("max_tokens", max_tokens)
    share = np.asarray(weights, np.float64) / sum(weights)
    mu, sigma = np.asarray(mus, np.float64), np.maximum(np.asarray(sigmas, np.float64), 1e-6)
    log_tokens = np.unique(mu[:, None] + sigma[:, None] * _NORMAL_GRID)
    probability = share @ ndtr((log_tokens - mu[:, None]) / sigma[:, None])
    probability, first = np.unique(probability, return_index=True)
    probability[0], probability[-1] = 0.0, 1.0  # the grid's ends, 5.5 standard deviations out
    tokens = np.minimum(np.exp(np.minimum(log_tokens[first], math.log(MAX_TOKENS))), max_tokens)
    return LengthLaw(probability, tokens)


def lognormal(median_tokens: float, sigma: float, max_tokens: int = MAX_TOKENS) -> LengthLaw:
    """Lognormal with a median and a standard deviation of the natural logarithm."""
    if not (math.isfinite(median_tokens) and median_tokens >= 1):
        raise SpecError(f"lengths: median_tokens={median_tokens} must be at least 1")
    return lognormal_mixture([1.0], [math.log(median_tokens)], [sigma], max_tokens)


def quantiles(probability: Sequence[float], tokens: Sequence[float]) -> LengthLaw:
    """An empirical law from its quantiles, linear in between; the first probability is 0 and the last is 1."""
    return LengthLaw(np.asarray(probability, np.float64), np.asarray(tokens, np.float64))


def empirical(sample_tokens: Int32Array, num_quantiles: int = 1001) -> LengthLaw:
    """The law of a sample, kept as evenly spaced quantiles."""
    if sample_tokens.size == 0:
        raise SpecError("lengths: an empirical law needs at least one length")
    probability = np.linspace(0.0, 1.0, num_quantiles)
    return LengthLaw(probability, np.quantile(sample_tokens, probability))


def check_tokens(name: str, value: int) -> None:
    """Raise SpecError unless 1 <= value <= `MAX_TOKENS`."""
    if not 1 <= value <= MAX_TOKENS:
        raise SpecError(f"lengths: {name}={value} must be between 1 and {MAX_TOKENS:,} tokens")
