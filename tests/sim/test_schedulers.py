"""What each scheduler is known for, in both simulators; iterations last 1 s. The random cases: test_differential.py."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import SchedulerName
from rl_autoscale.fleet.profile import load_profile
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.token_budget import BUSY_CONTEXT_TOKENS, BUSY_DECODES, TILE_TOKENS, token_budget_for
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import SCHEDULER_CODES
from rl_autoscale.sim.reference.schedulers import SCHEDULERS
from rl_autoscale.workload.trace import Workload

PROFILE = "llama-3.1-8b_h100_tp1"
LONG_PROMPT = [(0.0, "chat", 10, 10), (2.5, "chat", 150, 1)]
"""A decode sequence with 7 tokens to go when a prompt of more than two token budgets (64) comes."""


def test_every_scheduler_is_in_both_simulators() -> None:
    assert set(SCHEDULER_CODES) == set(SCHEDULERS) == set(get_args(SchedulerName))
    assert len(set(SCHEDULER_CODES.values())) == len(SCHEDULER_CODES)


@pytest.mark.parametrize(
    ("scheduler", "decode_end_s", "first_token_s"),
    [("sarathi", 10.0, 6.0), ("vllm", 10.0, 6.0), ("trtllm-max-utilization", 10.0, 6.0), ("vllm-v0", 13.0, 6.0)],
)
def test_only_prefill_first_stalls_decodes(
    play: Any, scheduler: str, decode_end_s: float, first_token_s: float
) -> None:
    """The prompt takes three iterations either way; with prompts first, the decode sequence stands still for them."""
    requests = play([{"name": "p", "scheduler": scheduler}], LONG_PROMPT)
    assert requests["end_s"][0] == decode_end_s
    assert requests["first_token_s"][1] == first_token_s


def test_stalls_widen_the_gaps_between_tokens() -> None:
    """The same tokens, the same load: prompts first serves first tokens sooner and the others later."""
    rng = np.random.default_rng(0)
    number = 300
    arrival_s = np.cumsum(rng.exponential(1 / 12.0, number))
    prompt = np.clip(rng.lognormal(7.0, 0.8, number), 100, 8000).astype(int)
    workload = Workload(
        arrival_s, prompt, rng.integers(50, 150, number), np.zeros(number, int), ("chat",), float(arrival_s[-1])
    )
    tpot_s, ttft_s = {}, {}
    for scheduler in ("sarathi", "vllm-v0"):
        pool = {"name": "p", "profile": PROFILE, "scheduler": scheduler, "max_replicas": 1}
        pool["max_num_batched_tokens"] = 1024 if scheduler == "sarathi" else 8192
        fleet = SimFleet(
            FleetSpec.from_dict({"pools": [pool], "classes": [{"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 1}]}),
            workload,
        )
        while fleet.advance():
            pass
        (chat,) = fleet.result().classes
        tpot_s[scheduler], ttft_s[scheduler] = chat.tpot_p99_s, chat.ttft_p50_s
    assert tpot_s["sarathi"] < 0.75 * tpot_s["vllm-v0"]
    assert ttft_s["vllm-v0"] < ttft_s["sarathi"]


def test_a_whole_prompt_waits_until_the_budget_holds_it(play: Any) -> None:
    """Two decode sequences leave 62 of 64 tokens: vLLM chunks a prompt of 63, TensorRT-LLM lets it wait."""
    rows = [(0.0, "chat", 10, 6), (0.0, "chat", 10, 9), (2.5, "chat", 63, 1)]
    assert play([{"name": "p", "max_num_seqs": 3}], rows)["scheduled_s"][2] == 3.0
    whole = play([{"name": "p", "max_num_seqs": 3, "scheduler": "trtllm-max-utilization"}], rows)
    assert whole["scheduled_s"][2] == 6.0  # when the first has left


CROWD = [(0.0, "chat", 30, 40), (0.0, "chat", 30, 40), (0.5, "chat", 30, 40)]
"""Each grows to 70 tokens, 5 blocks; two fit 10 blocks to the end, three only at first."""


def test_no_evict_admits_what_fits_to_the_end_and_max_utilization_pauses(play: Any) -> None:
    pool = {"name": "p", "max_num_seqs": 3, "kv_blocks": 10}
    limit = {"max_output_tokens": 40}
    greedy = play([{**pool, "scheduler": "trtllm-max-utilization"}], CROWD, chat=limit, batch=limit)
    assert greedy["num_preemptions"].tolist() == [0, 0, 1]
    assert greedy["scheduled_s"].tolist() == [0.0, 1.0, 1.0]
    careful = play([{**pool, "scheduler": "trtllm-no-evict"}], CROWD, chat=limit, batch=limit)
    assert not careful["num_preemptions"].any()
    assert careful["scheduled_s"].tolist() == [0.0, 1.0, 40.0]


def test_what_is_reserved_is_what_the_client_asked_for_and_not_what_it_gets(play: Any) -> None:
    """Outputs of 3 tokens that might have had 40: the third waits all the same, until one has left."""
    rows = [(0.0, "chat", 30, 3), (0.0, "chat", 30, 3), (0.5, "chat", 30, 3)]
    pool = {"name": "p", "max_num_seqs": 3, "kv_blocks": 10, "scheduler": "trtllm-no-evict"}
    for asked, scheduled_s in ((40, 3.0), (3, 1.0)):
        limit = {"max_output_tokens": asked}
        requests = play([pool], rows, chat=limit, batch=limit)
        assert requests["scheduled_s"][2] == scheduled_s


def test_contiguous_allocation_wastes_what_paging_does_not(metronome_profile: Any) -> None:
    """Prompts of 30 tokens with 8 of at most 100 output tokens hold 37: of 3 blocks when paged, else of 9."""
    waste, ends = {}, {}
    for allocation in ("paged", "contiguous"):
        pool = {"name": "p", "profile": str(metronome_profile), "max_num_seqs": 4, "kv_blocks": 20, "max_replicas": 1}
        promise = {"name": "chat", "ttft_slo_s": 100, "tpot_slo_s": 100, "max_output_tokens": 100}
        spec = FleetSpec.from_dict({"pools": [{**pool, "kv_allocation": allocation}], "classes": [promise]})
        fleet = SimFleet(spec, Workload(np.zeros(4), np.full(4, 30), np.full(4, 8), np.zeros(4, int), ("chat",), 10.0))
        while fleet.advance():
            pass
        result = fleet.result()
        waste[allocation] = result.pools[0].kv_waste
        ends[allocation] = np.nanmax(fleet.batch.requests()["end_s"])
    assert waste == pytest.approx({"paged": 1 - 37 / 48, "contiguous": 1 - 37 / 144})
    assert ends == {"paged": 10.0, "contiguous": 17.0}  # 20 blocks hold two reservations of 9, or all four as they are


def test_a_pool_that_reserves_needs_to_know_what_clients_ask_for() -> None:
    fleet: dict[str, Any] = {
        "pools": [{"name": "p", "profile": PROFILE, "scheduler": "trtllm-no-evict"}],
        "classes": [{"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 1}],
    }
    with pytest.raises(SpecError, match="give class 'chat' its max_output_tokens"):
        FleetSpec.from_dict(fleet)
    fleet["classes"][0]["max_output_tokens"] = 5
    with pytest.raises(SpecError, match="request 0 has 6 output tokens, class 'chat' allows max_output_tokens=5"):
        SimFleet(
            FleetSpec.from_dict(fleet),
            Workload(np.zeros(1), np.ones(1, int), np.full(1, 6), np.zeros(1, int), ("chat",), 1.0),
        )


@pytest.mark.parametrize("tbt_slo_s", [0.02, 0.05, 0.1, 0.5])
def test_the_token_budget_is_the_largest_that_keeps_the_promise(tbt_slo_s: float) -> None:
    profile = load_profile(PROFILE)

    def iteration_s(budget: int) -> float:
        return profile.iteration_s(
            num_decode=BUSY_DECODES,
            decode_context_tokens=BUSY_DECODES * BUSY_CONTEXT_TOKENS,
            chunks=((budget - BUSY_DECODES, BUSY_CONTEXT_TOKENS),),
        )

    budget = token_budget_for(profile, tbt_slo_s)
    assert budget % TILE_TOKENS == 0
    assert iteration_s(budget) <= tbt_slo_s < iteration_s(budget + TILE_TOKENS)


def test_a_promise_that_no_budget_keeps_is_refused() -> None:
    with pytest.raises(SpecError, match="out of reach"):
        token_budget_for(load_profile(PROFILE), 0.001)


LINE = [(0.0, "chat", 10, 20), (0.5, "chat", 20, 1)]
"""A long answer, and a short one behind it whose prompt takes 2 KV blocks."""
TIGHT = {"name": "p", "kv_blocks": 2}
"""While the long answer runs, the short one does not fit."""


def test_fastserve_has_no_head_of_line_blocking(play: Any) -> None:
    """Both join level 7 of 1.28 s, since prompts take 1 s. After 2 s the first descends, and the second is served."""
    assert play([TIGHT], LINE)["end_s"].tolist() == [20.0, 21.0]
    requests = play([{**TIGHT, "scheduler": "fastserve", "block_move_s": 0.0}], LINE)
    assert requests["end_s"].tolist() == [21.0, 3.0]
    assert not requests["num_preemptions"].any()  # nothing is computed again


def test_an_iteration_waits_for_the_kv_blocks_that_are_moved(play: Any) -> None:
    """The first has 1 block when it makes way: 4 s there, 4 s back, instead of 1 s each for the iterations beside."""
    pool = {**TIGHT, "scheduler": "fastserve", "block_move_s": 4.0}
    assert play([pool], LINE)["end_s"].tolist() == [27.0, 6.0]
    assert play([{**pool, "kv_blocks": 4}], LINE)["end_s"].tolist() == [20.0, 2.0]


def test_fastserve_serves_the_starved(play: Any) -> None:
    """Short requests keep coming and go first, until the long one has waited for 3 s."""
    rows = [(0.0, "chat", 10, 12), *((0.5 + k, "chat", 20, 1) for k in range(30))]
    requests = play([{**TIGHT, "scheduler": "fastserve", "block_move_s": 0.0}], rows)
    assert requests["end_s"][1] == 3.0
    assert 3.0 + 3.0 + 10.0 <= requests["end_s"][0] <= 25.0


def test_fastserve_refuses_what_it_cannot_move() -> None:
    with pytest.raises(SpecError, match="scheduler fastserve does not go with prefix_caching"):
        FleetSpec.from_dict(
            {
                "pools": [{"name": "p", "profile": PROFILE, "scheduler": "fastserve", "prefix_caching": True}],
                "classes": [{"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 1}],
            }
        )


SLOS = {"ttft_slo_s": 4.0, "tpot_slo_s": 1.0}
"""An iteration of 64 tokens lasts as long as one token of an answer may."""


def test_slos_serve_keeps_the_promises_it_made_and_declines_the_rest(play: Any) -> None:
    """Four prompts of two iterations each by 4 s: the first two can be promised, and a newcomer does not delay them."""
    rows = [(0.0, "chat", 120, 1), *((0.5, "chat", 120, 1) for _ in range(3)), (3.5, "chat", 60, 1)]
    pool = {"name": "p", "max_num_seqs": 8, "max_num_batched_tokens": 64}
    in_turn = play([pool], rows, chat=SLOS)
    assert in_turn["slo_met"].tolist() == [1, 1, 0, 0, 0]
    planned = play([{**pool, "scheduler": "slos-serve"}], rows, chat=SLOS)
    assert planned["slo_met"].tolist() == [1, 1, 0, 0, 1]  # the last goes before those that are late already


def test_slos_serve_bounds_a_batch_by_the_tightest_tpot() -> None:
    """A long prompt beside one stream: chunks are as long as the stream's next token allows, and no longer."""
    arrival_s, prompt, output = np.array([0.0, 0.3]), np.array([100, 8000]), np.array([120, 2])
    workload = Workload(arrival_s, prompt, output, np.zeros(2, int), ("chat",), 2.0)
    met = {}
    for scheduler in ("vllm", "slos-serve"):
        pool = {"name": "p", "profile": PROFILE, "scheduler": scheduler, "max_replicas": 1}
        promise = {"name": "chat", "ttft_slo_s": 10, "tpot_slo_s": 0.0075}
        fleet = SimFleet(FleetSpec.from_dict({"pools": [pool], "classes": [promise]}), workload)
        while fleet.advance():
            pass
        met[scheduler] = fleet.batch.requests()["slo_met"][0]
    assert met == {"vllm": 0, "slos-serve": 1}


