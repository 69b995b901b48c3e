"""The local app: who gets in, what it reads, that nothing in a run can do harm, and every page in a real browser."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from needs import framework
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import assay
from assay.cli.app import app as command_line
from assay.core.errors import DataError, ModelError, RunError
from assay.core.registry import UsageError
from assay.data import load_data
from assay.data.fit import Fit
from assay.models.loaders import load_model
from assay.runs import Run
from assay.serve import compare
from assay.serve.app import make_app
from assay.serve.catalogue import Catalogue
from assay.serve.live import Walks
from assay.serve.run import states
from assay.serve.sample import gradient
from assay.serve.shelf import Shelf, Uploads
from assay.serve.sources import Sources
from assay.serve.upload import decoded, fit_of
from assay.study.walk import climb, walk

framework("dash")

TAG = "<img src=x onerror=alert(1)>"
SECRET = "the secret of another folder"


# ---------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A place that nobody asked the app to show: a run with a secret name."""
    folder = tmp_path_factory.mktemp("outside")
    evaluate("mnist-plain", folder / "secret-run", limit=4)
    change(folder / "secret-run", lambda m: m["model"].update(name=SECRET))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, outside):
    """Runs as people have them, and runs that somebody made to do harm."""
    folder = tmp_path_factory.mktemp("served") / "runs"
    evaluate("mnist-robust", folder / "demo" / "robust", prove="crown")
    plain = evaluate("mnist-plain", folder / "demo" / "plain")
    attack = ["attack", "demo:mnist-plain", "demo:mnist", "--with", "fgsm", "--threat", "linf:0.1", "--limit", "24"]
    assert CliRunner().invoke(command_line, [*attack, "--out", str(folder / "attacked"), "-q"]).exit_code == 0
    shutil.copytree(folder / "attacked", folder / "earlier")
    forget(folder / "earlier" / "attack.json")
    shutil.copytree(plain, folder / "hostile" / TAG)
    change(folder / "hostile" / TAG, poison)
    shutil.copytree(plain, folder / "hostile" / os.fsdecode(b"no text \xff"))
    damage(plain, folder / "damaged")
    (folder / "link").symlink_to(outside)
    shutil.copytree(plain, folder / "half")
    (folder / "half" / "manifest.json").unlink()
    (folder / "half" / "manifest.json").symlink_to(outside / "secret-run" / "manifest.json")
    (folder / "round").mkdir()
    (folder / "round" / "again").symlink_to(folder)
    return folder


def evaluate(name, out, threat="linf:0.1", limit=24, prove=None):
    command = f"assay evaluate demo:{name} demo:mnist"
    how = {"limit": limit, "effort": "quick", "out": out, "progress": False, "prove": prove, "command": command}
    assay.evaluate(f"demo:{name}", "demo:mnist", threat, **how)
    return out


def change(folder, edit):
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forget(file):
    """Leave only what the first version of the file said."""
    new = ("assay", "created", "command", "identity", "model", "data", "machine", "misclassified")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in new}))


def make_shelf(folder):
    sources = Sources()
    return Shelf(Catalogue(folder), sources, Walks(sources), Uploads())


def poison(manifest):
    """Put into a manifest what an attacker would."""
    manifest["model"] |= {"name": f"<script>alert(1)</script>{TAG}", "fingerprint": "0" * 64}
    manifest["data"] |= {
        "class_names": [TAG + "\ud800"] * 10,
        "source": "../../../../etc/passwd",
        "fingerprint": "1" * 64,
    }
    manifest["data"]["name"] = "javascript:alert(1)" + "x" * 100_000
    manifest["command"] = "assay evaluate py:os:getcwd x.pkl --trust-pickle"
    manifest["identity"]["threat"]["text"] = f'linf:0.1"><svg onload=alert(1)>{TAG}'
    finding = {"code": TAG, "severity": TAG, "message": f"{TAG}[x](javascript:alert(1))", "evidence": {TAG: 10**400}}
    manifest["findings"] = [{**finding, "remedy": TAG}]
    manifest["totals"]["passes"] = {"forwards": 10**300, "backwards": -1}


