"""``rl-autoscale calibrate --watch``: the same profile from a server that others use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rl_autoscale.cli.calibrate import Settings, hardware_of, stderr
from rl_autoscale.experiments.calibration import fit_watched
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import LatencyProfile
from rl_autoscale.serving.calibration.server import HttpServer, Row
from rl_autoscale.serving.calibration.watch import watch, watched_rows


async def calibrate_by_watching(settings: Settings, watch_s: float, every_s: float) -> LatencyProfile:
    """Look at a server in use, and fit what its counters show.

    Args:
        settings: as for the calibration that sends load.
        watch_s: for how long.
        every_s: from one look to the next.

    Raises:
        SpecError: the server says too little, or its traffic shows too little.
    """
    async with HttpServer(settings.url, key=settings.key) as server:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=stderr, transient=True) as progress:
            task = progress.add_task("watching", total=watch_s)
            seen = await watch(server, watch_s, every_s, lambda passed_s: progress.update(task, completed=passed_s))
        blocks = settings.kv_blocks or seen[0].look.kv_blocks
        if blocks is None:
            raise SpecError(f"{server.url} does not say how many KV blocks it has; watching needs that")
        rows = watched_rows(seen, settings.max_num_batched_tokens)
        seen_text = what_was_seen(rows)
        try:
            profile, num_left_out = fit_watched(
                rows, hardware_of(settings, server.model, blocks, f"watched for {watch_s:g} s"),
                np.random.default_rng(settings.seed),
            )  # fmt: skip
        except SpecError as error:
            raise SpecError(f"{seen_text}: {error}; watch for longer, or look more often (--every)") from None
    notes = (
        f"seen: {seen_text}; {num_left_out} left out as outliers; "
        "fit_error is that of a quarter, under a fit of the rest; "
        "beyond what was seen, and for prompts longer than the token budget, the model extrapolates"
    )
    return profile.model_copy(update={"notes": notes})


def what_was_seen(rows: Sequence[Row]) -> str:
    """How many moments, and the ranges they cover."""
    decode = [row for row in rows if not row["prefill_chunk_tokens"]]
    prompts = [row for row in rows if row["prefill_chunk_tokens"]]
    parts = [f"{len(decode)} moments of decode" + _range(decode, "decode_batch_size", "sequences")]
    parts[0] += _range(decode, "mean_decode_context", "tokens of context")
    parts.append(f"{len(prompts)} single prompts" + _range(prompts, "prefill_chunk_tokens", "tokens"))
    parts[1] += _range(prompts, "decode_batch_size", "sequences beside them")
    return ", ".join(parts)


def _range(rows: Sequence[Row], column: str, unit: str) -> str:
    values = [row[column] for row in rows]
    return f" ({min(values):.0f} to {max(values):.0f} {unit})" if values else ""
