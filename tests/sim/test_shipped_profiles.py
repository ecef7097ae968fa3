"""Every shipped profile against physics, and its stated error against data that its fit never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.experiments.validation.iterations import against_aic_grid
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS, load_profile, shipped_profile_names
from rl_autoscale.sim.iteration_table import REGIONS

REQUIRED_PROFILES = (
    "llama-3.1-70b_a100_tp4",
    "llama-3.1-70b_h100_tp4",
    "llama-3.1-70b_h200_tp2",
    "llama-3.1-8b_a100_tp1",
    "llama-3.1-8b_h100_tp1",
    "llama-3.1-8b_h200_tp1",
    "llama-3.1-8b_l40s_tp1",
    "qwen3-30b-a3b_h100_tp1",
    "qwen3-32b_h100_tp2",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """Data-sheet figures: memory, HBM bytes per second, dense bf16 FLOP/s."""

    memory_bytes: float
    bytes_per_s: float
    flops: float


@dataclass(frozen=True, slots=True)
class Model:
    """Model-card figures; ``active`` is what one token touches, input embedding left out."""

    params: float
    active_params: float
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 128

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.layers * self.kv_heads * self.head_size * 2

    @property
    def flops_per_pair(self) -> float:
        return 4 * self.layers * self.heads * self.head_size


GPUS = {
    "A100": Gpu(80 * 2**30, 2.039e12, 312e12),
    "H100": Gpu(80 * 2**30, 3.35e12, 989e12),
    "H200": Gpu(141 * 2**30, 4.8e12, 989e12),
    "L40S": Gpu(46_068 * 2**20, 0.864e12, 362e12),
}
MODELS = {
    "meta-llama/Meta-Llama-3.1-8B": Model(8.03e9, 7.50e9, 32, 32, 8),
    "meta-llama/Meta-Llama-3.1-70B": Model(70.55e9, 69.5e9, 80, 64, 8),
    "Qwen/Qwen3-32B": Model(32.76e9, 31.2e9, 64, 64, 8),
    "Qwen/Qwen3-30B-A3B": Model(30.53e9, 3.0e9, 48, 32, 4),
}


def test_the_promised_profiles_ship() -> None:
    assert set(REQUIRED_PROFILES) <= set(shipped_profile_names())


@pytest.mark.parametrize("name", shipped_profile_names())
class TestPhysics:
    """No profile may be faster than its GPUs' data sheet."""

    def test_decode_is_no_faster_than_reading_weights_and_cache(self, name: str) -> None:
        profile = load_profile(name)
        gpu, model, tp = GPUS[profile.gpu], MODELS[profile.model], profile.gpus_per_replica
        for batch, context in ((1, 128), (1, 8192), (32, 1024), (128, 512)):
            read = 2 * model.active_params + batch * context * model.kv_bytes_per_token
            seconds = profile.iteration_s(num_decode=batch, decode_context_tokens=batch * context)
            assert seconds >= read / tp / gpu.bytes_per_s
            assert batch > 1 or model.active_params < model.params / 2 or seconds < 2.5 * read / tp / gpu.bytes_per_s
        assert profile.decode_context_s >= model.kv_bytes_per_token / tp / gpu.bytes_per_s

    def test_prefill_is_no_faster_than_the_tensor_cores(self, name: str) -> None:
        profile = load_profile(name)
        gpu, model, tp = GPUS[profile.gpu], MODELS[profile.model], profile.gpus_per_replica
        fastest = 2 * model.active_params / tp / gpu.flops
        assert fastest <= profile.prefill_s_per_token() <= 3.5 * fastest
        assert profile.prefill_pair_s >= model.flops_per_pair / tp / gpu.flops

    def test_more_work_never_takes_less_time(self, name: str) -> None:
        profile = load_profile(name)
        tokens = np.arange(1, profile.max_num_batched_tokens + 1, dtype=np.float64)
        assert np.all(np.diff(profile.token_time_s(tokens)) >= 0)
        assert np.all(profile.attention_coefficients_s >= 0)
        assert profile.token_knots[-1] == profile.max_num_batched_tokens
        decode = [profile.iteration_s(num_decode=n, decode_context_tokens=1024.0 * n) for n in (1, 2, 8, 64, 256)]
        assert np.all(np.diff(decode) > 0)
        per_token = [profile.decode_s_per_token(n, 1024.0) for n in (1, 2, 8, 64, 256)]
        assert np.all(np.diff(per_token) < 0)  # batching pays

    def test_kv_blocks_leave_room_for_weights_and_a_few_gigabytes(self, name: str) -> None:
        profile = load_profile(name)
        gpu, model, tp = GPUS[profile.gpu], MODELS[profile.model], profile.gpus_per_replica
        cache = profile.kv_blocks * BLOCK_SIZE_TOKENS * model.kv_bytes_per_token / tp
        reserve = 0.92 * gpu.memory_bytes - 2 * model.params / tp - cache
        assert 3.5e9 < reserve < 6e9  # CUDA context and graphs, activations, communication buffers

    def test_limits_are_vllms_and_errors_are_stated(self, name: str) -> None:
        profile = load_profile(name)
        large = GPUS[profile.gpu].memory_bytes >= 70 * 2**30 and profile.gpu != "A100"
        assert (profile.max_num_batched_tokens, profile.max_num_seqs) == ((8192, 1024) if large else (2048, 256))
        assert set(profile.fit_error) == {f"{kind}_{figure}" for kind in REGIONS for figure in ("mean", "p99")}
        assert all(profile.fit_error[f"{kind}_mean"] <= 0.05 for kind in REGIONS)
        assert profile.name == name
        assert "Apache-2.0" in profile.source


def test_the_documented_table_is_that_of_the_profiles(repository: Path) -> None:
    page = (repository / "docs" / "profiles.md").read_text(encoding="utf-8")
    table = page.split("## What ships")[1].split("\n## ")[0]
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `") and "_tp" in line}
    assert sorted(rows) == shipped_profile_names()
    for name, row in rows.items():
        profile = load_profile(name)
        decode_ms = profile.iteration_s(num_decode=32, decode_context_tokens=32 * 1024) * 1e3
        errors = [
            f"{profile.fit_error[f'{kind}_mean'] * 100:.1f} / {profile.fit_error[f'{kind}_p99'] * 100:.1f}"
            for kind in REGIONS
        ]
        figures = [f"{profile.kv_blocks:,}", f"{decode_ms:.1f}", f"{1 / profile.prefill_s_per_token():,.0f}", *errors]
        assert row.split(" | ")[1:] == [*figures[:-1], f"{figures[-1]} |"]


ON_THE_GRID = (
    "llama-3.1-8b_a100_tp1",
    "llama-3.1-8b_h100_tp1",
    "llama-3.1-8b_h200_tp1",
    "llama-3.1-70b_a100_tp4",
    "llama-3.1-70b_h100_tp4",
    "llama-3.1-70b_h200_tp2",
)


@pytest.mark.parametrize("name", ON_THE_GRID)
def test_stated_errors_hold_on_an_independent_grid(name: str, real_profiles: Path) -> None:
    profile = load_profile(name)
    errors = {item.kind: item for item in against_aic_grid(profile, real_profiles)}
    assert sum(item.num_rows for item in errors.values()) > 5000
    for kind in REGIONS:
        # The grid weighs sizes differently from the log-uniform sample, so the figures are close and not equal.
        assert errors[kind].mean == pytest.approx(profile.fit_error[f"{kind}_mean"], abs=0.007)
        assert errors[kind].p99 <= profile.fit_error[f"{kind}_p99"] + 0.025
