"""Rounded weights are within half a step, and graphs compute nearly the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.exporting.weights import quantized, round_weights, rounded


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_integers_are_within_half_a_step_of_each_output(axis: int) -> None:
    rng = np.random.default_rng(0)
    values = np.moveaxis(rng.normal(size=(40, 30, 3)) * 10.0 ** rng.uniform(-3, 3, (40, 1, 1)), 0, axis).astype(np.float32)
    np.moveaxis(values, axis, 0)[7] = 0
    integers, scale = quantized(values, axis)
    assert integers.dtype == np.int8
    assert scale.size == values.shape[axis] == 40
    assert (np.abs(integers * scale - values) <= scale * 0.5001).all()


@pytest.mark.parametrize(("bits", "kind", "most"), [(16, np.float16, 2**-10), (8, np.int8, 2**-5)])
def test_a_tokenizers_graphs_compute_nearly_the_same(bits: int, kind: type, most: float, exported: Path, tmp_path: Path) -> None:
    shutil.copy(exported / "graphs" / "decoder.onnx", tmp_path)
    codes = {"level0": np.random.default_rng(0).integers(16, size=(9, 2, 3))}
    exact = onnx.load(tmp_path / "decoder.onnx")
    round_weights(tmp_path / "decoder.onnx", bits)
    rounded_graph = onnx.load(tmp_path / "decoder.onnx")
    large = {numpy_helper.to_array(weight).dtype for weight in rounded_graph.graph.initializer if np.prod(weight.dims) >= 1024}
    assert large == {np.dtype(kind)}
    expected, outputs = (onnxruntime.InferenceSession(graph.SerializeToString()).run(None, codes)[0] for graph in (exact, rounded_graph))
    assert 0 < np.abs(outputs - expected).max() < most * np.abs(expected).max()


@pytest.mark.parametrize(
    ("node", "shape", "axis"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (64, 40), 1),
        (helper.make_node("MatMul", ["w", "x"], ["y"]), (40, 64), 0),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (40, 64), 0),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), (64, 40), 1),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"]), (64, 40, 3, 3), 1),
        (helper.make_node("Conv", ["x", "w"], ["y"]), (40, 64, 3, 3), 0),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_each_output_has_a_separate_scale(node: onnx.NodeProto, shape: tuple[int, ...], axis: int) -> None:
    """Outputs of very different size are equally exact relative to their size, which one common scale would not allow."""
    rng = np.random.default_rng(0)
    sizes = np.moveaxis(10.0 ** rng.uniform(-4, 4, (40, *[1] * (len(shape) - 1))), 0, axis)
    weight = (rng.normal(size=shape) * sizes).astype(np.float32)
    x = rng.normal(size=(64, 5) if node.input[0] == "w" else (5, 64, 4, 4)[: len(shape)]).astype(np.float32)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(weight, "w")],
    )
    exact = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    expected, result = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0] for model in (exact, rounded(exact, 8))
    )
    outputs = tuple(other for other in range(expected.ndim) if other != (0 if node.input[0] == "w" else 1))
    furthest, size = np.abs(result - expected).max(outputs), np.abs(expected).max(outputs)
    assert furthest.shape == (40,)
    assert (furthest < 0.03 * size).all()


def test_weights_beyond_half_precision_are_left_as_they_are() -> None:
    huge = np.full((64, 64), 1e6, np.float32)
    graph = helper.make_graph([], "none", [], [], [numpy_helper.from_array(huge, "w")])
    result = rounded(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), 16)
    assert np.array_equal(numpy_helper.to_array(result.graph.initializer[0]), huge)
