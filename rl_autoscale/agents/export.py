"""A trained policy leaves training as two files: ``policy.onnx`` (the network) and ``policy.json`` (its card).

The card holds what is needed to use the network rightly and to distrust it rightly: schema hash, feature and action
names, the network file's SHA-256, the dial's range, where it was trained and what it scored. The network is written
operator by operator (Gemm, Tanh, Clip, Sigmoid), so the file depends on no tracing and holds no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import block_diag

from rl_autoscale import __version__
from rl_autoscale.envs.constants import Constants
from rl_autoscale.envs.reward import PRICE_RANGE
from rl_autoscale.envs.schema import SCHEMA_VERSION, Schema
from rl_autoscale.fleet.errors import MissingExtraError, PolicyFileError

CARD_FORMAT = 1
_OPSET = 17
_IR_VERSION = 8
_NO_SHIFT = np.float32(0.0)

MISS_SHARE = "miss_share"
"""The output of a network's miss forecast."""

Layer = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def onnx_bytes(layers: list[Layer], forecast: list[Layer] | None = None) -> bytes:
    """Serialise a tanh MLP whose output is clipped to [-1, 1], and beside it one whose output is a share.

    Input ``observation`` float32 (batch, num_features); output ``action`` float32 (batch, num_actions) and, with a
    forecast, ``miss_share`` float32 (batch, num_classes) in (0, 1).
    """
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise MissingExtraError("exporting a policy", "train") from error

    nodes: list[Any] = []
    initializers: list[Any] = []

    def append_mlp(layers: list[Layer], prefix: str) -> str:
        value = "observation"
        for k, (weight, bias) in enumerate(layers):
            names = f"{prefix}w{k}", f"{prefix}b{k}"
            initializers.extend(map(numpy_helper.from_array, (weight, bias), names))
            nodes.append(helper.make_node("Gemm", [value, *names], [f"{prefix}z{k}"], transB=1))
            value = f"{prefix}z{k}"
            if k < len(layers) - 1:
                nodes.append(helper.make_node("Tanh", [value], [f"{prefix}h{k}"]))
                value = f"{prefix}h{k}"
        return value

    initializers += [
        numpy_helper.from_array(np.array(-1.0, dtype=np.float32), "low"),
        numpy_helper.from_array(np.array(1.0, dtype=np.float32), "high"),
    ]
    nodes.append(helper.make_node("Clip", [append_mlp(layers, ""), "low", "high"], ["action"]))
    inputs = [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", layers[0][0].shape[1]])]
    outputs = [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", layers[-1][0].shape[0]])]
    if forecast is not None:
        nodes.append(helper.make_node("Sigmoid", [append_mlp(forecast, "miss_")], [MISS_SHARE]))
        outputs.append(
            helper.make_tensor_value_info(MISS_SHARE, TensorProto.FLOAT, ["batch", forecast[-1][0].shape[0]])
        )
    graph = helper.make_graph(nodes, "policy", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="rl-autoscale")
    model.ir_version = _IR_VERSION
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def forward(
    layers: list[Layer],
    observation: npt.NDArray[np.float32],
    shift: npt.NDArray[np.float32] | np.float32 = _NO_SHIFT,
) -> npt.NDArray[np.float32]:
    """What the network of `onnx_bytes` computes, in NumPy: shape (batch, num_actions); shifted before its last clip."""
    value = observation
    # OpenBLAS 0.3.31 on AVX-512 fills the spare lanes of one row of five float32 with what its buffer held before: the
    # product is right, but the processor's "invalid" flag may be set, and NumPy warns of it.
    with np.errstate(invalid="ignore"):
        for weight, bias in layers[:-1]:
            value = np.tanh(value @ weight.T + bias)
        weight, bias = layers[-1]
        return np.asarray(np.clip(value @ weight.T + bias + shift, -1.0, 1.0), dtype=np.float32)


def mean_network(networks: Sequence[list[Layer]]) -> list[Layer]:
    """One network whose action, before it is clipped, is the mean of several networks' actions.

    Their hidden layers side by side, with no weights from one network to another. Policies of several seeds err in
    different ways, and their mean errs less (docs/learner.md).

    Args:
        networks: of the same depth, inputs and outputs; hidden sizes may differ.
    """
    if len(networks) == 1:
        return networks[0]
    last = len(networks[0]) - 1
    layers: list[Layer] = []
    for k, parts in enumerate(zip(*networks, strict=True)):
        weights, biases = [weight for weight, _ in parts], [bias for _, bias in parts]
        if k == last:
            weight, bias = np.hstack(weights) / len(networks), np.mean(biases, axis=0)
        else:
            weight, bias = np.vstack(weights) if k == 0 else block_diag(*weights), np.concatenate(biases)
        layers.append((weight.astype(np.float32), bias.astype(np.float32)))
    return layers


def read_actor(network: bytes) -> list[Layer]:
    """The layers of the actor in a network that `onnx_bytes` wrote, first layer first.

    Raises:
        PolicyFileError: another network.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtraError("training on from an exported policy", "train") from error
    try:
        initializers = onnx.load_from_string(network).graph.initializer
    except Exception as error:  # protobuf's own, by any of its implementations
        raise PolicyFileError(f"not an ONNX network ({type(error).__name__}); export it again") from None
    tensors = {item.name: numpy_helper.to_array(item) for item in initializers}
    depth = next(k for k in count() if f"w{k}" not in tensors)
    if depth == 0 or any(f"b{k}" not in tensors for k in range(depth)):
        raise PolicyFileError("the network is no tanh MLP that 'rl-autoscale export' wrote; train one anew")
    return [(tensors[f"w{k}"], tensors[f"b{k}"]) for k in range(depth)]


def export_policy(
    layers: list[Layer],
    schema: Schema,
    folder: Path,
    *,
    refuse: bool,
    training: dict[str, Any],
    miss_price_range: tuple[float, float] = PRICE_RANGE,
    dial: Sequence[Mapping[str, float]] = (),
    forecast: list[Layer] | None = None,
    constants: Constants | None = None,
) -> Path:
    """Write ``policy.onnx`` and ``policy.json``; the card is written last, so a folder with a card is whole.

    Args:
        layers: weights (out, in) and biases of a tanh MLP, see `agents.ppo.policy_layers`.
        schema: of the fleet it was trained on.
        folder: made if missing.
        refuse: whether early refusal is part of its action.
        training: scenarios, seed, timesteps, envelope: copied into the card.
        miss_price_range: prices it was trained on, the range of the dial.
        dial: what it delivered at some prices (``miss_price``, ``slo_attainment``, ``cost_over_ideal`` and, of several
            classes, ``slo_attainment/class0.KIND``) on validation traffic.
        forecast: layers of its miss forecast (experiments/miss_forecast.py).
        constants: that it was trained with (envs/constants.py), and has unless told otherwise.

    Returns:
        The card's path.
    """
    content = onnx_bytes(layers, forecast)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.onnx.tmp").write_bytes(content)
    (folder / "policy.onnx.tmp").replace(folder / "policy.onnx")
    card = {
        "format": CARD_FORMAT,
        "package_version": __version__,
        "schema_version": SCHEMA_VERSION,
        "schema": schema.digest,
        "layout": list(schema.layout),
        "features": list(schema.features),
        "actions": list(schema.actions),
        "onnx_sha256": hashlib.sha256(content).hexdigest(),
        "refuse": refuse,
        **(Constants() if constants is None else constants).over(miss_price_range).to_card(),
        "miss_price_range": list(miss_price_range),
        "dial": [dict(point) for point in dial],
        "miss_forecast": forecast is not None,
        "training": training,
    }
    temporary = folder / "policy.json.tmp"
    temporary.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "policy.json")
    return folder / "policy.json"
