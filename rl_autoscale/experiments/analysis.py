"""From rows to findings: what a report says, before it is formatted. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl_autoscale.experiments.rows import Refusal, Row
from rl_autoscale.experiments.statistics import (
    TARGETS,
    Estimate,
    Sweep,
    front_indices,
    hours_at,
    hours_at_attainment,
    hypervolume_estimate,
    paired_ratio,
    share_of_gap_closed,
)
from rl_autoscale.fleet.errors import SpecError

REFERENCE_ATTAINMENT = 0.90
REFERENCE_COST = 2.0
"""The hypervolume's reference point: this attainment, at so many times the cheapest rule's GPU-hours for 95 %."""

USAGE_TARGET = 0.98
"""The attainment at which policies are compared by how they use the fleet."""
USAGE_METRICS = (
    "gpu_utilisation",
    "gpu_efficiency",
    "over_provisioned",
    "under_provisioned",
    "scale_ups",
    "scale_downs",
    "reversals",
)

CLAIRVOYANT = "oracle"
LEARNED = "learned"
NOT_ADAPTIVE = "static"
"""Its knob is chosen in hindsight; nobody could have deployed it. It is shown, but is not a rule to beat."""


Place = tuple[float | None, float | None]
"""(`Row.tuned_for`, `Row.knob_value`)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One policy with early refusal off or on.

    Attributes:
        policy: what tables call it.
        registered: its name in the registry.
        refusal: early refusal off or on.
        knob: name of the swept knob.
        settings: what was swept: which set of tuned constants (`Row.tuned_for`), and the knob's value, increasing.
        sweep: its episodes.
        hours: GPU-hours at each target.
        hypervolume: share of the reference rectangle.
    """

    policy: str
    registered: str
    refusal: Refusal
    knob: str
    settings: tuple[Place, ...]
    sweep: Sweep
    hours: tuple[Estimate, ...]
    hypervolume: Estimate

    @property
    def is_rule(self) -> bool:
        """Whether somebody could run it today: not clairvoyant, not learned, not a constant chosen in hindsight."""
        return _counts(self.registered)


@dataclass(frozen=True, slots=True)
class Comparison:
    """GPU-hours of the focal policy over those of another, at each target; below 1 the focal policy is cheaper."""

    other: Entry
    ratios: tuple[Estimate, ...]

    def verdict(self, k: int) -> str:
        """``wins``, ``loses``, ``tie`` (the interval holds 1, or there is none) or ``-`` (one was not reached)."""
        ratio = self.ratios[k]
        if not ratio.reached:
            return "-"
        if ratio.high < 1.0:
            return "wins"
        return "loses" if ratio.low > 1.0 else "tie"


@dataclass(frozen=True, slots=True)
class Deployed:
    """A tuned rule at the point it was tuned to on training traffic, on the test traffic."""

    policy: str
    refusal: Refusal
    asked_attainment: float
    attainment: float
    worst_attainment: float
    gpu_hours: float
    over_hindsight: float
    """GPU-hours over what the cheapest rule in hindsight needs for the delivered attainment; NaN if none gets there."""


@dataclass(frozen=True, slots=True)
class Used:
    """How one policy used the fleet at the cheapest knob value that attains `USAGE_TARGET`, mean over seeds.

    Attributes:
        attainment: delivered.
        metrics: of `EpisodeResult.summary()`; those of a class at its worst class; NaN where no row has them.
    """

    policy: str
    refusal: Refusal
    attainment: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything a report says about one scenario."""

    scenario: str
    seeds: tuple[int, ...]
    targets: tuple[float, ...]
    reference: tuple[float, float] | None
    entries: tuple[Entry, ...]
    focal: Entry | None
    comparisons: tuple[Comparison, ...]
    gap_closed: tuple[float, ...]
    deployed: tuple[Deployed, ...]
    used: tuple[Used, ...]

    def entry(self, policy: str, refusal: Refusal) -> Entry | None:
        """The entry of that name, or None."""
        return next((item for item in self.entries if (item.policy, item.refusal) == (policy, refusal)), None)

    def cheapest_rule(self, k: int) -> Entry | None:
        """The rule with the fewest GPU-hours at target k, in hindsight."""
        reached = [item for item in self.entries if item.is_rule and item.hours[k].reached]
        return min(reached, key=lambda item: item.hours[k].value, default=None)


