"""Patched layers: the same values as the network's own up to rounding, and nothing left behind."""

import pytest
import torch
from torch import nn

import assay
from assay.models import Model


class Residual(nn.Module):
    """Convolutions with and without a BatchNorm behind them, one seen twice; a BatchNorm without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.seen_twice, self.norm3 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.lonely, self.alone = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, stride=2, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.stem(x)).relu()
        x = self.norm2(self.conv2(x)).relu() + x
        middle = self.seen_twice(x)
        x = self.lonely(self.norm3(middle).relu() + middle)
        return self.head(self.alone(x).mean((2, 3)))


def randomised(module: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics that matter."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = torch.randn(m.num_features)
            m.running_var = torch.rand(m.num_features) + 0.3
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return module


def values_and_gradient(net, x):
    x = x.clone().requires_grad_()
    z = net(x)
    return z.detach(), torch.autograd.grad(z.logsumexp(1).sum(), x)[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_searching_pass_has_the_values_and_gradients_of_the_net(layout):
    net, x = randomised(Residual()).eval(), torch.rand(8, 3, 12, 12)
    with Model(net, memory_format=layout).frozen() as live:
        for one, two in zip(values_and_gradient(live, x), values_and_gradient(live.search, x), strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)
            assert not torch.equal(one, two)  # else nothing was patched, and this test shows nothing


def test_only_a_norm_that_alone_sees_its_convolution_is_folded():
    net = randomised(Residual()).eval()
    with Model(net).frozen() as live:
        patched = {id(m) for m, _ in live.patches}
    assert {id(m) for m in (net.stem, net.norm1, net.conv2, net.norm2, net.seen_twice, net.alone)} == patched


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.Conv2d(3, 6, 3, stride=(1, 2), padding=(2, 0), dilation=(1, 2)),
        nn.Conv2d(4, 5, 5, bias=False),
        nn.Conv2d(2, 4, (1, 3), padding=1, padding_mode="circular"),
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(3, 4, 7),
    ],
    ids=repr,
)
def test_the_gradient_of_any_first_convolution_is_right(conv):
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))
    x = torch.rand(8, conv.in_channels, 11, 13)
    net(x)
    with Model(net).frozen() as live:
        for one, two in zip(values_and_gradient(live, x), values_and_gradient(live.search, x), strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_nothing_is_left_in_the_modules_even_after_an_exception():
    net = randomised(Residual())
    before = [dict(vars(m)) for m in net.modules()]

    def fail():
        with Model(net).frozen() as live:
            live.search(torch.rand(8, 3, 12, 12))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [dict(vars(m)) for m in net.modules()] == before


def test_a_net_that_cannot_be_traced_is_used_as_it_is():
    class Branching(Residual):
        def forward(self, x):
            self.last_seen = x  # must not hold a tracer's proxy afterwards
            return super().forward(x if x.sum() > 0 else -x)

    net, x = randomised(Branching()).eval(), torch.rand(8, 3, 12, 12)
    with Model(net).frozen() as live:
        assert not any(isinstance(m, nn.BatchNorm2d) for m, _ in live.patches)
        assert not hasattr(net, "last_seen")
        assert torch.allclose(live(x), live.search(x), atol=1e-5)


def test_a_net_that_notices_its_patches_is_evaluated_as_it_is():
    class Watchful(Residual):
        def forward(self, x):
            return super().forward(x) * (0 if "forward" in vars(self.conv2) else 1)

    net, x = randomised(Watchful()).eval(), torch.rand(16, 3, 12, 12)
    with torch.no_grad():
        net.head.bias -= net(x).mean(0)  # so that every class has its share
    plain = randomised(Residual()).eval()
    plain.load_state_dict(net.state_dict())
    y = net(x).argmax(1)
    one, two = (assay.evaluate(n, (x, y), "linf:0.2", "quick", progress=False) for n in (net, plain))
    assert two.robust_accuracy < 0.7
    assert abs(one.robust_accuracy - two.robust_accuracy) <= 1 / 16


def test_a_forward_that_the_user_put_in_place_stays():
    net = randomised(Residual()).eval()
    mine = net.stem.forward
    net.stem.forward = lambda x: mine(x) * 0
    with Model(net).frozen() as live:
        x = torch.rand(8, 3, 12, 12)
        assert torch.allclose(live(x), live.search(x), rtol=1e-4, atol=1e-5)
    assert net.stem.forward(x).abs().max() == 0


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_anew_at_each_call_are_not_frozen_in_place(wrap):
    net = nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4)).eval()
    x = torch.rand(8, 3, 9, 9)
    net(x)
    with torch.no_grad():
        net[0].weight_orig.mul_(3) if wrap is nn.utils.spectral_norm else net[0].weight_g.mul_(3)
    with Model(net).frozen() as live:
        assert torch.allclose(live(x), live.search(x), rtol=1e-4, atol=1e-5)


def test_layers_with_hooks_are_left_alone():
    net = randomised(Residual()).eval()
    net.conv2.register_forward_hook(lambda _m, _args, out: out * 0.5)
    x = torch.rand(8, 3, 12, 12)
    with Model(net).frozen() as live:
        assert torch.allclose(live(x), live.search(x), rtol=1e-4, atol=1e-5)
