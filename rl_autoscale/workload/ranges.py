"""Numbers in YAML that may be fixed or drawn anew for every build: ``12`` or ``{low: 5, high: 50, log: true}``."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, model_serializer, model_validator

from rl_autoscale.fleet.config import Config


class Range(Config):
    """A number drawn uniformly (or log-uniformly) from low..high; equal ends are a fixed number."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low={self.low} exceeds high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs low > 0, got low={self.low}")
        return self

    @model_serializer
    def _plain(self) -> float | dict[str, Any]:
        return self.low if self.low == self.high else {"low": self.low, "high": self.high, "log": self.log}

    @property
    def is_fixed(self) -> bool:
        """Whether every draw is the same."""
        return self.low == self.high

    def draw(self, rng: np.random.Generator) -> float:
        """One number; a fixed one consumes no randomness."""
        if self.is_fixed:
            return self.low
        if self.log:
            return float(np.clip(math.exp(rng.uniform(math.log(self.low), math.log(self.high))), self.low, self.high))
        return float(rng.uniform(self.low, self.high))


def _as_range(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        if isinstance(value, dict | Range):
            return value
        raise ValueError("must be a number or {low: ..., high: ..., log: true}")
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return {"low": value, "high": value}


def _ends(value: Range) -> str:
    """The ends of a proper range, for a message; a plain number is shown by `describe_validation_error` already."""
    return "" if value.is_fixed else f", got {value.low:g}..{value.high:g}"


def _above_zero(value: Range) -> Range:
    if value.low <= 0:
        raise ValueError(f"must be greater than 0{_ends(value)}")
    return value


def _not_negative(value: Range) -> Range:
    if value.low < 0:
        raise ValueError(f"must not be negative{_ends(value)}")
    return value


def _fraction(value: Range) -> Range:
    if value.low < 0 or value.high > 1:
        raise ValueError(f"must be between 0 and 1{_ends(value)}")
    return value


Number = Annotated[Range, BeforeValidator(_as_range)]
"""Any finite number, fixed or a range."""

Positive = Annotated[Range, BeforeValidator(_as_range), AfterValidator(_above_zero)]
"""A number above 0, fixed or a range."""

NonNegative = Annotated[Range, BeforeValidator(_as_range), AfterValidator(_not_negative)]
"""A number >= 0, fixed or a range."""

Fraction = Annotated[Range, BeforeValidator(_as_range), AfterValidator(_fraction)]
"""A number in 0..1, fixed or a range."""


def fixed(value: float) -> Range:
    """A range of one number, for defaults."""
    return Range(low=value, high=value)
