"""The door to a model: it leaves no trace, counts exactly, splits, checks, and answers a sample alike in any batch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.attacks.losses import cross_entropy, margin
from assay.core.errors import DataError, ModelError, ModelOutputError, NonFiniteError
from assay.core.random import Draws
from assay.core.together import together
from assay.models import Door, Model
from assay.models.line import Line
from assay.threats import Box, Problem, Threat


def cnn(channels: int = 3, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 16, 4)
    )


class Residual(nn.Module):
    """A block with batch normalisation and a skip; its statistics are not those of a fresh layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width, 10)
        for bn in self.norms:
            bn.running_mean.uniform_(-0.1, 0.1)
            bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x)).relu()
        x = x + self.norms[2](self.convs[1](self.norms[1](self.convs[0](x)).relu()))
        return self.head(self.drop(x.relu().mean((2, 3))))


def residual() -> Residual:
    torch.manual_seed(1)
    return Residual()


def images(b: int = 5, channels: int = 3) -> Tensor:
    return torch.rand(b, channels, 8, 8, generator=torch.Generator().manual_seed(3))


def posed(x: Tensor, classes: int = 4) -> Problem:
    rows = torch.arange(len(x))
    return Problem.pose(x, rows % classes, Threat("linf", 0.1, Box()), Draws.of(0, rows))


@contextmanager
def opened(net: Any, n: int = 5, **options: Any) -> Iterator[Door]:
    with Model(net, **options).frozen() as live:
        yield Door(live, n)


def snapshot(net: nn.Module) -> list[Any]:
    """Return everything that may be seen of a module, by identity where it has one."""
    seen: list[Any] = [torch.get_rng_state().tolist()]
    seen += [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()
    ]
    for v in (*net.parameters(), *net.buffers()):
        data = v.detach().clone().tolist()
        seen.append((id(v), v.data_ptr(), v.stride(), v.requires_grad, id(v.grad), v._version, data))
    return seen


def unusual(net: nn.Module) -> nn.Module:
    """Put a net into a state that a careless user of it would not put back."""
    net.train()
    for i, m in enumerate(net.modules()):
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
        for p in m.parameters(recurse=False):
            p.requires_grad_(i % 2 == 0)
    first = next(net.parameters())
    first.data = first.data.to(memory_format=torch.channels_last) if first.ndim == 4 else first.data
    first.grad = torch.ones_like(first)
    return net


class Counts(nn.Module):
    """Changes a buffer whenever it is asked, in place and by replacing another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.last = x.mean().detach()
        return self.net(x)


class Noisy(nn.Module):
    """Draws from the global generator in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.01 * torch.randn_like(x))


