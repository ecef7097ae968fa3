"""An exported policy on disk: its card, ``policy.json``, and its network, ``policy.onnx``, checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.agents.export import CARD_FORMAT, MISS_SHARE
from rl_autoscale.agents.pretrained import policy_folder
from rl_autoscale.envs.constants import CONSTANTS, Constants
from rl_autoscale.envs.schema import SCHEMA_VERSION, Schema
from rl_autoscale.fleet.errors import PolicyFileError, SpecError

SWEEP_POINTS = 7
LEAST_USEFUL = 0.8
"""Attainment below which nobody would run a fleet, so that a sweep has no point there."""

_REQUIRED = (
    "format", "schema_version", "schema", "layout", "features", "actions", "onnx_sha256", "refuse", "miss_price_range",
)  # fmt: skip


def read_card(path: Path) -> dict[str, Any]:
    """Read and check ``policy.json``.

    Args:
        path: the card, the folder that holds it, or ``pretrained/NAME``.

    Raises:
        PolicyFileError: missing, not JSON, incomplete, or of another format.
        UnknownNameError: no such pre-trained policy.
    """
    path = policy_folder(path)
    card_path = path / "policy.json" if path.is_dir() else path
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolicyFileError(f"{card_path}: no such file; export a policy with 'rl-autoscale export'") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PolicyFileError(f"{card_path}: not a policy card ({error})") from None
    missing = [key for key in _REQUIRED if not isinstance(card, dict) or key not in card]
    if missing:
        raise PolicyFileError(f"{card_path}: not a policy card; missing {', '.join(missing)}")
    if card["format"] != CARD_FORMAT:
        raise PolicyFileError(f"{card_path}: card format {card['format']}, this version reads {CARD_FORMAT}")
    for name in CONSTANTS:
        card.setdefault(name, getattr(Constants(), name))  # cards of before the constant had none
    try:
        constants_of(card)
    except (SpecError, TypeError, ValueError) as error:  # the others where miss_price_range is no pair of numbers
        raise PolicyFileError(f"{card_path}: constants or miss_price_range: {error}; export again") from None
    return dict(card)


def constants_of(card: Mapping[str, Any]) -> Constants:
    """The constants that a card names (envs/constants.py)."""
    low, high = card["miss_price_range"]
    return Constants(**{name: card[name] for name in CONSTANTS}, miss_price=(float(low), float(high)))


def check_schema(card: Mapping[str, Any], schema: Schema, where: object) -> None:
    """Refuse a policy that speaks of other features or actions than a fleet has.

    Args:
        card: of the policy.
        schema: of the fleet.
        where: what the message calls the policy.

    Raises:
        PolicyFileError: of another schema, or of another version of it.
    """
    if card["schema_version"] != SCHEMA_VERSION:
        raise PolicyFileError(
            f"{where}: of schema version {card['schema_version']}, this package reads {SCHEMA_VERSION}, in which "
            "features or actions mean something else; train it anew"
        )
    if card["schema"] != schema.digest:
        raise PolicyFileError(
            f"{where}: trained for schema {card['schema']} ({', '.join(card['layout'])}), "
            f"this fleet has {schema.digest} ({', '.join(schema.layout)}); "
            "train a policy on a scenario with these pools and classes"
        )


def read_network(path: Path, card: dict[str, Any]) -> tuple[Path, bytes]:
    """The network file beside a card and its content, after checking its SHA-256.

    Raises:
        PolicyFileError: missing, or changed since export.
    """
    path = policy_folder(path)
    network_path = (path if path.is_dir() else path.parent) / "policy.onnx"
    try:
        content = network_path.read_bytes()
    except OSError:
        raise PolicyFileError(f"{network_path}: no such file; it belongs beside its card") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != card["onnx_sha256"]:
        raise PolicyFileError(
            f"{network_path}: SHA-256 {digest[:12]}... is not the card's {card['onnx_sha256'][:12]}...; export it again"
        )
    return network_path, content


def load_network(path: Path, card: dict[str, Any]) -> Any:
    """Load the network beside a card into ONNX Runtime, after checking its SHA-256.

    Raises:
        PolicyFileError: missing, changed since export, or not a network of the card's shape.
    """
    import onnxruntime

    network_path, content = read_network(path, card)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own, undocumented exception types
        raise PolicyFileError(f"{network_path}: not a usable ONNX network ({type(error).__name__})") from None
    shape = session.get_inputs()[0].shape, session.get_outputs()[0].shape
    outputs = ["action", MISS_SHARE] if card.get("miss_forecast") else ["action"]
    named = [output.name for output in session.get_outputs()]
    if (shape[0][-1], shape[1][-1]) != (len(card["features"]), len(card["actions"])) or named != outputs:
        raise PolicyFileError(f"{network_path}: network of shape {shape} does not match its card")
    return session


def price_sweep(card: Mapping[str, Any]) -> tuple[float, ...]:
    """Settings of the dial that cover the prices a policy was trained on, evenly in their logarithm.

    Prices below the last one at which it left a fifth of validation traffic without its SLOs are nobody's to want.
    """
    low, high = card["miss_price_range"]
    useless = [point["miss_price"] for point in card.get("dial", ()) if point["slo_attainment"] < LEAST_USEFUL]
    low = max([low, *useless])
    return tuple(float(f"{price:.3g}") for price in np.geomspace(low, high, SWEEP_POINTS))
