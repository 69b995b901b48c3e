"""Write docs/screens: a picture of every page of `assay serve`, and of every page that assay writes as a file.

Small runs on the models and data that ship are made for it, in a few minutes on one core. It needs the extra
`serve`, playwright, and a Chromium on this machine.

    python scripts/screenshots.py                 # all
    python scripts/screenshots.py walk report     # some of them, by their names
    python scripts/screenshots.py --out elsewhere
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

import assay
from assay.cli.app import app as command_line
from assay.data import load_data
from assay.models.loaders import load_model
from assay.serve.app import make_app, serving
from assay.serve.gate import Gate

ROOT = Path(__file__).parents[1]
WIDE, HIGH, NARROW, MOST = 1280, 900, 400, 2400
"""Width of a picture, height of the window, width of a narrow one, and the most of a long page that is shown."""

LARGEST = 200_000
"""Bytes above which a picture is written in fewer colours."""

FLAGS = [f"--{flag}" for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
         "disable-background-networking", "disable-component-update", "disable-sync")]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what is shown


def runs(folder: Path) -> Path:
    """Make the runs that the app shows."""
    for name, threat, prove in (
        ("robust", "linf:0.3", None),
        ("certified", "linf:0.1", "crown"),
        ("plain", "linf:0.1", None),
    ):
        command = f"assay evaluate demo:mnist-{name} demo:mnist --threat {threat} --limit 200"
        how: dict[str, Any] = {"limit": 200, "prove": prove, "progress": False, "command": command}
        assay.evaluate(f"demo:mnist-{name}", "demo:mnist", threat, **how, out=folder / f"mnist-{name}")
    how = {"limit": 200, "effort": "quick", "progress": False}
    assay.evaluate("demo:mnist-plain", "demo:mnist", "linf:0.3", **how, out=folder / "mnist-plain-0.3")
    run("attack demo:mnist-plain demo:mnist --with fgsm --threat linf:0.1 --limit 200 -q --out", folder / "fgsm")
    return folder


def run(command: str, *more: Any) -> None:
    """Call the command line in this process."""
    try:
        command_line([*command.split(), *map(str, more)], standalone_mode=False)
    except SystemExit as e:
        if e.code:
            raise


def report(folder: Path) -> Path:
    """Evaluate with proofs, and write the report."""
    command = "assay evaluate demo:mnist-certified demo:mnist --threat linf:0.1 --prove crown --limit 200"
    how: dict[str, Any] = {"limit": 200, "prove": "crown", "progress": False, "command": command}
    return assay.evaluate("demo:mnist-certified", "demo:mnist", "linf:0.1", **how, out=folder).report()


def training(folder: Path) -> Path:
    """Harden a network for some epochs."""
    net = "demo:mnist-plain"
    assay.harden(
        net, load_data("demo:mnist", limit=1500), "linf:0.1", epochs=6, out=folder / "net.safetensors", progress=False
    )
    return folder / "net.training" / "history.html"


def sparseness(folder: Path) -> Path:
    """Measure sparseness, clean and attacked."""
    how: dict[str, Any] = {"limit": 300, "progress": False}
    assay.study.sparseness(load_model("demo:mnist-plain"), load_data("demo:mnist", limit=300), "linf:0.1", **how).save(
        folder
    )
    return folder / "sparseness.html"


def landscape(folder: Path) -> Path:
    """Draw two models beside each other."""
    data = load_data("demo:mnist", limit=4)
    models = [load_model(f"demo:mnist-{name}") for name in ("plain", "robust")]
    found = assay.study.landscape(models, data.batch([3])[0], int(data.labels[3]), "linf:0.3", index=3, label="0")
    return found.report(folder / "landscape.html")


def walk(folder: Path) -> Path:
    """Walk from a sample to every other class."""
    data, model = load_data("demo:mnist", limit=40), load_model("demo:mnist-plain")
    found = assay.study.walk(model, data.batch([3])[0], int(data.labels[3]), index=3)
    matrix = assay.study.distances(model, data, limit=40, steps=50)
    return found.report(folder / "walk.html", data.class_names, matrix)


def attribution(folder: Path) -> Path:
    """Compare what the answers go back to."""
    from assay.study.attribution import attribution as measure

    found = measure(load_model("demo:mnist-plain"), load_data("demo:mnist", limit=24), "linf:0.1")
    return found.report(folder / "attribution.html")


FILES: dict[str, Callable[[Path], Path]] = {
    "report": report,
    "training": training,
    "sparseness": sparseness,
    "landscape": landscape,
    "walk": walk,
    "attribution": attribution,
}


# -------------------------------------------------------------------------------------------------------------- the app


def fallen(page: Page) -> int:
    """Return how many samples the page says have fallen."""
    return int(re.search(r"(\d+) of", page.locator("#eps-told").inner_text())[1])  # type: ignore[index]


def to_run(page: Page, name: str) -> None:
    """Go from the list to a run."""
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.locator("#gallery .card").first).to_be_visible()
    expect(page.locator("#eps-told")).to_contain_text("have fallen")


def to_sample(page: Page) -> None:
    """Go to the first sample that was fooled."""
    to_run(page, "mnist-plain-0.3")
    page.locator("#of-state").get_by_text("fooled").click()
    page.locator("#gallery a").nth(3).click()
    expect(page.locator("#attributions img")).to_have_count(4)


def go_walk(page: Page) -> None:
    """Walk to the end."""
    page.locator("#walk-go").click()
    expect(page.locator("#walk-status")).to_contain_text("Done", timeout=60_000)
    expect(page.locator("#walk-found .strip img").first).to_be_visible()


def serve_list(page: Page) -> None:
    """Choose two runs."""
    for name in ("mnist-plain-0.3", "mnist-robust"):
        page.locator("tr", has=page.get_by_role("link", name=name, exact=True)).get_by_role("checkbox").check()
    expect(page.locator("#compare a")).to_be_visible()


def serve_compare(page: Page) -> None:
    """Compare them."""
    serve_list(page)
    page.locator("#compare a").click()
    expect(page.locator(".chips").first).to_be_attached()


def serve_run(page: Page) -> None:
    """Drag the mark of eps to a third."""
    to_run(page, "mnist-plain-0.3")
    before = fallen(page)
    page.locator("#eps").fill("350")
    page.wait_for_timeout(800)
    if fallen(page) == before:
        sys.exit("dragging eps changed nothing")


def serve_sample(page: Page) -> None:
    """Look at a sample."""
    to_sample(page)


def serve_walk(page: Page) -> None:
    """Watch a walk from it."""
    to_sample(page)
    go_walk(page)
    page.locator("#walk").scroll_into_view_if_needed()


def serve_upload(page: Page) -> None:
    """Upload the picture of a digit as somebody would have it: dark ink on light paper, larger than the model's."""
    to_run(page, "mnist-plain-0.3")
    page.get_by_role("link", name="Upload an image").click()
    digit = 255 - 255 * load_data("demo:mnist", limit=5).batch([4])[0, 0].numpy()
    packed = io.BytesIO()
    Image.fromarray(digit.astype(np.uint8)).resize((280, 280), Image.Resampling.BICUBIC).save(packed, "PNG")
    file: Any = {"name": "four.png", "mimeType": "image/png", "buffer": packed.getvalue()}
    page.locator("#upload input").set_input_files(file)
    page.locator("#invert").get_by_text("swap").click()
    expect(page.locator("#uploaded h2").first).to_have_text("It says 4")
    go_walk(page)


