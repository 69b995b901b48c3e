"""The same network with ReLUs in place of max pooling and clamping: what a search can split.

Bounds of the pieces are looser than those of the whole until they are split. So bounds of the whole come first, and
what they say of a step holds for the pieces that stand for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from assay.certification.graph import Builder, Graph, Shape, Var
from assay.certification.rules import Clamp, MaxPool, ReLU


class Pieces(NamedTuple):
    """A graph, and which of its steps has the value of each step of the whole."""

    graph: Graph
    places: tuple[int, ...]


def in_pieces(graph: Graph, device: torch.device) -> Pieces | None:
    """Return a graph of the same function, in which max pooling without padding and clamping are made of ReLUs.

    None where there is nothing of that kind.
    """
    if not any(isinstance(s.rule, MaxPool | Clamp) for s in graph.steps):
        return None
    build = Builder(graph.dtype, device)
    made: list[Var] = []
    for step in graph.steps:
        inputs = [made[i] for i in step.inputs]
        if step.rule is None:
            made.append(build.input(step.shape))
        elif isinstance(step.rule, MaxPool) and not _padded(step.rule, inputs[0].shape):
            made.append(_pool(build, step.rule, inputs[0]))
        elif isinstance(step.rule, Clamp):
            made.append(_clamp(build, step.rule, inputs[0]))
        else:
            made.append(build.apply(step.name, step.rule, *inputs))
    return Pieces(Graph(tuple(build.steps), graph.dtype, graph.softmax), tuple(v.index for v in made))


def _padded(rule: MaxPool, shape: Shape) -> bool:
    return not bool(rule.windows(torch.zeros(shape)).isfinite().all())


def _pool(build: Builder, rule: MaxPool, x: Var) -> Var:
    """Return the largest entry of each window by a tree of ``max(a, b) = a + relu(b - a)``."""

    def entry(k: int) -> Var:
        return build.affine("window", lambda t: rule.windows(t)[:, k].view(rule.shape), x)

    size = rule.windows(torch.zeros(x.shape)).shape[1]
    level = [entry(k) for k in range(size)]
    while len(level) > 1:
        pairs = [_larger(build, a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


# The network that is deployed does not compute these differences: nothing is rounded in them, so they have no terms.


def _larger(build: Builder, a: Var, b: Var) -> Var:
    gap = build.apply("relu", ReLU(), build.affine("sub", torch.sub, b, a, signs="vertex", absolute=torch.add))
    return build.affine("max", torch.add, a, gap, signs="vertex", absolute=torch.add)


def _clamp(build: Builder, rule: Clamp, x: Var) -> Var:
    """Return ``lo + relu(x - lo) - relu(x - hi)``."""

    def above(limit: float) -> Var:
        less = build.affine("sub", lambda t: t - limit, x, signs="vertex", absolute=lambda t: t + abs(limit))
        return build.apply("relu", ReLU(), less)

    def put(a: Tensor, b: Tensor) -> Tensor:
        return a - b + rule.lo

    def absolute(a: Tensor, b: Tensor) -> Tensor:
        return a + b + abs(rule.lo)

    return build.affine("clamp", put, above(rule.lo), above(rule.hi), signs="vertex", absolute=absolute)
