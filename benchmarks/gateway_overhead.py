"""What the gateway costs: added time to first token, and 500 streams at 20 tokens per second each.

    python benchmarks/gateway_overhead.py                 # a quick look
    python benchmarks/gateway_overhead.py --minutes 10    # the figure in docs/gateway.md

Three emulated replicas, the gateway and this load generator share the machine, each a process. Two replicas play a
metronome (an iteration lasts exactly 50 ms, so every stream gets 20 tokens per second) and carry the streams; the third
answers at once and is asked by probes, in turn directly and through the gateway, first without and then beside the
streams. What the gateway adds is the difference of the two distributions' percentiles. CPU time and memory of the
gateway come from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import yaml

TOKENS_PER_S = 20
STREAM_TOKENS = 200
COMMAND = "from rl_autoscale.cli.root import main; main()"
PROBE_GAP_S = 0.01
END = b"0\r\n\r\n"


def profile(name: str, iteration_s: float) -> dict:
    return {
        "name": name, "model": "none", "gpu": "none", "gpus_per_replica": 1, "kv_blocks": 100_000, "max_num_seqs": 512,
        "max_num_batched_tokens": 8192, "token_knots": [0, 1], "token_knot_s": [iteration_s, iteration_s],
        "decode_context_s": 0, "decode_seq_s": 0, "prefill_pair_s": 0, "prefill_context_s": 0, "prefill_seq_s": 0,
        "source": "made up: an iteration of constant length",
    }  # fmt: skip


class Stream(asyncio.Protocol):
    """One request; counts its events and when they came. Plain bytes, so that the load generator is cheap."""

    def __init__(self, tokens: int, service_class: str) -> None:
        body = json.dumps({"prompt": [1] * 20, "stream": True, "ignore_eos": True, "max_tokens": tokens}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-service-class: {service_class}\r\n"
        self.request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        self.events = 0
        self.first_s: float | None = None
        self.last_s = 0.0
        self.longest_gap_s = 0.0
        self.failed = False
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.sent_s = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        events = data.count(b'"text":')
        if events:
            now_s = time.perf_counter()
            if self.first_s is None:
                self.first_s = now_s
            else:
                self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_s)
            self.last_s = now_s
            self.events += events
        self.failed |= b'"error"' in data or (self.first_s is None and b" 200 " not in data[:20] and b"HTTP" in data)
        if data.endswith(END) or self.failed:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.failed |= error is not None
        if not self.over.done():
            self.over.set_result(None)


async def request(port: int, tokens: int, service_class: str) -> Stream:
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(lambda: Stream(tokens, service_class), "127.0.0.1", port)
    await stream.over
    return stream


@asynccontextmanager
async def process(*options: str) -> AsyncIterator[tuple[int, int]]:
    """A server of ours as (pid, port)."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", COMMAND, *options, stderr=asyncio.subprocess.PIPE
    )
    try:
        line = (await child.stderr.readline()).decode()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise RuntimeError(f"{options[0]} did not start: {line}{(await child.stderr.read()).decode()}")
        yield child.pid, int(found[1])
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGKILL)
        await child.wait()


def gateway_config(folder: Path, metronomes: list[int], probe: int) -> Path:
    pools = [
        {"name": "streams", "role": "batch", "profile": str(folder / "metronome.yaml")},
        {"name": "probes", "role": "interactive", "profile": str(folder / "instant.yaml")},
    ]
    classes = [
        {"name": "stream", "kind": "batch", "ttft_slo_s": 60, "tpot_slo_s": 1},
        {"name": "probe", "ttft_slo_s": 1, "tpot_slo_s": 1},
    ]
    ports = [("streams", port) for port in metronomes] + [("probes", probe)]
    replicas = [
        {"replica_id": str(port), "pool": pool, "url": f"http://127.0.0.1:{port}", "phase": "ready"}
        for pool, port in ports
    ]
    path = folder / "gateway.yaml"
    fleet = {"pools": pools, "classes": classes}
    path.write_text(yaml.safe_dump({"fleet": fleet, "replicas": replicas, "port": 0, "control_port": 0}))
    return path


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def probe(direct_port: int, gateway_port: int, going_on: Callable[[], bool]) -> dict[str, object]:
    """Ask the instant replica directly and through the gateway, in turn; milliseconds."""
    times_s: dict[str, list[float]] = {"direct": [], "gateway": []}
    ports = {"direct": direct_port, "gateway": gateway_port}
    while going_on():
        for way, port in ports.items():
            stream = await request(port, 1, "probe")
            if not stream.failed and stream.first_s is not None:
                times_s[way].append(stream.first_s - stream.sent_s)
            await asyncio.sleep(PROBE_GAP_S)
    found: dict[str, object] = {"num_probes": len(times_s["gateway"])}
    for share in (50, 99):
        direct, through = (1e3 * float(np.percentile(times_s[way], share)) for way in ("direct", "gateway"))
        found |= {
            f"direct_p{share}_ms": direct,
            f"gateway_p{share}_ms": through,
            f"added_p{share}_ms": through - direct,
        }
    return found


