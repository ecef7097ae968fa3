"""The ``rl-autoscale`` command: its table of commands, and what becomes of errors.

A command's module is imported when the command is used, not before: ``rl-autoscale --help`` must not wait for Numba or
torch. So the table below holds each command's help line beside its module, and a module exports either

- ``app``, a ``typer.Typer`` with verbs of its own (``rl-autoscale trace ls``), or
- ``command``, a function (``rl-autoscale demo``).

Exit codes: 0 done; 1 anything unforeseen, with a traceback; 2 a mistake in the command line or in a file it names, told
in one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from rl_autoscale import __version__
from rl_autoscale.fleet.errors import RlAutoscaleError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("rl_autoscale.cli.demo", "Train PPO and show it beside every baseline on a real trace."),
    "train": ("rl_autoscale.cli.train", "Train a policy with PPO; checkpoints, resumes, tracks."),
    "evaluate": ("rl_autoscale.cli.evaluate", "Run one policy on one scenario: what it cost and broke."),
    "benchmark": ("rl_autoscale.cli.benchmark", "Compare every policy: GPU-hours at equal SLO attainment."),
    "choose": ("rl_autoscale.cli.choose", "Choose the policy and setting to run on a fleet, on its own traffic."),
    "compare-systems": ("rl_autoscale.cli.systems", "Compare schedulers: requests per second and GPU within the SLOs."),
    "place": ("rl_autoscale.cli.place", "Find the placement of prefill and decode with the most goodput per GPU."),
    "replay": ("rl_autoscale.cli.replay", "Replay recorded traffic: what each policy would cost and break."),
    "report": ("rl_autoscale.cli.report", "Turn a benchmark's results into an HTML report with figures."),
    "export": ("rl_autoscale.cli.export", "Write a trained policy as ONNX with its card."),
    "policy": ("rl_autoscale.cli.policy", "List policies and what ships pre-trained; show one's card."),
    "control": ("rl_autoscale.cli.control", "Control a live fleet, or watch what a policy would do with it."),
    "trace": ("rl_autoscale.cli.trace", "List, fetch, describe and convert request traces."),
    "profile": ("rl_autoscale.cli.profile", "List, show and fit latency profiles of a model on a GPU."),
    "calibrate": ("rl_autoscale.cli.calibrate", "Measure a live vLLM server and write its latency profile."),
    "gateway": ("rl_autoscale.cli.gateway", "Serve an OpenAI-compatible gateway in front of vLLM replicas."),
    "emulate": ("rl_autoscale.cli.emulate", "Serve an emulated vLLM replica, timed by a latency profile."),
    "validate": ("rl_autoscale.cli.validate", "Compare the simulator with measured times and queueing theory."),
    "scenario": ("rl_autoscale.cli.scenario", "List, show and check scenarios."),
}
"""Command name -> (module, help line), in the order in which ``--help`` lists them."""

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


class LazyGroup(TyperGroup):
    """Lists every command from the table, and replaces an entry by the real command when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command to run; also asked by shell completion on its way to a subcommand."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = _load(args[0])
        return super().resolve_command(ctx, args)


def _load(name: str) -> Any:
    """Import a command's module and build the command, a group when the module has verbs of its own."""
    module = importlib.import_module(COMMANDS[name][0])
    if isinstance(sub_app := getattr(module, "app", None), typer.Typer):
        command: Any = get_group(sub_app)
    else:
        single = typer.Typer(add_completion=False)
        single.command(name)(module.command)
        command = get_command(single)
    command.name = name
    return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rl-autoscale {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Learned autoscaling and backpressure for LLM serving.

    Start with `rl-autoscale demo`; `rl-autoscale COMMAND --help` explains each command.
    """


def _never_called() -> None:
    """The body of every entry of the list; `LazyGroup` puts the real command in its place before it could run."""
    raise AssertionError("a lazy command ran without being loaded")


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(_never_called)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.
    """
    try:
        get_command(app).main(args=None if arguments is None else list(arguments), prog_name="rl-autoscale")
    except RlAutoscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
