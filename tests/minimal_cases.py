"""Models whose least perturbations are known: linear ones exactly, tiny ReLU networks by exhaustive search."""

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

from assay.core.random import Draws


class Planes(nn.Module):
    """``c`` linear logits of ``shape``-shaped inputs, with weights that no two coordinates share."""

    def __init__(self, shape: tuple[int, ...], c: int, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        n = int(np.prod(shape))
        values = Draws.of(seed, torch.arange(c)).normal((n,)).double()
        self.weight = nn.Parameter(scale * values / n**0.5)
        self.bias = nn.Parameter(-self.weight.sum(1) / 2 + 0.02 * torch.arange(c))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T.to(x) + self.bias.to(x)


def inputs(shape: tuple[int, ...], b: int = 4, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return samples in the middle of the box [0, 1], where it binds no small perturbation in l2 and linf."""
    return (0.35 + 0.3 * Draws.of(seed, torch.arange(b)).uniform(shape)).to(dtype)


def labels(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1)


def least(net: Planes, x: Tensor, y: Tensor, norm: str, target: Tensor | None = None) -> Tensor:
    """Return the exact least size (b,), inside [0, 1], of a change that leaves y, or (of 2 classes) reaches target."""
    w, b = net.weight.detach().double().numpy(), net.bias.detach().double().numpy()
    sizes = []
    for i in range(len(x)):
        own = int(y[i]) if target is None else 1 - int(target[i])
        v = x[i].flatten().double().numpy()
        rivals = [j for j in range(len(w)) if j != own]
        sizes.append(min(_to_plane(v, w[j] - w[own], float((w[j] - w[own]) @ v + b[j] - b[own]), norm) for j in rivals))
    return torch.tensor(sizes, dtype=torch.float64)


def _to_plane(x: np.ndarray, w: np.ndarray, gap: float, norm: str) -> float:
    """Return the least size of d, x + d in [0, 1], with gap + w @ d >= 0 for a gap below zero."""
    room, slope, need = np.where(w > 0, 1 - x, x), np.abs(w), -gap
    if slope @ room < need:
        return float("inf")
    if norm == "linf":
        return float(scipy.optimize.brentq(lambda r: slope @ np.minimum(room, r) - need, 0, 1))
    if norm == "l2":
        s = scipy.optimize.brentq(lambda s: slope @ np.minimum(room, s * slope) - need, 0, 1e6)
        return float(np.linalg.norm(np.minimum(room, s * slope)))
    if norm == "l1":  # the steepest coordinates first, each as far as the box lets it
        order = np.argsort(-slope)
        gain = np.cumsum(slope[order] * room[order])
        k = int(np.searchsorted(gain, need))
        before = gain[k - 1] if k else 0.0
        return float(room[order[:k]].sum() + (need - before) / slope[order[k]])
    gain = np.cumsum(np.sort(slope * room)[::-1])
    return float(np.searchsorted(gain, need) + 1)


class TinyNet(nn.Module):
    """A ReLU network of two inputs, small enough for exhaustive search."""

    def __init__(self, c: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.a = nn.Parameter(6 * (Draws.of(seed, torch.arange(8)).uniform((2,)) - 0.5))
        self.b = nn.Parameter(2 * (Draws.of(seed + 1, torch.arange(8)).uniform() - 0.5))
        self.c = nn.Parameter(2 * (Draws.of(seed + 2, torch.arange(c)).uniform((8,)) - 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - 0.5) @ self.a.T.to(x) + self.b.to(x)).relu() @ self.c.T.to(x)


def by_search(net: nn.Module, x: Tensor, y: Tensor, norm: str, points: int = 601) -> Tensor:
    """Return the least size (b,) among the points of a grid over [0, 1]^2 (inf: the label is never left)."""
    axis = torch.linspace(0, 1, points)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        guess = net(grid).argmax(1)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    sizes = torch.linalg.vector_norm(grid[None].double() - x[:, None].double(), ord=order, dim=2)
    return torch.where(guess[None] != y[:, None], sizes, torch.inf).amin(1)
