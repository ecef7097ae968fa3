"""The ways kernels are compiled.

Kernels allocate nothing, so Numba's reference counting is switched off in them (``_nrt=False``): without that, every
call that passes a World counts references of all its arrays, atomically, and takes ten times as long as the work
itself.

Kernels that only other kernels call get no wrapper for Python or C: making those took half of the compile time.
Calling such a kernel from Python would crash the process, so tests/sim/test_kernels.py looks for it in the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_compile: Any = numba.njit  # the option _nrt is not in Numba's types
_NO_WRAPPERS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
Kernel = TypeVar("Kernel", bound=Callable[..., object])


def njit(function: Kernel) -> Kernel:
    """A kernel called rarely, by kernels only: a plain call."""
    return cast(Kernel, _compile(_nrt=False, **_NO_WRAPPERS)(function))


def shared_njit(function: Kernel) -> Kernel:
    """A kernel that both kernels and Python call."""
    return cast(Kernel, _compile(_nrt=False)(function))


def hot(function: Kernel) -> Kernel:
    """A kernel on the path of every request: inlined, since passing a World by value costs more than the work."""
    return cast(Kernel, _compile(_nrt=False, forceinline=True, **_NO_WRAPPERS)(function))


def cached_njit(function: Kernel) -> Kernel:
    """An entry point: releases the GIL and is cached on disk."""
    return cast(Kernel, _compile(_nrt=False, nogil=True, cache=True)(function))
