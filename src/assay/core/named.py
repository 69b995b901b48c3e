"""``module:callable``: the way a user's own code is named on the command line."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay.core.errors import AssayError
from assay.core.registry import closest


def call_named(spec: str, error: type[AssayError], what: str) -> Any:
    """Import ``module:callable`` and return what the callable, called without arguments, returns.

    The current directory is put first on ``sys.path`` and stays there, as with ``python -m``: what the
    callable imports later has to be found too.

    Args:
        spec: the module and the callable in it (which may be dotted), as ``pkg.nets:small``.
        error: what to raise.
        what: what the callable is for, as messages call it.

    Raises:
        error: no such module, no such callable, or either of them raised; the message has the original text.
    """
    module, _, path = spec.partition(":")
    if not module or not path:
        raise error(f"module:callable for {what}", repr(spec), "Write for example my_module:build.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as e:  # a script without a __main__ guard may end in sys.exit()
        raise error(
            f"a module {module!r} that can be imported, for {what}",
            _said(e),
            "Run from the folder that has the module, or install it; if it was found, mend what it raised.",
        ) from e
    for name in path.split("."):
        if not hasattr(found, name):
            raise error(f"{path!r} in module {module!r}, for {what}", "no such name", closest(name, dir(found)))
        found = getattr(found, name)
    if not callable(found) or hasattr(type(found), "forward"):
        raise error(f"{spec} to be a callable, for {what}", type(found).__name__, "Name a function that returns it.")
    return call(found, spec, error, what)


def call(function: Callable[[], Any], name: str, error: type[AssayError], what: str) -> Any:
    """Return what a user's function without arguments returns.

    Raises:
        error: it raised; the message has the original text.
    """
    try:
        return function()
    except (Exception, SystemExit) as e:
        found = f"it raised {_said(e)}"
        raise error(f"{name}() to return {what}", found, "Mend it; it is called without arguments.") from e


def _said(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}".rstrip(": ")
