"""timm: a vision transformer by its name, trained on digits, saved, and judged from its weights file.

python docs/examples/timm_mnist.py
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import assay
from assay.core.optional import need

NAME = "test_vit"
"""A tiny transformer that timm keeps for tests."""


def build() -> torch.nn.Module:
    """Build the network for grey images of 28 x 28 pixels."""
    settings = {"pretrained": False, "num_classes": 10, "in_chans": 1, "img_size": 28, "patch_size": 4}
    net: torch.nn.Module = need("timm", "timm").create_model(NAME, **settings)
    return net


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=4)
    a = parser.parse_args(argv)
    torch.manual_seed(0)
    data, net = assay.load_data("demo:mnist"), build()
    x, y = data.batch(range(a.train)), data.labels[: a.train]
    test = data.batch(range(8000, 8000 + a.judged)), data.labels[8000 : 8000 + a.judged]
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(a.epochs):
        for rows in torch.randperm(len(x)).split(64):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            F.cross_entropy(net((x[rows] - 0.5) / 0.5), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "vit.safetensors"
        save_file(net.state_dict(), weights)
        model = assay.load_model(weights, arch=build, mean=0.5, std=0.5)
        e = assay.evaluate(model, test, "linf:0.1", "quick", progress=False)
    print(f"{NAME}  clean {e.clean_accuracy:.1%}  robust {e.robust_accuracy:.1%} at linf:0.1")


if __name__ == "__main__":
    main()
