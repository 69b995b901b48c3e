"""A model behind HTTP: a real server in a process of its own, whose log says what it was asked."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from needs import framework

import assay
from assay.core.errors import ModelError, ModelOutputError
from assay.core.registry import UsageError
from assay.runs import Run

framework("urllib3")

SERVER = textwrap.dedent("""
    import hashlib, io, json, sys, time
    from http.server import BaseHTTPRequestHandler, HTTPServer
    import numpy as np, torch
    from PIL import Image
    import assay

    net = assay.load_model("demo:mnist-robust").net
    log, failing = open(sys.argv[1], "a"), int(sys.argv[2])

    class Handler(BaseHTTPRequestHandler):
        count = 0

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            Handler.count += 1
            if Handler.count <= failing:
                return self.answer(503, b"busy")
            if self.path == "/refuse":
                return self.answer(403, b"who are you?")
            if self.path == "/nonsense":
                return self.answer(200, b"<html>")
            if self.path == "/png":
                x = torch.tensor(np.array(Image.open(io.BytesIO(body)))[None, None] / 255, dtype=torch.float32)
            else:
                x = torch.tensor(json.loads(body)["inputs"], dtype=torch.float32)
            for row in x:
                log.write(hashlib.sha256(row.numpy().tobytes()).hexdigest() + "\\n")
            log.flush()
            with torch.no_grad():
                z = net(x)
            if self.path == "/slow":
                time.sleep(0.002)
            found = {"labels": z.argmax(1).tolist()} if self.path == "/labels" else {"scores": z.tolist()}
            if self.path == "/below":
                found = {"labels": [-1] * len(z)}
            if self.path == "/wider":
                found = {"scores": [row + [0.0] * (Handler.count % 2) for row in z.tolist()]}
            if self.path == "/once-nan" and Handler.count <= 1:
                found = {"scores": (z * float("nan")).tolist()}
            self.answer(200, json.dumps(found | {"token": self.headers.get("Authorization")}).encode())

        def answer(self, status, content):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
