"""The gateway's core: laws under any sequence of events, and single rules by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.serving.gateway.core import GatewayCore
from rl_autoscale.serving.gateway.tickets import INSIDE, State
from rl_autoscale.serving.gateway_api import GatewayDecision, ReplicaAddress

PROFILE = "llama-3.1-8b_a100_tp1"
SPEC = FleetSpec.from_dict(
    {
        "pools": [
            {"name": "fast", "role": "interactive", "profile": PROFILE, "max_num_seqs": 3},
            {"name": "shared", "role": "mixed", "profile": PROFILE, "max_num_seqs": 2, "startup": [{"mean_s": 40.0}]},
        ],
        "classes": [
            {"name": "chat", "ttft_slo_s": 0.5, "tpot_slo_s": 0.1, "queue_limit": 4, "timeout_s": 5.0},
            {"name": "bulk", "kind": "batch", "ttft_slo_s": 60, "tpot_slo_s": 1, "queue_limit": 6, "priority": 1},
        ],
    }
)


def address(name: str, pool: str = "shared", phase: str = "ready") -> ReplicaAddress:
    return ReplicaAddress(replica_id=name, pool=pool, url=f"http://{name}", phase=phase)


def core_with(*addresses: ReplicaAddress, max_sent: int = 3) -> GatewayCore:
    core = GatewayCore(SPEC, random.Random(1).random, max_sent=max_sent)
    core.set_replicas(addresses, 0.0)
    return core


class AnySequence(RuleBasedStateMachine):
    """Clients, replicas and the controller do what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.core = core_with()
        self.now_s = 0.0
        self.tickets = []
        self.num_told = 0  # of evictions

    # Two arrivals find a mixed replica full of batch work more often than chance would have it.
    @rule(streams=st.booleans())
    def interactive_burst(self, streams):
        for c in (1, 1, 0, 0):
            self.arrive(c, 10, streams)

    def sent(self):
        return [ticket for ticket in self.tickets if ticket.state is State.SENT]

    @rule(c=st.integers(0, 1), tokens=st.integers(1, 2000), streams=st.booleans())
    def arrive(self, c, tokens, streams):
        self.tickets.append(self.core.arrive(c, tokens, self.now_s, streams=streams, on_evict=self.told))

    def told(self):
        self.num_told += 1

    @rule(seconds=st.sampled_from([0.01, 0.3, 2.0, 40.0]))
    def pass_time(self, seconds):
        self.now_s += seconds
        self.core.tick(self.now_s)

    @rule(data=st.data())
    @precondition(lambda self: self.tickets)
    def cancel(self, data):
        self.core.cancel(data.draw(st.sampled_from(self.tickets)), self.now_s)

    @rule(data=st.data(), event=st.sampled_from(["see_token", "finish", "lose"]))
    @precondition(lambda self: self.sent())
    def replica_answers(self, data, event):
        ticket = data.draw(st.sampled_from(self.sent()))
        if event == "see_token" and ticket.streams:
            self.core.see_token(ticket, self.now_s)
        elif event == "finish":
            self.core.finish(ticket, 5, self.now_s)
        elif event == "lose":
            self.core.lose(ticket, self.now_s, "it fell over")

    @rule(
        phases=st.lists(
            st.tuples(st.integers(0, 3), st.sampled_from(["starting", "ready", "ready", "draining", "failed"])),
            max_size=4,
            unique_by=lambda item: item[0],
        )
    )
    def list_replicas(self, phases):
        self.core.set_replicas(
            [address(f"r{number}", "fast" if number % 2 else "shared", phase) for number, phase in phases], self.now_s
        )

    @rule(cap=st.integers(1, 4), level=st.sampled_from([None, 0.0, 1.0, 3.0]))
    def decide(self, cap, level):
        before = {replica.replica_id: replica.load for replica in self.core.replicas.values()}
        self.core.decide(GatewayDecision(max_batch_size={"shared": cap}, admission={"chat": level}), self.now_s)
        for replica in self.core.replicas.values():
            assert replica.load <= max(replica.pool.cap, before[replica.replica_id])

    @invariant()
    def every_request_is_in_exactly_one_state(self):
        snapshot = self.core.snapshot(self.now_s, started_at_s=0.0, uptime_s=self.now_s)
        for c, name in enumerate(SPEC.class_names):
            book = snapshot.classes[name]
            ends = book.finished + book.refused + book.dropped + book.cancelled + book.failed
            assert book.arrivals == ends + book.queue_length + book.in_flight
            mine = [ticket for ticket in self.tickets if ticket.class_index == c]
            assert book.arrivals == len(mine)
            assert book.in_flight == sum(ticket.state is State.SENT for ticket in mine)
            assert book.queue_length == sum(ticket.state is State.QUEUED for ticket in mine)
            assert book.met <= book.finished
            assert book.ttft.count <= book.first_tokens

    @invariant()
    def sums_agree_with_what_is_on_the_replicas(self):
        for pool in self.core.pools:
            on_it = [ticket for replica in pool.replicas for ticket in replica.tickets]
            assert pool.in_flight == len(on_it)
            assert pool.pending_tokens == sum(ticket.prompt_tokens for ticket in on_it if ticket.awaited)
            assert pool.in_flight_interactive == sum(ticket.class_index == 0 for ticket in on_it)
            assert all(ticket.replica is replica for replica in pool.replicas for ticket in replica.tickets)
        assert sum(pool.in_flight for pool in self.core.pools) == len(self.sent())

    @invariant()
    def evictions_are_bounded_told_of_and_cut_no_stream(self):
        assert self.num_told == sum(pool.evictions for pool in self.core.pools)
        assert self.num_told == sum(ticket.num_evictions for ticket in self.tickets)
        for ticket in self.tickets:
            assert ticket.num_evictions <= (3 if ticket.class_index == 1 else 0)
            assert ticket.state is not State.QUEUED or not ticket.has_begun

    @invariant()
    def queues_are_in_the_order_of_arrival(self):
        for book in self.core.classes:
            numbers = [ticket.sequence for ticket in book.queue]
            assert numbers == sorted(numbers)
            assert book.queued_tokens == sum(ticket.prompt_tokens for ticket in book.queue)

    @invariant()
    def nobody_waits_beside_room(self):
        for c, book in enumerate(self.core.classes):
            for p in SPEC.pools_serving(c):
                room = any(replica.has_room(self.now_s) for replica in self.core.pools[p].replicas)
                assert not (book.queue and room)

    def teardown(self):
        for ticket in self.tickets:
            self.core.cancel(ticket, self.now_s)
        assert not any(ticket.state in INSIDE for ticket in self.tickets)
        assert all(pool.in_flight == pool.pending_tokens == 0 for pool in self.core.pools)


