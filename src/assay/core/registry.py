"""Names for things: name <-> frozen dataclass or function <-> plain JSON."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from assay.core.errors import AssayError

T = TypeVar("T")


class UsageError(AssayError):
    """A name, a parameter or a value that does not exist here."""

    exit_code = 2


def closest(name: str, known: list[str]) -> str:
    """Return a hint: the most similar known name, and all of them."""
    near = difflib.get_close_matches(name, known, 1)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(sorted(known))}."


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        UsageError: naming the most similar known one.
    """
    if value not in known:
        raise UsageError(f"{what} out of {', '.join(known)}", repr(value), closest(value, [*known]))


class Registry(Generic[T]):
    """A table from names to values, each with traits to search by."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._traits: dict[str, dict[str, Any]] = {}

    def register(self, name: str, **traits: Any) -> Callable[[T], T]:
        """Enter the decorated value under ``name``. A trait that is a tuple matches any of its members."""

        def enter(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name], self._traits[name] = item, traits
            return item

        return enter

    def names(self, **wanted: Any) -> tuple[str, ...]:
        """Return the names whose traits match; ``None`` matches everything."""

        def fits(traits: Mapping[str, Any]) -> bool:
            return all(
                w is None or w == traits[t] or (isinstance(traits[t], tuple) and w in traits[t])
                for t, w in wanted.items()
            )

        return tuple(sorted(n for n, t in self._traits.items() if fits(t)))

    def values(self, trait: str) -> set[Any]:
        """Return what registered values have as that trait."""
        each = (t[trait] for t in self._traits.values())
        return {v for found in each for v in (found if isinstance(found, tuple) else (found,))}

    def traits(self, name: str) -> Mapping[str, Any]:
        self[name]
        return self._traits[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise UsageError(f"the name of a registered {self.kind}", repr(name), closest(name, [*self._items]))
        return self._items[name]

    def name_of(self, item: Any) -> str:
        """Return the name of a registered value, or of the registered class of an instance."""
        for name, known in self._items.items():
            if known is item or known is type(item):
                return name
        return getattr(item, "__name__", type(item).__name__)


def build(make: Callable[..., T], params: Mapping[str, Any], what: str) -> T:
    """Call a class or a function with parameters that may be text (``steps=200``); a wrong name or value is an error.

    Raises:
        UsageError: a parameter that ``make`` does not have, or text that its type does not take.
    """
    known = inspect.signature(make).parameters
    for name in params:
        if name not in known:
            raise UsageError(f"a parameter of {what}", repr(name), closest(name, [*known]))
    return make(**{n: _coerce(v, known[n].default, f"{what} {n}") for n, v in params.items()})


def check_numbers(value: Any) -> None:
    """Refuse numbers that no parameter of our attacks can be: negative, not finite, or no whole ones.

    Attacks inside others are looked at, too. Numbers of other people's attacks, of whatever sign, are their matter.

    Raises:
        UsageError: naming the parameter.
    """
    if isinstance(value, tuple | list):
        for v in value:
            check_numbers(v)
    if not dataclasses.is_dataclass(value) or not type(value).__module__.startswith("assay.attacks."):
        return
    for f in dataclasses.fields(value):
        v, whole = getattr(value, f.name), isinstance(f.default, int)
        if not isinstance(f.default, int | float) or isinstance(f.default, bool):
            check_numbers(v)
        elif not isinstance(v, int if whole else int | float) or not 0 <= v < math.inf:
            kind = "a whole number" if whole else "a finite number"
            what = f"{kind} of at least 0 for {f.name} of {type(value).__name__}"
            raise UsageError(what, repr(v), f"Usual: {f.default}.")


def _coerce(value: Any, default: Any, what: str) -> Any:
    """Turn text into a value of the default's type."""
    if not isinstance(value, str):
        return value
    if isinstance(default, bool):
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if value.lower() in truth:
            return truth[value.lower()]
    elif isinstance(default, int | float):
        try:
            return type(default)(value)
        except ValueError:
            pass
    else:
        return value
    raise UsageError(f"{type(default).__name__} for {what}", repr(value), f"For example {what}={default!r}.")


def describe(value: Any, name_of: Callable[[Any], str]) -> Any:
    """Turn a (nested) value into plain JSON: dataclasses become ``{"name": ..., field: ...}``, functions names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: describe(getattr(value, f.name), name_of) for f in dataclasses.fields(value)}
        return {"name": name_of(value)} | inner
    if isinstance(value, tuple | list):
        return [describe(v, name_of) for v in value]
    return name_of(value) if callable(value) else value