""")


class Served:
    """A server, and its log."""

    def __init__(self, folder, failing=0):
        self.log = folder / f"asked-{failing}.txt"
        command = [sys.executable, "-c", SERVER, str(self.log), str(failing)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def asked(self):
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("server"))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def digits():
    return assay.load_data("demo:mnist", limit=12)


def test_scores_are_those_of_the_network(server, digits, tmp_path):
    model = assay.load_model(f"{server.url}/#cache={tmp_path}")
    x = digits.batch(range(12))
    native = assay.load_model("demo:mnist-robust")(x)
    assert torch.allclose(model(x).float(), native, atol=1e-5)


def test_the_same_input_is_sent_once_in_a_batch_between_batches_and_between_processes(server, digits, tmp_path):
    x = digits.batch([0, 1, 0, 1]) * 0.37
    for _ in range(3):
        assay.load_model(f"{server.url}/#cache={tmp_path}")(x)
    sent = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in x[:2]]
    assert [server.asked()[k] for k in sent] == [1, 1]
    assert len((tmp_path / "queries.jsonl").read_text().splitlines()) == 1


def test_rows_bounds_the_samples_of_a_request(server, digits, tmp_path):
    assay.load_model(f"{server.url}/#cache={tmp_path}&rows=5")(digits.batch(range(12)) * 0.9)
    lines = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    assert [len(line["inputs"]) for line in lines] == [5, 5, 2]
    assert {line["status"] for line in lines} == {200}


def test_images_can_be_sent_as_bytes(server, digits, tmp_path):
    x = digits.batch(range(4))
    answers = assay.load_model(f"{server.url}/png#send=png&cache={tmp_path}")(x)
    assert torch.allclose(answers.float(), assay.load_model("demo:mnist-robust")(x), atol=1e-4)


def test_labels_alone_become_one_hot_scores(server, digits, tmp_path):
    x = digits.batch(range(8))
    answers = assay.load_model(f"{server.url}/labels#classes=10&cache={tmp_path}")(x)
    assert torch.equal(answers.argmax(1), assay.load_model("demo:mnist-robust")(x).argmax(1))
    assert answers.sum(1).tolist() == [1.0] * 8


def test_a_busy_server_is_asked_again(digits, tmp_path):
    busy = Served(tmp_path, failing=2)
    try:
        begun = time.monotonic()
        assert assay.load_model(f"{busy.url}/#cache={tmp_path}/a")(digits.batch([0])).shape == (1, 10)
        assert time.monotonic() - begun >= 0.5 + 1.0 - 0.01
        assert sum(busy.asked().values()) == 1
        lines = [json.loads(line) for line in (tmp_path / "a" / "queries.jsonl").read_text().splitlines()]
        assert [line["status"] for line in lines] == [503, 503, 200]
    finally:
        busy.stop()


def test_an_answer_that_is_not_finite_is_not_kept(digits, tmp_path):
    served = Served(tmp_path)
    try:
        model = assay.load_model(f"{served.url}/once-nan#cache={tmp_path}/a")
        with pytest.raises(assay.NonFiniteError):
            assay.evaluate(model, digits.head(1), "linf:0.1", effort="quick", progress=False)
        assert torch.isfinite(model(digits.batch([0]))).all()
    finally:
        served.stop()


def test_a_server_that_is_gone_is_an_error_that_says_so(digits, tmp_path):
    gone = Served(tmp_path)
    gone.stop()
    with pytest.raises(ModelError, match="answers so far are kept") as e:
        assay.load_model(f"{gone.url}/#cache={tmp_path}&retries=1&timeout=1")(digits.batch([0]))
    assert e.value.code == "endpoint-failed"


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("refuse", ModelError, "who are you"),
        ("nonsense", ModelOutputError, "<html>"),
        ("labels", ModelOutputError, "classes=10"),
        ("below#classes=10&", ModelOutputError, "numbers"),
        ("wider", ModelOutputError, "10 and 11"),
    ],
)
def test_answers_of_another_kind_are_named(server, digits, tmp_path, path, error, said):
    model = assay.load_model(f"{server.url}/{path}{'' if '#' in path else '#'}cache={tmp_path}&rows=1")
    with pytest.raises(error, match=said) as e:
        model(digits.batch([0, 1]))
    assert error is ModelError or e.value.code == "bad-logits"


def test_the_rate_is_kept(server, digits, tmp_path):
    model = assay.load_model(f"{server.url}/#cache={tmp_path}&rows=1&rate=20")
    begun = time.monotonic()
    model(digits.batch(range(5)) * 0.8)
    assert time.monotonic() - begun >= 4 / 20 - 0.01


def test_the_rate_holds_for_processes_together(tmp_path):
    take = "import sys, pathlib; from assay.models.endpoint import Answers; a = Answers(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{take}; print([a.turn(0.2) for _ in range(3)])", str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    turns = sorted(turn for p in both for turn in json.loads(p.communicate()[0]))
    assert len(turns) == 6
    assert all(later - earlier >= 0.2 - 1e-6 for earlier, later in pairwise(turns))


def test_what_is_asked_before_an_attack_by_scores_is_little_and_told(server, tmp_path):
    command = ["attack", f"{server.url}/#cache={tmp_path}/a", "demo:mnist", "--with", "square", "--set", "steps=1"]
    before = sum(server.asked().values())
    done = subprocess.run(
        [sys.executable, "-m", "assay", *command, "--threat", "linf:0.005", "--limit", "8", "--json"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    told = json.loads(done.stdout)
    asked = sum(server.asked().values()) - before
    assert asked <= told["passes"]["forwards"] + told["checks"]["forwards"]
    assert asked < 12 * 8


def test_a_token_comes_from_the_environment_and_is_not_written_down(server, digits, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="MY_TOKEN"):
        assay.load_model(f"{server.url}/#token=MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "a-secret")
    model = assay.load_model(f"{server.url}/#token=MY_TOKEN&cache={tmp_path}")
    model(digits.batch([3]) * 0.7)
    assert b"a-secret" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert "a-secret" not in repr(model.net)


@pytest.mark.parametrize(("options", "said"), [("sent=png", "send"), ("send=xml", "png"), ("rows=0", "rows")])
def test_options_that_there_are_not_are_refused(options, said):
    with pytest.raises((UsageError, ModelError), match=said):
        assay.load_model(f"http://127.0.0.1:9/#{options}")


def test_a_verdict_by_scores_alone(server, digits, tmp_path):
    how = {"effort": "quick", "limit": 4, "max_passes": 150, "progress": False}
    found = assay.evaluate(f"{server.url}/#cache={tmp_path}", digits, "linf:0.3", **how)
    native = assay.evaluate("demo:mnist-robust", digits, "linf:0.3", **how)
    assert {"no-gradient", "adapted"} <= {f.code for f in found.findings}
    assert native.robust_accuracy <= found.robust_accuracy <= native.clean_accuracy


def test_a_run_that_is_killed_and_resumed_asks_nothing_twice(tmp_path):
    slow = Served(tmp_path)
    command = [sys.executable, "-m", "assay", "evaluate", f"{slow.url}/slow#cache={tmp_path}/answers", "demo:mnist"]
    command += [
        "--threat",
        "linf:0.3",
        "--limit",
        "4",
        "--effort",
        "quick",
        "--max-passes",
        "200",
        "--out",
        "run",
        "--quiet",
    ]
    how = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": dict(os.environ)}
    try:
        kills = 0
        while kills < 3:
            process = subprocess.Popen(command, **how)
            before = sum(slow.asked().values())
            while process.poll() is None and sum(slow.asked().values()) < before + 100:
                time.sleep(0.002)
            kills += 1
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stderr.close()
        done = subprocess.run(command, **how, check=False)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert len(Run.read(tmp_path / "run").done()) == 4
        asked = slow.asked()
        assert sum(asked.values()) > 300
        # A kill between an answer and its storing may cost that one request: 64 samples at the most, three times.
        twice = np.array([n for n in asked.values() if n > 1])
        assert twice.sum() - len(twice) <= 3 * 64
    finally:
        slow.stop()
