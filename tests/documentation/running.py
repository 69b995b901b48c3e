"""How a block is run: commands by their programs, Python in one namespace, and what is only read."""

import argparse
import ast
import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from blocks import PROGRAMS, ROOT, SHELL, Block, Command, blocks, commands
from packaging.requirements import Requirement
from typer.testing import CliRunner
from workshop import ADDED, ENDPOINT, FIRST, KEYWORDS, NAMES, OWN, SIZES, TRAINING, Exempt, Workshop, mentioned, seeded

from assay.cli.app import app

PLUGIN = "assay.integrations.pytest_plugin"


class BlockError(AssertionError):
    """A block that does not do what its page says."""


def run(page: str, text: str, shop: Workshop, exempt: Sequence[Exempt] = ()) -> None:
    """Run the blocks of a page in their order.

    Raises:
        BlockError: the first that fails; it names the page and the line.
    """
    seeded()
    found = [b for b in blocks(text) if b.runs]
    code = "\n".join(b.code for b in found)
    for name in mentioned(code):
        shop.path(name)
    words = set(re.findall(r"\w+", "\n".join(b.code for b in found if b.is_python)))
    known = {**NAMES, **OWN.get(page, {})}
    shop.names.update({name: make(shop) for name, make in known.items() if name in words})
    left_out = {e.line for e in exempt if e.page == page}
    for block in found:
        try:
            _block(block, shop, left_out)
        except (Exception, SystemExit) as e:
            raise BlockError(f"{page}:{block.line}: {type(e).__name__}: {e}\n\n{block.code}") from e


def _block(block: Block, shop: Workshop, left_out: set[str]) -> None:
    if block.is_python:
        _python(block.code, shop, only_imports=not left_out.isdisjoint(block.code.splitlines()))
    elif block.language in READ:
        READ[block.language](block.code, shop)
    elif block.language in (*SHELL, "", "text"):
        for command in commands(block.code, block.line):
            if str(command) not in left_out:
                _command(command, shop)
    else:
        raise BlockError(f"no rule says how a block of {block.language!r} is run")


# ---------------------------------------------------------------------------------------------------------- the shell


def _command(command: Command, shop: Workshop) -> None:
    program, arguments = command.program, [os.path.expandvars(word) for word in command.arguments]
    odd = [word for word in arguments if re.fullmatch(r"[|&;<>]+\d?", word)]
    if odd or program not in PROGRAMS:
        raise BlockError(f"no rule says how this command is run: {command}")
    RUN[program](arguments, shop)


def _assay(arguments: list[str], shop: Workshop) -> None:
    words = small([re.sub(r"http://127\.0\.0\.1:\d+", shop.address, word) for word in arguments])
    if words[0] == "serve":
        return _serve(words)
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    if done.exit_code:
        raise BlockError(f"exit code {done.exit_code} of: {shlex.join(['assay', *words])}\n{done.output}")
    return None