def damage(run, folder):
    """Make a run of each kind of damage."""
    for name in ("manifest", "table", "inputs", "schema", "list"):
        shutil.copytree(run, folder / name)
    (folder / "manifest" / "manifest.json").write_text('{"schema": 1, ')
    (folder / "list" / "manifest.json").write_text("[]")
    next((folder / "table" / "samples").iterdir()).write_bytes(b"PAR1 and nothing more")
    next((folder / "inputs" / "adversarials").iterdir()).write_bytes(b"PK\3\4 nothing")
    part = next((folder / "schema" / "samples").iterdir())
    pq.write_table(pq.read_table(part).drop_columns(["size", "status"]), part)


# ---------------------------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def address(runs):
    """Start the real command in a process of its own, and end it as its user would."""
    command = [sys.executable, "-m", "assay", "serve", str(runs), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told = server.stdout.readline()
        yield re.match(r"http://127\.0\.0\.1:\d+/\?token=\S+", told)[0]
    finally:
        server.send_signal(signal.SIGINT)
        errors = server.communicate(timeout=60)[1]
    assert server.returncode == 0, errors
    assert "Traceback" not in errors, errors


def ask(address, path, method="GET", body=None, **headers):
    """Ask over plain HTTP, with no more headers than these; return the answer and its text."""
    port = int(re.search(r":(\d+)/", address)[1])
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    line.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    given = {"Host": f"127.0.0.1:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    if body is not None:
        given |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    for name, value in given.items():
        line.putheader(name, value)
    line.endheaders()
    if body is not None:
        line.send(body.encode())
    answer = line.getresponse()
    text = answer.read().decode(errors="replace")
    line.close()
    return answer, text


@pytest.fixture(scope="module")
def cookie(address):
    """The cookie that whoever comes with the token gets."""
    answer, _ = ask(address, "/?" + address.partition("?")[2])
    return answer.headers["Set-Cookie"].partition(";")[0]


def shown(address, cookie, path, search=""):
    """Return what the app answers when a browser goes to a page: the tree of elements, as JSON."""
    asked = {
        "output": "..page.children...crumbs.children..",
        "outputs": [{"id": "page", "property": "children"}, {"id": "crumbs", "property": "children"}],
        "inputs": [
            {"id": "at", "property": "pathname", "value": path},
            {"id": "at", "property": "search", "value": search},
        ],
        "changedPropIds": ["at.pathname"],
    }
    origin = re.match(r"http://[^/]+", address)[0]
    answer, text = ask(address, "/_dash-update-component", "POST", json.dumps(asked), Cookie=cookie, Origin=origin)
    assert answer.status == 200, text
    return text


WAYS_IN = ("/", "/?token=", "/?token=x", "/?token=%ff%fe", "/run?name=x", "/_dash-layout", "/_dash-dependencies",
           "/_favicon.ico", "/_reload-hash", "/_dash-component-suites/dash/dcc/dash_core_components.js", "/assets/x",
           "/nothing")  # fmt: skip


@pytest.mark.parametrize("path", WAYS_IN)
def test_nobody_without_the_token_gets_anything(address, path):
    answer, text = ask(address, path)
    assert answer.status == 403
    assert "Set-Cookie" not in answer.headers
    assert "robust" not in text


def test_callbacks_without_the_cookie_are_refused(address):
    origin = re.match(r"http://[^/]+", address)[0]
    for wrong in ("", "assay=x", "session=" + address.partition("=")[2]):
        answer, _ = ask(address, "/_dash-update-component", "POST", "{}", Cookie=wrong, Origin=origin)
        assert answer.status == 403


def test_the_token_gives_a_cookie_that_neither_scripts_nor_other_sites_can_use(address):
    answer, _ = ask(address, "/run?name=a%20b&" + address.partition("?")[2])
    given = answer.headers["Set-Cookie"]
    assert answer.status == 303
    assert answer.headers["Location"] == "/run?name=a%20b"
    assert "HttpOnly" in given
    assert "SameSite=Strict" in given


def test_every_server_has_a_token_of_its_own(runs):
    from assay.serve.gate import Gate

    a, b = Gate(), Gate()
    assert a.token != b.token
    assert a.cookie != b.cookie
    assert len(a.token) >= 43  # 256 bits


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:{port}"])
def test_a_name_that_is_rebound_to_this_machine_is_not_believed(address, cookie, host):
    port = re.search(r":(\d+)/", address)[1]
    answer, _ = ask(address, "/", Host=host.format(port=port), Cookie=cookie)
    assert answer.status == 403
    assert ask(address, "/", Host=f"localhost:{port}", Cookie=cookie)[0].status == 200


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://127.0.0.1:1"])
def test_a_page_of_another_origin_cannot_call_back(address, cookie, origin):
    given = {"Cookie": cookie} | ({} if origin is None else {"Origin": origin})
    assert ask(address, "/_dash-update-component", "POST", "{}", **given)[0].status == 403


def test_no_other_address_of_this_machine_answers(address):
    port = int(re.search(r":(\d+)/", address)[1])
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port), timeout=2):
        pass


