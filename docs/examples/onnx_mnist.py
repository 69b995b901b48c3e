"""ONNX: a network of both exporters of torch, attacked by gradients, and through ONNX Runtime by scores alone.

python docs/examples/onnx_mnist.py
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import assay


def export(net: torch.nn.Module, folder: Path) -> list[str]:
    """Write the network twice; return the paths."""
    x = torch.zeros(2, 1, 28, 28)
    new, old = folder / "dynamo.onnx", folder / "torchscript.onnx"
    free = ({0: torch.export.Dim("batch")},)
    how: dict[str, Any] = {"dynamo": True, "dynamic_shapes": free, "external_data": False, "verbose": False}
    torch.onnx.export(net, (x,), str(new), **how)
    how = {"dynamo": False, "opset_version": 17, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(net, (x,), str(old), **how)
    return [str(new), str(old)]


def main(argv: Sequence[str] | None = None) -> None:
    """Export, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--judged-by-scores", type=int, default=20)
    a = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        files = export(assay.load_model("demo:mnist-robust").net, Path(folder))
        for model in files:
            e = assay.evaluate(model, "demo:mnist", "linf:0.3", "quick", limit=a.judged, progress=False)
            said = next(f.message for f in e.findings if f.code == "converted")
            print(f"{Path(model).name:18} clean {e.clean_accuracy:.1%}  robust {e.robust_accuracy:.1%}  {said}")
        few = {"limit": a.judged_by_scores, "max_passes": 1000, "progress": False}
        e = assay.evaluate(f"ort:{files[1]}", "demo:mnist", "linf:0.3", "quick", **few)
        print(f"by scores alone    clean {e.clean_accuracy:.1%}  robust {e.robust_accuracy:.1%}")


if __name__ == "__main__":
    main()
