"""What is loaded when: nothing heavy before it is used, and nothing that readers of runs do not need."""

import subprocess
import sys

import pytest


def loaded_after(code):
    script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize("code", ["import assay", "import assay.cli", "import assay.runs, assay.reports"])
def test_torch_is_loaded_only_when_a_model_or_an_attack_is(code):
    assert "torch" not in loaded_after(code)


def test_no_optional_framework_is_ever_loaded_by_assay_itself():
    everything = "import assay; [getattr(assay, name) for name in assay.__all__]; assay.load_model('demo:mnist-plain')"
    frameworks = {
        "torchvision",
        "tensorflow",
        "keras",
        "jax",
        "timm",
        "transformers",
        "datasets",
        "fastai",
        "ray",
        "onnx",
    }
    assert not frameworks & loaded_after(everything)
