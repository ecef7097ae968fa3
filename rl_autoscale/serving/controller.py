"""The controller: once per control step from telemetry to a safe decision, with a reason for everything.

    look -> judge -> policy (time budget) or rule -> shield -> cool-downs, owner, crash loops, budget -> apply -> log

What decides when something is wrong, from mild to severe:

- the policy fails, is late, answers nonsense or sees what it was not trained on: the warm rule decides this step, and
  after some such steps the breaker opens and the rule decides until the policy has behaved for a while;
- telemetry of a pool is missing or old: its targets are held; later the rule may add replicas, nothing is removed;
- the gateway is silent: nothing is removed, for it may still be sending requests to what would leave;
- a pool's replicas crash as they start: it does not grow; someone else scales it: it is left alone;
- a pool that was to shrink is held, or still drains: what was to grow into its GPUs waits for them;
- calls fail: tried again with growing pauses; targets are absolute, so trying again is harmless.

A restart holds what it finds, and treats all cool-downs as just fired.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rl_autoscale.agents.envelope import Envelope
from rl_autoscale.fleet.protocols import Fleet, Policy
from rl_autoscale.fleet.shield import Shield
from rl_autoscale.fleet.spec import IntArray, ShieldSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, FleetState, FloatArray, ScalingDecision
from rl_autoscale.serving.budget import Caller, OutOfTimeError, ThreadCaller
from rl_autoscale.serving.dial import Dial
from rl_autoscale.serving.live_fleet import TelemetryReport
from rl_autoscale.serving.modes import Mode, ModeSwitch
from rl_autoscale.serving.protocols import BackendError, Clock
from rl_autoscale.serving.safety import (
    Actuation,
    Breaker,
    CoolDowns,
    Fault,
    Owner,
    SafetyConfig,
    Verdict,
    check_decision,
    is_override,
    judge,
)
from rl_autoscale.serving.step_record import Source, StepRecord
from rl_autoscale.serving.telemetry import Limits

_GAP_INTERVALS = 3.0


class ControlledFleet(Fleet, Protocol):
    """A fleet that can say how it knows and what it could not do; `LiveFleet` is one."""

    @property
    def report(self) -> TelemetryReport:
        """What stands behind the last observation."""
        ...

    def apply(self, decision: ScalingDecision, leave: Collection[str] = ()) -> None:
        """As `Fleet.apply`, without calling the back ends of some pools."""
        ...

    @property
    def apply_failures(self) -> Mapping[str, BackendError]:
        """What the last `apply` could not do."""
        ...


Listener = Callable[[StepRecord], None]


class Controller:
    """Drives a fleet with a policy that nobody has to trust.

    Args:
        fleet: the live fleet.
        policy: None when it could not be loaded: the rule decides and every record says so.
        fallback: the rule; it sees every observation, so it is warm when it is needed.
        shield: the same limits as in training.
        limits: when telemetry is too old; the fleet's own.
        safety: see `SafetyConfig`.
        modes: whether it may act.
        clock: monotonic for decisions, wall for the log.
        envelope: where the policy was trained; None switches the check off.
        shared_pools: whose targets somebody else writes by our figure (an HPA, KEDA): their lag is no quarrel.
        policy_error: why ``policy`` is None.
        listeners: called with every record: log, metrics, status page.
        caller: runs the policy under its time budget.
        dial: asked each step whether the policy is to go on with other knobs; None for never.
    """

    def __init__(
        self,
        fleet: ControlledFleet,
        policy: Policy | None,
        fallback: Policy,
        shield: ShieldSpec,
        limits: Limits,
        safety: SafetyConfig,
        modes: ModeSwitch,
        clock: Clock,
        *,
        envelope: Envelope | None = None,
        shared_pools: Collection[str] = (),
        policy_error: str = "",
        listeners: Sequence[Listener] = (),
        caller: Caller | None = None,
        dial: Dial | None = None,
    ) -> None:
        self._fleet, self._policy, self._fallback = fleet, policy, fallback
        self._limits, self._safety, self._modes, self._clock = limits, safety, modes, clock
        self._envelope = envelope
        self._shared = frozenset(shared_pools)
        self._listeners = list(listeners)
        self._caller = caller or ThreadCaller()
        self._dial = dial
        spec = self.spec = fleet.spec
        self._shield = Shield(spec, shield)
        self._fallback.reset(spec)
        self._policy_error = policy_error
        if policy is not None:
            policy.reset(spec)
        self.breaker = Breaker(safety)
        self._owner = Owner(safety.manual_hold_s)
        self._actuation = [Actuation() for _ in spec.pools]
        now_s = clock.monotonic_s()
        self._cool_downs = CoolDowns(len(spec.pools), safety, now_s)
        self._in_flight: IntArray | None = None  # of classes, in force: no gateway reports them
        self._selectivity: FloatArray | None = None  # likewise
        self._standing = self._current(fleet.observe(), spec.initial_replicas)
        self._shield.prime(self._standing)
        self._blind_since_s = np.full(len(spec.pools), np.nan)
        self._step = 0

    def add_listener(self, listener: Listener) -> None:
        """Call it with every record from now on."""
        self._listeners.append(listener)

    def run(self, max_steps: int | None = None) -> None:
        """Step until the fleet says it is over, or so many times."""
        while True:
            self.step()
            if (max_steps is not None and self._step >= max_steps) or not self._fleet.advance():
                return

    def step(self) -> StepRecord:
        """Take one decision on the present observation, and apply it if allowed."""
        started_s = self._clock.monotonic_s()
        state, report = self._fleet.observe(), self._fleet.report
        mode, mode_reason = self._modes.current()
        reasons: list[str] = []
        if self._dial is not None and self._policy is not None:
            reasons += self._dial.turn(self._policy)
        self._standing = current = self._current(state, self._standing)
        self._notice_gap(state, current, started_s, reasons)
        verdict = judge(state, report, self.spec, self._limits.stale_after_s, self._limits.min_coverage)
        self._time_blindness(verdict, started_s)
        proposal, faults, outside = self._ask_policy(state, verdict, reasons)
        rule = self._ask_rule(state, reasons)
        source, raw = self._choose(state, current, verdict, proposal, rule, faults, started_s, reasons)
        raw = self._with_limits(source, raw)
        shielded = self._shield.clip(raw, state)
        final, leave = self._restrain(shielded, state, report, current, mode, started_s, reasons)
        overridden = source == "policy" and is_override(raw, self.spec)
        failures = self._act(final, leave, current, started_s) if mode == "active" else {}
        faults += ["actuator"] * bool(failures)
        self.breaker.record(faults, overridden=overridden if source == "policy" else None)
        self._step += 1
        record = StepRecord(
            pool_names=self.spec.pool_names,
            class_names=self.spec.class_names,
            step=self._step,
            wall_s=self._clock.wall_s(),
            time_s=float(state.time_s),
            mode=mode,
            mode_reason=mode_reason,
            source=source,
            reasons=(*reasons, *verdict.reasons),
            faults=tuple(faults),
            state=state,
            report=report,
            current=current,
            raw=raw,
            shielded=shielded,
            final=final,
            applied=mode == "active",
            failures=failures,
            overridden=overridden,
            outside=outside,
            breaker=self.breaker.open_reason,
            latency_s=self._clock.monotonic_s() - started_s,
        )
        for listener in self._listeners:
            listener(record)
        return record

    # -- proposals ---------------------------------------------------------------------------------------------------

    def _ask_policy(
        self, state: FleetState, verdict: Verdict, reasons: list[str]
    ) -> tuple[ScalingDecision | None, list[Fault], tuple[str, ...]]:
        """Its answer, what is wrong with it, and the features outside its training; it is asked even while distrusted.

        A policy remembers what it has seen, so leaving it out for a while would make it worse.
        """
        faults: list[Fault] = ["stale"] if verdict.blind.any() else []
        policy = self._policy
        if policy is None:
            reasons.append(f"no policy: {self._policy_error or 'none given'}")
            return None, [*faults, "error"], ()
        try:
            proposal: ScalingDecision = self._caller(lambda: policy.decide(state), self._safety.policy_time_budget_s)
            wrong = check_decision(proposal, self.spec)
        except OutOfTimeError as error:
            reasons.append(f"policy late: {error}")
            return None, [*faults, "timeout"], ()
        except Exception as error:  # whatever a policy raises, the fleet must be controlled
            reasons.append(f"policy failed: {type(error).__name__}: {error}")
            return None, [*faults, "error"], ()
        if wrong is not None:
            reasons.append(f"policy answered nonsense: {wrong}")
            return None, [*faults, "invalid"], ()
        outside = self._outside(policy)
        if self._envelope is not None and len(outside) > self._envelope.usually_outside:
            reasons.append(f"{len(outside)} features outside training: {', '.join(outside[:5])}")
            faults.append("envelope")
        return proposal, faults, outside

    def _outside(self, policy: Policy) -> tuple[str, ...]:
        seen: npt.NDArray[np.floating] | None = getattr(policy, "last_observation", None)
        return self._envelope.outside(seen) if self._envelope is not None and seen is not None else ()

    def _ask_rule(self, state: FleetState, reasons: list[str]) -> ScalingDecision | None:
        try:
            rule = self._fallback.decide(state)
            wrong = check_decision(rule, self.spec)
        except Exception as error:  # the last line before "hold"
            reasons.append(f"rule failed: {type(error).__name__}: {error}")
            return None
        if wrong is not None:
            reasons.append(f"rule answered nonsense: {wrong}")
        return None if wrong is not None else rule

    def _choose(
        self,
        state: FleetState,
        current: IntArray,
        verdict: Verdict,
        proposal: ScalingDecision | None,
        rule: ScalingDecision | None,
        faults: Sequence[Fault],
        now_s: float,
        reasons: list[str],
    ) -> tuple[Source, ScalingDecision]:
        """Policy, rule or hold; blind pools never shrink, and do not grow before the hold is over."""
        if proposal is not None and not faults and not self.breaker.is_open:
            return "policy", proposal
        if self.breaker.is_open:
            reasons.append(f"breaker open: {self.breaker.open_reason}")
        held = self._hold(state, current)
        if rule is None:
            return "hold", held
        if not verdict.blind.any():
            return "rule", rule
        waited = now_s - self._blind_since_s >= self._safety.blind_hold_s
        grown = np.maximum(rule.target_replicas, current)
        blind_target = np.where(waited, grown, current)
        reasons += [
            f"{self.spec.pool_names[p]}: blind for {now_s - self._blind_since_s[p]:.0f} s, "
            + ("may grow, not shrink" if waited[p] else "held")
            for p in np.flatnonzero(verdict.blind)
        ]
        target = np.where(verdict.blind, blind_target, rule.target_replicas)
        caps = np.where(verdict.blind, held.max_batch_size, rule.max_batch_size)
        source: Source = "hold" if np.array_equal(target, current) else "rule"
        if verdict.blind.all():
            return source, replace(held, target_replicas=target, max_batch_size=caps)
        return source, replace(rule, target_replicas=target, max_batch_size=caps)

    def _with_limits(self, source: Source, decision: ScalingDecision) -> ScalingDecision:
        """Who is in charge and says nothing of limits on classes lifts them; who stands in for a step leaves them.

        A step without a limit would send all batch work that is held at once, and what is sent is not taken back.
        Likewise of how refusal weighs requests.
        """
        in_charge = source == "policy" or (source == "rule" and self.breaker.is_open)
        limits, selectivity = decision.max_in_flight, decision.selectivity
        if limits is None:
            limits = decision.in_flight_limits if in_charge else self._in_flight
        if selectivity is None:
            selectivity = decision.selectivities if in_charge else self._selectivity
        return replace(decision, max_in_flight=limits, selectivity=selectivity)

    def _hold(self, state: FleetState, current: IntArray) -> ScalingDecision:
        """What is in force now; where that is unknown, no limit."""
        caps = np.where(np.isnan(state.pools.batch_cap), self.spec.batch_limits, state.pools.batch_cap)
        admission = np.where(np.isnan(state.classes.admission), NEVER_REFUSE, state.classes.admission)
        batch = np.maximum(caps, 1).astype(np.int64)
        return ScalingDecision(current.copy(), batch, admission, self._in_flight, self._selectivity)

    # -- restraint ---------------------------------------------------------------------------------------------------

    def _restrain(
        self,
        shielded: ScalingDecision,
        state: FleetState,
        report: TelemetryReport,
        current: IntArray,
        mode: Mode,
        now_s: float,
        reasons: list[str],
    ) -> tuple[ScalingDecision, set[str]]:
        """Cool-downs, crash loops, other owners and failing back ends: each can only hold a pool where it is.

        What the shield let grow into the GPUs of a pool that is held, drains or may fail to shrink waits for them.

        Returns:
            The decision, and the pools whose back end is not to be called at all.
        """
        names, wanted = self.spec.pool_names, shielded.target_replicas
        leave: set[str] = set()
        target = self._cool_downs.limit(wanted, current, now_s)
        reasons += [f"{names[p]}: cooling down" for p in np.flatnonzero(target != wanted)]
        if not report.gateway_reached and (target < current).any():
            reasons.append("gateway not reached: nothing leaves while it cannot be told where not to send")
            target = np.maximum(target, current)
        for p, name in enumerate(names):
            num_failed = len(report.failed.get(name, ()))
            if num_failed >= self._safety.crash_loop_failures:
                reasons.append(f"{name}: {num_failed} replicas failed ({report.failed[name][-1]}); not growing")
                target[p] = min(target[p], current[p])
            if np.isnan(state.pools.asked_for[p]):  # no failed call: it is written to as soon as it can be read
                reasons.append(f"{name}: its present target cannot be read; left as it is")
                leave.add(name)
                target[p] = current[p]
            if mode != "active":
                continue
            foreign = None if name in self._shared else self._owner.look(p, float(state.pools.asked_for[p]), now_s)
            if foreign is not None:
                reasons.append(f"{name}: {foreign}")
            if self._owner.hands_off(p, now_s):
                reasons.append(f"{name}: left alone after someone else's change")
                leave.add(name)
            if now_s < self._actuation[p].not_before_s:
                reasons.append(f"{name}: {self._actuation[p].num_failed} calls failed; waiting to try again")
                leave.add(name)
            if name in leave:
                target[p] = current[p]
        draining = np.nan_to_num(state.pools.draining).astype(np.int64)
        allowed = self._shield.within_budget(target, current, current + draining)
        reasons += [f"{names[p]}: no free GPUs in the budget yet" for p in np.flatnonzero(allowed != target)]
        return replace(shielded, target_replicas=allowed), leave

    def _act(self, final: ScalingDecision, leave: set[str], current: IntArray, now_s: float) -> dict[str, str]:
        self._fleet.apply(final, leave)
        self._in_flight, self._selectivity = final.max_in_flight, final.selectivity
        failures = self._fleet.apply_failures
        accepted = final.target_replicas.copy()
        for p, name in enumerate(self.spec.pool_names):
            target = int(final.target_replicas[p])
            if name in failures:
                accepted[p] = current[p]
                retryable = failures[name].retryable
                self._owner.attempted(p, target)
                self._actuation[p].failed(
                    now_s, self.spec.control_interval_s, self._safety.max_actuator_backoff_s, retryable=retryable
                )
            elif name not in leave:
                self._owner.applied(p, target)
                self._actuation[p].succeeded()
        self._cool_downs.changed(current, accepted, now_s)
        return {name: str(error) for name, error in failures.items()}

    # -- memory ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _current(state: FleetState, known: IntArray) -> IntArray:
        """Targets in force; where they cannot be read, the last that could."""
        asked_for = state.pools.asked_for
        return np.where(np.isnan(asked_for), known, np.nan_to_num(asked_for)).astype(np.int64)

    def _notice_gap(self, state: FleetState, current: IntArray, now_s: float, reasons: list[str]) -> None:
        """A process that was suspended knows as little as one that was restarted."""
        if float(state.window_s) > _GAP_INTERVALS * self.spec.control_interval_s:
            reasons.append(f"{float(state.window_s):.0f} s since the last look: cool-downs start again")
            self._cool_downs.restart(now_s)
            self._shield.prime(current)

    def _time_blindness(self, verdict: Verdict, now_s: float) -> None:
        began = np.where(np.isnan(self._blind_since_s), now_s, self._blind_since_s)
        self._blind_since_s = np.where(verdict.blind, began, np.nan)
