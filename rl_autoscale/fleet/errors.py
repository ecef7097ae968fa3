"""Every error this package raises on purpose, and the one way to suggest a name.

    RlAutoscaleError
    ├── SpecError            a scenario, fleet, shield or option that cannot be
    │   └── SilenceError     a draw of traffic that holds no request; another may
    ├── TraceError           a workload file that cannot be read (carries file, line, reason)
    ├── UnknownNameError     a policy, scenario, profile or trace nobody has heard of
    ├── PolicyFileError      an exported policy that is damaged or was made for another schema
    └── MissingExtraError    an optional dependency that is not installed

Each message says what was got, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RlAutoscaleError(Exception):
    """Base of all errors raised on purpose; the CLI prints these as one line and exits with 2."""


class SpecError(RlAutoscaleError, ValueError):
    """A specification (scenario, fleet, shield, option) that is contradictory or out of range."""


class SilenceError(SpecError):
    """A draw of traffic in which no request arrives."""


class TraceError(RlAutoscaleError, ValueError):
    """A workload file that cannot be used as it is."""


class UnknownNameError(RlAutoscaleError, KeyError):
    """A name that is not registered."""

    def __init__(self, kind: str, name: str, allowed: Iterable[str]) -> None:
        known = sorted(allowed)
        super().__init__(f"unknown {kind} '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class PolicyFileError(RlAutoscaleError, ValueError):
    """An exported policy that is damaged, incomplete or made for another schema."""


class TrackingError(RlAutoscaleError, RuntimeError):
    """A tracking service that cannot be used: nobody is logged in, or it does not answer."""


class MissingExtraError(RlAutoscaleError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the '{extra}' extra; in a checkout of rl_autoscale run: pip install '.[{extra}]'"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
