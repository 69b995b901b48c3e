"""Transfer: surrogates are attacked and the model is judged; surrogates from the model's own answers."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import assay
from assay import Model, Threat, attacks
from assay.attacks import BIM, PGD, Bisect, Cascade, Transfer
from assay.attacks.testing import Line, check_attack
from assay.attacks.transfer.surrogates import joint
from assay.core.errors import ModelError
from assay.core.registry import UsageError
from assay.hardening.distil import distil

EPS = "linf:0.2"


class Asked(nn.Module):
    """A network that counts the rows that it is asked about."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        z: Tensor = self.net(x)
        return z


class Never(nn.Module):
    """A network that is never fooled."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0]).expand(len(x), 2) + 0 * x.flatten(1)[:, :1]


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = assay.load_data("demo:mnist", limit=4000)
    return data.batch(range(4000)), data.labels


@cache
def plain() -> Model:
    return assay.load_model("demo:mnist-plain")


@cache
def other() -> Model:
    """A dense network, trained by itself on other images than those that are attacked."""
    x, y = digits()
    x, y = x[1500:], y[1500:]
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(8):
        for i in range(0, len(x), 50):
            loss = nn.functional.cross_entropy(net(x[i : i + 50]), y[i : i + 50])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return Model(net.eval())


@cache
def surrogate() -> Model:
    """A copy of the demo network from 1,500 of its labels, beginning with 300 images."""
    x, y = digits()
    return distil(plain(), (x[500:800], y[500:800]), queries=1500, by="labels")


def fooled(attack: attacks.Runnable, model: Model, threat: str = EPS) -> float:
    x, y = (v[:100] for v in digits())
    return attack(model, x, y, threat).success.float().mean().item()


def test_transfer_breaks_more_than_noise_of_the_same_size() -> None:
    noise = fooled(attacks.get("uniform-noise", draws=20), other())
    carried = fooled(Transfer(PGD(steps=20), plain()), other())
    assert carried > noise + 0.1  # with one question instead of 20
    assert carried < fooled(PGD(steps=20), other())


@pytest.mark.parametrize("by", ["logits", "probabilities"])
def test_an_ensemble_is_no_worse_than_its_worse_member(by: str) -> None:
    members = (plain(), surrogate())
    alone = [fooled(Transfer(PGD(steps=20), m), other(), "linf:0.1") for m in members]
    assert fooled(Transfer(PGD(steps=20), members, by=by), other(), "linf:0.1") >= min(alone)


def test_an_ensemble_says_the_mean_of_what_its_members_say() -> None:
    x = digits()[0][:4]
    a, b = plain()(x), other()(x)
    assert torch.allclose(joint((plain(), other()), "logits")(x), (a + b) / 2, atol=1e-6)
    mean = (a.softmax(1) + b.softmax(1)) / 2
    assert torch.allclose(joint((plain(), other()), "probabilities")(x).exp(), mean, atol=1e-6)


def test_the_model_is_asked_once_and_surrogates_cost_it_nothing() -> None:
    x, y = torch.full((16, 8), 0.6), torch.ones(16, dtype=torch.long)
    target, line = Asked(Never()), Asked(Line())
    r = Transfer(PGD(steps=10), line, queries=5)(target, x, y, "linf:0.2")
    assert target.rows == 16
    assert r.forwards.tolist() == [1] * 16
    assert r.backwards.tolist() == [0] * 16
    assert line.rows > 16 * 10  # the attack goes on although the surrogate has fallen


@pytest.mark.parametrize("queries", [1, 4, 16])
def test_the_way_to_the_candidate_is_halved_for_a_smaller_one(queries: int) -> None:
    x, y = torch.full((8, 8), 0.6), torch.ones(8, dtype=torch.long)
    target = Asked(Line())
    r = Transfer(PGD(steps=20), Line(), queries=queries)(target, x, y, "linf:0.3")
    assert r.success.all()
    assert r.forwards.tolist() == [queries + 1] * 8
    assert target.rows == 8 * (queries + 1)
    assert r.backwards.tolist() == [0] * 8
    assert (r.size > 0.1 * (1 - 1e-5)).all()
    assert (r.size <= 0.1 + 0.2 * 0.5 ** (queries - 1) + 1e-4).all()


def test_without_an_eps_the_radius_is_bisected() -> None:
    x, y = torch.full((4, 8), 0.6), torch.ones(4, dtype=torch.long)
    tilted = Model(lambda v: Line()(v * torch.linspace(0.8, 1.2, 8)))
    r = Bisect(Transfer(BIM(), tilted), rounds=12)(Line(), x, y, "linf")
    assert torch.allclose(r.size, torch.full((4,), 0.1), rtol=0.01)
    assert (r.forwards <= 13).all()


@pytest.mark.parametrize("queries", [1, 3])
def test_transfer_keeps_the_contract(queries: int) -> None:
    check_attack(Transfer(PGD(steps=6), Line(), queries=queries), model=Line(), norms=("linf", "l2"), shape=(1, 6, 6))


def test_transfers_combine_like_attacks() -> None:
    both = Cascade((Transfer(PGD(steps=5), plain()), Transfer(PGD(steps=5), surrogate())))
    each = [fooled(attack, other()) for attack in both.attacks]
    assert fooled(both, other()) >= max(each)


def test_a_transfer_is_described_with_what_tells_its_surrogates_apart() -> None:
    one, two = (str(attacks.describe_attack(Transfer(PGD(), m))) for m in (plain(), other()))
    assert "SHA-256" in one
    assert one != two
    assert one == str(attacks.describe_attack(Transfer(PGD(), plain())))


def test_surrogates_that_do_not_fit_are_refused() -> None:
    x, y = torch.full((2, 8), 0.6), torch.ones(2, dtype=torch.long)
    wide, three = Model(Line(), box=(-1, 1)), nn.Linear(8, 3)
    with pytest.raises(ModelError, match="surrogates with the model's"):
        Transfer(PGD(), wide)(Line(), x, y, "linf:0.1")
    with pytest.raises(ModelError, match="same box"):
        Transfer(PGD(), (wide, Line()))
    with pytest.raises(ModelError, match="equally many classes"):
        Transfer(PGD(), (three, Line()))(Line(), x, y, "linf:0.1")
    for params in ({"by": "votes"}, {"queries": 0}):
        with pytest.raises(UsageError):
            Transfer(PGD(), Line(), **params)
    with pytest.raises(UsageError, match="at least one"):
        Transfer(PGD(), [])


# Surrogates from answers.


def test_a_distilled_surrogate_agrees_with_the_model_and_carries_over_to_it() -> None:
    x = digits()[0][2000:2500]
    agree = (surrogate()(x).argmax(1) == plain()(x).argmax(1)).float().mean()
    assert agree > 0.85
    carried = fooled(Transfer(PGD(steps=20), surrogate()), plain())
    assert carried > fooled(attacks.get("uniform-noise"), plain()) + 0.2


@pytest.mark.parametrize(("queries", "by", "augment"), [(64, "labels", "noise"), (200, "scores", "jacobian")])
def test_exactly_as_many_queries_are_spent_as_said(queries: int, by: str, augment: str) -> None:
    x = torch.rand(48, 6, generator=torch.Generator().manual_seed(0))
    target = Asked(Line())
    copy = distil(target, (x, torch.zeros(48).long()), queries=queries, by=by, augment=augment, epochs=1)
    assert target.rows == queries
    assert f"to {queries} queries" in copy.notes[0]


def test_a_budget_below_the_samples_is_kept() -> None:
    x, target = torch.rand(48, 6, generator=torch.Generator().manual_seed(0)), Asked(Line())
    distil(target, (x, torch.zeros(48).long()), queries=16, epochs=1)
    assert target.rows == 16


def test_distilling_repeats_itself_and_leaves_everything_as_it_was() -> None:
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    net, target = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 2)), Line()
    kept, state = [v.clone() for v in net.parameters()], torch.get_rng_state()
    first, second, third = (distil(target, (x, torch.zeros(40).long()), 80, net, seed=s, epochs=2) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, w) for v, w in zip(net.parameters(), kept, strict=True))
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), third(x))
    assert Threat("linf", 0.1).within(first.domain, 6).box == Model(target).domain


def test_nets_and_numbers_that_do_not_fit_are_refused() -> None:
    data = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(8).long()
    with pytest.raises(ModelError, match="2 classes"):
        distil(Line(), data, 8, nn.Linear(6, 3))
    for params in ({"by": "logits"}, {"augment": "mixup"}, {"queries": 0}, {"epochs": 0}, {"step": 0.0}):
        with pytest.raises(UsageError):
            distil(Line(), data, **params)
