"""``assay.harden``: from a network and its data to one that can take more."""

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from assay.core.errors import AssayError, DataError, ModelError, RunError, ThreatError
from assay.core.files import replacing
from assay.core.registry import UsageError, build, closest, describe
from assay.core.trackers import Tracking, tracking
from assay.core.types import Inputs, Logits
from assay.data import Data, load_data
from assay.hardening import objectives  # noqa: F401  (registers them)
from assay.hardening.checkpoint import read
from assay.hardening.devices import fabric_for, one_thread
from assay.hardening.export import check_format, export
from assay.hardening.ibp_init import ibp_init
from assay.hardening.loop import Training
from assay.hardening.objective import OBJECTIVES, Objective
from assay.hardening.settings import Settings
from assay.hardening.source import Source, split_off
from assay.hardening.task import Moment, Task, Tell
from assay.models import Model
from assay.models.fingerprint import fingerprint
from assay.models.loaders import load_model
from assay.models.model import are_probabilities
from assay.nets import Normalise
from assay.reports.training import write_history
from assay.reports.training_live import showing
from assay.runs.store import differences
from assay.threats import Threat
from assay.threats.threat import outside_box

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CHECKPOINT: Final = "checkpoint.safetensors"


class BrokenDefence(UserWarning):
    """A training method that is kept to be seen through: what broke it, and what to take instead."""


@final
@dataclass(frozen=True, slots=True)
class Hardened:
    """What training left.

    Args:
        net: the trained network, of the type that was given, in eval mode on the CPU.
        model: the same as a model, with its box and its normalisation: what to evaluate.
        history: one row a validation: epoch, lr, eps, loss, accuracies (shares), passes and seconds so far, events.
        forwards, backwards: passes of training, summed over samples, those of networks that had to be trained first
            included; validation is not among them.
        seconds: of all these trainings and their validation, without interruptions.
        stopped: why training ended before its last epoch; empty where it did not.
    """

    net: nn.Module
    model: Model
    history: pa.Table
    forwards: int
    backwards: int
    seconds: float
    stopped: str = ""


