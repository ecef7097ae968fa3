"""What holds for every policy, whatever its rule."""

from __future__ import annotations

import re
from dataclasses import fields
from inspect import Parameter, signature

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.agents.registry import POLICIES, make_policy, policy_class
from rl_autoscale.envs.constants import CONSTANTS
from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.fleet.state import ClassTelemetry, FleetState, PoolTelemetry, ScalingDecision

JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 3600.0, "tpot_slo_s": 1.0}
CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
FUTURE = {
    "arrival_s": np.arange(0.0, 200.0, 0.2),
    "prompt_tokens": np.full(1000, 900),
    "output_tokens": np.full(1000, 200),
    "class_index": np.arange(1000) % 2,
}
RULES = sorted(name for name, policy in POLICIES.items() if "NAME" in vars(policy) and name != "learned")


def build(name: str, **knobs: object):
    return make_policy(name, **(FUTURE if name == "oracle" else {}), **knobs)


@pytest.fixture
def three_pools(make_spec):
    return make_spec("interactive", "mixed", "batch", classes=(CHAT, JOBS), pool={"max_replicas": 20})


def random_state(spec, rng: np.random.Generator, time_s: float, missing: float) -> FleetState:
    pools = rng.uniform(0.0, 30.0, (len(spec.pools), len(fields(PoolTelemetry)))).round()
    classes = rng.uniform(0.0, 30.0, (len(spec.classes), len(fields(ClassTelemetry)))).round()
    pools[rng.random(pools.shape) < missing] = np.nan
    classes[rng.random(classes.shape) < missing] = np.nan
    return FleetState(
        np.float64(time_s), np.float64(10.0), PoolTelemetry.from_matrix(pools), ClassTelemetry.from_matrix(classes)
    )


def run(policy, spec, seed: int, missing: float = 0.2, steps: int = 30) -> list[ScalingDecision]:
    rng = np.random.default_rng(seed)
    policy.reset(spec)
    return [policy.decide(random_state(spec, rng, 10.0 * k, missing)) for k in range(steps)]


def same(left: list[ScalingDecision], right: list[ScalingDecision]) -> bool:
    names = [field.name for field in fields(ScalingDecision)]
    pairs = zip(left, right, strict=True)
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in names)


@pytest.mark.parametrize("name", RULES)
class TestEveryPolicy:
    def test_declares_itself(self, name):
        policy = policy_class(name)
        assert name == policy.NAME
        assert policy.SOURCE
        assert policy.READS
        assert policy.RULE
        assert policy.KNOB.name in policy.knob_names()
        assert list(policy.KNOB.sweep) == sorted(policy.KNOB.sweep)
        assert policy.__doc__

    def test_every_sweep_value_is_accepted_and_named(self, name):
        knob = policy_class(name).KNOB
        names = {build(name, **{knob.name: value}).name for value in knob.sweep}
        assert len(names) == len(knob.sweep)

    @pytest.mark.parametrize("missing", [0.0, 0.3, 1.0])
    def test_decisions_fit_the_fleet(self, name, three_pools, missing):
        for seed in range(5):
            for decision in run(build(name), three_pools, seed, missing):
                assert decision.target_replicas.shape == (3,)
                assert decision.target_replicas.dtype == np.int64
                assert (decision.target_replicas >= three_pools.min_replicas).all()
                assert (decision.target_replicas <= three_pools.max_replicas).all()
                assert decision.max_batch_size.shape == (3,)
                assert decision.max_batch_size.dtype == np.int64
                assert (decision.max_batch_size >= 1).all()
                assert (decision.max_batch_size <= three_pools.batch_limits).all()
                assert decision.admission.shape == (2,)
                assert decision.admission.dtype == np.float64
                assert np.isinf(decision.admission).all()

    def test_same_observations_same_decisions_and_reset_forgets(self, name, three_pools):
        policy = build(name)
        first = run(policy, three_pools, seed=1)
        run(policy, three_pools, seed=2)
        assert same(run(policy, three_pools, seed=1), first)
        assert same(run(build(name), three_pools, seed=1), first)

    def test_decisions_are_not_shared(self, name, three_pools):
        policy = build(name)
        policy.reset(three_pools)
        state = random_state(three_pools, np.random.default_rng(0), 0.0, 0.0)
        first = policy.decide(state)
        kept = first.target_replicas.copy()
        policy.decide(state).target_replicas[:] = 99
        policy.decide(state).max_batch_size[:] = 99
        assert np.array_equal(first.target_replicas, kept)

    def test_early_refusal_and_batch_cap_reach_the_decision(self, name, three_pools):
        for decision in run(build(name, admission=1.0, batch_cap=17), three_pools, seed=3):
            assert decision.admission.tolist() == [1.0, 1.0]
            assert (decision.max_batch_size <= 17).all()

    def test_least_replicas_are_kept_whatever_the_rule_says(self, name, three_pools):
        least = int(three_pools.max_replicas.min())
        for asked in (least, least - 0.5):  # of half a replica a whole one
            for decision in run(build(name, least_replicas=asked), three_pools, seed=3):
                assert (decision.target_replicas >= least).all()

    def test_total_blindness_is_not_idleness(self, name, three_pools, make_state):
        if name in ("static", "oracle"):
            pytest.skip("reads no telemetry")
        policy = build(name)
        policy.reset(three_pools)
        busy = {"arrivals_per_s": 10.0, "arrived_prompt_tokens_per_s": 9000.0, "queue_length": 50, "oldest_wait_s": 5}
        busy |= {
            "running": 40,
            "in_flight": 40,
            "in_flight_interactive": 40,
            "busy_interactive": 2,
            "class_in_flight": 40,
        }
        target = np.array([3, 3, 3])
        for k in range(3):
            state = make_state(three_pools, time_s=10.0 * k, ready=target, **busy)
            target = policy.decide(state).target_replicas
        nothing = {field.name: np.nan for field in fields(PoolTelemetry)}
        nothing |= {f"class_{field.name}": np.nan for field in fields(ClassTelemetry)}
        for k in range(3, 60):
            blind = policy.decide(make_state(three_pools, time_s=10.0 * k, **nothing)).target_replicas
            assert (blind >= target).all()

    def test_deciding_before_reset_is_our_own_bug(self, name, three_pools):
        state = random_state(three_pools, np.random.default_rng(0), 0.0, 0.0)
        with pytest.raises(RuntimeError, match=r"before reset"):
            build(name).decide(state)

    @pytest.mark.parametrize("admission", [-1.0, float("nan"), "1"])
    def test_bad_admission_is_refused(self, name, admission):
        with pytest.raises(SpecError, match=r"admission=.* must be a (finite )?number"):
            build(name, admission=admission)


