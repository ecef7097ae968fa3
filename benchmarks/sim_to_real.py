"""The same load and the same policies in the simulator, on emulated servers and on real vLLM: do they decide alike?

    rl-autoscale train --scenario examples/sim_to_real/scenario.yaml --timesteps 60000 --out runs/sim-to-real/train
    python benchmarks/sim_to_real.py --policy runs/sim-to-real/train/policy      # 25 minutes; see --worlds

Emulators and vLLM servers are processes of the `local` back end behind the gateway, in real time; the controller is the
one of ``rl-autoscale control``, and attainment is what the client saw. The emulated runs of all policies go on at the
same time, real servers run one policy after the other. Every run leaves a JSON file in ``--out``; ``--worlds none``
only reports what lies there. ``--page docs/sim-to-real.md`` renews table and picture of that page.

Why no verb of ``rl-autoscale``: this needs vLLM's own environment and the repository's examples.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import yaml
from sim_to_real_report import CORRECTED, Run, renew, table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "examples"))

from tiny_vllm import ENV, MODEL_NAME, READY_LOG, VOCABULARY, has_vllm, make_model, serve_command, vllm_python  # noqa: E402

from rl_autoscale.envs.scenario import Scenario, load_scenario  # noqa: E402
from rl_autoscale.experiments.episodes import policy_for, run_episode  # noqa: E402
from rl_autoscale.serving.assemble import Assembly, assemble  # noqa: E402
from rl_autoscale.serving.clock import SystemClock  # noqa: E402
from rl_autoscale.serving.config import ControlConfig  # noqa: E402
from rl_autoscale.serving.http_client import HttpError, send  # noqa: E402
from rl_autoscale.sim.result import EpisodeResult  # noqa: E402
from rl_autoscale.workload.store import TraceStore  # noqa: E402
from rl_autoscale.workload.trace import Workload  # noqa: E402

SCENARIO = REPOSITORY / "examples" / "sim_to_real" / "scenario.yaml"
COMMAND = [sys.executable, "-c", "from rl_autoscale.cli.root import main; main()"]
WORLDS = ("simulator", "emulator", "vllm")
EMULATED_STARTUP_S = 50.0  # and about ten seconds until the process gets there: the scenario's mean is 60
START_LIMIT_S = 600.0
Choice = tuple[str, dict[str, Any]]  # a registered policy's name, or an exported policy's folder; knobs
Answer = tuple[int, float, float]  # HTTP status (0: not answered in full), TTFT, TPOT; NaN where there is none
NUM_DRAWS, MOMENTS_S = 40, 15.0  # HPA looks every 15 s: the moment the load begins matters


def policies(trained: Path | None) -> dict[str, Choice]:
    """By label. HPA's target suits two slots; its window suits four minutes."""
    return {
        **({} if trained is None else {"PPO": (str(trained.resolve()), {})}),
        "single-pool": ("pretrained/single-pool", {"attainment": 0.95}),
        "Chiron-robust": ("chiron-robust", {}),
        "HPA": ("hpa", {"target": 1.5, "down_stabilisation_s": 60.0}),
    }


# -- the simulator -----------------------------------------------------------------------------------------------------


def simulate(label: str, choice: Choice, scenario: Scenario, load: Workload, *, world: str, **reality: float) -> Run:
    result = episode(choice, scenario, load, seed=0, **reality)
    item, timeline = result.classes[0], result.timeline
    return Run(
        world=world,
        policy=label,
        num_arrived=result.num_arrived,
        slo_attainment=result.slo_attainment,
        replica_minutes=result.gpu_hours * 60.0,
        ttft_p50_s=item.ttft_p50_s,
        ttft_p95_s=item.ttft_p95_s,
        tpot_p50_s=item.tpot_p50_s,
        num_refused=sum(result.outcomes[outcome] for outcome in ("refused", "queue_full", "timed_out")),
        num_lost=sum(result.outcomes[outcome] for outcome in ("failed", "unfinished")),
        startup_s=scenario.fleet.pools[0].startup_mean_s * reality.get("startup_scale", 1.0),
        step_s=timeline["time_s"].tolist(),
        asked=timeline["target"][:, 0].tolist(),
        ready=timeline["ready"][:, 0].tolist(),
        spread=spread(choice, scenario, load, **reality),
    )


