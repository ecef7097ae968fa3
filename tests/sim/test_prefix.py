"""Automatic prefix caching: by hand, against the trace's own ideal, and on a public trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.prefix import ideal_prefix_hit_rate, prefix_blocks
from rl_autoscale.workload.readers import read_trace
from rl_autoscale.workload.trace import Workload
from rl_autoscale.workload.transform import assign_class, slice_time

POOL = {"name": "p", "prefix_caching": True}
A, B, C = (list(range(100 * k, 100 * k + 12)) for k in (1, 2, 3))


def first_tokens_s(requests: Any) -> list[float]:
    return requests["first_token_s"].tolist()


def hashed(prompt_tokens: list[int], hash_ids: list[list[int]], block_tokens: int = 16) -> Workload:
    number = len(prompt_tokens)
    return Workload(
        np.arange(number) * 10.0,
        np.array(prompt_tokens),
        np.ones(number, dtype=np.int32),
        np.zeros(number, dtype=np.int16),
        ("chat",),
        10.0 * number,
        hash_offsets=np.concatenate([[0], np.cumsum([len(ids) for ids in hash_ids])]),
        hash_ids=np.concatenate(hash_ids).astype(np.int64),
        hash_block_tokens=block_tokens,
    )


def test_a_repeated_prompt_is_computed_from_its_last_token_on(play: Any) -> None:
    """128 tokens are two iterations of 64; the second time 7 of 8 full blocks are found and 16 tokens are left."""
    rows = [(0.0, "chat", 128, 3), (10.0, "chat", 128, 3), (20.0, "chat", 128, 3)]
    hashes = [A[:8], A[:8], B[:8]]
    assert first_tokens_s(play([POOL], rows, hashes=hashes)) == [2.0, 11.0, 22.0]
    assert first_tokens_s(play([{"name": "p"}], rows, hashes=hashes)) == [2.0, 12.0, 22.0]
    assert first_tokens_s(play([POOL], rows)) == [2.0, 12.0, 22.0]


def test_one_token_at_least_is_computed(play: Any) -> None:
    """A prompt that is cached to its last token needs its last block again: 64 + 16 tokens exceed a budget of 79."""
    rows = [(0.0, "chat", 128, 1), (10.0, "chat", 1, 1), (10.5, "chat", 64, 1), (10.5, "chat", 128, 1)]
    hashes = [A[:8], [], B[:4], A[:8]]
    assert first_tokens_s(play([POOL | {"max_num_batched_tokens": 79}], rows, hashes=hashes))[3] == 13.0
    assert first_tokens_s(play([POOL | {"max_num_batched_tokens": 80}], rows, hashes=hashes))[3] == 12.0


def test_a_prefix_is_found_as_soon_as_the_chunk_that_computes_it_is_scheduled(play: Any) -> None:
    """Both are admitted at 1 s: the second one's 64 shared tokens are in the first one's chunk, 16 are left."""
    rows = [(0.0, "chat", 1, 1), (0.5, "chat", 64, 2), (0.5, "chat", 80, 2)]
    pool = POOL | {"max_num_batched_tokens": 80}
    assert first_tokens_s(play([pool], rows, hashes=[[], A[:4], A[:5]])) == [1.0, 2.0, 2.0]
    assert first_tokens_s(play([pool], rows)) == [1.0, 2.0, 3.0]


def test_the_tail_of_the_least_recently_used_prompt_is_overwritten_first(play: Any) -> None:
    """12 blocks. A leaves 8 full ones, 3 were never used and 1 is blank: B overwrites A only beyond these 4.

    When A comes again, 5 lost blocks are one too many: more than the 64 tokens of one iteration must be computed.
    """
    pool = POOL | {"kv_blocks": 12}
    for prompt_tokens, num_overwritten, last_first_token_s in ((64, 1, 21.0), (127, 4, 21.0), (143, 5, 22.0)):
        rows = [(0.0, "chat", 128, 2), (10.0, "chat", prompt_tokens, 2), (20.0, "chat", 128, 2)]
        assert -(-(prompt_tokens + 1) // 16) == 4 + num_overwritten
        requests = play([pool], rows, hashes=[A[:8], B[: prompt_tokens // 16], A[:8]])
        assert first_tokens_s(requests)[2] == last_first_token_s


def test_a_preempted_request_finds_what_it_has_computed(play: Any) -> None:
    """Two sequences outgrow 9 blocks; with caching the one that made room computes one block again, not all."""
    rows = [(0.0, "chat", 60, 30), (0.0, "chat", 60, 30)]
    pool = {"name": "p", "kv_blocks": 9, "max_num_batched_tokens": 128}
    plain, cached = play([pool], rows), play([pool | {"prefix_caching": True}], rows)
    assert plain["num_preemptions"].tolist() == cached["num_preemptions"].tolist() == [0, 1]
    assert plain["end_s"].tolist() == cached["end_s"].tolist()  # both fit one iteration of 128 tokens
    pool["max_num_batched_tokens"] = 64  # 79 tokens no longer fit one iteration; 15 do
    plain, cached = play([pool], rows), play([pool | {"prefix_caching": True}], rows)
    assert cached["end_s"][1] == plain["end_s"][1] - 1.0


def test_prefix_affinity_sends_a_prompt_where_its_prefix_is(play: Any) -> None:
    """A and B overlap, so they go to different replicas; both idle later, only affinity finds B's again."""
    rows = [(0.0, "chat", 64, 5), (1.5, "chat", 64, 5), (20.0, "chat", 128, 2), (30.0, "chat", 128, 2)]
    hashes = [A[:4], B[:4], B[:8], A[:8]]
    pool = POOL | {"min_replicas": 2, "max_replicas": 2}
    requests = play([pool], rows, hashes=hashes, router="prefix_affinity")
    assert requests["replica"].tolist() == [0, 1, 1, 0]
    assert first_tokens_s(requests)[2:] == [21.0, 31.0]
    requests = play([pool], rows, hashes=hashes)
    assert requests["replica"].tolist() == [0, 1, 0, 0]
    assert first_tokens_s(requests)[2:] == [22.0, 31.0]


