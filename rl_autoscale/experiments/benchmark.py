"""The benchmark: every policy x knob value x early refusal x scenario x seed, under common random numbers.

A seed fixes arrivals, lengths, start-up times and routing numbers for every policy. Results are rows in
``rows.jsonl``, one per episode, appended as they come; an interrupted benchmark goes on where it stopped. A row is
reused only if everything it depends on is unchanged: scenario, traffic, policy, knobs, seed, and the code itself.

A name that ends in ``-tuned`` is a rule whose constants are first tuned on the scenario's training traffic
(`tuning.py`), once with early refusal and once without; then its knob is swept with the other constants fixed, and
the tuned point itself is run too: what an operator would have deployed.

With ``chosen_on`` the setting of every policy for every attainment asked is found on a scenario's history or validation
traffic first, and so is the policy to run (`choice.py`); what was chosen is deployed on the test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rl_autoscale.agents.policy_file import read_card
from rl_autoscale.agents.pretrained import policy_folder
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.choice import FOLDER, Choice, choice_split, choose, deployed, trial_config
from rl_autoscale.experiments.episodes import EpisodeJob, EpisodeOutcome, EpisodePool, trace_names
from rl_autoscale.experiments.grid import (
    BenchmarkConfig,
    Cell,
    PolicySweep,
    check_sweep,
    grid,
    refine,
    refusal_knobs,
)
from rl_autoscale.experiments.ray_workers import RayCluster, RayWorkers
from rl_autoscale.experiments.rows import Refusal, Row, RowStore
from rl_autoscale.experiments.runs import RunInfo, code_fingerprint, describe_run, write_run, write_text
from rl_autoscale.experiments.search_spaces import search_space
from rl_autoscale.experiments.suites import groups_of, sweeps_that_fit
from rl_autoscale.experiments.tuning import TuningResult, budget_episodes, trained_hours, tune_policy
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.store import TraceStore

Progress = Callable[[str, int, int], None]
"""Called with what is being done, episodes done, episodes in all."""


def run_benchmark(
    config: BenchmarkConfig,
    out_dir: Path,
    *,
    num_processes: int = 1,
    ray: RayCluster | None = None,
    trace_folders: Sequence[Path] = (),
    progress: Progress | None = None,
    info: RunInfo | None = None,
) -> list[Row]:
    """Run whatever of the grid is not in the folder yet, and return all of its rows.

    Writes ``config.yaml``, ``run.json``, ``workloads.json`` (scenario cards, notes on the traffic), ``tuning.json``,
    ``rows.jsonl`` and, with ``chosen_on``, ``chosen.json`` and ``choice/rows.jsonl``.

    Args:
        config: what to compare.
        out_dir: the run folder; a benchmark found there is resumed.
        num_processes: episodes run at the same time.
        ray: run them on this cluster instead.
        trace_folders: where to look for traces first.
        progress: told how far it is.
        info: how this run came about; default: described now.

    Raises:
        RlAutoscaleError: a mistake in the configuration, found before the first episode, or a worker that failed.
    """
    scenarios, sweeps, store = _prepare(config, trace_folders)
    cards = {name: _card(scenario, store) for name, scenario in scenarios.items()}
    write_run(out_dir, config, info or describe_run(config.first_seed))
    write_text(out_dir / "workloads.json", json.dumps(cards, indent=2) + "\n")
    context = _contexts(cards)
    workers = None if ray is None else RayWorkers(ray, scenarios, store)
    with EpisodePool(scenarios, trace_folders, num_processes, workers) as pool:
        tuned = _tune(config, scenarios, context, pool, out_dir, progress)
        play = partial(_play, context=context, pool=pool, progress=progress)
        asked_of = grid(config, sweeps, tuned)
        if config.chosen_on is not None:
            choices = _choose(config, scenarios, sweeps, tuned, play, out_dir)
            asked_of = [cell for cell in asked_of if cell.asked_attainment is None] + deployed(choices, config)
        return [row for _, row in play("benchmark", config, asked_of, out_dir)]


def run_choice(
    config: BenchmarkConfig,
    out_dir: Path,
    *,
    num_processes: int = 1,
    trace_folders: Sequence[Path] = (),
    progress: Progress | None = None,
) -> list[Choice]:
    """The first half of a benchmark with ``chosen_on``: no test traffic is run. What is in the folder is used.

    Writes ``config.yaml``, ``run.json``, ``chosen.json`` and ``choice/rows.jsonl``; `run_benchmark` goes on from
    there.

    Raises:
        RlAutoscaleError: as `run_benchmark`.
    """
    scenarios, sweeps, store = _prepare(config, trace_folders)
    cards = {name: _card(scenario, store) for name, scenario in scenarios.items()}
    write_run(out_dir, config, describe_run(config.first_seed))
    context = _contexts(cards)
    with EpisodePool(scenarios, trace_folders, num_processes) as pool:
        tuned = _tune(config, scenarios, context, pool, out_dir, progress)
        play = partial(_play, context=context, pool=pool, progress=progress)
        return _choose(config, scenarios, sweeps, tuned, play, out_dir)


def _prepare(
    config: BenchmarkConfig, trace_folders: Sequence[Path]
) -> tuple[dict[str, Scenario], dict[str, tuple[PolicySweep, ...]], TraceStore]:
    """Scenarios, who runs on which, and where traces come from; mistakes are found here."""
    scenarios = {scenario.name: scenario for scenario in map(load_scenario, config.scenarios)}
    if len(scenarios) < len(config.scenarios):
        raise SpecError("two scenarios have the same name; rename one")
    for sweep in config.policies:
        check_sweep(sweep, config)
    return scenarios, sweeps_that_fit(config.policies, scenarios), TraceStore(trace_folders)


def _contexts(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: f"{card['fingerprint']}/{code_fingerprint()}" for name, card in cards.items()}


def _play(
    what: str,
    config: BenchmarkConfig,
    asked_of: Sequence[Cell],
    folder: Path,
    *,
    context: Mapping[str, str],
    pool: EpisodePool,
    progress: Progress | None,
) -> list[tuple[Cell, Row]]:
    """Episodes and their refinements, those that the folder does not have yet; every one with its row."""
    cells = {_key(cell, context[cell.scenario], config.span_s): cell for cell in asked_of}
    rows = RowStore(folder, cells)
    _run_missing(what, cells, rows, pool, config.span_s, progress)
    for number in range(config.refinements):
        added = refine([(cell, rows.rows[key]) for key, cell in cells.items()], config.targets)
        more = {_key(cell, context[cell.scenario], config.span_s): cell for cell in added}
        rows.take_back(more)
        cells |= more
        _run_missing(f"{what}, refinement {number + 1}", cells, rows, pool, config.span_s, progress)
    return [(cell, rows.rows[key]) for key, cell in cells.items()]


def _choose(
    config: BenchmarkConfig,
    scenarios: Mapping[str, Scenario],
    sweeps: Mapping[str, Sequence[PolicySweep]],
    tuned: Mapping[tuple[str, str, Refusal], Sequence[TuningResult]],
    play: Callable[..., list[tuple[Cell, Row]]],
    out_dir: Path,
) -> list[Choice]:
    """Sweep everybody on the traffic to choose on, and write down what to deploy."""
    assert config.chosen_on is not None
    trial = trial_config(config)
    split = {name: choice_split(scenario, config.chosen_on) for name, scenario in scenarios.items()}
    cells = [replace(cell, split=split[cell.scenario]) for cell in grid(trial, sweeps, tuned)]
    choices = choose(play("choice", trial, cells, out_dir / FOLDER), config.asked or ())
    records = [record for choice in choices for record in choice.to_json()]
    write_text(out_dir / "chosen.json", json.dumps(records, indent=2) + "\n")
    return choices


def _run_missing(
    what: str,
    cells: Mapping[str, Cell],
    rows: RowStore,
    pool: EpisodePool,
    span_s: float | None,
    progress: Progress | None,
) -> None:
    missing = [_job(key, cell, span_s) for key, cell in cells.items() if key not in rows.rows]
    if progress is not None:
        progress(what, len(cells) - len(missing), len(cells))
    for outcome in pool.run(missing):
        rows.append(_row(cells[outcome.job.identity], outcome))
        if progress is not None:
            progress(what, len(rows.rows), len(cells))


def _tune(
    config: BenchmarkConfig,
    scenarios: Mapping[str, Scenario],
    context: Mapping[str, str],
    pool: EpisodePool,
    out_dir: Path,
    progress: Progress | None,
) -> dict[tuple[str, str, Refusal], list[TuningResult]]:
    """Tune what is to be tuned and is not in ``tuning.json`` yet; of each, constants for every attainment."""
    path = out_dir / "tuning.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    targets = tuple(dict.fromkeys((config.tune_target, *(config.asked or ()))))
    wanted = [
        (name, sweep, refusal)
        for name in scenarios
        for sweep in config.policies
        if sweep.tuned
        for refusal in config.refusal
    ]
    results: dict[tuple[str, str, Refusal], list[TuningResult]] = {}
    for done, (name, sweep, refusal) in enumerate(wanted):
        if progress is not None:
            progress(f"tuning {sweep.policy}", done, len(wanted))
        fixed = {**sweep.knobs, **refusal_knobs(sweep, refusal, config.refusal_strictness)}
        episode_s = config.tune_episode_s or scenarios[name].episode_s
        hours = _tuning_hours(config, scenarios[name])
        asked = {
            "episode_s": episode_s,
            "budget_episodes": config.tune_episodes if hours is None else budget_episodes(hours, episode_s),
            "num_seeds": config.tune_seeds,
            "targets": targets,
            "one_pool": len(scenarios[name].fleet.pools) == 1,
            "history": config.tune_history and scenarios[name].history is not None,
        }
        key = _digest([context[name], sweep.policy, refusal, fixed, asked, asdict(search_space(sweep.policy))])
        if key not in known:
            found = tune_policy(sweep.policy, name, pool, fixed=fixed, **asked)  # type: ignore[arg-type]
            known[key] = [{"scenario": name, "refusal": refusal, **asdict(result)} for result in found]
            write_text(path, json.dumps(known, indent=2) + "\n")
        results[name, sweep.name, refusal] = [
            TuningResult(**{field: value for field, value in stored.items() if field not in ("scenario", "refusal")})
            for stored in known[key]
        ]
    return results


def _tuning_hours(config: BenchmarkConfig, scenario: Scenario) -> float | None:
    """The budget of one tuned rule in simulated hours; None where it is stated in episodes.

    What a policy got that was trained on several scenarios is shared out among them.
    """
    if config.tune_hours != "as-trained":
        return config.tune_hours
    cards = [read_card(Path(str(sweep.knobs["path"]))) for sweep in config.policies if sweep.trained]
    interval_s = scenario.fleet.control_interval_s
    return max(trained_hours(card, interval_s) / max(len(card["training"].get("scenarios", ())), 1) for card in cards)


def _card(scenario: Scenario, store: TraceStore) -> dict[str, Any]:
    """What a report says of a scenario, and a hash of everything its traffic and fleet depend on."""
    notes: list[str] = []
    digest = hashlib.sha256(scenario.model_dump_json().encode())
    for pool in scenario.fleet.pools:
        digest.update(pool.hardware.model_dump_json().encode())
    names = trace_names(scenario)
    for name in names:
        loaded = store.load_or_stand_in(name)
        notes += loaded.notes
        for column in (loaded.workload.arrival_s, loaded.workload.prompt_tokens, loaded.workload.output_tokens):
            digest.update(column.tobytes())
    return {
        "description": scenario.description,
        "traces": names,
        "notes": list(dict.fromkeys(notes)),
        "groups": list(groups_of(scenario)),
        "gpus_per_replica": scenario.fleet.gpus_per_replica.tolist(),
        "classes": [item.model_dump(mode="json") for item in scenario.fleet.classes],
        "fingerprint": digest.hexdigest()[:16],
    }


def _key(cell: Cell, context: str, span_s: float | None) -> str:
    knobs = cell.knobs
    if "path" in knobs:  # an exported policy is what its file says, wherever the file lies
        folder = policy_folder(str(knobs["path"]))
        card = folder / "policy.json" if folder.is_dir() else folder
        if card.exists():
            knobs = {**knobs, "path": hashlib.sha256(card.read_bytes()).hexdigest()}
    where = [cell.scenario, cell.seed, cell.sweep.name, cell.sweep.registered, cell.refusal, cell.asked_attainment]
    where += [] if cell.split == "test" else [cell.split]
    return _digest([context, span_s, where, knobs])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _job(key: str, cell: Cell, span_s: float | None) -> EpisodeJob:
    return EpisodeJob(key, cell.scenario, cell.split, cell.seed, cell.sweep.registered, cell.knobs, span_s)


def _row(cell: Cell, outcome: EpisodeOutcome) -> Row:
    return Row(
        key=outcome.job.identity,
        scenario=cell.scenario,
        policy=cell.sweep.name,
        registered=cell.sweep.registered,
        knob=cell.knob,
        knob_value=cell.knob_value,
        refusal=cell.refusal,
        seed=cell.seed,
        gpu_hours=outcome.metrics["gpu_hours"],
        slo_attainment=outcome.metrics["slo_attainment"],
        asked_attainment=cell.asked_attainment,
        tuned_for=cell.tuned_for,
        knobs=cell.knobs,
        metrics=outcome.metrics,
        wall_s=outcome.wall_s,
    )
