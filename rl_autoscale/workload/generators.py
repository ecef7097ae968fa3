"""Synthetic arrivals as users write them: one small config per kind, each of which draws arrival times.

Every number may be a range that is drawn anew for each build (`ranges.py`): this is the domain randomisation of
training.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import did_you_mean
from rl_autoscale.workload import curves
from rl_autoscale.workload.arrivals import MAX_GAP_CV, GapKind, GapLaw, RateCurve, sample_arrivals
from rl_autoscale.workload.clients import Population, sample_clients, sum_of_clients
from rl_autoscale.workload.fitted import FITTED_NAMES, fitted_arrivals
from rl_autoscale.workload.ranges import Fraction, NonNegative, Positive, Range, fixed
from rl_autoscale.workload.trace import FloatArray


def _usable_cv(value: Range) -> Range:
    if value.high > MAX_GAP_CV:
        raise ValueError(f"must be at most {MAX_GAP_CV:g}")
    return value


Cv = Annotated[
    NonNegative, AfterValidator(_usable_cv), Field(description="coefficient of variation of the gaps; 1 is Poisson")
]


class RenewalSpec(Config):
    """Independent gaps at a constant rate."""

    kind: Literal["poisson", "gamma", "weibull"]
    rate_per_s: Positive
    cv: Cv = fixed(1.0)
    span_s: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> RenewalSpec:
        if self.kind == "poisson" and self.cv != fixed(1.0):
            raise ValueError("a poisson generator has cv 1; use kind: gamma or kind: weibull for another cv")
        return self

    def arrivals(self, rng: np.random.Generator, span_s: float) -> FloatArray:
        """Draw arrival times within [0, span_s]."""
        kind: GapKind = "weibull" if self.kind == "weibull" else "gamma"
        curve = curves.constant(self.rate_per_s.draw(rng), span_s)
        return sample_arrivals(rng, curve, GapLaw(self.cv.draw(rng), kind))


class MarkovModulatedSpec(Config):
    """A Markov chain over rates (MMPP; with cv != 1 a Markov-modulated Gamma process)."""

    kind: Literal["mmpp"]
    rates_per_s: tuple[NonNegative, ...] = Field(min_length=2)
    mean_sojourns_s: tuple[Positive, ...] = Field(min_length=2, description="mean stay in each state")
    cv: Cv = fixed(1.0)
    span_s: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> MarkovModulatedSpec:
        if len(self.rates_per_s) != len(self.mean_sojourns_s):
            raise ValueError(f"{len(self.rates_per_s)} rates_per_s but {len(self.mean_sojourns_s)} mean_sojourns_s")
        return self

    def arrivals(self, rng: np.random.Generator, span_s: float) -> FloatArray:
        """Draw arrival times within [0, span_s]."""
        rates = [rate.draw(rng) for rate in self.rates_per_s]
        sojourns = [sojourn.draw(rng) for sojourn in self.mean_sojourns_s]
        curve = curves.markov_modulated(rng, rates, sojourns, span_s)
        return sample_arrivals(rng, curve, GapLaw(self.cv.draw(rng)))


class DiurnalSpec(Config):
    """A day: a named hourly shape, or a sinusoid, times slow noise."""

    kind: Literal["diurnal"]
    rate_per_s: Positive = Field(description="mean over a whole period")
    hourly: Literal["servegen_m_small", "servegen_deepseek_r1", "burstgpt"] | tuple[NonNegativeFloat, ...] | None = (
        Field(default=None, description="relative rate by hour of day: a named shape or 24 numbers; none: a sinusoid")
    )
    amplitude: Fraction = fixed(0.5)
    period_s: Positive = Field(default=fixed(curves.DAY_S), description="of the sinusoid")
    start_hour: NonNegative = Field(
        default=fixed(0.0), description="hour of day at time 0; for the sinusoid of a 24-hour period"
    )
    noise_sigma: NonNegative = Field(
        default=fixed(0.0), description="standard deviation of the log rate around the shape"
    )
    noise_correlation_s: Positive = fixed(600.0)
    cv: Cv = fixed(1.0)
    span_s: Positive | None = None

    def curve(self, rng: np.random.Generator, span_s: float) -> RateCurve:
        """Draw the rate curve."""
        rate, start_hour = self.rate_per_s.draw(rng), self.start_hour.draw(rng)
        if self.hourly is None:
            curve = curves.sinusoid(
                rate, self.amplitude.draw(rng), self.period_s.draw(rng), span_s, phase=start_hour / 24.0
            )
        else:
            shape = curves.HOURLY_SHAPES[self.hourly] if isinstance(self.hourly, str) else self.hourly
            curve = curves.hourly(shape, rate, span_s, start_hour)
        return curves.with_noise(rng, curve, self.noise_sigma.draw(rng), self.noise_correlation_s.draw(rng))

    def arrivals(self, rng: np.random.Generator, span_s: float) -> FloatArray:
        """Draw arrival times within [0, span_s]."""
        return sample_arrivals(rng, self.curve(rng, span_s), GapLaw(self.cv.draw(rng)))


class FlashCrowdSpec(Config):
    """A base rate, a sudden crowd, a slow end."""

    kind: Literal["flash_crowd"]
    base_per_s: Positive
    peak_factor: Positive = Field(description="plateau over base, at least 1")
    start_s: NonNegative = Field(description="when the ramp begins")
    ramp_s: NonNegative = fixed(30.0)
    hold_s: NonNegative = fixed(120.0)
    decay_s: NonNegative = Field(default=fixed(120.0), description="time constant of the decay")
    cv: Cv = fixed(1.0)
    span_s: Positive | None = None

    def arrivals(self, rng: np.random.Generator, span_s: float) -> FloatArray:
        """Draw arrival times within [0, span_s]."""
        parts = (self.base_per_s, self.peak_factor, self.start_s, self.ramp_s, self.hold_s, self.decay_s)
        base, peak, start, ramp, hold, decay = (part.draw(rng) for part in parts)
        curve = curves.flash_crowd(base, peak, start, ramp, hold, decay, span_s)
        return sample_arrivals(rng, curve, GapLaw(self.cv.draw(rng)))


class LogAr1Spec(Config):
    """A rate that wanders: the exponential of an AR(1) process."""

    kind: Literal["log_ar1"]
    rate_per_s: Positive
    sigma: NonNegative = Field(default=fixed(0.3), description="standard deviation of the log rate")
    correlation_time_s: Positive = fixed(600.0)
    cv: Cv = fixed(1.0)
    span_s: Positive | None = None

    def arrivals(self, rng: np.random.Generator, span_s: float) -> FloatArray:
        """Draw arrival times within [0, span_s]."""
        rate, sigma, correlation_s = (part.draw(rng) for part in (self.rate_per_s, self.sigma, self.correlation_time_s))
        curve = curves.log_ar1(rng, rate, sigma, correlation_s, span_s, step_s=min(10.0, correlation_s / 5.0))
        return sample_arrivals(rng, curve, GapLaw(self.cv.draw(rng)))


class RateCurveSpec(Config):
    """Any piecewise-constant rate, written out; beyond its end the rate is zero."""

    kind: Literal["rate_curve"]
    edges_s: tuple[NonNegativeFloat, ...] = Field(min_length=2, description="from 0, strictly increasing")
    rates_per_s: tuple[NonNegativeFloat, ...] = Field(min_length=1, description="one fewer than edges_s")
    scale: Positive = Field(default=fixed(1.0), description="multiplies every rate")
    start_s: NonNegative = Field(default=fixed(0.0), description="place on the curve where time begins; it goes round")
    cv: Cv = fixed(1.0)
    gaps: GapKind = "gamma"
    span_s: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> RateCurveSpec:
        RateCurve(np.array(self.edges_s), np.array(self.rates_per_s))  # its own messages are the ones a user needs
        return self

    def arrivals(self, rng: np.random.Generator, span_s: float) -> FloatArray:
        """Draw arrival times within [0, span_s]."""
        curve = RateCurve(np.array(self.edges_s), np.array(self.rates_per_s)).scaled(self.scale.draw(rng))
        curve = curve.turned(self.start_s.draw(rng))
        times = sample_arrivals(rng, curve, GapLaw(self.cv.draw(rng), self.gaps))
        return times[: np.searchsorted(times, span_s, side="right")]


class ClientsSpec(Config):
    """A sum of clients of very different size and burstiness, as in ServeGen; see `clients.Population`."""

    kind: Literal["clients"]
    rate_per_s: Positive
    num_clients: PositiveInt = 139
    share_sigma: NonNegative = fixed(2.2)
    cv_median_excess: NonNegative = fixed(0.3)
    cv_sigma: NonNegative = fixed(2.17)
    weibull_share: Fraction = fixed(0.3)
    rate_sigma: NonNegative = fixed(0.6)
    rate_correlation_s: Positive = fixed(3600.0)
    hourly: Literal["servegen_m_small", "servegen_deepseek_r1", "burstgpt"] | None = None
    start_hour: NonNegative = fixed(0.0)
    span_s: Positive | None = None

    def arrivals(self, rng: np.random.Generator, span_s: float) -> FloatArray:
        """Draw arrival times within [0, span_s]."""
        drawn = ("share_sigma", "cv_median_excess", "cv_sigma", "weibull_share", "rate_sigma", "rate_correlation_s")
        population = Population(self.num_clients, **{name: getattr(self, name).draw(rng) for name in drawn})
        start_hour = self.start_hour.draw(rng)
        shape = curves.hourly(curves.HOURLY_SHAPES[self.hourly], 1.0, span_s, start_hour) if self.hourly else None
        clients = sample_clients(rng, population, self.rate_per_s.draw(rng), span_s, shape)
        return sum_of_clients(rng, clients)[0]


class FittedSpec(Config):
    """Arrivals like those of a public trace: another draw of the model fitted to it (`fitted.py`)."""

    kind: Literal["fitted"]
    name: str
    rate_per_s: Positive | None = Field(default=None, description="none: the trace's own mean rate")
    span_s: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> FittedSpec:
        if self.name not in FITTED_NAMES:
            raise ValueError(
                f"no fitted generator '{self.name}'{did_you_mean(self.name, FITTED_NAMES)}; "
                f"known: {', '.join(FITTED_NAMES)}"
            )
        return self

    def arrivals(self, rng: np.random.Generator, span_s: float) -> FloatArray:
        """Draw arrival times within [0, span_s]."""
        rate = None if self.rate_per_s is None else self.rate_per_s.draw(rng)
        return fitted_arrivals(rng, self.name, span_s, rate)


GENERATOR_KINDS: dict[str, str] = {
    "poisson": "independent exponential gaps",
    "gamma": "independent gaps with a given cv",
    "weibull": "independent gaps with a given cv and a heavier tail",
    "mmpp": "Markov-modulated rates",
    "diurnal": "a day: an hourly shape or a sinusoid, with noise",
    "flash_crowd": "base, ramp, plateau, decay",
    "log_ar1": "a rate that wanders",
    "rate_curve": "a piecewise-constant rate, written out",
    "clients": "a ServeGen-style sum of clients",
    "fitted": "another draw of a model fitted to a public trace",
}
"""Kind to what it is, for messages and the CLI."""


def _check_kind(value: Any) -> Any:
    if isinstance(value, dict):
        kind = value.get("kind")
        if kind not in GENERATOR_KINDS:
            hint = did_you_mean(str(kind), GENERATOR_KINDS) if kind is not None else ""
            raise ValueError(f"unknown generator kind '{kind}'{hint}; known: {', '.join(GENERATOR_KINDS)}")
    return value


GeneratorSpec = Annotated[
    Annotated[
        RenewalSpec
        | MarkovModulatedSpec
        | DiurnalSpec
        | FlashCrowdSpec
        | LogAr1Spec
        | RateCurveSpec
        | ClientsSpec
        | FittedSpec,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_check_kind),
]
"""Any generator, told apart by ``kind``."""