@pytest.mark.parametrize("name", RULES)
def test_knobs_refuse_nonsense(name):
    with pytest.raises(SpecError, match=f"policy '{name}'.*must be"):
        build(name, **{policy_class(name).KNOB.name: -0.5})


@pytest.mark.parametrize("name", POLICIES)
def test_a_knob_of_the_wrong_kind_is_one_clear_line(name):
    """Text, a list or nothing for a number, a number for text: refused at one gate, before any file is read."""
    given = {"learned": {"path": "nowhere"}, "oracle": FUTURE}.get(name, {})
    for knob, parameter in signature(policy_class(name)).parameters.items():
        wrong = ("abc", [1.0], *([] if parameter.default is None else [None]))
        if knob == "path" or isinstance(parameter.default, str):
            wrong = (3.0,)
        elif knob in CONSTANTS:
            wrong = ("abc", {"a": 1.0})  # several by price may be a list
        elif parameter.default is Parameter.empty:
            continue  # a column of a workload
        kinds = "(a number|a number, or several by price|text)"
        for value in wrong:
            with pytest.raises(SpecError, match=rf"policy '{name}': {knob}=.* it must be {kinds}$") as caught:
                make_policy(name, **{**given, knob: value})
            assert "\n" not in str(caught.value)


def test_names_carry_changed_knobs():
    assert make_policy("hpa").name == "hpa"
    assert make_policy("hpa", target=20, admission=1.0).name == "hpa(admission=1, target=20)"
    assert make_policy("headroom", headroom=1.5).name == "headroom"
    assert make_policy("static", replicas={"a": 2}).name == "static(replicas={'a': 2})"


def test_unknown_policy_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown policy 'chiron-robst'; did you mean 'chiron-robust'\?"):
        make_policy("chiron-robst")


def test_unknown_knob_suggests_the_nearest():
    with pytest.raises(SpecError, match=r"policy 'hpa' has no knob 'taget'; did you mean 'target'\?; knobs: admission"):
        make_policy("hpa", taget=40)


def test_missing_required_knobs_are_named():
    with pytest.raises(SpecError, match=r"needs arrival_s, prompt_tokens, output_tokens, class_index"):
        make_policy("oracle")


@given(knob=st.text(min_size=1, max_size=12))
def test_private_fields_are_no_knobs(knob):
    for name in RULES:
        if knob not in policy_class(name).knob_names():
            with pytest.raises(SpecError, match=r"has no knob"):
                make_policy(name, **{knob: 1})


def test_policy_page_describes_every_policy(repository):
    page = (repository / "docs" / "policies.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([a-z-]+)` \|", page, flags=re.MULTILINE))
    assert rows >= set(RULES)
    for name in RULES:
        row = re.search(rf"^\| `{name}` \|.*$", page, flags=re.MULTILINE)
        assert row is not None
        assert f"`{policy_class(name).KNOB.name}`" in row.group()
