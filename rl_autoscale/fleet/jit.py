"""The three ways kernels are compiled.

Kernels allocate nothing, so Numba's reference counting is switched off in them (``_nrt=False``): without that, every
call that passes a World counts references of all its arrays, atomically, and takes ten times as long as the work itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numba

njit: Any = partial(numba.njit, _nrt=False)()
"""A kernel called rarely: a plain call."""

hot: Any = partial(numba.njit, _nrt=False, forceinline=True)()
"""A kernel on the path of every request: inlined, since passing a World by value costs more than the work."""

cached_njit: Any = partial(numba.njit, _nrt=False, nogil=True, cache=True)()
"""An entry point: releases the GIL and is cached on disk."""
