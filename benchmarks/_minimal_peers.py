"""Minimal-norm attacks as other libraries offer them, each with the number of steps that a budget of passes buys.

A pass is one row that goes through the network forward, or one that comes back. What a step of an attack costs is
known from its algorithm; where an attack repeats itself (binary searches), the budget is shared out. Parameters that
do not follow from the budget are the library's defaults unless a comment says why not. Rows "lr 0.1" are there because
a rate of 0.01 in the space of tanh does not leave a black pixel within such budgets, "step 10" because FMN's authors
tune its first step (1, 5 or 10). Libraries are imported where they are used, so that a missing one is a row of the
table and not an error.
"""

import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

ORDER = {"linf": math.inf, "l2": 2, "l1": 1, "l0": 0}
FEW, MANY = 3, 9  # rounds of a binary search, on a budget below and from 600 passes


class TimeUpError(Exception):
    """The seconds of a row are over."""


class Counted(nn.Module):
    """A network that counts the rows that pass through it, and refuses to work after ``seconds``."""

    def __init__(self, net: nn.Module, seconds: float) -> None:
        super().__init__()
        self.net, self.seconds, self.end = net, seconds, time.monotonic() + seconds
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, c)."""
        if time.monotonic() > self.end:
            raise TimeUpError(f"stopped after {self.seconds:.0f} s, {self.forwards + self.backwards} passes")
        self.forwards += len(x)
        out: Tensor = self.net(x)
        if out.requires_grad:
            out.register_hook(self._back)  # type: ignore[no-untyped-call]
        return out

    def _back(self, grad: Tensor) -> None:
        self.backwards += len(grad)


@dataclass(frozen=True)
class Task:
    """What is attacked: samples that the network gets right, with ``budget`` passes for each."""

    net: nn.Module
    x: Tensor  # (b, *f) in [0, 1]
    y: Tensor  # (b,) int64
    norm: str
    budget: int
    classes: int = 10

    @property
    def p(self) -> float:
        """The order of the norm."""
        return ORDER[self.norm]

    @property
    def features(self) -> int:
        return self.x[0].numel()

    @property
    def rounds(self) -> int:
        """Rounds of a binary search: fewer where each would have only a handful of steps."""
        return FEW if self.budget < 600 else MANY

    def steps(self, cost: float = 2, rounds: int = 1) -> int:
        """Return how many steps of ``cost`` passes fit into the budget, in each of ``rounds`` rounds."""
        return max(1, int(self.budget / (cost * rounds)))


Run: TypeAlias = Callable[[Task], Any]


@dataclass(frozen=True)
class Peer:
    """An attack of a library; ``attack`` is the name of the same algorithm in assay's registry."""

    library: str
    attack: str
    norms: tuple[str, ...]
    run: Run
    variant: str = ""


def nearest_other(x: Tensor, y: Tensor) -> Tensor:
    """Return for each sample the one of another class that is nearest in l2: a start that costs no pass."""
    gap = torch.cdist(x.flatten(1), x.flatten(1)).masked_fill(y[:, None] == y, torch.inf)
    return x[gap.argmin(1)]