def test_prefix_affinity_gives_nobody_more_than_its_share(play: Any) -> None:
    """All have one prefix. The third finds 2 there, 1.25 x 3 / 2 are allowed; the eighth 5 and 1.25 x 8 / 2."""
    rows = [(0.1 * k, "chat", 16, 30) for k in range(8)]
    pool = POOL | {"min_replicas": 2, "max_replicas": 2, "max_num_seqs": 8}
    requests = play([pool], rows, hashes=[A[:1]] * 8, router="prefix_affinity")
    assert requests["replica"].tolist() == [0, 0, 1, 1, 1, 1, 1, 0]


def test_an_ideal_cache_finds_full_blocks_and_leaves_a_token() -> None:
    workload = hashed([40, 40, 32, 16, 100], [A[:3], A[:3], A[:2], B[:1], A[:2] + C[:5]])
    assert ideal_prefix_hit_rate(workload) == (32 + 16 + 0 + 32) / (40 + 40 + 32 + 16 + 100)


def test_a_hash_of_many_tokens_stands_for_many_blocks() -> None:
    blocks = prefix_blocks(hashed([100, 70], [[7, 9], [7, 8]], block_tokens=64))
    assert blocks.num_shared.tolist() == [6, 4]
    assert blocks.keys(0).tolist() == [0, 1, 2, 3, 8, 9]
    assert blocks.keys(1).tolist() == [0, 1, 2, 3]


def test_hashes_that_do_not_fit_kv_blocks_are_refused() -> None:
    workload = hashed([100], [[1, 2, 3, 4, 5]], block_tokens=20)
    spec = one_pool(2, True)
    with pytest.raises(SpecError, match=r"hash_block_tokens=20 .* prefix_caching: false"):
        SimFleet(spec, workload)
    SimFleet(one_pool(2, False), workload)


def one_pool(num_replicas: int, prefix_caching: bool) -> FleetSpec:
    pool = {"name": "h100", "profile": "llama-3.1-8b_h100_tp1", "prefix_caching": prefix_caching}
    replicas = {"min_replicas": num_replicas, "max_replicas": num_replicas}
    return FleetSpec.from_dict(
        {"pools": [pool | replicas], "classes": [{"name": "chat", "ttft_slo_s": 2, "tpot_slo_s": 0.1}]}
    )


def test_a_public_trace_is_served_faster_with_prefix_caching(real_traces: Path) -> None:
    """The first half hour of Mooncake's conversations; the cache of two replicas holds a part of what it could."""
    trace = read_trace(real_traces / "mooncake_conversation.parquet").workload
    workload = slice_time(assign_class(trace, "chat"), 0.0, 1800.0)
    results = {}
    for caching in (True, False):
        fleet = SimFleet(one_pool(16, caching), workload)
        while fleet.advance():
            pass
        results[caching] = fleet.result()
    hit_rate = results[True].summary()["prefix_hit_rate"]
    assert 0.02 < hit_rate < ideal_prefix_hit_rate(workload) < 0.5
    assert "prefix_hit_rate" not in results[False].summary()
    assert results[True].classes[0].ttft_p50_s < results[False].classes[0].ttft_p50_s
    pool = results[True].pools[0]
    assert pool.prefix_hit_rate == hit_rate
    assert pool.prefix_queried_tokens == workload.prompt_tokens.sum(dtype=np.int64)
