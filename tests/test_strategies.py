"""The strategies reach the cases that matter, and build only what the package accepts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import fleet_specs, fleet_states, scaling_decisions, workloads


def hard_cases(spec: Any, state: Any, decision: Any, workload: Any) -> dict[str, bool]:
    """Which of the cases that break laws this example holds."""
    return {
        "three pools": len(spec.pools) == 3,
        "both kinds": {item.kind for item in spec.classes} == {"interactive", "batch"},
        "starts empty": int(spec.initial_replicas.sum()) == 0,
        "no queue": any(item.queue_limit == 0 for item in spec.classes),
        "a choice of pools": any(len(spec.pools_serving(c)) > 1 for c in range(len(spec.classes))),
        "missing signal": bool(np.isnan(state.pools.ready).any()),
        "impossible target": bool((decision.target_replicas > spec.max_replicas).any()),
        "simultaneous arrivals": workload.num_requests > 5 and float(workload.arrival_s[-1]) == 0.0,
    }


def test_everything_drawn_fits_its_fleet_and_hard_cases_are_reached() -> None:
    reached: Counter[str] = Counter()

    @settings(max_examples=80, database=None)
    @given(st.data())
    def look(data: st.DataObject) -> None:
        spec = data.draw(fleet_specs())
        workload = data.draw(workloads(spec.class_names))  # before the many numbers of a state use up the entropy
        state = data.draw(fleet_states(spec))
        decision = data.draw(scaling_decisions(spec))
        assert state.pools.ready.shape == decision.target_replicas.shape == (len(spec.pools),)
        assert state.classes.admission.shape == decision.admission.shape == (len(spec.classes),)
        assert workload.class_index.max() < len(spec.classes)
        reached.update(hard_cases(spec, state, decision, workload))

    look()
    assert [name for name, times in reached.items() if not times] == []
