"""Options of the scheduler `slos-serve`; each can be switched off, to see what it is worth."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rl_autoscale.fleet.config import Config


class SlosServeSpec(Config):
    """Who is served as promised, and how long an iteration may be; see docs/systems.md."""

    admission: Literal["dp", "firm", "greedy", "late", "all"] = Field(
        default="dp",
        description="dp: the most requests that can be in time, chosen anew among those not begun whenever one comes; "
        "firm: likewise, but who was accepted once stays so; greedy: one after the other, as they come; "
        "late: all, until they are late; all: nobody is declined",
    )
    tries: PositiveInt = Field(
        default=1,
        description="replicas of the pool that are asked in turn before a request is served as best effort",
    )
    slack_batches: bool = Field(default=True, description="iterations last as long as the next token due allows")
    adaptive_drafts: bool = Field(
        default=True,
        description="with speculation: each iteration verifies as many drafts, from none to draft_tokens, as have the "
        "next prompt computed the soonest, or without prompts as bring the most tokens; false: always all",
    )