def test_the_page_is_strict_and_loads_nothing_from_elsewhere(address, cookie):
    answer, text = ask(address, "/", Cookie=cookie)
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert not {"unsafe", "http", "*"} & set(
        re.findall(r"unsafe|http|\*", policy["script-src"] + policy["connect-src"])
    )
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", text)


@pytest.mark.parametrize(
    "name", ["../outside/secret-run", "link/secret-run", "half", "/etc", "demo/../link/secret-run", "."]
)
def test_only_names_in_the_list_are_opened(address, cookie, outside, name):
    for page, key in (("/run", "name"), ("/upload", "run"), ("/sample", "run"), ("/compare", "a")):
        text = shown(address, cookie, page, f"?{key}={quote(name)}&index=0&b=demo/plain")
        assert "trouble" in text
        assert SECRET not in text
    assert SECRET not in shown(address, cookie, "/")


@pytest.mark.parametrize("index", ["-1", "x", "99999999999999999999", "1e3", "..", "%00"])
def test_only_samples_of_the_table_are_opened(address, cookie, index):
    assert "Choose one there" in shown(address, cookie, "/sample", f"?run=demo/plain&index={index}")


def test_the_files_of_the_packages_are_all_that_is_served(address, cookie):
    for path in (
        "/_dash-component-suites/dash/../../../../../etc/passwd",
        "/_dash-component-suites/os/path.py",
        "/assets/../x",
    ):
        answer, text = ask(address, path, Cookie=cookie)
        assert answer.status == 404 or "react-entry-point" in text  # unknown pages get the empty app
        assert "root:" not in text


