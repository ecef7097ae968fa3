"""The simulated fleet as a specification: SimPy, one event per engine iteration, no shortcuts.

Slow and plain on purpose. The compiled engine (``sim/engine.py``) must give the same numbers request by request;
``tests/sim/test_differential.py`` binds the two. Where they differ, read this one first.

    clock.py      order of simultaneous events
    request.py    one request and how it ends
    kv_blocks.py  KV blocks and the prefix cache
    scheduler.py  vLLM's scheduler inside one replica: what runs in the next iteration
    replica.py    one replica's life: start-up, iterations, drain, crash
    pool.py       replicas that come and go
    estimate.py   what the gateway expects a request's time to first token to be
    gateway.py    queues, refusal, routing, eviction
    balancer.py   running sequences that move to freer replicas
    bridge.py     KV cache on its way from prefill to decode replicas
    postprocess.py  CPU work after the last token
    books.py      counters that only rise
    telemetry.py  what a decision reads
    fleet.py      all of it behind the `Fleet` protocol
"""

from rl_autoscale.sim.reference.fleet import ReferenceFleet

__all__ = ["ReferenceFleet"]
