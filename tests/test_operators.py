"""Every operator that has a rule: no value of its network leaves its bounds. What has none is refused by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.certification.graph import record
from assay.certification.operators import LOWERINGS, name_of
from assay.core.errors import ModelError
from assay.models import Model
from bound_cases import CASES, MAPS, Case, Net, ball, check_sound, draw, normal, recorded


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_value_leaves_its_bounds(case: Case) -> None:
    program = recorded(case.net(), case.shape)
    x = torch.rand(3, *case.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        told = torch.cat([case.net()(row[None]) for row in x])
    assert torch.allclose(program.graph(torch.float64).logits(x), told.double(), rtol=1e-4, atol=1e-4)
    check_sound(program, ball(case.shape, "linf"))


def test_every_operator_with_a_rule_has_a_case() -> None:
    nodes = [node for case in CASES for node in recorded(case.net(), case.shape).exported.graph.nodes]
    seen = {name_of(node.target) for node in nodes if node.op == "call_function"}
    assert {*LOWERINGS} <= seen, f"without a case: {sorted({*LOWERINGS} - seen)}"


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_value_leaves_its_bounds_in_any_norm(case: Case, norm: str) -> None:
    program = recorded(case.net(), case.shape)
    for seed in range(5):
        check_sound(program, ball(case.shape, norm, n=6, seed=seed), seed)


def test_a_layer_norm_of_a_wide_box_is_bounded_by_its_width() -> None:
    program = recorded(Net(lambda x: F.layer_norm(50 * x, (9,)), (9,)).eval(), (9,))
    check_sound(program, ball((9,), "linf"))


# ------------------------------------------------------------------------------------------------------ refusals


def module(f: Callable[[Tensor], Tensor]) -> nn.Module:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    return Plain().eval()


REFUSED = {
    "round": lambda x: x.round(),
    "sort": lambda x: x.sort(1)[0],
    "div": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "floor_divide": lambda x: x // 2,
    "hardshrink": lambda x: F.hardshrink(x, 0.1),
    "threshold": lambda x: F.threshold(x, 0.5, 0.1),
    "place of the largest": lambda x: x * x.max(1, keepdim=True)[1],
    "gt": lambda x: torch.where(x > 0.5, x, 2 * x),
    "to.dtype": lambda x: (4 * x).to(torch.int64).float(),
    "float16": lambda x: x.half().float(),
    "linear": lambda x: F.linear(x, x),
    "pow": lambda x: 2**x,
    "avg_pool2d": lambda x: F.avg_pool2d(x.view(1, 1, 2, 2), 1, divisor_override=-1).flatten(1),
    "max_pool2d": lambda x: F.max_pool2d(x.view(1, 2, 2), 1).flatten(1),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 2, 2)] * 3, is_causal=True)[
        0, :1
    ],
    "finite": lambda x: x.masked_fill(torch.tensor([True, False, False, False]), -torch.inf),
    "batch axis": lambda x: x - x.mean(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        recorded(module(REFUSED[name]), (4,))


def test_dropout_in_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match="dropout in training mode"):
        recorded(module(lambda x: F.dropout(x, 0.5)), (4,))
    with pytest.raises(ModelError, match="RReLU in training mode"):
        recorded(module(lambda x: F.rrelu(x, training=True)), (4,))
    assert len(recorded(nn.Dropout(0.5).train(), (4,)).graph().steps) == 1, "a model is asked in eval mode"


def test_batch_norm_in_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match="batch norm in training mode"):
        recorded(nn.BatchNorm1d(4, track_running_stats=False), (4, 3))


@pytest.mark.parametrize(
    "f", [lambda x: x + torch.rand(4), lambda x: x + torch.rand_like(x), lambda x: x * torch.empty(4)]
)
def test_random_networks_are_refused(f: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match=r"rand|empty"):
        recorded(module(f), (4,))
    with pytest.raises(ModelError, match="random"):
        record(Model(module(torch.relu), samples=4), (4,))


def test_branches_on_values_are_refused() -> None:
    with pytest.raises(ModelError, match="not-exportable"):
        recorded(module(lambda x: x if x.sum() > 0 else -x), (4,))


class Half(nn.Module):
    """A part of a network that TorchScript may compile."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = draw(nn.Conv2d(2, 2, 3, 2, 1), 1), draw(nn.BatchNorm2d(2), 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def classifier(half: nn.Module) -> nn.Module:
    return nn.Sequential(half, nn.Flatten(), draw(nn.Linear(12, 3), 3)).eval()


COMPILED = {
    "a part, scripted": lambda: classifier(torch.jit.script(Half().eval())),
    "scripted": lambda: torch.jit.script(classifier(Half())),
    "traced": lambda: torch.jit.trace(classifier(Half()), torch.rand(1, *MAPS)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", COMPILED)
def test_what_torchscript_compiled_is_read_like_what_it_was_made_of(kind: str) -> None:
    """``torch.export`` cannot record scripted parts: ``torch.fx`` traces the rest first."""
    plain, compiled = (recorded(net, MAPS) for net in (classifier(Half()), COMPILED[kind]()))
    assert [s.shape for s in plain.graph().steps] == [s.shape for s in compiled.graph().steps]
    x = torch.rand(3, *MAPS, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(plain.graph().logits(x), compiled.graph().logits(x), rtol=1e-9, atol=1e-9)
    check_sound(compiled, ball(MAPS, "linf"))


class Sly(nn.Module):
    """While it is traced it looks like another network; what cannot be recorded comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return 2 * x if isinstance(x, Tensor) else x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_network_that_tracing_changes_is_refused() -> None:
    with pytest.raises(ModelError, match="not-exportable"):
        recorded(Sly().eval(), (4,))


class Counts(nn.Module):
    """Remembers how often it was called, and adds it up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_networks_with_a_memory_are_refused() -> None:
    with pytest.raises(ModelError, match=r"writes to net\.calls"):
        recorded(Counts().eval(), (4,))


def test_arguments_outside_the_domain_are_refused_with_their_bounds() -> None:
    program = recorded(Net(lambda x: torch.log(x + 2), (3,)).eval(), (3,))
    check_sound(program, ball((3,), "linf"))
    program = recorded(Net(torch.log, (3,), positive=True).eval(), (3,))
    wide = ball((3,), "linf")
    with pytest.raises(ModelError, match="outside-domain"):
        check_sound(recorded(module(torch.log), (3,)), wide)
    check_sound(program, wide)


def test_a_softmax_at_the_end_is_left_out() -> None:
    weight = normal(4, 3)
    for last in (lambda x: F.softmax(x, 1), lambda x: F.log_softmax(x, -1).clone()):
        graph = recorded(module(lambda x, last=last: last(x @ weight)), (4,)).graph()
        assert graph.softmax
        assert torch.allclose(graph.logits(torch.ones(1, 4)), normal(4, 3).sum(0).double())
