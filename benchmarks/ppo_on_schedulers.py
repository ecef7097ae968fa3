"""Does a better scheduler change what PPO learns? One policy per scheduler, each then run on every scheduler.

    python benchmarks/ppo_on_schedulers.py                                 # an hour of two cores
    python benchmarks/ppo_on_schedulers.py --timesteps 20000 --span-s 600  # a look

The scenario's fleet under each of the schedulers, batched as `rl-autoscale compare-systems` does; everything else is
the same, the seeds too. A policy that was trained on the scheduler it runs on stands on the diagonal; what a row loses
beside it is what the scheduler changed. Without a change, one policy serves all. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import yaml

from rl_autoscale.agents.ppo import PpoConfig, TrainingProgress
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.analysis import analyse
from rl_autoscale.experiments.benchmark import run_benchmark
from rl_autoscale.experiments.grid import BenchmarkConfig, PolicySweep
from rl_autoscale.experiments.rows import Row
from rl_autoscale.experiments.systems import SYSTEMS
from rl_autoscale.experiments.train import finished_policy, train
from rl_autoscale.experiments.train_config import TrainConfig
from rl_autoscale.workload.store import TraceStore

TARGETS = (0.85, 0.9, 0.94)
RULE = PolicySweep(policy="headroom", values=(0.9, 1.2, 1.6, 2.4))


def main() -> None:
    """Train, run everybody on everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="tool-calls")
    parser.add_argument("--schedulers", nargs="+", default=["vllm", "sarathi", "slos-serve"], choices=list(SYSTEMS))
    parser.add_argument("--timesteps", type=int, default=150_000)
    parser.add_argument("--seeds", type=int, default=3, help="of the test traffic")
    parser.add_argument("--span-s", type=float, help="cut the test traffic")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/ppo-on-schedulers"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    paths = {name: write_variant(load_scenario(asked.scenario), name, asked.out) for name in asked.schedulers}
    policies = {name: trained(name, path, asked.timesteps, asked.out) for name, path in paths.items()}
    config = BenchmarkConfig(
        scenarios=tuple(map(str, paths.values())),
        policies=(RULE, *(learned(name, folder) for name, folder in policies.items())),
        num_seeds=asked.seeds,
        refusal=("on",),
        max_knob_values=5,
        refinements=1,
        targets=TARGETS,
        span_s=asked.span_s,
    )
    rows = run_benchmark(config, asked.out / "benchmark", num_processes=asked.processes, progress=show)
    print(table(rows, asked.schedulers))


def learned(name: str, folder: Path) -> PolicySweep:
    """The policy that was trained on a scheduler."""
    return PolicySweep(policy="learned", label=f"PPO trained on {name}", knobs={"path": str(folder)})


def write_variant(scenario: Scenario, scheduler: str, out: Path) -> Path:
    """The scenario with this scheduler in every pool, as a file."""
    system = SYSTEMS[scheduler]
    data = scenario.model_dump(mode="json", exclude_unset=True)
    data["name"] = scheduler
    chosen = system.pool(scenario).model_dump(mode="json", exclude_unset=True)
    for pool in data["fleet"]["pools"]:
        pool.pop("max_num_batched_tokens", None)
        keys = ("scheduler", "kv_allocation", "max_num_batched_tokens", "max_num_seqs")
        pool.update({key: chosen[key] for key in keys if key in chosen})
    path = out / f"{scheduler}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def trained(name: str, path: Path, timesteps: int, out: Path) -> Path:
    """The exported policy of this scheduler, trained if it is not there yet."""
    folder = out / f"train-{name}"
    ppo = PpoConfig(
        total_timesteps=timesteps, num_fleets=32, rollout_steps=96, minibatch_size=512, num_epochs=8,
        entropy_coefficient=0.0005, gamma=0.98, gae_lambda=0.94,
    )  # fmt: skip
    config = TrainConfig(scenarios=(str(path),), ppo=ppo, miss_price=(3.0, 600.0), num_workloads=48)

    def report(progress: TrainingProgress) -> None:
        print(f"{name}: {progress.timesteps:,} steps, {progress.steps_per_s:.0f}/s", end="\r", flush=True)

    if (done := finished_policy(folder)) is not None:
        return done
    return train(config, [load_scenario(path)], TraceStore(), folder, report=report).policy_folder


def show(what: str, done: int, total: int) -> None:
    """One line of progress."""
    print(f"{what}: {done}/{total}", end="\r", flush=True)


def table(rows: list[Row], schedulers: list[str]) -> str:
    """GPU-hours at each target, who decides by where; in brackets over the policy that was trained there."""
    findings = {item.scenario: item for item in analyse(rows, targets=TARGETS)}
    names = [RULE.name, *(f"PPO trained on {name}" for name in schedulers)]
    lines = ["| decides | " + " | ".join(f"{s}, {t:.0%}" for s in schedulers for t in TARGETS) + " |"]
    lines.append("|---|" + "---:|" * len(schedulers) * len(TARGETS))
    for name in names:
        cells = []
        for scheduler in schedulers:
            entry, own = (findings[scheduler].entry(item, "on") for item in (name, f"PPO trained on {scheduler}"))
            assert entry is not None
            assert own is not None
            for mine, best in zip(entry.hours, own.hours, strict=True):
                cells.append(cell(mine.value, None if entry is own else best.value))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(hours: float, own: float | None) -> str:
    """GPU-hours, and how many times those of the policy that was trained there."""
    if not np.isfinite(hours):
        return "not reached"
    return f"{hours:.2f}" if own is None or not np.isfinite(own) else f"{hours:.2f} ({hours / own:.2f} ×)"


if __name__ == "__main__":
    main()
