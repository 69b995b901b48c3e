"""Forwards of single layers that give the same values in less time, put in place while an attack searches.

A patch replaces the ``forward`` of one module instance; nothing of the user's module is lost, and verification asks the
network without patches. What they gain is measured by ``benchmarks/step_overhead.py``.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

Patch: TypeAlias = tuple[nn.Module, Callable[[Tensor], Tensor]]

_STEM_CHANNELS = 4
_STEM_TAPS = 25
"""Input channels and kernel area up to which the plain way to differentiate a convolution wins on a CPU."""


@contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """Put the patches in place, and take them away at the end."""
    for module, forward in patches:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in patches:
            del module.__dict__["forward"]


def find_patches(module: nn.Module, layout: torch.memory_format) -> list[Patch]:
    """Return patches of the convolutions of a frozen module, with weights in the memory format ``layout``.

    A BatchNorm, in eval mode a scale and a shift, is folded into the convolution that alone feeds it.
    """
    follower = dict(_pairs(module))
    patches: list[Patch] = []
    for conv in module.modules():
        if type(conv) is not nn.Conv2d or not _is_plain(conv) or not _is_untouched(conv):
            continue
        weight, bias = conv.weight.detach(), conv.bias
        if norm := follower.get(conv):
            scale, shift = _affine(norm)
            weight = torch.mul(weight, scale[:, None, None, None], out=torch.empty_like(weight, memory_format=layout))
            bias = shift if bias is None else bias * scale + shift
            patches.append((norm, _same))
        patches.append((conv, functools.partial(_convolve, conv, weight.contiguous(memory_format=layout), bias)))
    return patches


def stem_patches(module: nn.Module) -> list[Patch]:
    """Return patches of the first convolutions only: cheap enough to be found anew while weights change."""
    stems = [m for m in module.modules() if type(m) is nn.Conv2d and _is_stem(m) and _is_untouched(m)]
    return [(m, functools.partial(_convolve, m, m.weight.detach(), None if m.bias is None else m.bias.detach()))
            for m in stems]  # fmt: skip


def _is_stem(conv: nn.Conv2d) -> bool:
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    return conv.in_channels <= _STEM_CHANNELS and conv.groups == 1 and taps <= _STEM_TAPS and _is_plain(conv)


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _is_untouched(m: nn.Module) -> bool:
    """Tell whether a layer computes just what its class says: no hooks, no weight that is computed anew each time."""
    hooks = (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks, m._backward_pre_hooks)
    return "forward" not in vars(m) and not any(hooks) and m._parameters.keys() >= {"weight", "bias"}


def _convolve(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    how: Any = (conv.stride, conv.padding, conv.dilation)
    stem = x.requires_grad and x.ndim == 4 and x.device.type == "cpu" and _is_stem(conv)
    if not stem:
        return F.conv2d(x, weight, bias, *how, conv.groups)  # type: ignore[no-any-return, call-overload]
    return _Stem.apply(x, weight, bias, *how)  # type: ignore[no-any-return, no-untyped-call]


class _Stem(torch.autograd.Function):
    """A convolution of few channels whose input gradient is one matrix product and a fold.

    The kernels behind ``convolution_backward`` are tuned for many input channels; for one or three, as in the first
    layer of a network, they take up to five times as long as this.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, (ctx.stride, ctx.padding, ctx.dilation) = x.shape[2:], how
        out: Tensor = F.conv2d(x, weight, bias, *how)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (g,) = ctx.saved_tensors, grads
        columns = weight.flatten(1).T.to(g.dtype) @ g.flatten(2)  # under autocast g has less precision
        grad = F.fold(columns, ctx.size, weight.shape[2:], ctx.dilation, ctx.padding, ctx.stride)
        return grad, None, None, None, None, None


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift per channel of a BatchNorm in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale


def _same(x: Tensor) -> Tensor:
    return x


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Yield each convolution and the BatchNorm it feeds, where both are used once and nothing else sees the middle."""
    kinds = {type(m) for m in module.modules()}
    if not {nn.Conv2d, nn.BatchNorm2d} <= kinds:
        return
    layers = dict(module.named_modules())
    calls = {n: layers[str(n.target)] for n in _trace(module)}
    times = Counter(calls.values())
    for node, norm in calls.items():
        source = node.args[0] if node.args else None
        if type(norm) is not nn.BatchNorm2d or not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        conv = calls.get(source)
        alone = times[norm] == 1 and conv is not None and times[conv] == 1
        if alone and type(conv) is nn.Conv2d and norm.running_mean is not None and _is_untouched(norm):
            yield conv, norm


def _trace(module: nn.Module) -> list[fx.Node]:
    """Return the calls of layers in the graph of a module; none where it cannot be followed.

    The graph only says what feeds what: it is never run. What the trace left in the modules is taken back.
    """
    before = [(m, dict(vars(m))) for m in module.modules()]
    lists = [(v, v[:]) for _, attributes in before for v in attributes.values() if type(v) is list]
    try:
        return [n for n in fx.Tracer().trace(module).nodes if n.op == "call_module"]
    except Exception:  # whatever the user's forward raises when it meets a proxy: then nothing is folded
        return []
    finally:
        for m, attributes in before:
            vars(m).clear()
            vars(m).update(attributes)
        for held, content in lists:
            held[:] = content
