"""SLOs-Serve's dynamic programme against every subset, on small cases."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.sim.schedulers.slos_plan import (
    PLAN_PROMPT,
    Costs,
    choose_prompts,
    decode_s,
    most_output,
    most_room,
    paces,
    plan_labels,
    prompt_end_s,
    prompt_s,
)

BUDGET = 600
TABLE_S = np.maximum(0.01, 1e-4 * np.arange(BUDGET + 1))
"""Seconds by tokens: weights are read in the time of 100."""
SLOPES = np.array([1e-6, 1e-5, 1e-8, 0.0, 1e-4, 1e-6, 1e-5])
PLAIN = Costs(BUDGET, TABLE_S, SLOPES, np.ones(1), 0, 0.0)
DRAFTS = PLAIN._replace(kept_tokens=np.array([1.0, 1.75, 2.25, 2.5]), draft_s=0.003)
PERIODS_S = (0.02, 0.05, math.inf)


@dataclass(frozen=True)
class Prompt:
    """One that waits or is under way."""

    left: int
    deadline_s: float
    tier: int
    kept: bool = False
    done: int = 0


@dataclass(frozen=True)
class Queue:
    """What the programme is asked about."""

    prompts: tuple[Prompt, ...]
    num_decode: int
    context: int
    tier: int
    most_context: int
    costs: Costs = PLAIN

    @property
    def candidates(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts if not prompt.kept]

    def chosen(self) -> list[Prompt]:
        """Whom the programme accepts."""
        rows = np.zeros(len(self.prompts), dtype=PLAN_PROMPT)
        for row, prompt in zip(rows, self.prompts, strict=True):
            row["tier"], row["kept"], row["deadline_s"] = prompt.tier, prompt.kept, prompt.deadline_s
            row["left_tokens"], row["done_tokens"] = prompt.left, prompt.done
        accepted = choose_prompts(
            rows, len(rows), 0.0, self.num_decode, self.context, self.tier, self.most_context, np.array(PERIODS_S),
            self.costs, plan_labels(len(PERIODS_S)),
        )  # fmt: skip
        return [prompt for k, prompt in enumerate(self.candidates) if accepted >> k & 1]

    def ends_s(self, accepted: list[Prompt]) -> tuple[list[tuple[Prompt, float]], bool]:
        """When each prompt is computed if these are accepted, and whether all of them decode in time and fit."""
        time_s, number, context, tier = 0.0, self.num_decode, self.context, self.tier
        ends = []
        for prompt in self.prompts:
            if prompt.kept or any(prompt is one for one in accepted):
                period_s = PERIODS_S[tier]
                time_s = prompt_end_s(time_s, prompt.left, prompt.done, period_s, number, context, self.costs)
                ends.append((prompt, time_s))
                number, context, tier = number + 1, context + prompt.left + prompt.done, min(tier, prompt.tier)
        return ends, paces(number, context, PERIODS_S[tier], self.costs) and context <= self.most_context

    def keeps_promises(self, accepted: list[Prompt]) -> bool:
        """Whether nobody accepted is late, nor anybody who was promised and would be in time without them."""
        if not accepted:
            return True
        broken = {id(prompt) for prompt, end_s in self.ends_s([])[0] if end_s > prompt.deadline_s}
        ends, fits = self.ends_s(accepted)
        return fits and all(end_s <= prompt.deadline_s or id(prompt) in broken for prompt, end_s in ends)

    def largest(self) -> int:
        """By trying every subset."""
        subsets = itertools.product([False, True], repeat=len(self.candidates))
        sets = ([p for p, taken in zip(self.candidates, subset, strict=True) if taken] for subset in subsets)
        return max(len(accepted) for accepted in sets if self.keeps_promises(accepted))

    def in_turn(self) -> list[Prompt]:
        """Greedy: one after the other by deadline, if it can be accepted beside those before it."""
        accepted: list[Prompt] = []
        for prompt in self.candidates:
            if self.keeps_promises([*accepted, prompt]):
                accepted.append(prompt)
        return accepted


prompts = st.builds(
    Prompt,
    left=st.integers(1, 2000),
    deadline_s=st.floats(0.0, 1.0),
    tier=st.integers(0, 1),
    kept=st.sampled_from([False, False, False, True]),
    done=st.sampled_from([0, 0, 100]),
)
queues = st.builds(
    lambda waiting, **rest: Queue(tuple(sorted(waiting, key=lambda prompt: prompt.deadline_s)), **rest),
    waiting=st.lists(prompts, max_size=8),
    num_decode=st.integers(0, 60),
    context=st.integers(0, 5000),
    tier=st.integers(0, 2),
    most_context=st.sampled_from([4000, 8000, 100_000]),
    costs=st.sampled_from([PLAIN, DRAFTS]),
)


@settings(max_examples=300, deadline=None)
@given(queues)
def test_no_subset_that_keeps_the_promises_is_larger(queue: Queue) -> None:
    chosen = queue.chosen()
    assert queue.keeps_promises(chosen)
    assert len(chosen) == queue.largest() >= len(queue.in_turn())


def test_a_long_prompt_makes_way_for_several() -> None:
    """The programme declines the first of three; one after the other, it would be served and they would not."""
    long, short = Prompt(2000, 0.25, 1), Prompt(900, 0.26, 1)
    queue = Queue((long, short, replace(short, deadline_s=0.27)), 0, 0, 2, 100_000)
    assert queue.in_turn() == [long]
    assert queue.chosen() == list(queue.prompts[1:])


def test_a_tight_pace_leaves_room_for_fewer() -> None:
    """Beside 20 streams an iteration of 20 ms has room for 130 tokens or so, one of 50 ms for 430."""
    waiting = tuple(Prompt(300, 0.2 + 0.001 * k, 1) for k in range(6))
    tight, loose = (len(Queue(waiting, 20, 2000, tier, 100_000).chosen()) for tier in (0, 1))
    assert 0 < tight < loose


def test_a_full_cache_takes_nobody() -> None:
    waiting = (Prompt(300, 1.0, 1), Prompt(200, 1.0, 1))
    assert Queue(waiting, 1, 100, 1, 100 + 250).chosen() == [waiting[1]]
    assert Queue(waiting, 1, 100, 1, 100).chosen() == []


def test_a_broken_promise_binds_nobody() -> None:
    """The kept prompt is late whatever is decided: it delays the candidate, and does not forbid it."""
    late, candidate = Prompt(1000, 0.001, 1, kept=True), Prompt(100, 0.5, 1)
    assert Queue((late, candidate), 0, 0, 2, 100_000).chosen() == [candidate]


def test_drafts_pay_while_they_fit_beside_the_weights() -> None:
    """Weights are read in the time of 100 tokens: 10 sequences verify 4 each for nothing, 110 sequences none."""
    free = DRAFTS._replace(draft_s=0.0)
    assert [most_output(number, 0, free) for number in (1, 10, 25, 110)] == [3, 3, 3, 0]
    assert most_output(10, 0, DRAFTS._replace(draft_s=1.0)) == 0
    assert most_output(110, 0, free._replace(fewest_drafts=3)) == 3


@given(st.integers(1, 120), st.integers(0, 200_000), st.integers(0, 200_000))
def test_more_context_never_calls_for_fewer_drafts(num_decode: int, context: int, more: int) -> None:
    """What a leap of a decode batch relies on; and the choice is the best."""
    drafts = most_output(num_decode, context, DRAFTS)
    assert most_output(num_decode, context + more, DRAFTS) >= drafts
    rates = [kept / decode_s(k, num_decode, context, DRAFTS) for k, kept in enumerate(DRAFTS.kept_tokens)]
    assert rates[drafts] == max(rates)


def test_a_pace_tighter_than_an_iteration_needs_drafts() -> None:
    """Weights are read in 10 ms. A token every 8 ms leaves no room without drafts, and some with two of them."""
    assert most_room(0.008, 10, 0, PLAIN)[1] == 0
    assert prompt_s(500, 0.008, 0.008, 10, 0, PLAIN)[2] == math.inf
    assert not paces(10, 0, 0.008, PLAIN)
    assert most_room(0.008, 10, 0, DRAFTS)[1] > 0
    drafts, chunk, time_s = prompt_s(500, 0.008, 0.008, 10, 0, DRAFTS)
    assert drafts > 0
    assert chunk > 0
    assert time_s < 1.0
    assert paces(10, 0, 0.008, DRAFTS)


def test_drafts_are_not_for_prompts_that_fit_one_iteration() -> None:
    """A token every 20 ms for 50 sequences leaves 150 tokens: more than the short prompt, less than the long one."""
    assert [prompt_s(left, 0.02, 0.02, 50, 0, DRAFTS)[0] for left in (100, 140)] == [0, 0]
    times_s = [prompt_s(2000, 0.02, 0.02, 50, 0, DRAFTS._replace(fewest_drafts=k))[2] for k in range(4)]
    _, _, best_s = prompt_s(2000, 0.02, 0.02, 50, 0, DRAFTS)
    assert best_s == min(times_s)


def test_slack_is_used_before_drafts() -> None:
    """Where the first iteration may last as long as the prompt takes, drafts would only make it longer."""
    assert prompt_s(400, 0.02, 0.008, 10, 0, DRAFTS)[0] > 0
    assert prompt_s(400, 0.2, 0.008, 10, 0, DRAFTS)[0] == 0
