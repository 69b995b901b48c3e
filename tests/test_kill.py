"""Slow: an evaluation that is killed again and again ends in the same table."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from assay.runs import Run

pytestmark = pytest.mark.slow

ARGS = ("evaluate", "demo:mnist-robust", "demo:mnist", "--threat", "linf:0.3", "--limit", "160", "--quiet")


def start(folder, out, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "assay", *ARGS, "--out", out, *more],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )


def finish(folder, out, *more):
    process = start(folder, out, *more)
    assert process.wait(timeout=600) == 0
    return Run.read(folder / out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    return finish(folder, "run"), time.monotonic() - begin


def test_twenty_kills_at_random_moments_change_nothing(whole, tmp_path):
    """kill -9, the same command again, and so on; between the kills the batch size changes too."""
    expected, seconds = whole
    chance, kills = random.Random(7), 0
    while kills < 20:
        process = start(tmp_path, "run", "--batch-size", str(chance.choice([4, 7, 16])))
        try:
            process.wait(chance.uniform(0.3 * seconds, 0.8 * seconds) if kills % 2 else chance.uniform(2, 6))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            if kills < 20:  # finished before the kill: begin anew, so that twenty kills really hit
                assert Run.read(tmp_path / "run").samples().equals(expected.samples())
                shutil.rmtree(tmp_path / "run")
    final = finish(tmp_path, "run")
    assert final.samples().equals(expected.samples())
    assert len(final.done()) == 160
