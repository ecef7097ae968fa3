"""A server under calibration: streams of tokens, and looks at its metrics page."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.serving.gateway.sse import EventSplitter, StreamError
from rl_autoscale.serving.metric_names import engine_names
from rl_autoscale.serving.samples import parse_exposition

Row = dict[str, float]

_NAMES = engine_names("vllm").with_all
_NEEDED = ("prefill", "itl")


def iteration_row(
    *, chunk: float = 0, chunk_context: float = 0, num_decode: int = 0, context: float = 0.0, time_s: float
) -> Row:
    """One measured iteration in the columns of docs/profiles.md: a prompt chunk, a decode batch, or both."""
    return {
        "prefill_chunk_tokens": chunk,
        "prefill_kv_context": chunk_context,
        "decode_batch_size": num_decode,
        "mean_decode_context": context,
        "iter_time_ms": time_s * 1e3,
    }


@dataclass(frozen=True, slots=True)
class Total:
    """Sum and number of values of a histogram since the server began, in the histogram's unit."""

    sum: float
    count: float

    def since(self, before: Total) -> Total:
        """What came in between."""
        return Total(self.sum - before.sum, self.count - before.count)

    @property
    def mean(self) -> float:
        """Of at least one value."""
        return self.sum / self.count


@dataclass(frozen=True, slots=True)
class Look:
    """One reading of the metrics page.

    Attributes:
        running: sequences in the batch.
        waiting: sequences queued.
        generated: output tokens since the server began.
        preemptions: since the server began.
        prefill: seconds from a request's first iteration to its first token; counted when it ends.
        itl: seconds between tokens.
        kv_blocks: of 16 tokens; None where the server does not say.
        block_tokens: size of the server's own blocks; None likewise.
        kv_usage: share of them in use.
        first_tokens: of how many requests since the server began.
        prompts: tokens; counted when a request ends, as the next two.
        computed: tokens of prompts that were computed, the others being cached; as ``prompts`` in older versions.
        decode: seconds from a request's first token to its last.
    """

    running: int
    waiting: int
    generated: float
    preemptions: float
    prefill: Total
    itl: Total
    kv_blocks: int | None
    block_tokens: int | None
    kv_usage: float
    first_tokens: float
    prompts: Total
    computed: Total
    decode: Total


def read_page(text: str, where: str) -> Look:
    """Read a metrics page.

    Raises:
        SpecError: a series that calibration needs is missing.
    """
    sample = parse_exposition(text, _NAMES, 0.0)
    missing = [name for name in _NEEDED if name not in sample.histograms]
    missing += [name for name in ("running", "waiting") if name not in sample.gauges]
    missing += [name for name in ("generation_tokens",) if name not in sample.counters]
    if missing:
        series = ", ".join(_NAMES.fields[name].names[0] for name in missing)
        raise SpecError(f"{where} lacks {series}; calibration needs a vLLM server with its metrics on")
    blocks, size = _kv_cache(text)

    def total(*names: str) -> Total:
        found = next((sample.histograms[name] for name in names if name in sample.histograms), None)
        return Total(math.nan, math.nan) if found is None else Total(found.total, found.count)

    return Look(
        running=int(sample.gauges["running"]),
        waiting=int(sample.gauges["waiting"]),
        generated=sample.counters["generation_tokens"],
        preemptions=sample.counters.get("preemptions", 0.0),
        prefill=total("prefill"),
        itl=total("itl"),
        kv_blocks=blocks,
        block_tokens=size,
        kv_usage=sample.gauges.get("kv_usage", math.nan),
        first_tokens=total("ttft").count,
        prompts=total("prompt_lengths"),
        computed=total("computed", "prompt_lengths"),
        decode=total("decode"),
    )


def _kv_cache(text: str) -> tuple[int | None, int | None]:
    """``vllm:cache_config_info``: blocks of 16 tokens, summed over data-parallel engines, and its own block size."""
    lines = [
        line for line in text.splitlines() if line.startswith(("vllm:cache_config_info", "vllm_cache_config_info"))
    ]
    found, block_tokens = 0, None
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            blocks, size = sample.labels.get("num_gpu_blocks", ""), sample.labels.get("block_size", "")
            if blocks.isdigit() and size.isdigit():
                found, block_tokens = found + int(blocks) * int(size) // BLOCK_SIZE_TOKENS, int(size)
    return found or None, block_tokens


class CalibratedServer(Protocol):
    """What calibration asks of a server."""

    async def look(self) -> Look:
        """Read its metrics now."""
        ...

    def stream(self, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        """Send token ids and give the number of new tokens whenever some come, exactly ``max_tokens`` in all.

        Closing the iterator early takes the request back.
        """
        ...


class HttpServer:
    """A vLLM server at an address; a context manager that looks up the served model.

    Args:
        url: ``http://host:port``.
        key: API key, where it wants one.
        timeout_s: for a connection, a metrics page, and between two tokens.

    Attributes:
        model: the served model's name.
        max_model_len: prompt and output together; None where it does not say.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = ""
        self.max_model_len: int | None = None
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0)
        )
        try:
            text = await self._get("/v1/models")
        except BaseException:
            await self._session.close()
            raise
        try:
            model = json.loads(text)["data"][0]
            self.model, self.max_model_len = str(model["id"]), model.get("max_model_len")
        except (ValueError, KeyError, IndexError, TypeError):
            await self._session.close()
            raise SpecError(f"{self.url}/v1/models: not the answer of an OpenAI-compatible server") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def look(self) -> Look:
        """Read ``/metrics``."""
        return read_page(await self._get("/metrics"), f"{self.url}/metrics")

    async def stream(self, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        """See `CalibratedServer`; raises SpecError when the server refuses or ends the stream early."""
        body: dict[str, Any] = {
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        seen = 0
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise SpecError(f"{self.url}: status {answer.status}: {(await answer.text())[:200]}")
                splitter = EventSplitter()
                async for chunk in answer.content.iter_any():
                    before = seen
                    for event in splitter.feed(chunk):
                        seen += self._tokens(event, seen)
                    if seen > before:
                        yield seen - before
        except (aiohttp.ClientError, TimeoutError, StreamError) as error:
            raise SpecError(f"{self.url}: {type(error).__name__}: {error}") from None
        if seen != max_tokens:
            raise SpecError(f"{self.url}: {seen} tokens came, {max_tokens} were asked for; is the server draining?")

    def _tokens(self, event: bytes, seen: int) -> int:
        """New tokens of an event; the usage at the end corrects events that held several."""
        text = event.strip().removeprefix(b"data:").strip()
        if not text or text == b"[DONE]":
            return 0
        said = json.loads(text)
        if "error" in said:
            raise SpecError(f"{self.url}: {said['error']}")
        if said.get("usage"):
            return int(said["usage"]["completion_tokens"]) - seen
        return len(said["choices"])

    async def _get(self, path: str) -> str:
        try:
            async with self._session.get(self.url + path) as answer:
                if answer.status != 200:
                    raise SpecError(f"{self.url}{path}: status {answer.status}")
                return await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise SpecError(f"{self.url}{path}: {type(error).__name__}: {error}; is the server up?") from None
