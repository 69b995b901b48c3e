"""Install assay alone, and then each of its extras, in fresh environments, and run the tests that belong to it.

    python scripts/try_extras.py            all, about two minutes each
    python scripts/try_extras.py keras sklearn
    python scripts/try_extras.py none       assay alone: import, doctor, demo

Exits with 1 where an installation, or a test, fails.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "none": [],
    "attribution": ["tests/frameworks/test_attribution.py"],
    "augment": ["tests/test_augment.py"],
    "fastai": ["tests/frameworks/test_fastai.py"],
    "harden": ["tests/test_harden.py"],
    "huggingface": ["tests/frameworks/test_hugging_face.py", "tests/frameworks/test_hugging_face_trainer.py"],
    "jax": ["tests/frameworks/test_jax.py"],
    "keras": ["tests/frameworks/test_keras.py"],
    "lightning": ["tests/frameworks/test_lightning.py"],
    "onnx": ["tests/test_onnx.py"],
    "serve": ["tests/frameworks/test_serve.py"],
    "sklearn": ["tests/frameworks/test_sklearn.py"],
    "tensorflow": ["tests/frameworks/test_tensorflow.py"],
    "http": ["tests/frameworks/test_endpoint.py"],
    "timm": ["tests/frameworks/test_timm.py"],
    "torchvision": ["tests/frameworks/test_torchvision_models.py"],
}


def attempt(extra: str) -> bool:
    """Install one extra in a fresh environment, run its tests, and say how that went."""
    with tempfile.TemporaryDirectory() as folder:
        python = f"{folder}/bin/python"
        wanted = str(ROOT) if extra == "none" else f"{ROOT}[{extra},test]"
        begun = time.monotonic()
        steps = [
            [sys.executable, "-m", "venv", folder],
            [python, "-m", "pip", "install", "--quiet", "--constraint", f"{ROOT}/constraints.txt", "torch", wanted],
            [python, "-m", "pip", "check"],
            [f"{folder}/bin/assay", "doctor"],
        ]
        if extra == "none":
            steps.append(
                [f"{folder}/bin/assay", "demo", "--limit", "50", "--effort", "quick", "--out", f"{folder}/demo"]
            )
        else:
            steps.append([python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS[extra]])
        for step in steps:
            done = subprocess.run(step, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{extra:12} FAILED at {' '.join(step[1:4])}\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
                return False
        used = subprocess.run(["du", "-sm", folder], capture_output=True, text=True, check=True).stdout.split()[0]
        said = done.stdout.strip().splitlines()[-1] if extra != "none" else "the demo ran"
        print(f"{extra:12} {time.monotonic() - begun:4.0f} s, {used:>5} MB: {said}", flush=True)
        return True


def main() -> int:
    """Try the extras that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", default=[*TESTS], metavar="EXTRA")
    chosen = parser.parse_args().extras
    if unknown := [e for e in chosen if e not in TESTS]:
        parser.error(f"no extra {unknown[0]!r}; known: {', '.join(TESTS)}")
    worked = [attempt(e) for e in chosen]
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
