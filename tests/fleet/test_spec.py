"""What a fleet's YAML may say, and what the answer is when it says something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.fleet.spec import FleetSpec


def fleet(**changes: Any) -> dict[str, Any]:
    base = {
        "pools": [{"name": "gpu", "profile": "llama-3.1-8b_a100_tp1", "min_replicas": 1, "max_replicas": 4}],
        "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
    }
    return {**base, **changes}


def one_pool(**changes: Any) -> dict[str, Any]:
    return fleet(pools=[{**fleet()["pools"][0], **changes}])


def one_class(**changes: Any) -> dict[str, Any]:
    return fleet(classes=[{**fleet()["classes"][0], **changes}])


def shared(*names: str, **changes: Any) -> dict[str, Any]:
    """Two pools that share three GPUs."""
    pool = {**fleet()["pools"][0], **changes}
    return fleet(pools=[pool, {**pool, "name": "gpu2"}], shared_gpus=[{"pools": names, "gpus": 3}])


SLEEP = {"max_sleeping": 1, "wake": [{"mean_s": 3}]}
TWO_MODELS = [fleet()["pools"][0], {"name": "big", "profile": "llama-3.1-70b_a100_tp4"}]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (fleet(ruoter="packing"), "unknown key 'ruoter'.*did you mean 'router'"),
        (one_pool(max_replica=3), "did you mean 'max_replicas'"),
        (one_class(ttft_slo=1), "did you mean 'ttft_slo_s'"),
        (one_pool(min_replicas=5), "min_replicas=5 exceeds max_replicas=4"),
        (one_pool(initial_replicas=9), "initial_replicas=9 is outside"),
        (one_pool(max_num_seqs=64, max_num_batched_tokens=32), "max_num_seqs=64 exceeds max_num_batched_tokens=32"),
        (one_pool(role="batch"), "no pool may serve class 'chat'"),
        (one_pool(mean_time_to_crash_s=-1), "mean_time_to_crash_s"),
        (one_pool(kv_blocks=0), "kv_blocks"),
        (one_class(ttft_slo_s=0), "ttft_slo_s"),
        (one_class(tpot_slo_s=float("inf")), "tpot_slo_s"),
        (one_class(queue_limit=-1), "queue_limit"),
        (fleet(control_interval_s=0), "control_interval_s"),
        (fleet(telemetry_age_s=20.0), "telemetry_age_s=20.0 exceeds control_interval_s=10.0"),
        (fleet(gpu_budget=1, pools=[{**fleet()["pools"][0], "min_replicas": 2}]), "gpu_budget=1 cannot hold min"),
        (fleet(pools=fleet()["pools"] * 2), "pool names must differ; repeated: gpu"),
        (fleet(classes=fleet()["classes"] * 2), "class names must differ; repeated: chat"),
        (fleet(router="random"), "router"),
        (fleet(pools=[]), "at least one pool|pools"),
        (one_class(model="a"), "no pool may serve class 'chat' .interactive.; .* and model a"),
        (shared("gpu", "gqu2"), "shared_gpus names pool 'gqu2'.*did you mean 'gpu2'"),
        (shared("gpu", "gpu2", "gpu"), "names pool 'gpu' twice"),
        (shared("gpu", "gpu2", spot={"mean_life_s": 60.0}), "shares its GPUs and is spot"),
        (shared("gpu", "gpu2", sleep=SLEEP), "shares its GPUs and sleeps"),
        (
            fleet(pools=[one_pool(sleep=SLEEP)["pools"][0], TWO_MODELS[1]], gpu_budget=9),
            "'gpu' sleeps, and gpu_budget=9",
        ),
        (shared("gpu", "gpu2", initial_replicas=2), "the initial replicas of its pools take 4 of 3 GPUs"),
        ({**one_pool(scheduler="sarathi"), "eviction": "host"}, "eviction: host goes with scheduler vllm"),
        ({**one_pool(kv_allocation="contiguous"), "drain": "migrate"}, "drain: migrate goes with scheduler vllm"),
        (fleet(pools=TWO_MODELS, eviction="host"), "a KV cache belongs to one model"),
    ],
)
def test_one_line_says_what_is_wrong(data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint) as error:
        FleetSpec.from_dict(data, where="fleet.yaml")
    assert str(error.value).startswith("fleet.yaml: ")
    assert "\n" not in str(error.value)


def test_an_unknown_profile_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'llama-3.1-8b_h100_tp1'"):
        FleetSpec.from_dict(one_pool(profile="llama-3.1-8b_h100_tp2"))


def test_what_is_left_out_comes_from_the_profile() -> None:
    spec = FleetSpec.from_dict(fleet())
    pool = spec.pools[0]
    assert (pool.batch_limit, pool.token_budget) == (pool.hardware.max_num_seqs, pool.hardware.max_num_batched_tokens)
    assert pool.num_kv_blocks == pool.hardware.kv_blocks
    assert pool.initial == 1
    assert pool.startup_mean_s == 60.0


def test_classes_go_to_the_pools_of_their_kind_first() -> None:
    profile = {"profile": "llama-3.1-8b_a100_tp1"}
    pools = [{"name": name, "role": role, **profile} for name, role in
             (("m", "mixed"), ("b", "batch"), ("i", "interactive"), ("m2", "mixed"))]  # fmt: skip
    classes = [{"name": kind, "kind": kind, "ttft_slo_s": 1, "tpot_slo_s": 1} for kind in ("batch", "interactive")]
    spec = FleetSpec.from_dict({"pools": pools, "classes": classes})
    assert spec.pools_serving(0) == (1, 0, 3)
    assert spec.pools_serving(1) == (2, 0, 3)
    np.testing.assert_array_equal(spec.gpus_per_replica, [1, 1, 1, 1])


def test_a_spec_cannot_be_changed() -> None:
    spec = FleetSpec.from_dict(fleet())
    with pytest.raises(ValueError, match="frozen"):
        spec.router = "packing"  # type: ignore[misc]
