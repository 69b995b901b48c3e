"""The contract of attacks as one function: for those of this package, and for anybody's.

Every rule is a function of its own and says, when it is broken, which rule it is and what was seen.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from assay.attacks.attack import Result, Runnable, verify
from assay.attacks.loop import GradientAttack
from assay.core.random import Draws
from assay.core.types import Inputs, Labels, Logits, Mask
from assay.models.door import Door
from assay.models.model import Model
from assay.threats.norms import NORMS
from assay.threats.problem import Problem, exact_size
from assay.threats.threat import Threat

SAMPLES = 5
ROUNDING = 1e-5
"""How far a verified point may lie from the one that was asked about."""


def check_attack(
    attack: Runnable,
    *,
    norms: tuple[str, ...] | None = None,
    model: Model | nn.Module | None = None,
    shape: tuple[int, ...] = (3, 6, 6),
    quick: bool = False,
) -> None:
    """Check that an attack keeps the rules that every attack of assay keeps.

    It is run a few dozen times on a handful of samples, so give it few steps.

    Args:
        attack: any attack or combination of attacks.
            One that is ``shared`` finds one thing for all samples, so that nothing is asked of a sample alone; one that
            is ``sizeless`` takes no eps, and is not asked to find what a norm calls easy.
        norms: names of the norms to try; None for those that the attack names, else linf and l2.
        model: a classifier of inputs (b, *shape); None for a small convolutional network, or a dense one.
        shape: of one sample.
        quick: try half of the threats, where an attack takes them with and without an eps.

    Raises:
        AssertionError: a rule is broken; the message says which.

    Example:
        >>> from assay.attacks import FGSM
        >>> from assay.attacks.testing import check_attack
        >>> check_attack(FGSM(), norms=("linf",))
    """
    net = _small_net(shape) if model is None else model
    model = net if isinstance(net, Model) else Model(net)
    named: tuple[str, ...] = getattr(attack, "norms", ("linf", "l2"))
    for norm in norms or named:
        case = _Case.of(attack, model, norm, shape, quick=quick)
        for rule in RULES:
            if not (rule in _OF_ONE_SAMPLE and getattr(attack, "shared", False)):
                rule(case)


@final
@dataclass(frozen=True, slots=True)
class _Case:
    """An attack, a model, and samples that the model gets right."""

    attack: Runnable
    model: Model
    norm: str
    x: Inputs
    y: Labels
    second: Labels
    """The class that the model likes second best."""
    quick: bool
    usual: dict[tuple[Threat, bool], Result] = field(default_factory=dict)
    """What plain calls gave: several rules look at them."""
    claims: dict[Threat, tuple[Mask, Mask, Inputs]] = field(default_factory=dict)
    """Likewise what the attack itself claimed of all samples, what held of it, and the points."""

    @classmethod
    def of(cls, attack: Runnable, model: Model, norm: str, shape: tuple[int, ...], *, quick: bool) -> "_Case":
        box = model.domain
        x = box.lo + box.width * (0.2 + 0.6 * Draws.of(7, torch.arange(SAMPLES)).uniform(shape))
        with model.frozen("cpu") as live, torch.no_grad():
            ranked = live(x).argsort(dim=1, descending=True)
        return cls(attack, model, norm, x, ranked[:, 0], ranked[:, 1], quick)

    def threats(self) -> Iterator[tuple[Threat, Labels]]:
        """Yield the threats to try, each with its labels: targeted or not, and without eps where the attack can."""
        features = self.x[0].numel()
        share = {"linf": 0.03, "l2": 0.025 * features**0.5, "l1": 0.015 * features, "l0": 0.0}[self.norm]
        eps = float(max(1, features // 20)) if self.norm == "l0" else share * self.model.domain.width
        sizes: tuple[float | None, ...] = (eps, None) if getattr(self.attack, "any_size", False) else (eps,)
        if getattr(self.attack, "sizeless", False):
            sizes = (None,)
        for targeted, y in ((False, self.y), (True, self.second)):
            for size in sizes if not self.quick or len(sizes) == 1 else sizes[int(targeted) :][:1]:
                yield Threat(self.norm, size, targeted=targeted), y

    def result(self, threat: Threat, y: Labels, *, full: bool = False) -> Result:
        if (threat, full) not in self.usual:
            self.usual[threat, full] = self.attack(self.model, self.x, y, threat, full=full)
        return self.usual[threat, full]

    def ran(self, threat: Threat, y: Labels) -> tuple[Mask, Mask, Inputs]:
        if threat not in self.claims:
            self.claims[threat] = _run(self, threat, y, torch.arange(SAMPLES))
        return self.claims[threat]

    def results(self) -> Iterator[tuple[Threat, Labels, Result]]:
        for threat, y in self.threats():
            for full in (False, True):
                yield threat, y, self.result(threat, y, full=full)

    def witnessed(self) -> "tuple[_Case, _Witness]":
        witness = _Witness(self.model.net)
        return replace(self, model=replace(self.model, net=witness), usual={}, claims={}), witness

    def fresh(self, x: Inputs) -> Tensor:
        with self.model.frozen("cpu") as live, torch.no_grad():
            return live(x)


def _is_what_it_says(c: _Case) -> None:
    for threat, y, r in c.results():
        met = _met(threat, y, c.fresh(r.x))
        size = exact_size(threat.norm, r.x, c.x)
        box, where = c.model.domain, f"{type(c.attack).__name__}, {threat}"
        _hold(r.x.shape == c.x.shape and r.x.dtype == c.x.dtype, "a result has the shape and dtype of the input", where)
        _hold(bool(((r.x >= box.lo) & (r.x <= box.hi)).all()), "every point returned is inside the box", where)
        inside = threat.eps is None or bool((size <= threat.eps).all())
        _hold(inside, "every point returned is inside the ball", f"{where}: sizes {size.tolist()}")
        _hold(torch.equal(met, r.success), "success is what a fresh pass of the model says", f"{where}: {r.success}")
        said = torch.where(met, size, torch.inf).to(r.size.dtype)
        _hold(torch.equal(said, r.size), "size is the distance to the clean input, inf without success", where)


def _claims_are_true(c: _Case) -> None:
    for threat, y in c.threats():
        claimed, held, _ = c.ran(threat, y)
        _hold(
            torch.equal(claimed, held), "an attack claims only successes that are ones", f"{threat}: {claimed}, {held}"
        )


def _keeps_what_it_found(c: _Case) -> None:
    """Look at one sample, so that every question is about it."""
    for threat, y in c.threats():
        _keeps_what_it_saw(c.attack, c.model, c.x[2:3], threat, y[2:3])
    for x, y, threat in _easy(c):
        _keeps_what_it_saw(c.attack, Model(Line()), x[:1], threat, y[:1])


def _keeps_what_it_saw(attack: Runnable, model: Model, x: Inputs, threat: Threat, y: Labels) -> None:
    witness = _Witness(model.net)
    for full in (False, True):
        witness.asked.clear()
        r = attack(replace(model, net=witness), x, y, threat, full=full)
        asked = torch.cat(witness.asked)
        allowed = exact_size(threat.norm, asked, x.expand_as(asked)) <= (threat.eps or torch.inf)
        with model.frozen("cpu") as live, torch.no_grad():
            met = allowed & _met(threat, y, live(asked))
        seen = f"{threat}, full={full}: {int(met.sum())} of {len(asked)} points met the goal"
        _hold(bool(met.any()) == bool(r.success), "a point that meets the goal is returned", seen)
        near = (torch.cat([asked, x[: 1 - int(r.success)]]) - r.x).flatten(1).abs().amax(1).min()
        _hold(bool(near < ROUNDING), "the point returned is one that was asked about, or the clean input", seen)


def _asks_inside_the_box_and_counts_every_pass(c: _Case) -> None:
    c, witness = c.witnessed()
    for threat, y in c.threats():
        for full in (False, True) if threat.eps is not None else (False,):
            witness.asked.clear()
            witness.differentiated.clear()
            r = c.attack(c.model, c.x, y, threat, full=full)
            asked, box = torch.cat(witness.asked), c.model.domain
            inside = bool(((asked >= box.lo) & (asked <= box.hi)).all())
            seen = f"{float(asked.min())}..{float(asked.max())}"
            _hold(inside, "the model is asked about points inside the box only", seen)
            if threat.eps is not None:  # else points far from every sample belong to none
                _is_counted(c, r, witness, f"{threat}, full={full}")


def _is_counted(c: _Case, r: Result, witness: "_Witness", where: str) -> None:
    for kind, seen, counted in (
        ("forward", witness.asked, r.forwards),
        ("backward", witness.differentiated, r.backwards),
    ):
        true, said = _owners(seen, c.x), counted
        if getattr(c.attack, "minimal", False):  # its points go as far as the box lets them
            true, said = true.sum(), said.sum()
        told = f"{where}: counted {said.tolist()}, seen {true.tolist()}"
        _hold(torch.equal(true, said), f"every {kind} pass is counted, for its sample", told)


def _a_sample_stands_alone(c: _Case) -> None:
    for threat, y in c.threats():
        _, held, points = c.ran(threat, y)
        for order in (torch.tensor([3]), torch.tensor([4, 1, 0])):
            _, again, others = _run(c, threat, y, order)
            same = torch.equal(again, held[order]) and torch.allclose(others, points[order], rtol=0, atol=ROUNDING)
            _hold(same, "a sample's result does not depend on the others in its batch", f"{threat}, {order.tolist()}")


def _respects_a_budget(c: _Case) -> None:
    """Limit the passes of a sample; one of them is kept for verification, so one more than was spent is no limit."""
    for threat, y in c.threats():
        free = c.result(threat, y)
        spent = free.forwards + free.backwards
        enough = int(spent.max()) + c.model.deciding
        for limit in (1, 3, 1 + enough // 2, enough):
            r = c.attack(c.model, c.x, y, threat, max_passes=limit)
            where, passes = f"{threat}, max_passes={limit}", r.forwards + r.backwards
            _hold(bool((passes <= limit).all()), "no sample costs more than it may", f"{where}: {passes}")
            met = _met(threat, y, c.fresh(r.x))
            seen = f"{where}: {r.success}"
            _hold(torch.equal(met, r.success), "success is what a fresh pass of the model says", seen)
            kept = r.success | ~free.success | (spent + c.model.deciding > limit)
            _hold(bool(kept.all()), "what is found within the budget is returned", seen)
        _hold(torch.equal(r.x, free.x), "a limit that is not reached changes nothing", where)


def _leaves_no_trace(c: _Case) -> None:
    module = c.model.module
    for threat, y in c.threats():
        x, labels, state = c.x.clone(), y.clone(), torch.get_rng_state()
        kept = [] if module is None else [(p, p.clone(), p.grad, p.requires_grad) for p in module.parameters()]
        modes = [] if module is None else [m.training for m in module.modules()]
        first = c.attack(c.model, x, y, threat)
        _hold(torch.equal(x, c.x) and torch.equal(y, labels), "inputs and labels are left as they are", str(threat))
        _hold(torch.equal(state, torch.get_rng_state()), "the global random state is left as it is", str(threat))
        same = all(torch.equal(p, v) and p.grad is g and p.requires_grad == r for p, v, g, r in kept)
        same &= module is None or modes == [m.training for m in module.modules()]
        _hold(same, "the model is left as it is", str(threat))
        first.x.zero_()
        _hold(torch.equal(x, c.x), "a result shares no memory with the input", str(threat))


def _repeats_itself(c: _Case) -> None:
    for threat, y in c.threats():
        layout = torch.channels_last if c.x.ndim == 4 else torch.contiguous_format
        again = c.attack(c.model, c.x.contiguous(memory_format=layout), y, threat)
        same = torch.equal(c.result(threat, y).x, again.x)
        _hold(same, "the same seed gives the same result, whatever the memory format of the input", str(threat))


def _finds_what_is_easy(c: _Case) -> None:
    for x, y, threat in _easy(c):
        found = c.attack(Line(), x, y, threat).success
        _hold(bool(found.all()), "an easy example is found", f"{threat}, targeted={threat.targeted}: {found.tolist()}")
        if c.norm != "l0" and threat.eps is not None:
            less = Threat(c.norm, 0.95 * float(_distance(x, c.norm).min()), targeted=threat.targeted)
            found = c.attack(Line(), x, y, less).success
            _hold(not found.any(), "nothing is found where there is nothing", f"{less}: {found.tolist()}")


def _easy(c: _Case) -> Iterator[tuple[Inputs, Labels, Threat]]:
    """Yield samples on both sides of :class:`Line`, with threats that reach a little further than the plane."""
    slack = 1.05 if isinstance(c.attack, GradientAttack) and c.norm in ("linf", "l2") else 4.0
    if getattr(c.attack, "sizeless", False):
        return
    noise = 0.1 * (c.x - c.model.domain.lo) / c.model.domain.width
    for x, label in ((noise + 0.3, 0), (noise + 0.6, 1)):
        eps = slack * float(_distance(x, c.norm).max())
        for targeted in (False, True):
            y = torch.full((SAMPLES,), 1 - label if targeted else label)
            size = float(min(round(eps), x[0].numel())) if c.norm == "l0" else eps
            yield x, y, Threat(c.norm, size, targeted=targeted)


RULES: tuple[Callable[[_Case], None], ...] = (
    _claims_are_true,
    _is_what_it_says,
    _keeps_what_it_found,
    _asks_inside_the_box_and_counts_every_pass,
    _respects_a_budget,
    _a_sample_stands_alone,
    _leaves_no_trace,
    _repeats_itself,
    _finds_what_is_easy,
)


_OF_ONE_SAMPLE = (_keeps_what_it_found, _a_sample_stands_alone)
"""Rules that an attack which finds one thing for all samples breaks by nature."""


@final
class Line(nn.Module):
    """Two classes, split where the mean of the input is 1/2: every distance is known in closed form."""

    def forward(self, x: Inputs) -> Tensor:
        z = x.flatten(1).mean(1) - 0.5
        return torch.stack([-z, z], 1)


@final
class _Witness(nn.Module):
    """A network that remembers what it was asked about, but for the rows that only fill a batch."""

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.asked: list[Tensor] = []
        self.differentiated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        own = torch.cat([torch.ones(1, dtype=torch.bool), (x[1:] != x[:1]).flatten(1).any(1)])
        self.asked.append(x.detach()[own].clone(memory_format=torch.contiguous_format))
        asked, z = self.asked[-1], self.net(x)
        if z.requires_grad:
            z.register_hook(lambda _: self.differentiated.append(asked))  # type: ignore[no-untyped-call]
        return z


def _run(c: _Case, threat: Threat, y: Labels, order: Tensor) -> tuple[Mask, Mask, Inputs]:
    """Attack the samples in this order, under their own names; return what was claimed, what held, and the points."""
    threat = threat.within(c.model.domain, c.x[0].numel())
    with c.model.frozen("cpu") as live:
        door = Door(live, len(order))
        p = Problem.pose(c.x[order], y[order], threat, Draws.of(0, order))
        out = c.attack.run(door, p)
        held, points, _ = verify(door, p, out)
    return out.success, held, points


def _owners(parts: list[Tensor], x0: Inputs) -> Tensor:
    """Return how many of these points lie nearest to each clean sample."""
    points = torch.cat(parts) if parts else x0[:0]
    return torch.cdist(points.flatten(1), x0.flatten(1)).argmin(1).bincount(minlength=len(x0))


def _met(threat: Threat, y: Labels, logits: Logits) -> Mask:
    guess = logits.argmax(1)
    return guess == y if threat.targeted else guess != y


def _distance(x: Inputs, norm: str) -> Tensor:
    """Return the distance of x to the plane of :class:`Line`, away from the ends of the box."""
    gap, n = (x.flatten(1).mean(1) - 0.5).abs(), x[0].numel()
    factor: float = {"linf": 1.0, "l2": n**0.5, "l1": n, "l0": 2.0 * n}[norm]
    return gap * factor


def _hold(true: bool, rule: str, seen: str) -> None:
    if not true:
        raise AssertionError(f"broken rule: {rule} ({seen})")


def _small_net(shape: tuple[int, ...]) -> nn.Module:
    """Return a network of four classes with weights that do not depend on the global random state."""
    with torch.random.fork_rng([]):
        image = len(shape) == 3
        features = 8 * shape[1] * shape[2] if image else math.prod(shape)
        front = [nn.Conv2d(shape[0], 8, 3, padding=1), nn.ReLU()] if image else []
        net = nn.Sequential(*front, nn.Flatten(), nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, 4))
    for i, p in enumerate(net.parameters()):
        scale = 1.0 if p.ndim > 1 else 0.1
        values = Draws.of(i, torch.zeros(1, dtype=torch.int64)).normal(p.shape)[0]
        p.data = scale * values / p[0].numel() ** 0.5
    return net.eval()


assert set(NORMS) == {"linf", "l2", "l1", "l0"}  # the tables above know these
