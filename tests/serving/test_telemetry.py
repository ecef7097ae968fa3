"""Scrapes, PromQL answers and windows: resets, gaps, freezes, and missing told from stale told from zero."""

from __future__ import annotations

import json
import math
import threading
from itertools import pairwise
from urllib.parse import parse_qs

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_world import FakeClock, World, decide, world_spec

from rl_autoscale.fleet.errors import UnknownNameError
from rl_autoscale.serving.http_client import HttpAnswer, HttpError, send
from rl_autoscale.serving.metric_names import engine_names
from rl_autoscale.serving.protocols import BackendError, Replica
from rl_autoscale.serving.samples import Histogram, parse_exposition
from rl_autoscale.serving.sources import DirectSource, PrometheusSource
from rl_autoscale.serving.windows import ReplicaTrack, counter_difference, histogram_difference

VLLM = engine_names("vllm")
PAGE = """
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.2
vllm:kv_cache_usage_perc{engine="1"} 0.4
vllm:prompt_tokens_total{engine="0"} 2410.0
vllm:prompt_tokens_created{engine="0"} 1.79e+09
vllm:request_success_total{finished_reason="stop"} 5.0
vllm:request_success_total{finished_reason="length"} 2.0
vllm:request_success_total{finished_reason="abort"} 90.0
vllm:iteration_tokens_total_bucket{le="8.0"} 1.0
vllm:iteration_tokens_total_bucket{le="+Inf"} 4.0
vllm:iteration_tokens_total_sum 100.0
vllm:iteration_tokens_total_count 4.0
"""


def parse(text, names=VLLM):
    return parse_exposition(text, names, 0.0)


def test_ranks_are_summed_fractions_averaged_and_aborts_left_out():
    sample = parse(PAGE)
    assert sample.gauges == {"running": 7.0, "kv_usage": pytest.approx(0.3)}
    assert sample.counters == {"prompt_tokens": 2410.0, "finished": 7.0}
    assert sample.histograms["steps"].counts.tolist() == [1.0, 3.0]


def test_old_names_and_escaped_names_mean_the_same():
    old = parse("vllm:gpu_cache_usage_perc 0.5\n")
    escaped = parse("vllm_kv_cache_usage_perc 0.5\n")
    assert old.gauges == escaped.gauges == {"kv_usage": 0.5}


def test_of_two_names_the_newer_counts():
    assert parse("vllm:gpu_cache_usage_perc 0.9\nvllm:kv_cache_usage_perc 0.5\n").gauges == {"kv_usage": 0.5}


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1"])
def test_what_is_no_number_is_missing_not_zero(value):
    assert "running" not in parse(f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 0\n").gauges


@pytest.mark.parametrize(
    "line", ["vllm:num_requests_running 3 1700000000", "vllm:num_requests_running{a= 3", "vllm:num_requests_running x"]
)
def test_a_line_that_cannot_be_meant_spoils_the_scrape(line):
    with pytest.raises(ValueError, match=r".+"):
        parse(line + "\n")


def test_a_histogram_cut_off_in_the_middle_is_missing():
    assert parse('vllm:iteration_tokens_total_bucket{le="8.0"} 1.0\n').histograms == {}


@pytest.mark.parametrize(
    ("engine", "page"),
    [("sglang", "sglang:num_running_reqs 2\n"), ("tensorrt-llm", "trtllm_num_requests_running 2\n")],
)
def test_other_engines_speak_through_the_same_map(engine, page):
    assert parse(page, engine_names(engine)).gauges == {"running": 2.0}


def test_an_unknown_engine_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="did you mean 'vllm'"):
        engine_names("vlm")


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20))
def test_differences_of_a_counter_are_never_negative_and_count_everything_after_a_reset(values):
    steps = [counter_difference(a, b) for a, b in pairwise(values)]
    assert min(steps) >= 0
    if values == sorted(values):
        assert sum(steps) == values[-1] - values[0]


def test_a_restarted_engine_counts_from_zero():
    edges = np.array([1.0])
    before, after = Histogram(edges, np.array([5.0, 5.0]), 9.0), Histogram(edges, np.array([2.0, 0.0]), 1.0)
    assert histogram_difference(before, after) is after
    assert histogram_difference(before, Histogram(np.array([2.0]), np.array([9.0, 9.0]), 9.0)) is None


def test_the_first_reading_of_an_old_replica_gives_no_rate_and_of_a_new_one_all():
    sample = parse_exposition("vllm:generation_tokens_total 500\n", VLLM, 110.0)
    old, new = ReplicaTrack(since_s=100.0), ReplicaTrack(since_s=100.0, began_at_zero=True)
    old.take(sample, VLLM)
    new.take(sample, VLLM)
    assert old.events == {}
    assert (new.events["generation_tokens"].value, new.events["generation_tokens"].span_s) == (500.0, 10.0)


def advance(fleet, steps):
    for _ in range(steps):
        fleet.apply(decide(fleet, int(np.nan_to_num(fleet.observe().pools.asked_for[0], nan=1.0))))
        fleet.advance()
    return fleet.observe()


