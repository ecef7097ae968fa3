"""What a benchmark is made of: its configuration, the episodes it asks for, and where it looks closer.

A sweep is first run at a policy's own knob values (or some of them), then *refined*: where a reported attainment falls
between two points of the front, the knob half-way between them is run too. So claims at equal attainment interpolate
over short distances, and every policy gets the same number of refinements.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rl_autoscale.agents.policy_file import price_sweep, read_card
from rl_autoscale.agents.registry import policy_class
from rl_autoscale.experiments.episodes import Split, check_policy, is_whole
from rl_autoscale.experiments.rows import Refusal, Row
from rl_autoscale.experiments.search_spaces import TUNED_SUFFIX, search_space
from rl_autoscale.experiments.statistics import TARGETS, FloatArray, front_indices
from rl_autoscale.experiments.tuning import TuningResult
from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import SpecError

BESIDE = 0.1
"""How far beside its tuned value a knob is swept, as a share of its range, where constants were searched for several
attainments."""
RESOLUTION = 0.002
"""Neighbours on a front closer than this in attainment are not refined further."""

DEFAULT_POLICIES = (
    "static", "headroom", "headroom-tuned", "hpa", "hpa-tuned",
    "chiron-literal", "chiron-robust", "chiron-tuned", "oracle",
)  # fmt: skip


class PolicySweep(Config):
    """One policy and the values of its knob to try."""

    policy: str = Field(description="a registered name, or <name>-tuned")
    label: str | None = Field(default=None, description="what tables call it; default the policy's name")
    values: tuple[float, ...] | None = Field(default=None, description="knob values; default the policy's own sweep")
    knobs: dict[str, Any] = Field(default_factory=dict, description="other keyword arguments, for example path")

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.label or self.policy

    @property
    def tuned(self) -> bool:
        """Whether its constants are searched first."""
        return self.policy.endswith(TUNED_SUFFIX)

    @property
    def trained(self) -> bool:
        """Whether it is an exported policy, which runs only on fleets of its schema."""
        return "path" in self.knobs

    @property
    def registered(self) -> str:
        """The name in the registry."""
        return search_space(self.policy).base if self.tuned else self.policy


def default_sweep(sweep: PolicySweep) -> tuple[float, ...]:
    """The knob values to try where none are given: an exported policy's own range of prices, else the rule's."""
    if sweep.trained:
        return price_sweep(read_card(Path(str(sweep.knobs["path"]))))
    knob = policy_class(sweep.registered).KNOB
    return () if knob is None else knob.sweep


class BenchmarkConfig(Config):
    """What to compare."""

    scenarios: tuple[str, ...] = Field(min_length=1, description="shipped names, or paths that end in .yaml")
    policies: tuple[PolicySweep, ...] = Field(min_length=1)
    num_seeds: PositiveInt = 5
    first_seed: NonNegativeInt = 0
    refusal: tuple[Refusal, ...] = Field(
        default=("off", "on"), min_length=1, description="early refusal off, on, or both"
    )
    refusal_strictness: PositiveFloat = Field(
        default=1.0, description="rules refuse when the estimated TTFT exceeds this times the SLO"
    )
    max_knob_values: PositiveInt | None = Field(default=None, description="thin every sweep to so many values")
    refinements: NonNegativeInt = Field(default=2, description="rounds of added knob values around each target")
    targets: tuple[float, ...] = Field(default=TARGETS, min_length=1, description="attainments that are reported")
    span_s: PositiveFloat | None = Field(default=None, description="cut the test traffic, for quick looks")
    tune_episodes: PositiveInt = Field(
        default=96, description="training episodes per tuned rule and attainment, the same for all"
    )
    tune_hours: PositiveFloat | Literal["as-trained"] | None = Field(
        default=None,
        description="simulated hours per tuned rule and attainment instead; as-trained: what the learned policy got",
    )
    tune_seeds: PositiveInt = Field(default=4, description="training episodes each candidate is judged on")
    tune_episode_s: PositiveFloat | None = Field(default=None, description="their length; default the scenario's")
    tune_history: bool = Field(
        default=False, description="every second of them is of the fleet's own history, where the scenario has one"
    )
    tune_target: float = Field(default=0.98, gt=0, lt=1, description="attainment the rules are tuned for")
    asked: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        description="attainments asked of deployed policies, constants of rules are searched for each; "
        "default tune_target of rules, and the targets of policies that can be asked",
    )
    chosen_on: Literal["history", "validation"] | None = Field(
        default=None,
        description="find the setting of every policy for every attainment asked, and the policy to run, on this "
        "traffic of each scenario, and deploy them on the test (choice.py)",
    )
    choice_seeds: PositiveInt = Field(default=8, description="episodes of it that each setting is judged on")

    @model_validator(mode="after")
    def _check(self) -> BenchmarkConfig:
        if not all(0 < target < 1 for target in self.targets):
            raise ValueError("targets must lie between 0 and 1")
        if not all(0 < target < 1 for target in self.asked or ()):
            raise ValueError("asked must lie between 0 and 1")
        if self.chosen_on is not None and self.asked is None:
            raise ValueError("chosen_on needs the attainments to choose for; give asked, for example [0.95, 0.98]")
        if self.tune_hours == "as-trained" and not any(item.trained for item in self.policies):
            raise ValueError("tune_hours=as-trained needs a learned policy among the policies; add one or give hours")
        for kind, names in (
            # trained policies may share one: suites.py lets one of them run on each scenario
            ("policy label", [item.name for item in self.policies if not item.trained]),
            ("scenario", list(self.scenarios)),
        ):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"every {kind} must differ; repeated: {', '.join(repeated)}")
        return self


@dataclass(frozen=True, slots=True)
class Cell:
    """One episode of the grid."""

    scenario: str
    seed: int
    sweep: PolicySweep
    refusal: Refusal
    knob: str | None
    knob_value: float | None
    knobs: dict[str, Any]
    asked_attainment: float | None = None
    split: Split = "test"
    tuned_for: float | None = None


def parse_policies(words: Sequence[str]) -> tuple[PolicySweep, ...]:
    """Policies as the command line names them: ``hpa``, ``chiron-tuned``, ``learned=FOLDER``, or just a folder.

    Several trained policies are told apart by the name of their folder.

    Raises:
        UnknownNameError: no such policy.
        SpecError: a tuned variant that does not exist, or another name than ``learned`` before a folder.
    """
    sweeps = []
    for word in words:
        name, _, path = word.partition("=")
        if not path and (word.endswith((".json", ".onnx")) or "/" in word or Path(word).is_dir()):
            name, path = "learned", word
        if path and name != "learned":
            raise SpecError(
                f"'{word}': only trained policies are in folders; write learned={path}, or the folder alone"
            )
        if path:
            found = Path(path).parent if path.endswith(".onnx") else Path(path)
            sweeps.append(PolicySweep(policy=name, knobs={"path": str(found)}))
        else:
            sweeps.append(PolicySweep(policy=name))
    labels = [sweep.name for sweep in sweeps]
    return tuple(
        sweep.model_copy(update={"label": f"{sweep.name} {Path(str(sweep.knobs['path'])).name}"})
        if labels.count(sweep.name) > 1 and "path" in sweep.knobs
        else sweep
        for sweep in sweeps
    )


def grid(
    config: BenchmarkConfig,
    sweeps: Mapping[str, Sequence[PolicySweep]],
    tuned: Mapping[tuple[str, str, Refusal], Sequence[TuningResult]],
) -> list[Cell]:
    """All episodes, those that share a workload together.

    Args:
        config: what to compare.
        sweeps: who runs, by name of the scenario (`suites.sweeps_that_fit`).
        tuned: by (scenario, name of the sweep, refusal): constants for each attainment they were searched for.
    """
    seeds = range(config.first_seed, config.first_seed + config.num_seeds)
    return [
        cell
        for scenario in sweeps
        for seed in seeds
        for sweep in sweeps[scenario]
        for refusal in config.refusal
        for cell in _sweep_cells(config, sweep, scenario, seed, refusal, tuned.get((scenario, sweep.name, refusal), ()))
    ]


def _sweep_cells(
    config: BenchmarkConfig,
    sweep: PolicySweep,
    scenario: str,
    seed: int,
    refusal: Refusal,
    results: Sequence[TuningResult],
) -> list[Cell]:
    knob = policy_class(sweep.registered).KNOB
    base = (
        {**sweep.knobs, **refusal_knobs(sweep, refusal, config.refusal_strictness)}
        if not results
        else dict(results[0].knobs)
    )
    cell = Cell(scenario, seed, sweep, refusal, None if knob is None else knob.name, None, base)
    if knob is None:
        return [cell]
    values = thin(sweep.values or default_sweep(sweep), config.max_knob_values)
    swept = [(cell, values)]
    if len(results) > 1:
        swept = [
            (
                replace(cell, knobs=result.knobs, tuned_for=result.asked_attainment),
                values if sweep.values else _around(result, knob.name),
            )
            for result in results
        ]
    cells = [
        replace(one, knob_value=value, knobs={**one.knobs, knob.name: value})
        for one, around in swept
        for value in around
    ]
    for result in results:
        if config.asked is None or result.asked_attainment in config.asked:
            chosen = float(result.knobs[knob.name])
            deployed = replace(cell, knob_value=chosen, knobs=dict(result.knobs))
            cells.append(replace(deployed, asked_attainment=result.asked_attainment))
    if not results and "attainment" in policy_class(sweep.registered).knob_names():
        asked = config.targets if config.asked is None else config.asked
        cells += [replace(cell, knobs={**base, "attainment": one}, asked_attainment=one) for one in asked]
    return cells


def _around(result: TuningResult, knob: str) -> tuple[float, ...]:
    """The knob as it was tuned, and a little to both sides: constants for one attainment serve those beside it."""
    tuned, dimension = float(result.knobs[knob]), search_space(result.policy).dimensions[0]
    beside = (dimension.value(min(max(dimension.unit(tuned) + step, 0.0), 1.0)) for step in (-BESIDE, BESIDE))
    whole = is_whole(policy_class(search_space(result.policy).base), knob)
    return tuple(sorted({tuned, *(float(round(value)) if whole else value for value in beside)}))


def thin(values: tuple[float, ...], at_most: int | None) -> tuple[float, ...]:
    """Evenly spaced members of a sweep, both ends kept."""
    if at_most is None or len(values) <= at_most:
        return values
    return tuple(values[k] for k in np.unique(np.linspace(0, len(values) - 1, at_most).round().astype(int)))


def refusal_knobs(sweep: PolicySweep, refusal: Refusal, strictness: float) -> dict[str, Any]:
    """Rules get a fixed strictness, or none; a policy that decides it (default None) is left alone, or switched off."""
    parameter = inspect.signature(policy_class(sweep.registered)).parameters.get("admission")
    if parameter is None or "admission" in sweep.knobs:
        return {}
    if parameter.default is None:
        return {} if refusal == "on" else {"admission": float("inf")}
    return {"admission": strictness} if refusal == "on" else {}


def refine(done: Sequence[tuple[Cell, Row]], targets: tuple[float, ...]) -> list[Cell]:
    """The cells of one refinement: per sweep, the knob half-way across the front's gap around each target.

    Args:
        done: every cell of the grid with its row.
        targets: attainments that are reported.

    Returns:
        New cells, all seeds of each new knob value, those that share a workload together.
    """
    groups: dict[tuple[str, str, Refusal, float | None], list[tuple[Cell, Row]]] = {}
    for cell, row in done:
        if cell.knob_value is not None and cell.asked_attainment is None:
            place = (cell.scenario, cell.sweep.name, cell.refusal, cell.tuned_for)
            groups.setdefault(place, []).append((cell, row))
    added = []
    for group in groups.values():
        values = np.array(sorted({cell.knob_value for cell, _ in group if cell.knob_value is not None}))
        points = [[row for cell, row in group if cell.knob_value == value] for value in values]
        attainment = np.array([np.mean([row.slo_attainment for row in rows]) for rows in points])
        hours = np.array([np.mean([row.gpu_hours for row in rows]) for rows in points])
        chosen = policy_class(group[0][0].sweep.registered)
        for value in _between(values, attainment, hours, targets, whole=is_whole(chosen, str(group[0][0].knob))):
            for cell in {cell.seed: cell for cell, _ in group}.values():
                added.append(replace(cell, knob_value=value, knobs={**cell.knobs, str(cell.knob): value}))
    return sorted(added, key=lambda cell: (cell.scenario, cell.seed))


def _between(
    values: FloatArray, attainment: FloatArray, hours: FloatArray, targets: tuple[float, ...], *, whole: bool
) -> list[float]:
    front = front_indices(attainment, hours)
    found: dict[float, None] = {}
    for target in targets:
        above = int(np.searchsorted(attainment[front], target))
        if 0 < above < len(front) and attainment[front[above]] - attainment[front[above - 1]] > RESOLUTION:
            low, high = values[front[above - 1]], values[front[above]]
            middle = float(f"{np.sqrt(low * high) if min(low, high) > 0 else (low + high) / 2.0:.4g}")
            middle = float(round(middle)) if whole else middle
            if middle not in values:
                found[middle] = None
    return list(found)


def check_sweep(sweep: PolicySweep, config: BenchmarkConfig) -> None:
    """Refuse an unknown policy, knob or value before the first episode."""
    knob = policy_class(sweep.registered).KNOB
    if knob is None and sweep.values is not None:
        raise SpecError(f"policy '{sweep.policy}' has no knob to sweep; leave out values")
    for value in sweep.values or default_sweep(sweep)[:1]:
        assert knob is not None
        for refusal in config.refusal:
            check_policy(
                sweep.registered,
                {**sweep.knobs, **refusal_knobs(sweep, refusal, config.refusal_strictness), knob.name: value},
            )