RIVALS = [
    (0.0, "chat", 128, 1),
    (0.2, "chat", 250, 1),
    *((1.5, "chat", 120, 1) for _ in range(3)),
]
"""With 64 tokens per second and 6 s to the first token: the long prompt alone, or two of the three behind it."""


@pytest.mark.parametrize(("admission", "met"), [("dp", [1, 0, 1, 1, 0]), ("firm", [1, 1, 0, 0, 0])])
def test_slos_serve_serves_the_most_that_it_can(play: Any, admission: str, met: list[int]) -> None:
    """At 1 s the long prompt is promised its SLO; at 2 s, not begun yet, it makes way for two. Firm promises stand."""
    pool = {"name": "p", "max_num_seqs": 8, "scheduler": "slos-serve", "slos_serve": {"admission": admission}}
    assert play([pool], RIVALS, chat={**SLOS, "ttft_slo_s": 6.0})["slo_met"].tolist() == met


@pytest.mark.parametrize(("tries", "first_token_s"), [(1, 6.0), (2, 3.0)])
def test_slos_serve_offers_what_it_declines_to_the_next_replica(play: Any, tries: int, first_token_s: float) -> None:
    """The third comes to the first replica again, which computes 250 tokens until 4 s; the second is done at 1 s."""
    rows = [(0.0, "chat", 250, 1), (0.0, "chat", 60, 1), (0.5, "chat", 120, 1)]
    pool = {"name": "p", "min_replicas": 2, "max_replicas": 2, "max_num_seqs": 4, "scheduler": "slos-serve"}
    requests = play([{**pool, "slos_serve": {"tries": tries}}], rows, chat=SLOS, router="round_robin")
    assert requests["first_token_s"].tolist() == [4.0, 1.0, first_token_s]
    assert requests["slo_met"].tolist() == [1, 1, int(tries == 2)]


