"""JAX functions beside torch in one process."""

import pytest
import torch
from needs import framework
from torch.nn import functional as F

import assay
from assay.core.errors import ModelError
from assay.models.fingerprint import fingerprint

jax = framework("jax")
from_jax = framework("assay.models.bridges.jax").from_jax
jnp = jax.numpy


@pytest.fixture
def images():
    return torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def parameters():
    draw = torch.Generator().manual_seed(0)
    return {"w": torch.randn(36, 16, generator=draw) / 6, "v": torch.randn(16, 3, generator=draw)}


def net(parameters, x):
    """In torch, of x (b, 1, 6, 6)."""
    return F.silu(x.flatten(1) @ parameters["w"]) @ parameters["v"]


def made(parameters):
    """The same in JAX, of x (b, 6, 6, 1)."""
    tree = {name: jnp.asarray(v.numpy()) for name, v in parameters.items()}
    return lambda x: jax.nn.silu(x.reshape(len(x), -1) @ tree["w"]) @ tree["v"]


def slope(net, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(x), torch.arange(len(x)) % 3, reduction="sum"), x)[0]


def test_the_same_weights_give_the_same_logits_and_gradients(images, parameters):
    m = assay.Model(from_jax(made(parameters), (6, 6, 1)))
    torch.testing.assert_close(m(images), net(parameters, images), atol=1e-5, rtol=0)
    torch.testing.assert_close(slope(m, images), slope(lambda x: net(parameters, x), images), atol=1e-5, rtol=0)


def test_a_jitted_function_is_a_model_as_it_is(images, parameters):
    m = assay.Model(jax.jit(made(parameters)))
    torch.testing.assert_close(m(images), net(parameters, images), atol=1e-5, rtol=0)
    assert any("JAX computes this model" in n for n in m.notes)
    with pytest.raises(ModelError, match="JAX function"):
        assay.Model(jnp.zeros(3))


def test_the_verdict_is_the_same_sample_by_sample(images, parameters):
    def ours(x):
        return net(parameters, x)

    data = images, ours(images).argmax(1)
    runs = [
        assay.evaluate(n, data, "linf:0.02", effort="quick", progress=False)
        for n in (ours, from_jax(made(parameters), (6, 6, 1)))
    ]
    a, b = (r.samples.select(["prediction", "fooled"]).to_pylist() for r in runs)
    assert a == b
    assert 0 < runs[0].robust_accuracy < 1


def test_batches_are_filled_up_so_that_few_sizes_are_compiled():
    seen = []

    def fn(x):
        seen.append(len(x))
        return jnp.stack([x.sum(1), -x.sum(1)], 1)

    m = from_jax(fn)
    for rows in range(1, 17):
        x = torch.rand(20, 3)[20 - rows :]
        torch.testing.assert_close(m(x)[:, 0], x.sum(1))
    assert sorted(seen) == [1, 2, 4, 8, 16]


def test_nothing_is_written_to_and_constants_are_not_handed_out():
    constant = jnp.ones((8, 2))
    m = from_jax(lambda x: constant + 0 * x[:, :2])
    m(torch.rand(8, 3)).zero_()
    assert (m(torch.rand(8, 3)) == 1).all()


def test_second_derivatives_are_refused_by_name(images, parameters):
    x = images.requires_grad_()
    z = from_jax(made(parameters), (6, 6, 1))(x)
    with pytest.raises(ModelError, match="differentiate twice"):
        torch.autograd.grad(z[:, 0].sum(), x, create_graph=True)


def test_the_fingerprint_is_that_of_code_and_weights(parameters):
    same = fingerprint(assay.Model(from_jax(made(parameters))))
    assert fingerprint(assay.Model(from_jax(made(parameters)))) == same
    assert fingerprint(assay.Model(jax.jit(made(parameters)))) == fingerprint(assay.Model(jax.jit(made(parameters))))
    other = parameters | {"v": parameters["v"] + 1}
    assert fingerprint(assay.Model(from_jax(made(other)))) != same
    assert fingerprint(assay.Model(from_jax(lambda x: x))) != same


def test_a_function_may_hold_modules_of_torch():
    """As one that was translated from torch layer by layer does; their parameters belong to its fingerprint."""
    layer = torch.nn.Linear(4, 3)

    def f(x):
        return x @ jnp.asarray(layer.weight.detach().numpy()).T

    net = from_jax(f)
    before = net.digest
    with torch.no_grad():
        layer.weight += 1
    assert net.digest != before
