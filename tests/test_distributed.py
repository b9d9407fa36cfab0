"""Many processes: the script of a cluster, run here as several processes that talk over Gloo.

Each process has four or two host devices, eight in all, as this one has, which runs the same script
alone: what is frozen has to end with the same bits, what is trained with the same to rounding.
"""

import importlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import host_bits
from pages import read

import frozen_optax as fo

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "distributed_finetune.py"
SLURM_PORTS = range(61440, 65536)  # of which jax takes the one that the job's number says
SMALL = ["--layers", "1", "--width", "32", "--batch-size", "16"]
LIMIT = 240  # seconds for each process, ten times what it takes on two busy cores


def hold(port):
    """A free port, or this one if it is free, which nobody but a coordinator gets any more.

    The socket does not listen. A coordinator may listen beside it, as both say that they share.
    """
    held = socket.socket()
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", port))
    except OSError:
        held.close()
        raise
    return held


class Cluster:
    """The script, started in several processes; none outlives the `with` that it is used in.

    Each has a session of its own, so that it is killed with all that it has started, and writes
    into a file, so that it never waits for a reader.
    """

    def __init__(self, folder, processes, *arguments, script=SCRIPT, port=0, is_slurm=False):
        self._begin = time.monotonic()
        self._port = hold(port)
        self.address = self._port.getsockname()
        # What jax itself warns of differs from version to version; the library tells of leaves that
        # are moved at each step.
        command = [sys.executable, "-W", "error::UserWarning", str(script), *arguments]
        command += ["--cpu-devices", str(8 // processes)]
        # All speak to this machine alone, and jax warns of proxies.
        environment = {key: os.environ[key] for key in os.environ if "proxy" not in key.lower()}
        environment |= {"PYTHONUNBUFFERED": "1"}
        if is_slurm:
            environment |= {"SLURM_JOB_ID": str(self.address[1] - SLURM_PORTS[0])}
            environment |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(processes)}
            environment |= {"SLURM_STEP_NUM_NODES": "1"}
        else:
            command += ["--coordinator", "{}:{}".format(*self.address)]
            command += ["--processes", str(processes)]
        folder.mkdir(exist_ok=True)
        self._outputs = [folder / f"process_{index}.txt" for index in range(processes)]
        self._processes = []
        try:
            for index, output in enumerate(self._outputs):
                by_argument = [] if is_slurm else ["--process-id", str(index)]
                by_slurm = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
                with output.open("w") as file:
                    self._processes.append(
                        subprocess.Popen(
                            [*command, *by_argument],
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            env=environment | (by_slurm if is_slurm else {}),
                            start_new_session=True,
                        )
                    )
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has ended, and was waited for
                continue
            process.wait()
        self._port.close()

    def output(self, index=0):
        """What a process has printed until now."""
        return self._outputs[index].read_text()

    def fail(self, why):
        """Fails the test with all that was printed."""
        told = [f"process {i}: {self.output(i)[-3000:]}" for i in range(len(self._processes))]
        pytest.fail("\n\n".join([why, *told]))

    def _wait_for(self, is_there, what):
        while not is_there():
            if time.monotonic() - self._begin > LIMIT:
                self.fail(f"no {what} within {LIMIT} s")
            if any(process.poll() for process in self._processes):
                self.fail("a process failed")
            time.sleep(0.02)

    def wait_for(self, text):
        """Waits until the first process has printed a text."""
        self._wait_for(lambda: text in self.output(), repr(text))

    def wait(self):
        """Waits until all have ended well."""
        running = lambda: [each for each in self._processes if each.poll() is None]
        self._wait_for(lambda: not running(), "end")
        if any(process.returncode for process in self._processes):  # all of them at once
            self.fail("a process failed")

    def kill_in_mid_step(self, index):
        """Kills a process while the first one waits for it, in a step."""
        lost = self._processes[index]
        lost.send_signal(signal.SIGSTOP)
        told, quiet_since = self.output(), time.monotonic()
        while time.monotonic() - quiet_since < 1:
            time.sleep(0.1)
            if self.output() != told:
                told, quiet_since = self.output(), time.monotonic()
        assert self._processes[0].poll() is None
        lost.kill()
        lost.wait()
        return told

    def wait_for_survivors(self):
        """The exit codes, when those that are left have ended by themselves."""
        return [process.wait(LIMIT) for process in self._processes]

    def is_gone(self):
        """Whether no process is left, nor anything that listens to the port."""
        for process in self._processes:
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger
            free.bind(self.address)
        return True


def run(folder, processes, *arguments):
    """What a run on so many processes reports; its checkpoints are left in the folder."""
    report = folder / "report.json"
    options = ["--checkpoints", str(folder / "checkpoints"), "--report", str(report)]
    with Cluster(folder, processes, *SMALL, *options, *arguments) as cluster:
        cluster.wait()
    assert cluster.is_gone()
    return json.loads(report.read_text())


@pytest.fixture
def script(monkeypatch):
    """The script, imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("distributed_finetune")


def run_alone(script, folder, steps):
    """The same run in this process, on its eight devices."""
    options = ["--processes", "1", "--checkpoints", str(folder), "--steps", str(steps)]
    return script.main([*SMALL, *options])


def load(script, folder):
    """The parameters of the last checkpoint, on the devices of this process."""
    settings = script.parse([*SMALL, "--checkpoints", str(folder)])
    checkpoints = script.Checkpoints(folder)
    like = script.make_state(script.make_mesh(), settings)
    params, _ = checkpoints.restore(checkpoints.latest(), like)
    checkpoints.close()
    return params


def assert_agree(script, folders, alone, together):
    """The same bits in what is frozen, in fingerprints and one by one; the rest to rounding."""
    assert together["frozen"] == alone["frozen"]
    kept = alone["losses"][together["begin"] :]
    np.testing.assert_allclose(together["losses"], kept, rtol=1e-4)
    left, right = (load(script, folder) for folder in folders)
    frozen = script.TX.frozen.mask(left)
    # Nothing of the library compares here.
    for is_frozen, x, y in zip(*map(jax.tree.leaves, (frozen, left, right)), strict=True):
        if is_frozen:
            np.testing.assert_array_equal(host_bits(x), host_bits(y))
        else:
            np.testing.assert_allclose(x, y, atol=1e-4)
    assert fo.fingerprint(right, script.TX) == alone["frozen"]


def losses_in(output):
    """The loss of each step that a run has printed, by its number."""
    lines = [line.split() for line in output.splitlines() if line.startswith("step ")]
    return {int(step.rstrip(":")): np.float32(loss) for _, step, _, loss in lines}


def kill_a_run(folder, processes, *arguments, end_by_itself=False):
    """What a run of many steps has printed, one process of which is killed after a checkpoint."""
    options = ["--checkpoints", str(folder / "checkpoints"), "--save-every", "40"]
    options += ["--steps", "9999", *arguments]
    with Cluster(folder, processes, *SMALL, *options) as cluster:
        cluster.wait_for("step 42:")
        told = cluster.kill_in_mid_step(processes - 1)
        if end_by_itself:
            assert all(cluster.wait_for_survivors())
    assert cluster.is_gone()
    return losses_in(told)


def test_two_processes_one_of_them_killed_keep_what_one_keeps(script, tmp_path):
    folder = tmp_path / "two"
    killed = kill_a_run(folder, 2)
    last = max(killed)
    assert 42 <= last < 80  # it was in a step, and not in a save
    resumed = run(folder, 2, "--steps", str(last))
    assert (resumed["processes"], resumed["devices"], resumed["begin"]) == (2, 8, 40)
    # From run to run every bit is the same.
    assert [killed[step] for step in range(41, last + 1)] == list(
        map(np.float32, resumed["losses"])
    )
    alone = run_alone(script, tmp_path / "alone", last)
    assert_agree(script, (tmp_path / "alone", folder / "checkpoints"), alone, resumed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_keep_what_one_keeps(script, tmp_path, processes):
    alone = run_alone(script, tmp_path / "alone", 6)
    together = run(tmp_path / "many", processes, "--steps", "6")
    assert (together["processes"], together["devices"], together["begin"]) == (processes, 8, 0)
    assert len(together["losses"]) == 6
    folders = tmp_path / "alone", tmp_path / "many" / "checkpoints"
    assert_agree(script, folders, alone, together)


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [2, 4])
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(tmp_path, processes):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    last = max(kill_a_run(killed, processes, "--lost-after", "10", end_by_itself=True))
    steps = ["--steps", str(last), "--save-every", "40"]
    resumed, through = run(killed, processes, *steps), run(whole, processes, *steps)
    assert resumed["begin"] == 40
    for part in "frozen", "trained":
        assert resumed[part] == through[part]
    assert resumed["losses"] == through["losses"][40:]


@pytest.mark.exhaustive
def test_four_processes_go_on_where_two_were_killed(script, tmp_path):
    folder = tmp_path / "run"
    last = max(kill_a_run(folder, 2))
    resumed = run(folder, 4, "--steps", str(last))
    assert (resumed["processes"], resumed["begin"]) == (4, 40)
    alone = run_alone(script, tmp_path / "alone", last)
    assert_agree(script, (tmp_path / "alone", folder / "checkpoints"), alone, resumed)


@pytest.mark.exhaustive
def test_what_is_not_said_slurm_is_asked_for(script, tmp_path):
    options = ["--checkpoints", str(tmp_path / "checkpoints"), "--steps", "3"]
    for port in SLURM_PORTS:
        try:
            cluster = Cluster(tmp_path, 2, *SMALL, *options, port=port, is_slurm=True)
        except OSError:  # somebody has that one
            continue
        break
    with cluster:
        cluster.wait()
    assert cluster.is_gone()
    assert "8 devices of 2 processes" in cluster.output()


def test_the_commands_on_the_page_are_ones_the_script_takes(script):
    page = read("docs/distributed.md").replace("\\\n", " ")
    commands = re.findall(r"examples/distributed_finetune\.py( --.*?)(?:\"| && |$)", page, re.M)
    listed = " ".join(re.findall(r"^ +- (--.*)$", page, re.M))
    commands.append(listed.replace("$(JOB_COMPLETION_INDEX)", "3"))
    rehearsal, tpu, slurm, kubernetes = (script.parse(shlex.split(each)) for each in commands)
    assert (rehearsal.cpu_devices, rehearsal.process_id) == (4, 0)
    assert tpu.processes is slurm.processes is None  # the cluster is asked
    assert (kubernetes.processes, kubernetes.process_id) == (4, 3)


# --- checks of arrays that no process holds alone

CHECKS = """
import distributed_finetune, jax, jax.numpy as jnp, pytest
import frozen_optax as fo

settings = distributed_finetune.parse()
distributed_finetune.join(settings)
mesh = distributed_finetune.make_mesh()
before, _ = distributed_finetune.make_state(mesh, settings)
up = before["backbone"]["layer_0"]["up"]
assert not up.is_fully_addressable and not up.is_fully_replicated
assert set(up.sharding.device_set) == set(jax.devices())
trained = jax.tree.map(lambda leaf: leaf + 1, before)
same = trained | {"backbone": jax.tree.map(jnp.copy, before["backbone"])}
fo.assert_frozen(before, same, "backbone")
fo.assert_trees_bit_identical(before["backbone"], same["backbone"])

def first_element_negated(leaf):  # which the first process holds
    return leaf.at[0, 0].multiply(-1)

below = before["backbone"]["layer_0"] | {"up": first_element_negated(up)}
moved = trained | {"backbone": {"layer_0": below}}
with pytest.raises(AssertionError, match="1 of 2 frozen leaves .*\\n.*layer_0/up: elements differ"):
    fo.assert_frozen(before, moved, "backbone")
with pytest.raises(AssertionError, match="1 of 2 leaves differ.*\\n.*layer_0/up: elements differ"):
    fo.assert_trees_bit_identical(before["backbone"], moved["backbone"])
with pytest.raises(AssertionError, match="no trainable leaf moved"):
    fo.assert_frozen(before, before | {"backbone": same["backbone"]}, "backbone")
with pytest.raises(AssertionError, match="1 of 2 leaves have another fingerprint"):
    fo.assert_fingerprint(moved, fo.fingerprint(before, "backbone"))
jax.distributed.shutdown()
"""


def test_what_no_process_holds_alone_is_compared_bit_by_bit(tmp_path):
    program = tmp_path / "checks.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n{CHECKS}")
    options = [*SMALL, "--checkpoints", str(tmp_path / "unused")]
    with Cluster(tmp_path, 2, *options, script=program) as cluster:
        cluster.wait()
    assert cluster.is_gone()


# --- the cluster of these tests


def test_a_process_that_fails_is_shown_and_none_is_left(tmp_path):
    failure = pytest.raises(pytest.fail.Exception, match=r"(?s)a process failed.*invalid int value")
    options = ["--checkpoints", str(tmp_path), "--steps", "many"]
    with Cluster(tmp_path, 2, *options) as cluster, failure:
        cluster.wait()
    assert cluster.is_gone()


def test_processes_that_wait_for_ever_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 2)
    failure = pytest.raises(pytest.fail.Exception, match="no end within 2 s")
    with Cluster(tmp_path, 2, "--checkpoints", str(tmp_path)) as cluster, failure:
        cluster.wait()
    assert cluster.is_gone()
