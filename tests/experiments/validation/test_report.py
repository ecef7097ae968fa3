from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.experiments.validation.compare import RequestTimes, metric_error
from rl_autoscale.experiments.validation.iterations import IterationErrors, iteration_errors
from rl_autoscale.experiments.validation.queues import QueueResult
from rl_autoscale.experiments.validation.report import Findings, all_tables, draw_all, update_page
from rl_autoscale.experiments.validation.run import validate
from rl_autoscale.experiments.validation.vidur_runs import RunErrors
from rl_autoscale.experiments.validation.vllm_runs import RunPrediction
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import load_profile
from rl_autoscale.sim.iteration_table import IterationTable

MEASURED = np.linspace(1.0, 2.0, 50)


def findings(factor: float = 1.09) -> Findings:
    errors = tuple(metric_error(name, factor * MEASURED, MEASURED) for name in ("ttft_s", "tpot_s", "e2e_s"))
    times = RequestTimes(MEASURED, MEASURED, MEASURED)
    return Findings(
        iterations=(
            IterationErrors("good", "kernels", True, "decode", 10, 0.012, 0.034, 0.001),
            IterationErrors("bad", "kernels", True, "mixed", 10, 0.062, 0.3, 0.001),
            IterationErrors("good", "Vidur", False, "decode", 10, 0.1, 0.2, -0.05),
        ),
        vidur=(
            RunErrors("run", "sarathi", 0.5, "rho < 0.7", "Vidur", "Vidur", errors, 0, 0),
            RunErrors("run", "sarathi", 1.5, "overload", "Vidur", "Vidur", errors, 3, 3),
        ),
        vllm=(RunPrediction("gpu", "compiled", "fitted profile", False, errors, 5, times),),
        vllm_measured=(("gpu", times),),
        queues=(QueueResult("M/D/1", 0.2, 0.21, 0.005),),
    )


def cells(name: str, data: Findings) -> list[list[str]]:
    return [[("!" if cell.strong else "") + cell.text for cell in row] for row in all_tables(data)[name].rows]


def test_what_misses_its_target_is_bold() -> None:
    assert [row[-1] for row in cells("iterations", findings())] == ["-", "!6.2 / 30.0"]
    assert [row[4] for row in cells("iterations", findings())] == ["1.2 / 3.4", "-"]
    assert cells("other-software", findings())[0][4] == "-5.0"
    assert [row[4] for row in cells("vidur-regimes", findings())] == ["!+9.0 / +9.0", "+9.0 / +9.0"]
    assert cells("vllm", findings())[0][5:9] == ["!+9.0", "!+9.0", "+9.0", "+9.0"]
    assert cells("vllm", findings(1.2))[0][8] == "!+20.0"
    assert cells("queues", findings())[0][2] == "!0.2100 ± 0.0050"


def test_a_page_keeps_its_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: queues -->\nstale | 1\\d\n<!-- end -->\nafter\n")
    tables = all_tables(findings())
    update_page(page, {"queues": tables["queues"]})
    once = page.read_text()
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "| M/D/1 |" in once
    assert "stale" not in once
    update_page(page, {"queues": tables["queues"]})
    assert page.read_text() == once
    with pytest.raises(SpecError, match="table: iterations"):
        update_page(page, tables)
    with pytest.raises(SpecError, match="no such file"):
        update_page(tmp_path / "none.md", tables)


def test_json_and_figures(tmp_path: Path) -> None:
    data = json.loads(json.dumps(findings().as_data()))
    assert data["vllm"][0]["errors"][0]["quantiles"]["p50"] == pytest.approx(0.09)
    (figure,) = draw_all(findings(), tmp_path / "new")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_iteration_errors_leave_out_what_the_engine_cannot_run() -> None:
    profile = load_profile("llama-3.1-8b_a100_tp1")
    batch, context = np.array([32.0, 32.0, 300.0, 200.0]), np.array([1024.0, 2048.0, 64.0, 16_000.0])
    none = np.zeros(4)
    seconds = np.array(
        [
            profile.iteration_s(num_decode=int(n), decode_context_tokens=n * k)
            for n, k in zip(batch, context, strict=True)
        ]
    )
    table = IterationTable(none, none, none, batch, context, seconds * np.array([1.0, 0.8, 1.0, 1.0]))
    (errors,) = iteration_errors(profile, table, "here", judged=True)
    assert (errors.kind, errors.num_rows) == ("decode", 2)  # 300 sequences and 3.2 million tokens are too many
    assert errors.mean == pytest.approx(0.125)
    assert errors.bias == pytest.approx(0.125)


def test_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such folder"):
        validate(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="unknown part 'vidr'"):
        validate(tmp_path, parts=["vidr"])
    assert validate(tmp_path, parts=["vidur", "vllm"]).as_data() == Findings().as_data()
