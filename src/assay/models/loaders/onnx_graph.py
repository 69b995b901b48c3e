"""What is done to an ONNX graph before and after it is converted: vetted, in neutral names, in plain operators.

Imported only where ``onnx`` is installed. No function changes the graph that it is given.
"""

import copy
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import fx

from assay.core.errors import ModelError

_NAMES: Final = """
Abs Add And AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose
Cos DepthToSpace Div Dropout Elu Equal Erf Exp Expand Flatten Floor Gather Gelu Gemm GlobalAveragePool
GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish Identity InstanceNormalization LRN
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mod Mul Neg Not Or
PRelu Pad Pow Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize Round Selu Shape Sigmoid Sign Sin
Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tan Tanh Tile Transpose Unsqueeze Where
"""

OPERATORS: Final = frozenset(_NAMES.split())
"""The operators that are converted. The list is closed because a converter may look up any other name in torch."""

CONSTANT: Final = frozenset(
    ("CumSum", "EyeLike", "GatherElements", "GatherND", "NonZero", "OneHot", "ScatterElements", "ScatterND", "Trilu")
)
"""Operators that may stand where they depend on constants only, such as tables of relative positions."""

OPSETS: Final = (9, 17)
"""The oldest and the newest opset whose operators onnx2torch knows."""


def read(path: Path) -> Any:
    """Read a graph, and check its operators.

    Raises:
        ModelError: a damaged file, or an operator that is not converted.
    """
    try:
        model = onnx.load(str(path))
    except Exception as e:  # a parser given hostile bytes may raise anything
        said = str(e).strip().splitlines() or [""]
        found = f"{path}: {type(e).__name__}: {said[0]}"
        raise ModelError("a readable .onnx file", found, "Export or copy it anew.") from e
    unknown = _kinds(model) - OPERATORS
    if unknown and unknown <= CONSTANT:
        unknown = _kinds(_folded(model)) - OPERATORS
    if unknown:
        raise ModelError(
            "operators of a classifier that can be converted",
            f"{', '.join(sorted(unknown))} in {path}",
            f"Go on by scores, without gradients: ort:{path}. Or export the network without them, or save it with "
            "torch.export as .pt2.",
        )
    return model


def _kinds(model: Any) -> set[str]:
    """Return the operators of a graph, those of other domains with the domain."""
    return {n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}" for n in model.graph.node}


def neutral(model: Any) -> Any:
    """Return the graph with constants folded into its weights, and neutral names in place of its own.

    The TorchScript exporter shares equal weights through Identity, and computes paddings from constants, neither of
    which the converters expect. And names become Python source where a network is traced, so none of the file's own
    may remain.
    """
    return _renamed(_folded(model))


