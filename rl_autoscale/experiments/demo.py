"""The demo.

Train PPO on a laptop, put it beside every baseline on a real trace, write a report. Resumable at every stage.

<out>/train/            checkpoint, learning curve, exported policy
<out>/rows.jsonl        one line per benchmark episode
<out>/report.html       the result, with PNG figures beside it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rl_autoscale.agents.ppo import PpoConfig
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments.benchmark import Progress, run_benchmark
from rl_autoscale.experiments.grid import BenchmarkConfig, PolicySweep
from rl_autoscale.experiments.offset_search import OffsetSearchConfig
from rl_autoscale.experiments.report import Report, write_report
from rl_autoscale.experiments.rows import Row
from rl_autoscale.experiments.train import TrainingReport, finished_policy, train
from rl_autoscale.experiments.train_config import TrainConfig
from rl_autoscale.workload.store import TraceStore

SCENARIO = "azure-conversation"
TIMESTEPS = 500_000
TUNE_EPISODES = 48

POLICIES = (
    PolicySweep(policy="static", values=(16, 19, 22, 25, 28, 32)),
    PolicySweep(policy="headroom-tuned", values=(1.0, 1.15, 1.3, 1.45, 1.6, 1.8, 2.1)),
    PolicySweep(policy="hpa", values=(32, 45, 60, 75, 90)),
    PolicySweep(policy="hpa-tuned", values=(25, 32, 40, 50, 60, 75, 90)),
    PolicySweep(policy="chiron-literal", values=(0.1, 0.15, 0.2, 0.25, 1 / 3)),
    PolicySweep(policy="chiron-robust", values=(0.1, 0.15, 0.2, 0.25, 1 / 3)),
    PolicySweep(policy="chiron-tuned", values=(0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)),
    PolicySweep(policy="oracle"),
)
"""Baselines and where their knobs are swept: around the attainments the tables report, found on training traffic."""

MISS_PRICES = (2.0, 4.0, 7.0, 12.0, 20.0, 35.0, 60.0, 110.0)


def demo_training(timesteps: int, seed: int, num_threads: int) -> TrainConfig:
    """What the demo trains: PPO and nothing after it, so that its minutes show what PPO learns in them."""
    ppo = PpoConfig(total_timesteps=timesteps, seed=seed, num_threads=num_threads)
    return TrainConfig(scenarios=(SCENARIO,), ppo=ppo, offset_search=OffsetSearchConfig(rounds=0))


def traffic_notes(trace_folders: Sequence[Path]) -> tuple[str, ...]:
    """Where the demo's traffic comes from: a note for each trace that is replaced by its generator, or downloaded."""
    scenario = load_scenario(SCENARIO)
    return scenario.build_test(0, TraceStore(trace_folders), span_s=scenario.fleet.control_interval_s).notes


def train_demo(
    out: Path,
    config: TrainConfig,
    *,
    trace_folders: Sequence[Path] = (),
    report: TrainingReport | None = None,
) -> Path:
    """Train and export, unless the run's folder has the policy of this training already.

    Returns the policy's folder.
    """
    policy = _finished(out / "train", config)
    if policy is not None:
        return policy
    scenario = load_scenario(SCENARIO)
    return train(config, [scenario], TraceStore(trace_folders), out / "train", report=report).policy_folder


def benchmark_demo(
    out: Path,
    policy: Path,
    *,
    num_seeds: int = 3,
    num_processes: int = 2,
    trace_folders: Sequence[Path] = (),
    progress: Progress | None = None,
) -> list[Row]:
    """Run the episodes that are missing."""
    learned = PolicySweep(policy="learned", label="PPO", values=MISS_PRICES, knobs={"path": str(policy)})
    config = BenchmarkConfig(
        scenarios=(SCENARIO,), policies=(*POLICIES, learned), num_seeds=num_seeds, tune_episodes=TUNE_EPISODES
    )
    return run_benchmark(config, out, num_processes=num_processes, trace_folders=trace_folders, progress=progress)


def report_demo(out: Path, config: TrainConfig, *, trace_folders: Sequence[Path] = ()) -> Report:
    """Write the report from the rows in the run's folder."""
    trained = (
        f"PPO was trained for {config.ppo.total_timesteps:,} control steps (seed {config.ppo.seed}) on the scenario's "
        "training traffic only; its dial is the price of a miss."
    )
    return write_report(
        out,
        trace_folders=trace_folders,
        title="PPO beside Chiron",
        extra_notes=(trained, *traffic_notes(trace_folders)),
    )


def _finished(folder: Path, config: TrainConfig) -> Path | None:
    """The folder's policy if it came out of exactly this training."""
    policy = finished_policy(folder)
    if policy is None or TrainConfig.from_yaml(folder / "config.yaml") != config:
        return None
    return policy
