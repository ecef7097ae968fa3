"""Length models as users write them: a name, or one law per side with an optional correlation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import did_you_mean
from rl_autoscale.workload import lengths
from rl_autoscale.workload.length_table import LENGTH_MODEL_NAMES, length_model
from rl_autoscale.workload.lengths import MAX_TOKENS, LengthLaw, LengthModel


class ConstantLength(Config):
    """Every request the same."""

    kind: Literal["constant"]
    tokens: Annotated[PositiveInt, Field(le=MAX_TOKENS)]

    def law(self) -> LengthLaw:
        """The law."""
        return lengths.constant(self.tokens)


class UniformLength(Config):
    """Every whole number from low to high."""

    kind: Literal["uniform"]
    low: PositiveInt
    high: Annotated[PositiveInt, Field(le=MAX_TOKENS)]

    @model_validator(mode="after")
    def _check(self) -> UniformLength:
        self.law()  # what the law refuses is refused when the file is read, not at the first draw
        return self

    def law(self) -> LengthLaw:
        """The law."""
        return lengths.uniform(self.low, self.high)


class LogNormalLength(Config):
    """One lognormal."""

    kind: Literal["lognormal"]
    median_tokens: Annotated[float, Field(ge=1, le=MAX_TOKENS)]
    sigma: NonNegativeFloat = Field(description="standard deviation of the natural logarithm")
    max_tokens: Annotated[PositiveInt, Field(le=MAX_TOKENS)] = MAX_TOKENS

    def law(self) -> LengthLaw:
        """The law."""
        return lengths.lognormal(self.median_tokens, self.sigma, self.max_tokens)


class MixtureLength(Config):
    """Several lognormals."""

    kind: Literal["lognormal_mixture"]
    weights: tuple[PositiveFloat, ...] = Field(min_length=1)
    mus: tuple[float, ...] = Field(min_length=1, description="means of the natural logarithm")
    sigmas: tuple[NonNegativeFloat, ...] = Field(min_length=1)
    max_tokens: Annotated[PositiveInt, Field(le=MAX_TOKENS)] = MAX_TOKENS

    @model_validator(mode="after")
    def _check(self) -> MixtureLength:
        self.law()  # what the law refuses is refused when the file is read, not at the first draw
        return self

    def law(self) -> LengthLaw:
        """The law."""
        return lengths.lognormal_mixture(self.weights, self.mus, self.sigmas, self.max_tokens)


class QuantileLength(Config):
    """An empirical law by its quantiles."""

    kind: Literal["quantiles"]
    probability: tuple[float, ...] = Field(min_length=2, description="strictly increasing from 0 to 1")
    tokens: tuple[NonNegativeFloat, ...] = Field(min_length=2, description="the quantile at each probability")

    @model_validator(mode="after")
    def _check(self) -> QuantileLength:
        self.law()  # what the law refuses is refused when the file is read, not at the first draw
        return self

    def law(self) -> LengthLaw:
        """The law."""
        return lengths.quantiles(self.probability, self.tokens)


LengthLawSpec = Annotated[
    ConstantLength | UniformLength | LogNormalLength | MixtureLength | QuantileLength, Field(discriminator="kind")
]
"""Any law, told apart by ``kind``."""


class LengthSpec(Config):
    """One law per side and how they depend on each other."""

    prompt: LengthLawSpec
    output: LengthLawSpec
    correlation: float = Field(default=0.0, gt=-1, lt=1, description="of a Gaussian copula")


def _known_name(value: str) -> str:
    if value not in LENGTH_MODEL_NAMES:
        hint = did_you_mean(value, LENGTH_MODEL_NAMES)
        raise ValueError(f"unknown length model '{value}'{hint}; known: {', '.join(LENGTH_MODEL_NAMES)}")
    return value


def _name_or_inline(value: Any) -> str:
    return "name" if isinstance(value, str) else "inline"


NamedOrInlineLengths = Annotated[
    Annotated[str, AfterValidator(_known_name), Tag("name")] | Annotated[LengthSpec, Tag("inline")],
    Discriminator(_name_or_inline),
]
"""A name of `LENGTH_MODEL_NAMES` or a `LengthSpec`."""


def resolve_lengths(spec: str | LengthSpec) -> LengthModel:
    """Turn what a user wrote into laws to draw from."""
    if isinstance(spec, str):
        return length_model(spec)
    return LengthModel(spec.prompt.law(), spec.output.law(), spec.correlation)