# --- adv-lib


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Put empty modules where packages are missing, for the length of an import."""
    missing = [name for name in names if find_spec(name) is None]
    for name in missing:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].models = None  # type: ignore[attr-defined]  # of torchvision
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _adv_lib(module: str = "") -> Any:
    """Import attacks of adv-lib. Visdom draws its plots, torchvision its LPIPS distance: no attack here needs them."""
    with _stand_ins("visdom", "torchvision"):
        return importlib.import_module("adv_lib.attacks" + module)


def _al_steps(name: str, keyword: str, t: Task, *, cost: float = 2, norm: str = "", **params: Any) -> Any:
    """Run an attack whose one knob is a number of steps; ``norm``: the keyword for the order of the norm."""
    if norm:
        params[norm] = t.p
    return getattr(_adv_lib(), name)(t.net, t.x, t.y, **{keyword: t.steps(cost)}, **params)


def _al(name: str, keyword: str = "num_steps", **params: Any) -> Run:
    return partial(_al_steps, name, keyword, **params)


def _al_alma(t: Task) -> Any:
    # Without a first step of a set length the first rate, 0.1, fits no norm; these are its authors' settings.
    return _adv_lib().alma(
        t.net, t.x, t.y, num_steps=t.steps(), distance=t.norm, init_lr_distance={"l2": 0.1, "l1": 0.5}[t.norm]
    )


def _al_fab(t: Task) -> Any:
    return _adv_lib().fab(t.net, t.x, t.y, norm=t.p, n_iter=t.steps(t.classes + 1))


def _al_fab_targets(t: Task) -> Any:
    return _adv_lib().fab(
        t.net, t.x, t.y, norm=t.p, n_iter=t.steps(3, t.rounds), restarts=t.rounds, targeted_restarts=True
    )


def _al_cw_l2(t: Task, learning_rate: float = 0.01) -> Any:
    return _adv_lib().carlini_wagner_l2(
        t.net,
        t.x,
        t.y,
        learning_rate=learning_rate,
        binary_search_steps=t.rounds,
        max_iterations=t.steps(2, t.rounds),
        abort_early=False,  # it looks every tenth part of a round, and gives up short rounds at once
    )


def _al_cw_linf(t: Task, learning_rate: float = 0.01) -> Any:
    # By default the constant doubles 21 times before tau ever shrinks; a budget allows for about 8 rounds in all.
    return _adv_lib().carlini_wagner_linf(
        t.net,
        t.x,
        t.y,
        learning_rate=learning_rate,
        max_iterations=t.steps(2, 8),
        initial_const=0.1,
        const_factor=10,
    )


def _al_apgd(t: Task) -> Any:
    rounds = 10
    most = {"linf": 0.5, "l2": 0.25 * math.sqrt(t.features), "l1": 0.15 * t.features}[t.norm]
    steps = int((t.budget / rounds - 3) / 2)  # a round also makes a first pass and a last one
    minimal = _adv_lib(".auto_pgd").minimal_apgd
    return minimal(t.net, t.x, t.y, norm=t.p, max_eps=most, binary_search_steps=rounds, n_iter=steps)


def _al_sdf(t: Task) -> Any:
    # On a robust network its inner loops run to their end, by default 100 times 100 steps.
    return _adv_lib().sdf(t.net, t.x, t.y, steps=3, df_steps=t.steps(t.classes, 3))


# --- Foolbox


def _foolbox(name: str, t: Task, *, starts: Tensor | None = None, **params: Any) -> Any:
    """Run an attack of Foolbox; ``run`` is the attack without the calls that judge the result."""
    import foolbox

    model = foolbox.PyTorchModel(t.net, bounds=(0, 1), device="cpu")
    attack = getattr(foolbox.attacks, name)(**params)
    given = {} if starts is None else {"starting_points": starts}
    return attack.run(model, t.x, foolbox.criteria.Misclassification(t.y), **given)


def _fb_ddn(t: Task) -> Any:
    return _foolbox("DDNAttack", t, steps=t.steps())


def _fb_fmn(t: Task) -> Any:
    name = {"linf": "LInf", "l2": "L2", "l1": "L1", "l0": "L0"}[t.norm]
    return _foolbox(f"{name}FMNAttack", t, steps=t.steps())


def _fb_cw(t: Task, stepsize: float = 0.01) -> Any:
    steps = t.steps(2, t.rounds)
    shape: dict[str, Any] = {"binary_search_steps": t.rounds, "steps": steps, "stepsize": stepsize}
    return _foolbox("L2CarliniWagnerAttack", t, abort_early=False, **shape)


def _fb_ead(t: Task, stepsize: float = 0.01) -> Any:
    steps = t.steps(3, t.rounds)
    shape: dict[str, Any] = {"binary_search_steps": t.rounds, "steps": steps, "initial_stepsize": stepsize}
    return _foolbox("EADAttack", t, decision_rule="L1", abort_early=False, **shape)


def _fb_deepfool(t: Task) -> Any:
    name = {"linf": "Linf", "l2": "L2"}[t.norm]
    return _foolbox(f"{name}DeepFoolAttack", t, steps=t.steps(2 * (t.classes - 1)), candidates=t.classes)


def _fb_brendel_bethge(t: Task) -> Any:
    name = {"linf": "Linfinity", "l2": "L2", "l1": "L1", "l0": "L0"}[t.norm]
    return _foolbox(
        f"{name}BrendelBethgeAttack",
        t,
        starts=nearest_other(t.x, t.y),  # its own start, noise, does not fool a robust network
        steps=t.steps(),
        lr=1e-3 / len(t.x),  # it multiplies its trust region by the number of samples in the batch
    )


# --- torchattacks


def _torchattacks(name: str, t: Task, **params: Any) -> Any:
    import torchattacks

    return getattr(torchattacks, name)(t.net, **params)(t.x, t.y)


def _ta_cw(t: Task, lr: float = 0.01) -> Any:
    return _torchattacks("CW", t, steps=t.steps(), lr=lr)


def _ta_deepfool(t: Task) -> Any:
    return _torchattacks("DeepFool", t, steps=t.steps(t.classes + 1))


def _ta_fab(t: Task) -> Any:
    import torchattacks

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[t.norm]
    attack = torchattacks.FAB(t.net, norm=name, steps=t.steps(t.classes + 1), n_classes=t.classes)
    return attack.attack_single_run(t.x, t.y)  # its full call forgets what lies beyond eps, and breaks on L1


def _ta_ead(name: str, t: Task, lr: float = 0.01) -> Any:
    steps = t.steps(3, t.rounds)
    return _torchattacks(name, t, lr=lr, binary_search_steps=t.rounds, max_iterations=steps, abort_early=False)


def _ta_jsma(t: Task) -> Any:
    changed = 2 * t.steps(t.classes + 2)  # two values a step
    return _torchattacks("JSMA", t, theta=1.0, gamma=min(1.0, changed / t.features))


def _ta_sparsefool(t: Task) -> Any:
    return _torchattacks("SparseFool", t, steps=t.steps(200))  # a step holds a whole DeepFool


# --- ART, sample by sample: in a batch it goes back once for every class that occurs


def _art(name: str, t: Task, *, labels: bool = True, **params: Any) -> Any:
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(
        t.net,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(t.x.shape[1:]),
        nb_classes=t.classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = getattr(evasion, name)(model, batch_size=1, verbose=False, **params)
    return attack.generate(t.x.numpy(), y=t.y.numpy() if labels else None)


def _art_cw(t: Task, **params: float) -> Any:
    return _art("CarliniL2Method", t, binary_search_steps=t.rounds, max_iter=t.steps(9, t.rounds), **params)


def _art_cw_linf(t: Task, **params: float) -> Any:
    return _art("CarliniLInfMethod", t, max_iter=t.steps(6, 8), initial_const=0.1, const_factor=10.0, **params)


def _art_cw_l0(t: Task, **params: float) -> Any:
    return _art("CarliniL0Method", t, binary_search_steps=FEW, max_iter=t.steps(12, 10 * FEW), **params)


def _art_ead(t: Task, **params: float) -> Any:
    steps = t.steps(6, t.rounds)
    return _art("ElasticNet", t, binary_search_steps=t.rounds, max_iter=steps, decision_rule="L1", **params)


def _art_deepfool(t: Task) -> Any:
    return _art("DeepFool", t, labels=False, max_iter=t.steps(t.classes + 2))


def _art_jsma(t: Task) -> Any:
    changed = 2 * t.steps(3)  # two values a step; targets are random
    return _art("SaliencyMapMethod", t, labels=False, theta=1.0, gamma=min(1.0, changed / t.features))


_STRONG = {"learning_rate": 0.1, "initial_const": 10.0}
"""For ART: its first constant, 0.01, grows too little within a few rounds to leave a robust label."""

AL, FB, TA, ART = "adv-lib", "Foolbox", "torchattacks", "ART"
ROUND, ALL = ("linf", "l2", "l1"), ("linf", "l2", "l1", "l0")
L2, L1, L0, LINF = ("l2",), ("l1",), ("l0",), ("linf",)

PEERS = (
    Peer(AL, "ddn", L2, _al("ddn", "steps", levels=None)),  # levels: it rounds to 256 grey values by default
    Peer(FB, "ddn", L2, _fb_ddn),
    Peer(AL, "fmn", ALL, _al("fmn", "steps", norm="norm")),
    Peer(AL, "fmn", ALL, _al("fmn", "steps", norm="norm", **{"\u03b1_init": 10.0}), "step 10"),
    Peer(FB, "fmn", ALL, _fb_fmn),
    Peer(AL, "fab", ROUND, _al_fab),
    Peer(AL, "fab", ROUND, _al_fab_targets, "targets"),
    Peer(TA, "fab", ROUND, _ta_fab),
    Peer(AL, "cw", L2, _al_cw_l2),
    Peer(AL, "cw", L2, partial(_al_cw_l2, learning_rate=0.1), "lr 0.1"),
    Peer(FB, "cw", L2, _fb_cw),
    Peer(FB, "cw", L2, partial(_fb_cw, stepsize=0.1), "lr 0.1"),
    Peer(TA, "cw", L2, _ta_cw),
    Peer(TA, "cw", L2, partial(_ta_cw, lr=0.1), "lr 0.1"),
    Peer(ART, "cw", L2, _art_cw),
    Peer(ART, "cw", L2, partial(_art_cw, **_STRONG), "lr 0.1, c 10"),
    Peer(AL, "cw-linf", LINF, _al_cw_linf),
    Peer(AL, "cw-linf", LINF, partial(_al_cw_linf, learning_rate=0.1), "lr 0.1"),
    Peer(ART, "cw-linf", LINF, _art_cw_linf),
    Peer(ART, "cw-linf", LINF, partial(_art_cw_linf, learning_rate=0.1), "lr 0.1"),
    Peer(ART, "cw-l0", L0, _art_cw_l0),
    Peer(ART, "cw-l0", L0, partial(_art_cw_l0, **_STRONG), "lr 0.1, c 10"),
    Peer(FB, "ead", L1, _fb_ead),
    Peer(FB, "ead", L1, partial(_fb_ead, stepsize=0.1), "lr 0.1"),
    Peer(TA, "ead", L1, partial(_ta_ead, "EADL1")),
    Peer(TA, "ead", L1, partial(_ta_ead, "EADEN"), "EN"),
    Peer(ART, "ead", L1, _art_ead),
    Peer(ART, "ead", L1, partial(_art_ead, **_STRONG), "lr 0.1, c 10"),
    Peer(AL, "pdgd", L2, _al("pdgd")),
    Peer(AL, "pdpgd", ALL, _al("pdpgd", norm="norm")),
    Peer(AL, "alma", ("l2", "l1"), _al_alma),
    Peer(AL, "deepfool", ("linf", "l2"), _al("df", "steps", norm="norm", cost=10)),
    Peer(FB, "deepfool", ("linf", "l2"), _fb_deepfool),
    Peer(TA, "deepfool", L2, _ta_deepfool),
    Peer(ART, "deepfool", L2, _art_deepfool),
    Peer(AL, "superdeepfool", L2, _al_sdf),
    Peer(AL, "trust-region", ("linf", "l2"), _al("tr", "iter", norm="p", cost=4, adaptive=True)),
    Peer(AL, "bisect(apgd)", ROUND, _al_apgd),
    Peer(FB, "brendel-bethge", ALL, _fb_brendel_bethge),
    Peer(AL, "sigma-zero", L0, _al("sigma_zero")),
    Peer(AL, "vfga", L0, _al("vfga", "max_iter", cost=22, targeted=False)),
    Peer(TA, "jsma", L0, _ta_jsma),
    Peer(ART, "jsma", L0, _art_jsma),
    Peer(TA, "sparsefool", ("l1", "l0"), _ta_sparsefool),
)