def episode(choice: Choice, scenario: Scenario, load: Workload, *, seed: int, **reality: float) -> EpisodeResult:
    name, knobs = choice
    policy = policy_for("learned", {"path": name, **knobs}, load) if "/" in name else policy_for(name, knobs, load)
    return run_episode(scenario, load, policy, seed=seed, **reality)


def spread(choice: Choice, scenario: Scenario, load: Workload, **reality: float) -> tuple[float, float]:
    """What start-up draws and the moment at which the load begins, between two decisions, make of the attainment."""
    rng = np.random.default_rng(0)
    found = [episode(choice, scenario, load, seed=0, **reality).slo_attainment]
    for seed in range(1, NUM_DRAWS):
        later_s = rng.uniform(0.0, MOMENTS_S)
        moved = replace(load, arrival_s=load.arrival_s + later_s, span_s=load.span_s + MOMENTS_S)
        found.append(episode(choice, scenario, moved, seed=seed, **reality).slo_attainment)
    return min(found), max(found)


# -- real servers ------------------------------------------------------------------------------------------------------


def write_files(folder: Path, world: str, choice: Choice, scenario: Scenario, port: int) -> None:
    fleet = scenario.fleet.model_dump(mode="json", exclude_none=True)
    pool = fleet["pools"][0]
    pool["profile"] = str((REPOSITORY / pool["profile"]).resolve())
    (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    gateway = {"fleet": "fleet.yaml", "port": port, "control_port": port + 1}
    (folder / "gateway.yaml").write_text(yaml.safe_dump(gateway))
    if world == "vllm":
        command, env = serve_command(vllm_python(), folder / "model"), ENV
    else:
        options = ["--profile", pool["profile"], "--model", MODEL_NAME, "--startup-s", str(EMULATED_STARTUP_S)]
        command, env = [*COMMAND, "emulate", "--port", "{port}", *options], {}
    control = {
        "fleet": "fleet.yaml",
        "mode": "active",
        "policy": {"name": choice[0], "knobs": choice[1]},
        "gateway": {"url": f"http://127.0.0.1:{port + 1}", "timeout_s": 4.0},
        "telemetry": {"timeout_s": 4.0},
        "safety": {"down_cooldown_s": 0.0},  # the simulator has no cool-downs
        "status": None,
        "decision_log": str(folder / "decisions.jsonl"),
        "backends": {
            pool["name"]: {
                "local": {
                    "command": command,
                    "env": env,
                    "state_dir": str(folder / "state"),
                    "ports": [port + 2, port + 49],
                    "ready_log": READY_LOG,
                    "startup_timeout_s": START_LIMIT_S,
                }
            }
        },
    }
    (folder / "control.yaml").write_text(yaml.safe_dump(control))


def drive(label: str, choice: Choice, scenario: Scenario, load: Workload, world: str, folder: Path, port: int) -> Run:
    """Start gateway, controller and one replica; play the load; take everything down."""
    folder.mkdir(parents=True)
    if world == "vllm":
        make_model(vllm_python(), folder / "model")
    write_files(folder, world, choice, scenario, port)
    with (folder / "gateway.log").open("wb") as log:
        gateway = subprocess.Popen([*COMMAND, "gateway", "--config", str(folder / "gateway.yaml")], stderr=log)
    assembly = None
    try:
        wait_for_gateway(port + 1)
        assembly = assemble(ControlConfig.from_file(folder / "control.yaml"), SystemClock())
        until_ready(assembly, scenario.fleet.pools[0].initial)
        answers: list[Answer] = []
        player = threading.Thread(target=lambda: answers.extend(asyncio.run(play(load, port))))
        started_wall_s = time.time()
        player.start()
        while player.is_alive():
            assembly.controller.step()
            assembly.fleet.advance()
        return summarise(world, label, scenario, answers, folder / "decisions.jsonl", started_wall_s)
    finally:
        if assembly is not None:
            for backend in assembly.fleet._backends.values():
                backend.kill_all()  # type: ignore[attr-defined]
            assembly.close()
        gateway.terminate()
        gateway.wait(60.0)


def wait_for_gateway(port: int) -> None:
    for _ in range(600):
        try:
            if send("GET", f"http://127.0.0.1:{port}/control/snapshot", timeout_s=2.0).status == 200:
                return
        except HttpError:
            time.sleep(0.2)
    raise RuntimeError(f"no gateway on port {port}; see gateway.log")


def until_ready(assembly: Assembly, count: int) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while assembly.fleet.observe().pools.ready[0] < count:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"no {count} replicas ready after {START_LIMIT_S:.0f} s; see state/logs")
        assembly.controller.step()
        assembly.fleet.advance()


