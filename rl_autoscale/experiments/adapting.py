"""Whether adapting a policy was worth it: its bill beside that of the policy it came of, on traffic that no search saw.

A search of a few episodes a price keeps some of their luck, and a fleet's own past may differ from what was searched
on: of twenty adapted networks seven were dearer than before on one of the two (docs/results.md). So both
policies are played on validation traffic and on the fleet's history, and the adapted one is to be run where its bill is
lower on the history, and on both together, weighted as the search weighs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.experiments.bills import compare_policies, mean_changes, with_traffic
from rl_autoscale.experiments.offset_search import traffic_weights
from rl_autoscale.workload.spec import TraceSource

EPISODES = {"validation": 12, "history": 6}
"""Of each scenario at each price, by traffic. An episode of history is longer."""
SEED = 7
VERDICT_FILE = "verdict.json"
"""In a run's folder."""
_TRAFFIC = {"validation": "validation traffic", "history": "the fleet's own past"}


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What adapting does to the bill on one kind of traffic.

    Attributes:
        miss_price: shape (num_prices,).
        by_price: change as a share, geometric mean over scenarios; shape (num_prices,).
        notes: what is to be told of the traffic.
    """

    miss_price: npt.NDArray[np.float64]
    by_price: npt.NDArray[np.float64]
    notes: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Over prices, geometric."""
        return float(np.expm1(np.log1p(self.by_price).mean()))


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """An adapted policy beside the one it came of.

    Attributes:
        start: the policy that it came of; of several the first.
        adapted: its folder.
        changes: by traffic, ``validation`` and ``history``; without those that no scenario has.
    """

    start: str
    adapted: str
    changes: dict[str, Change]

    @property
    def keep(self) -> bool | None:
        """Whether its bill is lower on the past and on the weighted mean of all; None where there is nothing."""
        if not self.changes:
            return None
        weights = traffic_weights(1, 1) if len(self.changes) == 2 else np.ones(1)
        means = [self.changes[name].mean for name in EPISODES if name in self.changes]
        return bool(means[-1] < 0.0 and weights @ np.log1p(means) < 0.0)

    @property
    def notes(self) -> set[str]:
        """Of all the traffic."""
        return {note for change in self.changes.values() for note in change.notes}

    def in_words(self) -> str:
        """One sentence, which policy to run and why."""
        if not self.changes:
            return (
                f"nothing tells whether it is better than {self.start}: the scenario has neither generators among its "
                "training sources nor a trace that begins before its test"
            )
        told = ", ".join(f"{change.mean:+.1%} on {_TRAFFIC[name]}" for name, change in self.changes.items())
        better = self.adapted if self.keep else self.start
        return f"its bill against {self.start}'s: {told}; run {better}"

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        changes = {
            name: {
                "miss_price": change.miss_price.round(3).tolist(),
                "change_of_bill": change.by_price.round(4).tolist(),
                "mean": round(change.mean, 4),
            }
            for name, change in self.changes.items()
        }
        return {"start": self.start, "keep": self.keep, **changes}


def judge_adapted(
    adapted: Path,
    start: str,
    scenarios: Sequence[Scenario],
    store: TraceSource,
    *,
    report: Callable[[str], None] | None = None,
) -> Verdict:
    """Play an adapted policy and the one that it came of, as they are deployed, in the same episodes.

    Args:
        adapted: its folder.
        start: the other's folder, or ``pretrained/NAME``.
        scenarios: that it was adapted to.
        store: where traces come from.
        report: told what is being played.

    Raises:
        PolicyFileError: one of the two is damaged, or of another schema than a scenario.
    """
    changes = {}
    for traffic, episodes in EPISODES.items():
        history = traffic == "history"
        if not with_traffic(scenarios, history=history):
            continue
        if report is not None:
            report(f"playing it beside {start} on {_TRAFFIC[traffic]} ...")
        policies = (start, str(adapted))
        prices, found = compare_policies(policies, scenarios, store, episodes=episodes, seed=SEED, history=history)
        notes = {note for item in found for note in item.notes}
        changes[traffic] = Change(prices, mean_changes(found)[1], tuple(sorted(notes)))
    return Verdict(start, str(adapted), changes)
