"""Comparisons beside the one of all systems: what each part of SLOs-Serve is worth, bursts, replicas, speculation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments.capacity import Settings, draw_requests
from rl_autoscale.experiments.systems import (
    CAPACITY,
    LONG_BUDGET_TOKENS,
    SYSTEMS,
    TARGET,
    Load,
    Study,
    System,
)
from rl_autoscale.experiments.tables import Cell, Table
from rl_autoscale.fleet.profile import LatencyProfile
from rl_autoscale.workload.spec import TraceSource
from rl_autoscale.workload.trace import Workload

DRAFTS = {"draft_tokens": 4, "acceptance": 0.8, "draft_s": 0.004}
"""The acceptance that SLOs-Serve's authors assume; 1 ms for each draft, as of a model of 125M parameters."""
TIGHT_TPOT = 0.2
"""Of 50 ms: 10 ms. Reading the weights of Llama-3.1-8B takes 6 on an H100 and 12 on an A100."""
BURSTY_CV = 3.0
"""Gaps between arrivals: half of the requests come within a few percent of the time."""


def _slos_serve(name: str, **options: Any) -> System:
    return System(name, "slos-serve", "long", options={"slos_serve": options})


def least_gpu_s(profile: LatencyProfile, sample: Workload) -> float:
    """GPU time without which the target share of these requests cannot be served, whatever the scheduler.

    Every token at the rate of the largest batches, and attention; of the requests those that cost the least.
    """
    table_s = profile.token_time_table_s(LONG_BUDGET_TOKENS)
    token_s = float((table_s[1:] / np.arange(1, len(table_s))).min())
    context_s, sequence_s, pair_s = profile.attention_coefficients_s[:3]
    prompt, more = sample.prompt_tokens.astype(float), sample.output_tokens - 1.0
    work_s = (prompt + more) * token_s + pair_s * prompt**2 / 2.0
    work_s += more * (sequence_s + context_s * (prompt + more / 2.0))
    cheapest = np.sort(work_s)[: int(np.ceil(TARGET * len(work_s)))]
    return float(cheapest.sum())


def with_bound(table: Table, scenarios: tuple[str, ...], store: TraceSource, settings: Settings) -> Table:
    """The table with a row that no scheduler can exceed; columns are scenarios on one replica."""
    cells = []
    for name in scenarios:
        scenario = load_scenario(name)
        samples = [draw_requests(scenario, store, settings.num_requests, seed) for seed in range(settings.seeds)]
        profile = scenario.fleet.pools[0].hardware
        rates = [settings.num_requests / least_gpu_s(profile, sample) for sample in samples]
        cells.append(Cell(f"{np.mean(rates) / profile.gpus_per_replica:.2f}"))
    note = f"{table.note} Bound: GPU time of the cheapest {TARGET:.0%} of the requests, every token at the full rate."
    return replace(table, note=note, rows=(*table.rows, (Cell("bound of any scheduler"), *cells)))


_MAIN = {name: SYSTEMS[name] for name in ("vllm", "sarathi", "slos-serve")}
_PARTS = (
    SYSTEMS["vllm"],
    System("by deadline", "slos-serve", options={"slos_serve": {"admission": "all", "slack_batches": False}}),
    _slos_serve("and slack-sized batches", admission="all"),
    _slos_serve("and late ones last", admission="late"),
    _slos_serve("and declining, greedy", admission="greedy"),
    _slos_serve("and declining, programme, firm", admission="firm"),
    SYSTEMS["slos-serve"],
)

_SPECULATION = (
    SYSTEMS["vllm"],
    System("vllm, all drafts", "vllm", options={"speculation": DRAFTS}),
    SYSTEMS["slos-serve"],
    System("slos-serve, all drafts", "slos-serve", "long",
           options={"speculation": DRAFTS, "slos_serve": {"adaptive_drafts": False}}),
    System("slos-serve, adaptive drafts", "slos-serve", "long", options={"speculation": DRAFTS}),
)  # fmt: skip

STUDIES = {
    study.name: study
    for study in (
        CAPACITY,
        Study("parts", "What each part of SLOs-Serve is worth", {system.name: system for system in _PARTS}),
        Study(
            "drafts",
            "Capacity with speculation",
            {system.name: system for system in _SPECULATION},
            (Load(), Load(tpot_scale=TIGHT_TPOT)),
        ),
        Study("bursts", "Capacity under bursts", _MAIN, (Load(arrival_cv=BURSTY_CV),)),
        Study(
            "replicas",
            "Capacity with several replicas under bursts",
            _MAIN | {"slos-serve, routed": _slos_serve("slos-serve, routed", tries=4)},
            tuple(Load(num_replicas, BURSTY_CV) for num_replicas in (1, 2, 4)),
        ),
    )
}