def test_slos_serve_serves_as_best_effort_what_no_replica_takes(play: Any) -> None:
    """Both compute until 4 s and decline the third, which would have its first token at 6 s; nobody is asked twice."""
    rows = [(0.0, "chat", 250, 1), (0.0, "chat", 250, 1), (0.5, "chat", 120, 1)]
    pool = {"name": "p", "min_replicas": 2, "max_replicas": 2, "max_num_seqs": 2, "scheduler": "slos-serve"}
    for tries in (2, 5):
        requests = play([{**pool, "slos_serve": {"tries": tries}}], rows, chat=SLOS, router="round_robin")
        assert requests["slo_met"].tolist() == [1, 1, 0]
        assert requests["end_s"][2] == 6.0


def test_a_prompt_enters_when_decodes_overwrite_what_it_would_have_found(play: Any) -> None:
    """Beside one decode 63 tokens are left. With two blocks of the first prompt 64 are to compute, so it waits; without
    the second one, which the decode's second block takes, 80: more than the budget, so it enters in pieces."""
    pool = {"name": "p", "scheduler": "trtllm-no-evict", "prefix_caching": True, "max_num_seqs": 4, "kv_blocks": 20}
    rows = [(0.0, "chat", 48, 1), (1.5, "chat", 272, 1), (10.0, "chat", 10, 40), (12.5, "chat", 96, 1)]
    hashes = [[0, 1, 2], list(range(100, 117)), [], [0, 1, 200, 201, 202, 203]]
    limit = {"max_output_tokens": 40}
    requests = play([pool], rows, hashes=hashes, chat=limit, batch=limit)
    assert requests["end_s"][2] == 50.0
    assert requests["scheduled_s"][3] == 17.0