@pytest.fixture
def world():
    return World(world_spec(pool={"initial_replicas": 4}), rate_per_s=4.0)


def test_one_silent_replica_of_four_is_no_drop_in_load(world):
    fleet = world.fleet()
    before = advance(fleet, 5)
    world.fault, world.faulty = "down", {"gpu-0"}
    after = advance(fleet, 5)
    assert after.pools.running[0] == pytest.approx(before.pools.running[0], rel=0.2)
    assert after.classes.arrivals_per_s[0] == pytest.approx(4.0, rel=0.1)
    assert fleet.report.coverage["gpu"] == 0.75
    assert any("gpu-0: connection refused" in problem for problem in fleet.report.problems)


@pytest.mark.parametrize("fault", ["down", "empty", "nan", "frozen"])
def test_readings_grow_old_first_and_are_missing_then_never_zero(world, fault):
    fleet = world.fleet()
    before = advance(fleet, 5)
    world.fault = fault
    first, second = advance(fleet, 1), advance(fleet, 1)
    assert first.pools.running[0] == before.pools.running[0]
    assert first.pools.age_s[0] == pytest.approx(11.0, abs=0.1)
    assert second.pools.age_s[0] == pytest.approx(21.0, abs=0.1)
    blind = advance(fleet, 2)
    assert np.isnan(blind.pools.running[0])
    assert np.isnan(blind.classes.arrivals_per_s[0])
    assert fleet.report.coverage["gpu"] == 0.0
    world.fault = None
    assert advance(fleet, 2).classes.arrivals_per_s[0] == pytest.approx(4.0, rel=0.15)


def test_half_a_scrape_costs_only_the_half_that_is_missing(world):
    fleet = world.fleet()
    advance(fleet, 3)
    world.fault = "partial"
    state = advance(fleet, 5)
    assert np.isnan(state.pools.running[0])
    assert state.pools.generation_tokens_per_s[0] > 0
    assert fleet.report.ages_s["gpu.running"] == pytest.approx(51.0, abs=0.1)
    assert fleet.report.ages_s["gpu.generation_tokens"] == pytest.approx(1.0, abs=0.1)


def test_an_idle_engine_that_repeats_itself_is_fresh(world):
    world.rate_per_s = 0.0
    state = advance(world.fleet(), 6)
    assert (state.pools.running[0], state.pools.age_s[0]) == (0.0, 1.0)


def test_a_page_frozen_while_idle_is_found_out_by_the_gateways_count(world):
    world.rate_per_s = 0.0
    fleet = world.fleet(gateway=True)
    advance(fleet, 2)
    world.fault, world.rate_per_s = "frozen", 4.0
    state = advance(fleet, 5)
    assert np.isnan(state.pools.running[0])
    assert any("frozen" in problem for problem in fleet.report.problems)


def test_a_pool_without_replicas_runs_nothing_and_says_so():
    world = World(world_spec(pool={"initial_replicas": 0, "min_replicas": 0}), rate_per_s=0.0)
    state = advance(world.fleet(), 2)
    assert (state.pools.running[0], state.pools.kv_usage[0], state.pools.ready[0]) == (0.0, 0.0, 0.0)


def test_deleted_replicas_are_neither_scraped_nor_counted(world):
    fleet = world.fleet()
    advance(fleet, 3)
    world.backends["gpu"].retire("gpu-0")
    world.backends["gpu"].target = 3
    world.scraped.clear()
    state = advance(fleet, 2)
    assert "gpu-0" not in world.scraped
    assert state.pools.ready[0] == 3
    assert fleet.report.coverage["gpu"] == 1.0


def test_a_back_end_that_does_not_answer_is_held_then_missing_and_left_alone(world):
    fleet = world.fleet()
    advance(fleet, 2)
    world.backends["gpu"].read_error = BackendError("503", retryable=True)
    assert advance(fleet, 1).pools.ready[0] == 4
    state = advance(fleet, 3)
    assert np.isnan(state.pools.ready[0])
    fleet.apply(decide(fleet, 9))
    assert world.backends["gpu"].calls == []
    assert "cannot be read" in str(fleet.apply_failures["gpu"])


def test_a_restarted_gateway_costs_one_window_and_gives_no_wrong_rate(world):
    fleet = world.fleet(gateway=True)
    advance(fleet, 4)
    world.gateway.restart()
    lost = advance(fleet, 1)
    assert np.isnan(lost.classes.arrivals_per_s[0])
    assert advance(fleet, 1).classes.arrivals_per_s[0] == pytest.approx(4.0, rel=0.05)


def test_a_missed_read_of_the_gateway_widens_the_next_window(world):
    fleet = world.fleet(gateway=True)
    before = advance(fleet, 3)
    world.gateway.error = BackendError("timeout", retryable=True)
    held = advance(fleet, 1)
    assert held.classes.arrivals_per_s[0] == before.classes.arrivals_per_s[0]
    assert held.classes.age_s[0] == pytest.approx(11.0)
    world.gateway.error = None
    assert advance(fleet, 1).classes.arrivals_per_s[0] == pytest.approx(4.0, rel=0.05)


