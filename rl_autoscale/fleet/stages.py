"""Stages of a request's way that are not engines: the link between prefill and decode, and post-processing on CPUs.

Both have bounded queues, and a full one holds up the stage before it: post-processing -> decode -> bridge -> prefill ->
gateway. docs/simulator.md says what each of them models and what it leaves out.
"""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rl_autoscale.fleet.config import Config


class KvTransferSpec(Config):
    """How KV cache gets from prefill to decode replicas: over a link, into a bounded bridge.

    Each prefill replica sends one prompt at a time, in the order in which they were computed. The bridge is the decode
    side's host memory, where KV cache waits until a decode replica has room on the GPU (Mooncake, arXiv 2407.00079,
    section 3). A transfer begins when the bridge has a place for it; until it is over, the KV blocks stay on the
    prefill replica.
    """

    link_bytes_per_s: PositiveFloat = Field(default=50e9, description="of one prefill replica; 50e9 is 400 Gb/s")
    latency_s: NonNegativeFloat = Field(default=0.002, description="per transfer, beside its bytes")
    bridge_limit: PositiveInt = Field(
        default=64, description="requests under way or waiting for KV blocks on a decode replica"
    )


class PostprocessSpec(Config):
    """CPU work after the last token (parsing, safety checks, storage): workers behind one bounded first-come queue."""

    num_workers: PositiveInt
    request_s: NonNegativeFloat = Field(default=0.0, description="per request")
    token_s: NonNegativeFloat = Field(default=0.0, description="per output token")
    queue_limit: NonNegativeInt = Field(
        default=64, description="requests that wait for a worker; a finished stream beyond keeps its sequence and KV"
    )

    def work_s(self, output_tokens: int) -> float:
        """Seconds of one worker for a request."""
        return self.request_s + output_tokens * self.token_s
