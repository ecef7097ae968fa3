"""Every format from a small written file: what is read, what is refused, and with which line number."""

from __future__ import annotations

import builtins
import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import MissingExtraError, TraceError
from rl_autoscale.workload import NO_SESSION, ReadResult, csv_reader, read_trace, write_trace
from rl_autoscale.workload.readers import detect_format
from rl_autoscale.workload.stamps import STAMP_BYTES, parse_stamp_ns, parse_stamps
from rl_autoscale.workload.trace import Workload

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:50.9951690,396,109\r
2023-11-16 18:15:51.2224670,879,55"""

AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-12 23:59:59.999999+00:00,10,1
2024-05-13 00:00:00+00:00,20,2
2024-05-13 00:00:00.5+00:00,30,3
"""

BURSTGPT_OLD = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
"""

BURSTGPT_NEW = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log
19440161.0,,2,ChatGPT,36,29,65,API log
19440192.0,1722ac82-0a46,2,GPT-4,1,2,3,Conversation log
"""

MOONCAKE = "\n".join(
    json.dumps(item)
    for item in (
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 3000, "input_length": 512, "output_length": 6, "hash_ids": [0]},
        {"timestamp": 3000, "input_length": 1025, "output_length": 7, "hash_ids": [0, 1, 2]},
    )
)

