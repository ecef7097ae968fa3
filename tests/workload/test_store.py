"""Finding, downloading and standing in for traces; no network, a fake address book."""

from __future__ import annotations

import hashlib
import io
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from rl_autoscale.fleet.errors import TraceError, UnknownNameError
from rl_autoscale.workload import TraceStore, TraceUnavailable
from rl_autoscale.workload.catalog import KNOWN_TRACES
from rl_autoscale.workload.store import FOLDERS_VARIABLE

ORIGINAL = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50,396,109\n"
NATIVE = "arrival_s,prompt_tokens,output_tokens\n0,1,1\n2,2,2\n"
FILE_NAME = "AzureLLMInferenceTrace_conv.csv"


class Response(io.BytesIO):
    """What urlopen gives: bytes with headers."""

    def __init__(self, body: bytes, announced: int | None = None) -> None:
        super().__init__(body)
        self.headers = {} if announced is None else {"Content-Length": str(announced)}


class Web:
    """Serves one body, or one error, and counts how often it was asked."""

    def __init__(self, answer: Callable[[], IO[bytes]]) -> None:
        self.answer, self.asked = answer, [""] * 0

    def __call__(self, url: str, *, timeout: float) -> IO[bytes]:
        assert timeout > 0
        self.asked.append(url)
        return self.answer()


def offline() -> IO[bytes]:
    raise urllib.error.URLError("no route to host")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def _small_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the catalog expect ORIGINAL."""
    digest = hashlib.sha256(ORIGINAL).hexdigest()
    small = replace(KNOWN_TRACES["azure2023_conv"], sha256=digest, num_bytes=len(ORIGINAL))
    monkeypatch.setitem(KNOWN_TRACES, "azure2023_conv", small)


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("_small_original")
def test_a_trace_is_downloaded_once_checked_and_cached(tmp_path: Path, environment: dict[str, str]) -> None:
    web = Web(lambda: Response(ORIGINAL, len(ORIGINAL)))
    seen: list[tuple[str, int, int | None]] = []
    store = TraceStore(opener=web, environment=environment, progress=lambda *event: seen.append(event))
    loaded = store.load("azure2023_conv")
    assert loaded.workload.num_requests == 2
    assert loaded.report is not None
    assert seen == [("azure2023_conv", len(ORIGINAL), len(ORIGINAL))]
    assert files_below(tmp_path) == [FILE_NAME]
    assert store.load("azure2023_conv") is loaded
    again = TraceStore(opener=Web(offline), environment=environment)
    assert again.load("azure2023_conv").workload.num_requests == 2
    assert len(web.asked) == 1
    assert web.asked[0].startswith("https://")


def test_a_wrong_checksum_is_an_error_and_nothing_is_left(tmp_path: Path, environment: dict[str, str]) -> None:
    store = TraceStore(opener=Web(lambda: Response(ORIGINAL)), environment=environment)
    with pytest.raises(TraceError, match=r"sha256 .* expected .* nothing was kept") as caught:
        store.load_or_stand_in("azure2023_conv")  # a damaged download is not "unavailable": no stand-in for it
    assert not isinstance(caught.value, TraceUnavailable)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (offline, "no route to host"),
        (lambda: Response(ORIGINAL, len(ORIGINAL) + 1), "the connection ended after"),
    ],
)
def test_no_network_names_the_way_out_and_leaves_nothing(
    tmp_path: Path, environment: dict[str, str], answer: Callable[[], IO[bytes]], reason: str
) -> None:
    web = Web(answer)
    store = TraceStore(opener=web, environment=environment)
    for _ in range(2):
        with pytest.raises(TraceUnavailable, match=reason) as caught:
            store.load("azure2023_conv")
    assert "--traces" in str(caught.value)
    assert FILE_NAME in str(caught.value)
    assert len(web.asked) == 1  # asked once, remembered
    assert files_below(tmp_path) == []


def test_an_unwritable_cache_is_unavailable_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = TraceStore(opener=Web(lambda: Response(ORIGINAL)), environment={"XDG_CACHE_HOME": str(tmp_path / "file")})
    with pytest.raises(TraceUnavailable):
        store.load("azure2023_conv")


def test_a_stand_in_says_that_it_is_one(environment: dict[str, str]) -> None:
    store = TraceStore(opener=Web(offline), environment=environment)
    loaded = store.load_or_stand_in("azure2023_conv")
    assert loaded.report is None
    assert loaded.notes == (
        "azure2023_conv is not available (no route to host): a generator fitted to it stands in for it",
    )
    assert loaded.workload.mean_rate_per_s == pytest.approx(5.5, rel=0.15)
    assert store.load_or_stand_in("azure2023_conv") is loaded
    with pytest.raises(TraceUnavailable):
        store.load_or_stand_in("mooncake_toolagent")  # nothing is fitted to it


def test_downloads_can_be_switched_off(environment: dict[str, str]) -> None:
    web = Web(lambda: Response(ORIGINAL))
    with pytest.raises(TraceUnavailable, match="switched off"):
        TraceStore(download=False, opener=web, environment=environment).fetch("azure2023_conv")
    assert web.asked == []


def test_folders_come_before_the_variable_before_the_cache(tmp_path: Path) -> None:
    given, named, cache = (tmp_path / name for name in ("given", "named", "xdg/rl-autoscale/traces"))
    for folder in (given, named, cache):
        folder.mkdir(parents=True)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), FOLDERS_VARIABLE: f"{tmp_path / 'gone'}:{named}"}
    store = TraceStore([given], opener=Web(offline), environment=environment)
    (cache / FILE_NAME).write_bytes(ORIGINAL)
    assert store.find("azure2023_conv") == cache / FILE_NAME
    (named / FILE_NAME).write_bytes(ORIGINAL)
    assert store.find("azure2023_conv") == named / FILE_NAME
    (named / "azure2023_conv.csv").write_text(NATIVE)  # our own form comes before the original
    assert store.find("azure2023_conv") == named / "azure2023_conv.csv"
    (given / "azure2023_conv.csv").write_text(NATIVE)
    assert store.find("azure2023_conv") == given / "azure2023_conv.csv"
    assert store.load("azure2023_conv").workload.num_requests == 2


def test_files_are_found_by_stem_or_path(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "mine.csv").write_text(NATIVE)
    store = TraceStore([tmp_path], environment=environment)
    assert store.load("mine").workload.num_requests == 2
    assert store.load(str(tmp_path / "mine.csv")).workload.num_requests == 2
    with pytest.raises(TraceError, match="no such file"):
        store.load("other.csv")
    with pytest.raises(UnknownNameError, match="did you mean 'azure2023_conv'"):
        store.load("azure2023-conv")


def test_a_missing_traces_folder_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(TraceError, match="no such folder; --traces"):
        TraceStore([tmp_path / "gone"], environment=environment).find("azure2023_conv")


def test_unverified_downloads_and_skipped_failures_are_noted(environment: dict[str, str]) -> None:
    body = b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,A,4,1,5,x\n6,A,4,0,4,x\n"
    loaded = TraceStore(opener=Web(lambda: Response(body)), environment=environment).load("burstgpt_1")
    assert loaded.workload.num_requests == 1
    assert any("1 of 2 rows were left out" in note for note in loaded.notes)
    assert any("unverified" in note for note in loaded.notes)


def test_the_catalog_is_well_formed() -> None:
    for name, trace in KNOWN_TRACES.items():
        assert trace.name == name
        assert trace.url.startswith("https://")
        assert trace.file_name.endswith((".csv", ".jsonl"))
        assert trace.sha256 is None or len(trace.sha256) == 64
        assert trace.licence
        assert trace.citation
