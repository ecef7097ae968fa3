"""vLLM's series, by the names, types and labels of vLLM 0.33 (those of a text server without optional features).

Durations are engine seconds, so an accelerated emulator reports what the engine it plays would have measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rl_autoscale.fleet.latency_edges import TPOT_BOUNDS_S, TTFT_BOUNDS_S
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.serving.emulator.engine import Engine, Step
from rl_autoscale.serving.emulator.loop import Job

Series = TypeVar("Series", Counter, Gauge, Histogram)

_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_BASE_LABELS = ("model_name", "engine")

GAUGES = {
    "num_requests_running": "Number of requests in model execution batches.",
    "num_requests_waiting": "Number of requests waiting to be processed.",
    "kv_cache_usage_perc": "KV-cache usage. 1 means 100 percent usage.",
}
COUNTERS = {
    "prefix_cache_queries": "Prefix cache queries, in tokens.",
    "prefix_cache_hits": "Prefix cache hits, in tokens.",
    "external_prefix_cache_queries": "Prefix cache queries across instances, in tokens.",
    "external_prefix_cache_hits": "Prefix cache hits across instances, in tokens.",
    "mm_cache_queries": "Multi-modal cache queries, in items.",
    "mm_cache_hits": "Multi-modal cache hits, in items.",
    "num_preemptions": "Cumulative number of preemptions from the engine.",
    "prompt_tokens": "Number of prefill tokens processed.",
    "prompt_tokens_cached": "Number of cached prompt tokens.",
    "generation_tokens": "Number of generation tokens processed.",
}
LABELLED_COUNTERS = {
    "prompt_tokens_by_source": ("source", ("local_compute", "local_cache_hit", "external_kv_transfer")),
    "prompt_tokens_cached_by_source": ("source", ("device", "host", "p2p", "disk", "external_unspecified")),
    "request_success": ("finished_reason", ("stop", "length", "abort", "error", "repetition")),
}
LABELLED_GAUGES = {
    "num_requests_waiting_by_reason": ("reason", ("capacity", "deferred")),
    "engine_sleep_state": ("sleep_state", ("awake", "weights_offloaded", "discard_all")),
}
HISTOGRAMS_S = {
    "time_to_first_token_seconds": TTFT_BOUNDS_S,
    "inter_token_latency_seconds": TPOT_BOUNDS_S,
    "request_time_per_output_token_seconds": TPOT_BOUNDS_S,
    "e2e_request_latency_seconds": _REQUEST_S,
    "request_queue_time_seconds": _REQUEST_S,
    "request_inference_time_seconds": _REQUEST_S,
    "request_prefill_time_seconds": _REQUEST_S,
    "request_decode_time_seconds": _REQUEST_S,
}
HISTOGRAMS = {
    "iteration_tokens_total": _STEP_TOKENS,
    "request_params_n": (1, 2, 5, 10, 20),
    "request_num_preemptions": (1, 2, 3, 4, 5, 10, 20),
}
TOKEN_HISTOGRAMS = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
)


def token_buckets(max_tokens: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to a length."""
    series = (digit * 10.0**exponent for exponent in range(12) for digit in (1, 2, 5))
    return tuple(bucket for bucket in series if bucket <= max_tokens) or (1.0,)


