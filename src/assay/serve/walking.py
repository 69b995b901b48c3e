"""The walk on a page: choose a class, start, watch, stop; afterwards every step can be looked at again."""

from typing import Any, Final

import numpy as np

from assay.core.errors import AssayError
from assay.core.optional import need
from assay.reports.landscape import short
from assay.reports.text import NORMS, plural
from assay.serve.elements import (
    Element,
    brief,
    certainty,
    core,
    drawing,
    h,
    pictured,
    share_bar,
    shown,
    shown_change,
    slider,
    trouble,
)
from assay.serve.live import Climb
from assay.serve.shelf import Shelf, Subject

_POLL: Final = 160
"""Milliseconds between two looks at a walk."""

_LOOKS: Final = 16
"""A walk that is over is shown within this many looks, however fast it was."""

_MOST: Final = 5
"""Classes of which the confidence is shown, beside the two in question."""


def section(subject: Subject, where: dict[str, Any], sure: np.ndarray, wanted: int | None) -> Element:
    """Return the part of a page from which a walk is started; ``sure`` (c,) is what the model says now."""
    own = int(sure.argmax())
    ranked = [int(k) for k in np.argsort(-sure, kind="stable") if k != own]
    chosen = wanted if wanted in ranked else ranked[0]
    options = [{"label": brief(subject.label(k)), "value": k} for k in sorted(ranked)]
    return h(
        "Section",
        h("H2", f"What would have to change before it says something else than {subject.label(own)}?"),
        h(
            "P",
            "Choose a class. The walk climbs its probability step by step; then the smallest change that reaches it is "
            f"searched ({NORMS.get(subject.norm, subject.norm)}).",
            className="lead",
        ),
        h(
            "Div",
            h("Label", "to class", htmlFor="walk-target"),
            core("Dropdown", id="walk-target", options=options, value=chosen, clearable=False),
            h("Button", "Walk", id="walk-go", type="button"),
            h("Button", "Stop", id="walk-stop", type="button", disabled=True),
            className="controls",
        ),
        core("Store", id="walk-where", data=where),
        core("Store", id="walk-job"),
        core("Interval", id="walk-tick", interval=_POLL, disabled=True),
        h("P", id="walk-status", className="status", role="status"),
        h(
            "Div",
            h("Div", id="walk-frame"),
            slider("walk-step", "Step of the walk", 0, 0, disabled=True),
            id="walk-view",
            hidden=True,
        ),
        h("Div", id="walk-found"),
        id="walk",
    )


def register(app: Any, shelf: Shelf) -> None:
    """Make the walk work."""
    dash = need("dash", "serve")
    out, given, held = dash.Output, dash.Input, dash.State

    @app.callback(
        out("walk-job", "data"),
        out("walk-tick", "disabled", allow_duplicate=True),
        out("walk-status", "children", allow_duplicate=True),
        out("walk-step", "value", allow_duplicate=True),
        out("walk-found", "children", allow_duplicate=True),
        given("walk-go", "n_clicks"),
        held("walk-target", "value"),
        held("walk-where", "data"),
        prevent_initial_call=True,
    )
    def start(clicks: Any, target: Any, where: Any) -> Any:
        if not clicks:
            raise dash.exceptions.PreventUpdate
        return _begin(shelf, target, where)

    @app.callback(given("walk-stop", "n_clicks"), held("walk-job", "data"), prevent_initial_call=True)
    def stop(_: Any, name: Any) -> None:
        if (job := shelf.walks.get(name)) is not None:
            job.stop.set()

    @app.callback(
        out("walk-step", "max"),
        out("walk-step", "value"),
        out("walk-step", "disabled"),
        out("walk-view", "hidden"),
        out("walk-status", "children"),
        out("walk-found", "children"),
        out("walk-tick", "disabled"),
        out("walk-stop", "disabled"),
        given("walk-tick", "n_intervals"),
        held("walk-job", "data"),
        held("walk-step", "value"),
        held("walk-where", "data"),
        prevent_initial_call=True,
    )
    def look(_: Any, name: Any, at: Any, where: Any) -> Any:
        return _look(shelf, name, at, where)

    @app.callback(
        out("walk-frame", "children"),
        given("walk-step", "value"),
        given("walk-step", "max"),
        held("walk-job", "data"),
        held("walk-where", "data"),
        prevent_initial_call=True,
    )
    def draw(at: Any, _: Any, name: Any, where: Any) -> Any:
        job = shelf.walks.get(name)
        if job is None or not job.frames:
            return None
        return _drawn(shelf, job, min(max(int(at or 0), 0), len(job.frames) - 1), where)


def _begin(shelf: Shelf, target: Any, where: Any) -> tuple[Any, ...]:
    """Start a walk: return its name, whether nobody need look, the status, the step, and what was found."""
    try:
        subject = shelf.subject(where)
        name = shelf.walks.start(subject.model, subject.x, int(target), subject.norm, subject.index)
    except (AssayError, TypeError, ValueError) as e:
        return None, True, f"There is no walk: {e}", 0, None
    return name, False, "The walk begins.", 0, None


