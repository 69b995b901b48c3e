"""scikit-learn: a linear classifier, attacked by its scores alone; images that ship with assay.

python docs/examples/sklearn_mnist.py
"""

import argparse
from collections.abc import Sequence

from sklearn.linear_model import LogisticRegression

import assay


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--judged", type=int, default=50)
    parser.add_argument("--queries", type=int, default=500)
    a = parser.parse_args(argv)
    data = assay.load_data("demo:mnist")
    x, y = data.batch(range(a.train)), data.labels[: a.train]
    u, v = data.batch(range(8000, 8000 + a.judged)), data.labels[8000 : 8000 + a.judged]

    model = LogisticRegression(max_iter=200).fit(x.flatten(1).numpy(), y.numpy())
    m = assay.Model(model)
    print(*m.notes, sep="\n")
    r = assay.attacks.Square(steps=a.queries)(m, u, v, assay.Threat("linf", 0.1))
    print(f"clean {model.score(u.flatten(1).numpy(), v.numpy()):.1%}, after {a.queries} queries a sample ", end="")
    print(f"{1 - float(r.success.float().mean()):.1%}")


if __name__ == "__main__":
    main()
