"""What to deploy for an attainment, decided on traffic that is not the test's.

Somebody who runs a fleet asks two things before a policy goes live: at which setting does it deliver what was promised
*here*, and is it still the one to run? A trained policy is not the best everywhere (docs/results.md says where it
loses), and the traffic on record tells before the customers do. So every policy's knob is swept on the scenario's
history (envs/scenario.py), or on validation traffic, and of each the cheapest setting is kept that misses hardly more
than is allowed, or, where every setting does, hardly more than the best of them (`SLACK`): whoever asks for more never
gets a cheaper fixed setting (one that steers for an attainment counts if that is enough). Then a trained
policy stays unless a rule's loss (that of `tuning.py`: a point missing weighs a fifth of the trained policy's bill) is
better by more than `MARGIN` of that bill: the cheapest of ten rules on a few episodes looks better than it is. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.experiments.analysis import CLAIRVOYANT, NOT_ADAPTIVE
from rl_autoscale.experiments.episodes import Split
from rl_autoscale.experiments.grid import BenchmarkConfig, Cell, PolicySweep
from rl_autoscale.experiments.rows import Refusal, Row, plain
from rl_autoscale.experiments.tuning import loss

MARGIN = 0.03
"""Share of its GPU-hours that a rule must save for a trained policy to give way."""

SLACK = 1.1
"""Over the misses that are allowed, or that the best setting has: a few episodes cannot tell less from chance."""

FIRST_SEED = 1000
"""Of the episodes; on the first ones of validation traffic dials are measured (experiments/dial.py)."""

TIGHTER = (1.0, 0.6)
"""Shares of the allowed misses that a policy which can be asked is asked for, beside its knob's values."""

FOLDER = "choice"
"""In the run's folder: the episodes."""

BEST = "chosen beforehand"
"""What tables call the contender that runs, on each scenario, the policy chosen for it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One policy at one setting: means over the episodes it was tried on.

    Attributes:
        sweep: the policy.
        refusal: early refusal off or on.
        knob: name of the swept knob, None without one.
        knob_value: its value; None for a setting that was asked or tuned.
        knobs: all keyword arguments.
        slo_attainment: delivered.
        gpu_hours: spent.
    """

    sweep: PolicySweep
    refusal: Refusal
    knob: str | None
    knob_value: float | None
    knobs: dict[str, Any]
    slo_attainment: float
    gpu_hours: float

    @property
    def score(self) -> tuple[float, float]:
        """(attainment, GPU-hours)."""
        return self.slo_attainment, self.gpu_hours

    @property
    def aim(self) -> float | None:
        """The attainment that it steers for, by what it sees; None where its knob is fixed."""
        aim = self.knobs.get("attainment")
        return float(aim) if isinstance(aim, int | float) else None

    @property
    def may_be_chosen(self) -> bool:
        """Whether it is worth deploying: it needs no foresight, and follows traffic that grows."""
        return self.sweep.registered not in (CLAIRVOYANT, NOT_ADAPTIVE)


@dataclass(frozen=True, slots=True)
class Choice:
    """What to deploy on one scenario for one attainment.

    Attributes:
        scenario: name.
        refusal: early refusal off or on.
        asked: the attainment.
        settings: of every policy its best, by label.
        best: label of the one to run; None where no policy may be chosen.
    """

    scenario: str
    refusal: Refusal
    asked: float
    settings: dict[str, Candidate]
    best: str | None

    def to_json(self) -> list[dict[str, Any]]:
        """One record per policy."""
        return [
            {
                "scenario": self.scenario,
                "refusal": self.refusal,
                "asked_attainment": self.asked,
                "policy": label,
                "registered": item.sweep.registered,
                "knobs": plain(item.knobs),
                "slo_attainment": item.slo_attainment,
                "gpu_hours": item.gpu_hours,
                "best": label == self.best,
            }
            for label, item in self.settings.items()
        ]


def choice_split(scenario: Scenario, chosen_on: Literal["history", "validation"]) -> Split:
    """The traffic asked for; without a history validation traffic, and where every source holds a trace training's."""
    if chosen_on == "history" and scenario.history is not None:
        return "history"
    return "validation" if scenario.validation_sources else "train"


