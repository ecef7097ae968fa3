"""The placement search: what it tries, that a whole is simulated, and DistServe's comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.cli import root
from rl_autoscale.experiments import distserve, placement
from rl_autoscale.experiments.distserve import HUMANEVAL, LONGBENCH, SHAREGPT, Application
from rl_autoscale.experiments.placement import Placement, Search, Settings, Traffic
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import ServiceClass
from rl_autoscale.workload.lengths import LengthModel, sample_lengths
from rl_autoscale.workload.trace import Workload

TINY = Settings(num_requests=80, span_s=10.0, seeds=1, tolerance=0.3)
H100, H200 = "llama-3.1-70b_h100_tp4", "llama-3.1-70b_h200_tp2"


def traffic(ttft_slo_s: float = 1.0, tpot_slo_s: float = 0.05) -> Traffic:
    rng = np.random.default_rng(5)
    arrival_s = np.cumsum(rng.exponential(1.0, TINY.num_requests))
    prompt, output = (rng.integers(low, high, TINY.num_requests) for low, high in ((200, 1800), (20, 300)))
    which = np.zeros(TINY.num_requests, dtype=np.int16)
    sample = Workload(arrival_s, prompt, output, which, ("chat",), float(arrival_s[-1]))
    promise = {"name": "chat", "ttft_slo_s": ttft_slo_s, "tpot_slo_s": tpot_slo_s}
    return Traffic((sample,), (ServiceClass.from_dict(promise),))


def known_search(monkeypatch: pytest.MonkeyPatch, goodputs: dict[str, float], gpus: int) -> list[placement.Tried]:
    """A search in which instances are as good as told, and a whole as what its instances promise."""
    monkeypatch.setattr(placement, "goodput", lambda *_: 1.0)
    return Search((H100, H200), gpus, traffic(), settings=TINY, known=dict(goodputs)).run()


def test_gpus_are_split_as_the_instances_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    each = {"TP4 prefill instance": 12.0, "TP2 prefill instance": 5.0}
    each |= {"TP4 decode instance": 4.0, "TP2 decode instance": 1.0}
    tried = known_search(monkeypatch, each, 16)
    names = [item.placement.name for item in tried]
    assert "1 × TP4 prefill, 3 × TP4 decode" in names  # 12 per second on either side
    assert "2 × TP4 prefill, 2 × TP4 decode" in names  # a neighbour
    assert "3 × TP4 prefill, 1 × TP4 decode" not in names
    assert max(item.placement.num_gpus for item in tried) == 16
    expected = {item.placement.name: item.expected_per_s for item in tried}
    assert expected["1 × TP4 prefill, 3 × TP4 decode"] == 12.0
    assert expected["2 × TP4 prefill, 2 × TP4 decode"] == 8.0


def test_a_whole_is_a_fleet_with_as_many_gpus() -> None:
    apart = Placement(H200, 3, H100, 1)
    fleet = apart.fleet(traffic().classes, 1e9)
    assert apart.num_gpus == fleet.gpus_per_replica @ fleet.min_replicas == 10
    assert [pool.role for pool in fleet.pools] == ["prefill", "decode"]
    assert fleet.kv_transfer is not None
    assert fleet.kv_transfer.link_bytes_per_s == 1e9
    together = Placement(H200, 2, scheduler="vllm-v0").fleet(traffic().classes, 1e9)
    assert (together.pools[0].scheduler, together.pools[0].token_budget) == ("vllm-v0", 8192)


def test_each_instance_answers_for_its_own_promise() -> None:
    """A pace that nobody keeps stops decode, not prefill; a first token that nobody brings, the other way round."""
    no_pace = Search((H200,), 4, traffic(tpot_slo_s=1e-4), settings=TINY)
    assert no_pace.decode_goodput(H200) == 0.0 < no_pace.prefill_goodput(H200)
    no_start = Search((H200,), 4, traffic(ttft_slo_s=1e-4), settings=TINY)
    assert no_start.prefill_goodput(H200) == 0.0 < no_start.decode_goodput(H200)


def test_a_slow_link_costs_goodput() -> None:
    fast, slow = (Search((H200,), 4, traffic(), link_bytes_per_s=link, settings=TINY).run() for link in (300e9, 0.1e9))
    of = [{item.placement.name: item.goodput_per_s for item in tried} for tried in (fast, slow)]
    assert of[1]["1 × TP2 prefill, 1 × TP2 decode"] < 0.7 * of[0]["1 × TP2 prefill, 1 × TP2 decode"]
    assert of[1]["2 × TP2 vllm"] == of[0]["2 × TP2 vllm"]


def test_overload_has_time_to_show() -> None:
    """Eighty requests at once would all begin within a minute; what comes for twenty minutes does not."""
    patient = Search((H200,), 2, traffic(ttft_slo_s=60.0, tpot_slo_s=0.5), settings=TINY)
    assert 1.0 < patient.prefill_goodput(H200) < 12.0


def test_profiles_must_differ_and_fit() -> None:
    with pytest.raises(SpecError, match="one per degree"):
        Search((H200, H200), 8, traffic(), settings=TINY)
    with pytest.raises(SpecError, match="raise --gpus"):
        Search((H100,), 2, traffic(), settings=TINY)


def test_the_command_finds_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placement, "QUICK", TINY)
    line = ["place", "--profile", H200, "--scenario", "tool-calls", "--gpus", "4", "--quick", "--out", str(tmp_path)]
    for more in (["--json"], []):
        with pytest.raises(SystemExit) as leaving:
            root.main([*line, *more])
        assert leaving.value.code in (0, None)
        monkeypatch.setattr(placement, "goodput", lambda *_: pytest.fail("what is known was looked for again"))
    shown, _, table = capsys.readouterr().out.partition("\n]\n")
    tried = json.loads(shown + "]")
    assert [item["per_gpu_s"] for item in tried] == sorted((item["per_gpu_s"] for item in tried), reverse=True)
    assert "1 × TP2 prefill" in table
    with pytest.raises(SystemExit) as leaving:
        root.main([*line, "--tpot", "0.2"])
    assert leaving.value.code == root.EXIT_MISTAKE


@pytest.mark.parametrize(
    ("model", "prompt", "output"), [(SHAREGPT, 755.5, 200.3), (HUMANEVAL, 171.3, 98.2), (LONGBENCH, 1738.3, 90.7)]
)
def test_lengths_have_the_published_means(model: LengthModel, prompt: float, output: float) -> None:
    drawn = sample_lengths(np.random.default_rng(1), model, 100_000)
    assert [tokens.mean() for tokens in drawn] == pytest.approx([prompt, output], rel=0.01)


def test_distserve_is_compared(tmp_path: Path) -> None:
    small = Application("chatbot, OPT-13B", "opt-13b", (1,), 2, SHAREGPT, 0.5, 0.1, 1, "× 2")
    found = distserve.compare(tmp_path, settings=TINY, progress=lambda what, done, total: None, applications=(small,))
    table = distserve.placements_table(found)
    assert len(table.rows) == 1
    assert "prefill" in table.rows[0][4].text
    assert {item.placement.name for item in found[small.name]} == {
        "2 × TP1 vllm-v0", "2 × TP1 vllm", "1 × TP1 prefill, 1 × TP1 decode",
    }  # fmt: skip
