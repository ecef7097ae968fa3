"""Traffic out of a Prometheus server's past; a server on loopback knows what increase() would say."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import numpy as np
import pytest

from rl_autoscale.fleet.errors import TraceError
from rl_autoscale.serving import history
from rl_autoscale.serving.history import PrometheusHistory, Window
from rl_autoscale.serving.metric_names import engine_names

START_S, STEP_S = 1_793_577_600.0, 60.0
COUNTS = [10.0, 0.0, None, 30.0, 20.5]
"""Requests per minute; None where scrapes failed."""


class FakePrometheus:
    """Answers range queries over made-up increases: ``values[metric][labels] -> one value per bucket``."""

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[str, str], list[float | None]]] = {}
        self.queries: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: tuple[int, bytes] | None = None

    def reply(self, form: dict[str, str]) -> tuple[int, bytes]:
        self.queries.append(form)
        if self.answer is not None:
            return self.answer
        query = form["query"]
        name = re.search(r'__name__=~"([^"]+)"', query)
        assert name is not None
        assert "[60000ms]" in query
        times = np.arange(float(form["start"]), float(form["end"]) + 1e-6, float(form["step"]))
        result = []
        for metric, by_label in self.values.items():
            if re.fullmatch(name[1], metric):
                for (label, value), column in by_label.items():
                    points = [(at, column[round((at - START_S) / STEP_S) - 1]) for at in times]
                    held = [[at, str(point)] for at, point in points if point is not None]
                    if held:
                        result.append({"metric": {label: value} if label else {}, "values": held})
        return 200, json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()


@pytest.fixture
def prometheus():
    fake = FakePrometheus()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/api/v1/query_range"
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            fake.headers.append(dict(self.headers))
            status, answer = fake.reply({key: values[0] for key, values in parse_qs(body).items()})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_port}"
        yield fake
        server.shutdown()
        thread.join()


def window(buckets: int = len(COUNTS)) -> Window:
    return Window(START_S, START_S + buckets * STEP_S, STEP_S)


def times(factor: float) -> list[float | None]:
    return [None if count is None else count * factor for count in COUNTS]


def lengths(prefix: str, mean: float) -> dict:
    """A histogram with half of the requests within 100 tokens, all within 1000."""
    return {
        f"{prefix}_bucket": {("le", "100.0"): times(0.5), ("le", "1000.0"): times(1), ("le", "+Inf"): times(1)},
        f"{prefix}_sum": {("", ""): times(mean)},
        f"{prefix}_count": {("", ""): times(1)},
    }


def vllm() -> dict:
    return {
        "vllm:time_to_first_token_seconds_count": {("", ""): COUNTS},
        **lengths("vllm:request_prompt_tokens", 400.0),
        **lengths("vllm:request_generation_tokens", 90.0),
    }


def test_vllm_counts_histograms_and_gaps(prometheus) -> None:
    prometheus.values = vllm()
    (found,) = PrometheusHistory(prometheus.url, selector='job="vllm"').read(window())
    np.testing.assert_array_equal(found.arrivals, [10, 0, np.nan, 30, 20.5])
    np.testing.assert_array_equal(found.prompt.mean_tokens, [400, np.nan, np.nan, 400, 400])
    assert found.prompt.edges.tolist() == [100, 1000]
    assert found.prompt.counts.tolist() == [[5, 5, 0], [0, 0, 0], [0, 0, 0], [15, 15, 0], [10.25, 10.25, 0]]
    assert (found.start_s, found.bucket_s, found.class_name) == (START_S, 60.0, None)
    assert all('job="vllm"' in query["query"] for query in prometheus.queries)


def test_escaped_names_and_token_counters_do_as_well(prometheus) -> None:
    prometheus.values = {
        "vllm_time_to_first_token_seconds_count": {("", ""): COUNTS},
        "vllm_prompt_tokens_total": {("", ""): times(700)},
        "vllm_generation_tokens_total": {("", ""): times(50)},
    }
    (found,) = PrometheusHistory(prometheus.url).read(window())
    np.testing.assert_array_equal(found.prompt.mean_tokens, [700, np.nan, np.nan, 700, 700])
    np.testing.assert_array_equal(found.output.mean_tokens, [50, np.nan, np.nan, 50, 50])


def test_the_gateway_knows_classes(prometheus) -> None:
    name = "rl_autoscale_gateway_"
    half = [None if count is None else count / 2 for count in COUNTS]
    prometheus.values = {
        f"{name}arrivals_total": {("class", "chat"): COUNTS, ("class", "batch"): half},
        f"{name}arrived_prompt_tokens_total": {("class", "chat"): times(300), ("class", "batch"): times(100)},
        f"{name}finished_output_tokens_total": {("class", "chat"): times(40), ("class", "batch"): times(40)},
        f"{name}ended_total": {("class", "chat"): half, ("class", "batch"): half},
    }
    chat, batch = PrometheusHistory(prometheus.url, engine="gateway").read(window())
    assert (chat.class_name, batch.class_name) == ("chat", "batch")
    assert chat.prompt.mean_tokens[0] == 300
    assert batch.prompt.mean_tokens[0] == 200
    assert chat.output.mean_tokens[0] == 80


def test_long_times_are_asked_for_in_pieces(prometheus, monkeypatch) -> None:
    prometheus.values = vllm()
    monkeypatch.setattr(history, "POINTS_PER_QUERY", 2)
    told = []
    (found,) = PrometheusHistory(prometheus.url).read(window(), lambda done, total: told.append((done, total)))
    np.testing.assert_array_equal(found.arrivals, [10, 0, np.nan, 30, 20.5])
    assert told[-1] == (21, 21)  # seven queries in three pieces


def test_a_token_is_sent(prometheus) -> None:
    prometheus.values = vllm()
    PrometheusHistory(prometheus.url, token="abc").read(window())
    assert prometheus.headers[0]["Authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "has no vllm traffic"),
        ((400, b'{"status":"error","error":"parse error"}'), "status 400: parse error"),
        ((502, b"<html>"), "not the answer of a Prometheus server"),
        ((200, b'{"data": 1}'), "not the answer of a Prometheus server"),
    ],
)
def test_what_goes_wrong_is_said(prometheus, answer, reason) -> None:
    prometheus.answer = answer
    with pytest.raises(TraceError, match=reason):
        PrometheusHistory(prometheus.url).read(window())


def test_nobody_there() -> None:
    with pytest.raises(TraceError, match="check --prometheus"):
        PrometheusHistory("http://127.0.0.1:9").read(window())


@pytest.mark.parametrize(
    ("end_s", "step_s", "reason"), [(30, 60, "less than one --step"), (600, 1, "below 5 s"), (1e8, 5, "raise --step")]
)
def test_impossible_windows(end_s, step_s, reason) -> None:
    with pytest.raises(TraceError, match=reason):
        Window(0.0, end_s, step_s)


def test_the_live_scrape_does_not_read_what_only_the_past_needs() -> None:
    names = engine_names("vllm")
    assert "request_prompt_tokens" not in names.name_pattern
    assert "vllm_request_prompt_tokens_sum" not in names.index
