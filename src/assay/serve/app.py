"""The app: its pages, its gate, and the server that it runs in."""

import errno
import logging
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, final
from urllib.parse import parse_qsl

from assay.core.errors import AssayError, RunError
from assay.core.optional import need
from assay.data import Data
from assay.models import Model
from assay.reports.html import template
from assay.serve import compare, home, run, sample, upload, walking
from assay.serve.catalogue import Catalogue
from assay.serve.elements import Element, core, h, link, trouble
from assay.serve.gate import Gate
from assay.serve.live import Walks
from assay.serve.shelf import Shelf, Uploads
from assay.serve.sources import Sources

HOST: Final = "127.0.0.1"

_PAGES: Final[Mapping[str, Callable[[Shelf, Mapping[str, str]], Element]]] = {
    "/": home.page,
    "/run": run.page,
    "/compare": compare.page,
    "/sample": sample.page,
    "/upload": upload.page,
}

_INDEX: Final = """<!doctype html>
<html lang="en">
<head>{{%metas%}}<title>{{%title%}}</title>{{%favicon%}}{{%css%}}<style>{style}</style></head>
<body>{{%app_entry%}}{{%config%}}{{%scripts%}}{{%renderer%}}</body>
</html>"""


def make_app(
    folder: Path | str, models: Sequence[Model] = (), data: Sequence[Data] = (), gate: Gate | None = None
) -> Any:
    """Return the app as a ``dash.Dash``, which answers nobody who does not come through its gate.

    Args:
        folder: where the runs are; nothing else is read but the data and harmless model files that its manifests name.
        models: models that runs may be looked at with, by their fingerprints.
        data: the same of data.
        gate: with the token; None for a new one.

    Raises:
        RunError: there is no such folder.
        MissingExtraError: the packages of the extra ``serve`` are not installed.
    """
    dash = need("dash", "serve")
    root = Path(folder)
    if not root.is_dir():
        raise RunError("a folder of runs", str(folder), "Make one: assay evaluate MODEL DATA --threat linf:8/255")
    sources = Sources(models, data)
    shelf = Shelf(Catalogue(root), sources, Walks(sources), Uploads())
    app = dash.Dash(
        "assay.serve", title="assay", update_title=None, serve_locally=True, include_assets_files=False,
        suppress_callback_exceptions=True, add_log_handler=False, enable_mcp=False,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )  # fmt: skip
    app.index_string = _INDEX.format(style=template("report.css") + template("walk.css") + _own("serve.css"))
    app.layout = _layout()
    home.register(app)
    for part in (run, sample, upload, walking):
        part.register(app, shelf)
    _route(app, dash, shelf)
    app.server.register_error_handler(dash.exceptions.DependencyException, lambda _: ("", 404))
    (gate or Gate()).stand_before(app.server, app.csp_hashes())
    return app


def _own(name: str) -> str:
    return resources.files("assay.serve").joinpath(name).read_text(encoding="utf-8")


def _layout() -> Element:
    head = h(
        "Header",
        h("Div", link("assay", ""), h("Span", " local runs"), className="mark"),
        h("Nav", id="crumbs"),
        className="head",
    )
    return h("Div", core("Location", id="at", refresh=False), head, h("Main", id="page"), className="page")


def _route(app: Any, dash: Any, shelf: Shelf) -> None:
    @app.callback(
        dash.Output("page", "children"),
        dash.Output("crumbs", "children"),
        dash.Input("at", "pathname"),
        dash.Input("at", "search"),
    )
    def show(path: Any, search: Any) -> Any:
        query = dict(parse_qsl(str(search or "").lstrip("?")))
        try:
            asked = _PAGES.get(str(path or "/"))
            content = trouble("There is no such page.") if asked is None else asked(shelf, query)
        except AssayError as e:
            content = trouble(str(e))
        return content, _crumbs(query)


def _crumbs(query: Mapping[str, str]) -> list[Element]:
    """Return the way back: to the list, and to the run that the page belongs to."""
    name = query.get("run") or query.get("name")
    return [link("all runs", ""), *([" · ", link(name, "run", name=name)] if name else [])]


@final
@dataclass(frozen=True, slots=True)
class Served:
    """A server that is up: its address with the token, and the call that lets it work until it is stopped."""

    url: str
    work: Callable[[], None]
    stop: Callable[[], None]


@contextmanager
def serving(app: Any, gate: Gate, port: int = 0) -> Iterator[Served]:
    """Bind an app to a port of this machine that nobody else can reach; 0 for a free one.

    Raises:
        RunError: the port is taken, or not for this user.
    """
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        """Logs no requests: their addresses hold the token."""

        def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 (the name in the base)
            pass

    try:
        door = socket.create_server((HOST, port))  # werkzeug would print, and exit, where the port is taken
    except OSError as e:
        found = "another program listens there" if e.errno == errno.EADDRINUSE else str(e.strerror)
        raise RunError(f"a free port, {port}", found, "Leave --port out: a free one is chosen.") from e
    with door:
        server = make_server(HOST, port, app.server, threaded=True, request_handler=Quiet, fd=door.fileno())
        try:
            yield Served(f"http://{HOST}:{server.port}/?token={gate.token}", server.serve_forever, server.shutdown)
        finally:
            server.server_close()


def serve(
    folder: Path | str = "runs", port: int = 0, models: Sequence[Model] = (), data: Sequence[Data] = (), *,
    browser: bool = True, told: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve a folder of runs on this machine until Ctrl-C.

    Args:
        folder: where the runs are.
        port: on 127.0.0.1; 0 for a free one.
        models: see :func:`make_app`.
        data: see :func:`make_app`.
        browser: whether to open one.
        told: is given the address, which holds the token.

    Raises:
        RunError: there is no such folder, or the port is taken.
        MissingExtraError: the packages of the extra ``serve`` are not installed.
    """
    gate = Gate()
    app = make_app(folder, models, data, gate)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving(app, gate, port) as up:
        told(up.url)
        if browser:
            threading.Timer(0.3, webbrowser.open, (up.url,)).start()
        try:
            up.work()
        except KeyboardInterrupt:
            return
