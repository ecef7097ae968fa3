"""``rl-autoscale replay``: what each policy would have cost and broken on recorded traffic."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rl_autoscale.fleet.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    from rl_autoscale.experiments.replay import Outcome, ReplayFleet
    from rl_autoscale.workload.buckets import BucketSeries, Gaps, Spread
    from rl_autoscale.workload.trace import Workload

stderr = Console(stderr=True, highlight=False)
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_GAPS = ("cut", "fill", "error")
_REFUSALS = {"off": ("off",), "on": ("on",), "both": ("off", "on")}


def command(
    prometheus: Annotated[str | None, typer.Option(help="Address of a Prometheus server.")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Counts per time bucket, or a request trace that `trace` reads.")
    ] = None,
    from_: Annotated[str, typer.Option("--from", help="Begin: ISO 8601 (UTC unless said), or now-7d.")] = "now-7d",
    to: Annotated[str, typer.Option(help="End, written the same way.")] = "now",
    step: Annotated[str, typer.Option(help="Bucket length, 30s or 5m; at least two scrapes, better four.")] = "1m",
    engine: Annotated[str, typer.Option(help="vllm, sglang, tensorrt-llm, or gateway: ours.")] = "vllm",
    selector: Annotated[str, typer.Option(help='Label matchers: job="vllm",namespace="llm".')] = "",
    token_file: Annotated[Path | None, typer.Option(help="File with Prometheus' bearer token.")] = None,
    scenario: Annotated[str | None, typer.Option(help="Take fleet and shield of a scenario.")] = None,
    fleet: Annotated[Path | None, typer.Option(help="YAML with your fleet.")] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="Give every request this class.")] = None,
    policies: Annotated[
        str | None,
        typer.Option(help="Comma-separated; also pretrained/NAME or a policy's folder. Default: five."),
    ] = None,
    knob: Annotated[list[str] | None, typer.Option(help="POLICY.NAME=VALUE; may be repeated.")] = None,
    refusal: Annotated[str, typer.Option(help="Gateway refuses what would miss its TTFT: off, on, both.")] = "off",
    gaps: Annotated[str, typer.Option(help="Buckets without data: cut, fill or error.")] = "cut",
    length_cv: Annotated[float, typer.Option(min=0, help="Spread of lengths where only means are known.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    figure: Annotated[Path, typer.Option(help="Picture to write; .png, .svg or .pdf.")] = Path("replay.png"),
    write_trace: Annotated[
        Path | None, typer.Option(help="Keep the requests, .csv or .parquet, for scenarios and training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Replay my last week: what would each policy have cost, and what would it have broken?

    Traffic comes from Prometheus or from a file, the fleet from a scenario or a file of
    yours; every policy meets the same requests on a simulation of that fleet. Calibrate
    its latency profile first: rl-autoscale calibrate --help.

    --csv takes counts per bucket,
      time,arrivals,prompt_tokens,output_tokens
      2026-11-02T00:00:00Z,412,480211,80122
    (totals of the bucket; optional column class), or single requests:
      arrival_s,prompt_tokens,output_tokens

    Buckets without data are reported and never read as buckets without load. Engines
    count what they served; --engine gateway also knows classes and what was refused.

    Examples:
        rl-autoscale replay --csv week.csv --fleet fleet.yaml

        rl-autoscale replay --prometheus http://prometheus:9090 --from now-7d --fleet fleet.yaml

        rl-autoscale replay --csv week.csv --scenario chatbot --policies hpa,keda --knob hpa.target=40
    """
    if (prometheus is None) == (csv is None):
        raise SpecError("give either --prometheus URL or --csv FILE")
    if (scenario is None) == (fleet is None):
        raise SpecError("give either --scenario NAME or --fleet FILE: the fleet that the traffic is replayed on")
    for name, value, allowed in (("gaps", gaps, _GAPS), ("refusal", refusal, _REFUSALS)):
        if value not in allowed:
            raise UnknownNameError(f"--{name}", value, allowed)
    from rl_autoscale.cli.evaluate import parse_knobs
    from rl_autoscale.experiments.replay import DEFAULT_POLICIES, choose_policies, fit_classes
    from rl_autoscale.experiments.replay_figure import draw_replay
    from rl_autoscale.workload.writers import write_trace as write

    target = _fleet(scenario, fleet)
    words = [word for word in (policies or ",".join(DEFAULT_POLICIES)).split(",") if word]
    choices = choose_policies(words, parse_knobs(knob or []), cast("Any", _REFUSALS[refusal]))
    spread: Spread | None
    if prometheus is not None:
        series = _ask_prometheus(prometheus, engine, selector, token_file, from_, to, step)
        workload, spread, notes = _spread(series, seed, cast("Gaps", gaps), length_cv)
    else:
        assert csv is not None
        workload, spread, notes = _read_file(csv, seed, cast("Gaps", gaps), length_cv)
    workload = fit_classes(workload, target.fleet, class_name)
    for note in notes:
        stderr.print(f"note: {note}")
    if write_trace is not None:
        for note in write(workload, write_trace):
            stderr.print(f"note: {note}")
    outcomes = _run(target, workload, choices, seed)
    draw_replay(outcomes, workload.span_s, figure)
    interval_s = target.fleet.control_interval_s
    if as_json:
        typer.echo(json.dumps(_data(outcomes, workload, spread, notes, interval_s, figure), indent=2))
        return
    console = Console()
    days = workload.span_s / _UNITS_S["d"]
    console.print(f"{workload.num_requests:,} requests over {days:.3g} days", highlight=False)
    console.print(_table(outcomes, spread, interval_s))
    console.print(f"wrote {figure}", highlight=False)


