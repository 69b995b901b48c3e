"""A model behind an HTTP interface: asked for scores or labels, and never twice about the same input."""

import base64
import contextlib
import hashlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay.core.errors import ModelError, ModelOutputError
from assay.core.optional import need
from assay.core.registry import one_of
from assay.core.types import Inputs, Logits
from assay.data.png import encode_png

Answer = NDArray[np.float64]
"""The scores (c,) of one sample."""

FORMS: Final = ("json", "png")
_WAIT: Final = 0.5
"""Seconds before the first repetition of a request that failed; the time doubles with each further one."""

_LATEST: Final = 600.0
"""Seconds that a turn, or what ``Retry-After`` says, is waited for at most."""

_TRY_AGAIN: Final = (429, 500, 502, 503, 504)
_LONGEST: Final = 64 * 2**20
"""Bytes of an answer that are read at most."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """How an interface is asked.

    Args:
        url: where requests are sent, by POST.
        send: ``json``: ``{"inputs": [...]}``, up to ``rows`` samples as nested lists of numbers; or ``png``: the bytes
            of one 8-bit image, for inputs in [0, 1].
        inputs: the name under which JSON has the samples.
        outputs: the name under which the answer has the scores (b, c); one that has ``labels`` (b,) instead shows the
            class only.
        rows: samples in a request.
        classes: how many there are; needed where answers show the class only.
        probabilities: the scores are probabilities.
        timeout: seconds to wait for an answer.
        retries: how often a request is repeated that was not answered, or with 429, 500, 502, 503 or 504; the wait
            doubles each time, unless the answer says how long to wait.
        rate: requests a second at most, of all processes that share the cache, repetitions too; 0 for no limit.
        token: the environment variable that holds a bearer token.
        cache: the folder for answers and the log; empty for the user's cache folder.

    Raises:
        UsageError: an unknown form.
        ModelError: a number out of range, or a token that is not in the environment.
    """

    url: str
    send: str = "json"
    inputs: str = "inputs"
    outputs: str = "scores"
    rows: int = 64
    classes: int = 0
    probabilities: bool = False
    timeout: float = 30.0
    retries: int = 5
    rate: float = 0.0
    token: str = ""
    cache: str = ""

    def __post_init__(self) -> None:
        one_of("send", self.send, FORMS)
        for name, least in (("rows", 1), ("classes", 0), ("timeout", 1e-3), ("retries", 0), ("rate", 0)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= least):
                raise ModelError(f"{name} of at least {least:g}", f"{getattr(self, name)}", "Leave it out.")
        if self.token and self.token not in os.environ:
            raise ModelError(f"a token in the environment variable {self.token}", "none", "Set it.")

    @property
    def folder(self) -> Path:
        """Where the answers of this endpoint are kept."""
        if self.cache:
            return Path(self.cache)
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return base / "assay" / "answers" / hashlib.sha256(self.meaning.encode()).hexdigest()[:16]

    @property
    def meaning(self) -> str:
        """All that decides what an answer means; not how fast it is got."""
        return json.dumps([self.url, self.send, self.inputs, self.outputs, self.classes, self.probabilities])


@final
class Answers:
    """Answers on disk by the SHA-256 of what was sent; each batch is there before the next request goes out."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(folder / "answers.sqlite", timeout=60, check_same_thread=False)
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, scores BLOB)")
            self._file.execute("CREATE TABLE IF NOT EXISTS turns (only INTEGER PRIMARY KEY, next REAL)")
        except (OSError, sqlite3.Error) as e:
            raise ModelError("a folder that answers can be kept in", f"{folder}: {e}", "Choose another cache.") from e

    def known(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        found = {}
        for key in keys:
            row = self._file.execute("SELECT scores FROM answers WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = np.frombuffer(row[0], dtype=np.float64)
        return found

    def keep(self, answers: Mapping[bytes, Answer]) -> None:
        with self._file:
            rows = [(k, v.tobytes()) for k, v in answers.items()]
            self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def turn(self, apart: float) -> float:
        """Return the time of the next turn, ``apart`` seconds after the one before, and take it."""
        with self._file:
            self._file.execute("INSERT OR IGNORE INTO turns VALUES (0, 0)")  # from here on no other process may write
            after = self._file.execute("SELECT next FROM turns").fetchone()[0]
            # A clock that was set back must not stop everything.
            turn = max(time.time(), min(after, time.time() + max(_LATEST, apart)))
            self._file.execute("UPDATE turns SET next = ?", (turn + apart,))
        return float(turn)

    def close(self) -> None:
        self._file.close()


@final
@dataclass(slots=True)
class Line:
    """The line to an endpoint: pooled connections, repetitions, the rate, and the log."""

    endpoint: Endpoint
    answers: Answers
    log: Path
    pool: Any = None

    def post(self, body: bytes, kind: str, keys: Sequence[bytes]) -> Any:
        """Send a request, again and again if need be; return the JSON of the answer.

        Raises:
            ModelError: no answer after all repetitions, or another status than 200.
            ModelOutputError: the answer is no JSON, or too long.
        """
        e = self.endpoint
        status, content, wait = self._once(body, kind, keys)
        for k in range(e.retries):
            if status and status not in _TRY_AGAIN:
                break
            time.sleep(_WAIT * 2**k if wait is None else wait)
            status, content, wait = self._once(body, kind, keys)
        shown = content[:200].decode(errors="replace")
        if status != 200:
            said = f"status {status}: {shown!r}" if status else shown
            remedy = "All answers so far are kept: the same command goes on where it was."
            raise ModelError(f"an answer from {e.url}", said, remedy, code="endpoint-failed")
        if len(content) > _LONGEST:
            raise ModelOutputError(f"an answer below {_LONGEST} bytes", "more", "Send scores only.", code="bad-logits")
        with contextlib.suppress(ValueError):
            return json.loads(content)
        raise ModelOutputError(f"JSON from {e.url}", repr(shown[:80]), "Answer with JSON.", code="bad-logits")

    def _once(self, body: bytes, kind: str, keys: Sequence[bytes]) -> tuple[int, bytes, float | None]:
        """Send a request once; return its status, 0 for none, the answer, and how long to wait before another."""
        urllib3, e = need("urllib3", "http"), self.endpoint
        if self.pool is None:
            self.pool = urllib3.PoolManager(retries=False, timeout=e.timeout)
        if e.rate:
            time.sleep(max(0.0, self.answers.turn(1 / e.rate) - time.time()))
        begun, status, wait = time.time(), 0, None
        try:
            answer = self.pool.request("POST", e.url, body=body, headers=self._headers(kind), preload_content=False)
            content = answer.read(_LONGEST + 1, decode_content=True)
            answer.release_conn()
            status, wait = answer.status, _told_to_wait(answer)
        except urllib3.exceptions.HTTPError as error:
            content = f"{type(error).__name__}: {error}".encode()
        self._write(begun, status, keys)
        return status, content, wait

    def _headers(self, kind: str) -> dict[str, str]:
        token = os.environ.get(self.endpoint.token) if self.endpoint.token else None
        return {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})

    def _write(self, begun: float, status: int, keys: Sequence[bytes]) -> None:
        shown = [base64.b16encode(k[:8]).decode().lower() for k in keys]
        row = {"time": round(begun, 3), "seconds": round(time.time() - begun, 3), "status": status, "inputs": shown}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _told_to_wait(answer: Any) -> float | None:
    """Return the seconds that an answer's ``Retry-After`` says; None where it says nothing that can be read."""
    urllib3 = need("urllib3", "http")
    try:
        wait = urllib3.Retry().get_retry_after(answer)
    except urllib3.exceptions.HTTPError:
        return None
    return None if wait is None else min(wait, _LATEST)


@final
class Remote(nn.Module):
    """A network behind an endpoint: from inputs (b, *f) to scores (b, c), without gradients.

    The same input is sent once: within a batch, in later batches, and, since answers are kept on disk, in later runs.
    So a random model behind the endpoint looks like one that is not.
    """

    dear = True
    """Every question has its price: what a few samples can tell must be enough (``evaluation.preflight``)."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self.endpoint = endpoint
        self._answers: Answers | None = None
        self._line: Line | None = None

    def extra_repr(self) -> str:
        return self.endpoint.meaning  # a fingerprint reads it here

    def __getstate__(self) -> dict[str, Any]:
        """Leave connections behind: another process opens its own."""
        return self.__dict__ | {"_answers": None, "_line": None}

    def forward(self, x: Inputs) -> Logits:
        samples = x.detach().to("cpu", torch.float32)
        sent = [self._encoded(row) for row in samples]
        keys = [hashlib.sha256(body).digest() for body in sent]
        if self._answers is None:
            self._answers = Answers(self.endpoint.folder)
            self._line = Line(self.endpoint, self._answers, self.endpoint.folder / "queries.jsonl")
        known = self._answers.known(dict.fromkeys(keys))
        new = {k: i for i, k in enumerate(keys) if k not in known}
        each = 1 if self.endpoint.send == "png" else self.endpoint.rows
        order = [*new]
        for group in (order[i : i + each] for i in range(0, len(order), each)):
            answers = self._ask(group, [new[k] for k in group], samples, sent)
            self._check_width([*known.values(), *answers.values()])
            # What is not finite is an error of the moment: the next run asks again.
            self._answers.keep({k: z for k, z in answers.items() if np.isfinite(z).all()})
            known |= answers
        return torch.from_numpy(np.stack([known[k] for k in keys])).to(x.device)

    def _check_width(self, answers: Sequence[Answer]) -> None:
        if len(widths := {len(z) for z in answers}) > 1:
            found = " and ".join(map(str, sorted(widths)))
            remedy = f"If the model was replaced, remove {self.endpoint.folder}."
            raise ModelOutputError("as many scores for every sample", found, remedy, code="bad-logits")

    def _encoded(self, row: Tensor) -> bytes:
        """Return what stands for a sample in the cache: exactly what the endpoint sees of it."""
        if self.endpoint.send == "json":
            return row.contiguous().numpy().tobytes()
        return encode_png(row)

    def _ask(self, keys: list[bytes], at: list[int], samples: Tensor, sent: list[bytes]) -> dict[bytes, Answer]:
        e, line = self.endpoint, self._line
        assert line is not None
        if e.send == "png":
            answer = line.post(sent[at[0]], "image/png", keys)
        else:
            body = json.dumps({e.inputs: samples[at].tolist()}).encode()
            answer = line.post(body, "application/json", keys)
        return dict(zip(keys, self._scores(answer, len(keys)), strict=True))

    def _scores(self, answer: Any, count: int) -> Answer:
        """Return the scores (count, c) that an answer has, or stands for."""
        e = self.endpoint
        found = answer if isinstance(answer, dict) else {}
        try:
            if e.outputs in found:
                scores = np.asarray(found[e.outputs], dtype=np.float64).reshape(count, -1)
            else:
                labels = np.asarray(found["labels"]).reshape(count)
                if (labels < 0).any():
                    raise IndexError("a label below 0")
                scores = np.eye(e.classes)[labels]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ModelOutputError(
                f"{{{e.outputs!r}: {count} lists of scores}}, or {{'labels': {count} numbers}} below {e.classes}",
                f"{str(answer)[:120]!r}",
                "Answer in this form; for labels, say how many classes there are: URL#classes=10.",
                code="bad-logits",
            ) from error
        return scores
