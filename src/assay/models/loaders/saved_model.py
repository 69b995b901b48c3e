"""SavedModel folders of TensorFlow: vetted, then loaded; the signature that is served is the network.

A SavedModel is a program. Its operations can read and write files, and run what the process has registered. So it is
refused where a function of it, other than those with which TensorFlow itself writes and reads the weights, has such an
operation.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.models.bridges import tensorflow as bridges
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request

FILE: Final = "saved_model.pb"

_REFUSED: Final = re.compile(
    "PyFunc|File|Save|Restore|Checkpoint|Reader|Dataset|Summary|Print|InitializeTable|LookupTableImport|ImmutableConst"
    "|DecodeProto|EncodeProto|Rpc|Grpc|Send|Recv|Remote|HostCompute|Collective|Bigtable|Debug|Sql|Abort|LoadAll"
)
"""Operations that reach beyond the network: files, Python, other machines, other programs."""


def load(r: Request) -> Loaded:
    """Load the signature ``serving_default``, or the only one; a softmax or sigmoid at its end is left out.

    Raises:
        ModelError: no SavedModel, one that reaches beyond itself, several signatures, or one of other inputs than one
            tensor of floats.
        MissingExtraError: TensorFlow is not installed.
    """
    if not (r.path / FILE).is_file():
        raise _no_model(r.path)
    tf = bridges.tensorflow()
    if not r.trust_pickle:
        vet(r.path)
    try:
        module = tf.saved_model.load(str(r.path))
    except Exception as e:  # a parser given hostile bytes may raise anything
        raise _damaged(r.path, e) from e
    signature, key = bridges.served(module.signatures)
    spec, call = bridges.declared(signature)
    short, head = peeled(signature)
    notes = [f"The signature {key} of the SavedModel is asked."]
    if head:
        notes.append(f"The {head} at its end is left out: the network returns logits.")
    digest = _digest(r.path)
    return bridges.loaded(short or bridges.keeping(module, call), spec, lambda: digest, tuple(notes))


def peeled(signature: Any) -> tuple[Any, str]:
    """Return a signature with its weights as constants, up to a softmax or sigmoid at its end, and the name of that.

    (None, "") where it has no such end, or cannot be written like that (loops, lookups).
    """
    convert = need("tensorflow.python.framework.convert_to_constants", "tensorflow")
    try:
        frozen = convert.convert_variables_to_constants_v2(signature, lower_control_flow=False)
    except Exception:  # the conversion has limits of its own
        return None, ""
    if len(frozen.outputs) != 1 or len(frozen.inputs) != 1:
        return None, ""
    end = frozen.outputs[0].op
    while end.type == "Identity":
        end = end.inputs[0].op
    if end.type not in ("Softmax", "Sigmoid"):
        return None, ""
    return frozen.prune(frozen.inputs[0], end.inputs[0]), str(end.type).lower()


def vet(folder: Path) -> None:
    """Refuse a SavedModel with operations that reach beyond the network; nothing of it is run.

    Raises:
        ModelError: the operation, by name; or the file is damaged.
    """
    proto = need("tensorflow.core.protobuf.saved_model_pb2", "tensorflow")
    saved = proto.SavedModel()
    try:
        saved.ParseFromString((folder / FILE).read_bytes())
    except Exception as e:
        raise _damaged(folder, e) from e
    for graph in saved.meta_graphs:
        functions = {f.signature.name: f.node_def for f in graph.graph_def.library.function}
        own = _own(graph, functions)
        every = [graph.graph_def.node, *(nodes for name, nodes in functions.items() if name not in own)]
        for node in (n for nodes in every for n in nodes):
            if _REFUSED.search(node.op):
                raise ModelError(
                    "a network that reads and writes nothing but its inputs and outputs",
                    f"{folder} has the operation {node.op} ({node.name})",
                    "Save the model as .keras or .onnx. Only if you trust it: --trust-pickle.",
                )


def _own(graph: Any, functions: Mapping[str, Iterable[Any]]) -> set[str]:
    """Return the functions with which TensorFlow writes and reads the weights, and nothing else calls.

    They are called from the outermost graph, by the nodes that ``saver_def`` names; loading does not run them.
    """
    if not graph.HasField("object_graph_def"):  # TensorFlow 1: loading runs them
        return set()
    ends = {n.partition(":")[0] for n in (graph.saver_def.save_tensor_name, graph.saver_def.restore_op_name)}
    nodes = {n.name: n for n in graph.graph_def.node}
    reached, waiting = set(), [*ends]
    saver: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in reached or name not in nodes:
            continue
        reached.add(name)
        saver |= set(_called(nodes[name]))
        waiting += [i.lstrip("^").partition(":")[0] for i in nodes[name].input]
    elsewhere = {f for nodes in functions.values() for n in nodes for f in _called(n)}
    elsewhere |= {f for n in graph.graph_def.node if n.name not in reached for f in _called(n)}
    elsewhere |= set(graph.object_graph_def.concrete_functions)
    return saver - elsewhere


def _called(node: Any) -> Iterator[str]:
    """Yield the functions that an operation calls."""
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        yield from (f.name for f in value.list.func)


def _digest(folder: Path) -> str:
    sha = hashlib.sha256()
    for path in [folder / FILE, *sorted((folder / "variables").glob("*"))]:
        sha.update(path.name.encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _no_model(folder: Path) -> ModelError:
    remedy = "A folder of class folders is data, and comes second: assay evaluate MODEL DATA."
    if (folder / "config.json").is_file():
        remedy = f"It looks like a model of Hugging Face: write hf:{folder}."
    return ModelError(f"a SavedModel: a folder with {FILE}", f"none in {folder}", remedy)


def _damaged(folder: Path, e: Exception) -> ModelError:
    found = f"{folder}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    return ModelError("a SavedModel that TensorFlow can load", found, "Save or copy it anew.")
