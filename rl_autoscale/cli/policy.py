"""``rl-autoscale policy``: which policies there are, and the card of a trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rl_autoscale.agents.policy_file import read_card
from rl_autoscale.agents.pretrained import (
    CARD_FILE,
    PREFIX,
    card_problems,
    is_pretrained,
    policy_folder,
    pretrained_names,
)
from rl_autoscale.agents.registry import POLICIES, policy_class
from rl_autoscale.cli.report import FILE_WIDTH
from rl_autoscale.fleet.errors import SpecError

NONE_SHIPPED = "none ships with this version; train one: rl-autoscale train --help"

app = typer.Typer(help="Policies: the rules, what ships pre-trained, and model cards.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command("ls")
def list_policies(as_json: Json = False) -> None:
    """List the rules, and the trained policies that ship with the package.

    Any name works wherever a policy is named: rl-autoscale evaluate --policy NAME.
    """
    trained = [summary(PREFIX + name) for name in pretrained_names()]
    rules: list[dict[str, Any]] = [
        {"name": name, "knob": None if chosen.KNOB is None else chosen.KNOB.name, "rule": chosen.RULE}
        for name, chosen in POLICIES.items()
    ]
    if as_json:
        typer.echo(json.dumps({"pretrained": trained, "registered": rules}, indent=2))
        return
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("name", "knob", "rule"):
        table.add_column(heading, no_wrap=heading != "rule")
    for item in rules:
        table.add_row(item["name"], item["knob"] or "", item["rule"])
    console.print(table)
    console.print(f"pre-trained: {'' if trained else NONE_SHIPPED}", highlight=False)
    for item in trained:
        console.print(
            f"  {item['name']}  {', '.join(item['layout'])}; trained on {len(item['scenarios'])} scenarios",
            highlight=False,
        )


@app.command("show")
def show_policy(
    name: Annotated[str, typer.Argument(help="A rule's name, pretrained/NAME, or an exported policy's folder.")],
    as_json: Json = False,
) -> None:
    """Print what a policy is: a rule's definition, or a trained policy's model card.

    Examples:
        rl-autoscale policy show hpa

        rl-autoscale policy show runs/train/policy --json
    """
    if name in POLICIES:
        chosen = policy_class(name)
        rule = {"name": name, "reads": chosen.READS, "rule": chosen.RULE, "source": chosen.SOURCE}
        rule["knobs"] = ", ".join(chosen.knob_names())
        typer.echo(json.dumps(rule, indent=2) if as_json else "\n".join(f"{k}: {v}" for k, v in rule.items()))
        return
    if not is_pretrained(name) and not Path(name).exists() and "/" not in name:
        policy_class(name)  # neither a rule nor a path: says which rules there are
    found = summary(name)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    card = policy_folder(name) / CARD_FILE
    if card.exists():
        typer.echo(card.read_text(encoding="utf-8"))
    for key, value in found.items():
        if key != "card_problems":
            typer.echo(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for problem in found["card_problems"]:
        typer.echo(f"model card: {problem}", err=True)


@app.command("compare")
def compare(
    policies: Annotated[list[str], typer.Argument(help="pretrained/NAME, or folders; the first is the measure.")],
    scenario: Annotated[
        list[str] | None, typer.Option(help="Default: those that the first was trained on. May be given again.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each scenario at each of seven prices of a miss.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    history: Annotated[
        bool, typer.Option("--history", help="What the fleet's owner has on record, in place of validation traffic.")
    ] = False,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    as_json: Json = False,
) -> None:
    """Compare trained policies by what they cost their owner, on validation traffic: seconds to a minute a scenario.

    The bill is GPU time over the ideal plus the price of a miss times the share that missed, at seven prices from
    the first policy's dial; all policies meet the same episodes. Test traffic is not touched, so this may decide which
    network to keep. Validation traffic is broad, and fleets begin with 0.8 to 3 times the mean demand. --history plays
    half an hour each of the fleet's own past (other draws of the test's generators, of a trace the seconds before the
    test), from the replicas that the scenario says: look there before you keep an adapted policy.

    Examples:
        rl-autoscale policy compare pretrained/single-pool runs/mine/policy --scenario bursty

        rl-autoscale policy compare pretrained/single-pool runs/mine/policy --scenario bursty --history

        rl-autoscale policy compare runs/a/policy runs/b/policy --episodes 16 --json
    """
    from rl_autoscale.envs.scenario import load_scenario
    from rl_autoscale.experiments.bills import compare_policies, mean_changes
    from rl_autoscale.workload.store import TraceStore

    names = scenario or list(read_card(policy_folder(policies[0])).get("training", {}).get("scenarios", ()))
    if not names:
        raise SpecError(f"{policies[0]}: its card names no scenarios; give --scenario")
    scenarios = [load_scenario(name) for name in names]
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("playing", total=len(scenarios))
        prices, found = compare_policies(
            policies,
            scenarios,
            TraceStore(traces or []),
            episodes=episodes,
            seed=seed,
            history=history,
            report=lambda _: bar.advance(task),
        )
    mean = mean_changes(found)
    notes = sorted({note for item in found for note in item.notes})
    if as_json:
        bills = {item.scenario: item.bills.round(4).tolist() for item in found}
        answer = {
            "policies": policies,
            "miss_price": prices.tolist(),
            "bill": bills,
            "change": mean.round(4).tolist(),
            "notes": notes,
        }
        typer.echo(json.dumps(answer, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("scenario", "policy", *(f"{price:.3g}" for price in prices)):
        named = heading in ("scenario", "policy")
        table.add_column(heading, justify="left" if named else "right", overflow="fold", no_wrap=not named)
    for item in found:
        table.add_row(item.scenario, policies[0], *(f"{bill:.2f}" for bill in item.bills[0]))
        for path, change in zip(policies[1:], item.bills[1:] / item.bills[0] - 1.0, strict=True):
            table.add_row("", path, *(f"{share:+.1%}" for share in change))
    for path, change in zip(policies[1:], mean[1:], strict=True):
        table.add_row("mean", path, *(f"{share:+.1%}" for share in change))
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    judged = {item.scenario for item in found}
    left_out = [item.name for item in scenarios if item.name not in judged]
    if left_out:
        typer.echo(f"left out, no {'history' if history else 'validation traffic'}: {', '.join(left_out)}", err=True)


def summary(path: str) -> dict[str, Any]:
    """What tells trained policies apart, out of the card.

    Raises:
        RlAutoscaleError: no such policy, or its card is damaged.
    """
    folder = policy_folder(path)
    card = read_card(folder)
    training = card.get("training", {})
    return {
        "name": path,
        "layout": card["layout"],
        "schema": card["schema"],
        "scenarios": list(training.get("scenarios", ())),
        "timesteps": training.get("timesteps"),
        "decides_refusal": card["refuse"],
        "miss_price_range": card.get("miss_price_range"),
        "dial": [f"{point['slo_attainment']:.3f} at price {point['miss_price']:g}" for point in card.get("dial", ())],
        "card_problems": card_problems(folder if folder.is_dir() else folder.parent),
    }