async def carry(port: int, num_streams: int, ends_s: float, streams: list[Stream]) -> None:
    """Keep so many streams open: each is replaced when it ends."""

    async def client(number: int) -> None:
        await asyncio.sleep(number / num_streams * STREAM_TOKENS / TOKENS_PER_S)  # they do not begin together
        while time.perf_counter() < ends_s:
            streams.append(await request(port, STREAM_TOKENS, "stream"))

    await asyncio.gather(*(client(number) for number in range(num_streams)))


async def watch(pid: int, ends_s: float, samples: list[float]) -> None:
    while time.perf_counter() < ends_s:
        samples.append(memory_mib(pid))
        await asyncio.sleep(1.0)


async def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    for name, iteration_s in (("metronome", 1.0 / TOKENS_PER_S), ("instant", 1e-4)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(profile(name, iteration_s)))
    async with AsyncExitStack() as stack:
        emulate = ("emulate", "--port", "0", "--profile")
        metronomes = [
            await stack.enter_async_context(process(*emulate, str(folder / "metronome.yaml"))) for _ in range(2)
        ]
        _, probe_port = await stack.enter_async_context(process(*emulate, str(folder / "instant.yaml")))
        config = gateway_config(folder, [port for _, port in metronomes], probe_port)
        pid, port = await stack.enter_async_context(process("gateway", "--config", str(config)))
        quiet_ends_s = time.perf_counter() + args.probe_seconds
        spent_s = cpu_s(pid)
        quiet = await probe(probe_port, port, lambda: time.perf_counter() < quiet_ends_s)
        quiet["gateway_cpu_us_per_request"] = 1e6 * (cpu_s(pid) - spent_s) / int(str(quiet["num_probes"]))
        return {"quiet": quiet, **await under_load(args, pid, port, probe_port, [m for m, _ in metronomes])}


async def under_load(
    args: argparse.Namespace, pid: int, port: int, probe_port: int, emulators: list[int]
) -> dict[str, object]:
    begin_s = time.perf_counter()
    ends_s = begin_s + STREAM_TOKENS / TOKENS_PER_S + 60.0 * args.minutes
    before = {"gateway": cpu_s(pid), "emulators": sum(map(cpu_s, emulators)), "load": time.process_time()}
    streams: list[Stream] = []
    samples: list[float] = []
    full_s = begin_s + STREAM_TOKENS / TOKENS_PER_S  # from here on all streams are open

    async def probes() -> dict[str, object]:
        await asyncio.sleep(full_s - time.perf_counter())
        return await probe(probe_port, port, lambda: time.perf_counter() < ends_s)

    jobs: tuple[Awaitable[object], ...] = (
        probes(),
        carry(port, args.streams, ends_s, streams),
        watch(pid, ends_s, samples),
    )
    loaded, *_ = await asyncio.gather(*jobs)
    wall_s = time.perf_counter() - begin_s
    used = {"gateway": cpu_s(pid), "emulators": sum(map(cpu_s, emulators)), "load": time.process_time()}
    tokens = sum(stream.events for stream in streams)
    good = [s for s in streams if not s.failed and s.first_s is not None and s.events > 1]
    rates = [(s.events - 1) / (s.last_s - s.first_s) for s in good]
    steady = samples[len(samples) // 4 :]
    slope = np.polyfit(np.arange(len(steady)) / 60.0, steady, 1)[0] if len(steady) > 10 else float("nan")
    return {
        "beside_streams": loaded,
        "streams": len(streams),
        "failed_streams": len(streams) - len(good),
        "incomplete_streams": sum(s.events != STREAM_TOKENS for s in streams),
        "tokens_per_s": tokens / wall_s,
        "tokens_per_s_and_stream_p1": float(np.percentile(rates, 1)),
        "longest_gap_p99_ms": 1e3 * float(np.percentile([s.longest_gap_s for s in good], 99)),
        "cpu_share": {name: (used[name] - before[name]) / wall_s for name in used},
        "gateway_cpu_us_per_token": 1e6 * (used["gateway"] - before["gateway"]) / tokens,
        "gateway_memory_mib": {"first": samples[0], "last": samples[-1], "slope_per_minute": float(slope)},
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.5, help="with all streams open")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--probe-seconds", type=float, default=10.0, help="of probes without streams")
    args = parser.parse_args()
    try:
        import uvloop as loops
    except ImportError:
        loops = None
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=loops.new_event_loop if loops else None) as runner,
    ):
        print(json.dumps(runner.run(measure(Path(folder), args)), indent=2))


if __name__ == "__main__":
    main()
