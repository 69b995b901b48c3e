"""One sample: clean, adversarial and their difference, what is known of it, what the answers go back to, and a walk."""

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from assay.core.errors import AssayError, MissingExtraError, RunError
from assay.core.optional import need
from assay.core.types import Logits
from assay.models import Door, Model
from assay.reports.landscape import short
from assay.reports.text import DASH, count
from assay.runs.totals import number
from assay.serve import walking
from assay.serve.catalogue import Arrays, Kept
from assay.serve.elements import (
    Element,
    certainty,
    core,
    h,
    link,
    pictured,
    share_bar,
    shown,
    shown_change,
    table,
    trouble,
)
from assay.serve.home import Query
from assay.serve.live import predicted
from assay.serve.run import state_of
from assay.serve.shelf import Shelf, class_name
from assay.study.attribution import INTEGRATED, attribute
from assay.study.curvature import pose_one
from assay.threats import Threat
from assay.threats.problem import Goal

_SHOWN: Final = 5
"""Classes of which the confidence is shown."""


def page(shelf: Shelf, query: Query) -> Element:
    """Return the page of a sample: ``run`` and ``index``.

    Raises:
        RunError: the run or the sample is not there.
    """
    run = shelf.catalogue.open(query.get("run", ""))
    row = run.row(_whole(query.get("index", "")))
    if row is None:
        raise RunError(f"the number of a sample of {run.name}", repr(query.get("index", ""))[:40], "Choose one there.")
    index = row["index"]
    stored = run.arrays([index]).get(index, {})
    clean = shelf.clean(run, index, stored)
    return h(
        "Div",
        _beside(run, index),
        h("H1", _headline(run, row)),
        _pictures(run, row, stored, clean),
        h("Section", h("H2", "What is known"), _known(run, row, stored), id="known"),
        *_asked(shelf, run, row),
    )


def _whole(text: str) -> int:
    """Read a number of a sample; -1 where it is none."""
    return int(text) if text.isdecimal() and len(text) < 16 else -1


def _beside(run: Kept, index: int) -> Element:
    known = run.samples["index"].to_numpy()
    before, after = known[known < index], known[known > index]
    return h(
        "P",
        link(f"← #{before[-1]}", "sample", run=run.name, index=int(before[-1])) if len(before) else h("Span", " "),
        link(f"#{after[0]} →", "sample", run=run.name, index=int(after[0])) if len(after) else h("Span", " "),
        className="turn",
    )


def _headline(run: Kept, row: dict[str, Any]) -> str:
    s, index = run.summary, row["index"]
    if row["label"] < 0:
        return f"Sample {index} was not attacked: the model is wrong on it as it is."
    if row["status"] == "misclassified":
        return f"Sample {index}, a {s.label(row['label'])}, is taken for {s.label(row['prediction'])} as it is."
    if row["fooled"]:
        wrong = row["adversarial_prediction"]
        said = "something else" if wrong is None else s.label(wrong)
        return f"Sample {index}, a {s.label(row['label'])}, becomes {said} by a change of {s.units.show(row['size'])}."
    proof = "and that is proven" if row["certified"] is True else "no change was found that fools"
    return f"Sample {index}, a {s.label(row['label'])}, stays right under {s.threat}: {proof}."


def _pictures(run: Kept, row: dict[str, Any], stored: Arrays, clean: np.ndarray | None) -> Element:
    """Return clean, adversarial and difference, as far as they are there."""
    s, views = run.summary, []
    x = stored.get("x") if row["fooled"] else None
    try:
        if clean is not None:
            views.append(pictured(shown(clean, *run.box, alt="clean"), "clean", _told(stored, "clean_confidence")))
        if x is not None:
            views.append(pictured(shown(x, *run.box, alt="adversarial"), "adversarial", _told(stored, "confidence")))
        if x is not None and clean is not None:
            drawn, scale = shown_change(np.asarray(x, dtype=float) - clean, "difference")
            times = (run.box[1] - run.box[0]) / scale if scale else 1.0
            views.append(
                pictured(drawn, f"difference, {short(times)} times", f"full colour at ± {s.units.show(scale)}")
            )
    except (TypeError, ValueError) as e:
        return trouble(f"The stored inputs cannot be drawn: {e}")
    if not views:
        return trouble(
            "There is no picture: the run stores inputs of fooled samples only, and its data are not at hand."
        )
    return h("Div", *views, className="views large")


def _sure(stored: Arrays, name: str) -> str:
    value = number(stored[name].item()) if name in stored and stored[name].size == 1 else None
    return "" if value is None else certainty(value)


def _told(stored: Arrays, name: str) -> str:
    return f"{said} sure" if (said := _sure(stored, name)) else ""