@final
class Whole(nn.Module):
    """A model as a module to train: from inputs inside the box to logits, its normalisation included."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert model.module is not None
        self.net = model.module
        normalised = model.mean is not None and model.std is not None
        self.normalise = Normalise(model.mean, model.std) if normalised else nn.Identity()  # type: ignore[arg-type]

    def forward(self, x: Inputs) -> Logits:
        z = self.net(self.normalise(x))
        return getattr(z, "logits", z)  # type: ignore[no-any-return]


def harden(
    net: Any,
    train: Any,
    threat: Threat | str,
    method: str | Objective = "pgd",
    valid: Any = None,
    epochs: int = 10,
    out: str | Path | None = None,
    resume: bool = True,
    *,
    extra: Any = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    devices: int = 1,
    progress: bool | Tell = True,
    log: Sequence[str] = (),
    command: str | None = None,
    **settings: Any,
) -> Hardened:
    """Train a network so that it can take more; the network given is left as it is.

    Args:
        net: an ``nn.Module`` that takes inputs in [0, 1], an :class:`assay.Model` of one (its box and normalisation
            are kept), or a MODEL form of the command line. Training starts from its weights; parameters that require no
            gradient stay as they are, unless none requires one.
        train: ``(x, y)``, a dataset, a loader, or a DATA form of the command line.
        threat: with an eps: what to train against.
        method: the name of a training method, ``assay.hardening.OBJECTIVES.names()``, or an objective.
        valid: data to validate on; None holds back the last 5 % of ``train``, 2,000 samples at the most.
        epochs: how often all samples of ``train`` are learned from.
        out: where the network goes: ``.safetensors`` (weights), ``.pt2`` or ``.onnx`` (whole). Beside it a folder
            ``NAME.training`` holds the checkpoint, the history as a table and as a page. None keeps nothing on disk.
        resume: go on with the training of the same settings that is in that folder.
        extra: a second source of training data, generated or unlabelled with pseudo-labels, say.
        seed: of all random numbers.
        device: where to train; None for a GPU if there is one.
        devices: how many GPUs, or processes on a CPU, train together; each takes its part of every batch. Another
            number gives other roundings; statistics of batches are those of the parts.
        progress: show progress, or call this with every :class:`Moment`.
        log: trackers to send the history to: ``mlflow``, ``tensorboard``, ``wandb``.
        command: what reproduces the training, for its manifest.
        **settings: those of the method (``steps=7``, ``beta=6``) and of the loop (:class:`Settings`: ``lr=0.1``).

    Returns:
        The hardened network. What it can take is then for :func:`assay.evaluate` to say.

    Raises:
        UsageError: a setting that neither method nor loop has, or a value or ``epochs`` that does not fit.
        DataError, ThreatError, ModelError: network, data and threat do not fit; raised before any training.
        RunError: ``out`` cannot be written, or holds a training of other settings.
        NonFiniteError: the loss is not finite.
        MissingExtraError: a package is missing; the message says how to get it.
    """
    _check_epochs(epochs)
    model, threat = _model(net), Threat.parse(threat) if isinstance(threat, str) else threat
    objective, how = split_settings(method, settings)
    _check_devices(devices, objective, how)
    frozen = _frozen(model, how)
    if warning := getattr(objective, "warning", ""):
        warnings.warn(warning, BrokenDefence, stacklevel=2)
    path = None if out is None else Path(out)
    if path is not None:
        check_format(path)
    data, held_back = _data(train, valid, model)
    more = None if extra is None else model.takes(load_data(extra))
    threat = _checked(threat, objective, model, data)
    classes = _classes(model, [data, held_back, *([more] if more else [])])
    fabric = fabric_for(device, devices, how.precision)
    source = Source(data, more, how.batch_size, how.extra_share, seed)
    job = _Job(
        model=model,
        objective=objective,
        settings=how,
        seed=seed,
        task=partial(Task, threat=threat, settings=how, epochs=epochs, classes=classes, source=source, valid=held_back),
        about={
            "method": describe(objective, OBJECTIVES.name_of),
            "threat": threat.to_json(),
            "settings": how.to_json(),
            "epochs": epochs,
            "seed": seed,
            "devices": devices,
            "model": fingerprint(model),
            "data": {"train": data.fingerprint(), "valid": held_back.fingerprint()}
            | ({"extra": more.fingerprint()} if more else {}),
        }
        | ({"frozen": frozen} if frozen else {}),
        progress=progress,
        log=tuple(log),
    )
    with _folder(path and path.with_suffix(".training"), job.about, command, resume=resume) as folder:
        if trouble := fabric.launch(partial(job.train, folder=folder)):
            raise trouble
        return _finished(job, folder, path, data.shape)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """All that the processes of a training need."""

    model: Model
    objective: Objective
    settings: Settings
    seed: int
    task: Callable[..., Task]
    about: Mapping[str, Any]
    progress: bool | Tell
    log: tuple[str, ...]

    def train(self, fabric: "Fabric", folder: Path) -> AssayError | None:
        """Train, in each process; what comes out is in the checkpoints. Return what went wrong."""
        if fabric.world_size > 1 and fabric.device.type == "cpu":
            one_thread()
        first, seed, objective = fabric.global_rank == 0, self.seed, self.objective
        try:
            with showing(self.progress if first else False) as show:
                helpers = []
                for i, (helper, name) in enumerate(zip(objective.helpers, self.helpers, strict=True), 1):
                    whole = Whole(_fresh(self.model, seed + i, self.settings))
                    own = self.task(objective=helper, seed=seed + i, what=f"{OBJECTIVES.name_of(helper)} {i} first")
                    helpers.append(_trained(whole, own, fabric, folder / name, show))
                whole = Whole(_copied(self.model, seed, self.settings))
                own = self.task(
                    objective=objective, seed=seed, helpers=tuple(helpers), what=OBJECTIVES.name_of(objective)
                )
                name = f"{OBJECTIVES.name_of(objective)} {self.about['threat']['text']}"
                with tracking(self.log if first else (), folder, name, self.about) as send:
                    _trained(whole, own, fabric, folder / CHECKPOINT, _sending(show, send))
        except AssayError as e:
            return e
        return None

    @property
    def helpers(self) -> tuple[str, ...]:
        """The checkpoints of the networks that are trained first."""
        return tuple(f"helper-{i + 1}.safetensors" for i in range(len(self.objective.helpers)))


def _trained(whole: nn.Module, task: Task, fabric: "Fabric", checkpoint: Path, show: Tell) -> nn.Module:
    Training(whole, task, fabric, checkpoint, show).run()
    return whole.requires_grad_(False)


def _finished(job: _Job, folder: Path, path: Path | None, shape: tuple[int, ...]) -> Hardened:
    """Write what is to be kept, and return the result of the last training, with the cost of all."""
    whole = Whole(_copied(job.model, job.seed, job.settings))
    parts, about = read(folder / CHECKPOINT)
    whole.load_state_dict(parts["kept"])
    whole.eval()
    rows = about["rows"]
    history = table(rows)
    if path is not None:
        export(whole, whole.net.state_dict(), shape, path)
        with replacing(folder / "history.parquet") as f:
            pq.write_table(history, f)
        told = {**job.about, "stopped": about["stopped"], "file": path.name}
        write_history(folder / "history.html", rows, told)
    hardened = Model(whole.net, job.model.box, job.model.mean, job.model.std, name=job.model.name)
    every = [about, *(read(folder / name)[1] for name in job.helpers)]
    forwards, backwards = (sum(a["rows"][-1][kind] for a in every) for kind in ("forwards", "backwards"))
    seconds = sum(a["clock"]["seconds"] for a in every)
    return Hardened(whole.net, hardened, history, forwards, backwards, seconds, about["stopped"])


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the history as a table; parts of the loss become columns ``loss/NAME``."""
    flat = [{**{n: v for n, v in r.items() if n != "parts"}, **{f"loss/{n}": v for n, v in r["parts"].items()}}
            for r in rows]  # fmt: skip
    return pa.Table.from_pylist(flat)