class EmptyLooking(nn.Module):
    """A net whose length is 0 is still a net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()

    def __len__(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("make", [cnn, residual, Counts, Noisy, EmptyLooking])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was_after_success_and_after_failure(make: Callable[[], nn.Module], fails: bool) -> None:
    net, x = unusual(make()), images()
    before, copied = snapshot(net), copy.deepcopy(net.state_dict())
    try:
        with opened(net, memory_format=torch.channels_last) as door:
            door.gradient(x, posed(x), cross_entropy)
            door.logits(x, torch.arange(5))
            assert not any(m.training for m in net.modules())
            assert not any(p.requires_grad for p in net.parameters())
            torch.rand(7)
            if fails:
                raise KeyError("on purpose")
    except KeyError:
        pass
    assert snapshot(net) == before
    assert all(torch.equal(v, copied[k]) for k, v in net.state_dict().items())


def test_a_model_is_left_as_it_was_when_its_own_pass_fails() -> None:
    net = unusual(nn.Sequential(residual(), nn.Linear(10, 3), nn.Linear(4, 2)))
    before = snapshot(net)
    with pytest.raises(ModelError, match="RuntimeError: mat1 and mat2"), opened(net) as door:
        door.logits(images(), torch.arange(5))
    assert snapshot(net) == before


def test_dropout_and_batch_norm_do_not_act_while_a_model_is_in_use() -> None:
    net = residual().train()
    with opened(net) as door:
        first, second = (door.logits(images(), torch.arange(5)) for _ in range(2))
        alone = door.logits(images()[2:3], torch.tensor([2]))
    assert torch.equal(first, second)
    assert torch.equal(first[2:3], alone)


def test_a_net_that_views_its_input_works_in_channels_last_too() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16 * 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).view(len(x), -1))

    net, x = Views(), images(4, 16)
    before = snapshot(net)
    with opened(net, 4) as door:
        assert door.live.layout == torch.channels_last
        e = door.gradient(x, posed(x), cross_entropy)
        assert door.live.layout == torch.contiguous_format
        assert door.forwards.tolist() == [1] * 4
    assert torch.allclose(e.logits, net(x), atol=1e-6)
    assert snapshot(net) == before


@pytest.mark.parametrize("rows", [None, 1, 3, 8, 10])
def test_passes_are_counted_for_the_samples_asked_about_and_not_for_filling(rows: int | None) -> None:
    called: list[int] = []

    def net(x: Tensor) -> Tensor:
        called.append(len(x))
        return x.flatten(1)[:, :4]

    told: list[int] = []
    x = images(13)
    with Model(net, rows=rows).frozen() as live:
        door = Door(live, 20, told.append)
        p = posed(x)
        door.logits(x, torch.arange(13))
        door.gradient(x, p, margin)
        door.score(x[:2], p.take(torch.tensor([4, 9])), margin)
    assert door.forwards.tolist() == [2] * 4 + [3] + [2] * 4 + [3] + [2] * 3 + [0] * 7
    assert door.backwards.tolist() == [1] * 13 + [0] * 7
    most = rows or 13
    thirteen, two = ([min(most, n - i) for i in range(0, n, most)] for n in (13, 2))
    assert told == [*thirteen, *(2 * n for n in thirteen), *two]  # of each call: there is news of slow networks, too
    if rows:
        assert max(called) <= rows


def test_a_net_of_fixed_batch_size_gets_batches_of_that_size_only() -> None:
    sizes: list[int] = []

    def net(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.flatten(1)[:, :4]

    x = images(7)
    with opened(net, 7, rows=3, fixed_rows=True) as door:
        assert torch.equal(door.logits(x, torch.arange(7)), x.flatten(1)[:, :4])
    assert sizes == [3, 3, 3]


class Small(nn.Module):
    """Has memory for some rows only."""

    def __init__(self, rows: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.net, self.rows, self.error = cnn(), rows, error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.rows:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return self.net(x)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_batches_are_split_when_memory_runs_out_with_the_same_result(error: type[Exception]) -> None:
    x = images(50)
    with opened(Small(10**6), 50) as door:
        whole = door.gradient(x, posed(x), cross_entropy)
    with opened(Small(16, error), 50) as door:
        parts = door.gradient(x, posed(x), cross_entropy)
        assert torch.equal(door.logits(x, torch.arange(50)), whole.logits)
        assert door.forwards.tolist() == [2] * 50
        assert door.backwards.tolist() == [1] * 50
    for name in ("success", "loss", "logits", "grad"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name


def test_memory_for_not_even_a_handful_is_an_error_with_a_remedy() -> None:
    with opened(Small(4), 50) as door, pytest.raises(ModelError, match="Free memory"):
        door.logits(images(50), torch.arange(50))
    with opened(Small(8, ValueError), 50) as door, pytest.raises(ModelError, match=r"ValueError: .*allocate"):
        door.logits(images(50), torch.arange(50))


@pytest.mark.parametrize(
    ("net", "error", "says"),
    [
        (lambda x: x.flatten(1)[:, :4].log() * 0, NonFiniteError, "2 of 5 inputs.*sample 1"),
        (lambda x: x, ModelOutputError, r"\(8, 3, 8, 8\)"),
        (lambda x: x.flatten(1)[:, 0], ModelOutputError, r"\(8,\)"),
        (lambda x: x.flatten(1)[:, :1], ModelOutputError, r"torch.cat\(\[-z, z\], 1\)"),
        (lambda x: x.flatten(1)[:3, :4], ModelOutputError, r"\(3, 4\)"),
        (lambda x: x.sum(), ModelOutputError, r"\(\)"),
        (lambda x: (x.flatten(1), 0), ModelOutputError, "tuple"),
        (lambda _: None, ModelOutputError, "NoneType"),
    ],
)
def test_what_is_no_logits_is_refused_by_name(net: Callable[[Tensor], Any], error: type, says: str) -> None:
    x = images()
    x[[1, 3], 0, 0, 0] = 0
    for ask in (lambda d: d.logits(x, torch.arange(5)), lambda d: d.gradient(x, posed(x), margin)):
        with opened(net) as door, pytest.raises(error, match=says) as caught:
            ask(door)
        assert caught.value.exit_code == 4
        assert caught.value.code == "bad-logits"


def test_labels_without_a_class_are_refused() -> None:
    x = images()
    for ask in (lambda d, p: d.decide(x, p), lambda d, p: d.score(x, p, margin), lambda d, p: d.gradient(x, p, margin)):
        for classes in (4, -4):
            p = Problem.pose(x, torch.full((5,), classes), Threat("linf", 0.1, Box()), Draws.of(0, torch.arange(5)))
            with opened(cnn()) as door, pytest.raises(DataError, match="from 0 to 3") as caught:
                ask(door, p)
            assert caught.value.exit_code == 3


def test_objects_with_logits_and_half_precision_are_understood() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    x = images()
    with opened(lambda x: Output(x.flatten(1)[:, :4].half())) as door:
        z = door.logits(x, torch.arange(5))
    assert z.dtype == torch.float32
    assert torch.allclose(z, x.flatten(1)[:, :4], atol=1e-3)


def test_normalisation_is_inside_and_per_channel() -> None:
    net, x = cnn(), images()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    wanted = net((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    with opened(net, mean=mean, std=std) as door:
        e = door.gradient(x, posed(x), cross_entropy)
    assert torch.allclose(e.logits, wanted, atol=1e-6)
    inner = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        nn.functional.cross_entropy(
            net((inner - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]),
            posed(x).goal.label,
            reduction="sum",
        ),
        inner,
    )
    assert torch.allclose(e.grad, grad, atol=1e-6)
    assert torch.allclose(Model(net, mean=0.5, std=2.0)(x), net((x - 0.5) / 2))


def test_half_a_normalisation_or_a_bad_one_is_refused() -> None:
    with pytest.raises(ModelError, match="together"):
        Model(cnn(), mean=0.5)
    with pytest.raises(ModelError, match="std > 0"):
        Model(cnn(), mean=0.5, std=[1.0, 0.0, 1.0])
    with pytest.raises(ModelError, match="callable"):
        Model(3)  # type: ignore[arg-type]


def test_random_passes_are_averaged_and_all_counted() -> None:
    x = images()
    with opened(lambda x: x.flatten(1)[:, :2] + torch.randn(len(x), 2), samples=400) as door:
        e = door.gradient(x, posed(x, 2), margin)
    assert door.forwards.tolist() == door.backwards.tolist() == [400] * 5
    assert torch.allclose(e.logits, x.flatten(1)[:, :2], atol=0.25)
    assert not torch.equal(e.logits, x.flatten(1)[:, :2])


def test_probabilities_become_logits_and_zero_stays_finite() -> None:
    x = images()
    with opened(lambda _: torch.tensor([[0.9, 0.1], [1.0, 0.0]]).repeat(4, 1), probabilities=True) as door:
        z = door.logits(x, torch.arange(5))
    assert torch.allclose(z[0].exp(), torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert torch.isfinite(z).all()
    assert z[1, 1] < -600


@torch.no_grad()
def blind(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :4] * 2


@torch.inference_mode()
def inferred(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :4] * 2


@pytest.mark.parametrize(
    "net",
    [blind, inferred, lambda x: (x.flatten(1)[:, :4] * 2).detach(), lambda x: x.new_ones(len(x), 4).requires_grad_()],
)
def test_nets_without_a_gradient_give_zero(net: Callable[[Tensor], Tensor]) -> None:
    x = images()
    with opened(net) as door:
        e = door.gradient(x, posed(x), cross_entropy)
        assert not door.differentiable
    assert torch.equal(e.grad, torch.zeros_like(x))
    assert torch.equal(e.logits, net(x))


def test_a_gradient_that_is_not_a_number_is_zero() -> None:
    x = images()
    x[0] = 0
    with opened(lambda x: x.flatten(1)[:, :4].sqrt()) as door:  # infinite slope at 0
        e = door.gradient(x, posed(x), lambda z, _: 0 * z.sum(1))
    assert torch.equal(e.grad, torch.zeros_like(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_do_not_depend_on_the_callers_mode(mode: Callable[[], Any]) -> None:
    net, x = cnn(), images()
    with opened(net) as door:
        wanted = door.gradient(x, posed(x), cross_entropy).grad
    assert wanted.abs().sum() > 0
    with mode():
        inside = x.clone()
        with opened(net) as door:
            assert torch.equal(door.gradient(inside, posed(inside), cross_entropy).grad, wanted)


@pytest.mark.parametrize(
    "make",
    [cnn, residual, lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 36), nn.SiLU(), nn.Linear(36, 4))],
    ids=["cnn", "residual", "dense"],
)
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_a_sample_is_answered_alike_to_the_last_bit_in_batches_of_any_size(
    make: Callable[[], nn.Module], loss: Any
) -> None:
    x, rows = images(64), torch.arange(64)
    with opened(make(), 64) as door:
        p = posed(x)
        whole, exact = door.gradient(x, p, loss), door.logits(x, rows)
        assert torch.allclose(whole.logits, exact, atol=1e-5)
        for size in (1, 7, 8, 20):
            for start in (0, 33):
                at = rows[start : start + size]
                part = door.gradient(x[at], p.take(at), loss)
                assert torch.equal(part.logits, whole.logits[at]), f"logits in a batch of {size}"
                assert torch.equal(part.grad, whole.grad[at]), f"gradients in a batch of {size}"
                assert torch.equal(door.logits(x[at], at), exact[at]), f"logits, without a gradient, of {size}"


class Counting(nn.Module):
    """Notes how many rows it is asked about, and whether for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = cnn(), list[tuple[int, bool]]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((len(x), x.requires_grad))
        return self.net(x)


