"""From the rows of many scenarios to what a suite report says. Pure.

*Cost.* Scenarios differ in size, so an episode's GPU-hours are divided by what the cheapest rule, its knob chosen in
hindsight, needs on that scenario for `REFERENCE_TARGET`: cost 1 is that rule. Averages over scenarios weigh them
equally.

*A setting* is one way to run a policy on the whole suite without looking at the test traffic: an attainment asked of
it (rules: constants tuned for it on each scenario's training traffic) or, for a policy that cannot be asked, one knob
value on all scenarios. *Equal suite attainment* interpolates a policy's cost between its settings, as `statistics.py`
does between knob values, and extrapolates nothing.

*Score* of an episode: its cost plus `tuning.SHORTFALL_PRICE` per unit of attainment below the one asked: the loss
that every rule's tuning minimises. Less is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rl_autoscale.experiments.analysis import CLAIRVOYANT, LEARNED, Findings
from rl_autoscale.experiments.choice import BEST
from rl_autoscale.experiments.rows import Refusal, Row
from rl_autoscale.experiments.statistics import Estimate, FloatArray, IntArray, drawn_ratio, estimate_of, hours_at
from rl_autoscale.experiments.suite_fronts import FrontRatio, front_ratios
from rl_autoscale.experiments.suite_statistics import (
    interquartile_mean,
    interquartile_mean_estimate,
    probability_of_improvement,
    resample,
    seed_resamples,
    suite_mean,
)
from rl_autoscale.experiments.tuning import SHORTFALL_PRICE

REFERENCE_TARGET = 0.98
TOLERANCE = 0.01
"""A deployed policy that delivers more than this less than it was asked, on a scenario, is said to fall short there."""

CAUSES = ("shed", "startup_lag", "trigger_lag", "capacity", "too_long", "failed")


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """One way to run a policy on the whole suite.

    Attributes:
        label: ``asked 98%`` or ``target 40``.
        asked: the attainment asked of it, or None.
        attainment: shape (num_scenarios, num_seeds).
        cost: same shape; GPU-hours over the scenario's reference.
        behaviour: means over all episodes: ``actions``, ``reversals``, and misses by cause over arrivals.
    """

    label: str
    asked: float | None
    attainment: FloatArray
    cost: FloatArray
    behaviour: dict[str, float]

    def scores(self, target: float) -> FloatArray:
        """Cost plus the price of falling short of a target, shape (num_scenarios, num_seeds)."""
        return np.asarray(self.cost + SHORTFALL_PRICE * np.maximum(0.0, target - self.attainment))


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """A policy with early refusal off or on, over the suite.

    Attributes:
        policy: what tables call it.
        registered: its name in the registry.
        refusal: early refusal off or on.
        settings: by increasing attainment asked, or knob value.
        attainment: of each setting, mean over the suite.
        cost: of each setting, mean over the suite.
        cost_at: at each target of suite attainment.
        against_focal: cost of the focal contender over this one's, at each target.
        chosen: index of the setting that is scored.
        score: interquartile mean of the scores.
        improvement: probability that the focal contender's score is better.
    """

    policy: str
    registered: str
    refusal: Refusal
    settings: tuple[Setting, ...]
    attainment: tuple[Estimate, ...]
    cost: tuple[Estimate, ...]
    cost_at: tuple[Estimate, ...]
    against_focal: tuple[Estimate, ...]
    chosen: int
    score: Estimate
    improvement: Estimate


@dataclass(frozen=True, slots=True, eq=False)
class Suite:
    """What a suite report says.

    Attributes:
        scenarios: that count.
        left_out: scenarios that do not, with the reason.
        targets: attainments.
        target: the one that scores refer to.
        focal: the contender that is compared with all others.
        contenders: all, the focal one first.
        fronts: per scenario and refusal.
        groups: per group and refusal.
        drawn: the resamples, for profiles.
        findings: of every scenario, those left out too.
    """

    scenarios: tuple[str, ...]
    left_out: dict[str, str]
    targets: tuple[float, ...]
    target: float
    focal: Contender
    contenders: tuple[Contender, ...]
    fronts: tuple[FrontRatio, ...]
    groups: tuple[FrontRatio, ...]
    drawn: IntArray
    findings: tuple[Findings, ...]


def analyse_suite(
    rows: Sequence[Row],
    findings: Sequence[Findings],
    groups: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
) -> Suite | None:
    """Findings over all scenarios together; None for fewer than two of them.

    Args:
        rows: of the benchmark.
        findings: of its scenarios (`analysis.analyse`).
        groups: names of the groups each scenario counts in.
        seed: of the bootstrap.
    """
    found, left_out = _covered(findings)
    if len(found) < 2:
        return None
    targets = found[0].targets
    names, seeds = tuple(one.scenario for one in found), found[0].seeds
    rng = np.random.default_rng(seed)
    drawn = seed_resamples(len(names), len(seeds), rng)
    reference = np.array([reference_hours(one) for one in found])
    runs = _settings(rows, names, seeds, reference)
    if not runs:
        return None
    asked = sorted({item.asked for _, settings in runs.values() for item in settings if item.asked is not None})
    target = REFERENCE_TARGET if REFERENCE_TARGET in asked or not asked else asked[len(asked) // 2]
    focal = _focal(runs, target)
    order = (focal, *(key for key in runs if key != focal))
    costs = {key: _cost_at(runs[key][1], targets, drawn) for key in order}
    contenders = tuple(_contender(key, runs, focal, costs, target, drawn) for key in order)
    fronts, of_groups = front_ratios(found, focal[0], groups, drawn)
    return Suite(names, left_out, targets, target, contenders[0], contenders, fronts, of_groups, drawn, tuple(findings))


def reference_hours(one: Findings) -> float:
    """GPU-hours of the cheapest rule at `REFERENCE_TARGET`, or at the highest target below it; NaN without any."""
    for k in sorted(range(len(one.targets)), key=lambda k: -one.targets[k]):
        rule = one.cheapest_rule(k)
        if one.targets[k] <= REFERENCE_TARGET and rule is not None:
            return rule.hours[k].value
    return float("nan")


def _covered(findings: Sequence[Findings]) -> tuple[list[Findings], dict[str, str]]:
    """Scenarios that count, and why the others do not."""
    learned = any(item.registered == LEARNED for one in findings for item in one.entries)
    most_seeds = max((one.seeds for one in findings), key=len, default=())
    found, left_out = [], {}
    for one in findings:
        if learned and not any(item.registered == LEARNED for item in one.entries):
            left_out[one.scenario] = "no trained policy has its pools and classes"
        elif one.seeds != most_seeds:
            left_out[one.scenario] = f"has only {len(one.seeds)} of {len(most_seeds)} seeds yet"
        elif np.isnan(reference_hours(one)):
            left_out[one.scenario] = "no rule reaches any of the attainments"
        else:
            found.append(one)
    return found, left_out


_Key = tuple[str, Refusal]
_Runs = dict[_Key, tuple[str, tuple[Setting, ...]]]


def _settings(rows: Sequence[Row], names: Sequence[str], seeds: Sequence[int], reference: FloatArray) -> _Runs:
    """The settings of every policy that were run on all scenarios and seeds, with its name in the registry."""
    by_setting: dict[_Key, dict[tuple[float | None, ...], dict[tuple[str, int], Row]]] = {}
    for row in rows:
        swept = (None, None) if row.asked_attainment is not None else (row.knob_value, row.tuned_for)
        place = (row.asked_attainment, *swept)
        mine = by_setting.setdefault((row.policy, row.refusal), {})
        mine.setdefault(place, {})[row.scenario, row.seed] = row
    wanted = [(name, seed) for name in names for seed in seeds]
    found: _Runs = {}
    for key, places in by_setting.items():
        whole = {place: cells for place, cells in places.items() if all(cell in cells for cell in wanted)}
        asked = {place: cells for place, cells in whole.items() if place[0] is not None}
        chosen = sorted((asked or whole).items(), key=lambda item: [value or 0.0 for value in item[0]])
        settings = tuple(
            _setting(place, [cells[cell] for cell in wanted], len(names), reference) for place, cells in chosen
        )
        if settings:
            found[key] = next(iter(chosen[0][1].values())).registered, settings
    return found


def _setting(
    place: tuple[float | None, ...], rows: Sequence[Row], num_scenarios: int, reference: FloatArray
) -> Setting:
    asked, value, tuned_for = place
    label = f"asked {asked:.3g}" if asked is not None else "" if value is None else f"{rows[0].knob} {value:.3g}"
    label += "" if tuned_for is None else f", tuned for {tuned_for:.3g}"

    def mean(*metrics: str) -> float:
        return float(np.mean([sum(row.metrics.get(name, np.nan) for name in metrics) for row in rows]))

    behaviour = {"actions": mean("scale_ups", "scale_downs"), "reversals": mean("reversals")}
    behaviour |= {cause: mean(f"missed/{cause}") for cause in CAUSES}
    attainment = np.array([row.slo_attainment for row in rows]).reshape(num_scenarios, -1)
    hours = np.array([row.gpu_hours for row in rows]).reshape(num_scenarios, -1)
    return Setting(label, asked, attainment, hours / reference[:, None], behaviour)


def _focal(runs: _Runs, target: float) -> _Key:
    """The learned policy (refusing if it can), else the policy with the best score that is not clairvoyant."""
    learned = [key for key, (registered, _) in runs.items() if registered == LEARNED and key[0] != BEST]
    if learned:
        return max(learned, key=lambda key: key[1] == "on")
    rules = [key for key, (registered, _) in runs.items() if registered != CLAIRVOYANT] or list(runs)
    return min(rules, key=lambda key: interquartile_mean(_scored(runs[key][1], target).scores(target)))


def _scored(settings: Sequence[Setting], target: float) -> Setting:
    """The setting that is scored: the one asked for the target; else the cheapest that attains it, else the best."""
    asked = [item for item in settings if item.asked is not None]
    if asked:
        return min(asked, key=lambda item: abs((item.asked or 0.0) - target))
    enough = [item for item in settings if item.attainment.mean() >= target]
    if enough:
        return min(enough, key=lambda item: float(item.cost.mean()))
    return max(settings, key=lambda item: float(item.attainment.mean()))


def _cost_at(settings: Sequence[Setting], targets: Sequence[float], drawn: IntArray) -> tuple[FloatArray, FloatArray]:
    """Cost at equal suite attainment: shapes (num_targets,) and, resampled, (num_resamples, num_targets)."""
    wanted = np.array(targets)
    attainment = np.array([item.attainment.mean() for item in settings])
    cost = np.array([item.cost.mean() for item in settings])
    resampled = [
        np.stack([resample(values, drawn).mean(axis=(1, 2)) for values in columns], axis=1)
        for columns in ([item.attainment for item in settings], [item.cost for item in settings])
    ]
    return hours_at(attainment, cost, wanted), np.stack(
        [hours_at(a, c, wanted) for a, c in zip(*resampled, strict=True)]
    )


def _contender(
    key: _Key,
    runs: _Runs,
    focal: _Key,
    costs: Mapping[_Key, tuple[FloatArray, FloatArray]],
    target: float,
    drawn: IntArray,
) -> Contender:
    registered, settings = runs[key]
    num_seeds = drawn.shape[2]
    value, resampled = costs[key]
    focal_value, focal_resampled = costs[focal]
    scored = _scored(settings, target)
    scores, best = scored.scores(target), _scored(runs[focal][1], target).scores(target)
    ratio = drawn_ratio(focal_resampled, resampled)
    return Contender(
        *(key[0], registered, key[1], settings),
        attainment=tuple(suite_mean(item.attainment, drawn) for item in settings),
        cost=tuple(suite_mean(item.cost, drawn) for item in settings),
        cost_at=tuple(estimate_of(v, resampled[:, k], num_seeds) for k, v in enumerate(value)),
        against_focal=tuple(estimate_of(focal_value[k] / value[k], ratio[:, k], num_seeds) for k in range(len(value))),
        chosen=settings.index(scored),
        score=interquartile_mean_estimate(scores, drawn),
        improvement=probability_of_improvement(best, scores, drawn),
    )
