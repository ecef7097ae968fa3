"""Schedulers of a replica: what runs in its next iteration, and for how many iterations does that stay true?

One file per scheduler. Each is a kernel ``schedule(w, r, now_s)`` over the state of one replica that

- puts requests from the waiting queue into the batch or back, and gives prompts their chunks (steps.py), and
- returns the number of iterations for which that stays true: 0 with nothing to run, 1 with a prompt chunk or after a
  preemption, else any number up to the first finish; a request that becomes the head of the waiting queue cuts it.

It may read what a serving engine knows: prompts, tokens so far, KV blocks, SLOs; never an output length to come. The
time of the iterations follows from what is in them (plan.py). Each scheduler has a twin in sim/reference/schedulers,
and tests/sim/test_differential.py holds the two together.

A new one: its name in ``SchedulerName`` (fleet/pool.py) and ``SCHEDULER_CODES`` (sim/layout.py), its kernel here and
in plan.py, its twin in the table of sim/reference/schedulers.
"""
