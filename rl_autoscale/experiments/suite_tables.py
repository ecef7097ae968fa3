"""A suite's findings as tables, in the form that the terminal, markdown, HTML and JSON all print."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rl_autoscale.experiments.analysis import Findings
from rl_autoscale.experiments.statistics import Estimate
from rl_autoscale.experiments.suite_analysis import (
    CAUSES,
    REFERENCE_TARGET,
    TOLERANCE,
    Contender,
    Setting,
    Suite,
)
from rl_autoscale.experiments.suite_fronts import FrontRatio
from rl_autoscale.experiments.tables import NOT_REACHED, Cell, Table, interval
from rl_autoscale.experiments.tuning import SHORTFALL_PRICE

_COST = (
    f"Cost: GPU-hours over those of the cheapest rule in hindsight at {REFERENCE_TARGET:.0%}, averaged over scenarios."
)
_CAUSES = dict(zip(CAUSES, ("shed", "start-up lag", "trigger lag", "capacity", "too long", "failed"), strict=True))


def suite_tables(suite: Suite) -> list[Table]:
    """Every table of a suite report, the most asked for first."""
    return [
        deployment_table(suite),
        equal_attainment_table(suite),
        groups_table(suite),
        unseen_table(suite),
        scenarios_table(suite),
        scores_table(suite),
        behaviour_table(suite),
        matrix_table(suite),
    ]


def suite_summary(suite: Suite) -> list[str]:
    """Sentences for the top: what counts, wins and losses, in numbers."""
    focal = suite.focal
    wins, losses, ties = _verdicts(suite)
    lines = [
        f"{len(suite.scenarios)} scenarios count. {focal.policy} (early refusal {focal.refusal}) against the cheapest "
        "rule of each scenario, its knob chosen in hindsight, at every attainment reported: cheaper in "
        f"{wins} of {wins + losses + ties} comparisons, dearer in {losses}, undecided in {ties}."
    ]
    if suite.left_out:
        reasons: dict[str, list[str]] = {}
        for name, reason in suite.left_out.items():
            reasons.setdefault(reason, []).append(name)
        lines.append("Left out: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()) + ".")
    return lines


def deployment_table(suite: Suite) -> Table:
    """Every setting of every policy on the whole suite."""
    rows = []
    for item in suite.contenders:
        for setting, attainment, cost in zip(item.settings, item.attainment, item.cost, strict=True):
            short = [] if setting.asked is None else _short_of(setting, suite.scenarios)
            rows.append(
                (
                    *_who(item),
                    Cell(setting.label),
                    Cell(
                        _share(attainment),
                        strong=setting.asked is not None and attainment.value < setting.asked,
                        short=f"{attainment.value:.2%}",
                    ),
                    Cell(f"{setting.attainment.mean(axis=1).min():.1%}"),
                    Cell(
                        "-" if setting.asked is None else ", ".join(short) or "none",
                        strong=bool(short),
                        short=_count(short, setting),
                    ),
                    Cell(interval(cost), short=f"{cost.value:.3f}"),
                )
            )
    return Table(
        "Deployed on the whole suite",
        "None chosen on test traffic: an attainment asked, or one knob value for all scenarios. "
        f"Bold: less than asked. Short: scenarios with more than {TOLERANCE:.0%} less than asked. {_COST}",
        ("policy", "refusal", "setting", "delivered", "worst scenario", "short", "cost"),
        tuple(rows),
        num_text=3,
        interval_note=_INTERVALS,
    )


def equal_attainment_table(suite: Suite) -> Table:
    """What each deployed policy costs for equal suite attainment, and the focal policy against it."""
    rows = []
    for item in suite.contenders:
        cells = [Cell(interval(e), short=f"{e.value:.3f}" if e.reached else "") for e in item.cost_at]
        against = [_change(e, item is suite.focal) for e in item.against_focal]
        rows.append((*_who(item), *cells, *against))
    return Table(
        "Cost at equal suite attainment, deployed",
        f"Interpolated between a policy's settings, never beyond them. {_COST} Then: {suite.focal.policy} against it, "
        "negative is cheaper. Bold: it loses.",
        (
            *("policy", "refusal"),
            *(f"{target:.0%}" for target in suite.targets),
            *(f"at {target:.0%}" for target in suite.targets),
        ),
        tuple(rows),
        interval_note=_INTERVALS,
    )


def groups_table(suite: Suite) -> Table:
    """Against the best rule in hindsight, mean over groups of scenarios."""
    rows = []
    for item in suite.groups:
        counts = f"{min(item.num_scenarios)}-{max(item.num_scenarios)}"
        rows.append(
            (
                *(Cell(item.name), Cell(item.refusal)),
                Cell(counts if min(item.num_scenarios) < max(item.num_scenarios) else str(item.num_scenarios[0])),
                *_ratio_cells(item),
                *(_gap(share) for share in item.gap_closed),
                Cell(str(max(item.only_rule)), strong=max(item.only_rule) > 0),
            )
        )
    return Table(
        f"Fronts: {suite.focal.policy} against the best rule in hindsight",
        "Change in GPU-hours at equal attainment, geometric mean over scenarios on which both get there. The best rule "
        "is chosen anew for each scenario and attainment, its knob on the test traffic. Bold: it loses. Then: share "
        "of the way from the best rule to the clairvoyant plan. Last: scenarios where only the rule gets there.",
        (
            *("group", "refusal", "scenarios"),
            *(f"{target:.0%}" for target in suite.targets),
            *(f"gap {target:.0%}" for target in suite.targets),
            "only rule",
        ),
        tuple(rows),
        interval_note=_INTERVALS,
    )


def unseen_table(suite: Suite) -> Table:
    """The same with the rule chosen on other seeds than it is compared on."""
    rows = [
        (
            *(Cell(item.name), Cell(item.refusal)),
            *(
                Cell("-" if math.isnan(ratio) else f"{ratio - 1:+.1%} ({seeds})", strong=ratio > 1.0)
                for ratio, seeds in zip(item.rule_unseen, item.num_unseen, strict=True)
            ),
        )
        for item in suite.groups
    ]
    return Table(
        f"Fronts: {suite.focal.policy} against the rule that was best on the other seeds",
        "Change in GPU-hours at equal attainment on each seed of traffic, against the rule that is cheapest on the "
        "others; the knobs of both are in hindsight still. A rule that is chosen where it is measured is partly lucky: "
        "what this differs by from the table above is its luck. Geometric mean over seeds on which both get there (how "
        "many), then over scenarios. Seeds of a trace share its hour of traffic, so there hindsight remains. Bold: it "
        "loses.",
        ("group", "refusal", *(f"{target:.0%}" for target in suite.targets)),
        tuple(rows),
    )


def scenarios_table(suite: Suite) -> Table:
    """The same, scenario by scenario."""
    k = _place_of_target(suite)
    rows = [
        (Cell(item.name), Cell(item.refusal), Cell(item.best[k] or "-"), *_ratio_cells(item), _gap(item.gap_closed[k]))
        for item in suite.fronts
    ]
    return Table(
        f"{suite.focal.policy} against the best rule in hindsight, per scenario",
        f"Best rule and gap to the clairvoyant plan: at {suite.targets[k]:.0%}. Bold: it loses.",
        ("scenario", "refusal", "best rule", *(f"{target:.0%}" for target in suite.targets), "gap closed"),
        tuple(rows),
        num_text=3,
        interval_note=_INTERVALS,
    )


def scores_table(suite: Suite) -> Table:
    """Interquartile means, and how likely the focal policy is better."""
    rows = []
    for item in sorted(suite.contenders, key=lambda item: item.score.value):
        focal = item is suite.focal
        chance = item.improvement
        loses = not focal and chance.value < 0.5
        rows.append(
            (
                *_who(item),
                Cell(item.settings[item.chosen].label),
                Cell(interval(item.score), short=f"{item.score.value:.3f}"),
                Cell(
                    "" if focal else _share(chance, digits=0),
                    strong=loses,
                    tone="loss" if loses else "",
                    short="" if focal else f"{chance.value:.0%}",
                ),
            )
        )
    return Table(
        "Scores and probability of improvement",
        f"Score of an episode: its cost plus {SHORTFALL_PRICE:g} times what it stays below {suite.target:.0%}; "
        "interquartile mean over scenarios and seeds, less is better. A policy that cannot be asked has the knob value "
        f"that is best for it on this suite. Last: how likely {suite.focal.policy} has the better score on a scenario "
        "drawn at random.",
        ("policy", "refusal", "setting", "score (IQM)", "focal better"),
        tuple(rows),
        num_text=3,
        interval_note=_INTERVALS,
    )


def behaviour_table(suite: Suite) -> Table:
    """Scaling actions, and where the misses came from."""
    rows = []
    for item in suite.contenders:
        setting = item.settings[item.chosen]
        found = setting.behaviour
        causes = [Cell("-" if math.isnan(found[cause]) else f"{found[cause]:.2%}") for cause in CAUSES]
        counts = [Cell(f"{found[name]:.1f}") for name in ("actions", "reversals")]
        rows.append((*_who(item), Cell(setting.label), *counts, *causes))
    return Table(
        "What they did, and where their misses came from",
        "Changes of target and reversals, mean per episode. Misses over arrivals, each with exactly one cause: shed "
        "(refused early), start-up lag (replicas asked for, not ready), trigger lag (not asked for), capacity (at a "
        "bound), too long (on an idle replica too), failed (crash).",
        ("policy", "refusal", "setting", "changes", "reversals", *_CAUSES.values()),
        tuple(rows),
        num_text=3,
    )


_INTERVALS = "In brackets: 95 % bootstrap intervals over seeds, of a few seeds hardly more than their range."


def matrix_table(suite: Suite) -> Table:
    """Every policy in every scenario, those that no trained policy fits as well."""
    k = _place_of_target(suite)
    policies = dict.fromkeys(item.policy for one in suite.findings for item in one.entries)
    rows = []
    for one in suite.findings:
        rule = one.cheapest_rule(k)
        best = math.nan if rule is None else rule.hours[k].value
        rows.append((Cell(one.scenario), *(_in_matrix(one, name, k, best) for name in policies)))
    return Table(
        f"GPU-hours at {suite.targets[k]:.0%}, every policy in every scenario",
        "Knob in hindsight, the cheaper of with and without early refusal. Bold: the cheapest rule, and whatever is no "
        "dearer. In brackets: not reached; the most that it attained, and at what.",
        ("scenario", *policies),
        tuple(rows),
        num_text=1,
    )


def _in_matrix(one: Findings, policy: str, k: int, best: float) -> Cell:
    entries = [item for item in one.entries if item.policy == policy]
    if not entries:
        return Cell("-")
    reached = [item.hours[k].value for item in entries if item.hours[k].reached]
    if reached:
        return Cell(f"{min(reached):.3g}", strong=min(reached) <= best)
    points = [point for item in entries for point in zip(*item.sweep.mean(), strict=True)]
    attainment, hours = max(points, key=lambda point: (point[0], -point[1]))
    return Cell(f"({attainment:.1%}, {hours:.3g})")


def _place_of_target(suite: Suite) -> int:
    return suite.targets.index(suite.target) if suite.target in suite.targets else len(suite.targets) - 1


def _who(item: Contender) -> tuple[Cell, Cell]:
    return Cell(item.policy), Cell(item.refusal)


def _short_of(setting: Setting, names: Sequence[str]) -> list[str]:
    """Scenarios that got less than asked by more than the tolerance."""
    delivered = setting.attainment.mean(axis=1)
    return [name for name, share in zip(names, delivered, strict=True) if share < (setting.asked or 0.0) - TOLERANCE]


def _count(short: Sequence[str], setting: Setting) -> str:
    return "-" if setting.asked is None else f"{len(short)} of {len(setting.attainment)}"


def _share(estimate: Estimate, digits: int = 2) -> str:
    if math.isnan(estimate.low):
        return f"{estimate.value:.{digits}%}"
    return f"{estimate.value:.{digits}%} [{estimate.low:.{digits}%}, {estimate.high:.{digits}%}]"


def _change(ratio: Estimate, is_focal: bool) -> Cell:
    """``-12.0% [-15.0%, -9.0%]``."""
    if is_focal:
        return Cell("")
    if not ratio.reached:
        return Cell(NOT_REACHED, short="-")
    short = f"{ratio.value - 1:+.1%}"
    loses, wins = _loses(ratio), ratio.high < 1.0
    if math.isnan(ratio.low):
        return Cell(short, strong=loses, tone="loss" if loses else "", short=short)
    high = "∞" if math.isinf(ratio.high) else f"{ratio.high - 1:+.1%}"
    return Cell(f"{short} [{ratio.low - 1:+.1%}, {high}]", loses, "loss" if loses else "win" if wins else "", short)


def _loses(ratio: Estimate) -> bool:
    """Dearer for sure; with one seed, dearer."""
    return ratio.value > 1.0 if math.isnan(ratio.low) else ratio.low > 1.0


def _ratio_cells(item: FrontRatio) -> list[Cell]:
    return [_change(ratio, is_focal=False) for ratio in item.ratio]


def _gap(share: float) -> Cell:
    return Cell("-" if np.isnan(share) else f"{share:+.0%}", strong=share < 0)


def _verdicts(suite: Suite) -> tuple[int, int, int]:
    """(wins, losses, undecided) over scenarios and targets, with the focal policy's own refusal setting.

    Where one of the two alone gets there it wins.
    """
    fronts = [item for item in suite.fronts if item.refusal == suite.focal.refusal]
    ratios = [ratio for item in fronts for ratio in item.ratio if ratio.reached]
    wins, losses = sum(ratio.high < 1.0 for ratio in ratios), sum(_loses(ratio) for ratio in ratios)
    alone, left = (sum(sum(getattr(item, name)) for item in fronts) for name in ("only_focal", "only_rule"))
    return wins + alone, losses + left, len(ratios) - wins - losses
