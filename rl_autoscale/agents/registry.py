"""Every policy by name. A new one: write its file, add its line here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from rl_autoscale.agents.apa import ApaPolicy
from rl_autoscale.agents.base import RegisteredPolicy
from rl_autoscale.agents.chiron import ChironLiteralPolicy, ChironRobustPolicy, ChironTunedPolicy
from rl_autoscale.agents.clipper import ClipperPolicy
from rl_autoscale.agents.cocktail import CocktailPolicy
from rl_autoscale.agents.dynamo import DynamoPolicy
from rl_autoscale.agents.headroom import HeadroomPolicy
from rl_autoscale.agents.headroom_backpressure import HeadroomBackpressurePolicy
from rl_autoscale.agents.headroom_budget import HeadroomBudgetPolicy
from rl_autoscale.agents.headroom_forecast import HeadroomForecastPolicy
from rl_autoscale.agents.hpa import HpaPolicy
from rl_autoscale.agents.infaas import InfaasPolicy
from rl_autoscale.agents.inferline import InferlinePolicy
from rl_autoscale.agents.keda import KedaPolicy
from rl_autoscale.agents.kpa import KpaPolicy
from rl_autoscale.agents.learned import LearnedPolicy
from rl_autoscale.agents.llm_d import LlmdPolicy
from rl_autoscale.agents.llumnix import LlumnixPolicy
from rl_autoscale.agents.oracle import OraclePolicy
from rl_autoscale.agents.pretrained import is_pretrained
from rl_autoscale.agents.qlm import QlmPolicy
from rl_autoscale.agents.ray_serve import RayServePolicy
from rl_autoscale.agents.static import StaticPolicy
from rl_autoscale.fleet.errors import SpecError, UnknownNameError, did_you_mean

POLICIES: dict[str, type[RegisteredPolicy]] = {
    "static": StaticPolicy,
    "headroom": HeadroomPolicy,
    "headroom-backpressure": HeadroomBackpressurePolicy,
    "headroom-budget": HeadroomBudgetPolicy,
    "headroom-forecast": HeadroomForecastPolicy,
    "inferline": InferlinePolicy,
    "clipper": ClipperPolicy,
    "infaas": InfaasPolicy,
    "cocktail": CocktailPolicy,
    "qlm": QlmPolicy,
    "hpa": HpaPolicy,
    "keda": KedaPolicy,
    "kpa": KpaPolicy,
    "apa": ApaPolicy,
    "ray-serve": RayServePolicy,
    "llumnix": LlumnixPolicy,
    "dynamo": DynamoPolicy,
    "llm-d": LlmdPolicy,
    "chiron-literal": ChironLiteralPolicy,
    "chiron-robust": ChironRobustPolicy,
    "chiron-tuned": ChironTunedPolicy,
    "oracle": OraclePolicy,
    "learned": LearnedPolicy,
}


def policy_class(name: str) -> type[RegisteredPolicy]:
    """The class registered under a name; raises UnknownNameError with the nearest name."""
    if name not in POLICIES:
        raise UnknownNameError("policy", name, POLICIES)
    return POLICIES[name]


def make_policy(name: str, **knobs: Any) -> RegisteredPolicy:
    """Make a policy by name.

    Args:
        name: a key of `POLICIES`, or ``pretrained/NAME`` for a policy that ships with the package.
        knobs: its keyword arguments, for example ``make_policy("hpa", target=40, admission=1.0)``.

    Raises:
        UnknownNameError: no policy has that name.
        SpecError: the policy has no such knob, needs one that was not given, or refuses a value.
    """
    if is_pretrained(name):
        return make_policy(LearnedPolicy.NAME, path=name, **knobs)
    chosen = policy_class(name)
    known = chosen.knob_names()
    for knob in knobs:
        if knob not in known:
            suggestion = did_you_mean(knob, known)
            raise SpecError(f"policy '{name}' has no knob '{knob}'{suggestion}; knobs: {', '.join(known)}")
    missing = [knob for knob in chosen.required_knob_names() if knob not in knobs]
    if missing:
        raise SpecError(f"policy '{name}' needs {', '.join(missing)}; give each as a keyword argument")
    for knob, value in knobs.items():
        _check_kind(name, inspect.signature(chosen).parameters[knob], value)
    return chosen(**knobs)


def _check_kind(policy: str, parameter: inspect.Parameter, value: object) -> None:
    """Refuse text for a number and a number for text, as YAML and command lines mix them up.

    Which of the two a knob is, its annotation or its default says; its range is the policy's own to check.
    """
    annotation, optional = str(parameter.annotation), parameter.default is None
    if optional or isinstance(parameter.default, Real):
        per_pool = "Mapping" in annotation and isinstance(value, Mapping)
        by_price = "ByPrice" in annotation and isinstance(value, list | tuple)
        fits = isinstance(value, Real) or (optional and value is None) or per_pool or by_price
        kind = "a number, or several by price" if "ByPrice" in annotation else "a number"
    elif "str" in annotation:
        fits, kind = isinstance(value, str | Path), "text"
    else:
        return  # columns of a workload
    if not fits:
        raise SpecError(f"policy '{policy}': {parameter.name}={value!r} is not allowed; it must be {kind}")