def test_a_request_that_would_fill_the_memory_is_refused(address, cookie):
    origin = re.match(r"http://[^/]+", address)[0]
    port = int(re.search(r":(\d+)/", address)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        head = f"POST /_dash-update-component HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: {origin}\r\n"
        line.sendall(
            f"{head}Cookie: {cookie}\r\nContent-Type: application/json\r\nContent-Length: {10**10}\r\n\r\n{{".encode()
        )
        assert b" 413 " in line.recv(100)


# -------------------------------------------------------------------------------------------------------- what is read


def test_all_runs_are_listed_and_damaged_ones_with_their_error(runs):
    entries = Catalogue(runs).entries()
    whole = {name for name, e in entries.items() if not e.error}
    assert whole >= {"attacked", "demo/plain", "demo/robust"}
    assert "leads outside" in entries["half"].error
    assert "readable manifest" in entries["damaged/manifest"].error
    assert "schema" in entries["damaged/list"].error
    assert not any(name.startswith(("link", "round")) for name in entries)
    for name in ("damaged/table", "damaged/schema"):
        with pytest.raises(RunError):
            Catalogue(runs).open(name)
    inputs = Catalogue(runs).open("damaged/inputs")
    with pytest.raises(RunError, match="adversarial inputs"):
        inputs.arrays([0])


def test_a_run_says_the_same_here_as_everywhere(runs):
    kept, run = Catalogue(runs).open("demo/plain"), Run.read(runs / "demo" / "plain")
    assert kept.summary.robust.value == run.manifest["totals"]["robust_accuracy"]
    assert kept.samples.equals(run.samples())
    batch = next(run.adversarials())
    for i, index in enumerate(batch["index"].tolist()):
        assert np.array_equal(kept.arrays([index])[index]["x"], batch["x"][i])
    counts = {name: int(v.sum()) for name, v in states(kept).items()}
    assert counts["all"] == 24 == counts["fooled"] + counts["open"] + counts["proven"] + counts["misclassified"]


def test_an_attack_is_a_run_like_others(runs):
    told = json.loads((runs / "attacked" / "attack.json").read_text())
    kept = Catalogue(runs).open("attacked")
    assert kept.summary.clean.value == told["attacked"] / 24
    assert kept.summary.robust.value == (told["attacked"] - told["broken"]) / 24
    assert f"broke {told['broken']} of {told['attacked']}" in kept.verdict


def test_an_attack_has_its_model_and_its_data(runs):
    kept, shelf = Catalogue(runs).open("attacked"), make_shelf(runs)
    assert (kept.summary.model, kept.summary.data) == ("mnist-plain", "mnist")
    assert shelf.sources.model(kept).name == "mnist-plain"
    clean = shelf.clean(kept, 5, {})
    assert np.array_equal(clean, load_data("demo:mnist", limit=24).batch([5])[0].numpy())
    assert shelf.subject({"run": "attacked", "index": 5}).index == 5


def test_an_attack_is_compared_with_a_run_and_with_another_attack(runs):
    shelf = make_shelf(runs)
    for other in ("demo/plain", "attacked"):
        page = json.dumps(
            compare.page(shelf, {"a": "attacked", "b": other}), default=lambda part: part.to_plotly_json()
        )
        assert "Sample by sample" in page
    with pytest.raises(RunError, match="same data"):
        compare.page(shelf, {"a": "attacked", "b": "earlier"})


def test_an_attack_of_an_earlier_version_is_listed_without_model_and_data(runs):
    kept, now = (Catalogue(runs).open(name) for name in ("earlier", "attacked"))
    assert kept.samples["status"].to_pylist() == now.samples["status"].to_pylist()
    assert kept.summary.robust == now.summary.robust
    with pytest.raises(ModelError):
        Sources().model(kept)
    assert make_shelf(runs).clean(kept, 5, {}) is None


def test_models_are_loaded_only_by_their_fingerprint(runs, tmp_path):
    robust = Catalogue(runs).open("demo/robust")
    assert Sources().model(robust).name == "mnist-robust"
    shutil.copytree(runs / "demo" / "robust", tmp_path / "runs" / "other")
    change(tmp_path / "runs" / "other", lambda m: m["model"].update(fingerprint="0" * 64))
    other = Catalogue(tmp_path / "runs").open("other")
    with pytest.raises(ModelError, match="--model"):
        Sources().model(other)
    with pytest.raises(ModelError):
        Sources([load_model("demo:mnist-plain")]).model(other)


def test_a_port_that_is_taken_is_said_in_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = ["serve", str(tmp_path), "--no-browser", "--port", str(other.getsockname()[1])]
        done = CliRunner().invoke(command_line, words)
    assert done.exit_code == 3
    assert "found another program listens there" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_that_was_named_serves_the_runs_of_its_fingerprint(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model = assay.Model(net, name="mine")
    how = {"limit": 8, "effort": "quick", "out": tmp_path / "mine", "progress": False}
    assay.evaluate(model, load_data("demo:mnist", limit=8), "linf:0.1", **how)
    run = Catalogue(tmp_path).open("mine")
    with pytest.raises(ModelError, match="--model"):
        Sources().model(run)
    assert Sources([model]).model(run).net is net


def test_data_that_have_changed_since_are_not_taken_for_those_of_the_run(tmp_path):
    digits = load_data("demo:mnist", limit=8)
    x, y = (digits.batch(range(8)) * 255).round().to(torch.uint8).numpy(), digits.labels.numpy()
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    how = {"effort": "quick", "out": tmp_path / "runs" / "mine", "progress": False}
    assay.evaluate("demo:mnist-robust", str(tmp_path / "mine.npz"), "linf:0.1", **how)
    run = Catalogue(tmp_path / "runs").open("mine")
    assert torch.equal(Sources().data(run).batch([3]), digits.batch([3]))
    np.savez(tmp_path / "mine.npz", x=255 - x, y=y)
    with pytest.raises(DataError, match="others"):
        Sources().data(run)
    assert torch.equal(Sources(data=[digits]).data(run).batch([3]), digits.batch([3]))


def test_a_run_that_grows_is_seen_as_it_is(runs, tmp_path):
    folder, shelf = tmp_path / "growing", Catalogue(tmp_path)
    shutil.copytree(runs / "demo" / "plain", folder)
    part = next((folder / "samples").iterdir())
    kept = part.read_bytes()
    part.unlink()
    change(folder, lambda m: m.update(complete=False, totals=None))
    assert len(shelf.open("growing").samples) == 0
    part.write_bytes(kept)
    assert len(shelf.open("growing").samples) == 24
    assert shelf.entries()["growing"].summary.n == 24


def test_code_that_a_manifest_names_is_never_run(runs, tmp_path, monkeypatch):
    """The model is py:, its data are py:, and both would leave a file behind."""
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('was-here').touch()\ndef make(): return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(runs / "demo" / "plain", tmp_path / "runs" / "evil")

    def edit(manifest):
        manifest["model"] |= {"name": "py:evil:make", "fingerprint": "0" * 64}
        manifest["data"] |= {"source": "py:evil:make", "fingerprint": "1" * 64}
        manifest["command"] = "assay evaluate py:evil:make py:evil:make evil.pkl"

    change(tmp_path / "runs" / "evil", edit)
    run = Catalogue(tmp_path / "runs").open("evil")
    with pytest.raises(ModelError, match="--model"):
        Sources().model(run)
    with pytest.raises(DataError, match="--data"):
        Sources().data(run)
    assert not (tmp_path / "was-here").exists()


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(RunError, match="folder of runs"):
        make_app(tmp_path / "none")


# ------------------------------------------------------------------------------------------------- uploads and walks


def png(image, **how):
    packed = io.BytesIO()
    image.save(packed, how.get("format", "PNG"))
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


def test_an_upload_becomes_what_the_model_takes():
    picture = Image.fromarray(np.full((30, 60, 3), 128, np.uint8))
    x = decoded(png(picture), Fit(28, 28, 28, channels=1), (-1.0, 1.0))
    assert x.shape == (1, 28, 28)
    assert torch.allclose(x, torch.full_like(x, 128 / 255 * 2 - 1), atol=1e-2)
    assert decoded(png(picture, format="JPEG"), Fit(28, 28, channels=3), (0.0, 1.0)).shape == (3, 28, 28)


@pytest.mark.parametrize(
    "content", ["", "data:image/png;base64,!!!", f"data:,{base64.b64encode(b'%PDF-1.7').decode()}"]
)
def test_what_is_no_image_is_refused(content):
    with pytest.raises(DataError):
        decoded(content, Fit(28, 28), (0.0, 1.0))


def test_images_that_are_cut_foreign_or_bombs_are_refused():
    whole = base64.b64decode(png(Image.new("L", (99, 99))).partition(",")[2])
    cut = "data:," + base64.b64encode(whole[:60]).decode()
    with pytest.raises(DataError):
        decoded(cut, Fit(28, 28), (0.0, 1.0))
    with pytest.raises(DataError, match="PNG or JPEG"):
        decoded(png(Image.new("L", (9, 9)), format="GIF"), Fit(28, 28), (0.0, 1.0))
    with pytest.raises(DataError, match="sane size"):
        decoded(png(Image.new("1", (30_000, 30_000))), Fit(28, 28), (0.0, 1.0))


def test_the_fit_of_an_upload_is_that_of_the_runs_data(runs):
    kept = Catalogue(runs).open("demo/plain")
    assert fit_of(kept, load_model("demo:mnist-plain")) == Fit(28, 28, 28, channels=1)
    assert fit_of(Catalogue(runs).open("attacked"), load_model("demo:mnist-plain")) == Fit(28, 28, 28, channels=1)
    with pytest.raises(DataError, match="images"):
        fit_of(Catalogue(runs).open("earlier"), load_model("demo:mnist-plain"))


def test_a_climb_is_the_ascent_of_a_walk():
    model, x = load_model("demo:mnist-plain"), load_data("demo:mnist", limit=4).batch([3])[0]
    told = walk(model, x, 0, "linf", steps=20, target=6, targets=[6], slice_steps=0)
    frames, sure = map(np.stack, zip(*climb(model, x, 6, "linf"), strict=True))
    assert np.array_equal(frames, told.ascent.frames)
    assert np.array_equal(sure, told.ascent.confidences)
    assert [w.target for w in told.ways] == [6]
    with pytest.raises(UsageError, match="other than 0"):
        next(climb(model, x, 0))


def test_saliency_is_the_gradient_of_the_logit():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    model = assay.Model(lambda x: x @ weight.T)
    assert np.allclose(gradient(model, torch.tensor([0.2, 0.5, 0.9]), 1), weight[1])


class Slow(nn.Module):
    """Logits of the mean, after a while."""

    def forward(self, x):
        time.sleep(0.02)
        return torch.stack([0.9 - x.mean(1), x.mean(1) - 0.9], 1)


def wait_for(job, seconds=10.0):
    end = time.monotonic() + seconds
    while not job.over and time.monotonic() < end:
        time.sleep(0.01)
    return job.state


def test_a_walk_can_be_cancelled_and_one_that_nobody_watches_ends():
    sources = Sources()
    model, walks, x = assay.Model(Slow()), Walks(sources), torch.full((4,), 0.1)
    job = walks.get(walks.start(model, x, 1, "linf"))
    while len(job.frames) < 2:
        time.sleep(0.005)
    job.stop.set()
    assert wait_for(job) == "cancelled"
    left = walks.get(walks.start(model, x, 1, "linf"))
    left.seen -= 1000  # the last look was long ago
    assert wait_for(left) == "cancelled"
    assert not model.net._forward_pre_hooks
    assert walks.get("of another server") is None


def test_a_new_walk_takes_the_place_of_the_old_one():
    walks, model, x = Walks(Sources()), assay.Model(Slow()), torch.full((4,), 0.1)
    first = walks.get(walks.start(model, x, 1, "linf"))
    second = walks.get(
        walks.start(load_model("demo:mnist-plain"), load_data("demo:mnist", limit=1).batch([0])[0], 3, "linf")
    )
    assert wait_for(first) == "cancelled"
    while not second.over:
        walks.get(next(name for name, job in walks._walks.items() if job is second))
        time.sleep(0.02)
    assert second.state == "done"
    assert second.found.ways[0].found


def test_a_model_that_fails_ends_its_walk_with_the_reason():
    def broken(x):
        raise ValueError("this model is broken")

    walks = Walks(Sources())
    job = walks.get(walks.start(assay.Model(broken), torch.full((4,), 0.5), 1, "l2"))
    assert wait_for(job) == "failed"
    assert "this model is broken" in job.error


# --------------------------------------------------------------------------------------------------- in a real browser

FLAGS = [f"--{flag}" for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
         "disable-background-networking", "disable-component-update", "disable-sync")]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(program).exists():
        pytest.skip("no Chromium on this machine")
    sync = pytest.importorskip("playwright.sync_api")
    sync.expect.set_options(timeout=60_000)
    with sync.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A page that came in by the token; whatever goes wrong in it, or leaves this machine, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    wrong = []
    origin = re.match(r"http://[^/]+/", address)[0]
    page.on("dialog", lambda d: (wrong.append(f"a script ran: {d.message}"), d.dismiss()))
    page.on("pageerror", lambda e: wrong.append(f"error: {e}"))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((origin, "data:", "blob:")) else None)
    page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.goto(address)
    yield page
    context.close()
    assert not wrong