APP: dict[str, Callable[[Page], None]] = {
    "serve-list": serve_list,
    "serve-compare": serve_compare,
    "serve-run": serve_run,
    "serve-sample": serve_sample,
    "serve-walk": serve_walk,
    "serve-upload": serve_upload,
    "serve-run-narrow": serve_run,
    "serve-sample-dark": serve_sample,
}


# --------------------------------------------------------------------------------------------------------- the pictures


def main() -> None:
    """Make the pictures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screens")
    wanted = parser.parse_args()
    names = wanted.names or [*FILES, *APP]
    wanted.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, chromium() as browser:
        for name in (n for n in names if n in FILES):
            (Path(place) / name).mkdir()
            page = opened(browser, name)
            page.goto(FILES[name](Path(place) / name).as_uri())
            keep(page, wanted.out / f"{name}.png")
        if app := [n for n in names if n in APP]:
            shoot_app(browser, app, runs(Path(place) / "runs"), wanted.out)


def shoot_app(browser: Any, names: list[str], folder: Path, out: Path) -> None:
    """Serve the runs, and go through the pages."""
    gate = Gate()
    with serving(make_app(folder, gate=gate), gate) as up:
        threading.Thread(target=up.work, daemon=True).start()
        for name in names:
            page = opened(browser, name)
            page.goto(up.url)
            expect(page.locator(".runs")).to_be_visible()
            APP[name](page)
            keep(page, out / f"{name}.png", "#walk" if name == "serve-walk" else "")
        up.stop()


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield the browser."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        sys.exit("There is no Chromium on the PATH.")
    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=program, args=FLAGS)


def opened(browser: Any, name: str) -> Page:
    """Return a new page, narrow or dark if its name says so."""
    narrow = name.endswith("narrow")
    size = {"width": NARROW if narrow else WIDE, "height": HIGH}
    context = browser.new_context(viewport=size, color_scheme="dark" if name.endswith("dark") else "light")
    page: Page = context.new_page()
    page.set_default_timeout(30_000)
    return page


def keep(page: Page, file: Path, start: str = "") -> None:
    """Write a page as a PNG, from an element on, cut where it is too long, and say how large it is."""
    page.wait_for_timeout(700)  # transitions
    box = page.locator(start).bounding_box() if start else None
    top = 0 if box is None else int(box["y"] + page.evaluate("scrollY"))
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as whole:
        image = whole.convert("RGB").crop((0, top, whole.width, min(whole.height, top + MOST)))
    image.save(file, "PNG", optimize=True)
    if file.stat().st_size > LARGEST:
        few = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(file, "PNG", optimize=True)
    page.context.close()
    print(f"{file.name}: {image.width} x {image.height}, {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