class EngineMetrics:
    """The ``/metrics`` page of an engine.

    Args:
        engine: whose gauges are read when the page is asked for.
        model: label ``model_name``.
        max_model_len: longest request, for the buckets of token histograms.
    """

    def __init__(self, engine: Engine, model: str, max_model_len: int) -> None:
        self._engine = engine
        self._model = model
        self._seen_preemptions = 0
        self._seen_queries = self._seen_hits = 0
        self._registry = CollectorRegistry()
        self._gauges = {name: self._own(self._gauge(name, text)) for name, text in GAUGES.items()}
        self._counters = {name: self._own(self._counter(name, text)) for name, text in COUNTERS.items()}
        self._by_label = {
            name: self._children(self._counter(name, f"By {label}.", label), label, values)
            for name, (label, values) in LABELLED_COUNTERS.items()
        }
        self._gauges_by_label = {
            name: self._children(self._gauge(name, f"By {label}.", label), label, values)
            for name, (label, values) in LABELLED_GAUGES.items()
        }
        self._gauges_by_label["engine_sleep_state"]["awake"].set(1)
        tokens = token_buckets(max_model_len)
        buckets = {**HISTOGRAMS_S, **HISTOGRAMS, **dict.fromkeys(TOKEN_HISTOGRAMS, tokens)}
        self._histograms = {name: self._histogram(name, bounds) for name, bounds in buckets.items()}
        self._rejections = self._make_rejections()
        self._make_cache_info()

    # -- what the engine does --------------------------------------------------------------------------------------

    def on_step(self, step: Step, duration_s: float) -> None:
        """Count an iteration."""
        del duration_s
        self._histograms["iteration_tokens_total"].observe(step.tokens)
        self._counters["generation_tokens"].inc(len(step.yielded))
        self._counters["num_preemptions"].inc(self._engine.num_preemptions - self._seen_preemptions)
        self._seen_preemptions = self._engine.num_preemptions
        self._counters["prefix_cache_queries"].inc(self._engine.books.prefix_queried_tokens - self._seen_queries)
        self._counters["prefix_cache_hits"].inc(self._engine.books.prefix_hit_tokens - self._seen_hits)
        self._seen_queries = self._engine.books.prefix_queried_tokens
        self._seen_hits = self._engine.books.prefix_hit_tokens

    def on_token(self, job: Job, gap_s: float | None, now_s: float) -> None:
        """Count a token; a prompt is counted whole when its first token comes out."""
        if gap_s is not None:
            self._histograms["inter_token_latency_seconds"].observe(gap_s)
            return
        prompt_tokens = job.request.prompt_tokens
        self._histograms["time_to_first_token_seconds"].observe(now_s - job.request.arrival_s)
        self._counters["prompt_tokens"].inc(prompt_tokens)
        self._by_label["prompt_tokens_by_source"]["local_compute"].inc(prompt_tokens - job.cached_tokens)
        self._by_label["prompt_tokens_by_source"]["local_cache_hit"].inc(job.cached_tokens)
        self._by_label["prompt_tokens_cached_by_source"]["device"].inc(job.cached_tokens)
        self._counters["prompt_tokens_cached"].inc(job.cached_tokens)

    def on_finish(self, job: Job, now_s: float) -> None:
        """Count a request and its phases."""
        request, observe = job.request, self._histograms
        outputs = request.generated_tokens
        self._by_label["request_success"]["length" if job.cut_short else "stop"].inc()
        for name, value in {
            "request_prompt_tokens": request.prompt_tokens,
            "request_generation_tokens": outputs,
            "request_max_num_generation_tokens": outputs,
            "request_params_n": 1,
            "request_params_max_tokens": job.max_tokens,
            "request_num_preemptions": request.num_preemptions,
            "request_prefill_kv_computed_tokens": request.prompt_tokens - job.cached_tokens,
            "e2e_request_latency_seconds": now_s - request.arrival_s,
            "request_queue_time_seconds": request.scheduled_s - request.arrival_s,
            "request_prefill_time_seconds": request.first_token_s - request.scheduled_s,
            "request_decode_time_seconds": now_s - request.first_token_s,
            "request_inference_time_seconds": now_s - request.scheduled_s,
            "request_time_per_output_token_seconds": (now_s - request.first_token_s) / max(outputs - 1, 1),
        }.items():
            observe[name].observe(value)

    def on_rejection(self) -> None:
        """Count a request that was turned away because too many are in flight."""
        self._rejections.inc()

    def page(self) -> bytes:
        """Prometheus text; the gauges show the engine as it is."""
        engine = self._engine
        self._gauges["num_requests_running"].set(engine.num_running)
        self._gauges["num_requests_waiting"].set(engine.num_waiting)
        self._gauges["kv_cache_usage_perc"].set(engine.kv_usage)
        self._gauges_by_label["num_requests_waiting_by_reason"]["capacity"].set(engine.num_waiting)
        return generate_latest(self._registry)

    # -- making the series -----------------------------------------------------------------------------------------

    def _gauge(self, name: str, text: str, *more_labels: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, [*_BASE_LABELS, *more_labels], registry=self._registry)

    def _counter(self, name: str, text: str, *more_labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, [*_BASE_LABELS, *more_labels], registry=self._registry)

    def _histogram(self, name: str, bounds: Sequence[float]) -> Histogram:
        text = f"Histogram of {name}."
        return self._own(Histogram(f"vllm:{name}", text, _BASE_LABELS, buckets=bounds, registry=self._registry))

    def _own(self, family: Series) -> Series:
        return family.labels(model_name=self._model, engine="0")

    def _children(self, family: Series, label: str, values: Sequence[str]) -> dict[str, Series]:
        return {value: family.labels(model_name=self._model, engine="0", **{label: value}) for value in values}

    def _make_rejections(self) -> Counter:
        labels = ["model_name", "reason"]  # the one series without the engine's number
        family = Counter("vllm:admission_rejections", "Requests turned away.", labels, registry=self._registry)
        family.labels(model_name=self._model, reason="max_num_queued_tokens")
        return family.labels(model_name=self._model, reason="max_num_queued_reqs")

    def _make_cache_info(self) -> None:
        config = {
            "engine": "0",
            "block_size": str(BLOCK_SIZE_TOKENS),
            "num_gpu_blocks": str(self._engine.pool.num_kv_blocks),
            "enable_prefix_caching": str(self._engine.pool.prefix_caching),
        }
        text = "Information of the LLMEngine CacheConfig"
        Gauge("vllm:cache_config_info", text, list(config), registry=self._registry).labels(**config).set(1)
