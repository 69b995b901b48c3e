"""The format VNN-LIB, in which the neural-network verification competition states properties.

A file is data: symbols in nested lists, of limited number and depth.

References:
    Demarchi, Guidotti, Pulina & Tacchella 2023, "Supporting Standardization of Neural Networks Verification with
    VNNLIB and CoCoNet"; www.vnnlib.org.
"""

import gzip
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from assay.core.errors import DataError

Floats: TypeAlias = NDArray[np.float64]

MOST_CHARACTERS: Final = 1 << 28
MOST_NESTED: Final = 100
MOST_NUMBERS: Final = 100_000_000
"""Bounds on what a file may ask for: characters when unpacked, nested lists, and numbers when it is written out."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Conjunction:
    """The unsafe outputs y with ``a @ y <= b`` in all rows; a (k, m), b (k,). Without rows, every output is unsafe."""

    a: Floats
    b: Floats

    def holds(self, y: NDArray[Any]) -> bool:
        """Return whether the outputs y (m,) are unsafe."""
        return bool((self.a @ y.astype(np.float64) <= self.b).all())


@final
@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A box ``lo <= x <= hi`` of inputs, both (n,), and the alternatives that make an output unsafe there."""

    lo: Floats
    hi: Floats
    unsafe: tuple[Conjunction, ...]

    def contains(self, x: NDArray[Any]) -> bool:
        """Return whether x (n,) is inside the box."""
        return bool(((self.lo <= x) & (x <= self.hi)).all())


@final
@dataclass(frozen=True, slots=True, eq=False)
class Property:
    """What must not happen: an input (n,) of a region with an output (m,) that is unsafe there."""

    inputs: int
    outputs: int
    regions: tuple[Region, ...]

    def violated(self, x: NDArray[Any], y: NDArray[Any]) -> bool:
        """Return whether the input x (n,) with the output y (m,) is a counterexample; compared without tolerance."""
        return any(r.contains(x) and any(c.holds(y) for c in r.unsafe) for r in self.regions)


