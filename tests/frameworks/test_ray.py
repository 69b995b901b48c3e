"""Work that is shared on Ray, on this machine and over two nodes: the table is that of one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from needs import framework
from torch import nn

import assay
from assay.core.errors import ModelError, RunError
from assay.evaluation import course
from assay.runs import Run

ray = framework("ray")
from assay.distributed import RayExecutor  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    return assay.load_model("demo:mnist-robust"), assay.load_data("demo:mnist", limit=36)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(course, "BLOCK", 9)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def run(digits, **options):
    model, data = digits
    return assay.evaluate(model, data, "linf:0.35", "quick", progress=options.pop("progress", False), **options)


@pytest.fixture(scope="module")
def whole(digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "BLOCK", 9)
        return run(digits)


def below(parent):
    """Yield the processes that descend from one, with their names."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            above = int(re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())[1])
            name = (folder / "cmdline").read_text()
        except (OSError, TypeError):
            continue  # it has ended
        if above == parent:
            yield int(folder.name), name
            yield from below(int(folder.name))


def workers():
    return [pid for pid, name in below(os.getpid()) if name.startswith("ray::_Actor")]


def test_two_local_workers_of_which_one_is_killed_give_the_table_of_one_process(digits, whole, capsys):
    """What Ray says of it is not printed where a result may be wanted."""
    victims = []

    def kill(snapshot):
        if snapshot.done and not victims:
            victims.extend(workers()[:1])
            os.kill(victims[0], signal.SIGKILL)

    shared = run(digits, executor=RayExecutor(2), progress=kill)
    assert victims
    assert shared.samples.equals(whole.samples)
    assert shared.passes == whole.passes
    assert not ray.is_initialized()
    assert not workers()
    assert capsys.readouterr().out == ""


def test_an_address_where_no_cluster_is_says_so(digits):
    with pytest.raises(RunError, match=r"a cluster of Ray at 127\.0\.0\.1:1"):
        run(digits, executor=RayExecutor(2, address="127.0.0.1:1"))


def test_a_model_that_cannot_be_sent_is_refused_before_ray_is_started(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    net.log = sys.stderr
    with pytest.raises(ModelError, match="that can be sent"):
        assay.evaluate(net, digits[1], "linf:0.1", "quick", progress=False, executor=RayExecutor(2))
    assert not ray.is_initialized()


@pytest.fixture
def cluster():
    """Two nodes on loopback, a CPU each; yields the cluster and its second node."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": 23001}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield made, made.add_node(num_cpus=1)
    finally:
        made.shutdown()


@pytest.mark.slow
def test_two_nodes_of_which_one_is_lost_give_the_table_of_one_process(digits, whole, cluster):
    """The blocks of the lost node are done by the other. The cluster is left as it was."""
    made, second = cluster
    assert run(digits, executor=RayExecutor(2, address=made.address)).samples.equals(whole.samples)
    assert run(digits, executor=RayExecutor(2, address="ray://127.0.0.1:23001")).samples.equals(whole.samples)
    lost = []

    def lose(snapshot):
        if snapshot.done and not lost:
            lost.append(made.remove_node(second, allow_graceful=False))

    assert run(digits, executor=RayExecutor(2, address=made.address), progress=lose).samples.equals(whole.samples)
    assert lost


@pytest.mark.slow
def test_gpus_that_no_machine_has_are_not_waited_for(digits, cluster):
    made, _ = cluster
    with pytest.raises(RunError, match="GPUs for each worker"):
        run(digits, executor=RayExecutor(2, gpus_per_worker=1, address=made.address))


@pytest.mark.slow
def test_ray_that_is_in_use_already_is_used_and_left_alone(digits, whole):
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert run(digits, executor=RayExecutor(2)).samples.equals(whole.samples)
        assert ray.is_initialized()
        assert not workers()
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(tmp_path):
    """The first blocks are stored, the workers are gone; then the command is repeated, and alone, elsewhere."""
    command = [sys.executable, "-m", "assay", "evaluate", "demo:mnist-robust", "demo:mnist", "--threat", "linf:0.3"]
    command += ["--effort", "quick", "--limit", "3072", "--json", "--out"]
    shared = [*command, "run", "--executor", "ray", "--workers", "2"]
    process = subprocess.Popen(shared, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not [*(tmp_path / "run").glob("samples/*.parquet")]:
        assert process.poll() is None
        time.sleep(0.2)
    known = [pid for pid, _ in below(process.pid)]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "to go on" in said
    time.sleep(5)  # Ray ends its processes when the one that started it is gone
    assert not [pid for pid in known if Path(f"/proc/{pid}").exists()]
    assert 0 < len(Run.read(tmp_path / "run").done()) < 3072
    for one in (shared, [*command, "alone"]):
        done = subprocess.run(one, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["complete"]
    assert Run.read(tmp_path / "run").samples().equals(Run.read(tmp_path / "alone").samples())
