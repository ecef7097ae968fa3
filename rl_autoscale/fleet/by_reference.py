"""A bundle of arrays that kernels pass on as one pointer.

Numba passes a named tuple of arrays by value: the simulator's 40 arrays are 300 arguments of every call, and most of
the work of compiling it. `by_reference` stores the bundle once; its attributes are read from there when they are
needed.

What is stored does not change while the pointer lives, and every read says so to LLVM (``invariant.load``), which may
then keep an array's address in a register while elements are written. Each call gives a pointer that LLVM takes for
one it has not seen, so nothing read through the last is kept for the next.

References to the arrays are not counted: for kernels of fleet/jit.py only, whose callers own the arrays.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic


class Reference(types.Type):
    """Where a named tuple of arrays is stored."""

    def __init__(self, bundle: types.NamedTuple) -> None:
        self.bundle = bundle
        super().__init__(f"reference({bundle})")


@register_default(Reference)
class _ReferenceModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Reference) -> None:
        super().__init__(manager, kind, manager.lookup(kind.bundle).get_value_type().as_pointer())


@infer_getattr
class _Attributes(AttributeTemplate):
    key = Reference

    def generic_resolve(self, kind: Reference, name: str) -> types.Type | None:
        """Type of the bundle's field of this name; None, Numba's word for an error, where there is none."""
        fields = kind.bundle.fields
        return kind.bundle[fields.index(name)] if name in fields else None


@lower_getattr_generic(Reference)
def _read(context: Any, builder: Any, kind: Reference, pointer: Any, name: str) -> Any:
    return _load(builder, cgutils.gep_inbounds(builder, pointer, 0, kind.bundle.fields.index(name)))


def _load(builder: Any, pointer: Any) -> Any:
    """Scalar by scalar: LLVM drops the mark when it splits the load of an array's descriptor."""
    kind = pointer.type.pointee
    if isinstance(kind, ir.Aggregate):
        value = ir.Constant(kind, ir.Undefined)
        for i in range(len(kind)):
            value = builder.insert_value(value, _load(builder, cgutils.gep_inbounds(builder, pointer, 0, i)), i)
        return value
    load = builder.load(pointer)
    load.set_metadata("invariant.load", builder.module.add_metadata([]))
    return load


@intrinsic
def by_reference(typing_context: Any, bundle: Any) -> Any:
    """Store a named tuple of arrays and give a pointer with the same attributes.

    The pointer is good until the kernel that asked for it returns.
    """
    if not isinstance(bundle, types.NamedTuple):
        return None

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = cgutils.alloca_once_value(builder, args[0])
        unseen = ir.FunctionType(pointer.type, [pointer.type])
        return builder.asm(unseen, "", "=r,0,~{memory}", [pointer], side_effect=True)

    return Reference(bundle)(bundle), lower
