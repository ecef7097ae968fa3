"""Requests over time: trace files, synthetic generators, scaling and mixing. Pure, except for `store` and `writers`."""

from rl_autoscale.workload.readers import ReadReport, ReadResult, read_trace
from rl_autoscale.workload.spec import BuiltWorkload, StreamSpec, WorkloadSpec
from rl_autoscale.workload.stats import describe
from rl_autoscale.workload.store import LoadedTrace, TraceStore, TraceUnavailable
from rl_autoscale.workload.trace import NO_SESSION, Workload
from rl_autoscale.workload.writers import write_trace

__all__ = [
    "NO_SESSION",
    "BuiltWorkload",
    "LoadedTrace",
    "ReadReport",
    "ReadResult",
    "StreamSpec",
    "TraceStore",
    "TraceUnavailable",
    "Workload",
    "WorkloadSpec",
    "describe",
    "read_trace",
    "write_trace",
]
