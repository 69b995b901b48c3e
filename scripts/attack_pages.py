"""Write docs/attacks: a page for every registered attack, and an index; and our columns of the README's table.

Everything comes from the registry, from the fields of the attacks and from their docstrings, so that the pages cannot
say anything else than the code. In the README, rows of the table of attacks are written by hand; the cells about us
are filled in here, by the names in the first cell. A test fails where this script has not been run.

    python scripts/attack_pages.py            # write
    python scripts/attack_pages.py --check    # only say which files would change
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay import attacks
from assay.attacks import ATTACKS, LOSSES, Noise, Runnable, SharedAttack, combine, get, names
from assay.attacks.loop import StepAttack
from assay.attacks.taxonomy import taxonomy
from assay.attacks.transforms import Transformed

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "attacks"
README = ROOT / "README.md"
BEGIN, END = "<!-- attacks: our columns come from scripts/attack_pages.py -->", "<!-- end of attacks -->"

SEES = {"gradient": "the gradient", "score": "scores", "decision": "the predicted label"}
KINDS = {
    "budget": "fixed budget: fills a ball of given eps",
    "minimal": "minimal norm: looks for the smallest perturbation, with or without an eps",
    "spatial": "moves the image as a whole",
}
EPS = {"linf": "linf:0.2", "l2": "l2:2", "l1": "l1:20", "l0": "l0:100"}
DATA = "demo:mnist-plain demo:mnist"
ATLAS = "https://atlas.mitre.org/techniques"
NIST = "https://doi.org/10.6028/NIST.AI.100-2e2025"
WRITTEN = "`scripts/attack_pages.py` writes this page from the code: change the docstrings, and run it."


# --- docstrings


@dataclass
class Doc:
    """A docstring in its parts, as Markdown."""

    summary: str = ""
    rule: list[str] = field(default_factory=list)
    sees: str = ""
    cost: str = ""
    args: dict[str, str] = field(default_factory=dict)
    example: str = ""
    differs: str = ""
    references: str = ""


def parsed(item: Any) -> Doc:
    """Read the docstring of an attack, a combination, a transform or a preset."""
    first, *rest = re.split(r"\n\n(?! )", inspect.getdoc(item) or "")
    doc = Doc(summary=markdown(first))
    for part in rest:
        head, _, body = part.partition("\n")
        if head == "Args:":
            doc.args = _arguments(body)
        elif head == "Example:":
            doc.example = inspect.cleandoc("\n" + body)
        elif head == "References:":
            doc.references = markdown(inspect.cleandoc("\n" + body))
        elif part.startswith("*Differs"):
            doc.differs = markdown(part.partition(":")[2].strip())
        elif "*Cost*" in part:
            sees, _, cost = part.partition("*Cost*")
            doc.sees, doc.cost = (markdown(t.replace("*Sees*", "").strip()) for t in (sees, cost))
        else:
            doc.rule.append(markdown(part))
    return doc


def _arguments(body: str) -> dict[str, str]:
    """Return what is said of each parameter; ``mean, std: ...`` is said of both."""
    found = {}
    for entry in re.split(r"\n(?! )", inspect.cleandoc("\n" + body)):
        known, _, text = entry.partition(":")
        found |= {name.strip(): " ".join(markdown(text).split()) for name in known.split(",")}
    return found


def markdown(text: str) -> str:
    """Turn reStructuredText into Markdown: code, names of attacks as links, arXiv numbers as links, no tags."""
    text = re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r":\w+:`([^`]+)`", lambda m: _link(m[1]), text)
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _link(dotted: str) -> str:
    word = dotted.rpartition(".")[2]
    item = getattr(attacks, word, None)
    return f"[`{word}`]({ATTACKS.name_of(item)}.md)" if item in _classes() else f"`{dotted}`"


def _classes() -> list[Any]:
    return [ATTACKS[name] for name in names()]


# --- attacks


def defaults(item: Any) -> dict[str, str]:
    """Return the parameters of an attack or a preset with their defaults, as they are written on the command line."""
    return {n: _plain(p.default) for n, p in inspect.signature(item).parameters.items()}


def _plain(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    return LOSSES.name_of(value) if callable(value) else str(value)


def passes(attack: Runnable) -> int:
    """Return how many passes an attack costs a sample at the most."""
    if isinstance(attack, StepAttack):
        return sum(attack.cost(k) for k in range(attack.questions + 1))
    if isinstance(attack, SharedAttack):
        return 3 * attack.epochs
    if isinstance(attack, combine.Targets):
        return attack.count * passes(attack.attack)
    if isinstance(attack, combine.OutputDiversified):
        return 2 * attack.steps + 1 + passes(attack.attack)
    if isinstance(attack, Noise):
        return attack.draws * attack.rounds
    raise NotImplementedError(f"passes of {type(attack).__name__}")


def parts(attack: Runnable) -> Iterator[Any]:
    """Yield the attacks and transforms that a preset is made of, the outermost first."""
    yield attack
    for f in dataclasses.fields(attack):
        value = getattr(attack, f.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(inner):
                yield from parts(inner)  # type: ignore[arg-type]


def written(value: Any) -> str:
    """Write an attack as Python builds it; of parts inside it only what is not the default."""
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' * (len(value) == 1)})"
    if not dataclasses.is_dataclass(value):
        return _plain(value) if callable(value) else repr(value)
    shown = []
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if f.default is dataclasses.MISSING or v != f.default:
            shown.append(f"{f.name}={written(v)}" if f.kw_only else written(v))
    return f"{type(value).__name__}({', '.join(shown)})"


def any_size(attack: Runnable) -> bool:
    """Say whether an attack works without an eps."""
    return bool(getattr(attack, "any_size", False))


def threat(name: str) -> str:
    """Return a threat to try an attack with."""
    norm = "linf" if "linf" in ATTACKS.traits(name)["norm"] else ATTACKS.traits(name)["norm"][0]
    attack = get(name)
    free = ATTACKS.traits(name)["kind"] == "minimal" or getattr(attack, "sizeless", False)
    return norm if free else EPS[norm]


# --- pages


def page(name: str) -> str:
    """Return the page of an attack."""
    item, attack, doc = ATTACKS[name], get(name), parsed(ATTACKS[name])
    blocks = [f"# {name}", doc.summary, *doc.rule, _traits(name, doc), _how(name), *_tables(item, doc)]
    if not inspect.isclass(item):
        blocks += _made_of(attack)
    if doc.example:
        blocks += ["## Example", f"```pycon\n{doc.example}\n```"]
    if doc.differs:
        blocks += ["## Differs from the paper in", doc.differs[:1].upper() + doc.differs[1:]]
    if doc.references:
        blocks += ["## References", doc.references]
    blocks.append(
        "[All attacks](index.md). `scripts/attack_pages.py` writes this page from the code: change the docstring."
    )
    return "\n\n".join(blocks) + "\n"


def _traits(name: str, doc: Doc) -> str:
    traits, attack = ATTACKS.traits(name), get(name)
    lines = {
        "norms": ", ".join(traits["norm"]),
        "sees": (doc.sees or SEES[traits["access"]]).rstrip("."),
        "kind": KINDS[traits["kind"]],
        "without an eps": _without_eps(name),
        "cost of a sample": " ".join(doc.cost.split()),
        "at the defaults": f"at most {passes(attack):,} passes, forward and backward together",
        "taxonomy": _taxonomy(name),
        "Python": f"`assay.attacks.{ATTACKS[name].__name__}`" if inspect.isclass(ATTACKS[name]) else f'`get("{name}")`',
    }
    if getattr(attack, "shared", False):
        lines["mind"] = "one perturbation for all samples of the call"
    rows = [f"| {k} | {v} |" for k, v in lines.items() if v]
    return "\n".join(["| | |", "|---|---|", *rows])


def _taxonomy(name: str) -> str:
    """Return an attack's MITRE ATLAS techniques and its class in NIST AI 100-2, with links."""
    known = taxonomy(name)
    found = (technique.split(" ", 1) for technique in known.atlas)
    linked = [f"[{number}]({ATLAS}/{number}) {title}" for number, title in found]
    return f"MITRE ATLAS {', '.join(linked)}; [NIST AI 100-2]({NIST}) {known.nist}"


