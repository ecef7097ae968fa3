"""Recorded traffic through a user's fleet, once per policy: what each would have cost and broken.

All policies meet the same requests, start-up times and routing numbers (one seed). The fleet is simulated from its
latency profiles, so the answer is as good as they are: docs/fidelity.md for those that ship, ``rl-autoscale calibrate``
for your own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.experiments.episodes import check_policy, policy_for
from rl_autoscale.experiments.grid import PolicySweep, parse_policies, refusal_knobs
from rl_autoscale.experiments.rows import Refusal
from rl_autoscale.fleet.config import Config, read_yaml
from rl_autoscale.fleet.errors import SpecError, did_you_mean
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec
from rl_autoscale.fleet.state import FleetState
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.result import SECONDS_PER_HOUR, EpisodeResult
from rl_autoscale.workload import transform
from rl_autoscale.workload.trace import FloatArray, Workload

DEFAULT_POLICIES = ("headroom", "headroom-budget", "hpa", "chiron-robust", "oracle")
REFUSAL_STRICTNESS = 1.0
"""Rules refuse what would miss its TTFT."""

Progress = Callable[[int, str, float], None]
"""Told which policy runs (place and label) and how much of the traffic it has seen, 0 to 1."""


class ReplayFleet(Config):
    """What traffic is replayed on."""

    fleet: FleetSpec
    shield: ShieldSpec = ShieldSpec()


def read_fleet(path: Path) -> ReplayFleet:
    """Read a file with ``fleet`` and ``shield`` (a scenario's or controller's file too), or with a fleet alone.

    Raises:
        SpecError: missing, or not a fleet.
    """
    data: Any = read_yaml(path)
    if not isinstance(data, dict):
        raise SpecError(f"{path}: holds no fleet; it needs pools and classes, or fleet: with them")
    chosen = {name: data[name] for name in ("fleet", "shield") if name in data} if "fleet" in data else {"fleet": data}
    if isinstance(chosen["fleet"], str):
        return read_fleet(path.parent / chosen["fleet"])
    return ReplayFleet.from_dict(chosen, where=str(path))


@dataclass(frozen=True, slots=True)
class Choice:
    """One policy to replay.

    Attributes:
        label: what tables call it.
        registered: its name in the registry.
        refusal: early refusal off or on.
        knobs: its keyword arguments.
    """

    label: str
    registered: str
    refusal: Refusal
    knobs: dict[str, Any]


def choose_policies(
    words: Sequence[str], knobs: Mapping[str, Any] | None = None, refusal: Iterable[Refusal] = ("off",)
) -> list[Choice]:
    """Policies as the command line names them, with ``{"hpa": {"target": 40}}`` for their knobs.

    Raises:
        UnknownNameError: no such policy.
        SpecError: a knob for a policy that is not among them, a wrong knob, or a tuned variant.
    """
    sweeps = parse_policies(words)
    for sweep in sweeps:
        if sweep.tuned:
            raise SpecError(
                f"policy '{sweep.policy}' is tuned on training traffic, which a replay lacks; tune it with "
                f"rl-autoscale benchmark and give its constants as --knob {sweep.registered}.NAME=VALUE"
            )
    given = _knobs_by_policy(knobs or {}, sweeps)
    found = []
    for sweep in sweeps:
        own = {**sweep.knobs, **given.get(sweep.policy, {})}
        for mode in dict.fromkeys(refusal):
            chosen = {**refusal_knobs(sweep.model_copy(update={"knobs": own}), mode, REFUSAL_STRICTNESS), **own}
            check_policy(sweep.registered, chosen)
            found.append(Choice(sweep.name, sweep.registered, mode, chosen))
    return found


def _knobs_by_policy(knobs: Mapping[str, Any], sweeps: Sequence[PolicySweep]) -> dict[str, dict[str, Any]]:
    names = [sweep.policy for sweep in sweeps]
    found: dict[str, dict[str, Any]] = {}
    for policy, own in knobs.items():
        if not isinstance(own, dict) or policy not in names:
            raise SpecError(
                f"--knob {policy}: write POLICY.NAME=VALUE with one of the chosen policies"
                f"{did_you_mean(policy, names)}; chosen: {', '.join(names)}"
            )
        found[policy] = own
    return found


@dataclass(frozen=True, slots=True)
class WorstHour:
    """The hour with the most misses; ``start_s`` on the workload's clock."""

    start_s: float
    num_missed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy did with the traffic."""

    choice: Choice
    result: EpisodeResult

    @property
    def num_missed(self) -> int:
        """Requests that missed an SLO, were refused, dropped or cut off."""
        return self.result.num_arrived - self.result.num_met

    def usd_per_week(self) -> float:
        """Cost at this rate, for a week."""
        return self.result.cost_usd / self.result.duration_s * 7 * 24 * SECONDS_PER_HOUR

    def worst_hour(self, interval_s: float) -> WorstHour:
        """Misses are counted in the control step in which the request ended."""
        missed = self.result.timeline["missed"].sum(axis=1)
        per_hour = max(round(SECONDS_PER_HOUR / interval_s), 1)
        starts = np.arange(0, len(missed), per_hour)
        sums = np.add.reduceat(missed, starts)
        worst = int(np.argmax(sums))
        return WorstHour(float(self.result.timeline["time_s"][starts[worst]]), int(sums[worst]))


def fit_classes(workload: Workload, fleet: FleetSpec, class_name: str | None) -> Workload:
    """Give requests the fleet's classes: the one asked for, the fleet's only one, or those that the data name.

    Raises:
        SpecError: the data name no class, or one that the fleet does not have.
    """
    names = fleet.class_names
    if class_name is not None or len(names) == 1:
        chosen = class_name or names[0]
        if chosen not in names:
            raise SpecError(f"--class {chosen}: the fleet has {', '.join(names)}{did_you_mean(chosen, names)}")
        return transform.order_classes(transform.assign_class(workload, chosen), names)
    unknown = sorted(set(workload.class_names) - set(names))
    if unknown:
        raise SpecError(
            f"the traffic's class {', '.join(unknown)} is none of the fleet's ({', '.join(names)}); say which it is "
            "with --class"
        )
    return transform.order_classes(workload, names)


def replay(
    fleet: ReplayFleet,
    workload: Workload,
    choices: Sequence[Choice],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Run every choice on the same traffic.

    Args:
        fleet: what it runs on.
        workload: with the fleet's classes (`fit_classes`).
        choices: who decides.
        seed: of start-ups, crashes and routing.
        progress: told how far it is.

    Raises:
        RlAutoscaleError: a policy that does not fit the fleet.
    """
    outcomes = []
    for place, choice in enumerate(choices):
        policy = policy_for(choice.registered, choice.knobs, workload)
        simulated = SimFleet(fleet.fleet, workload, seed=seed)

        def on_step(state: FleetState, *_: object, place: int = place, label: str = choice.label) -> None:
            if progress is not None:
                progress(place, label, min(float(state.time_s) / workload.span_s, 1.0))

        run_control_loop(simulated, policy, fleet.shield, on_step=on_step)
        outcomes.append(Outcome(choice, simulated.result()))
    return outcomes


SHOWN = ("arrivals_per_s", "ready", "starting", "missed")
"""Columns of a timeline that a picture shows."""


def thinned(timeline: Mapping[str, FloatArray], span_s: float, at_most: int) -> dict[str, FloatArray]:
    """A timeline in at most so many points, for a picture: sums of misses, means of all else.

    Args:
        timeline: `EpisodeResult.timeline`.
        span_s: what comes later (the last requests' end) is left out.
        at_most: points, >= 1.

    Returns:
        ``time_s`` and the columns of `SHOWN`, each summed over pools or classes; shape (num_points,).
    """
    keep = timeline["time_s"] < span_s
    size = int(keep.sum())
    starts = np.arange(0, size, -(-size // at_most))
    lengths = np.diff(np.append(starts, size))
    thin = {"time_s": timeline["time_s"][keep][starts]}
    for name in SHOWN:
        # the first observation has no window behind it: its rates are NaN
        sums = np.add.reduceat(np.nan_to_num(timeline[name][keep]).sum(axis=1), starts)
        thin[name] = sums if name == "missed" else sums / lengths
    return thin