def analyse(rows: Sequence[Row], *, targets: tuple[float, ...] = TARGETS, seed: int = 0) -> list[Findings]:
    """Findings of every scenario, in the order of the rows.

    Args:
        rows: of one benchmark.
        targets: attainments to report at.
        seed: of the bootstrap.

    Raises:
        SpecError: there are no rows.
    """
    if not rows:
        raise SpecError("there are no results yet; run 'rl-autoscale benchmark' first")
    return [
        _findings(name, [row for row in rows if row.scenario == name], targets, seed)
        for name in dict.fromkeys(row.scenario for row in rows)
    ]


def _findings(scenario: str, rows: list[Row], targets: tuple[float, ...], seed: int) -> Findings:
    rng = np.random.default_rng(seed)
    seeds = tuple(sorted({row.seed for row in rows}))
    groups = dict.fromkeys((row.policy, row.refusal) for row in rows)
    sweeps = {group: _sweep(rows, *group, seeds) for group in groups}
    known = {group: found for group, found in sweeps.items() if found is not None}
    registered = {(row.policy, row.refusal): (row.registered, row.knob or "") for row in rows}
    reference = _reference([sweep for group, (_, sweep) in known.items() if _counts(registered[group][0])])
    entries = tuple(
        Entry(
            *(group[0], registered[group][0], group[1], registered[group][1]),
            settings=settings,
            sweep=sweep,
            hours=tuple(hours_at_attainment(sweep, targets, rng=rng)),
            hypervolume=_hypervolume(sweep, reference, rng),
        )
        for group, (settings, sweep) in known.items()
    )
    focal = _focal(entries)
    used = tuple(_used(rows, entry) for entry in entries)
    partial = Findings(scenario, seeds, targets, reference, entries, focal, (), (), (), used)
    if focal is None:
        return partial
    comparisons = tuple(
        Comparison(other, tuple(paired_ratio(focal.sweep, other.sweep, targets, rng=rng)))
        for other in entries
        if other is not focal
    )
    return Findings(
        *(scenario, seeds, targets, reference, entries, focal, comparisons),
        gap_closed=tuple(_gap_closed(partial, focal, k) for k in range(len(targets))),
        deployed=tuple(_deployed(rows, partial)),
        used=used,
    )


def _sweep(
    rows: list[Row], policy: str, refusal: Refusal, seeds: tuple[int, ...]
) -> tuple[tuple[Place, ...], Sweep] | None:
    """A complete sweep (every setting on every seed); settings still missing a seed are left out."""
    mine = {
        ((row.tuned_for, row.knob_value), row.seed): row
        for row in rows
        if (row.policy, row.refusal) == (policy, refusal) and row.asked_attainment is None
    }
    settings = sorted({place for place, _ in mine}, key=lambda place: [-np.inf if x is None else x for x in place])
    settings = [place for place in settings if all((place, seed) in mine for seed in seeds)]
    if not settings:
        return None
    attainment = np.array([[mine[place, seed].slo_attainment for place in settings] for seed in seeds])
    hours = np.array([[mine[place, seed].gpu_hours for place in settings] for seed in seeds])
    return tuple(settings), Sweep(np.nan_to_num(attainment), hours)


def _counts(registered: str) -> bool:
    return registered not in (CLAIRVOYANT, LEARNED, NOT_ADAPTIVE)


