"""AIConfigurator as a source: how an iteration is composed, and that the shipped profiles are what the command makes.

Needs the `profiles` extra; skipped without it.
"""

from __future__ import annotations

import warnings
from importlib import metadata

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.fleet.profile import LatencyProfile, load_profile, shipped_profile_names
from rl_autoscale.sim.fit_sources import SYSTEMS, AicModel, fit_from_aic, sample_iterations

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies deprecate is not this package's business
    pytest.importorskip("aiconfigurator_core", reason="needs the profiles extra")

LLAMA_8B = "meta-llama/Meta-Llama-3.1-8B"


@pytest.fixture(scope="module")
def h100() -> AicModel:
    return AicModel(LLAMA_8B, "h100_sxm", 1)


def test_a_mixed_iteration_is_the_sum_of_its_parts(h100: AicModel) -> None:
    prefill = h100.iteration_s(1, 512, 0, 0, 0)
    decode = h100.iteration_s(0, 0, 0, 32, 1024)
    mixed = h100.iteration_s(1, 512, 0, 32, 1024)
    assert max(prefill, decode) < mixed < prefill + decode  # weights are read once, not twice


def test_pure_iterations_are_the_engines_own(h100: AicModel) -> None:
    engine = h100._engine
    assert h100.iteration_s(0, 0, 0, 32, 1024) == pytest.approx(engine.decode_step_latency(32, 1024, 2) / 1e3)
    for chunks, tokens, context in ((1, 2048, 0), (1, 512, 4096)):
        whole = engine.predict_prefill_latency(chunks, context + tokens, context) / 1e3
        assert h100.iteration_s(chunks, tokens, context, 0, 0) == pytest.approx(whole, rel=1e-6)


def test_context_costs_a_chunk_the_work_it_is(h100: AicModel) -> None:
    """4096 tokens after 8192 attend to 5 times the pairs of 4096 alone; the engine's own mixed step says 1.3 times."""
    without = h100._prefill_attention_ms(1, 4096, 0)
    assert h100._prefill_attention_ms(1, 4096, 8192) / without == pytest.approx(5.0, rel=0.25)
    assert h100._engine.mixed_step_breakdown(4096, 1, 12_288, 2, 8192)[2] / without < 1.5


def test_kv_capacity_agrees_with_aiconfigurator(h100: AicModel) -> None:
    from aiconfigurator_core.sdk import estimate_num_gpu_blocks

    theirs = estimate_num_gpu_blocks(
        LLAMA_8B,
        "h100_sxm",
        "vllm",
        SYSTEMS["h100_sxm"].kernel_version,
        scheduler_block_size=16,
        max_num_tokens=8192,
        max_batch_size=1024,
        memory_fraction_kind="of_total",
        memory_fraction_value=0.92,
    )
    assert h100.kv_capacity.num_blocks == theirs
    assert (
        h100.kv_capacity.bytes_per_token == 2 * 32 * 8 * 128 * 2
    )  # keys and values, layers, KV heads, head size, bf16


def test_samples_fit_the_engine_and_its_cache(h100: AicModel) -> None:
    table = sample_iterations(h100, np.random.default_rng(0), 600)
    assert [int(table.region(kind).sum()) for kind in ("prefill", "decode", "mixed")] == [200, 200, 200]
    assert table.kv_tokens.max() <= h100.kv_capacity.num_blocks * 16
    assert table.new_tokens.max() == h100.system.max_num_batched_tokens
    assert table.num_decode.max() <= h100.system.max_num_seqs
    again = sample_iterations(h100, np.random.default_rng(0), 600)
    np.testing.assert_array_equal(again.iteration_s, table.iteration_s)


@pytest.mark.parametrize(
    ("model", "system", "tensor_parallel", "error", "message"),
    [
        (LLAMA_8B, "h100", 1, UnknownNameError, r"unknown system 'h100'; did you mean 'h100_sxm'\?"),
        (
            LLAMA_8B,
            "h100_sxm",
            3,
            SpecError,
            "AIConfigurator cannot build .* with tp=3: num_heads 32 should be divisible",
        ),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(
    model: str, system: str, tensor_parallel: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AicModel(model, system, tensor_parallel)


def test_a_model_too_large_for_its_gpus_says_so() -> None:
    with pytest.raises(SpecError, match=r"no KV budget.*raise --tp"):
        _ = AicModel("meta-llama/Meta-Llama-3.1-70B", "l40s", 1).kv_capacity


def remade(shipped: LatencyProfile) -> LatencyProfile:
    """The shipped profile made again by the code behind the command in docs/profiles.md."""
    version = metadata.version("aiconfigurator-core")
    if f"aiconfigurator-core {version}," not in shipped.source:
        pytest.skip(f"aiconfigurator-core {version} is not what made it: {shipped.source}")
    system = next(name for name, item in SYSTEMS.items() if item.gpu == shipped.gpu)
    return fit_from_aic(shipped.model, system, shipped.gpus_per_replica, name=shipped.name)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "llama-3.1-8b_a100_tp1" else pytest.param(name, marks=pytest.mark.slow)
        for name in shipped_profile_names()
    ],
)
def test_shipped_profiles_are_what_the_command_makes(name: str) -> None:
    shipped = load_profile(name)
    again = remade(shipped)
    assert again.fit_error == pytest.approx(shipped.fit_error, abs=2e-4)
    assert again.token_knots == shipped.token_knots
    assert again.token_knot_s == pytest.approx(shipped.token_knot_s, rel=1e-4)
    np.testing.assert_allclose(again.attention_coefficients_s, shipped.attention_coefficients_s, rtol=1e-3)
    assert again.notes == shipped.notes
    assert again.kv_blocks == shipped.kv_blocks
