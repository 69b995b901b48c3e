"""Decision-based attacks of assay, Foolbox and ART, each stopped after the same number of queries a sample.

A recorder round the network keeps the smallest adversarial point among the first ``queries`` rows that it was asked
about, and then stops the attack. So every attack gets what it has seen, whether it returns that or not, and none gets
an answer more than another. ``DECISION`` is read by ``black_box.py``; alone, for the demo network:

    python benchmarks/_black_box_decision.py --samples 16 --queries 200 1000
    python benchmarks/_black_box_decision.py --weights pgd_madry.pth --samples 50 --queries 200 1000 5000

Parameters of the peers are their defaults, but for the numbers of iterations, which are as many as the budget needs.
"""

import argparse
import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 10
ORDER = {"linf": math.inf, "l2": 2, "l1": 1, "l0": 0}


class SpentError(Exception):
    """The queries of a sample are spent."""


class Recorder(nn.Module):
    """A network that answers ``queries`` rows, and keeps the size of the smallest adversarial one after each."""

    def __init__(self, net: nn.Module, x0: Tensor, label: int, norm: str, queries: int) -> None:
        super().__init__()
        self.net, self.x0, self.label, self.p, self.queries = net, x0, label, ORDER[norm], queries
        self.sizes: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, c)."""
        with torch.no_grad():
            z: Tensor = self.net(x)
        away = torch.linalg.vector_norm((x.double() - self.x0.double()).flatten(1), self.p, dim=1)
        wrong = (z.argmax(1) != self.label) & ((x >= 0) & (x <= 1)).flatten(1).all(1)
        for size in torch.where(wrong, away, torch.inf).tolist():
            if len(self.sizes) == self.queries:
                raise SpentError
            self.sizes.append(min(size, self.sizes[-1] if self.sizes else math.inf))
        return z


Attack: TypeAlias = Callable[[nn.Module, Tensor, Tensor, int], Any]
"""From the recorder, one sample (1, *f), its label (1,) and the queries; what it returns is not looked at."""


@dataclass(frozen=True)
class Contestant:
    """An attack of a library (``package``: its name in the package index)."""

    attack: str
    library: str
    package: str
    norms: tuple[str, ...]
    make: Callable[[str], Attack]  # from a norm


def assay_attack(name: str) -> Callable[[str], Attack]:
    """Make an attack of assay; it runs all samples at once elsewhere, here one, for the recorder."""

    def make(norm: str) -> Attack:
        from assay import Model, Threat, attacks

        def run(net: nn.Module, x: Tensor, y: Tensor, queries: int) -> Any:
            # A limit of one row a call: rows that fill up a batch would be recorded.
            model = Model(net, rows=1, fixed_rows=True, tuned=False)
            return attacks.get(name, steps=queries)(model, x, y, Threat(norm))

        return run

    return make


def foolbox_attack(name: str, **params: Any) -> Callable[[str], Attack]:
    """Make an attack of Foolbox."""

    def make(norm: str) -> Attack:
        import foolbox

        more = {"constraint": norm} if name == "HopSkipJumpAttack" else {}
        attack = getattr(foolbox.attacks, name)(**params, **more)

        def run(net: nn.Module, x: Tensor, y: Tensor, _: int) -> Any:
            model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
            return attack.run(model, x, foolbox.criteria.Misclassification(y))

        return run

    return make


def art_scores(net: nn.Module, x: Tensor) -> Any:
    """Return a network as ART's classifier that shows probabilities only, for samples like x (b, *f)."""
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    return BlackBoxClassifierNeuralNetwork(
        lambda v: net(torch.as_tensor(v, dtype=torch.float32)).softmax(1).numpy(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=CLASSES,
        clip_values=(0.0, 1.0),
    )


def art_attack(name: str, **params: Any) -> Callable[[str], Attack]:
    """Make an attack of ART."""

    def make(norm: str) -> Attack:
        from art.attacks import evasion

        more = {"norm": {"linf": "inf", "l2": 2, "l1": 1}[norm]} if name in ("HopSkipJump", "GeoDA") else {}

        vars(np).setdefault("mat", np.asmatrix)  # ART's GeoDA calls it, and NumPy 2 no longer has it

        def run(net: nn.Module, x: Tensor, _: Tensor, queries: int) -> Any:
            model = art_scores(net, x)
            # GeoDA fails below 1,000; it leaves a file of its waves in the working directory.
            budget = {"max_iter": max(queries, 1000)} if name == "GeoDA" else {}
            return getattr(evasion, name)(model, **params, **more, **budget, verbose=False).generate(x.numpy())

        return run

    return make


DECISION = (
    Contestant("rays", "assay", "assay", ("linf",), assay_attack("rays")),
    Contestant("hop-skip-jump", "assay", "assay", ("linf", "l2"), assay_attack("hop-skip-jump")),
    Contestant("hop-skip-jump", "Foolbox", "foolbox", ("linf", "l2"), foolbox_attack("HopSkipJumpAttack")),
    Contestant(
        "hop-skip-jump",
        "ART",
        "adversarial-robustness-toolbox",
        ("linf", "l2"),
        art_attack("HopSkipJump", max_iter=64, batch_size=1),
    ),
    Contestant("geoda", "assay", "assay", ("linf", "l2", "l1"), assay_attack("geoda")),
    Contestant(
        "geoda", "ART", "adversarial-robustness-toolbox", ("linf", "l2", "l1"), art_attack("GeoDA", batch_size=1)
    ),
    Contestant("surfree", "assay", "assay", ("l2",), assay_attack("surfree")),
    Contestant("cgba", "assay", "assay", ("l2",), assay_attack("cgba")),
    Contestant("sign-opt", "assay", "assay", ("l2",), assay_attack("sign-opt")),
    Contestant(
        "sign-opt",
        "ART",
        "adversarial-robustness-toolbox",
        ("l2",),
        art_attack("SignOPTAttack", targeted=False, batch_size=1),
    ),
    Contestant("boundary", "assay", "assay", ("l2",), assay_attack("boundary")),
    Contestant("boundary", "Foolbox", "foolbox", ("l2",), foolbox_attack("BoundaryAttack")),
    Contestant(
        "boundary",
        "ART",
        "adversarial-robustness-toolbox",
        ("l2",),
        art_attack("BoundaryAttack", targeted=False, batch_size=1),
    ),
    Contestant("pointwise", "assay", "assay", ("l0",), assay_attack("pointwise")),
    Contestant("pointwise", "Foolbox", "foolbox", ("l0",), foolbox_attack("PointwiseAttack")),
)


def sizes(c: Contestant, net: nn.Module, x: Tensor, y: Tensor, norm: str, queries: int) -> Tensor:
    """Return the smallest size after each query (b, queries); inf before the first success.

    Raises:
        ImportError: the library is not installed.
    """
    attack, rows = c.make(norm), []
    for i in range(len(x)):
        recorder = Recorder(net, x[i : i + 1], int(y[i]), norm, queries)
        torch.manual_seed(i)
        with contextlib.suppress(SpentError, _model_error()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attack(recorder, x[i : i + 1], y[i : i + 1], queries)
        seen = recorder.sizes or [math.inf]
        rows.append(seen + seen[-1:] * (queries - len(seen)))
    return torch.tensor(rows)


def _model_error() -> type[Exception]:
    """Return what assay raises when the recorder stops it."""
    from assay.core.errors import ModelError

    return ModelError


def main() -> None:
    """Print the median size after some numbers of queries, an attack a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of the demo network's architecture; without, the demo network")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--queries", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--only", nargs="+", help="names of attacks")
    args = parser.parse_args()
    net, x, y = _case(args.weights, args.samples)
    print(f"{len(x)} samples; median size after queries", *args.queries, sep="\t")
    for c in DECISION:
        for norm in c.norms if not args.only or c.attack in args.only else ():
            begun = time.process_time()
            try:
                best = sizes(c, net, x, y, norm, max(args.queries))
            except ImportError as e:
                print(c.attack, norm, c.library, f"not installed ({e})", sep="\t")
                continue
            medians = [f"{float(best[:, q - 1].median()):.4g}" for q in args.queries]
            print(c.attack, norm, c.library, *medians, f"{time.process_time() - begun:.0f} s", sep="\t", flush=True)


def _case(weights: Path | None, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, and the first images that it gets right."""
    import assay
    from assay.models.demo.nets import mnist_cnn

    net: nn.Module = assay.load_model("demo:mnist-robust").net  # type: ignore[assignment]
    if weights is not None:
        net = mnist_cnn()
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False)
    x, y = (torch.cat(v) for v in zip(*assay.load_data("demo:mnist", limit=2 * samples), strict=True))
    right = (net(x).argmax(1) == y).nonzero()[:samples, 0]
    return net, x[right], y[right]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
