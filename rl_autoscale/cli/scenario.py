"""``rl-autoscale scenario``: list, show and check scenarios."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from rl_autoscale.envs.scenario import Scenario, load_scenario, shipped_scenario_names

app = typer.Typer(
    help="Scenarios: a fleet, the traffic to train on, and the traffic to be judged on.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command("ls")
def list_scenarios(as_json: Json = False) -> None:
    """List the scenarios that ship with the package."""
    found = [summary(load_scenario(name)) for name in shipped_scenario_names()]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("name", "replicas", "hardware", "test traffic"):
        table.add_column(heading, no_wrap=True)
    for item in found:
        pools = [f"{pool['name']} {pool['min_replicas']}-{pool['max_replicas']}" for pool in item["pools"]]
        hardware = dict.fromkeys(pool["profile"] for pool in item["pools"])
        table.add_row(item["name"], "\n".join(pools), "\n".join(hardware), " + ".join(item["test"]))
    Console().print(table)


@app.command("show")
def show_scenario(
    name: Annotated[str, typer.Argument(help="A shipped scenario, or a path that ends in .yaml.")],
    as_json: Json = False,
) -> None:
    """Print a scenario's card and its resolved YAML, a start for one of your own.

    Example: rl-autoscale scenario show bursty > mine.yaml
    """
    scenario = load_scenario(name)
    data = scenario.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    card = textwrap.wrap(data.pop("description"), width=100)
    typer.echo("\n".join(f"# {line}" for line in card) + "\n")
    data = {"name": data.pop("name"), "description": scenario.description.strip(), **data}
    typer.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110), nl=False)


@app.command("validate")
def validate_scenario(
    file: Annotated[Path, typer.Argument(help="A scenario's YAML file.")],
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    build: Annotated[bool, typer.Option(help="Also draw one training and one test workload.")] = True,
    as_json: Json = False,
) -> None:
    """Check a scenario file, and that its traffic can be built; says what it found.

    Example: rl-autoscale scenario validate mine.yaml
    """
    scenario = Scenario.from_yaml(file)
    found = summary(scenario)
    if build:
        from rl_autoscale.workload.store import TraceStore

        store = TraceStore(traces or ())
        for split, draw in (("train", scenario.build_train), ("test", scenario.build_test)):
            built = draw(0, store)
            found[f"{split}_requests"] = built.workload.num_requests
            found[f"{split}_span_s"] = built.workload.span_s
            found["notes"] = sorted({*found.get("notes", []), *built.notes})
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{file}: scenario '{scenario.name}' is valid")
    for split in ("train", "test") if build else ():
        requests, span_s = found[f"{split}_requests"], found[f"{split}_span_s"]
        typer.echo(f"{split}: {requests:,} requests in {span_s:,.0f} s ({requests / span_s:.1f}/s), seed 0")
    for note in found.get("notes", []):
        typer.echo(f"note: {note}")


def summary(scenario: Scenario) -> dict[str, Any]:
    """What tells scenarios apart."""
    fleet = scenario.fleet
    return {
        "name": scenario.name,
        "description": scenario.description.strip(),
        "pools": [
            pool.model_dump(mode="json", include={"name", "role", "profile", "min_replicas", "max_replicas"})
            for pool in fleet.pools
        ],
        "classes": [
            item.model_dump(mode="json", include={"name", "kind", "ttft_slo_s", "tpot_slo_s"}) for item in fleet.classes
        ],
        "train": [source.name for source in scenario.train],
        "test": [s.trace or (s.generator.kind if s.generator else "?") for s in scenario.test.streams],
        "control_interval_s": fleet.control_interval_s,
        "episode_s": scenario.episode_s,
    }