async def play(load: Workload, port: int) -> list[Answer]:
    """Send every request at its time."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, VOCABULARY, size=(len(load.arrival_s), int(load.prompt_tokens.max()))).tolist()
    limits = aiohttp.TCPConnector(limit=0)
    began_s = time.monotonic()
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=180)) as session:

        async def one(i: int) -> Answer:
            await asyncio.sleep(max(began_s + float(load.arrival_s[i]) - time.monotonic(), 0.0))
            return await ask(session, port, prompts[i][: load.prompt_tokens[i]], int(load.output_tokens[i]))

        return list(await asyncio.gather(*(one(i) for i in range(len(load.arrival_s)))))


async def ask(session: aiohttp.ClientSession, port: int, prompt: list[int], tokens: int) -> Answer:
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    sent_s, first_s, last_s, text = time.monotonic(), 0.0, 0.0, b""
    try:
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
            async for chunk in response.content.iter_any():
                if b'"text":' in chunk:
                    last_s = time.monotonic()
                    first_s = first_s or last_s
                text += chunk
            status = response.status
    except (aiohttp.ClientError, TimeoutError):
        return 0, float("nan"), float("nan")
    if status != 200:
        return status, float("nan"), float("nan")
    if (
        b'"error"' in text
        or not text.endswith(b"data: [DONE]\n\n")
        or f'"completion_tokens":{tokens}'.encode() not in text
    ):
        return 0, float("nan"), float("nan")
    return 200, first_s - sent_s, (last_s - first_s) / max(tokens - 1, 1)


def summarise(world: str, label: str, scenario: Scenario, answers: list[Answer], log: Path, began_wall_s: float) -> Run:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = [record for record in records if record["wall_s"] >= began_wall_s]
    pools = [record["pools"][scenario.fleet.pool_names[0]] for record in records]
    step_s = [record["wall_s"] - began_wall_s for record in records]
    alive = [pool["ready"] + pool["starting"] + pool["draining"] for pool in pools]
    status, ttft_s, tpot_s = (np.array(column) for column in zip(*answers, strict=True))
    item = scenario.fleet.classes[0]
    met = (status == 200) & (ttft_s <= item.ttft_slo_s) & (tpot_s <= item.tpot_slo_s)
    asked, ready = [pool["final"] for pool in pools], [pool["ready"] for pool in pools]
    wanted = next((t for t, target in zip(step_s, asked, strict=True) if target > 1), np.nan)
    came = next((t for t, count in zip(step_s, ready, strict=True) if count > 1), np.nan)
    return Run(
        world=world,
        policy=label,
        num_arrived=len(answers),
        slo_attainment=float(met.mean()),
        replica_minutes=float(np.sum(np.array(alive[:-1]) * np.diff(step_s)) / 60.0),
        ttft_p50_s=float(np.nanquantile(ttft_s, 0.5)),
        ttft_p95_s=float(np.nanquantile(ttft_s, 0.95)),
        tpot_p50_s=float(np.nanquantile(tpot_s, 0.5)),
        num_refused=int((status == 429).sum()),
        num_lost=int(((status != 200) & (status != 429)).sum()),
        others=float(np.mean([record["source"] != "policy" for record in records])),
        startup_s=came - wanted,
        step_s=step_s,
        asked=asked,
        ready=ready,
    )


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, help="folder of a policy trained for this load; without it, the others")
    parser.add_argument("--worlds", default="simulator,emulator,vllm", help="which to run now; none only reports")
    parser.add_argument("--only", help="one policy's label")
    parser.add_argument("--out", type=Path, default=Path("runs/sim-to-real/runs"))
    parser.add_argument("--page", type=Path, help="the page whose table and picture are renewed")
    options = parser.parse_args()
    scenario = load_scenario(SCENARIO)
    load = scenario.build_test(0, TraceStore((), download=False)).workload
    chosen = {key: item for key, item in policies(options.policy).items() if options.only in (None, key)}
    options.out.mkdir(parents=True, exist_ok=True)
    for world in options.worlds.split(","):
        run_world(world, chosen, scenario, load, options.out)
    runs = read_runs(options.out, policies(options.policy), scenario, load)
    print(table(runs, load.span_s))
    if options.page is not None:
        renew(options.page, runs, scenario, load)


def run_world(world: str, chosen: dict[str, Choice], scenario: Scenario, load: Workload, out: Path) -> None:
    if world == "none":
        return
    if world not in WORLDS:
        raise SystemExit(f"--worlds {world}: choose from {', '.join(WORLDS)} and none")
    if world == "vllm" and not has_vllm(vllm_python()):
        raise SystemExit(f"no vLLM at {vllm_python()}: run `make test-vllm`, or set RL_AUTOSCALE_VLLM_PYTHON")
    stamp = time.strftime("%H%M%S")

    def one(k: int, label: str) -> None:
        if world == "simulator":
            run = simulate(label, chosen[label], scenario, load, world=world)
        else:
            run = drive(label, chosen[label], scenario, load, world, out / f"{world}-{label}-{stamp}", 19000 + 100 * k)
        (out / f"{world}-{label}.json").write_text(json.dumps(asdict(run), indent=1))
        print(f"{world}, {label}: attainment {run.slo_attainment:.1%}", file=sys.stderr)

    with ThreadPoolExecutor(max_workers=len(chosen) if world == "emulator" else 1) as executor:
        list(executor.map(one, range(len(chosen)), chosen))


def read_runs(out: Path, chosen: dict[str, Choice], scenario: Scenario, load: Workload) -> list[Run]:
    """All runs in the folder; for every one on vLLM also the simulator with what was measured there.

    That is its time per token, and the longest start-up of all runs: where a replica never came there is no other.
    """
    paths = {(world, label): out / f"{world}-{label}.json" for label in chosen for world in WORLDS}
    found = {key: Run(**json.loads(path.read_text())) for key, path in paths.items() if path.exists()}
    startups_s = [run.startup_s for run in found.values() if run.world == "vllm" and np.isfinite(run.startup_s)]
    startup_s = max(startups_s, default=scenario.fleet.pools[0].startup_mean_s)
    runs = []
    for label, choice in chosen.items():
        read = {world: found[world, label] for world in WORLDS if (world, label) in found}
        runs += read.values()
        if "simulator" in read and "vllm" in read:
            speed = read["vllm"].tpot_p50_s / read["simulator"].tpot_p50_s
            reality = {"speed": speed, "startup_scale": startup_s / read["simulator"].startup_s}
            runs.append(simulate(label, choice, scenario, load, world=CORRECTED, **reality))
    return runs


if __name__ == "__main__":
    main()
