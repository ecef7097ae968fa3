"""Kernels are compiled once for all integers, and only entry points have machine code."""

from __future__ import annotations

from typing import Any

import numpy as np

from rl_autoscale.fleet.jit import hot, njit, shared_njit


@hot
def squared(x):  # type: ignore[no-untyped-def]
    """A leaf."""
    return x * x


@njit
def sum_of_squares(values, first):  # type: ignore[no-untyped-def]
    """Calls the leaf with an element (int32), a literal and an argument (int64)."""
    total = squared(3) + squared(first)
    for value in values:
        total += squared(value)
    return total


@shared_njit
def both(values, first):  # type: ignore[no-untyped-def]
    """The entry point: it has to link the leaf through the part between them."""
    return sum_of_squares(values, first) + squared(first)


@njit
def leaf(x):  # type: ignore[no-untyped-def]
    """Called by two parts, in one of them never."""
    return x + 1


@njit
def never_calls_it(x):  # type: ignore[no-untyped-def]
    """LLVM sees that the condition is false; Numba does not."""
    return leaf(x) if x < x else x


@njit
def calls_it(x):  # type: ignore[no-untyped-def]
    """One level further down."""
    return leaf(2 * x)


@njit
def between(x):  # type: ignore[no-untyped-def]
    """Makes the second caller come after the leaf in any order by depth."""
    return calls_it(x)


@shared_njit
def deep(x):  # type: ignore[no-untyped-def]
    """The leaf has to be linked after the caller that needs it."""
    return never_calls_it(x) + between(x)


VALUES = np.array([1, 2, -46341], dtype=np.int32)


def test_an_entry_point_computes_what_python_does() -> None:
    exact = sum(int(v) ** 2 for v in VALUES) + 9 + 2 * 5**2
    assert both(VALUES, 5) == exact  # 46341 ** 2 is more than an int32 holds


def test_a_part_is_linked_though_its_first_caller_never_calls_it() -> None:
    assert deep(5) == 5 + 11


def test_a_kernel_is_compiled_once_for_all_integers() -> None:
    both(VALUES, 5)
    leaf: Any = squared
    assert [str(signature[0]) for signature in leaf.signatures] == ["int64"]


def test_only_the_entry_point_has_machine_code() -> None:
    both(VALUES, 5)

    def library(kernel: Any) -> Any:
        (overload,) = kernel.overloads.values()
        return overload.library

    defined = {function.name for function in library(both).get_defined_functions()}
    engine = library(both).codegen._engine
    assert any("both" in name and engine.is_symbol_defined(name) for name in defined)
    for part in (squared, sum_of_squares):
        names = [function.name for function in library(part)._final_module.functions if not function.is_declaration]
        assert names
        assert library(part).get_pointer_to_function(names[0]) == 0
