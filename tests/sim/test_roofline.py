"""The analytic profile against formulas worked out by hand, its own exact form, and measured profiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import load_profile
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.profile_error import profile_error
from rl_autoscale.sim.profile_file import write_profile
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.sim.roofline import GPUS, MODELS, Roofline
from rl_autoscale.workload.trace import Workload

LLAMA, A100 = MODELS["llama-3.1-8b"], GPUS["A100"]
IDEAL = {"compute_efficiency": 1.0, "memory_efficiency": 1.0}
MEASURED = [f"llama-3.1-8b_{gpu}_tp1" for gpu in ("a100", "h100", "h200", "l40s")]
MEASURED += [f"llama-3.1-70b_{gpu}" for gpu in ("a100_tp4", "h100_tp4", "h200_tp2")] + ["qwen3-32b_h100_tp2"]


def test_shapes_have_the_published_sizes():
    parameters = {"llama-3.1-8b": 8.03e9, "llama-3.1-70b": 70.6e9, "qwen3-32b": 32.8e9, "mistral-7b": 7.24e9}
    for name, number in parameters.items():
        assert MODELS[name].weights_bytes() / 2 == pytest.approx(number, rel=0.002)
    assert LLAMA.kv_bytes_per_token == 131_072


def test_one_token_reads_the_weights_and_many_compute():
    ideal = Roofline(LLAMA, A100, **IDEAL)
    read_bytes = LLAMA.weights_bytes() - 2 * LLAMA.vocabulary * LLAMA.hidden  # one row of the embedding, not all of it
    assert ideal.linear_s(1) == pytest.approx(read_bytes / 2.039e12, rel=0.001)
    flops_per_token = 2 * (read_bytes / 2 - LLAMA.vocabulary * LLAMA.hidden)
    slope = (ideal.linear_s(20_000) - ideal.linear_s(10_000)) / 10_000
    assert flops_per_token / 312e12 < slope < 1.15 * flops_per_token / 312e12  # the rest is elementwise
    two = Roofline(LLAMA, A100, 2, **IDEAL)
    assert ideal.linear_s(1) / 2 < two.linear_s(1) < 0.51 * ideal.linear_s(1)


@given(
    contexts=st.lists(st.integers(1, 8000), max_size=40),
    chunk=st.tuples(st.integers(100, 2000), st.integers(0, 8000)),
    prefix=st.sampled_from([0, 500, 3000]),
    relay=st.booleans(),
    attention=st.sampled_from(["flash", "standard"]),
)
def test_the_profile_is_the_roofline_or_a_stated_bit_slower(contexts, chunk, prefix, relay, attention):
    roofline = Roofline(LLAMA, A100, attention=attention, shared_prefix_tokens=prefix, relay=relay and prefix > 0)
    profile = roofline.profile(name="x", max_num_batched_tokens=4096)
    decode = {"num_decode": len(contexts), "decode_context_tokens": float(sum(contexts))}
    if contexts:
        exact = roofline.iteration_s(tuple(contexts))
        within = 1e-4 if roofline.relay or not prefix else 0.03  # products beside reads
        assert exact * (1 - 1e-4) <= profile.iteration_s(**decode) <= exact * (1 + within)
    exact = roofline.iteration_s(tuple(contexts), (chunk,))
    share = roofline.kv_read_s / (roofline.pair_s * chunk[0])
    beside_s = 0.0 if roofline.relay else prefix * len(contexts) * roofline.kv_read_s  # reads beside a chunk's products
    assert exact * (1 - 1e-4) <= profile.iteration_s(**decode, chunks=(chunk,)) <= exact * (1 + share + 0.03) + beside_s


def test_quantised_weights_are_read_faster_computed_as_before_and_leave_room():
    ideal, quantised = (Roofline(LLAMA, A100, weight_bits=bits, **IDEAL) for bits in (16, 4))
    of_layers = LLAMA.layers * sum(rows * columns for rows, columns in LLAMA.matrices)
    assert ideal.linear_s(1) - quantised.linear_s(1) == pytest.approx(1.5 * of_layers / 2.039e12, rel=1e-3)
    assert quantised.linear_s(8192) == pytest.approx(ideal.linear_s(8192))
    blocks = [roofline.profile(name="x").kv_blocks for roofline in (ideal, quantised)]
    assert blocks[1] - blocks[0] == pytest.approx(1.5 * of_layers / (16 * LLAMA.kv_bytes_per_token), abs=1)
    for contexts in ((1000,), tuple([500] * 40)):  # the profile's knots follow the ridge
        sums = {"num_decode": len(contexts), "decode_context_tokens": float(sum(contexts))}
        assert quantised.profile(name="x").iteration_s(**sums) == pytest.approx(
            quantised.iteration_s(contexts), rel=1e-4
        )
    assert "Weights of 4 bits" in quantised.profile(name="x").notes
    with pytest.raises(SpecError, match="weight_bits=5 is not allowed"):
        Roofline(LLAMA, A100, weight_bits=5)


def test_standard_attention_pays_for_its_scores_in_time_and_memory():
    flash, standard = (Roofline(LLAMA, A100, attention=kind, **IDEAL) for kind in ("flash", "standard"))
    of_head = standard.pair_s / (32 * 32)
    assert of_head == pytest.approx(2 * max(2 * 128 / 312e12, 2 / 2.039e12) + 4 / 2.039e12)
    assert flash.pair_s / (32 * 32) == pytest.approx(4 * 128 / 312e12)
    chunk = ((2048, 6144),)
    assert standard.iteration_s((), chunk) > 1.2 * flash.iteration_s((), chunk)
    assert standard.iteration_s((4096,) * 64) > 1.01 * flash.iteration_s((4096,) * 64)
    scores_bytes = 2 * 2 * 32 * 2048 * 8192
    lost = flash.profile(name="x").kv_blocks - standard.profile(name="x").kv_blocks
    assert lost == pytest.approx(scores_bytes / 131_072 / 16, abs=1)


def test_chunked_prefill_reads_weights_and_context_again():
    profile = Roofline(LLAMA, A100).profile(name="x", max_num_batched_tokens=512)
    assert profile.max_num_batched_tokens == 512
    wide = Roofline(LLAMA, A100).profile(name="x", max_num_batched_tokens=8192)
    whole = wide.iteration_s(chunks=((8192, 0),))
    done = np.arange(0, 8192, 512)
    chunked = sum(wide.iteration_s(chunks=((512, int(k)),)) for k in done)
    # pairs are the same work; what comes on top is reading context, and the output layer 16 times instead of once
    extra = done.sum() * wide.prefill_context_s + 15 * 2 * LLAMA.vocabulary * LLAMA.hidden / (0.7 * 2.039e12)
    assert chunked - whole == pytest.approx(extra, rel=0.01)
    tiny = sum(wide.iteration_s(chunks=((32, k),)) for k in range(0, 8192, 32))
    assert tiny > 3 * whole  # below the ridge every chunk pays for all weights


def test_relay_attention_reads_a_shared_prefix_once():
    prefix, batch = 2000, 64
    options = {"shared_prefix_tokens": prefix, **IDEAL}
    own, relay = Roofline(LLAMA, A100, **options), Roofline(LLAMA, A100, relay=True, **options)
    plain = Roofline(LLAMA, A100, **IDEAL)
    read_s = prefix * 131_072 / 2.039e12
    products_s = prefix * batch * 4 * 32 * 32 * 128 / 312e12
    saved = own.iteration_s((500,) * batch) - relay.iteration_s((500,) * batch)
    assert products_s > read_s  # of 64 queries together: computation now
    assert saved == pytest.approx(batch * read_s - products_s)
    assert own.iteration_s((500,) * batch) == pytest.approx(plain.iteration_s((500 + prefix,) * batch))
    blocks = [roofline.profile(name="x").kv_blocks for roofline in (plain, own, relay)]
    assert blocks == [blocks[0], blocks[0] - 125, blocks[0] - 125]  # kept once, whoever reads it
    times = [
        roofline.profile(name="x").iteration_s(num_decode=batch, decode_context_tokens=batch * 500.0)
        for roofline in (own, relay)
    ]
    assert times[0] > 1.5 * times[1]


def test_a_window_bounds_attention_and_memory_and_no_profile_holds_it():
    whole, windowed = Roofline(LLAMA, A100), Roofline(LLAMA, A100, window_tokens=1028)
    assert windowed.iteration_s((1000,) * 8) == whole.iteration_s((1000,) * 8)
    assert windowed.iteration_s((60_000,) * 8) == windowed.iteration_s((1028,) * 8) == whole.iteration_s((1028,) * 8)
    assert (windowed.kept_tokens(60_000), whole.kept_tokens(60_000)) == (1028, 60_000)
    late, early = (windowed.iteration_s((), ((512, done),)) for done in (30_000, 2000))
    assert late == early < whole.iteration_s((), ((512, 30_000),))
    one_by_one = sum(min(k + 0.5, 1028) for k in range(900, 1412))  # a chunk that grows into the window
    inside = windowed.iteration_s((), ((512, 900),)) - windowed.linear_s(512)
    assert inside == pytest.approx(one_by_one * windowed.pair_s, rel=1e-3)
    with pytest.raises(SpecError, match="cannot hold a window"):
        windowed.profile(name="x")


@pytest.mark.parametrize("name", MEASURED)
def test_error_against_measured_profiles(name):
    """One pair of efficiencies for four GPUs and three models; docs/profiles.md tells these figures."""
    measured = load_profile(name)
    model, gpu, _ = name.split("_")
    roofline = Roofline(MODELS[model], GPUS[gpu.upper()], measured.gpus_per_replica)
    profile = roofline.profile(name="x")
    assert profile.kv_blocks == pytest.approx(measured.kv_blocks, rel=0.03)
    for error in profile_error(profile, measured, num_rows=600).values():
        assert error.mean < 0.17
        assert error.p99 < 0.5
        assert -0.17 < error.bias < 0.09
    ideal = Roofline(MODELS[model], GPUS[gpu.upper()], measured.gpus_per_replica, **IDEAL).profile(name="x")
    for error in profile_error(ideal, measured, num_rows=600).values():
        assert -0.45 < error.bias < -0.2  # no kernel reaches the data sheet


def test_both_simulators_take_it(tmp_path: Path):
    path = tmp_path / "roofline.yaml"
    roofline = Roofline(LLAMA, A100, attention="standard", shared_prefix_tokens=1000, relay=True)
    write_profile(roofline.profile(name="x", max_num_batched_tokens=512), path)
    spec = FleetSpec.from_dict(
        {
            "pools": [{"name": "a", "profile": str(path), "max_replicas": 2, "initial_replicas": 2}],
            "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
        }
    )
    rng = np.random.default_rng(0)
    lengths = (rng.integers(1, 3000, 60).astype(np.int32), rng.integers(1, 200, 60).astype(np.int32))
    workload = Workload(np.sort(rng.uniform(0, 10, 60)), *lengths, np.zeros(60, dtype=np.int16), ("chat",), 10.0)
    summaries = []
    for simulator in (SimFleet, ReferenceFleet):
        fleet = simulator(spec, workload)
        while fleet.advance():
            pass
        summaries.append(fleet.result().summary())
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 3}, "must divide the 8 KV heads"),
        ({"compute_efficiency": 1.2}, "above 0 and at most 1"),
        ({"relay": True}, "above 0 for relay"),
        ({"window_tokens": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        Roofline(LLAMA, A100, **options)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(SpecError, match="no memory is left"):
        Roofline(MODELS["llama-3.1-70b"], A100).profile(name="x")
