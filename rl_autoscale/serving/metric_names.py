"""What each engine calls the signals we read: `metric_names.yaml`, checked and turned into a look-up by series."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import SpecError, UnknownNameError

FORMAT = 1
KNOWN_FIELDS = (
    "running", "waiting", "kv_usage", "preemptions", "prompt_tokens", "generation_tokens", "finished", "rejected",
    "completed", "ttft", "itl", "tpot", "output_tokens", "steps", "prompt_lengths",
    "prefill", "computed", "decode",
)  # fmt: skip
Part = Literal["value", "bucket", "sum", "count"]


class MetricField(Config):
    """One signal of one engine; the keys are explained at the top of the data file."""

    kind: Literal["gauge", "counter", "histogram"]
    names: tuple[str, ...] = Field(min_length=1)
    combine: Literal["sum", "mean"] = "sum"
    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    live: bool = Field(default=True, description="false: not read at every scrape of a controller")


@dataclass(frozen=True, slots=True)
class Series:
    """What a scraped series name stands for: a part of a field, and how early in ``names`` it stands."""

    field: str
    part: Part
    rank: int


class EngineNames(Config):
    """All signals of one engine."""

    metrics_path: str
    busy: tuple[str, ...]
    fields: dict[str, MetricField]

    @model_validator(mode="after")
    def _check(self) -> EngineNames:
        unknown = sorted(set(self.fields) - set(KNOWN_FIELDS)) + sorted(set(self.busy) - set(self.fields))
        if unknown:
            raise ValueError(f"unknown field {', '.join(unknown)}; known: {', '.join(KNOWN_FIELDS)}")
        return self

    @cached_property
    def with_all(self) -> EngineNames:
        """The same with the fields that a controller does not read."""
        fields = {name: item.model_copy(update={"live": True}) for name, item in self.fields.items()}
        return EngineNames(metrics_path=self.metrics_path, busy=self.busy, fields=fields)

    @cached_property
    def index(self) -> dict[str, Series]:
        """Normalised series name (see `normalise`) -> what it stands for."""
        found: dict[str, Series] = {}
        for field, item in self.fields.items():
            if not item.live:
                continue
            for rank, name in enumerate(item.names):
                for suffix, part in _suffixes(item.kind):
                    found.setdefault(normalise(name + suffix), Series(field, part, rank))
        return found

    @cached_property
    def name_pattern(self) -> str:
        """A regular expression (RE2 syntax, for PromQL) that matches every series we read and no other."""
        names = sorted(
            {
                name + suffix
                for item in self.fields.values()
                if item.live
                for name in item.names
                for suffix, _ in _suffixes(item.kind)
            }
        )
        return "|".join(name.replace(":", "[:_]") for name in names)


def _suffixes(kind: str) -> tuple[tuple[str, Part], ...]:
    if kind == "histogram":
        return (("_bucket", "bucket"), ("_sum", "sum"), ("_count", "count"))
    return (("_total", "value"), ("", "value")) if kind == "counter" else (("", "value"),)


def normalise(name: str) -> str:
    """One spelling for ``vllm:x`` and ``vllm_x``: OpenMetrics escaping turns the colon into an underscore."""
    return name.replace(":", "_")


@lru_cache
def _data() -> dict[str, Any]:
    text = (resources.files("rl_autoscale") / "serving" / "metric_names.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    version = data.pop("format")
    if version != FORMAT:
        raise SpecError(f"metric_names.yaml: format {version}, this version reads {FORMAT}")
    return data


def engine_names(engine: str) -> EngineNames:
    """The names of one engine; raises UnknownNameError with the nearest name."""
    if engine not in _data():
        raise UnknownNameError("engine", engine, _data())
    return EngineNames.from_dict(_data()[engine], where=f"metric_names.yaml, {engine}")
