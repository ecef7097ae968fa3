"""Our policy as Ray Serve calls it, with a context made by hand (a real Serve's is used in test_rayserve_live)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.serving.backends.rayserve_policy import FleetPolicy, PendingStarts, combine, read_context

from .conftest import FakeClock

POOL = {"name": "engine", "profile": "llama-3.1-8b_a100_tp1", "min_replicas": 1, "max_replicas": 8}
CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 600.0, "tpot_slo_s": 1.0}


def context(current: int = 1, target: int = 1, running: float = 0.0, queued: float = 0.0, **metrics: Any) -> Any:
    return SimpleNamespace(
        current_num_replicas=current,
        target_num_replicas=target,
        total_running_requests=running,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        config=SimpleNamespace(metrics_interval_s=2.0),
    )


@pytest.fixture
def fleet(tmp_path: Path) -> str:
    path = tmp_path / "fleet.yaml"
    text = f"pools: [{POOL}]\nclasses: [{CHAT}]\n".replace("'", "")
    path.write_text(text, encoding="utf-8")
    return str(path)


def hpa(fleet: str, clock: FakeClock, **options: Any) -> FleetPolicy:
    return FleetPolicy(fleet, "hpa", {"target": 10.0}, monotonic_s=clock.monotonic_s, **options)


def test_the_policy_decides_on_what_serve_knows(fleet: str, clock: FakeClock) -> None:
    policy = hpa(fleet, clock)
    assert policy(context(running=25.0, queued=5.0)) == (3, {})  # 30 in flight, 10 per replica


def test_a_decision_is_held_for_a_control_interval(fleet: str, clock: FakeClock) -> None:
    policy = hpa(fleet, clock)
    assert policy(context(running=30.0))[0] == 3
    clock.sleep(9.9)
    assert policy(context(running=70.0))[0] == 3
    clock.sleep(10.0)
    assert policy(context(current=3, target=3, running=70.0))[0] == 7


def test_the_fleets_bounds_and_the_shield_hold(fleet: str, clock: FakeClock) -> None:
    assert hpa(fleet, clock)(context(current=7, target=7, running=900.0))[0] == 8
    assert hpa(fleet, clock, shield={"max_step_up": 2})(context(running=900.0))[0] == 3


def test_an_error_holds_the_target(fleet: str, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    policy = hpa(fleet, clock)
    broken = context(current=4, target=5)
    broken.total_running_requests = None
    assert policy(broken) == (5, {})
    assert "holding the target" in caplog.text


@pytest.mark.parametrize(
    ("name", "knobs", "message"), [("hpaa", {}, "did you mean 'hpa'"), ("hpa", {"tarket": 3}, "did you mean 'target'")]
)
def test_a_wrong_name_is_told_at_once(fleet: str, name: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises((SpecError, KeyError), match=message):
        FleetPolicy(fleet, name, knobs)


def test_one_deployment_is_one_pool(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    pools = [POOL, {**POOL, "name": "second"}]
    path.write_text(f"pools: {pools}\nclasses: [{CHAT}]\n".replace("'", ""), encoding="utf-8")
    with pytest.raises(SpecError, match="one pool; got engine, second"):
        FleetPolicy(str(path), "hpa")


def test_what_serve_does_not_say_is_missing() -> None:
    spec = FleetSpec.from_dict({"pools": [POOL], "classes": [CHAT]})
    state = read_context(context(2, 3, 7.0, 4.0), spec, time_s=50.0, window_s=10.0, start_ages_s=(9.0, 1.0))
    pools, classes = state.pools, state.classes
    known = {"ready": 2, "starting": 1, "asked_for": 3, "running": 7, "waiting": 0, "in_flight": 7, "age_s": 2}
    known |= {"oldest_start_age_s": 9, "newest_start_age_s": 1}
    for name in pools.__slots__:
        value = getattr(pools, name)
        assert value.shape == (1,)
        assert value[0] == known[name] if name in known else np.isnan(value[0]), name
    assert classes.queue_length[0] == 4
    assert np.isnan(classes.arrivals_per_s[0])
    assert (state.time_s, state.window_s) == (50.0, 10.0)


def test_what_replicas_report_is_combined() -> None:
    reported = combine(
        {
            "kv_usage": {"a": 0.2, "b": 0.4},
            "generation_tokens_per_s": {"a": 100.0, "b": 50.0},
            "oldest_wait_s": {"a": 3.0, "b": 1.0},
            "ttft_p95_s": {"a": 1.0, "b": 2.0},
            "arrivals_per_s/chat": {"a": 1.0, "b": 2.0},
            "my_own_metric": {"a": 1.0},
            "waiting": {},
        }
    )
    assert reported == pytest.approx(
        {
            "kv_usage": 0.3,
            "generation_tokens_per_s": 150.0,
            "oldest_wait_s": 3.0,
            "ttft_p95_s": 1.5,
            "arrivals_per_s/chat": 3.0,
        }
    )


def test_classes_are_reported_by_name() -> None:
    spec = FleetSpec.from_dict({"pools": [POOL], "classes": [CHAT, JOBS]})
    metrics = {"arrivals_per_s/jobs": {"a": 2.0}, "arrivals_per_s": {"a": 9.0}, "kv_usage": {"a": 0.5}}
    state = read_context(context(**metrics), spec, time_s=0.0, window_s=10.0, start_ages_s=(0.0, 0.0))
    np.testing.assert_array_equal(state.classes.arrivals_per_s, [np.nan, 2.0])
    np.testing.assert_array_equal(state.classes.queue_length, [np.nan, np.nan])
    assert state.pools.kv_usage[0] == 0.5


def test_pending_starts_end_in_the_order_they_began() -> None:
    starts = PendingStarts()
    assert starts.update(0, 100.0) == (0.0, 0.0)
    assert starts.update(1, 100.0) == (0.0, 0.0)
    assert starts.update(3, 110.0) == (10.0, 0.0)
    assert starts.update(2, 115.0) == (5.0, 5.0)
    assert starts.update(-1, 120.0) == (0.0, 0.0)