def parse_moment(text: str, now_s: float) -> float:
    """Seconds since 1970 of ``now``, ``now-7d``, an ISO 8601 stamp (UTC unless it says otherwise) or a number.

    Raises:
        SpecError: none of these.
    """
    if text == "now":
        return now_s
    if text.startswith("now-"):
        return now_s - parse_duration_s(text[4:])
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SpecError(f"'{text}' is not a time; write 2026-11-02, 2026-11-02T08:00Z, now or now-7d") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def parse_duration_s(text: str) -> float:
    """Seconds of ``90``, ``30s``, ``5m``, ``12h``, ``7d`` or ``1w``.

    Raises:
        SpecError: none of these, or not positive.
    """
    number, unit_s = (text[:-1], _UNITS_S[text[-1]]) if text[-1:] in _UNITS_S else (text, 1.0)
    try:
        duration_s = float(number) * unit_s
    except ValueError:
        duration_s = math.nan
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise SpecError(f"'{text}' is not a length of time; write 30s, 5m, 12h, 7d or 1w")
    return duration_s


def _fleet(scenario: str | None, fleet: Path | None) -> ReplayFleet:
    from rl_autoscale.experiments.replay import ReplayFleet, read_fleet

    if fleet is not None:
        return read_fleet(fleet)
    from rl_autoscale.envs.scenario import load_scenario

    assert scenario is not None
    chosen = load_scenario(scenario)
    return ReplayFleet(fleet=chosen.fleet, shield=chosen.shield)


def _ask_prometheus(
    url: str, engine: str, selector: str, token_file: Path | None, begin: str, end: str, step: str
) -> list[BucketSeries]:
    from rl_autoscale.serving.history import PrometheusHistory, Window

    now_s = time.time()
    step_s = parse_duration_s(step)
    token = None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SpecError(f"--token-file {token_file}: cannot be read ({error.strerror})") from None
    window = Window(parse_moment(begin, now_s), parse_moment(end, now_s), step_s)
    source = PrometheusHistory(url, engine=engine, selector=selector, token=token)
    with _bar() as progress:
        task = progress.add_task("asking Prometheus", total=1)
        return source.read(window, lambda done, total: progress.update(task, completed=done, total=total))


def _read_file(path: Path, seed: int, gaps: Gaps, length_cv: float) -> tuple[Workload, Spread | None, tuple[str, ...]]:
    from rl_autoscale.workload.bucket_csv import is_bucket_csv, read_buckets
    from rl_autoscale.workload.readers import read_trace

    if is_bucket_csv(path):
        return _spread(read_buckets(path), seed, gaps, length_cv)
    result = read_trace(path)
    return result.workload, None, result.report.notes


def _spread(
    series: Sequence[BucketSeries], seed: int, gaps: Gaps, length_cv: float
) -> tuple[Workload, Spread, tuple[str, ...]]:
    from rl_autoscale.workload.buckets import spread

    found = spread(series, seed=seed, gaps=gaps, length_cv=length_cv, describe_time=_when)
    return found.workload, found, found.notes


def _run(target: ReplayFleet, workload: Workload, choices: Sequence[Any], seed: int) -> list[Outcome]:
    from rl_autoscale.experiments.replay import replay

    with _bar() as progress:
        task = progress.add_task("compiling", total=len(choices))

        def report(place: int, label: str, share: float) -> None:
            progress.update(task, description=label, completed=place + share)

        return replay(target, workload, choices, seed=seed, progress=report)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True)


def _when(at_s: float) -> str:
    """A moment for people; numbers below a year since 1970 are a file's own clock."""
    if at_s < 365 * _UNITS_S["d"]:
        return f"{at_s:,.0f} s"
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%MZ")


def _worst(outcome: Outcome, spread: Spread | None, interval_s: float) -> tuple[str, int]:
    worst = outcome.worst_hour(interval_s)
    return _when(worst.start_s if spread is None else spread.wall_s(worst.start_s)), worst.num_missed


def _table(outcomes: Sequence[Outcome], spread: Spread | None, interval_s: float) -> Table:
    from rl_autoscale.experiments.replay_figure import name_of

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for heading in ("SLO met", "misses", "refused", "worst hour", "GPU-h", "cost $", "$/week"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        result = outcome.result
        at, missed = _worst(outcome, spread, interval_s)
        table.add_row(
            name_of(outcome), f"{result.slo_attainment:.2%}", f"{outcome.num_missed:,}",
            f"{result.outcomes['refused']:,}", f"{missed:,}\n{at}" if missed else "-",
            f"{result.gpu_hours:,.1f}", f"{result.cost_usd:,.2f}", f"{outcome.usd_per_week():,.0f}",
        )  # fmt: skip
    return table


def _data(
    outcomes: Sequence[Outcome], workload: Workload, spread: Spread | None, notes: Sequence[str], interval_s: float,
    figure: Path,
) -> dict[str, Any]:  # fmt: skip
    rows = []
    for outcome in outcomes:
        at, missed = _worst(outcome, spread, interval_s)
        metrics = {name: value if math.isfinite(value) else None for name, value in outcome.result.summary().items()}
        rows.append({
            "policy": outcome.choice.label, "refusal": outcome.choice.refusal,
            "knobs": {name: str(value) for name, value in outcome.choice.knobs.items()},
            "num_missed": outcome.num_missed, "outcomes": outcome.result.outcomes,
            "worst_hour": {"start": at, "num_missed": missed},
            "usd_per_week": outcome.usd_per_week(), "metrics": metrics,
        })  # fmt: skip
    traffic = {"num_requests": workload.num_requests, "span_s": workload.span_s, "notes": list(notes)}
    return {"traffic": traffic, "policies": rows, "figure": str(figure)}
