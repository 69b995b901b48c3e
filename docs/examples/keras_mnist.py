"""Keras and MNIST: FGSM on two networks that everybody starts with, and adversarial training of the first one.

python docs/examples/keras_mnist.py                        # on 8,000 + 2,000 of the images that ship with assay
python docs/examples/keras_mnist.py --data mnist.npz       # on the file that keras.datasets.mnist.load_data() keeps
"""

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from keras import layers

import assay
from assay.integrations.keras import AdversarialModel

EPS = 0.1


def convolutional() -> keras.Model:
    """Conv2D, MaxPooling2D, Flatten, Dense: images (28, 28, 1)."""
    return compiled(
        keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(32, (3, 3), activation="relu"),
                layers.MaxPooling2D((2, 2)),
                layers.Flatten(),
                layers.Dense(10, activation="softmax"),
            ]
        )
    )


def dense() -> keras.Model:
    """Flatten, Dense, Dropout, Dense: images (28, 28)."""
    return compiled(
        keras.Sequential(
            [
                keras.Input((28, 28)),
                layers.Flatten(),
                layers.Dense(128, activation="relu"),
                layers.Dropout(0.2),
                layers.Dense(10, activation="softmax"),
            ]
        )
    )


def compiled(model: keras.Model) -> keras.Model:
    """Compile as tutorials do."""
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def load(path: str | None, train: int, test: int) -> tuple[np.ndarray, ...]:
    """Return training images (n, 28, 28) in [0, 1], their labels, and the same for testing."""
    if path is None:
        data = assay.load_data("demo:mnist")
        x, y = data.batch(range(len(data)))[:, 0].numpy(), data.labels.numpy()
        return x[:train], y[:train], x[8000 : 8000 + test], y[8000 : 8000 + test]
    with np.load(path) as f:
        x, y, u, v = (f[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    return x[:train] / np.float32(255), y[:train].astype(int), u[:test] / np.float32(255), v[:test].astype(int)


def report(name: str, model: keras.Model, x: np.ndarray, y: np.ndarray, judged: int) -> None:
    """Print accuracies: without an attack, under FGSM, and what is left by all attacks of a quick evaluation."""
    _, clean = model.evaluate(x if len(model.input_shape) == 3 else x[..., None], y, verbose=0)
    images, labels = torch.tensor(x)[:, None], torch.tensor(y)  # to assay, an image is (c, h, w)
    fgsm = assay.attacks.FGSM()(assay.Model(model), images, labels, assay.Threat("linf", EPS))
    e = assay.evaluate(model, (images, labels), f"linf:{EPS}", effort="quick", limit=judged, progress=False)
    print(
        f"{name:42} clean {clean:6.1%}   FGSM {1 - float(fgsm.success.float().mean()):6.1%}   "
        f"verdict {e.robust_accuracy:6.1%} of {e.n}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, attack, harden, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="mnist.npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--train", type=int, default=60_000, help="training images, at most")
    parser.add_argument("--test", type=int, default=2000, help="test images, at most")
    parser.add_argument("--judged", type=int, default=200, help="test images for the verdict")
    parser.add_argument("--epochs", type=int, default=3)
    a = parser.parse_args(argv)
    train = a.train if a.data else min(a.train, 8000)
    x, y, u, v = load(a.data, train, a.test)
    keras.utils.set_random_seed(0)

    model = convolutional()
    model.fit(x[..., None], y, epochs=a.epochs, batch_size=64, verbose=0)
    print(*assay.Model(model).notes, sep="\n")
    report("Conv2D, MaxPooling2D, Flatten, Dense", model, u, v, a.judged)

    hardened = AdversarialModel(model, f"linf:{EPS}")
    hardened.fit(x[..., None], y, epochs=a.epochs, batch_size=64, verbose=0)
    report("  trained on with FGSM, half and half", model, u, v, a.judged)

    hardened = AdversarialModel(model, f"linf:{EPS}", steps=7, clean=0)
    hardened.fit(x[..., None], y, epochs=a.epochs, batch_size=64, verbose=0)
    report("  trained on with PGD of 7 steps alone", model, u, v, a.judged)

    model = dense()
    model.fit(x, y, epochs=a.epochs, batch_size=64, verbose=0)
    report("Flatten, Dense 128, Dropout, Dense", model, u, v, a.judged)


if __name__ == "__main__":
    main()
