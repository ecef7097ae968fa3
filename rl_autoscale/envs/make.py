"""Environments by scenario name: what ``gym.make`` and ``gym.make_vec`` call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl_autoscale.envs.fleet_env import FleetEnv, FleetVectorEnv
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.workload.store import TraceStore

DEFAULT_SCENARIO = "azure-conversation"


def _parts(
    scenario: str | Scenario, traces: str | Path | None, miss_price: float | None
) -> tuple[Scenario, ScenarioSampler]:
    chosen = scenario if isinstance(scenario, Scenario) else load_scenario(scenario)
    store = TraceStore([Path(traces)] if traces is not None else [])
    if miss_price is None:
        return chosen, ScenarioSampler(chosen, store)
    return chosen, ScenarioSampler(chosen, store, (miss_price, miss_price), weighted=False)


def make_fleet_env(
    scenario: str | Scenario = DEFAULT_SCENARIO,
    *,
    traces: str | Path | None = None,
    miss_price: float | None = None,
    render_mode: str | None = None,
    **options: Any,
) -> FleetEnv:
    """One fleet on a scenario's training traffic.

    Args:
        scenario: a shipped scenario's name, a path ending in .yaml, or a Scenario.
        traces: folder of traces; default see TraceStore. A trace that cannot be had is replaced by its fitted
            generator.
        miss_price: fix the price of a miss, the same for all classes; by default price and weights of the classes are
            drawn anew for each episode.
        render_mode: None, "ansi" or "rgb_array".
        options: further arguments of `FleetMdp` (``refuse``, ``faults``, ``constants``).
    """
    chosen, sampler = _parts(scenario, traces, miss_price)
    return FleetEnv(chosen.fleet, chosen.shield, sampler, render_mode=render_mode, **options)


def make_fleet_vector_env(
    num_envs: int = 1,
    scenario: str | Scenario = DEFAULT_SCENARIO,
    *,
    traces: str | Path | None = None,
    miss_price: float | None = None,
    num_threads: int = 1,
    **options: Any,
) -> FleetVectorEnv:
    """Many fleets on a scenario's training traffic, advanced together; see `make_fleet_env` for the arguments."""
    chosen, sampler = _parts(scenario, traces, miss_price)
    return FleetVectorEnv(chosen.fleet, chosen.shield, sampler, num_envs=num_envs, num_threads=num_threads, **options)
