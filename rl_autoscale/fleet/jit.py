"""The ways kernels are compiled.

Kernels allocate nothing, so Numba's reference counting is switched off in them (``_nrt=False``): without that, every
array that is handed on would be counted, atomically, which takes ten times as long as the work itself.

Numba compiles each function of a call tree to machine code of its own, with copies of everything below it. Kernels that
only other kernels call get none, and no wrapper for Python or C: they are optimised once, in the entry point above
them (`one_library`). Calling such a kernel from Python would crash the process, so tests/sim/test_kernels.py looks for
it in the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

from rl_autoscale.fleet.one_library import EntryCompiler, PartCompiler, widened

_compile: Any = numba.njit  # the option _nrt is not in Numba's types
_PART = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": PartCompiler}
Kernel = TypeVar("Kernel", bound=Callable[..., object])


def njit(function: Kernel) -> Kernel:
    """A kernel called rarely, by kernels only: a plain call."""
    return cast(Kernel, widened(_compile(_nrt=False, **_PART)(function)))


def shared_njit(function: Kernel) -> Kernel:
    """A kernel that both kernels and Python call."""
    return cast(Kernel, widened(_compile(_nrt=False, pipeline_class=EntryCompiler)(function)))


def hot(function: Kernel) -> Kernel:
    """A kernel on the path of every request: inlined, since a call costs more than the work."""
    return cast(Kernel, widened(_compile(_nrt=False, forceinline=True, **_PART)(function)))


def cached_njit(function: Kernel) -> Kernel:
    """An entry point: releases the GIL and is cached on disk."""
    return cast(Kernel, _compile(_nrt=False, nogil=True, cache=True, pipeline_class=EntryCompiler)(function))
