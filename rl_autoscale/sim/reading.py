"""Kernel: what a client has read of a stream, and the quality of experience (QoE) that this makes.

Reference: Liu et al., Andes, arXiv 2404.16283, on the QoE metric.

A user expects the first token ``ttft_slo_s`` after asking and reads one token per ``tpot_slo_s``, so token i is due at
``e_i = arrival + ttft_slo_s + i tpot_slo_s``. Tokens that come early wait in the client's token pacer: the first one is
read at ``c_0 = max(delivered_0, e_0)``, the others at ``c_i = max(delivered_i, c_{i-1} + tpot_slo_s)``. With ``c_end``,
when the last one has been read,

    QoE = 1 - sum(c_i - e_i) / sum(c_end - e_i)

that is, the area under the curve of what was read over the area under the curve of what was expected. ``c_end`` counts
the time to read the last token; without it, a reply of one token would have a QoE of 0 or none.

Nothing is simulated per token. One looks at a stream's first token, when it is interrupted (preempted, set aside,
evicted, transferred, migrated), when it goes on and at its last token; tokens between two looks count as evenly spaced.
"""

from __future__ import annotations

from rl_autoscale.fleet.jit import cached_njit, njit, shared_njit
from rl_autoscale.sim.layout import FINISHED, FloatArray, RecordArray


@shared_njit
def read_on(
    read_s: float, before: int, since_s: float, until_s: float, tokens: int, expected_s: float, token_s: float
) -> tuple[float, float]:
    """Read tokens that come evenly, the last one at ``until_s``.

    Args:
        read_s: when the token before them is read; ``expected_s - token_s`` before the first.
        before: how many there were before.
        since_s: from when on they come.
        until_s: when the last one comes.
        tokens: how many come.
        expected_s: when the stream's first token is due.
        token_s: what reading one takes.

    Returns:
        (when the last one is read, sum over them of how long after its due time each is read).
    """
    if tokens == 0:
        return read_s, 0.0
    gap_s = (until_s - since_s) / tokens
    due_s = expected_s + before * token_s
    if gap_s <= token_s:  # only the first one may have to be waited for
        first_s = max(read_s + token_s, since_s + gap_s)
        return first_s + (tokens - 1) * token_s, tokens * (first_s - due_s)
    smooth = 0  # tokens that come before those ahead of them are read
    if read_s > since_s:
        smooth = int(min((read_s - since_s) / (gap_s - token_s), float(tokens)))
    awaited = tokens - smooth
    late_s = smooth * (read_s + token_s - due_s) + awaited * (since_s + gap_s - due_s)
    late_s += (gap_s - token_s) * (0.5 * awaited * (smooth + tokens - 1))
    return (until_s if awaited > 0 else read_s + tokens * token_s), late_s


@njit
def read_until(w, q, tokens, now_s):
    """A stream has so many tokens by now: book how those that are new to us are read."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    expected_s = request.arrival_s + cls.ttft_slo_s
    first_s = request.first_token_s
    if request.read_tokens == 0:
        request.read_s, request.late_s = read_on(
            expected_s - cls.tpot_slo_s, 0, first_s, first_s, 1, expected_s, cls.tpot_slo_s
        )
        request.read_from_s = first_s
        request.read_tokens = 1
    request.read_s, late_s = read_on(
        request.read_s, request.read_tokens, request.read_from_s, now_s, tokens - request.read_tokens, expected_s,
        cls.tpot_slo_s,
    )  # fmt: skip
    request.late_s += late_s
    request.read_from_s = now_s
    request.read_tokens = tokens


@cached_njit
def fill_qoe(requests: RecordArray, ttft_s: float, token_s: float, qoe: FloatArray) -> None:
    """QoE of each request, 0..1; 0 where it did not finish.

    Args:
        requests: REQUEST records, shape (n,).
        ttft_s: expected time to first token.
        token_s: expected time per token.
        qoe: output, shape (n,).
    """
    for k in range(len(requests)):
        request = requests[k]
        qoe[k] = 0.0
        if request.outcome != FINISHED:
            continue
        expected_s = request.arrival_s + ttft_s
        tokens = request.output_tokens
        read_s, late_s, since_s, known = request.read_s, request.late_s, request.read_from_s, request.read_tokens
        if known == 0:
            known = 1
            since_s = request.first_token_s
            read_s, late_s = read_on(expected_s - token_s, 0, since_s, since_s, 1, expected_s, token_s)
        read_s, more_s = read_on(read_s, known, since_s, request.last_token_s, tokens - known, expected_s, token_s)
        whole_s = tokens * (read_s + token_s - expected_s - 0.5 * (tokens - 1) * token_s)
        qoe[k] = 1.0 - (late_s + more_s) / whole_s
