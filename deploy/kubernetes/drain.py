"""preStop of a vLLM pod: let it finish what it has, then return, so that SIGTERM cuts no stream.

Kubernetes runs this inside the container before it sends SIGTERM (on which vLLM aborts by default). The controller sees
the pod as draining and the gateway stops sending to it; `/health` stays 200 meanwhile, so only the engine's own counts
tell when it is empty. Standard library only: it runs in vLLM's image.
"""

import os
import re
import sys
import time
import urllib.request

METRICS_URL = os.environ.get("DRAIN_METRICS_URL", "http://127.0.0.1:8000/metrics")
# The gateway hears of the drain within a control interval (10 s): until then requests may still arrive.
LINGER_S = float(os.environ.get("DRAIN_LINGER_S", "15"))
LONGEST_S = float(os.environ.get("DRAIN_LONGEST_S", "300"))
POLL_S = float(os.environ.get("DRAIN_POLL_S", "1"))
COUNT = re.compile(r"^vllm[:_]num_requests_(?:running|waiting)(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)


def num_requests() -> float:
    """Requests in the engine, running and waiting; raises OSError or ValueError when they cannot be read."""
    with urllib.request.urlopen(METRICS_URL, timeout=5) as answer:
        counts = COUNT.findall(answer.read().decode())
    if not counts:
        raise ValueError("no vllm:num_requests_* in the metrics")
    return sum(map(float, counts))


def main() -> int:
    """Return 0 when empty, 1 when the time is over; Kubernetes goes on either way."""
    began = time.monotonic()
    while (waited_s := time.monotonic() - began) < LONGEST_S:
        if waited_s >= LINGER_S:
            try:
                if num_requests() == 0:
                    return 0
            except (OSError, ValueError) as error:
                if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                    return 0  # nobody listens: the server is gone
                print(f"drain: {error}", file=sys.stderr)  # not known is not zero
        time.sleep(POLL_S)
    return 1


if __name__ == "__main__":
    sys.exit(main())
