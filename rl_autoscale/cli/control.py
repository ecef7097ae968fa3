"""``rl-autoscale control``: the live controller."""

from __future__ import annotations

import json
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rl_autoscale.fleet.errors import MissingExtraError

if TYPE_CHECKING:
    from rl_autoscale.serving.assemble import Assembly
    from rl_autoscale.serving.clock import SystemClock

stderr = Console(stderr=True, highlight=False)


def command(
    config: Annotated[Path, typer.Option(help="YAML with fleet, backends, policy, ...; see docs/live.md.")],
    mode: Annotated[str | None, typer.Option(help="paused, shadow or active; default the file's, else shadow.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Validate the file and the policy, print both, and end.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="End after so many control steps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every step as JSON on stdout.")] = False,
) -> None:
    """Control a live fleet, or watch what a policy would do with it.

    The controller starts in SHADOW mode: it reads telemetry, decides, logs and charts,
    and touches nothing. Watch the status page (http://127.0.0.1:9400), then let it act
    with --mode active.

    Each control step: read replicas, back ends and gateway; judge the telemetry; ask the
    policy within its time budget; clip by the shield; cool-downs; apply; log with reasons.

    No data is never read as no load: blind pools are held, may grow by the fallback rule
    later, and never shrink. A policy that fails, is late or sees what it was not trained
    on loses the fleet to the rule until it behaves.

    Stop it from acting, any of:
      touch KILL_FILE       the file that 'kill_file' names; paused while it exists
      kill -USR1 PID        (-USR2 resumes)
      curl -X POST -H 'X-RL-Autoscale: 1' http://127.0.0.1:9400/pause
      mode: paused          in the file, which is read again when it changes
    Stopping the controller leaves all replicas as they are.

    A first file:
      fleet:
        pools:
        - name: gpu
          profile: llama-3.1-8b_a100_tp1
          max_replicas: 4
        classes:
        - {name: chat, ttft_slo_s: 1.0, tpot_slo_s: 0.1}
      policy: {name: headroom}
      backends:
        gpu:
          local:
            state_dir: state/gpu
            command:
            - vllm
            - serve
            - my-model
            - --port={port}

    Examples:
        rl-autoscale control --config fleet.yaml --check

        rl-autoscale control --config fleet.yaml

        rl-autoscale control --config fleet.yaml --mode active
    """
    if find_spec("prometheus_client") is None or find_spec("kubernetes") is None:
        raise MissingExtraError("the live controller", "serve")
    from rl_autoscale.serving.assemble import assemble, build_fallback, build_policy
    from rl_autoscale.serving.changes import Changes
    from rl_autoscale.serving.clock import SystemClock
    from rl_autoscale.serving.config import ControlConfig
    from rl_autoscale.serving.modes import parse_mode

    chosen = ControlConfig.from_file(config)
    asked = parse_mode(mode, "--mode") if mode is not None else None
    if check:
        policy = build_policy(chosen.policy, chosen.fleet)
        fallback = build_fallback(chosen, policy)
        found = {"policy": policy.name, "fallback": fallback.name}
        print(json.dumps({**found, "config": chosen.model_dump(mode="json", exclude_defaults=True)}, indent=2))
        return
    clock = SystemClock()
    assembly = assemble(chosen, clock, mode=asked, path=config)
    _handle_signals(assembly, clock)
    _greet(assembly)
    assembly.controller.add_listener(Changes(stderr.print))
    if as_json:
        assembly.controller.add_listener(_print_step)
    try:
        assembly.controller.run(steps)
    finally:
        assembly.close()


def _print_step(record: object) -> None:
    from rl_autoscale.serving.decision_log import finite
    from rl_autoscale.serving.status_server import describe
    from rl_autoscale.serving.step_record import StepRecord

    assert isinstance(record, StepRecord)
    print(json.dumps(finite(describe(record))), flush=True)


def _handle_signals(assembly: Assembly, clock: SystemClock) -> None:
    def end(*_: object) -> None:
        assembly.fleet.stop()
        clock.wake()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGUSR1, lambda *_: assembly.modes.pause("SIGUSR1"))
    signal.signal(signal.SIGUSR2, lambda *_: assembly.modes.resume())


def _greet(assembly: Assembly) -> None:
    mode, why = assembly.modes.current()
    stderr.print(f"controller in {mode} mode ({why})")
    if assembly.policy_error:
        stderr.print(f"no policy, the fallback rule decides: {assembly.policy_error}")
    if assembly.status is not None:
        stderr.print(f"status page on port {assembly.status.port}")
