"""Kernel, Andes' scheduler: the requests that gain most quality of experience (QoE) per KV block run, others pause.

Reference: Liu et al., Andes, arXiv 2404.16283, section 4, and AmberLJC/vllm-0.6.1, vllm/core/andes_scheduler.py and
vllm/core/andes_utils/{knapsack_solver,qoe_tracker}.py; twin: sim/reference/schedulers/andes.py. What QoE is:
sim/reading.py. The client expects its first token after ``ttft_slo_s`` and reads a token per ``tpot_slo_s``.

- Every 10 iterations one looks whether requests contend: all that are here, running or not, would fill more than 90 %
  of the KV cache by the next look, or make decoding slower than the fastest of them reads. If not, all may run, first
  come first served, by vLLM V1's rules.
- If they do, a batch is chosen as a knapsack of KV blocks. A request is worth the QoE that it would gain by being
  served for the next 50 s, at the pace of a batch of that size, over not being served; half as much again if it runs
  already. Whoever has many tokens ahead in its client's pacer gains little. Batches are filled by worth per block, for
  up to 8 sizes between the largest that is faster than the fastest reader and what the KV cache can hold at most; the
  size with the largest sum wins. Who is not chosen pauses until the next look; its KV cache stays or moves (swap.py).
- Between two looks newcomers run if there is room, behind those that were chosen. When the next tokens do not fit the
  KV cache, the newest is set aside.

The 10 iterations, the 90 %, the 50 s and the half are the authors' code's. Left out: recomputation instead of moving,
which takes several times as long with the shipped profiles; the paper's second pass, which drops exchanges that cost
more than they gain, in place of which the code favours who runs; and a cap on the number of preemptions. Different from
both: prompts are computed in chunks beside decodes, as vLLM does by now; the gain is the QoE formula's, with tokens as
a continuum (the code has a surrogate); and requests that do not fit are skipped until nothing is left.
"""

from __future__ import annotations

from rl_autoscale.fleet.admission import prefill_time_s
from rl_autoscale.fleet.jit import njit, shared_njit
from rl_autoscale.sim.batch import waiting_insert, waiting_remove
from rl_autoscale.sim.kv_cache import blocks_of
from rl_autoscale.sim.layout import FloatArray
from rl_autoscale.sim.reading import read_until
from rl_autoscale.sim.schedulers.steps import continue_prompt, iterations_ahead
from rl_autoscale.sim.schedulers.swap import bring_in, keep_running, park, takes_part

CHOSEN, NEW, PAUSED = 0, 1, 2
"""Ranks; within one by arrival."""
LOOK_EVERY = 10
FULL = 0.9
HORIZON_S = 50.0
FAVOUR_RUNNING = 1.5
MOST_SIZES = 8


@shared_njit
def qoe_gain(now_s: float, read_s: float, begins_s: float, gap_s: float, expected_s: float, token_s: float) -> float:
    """QoE at the horizon of a stream that is served from now on, over that of one that is not.

    Both are the area under what is read by then over the area under what is expected by then.

    Args:
        now_s: the time.
        read_s: when all tokens so far are read; when the first is due if there is none.
        begins_s: when it could be back in the batch.
        gap_s: between its tokens then.
        expected_s: when the first token is due.
        token_s: what reading one takes.
    """
    until_s = now_s + HORIZON_S
    start_s = max(read_s, begins_s)
    if until_s <= expected_s or until_s <= start_s:
        return 0.0
    if gap_s <= token_s:
        area = (until_s - start_s) * (until_s - start_s) / (2.0 * token_s)
    else:  # the tokens ahead in the pacer last until it has caught up with the server
        ahead = max(read_s - begins_s, 0.0) / (gap_s - token_s)
        caught_up_s = start_s + ahead * token_s
        if caught_up_s >= until_s:
            area = (until_s - start_s) * (until_s - start_s) / (2.0 * token_s)
        else:
            left_s = until_s - caught_up_s
            area = 0.5 * ahead * (caught_up_s - start_s) + ahead * left_s + left_s * left_s / (2.0 * gap_s)
    return area * (2.0 * token_s) / ((until_s - expected_s) * (until_s - expected_s))


