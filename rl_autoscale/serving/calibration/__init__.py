"""Iteration times of a live vLLM server, out of a short designed load and the server's own clocks.

    server.py    what is asked of a server: streams and looks at its metrics; over HTTP, or in the same process
    load.py      single prompts, decode batches, prompts beside decode batches; random load for the hold-out

Times of iterations are differences of the server's histogram sums (``request_prefill_time_seconds``,
``inter_token_latency_seconds``), not of this client's clock: network and client delay nothing, and an emulator that
runs faster than real time reports the seconds of the engine that it plays.
"""
