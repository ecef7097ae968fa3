"""How far the simulator is from the truth: the figures of docs/fidelity.md, made by ``rl-autoscale validate``.

    replay.py            one replica that serves a recorded workload
    compare.py           errors of predicted request times: per request and in quantiles
    iterations.py        latency profiles against measured iterations
    vidur_times.py       Vidur's predicted iteration times, looked up
    vidur_schedulers.py  the two schedulers of Vidur that its runs used
    vidur_runs.py        request by request against Vidur
    vllm_runs.py         request by request against a real vLLM server
    queues.py            queueing theory
    report.py            tables, JSON, figures

Data is never in the package: it is read from a folder that the user names.
"""