AnySequence.TestCase.settings = settings(max_examples=25, stateful_step_count=40)
TestAnySequence = AnySequence.TestCase


def test_a_request_without_a_replica_is_held_and_sent_when_one_comes() -> None:
    core = core_with()
    called = []
    ticket = core.arrive(0, 10, 0.0, on_change=lambda: called.append(True))
    assert (ticket.state, called) == (State.QUEUED, [])
    core.set_replicas([address("a")], 1.0)
    assert (ticket.state, called) == (State.SENT, [True])


def test_a_preferred_pool_comes_first_and_the_cap_holds() -> None:
    core = core_with(address("s", "shared"), address("f", "fast"))
    names = [core.arrive(0, 10, 0.0).replica.replica_id for _ in range(5)]
    assert names == ["f", "f", "f", "s", "s"]
    assert core.arrive(0, 10, 0.0).state is State.QUEUED


def test_batch_stays_off_interactive_pools() -> None:
    assert core_with(address("f", "fast")).arrive(1, 10, 0.0).state is State.QUEUED


def test_the_queue_is_bounded_and_says_when_to_come_again() -> None:
    core = core_with()
    states = [core.arrive(0, 10, 0.0) for _ in range(5)]
    assert [ticket.state for ticket in states[3:]] == [State.QUEUED, State.DROPPED]
    assert states[-1].retry_after_s == 60.0  # no replica of the preferred pool: its start-up time


def test_patience_ends() -> None:
    core = core_with()
    ticket = core.arrive(0, 10, 0.0)
    core.tick(4.99)
    assert ticket.state is State.QUEUED
    core.tick(5.0)
    assert ticket.state is State.DROPPED


def test_what_would_miss_is_refused_early() -> None:
    core = core_with()
    core.decide(GatewayDecision(max_batch_size={}, admission={"chat": 1.0}), 0.0)
    ticket = core.arrive(0, 10, 0.0)  # nothing is ready: the wait is a start-up
    assert ticket.state is State.REFUSED
    assert ticket.retry_after_s == pytest.approx(60.0 - 0.5, abs=0.1)
    assert core.arrive(1, 10, 0.0).state is State.QUEUED  # another class has its own level