def test_draining_replicas_leave_the_routing_list_at_once(world):
    fleet = world.fleet(gateway=True)
    advance(fleet, 2)
    fleet.apply(decide(fleet, 1))
    phases = [replica.phase for replica in world.gateway.replicas.replicas]
    assert sorted(phases) == ["draining", "draining", "draining", "ready"]
    assert world.gateway.decision.max_batch_size == {"gpu": 256}


def test_a_hanging_scrape_costs_its_time_limit_once_and_is_not_repeated():
    release = threading.Event()
    asked = []

    def http(method, url, *, body=None, headers=None, timeout_s):
        asked.append(url)
        release.wait(5.0)
        return HttpAnswer(200, PAGE.encode())

    source = DirectSource(VLLM, FakeClock(), http, timeout_s=0.02)
    replica = Replica("r", "gpu", "http://r:1", "ready", 0.0)
    assert "no answer" in source.read([replica]).failures["r"]
    assert "still hangs" in source.read([replica]).failures["r"]
    release.set()
    source.close()
    assert len(asked) == 1


def test_a_fleet_that_is_closed_scrapes_no_more(world):
    fleet = world.fleet()
    fleet.close()
    world.scraped.clear()
    with pytest.raises(RuntimeError, match="after shutdown"):
        fleet.advance()
    assert world.scraped == []


def prometheus(series, age_s=4.0):
    """The HTTP API of a Prometheus that knows some series: name -> {instance: value}."""

    def http(method, url, *, body=None, headers=None, timeout_s):
        query = parse_qs(body.decode())["query"][0]
        at_s = 1_000_000.0
        if query.startswith("timestamp("):
            rows = [({"instance": i}, at_s - age_s) for i in series["vllm:num_requests_running"]]
        else:
            rows = [({"__name__": n, "instance": i}, v) for n, by in series.items() for i, v in by.items()]
        result = [{"metric": labels, "value": [at_s, str(value)]} for labels, value in rows]
        return HttpAnswer(200, json.dumps({"status": "success", "data": {"result": result}}).encode())

    return http


def test_prometheus_gives_the_same_samples_with_the_scrapes_age():
    series = {
        "vllm:num_requests_running": {"a:8000": 3, "b:8000": 1},
        "vllm_generation_tokens_total": {"a:8000": 700},
    }
    clock = FakeClock()
    source = PrometheusSource("http://prom:9090", VLLM, clock, prometheus(series))
    replicas = [Replica(name, "gpu", f"http://{name}:8000", "ready", 0.0) for name in "abc"]
    readings = source.read(replicas)
    assert readings.samples["a"].gauges == {"running": 3.0}
    assert readings.samples["a"].counters == {"generation_tokens": 700.0}
    assert readings.samples["b"].taken_s == clock.now_s - 4.0
    assert "no series" in readings.failures["c"]


def test_what_prometheus_still_knows_of_deleted_replicas_is_left_out():
    series = {"vllm:num_requests_running": {"a:8000": 3, "gone:8000": 50}}
    source = PrometheusSource("http://prom:9090", VLLM, FakeClock(), prometheus(series))
    assert set(source.read([Replica("a", "gpu", "http://a:8000", "ready", 0.0)]).samples) == {"a"}


@pytest.mark.parametrize("answer", [HttpAnswer(503, b""), HttpAnswer(200, b"<html>"), HttpAnswer(200, b'{"data": 1}')])
def test_a_prometheus_that_talks_nonsense_is_a_failure_of_every_replica(answer):
    source = PrometheusSource("http://prom:9090", VLLM, FakeClock(), lambda *_, **__: answer)
    assert set(source.read([Replica("a", "gpu", "http://a:1", "ready", 0.0)]).failures) == {"a"}


def test_the_query_names_every_series_under_both_spellings():
    assert "vllm[:_]num_requests_running" in VLLM.name_pattern
    assert "vllm[:_]iteration_tokens_total_bucket" in VLLM.name_pattern


def test_only_http_addresses_are_opened():
    with pytest.raises(HttpError, match="not an http"):
        send("GET", "file:///etc/passwd", timeout_s=1.0)


def test_without_a_gateway_what_is_late_is_read_off_the_engines_buckets(world):
    """All first tokens are within 1 s, the SLO; all TPOTs in the bucket up to 0.5 s, of which the SLO is a fifth."""
    classes = advance(world.fleet(), 5).classes
    assert classes.late_first_tokens_per_s[0] == 0.0
    assert classes.finished_per_s[0] > 0.0
    assert classes.slow_answers_per_s[0] == pytest.approx(0.8 * classes.finished_per_s[0])
    assert classes.met_per_s[0] == pytest.approx(0.2 * classes.finished_per_s[0])


def test_share_up_to_a_bound_is_linear_inside_the_bucket():
    histogram = Histogram(np.array([1.0, 2.0]), np.array([4.0, 4.0, 2.0]), 12.0)
    assert histogram.share_up_to(1.5) == pytest.approx(0.6)
    assert math.isnan(Histogram(np.array([1.0]), np.zeros(2), 0.0).share_up_to(1.0))
