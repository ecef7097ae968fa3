"""The exported policy as a `Policy`: ONNX Runtime, the training's own encoder and decoder, and one dial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from rl_autoscale.agents.base import Knob, RegisteredPolicy
from rl_autoscale.agents.dials import Dials
from rl_autoscale.agents.error_budget import check_attainment
from rl_autoscale.agents.export import MISS_SHARE
from rl_autoscale.agents.policy_file import check_schema, constants_of, load_network, read_card
from rl_autoscale.agents.pretrained import policy_folder
from rl_autoscale.envs.action import ActionDecoder
from rl_autoscale.envs.constants import CONSTANTS, ByPrice
from rl_autoscale.envs.observation import ObservationEncoder, price_feature
from rl_autoscale.envs.reward import LEAST_WEIGHT
from rl_autoscale.envs.schema import Schema
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, FleetState, FloatArray, ScalingDecision


class LearnedPolicy(RegisteredPolicy):
    """A trained policy at one setting of its dial.

    Args:
        path: the exported policy's folder, or its card, or ``pretrained/NAME``.
        miss_price: what an SLO miss costs (envs/reward.py); higher holds more replicas for a higher attainment.
        admission: None lets the policy decide how strict early refusal is; inf switches refusal off.
        attainment: asked share of requests that meet their SLOs, of all together or by class. The dial then begins at
            the price at which the policy delivered it on validation traffic (its card); its miss forecast, if it has
            one, and the error budget turn it.
        forecast: whether the miss forecast may; without it the error budget alone turns the dial.
        miss_weight: by class, what its misses cost over those of the dearest class; 1 of a class that is not named.
        hysteresis: share of the replicas wanted that a pool may have more of before it gives any back
            (envs/constants.py), one number or several by price; None for what it was trained with.
        selectivity: how much more readily requests of much work are refused, likewise; 0 treats all alike.
        cap_share: requests in flight per replica over what the load allows, likewise.
        found_share, least_replicas: what a pool keeps at least, likewise.
    """

    NAME: ClassVar[str] = "learned"
    READS: ClassVar[str] = "all of FleetState, through envs/observation.py"
    RULE: ClassVar[str] = (
        "a network maps features to headroom and floor per pool, refusal strictness per class and, in fleets of "
        "several pools or classes, a batch cap per pool"
    )
    SOURCE: ClassVar[str] = (
        "PPO (Schulman et al., arXiv 1707.06347) in Stable-Baselines3, trained by 'rl-autoscale train'"
    )
    KNOB: ClassVar[Knob | None] = Knob(
        "miss_price", (2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 110.0), "ideal bills per unit of missed share"
    )

    def __init__(
        self,
        path: str | Path,
        miss_price: float = 20.0,
        admission: float | None = None,
        attainment: float | Mapping[str, float] | None = None,
        forecast: bool = True,
        miss_weight: Mapping[str, float] | None = None,
        hysteresis: ByPrice | None = None,
        selectivity: ByPrice | None = None,
        cap_share: ByPrice | None = None,
        found_share: ByPrice | None = None,
        least_replicas: ByPrice | None = None,
    ) -> None:
        if not (np.isfinite(miss_price) and miss_price > 0):
            raise SpecError(f"policy 'learned': miss_price={miss_price} is not allowed; it must be a finite number > 0")
        if admission is not None and not admission >= 0:
            raise SpecError(f"policy 'learned': admission={admission} is not allowed; it must be at least 0, or inf")
        if forecast not in (True, False):
            raise SpecError(f"policy 'learned': forecast={forecast!r} is not allowed; it must be true or false")
        self._path = policy_folder(path)
        self.miss_price = float(miss_price)
        self.admission = admission
        self.card = read_card(self._path)
        self._session = load_network(self._path, self.card)
        self.attainment = attainment
        for share in attainment.values() if isinstance(attainment, Mapping) else (attainment,):
            if share is not None:
                check_attainment(self.NAME, share)
        if miss_weight is not None and isinstance(attainment, Mapping):
            raise SpecError("policy 'learned': attainment by class finds miss_weight; give one of the two")
        asked = zip(CONSTANTS, (hysteresis, selectivity, cap_share, found_share, least_replicas), strict=True)
        given = {name: value for name, value in asked if value is not None}
        try:
            self.constants = constants_of(self.card | given)
        except SpecError as error:
            raise SpecError(f"policy 'learned': {error}") from None
        self.selectivity = float(self.constants.at(self.miss_price).selectivity)  # what the fallback rule takes over
        self.miss_weight = _checked_weights(miss_weight)
        self._forecasts = bool(forecast and self.card.get("dial") and self.card.get("miss_forecast"))
        self._dials: Dials | None = None
        self._weight: FloatArray = np.ones(0)
        self._spec: FleetSpec | None = None
        self._encoder: ObservationEncoder | None = None
        self._decoder: ActionDecoder | None = None
        self.last_observation: npt.NDArray[np.float32] | None = None
        """What the network saw last, shape (num_features,); a live controller checks it against the card's envelope."""

    @property
    def name(self) -> str:
        """The registered name with the dial's setting."""
        closed = "" if self.admission is None else f", admission={self.admission:g}"
        theirs = constants_of(self.card)
        for name in CONSTANTS:
            if (value := getattr(self.constants, name)) != getattr(theirs, name):
                closed += f", {name}={value:g}" if isinstance(value, float) else f", {name}={value}"
        if self.attainment is None:
            dial = f"miss_price={self.miss_price:g}" + _by_class(", miss_weight", self.miss_weight)
        elif isinstance(self.attainment, Mapping):
            dial = _by_class("attainment", self.attainment)
        else:
            dial = f"attainment={self.attainment:g}" + _by_class(", miss_weight", self.miss_weight)
        return f"learned({dial}{closed})"

    @property
    def usual_admission(self) -> float:
        """The knob; without one, 1 if refusing was part of its training, else never."""
        if self.admission is not None:
            return float(self.admission)
        return 1.0 if self.card["refuse"] else NEVER_REFUSE

    def turn(self, knobs: Mapping[str, object]) -> None:
        """Another price, attainment or weights; the averages of demand stay, the error budget begins anew.

        Raises:
            SpecError: another knob differs too, or a value is not allowed.
        """
        path = policy_folder(str(knobs.get("path", self._path)))
        turned = LearnedPolicy(path, **{name: knobs[name] for name in knobs if name != "path"})  # type: ignore[arg-type]
        differ = [name for name in ("_path", "admission", "_forecasts") if getattr(self, name) != getattr(turned, name)]
        differ += [name for name in CONSTANTS if getattr(self.constants, name) != getattr(turned.constants, name)]
        if changed := [name.strip("_") for name in differ]:
            raise SpecError(f"policy 'learned': {', '.join(changed)} cannot change while it runs; restart for that")
        dial = ("miss_price", "attainment", "miss_weight")
        if all(getattr(self, name) == getattr(turned, name) for name in dial):
            return
        if self._spec is not None:
            turned._set_dial(self._spec)
            self._weight, self._dials = turned._weight, turned._dials
        for name in dial:
            setattr(self, name, getattr(turned, name))

    def reset(self, spec: FleetSpec) -> None:
        """Prepare for a fleet.

        Raises:
            PolicyFileError: the policy was trained for another schema.
            SpecError: a knob names a class that the fleet has not, or leaves one out.
        """
        schema = Schema.of(spec)
        check_schema(self.card, schema, self._path)
        self._encoder = ObservationEncoder(spec)
        self._decoder = ActionDecoder(spec, refuse=bool(self.card["refuse"]))
        self._price_column = schema.features.index("miss_price")
        self._weight_columns = [k for k, name in enumerate(schema.features) if name.endswith(".miss_weight")]
        self._set_dial(spec)
        self._spec = spec

    def _set_dial(self, spec: FleetSpec) -> None:
        """The weights of classes, and what finds the price where an attainment is asked for."""
        names = [item.name for item in spec.classes]
        self._check_names("miss_weight", self.miss_weight, names)
        if self.miss_weight and max(self.miss_weight.get(name, 1.0) for name in names) < 1.0:
            raise SpecError(
                "policy 'learned': miss_weight leaves no class at 1; weights are over that of the dearest class"
            )
        weight = np.array([self.miss_weight.get(name, 1.0) for name in names])
        if self.attainment is None:
            self._weight, self._dials = weight, None
            return
        asked: float | list[float]
        if isinstance(self.attainment, Mapping):
            self._check_names("attainment", self.attainment, names)
            if left_out := [name for name in names if name not in self.attainment]:
                raise SpecError(
                    f"policy 'learned': attainment of {', '.join(left_out)} is missing; give every class one"
                )
            asked = [float(self.attainment[name]) for name in names]
        else:
            asked = float(self.attainment)
        low, high = self.card["miss_price_range"]
        layout = Schema.of(spec).layout[len(spec.pools) :]
        self._dials = Dials(self.card.get("dial", ()), asked, layout, (low, high), self.miss_price)
        self._weight = weight

    def _check_names(self, knob: str, given: Mapping[str, float], names: Sequence[str]) -> None:
        if unknown := [name for name in given if name not in names]:
            raise SpecError(
                f"policy 'learned': {knob} names {', '.join(unknown)}; the classes of this fleet: {', '.join(names)}"
            )

    def run_network(self, observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Actions in [-1, 1], shape (batch, num_actions), of observations of shape (batch, num_features)."""
        return np.asarray(self._session.run(["action"], {"observation": observations})[0])

    def forecast_misses(
        self, observation: npt.NDArray[np.float32], miss_price: FloatArray, miss_weight: FloatArray
    ) -> FloatArray:
        """Share of the requests of the next minutes that will miss, by class, at each price, for one observation.

        Args:
            observation: shape (num_features,).
            miss_price: shape (num_prices,).
            miss_weight: shape (num_prices, num_classes).

        Returns:
            Shape (num_prices, num_classes).
        """
        rows = np.repeat(observation[None], len(miss_price), axis=0)
        rows[:, self._price_column] = price_feature(miss_price)
        if self._weight_columns:
            rows[:, self._weight_columns] = price_feature(miss_weight)
        return np.asarray(self._session.run([MISS_SHARE], {"observation": rows})[0], dtype=np.float64)

    def price_now(self, state: FleetState, observation: npt.NDArray[np.float32]) -> tuple[float, FloatArray]:
        """The dial's setting: fixed, or what should deliver the asked attainment, corrected by the error budget.

        Args:
            state: the observation.
            observation: its features, shape (num_features,).

        Returns:
            ``miss_price``, and ``miss_weight`` of shape (num_classes,).
        """
        if self._dials is None:
            return self.miss_price, self._weight

        def forecast(miss_price: FloatArray, miss_weight: FloatArray) -> FloatArray:
            return self.forecast_misses(observation, miss_price, miss_weight * self._weight)

        price, weight = self._dials.turn(state, forecast if self._forecasts else None)
        return price, np.maximum(weight * self._weight, LEAST_WEIGHT)

    def decide(self, state: FleetState) -> ScalingDecision:
        """Encode, turn the dial, run the network, decode."""
        if self._encoder is None or self._decoder is None:
            raise RuntimeError("policy 'learned' was asked to decide before reset(spec)")
        features = self._encoder.encode(state, self.miss_price, self._weight)
        price, weight = self.price_now(state, features)
        features[self._price_column] = price_feature(price)
        if self._weight_columns:
            features[self._weight_columns] = price_feature(weight)
        self.last_observation = features
        action = self.run_network(features[None])[0]
        decision = self._decoder.decode(action, self._encoder.anchors(), state, self.constants.at(price))
        if self.admission is None:
            return decision
        return replace(decision, admission=np.full_like(decision.admission, self.admission))


def _by_class(knob: str, values: Mapping[str, float]) -> str:
    return f"{knob}=" + " ".join(f"{name}:{value:g}" for name, value in values.items()) if values else ""


def _checked_weights(miss_weight: Mapping[str, float] | None) -> dict[str, float]:
    if miss_weight is not None and not isinstance(miss_weight, Mapping):
        raise SpecError(f"policy 'learned': miss_weight={miss_weight!r} is not allowed; give one by class")
    for name, weight in (miss_weight or {}).items():
        if not (isinstance(weight, Real) and LEAST_WEIGHT <= weight <= 1.0):
            raise SpecError(
                f"policy 'learned': miss_weight.{name}={weight!r} is not allowed; it must be {LEAST_WEIGHT:g} to 1"
            )
    return dict(miss_weight or {})