def _known(run: Kept, row: dict[str, Any], stored: Arrays) -> Element:
    s = run.summary
    before, after = _sure(stored, "clean_confidence"), _sure(stored, "confidence")
    wrong = row["adversarial_prediction"]
    facts = {
        "state": state_of(row),
        "label": s.label(row["label"]) if row["label"] >= 0 else DASH,
        "prediction": _joined(s.label(row["prediction"]) if row["prediction"] >= 0 else DASH, before),
        "adversarial prediction": _joined(DASH if wrong is None else s.label(wrong), after),
        "margin (logits)": short(row["margin"]) if np.isfinite(row["margin"]) else DASH,
        "size of the change": s.units.show(row["size"]) if row["size"] else "0, wrong as it is",
        "bracket": _bracket(run, row),
        "broken by": str(row["broken_by"] or DASH),
        "passes": f"{count(row['forwards'])} forward, {count(row['backwards'])} backward",
    }
    return table(["", ""], [[name, h("Span", value)] for name, value in facts.items()])


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _bracket(run: Kept, row: dict[str, Any]) -> str:
    show, lower, upper = run.summary.units.show, row["lower"], row["upper"]
    proven = f"{show(lower)} proven" if lower > 0 else "nothing proven"
    return f"{proven}, {'nothing found' if np.isinf(upper) else f'{show(upper)} found'}"


# --------------------------------------------------------------------------------------------------- what needs a model


def _asked(shelf: Shelf, run: Kept, row: dict[str, Any]) -> list[Element]:
    """Return what the model has to be asked for; a sentence where that cannot be."""
    where = {"run": run.name, "index": row["index"]}
    try:
        subject = shelf.subject(where)
        sure = predicted(subject.model, subject.x, shelf.sources)
    except AssayError as e:
        return [h("Section", h("H2", "With the model"), trouble(str(e)))]
    wanted = row["adversarial_prediction"]
    return [
        h("Section", h("H2", "What the model says now"), confidences(run, subject.model, sure)),
        h(
            "Section",
            h("H2", "Which pixels the answer goes back to"),
            core("Store", id="attribute-where", data=where),
            core("Loading", children=h("Div", id="attributions"), type="dot"),
        ),
        walking.section(subject, where, sure, wanted),
    ]


def confidences(run: Kept, model: Model, sure: np.ndarray) -> Element:
    """Return the classes that a model is surest of."""
    top = [int(k) for k in np.argsort(-sure, kind="stable")[:_SHOWN]]
    bars = [share_bar(class_name(run.summary, model, k), float(sure[k]), main=k == top[0]) for k in top]
    return h("Div", *bars, className="sures")


def register(app: Any, shelf: Shelf) -> None:
    """Make the attributions come after the page, for they take their time."""
    dash = need("dash", "serve")

    @app.callback(dash.Output("attributions", "children"), dash.Input("attribute-where", "data"))
    def maps(where: Any) -> Any:
        try:
            return _attributions(shelf, where)
        except AssayError as e:
            return trouble(str(e))


def _attributions(shelf: Shelf, where: Any) -> Element:
    """Return maps of the clean and the adversarial input, each of the class that the model says there."""
    subject = shelf.subject(where)
    run, model = subject.run, subject.model
    stored = run.arrays([subject.index]).get(subject.index, {})
    inputs = {"clean": subject.x}
    if "x" in stored:
        inputs["adversarial"] = torch.from_numpy(np.ascontiguousarray(stored["x"])).float()
    views, method = [], ""
    for name, x in inputs.items():
        with shelf.sources.use:
            said = int(predicted(model, x, shelf.sources).argmax())
            found, method = _map(model, x, said)
        drawn, scale = shown_change(found, f"Attribution of the {name} input to {subject.label(said)}")
        views += [
            pictured(shown(x.numpy(), *run.box, alt=name), name),
            pictured(drawn, f"for {subject.label(said)}", f"full colour at ± {short(scale)}"),
        ]
    told = f"By {method}: what is red speaks for the class that the model says, what is blue against it."
    return h("Div", h("P", told, className="lead"), h("Div", *views, className="views four"))


def _map(model: Model, x: Tensor, target: int) -> tuple[np.ndarray, str]:
    """Return the attributions (*f) of a class, and what they are: plain gradients where captum is missing."""
    try:
        return attribute(model, x, target, INTEGRATED), "integrated gradients"
    except MissingExtraError:
        return gradient(model, x, target), "the gradient of its logit (integrated gradients need the extra attribution)"


def gradient(model: Model, x: Tensor, target: int) -> np.ndarray:
    """Return the gradient (*f) of the logit of a class by one sample x (*f).

    Raises:
        DataError: x is not inside the box.
    """

    def logit(z: Logits, _: Goal) -> Tensor:
        return z[:, target]

    with model.frozen() as live:
        p = pose_one(live, x, target, Threat("linf"), 0, 0)
        found: np.ndarray = Door(live, 1).gradient(p.x0, p, logit).grad[0].cpu().numpy()
    return found