def read(path: Path | str) -> Property:
    """Read a property from a ``.vnnlib`` file, which may be packed as ``.vnnlib.gz``.

    Raises:
        DataError: the file is not there, damaged, too large, or says what is not in the format; with the line.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MOST_CHARACTERS + 1)
        text = content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise DataError("a readable .vnnlib file", f"{path}: {e}", "Check the path, or copy it anew.") from e
    if len(content) > MOST_CHARACTERS:
        raise DataError(f"a property of at most {MOST_CHARACTERS} characters", f"{path}: more", "Split it.")
    return parse(text, str(path))


def parse(text: str, name: str = "the text") -> Property:
    """Return the property that a text in VNN-LIB describes; ``name`` is how messages call it.

    Inputs are ``X_0 ...``, outputs ``Y_0 ...``, declared as Real. Each assertion is built with ``and`` and ``or``
    from ``(<= term term)`` and ``(>= term term)``, whose terms are linear; each comparison is about outputs only, or
    about one input.

    Raises:
        DataError: what is not in the format, with the line.

    Example:
        >>> p = parse("(declare-const X_0 Real) (declare-const Y_0 Real)"
        ...           "(assert (>= X_0 0)) (assert (<= X_0 1)) (assert (>= Y_0 3))")
        >>> p.regions[0].hi, p.regions[0].unsafe[0].a, p.regions[0].unsafe[0].b
        (array([1.]), array([[-1.]]), array([-3.]))
    """
    try:
        return _property(text)
    except _Refused as e:
        raise DataError(e.expected, f"{e.found}, in line {e.line} of {name}", "Write it in VNN-LIB.") from e


class _Node(NamedTuple):
    """A symbol, or a list of nodes, and the line it begins on."""

    value: "str | list[_Node]"
    line: int

    @property
    def items(self) -> "list[_Node]":
        assert isinstance(self.value, list)
        return self.value


class _Bound(NamedTuple):
    """The comparison ``sum of factor * variable <= limit``: of outputs, or of one input with the factor 1 or -1."""

    kind: str
    factors: dict[int, float]
    limit: float


_Cases: TypeAlias = list[list[_Bound]]
"""A formula as alternatives of which one must hold, in each of them bounds that must hold together."""


class _Refused(Exception):  # noqa: N818
    """What is not in the format, and where."""

    def __init__(self, expected: str, found: str, line: int) -> None:
        super().__init__(expected, found, line)
        self.expected, self.found, self.line = expected, found, line


_TOKEN: Final = re.compile(r"\n|;[^\n]*|[()]|[^\s();]+")
_NUMBER: Final = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_VARIABLE: Final = re.compile(r"([XY])_(0|[1-9]\d{0,8})", re.ASCII)


def _property(text: str) -> Property:
    declared: dict[str, int] = {"X": 0, "Y": 0}
    formulas: list[_Cases] = []
    for command in _commands(text):
        match command.value:
            case [_Node("declare-const"), _Node(str(variable)), _Node("Real")]:
                _declare(variable, declared, command.line)
            case [_Node("assert"), formula]:
                formulas.append(_cases(formula, declared))
            case _:
                raise _Refused("(declare-const X_0 Real) or (assert ...)", _shown(command), command.line)
    n, m = declared["X"], declared["Y"]
    count, rows = _size(formulas)
    if not n or not m or count * (n + m * rows) > MOST_NUMBERS:
        found = f"{n} inputs, {m} outputs, {count} alternatives of up to {rows} bounds"
        raise _Refused(f"inputs, outputs, and at most {MOST_NUMBERS} numbers written out", found, 1)
    return Property(n, m, tuple(_regions(n, m, formulas)))


def _commands(text: str) -> Iterator[_Node]:
    """Yield the commands as nested lists."""
    line, unfinished = 1, list[_Node]()
    for token in _TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token == "(":
            unfinished.append(_Node([], line))
            if len(unfinished) > MOST_NESTED:
                raise _Refused(f"at most {MOST_NESTED} nested lists", "more", line)
        elif token[0] != ";":
            if not unfinished:
                raise _Refused("a command in parentheses", repr(token[:40]), line)
            done = unfinished.pop() if token == ")" else _Node(token, line)
            if unfinished:
                unfinished[-1].items.append(done)
            else:
                yield done
    if unfinished:
        raise _Refused("a closing parenthesis", "the end", unfinished[-1].line)


def _declare(variable: str, declared: dict[str, int], line: int) -> None:
    found = _VARIABLE.fullmatch(variable)
    wanted = " or ".join(f"{kind}_{count}" for kind, count in declared.items())
    if found is None or int(found[2]) != declared[found[1]]:
        raise _Refused(f"variables declared in order ({wanted} is next)", repr(variable[:40]), line)
    declared[found[1]] += 1


def _cases(formula: _Node, declared: dict[str, int]) -> _Cases:
    match formula.value:
        case [_Node("or"), first, *rest]:
            return [case for f in (first, *rest) for case in _cases(f, declared)]
        case [_Node("and"), first, *rest]:
            parts = [_cases(f, declared) for f in (first, *rest)]
            if math.prod(_size(parts)) > MOST_NUMBERS // 10:
                raise _Refused("alternatives that can be written out", f"{_size(parts)[0]} of them", formula.line)
            return [[*itertools.chain(*chosen)] for chosen in itertools.product(*parts)]
        case [_Node("<="), small, large] | [_Node(">="), large, small]:
            return [[_bound(_linear(small, declared), _linear(large, declared), formula.line)]]
    raise _Refused("(and ...), (or ...), (<= a b) or (>= a b)", _shown(formula), formula.line)


def _size(formulas: Sequence[_Cases]) -> tuple[int, int]:
    """Return how many alternatives the formulas have together, and the most bounds in one."""
    return math.prod(map(len, formulas)), sum(max(map(len, f)) for f in formulas)


_Linear: TypeAlias = tuple[dict[str, float], float]
"""Factors of variables, and a constant."""


def _linear(term: _Node, declared: dict[str, int]) -> _Linear:
    match term.value:
        case str(symbol):
            return _symbol(symbol, declared, term.line)
        case [_Node("+"), first, *rest]:
            return _sum(_linear(t, declared) for t in (first, *rest))
        case [_Node("-"), only]:
            return _scaled(_linear(only, declared), -1)
        case [_Node("-"), first, *rest]:
            return _sum([_linear(first, declared), *(_scaled(_linear(t, declared), -1) for t in rest)])
        case [_Node("*"), a, b]:
            one, two = _linear(a, declared), _linear(b, declared)
            if not one[0] or not two[0]:
                return _scaled(two, one[1]) if not one[0] else _scaled(one, two[1])
    raise _Refused("a variable, a number, or a linear term of + - *", _shown(term), term.line)


def _symbol(symbol: str, declared: dict[str, int], line: int) -> _Linear:
    if (variable := _VARIABLE.fullmatch(symbol)) and int(variable[2]) < declared[variable[1]]:
        return {symbol: 1.0}, 0.0
    if _NUMBER.fullmatch(symbol) and math.isfinite(number := float(symbol)):
        return {}, number
    raise _Refused("a number or a declared variable", repr(symbol[:40]), line)


def _sum(terms: Iterable[_Linear]) -> _Linear:
    factors: dict[str, float] = {}
    constant = 0.0
    for more, number in terms:
        constant += number
        for variable, factor in more.items():
            factors[variable] = factors.get(variable, 0.0) + factor
    return factors, constant


def _scaled(term: _Linear, by: float) -> _Linear:
    return {v: by * factor for v, factor in term[0].items()}, by * term[1]


def _bound(small: _Linear, large: _Linear, line: int) -> _Bound:
    factors, constant = _sum([small, _scaled(large, -1)])
    kinds = {v[0] for v in factors}
    plain = kinds == {"Y"} or (kinds == {"X"} and len(factors) == 1 and abs(next(iter(factors.values()))) == 1)
    if not plain or not all(map(math.isfinite, (*factors.values(), constant))):
        found = f"one of {', '.join([*factors][:4]) or 'numbers only'}"
        raise _Refused("a comparison of outputs, or of one input with a number", found, line)
    return _Bound(kinds.pop(), {int(v[2:]): factor for v, factor in factors.items()}, 0.0 - constant)


def _regions(n: int, m: int, formulas: Sequence[_Cases]) -> Iterator[Region]:
    """Yield the boxes of all alternatives, each once; those that hold no point are left out."""
    common = [bound for f in formulas if len(f) == 1 for bound in f[0]]
    base = _narrowed((np.full(n, -np.inf), np.full(n, np.inf)), common)
    found: dict[tuple[bytes, bytes], tuple[tuple[Floats, Floats], list[Conjunction]]] = {}
    for chosen in itertools.product(*(f for f in formulas if len(f) > 1)):
        own = [*itertools.chain(*chosen)]
        box = _narrowed(base, own)
        for side, ends in zip(("lower", "upper"), box, strict=True):
            if np.isinf(ends).any():
                raise _Refused(f"a {side} bound of every input", f"none of X_{int(np.isinf(ends).argmax())}", 1)
        if (box[0] <= box[1]).all():
            _, unsafe = found.setdefault((box[0].tobytes(), box[1].tobytes()), (box, []))
            unsafe.append(_conjunction(m, [b for b in (*common, *own) if b.kind == "Y"]))
    return (Region(*box, tuple(unsafe)) for box, unsafe in found.values())


def _narrowed(box: tuple[Floats, Floats], bounds: Sequence[_Bound]) -> tuple[Floats, Floats]:
    inputs = [b for b in bounds if b.kind == "X"]
    if not inputs:
        return box
    lo, hi = box[0].copy(), box[1].copy()
    for b in inputs:
        ((i, factor),) = b.factors.items()
        if factor > 0:
            hi[i] = min(hi[i], b.limit)
        else:
            lo[i] = max(lo[i], 0.0 - b.limit)
    return lo, hi


def _conjunction(m: int, bounds: Sequence[_Bound]) -> Conjunction:
    a = np.zeros((len(bounds), m))
    for row, b in zip(a, bounds, strict=True):
        row[[*b.factors]] = [*b.factors.values()]
    return Conjunction(a, np.array([b.limit for b in bounds]))


def _shown(node: _Node) -> str:
    """Return the beginning of what the file says."""
    inner = node.value if isinstance(node.value, str) else f"({' '.join(map(_head, node.value[:4]))} ...)"
    return inner[:80]


def _head(node: _Node) -> str:
    return node.value if isinstance(node.value, str) else "(...)"
