"""The split of all traffic into training, validation and test, as written in ``split.yaml``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeFloat, model_validator

from rl_autoscale.fleet.config import Config

SPLIT_FILE = Path(__file__).with_name("split.yaml")


class TraceSplit(Config):
    """Which seconds [start, end) of a public trace are for what."""

    train: tuple[NonNegativeFloat, NonNegativeFloat]
    test: tuple[NonNegativeFloat, NonNegativeFloat]

    @model_validator(mode="after")
    def _disjoint(self) -> TraceSplit:
        for name, (start, end) in (("train", self.train), ("test", self.test)):
            if start >= end:
                raise ValueError(f"{name}=[{start:g}, {end:g}] must have start < end")
        if self.train[0] < self.test[1] and self.test[0] < self.train[1]:
            raise ValueError(f"train={list(self.train)} and test={list(self.test)} overlap")
        return self


class ScenarioSplit(Config):
    """What a scenario trains, validates and tests on: names of its training sources, and kinds of test traffic."""

    train: tuple[str, ...] = Field(min_length=1)
    validation: tuple[str, ...] = Field(min_length=1)
    test: tuple[str, ...] = Field(min_length=1)


class Split(Config):
    """The whole file."""

    streams: dict[str, str] = Field(description="name of the random stream of each split")
    traces: dict[str, TraceSplit]
    scenarios: dict[str, ScenarioSplit]


def load_split(path: Path = SPLIT_FILE) -> Split:
    """Read the split; raises SpecError when it contradicts itself."""
    return Split.from_yaml(path)
