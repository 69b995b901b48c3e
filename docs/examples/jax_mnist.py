"""JAX: plain functions on arrays, trained by jax.grad and attacked through a bridge; images that ship with assay.

python docs/examples/jax_mnist.py
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import assay
from assay.models.bridges.jax import from_jax


def logits(w: dict[str, Any], x: Any) -> Any:
    """Return (b, 10) for images (b, 28, 28, 1)."""
    h = jax.nn.relu(x.reshape(len(x), -1) @ w["a"] + w["b"])
    return h @ w["c"]


def loss(w: dict[str, Any], x: Any, y: Any) -> Any:
    """Return the mean cross-entropy."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(w, x)), y[:, None], 1).mean()


@jax.jit
def step(w: dict[str, Any], x: Any, y: Any) -> dict[str, Any]:
    """Descend."""
    return jax.tree.map(lambda v, g: v - 0.2 * g, w, jax.grad(loss)(w, x, y))


def main(argv: Sequence[str] | None = None) -> None:
    """Train, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=5)
    a = parser.parse_args(argv)
    data = assay.load_data("demo:mnist")
    x = jnp.asarray(data.batch(range(a.train)).permute(0, 2, 3, 1).numpy())
    y = jnp.asarray(data.labels[: a.train].numpy())
    test = data.batch(range(8000, 8000 + a.judged)), data.labels[8000 : 8000 + a.judged]

    one, two = jax.random.split(jax.random.key(0))
    w = {
        "a": jax.random.normal(one, (784, 64)) * 0.04,
        "b": jnp.zeros(64),
        "c": jax.random.normal(two, (64, 10)) * 0.12,
    }
    for _ in range(a.epochs):
        for i in range(0, len(x) // 64 * 64, 64):
            w = step(w, x[i : i + 64], y[i : i + 64])

    net = from_jax(lambda x: logits(w, x), shape=(28, 28, 1))
    print(assay.evaluate(assay.Model(net, name="jax"), test, "linf:0.1", effort="quick", progress=False))


if __name__ == "__main__":
    main()
