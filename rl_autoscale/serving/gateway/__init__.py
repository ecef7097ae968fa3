"""The gateway: an OpenAI-compatible streaming proxy that owns class queues, batch caps, routing, refusal and drain.

What decides is pure (no I/O, the time is an argument) and is bound to the simulator's gateway by a test that gives
both the same arrivals; what talks is around it.

    tickets.py    one request and the state it is in
    books.py      what the gateway knows of a replica and of a pool; the estimate behind early refusal
    classes.py    a class's queue, counters and histograms
    core.py       arrivals, queues, routing, refusal, what comes back, snapshots
    tokens.py     prompt tokens guessed from bytes, corrected by what replicas report
    sse.py        a stream cut into events, and what an event says
    completion.py what a client asks for, and what is sent on
    errors.py     what a client is told when it gets nothing, or no more
    config.py     what a user writes
    guard.py      API keys, classes, limits
    proxy.py      one request from the client to a replica and back
    control.py    the controller's routes
    exposition.py Prometheus text
    server.py     listeners, start and drain
"""