def _without_eps(name: str) -> str:
    attack = get(name)
    if ATTACKS.traits(name)["kind"] == "minimal":
        return "finds the smallest perturbation"
    if getattr(attack, "sizeless", False):
        return "the only way: no norm bounds it"
    if any_size(attack):
        return "works too: the box alone bounds it"
    return "no" if isinstance(attack, SharedAttack) else "no; `Bisect` searches the radius"


def _how(name: str) -> str:
    return f"```\nassay attack {DATA} --with {name} --threat {threat(name)} --limit 8\n```"


def _tables(item: Any, doc: Doc) -> list[str]:
    known = defaults(item)
    if not known:
        return []
    said = doc.args if inspect.isclass(item) else _said(ATTACKS.name_of(item))
    rows = [f"| `{n}` | {_cell(d)} | {_cell(said.get(n, ''))} |" for n, d in known.items()]
    return ["## Parameters", "\n".join(["| parameter | default | |", "|---|---|---|", *rows])]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _said(name: str) -> dict[str, str]:
    """Return what the parts of a preset say of its parameters: a parameter is that field that changes with it."""
    said = {}
    for parameter, default in inspect.signature(ATTACKS[name]).parameters.items():
        other = get(name, **{parameter: _other(default.default)})
        for part, field_ in _changed(get(name), other) or _called(get(name), parameter):
            text = parsed(part).args.get(field_, f"see {part.__name__}, below.")
            said[parameter] = f"`{part.__name__}.{field_}`: {text}"
            break
    return said


