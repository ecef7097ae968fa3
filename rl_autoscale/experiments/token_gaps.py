"""Sarathi-Serve's capacity experiment: requests per second of one GPU while gaps between tokens stay short.

Capacity is the highest Poisson rate at which 99 % of *all* gaps between tokens (its time between tokens, not a
request's mean) keep a bound and the median request waits at most two seconds for its first place in a batch. Every
engine gets the same 2,048 requests and, but for the rate, the same gaps between arrivals.

Source: Agrawal et al., OSDI 2024 (arXiv 2403.02310), sections 5 and 5.1, tables 2 and 3; microsoft/sarathi-serve,
osdi-experiments/figure-5-6 (branch osdi-sarathi-serve).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rl_autoscale.experiments.capacity import Settings, at_rate, largest_rate, resumed
from rl_autoscale.experiments.runs import write_text
from rl_autoscale.experiments.tables import Cell, Table
from rl_autoscale.fleet.pool import SchedulerName
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.lengths import LengthModel, quantiles, sample_lengths
from rl_autoscale.workload.trace import Workload

PROFILE = "llama-3.1-8b_a100_tp1"
"""Stands for Mistral-7B on A100: the same layers, hidden size, heads and feed-forward, measured; only the vocabulary is
four times larger. `profile roofline --model mistral-7b` has the right one, unmeasured."""
MAX_NUM_SEQS = 128
GAP_SHARE, LONGEST_DELAY_S = 0.99, 2.0
BOUNDS_S = {"strict": 0.1, "relaxed": 0.5}
CAREFUL, QUICK = Settings(num_requests=2048), Settings(num_requests=200, seeds=1, tolerance=0.1)


@dataclass(frozen=True, slots=True)
class Engine:
    """A row.

    Attributes:
        name: of the row.
        scheduler: of the pool.
        budget_tokens: per iteration; None: the longest request of the data set, which vLLM demanded before V1.
    """

    name: str
    scheduler: SchedulerName
    budget_tokens: int | None


ENGINES = (
    Engine("vllm-v0", "vllm-v0", None),
    Engine("vllm, 2048", "vllm", 2048),
    Engine("sarathi, 2048", "sarathi", 2048),
    Engine("sarathi, 512", "sarathi", 512),
)


@dataclass(frozen=True, slots=True)
class DataSet:
    """Lengths as the paper's table 2 has them, and the longest request (prompt and output) that is kept."""

    name: str
    lengths: LengthModel
    longest_tokens: int


# Medians and 90th percentiles are published; minima and maxima are ours, chosen so that the standard deviations (2,088,
# 3,638 and 265) come out. The one of openchat's outputs, 101, does not go with its own median and 90th percentile.
DATA_SETS = tuple(
    DataSet(name, LengthModel(quantiles((0, 0.5, 0.9, 1), prompt), quantiles((0, 0.5, 0.9, 1), output)), longest)
    for name, prompt, output, longest in (
        ("openchat_sharegpt4", (10, 1730, 5696, 8000), (4, 415, 834, 1020), 8192),
        ("arxiv_summarization", (2500, 7059, 12985, 16000), (30, 208, 371, 1550), 16384),
    )
)


@dataclass(frozen=True, slots=True)
class Found:
    """Requests per second, one per seed, and what stands against more of them: ``gaps`` or ``delay``."""

    rate_per_s: tuple[float, ...]
    binds: str

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.rate_per_s))


def draw(data: DataSet, num_requests: int, seed: int) -> Workload:
    """Requests of a data set with Poisson arrivals at one per second; what is too long is drawn again."""
    rng = stream(seed, f"token-gaps/{data.name}")
    prompt, output = sample_lengths(rng, data.lengths, 2 * num_requests)
    fits = prompt + output <= data.longest_tokens
    arrival_s = np.cumsum(rng.exponential(1.0, num_requests))
    return Workload(
        arrival_s, prompt[fits][:num_requests], output[fits][:num_requests], np.zeros(num_requests, dtype=np.int16),
        ("requests",), float(arrival_s[-1]),
    )  # fmt: skip


