"""Kernel: every gap between two output tokens of a request, in a histogram per pool; only where somebody asked for it.

The decode batch of a leap moves together, so its gaps are the lengths of its iterations, once per sequence: an
arithmetic progression, booked bucket by bucket. What is different is the first iteration after a sequence joined the
batch: its gap began with a token of its own (its prompt's end here or on a prefill replica, or the last one before it
was preempted), and where the decode batch stood still all gaps began before that. ``joined`` lists the sequences that
have joined since the batch last got tokens; ``token_s`` holds the last token of whoever is not in a decode batch.

A gap is booked in the pool that computed the later token. The reference keeps every gap (reference/replica.py).
"""

from __future__ import annotations

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.ordered import bucket


@njit
def prompt_token(w, r, q, now_s):
    """A prompt's end brings a token: the first, or the next one of a sequence that had lost its KV cache."""
    if w.req[q].first_token_s >= 0.0:
        w.gap_hist[w.rep[r].pool, bucket(w.gap_edges, now_s - w.token_s[q])] += 1
    w.token_s[q] = now_s


@njit
def join_gaps(w, r, q):
    """A sequence joins the decode batch; its next gap began with its own last token."""
    rep = w.rep[r]
    w.joined[r, rep.num_joined] = q
    rep.num_joined += 1


@njit
def leave_gaps(w, r, q):
    """A sequence leaves the decode batch: remember its last token."""
    rep = w.rep[r]
    for k in range(rep.num_joined):
        if w.joined[r, k] == q:  # it has got none here
            rep.num_joined -= 1
            w.joined[r, k] = w.joined[r, rep.num_joined]
            return
    w.token_s[q] = rep.last_tokens_s


@njit
def count_gaps(w, r, iterations, first_s, growth_s, duration_s):
    """Book the gaps that end with iterations of the decode batch.

    Args:
        w: the fleet.
        r: its replica, whose leap began at ``leap_start_s``.
        iterations: that are complete, >= 1.
        first_s: length of the first one.
        growth_s: by which each is longer than the one before.
        duration_s: of all of them.
    """
    rep = w.rep[r]
    histogram = w.gap_hist[rep.pool]
    edges = w.gap_edges
    first_end_s = rep.leap_start_s + first_s
    for k in range(rep.num_joined):
        histogram[bucket(edges, first_end_s - w.token_s[w.joined[r, k]])] += 1
    if rep.num_decode > rep.num_joined:
        histogram[bucket(edges, first_end_s - rep.last_tokens_s)] += rep.num_decode - rep.num_joined
    rep.num_joined = 0
    rep.last_tokens_s = rep.leap_start_s + duration_s
    done = 1
    while done < iterations:
        column = bucket(edges, first_s + done * growth_s)
        until = iterations
        if column < edges.shape[0] and first_s + (iterations - 1) * growth_s > edges[column]:
            until = min(max(int((edges[column] - first_s) / growth_s) + 1, done + 1), iterations)
            while until > done + 1 and first_s + (until - 1) * growth_s > edges[column]:
                until -= 1
            while first_s + until * growth_s <= edges[column]:
                until += 1
        histogram[column] += (until - done) * rep.num_decode
        done = until