NATIVE = """arrival_s,prompt_tokens,output_tokens,class,session,hash_ids,color
0.5,20,3,chat,a,1 2,red
1.5,10,4,batch,,1,blue
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(TraceError) as caught:
        read_trace(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_azure_2023_keeps_100_ns_digits(tmp_path: Path) -> None:
    result = read_trace(written(tmp_path, "a.csv", AZURE_2023))
    assert result.report.format == "azure"
    assert result.workload.arrival_s.tolist() == [0.0, 4.314579, 4.541877]
    assert result.workload.prompt_tokens.tolist() == [374, 396, 879]
    assert result.workload.output_tokens.tolist() == [44, 109, 55]
    assert result.workload.span_s == pytest.approx(4.541877 * 1.5)
    assert any("2023-11-16T18:15:46.680590000 UTC" in note for note in result.report.notes)


def test_azure_2024_has_offsets_and_stamps_without_fraction(tmp_path: Path) -> None:
    result = read_trace(written(tmp_path, "a.csv", AZURE_2024))
    assert result.workload.arrival_s == pytest.approx([0.0, 1e-6, 0.500001], abs=1e-12)


def test_other_offsets_are_respected(tmp_path: Path) -> None:
    text = AZURE_2024.replace("2024-05-13 00:00:00.5+00:00", "2024-05-13 02:00:00.5+02:00")
    result = read_trace(written(tmp_path, "a.csv", text))
    assert result.workload.arrival_s[2] == pytest.approx(0.500001, abs=1e-12)


def test_burstgpt_failures_are_named_with_their_line(tmp_path: Path) -> None:
    path = written(tmp_path, "b.csv", BURSTGPT_OLD)
    message = refused(path)
    assert f"{path}:3: 0 output tokens: the request failed" in message
    assert "1 of 3 rows cannot be used" in message
    assert "--on-bad-rows skip" in message
    result = read_trace(path, on_bad_rows="skip")
    assert [bad.line for bad in result.report.bad_rows] == [3]
    assert result.workload.arrival_s.tolist() == [0.0, 113.0]
    assert result.workload.class_names == ("ChatGPT", "GPT-4")
    assert result.workload.class_index.tolist() == [0, 1]
    assert any("1 of 3 rows were left out" in note for note in result.report.notes)


def test_burstgpt_with_sessions(tmp_path: Path) -> None:
    result = read_trace(written(tmp_path, "b.csv", BURSTGPT_NEW))
    assert result.workload.session is not None
    assert result.workload.session.tolist() == [0, NO_SESSION, 0]
    assert result.workload.arrival_s.tolist() == [0.0, 51.0, 82.0]
    assert result.report.notes == ("b.csv: time 0 is 1.94401e+07 s on the file clock",)


def test_mooncake_has_hashes_of_inferred_size(tmp_path: Path) -> None:
    result = read_trace(written(tmp_path, "m.jsonl", MOONCAKE))
    workload = result.workload
    assert workload.arrival_s.tolist() == [0.0, 3.0, 3.0]
    assert workload.hash_block_tokens == 512
    assert workload.hash_offsets is not None
    assert workload.hash_ids is not None
    assert workload.hash_offsets.tolist() == [0, 2, 3, 6]
    assert workload.hash_ids.tolist() == [0, 1, 0, 0, 1, 2]
    assert read_trace(tmp_path / "m.jsonl", hash_block_tokens=1024).workload.hash_block_tokens == 1024


def test_native_csv_with_everything(tmp_path: Path) -> None:
    result = read_trace(written(tmp_path, "n.csv", NATIVE), hash_block_tokens=16)
    workload = result.workload
    assert workload.arrival_s.tolist() == [0.5, 1.5]  # our own clock is not moved
    assert workload.class_names == ("chat", "batch")
    assert workload.session is not None
    assert workload.session.tolist() == [0, NO_SESSION]
    assert workload.hash_ids is not None
    assert workload.hash_ids.tolist() == [1, 2, 1]
    assert result.report.notes == ("n.csv: columns not used: color",)


def test_gzip_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + AZURE_2023.encode()))
    assert read_trace(path).workload.num_requests == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("2023-11-16 18:15:52,abc,5", "ContextTokens 'abc' is not a number"),
        ("2023-11-16 18:15:52,5", "2 fields where the header has 3"),
        ("2023-11-16 18:15:52,1,234,5", "4 fields where the header has 3"),
        ("2023-11-16 18:15:52,,5", "ContextTokens is missing"),
        ("2023-11-16 18:15:52,-4,5", "-4 prompt tokens"),
        ("2023-11-16 18:15:52,0,5", "0 prompt tokens"),
        ("2023-11-16 18:15:52,nan,5", "prompt tokens nan are missing or not finite"),
        ("2023-11-16 18:15:52,4.5,5", "4.5 prompt tokens is not a whole number"),
        ("2023-11-16 18:15:52,4,0", "0 output tokens: the request failed"),
        ("2023-11-16 18:15:52,4,-1", "-1 output tokens"),
        ("2023-11-16 18:15:52,4,1e12", "exceed 10,000,000"),
        ("16.11.2023 18:15,4,1", "'16.11.2023 18:15' is not a time like"),
        ("2023-13-41 18:15:52,4,1", "TIMESTAMP: "),
        ("2023-11-16 25:15:52,4,1", "TIMESTAMP: "),
        ("9999-11-16 12:15:52,4,1", "the year of '9999-11-16 12:15:52' is not within 1970..2261"),
        (",4,1", "TIMESTAMP is missing"),
    ],
)
def test_a_broken_row_is_named_and_skipping_it_keeps_the_rest(tmp_path: Path, row: str, reason: str) -> None:
    lines = AZURE_2023.split("\r\n")
    path = written(tmp_path, "a.csv", "\n".join([*lines[:2], row, *lines[2:]]))
    message = refused(path)
    assert f"{path}:3: " in message
    assert reason in message
    result = read_trace(path, on_bad_rows="skip")
    assert result.workload.arrival_s.tolist() == [0.0, 4.314579, 4.541877]
    assert [bad.line for bad in result.report.bad_rows] == [3]
    assert result.report.num_rows == 4


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"timestamp": 5, "input_length": 3', "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"timestamp": 5, "input_length": 3}', "output_length is missing"),
        ('{"timestamp": "soon", "input_length": 3, "output_length": 4}', "timestamp 'soon' is not a number"),
        ('{"timestamp": 5, "input_length": true, "output_length": 4}', "input_length True is not a number"),
        ('{"timestamp": 5, "input_length": 3, "output_length": 4, "hash_ids": ["x"]}', "hash_ids is not a list"),
        ('{"timestamp": 5, "input_length": 3, "output_length": 4, "hash_ids": [99999999999999999999]}', "hash_ids"),
        ('{"timestamp": 1e400, "input_length": 3, "output_length": 4}', "missing or not finite"),
        ('{"timestamp": -5, "input_length": 3, "output_length": 4}', "is negative"),
    ],
)
def test_a_broken_json_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    first, *rest = MOONCAKE.split("\n")
    path = written(tmp_path, "m.jsonl", "\n".join([first, "", line, *rest]))
    message = refused(path)
    assert f"{path}:3: " in message
    assert reason in message
    assert read_trace(path, on_bad_rows="skip").workload.num_requests == 3


def test_many_bad_rows_are_counted_not_listed(tmp_path: Path) -> None:
    rows = "".join(f"{i},10,0\n" for i in range(50))
    message = refused(written(tmp_path, "n.csv", "arrival_s,prompt_tokens,output_tokens\n60,1,1\n" + rows))
    assert "50 of 51 rows" in message
    assert "and 45 more" in message
    assert message.count("request failed") == 5


def test_late_rows_are_sorted_with_a_note_or_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "n.csv", "arrival_s,prompt_tokens,output_tokens\n1,10,1\n3,20,1\n2,30,1\n4,40,1\n")
    result = read_trace(path)
    assert result.workload.prompt_tokens.tolist() == [10, 30, 20, 40]
    assert result.report.notes == ("n.csv: 1 rows came out of order (by up to 1 s) and were sorted",)
    assert f"{path}:4: arrives at 2 s, before an earlier row at 3 s" in refused(path, on_disorder="bad_row")
    skipped = read_trace(path, on_disorder="bad_row", on_bad_rows="skip").workload
    assert skipped.prompt_tokens.tolist() == [10, 20, 40]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "", "the file is empty"),
        ("a.csv", "\n\n", "the file is empty"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
        ("a.jsonl", "\n", "no rows"),
        ("a.csv", "when,what\n1,2\n", "the header 'when,what' is none that is known"),
        ("a.txt", "hello", "unknown ending '.txt'"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.csv.gz", "not gzip", "cannot be read"),
        ("a.csv", "arrival_s,prompt_tokens,output_tokens\n1,0,0\n", "cannot be used"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str, reason: str) -> None:
    assert reason in refused(written(tmp_path, name, text))


def test_a_file_of_bad_rows_only_is_refused_even_when_skipping(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "arrival_s,prompt_tokens,output_tokens\n1,0,0\n")
    assert "every row is bad" in refused(path, on_bad_rows="skip")


def test_missing_files_binary_files_and_wrong_formats_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.csv")
    binary = tmp_path / "b.csv"
    binary.write_bytes(b"\xff\xfe\x00\x80" * 10)
    assert "cannot be read" in refused(binary)
    path = written(tmp_path, "a.csv", AZURE_2023)
    assert "no column Timestamp, Request tokens, Response tokens" in refused(path, format="burstgpt")
    with pytest.raises(TraceError, match="unknown trace format 'azur'; did you mean 'azure'"):
        read_trace(path, "azur")  # type: ignore[arg-type]


def test_hash_counts_that_fit_no_block_size_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "m.jsonl", MOONCAKE.replace("[0, 1, 2]", "[0, 1, 2, 3, 4, 5, 6]"))
    assert "say it with hash_block_tokens" in refused(path)


def test_formats_are_detected_by_content(tmp_path: Path) -> None:
    for text, expected in ((AZURE_2023, "azure"), (BURSTGPT_NEW, "burstgpt"), (NATIVE, "csv")):
        assert detect_format(written(tmp_path, "x.csv", text)) == expected


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_round_trip(tmp_path: Path, ending: str) -> None:
    original = Workload(
        arrival_s=np.array([0.1, 1 / 3, 2.0]),
        prompt_tokens=np.array([17, 32, 3]),
        output_tokens=np.array([1, 2, 3]),
        class_index=np.array([1, 0, 1]),
        class_names=("chat", "batch", "unused"),
        span_s=10.0,
        session=np.array([0, NO_SESSION, 0]),
        hash_ids=np.array([5, 6, 5, 7, 9]),
        hash_offsets=np.array([0, 2, 4, 5]),
        hash_block_tokens=16,
    )
    path = tmp_path / f"w.{ending}"
    write_trace(original, path)
    result = read_trace(path)
    back = result.workload
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "session", "hash_ids", "hash_offsets"):
        assert getattr(back, name).tolist() == getattr(original, name).tolist(), name
    names = [[workload.class_names[i] for i in workload.class_index] for workload in (back, original)]
    assert names[0] == names[1]
    if ending == "parquet":
        assert back.class_names == original.class_names
        assert back.span_s == 10.0
        assert result.report.notes == ()


def test_parquet_of_other_programs(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"arrival_s": [1, 2, None, 4], "prompt_tokens": [5, 6, 7, 8], "output_tokens": [1, 0, 1, 1]}
    columns |= {"class": [3, 3, 4, None], "client": [0, 0, 0, 0]}
    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.table(columns), path)
    message = refused(path)
    assert f"{path}:2: 0 output tokens" in message
    assert f"{path}:3: arrival time nan is missing" in message
    result = read_trace(path, on_bad_rows="skip")
    assert result.workload.arrival_s.tolist() == [1.0, 4.0]
    assert [result.workload.class_names[i] for i in result.workload.class_index] == ["3", "default"]
    assert "p.parquet: columns not used: client" in result.report.notes
    parquet.write_table(arrow.table({"arrival_s": [1], "prompt_tokens": ["x"], "output_tokens": [1]}), path)
    assert "column prompt_tokens holds string" in refused(path)
    parquet.write_table(arrow.table({"arrival_s": [1]}), path)
    assert "no column prompt_tokens, output_tokens" in refused(path)


def test_without_pyarrow_parquet_names_its_extra_and_csv_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "a.csv", AZURE_2023)
    real_import = builtins.__import__

    def no_pyarrow(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    workload = read_trace(path).workload
    with pytest.raises(MissingExtraError, match=r"pip install '.\[parquet\]"):
        write_trace(workload, tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written


def careful_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> ReadResult:
    with monkeypatch.context() as patch:
        patch.setattr(csv_reader, "_read_fast", lambda *_: None)
        return read_trace(path)


@pytest.mark.parametrize("text", [AZURE_2023, AZURE_2024, BURSTGPT_NEW, NATIVE.replace(",hash_ids", ",other")])
def test_fast_and_careful_paths_agree(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "x.csv", text)
    with monkeypatch.context() as patch:
        patch.setattr(csv_reader, "_read_carefully", lambda *_: pytest.fail("the fast path was not taken"))
        patch.setattr(csv_reader, "_CHUNK_ROWS", 2)  # several chunks
        fast = read_trace(path)
    careful = careful_only(path, monkeypatch)
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "class_index", "class_names", "span_s"):
        assert np.array_equal(getattr(fast.workload, name), getattr(careful.workload, name)), name
    assert (fast.workload.session is None) == (careful.workload.session is None)
    if fast.workload.session is not None and careful.workload.session is not None:
        assert fast.workload.session.tolist() == careful.workload.session.tolist()
    assert fast.report == careful.report


def test_long_labels_are_not_cut(tmp_path: Path) -> None:
    rows = "".join(f"{i},5,5,{'x' * 100}{i}\n" for i in range(3))
    result = read_trace(written(tmp_path, "x.csv", "arrival_s,prompt_tokens,output_tokens,class\n" + rows))
    assert len(result.workload.class_names) == 3


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.datetimes(datetime(1970, 1, 1), datetime(2261, 12, 31)),
            st.integers(0, 9),
            st.sampled_from(["", "Z", "+00:00"]),
            st.sampled_from([" ", "T"]),
        ),
        min_size=1,
    )
)
def test_vectorised_stamps_agree_with_the_plain_ones(items: list[tuple[Any, int, str, str]]) -> None:
    texts = []
    for moment, digits, ending, separator in items:
        fraction = f".{moment.microsecond:06d}789"[: digits + 1] if digits else ""
        texts.append(moment.strftime(f"%Y-%m-%d{separator}%H:%M:%S") + fraction + ending)
    fast = parse_stamps(np.array(texts, dtype=f"S{STAMP_BYTES}"))
    assert fast is not None
    assert fast.tolist() == [parse_stamp_ns(text) for text in texts]


def test_real_originals_and_conversions_agree(real_traces: Path, tmp_path: Path) -> None:
    conversion = read_trace(real_traces / "mooncake_conversation.parquet").workload
    assert conversion.num_requests == 12_031
    assert conversion.hash_block_tokens == 512
    path = tmp_path / "again.parquet"
    write_trace(conversion, path)
    again = read_trace(path).workload
    assert again.hash_ids is not None
    assert np.array_equal(again.hash_ids, conversion.hash_ids)
    assert again.span_s == conversion.span_s
