"""One writer at a time, by a Lease of ``coordination.k8s.io/v1``; the rules are those of client-go's leader election.

- A lease is taken when nobody holds it, or when its record has not changed for its whole duration *as we watched it*:
  clocks of different machines are never compared.
- Every write of the lease names the version that was read, so of two takers one gets a 409.
- Validity counts from before the request that renewed it, so we stop before anyone else may begin.
"""

from __future__ import annotations

from datetime import UTC, datetime

from rl_autoscale.serving.backends.http_failure import HttpFailure
from rl_autoscale.serving.backends.kubernetes_api import LEASES, Json, KubernetesApi
from rl_autoscale.serving.protocols import BackendError, Clock


class WriterLease:
    """The right to write one target.

    Args:
        api: reaches the namespace of the lease.
        name: the lease's name.
        identity: who we are; differs between any two processes.
        duration_s: how long others wait for a holder that has gone silent.
        clock: monotonic for validity, wall for the time stamps that people read.
    """

    def __init__(self, api: KubernetesApi, name: str, identity: str, duration_s: int, clock: Clock) -> None:
        self.name = name
        self.identity = identity
        self._api = api
        self._duration_s = duration_s
        self._clock = clock
        self._seen: Json | None = None
        self._seen_at_s = 0.0
        self._valid_until_s = float("-inf")

    def valid_for_s(self) -> float:
        """How long the right still lasts without a renewal; negative or zero when it is not ours."""
        return self._valid_until_s - self._clock.monotonic_s()

    def hold(self) -> None:
        """Take or renew the lease.

        Raises:
            BackendError: another holds it, or it cannot be read or written; retryable. Nothing may be written then.
        """
        asked_at_s = self._clock.monotonic_s()
        lease = self._take_or_renew(asked_at_s)
        self._remember(lease["spec"], asked_at_s)
        self._valid_until_s = asked_at_s + self._duration_s

    def release(self) -> None:
        """Give it back, so that a successor need not wait; silent when that fails, for it expires anyway."""
        if self.valid_for_s() <= 0:
            return
        try:
            lease = self._api.read(LEASES, self.name)
            if (lease.get("spec") or {}).get("holderIdentity") == self.identity:
                lease["spec"] = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                self._api.replace(LEASES, self.name, lease)
        except BackendError:
            pass
        finally:
            self._valid_until_s = float("-inf")

    def _take_or_renew(self, now_s: float) -> Json:
        try:
            lease = self._api.read(LEASES, self.name)
        except HttpFailure as failure:
            if failure.status != 404:
                raise
            body = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self.name, "namespace": self._api.namespace},
                "spec": self._record(transitions=0),
            }
            return self._api.create(LEASES, body)
        spec = lease.get("spec") or {}
        if spec != self._seen:
            self._remember(spec, now_s)
        holder = spec.get("holderIdentity") or ""
        if holder and holder != self.identity:
            self._valid_until_s = float("-inf")
            left_s = self._seen_at_s + float(spec.get("leaseDurationSeconds") or 0) - now_s
            if left_s > 0:
                raise BackendError(
                    f"lease {self._api.namespace}/{self.name} is held by {holder}: it writes, we do not "
                    f"(free in {left_s:.0f} s if it has died)",
                    retryable=True,
                )
        ours = holder == self.identity
        transitions = int(spec.get("leaseTransitions") or 0) + (not ours)
        record = self._record(transitions)
        if ours and spec.get("acquireTime"):
            record["acquireTime"] = spec["acquireTime"]
        return self._api.replace(LEASES, self.name, {**lease, "spec": record})

    def _record(self, transitions: int) -> Json:
        now = datetime.fromtimestamp(self._clock.wall_s(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._duration_s,
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }

    def _remember(self, spec: Json, now_s: float) -> None:
        self._seen = spec
        self._seen_at_s = now_s
