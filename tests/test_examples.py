"""What lies in examples/ keeps fitting the package; real servers are tested in tests/serving/test_real_vllm.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_vllm

from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.serving.backends.local import LocalConfig
from rl_autoscale.workload.store import TraceStore

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_scenario_of_sim_to_real_asks_for_more_than_one_replica_and_no_more_than_all(monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # it names its profile from there
    scenario = load_scenario(REPOSITORY / "examples" / "sim_to_real" / "scenario.yaml")
    pool = scenario.fleet.pools[0]
    load = scenario.build_test(0, TraceStore((), download=False)).workload
    per_token_s = pool.hardware.decode_s_per_token(pool.batch_limit, 0.0)
    crowd = (load.arrival_s > 50) & (load.arrival_s < 140)
    replicas = load.output_tokens[crowd].sum() / 90.0 * per_token_s
    assert 1.0 < replicas < pool.max_replicas


def test_serve_command_suits_the_local_back_end(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RL_AUTOSCALE_VLLM_ARGS", "--seed 7")
    command = tiny_vllm.serve_command(Path("python"), tmp_path)
    assert command[-2:] == ["--seed", "7"]
    LocalConfig.from_dict({"command": command, "env": tiny_vllm.ENV, "state_dir": str(tmp_path)})


@pytest.mark.parametrize("text", ["no-such-python", "examples"])
def test_an_interpreter_that_is_none_has_no_vllm(text) -> None:
    assert not tiny_vllm.has_vllm(REPOSITORY / text / "python")
