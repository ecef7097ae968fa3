"""A server that speaks vLLM's API and metric names, with timings from a latency profile: the dress rehearsal.

    engine.py     one engine in whatever time it is given: the simulator's scheduler, stepped iteration by iteration
    metrics.py    vLLM's series
    requests.py   what a client asks for: prompt, output length, priority
    answers.py    OpenAI's JSON
    server.py     routes, streams, start-up, drain

The engine is the scheduler of ``sim/reference`` (plain Python, one step per iteration), not the compiled replica: a
server has to hand out every token when it is due, and the compiled engine is fast because it never looks at tokens one
by one. A differential test binds the two, so what the emulator plays is what policies were trained on.
"""