def expect(target):
    from playwright.sync_api import expect as promise

    return promise(target)


def to_run(page, name="demo/plain"):
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.locator("#gallery .card").first).to_be_visible()


def to_sample(page, index, name="demo/plain"):
    to_run(page, name)
    page.locator(f"#gallery a[href$='index={index}']").click()
    expect(page.locator("h1")).to_contain_text(f"Sample {index},")


def test_the_list_can_be_sorted(page, address):
    assert "token" not in page.url
    names = page.locator(".runs tbody a")
    expect(names.first).to_be_visible()
    page.get_by_role("link", name="robust", exact=True).click()
    expect(names.first).to_have_text("demo/robust")
    page.get_by_role("link", name=re.compile("^robust ")).click()
    expect(names.first).not_to_have_text("demo/robust")
    expect(page.get_by_text("damaged:").first).to_be_visible()


def test_names_from_a_run_stay_text(page):
    """Every page of a run whose names are tags and scripts: they are read, and none of them runs."""
    name = f"hostile/{TAG}"
    expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    to_run(page, name)
    assert page.locator("main").get_by_text(TAG).count() > 3
    assert page.locator("img[src='x'], [onerror], [onload], main script").count() == 0
    expect(page.locator("#try")).to_contain_text("--model")
    page.locator("#gallery a").first.click()
    expect(page.locator("h1")).to_contain_text(TAG)
    expect(page.get_by_text("Name it: assay serve DIR --model")).to_be_visible()
    assert page.locator("img[src='x'], [onerror], [onload], main script").count() == 0