def _other(value: Any) -> Any:
    """Return a value that a parameter may have instead of its default, the same where none is known."""
    if callable(value):
        return next(loss for loss in (LOSSES["ce"], LOSSES["margin"]) if loss is not value)
    return value + 2 if isinstance(value, int) else value / 2 if isinstance(value, float) else value


def _changed(one: Runnable, two: Runnable) -> list[tuple[Any, str]]:
    """Return the class and the name of the fields in which two attacks of the same make differ."""
    pairs = [(a, b, f.name) for a, b in zip(parts(one), parts(two), strict=True) for f in dataclasses.fields(a)]
    return [(type(a), n) for a, b, n in pairs if _is_plain(getattr(a, n)) and getattr(a, n) != getattr(b, n)]


def _called(attack: Runnable, name: str) -> list[tuple[Any, str]]:
    return [(type(part), name) for part in parts(attack) if name in {f.name for f in dataclasses.fields(part)}]


def _is_plain(value: Any) -> bool:
    return not (dataclasses.is_dataclass(value) or isinstance(value, tuple))


def _made_of(attack: Runnable) -> list[str]:
    blocks = ["## Made of", f"```python\n{written(attack)}\n```"]
    for part in parts(attack):
        kind = type(part)
        if kind in _classes():
            blocks.append(f"{_link(kind.__name__)} has a page of its own.")
        elif kind is not Transformed:
            doc = parsed(kind)
            blocks += [f"### {kind.__name__}", doc.summary, *doc.rule]
            blocks += [f"*Cost*: {doc.cost}"] * bool(doc.cost)
            blocks += [f"*Differs from the paper in*: {doc.differs}"] * bool(doc.differs)
            blocks += [f"*References*: {doc.references}"] * bool(doc.references)
    return blocks


# --- index


HEAD = """# All attacks

Which one for which question: [how to choose](../how-to-choose.md). Every attack has the same call and the same rules:
each success is verified by a fresh pass, box and ball measured again in float64. *Passes* are forward and backward
passes together, of one sample, at the defaults, at the most: samples that fall early cost less. Attacks with an *x*
under *no eps* work without one."""

GROUPS = {
    "Smallest perturbation": lambda t: t["kind"] == "minimal",
    "Fixed budget": lambda t: t["kind"] != "minimal" and t["access"] == "gradient",
    "Without the gradient": lambda t: t["kind"] != "minimal" and t["access"] != "gradient",
}


