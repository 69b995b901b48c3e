"""Hardened networks as files: weights, or whole networks with their normalisation inside."""

import warnings
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor, nn

from assay.core.errors import MissingExtraError, RunError
from assay.core.files import replacing

FORMATS: Final = (".safetensors", ".pt2", ".onnx")


def check_format(path: Path) -> None:
    """Refuse a file name that says no format.

    Raises:
        RunError: see above.
        MissingExtraError: a format that needs a package that is not there.
    """
    if path.suffix not in FORMATS:
        raise RunError(
            f"a file that ends in {', '.join(FORMATS)}", str(path), "Write for example hardened.safetensors."
        )
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
        except ImportError as e:
            raise MissingExtraError("the package onnx", "none", "Install it: pip install 'assay[onnx]'.") from e


def export(whole: nn.Module, weights: dict[str, Tensor], shape: tuple[int, ...], path: Path) -> None:
    """Write a network in the format that the file's name says.

    Args:
        whole: from inputs in the box to logits; what ``.pt2`` and ``.onnx`` hold, with a free batch axis.
        weights: the state of the network as the user gave it; what ``.safetensors`` holds.
        shape: of one input.
        path: the file.

    Raises:
        RunError: the file cannot be written, or the network cannot be exported.
    """
    whole = whole.cpu().eval()
    try:
        with replacing(path) as f:
            if path.suffix == ".safetensors":
                f.write(save({n: v.detach().cpu().contiguous() for n, v in weights.items()}))
            elif path.suffix == ".pt2":
                batch = {0: torch.export.Dim("batch", min=1)}
                program = torch.export.export(whole, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))
                torch.export.save(program, f)
            else:
                _to_onnx(whole, shape, f.name)
    except OSError as e:
        raise RunError(f"a place that can be written for {path.name}", str(e), "Choose another --out.") from e
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as e:
        found = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        raise RunError(f"a network that can be written as {path.suffix}", found, "Write .safetensors.") from e


def _to_onnx(whole: nn.Module, shape: tuple[int, ...], file: str) -> None:
    free = {"input": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["logits"], "dynamic_axes": free}
    with warnings.catch_warnings():
        # The new exporter needs onnxscript, and its files fewer programs can read.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(whole, (torch.zeros(2, *shape),), file, dynamo=False, opset_version=17, **names)  # type: ignore[arg-type]