def pair(z: Tensor, goal: Any) -> Tensor:
    """Two functions of the logits."""
    return torch.stack([margin(z, goal), cross_entropy(z, goal)], 1)


QUESTIONS: list[Callable[[Door, Tensor, Problem], Any]] = [
    lambda door, x, p: door.gradient(x, p, margin),
    lambda door, x, p: door.gradient(x, p, cross_entropy),
    lambda door, x, p: door.slopes(x, p, pair, 2),
    lambda door, x, p: door.gradient(x, p, margin, lambda v, rows: v.roll(1, 2) * (1 + rows.view(-1, 1, 1, 1))),
    lambda door, x, p: door.score(x, p, margin),
    lambda door, x, p: door.decide(x, p),
]


@pytest.mark.parametrize("options", [{}, {"rows": 3, "fixed_rows": True}, {"rows": 10}, {"tuned": False}])
def test_what_several_doors_ask_is_asked_together_and_answered_as_alone(options: dict[str, Any]) -> None:
    x, net = images(30), Counting()
    with Model(net, **options).frozen() as live:
        lots = [torch.arange(5 * i, 5 * i + 5) for i in range(len(QUESTIONS))]

        def ask(i: int, door: Door) -> Any:
            at = lots[i]
            return QUESTIONS[i](door, x[at], replace(posed(x).take(at), rows=torch.arange(5)))

        alone = [ask(i, Door(live, 5)) for i in range(len(lots))]
        net.calls.clear()
        doors: dict[int, Door] = {}

        def work(i: int, seat: Any) -> tuple[int, Any]:
            doors[i] = Door(live, 5, ask=seat.ask)
            return i, ask(i, doors[i])

        found = dict(together([partial(work, i) for i in range(len(lots))], Line(live).answers, len(lots)))
    for i, wanted in enumerate(alone):
        for name in wanted.__dataclass_fields__:
            assert torch.equal(getattr(found[i], name), getattr(wanted, name)), (i, name)
        assert doors[i].forwards.tolist() == [1] * 5
        assert doors[i].backwards.tolist() == [[1, 1, 2, 1, 0, 0][i]] * 5
    if not options:
        assert sorted(net.calls) == [(8, False), (8, False), (24, True)]


def test_when_memory_runs_out_for_several_questions_each_is_answered_all_the_same() -> None:
    x = images(40)
    with Model(Small(16)).frozen() as live:

        def work(i: int, seat: Any) -> Tensor:
            at = torch.arange(20 * i, 20 * i + 20)
            return Door(live, 40, ask=seat.ask).logits(x[at], at)

        parts = [*together([partial(work, i) for i in range(2)], Line(live).answers, 2)]
    with opened(Small(10**6), 40) as door:
        assert torch.equal(torch.cat(parts), door.logits(x, torch.arange(40)))