def index() -> str:
    """Return the page that lists all attacks and combinations."""
    blocks = [HEAD]
    for title, fits in GROUPS.items():
        rows = [_row(n) for n in names() if fits(ATTACKS.traits(n))]
        head = ["| attack | norms | sees | no eps | passes | |", "|---|---|---|---|---|---|"]
        blocks += [f"## {title}", "\n".join([*head, *rows])]
    blocks += ["## Combinations", "They have the call of an attack, so they nest.", _combinations()]
    blocks.append(WRITTEN)
    return "\n\n".join(blocks) + "\n"


def _row(name: str) -> str:
    traits, attack = ATTACKS.traits(name), get(name)
    cells = [f"[`{name}`]({name}.md)", " ".join(traits["norm"]), traits["access"], "x" * any_size(attack)]
    return f"| {' | '.join([*cells, f'{passes(attack):,}', _short(parsed(ATTACKS[name]).summary)])} |"


def _short(summary: str) -> str:
    """Return what comes before the formula and the paper."""
    words = re.split(r"(?<=\S): | \([^()]*\[arXiv", " ".join(summary.split()))[0]
    return _cell(words.removesuffix(".") + ".")


def _combinations() -> str:
    found = [c for c in vars(combine).values() if inspect.isclass(c) and c.__module__ == combine.__name__]
    rows = [f"| `{c.__name__}` | {_cell(' '.join(parsed(c).summary.split()))} |" for c in (*found, Transformed)]
    return "\n".join(["| combination | |", "|---|---|", *rows])


# --- the table of the README


def filled(readme: str) -> str:
    """Return the README with our cells of the table of attacks as the registry has them.

    Raises:
        ValueError: a registered attack has no row, or attacks that differ share one.
    """
    before, begin, rest = readme.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no table between {BEGIN} and {END}")
    lines = table.strip().splitlines()
    missing = sorted(set(names()) - {n for line in lines for n in _named(line)})
    if missing:
        raise ValueError(f"README.md's table of attacks has no row for {', '.join(missing)}")
    return f"{before}{begin}\n{chr(10).join(map(_refilled, lines))}\n{end}{after}"


def _named(line: str) -> list[str]:
    return re.findall(r"\[?`([a-z0-9-]+)`", line.split("|")[1])


def _refilled(line: str) -> str:
    """Fill in our cells of a row: what its attacks see, the norms, and whether they work without an eps."""
    cells = [c.strip() for c in line.split("|")[1:-1]]
    known = [n for n in _named(line) if n in names()]
    if not known:
        return line
    ours = {tuple(_ours(n)) for n in known}
    if len(ours) > 1:
        raise ValueError(f"attacks of one row of README.md differ: {', '.join(known)}")
    first = re.sub(r"\[?`([a-z0-9-]+)`(\]\([^)]*\))?", lambda m: _paged(m[1]), cells[0])
    return f"| {' | '.join([first, *ours.pop(), *cells[7:]])} |".replace("|  ", "| ")


def _ours(name: str) -> list[str]:
    traits = ATTACKS.traits(name)
    own = ["x" * (norm in traits["norm"]) for norm in ("linf", "l2", "l1", "l0")]
    return [traits["access"], *own, "x" * any_size(get(name))]


def _paged(name: str) -> str:
    return f"[`{name}`](docs/attacks/{name}.md)" if name in names() else f"`{name}`"


# --- files


def files() -> dict[Path, str]:
    """Return every file that this script writes, with its text."""
    pages = {PAGES / f"{name}.md": page(name) for name in names()}
    return pages | {PAGES / "index.md": index(), README: filled(README.read_text(encoding="utf-8"))}


def stale() -> list[Path]:
    """Return the files that are not as they should be: to be written, or of attacks that are no more."""
    wanted = files()
    gone = [p for p in PAGES.glob("*.md") if p not in wanted]
    return gone + [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]


def main(argv: list[str] | None = None) -> int:
    """Write what has changed; return 1 where ``--check`` finds something to write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    args = parser.parse_args(argv)
    wanted, changed = files(), stale()
    for path in changed:
        print(path.relative_to(ROOT))
        if args.check:
            continue
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
