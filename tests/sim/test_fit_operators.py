"""Iterations composed of measured operators: what is counted how often, and what a grid with holes becomes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.sim.fit_operators import OperatorTimes, read_operators
from rl_autoscale.sim.fit_sources import GpuSystem

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the parquet extra")
pyarrow = pytest.importorskip("pyarrow")

LAYERS = 4
SYSTEM = GpuSystem("TOY", "", 512, 64)
Rows = dict[tuple[int, int, int, int], float]


def attention_us(chunk: int, context: int, batch: int, kv: int) -> float:
    """Linear in each size, so that interpolation is exact; beside a chunk, decode costs three times as much."""
    return chunk * (1 + context) / 10 + batch * kv / 100 * (3 if chunk else 1)


def full_grid() -> Rows:
    chunks, contexts, batches, kvs = (0, 16, 64), (0, 32, 64), (0, 1, 8), (16, 256)
    return {
        (chunk, context if chunk else 0, batch, kv if batch else 0): attention_us(chunk, context, batch, kv)
        for chunk, context, batch, kv in itertools.product(chunks, contexts, batches, kvs)
        if chunk + batch > 0
    }


def write(folder: Path, rows: Rows, dense: dict[str, list[int]] | None = None) -> Path:
    stem = folder / "toy_tp1"
    sizes = dense or {name: [1, 101] for name in ("qkv_proj", "layernorm", "embedding", "final_layernorm")}
    table = [(name, tokens, float(10 + tokens)) for name, found in sizes.items() for tokens in found]
    save(stem, "dense", ("layer", "tokens", "time_us"), table)
    save(stem, "per_sequence", ("layer", "sequences", "time_us"), [("lm_head", n, 5.0 * n) for n in (1, 65)])
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    save(stem, "attention", columns, [(*sizes, us) for sizes, us in rows.items()])
    return stem


def save(stem: Path, name: str, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    table = pyarrow.table({column: [row[k] for row in rows] for k, column in enumerate(columns)})
    parquet.write_table(table, stem.with_name(f"{stem.name}_{name}.parquet"))


def read(stem: Path) -> OperatorTimes:
    return read_operators(stem, SYSTEM, num_layers=LAYERS, kv_tokens=2048)


def shared_us(tokens: int, sequences: int) -> float:
    """One linear operator and two norms in each layer, embedding and last norm once, the head per sequence."""
    return (LAYERS + 2 * LAYERS + 2) * (10 + tokens) + 5 * sequences


def test_an_iteration_is_its_operators(tmp_path: Path) -> None:
    times = read(write(tmp_path, full_grid()))
    assert times.iteration_s(0, 0, 0, 4, 100) == pytest.approx((shared_us(4, 4) + LAYERS * 4.0) * 1e-6)
    prefill = shared_us(40, 1) + LAYERS * attention_us(40, 48, 0, 0)
    assert times.iteration_s(1, 40, 48, 0, 0) == pytest.approx(prefill * 1e-6)


def test_attention_beside_a_chunk_is_looked_up_whole(tmp_path: Path) -> None:
    times = read(write(tmp_path, full_grid()))
    both = shared_us(44, 5) + LAYERS * attention_us(40, 48, 4, 100)
    assert times.iteration_s(1, 40, 48, 4, 100) == pytest.approx(both * 1e-6)
    # Only one chunk was measured beside decode: the heaviest stands beside it, the other is added.
    three = shared_us(20 + 40 + 4, 6) + LAYERS * (attention_us(40, 48, 4, 100) + attention_us(20, 0, 0, 0))
    assert times.batch_s([(20, 0), (40, 48)], 4, 100.0) == pytest.approx(three * 1e-6)


def test_a_batch_below_the_first_size_pays_for_the_first(tmp_path: Path) -> None:
    times = read(write(tmp_path, full_grid()))
    assert times.iteration_s(1, 2, 0, 0, 0) == pytest.approx((shared_us(2, 1) + LAYERS * 1.6) * 1e-6)


def test_overlapping_grids_shrink_to_a_full_one(tmp_path: Path) -> None:
    rows = full_grid()
    rows[24, 32, 1, 16] = 1e9  # a size that was measured beside one other only
    times = read(write(tmp_path, rows))
    assert times.mixed.grid[0].tolist() == [16.0, 64.0]
    assert times.iteration_s(1, 24, 32, 1, 16) == pytest.approx(
        (shared_us(25, 2) + LAYERS * attention_us(24, 32, 1, 16)) * 1e-6
    )


def test_the_measured_rows_become_a_table_of_what_fits(tmp_path: Path) -> None:
    times = read(write(tmp_path, full_grid()))
    table = times.measured_table(max_tokens=70)
    assert len(table) < len(full_grid())
    assert table.new_tokens.max() <= 70
    assert table.kv_tokens.max() <= 2048
    row = int((table.region("decode") & (table.num_decode == 8) & (table.decode_context_tokens == 16)).argmax())
    assert table.iteration_s[row] == pytest.approx((shared_us(8, 8) + LAYERS * 1.28) * 1e-6)


def test_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="operator embedding lacks some of the 2 values of tokens"):
        read(write(tmp_path, full_grid(), {"qkv_proj": [1, 101], "embedding": [1]}))
    lonely = {sizes: us for sizes, us in full_grid().items() if sizes[0] == 0 or sizes[2] == 0} | {(16, 0, 1, 16): 1.0}
    with pytest.raises(SpecError, match="not measured on a grid"):
        read(write(tmp_path, lonely))
    with pytest.raises(SpecError, match="no such file"):
        read(tmp_path / "other_tp1")
