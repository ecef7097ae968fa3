"""An array that a kernel makes from an address and a length.

A batch of fleets keeps what is as long as the traffic in an array for each fleet, so Python hands over where they are.
References are not counted: for kernels of fleet/jit.py only, whose callers own the arrays.

Source: numba 0.68, np/arrayobj.py (`impl_carray`, which itself needs reference counting).
"""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj

_numba: Any = arrayobj  # without types


@intrinsic
def array_at(typing_context: Any, address: Any, number: Any, dtype: Any) -> Any:
    """The ``number`` elements of type ``dtype`` at ``address``."""
    if not (address == number == types.int64 and isinstance(dtype, types.DType)):
        return None
    kind = types.Array(dtype.dtype, 1, "C")

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = _numba.make_array(kind)(context, builder)
        itemsize = context.get_constant(types.intp, _numba.get_itemsize(context, kind))
        data = builder.inttoptr(args[0], context.get_data_type(kind.dtype).as_pointer())
        _numba.populate_array(array, data, shape=[args[1]], strides=[itemsize], itemsize=itemsize, meminfo=None)
        return array._getvalue()

    return kind(address, number, dtype), lower
