"""``rl-autoscale trace``: list, fetch, describe and convert request traces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload import transform
from rl_autoscale.workload.catalog import KNOWN_TRACES
from rl_autoscale.workload.fitted import FITTED_NAMES
from rl_autoscale.workload.readers import OnBadRows, ReadResult, TraceFormat, read_trace
from rl_autoscale.workload.stats import describe
from rl_autoscale.workload.store import TraceStore
from rl_autoscale.workload.trace import Workload
from rl_autoscale.workload.writers import write_trace

app = typer.Typer(help="Request traces: list, fetch, describe and convert.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(help="A known trace's name, a file's stem in a --traces folder, or a path.")]
Folders = Annotated[list[Path] | None, typer.Option("--traces", help="Folder with trace files; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Format = Annotated[
    TraceFormat | None, typer.Option("--format", help="Of the input; default: told from ending and header.")
]
BadRows = Annotated[
    OnBadRows | None,
    typer.Option("--on-bad-rows", help="error: refuse; skip: leave out and report. Default: error, or as catalogued."),
]


@app.command("ls")
def list_traces(traces: Folders = None, as_json: Json = False) -> None:
    """List the known public traces, and which of them are on this machine.

    Example: rl-autoscale trace ls --traces ~/traces
    """
    store = TraceStore(traces or ())
    rows = [
        {
            "name": trace.name,
            "num_requests": trace.num_requests,
            "format": trace.format,
            "licence": trace.licence,
            "verified": trace.sha256 is not None,
            "fitted_stand_in": trace.name in FITTED_NAMES,
            "path": None if (path := store.find(trace.name)) is None else str(path),
            "url": trace.url,
            "citation": trace.citation,
        }
        for trace in KNOWN_TRACES.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("requests", justify="right")
    for heading in ("licence", "checksum", "stand-in", "on this machine"):
        table.add_column(heading)
    for row in rows:
        count = "?" if row["num_requests"] is None else f"{row['num_requests']:,}"
        flags = ("yes" if row["verified"] else "unknown", "yes" if row["fitted_stand_in"] else "")
        table.add_row(str(row["name"]), count, str(row["licence"]), *flags, str(row["path"] or "-"))
    Console().print(table)


@app.command("fetch")
def fetch_trace(
    name: Annotated[str, typer.Argument(help="A known trace's name; see `rl-autoscale trace ls`.")],
    traces: Folders = None,
    as_json: Json = False,
) -> None:
    """Download a public trace into the cache, unless it is on this machine already; print where it is.

    Example: rl-autoscale trace fetch azure2023_conv
    """
    with _download_progress() as progress:
        store = TraceStore(traces or (), progress=progress)
        path = store.fetch(name)
    trace = KNOWN_TRACES.get(name)
    if trace is not None and trace.sha256 is None:
        _say(f"{name}: no checksum is known for this trace; the file is unverified")
    if trace is not None:
        _say(f"{name}: {trace.licence}; please cite {trace.citation}")
    typer.echo(json.dumps({"name": name, "path": str(path)}) if as_json else str(path))


@app.command("describe")
def describe_trace(
    source: Source,
    traces: Folders = None,
    format: Format = None,
    on_bad_rows: BadRows = None,
    as_json: Json = False,
) -> None:
    """Show a trace's rate, burstiness and lengths.

    Example: rl-autoscale trace describe azure2023_conv

    Example: rl-autoscale trace describe my.csv --json
    """
    result = _read(source, traces, format, on_bad_rows)
    stats = describe(result.workload)
    if as_json:
        stats["notes"] = list(result.report.notes)
        stats["num_bad_rows"] = len(result.report.bad_rows)
        typer.echo(json.dumps(stats, indent=2))
        return
    console = Console()
    console.print(_overview(source, stats))
    console.print(_lengths(stats))


@app.command("convert")
def convert_trace(
    source: Source,
    out: Annotated[Path, typer.Argument(help="File to write; its ending, .csv or .parquet, chooses the form.")],
    traces: Folders = None,
    format: Format = None,
    on_bad_rows: BadRows = None,
    slice_s: Annotated[
        tuple[float, float] | None, typer.Option("--slice-s", help="Keep [START, END) seconds.", metavar="START END")
    ] = None,
    time_warp: Annotated[float, typer.Option(help="Multiply every time; 2 is half the rate.")] = 1.0,
    rate_scale: Annotated[
        float, typer.Option(help="Multiply the number of requests; keeps the shape by minute.")
    ] = 1.0,
    max_context_tokens: Annotated[int | None, typer.Option(help="Clip prompt + output to this.")] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="Give every request this class.")] = None,
    seed: Annotated[int, typer.Option(help="Of the copies or the thinning of --rate-scale.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Convert any known trace file to our own CSV or parquet, cut, stretched and scaled on the way.

    The order is: slice, time warp, rate scale, context clip, class.

    Example: rl-autoscale trace convert BurstGPT_1.csv burst.parquet --on-bad-rows skip --slice-s 0 86400

    Example: rl-autoscale trace convert azure2023_conv big.parquet --rate-scale 20
    """
    if out.exists() and not force:
        raise SpecError(f"{out} exists; choose another name, or say --force to overwrite it")
    workload = _read(source, traces, format, on_bad_rows).workload
    if slice_s is not None:
        workload = transform.slice_time(workload, *slice_s)
    workload = transform.warp_time(workload, time_warp)
    workload = transform.scale_rate(np.random.default_rng(seed), workload, rate_scale)
    if max_context_tokens is not None:
        workload = transform.clip_context(workload, max_context_tokens)
    if class_name is not None:
        workload = transform.assign_class(workload, class_name)
    _refuse_empty(workload)
    for note in write_trace(workload, out):
        _say(note)
    _say(f"{out}: {workload.num_requests:,} requests over {workload.span_s:,.1f} s")


