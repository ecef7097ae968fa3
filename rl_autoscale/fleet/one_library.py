"""Numba compilers that optimise a call tree of kernels once, as a whole.

By default Numba optimises every function of a call tree, with copies of all it calls, and emits machine code for it;
then it throws that away, because the entry point has its own copy. Of 90 s for the simulator's 160 kernels that took
half. Here a kernel called by kernels stays as it was lowered (a *part*), and the entry point links all parts and is
optimised as any function is. The code is as fast: LLVM sees the same functions, with the same marks for inlining.

Besides, a kernel is compiled once for all integers: Numba would compile it again for an int32 read from a record and
for each literal.

Source: numba 0.68, core/codegen.py (`CPUCodeLibrary.finalize`), core/typed_passes.py (`BaseNativeLowering`),
core/dispatcher.py (`get_call_template`). They are no public interface; tests/fleet/test_one_library.py fails when a
release changes them.
"""

from __future__ import annotations

import itertools
from graphlib import TopologicalSorter
from typing import Any

from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

_number = itertools.count()


class _Part(JITCodeLibrary):
    """Code that has no machine code of its own."""

    def finalize(self) -> None:
        """Close it as it is; what it calls is linked by the entry point."""
        self._raise_if_finalized()
        self._finalized = True

    @property
    def codegen(self) -> Any:
        """Asked only to write the address of Python's globals into machine code: there is none."""
        return _NO_MACHINE_CODE

    def get_pointer_to_function(self, name: str) -> int:
        """0, which is Numba's word for a function without a wrapper of this name."""
        self._ensure_finalized()
        return 0


class _NoMachineCode:
    def set_env(self, env_name: str, env: object) -> None:
        """Nowhere to write it."""


_NO_MACHINE_CODE = _NoMachineCode()


class _Entry(JITCodeLibrary):
    """Code that links all parts below it before it is optimised."""

    def finalize(self) -> None:
        """Link the parts of the parts too, each after all that call it: LLVM leaves out what nobody calls yet."""
        callers: dict[Any, list[Any]] = {library: [] for library in self._linking_libraries}
        queue = list(callers)
        for library in queue:
            for below in library._linking_libraries if isinstance(library, _Part) else ():
                if below not in callers:
                    callers[below] = []
                    queue.append(below)
                callers[below].append(library)
        self._linking_libraries = list(TopologicalSorter(callers).static_order())
        super().finalize()

    def _optimize_final_module(self) -> None:
        """Once. Numba goes over it twice, to bring reference counts together first: kernels have none."""
        passes, builder = self._codegen._module_pass_manager()
        with self._recorded_timings.record("Module passes", builder):
            passes.run(self._final_module, builder)

    def _verify_declare_only_symbols(self) -> None:
        """Raise where code would call a kernel that is not there: machine code would crash the process."""
        missing = [fn.name for fn in self._final_module.functions if fn.is_declaration and fn.name.startswith("_ZN")]
        if missing:
            raise AssertionError(f"{self.name} calls kernels that were not linked: {missing}")


class PartCompiler(Compiler):
    """Pipeline of kernels that only kernels call."""

    def __init__(self, typingctx: Any, targetctx: Any, library: None, *rest: Any) -> None:
        super().__init__(typingctx, targetctx, _Part(targetctx.codegen(), f"part {next(_number)}"), *rest)


class EntryCompiler(Compiler):
    """Pipeline of kernels that Python calls."""

    def __init__(self, typingctx: Any, targetctx: Any, library: None, *rest: Any) -> None:
        entry = _Entry(targetctx.codegen(), f"entry {next(_number)}")
        entry.enable_object_caching()
        super().__init__(typingctx, targetctx, entry, *rest)


def _wide(argument: types.Type) -> types.Type:
    plain = types.unliteral(argument)
    return types.int64 if plain in types.signed_domain else plain


def widened(dispatcher: Any) -> Any:
    """The kernel, compiled for int64 wherever a kernel calls it with a narrower integer or a literal."""
    ask = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: ask(tuple(map(_wide, args)), kws)
    return dispatcher
