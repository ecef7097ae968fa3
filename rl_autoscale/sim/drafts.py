"""Kernel: decode sequences that get several tokens per iteration, for pools with speculative decoding.

Semantics: docs/simulator.md; reference twin in sim/reference/sequences.py. Every decode sequence of a replica gains the
same ``step_units`` in an iteration, in units of 1 / 2**token_shift token, and has the whole tokens of what it has
gained since it joined. It needs a KV block when it reaches the first token of one, so *when* depends on its position
modulo the units of a block: ``residue`` counts sequences by a column that stays the same while all of them advance,
those that need a block in an iteration are in ``step_units`` neighbouring columns, and the next iteration's follow.

Without speculation a unit is a token, ``step_units`` is 1, and replica.py does the same with less arithmetic. With it
all drafts are verified, unless the scheduler chooses how many (schedulers/slos_serve.py).
"""

from __future__ import annotations

import numpy as np

from rl_autoscale.fleet.jit import hot, njit


@hot
def verify_all_drafts(w, r):
    """The next iterations verify the pool's number of drafts of each decode sequence."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    rep.verified_tokens = pool.verified_tokens
    rep.step_units = pool.step_units
    rep.step_tokens = pool.step_tokens
    rep.lost_tokens = pool.lost_tokens
    rep.draft_s = pool.draft_s


@njit
def verify_drafts(w, r, drafts, kept_tokens, drafting_s):
    """The next iterations verify so many, which takes so long to draft and keeps so many tokens on average."""
    rep = w.rep[r]
    rep.verified_tokens = 1 + drafts
    rep.step_units = np.int64(kept_tokens / w.pool[rep.pool].unit_tokens)
    rep.step_tokens = kept_tokens
    rep.lost_tokens = 1 + drafts - kept_tokens
    rep.draft_s = drafting_s


@hot
def next_finished(w, r):
    """Place in the heap of the lowest sequence that has all its tokens; there is one.

    With several tokens per iteration the first in the heap may be another that ends in the same one.
    """
    rep = w.rep[r]
    heap = w.heap[r]
    lowest = 0
    if w.pool[rep.pool].token_shift > 0:
        for place in range(1, rep.heap_size):
            if heap[place] >> 32 <= rep.iteration and heap[place] & 0xFFFFFFFF < heap[lowest] & 0xFFFFFFFF:
                lowest = place
    return lowest


@njit
def drafted_blocks(residue, first_unit, units, phase_mask, token_shift, num_decode):
    """KV blocks that a decode batch needs while it advances.

    Args:
        residue: the replica's, shape (phase_mask + 1,) or more.
        first_unit: what its iterations so far have added to a sequence.
        units: what the next ones will add.
        phase_mask: units in a block - 1.
        token_shift: of the pool.
        num_decode: sequences in the batch.
    """
    need = (units >> (token_shift + 4)) * num_decode  # every sequence fills one block in 16 tokens
    for unit in range(first_unit, first_unit + (units & phase_mask)):
        need += residue[unit & phase_mask]
    return need


@njit
def drafted_until_full(residue, first_unit, step_units, phase_mask, token_shift, num_decode, free_blocks, limit):
    """Largest number of iterations <= limit whose blocks fit; arguments as in `drafted_blocks`."""
    if (((limit * step_units) >> (token_shift + 4)) + 1) * num_decode <= free_blocks:
        return limit
    fits = 0
    too_many = limit + 1
    while fits + 1 < too_many:
        middle = (fits + too_many) >> 1
        need = drafted_blocks(residue, first_unit, middle * step_units, phase_mask, token_shift, num_decode)
        if need <= free_blocks:
            fits = middle
        else:
            too_many = middle
    return fits


@njit
def fraction_units(residue, first_unit, phase_mask, token_shift):
    """What the decode sequences have beyond whole tokens, summed; arguments as in `drafted_blocks`."""
    within = (1 << token_shift) - 1
    total = 0
    for column in range(phase_mask + 1):
        total += residue[column] * ((first_unit + within - column) & within)
    return total
