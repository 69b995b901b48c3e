"""What a ``.pt2`` file would run while it is loaded, found before it is loaded.

``torch.export.load`` (read in torch 2.13) runs what the file says in these ways, and each is ruled out here:

- pickles: the example inputs, and weights or constants marked ``use_pickle``, are unpickled with
  ``weights_only=False`` (the example inputs after ``weights_only=True`` has failed). They are read here as
  weights only, and what is not admitted there is refused; so is the format before torch 2.8, made of pickles.
- custom and opaque objects among the constants are unpickled; there are none in a classifier.
- ``data/aotinductor`` holds compiled machine code.
- sizes such as ``2*s0`` are evaluated by ``sympy.sympify``, that is ``eval``.
- names of nodes, inputs and attributes become Python source, that is ``exec``.
- operators are looked up by name from ``torch`` on; only tensor operators are admitted here.

The archive is read with the reader that will load it, so that both see the same members.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from assay.core.errors import ModelError
from assay.models.loaders.pickled import refusal

_WORD = re.compile(r"[\w.:/ +-]*")  # nothing in Python source can be called without parentheses
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.ops\.(prims|torchvision)\.\w+\.\w+|torch\.sym_\w+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)|_operator\.\w+|math\.\w+"
)
_TOKEN = re.compile(r"'\w*'|\d+(?:\.\d*)?|\w+|\*\*|\S")
_SYMBOLIC = re.compile(
    r"'\w+'|\d+(\.\d*)?|[szu]\w*\d|[-+*/%(),=<>]|True|False|positive|nonnegative|integer|real|evaluate"
    r"|Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|Eq|Ne|Lt|Le|Gt|Ge|floor|ceiling"
    r"|FloorDiv|ModularIndexing|PythonMod|CleanDiv|CeilDiv|CeilToInt|FloorToInt|PowByNatural|IntTrueDiv"
    r"|FloatTrueDiv|TruncToInt|TruncToFloat|RoundToInt|ToFloat|Identity"
)
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_FREE = ("metadata", "guards_code", "as_string", "as_strings")
"""Texts that are never run: remarks, guards that are not asked for, constants that are written with repr."""


def vet(path: Path) -> None:
    """Check that loading the program at ``path`` runs no code from it.

    Raises:
        ModelError: it would, or it is damaged or of an unknown format; the message says where.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    try:
        with zipfile.ZipFile(path) as archive:
            if "version" in archive.namelist():
                raise _refused(path, "the format before torch 2.8, whose members are pickles")
        with PT2ArchiveReader(str(path)) as reader:
            _vet_members(reader, path)
    except ModelError:
        raise
    except Exception as e:  # a parser given hostile bytes may raise anything
        raise ModelError(
            "a program that torch.export.save wrote",
            f"{path}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}",
            "The file is damaged or of another format; export it anew.",
        ) from e


def _vet_members(reader: Any, path: Path) -> None:
    names = reader.get_file_names()
    programs = [n[len("models/") : -len(".json")] for n in names if n.startswith("models/")]
    if native := [n for n in names if n.startswith("data/aotinductor")]:
        raise _refused(path, f"compiled machine code ({native[0]})")
    for name in programs:
        _vet_pickle(reader, path, f"data/sample_inputs/{name}.pt")
        for kind in ("weights", "constants"):
            _vet_tensors(reader, path, f"data/{kind}/", name, names)
        _vet_program(json.loads(reader.read_bytes(f"models/{name}.json")), path, "program")
    if programs != ["model"]:
        raise ModelError("one program, named model", f"{programs} in {path}", "Export it with torch.export.save.")


def _vet_tensors(reader: Any, path: Path, folder: str, name: str, names: list[str]) -> None:
    """Check weights or constants: a pickle of all, or a list of members, each raw bytes or a pickle."""
    if f"{folder}{name}.pt" in names:
        _vet_pickle(reader, path, f"{folder}{name}.pt")
        return
    kind = folder.split("/")[1]
    for entry in json.loads(reader.read_bytes(f"{folder}{name}_{kind}_config.json"))["config"].values():
        member = entry["path_name"]
        if not member.startswith(("weight_", "tensor_")):
            raise _refused(path, f"a pickled object ({folder}{member})")
        if entry["use_pickle"]:
            _vet_pickle(reader, path, folder + member)


def _vet_pickle(reader: Any, path: Path, member: str) -> None:
    content = reader.read_bytes(member)
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as e:
        raise refusal(e, f"{member} in {path}") or e from e


def _vet_program(value: Any, path: Path, key: str) -> None:
    """Walk through the JSON of a program; every text in it has to be harmless where it stands."""
    if isinstance(value, dict):
        for k, v in value.items():
            _vet_text(k, path, "a name")
            if k not in _FREE:
                _vet_program(v, path, k)
    elif isinstance(value, list):
        for v in value:
            _vet_program(v, path, key)
    elif isinstance(value, str):
        _vet_text(value, path, key)


def _vet_text(text: str, path: Path, key: str) -> None:
    if key in ("in_spec", "out_spec"):
        harmless = _is_plain_tree(json.loads(text)[1])
    elif key == "expr_str":
        harmless = all(_SYMBOLIC.fullmatch(token) for token in _TOKEN.findall(text))
    elif key in ("target", "as_operator"):
        harmless = _OPERATOR.fullmatch(text) is not None
    else:
        harmless = _WORD.fullmatch(text) is not None
    if not harmless:
        raise _refused(path, f"{key} = {text[:100]!r}, which might run as code")


def _is_plain_tree(tree: dict[str, Any]) -> bool:
    """Return whether inputs or outputs are nested from tuples, lists and dicts of tensors only."""
    context = tree["context"]
    names = json.loads(context) if isinstance(context, str) else []
    plain = all(isinstance(n, str) and n.isidentifier() for n in names or [])
    return tree["type"] in _TREES and plain and all(map(_is_plain_tree, tree["children_spec"]))


def _refused(path: Path, found: str) -> ModelError:
    return ModelError(
        "a program of tensors and tensor operators only",
        f"{found}, in {path}; loading it could run code from the file",
        "Export it anew with this torch, if need be in a wrapper that returns logits only. "
        "Only if you trust where the file is from: --trust-pickle.",
    )
