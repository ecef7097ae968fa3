"""Random small fleets, their traffic and what is decided, as Hypothesis draws them (toy profiles: conftest.py).

Every arrival is a multiple of a power of two, like every duration of the toy profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from rl_autoscale.fleet.pool import STAGED_SCHEDULERS
from rl_autoscale.fleet.spec import ROLES_SERVING, FleetSpec
from rl_autoscale.fleet.state import NO_LIMIT, ScalingDecision
from rl_autoscale.sim.layout import ADMISSION_CODES, ROUTER_CODES, SCHEDULER_CODES
from rl_autoscale.workload.trace import Workload

ROLES = (
    ["mixed"],
    ["mixed"],
    ["mixed", "mixed"],
    ["mixed", "batch"],
    ["interactive", "batch"],
    ["interactive", "mixed", "batch"],
    ["interactive", "mixed", "interactive"],
)
STAGED_ROLES = (["prefill", "decode"], ["decode", "prefill", "decode"], ["prefill", "decode", "prefill"], ["mixed"])
GRID_S = 2.0**-10


COMINGS_AND_GOINGS: list[dict[str, Any]] = [
    {"sleep": {"max_sleeping": 1, "wake": [{"mean_s": 0.25, "cv": 0.5}], "price_fraction": 0.25}},
    {"sleep": {"max_sleeping": 3, "wake": [{"mean_s": 0.0}], "price_fraction": 1.0}},
    {"spot": {"mean_life_s": 2.0, "notice_s": 0.5}},
    {"spot": {"mean_life_s": 6.0, "notice_s": 0.0}},
    {"spot": {"mean_life_s": 6.0, "notice_s": 4.0}},
]


SPECULATIONS: list[dict[str, Any]] = [
    {"draft_tokens": 1, "acceptance": 0.5},
    {"draft_tokens": 3, "acceptance": 0.7, "draft_s": 3 * 2.0**-10},  # of which one takes a third
    {"draft_tokens": 5, "acceptance": 0.97},
    {"draft_tokens": 4, "acceptance": 0.0, "draft_s": 2.0**-10},
    {"draft_tokens": 15, "acceptance": 1.0},
]


REBALANCES: list[dict[str, Any]] = [
    {"every_s": 0.0625, "source_below": 4.0, "destination_above": 4.0},
    {"every_s": 0.25, "source_below": 2.0, "destination_above": 6.0},
    {"every_s": 0.5, "source_below": 0.0, "destination_above": 1.0},
    {"every_s": 1.0, "source_below": 10.0, "destination_above": 60.0},
]


SLOS_SERVE_OPTIONS = st.fixed_dictionaries(
    {
        "admission": st.sampled_from(["dp", "dp", *ADMISSION_CODES]),
        "tries": st.integers(1, 3),
        "slack_batches": st.sampled_from([True, True, False]),
        "adaptive_drafts": st.sampled_from([True, True, True, False]),
    }
)


KV_TRANSFERS: list[dict[str, Any]] = [
    {"link_bytes_per_s": 2.0**21, "latency_s": 0.0, "bridge_limit": 1},  # a block in 2^-7 s
    {"link_bytes_per_s": 2.0**19, "latency_s": 2.0**-6, "bridge_limit": 2},
    {"link_bytes_per_s": 2.0**17, "latency_s": 0.25, "bridge_limit": 3},
    {"link_bytes_per_s": 2.0**23, "latency_s": 2.0**-8, "bridge_limit": 40},
]


POSTPROCESSES: list[dict[str, Any]] = [
    {"num_workers": 1, "request_s": 0.0625, "token_s": 2.0**-8, "queue_limit": 0},
    {"num_workers": 1, "request_s": 0.25, "token_s": 0.0, "queue_limit": 2},
    {"num_workers": 3, "request_s": 0.0, "token_s": 2.0**-5, "queue_limit": 1},
    {"num_workers": 8, "request_s": 2.0**-6, "token_s": 0.0, "queue_limit": 4},
]


@dataclass(frozen=True)
class Case:
    """A fleet, its traffic and what is decided at each control step."""

    spec: FleetSpec
    workload: Workload
    decisions: list[ScalingDecision]
    seed: int
    speed: float

    def decision(self, step: int) -> ScalingDecision:
        """What is decided at a control step; the list starts again when it is over."""
        return self.decisions[step % len(self.decisions)]


def slow_profile(exact_profile: Path) -> Path:
    """Where the toy profile at half the speed is."""
    return exact_profile.with_name("slow.yaml")


@st.composite
def _pools(draw: st.DrawFn, profile: str, name: str, role: str) -> dict[str, Any]:
    batch_limit = draw(st.integers(1, 8))
    low, high = sorted(draw(st.tuples(st.integers(0, 2), st.integers(1, 4))))
    return {
        "name": name,
        "role": role,
        "profile": draw(st.sampled_from([profile, profile, str(slow_profile(Path(profile)))])),
        "min_replicas": low,
        "max_replicas": max(high, 1),
        "initial_replicas": max(low, draw(st.integers(0, high))) if high >= low else low,
        "startup": [{"mean_s": draw(st.sampled_from([0.0, 0.5, 2.0, 5.0])), "cv": draw(st.sampled_from([0.0, 0.5]))}],
        "max_num_seqs": batch_limit,
        "max_num_batched_tokens": draw(st.sampled_from([batch_limit, 8, 16, 24, 64, 100])),
        "kv_blocks": draw(st.sampled_from([12, 16, 24, 40, 400])),
        "scheduler": draw(st.sampled_from(["vllm", *SCHEDULER_CODES])),
        "slos_serve": draw(SLOS_SERVE_OPTIONS),
        "mean_time_to_crash_s": draw(st.sampled_from([None, None, 3.0, 15.0])),
        "prefix_caching": draw(st.booleans()),
        "speculation": draw(st.sampled_from([None, None, *SPECULATIONS])),
        "block_move_s": draw(st.sampled_from([0.0, 2.0**-7])),
        "kv_allocation": draw(st.sampled_from([*4 * ["paged"], "contiguous"])),
    } | draw(st.sampled_from([{}, {}, *COMINGS_AND_GOINGS]))


@st.composite
def _classes(draw: st.DrawFn, name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "ttft_slo_s": draw(st.sampled_from([0.25, 1.0, 4.0])),
        "tpot_slo_s": draw(st.sampled_from([0.04, 0.0625, 0.5])),
        "deadline_s": draw(st.sampled_from([None, 2.0, 8.0])),
        "priority": draw(st.integers(0, 2)),
        "queue_limit": draw(st.sampled_from([0, 1, 3, 100])),
        "timeout_s": draw(st.sampled_from([None, None, 0.25, 2.0])),
        "max_output_tokens": draw(st.sampled_from([80, 100])),
    }


@st.composite
def cases(
    draw: st.DrawFn,
    profile: str,
    role_sets: tuple[list[str], ...],
    least_requests: int = 0,
    scheduler: str | None = None,
    moving: bool = False,
    balanced: bool = False,
) -> Case:
    roles = draw(st.sampled_from(role_sets))
    pools = [draw(_pools(profile, f"pool{k}", role)) for k, role in enumerate(roles)]
    for pool in pools:
        if scheduler is not None:
            pool |= {"scheduler": scheduler, "min_replicas": 2, "initial_replicas": 2, "max_replicas": 3}
        if pool["role"] == "prefill":
            pool["speculation"] = None
        if pool["role"] == "decode":  # small, so that some are preempted after their transfer
            pool |= {"prefix_caching": False, "kv_blocks": min(pool["kv_blocks"], 16)}
            pool["max_num_seqs"] = max(pool["max_num_seqs"], 4)
        if pool["scheduler"] in ("fastserve", "slos-serve", "andes"):
            pool |= {"kv_allocation": "paged", "prefix_caching": False}
            pool["speculation"] = pool["speculation"] if pool["scheduler"] == "slos-serve" else None
        pool["prefix_caching"] &= pool["kv_allocation"] == "paged"
        if balanced:  # several replicas with several sequences each
            pool |= {"rebalance": draw(st.sampled_from(REBALANCES)), "kv_blocks": draw(st.sampled_from([16, 24, 40]))}
            pool |= {"min_replicas": 2, "initial_replicas": 2, "max_replicas": draw(st.integers(2, 4))}
            pool["max_num_seqs"] = max(pool["max_num_seqs"], 4)
        elif moving:  # small, so that interactive work must make room
            pool["max_num_seqs"] = min(pool["max_num_seqs"], 4)
        if moving or pool["role"] in ("prefill", "decode"):
            pool |= {"scheduler": draw(st.sampled_from(["vllm", "vllm-priority"])), "kv_allocation": "paged"}
        verified_tokens = 1 + (pool["speculation"] or {}).get("draft_tokens", 0)
        pool["max_num_batched_tokens"] = max(pool["max_num_batched_tokens"], pool["max_num_seqs"] * verified_tokens)
    mixes = [["interactive", "batch"], ["batch", "interactive", "interactive"]]
    kinds = draw(st.sampled_from(mixes if moving else [["interactive"], *mixes]))
    classes = [draw(_classes(f"class{k}", kind)) for k, kind in enumerate(kinds)]
    if roles == ["mixed", "mixed"] and draw(
        st.booleans()
    ):  # two models, each with a pool and the classes that ask for it
        for k, item in enumerate((*pools, *classes)):
            item["model"] = "ab"[k % 2]
    interval_s = draw(st.sampled_from([1.0, 2.0]))
    router = draw(st.sampled_from(["packing", "packing", "freeness"] if balanced else sorted(ROUTER_CODES)))
    if (balanced or router == "freeness") and len({item["priority"] for item in classes}) > 1:
        urgent = min(item["priority"] for item in classes)
        kinds_and_models = {(item["kind"], item.get("model")) for item in classes if item["priority"] == urgent}
        for pool in pools:
            serves = any(
                pool["role"] in (*ROLES_SERVING[kind], "prefill", "decode") and pool.get("model") == model
                for kind, model in kinds_and_models
            )
            pool["urgent_headroom_blocks"] = draw(st.sampled_from([0, 3, 8])) if serves else 0
    staged = all(pool["scheduler"] in STAGED_SCHEDULERS and pool["kv_allocation"] == "paged" for pool in pools)
    spec = FleetSpec.from_dict(
        {
            "pools": pools,
            "classes": classes,
            "router": router,
            "control_interval_s": interval_s,
            "telemetry_age_s": draw(st.sampled_from([0.0, 0.25, interval_s])),
            "evict_batch": draw(st.sampled_from([True, True, moving])),
            "eviction": draw(st.sampled_from(["host", "host", "recompute"])) if moving else "recompute",
            "drain": draw(st.sampled_from(["wait", "migrate"])) if moving else "wait",
            "kv_transfer": draw(st.sampled_from(KV_TRANSFERS)) if "prefill" in roles else None,
            "postprocess": draw(st.sampled_from([None, None, None, *POSTPROCESSES])) if staged else None,
        }
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_requests = draw(st.integers(least_requests, 40))
    workload = _workload(rng, spec, num_requests, burst_s=draw(st.sampled_from([0.0, 0.125, 4.0])))
    decisions = [_decision(rng, spec) for _ in range(draw(st.integers(1, 6)))]
    return Case(spec, workload, decisions, draw(st.integers(0, 1000)), draw(st.sampled_from([1.0, 0.75, 1.5])))


def _workload(rng: np.random.Generator, spec: FleetSpec, num_requests: int, burst_s: float) -> Workload:
    """Requests in bursts; lengths fit the smallest replica."""
    room = min(pool.num_kv_blocks * 16 - pool.verified_tokens + 1 for pool in spec.pools)
    bursts = np.sort(rng.uniform(0.0, 6.0, size=3))
    arrival_s = bursts[rng.integers(0, 3, size=num_requests)] + rng.uniform(0.0, 1.0, size=num_requests) * burst_s
    prompt = np.where(
        rng.random(num_requests) < 0.7, rng.integers(1, 60, num_requests), rng.integers(1, room, num_requests)
    )
    output = np.where(rng.random(num_requests) < 0.2, 1, rng.integers(1, 80, num_requests))
    prompt = np.minimum(prompt, room)
    output = np.minimum(output, room - prompt + 1)
    if any(pool.reserves_output for pool in spec.pools):
        prompt = np.minimum(prompt, room - 100)
    return Workload(
        np.sort(np.round(arrival_s / GRID_S) * GRID_S),
        prompt,
        output,
        rng.integers(0, len(spec.classes), num_requests),
        spec.class_names,
        12.0,
        **shared_prefixes(rng, prompt),
    )


def shared_prefixes(rng: np.random.Generator, prompt_tokens: Any) -> dict[str, Any]:
    """Hashes of prompts that are branches of a few conversations; some requests repeat one to its end."""
    block_tokens = int(rng.choice([16, 48]))
    counts = np.where(rng.random(len(prompt_tokens)) < 0.9, -(-prompt_tokens // block_tokens), 0)
    ids = []
    for q, count in enumerate(counts):
        conversation, shared = rng.integers(0, 3), rng.integers(0, 30)
        ids += [1000 * conversation + k if k < shared else 10_000 * (q + 1) + k for k in range(count)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return {
        "hash_offsets": offsets.astype(np.int64),
        "hash_ids": np.array(ids, dtype=np.int64),
        "hash_block_tokens": block_tokens,
    }


def _decision(rng: np.random.Generator, spec: FleetSpec) -> ScalingDecision:
    targets = [rng.integers(pool.min_replicas, pool.max_replicas + 1) for pool in spec.pools]
    caps = [pool.batch_limit if rng.random() < 0.5 else rng.integers(1, pool.batch_limit + 1) for pool in spec.pools]
    admission = rng.choice([np.inf, np.inf, np.inf, 2.0, 1.0, 0.5, 0.0], size=len(spec.classes))
    limits = rng.choice([NO_LIMIT, NO_LIMIT, NO_LIMIT, 5, 2, 1, 0], size=len(spec.classes))
    selectivity = rng.choice([0.0, 0.0, 0.5, 1.0, 3.0], size=len(spec.classes))
    whole = np.array(targets, dtype=np.int64), np.array(caps, dtype=np.int64)
    return ScalingDecision(*whole, admission, limits, selectivity)
