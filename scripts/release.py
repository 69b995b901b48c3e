"""Make a release: wheel and sdist, the hashed requirements it was tried with, a bill of materials, and a trial.

    python scripts/release.py            # build twice, compare byte by byte, look at what is inside: dist/
    python scripts/release.py --try      # and install the wheel in a fresh environment, run the demo in an empty folder
    python scripts/release.py --sbom     # and write what that environment holds, as CycloneDX
    python scripts/release.py --lock     # only write requirements-release.txt anew, from constraints.txt

It needs `pip install 'assay[release]'`. Nothing is uploaded.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
LOCK = ROOT / "requirements-release.txt"
PLATFORMS = ("macosx_14_0_arm64", "win_amd64")
PYTHONS = ("311", "312", "313")
DATA = (".safetensors", ".gz", ".md", ".toml", ".css", ".js", ".j2", ".typed")
"""What a wheel holds besides Python: demo models and images, recipes, templates."""

HEAD = """# What a release was tried with: the package's own requirements, on a CPU, with the hashes of all their files.
# `python scripts/release.py --lock` writes this from constraints.txt, for the Python that it runs with (3.11 here, that
# of the Dockerfile). On Linux torch is a CPU build, without its CUDA packages: add the index that has these.
#
#     pip install --require-hashes -r requirements-release.txt
#     pip install --no-deps assay-*.whl
"""


def run(*command: str | Path, **settings: object) -> str:
    """Run a program; return what it printed.

    Raises:
        SystemExit: it failed; what it said is shown.
    """
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **settings)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return str(done.stdout)


# --- wheel and sdist


def build(folder: Path) -> list[Path]:
    """Build sdist and wheel, stamped with the time of the last commit; return both."""
    stamp = run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": stamp}
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, env=environment)
    return sorted(folder.iterdir())


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def superfluous(names: Iterable[str]) -> list[str]:
    """Return the files of a wheel that are neither code nor known data of the package, nor its metadata."""
    return [n for n in names if not (_of_package(n) or re.match(r"assay-[\w.]+\.dist-info/", n))]


def _of_package(name: str) -> bool:
    return name.startswith("assay/") and "__pycache__" not in name and name.endswith((".py", *DATA))


def build_twice() -> Path:
    """Build into dist/ and a second time elsewhere; return the wheel.

    Raises:
        SystemExit: the builds differ, or the wheel holds what does not belong there.
    """
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as other:
        files = build(DIST)
        for first, second in zip(files, build(Path(other)), strict=True):
            if digest(first) != digest(second):
                sys.exit(f"two builds of {first.name} differ")
            print(f"{digest(first)}  {first.name}  {first.stat().st_size / 1e6:.1f} MB, the same twice")
    wheel = next(f for f in files if f.suffix == ".whl")
    names = zipfile.ZipFile(wheel).namelist()
    if extra := superfluous(names):
        sys.exit(f"the wheel holds what does not belong there: {', '.join(extra)}")
    print(f"{len(names)} files in the wheel, {sum(not n.endswith('.py') for n in names)} of them not Python")
    return wheel


# --- requirements


def lock() -> None:
    """Write the package's requirements, and theirs, with the hashes of all files that the index has of them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "requirements.txt"
        quiet = ("--quiet", "--strip-extras", "--no-annotate", "--no-header", "--allow-unsafe")
        silent = ("--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--no-emit-options")
        pins = ("--generate-hashes", "--constraint", "constraints.txt", "--output-file", out, "pyproject.toml")
        run(sys.executable, "-m", "piptools", "compile", *quiet, *silent, *pins, cwd=ROOT)
        text = out.read_text(encoding="utf-8")
    LOCK.write_text(HEAD + with_every_torch(text), encoding="utf-8")


def with_every_torch(text: str) -> str:
    """Return requirements that take the CPU build of torch on Linux, and the usual one where that is for CPUs.

    A CPU build for Linux has a version of its own (2.13.0+cpu), which only its own index knows. Where this machine has
    another build, nothing is changed.
    """
    found = re.search(r"(?m)^torch==([\d.]+)\+cpu \\\n((?: .*\n)+)", text)
    if found is None:
        return text
    other = " \\\n".join(f"    --hash=sha256:{h}" for h in sorted({*torch_hashes(found[1])}))
    linux = f'torch=={found[1]}+cpu ; sys_platform == "linux" \\\n{found[2]}'
    return (
        f'{text[: found.start()]}{linux}torch=={found[1]} ; sys_platform != "linux" \\\n{other}\n{text[found.end() :]}'
    )


def torch_hashes(version: str) -> Iterator[str]:
    """Yield the hashes of the usual index's wheels of torch, one for each platform and Python that has one."""
    plain = {k: v for k, v in os.environ.items() if k not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
    plain |= {"PIP_CONFIG_FILE": os.devnull}
    ask = (sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps")
    for platform in PLATFORMS:
        for python in PYTHONS:
            with tempfile.TemporaryDirectory() as folder:
                which = ("--only-binary", ":all:", "--platform", platform, "--python-version", python)
                where = ("--target", folder, "--report", "-")
                done = subprocess.run(
                    [*ask, *which, *where, f"torch=={version}"], env=plain, capture_output=True, text=True, check=False
                )
            if done.returncode == 0:
                yield json.loads(done.stdout)["install"][0]["download_info"]["archive_info"]["hashes"]["sha256"]


# --- trial


def python_of(folder: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment that has the hashed requirements and the wheel, and nothing else; return its Python."""
    venv.create(folder, with_pip=True, clear=True)
    python = python_of(folder)
    run(python, "-m", "pip", "install", "--quiet", "--require-hashes", "--requirement", LOCK)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    run(python, "-m", "pip", "check")
    return python


def demo(python: Path, folder: Path) -> str:
    """Run the demo in an empty folder, with no access to the checkout; return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return run(python.with_name("assay"), "demo", "--quiet", cwd=folder, env=environment)


def timed(what: str, since: float) -> float:
    """Say how long something took; return the time."""
    now = time.monotonic()
    print(f"{now - since:7.1f} s  {what}")
    return now


def try_it(wheel: Path, *, sbom: bool) -> None:
    """Install the wheel as a user would, and run the demo; write the bill of materials if asked."""
    with tempfile.TemporaryDirectory() as temporary:
        empty = Path(temporary) / "empty"
        empty.mkdir()
        begun = time.monotonic()
        python = install(wheel, Path(temporary) / "venv")
        installed = timed("a fresh environment, hashed requirements, the wheel", begun)
        said = demo(python, empty)
        timed("assay demo in an empty folder", installed)
        print(said.rstrip())
        if sbom:
            out = DIST / f"{wheel.name.split('-py3')[0]}.cdx.json"
            run(sys.executable, "-m", "cyclonedx_py", "environment", python, "--output-reproducible", "-o", out)
            parts = json.loads(out.read_text(encoding="utf-8"))["components"]
            print(f"{len(parts)} components in {out.relative_to(ROOT)}")


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lock", action="store_true", help="only write requirements-release.txt")
    parser.add_argument("--try", dest="trial", action="store_true", help="install the wheel and run the demo")
    parser.add_argument("--sbom", action="store_true", help="and write dist/*.cdx.json; implies --try")
    asked = parser.parse_args(arguments)
    if asked.lock:
        return lock()
    wheel = build_twice()
    if asked.trial or asked.sbom:
        try_it(wheel, sbom=asked.sbom)
    return None


if __name__ == "__main__":
    main()