@dataclass(slots=True)
class Replica:
    """One replica of an engine that serves the same requests at any rate."""

    batch: FleetBatch
    sample: Workload

    @classmethod
    def of(cls, engine: Engine, data: DataSet, sample: Workload, bound_s: float, profile: str = PROFILE) -> Replica:
        """Set it up; nothing is refused and nobody gives up."""
        pool = {
            "name": "gpu", "profile": profile, "min_replicas": 1, "max_replicas": 1, "scheduler": engine.scheduler,
            "max_num_batched_tokens": engine.budget_tokens or data.longest_tokens, "max_num_seqs": MAX_NUM_SEQS,
        }  # fmt: skip
        patient = {"name": "requests", "ttft_slo_s": 1e6, "tpot_slo_s": 1e6, "queue_limit": sample.num_requests}
        spec = FleetSpec.from_dict({"pools": [pool], "classes": [patient]})
        return cls(FleetBatch(spec, gap_edges_s=np.array([bound_s])), sample)

    def run(self, rate_per_s: float) -> tuple[float, float]:
        """(Share of gaps within the bound, median delay until a request is first in a batch in s) at a rate."""
        self.batch.load(0, at_rate(self.sample, rate_per_s), seed=0)
        self.batch.run(0)
        short, long = self.batch.token_gaps().sum(axis=0)
        requests = self.batch.requests()
        return float(short / (short + long)), float(np.median(requests["scheduled_s"] - requests["arrival_s"]))


def capacity_of(engine: Engine, data: DataSet, bound_s: float, settings: Settings, profile: str = PROFILE) -> Found:
    """Find an engine's capacity under a bound on its gaps, once per seed."""
    rates, binds = [], "delay"
    for seed in range(settings.seeds):
        replica = Replica.of(engine, data, draw(data, settings.num_requests, seed), bound_s, profile)

        def share_of_bounds_kept(rate_per_s: float, replica: Replica = replica) -> float:
            share, delay_s = replica.run(rate_per_s)
            return ((share >= GAP_SHARE) + (delay_s <= LONGEST_DELAY_S)) / 2.0

        rates.append(largest_rate(share_of_bounds_kept, 1.0, settings.tolerance))
        share, _ = replica.run(max(rates[-1], 1 / 60) * (1.0 + settings.tolerance))
        if share < GAP_SHARE:
            binds = "gaps"
    return Found(tuple(rates), binds)


def find_all(
    out: Path, *, settings: Settings, progress: Callable[[str, int, int], None]
) -> dict[str, dict[str, Found]]:
    """Find all capacities; what ``out/token-gaps.json`` holds already is not looked for again.

    Returns:
        By column (data set and bound), then by engine.

    Raises:
        SpecError: the folder holds results of other settings.
    """
    path = out / "token-gaps.json"
    data = resumed(path, asdict(settings), "found")
    cells = [(item, slo, engine) for item in DATA_SETS for slo in BOUNDS_S for engine in ENGINES]
    for k, (item, slo, engine) in enumerate(cells):
        progress(f"{item.name}, {slo}: {engine.name}", k, len(cells))
        known = data["found"].setdefault(f"{item.name}, {slo}", {})
        if engine.name not in known:
            known[engine.name] = asdict(capacity_of(engine, item, BOUNDS_S[slo], settings))
            write_text(path, json.dumps(data, indent=2))
    progress("done", len(cells), len(cells))
    return {
        column: {name: Found(tuple(cell["rate_per_s"]), cell["binds"]) for name, cell in engines.items()}
        for column, engines in data["found"].items()
    }


def gap_table(found: dict[str, dict[str, Found]]) -> Table:
    """Capacity of every engine in every column, and how many times that of vLLM before V1."""
    base = ENGINES[0].name
    rows = [
        (
            Cell(engine.name),
            *(
                Cell(
                    f"{cells[engine.name].mean:.2f} (× {cells[engine.name].mean / cells[base].mean:.2f})"
                    + (" *" if cells[engine.name].binds == "gaps" else ""),
                    strong=cells[engine.name].mean == max(cell.mean for cell in cells.values()),
                )
                for cells in found.values()
            ),
        )
        for engine in ENGINES
    ]
    bounds = " and ".join(f"{bound_s:g} s ({name})" for name, bound_s in BOUNDS_S.items())
    return Table(
        "Capacity under a bound on every gap between tokens, requests per second",
        f"Highest rate with {GAP_SHARE:.0%} of all gaps between tokens within {bounds} and a median wait for the first "
        f"place in a batch of at most {LONGEST_DELAY_S:g} s; mean over seeds, in brackets over {base}. "
        "An asterisk: with more, gaps are too long; else, requests wait too long. Bold: the best of a column.",
        ("engine, token budget", *found),
        tuple(rows),
        num_text=1,
    )