@shared_njit
def decode_s(size: int, mean_tokens: float, table_s: FloatArray, slopes: FloatArray) -> float:
    """Seconds of an iteration of so many decode sequences of that mean length, by the latency profile."""
    return float(table_s[size] + slopes[1] * size + slopes[0] * (size * (mean_tokens + 1.0)))


@njit
def rank_newcomer(w, q):
    """A request that comes is not chosen yet, and goes before those that were passed over."""
    w.req[q].rank = NEW
    w.req[q].rank_s = w.req[q].arrival_s


@njit
def add_candidate(w, r, position, q):
    """Put a request among those that may run; returns its tokens."""
    request = w.req[q]
    item = w.candidates[position]
    tokens = request.prompt_tokens + request.generated_tokens
    item.runs = request.in_batch
    if request.in_batch:
        generated = request.output_tokens - (request.finish_iteration - w.rep[r].iteration)
        read_until(w, q, generated, w.fleet[0].now_s)
        tokens = request.prompt_tokens + generated
    item.request = q
    item.blocks = min(blocks_of(tokens + LOOK_EVERY), w.pool[w.rep[r].pool].kv_blocks)
    item.chosen = 1
    return tokens


@njit
def find_candidates(w, r):
    """List the decode sequences and the waiting queue.

    Returns:
        (how many, all their tokens, all their blocks, the fastest reader's time per token), the partly computed prompt
        counted in all but the first.
    """
    rep = w.rep[r]
    count = 0
    all_tokens = 0
    all_blocks = 0
    fastest_s = 1e9
    for waiting in (False, True):
        q = rep.wait_head if waiting else rep.batch_head
        while q >= 0:
            request = w.req[q]
            fastest_s = min(fastest_s, w.cls[request.class_index].tpot_slo_s)
            if q == rep.partial:
                tokens = request.prompt_tokens + request.generated_tokens
                all_blocks += blocks_of(tokens + LOOK_EVERY)
            else:
                tokens = add_candidate(w, r, count, q)
                all_blocks += w.candidates[count].blocks
                count += 1
            all_tokens += tokens
            q = request.next
    return count, all_tokens, all_blocks, fastest_s


@njit
def weigh(w, r, count, now_s, gap_s):
    """What each candidate would gain in a batch in which tokens come every ``gap_s``."""
    p = w.rep[r].pool
    pool = w.pool[p]
    for k in range(count):
        item = w.candidates[k]
        request = w.req[item.request]
        cls = w.cls[request.class_index]
        expected_s = request.arrival_s + cls.ttft_slo_s
        read_s = expected_s if request.read_tokens == 0 else request.read_s
        begins_s = now_s
        if request.on_host:
            begins_s += blocks_of(request.computed_tokens) * pool.block_move_s
        elif not item.runs and request.computed_tokens == 0:
            tokens = request.prompt_tokens + request.generated_tokens
            begins_s += prefill_time_s(
                tokens, tokens * tokens, 0, 0, pool.token_budget, w.token_time[p], w.coefficients[p]
            )
        gain = qoe_gain(now_s, read_s, begins_s, gap_s, expected_s, cls.tpot_slo_s)
        item.gain = gain * FAVOUR_RUNNING if item.runs else gain
        item.density = item.gain / item.blocks


@njit
def sort_candidates(w, count):
    """The densest first, among equals the earlier arrival: insertion, as they are sorted nearly from size to size."""
    items = w.candidates
    for k in range(1, count):
        j = k
        while j > 0 and (
            items[j - 1].density < items[j].density
            or (items[j - 1].density == items[j].density and items[j - 1].request > items[j].request)
        ):
            swap_candidates(items, j - 1, j)
            j -= 1