def small(words: Sequence[str]) -> list[str]:
    """Return the arguments of a command of ours with the sizes of :data:`workshop.SIZES`."""
    asked = ENDPOINT if any(word.startswith("http://") for word in words) else {}
    sizes = {**SIZES, **asked, **(TRAINING if words[0] == "harden" else {})}
    found = [sizes.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    for option, value in {**ADDED.get(words[1] if words[0] == "study" else words[0], {}), **asked}.items():
        if option not in words:
            found += [option] if value is None else [option, value]
    return found


def _serve(words: list[str]) -> None:
    """Start the local app, ask for its first page as a browser would, and end it by Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, "-m", "assay", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            told = process.stdout.readline()
            _asked(told if told.startswith("http") else told + process.stdout.read())
        finally:
            process.send_signal(signal.SIGINT)
    if process.returncode:
        raise BlockError(f"exit code {process.returncode} of: assay {shlex.join(words)}")


def _asked(told: str) -> None:
    """Ask for the page at the address that was printed."""
    address = told.split(maxsplit=1)[0] if told.startswith("http") else ""
    if not address:
        raise BlockError(f"no address, but: {told}")
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with browser.open(address, timeout=60) as answer:
        assert b"assay" in answer.read()


def _make(arguments: list[str], shop: Workshop) -> None:
    targets = re.findall(r"(?m)^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    missing = [word for word in arguments if "=" not in word and word not in targets]
    if missing:
        raise BlockError(f"no target in the Makefile: {missing}")


def _pip(arguments: list[str], shop: Workshop) -> None:
    """Read what is installed: our extras are those of pyproject.toml, files are there, other names can be parsed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    for option in ("-c", "-r"):
        parser.add_argument(option, {"-c": "--constraint", "-r": "--requirement"}[option], type=_in_repository)
    parser.add_argument("-e", "--editable", action="append", default=[])
    parser.add_argument("--no-deps", action="store_true")
    parser.add_argument("--upgrade", "-U", action="store_true")
    parser.add_argument("what", choices=["install"])
    parser.add_argument("packages", nargs="*", default=[])
    a = parser.parse_intermixed_args(arguments)
    for text in (*a.packages, *a.editable):
        wanted = Requirement(text.replace(".", "assay", 1) if text.startswith(".") else text)
        unknown = wanted.extras - project["optional-dependencies"].keys() if wanted.name == project["name"] else set()
        if unknown:
            raise BlockError(f"no such extra: {sorted(unknown)}")


def _in_repository(name: str) -> Path:
    if not (ROOT / name).is_file():
        raise BlockError(f"no such file in the repository: {name}")
    return ROOT / name


def _interpreter(arguments: list[str], shop: Workshop) -> None:
    """Look whether a module is there, or whether a script of the repository takes its arguments; neither is run."""
    if arguments[0] == "-m":
        if importlib.util.find_spec(arguments[1]) is None:
            raise BlockError(f"no such module: {arguments[1]}")
        return
    script = _in_repository(arguments[0])
    if "argparse" in script.read_text(encoding="utf-8"):
        with _until_parsed(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(arguments))
            patch.syspath_prepend(str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
    elif arguments[1:]:
        raise BlockError(f"{arguments[0]} takes no arguments")


class _Parsed(BaseException):
    """The arguments of a script are fine; there it ends."""


@contextmanager
def _until_parsed() -> Iterator[None]:
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        parse(self, args, namespace)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        try:
            yield
        except _Parsed:
            return
    raise BlockError("the script never read its arguments")


def _pytest(arguments: list[str], shop: Workshop) -> None:
    """Run pytest in the workshop, within this process, where everything is imported."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:dash", "-p", "no:xdist", "--rootdir", str(shop.folder)]
    installed = any(point.value == PLUGIN for point in entry_points(group="pytest11"))
    code = pytest.main([*options, *([] if installed else ["-p", PLUGIN]), *arguments])
    if code:
        raise BlockError(f"pytest ends with {code!r}")


def _ray(arguments: list[str], shop: Workshop) -> None:
    """Read what is said to Ray; clusters are started in the tests of the frameworks."""
    from ray.scripts.scripts import cli

    cli.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))


RUN: Mapping[str, Callable[[list[str], Workshop], None]] = {
    "assay": _assay,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "python": _interpreter,
    "python3": _interpreter,
    "ray": _ray,
}

# -------------------------------------------------------------------------------------------------------------- Python


class _Smaller(ast.NodeTransformer):
    """Puts what :data:`workshop.KEYWORDS` and :data:`workshop.FIRST` allow in the place of larger numbers."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        given = [(FIRST.get(getattr(node.func, "id", "")), value) for value in node.args[:1]]
        for most, value in [*given, *((KEYWORDS.get(k.arg or ""), k.value) for k in node.keywords)]:
            if most is not None and isinstance(value, ast.Constant) and isinstance(value.value, int):
                value.value = min(value.value, most)
        return node


def _python(code: str, shop: Workshop, *, only_imports: bool = False) -> None:
    """Run a block in the namespace of its page; one that begins with the name of a file is that file."""
    file = re.match(r"# (\S+\.py)\n", code)
    if file and not (ROOT / file[1]).exists():
        return _written(shop.folder / file[1], code, shop)
    lines = code.splitlines()
    for node in _Smaller().visit(ast.parse(code)).body:
        if only_imports and not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        statement = compile(ast.Module([node], []), "<block>", "exec")
        if "until Ctrl-C" in lines[node.end_lineno - 1]:
            with _interrupted():
                exec(statement, shop.names)
        else:
            exec(statement, shop.names)
    return None


def _written(path: Path, code: str, shop: Workshop) -> None:
    """Write a file of the page: a test is run, a module of ours can be imported."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    folder, source = path.parent, shop.folder / "src"
    if path.name.startswith("test_"):
        _pytest([str(path)], shop)
    elif source in path.parents:
        package = importlib.import_module(".".join(folder.relative_to(source).parts))
        package.__path__.append(str(folder))


@contextmanager
def _interrupted() -> Iterator[None]:
    """Press Ctrl-C as soon as what is run has printed an address, and answers there."""
    told, answered = io.StringIO(), threading.Event()

    def press() -> None:
        end = time.monotonic() + 60
        while "\n" not in told.getvalue() and time.monotonic() < end:
            time.sleep(0.05)
        try:
            _asked(told.getvalue())
            answered.set()
        except (BlockError, OSError) as e:
            told.write(str(e))
        finally:
            signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    with redirect_stdout(told):
        thread.start()
        yield
    thread.join()
    if not answered.is_set():
        raise BlockError(f"it did not serve what it said: {told.getvalue()}")


# ------------------------------------------------------------------------------------------------------ what is read


def _toml(code: str, shop: Workshop) -> None:
    """Read TOML; a policy becomes the file that ``assay gate`` reads."""
    if "gate" in tomllib.loads(code):
        (shop.folder / "assay.toml").write_text(code, encoding="utf-8")


def _yaml(code: str, shop: Workshop) -> None:
    """Read YAML, and run the commands in it that are ours."""
    import yaml

    for text in _texts(yaml.safe_load(code)):
        for command in commands(text, 1) if text.startswith(("assay ", "pip ")) else ():
            _command(command, shop)


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(part)


def _json(code: str, shop: Workshop) -> None:
    json.loads(code)


READ: Mapping[str, Callable[[str, Workshop], None]] = {"toml": _toml, "yaml": _yaml, "json": _json}
