"""TensorFlow: a module trained by a gradient tape, attacked live and as a SavedModel folder, on images of assay.

python docs/examples/tensorflow_mnist.py
"""

import argparse
import os
import tempfile
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

import assay


class Net(tf.Module):
    """One hidden layer on images (28, 28, 1)."""

    def __init__(self) -> None:
        super().__init__()
        draw = tf.random.Generator.from_seed(0)
        self.a = tf.Variable(draw.normal((784, 64), stddev=0.04))
        self.b = tf.Variable(tf.zeros(64))
        self.c = tf.Variable(draw.normal((64, 10), stddev=0.12))

    @tf.function(input_signature=[tf.TensorSpec((None, 28, 28, 1))])
    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Return logits (b, 10)."""
        return tf.nn.relu(tf.reshape(x, (-1, 784)) @ self.a + self.b) @ self.c


def train(net: Net, x: tf.Tensor, y: tf.Tensor, epochs: int) -> None:
    """Descend the cross-entropy."""
    for _ in range(epochs):
        for i in range(0, len(x), 64):
            with tf.GradientTape() as tape:
                z = net(x[i : i + 64])
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y[i : i + 64], z))
            for v, g in zip(net.trainable_variables, tape.gradient(loss, net.trainable_variables), strict=True):
                v.assign_sub(0.2 * g)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, attack the module, attack the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=5)
    a = parser.parse_args(argv)
    data = assay.load_data("demo:mnist")
    x, y = data.batch(range(a.train)), data.labels[: a.train]
    test = data.batch(range(8000, 8000 + a.judged)), data.labels[8000 : 8000 + a.judged]

    net = Net()
    train(net, tf.constant(x.permute(0, 2, 3, 1).numpy()), tf.constant(y.numpy()), a.epochs)
    print(assay.evaluate(net, test, "linf:0.1", effort="quick", progress=False))

    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(net, folder, net.__call__.get_concrete_function())
        model = assay.load_model(folder)  # on the command line: assay evaluate FOLDER demo:mnist --threat linf:0.1
        print(assay.evaluate(model, test, "linf:0.1", effort="quick", progress=False))
    print(*model.notes, sep="\n")
    print("largest difference of a logit:", float((model(test[0]) - assay.Model(net)(test[0])).abs().max()))


if __name__ == "__main__":
    main()
