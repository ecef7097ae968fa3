"""A headless Chromium, spoken to in its own debugging protocol: a page, what it evaluates, every error it reports.

Any Chromium will do: ``RL_AUTOSCALE_CHROMIUM`` names it, else it is looked for on the path.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
MISSING = f"no Chromium: install one ({', '.join(NAMES[:3])}, ...) or name it in RL_AUTOSCALE_CHROMIUM"
# As root Chromium refuses to start its sandbox; the only page it opens is ours, on this machine.
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1300,1000")
START_LIMIT_S = 60.0


def chromium() -> str | None:
    """The browser's command, or None."""
    return os.environ.get("RL_AUTOSCALE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab.

    Attributes:
        errors: exceptions of its scripts, errors on its console, resources that did not load.
        requests: addresses that it asked for.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._socket = socket
        self._session_id: str | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listening = asyncio.create_task(self._listen())

    async def open(self, url: str) -> None:
        """Load an address in a new tab, all errors watched from the beginning."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session_id = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until(f"location.href === '{url}' && document.readyState === 'complete'", START_LIMIT_S)

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(message if self._session_id is None else message | {"sessionId": self._session_id})
        return await answer

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, limit_s: float) -> None:
        """Wait until an expression is true."""
        async with asyncio.timeout(limit_s):
            while not await self.evaluate(expression):
                await asyncio.sleep(0.2)

    async def picture(self) -> bytes:
        """What is to be seen, PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def _listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if "error" in said:
                    answer.set_exception(RuntimeError(str(said["error"])))
                else:
                    answer.set_result(said["result"])
            else:
                self._note(said["method"], said["params"])

    def _note(self, event: str, what: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(what["exceptionDetails"].get("exception", what["exceptionDetails"])["description"])
        elif event == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert", "warning"):
            self.errors.append(f"console: {[item.get('value') for item in what['args']]}")
        elif event == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"log: {what['entry']['text']} {what['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])


@asynccontextmanager
async def browser(command: str, folder: Path) -> AsyncIterator[Page]:
    """A Chromium with an empty profile in ``folder``, and a page of it that has not been opened yet."""
    process = await asyncio.create_subprocess_exec(
        command, *OPTIONS, f"--user-data-dir={folder}", stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(START_LIMIT_S):
            url = await _debugging_url(process)
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            page = Page(socket)
            try:
                yield page
            finally:
                await page.close()
    finally:
        process.kill()
        await process.wait()


async def _debugging_url(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    said = b""
    async for line in process.stderr:
        said += line
        if found := re.search(rb"DevTools listening on (ws://\S+)", line):
            return found[1].decode()
    raise RuntimeError(f"the browser ended:\n{said.decode(errors='replace')[-2000:]}")
