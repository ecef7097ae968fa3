"""Every miss has exactly one cause, and the cause is the one a person would name on made-up episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments.episodes import run_episode
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.misses import MissCause, interval_causes
from rl_autoscale.sim.result import EpisodeResult
from rl_autoscale.workload.trace import Workload

LAG, START, FULL = MissCause.TRIGGER_LAG, MissCause.STARTUP_LAG, MissCause.CAPACITY


def fleet(**changes: Any) -> FleetSpec:
    pool = {"name": "gpu", "profile": "llama-3.1-8b_a100_tp1", "max_replicas": 6, "initial_replicas": 1}
    chat = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
    return FleetSpec.from_dict({"pools": [pool | changes.pop("pool", {})], "classes": [chat], **changes})


def timeline(target: list[float], ready: list[float], queue: list[float]) -> dict[str, np.ndarray]:
    columns = {"target": target, "ready": ready, "queue_length": queue, "waiting": [0.0] * len(queue)}
    by_item = {name: np.array(values, dtype=np.float64)[:, None] for name, values in columns.items()}
    return by_item | {"time_s": 10.0 * np.arange(len(queue))}


def test_intervals_are_told_apart() -> None:
    made_up = timeline(target=[1, 1, 4, 4, 4, 4, 6], ready=[1, 1, 1, 1, 4, 4, 6], queue=[0, 9, 30, 60, 50, 70, 80])
    # idle; not asked yet; asked; starting; all there, working off what the start left; growing again; at the bound
    assert interval_causes(fleet(), 0, made_up).tolist() == [LAG, LAG, START, START, START, LAG, FULL]


def test_a_gpu_budget_is_a_bound_too() -> None:
    made_up = timeline(target=[3, 4], ready=[3, 4], queue=[5, 9])
    assert interval_causes(fleet(gpu_budget=4), 0, made_up).tolist() == [LAG, FULL]


def test_so_are_shared_gpus() -> None:
    pools = [{"name": name, "profile": "llama-3.1-8b_a100_tp1", "model": name, "min_replicas": 0} for name in "ab"]
    classes = [{"name": name, "model": name, "ttft_slo_s": 1.0, "tpot_slo_s": 0.1} for name in "ab"]
    shared = [{"pools": ["a", "b"], "gpus": 3}]
    spec = FleetSpec.from_dict({"pools": pools, "classes": classes, "shared_gpus": shared})
    made_up = timeline(target=[1, 2], ready=[1, 2], queue=[5, 9])
    two = {name: np.repeat(values, 2, axis=1) if values.ndim == 2 else values for name, values in made_up.items()}
    two["target"][:, 1] = two["ready"][:, 1] = 1
    assert interval_causes(spec, 0, two).tolist() == [LAG, FULL]


def steady(rate_per_s: float, span_s: float = 120.0, prompt_tokens: int = 500) -> Workload:
    number = int(rate_per_s * span_s)
    return Workload(
        np.arange(number) / rate_per_s,
        np.full(number, prompt_tokens, np.int32),
        np.full(number, 100, np.int32),
        np.zeros(number, np.int16),
        ("chat",),
        span_s,
    )


def episode(
    tiny: Path, workload: Workload, policy: str, pool: dict[str, Any] | None = None, **knobs: Any
) -> EpisodeResult:
    scenario = load_scenario(tiny).model_copy(update={"fleet": fleet(pool=pool or {})})
    return run_episode(scenario, workload, make_policy(policy, **knobs), seed=0)


def shares(result: EpisodeResult) -> dict[str, float]:
    """Causes as shares of all misses; checks the law."""
    assert sum(result.miss_causes.values()) == result.num_arrived - result.num_met > 0
    total = sum(value for name, value in result.summary().items() if name.startswith("missed/"))
    assert total == pytest.approx(1.0 - result.slo_attainment)
    return {name: number / (result.num_arrived - result.num_met) for name, number in result.miss_causes.items()}


def test_too_few_replicas_that_nobody_adds_to_is_trigger_lag(tiny_scenario: Path) -> None:
    assert shares(episode(tiny_scenario, steady(60), "static", replicas=1))["trigger_lag"] == 1.0


def test_too_few_replicas_at_the_bound_is_capacity(tiny_scenario: Path) -> None:
    result = episode(tiny_scenario, steady(60), "static", {"max_replicas": 1}, replicas=1)
    assert shares(result)["capacity"] == 1.0


def test_replicas_on_their_way_are_startup_lag(tiny_scenario: Path) -> None:
    startup = {"startup": [{"name": "load", "mean_s": 60.0}]}
    assert shares(episode(tiny_scenario, steady(60), "static", startup, replicas=6))["startup_lag"] == 1.0


def test_what_the_gateway_refuses_is_shed(tiny_scenario: Path) -> None:
    found = shares(episode(tiny_scenario, steady(60), "static", replicas=1, admission=1.0))
    assert found["shed"] > 0.5


def test_a_prompt_that_no_replica_computes_in_time_is_nobodys_fault(tiny_scenario: Path) -> None:
    result = episode(tiny_scenario, steady(0.2, prompt_tokens=30_000), "static", replicas=6)
    assert shares(result)["too_long"] == 1.0


def test_a_crash_is_a_failure(tiny_scenario: Path) -> None:
    result = episode(tiny_scenario, steady(10), "static", {"mean_time_to_crash_s": 30.0}, replicas=6)
    assert shares(result)["failed"] == result.outcomes["failed"] / (result.num_arrived - result.num_met) > 0
