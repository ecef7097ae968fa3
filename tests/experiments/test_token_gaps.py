"""Sarathi-Serve's capacity experiment: its data sets, its bounds and its command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.cli import root
from rl_autoscale.experiments import token_gaps
from rl_autoscale.experiments.capacity import Settings
from rl_autoscale.experiments.token_gaps import DATA_SETS, ENGINES, Replica, draw
from rl_autoscale.fleet.errors import SpecError

TINY = Settings(num_requests=60, seeds=1, tolerance=0.3)
PUBLISHED = {
    "openchat_sharegpt4": ((1730, 5696, 2088), (415, 834, None)),
    "arxiv_summarization": ((7059, 12985, 3638), (208, 371, 265)),
}


@pytest.mark.parametrize("data", DATA_SETS, ids=lambda data: data.name)
def test_lengths_are_as_published(data: token_gaps.DataSet) -> None:
    sample = draw(data, 50_000, seed=0)
    for tokens, (median, p90, deviation) in zip(
        (sample.prompt_tokens, sample.output_tokens), PUBLISHED[data.name], strict=True
    ):
        assert np.median(tokens) == pytest.approx(median, rel=0.02)
        assert np.quantile(tokens, 0.9) == pytest.approx(p90, rel=0.02)
        assert deviation is None or tokens.std() == pytest.approx(deviation, rel=0.03)
    assert (sample.prompt_tokens + sample.output_tokens).max() <= data.longest_tokens


def test_whole_prompts_stall_and_small_chunks_do_not() -> None:
    chat, sample = DATA_SETS[0], draw(DATA_SETS[0], 300, seed=1)
    shares = {engine.name: Replica.of(engine, chat, sample, 0.1).run(2.0)[0] for engine in ENGINES}
    assert shares["sarathi, 512"] > 0.999
    assert shares["vllm-v0"] < 0.99
    assert shares["sarathi, 2048"] < 0.99


def test_too_high_a_rate_shows_in_the_delay() -> None:
    replica = Replica.of(ENGINES[-1], DATA_SETS[0], draw(DATA_SETS[0], 300, seed=1), 0.5)
    assert replica.run(0.5)[1] < 0.1 < 2.0 < replica.run(20.0)[1]


def test_the_command_finds_shows_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(token_gaps, "QUICK", TINY)
    page = tmp_path / "page.md"
    page.write_text("<!-- table: token-gaps --><!-- end -->")
    line = ("compare-systems", "--token-gaps", "--quick", "--out", str(tmp_path))
    for more in (("--json",), ("--update", str(page))):
        with pytest.raises(SystemExit) as leaving:
            root.main((*line, *more))
        assert leaving.value.code in (0, None)
        monkeypatch.setattr(token_gaps, "capacity_of", lambda *_: pytest.fail("what is known was looked for again"))
    found = json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "}")
    assert len(found) == 4
    assert all(set(cells) == {engine.name for engine in ENGINES} for cells in found.values())
    assert "| sarathi, 512 |" in page.read_text()
    with pytest.raises(SpecError, match="choose another --out"):
        token_gaps.find_all(tmp_path / "quick", settings=token_gaps.CAREFUL, progress=lambda what, done, total: None)


def test_it_has_its_own_engines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        root.main(("compare-systems", "--token-gaps", "--systems", "vllm"))
    assert leaving.value.code == root.EXIT_MISTAKE
    assert "without --systems" in capsys.readouterr().err