def _look(shelf: Shelf, name: Any, at: Any, where: Any) -> tuple[Any, ...]:
    """Return how far a walk is: most steps, step, whether that is locked, no picture, status, find, ended, ended."""
    job = shelf.walks.get(name)
    if job is None:
        return 0, 0, True, True, "", None, True, True
    over, state, last = job.over, job.state, max(len(job.frames) - 1, 0)
    step = min(last, int(at or 0) + -(-(last + 1) // _LOOKS))
    ended = over and step == last
    found = _drawn(shelf, job, None, where) if ended else None
    return last, step, not ended, not job.frames, _status(job, state, step), found, ended, ended


def _drawn(shelf: Shelf, job: Climb, step: int | None, where: Any) -> Element:
    """Return a step of a walk, or with None what was found at its end; a sentence where its start is gone."""
    try:
        subject = shelf.subject(where)
    except AssayError as e:
        return trouble(str(e))
    return _found(job, subject) if step is None else _frame(job, step, subject)


def _status(job: Climb, state: str, step: int) -> str:
    if state == "failed":
        return f"The walk failed. {job.error}"
    if state == "cancelled":
        return f"Cancelled after step {len(job.frames) - 1}." if job.frames else "Cancelled."
    if state == "done" and step >= len(job.frames) - 1:
        return f"Done, after {plural(len(job.frames) - 1, 'step')}."
    return f"Step {step}, and looking for the smallest change." if state == "searching" else f"Climbing, step {step}."


def _frame(job: Climb, at: int, subject: Subject) -> Element:
    """Return one step: the picture, what the model says of it, and how that came about."""
    x, sure = job.frames[at], job.sure[at]
    own, top = int(job.sure[0].argmax()), int(sure.argmax())
    low, high = job.box
    changed, scale = shown_change(x - job.frames[0], f"What was changed up to step {at}")
    named = dict.fromkeys([job.target, own, *(int(k) for k in np.argsort(-sure, kind="stable")[:_MOST])])
    return h(
        "Div",
        pictured(
            shown(x, low, high, f"Step {at}: {subject.label(top)}"),
            f"step {at}: {subject.label(top)} {certainty(float(sure[top]))}",
        ),
        pictured(changed, "change so far", f"full colour at ± {short(scale)}"),
        h(
            "Div",
            *(share_bar(subject.label(k), float(sure[k]), main=k == job.target) for k in named),
            className="sures",
        ),
        h(
            "Figure",
            h("Img", src=_course(job, at, own), alt=f"Confidence in {subject.label(job.target)} along the way"),
            h("Figcaption", f"confidence in {subject.label(job.target)}, and dashed in {subject.label(own)}"),
            className="view course",
        ),
        className="step",
    )


def _course(job: Climb, at: int, own: int) -> str:
    """Draw how confidence went, up to step ``at``, on the length of all steps that are known."""
    over = max(len(job.frames) - 1, 1)

    def path(k: int) -> str:
        return "M" + "L".join(f"{1000 * i / over:.0f} {1000 * (1 - float(s[k])):.0f}" for i, s in enumerate(sures))

    sures = job.sure[: at + 1]
    frame = "".join(f'<path class="line" d="M0 {y}H1000"/>' for y in (0, 500, 1000))
    wanted, left = path(job.target), path(own)
    return drawing(f'{frame}<path class="ink dashes" d="{left}"/><path class="accent" d="{wanted}"/>')


def _found(job: Climb, subject: Subject) -> Element:
    """Return the smallest change that was found, and the pictures on the way there."""
    if job.found is None:
        return None
    way, wanted = job.found.ways[0], subject.label(job.target)
    if not way.found:
        return h("P", f"No change after which it says {wanted} was found by {job.found.attack}.", className="lead")
    low, high = job.box
    frames = [
        pictured(
            shown(x, low, high, f"{way.shares[i]:.0%} of the way"),
            f"{way.shares[i]:.0%}",
            f"{wanted} {certainty(float(way.confidences[i, job.target]))}",
        )
        for i, x in zip(way.shown, way.frames, strict=True)
    ]
    change, scale = shown_change(way.end - job.frames[0], f"The change to {wanted}")
    return h(
        "Div",
        h("H3", f"A change of {short(way.size)} ({NORMS.get(job.norm, job.norm)}) is enough for {wanted}"),
        h(
            "P",
            f"The smallest that {job.found.attack} found, verified by a fresh pass; a smaller one may exist. On the "
            "straight way there (100 %) and a little beyond:",
            className="lead",
        ),
        h("Div", *frames, pictured(change, "change", f"full colour at ± {short(scale)}"), className="strip"),
    )
