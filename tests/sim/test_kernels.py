"""Kernels without a wrapper for Python would crash the process when Python calls them; the source says who does."""

from __future__ import annotations

import ast
from pathlib import Path

from rl_autoscale.sim.engine import FLEET_FILES, KERNEL_FILES

BARE = {"njit", "hot"}
COMPILED = {*BARE, "shared_njit", "cached_njit"}


def decorators(node: ast.FunctionDef) -> set[str]:
    return {item.id for item in node.decorator_list if isinstance(item, ast.Name)}


def bare_kernels(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and decorators(node) & BARE}


def imported(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> 'module.name' of everything imported from our package."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rl_autoscale."):
            found |= {item.asname or item.name: f"{node.module}.{item.name}" for item in node.names}
    return found


def called_from_python(tree: ast.Module) -> set[str]:
    """Names that are called outside functions that Numba compiles."""
    compiled = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and decorators(node) & COMPILED]
    inside = {id(inner) for node in compiled for inner in ast.walk(node)}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in inside)
    return {node.func.id for node in calls if isinstance(node.func, ast.Name)}


def test_python_calls_no_bare_kernel(repository: Path) -> None:
    package = repository / "rl_autoscale"
    kernels = {
        f"rl_autoscale.sim.{name.removesuffix('.py').replace('/', '.')}.{kernel}"
        for name in KERNEL_FILES
        for kernel in bare_kernels(ast.parse((package / "sim" / name).read_text(encoding="utf-8")))
    }
    assert len(kernels) > 100
    wrong = []
    for path in (
        *package.rglob("*.py"),
        *(repository / "tests").rglob("*.py"),
        *(repository / "benchmarks").rglob("*.py"),
    ):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names, calls = imported(tree), called_from_python(tree)
        wrong += [f"{path.name} calls {name}" for name in sorted(calls) if names.get(name) in kernels]
        wrong += [f"{path.name} calls its own {name}" for name in sorted(calls & bare_kernels(tree))]
    assert wrong == []


def test_the_digest_of_the_disk_cache_covers_all_that_kernels_read(repository: Path) -> None:
    """What is missing in it, a constant for example, would change in the source and not in the compiled engine."""
    package = repository / "rl_autoscale"
    covered = {package / "sim" / name for name in KERNEL_FILES} | {package / "fleet" / name for name in FLEET_FILES}
    read = set()
    for path in covered:
        names = imported(ast.parse(path.read_text(encoding="utf-8"))).values()
        modules = {name.rpartition(".")[0] for name in names if not name.endswith("Array")}  # those are types
        read |= {repository / f"{module.replace('.', '/')}.py" for module in modules}
    assert len(read) > 10
    assert read <= covered


def test_that_check_would_notice() -> None:
    tree = ast.parse(
        "@njit\ndef inner():\n    pass\n@shared_njit\ndef outer():\n    inner()\ndef plain():\n    inner()\n"
    )
    assert called_from_python(tree) & bare_kernels(tree) == {"inner"}
    assert called_from_python(ast.parse("@cached_njit\ndef outer():\n    inner()\n")) == set()