def freed(model: Any) -> Any:
    """Return the graph for any number of rows, where its batch axis is fixed to one row.

    What it reshapes to a first axis of 1 gets a free one: what is left (-1), or the one it has (0). Whether that axis
    is the batch is for the comparison with ONNX Runtime to say.
    """
    model = copy.deepcopy(model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    weights = {w.name: w for w in model.graph.initializer}
    for n in model.graph.node:
        if n.op_type == "Reshape" and len(n.input) == 2 and n.input[1] in weights:
            sizes = numpy_helper.to_array(weights[n.input[1]]).copy()
            if sizes.size > 1 and sizes[0] == 1:
                sizes[0] = 0 if -1 in sizes else -1
                n.input[1] = _new_weight(model.graph, sizes)
                _drop(n, "allowzero")
    return model


def lowered(model: Any) -> Any:
    """Return the graph in the dialect of an opset from 9 to 17, as far as its operators differ in form only."""
    model = copy.deepcopy(model)
    (opset,) = (o for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset.version <= OPSETS[1]:
        opset.version = max(opset.version, OPSETS[0]) if opset.version >= 7 else opset.version  # 7: broadcasting
        return _plain_reshapes(model)
    opset.version = OPSETS[1]
    weights = {w.name: w for w in model.graph.initializer}
    for n in model.graph.node:
        if n.op_type.startswith("Reduce") and n.op_type != "ReduceSum" and len(n.input) == 2:
            n.attribute.append(helper.make_attribute("axes", numpy_helper.to_array(weights[n.input.pop()]).tolist()))
            _drop(n, "noop_with_empty_axes")
        elif n.op_type == "AveragePool":
            _drop(n, "dilations", lambda v: set(v) == {1})
        elif n.op_type == "Split":
            _drop(n, "num_outputs")
    return _plain_reshapes(model)


def plain(net: fx.GraphModule) -> fx.GraphModule:
    """Replace the layers of onnx2torch that read their settings from constant tensors by calls with plain numbers.

    Only then ``torch.export``, and with it certification, can follow them.
    """
    for node in [n for n in net.graph.nodes if n.op == "call_module"]:
        constants = [a for a in (*node.args[1:], *node.kwargs.values()) if a is not None]
        if node.kwargs or not constants or any(a.op != "get_attr" for a in constants):
            continue
        layer = net.get_submodule(node.target)
        values = [operator.attrgetter(a.target)(net).tolist() for a in constants]
        with net.graph.inserting_before(node):
            new = _call(net.graph, type(layer).__name__, node.args[0], values, getattr(layer, "mode", ""))
        if new is not None:
            node.replace_all_uses_with(new)
            net.graph.erase_node(node)
    net.graph.eliminate_dead_code()
    net.delete_all_unused_submodules()
    net.recompile()
    return net


def _call(graph: fx.Graph, kind: str, x: fx.Node, values: list[Any], mode: str) -> fx.Node | None:
    """Return the call that stands for a layer, None where it stays."""
    if kind == "OnnxReshape":
        sizes = [graph.call_method("size", (x, i)) if v == 0 else v for i, v in enumerate(values[0])]
        return graph.call_function(torch.reshape, (x, tuple(sizes)))
    if kind == "OnnxSlice":
        index = _index(*values)
        return None if index is None else graph.call_function(operator.getitem, (x, index))
    if kind == "OnnxPadDynamic" and mode == "constant":
        half = len(values[0]) // 2
        pairs = zip(values[0][half - 1 :: -1], values[0][: half - 1 : -1], strict=True)
        pads = [v for pair in pairs for v in pair]
        fill = np.ravel(values[1])[0].item() if len(values) > 1 else 0.0
        return graph.call_function(torch.nn.functional.pad, (x, pads, "constant", fill))
    return None


def _index(
    starts: list[int], ends: list[int], axes: list[int] | None = None, steps: list[int] | None = None
) -> tuple[Any, ...] | None:
    """Return the index of a slice; None where it runs backwards, or counts axes from both ends."""
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if min(steps) < 1 or min(axes) < 0 <= max(axes):
        return None
    wanted = {a: slice(*s) for a, *s in zip(axes, starts, ends, steps, strict=True)}
    if min(axes) < 0:
        return (..., *(wanted.get(a, slice(None)) for a in range(min(axes), 0)))
    return tuple(wanted.get(a, slice(None)) for a in range(max(axes) + 1))


def _folded(model: Any) -> Any:
    """Return the graph in which everything that does not depend on the input is a weight."""
    model = copy.deepcopy(model)
    graph = model.graph
    weights = {w.name: w for w in graph.initializer}
    for n in list(graph.node):
        if all(v in weights for v in n.input if v):
            try:
                values = _evaluated(n, weights, model.opset_import)
            except Exception:  # left to the converters
                continue
            for name, value in zip(n.output, values, strict=True):
                weights[name] = numpy_helper.from_array(np.asarray(value), name)
                graph.initializer.append(weights[name])
            graph.node.remove(n)
    return model


def _evaluated(node: Any, weights: dict[str, Any], opsets: Any) -> list[Any]:
    names = [v for v in dict.fromkeys(node.input) if v]
    inputs = [helper.make_tensor_value_info(v, weights[v].data_type, weights[v].dims) for v in names]
    outputs = [helper.make_empty_tensor_value_info(v) for v in node.output]
    one = helper.make_model(helper.make_graph([node], "constant", inputs, outputs), opset_imports=opsets)
    values = ReferenceEvaluator(one).run(None, {v: numpy_helper.to_array(weights[v]) for v in names})
    return list(values)


def _renamed(model: Any) -> Any:
    model = copy.deepcopy(model)
    graph = model.graph
    del graph.value_info[:]
    names: dict[str, str] = {"": ""}
    weights = {w.name for w in graph.initializer}
    for stale in [v for v in graph.input if v.name in weights]:
        graph.input.remove(stale)  # files before IR version 4 list their weights as inputs too
    for value in (*graph.input, *graph.initializer):
        value.name = names.setdefault(value.name, f"v{len(names)}")
    for i, n in enumerate(graph.node):
        n.name = f"n{i}"
        for values in (n.input, n.output):
            values[:] = [names.setdefault(v, f"v{len(names)}") for v in values]
    for value in graph.output:
        value.name = names.setdefault(value.name, f"v{len(names)}")
    return model


def _plain_reshapes(model: Any) -> Any:
    """Return the graph whose reshapes have constant sizes, wherever those can be inferred.

    Exporters compute the sizes from the shape of the input. In them 0 copies the batch axis, and -1 is what is left.
    """
    graph = model.graph
    for n in graph.node:
        if n.op_type == "Reshape":
            _drop(n, "allowzero")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {v.name: _sizes(v) for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    weights = {w.name for w in graph.initializer}
    for n in graph.node:
        if n.op_type == "Reshape" and len(n.input) == 2 and n.input[1] not in weights:
            to, of = shapes.get(n.output[0]) or [""], shapes.get(n.input[0]) or [""]
            sizes = [v if isinstance(v, int) else -1 for v in to]
            if isinstance(to[0], str) and to[0] and to[0] == of[0]:
                sizes[0] = 0
            if sizes.count(-1) < 2 and "" not in to[:1]:
                n.input[1] = _new_weight(graph, np.array(sizes, np.int64))
    _drop_unused(graph)
    return model


def _sizes(value: Any) -> list[int | str]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]


def _drop_unused(graph: Any) -> None:
    """Remove the nodes that nothing reads any more."""
    needed = {v.name for v in graph.output}
    for n in reversed(list(graph.node)):
        if needed.isdisjoint(n.output):
            graph.node.remove(n)
        else:
            needed.update(n.input)


def _drop(node: Any, name: str, condition: Any = lambda _: True) -> None:
    """Remove an attribute, where its value fulfils the condition."""
    for a in [a for a in node.attribute if a.name == name and condition(helper.get_attribute_value(a))]:
        node.attribute.remove(a)


def _new_weight(graph: Any, values: np.ndarray) -> str:
    name = next(_free_names(graph))
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _free_names(graph: Any) -> Iterator[str]:
    taken = {w.name for w in graph.initializer}
    return (f"w{i}" for i in range(len(taken) + 1) if f"w{i}" not in taken)