def trial_config(config: BenchmarkConfig) -> BenchmarkConfig:
    """The benchmark that is played to choose: every knob swept, refined around what is asked."""
    asked = config.asked or ()
    tighter = sorted({round(1.0 - (1.0 - share) * part, 6) for share in asked for part in TIGHTER})
    changes = {"num_seeds": config.choice_seeds, "first_seed": FIRST_SEED, "targets": asked, "asked": tuple(tighter)}
    return config.model_copy(update=changes)


def deployed(choices: Sequence[Choice], config: BenchmarkConfig) -> list[Cell]:
    """The test episodes of what was chosen: every policy at its setting, and the best of them as one more contender."""
    found = []
    for seed in range(config.first_seed, config.first_seed + config.num_seeds):
        for choice in choices:
            settings = list(choice.settings.values())
            if choice.best is not None:
                best = choice.settings[choice.best]
                settings.append(replace(best, sweep=best.sweep.model_copy(update={"label": BEST})))
            for item in settings:
                place = (choice.scenario, seed, item.sweep, choice.refusal)
                found.append(Cell(*place, item.knob, item.knob_value, item.knobs, choice.asked))
    return found


def choose(runs: Sequence[tuple[Cell, Row]], asked: Sequence[float]) -> list[Choice]:
    """What to deploy on every scenario, with and without refusal as far as it was run, for every attainment asked.

    Args:
        runs: episodes, of every setting the same seeds.
        asked: attainments, each in (0, 1).
    """
    groups: dict[tuple[str, Refusal], dict[str, dict[str, list[tuple[Cell, Row]]]]] = {}
    for cell, row in runs:
        policies = groups.setdefault((cell.scenario, cell.refusal), {})
        settings = policies.setdefault(cell.sweep.name, {})
        settings.setdefault(json.dumps(cell.knobs, sort_keys=True, default=str), []).append((cell, row))
    found = []
    for (scenario, refusal), policies in groups.items():
        candidates = {label: [_mean(tried) for tried in settings.values()] for label, settings in policies.items()}
        for share in asked:
            chosen = {label: best_setting(items, share) for label, items in candidates.items()}
            found.append(Choice(scenario, refusal, share, chosen, best_policy(chosen, share)))
    return found


def _mean(tried: Sequence[tuple[Cell, Row]]) -> Candidate:
    cell = tried[0][0]
    return Candidate(
        *(cell.sweep, cell.refusal, cell.knob),
        knob_value=cell.knob_value if cell.asked_attainment is None else None,
        knobs=dict(cell.knobs),
        slo_attainment=float(np.mean([row.slo_attainment for _, row in tried])),
        gpu_hours=float(np.mean([row.gpu_hours for _, row in tried])),
    )


def best_setting(candidates: Sequence[Candidate], asked: float) -> Candidate:
    """Of one policy the cheapest setting that misses hardly more than is allowed, or than the best setting does.

    A setting that aims at less than is asked is none: it would bring no more where the traffic is kinder than here.
    """
    candidates = [item for item in candidates if item.aim is None or item.aim >= asked] or candidates
    fewest = 1.0 - max(item.slo_attainment for item in candidates)
    most = SLACK * max(1.0 - asked, fewest) + 1e-12
    enough = [item for item in candidates if 1.0 - item.slo_attainment <= most]
    return min(enough, key=lambda item: item.gpu_hours)


def best_policy(settings: dict[str, Candidate], asked: float) -> str | None:
    """The label to run: a trained policy, unless a rule's loss is better by more than `MARGIN`; see the module."""
    able = {label: item for label, item in settings.items() if item.may_be_chosen}
    if not able:
        return None
    trained = {label: item for label, item in able.items() if item.sweep.trained}
    bill = min(item.gpu_hours for item in (trained or able).values())

    def handicapped(label: str) -> float:
        handicap = MARGIN if trained and label not in trained else 0.0
        return loss(able[label].score, asked, bill) + handicap

    return min(able, key=handicapped)