@njit
def swap_candidates(items, i, j):
    """Exchange two."""
    left = items[i]
    right = items[j]
    left.request, right.request = right.request, left.request
    left.runs, right.runs = right.runs, left.runs
    left.blocks, right.blocks = right.blocks, left.blocks
    left.gain, right.gain = right.gain, left.gain
    left.density, right.density = right.density, left.density
    left.chosen, right.chosen = right.chosen, left.chosen


@njit
def fill_batch(w, count, size, blocks):
    """Take candidates in their order while places and blocks last; returns the sum of their gains."""
    total = 0.0
    for k in range(count):
        item = w.candidates[k]
        item.taken = 0
        if size > 0 and item.blocks <= blocks:
            item.taken = 1
            size -= 1
            blocks -= item.blocks
            total += item.gain
    return total


@njit
def choose(w, r, now_s, count, mean_tokens, fastest_s):
    """Mark the candidates of the best batch; the partly computed prompt is in every batch."""
    rep = w.rep[r]
    p = rep.pool
    blocks = w.pool[p].kv_blocks
    places = 0  # of the partly computed prompt
    if rep.partial >= 0:
        places = 1
        request = w.req[rep.partial]
        blocks -= min(blocks_of(request.prompt_tokens + request.generated_tokens + LOOK_EVERY), blocks)
    for k in range(count):
        w.candidates[k].density = -float(w.candidates[k].blocks)
    sort_candidates(w, count)
    most = 0
    left = blocks
    while most < count and w.candidates[most].blocks <= left:
        left -= w.candidates[most].blocks
        most += 1
    most += places
    fast = count + places
    while fast > 1 and decode_s(fast, mean_tokens, w.token_time[p], w.coefficients[p]) > fastest_s:
        fast -= 1
    least = min(fast, most)
    step = max((most - least + MOST_SIZES - 2) // (MOST_SIZES - 1), 1)
    best = -1.0
    size = most
    while size >= least:
        weigh(w, r, count, now_s, decode_s(size, mean_tokens, w.token_time[p], w.coefficients[p]))
        sort_candidates(w, count)
        total = fill_batch(w, count, size - places, blocks)
        if total > best:
            best = total
            for k in range(count):
                w.candidates[k].chosen = w.candidates[k].taken
        size -= step


@njit
def look(w, r, now_s):
    """Let all requests run, or choose which may."""
    rep = w.rep[r]
    p = rep.pool
    count, all_tokens, all_blocks, fastest_s = find_candidates(w, r)
    here = count + (rep.partial >= 0)
    if here == 0:
        return
    mean_tokens = all_tokens / here
    full = all_blocks > FULL * w.pool[p].kv_blocks
    if full or decode_s(here, mean_tokens, w.token_time[p], w.coefficients[p]) > fastest_s:
        choose(w, r, now_s, count, mean_tokens, fastest_s)
    if rep.partial >= 0:
        w.req[rep.partial].rank = CHOSEN
    for k in range(count):
        q = w.candidates[k].request
        request = w.req[q]
        rank = CHOSEN if w.candidates[k].chosen else PAUSED
        if request.in_batch:
            request.rank = rank
            if rank == PAUSED:
                park(w, r, q, now_s)
        elif request.rank != rank:
            waiting_remove(w, r, q)
            request.rank = rank
            waiting_insert(w, r, q, False)


@njit
def schedule_andes(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    if rep.iteration >= rep.next_look or (rep.num_decode == 0 and rep.partial < 0):
        look(w, r, now_s)
        rep.next_look = rep.iteration + LOOK_EVERY
    chunk = keep_running(w, r, now_s)
    budget = w.pool[rep.pool].token_budget - rep.num_decode
    if rep.partial >= 0:
        continue_prompt(w, r, chunk)
        budget -= chunk
    while rep.wait_head >= 0 and w.req[rep.wait_head].rank != PAUSED:
        tokens = takes_part(w, r, budget, False)
        if tokens == 0:
            break
        budget -= bring_in(w, r, now_s, tokens, budget)
    return min(iterations_ahead(w, r, rep.moved_blocks > 0), rep.next_look - rep.iteration)
