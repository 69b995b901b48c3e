"""What each effort finds and costs: robust accuracy, passes a sample, seconds, stage by stage.

    python benchmarks/cascade.py                                    the demo models
    python benchmarks/cascade.py --weights pgd_madry.pth            an outside network of the reference architecture

The images are the first MNIST test images; outside weights must fit the demo
networks' architecture, ``assay.models.demo.nets.mnist_cnn``, as published adversarially trained ones do.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import assay
from assay.models.demo.nets import mnist_cnn


def main() -> None:
    """Evaluate at each effort and seed, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="state dict of the outside network; without it the demo models")
    parser.add_argument("--threat", default="linf:0.3")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--efforts", nargs="+", default=["quick", "standard", "thorough"])
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.weights:
        models = [assay.load_model(str(options.weights), arch=mnist_cnn)]
    else:
        models = [assay.load_model(f"demo:{name}") for name in ("mnist-plain", "mnist-robust")]
    data = assay.load_data("demo:mnist", limit=options.limit)
    table = Table("model", "effort", "seed", "clean", "robust", "passes a sample", "seconds", "after each stage")
    for model in models:
        for effort in options.efforts:
            for seed in range(options.seeds):
                e = assay.evaluate(model, data, options.threat, effort, seed=seed, progress=False)
                left, trail = e.n, []
                for stage in e.stages():
                    left -= stage["broken"]
                    trail.append(f"{stage['name']} {left / e.n:.1%}")
                passes = (e.passes.forwards + e.passes.backwards) / e.n
                table.add_row(
                    model.name,
                    effort,
                    str(seed),
                    f"{e.clean_accuracy:.1%}",
                    f"{e.robust_accuracy:.1%}",
                    f"{passes:.0f}",
                    f"{e.seconds:.1f}",
                    ", ".join(trail),
                )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