def _reference(rules: list[Sweep]) -> tuple[float, float] | None:
    """The hypervolume's reference point, or None when no rule reaches 95 %."""
    hours = [float(hours_at(*sweep.mean(), np.array([0.95]))[0]) for sweep in rules]
    reached = [value for value in hours if np.isfinite(value)]
    return (REFERENCE_ATTAINMENT, REFERENCE_COST * min(reached)) if reached else None


def _hypervolume(sweep: Sweep, reference: tuple[float, float] | None, rng: np.random.Generator) -> Estimate:
    if reference is None:
        return Estimate(float("nan"), float("nan"), float("nan"))
    return hypervolume_estimate(sweep, reference, rng=rng, num_resamples=500)


def _focal(entries: Sequence[Entry]) -> Entry | None:
    """The policy that is compared with all others: the learned one (refusal on if there is), else the best rule."""
    learned = [item for item in entries if item.registered == LEARNED]
    if learned:
        return max(learned, key=lambda item: item.refusal == "on")
    rules = [item for item in entries if item.is_rule]
    return max(rules, key=lambda item: np.nan_to_num(item.hypervolume.value), default=None)


def _gap_closed(findings: Findings, focal: Entry, k: int) -> float:
    rule = findings.cheapest_rule(k)
    limits = [
        item.hours[k].value for item in findings.entries if item.registered == CLAIRVOYANT and item.hours[k].reached
    ]
    if rule is None or not limits:
        return float("nan")
    return share_of_gap_closed(focal.hours[k].value, rule.hours[k].value, min(limits))


def _deployed(rows: list[Row], findings: Findings) -> list[Deployed]:
    found = []
    groups: dict[tuple[str, Refusal, float], list[Row]] = {}
    for row in rows:
        if row.asked_attainment is not None:
            groups.setdefault((row.policy, row.refusal, row.asked_attainment), []).append(row)
    for (policy, refusal, asked), mine in sorted(groups.items(), key=lambda group: group[0]):
        attainment = float(np.mean([row.slo_attainment for row in mine]))
        hours = float(np.mean([row.gpu_hours for row in mine]))
        hindsight = [
            float(hours_at(*item.sweep.mean(), np.array([attainment]))[0]) for item in findings.entries if item.is_rule
        ]
        reached = [value for value in hindsight if np.isfinite(value)]
        found.append(
            Deployed(
                *(policy, refusal, asked, attainment),
                worst_attainment=min(row.slo_attainment for row in mine),
                gpu_hours=hours,
                over_hindsight=hours / min(reached) if reached else float("nan"),
            )
        )
    return found


def _used(rows: list[Row], entry: Entry) -> Used:
    k = operating_point(entry, USAGE_TARGET)
    mine = [
        row.metrics
        for row in rows
        if (row.policy, row.refusal, row.asked_attainment) == (entry.policy, entry.refusal, None)
        and (row.tuned_for, row.knob_value) == entry.settings[k]
    ]
    metrics = {name: float(np.mean([item.get(name, np.nan) for item in mine])) for name in USAGE_METRICS}
    metrics["qoe"] = float(np.mean([min(_of_classes(item, "qoe")) for item in mine]))
    metrics["hol_blocking_s"] = float(np.mean([max(_of_classes(item, "hol_blocking_s")) for item in mine]))
    return Used(entry.policy, entry.refusal, float(entry.sweep.mean()[0][k]), metrics)


def _of_classes(metrics: dict[str, float], name: str) -> list[float]:
    """A metric of each class that has it, or one NaN."""
    found = [value for key, value in metrics.items() if key.startswith(f"{name}/") and not np.isnan(value)]
    return found or [float("nan")]


def operating_point(entry: Entry, target: float) -> int:
    """Index of the knob value to pick in hindsight: the cheapest that attains the target, else the best."""
    attainment, hours = entry.sweep.mean()
    front = front_indices(attainment, hours)
    enough = front[attainment[front] >= target]
    return int(enough[0] if len(enough) else front[-1])
