"""Replicas as a remote system shows them, their ages on our own clock, and the memory of who set the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl_autoscale.serving.protocols import Phase, Replica


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica, read.

    Attributes:
        replica_id: unique over the life of the fleet.
        address: host name or IP; None when it has none (yet).
        since_wall_s: when the phase began by the remote clock; None when it does not say.
        reason: why it is not ready, in the remote system's own words.
    """

    replica_id: str
    address: str | None
    phase: Phase
    since_wall_s: float | None
    reason: str


class TargetMemory:
    """Tells our own targets from somebody else's.

    Attributes:
        foreign_changes: how often somebody else was seen to have changed the target.
    """

    def __init__(self) -> None:
        self._last_seen: int | None = None
        self._written: set[int] = set()
        self.foreign_changes = 0

    def notice(self, in_force: int) -> bool:
        """Remember what is in force; True when it changed since the last look and we did not write it."""
        before, self._last_seen = self._last_seen, in_force
        foreign = before is not None and in_force != before and in_force not in self._written
        self.foreign_changes += foreign
        return foreign

    def attempt(self, num_replicas: int) -> None:
        """About to write: a write that times out may have been done."""
        self._written.add(num_replicas)

    def wrote(self, num_replicas: int) -> None:
        """It is in force."""
        self._written, self._last_seen = {num_replicas}, num_replicas


class PhaseAges:
    """How long each replica has been in its phase, on our monotonic clock.

    The first sight of a phase takes its age from the cluster's own clock (time stamp against the answer's ``Date``);
    from then on only the monotonic clock counts, so neither a clock that jumps nor one that differs from the
    cluster's changes what a decision reads.
    """

    def __init__(self) -> None:
        self._began_s: dict[tuple[str, Phase], float] = {}

    def update(self, views: Sequence[ReplicaView], *, now_s: float, server_wall_s: float | None) -> list[float]:
        """Age of each phase in seconds; forgets replicas that are gone."""
        began: dict[tuple[str, Phase], float] = {}
        for view in views:
            key = (view.replica_id, view.phase)
            known = None if server_wall_s is None or view.since_wall_s is None else server_wall_s - view.since_wall_s
            began[key] = self._began_s.get(key, now_s - max(0.0, known or 0.0))
        self._began_s = began
        return [now_s - began[view.replica_id, view.phase] for view in views]


def to_replicas(
    views: Sequence[ReplicaView],
    ages_s: Sequence[float],
    *,
    pool: str,
    scheme: str,
    port: int,
    ready_deadline_s: float,
) -> tuple[Replica, ...]:
    """Replicas in the order of the views; those that start for longer than the deadline are failed."""
    replicas = []
    for view, age_s in zip(views, ages_s, strict=True):
        overdue = view.phase == "starting" and age_s > ready_deadline_s
        replicas.append(
            Replica(
                replica_id=view.replica_id,
                pool=pool,
                url=None if view.address is None else f"{scheme}://{_host(view.address)}:{port}",
                phase="failed" if overdue else view.phase,
                phase_age_s=age_s,
                reason=f"not ready after {ready_deadline_s:g} s: {view.reason}" if overdue else view.reason,
            )
        )
    return tuple(replicas)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
