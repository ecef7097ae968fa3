"""The status page in a real browser, on a real controller with an emulated fleet under load.

python -m pytest -m live tests/serving/test_status_page_browser.py
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs the serve extra")

from browser import MISSING, browser, chromium
from rehearsal_files import write_files
from streaming_clients import Client, running_gateway, until

from rl_autoscale.serving.assemble import Assembly, assemble
from rl_autoscale.serving.clock import SystemClock
from rl_autoscale.serving.config import ControlConfig

pytestmark = [pytest.mark.live, pytest.mark.skipif(chromium() is None, reason=MISSING)]
PORT = 18700
LIMIT_S = 120.0
CHARTS = ("load", "replicas", "queue", "attainment")
MOVING = ("load", "replicas", "attainment")
# Of each chart: the lines that a user can see, how many points they have, and any figure that is none.
LOOK = """Object.fromEntries(["load", "replicas", "queue", "attainment"].map(id => {
  const box = document.getElementById(id).getBoundingClientRect();
  const lines = [...document.querySelectorAll(`#${id} path`)];
  return [id, {
    width: box.width, height: box.height, inside: lines.every(line => {
      const b = line.getBoundingClientRect();
      return b.top >= box.top - 2 && b.bottom <= box.bottom + 2 && b.left >= box.left - 2 && b.right <= box.right + 2;
    }),
    points: lines[0].getAttribute("d").length,
    broken: /NaN|undefined|Infinity/.test(document.getElementById(id).innerHTML),
    legend: document.getElementById(id + "-legend").innerText,
  }];
}))"""


@contextmanager
def controller_under_load(folder: Path) -> Iterator[Assembly]:
    """Gateway, one emulator, four clients, and an acting controller that steps in a thread of its own."""
    write_files(folder, PORT)
    stop, stopped = threading.Event(), threading.Event()
    clients = [Client(PORT, "emulated", "x" * 400, stop) for _ in range(4)]
    with running_gateway(folder / "gateway.yaml", PORT + 1):
        assembly = assemble(ControlConfig.from_file(folder / "control.yaml"), SystemClock())

        def step() -> None:
            assembly.controller.step()
            assembly.fleet.advance()

        def go_on() -> None:
            while not stopped.is_set():
                step()

        stepping = threading.Thread(target=go_on, daemon=True)
        try:
            until(lambda: assembly.fleet.observe().pools.ready[0] == 1, 120.0, step)
            for client in clients:
                client.start()
            stepping.start()
            yield assembly
        finally:
            stop.set()
            stopped.set()
            if stepping.ident is not None:
                stepping.join(30.0)
            assembly.fleet._backends["gpu"].kill_all()
            assembly.close()


def test_charts_are_drawn_and_grow_and_nothing_goes_wrong(tmp_path: Path) -> None:
    async def look_at_it(url: str) -> None:
        async with browser(chromium(), tmp_path / "profile") as page:
            await page.open(url)
            for chart in MOVING:  # a line, not a dot
                await page.until(f"(document.querySelector('#{chart} path')?.getTotalLength() ?? 0) > 50", LIMIT_S)
            first = await page.evaluate(LOOK)
            for chart in CHARTS:
                seen = first[chart]
                assert seen["width"] > 300, chart
                assert seen["height"] > 100, chart
                assert seen["inside"], chart
                assert not seen["broken"], chart
            assert "gpu ready" in first["replicas"]["legend"]
            last = await page.evaluate("steps[steps.length - 1].step")
            await page.until(f"steps[steps.length - 1].step > {last} + 2", LIMIT_S)
            later = await page.evaluate(LOOK)
            assert all(later[chart]["points"] > first[chart]["points"] for chart in MOVING)
            assert "active" in await page.evaluate("document.getElementById('mode').innerText")
            assert "s ago" in await page.evaluate("document.getElementById('age').innerText")
            assert len(await page.picture()) > 10_000
            assert page.errors == []
            assert {address.rsplit("?")[0] for address in page.requests} <= {url, url + "status.json"}

    with controller_under_load(tmp_path) as assembly:
        asyncio.run(look_at_it(f"http://127.0.0.1:{assembly.status.port}/"))


def test_it_says_so_when_the_controller_is_gone(tmp_path: Path) -> None:
    async def look_at_it(url: str, close) -> None:
        async with browser(chromium(), tmp_path / "profile") as page:
            await page.open(url)
            await page.until("steps.length > 0", LIMIT_S)
            close()
            await page.until("document.getElementById('age').innerText === 'controller does not answer'", LIMIT_S)
            assert await page.evaluate("document.querySelectorAll('#load path').length") > 0  # what was known stays

    with controller_under_load(tmp_path) as assembly:
        asyncio.run(look_at_it(f"http://127.0.0.1:{assembly.status.port}/", assembly.status.close))
