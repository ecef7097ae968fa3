"""As much of Ray as ray_workers.py uses: everything is pickled on its way, and what was asked last is done first."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any


class Ref:
    """A value in the object store."""

    def __init__(self, value: Any) -> None:
        self.content = pickle.dumps(value)


def _travelled(arguments: tuple[Any, ...]) -> list[Any]:
    """What arrives: references are resolved, everything else is copied."""
    return [pickle.loads(one.content if isinstance(one, Ref) else pickle.dumps(one)) for one in arguments]


class _Remote:
    """A function, method or class with ``.remote``; calls are counted per node."""

    def __init__(self, call: Callable[..., Any], answer: Callable[[Any], Any] = Ref) -> None:
        self._call, self._answer = call, answer

    def remote(self, *arguments: Any) -> Any:
        return self._answer(self._call(*_travelled(arguments)))


class _Actor:
    def __init__(self, instance: Any, ray: FakeRay) -> None:
        self._instance, self._ray = instance, ray

    def __getattr__(self, name: str) -> _Remote:
        self._ray.used.add(id(self._instance))
        return _Remote(getattr(self._instance, name))


class FakeRay:
    """The module."""

    def __init__(self, num_cpus: float = 2.0) -> None:
        self.num_cpus = num_cpus
        self.address: str | None = "not asked"
        self.used: set[int] = set()
        self.killed = 0
        self.is_up = False

    def init(self, address: str | None = None, **_: Any) -> None:
        if address == "nowhere:1":
            raise ConnectionError("nobody answers")
        self.address, self.is_up = address, True

    def shutdown(self) -> None:
        self.is_up = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.num_cpus}

    def put(self, value: Any) -> Ref:
        return Ref(value)

    def get(self, reference: Ref) -> Any:
        return pickle.loads(reference.content)

    def wait(self, references: list[Ref], num_returns: int) -> tuple[list[Ref], list[Ref]]:
        return references[-num_returns:], references[:-num_returns]

    def kill(self, actor: _Actor) -> None:
        self.killed += 1

    def remote(self, num_cpus: int) -> Callable[[Any], _Remote]:
        assert num_cpus >= 1

        def wrap(item: Any) -> _Remote:
            if inspect.isclass(item):
                return _Remote(item, lambda instance: _Actor(instance, self))
            return _Remote(item)

        return wrap
