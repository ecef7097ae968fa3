"""Configuration files of a small fleet of emulators behind a gateway, for tests that start everything as processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from live_world import world_spec
from streaming_clients import COMMAND


def write_files(
    folder: Path, port: int, *, replicas: int = 1, engine: tuple[str, ...] = ("--startup-s", "1"), **control: Any
) -> None:
    """Write ``fleet.yaml``, ``gateway.yaml`` (at ``port`` and the next) and ``control.yaml`` (ports from 20 on).

    Args:
        folder: for the files and the state of the replicas.
        port: the gateway's.
        replicas: what the static policy wants.
        engine: further options of the emulators.
        control: further keys of the controller's file.
    """
    pool = {"initial_replicas": 1, "max_replicas": 3, "startup": [{"mean_s": 5.0}]}
    spec = world_spec(pool=pool, control_interval_s=2.0, telemetry_age_s=0.5).model_dump(mode="json", exclude_none=True)
    (folder / "fleet.yaml").write_text(yaml.safe_dump(spec))
    gateway = {"fleet": "fleet.yaml", "port": port, "control_port": port + 1}
    (folder / "gateway.yaml").write_text(yaml.safe_dump(gateway))
    emulate = ["emulate", "--profile", spec["pools"][0]["profile"], "--port", "{port}", *engine]
    local = {
        "command": [*COMMAND, *emulate],
        "state_dir": str(folder / "state"),
        "ports": [port + 20, port + 99],
        "settle_s": 1.0,
    }
    data = {
        "fleet": "fleet.yaml",
        "mode": "active",
        "policy": {"name": "static", "knobs": {"replicas": replicas}},
        "gateway": {"url": f"http://127.0.0.1:{port + 1}"},
        "telemetry": {"stale_after_s": 10.0},
        "safety": {"down_cooldown_s": 0.0},
        "status": {"port": 0},
        "decision_log": str(folder / "decisions.jsonl"),
        "backends": {"gpu": {"local": local}},
    }
    (folder / "control.yaml").write_text(yaml.safe_dump(data | control))