def test_before_any_answer_has_ended_the_first_counts_for_as_long_as_it_has_stayed() -> None:
    core = core_with(address("a"))
    core.decide(GatewayDecision(max_batch_size={"shared": 1}, admission={"chat": 1.0}), 0.0)
    sent = core.arrive(1, 10, 0.0)
    core.see_token(sent, 0.1)
    assert core.arrive(0, 10, 0.2).state is State.QUEUED  # for all that is known, its place is free soon
    assert core.arrive(0, 10, 3.0).state is State.REFUSED


def test_a_selectivity_stays_until_another_is_said_and_is_told() -> None:
    core = core_with(address("a"))
    core.decide(GatewayDecision(max_batch_size={}, admission={}, selectivity={"chat": 0.5}), 0.0)
    core.decide(GatewayDecision(max_batch_size={}, admission={"chat": 1.0}), 0.0)
    told = core.snapshot(1.0, started_at_s=0.0, uptime_s=1.0).classes
    assert (told["chat"].selectivity, told["bulk"].selectivity) == (0.5, 0.0)


def test_a_class_at_its_limit_is_held_and_others_pass() -> None:
    core = core_with(address("a"))
    core.decide(GatewayDecision(max_batch_size={"shared": 4}, admission={}, max_in_flight={"bulk": 1}), 0.0)
    first, second = core.arrive(1, 10, 0.0), core.arrive(1, 10, 0.0)
    assert (first.state, second.state, core.arrive(0, 10, 0.0).state) == (State.SENT, State.QUEUED, State.SENT)
    core.decide(GatewayDecision(max_batch_size={}, admission={"bulk": None}), 1.0)  # what is not named stays
    assert second.state is State.QUEUED
    core.see_token(first, 1.0)
    core.finish(first, 10, 2.0)
    assert second.state is State.SENT
    third = core.arrive(1, 10, 3.0)
    assert third.state is State.QUEUED
    core.decide(GatewayDecision(max_batch_size={}, admission={}, max_in_flight={"bulk": None}), 4.0)
    assert third.state is State.SENT


def test_a_prompt_ahead_makes_the_next_one_wait() -> None:
    core = core_with(address("s"))
    core.decide(GatewayDecision(max_batch_size={}, admission={"chat": 1.0}), 0.0)
    assert core.arrive(1, 20_000, 0.0).state is State.SENT
    assert core.arrive(0, 10, 0.0).state is State.REFUSED


def test_an_unstarted_request_is_sent_elsewhere_and_its_replica_left_alone() -> None:
    core = core_with(address("a"), address("b"))
    ticket = core.arrive(1, 10, 0.0)
    assert ticket.replica.replica_id == "a"
    core.lose(ticket, 0.1, "connection refused")
    assert (ticket.state, ticket.replica.replica_id) == (State.SENT, "b")
    assert core.arrive(1, 10, 0.2).replica.replica_id == "b"
    assert core.arrive(1, 10, 0.7).replica.replica_id == "a"  # half a second is over


def test_a_begun_stream_fails_with_its_replica() -> None:
    core = core_with(address("a"), address("b"))
    ticket = core.arrive(1, 10, 0.0)
    core.see_token(ticket, 0.1)
    core.lose(ticket, 0.2, "connection reset")
    assert ticket.state is State.FAILED


def test_tries_are_bounded() -> None:
    core = core_with(address("a"), address("b"), address("c"), max_sent=2)
    ticket = core.arrive(1, 10, 0.0)
    core.lose(ticket, 0.1, "refused")
    core.lose(ticket, 0.2, "refused")
    assert ticket.state is State.FAILED


def test_a_lost_request_stands_before_younger_ones() -> None:
    core = core_with(address("a"))
    first, _, third = (core.arrive(1, 10, 0.0) for _ in range(3))
    core.lose(first, 0.1, "reset")
    assert list(core.classes[1].queue) == [first, third]


def test_draining_replicas_get_nothing_and_are_forgotten_once_empty() -> None:
    core = core_with(address("a"))
    ticket = core.arrive(1, 10, 0.0)
    core.set_replicas([address("a", phase="draining")], 1.0)
    assert core.arrive(1, 10, 1.0).state is State.QUEUED
    core.set_replicas([], 2.0)
    assert "a" in core.replicas
    core.finish(ticket, 3, 3.0)
    assert core.replicas == {}
    assert core.classes[1].ended[State.FINISHED] == 1