# ---------------------------------------------------------------------------------------- what is checked beforehand


def _model(net: Any) -> Model:
    model = load_model(net) if isinstance(net, str | Path) else net if isinstance(net, Model) else Model(net)
    if model.module is None or not any(p.is_floating_point() for p in model.module.parameters()):
        raise ModelError("a torch.nn.Module with parameters", type(model.net).__name__, "Pass the network itself.")
    if model.probabilities:
        raise _softmax()
    return model


def _softmax() -> ModelError:
    """Return the error for a network that would be trained through a second softmax."""
    code = "probabilities-not-logits"
    return ModelError("a network that returns logits", "probabilities", "Remove the last softmax.", code=code)


def _frozen(model: Model, how: Settings) -> list[str]:
    """Return the names of the parameters that stay as they are: none, where no gradient is wanted of any."""
    assert model.module is not None
    frozen = [name for name, p in model.module.named_parameters() if not p.requires_grad]
    frozen = [] if len(frozen) == len([*model.module.parameters()]) else frozen
    if frozen and how.init == "ibp":
        raise UsageError("init=keep where parameters are frozen", "init=ibp, which draws all anew", "Leave init out.")
    return frozen


def split_settings(method: str | Objective, given: Mapping[str, Any]) -> tuple[Objective, Settings]:
    """Return the objective and the settings of the loop that these names and values belong to."""
    mine = {f.name for f in fields(Settings)}
    loop = {n: v for n, v in given.items() if n in mine}
    rest = {n: v for n, v in given.items() if n not in mine}
    if isinstance(method, Objective):
        if rest:
            raise UsageError("settings of the loop beside an objective", ", ".join(rest), "Set them in the objective.")
        return method, build(Settings, {"ramp": method.ramp, **loop}, "training")
    kind = OBJECTIVES[method]
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in rest:
        if name not in known:
            raise UsageError(f"a setting of {method} or of training", repr(name), closest(name, [*known, *mine]))
    return build(kind, rest, method), build(Settings, {"ramp": kind.ramp, **loop}, "training")


def _check_epochs(epochs: object) -> None:
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise UsageError("epochs: a whole number of at least 1", repr(epochs), "Write for example epochs=10.")


def _check_devices(devices: int, objective: Objective, how: Settings) -> None:
    if devices > 1 and how.batch_size % devices:
        raise UsageError(f"a batch_size that {devices} devices share", f"{how.batch_size}", "Take a multiple of it.")
    if devices > 1 and objective.replays > 1:
        found = f"{devices} for {OBJECTIVES.name_of(objective)}"
        raise UsageError("one device for what is kept from batch to batch", found, "Leave devices out.")


def _data(train: Any, valid: Any, model: Model) -> tuple[Data, Data]:
    data = model.takes(load_data(train))
    if valid is None:
        return split_off(data)
    other = model.takes(load_data(valid))
    if other.shape != data.shape:
        raise DataError(f"validation samples of shape {data.shape}", f"{other.shape}", "Give data of one kind.")
    return data, other


def _checked(threat: Threat, objective: Objective, model: Model, data: Data) -> Threat:
    if threat.eps is None:
        raise ThreatError("an eps to train against", str(threat), "Write for example linf:8/255.")
    if threat.targeted or threat.quantize is not None:
        raise ThreatError("an untargeted threat without quantize", str(threat.to_json()), "Leave them out.")
    if threat.norm.name not in objective.norms:
        known = ", ".join(objective.norms)
        raise ThreatError(f"one of {known} for {OBJECTIVES.name_of(objective)}", str(threat), "Choose another method.")
    return threat.within(model.domain, int(np.prod(data.shape)))


