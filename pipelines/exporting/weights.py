"""Rounding of a graph's weights: half floats, or bytes with a scale per output.

The graph casts them back to float32 when onnxruntime folds constants at load: computation stays in float32, at the same speed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from configs.errors import UserError

# Smaller tensors (biases, norms, a first convolution) stay as they are.
_LARGE = 1024
_MAX_BYTES = 1.9e9  # of a file; protobuf's limit is 2 GiB
# (operator, number of the input that is the weight) -> the weight's axis of outputs.
_OUTPUTS = {("Conv", 1): 0, ("ConvTranspose", 1): 1, ("Gather", 0): 0, ("MatMul", 0): -2, ("MatMul", 1): -1}


def round_weights(path: Path, bits: int) -> None:
    """Round the large weights of a graph's file in place.

    Args:
        path: an ONNX file.
        bits: 16: half floats; 8: integers from -127 to 127 times a scale per output (row, channel), and 16 bits for tensors that no
            product, convolution or lookup takes directly, such as tables of positions.
    """
    model = onnx.load(path)
    data_file = path.with_name(f"{path.name}.data")  # where large graphs store their weights
    size = path.stat().st_size + (data_file.stat().st_size if data_file.exists() else 0)
    if size * bits / 32 > _MAX_BYTES:
        raise UserError(
            f"{path.name}: expected at most {_MAX_BYTES / 1e9} GB in {bits} bits, which browsers load, found {size * bits / 32e9:.1f}"
        )
    onnx.save(rounded(model, bits), path)
    data_file.unlink(missing_ok=True)


def rounded(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """Copy a model with rounded weights; `bits` as in `round_weights`."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    initializers, nodes = [], []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _LARGE or values.ndim < 2 or np.abs(values).max() > np.finfo(np.float16).max:
            initializers.append(weight)
            continue
        name, axis = weight.name, _output_axis(graph, weight.name) if bits == 8 else None
        if axis is None:
            initializers.append(numpy_helper.from_array(values.astype(np.float16), f"{name}.rounded"))
            nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT))
        else:
            integers, scale = quantized(values, axis)
            initializers += [numpy_helper.from_array(integers, f"{name}.rounded"), numpy_helper.from_array(scale, f"{name}.scale")]
            nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [f"{name}.integer"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", [f"{name}.integer", f"{name}.scale"], [name]))
    nodes += graph.node
    for field, content in ((graph.initializer, initializers), (graph.node, nodes)):
        content = list(content)
        del field[:]
        field.extend(content)
    onnx.checker.check_model(result)
    return result


def quantized(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 values to int8 and float32 scales of length 1 except along `axis`; the product is within half a scale."""
    axes = tuple(other for other in range(values.ndim) if other != axis % values.ndim)
    scale = (np.abs(values).max(axes, keepdims=True) / 127).astype(np.float32)
    scale[scale == 0] = 1
    return np.round(values / scale).astype(np.int8), scale


def _output_axis(graph: onnx.GraphProto, name: str) -> int | None:
    """Find the axis of a weight's outputs; None if it is unknown."""
    for node in graph.node:
        for index, input_name in enumerate(node.input):
            if input_name == name:
                if node.op_type == "Gemm" and index == 1:
                    return 0 if any(attribute.name == "transB" and attribute.i for attribute in node.attribute) else 1
                return _OUTPUTS.get((node.op_type, index))
    return None