def test_dragging_eps_shows_which_samples_have_fallen_by_there(page, runs):
    to_run(page)
    slider, told = page.locator("#eps"), page.locator("#eps-told")
    sizes = np.array(Run.read(runs / "demo" / "plain").samples()["size"].to_pylist())
    expect(told).to_contain_text(f"{int((sizes <= 0.1).sum())} of 24 have fallen")
    start = page.locator("#eps-mark").evaluate("e => parseFloat(e.style.left)")
    slider.scroll_into_view_if_needed()
    frame = slider.bounding_box()
    middle = frame["y"] + frame["height"] / 2
    page.mouse.move(frame["x"] + frame["width"] - 8, middle)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] * 0.6, middle, steps=5)
    page.mouse.up()
    eps = int(slider.input_value()) / 1000 * 0.1
    assert 0.04 < eps < 0.08
    fallen = int((sizes <= eps).sum())
    assert 0 < fallen < int((sizes <= 0.1).sum())
    expect(told).to_contain_text(f"{fallen} of 24 have fallen")
    expect(page.locator("#eps-fallen a")).to_have_count(fallen)
    assert page.locator("#eps-mark").evaluate("e => parseFloat(e.style.left)") < start


def test_samples_can_be_filtered(page, runs):
    to_run(page)
    table = Run.read(runs / "demo" / "plain").samples()
    fooled = [row for row in table.to_pylist() if row["fooled"]]
    cards = page.locator("#gallery .card")
    expect(cards).to_have_count(24)
    page.locator("#of-state").get_by_text(f"fooled {len(fooled)}").click()
    expect(cards).to_have_count(len(fooled))
    label = fooled[0]["label"]
    same = [row for row in fooled if row["label"] == label]
    page.locator("#of-class").click()
    page.get_by_role("option", name=str(label), exact=True).click()
    expect(cards).to_have_count(len(same))
    page.locator("#of-state").get_by_text("misclassified").click()
    expect(page.locator("#told")).to_contain_text("0 images")


