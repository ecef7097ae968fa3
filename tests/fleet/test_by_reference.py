"""Kernels hand a bundle of arrays on as one pointer, and read what is stored there now."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numba.core.errors import TypingError

from rl_autoscale.fleet.by_reference import by_reference
from rl_autoscale.fleet.jit import njit, shared_njit


class Bundle(NamedTuple):
    """Two arrays of different shape and type."""

    values: Any  # (n,) float64
    counts: Any  # (n, 2) int32


@njit
def add_all(w, times):  # type: ignore[no-untyped-def]
    """Writes to one array between reads of both."""
    for _ in range(times):
        for i in range(w.values.shape[0]):
            w.values[i] += w.counts[i, 1]
            w.counts[i, 0] += 1


@shared_njit
def work(batch, times):  # type: ignore[no-untyped-def]
    """One bundle after the other at the same place in memory."""
    total = 0.0
    for e in range(batch.values.shape[0]):
        w = by_reference(Bundle(batch.values[e], batch.counts[e]))
        add_all(w, times)
        total += w.values[0]
    return total


@shared_njit
def misspelt(batch):  # type: ignore[no-untyped-def]
    """Asks for what the bundle has not."""
    return by_reference(batch).valeus


@shared_njit
def of_a_number(x):  # type: ignore[no-untyped-def]
    """No bundle at all."""
    return by_reference(x)


def bundle() -> Bundle:
    counts = np.arange(24, dtype=np.int32).reshape(4, 3, 2)
    return Bundle(np.zeros((4, 3)), counts)


def test_every_bundle_is_read_where_it_lies_now() -> None:
    batch, before = bundle(), bundle()
    total = work(batch, 5)
    np.testing.assert_array_equal(batch.values, 5 * before.counts[:, :, 1])
    np.testing.assert_array_equal(batch.counts[:, :, 0], before.counts[:, :, 0] + 5)
    np.testing.assert_array_equal(batch.counts[:, :, 1], before.counts[:, :, 1])
    assert total == batch.values[:, 0].sum()


def test_a_kernel_takes_one_pointer() -> None:
    work(bundle(), 1)
    kernel: Any = add_all
    (overload,) = kernel.overloads.values()
    (function,) = [f for f in overload.library._final_module.functions if "add_all" in f.name and not f.is_declaration]
    # Every kernel of Numba takes two more, for its result and for an exception; by value the bundle would be 16.
    assert len(list(function.arguments)) == 2 + 2


@pytest.mark.parametrize("kernel", [misspelt, of_a_number])
def test_what_it_has_not_is_a_typing_error(kernel: Any) -> None:
    with pytest.raises(TypingError):
        kernel(bundle() if kernel is misspelt else 1.0)
