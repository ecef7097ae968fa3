"""The application that the live Ray tests deploy: a replica that answers slowly and reports a figure of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.01}, max_ongoing_requests=100)
class Engine:
    async def __call__(self, request: Any) -> str:
        await asyncio.sleep(0.5)
        return "done"

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"kv_usage": 0.25}


def build(arguments: dict[str, Any]) -> Any:
    return Engine.bind()
