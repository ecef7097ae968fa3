"""``rl-autoscale export``: a checkpoint becomes ONNX and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rl_autoscale.cli.train import require_training


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a training run (holds config.yaml and checkpoint/).")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write policy.onnx and policy.json; default RUN/policy.")
    ] = None,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Export a training run's checkpoint, also while it is still training.

    Its dial is measured and its miss forecast fitted anew, which takes a minute or several. The card holds the schema
    hash, the network's SHA-256, the dial's range and where the policy was trained. A policy
    of another schema, or a changed network file, is refused when it is loaded.

    Examples:
        rl-autoscale export runs/train

        rl-autoscale export runs/train --out policies/mine
    """
    require_training()
    from rl_autoscale.experiments.train import export_checkpoint
    from rl_autoscale.workload.store import TraceStore

    card_path = export_checkpoint(run, out or run / "policy", TraceStore(traces or []))
    print(
        card_path.read_text(encoding="utf-8")
        if as_json
        else f"exported {json.loads(card_path.read_text())['schema']} to {card_path.parent}"
    )
