"""DistServe's comparison: goodput per GPU of the best disaggregated placement over the best colocated one.

Applications, promises and mean lengths are the paper's (arXiv 2401.09670, section 6.1, table 1 and figure 7), its
models on A100 come from the roofline (no measurement of OPT is shipped), and its claims stand beside ours. Lengths are
lognormal or follow a few quantiles, with the published means; of their shapes the paper has histograms only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rl_autoscale.experiments.placement import Search, Settings, Traffic, Tried, resumable
from rl_autoscale.experiments.tables import Cell, Table
from rl_autoscale.fleet.pool import SchedulerName
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import ServiceClass
from rl_autoscale.sim.profile_file import write_profile
from rl_autoscale.sim.roofline import GPUS, MODELS, Roofline
from rl_autoscale.workload.lengths import LengthLaw, LengthModel, lognormal, quantiles, sample_lengths
from rl_autoscale.workload.trace import Workload

NVLINK_BYTES_PER_S = 300e9
"""Inside a node of A100: algorithm 2 keeps both phases there."""
SCHEDULERS: tuple[SchedulerName, ...] = ("vllm-v0", "vllm")


def lengths(prompt: LengthLaw, output: LengthLaw) -> LengthModel:
    """Prompt and output independent of each other."""
    return LengthModel(prompt, output)


SHAREGPT = lengths(lognormal(577, 1.0, 1800), lognormal(148, 0.8, 1000))
HUMANEVAL = lengths(lognormal(155, 0.45, 600), lognormal(82, 0.6, 500))
LONGBENCH = lengths(quantiles((0, 0.2, 0.5, 1), (700, 1530, 1960, 2000)), lognormal(61.7, 0.91, 500))


@dataclass(frozen=True, slots=True)
class Application:
    """A row.

    Attributes:
        name: of the row.
        model: of `roofline.MODELS`.
        degrees: of tensor parallelism that are tried.
        num_gpus: in a placement.
        lengths: of its requests.
        ttft_slo_s: promised.
        tpot_slo_s: promised.
        default_tp: tensor parallelism that the paper gives vLLM.
        claim: of the paper, over vLLM.
    """

    name: str
    model: str
    degrees: tuple[int, ...]
    num_gpus: int
    lengths: LengthModel
    ttft_slo_s: float
    tpot_slo_s: float
    default_tp: int
    claim: str


APPLICATIONS = (
    Application("chatbot, OPT-13B", "opt-13b", (1, 2, 4), 8, SHAREGPT, 0.25, 0.1, 1, "× 2.0 to 4.6"),
    Application("chatbot, OPT-66B", "opt-66b", (4, 8), 16, SHAREGPT, 2.5, 0.15, 4, "× 2.0 to 4.6"),
    Application("code completion, OPT-66B", "opt-66b", (4, 8), 16, HUMANEVAL, 0.125, 0.2, 4, "× 5.7"),
    Application("summarisation, OPT-66B", "opt-66b", (4, 8), 16, LONGBENCH, 15.0, 0.15, 4, "× 4.3"),
    Application("chatbot, Llama-3.1-8B", "llama-3.1-8b", (1, 2, 4), 8, SHAREGPT, 0.25, 0.1, 1, "-"),
)


def traffic_of(application: Application, settings: Settings) -> Traffic:
    """Its requests, Poisson arrivals at one per second."""
    samples = []
    for seed in range(settings.seeds):
        rng = stream(seed, f"distserve/{application.name}")
        prompt, output = sample_lengths(rng, application.lengths, settings.num_requests)
        arrival_s = np.cumsum(rng.exponential(1.0, settings.num_requests))
        which = np.zeros(settings.num_requests, dtype=np.int16)
        samples.append(Workload(arrival_s, prompt, output, which, ("requests",), float(arrival_s[-1])))
    promise = {"ttft_slo_s": application.ttft_slo_s, "tpot_slo_s": application.tpot_slo_s}
    return Traffic(tuple(samples), (ServiceClass.from_dict({"name": "requests", "queue_limit": 100_000, **promise}),))


def compare(
    out: Path,
    *,
    settings: Settings,
    progress: Callable[[str, int, int], None],
    applications: tuple[Application, ...] = APPLICATIONS,
) -> dict[str, list[Tried]]:
    """Search the placements of each application; what ``out`` holds already is not looked for again.

    Returns:
        Placements by application, the best per GPU first.
    """
    found = {}
    for application in applications:
        folder = out / application.name.replace(", ", "_").replace(" ", "-").lower()
        folder.mkdir(parents=True, exist_ok=True)
        profiles = []
        for degree in application.degrees:
            name = f"{application.model}_a100_tp{degree}"
            profile = Roofline(MODELS[application.model], GPUS["A100"], degree).profile(name=name)
            write_profile(profile, folder / f"{name}.yaml", overwrite=True)
            profiles.append(str(folder / f"{name}.yaml"))

        def report(name: str, done: int, total: int, application: Application = application) -> None:
            progress(f"{application.name}: {name}", done, total)

        known, write = resumable(folder / "place.json", asdict(settings), report)
        found[application.name] = Search(
            tuple(profiles), application.num_gpus, traffic_of(application, settings), schedulers=SCHEDULERS,
            link_bytes_per_s=NVLINK_BYTES_PER_S, settings=settings, known=known, found=write,
        ).run()  # fmt: skip
    return found


def placements_table(found: dict[str, list[Tried]]) -> Table:
    """The best placement of each kind, and the disaggregated one over two colocated ones."""
    rows = []
    for application in (item for item in APPLICATIONS if item.name in found):
        tried = found[application.name]
        together = [item for item in tried if item.placement.prefill is None]
        apart = next(item for item in tried if item.placement.prefill is not None)
        baseline = next(
            item for item in together if item.placement.name.endswith(f"TP{application.default_tp} vllm-v0")
        )
        rows.append(
            (
                Cell(application.name),
                Cell(f"{application.ttft_slo_s:g} / {application.tpot_slo_s:g}"),
                *(
                    Cell(f"{item.per_gpu_s:.2f} ({item.placement.name})", short=f"{item.per_gpu_s:.2f}")
                    for item in (baseline, together[0], apart)
                ),
                *(Cell(_ratio(apart.per_gpu_s, item.per_gpu_s)) for item in (baseline, together[0])),
                Cell(application.claim),
            )
        )
    return Table(
        "Goodput per GPU, requests per second",
        "Highest rate with 90 % of the requests within both promises, per GPU. Baseline: the parallelism that the "
        "paper gives vLLM. The last columns: the best disaggregated placement over the two colocated ones, and what "
        "the paper claims over its baseline.",
        (
            "application", "TTFT / TPOT, s", "baseline", "best colocated", "best disaggregated", "over baseline",
            "over best colocated", "DistServe's claim",
        ),
        tuple(rows),
        num_text=2,
    )  # fmt: skip


def _ratio(over: float, under: float) -> str:
    return f"× {over / under:.2f}" if under else "-"