def _classes(model: Model, sources: Sequence[Data]) -> int:
    """Ask the model about a batch, look at all samples once, and return the number of classes."""
    with model.frozen() as live:
        z = live(sources[0].batch(range(min(len(sources[0]), _ASKED))).to(live.device))
    if z.ndim != 2 or z.shape[1] < 2:
        raise ModelError("logits of shape (b, c) with c >= 2", f"{tuple(z.shape)}", "Return logits.", code="bad-logits")
    if are_probabilities(z):
        raise _softmax()
    box, c = model.domain, z.shape[1]
    for data in sources:
        if not (int(data.labels.min()) >= 0 and int(data.labels.max()) < c):
            found = f"labels from {int(data.labels.min())} to {int(data.labels.max())} in {data.name}"
            raise DataError(f"labels from 0 to {c - 1}", found, "Check that model and data belong together.")
        for rows in torch.split(torch.arange(len(data)), 1024):
            x = data.batch(rows)
            bad = ~((x >= box.lo) & (x <= box.hi)).flatten(1).all(1)
            if bad.any():
                raise outside_box(box, (float(x.min()), float(x.max())), rows[bad].tolist(), len(data))
    labels = sources[0].labels
    if int(labels.min()) == int(labels.max()):
        found = f"{len(labels)} samples of class {int(labels[0])}"
        raise DataError("training samples of at least two classes", found, "Shuffle the data, or give more of them.")
    return c


_ASKED: Final = 32
"""Samples that tell probabilities from logits."""


# ------------------------------------------------------------------------------------------------ networks and files


def _copied(model: Model, seed: int, how: Settings) -> Model:
    """Return the model with a copy of its network, which is what is trained: all of it, if all is frozen.

    So is what comes out of a file.
    """
    net = copy.deepcopy(model.module)
    assert net is not None
    if not any(p.requires_grad for p in net.parameters()):
        net.requires_grad_(True)
    if how.init == "ibp":
        ibp_init(net, seed)
    return Model(net.float(), model.box, model.mean, model.std, name=model.name)


def _fresh(model: Model, seed: int, how: Settings) -> Model:
    """Return the model with weights of its own: those of its layers that can draw them anew, and are not frozen."""
    own = _copied(model, seed, how)
    assert own.module is not None
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for layer in own.module.modules():
            free = all(p.requires_grad for p in layer.parameters(recurse=False))
            if free and callable(draw := getattr(layer, "reset_parameters", None)):
                draw()
    return own


@contextmanager
def _folder(folder: Path | None, identity: Mapping[str, Any], command: str | None, *, resume: bool) -> Iterator[Path]:
    """Yield the folder of a training; one that is there must be of the same settings. None stands for a passing one."""
    from assay import __version__

    if folder is None:
        with tempfile.TemporaryDirectory(prefix="assay-") as passing:
            yield Path(passing)
        return
    manifest, plain = folder / "manifest.json", json.loads(json.dumps({**identity, "assay": __version__}))
    try:
        if manifest.exists():
            _admit(folder, json.loads(manifest.read_text(encoding="utf-8")), plain, resume=resume)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(manifest) as f:
            f.write(json.dumps({"identity": plain, "command": command}, indent=1).encode())
    except (OSError, ValueError) as e:
        raise RunError(f"a folder that can be written and read: {folder}", str(e), "Choose another --out.") from e
    yield folder


def _admit(folder: Path, there: Mapping[str, Any], identity: Mapping[str, Any], *, resume: bool) -> None:
    if not resume:
        raise RunError("a folder without a training", str(folder), "Remove it, or choose another --out.")
    if found := list(differences(there.get("identity", {}), identity)):
        remedy = "Choose another --out, or repeat the training's own settings to go on with it."
        raise RunError(f"the settings of the training in {folder}", "; ".join(found), remedy)


def _sending(show: Tell, send: Tracking) -> Tell:
    """Return what shows every moment, and sends each row to the trackers once."""
    sent = [-1]

    def tell(moment: Moment) -> None:
        show(moment)
        if moment.row is not None and moment.row["steps"] > sent[0]:
            sent[0] = moment.row["steps"]
            send.log(figures(moment.row), moment.row["steps"])

    return tell


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of the history by name, parts of the loss among them."""
    plain = {n: float(v) for n, v in row.items() if isinstance(v, int | float) and n != "steps"}
    return plain | {f"loss/{n}": float(v) for n, v in row["parts"].items()}
