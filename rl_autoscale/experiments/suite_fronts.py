"""Fronts over many scenarios: the focal policy against the best rule in hindsight, per scenario and per group. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rl_autoscale.experiments.analysis import CLAIRVOYANT, Entry, Findings
from rl_autoscale.experiments.rows import Refusal
from rl_autoscale.experiments.statistics import (
    Estimate,
    FloatArray,
    IntArray,
    Sweep,
    drawn_ratio,
    estimate_of,
    resampled_hours,
)
from rl_autoscale.experiments.suite_statistics import geometric_mean

ALL = "all"
_REFUSALS: tuple[Refusal, ...] = ("off", "on")


@dataclass(frozen=True, slots=True)
class FrontRatio:
    """GPU-hours of the focal policy over the best rule in hindsight: on one scenario, or the mean of a group.

    Attributes:
        name: of the scenario or group.
        refusal: of the focal policy; with ``off`` the rules do not refuse either, with ``on`` they may.
        best: the cheapest rule at each target, empty where none gets there; no entries for a group.
        ratio: at each target, geometric mean over a group; below 1 the focal policy is cheaper.
        gap_closed: share of the way from the best rule to the clairvoyant plan; over a group, of the summed gaps, each
            relative to its best rule. A scenario in which the plan is no cheaper has none.
        num_scenarios: how many count at each target: those on which both get there.
        only_rule: on how many only the rule gets there.
        only_focal: on how many only the focal policy.
        rule_unseen: the ratio on each seed of traffic against the rule that is cheapest on the *other* seeds, both
            knobs in hindsight still; geometric mean over seeds on which both get there. What it differs from
            ``ratio`` by is the luck of a rule that is chosen where it is measured.
        num_unseen: on how many seeds, over all scenarios.
    """

    name: str
    refusal: Refusal
    best: tuple[str, ...]
    ratio: tuple[Estimate, ...]
    gap_closed: tuple[float, ...]
    num_scenarios: tuple[int, ...]
    only_rule: tuple[int, ...]
    only_focal: tuple[int, ...]
    rule_unseen: tuple[float, ...]
    num_unseen: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Hours:
    """On one scenario, shapes (num_targets,) and (num_resamples, num_targets); NaN where not reached.

    ``unseen`` has shape (num_seeds, num_targets): see `FrontRatio.rule_unseen`.
    """

    scenario: str
    focal: FloatArray
    rule: FloatArray
    oracle: FloatArray
    names: tuple[str, ...]
    focal_drawn: FloatArray
    rule_drawn: FloatArray
    unseen: FloatArray


def front_ratios(
    findings: Sequence[Findings], policy: str, groups: Mapping[str, Sequence[str]], drawn: IntArray
) -> tuple[tuple[FrontRatio, ...], tuple[FrontRatio, ...]]:
    """Ratios per scenario and per group, for the focal policy with refusal off and on, as far as it was run.

    Args:
        findings: of the scenarios that count.
        policy: name of the focal policy.
        groups: names of the groups each scenario counts in.
        drawn: resamples of seeds, in the order of the findings.
    """
    per_scenario: list[FrontRatio] = []
    per_group: list[FrontRatio] = []
    kinds = list(dict.fromkeys(group for one in findings for group in groups.get(one.scenario, ())))
    for refusal in _REFUSALS:
        hours = [_hours(one, policy, refusal, drawn[:, i]) for i, one in enumerate(findings)]
        known = [item for item in hours if item is not None]
        num_seeds = drawn.shape[2]
        per_scenario += [_ratio(item.scenario, refusal, [item], num_seeds, item.names) for item in known]
        for group in (ALL, *kinds) if known else ():
            members = [item for item in known if group == ALL or group in groups.get(item.scenario, ())]
            per_group.append(_ratio(group, refusal, members, num_seeds))
    return tuple(per_scenario), tuple(per_group)


def _hours(one: Findings, policy: str, refusal: Refusal, drawn: IntArray) -> _Hours | None:
    focal = one.entry(policy, refusal)
    allowed = [item for item in one.entries if item is not focal and (refusal == "on" or item.refusal == "off")]
    rules = [item for item in allowed if item.is_rule and item.policy != policy]
    oracles = [item for item in allowed if item.registered == CLAIRVOYANT]
    if focal is None or not rules:
        return None
    values = np.array([[estimate.value for estimate in item.hours] for item in rules])
    cheapest = np.where(np.isnan(values), np.inf, values)
    names = tuple(
        _described(rules[best]) if np.isfinite(cheapest[best, k]) else ""
        for k, best in enumerate(cheapest.argmin(axis=0))
    )
    wanted = np.array(one.targets)
    drawn_hours = [np.nan_to_num(resampled_hours(item.sweep, wanted, drawn), nan=np.inf) for item in rules]
    return _Hours(
        one.scenario,
        focal=np.array([estimate.value for estimate in focal.hours]),
        rule=_or_nan(cheapest.min(axis=0)),
        oracle=_or_nan(np.array([[e.value for e in item.hours] for item in oracles])) if oracles else _nothing(wanted),
        names=names,
        focal_drawn=np.nan_to_num(resampled_hours(focal.sweep, wanted, drawn), nan=np.inf),
        rule_drawn=np.min(drawn_hours, axis=0),
        unseen=_against_rule_unseen(focal.sweep, [item.sweep for item in rules], wanted),
    )


def _against_rule_unseen(focal: Sweep, rules: Sequence[Sweep], targets: FloatArray) -> FloatArray:
    """Hours of the focal policy on each seed over those of the rule that is cheapest on the others."""
    seeds = np.arange(focal.num_seeds)
    if len(seeds) < 2:
        return np.full((len(seeds), len(targets)), np.nan)
    others = np.array([np.delete(seeds, seed) for seed in seeds])
    elsewhere = np.nan_to_num([resampled_hours(rule, targets, others) for rule in rules], nan=np.inf)
    here = np.array([resampled_hours(rule, targets, seeds[:, None]) for rule in rules])
    chosen = np.take_along_axis(here, elsewhere.argmin(axis=0)[None], axis=0)[0]
    known = np.isfinite(elsewhere.min(axis=0))
    return np.asarray(np.where(known, resampled_hours(focal, targets, seeds[:, None]) / chosen, np.nan))


def _ratio(
    name: str, refusal: Refusal, members: Sequence[_Hours], num_seeds: int, best: tuple[str, ...] = ()
) -> FrontRatio:
    """One line of a table: the members' ratios and gaps, averaged."""
    focal, rule, oracle = (np.array([getattr(item, part) for item in members]) for part in ("focal", "rule", "oracle"))
    both = np.isfinite(focal) & np.isfinite(rule)
    unseen = np.array([item.unseen for item in members])
    ratios, gaps, unseen_ratios = [], [], []
    for k in range(focal.shape[1]):
        use = np.flatnonzero(both[:, k])
        value = float(geometric_mean(focal[use, k] / rule[use, k])) if len(use) else float("nan")
        ratios.append(estimate_of(value, _drawn_ratio([members[int(i)] for i in use], k), num_seeds))
        known = use[oracle[use, k] < rule[use, k]]
        gained = float((1.0 - focal[known, k] / rule[known, k]).sum())
        possible = float((1.0 - oracle[known, k] / rule[known, k]).sum())
        gaps.append(gained / possible if possible > 0 else float("nan"))
        unseen_ratios.append(_mean_over_scenarios(unseen[:, :, k]))
    return FrontRatio(
        *(name, refusal, best, tuple(ratios), tuple(gaps)),
        num_scenarios=tuple(both.sum(axis=0).tolist()),
        only_rule=tuple((np.isnan(focal) & np.isfinite(rule)).sum(axis=0).tolist()),
        only_focal=tuple((np.isfinite(focal) & np.isnan(rule)).sum(axis=0).tolist()),
        rule_unseen=tuple(unseen_ratios),
        num_unseen=tuple(np.isfinite(unseen).sum(axis=(0, 1)).tolist()),
    )