def test_an_answer_in_one_piece_is_taken_to_have_begun_when_it_was_expected_to() -> None:
    core = core_with(address("a"))
    ticket = core.arrive(1, 1000, 0.0, streams=False)
    assert core.pools[1].pending_tokens == 1000
    core.tick(ticket.expected_s)
    assert core.pools[1].pending_tokens == 0


@pytest.mark.parametrize(("end_s", "met"), [(0.5 + 9 * 0.1, 1), (0.5 + 9 * 0.1 + 0.01, 0)])
def test_an_answer_in_one_piece_may_take_as_long_as_a_stream_that_just_keeps_its_promises(end_s, met) -> None:
    core = core_with(address("a"))
    core.finish(core.arrive(0, 10, 0.0, streams=False), 10, end_s)
    book = core.classes[0]
    assert (book.met, book.late_first_tokens, book.slow_answers) == (met, 1 - met, 0)


@pytest.mark.parametrize(("first_s", "end_s", "met"), [(0.5, 1.4, 1), (0.51, 1.0, 0), (0.5, 1.41, 0)])
def test_slos_of_a_stream(first_s, end_s, met) -> None:
    core = core_with(address("a"))
    ticket = core.arrive(0, 10, 0.0)
    core.see_token(ticket, first_s)
    core.finish(ticket, 10, end_s)
    assert core.classes[0].met == met


@pytest.mark.parametrize(
    ("first_s", "tokens", "end_s", "late", "slow"),
    [(0.5, 6, 1.01, 0, 1), (0.5, 5, 1.01, 0, 0), (0.5, 6, 1.0, 0, 0), (0.51, 6, 1.2, 1, 0)],
    ids=["slow", "a few tokens", "in time", "late already"],
)
def test_what_made_a_stream_late_is_booked(first_s, tokens, end_s, late, slow) -> None:
    core = core_with(address("a"))
    ticket = core.arrive(0, 10, 0.0)
    core.see_token(ticket, first_s)
    core.finish(ticket, tokens, end_s)
    assert (core.classes[0].late_first_tokens, core.classes[0].slow_answers) == (late, slow)


def test_unknown_names_change_nothing() -> None:
    core = core_with(address("a"))
    with pytest.raises(UnknownNameError, match="unknown pool 'sharde'; did you mean 'shared'"):
        core.set_replicas([address("b", "sharde")], 0.0)
    with pytest.raises(UnknownNameError, match="unknown class 'chatt'"):
        core.decide(GatewayDecision(max_batch_size={"shared": 1}, admission={"chatt": None}), 0.0)
    with pytest.raises(UnknownNameError, match="unknown class 'bulc'"):
        core.decide(GatewayDecision(max_batch_size={"shared": 1}, admission={}, max_in_flight={"bulc": 1}), 0.0)
    with pytest.raises(UnknownNameError, match="unknown class 'bulc'"):
        core.decide(GatewayDecision(max_batch_size={}, admission={}, selectivity={"bulc": 1.0}), 0.0)
    assert set(core.replicas) == {"a"}
    assert core.pools[1].cap == 2


@pytest.mark.parametrize(
    ("router", "reason"), [("prefix_affinity", "does not hash prompts"), ("freeness", "does not know the KV blocks")]
)
def test_a_router_that_needs_what_a_gateway_does_not_see_is_refused(router: str, reason: str) -> None:
    spec = FleetSpec.from_dict(
        {
            "pools": [{"name": "p", "profile": "llama-3.1-8b_a100_tp1"}],
            "classes": [{"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 0.1}],
            "router": router,
        }
    )
    with pytest.raises(SpecError, match=f"the gateway {reason}"):
        GatewayCore(spec, draw=lambda: 0.0)


def test_stages_are_refused() -> None:
    spec = FleetSpec.from_dict(
        {
            "pools": [{"name": "p", "profile": "llama-3.1-8b_a100_tp1"}],
            "classes": [{"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 0.1}],
            "postprocess": {"num_workers": 1},
        }
    )
    with pytest.raises(SpecError, match="prefill and decode pools and postprocess are for simulated fleets"):
        GatewayCore(spec, draw=lambda: 0.0)
