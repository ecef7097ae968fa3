"""Suites: benchmarks over many scenarios, written out in ``suites/NAME.yaml``; and who runs on which scenario.

A suite's file is a `BenchmarkConfig`. Its trained policies are added when it is run: those that ship with the package,
or those named on the command line. A trained policy runs only on fleets of its schema, so several of them together may
be needed to cover a suite; as long as no two fit the same scenario they go under one label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rl_autoscale.agents.policy_file import read_card
from rl_autoscale.agents.pretrained import PREFIX, pretrained_names
from rl_autoscale.envs.scenario import Scenario, load_scenario, shipped_scenario_names
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.grid import BenchmarkConfig, PolicySweep
from rl_autoscale.fleet.errors import SpecError, UnknownNameError

SUITE_FOLDER = Path(__file__).with_name("suites")
ALL_SCENARIOS = "all"
LEARNED_LABEL = "PPO"

BURSTY, MULTI_CLASS, HETEROGENEOUS = "bursty", "multi-class", "heterogeneous"
GROUPS = (BURSTY, MULTI_CLASS, HETEROGENEOUS)
_BURSTY_GENERATORS = frozenset({"mmpp", "flash_crowd"})
_BURSTY_TRACES = frozenset({"azure2023_code"})
"""Its arrivals come in bursts shorter than a start-up (the card of ``azure-code``)."""


def suite_names() -> list[str]:
    """Names of the suites in the package, sorted."""
    return sorted(path.stem for path in SUITE_FOLDER.glob("*.yaml"))


def load_suite(
    name: str, policies: Sequence[PolicySweep] = (), scenarios: Sequence[str] = (), **changes: object
) -> BenchmarkConfig:
    """A suite's configuration.

    Args:
        name: one of `suite_names`.
        policies: added to the suite's own.
        scenarios: only these; default all of the suite.
        changes: fields of `BenchmarkConfig` to replace.

    Raises:
        UnknownNameError: no such suite.
        SpecError: a change that cannot be.
    """
    if name not in suite_names():
        raise UnknownNameError("suite", name, suite_names())
    data = yaml.safe_load((SUITE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if data["scenarios"] == ALL_SCENARIOS:
        data["scenarios"] = shipped_scenario_names()
    if scenarios:
        data["scenarios"] = list(scenarios)
    data["policies"] = [*data["policies"], *(sweep.model_dump() for sweep in policies)]
    return BenchmarkConfig.from_dict({**data, **changes}, where=f"suite {name}")


def shipped_policies_for(scenarios: Sequence[str] = ()) -> list[str]:
    """Paths of the shipped policies that fit one of these scenarios at least; default all of them."""
    schemas = {Schema.of(load_scenario(name).fleet).digest for name in scenarios}
    paths = [PREFIX + name for name in pretrained_names()]
    return [path for path in paths if not schemas or read_card(Path(path))["schema"] in schemas]


def learned_sweeps(paths: Sequence[str]) -> tuple[PolicySweep, ...]:
    """Trained policies under one label where each has a schema of its own, else told apart by their folders' names.

    Raises:
        RlAutoscaleError: a policy that is not there, or damaged.
    """
    schemas = [read_card(Path(path))["schema"] for path in paths]
    alone = len(set(schemas)) == len(schemas)
    return tuple(
        PolicySweep(
            policy="learned",
            label=LEARNED_LABEL if alone else f"{LEARNED_LABEL} {Path(path).name}",
            knobs={"path": path},
        )
        for path in paths
    )


def sweeps_that_fit(
    policies: Sequence[PolicySweep], scenarios: Mapping[str, Scenario]
) -> dict[str, tuple[PolicySweep, ...]]:
    """Who runs on which scenario: every rule, and the trained policies of the scenario's schema.

    Raises:
        SpecError: a trained policy fits no scenario, or two of one label fit the same.
    """
    schemas = {name: Schema.of(scenario.fleet) for name, scenario in scenarios.items()}
    cards = {str(item.knobs["path"]): read_card(Path(str(item.knobs["path"]))) for item in policies if item.trained}
    for path, card in cards.items():
        if all(card["schema"] != schema.digest for schema in schemas.values()):
            layouts = sorted({", ".join(schema.layout) for schema in schemas.values()})
            if ", ".join(card["layout"]) in layouts:
                raise SpecError(
                    f"{path}: exported by a version with other features (schema {card['schema']}); train it again"
                )
            raise SpecError(
                f"{path}: trained for ({', '.join(card['layout'])}); fits none of the scenarios, which have "
                f"({'), ('.join(layouts)}); choose scenarios with its pools and classes, or train one on these"
            )
    fitting = {}
    for name, schema in schemas.items():
        fitting[name] = tuple(
            item for item in policies if not item.trained or cards[str(item.knobs["path"])]["schema"] == schema.digest
        )
        labels = [item.name for item in fitting[name]]
        if repeated := sorted({label for label in labels if labels.count(label) > 1}):
            raise SpecError(f"two policies called {', '.join(repeated)} fit scenario {name}; give each a label")
    return fitting


def groups_of(scenario: Scenario) -> tuple[str, ...]:
    """The groups a scenario counts in, by what its test traffic and its fleet are; see `GROUPS`.

    *bursty*: a stream of the test traffic is Markov-modulated, a flash crowd, or the bursty trace; *multi-class*: more
    than one service class; *heterogeneous*: more than one kind of hardware.
    """
    streams = scenario.test.streams
    bursty = any(
        (item.generator is not None and item.generator.kind in _BURSTY_GENERATORS) or item.trace in _BURSTY_TRACES
        for item in streams
    )
    found = {
        BURSTY: bursty,
        MULTI_CLASS: len(scenario.fleet.classes) > 1,
        HETEROGENEOUS: len({pool.profile for pool in scenario.fleet.pools}) > 1,
    }
    return tuple(name for name in GROUPS if found[name])