def _mean_over_scenarios(ratios: FloatArray) -> float:
    """Of shape (num_scenarios, num_seeds): geometric mean over the seeds that count, then over scenarios."""
    means = [geometric_mean(row[np.isfinite(row)]) for row in ratios if np.isfinite(row).any()]
    return float(geometric_mean(np.array(means))) if means else float("nan")


def _drawn_ratio(members: Sequence[_Hours], k: int) -> FloatArray:
    """Resampled geometric mean of the ratios at target k; infinite where the focal policy does not get there."""
    if not members:
        return np.full(1, np.inf)
    focal = np.stack([item.focal_drawn[:, k] for item in members])
    rule = np.stack([item.rule_drawn[:, k] for item in members])
    # where only the rule is missing the focal policy is infinitely cheaper; a tiny ratio keeps the logarithm finite
    return geometric_mean(np.maximum(drawn_ratio(focal, rule), 1e-9))


def _described(item: Entry) -> str:
    return item.policy if item.refusal == "off" else f"{item.policy} (refuses)"


def _or_nan(hours: FloatArray) -> FloatArray:
    """Infinite becomes NaN; of several rows the cheapest."""
    cheapest = np.where(np.isnan(hours), np.inf, hours)
    cheapest = cheapest.min(axis=0) if cheapest.ndim == 2 else cheapest
    return np.where(np.isinf(cheapest), np.nan, cheapest)


def _nothing(targets: FloatArray) -> FloatArray:
    return np.full(len(targets), np.nan)