def _refuse_empty(workload: Workload) -> None:
    if workload.num_requests == 0:
        raise SpecError("nothing is left to write; choose a wider --slice-s or a larger --rate-scale")


def _read(source: str, traces: list[Path] | None, format: TraceFormat | None, on_bad_rows: str | None) -> ReadResult:
    """Find (or download) and read; notes go to stderr."""
    with _download_progress() as progress:
        path = TraceStore(traces or (), progress=progress).locate(source)
    known = KNOWN_TRACES.get(source)
    as_catalogued = known.on_bad_rows if known is not None and path.name == known.file_name else "error"
    result = read_trace(path, format, on_bad_rows=cast(OnBadRows, on_bad_rows or as_catalogued))
    for note in result.report.notes:
        _say(note)
    return result


def _say(message: str) -> None:
    """A remark for people, kept out of the results."""
    typer.echo(message, err=True)


@contextmanager
def _download_progress() -> Iterator[Any]:
    """A callback that draws a bar on stderr, from the first byte on."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def report(name: str, done: int, total: int | None) -> None:
        if name not in tasks:
            bar.start()  # not before: an idle bar would still print an empty line
            tasks[name] = bar.add_task(f"fetching {name}", total=total)
        bar.update(tasks[name], completed=done)

    try:
        yield report
    finally:
        bar.stop()


def _overview(source: str, stats: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=source, title_justify="left")
    table.add_column("statistic")
    table.add_column("value", justify="right")
    rows = (
        ("requests", f"{stats['num_requests']:,}"),
        ("span", f"{stats['span_s']:,.1f} s"),
        ("mean rate", f"{stats['mean_rate_per_s']:.4g} /s"),
        ("peak / mean by minute", _number(stats["peak_to_mean_1min"])),
        ("CV of inter-arrival gaps", _number(stats["gap_cv"])),
        ("Fano factor 1 / 10 / 60 s", " / ".join(_number(stats[f"fano_{window}s"]) for window in (1, 10, 60))),
        ("lag-1 autocorrelation by minute", _number(stats["autocorrelation_1min"])),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _lengths(stats: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("tokens")
    for heading in ("requests", "mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="right")
    groups: list[tuple[str, Mapping[str, Any]]] = [("all", stats)]
    if len(stats["classes"]) > 1:
        groups += list(stats["classes"].items())
    for name, group in groups:
        for side in ("prompt", "output"):
            lengths = group[f"{side}_tokens"]
            if lengths is not None:
                numbers = [f"{lengths[key]:,.0f}" for key in ("mean", "p50", "p90", "p99", "max")]
                table.add_row(f"{name} {side}", f"{group['num_requests']:,}", *numbers)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