def test_a_walk_can_be_watched_to_its_end(page, runs):
    table = Run.read(runs / "demo" / "plain").samples().to_pylist()
    row = next(r for r in table if r["fooled"])
    to_sample(page, row["index"])
    expect(page.locator(".views.large img")).to_have_count(3)
    expect(page.locator(".views.large")).to_contain_text(re.compile(r"difference, [\d.]+ times"))
    expect(page.locator("#attributions img")).to_have_count(4)
    page.locator("#walk-go").click()
    expect(page.locator("#walk-frame img").first).to_be_visible()
    expect(page.locator("#walk-status")).to_contain_text("Done, after")
    steps = int(page.locator("#walk-step").get_attribute("max"))
    assert steps > 3
    wanted = page.locator("#walk-frame .sure.key .num")
    expect(wanted).to_have_text(re.compile(r"(9[5-9]|100)\.\d %|> 99.9 %"))
    assert page.locator("#walk-found .strip img").count() == 8
    expect(page.locator("#walk-found")).to_contain_text("is enough for")
    page.locator("#walk-step").fill("0")
    expect(page.locator("#walk-frame")).to_contain_text("step 0")
    expect(wanted).not_to_have_text(re.compile(r"9\d\.\d %"))


def test_an_image_of_ones_own_is_predicted_and_walked_from(page):
    to_run(page)
    page.get_by_role("link", name="Upload an image").click()
    x = load_data("demo:mnist", limit=5).batch([4])[0, 0].numpy()  # a 4, here as dark ink on light paper, enlarged
    packed = io.BytesIO()
    Image.fromarray((255 - 255 * x).astype(np.uint8)).resize((140, 140)).save(packed, "PNG")
    page.locator("#upload input").set_input_files(
        {"name": "4.png", "mimeType": "image/png", "buffer": packed.getvalue()}
    )
    expect(page.locator("#uploaded h2").first).to_contain_text("It says")
    page.locator("#invert").get_by_text("swap").click()
    expect(page.locator("#uploaded h2").first).to_have_text("It says 4")
    page.locator("#walk-go").click()
    expect(page.locator("#walk-status")).to_contain_text("Done, after")
    page.locator("#upload input").set_input_files(
        {"name": "x.png", "mimeType": "image/png", "buffer": b"<svg onload=alert(1)>"}
    )
    expect(page.locator("#uploaded .trouble")).to_contain_text("an image in PNG or JPEG")


def test_two_runs_can_be_compared(page, runs):
    for name in ("demo/plain", "demo/robust"):
        page.locator("tr", has=page.get_by_role("link", name=name, exact=True)).get_by_role("checkbox").check()
    page.locator("#compare a").click()
    expect(page.locator("h1")).to_contain_text("McNemar")
    status = [Run.read(runs / "demo" / name).samples()["status"].to_pylist() for name in ("plain", "robust")]
    changed = sum((a == "robust") != (b == "robust") for a, b in zip(*status, strict=True))
    assert changed > 0
    expect(page.locator(".chips a")).to_have_count(changed)
    page.locator(".chips a").first.click()
    expect(page.locator("h1")).to_contain_text("Sample")


def test_a_narrow_screen_is_enough(browser, address):
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto(address)
    to_run(page)
    expect(page.locator("#eps-told")).to_contain_text("have fallen")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    context.close()
