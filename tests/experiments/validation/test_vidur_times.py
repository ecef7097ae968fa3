from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from rl_autoscale.experiments.validation.vidur_runs import read_run
from rl_autoscale.experiments.validation.vidur_times import VidurTimes, read_vidur_times
from rl_autoscale.fleet.errors import SpecError


def rest_ms(tokens: int) -> float:
    return 10.0 + 0.01 * tokens


@pytest.fixture
def times(tmp_path: Path) -> Callable[..., VidurTimes]:
    """Predictions that are linear in every size, and operators of the same shape."""
    grid = tmp_path / "grid.csv"
    with grid.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "model",
                "device",
                "tp",
                "prefill_chunk_tokens",
                "prefill_kv_context",
                "decode_batch_size",
                "mean_decode_context",
                "attn_prefill_ms",
                "attn_decode_ms",
                "iter_time_ms",
            ]
        )
        for chunk in (0, 8, 64, 512):
            for context in (0, 64, 1024) if chunk else (0,):
                for batch in (0, 1, 8, 64):
                    for kv in (64, 1024) if batch else (0,):
                        if chunk + batch == 0:
                            continue
                        prefill = chunk * (1 + context / 64) / 100
                        decode = batch * kv / 1000
                        tokens = -(-(chunk + batch) // 8) * 8
                        total = rest_ms(tokens) + prefill + decode
                        rows.writerow(["org/M", "a100", 1, chunk, context, batch, kv, prefill, decode, total])
    operators = tmp_path / "operators.csv"
    lines = ["model,device,tp,num_tokens,emb_ms,mlp_ms"]
    lines += [f"M,a100,1,{tokens},99,{rest_ms(tokens)}" for tokens in range(0, 600, 8)]
    operators.write_text("\n".join(lines))

    def read(device: str = "a100", **options: bool) -> VidurTimes:
        return read_vidur_times(grid, operators, model="org/M", device=device, tensor_parallel=1, **options)

    return read


def test_sizes_are_rounded_up_as_vidur_does(times: Callable[..., VidurTimes]) -> None:
    assert times()([], 5, 5 * 100) == pytest.approx((rest_ms(8) + 5 * 128 / 1000) / 1e3)
    assert times()([(50, 70)], 0, 0.0) == pytest.approx((rest_ms(56) + 50 * (1 + 128 / 64) / 100) / 1e3)


def test_several_chunks_count_as_one_and_cost_a_tenth_more(times: Callable[..., VidurTimes]) -> None:
    """Chunks of 30 and 40 are one of 50."""
    expected_ms = rest_ms(72) + 50 * (1 + 128 / 64) / 100 * 1.1
    assert times()([(30, 64), (40, 60)], 0, 0.0) == pytest.approx(expected_ms / 1e3)
    plain_ms = rest_ms(72) + 50 * (1 + 128 / 64) / 100
    assert times(grouped_query=False)([(30, 64), (40, 60)], 0, 0.0) == pytest.approx(plain_ms / 1e3)


def test_says_what_is_missing(times: Callable[..., VidurTimes], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no rows of org/M on h100 with tp=1"):
        times("h100")
    with pytest.raises(SpecError, match="expected <"):
        read_run(tmp_path / "gpt2_sarathi.csv")
