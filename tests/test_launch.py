"""Workers on this machine: output and exit status of good runs and of lost ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import train
from engine.placement import launcher
from engine.placement.rendezvous import choose_interface
from engine.placement.worker import process_state
from engine.placement.world import World, slurm_address, world_from_environment
from utils import StopRequest, UserError

pytestmark = pytest.mark.alone

TOY = Path(__file__).with_name("launch_worker.py")
SECRET = "hunter2-hunter2"


def toy(directory: Path, *arguments: str, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *by, TOY, f"local_run_dir={directory}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out waiting"
        time.sleep(0.05)


def workers(directory: Path) -> list[int]:
    """Process ids of the ranks, after each has begun."""
    files = [directory / f"{rank}.pid" for rank in range(2)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def is_alive(pid: int) -> bool:
    return process_state(pid) not in ("", "Z", "X")


@contextmanager
def running(directory: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launcher and its workers during a run."""
    process = toy(directory, "act=wait", f"exp_name={SECRET}")
    try:
        yield process, workers(directory)
    finally:
        process.kill()
        process.communicate()


def listening(pids: list[int]) -> list[str]:
    """Listening addresses of processes, in the hexadecimal form of proc(5)."""
    inodes = {
        link.removeprefix("socket:[").removesuffix("]")
        for pid in pids
        for descriptor in Path(f"/proc/{pid}/fd").iterdir()
        if (link := os.readlink(descriptor)).startswith("socket:")
    }
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        if Path(f"/proc/net/{table}").exists()
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


@pytest.mark.slow
def test_a_run_of_two_workers(tmp_path) -> None:
    status, out, err = outcome(toy(tmp_path))
    assert (status, err) == (0, "")
    assert out == f"rank 0 of 2 has 3\nrun_dir: {tmp_path}\n"  # rank 0 only
    assert (tmp_path / "order").read_text() == "0\n1\n"
    assert not any(map(is_alive, workers(tmp_path)))


@pytest.mark.parametrize(
    "act, status, message, shown",
    [
        ("killed", 7, "error[DISTRIBUTED] rank 1 was killed by SIGKILL; fix: ", True),
        pytest.param(
            "exception",
            1,
            "error[INTERNAL] rank 1: ZeroDivisionError: a bug; traceback in {}/crash-rank1.log",
            True,
            marks=pytest.mark.slow,
        ),
        pytest.param("user error", 3, "error[DATA] rank 1: row 7 is bad; fix: mend it", False, marks=pytest.mark.slow),
        # The same on all ranks, so none is named.
        pytest.param("no directory", 6, "error[STORAGE] no room; fix: make some", False, marks=pytest.mark.slow),
    ],
)
def test_the_first_failed_rank_is_named(act: str, status: int, message: str, shown: bool, tmp_path) -> None:
    found, _, err = outcome(toy(tmp_path, f"act={act}"))
    lines = err.splitlines()
    assert found == status
    assert lines[-1].startswith(message.format(tmp_path))
    assert lines[:-1] == ["rank 1 is about to act"] * shown  # stderr of rank 1


def test_a_stopped_rank_ends_the_run(tmp_path) -> None:
    process = toy(tmp_path, "act=stopped", "collective_timeout=3")
    pids = workers(tmp_path)
    wait_until(lambda: process_state(pids[1]) == "T")
    start = time.monotonic()
    status, _, err = outcome(process)
    assert time.monotonic() - start < 3 + 20
    assert status == 7 and err.count("\n") == 1
    assert err.startswith("error[DISTRIBUTED] rank 1 is stopped, and rank 0 timed out waiting; fix: ")
    assert not any(map(is_alive, pids))


# ---- Workers without torch ----

PLAIN = f"""
import os, sys, time
sys.path.insert(0, {str(TOY.parent.parent)!r})
from engine.placement.worker_link import Failure, attach, report
text, rank = attach(), int(os.environ["RANK"])
lost = Failure("error[DISTRIBUTED] lost", 7, is_consequence=True)
"""


def launched(script: str, text: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = launcher.launch(text, 2, [sys.executable, "-c", PLAIN + script])
    return status, *capfd.readouterr()


def test_a_worker_gets_its_text_unchanged(capfd) -> None:
    text = "lr: 5e-7\nof: {é: [true]}\n" + "x" * 200_000  # more than a pipe holds
    assert launched("print(text)", text, capfd) == (0, f"{text}\n", "")


@pytest.mark.parametrize(
    "script, status, message",
    [
        ("report(lost) if rank == 0 else time.sleep(60)", 7, "error[DISTRIBUTED] rank 1 does not respond, and rank 0 "),
        ("time.sleep(rank); report(Failure('error[DATA] x', 3, False) if rank else lost)", 3, "error[DATA] rank 1: x"),
        ("os.write(2, b'oh\\n'); os._exit(3 * rank)", 1, "oh\noh\nerror[INTERNAL] rank 1 ended with status 3 and no"),
        ("report(lost)", 7, "error[DISTRIBUTED] lost"),
    ],
)
def test_the_first_cause_is_reported(script: str, status: int, message: str, capfd) -> None:
    found, _, err = launched(script, "", capfd)
    assert (found, err[: len(message)]) == (status, message)


# ---- Signals, sockets, secrets ----


@pytest.mark.slow
def test_no_worker_outlives_a_killed_launcher(tmp_path) -> None:
    with running(tmp_path) as (process, pids):
        os.kill(pids[1], signal.SIGSTOP)
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_alive, pids)), seconds=5)


def test_workers_listen_on_loopback_only_get_signals_and_show_no_secrets(tmp_path) -> None:
    with running(tmp_path) as (process, pids):
        addresses = listening(pids)
        assert len(addresses) >= 3  # the rendezvous, and the peers
        assert set(addresses) == {"0100007F"}  # 127.0.0.1
        for pid in pids:
            for file in ("cmdline", "environ"):
                content = Path(f"/proc/{pid}/{file}").read_bytes()
                assert content and SECRET.encode() not in content
        process.send_signal(signal.SIGTERM)
        assert outcome(process) == (128 + signal.SIGTERM, "", "")
        assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_a_small_shared_memory_is_enough(tmp_path) -> None:
    """As in containers: gloo and the launcher need none."""
    script = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"'
    mount = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    command = [sys.executable, str(TOY), f"local_run_dir={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*mount, *command], capture_output=True, text=True, env=environment, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"rank 0 of 2 has 3\nrun_dir: {tmp_path}\n"


@pytest.mark.slow
def test_a_second_signal_kills(tmp_path) -> None:
    with running(tmp_path) as (process, pids):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # the first signal has no effect
        process.send_signal(signal.SIGINT)
        time.sleep(StopRequest.MERGE_SECONDS + 0.1)
        assert all(map(is_alive, pids)) and process.poll() is None
        process.send_signal(signal.SIGINT)
        assert outcome(process)[0] == 128 + signal.SIGINT
        assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_torchrun_restarts_workers(tmp_path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    status, out, err = outcome(toy(tmp_path, "act=killed once", by=torchrun))
    assert status == 0, err
    assert out == f"rank 0 of 2 has 3\nrun_dir: {tmp_path}\n"
    assert (tmp_path / "order").read_text() == "0\n1\n0\n1\n"


# ---- The launcher of this process ----

SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "gpu[007-009,12],login",
    "SLURM_STEP_NODELIST": "gpu[008-009,12],login",
}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | SLURM,
            World(rank=3, size=4, local_rank=1, local_size=2),
        ),
        (SLURM, World(rank=5, size=7, local_rank=1, local_size=2)),
        (SLURM | {"SLURM_NODEID": "3"}, World(rank=5, size=7, local_rank=1, local_size=1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "6"}, World(rank=5, size=6, local_rank=1, local_size=2)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({key: value for key, value in SLURM.items() if "STEP" not in key}, None),  # a batch script
    ],
)
def test_the_world_is_read_from_the_environment(environment: dict[str, str], expected: World | None) -> None:
    assert world_from_environment(environment) == expected


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node[03-05,9]", "node03"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]n[04,7],x", "rack1n04"),
        ("n[7,9].cluster", "n7.cluster"),
    ],
)
def test_tasks_of_slurm_meet_on_the_first_node(nodes: str, first: str) -> None:
    environment = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": nodes}
    assert slurm_address(environment) == (first, 12_000 + 1234567 % 20_000)
    assert slurm_address(environment | {"MASTER_ADDR": "x", "MASTER_PORT": "99"}) == ("x", 99)


def test_one_machine_uses_loopback_by_default(monkeypatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    choose_interface(is_single_machine=True)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "mine")


# ---- The number of processes ----


def config(**values: Any) -> Any:
    defaults = {"trainer": "FSDPTrainer", "num_processes": None, "tensor_parallel_size": None,
                "tensor_parallel": {"backend": "native"}, "fsdp": {"replicas": 1}, "plan": False}  # fmt: skip
    return OmegaConf.create(defaults | values)


@pytest.mark.parametrize(
    "values, num_gpus, expected",
    [
        ({}, 0, 1),
        ({}, 8, 8),
        ({"num_processes": 2}, 0, 2),
        ({"num_processes": 2}, 8, 2),
        ({"tensor_parallel_size": 2}, 0, 2),
        ({"tensor_parallel_size": 2, "fsdp": {"replicas": 2}}, 0, 4),
        ({"tensor_parallel_size": 2}, 8, 8),
        ({"tensor_parallel_size": 2, "trainer": "TensorParallelTrainer"}, 8, 2),
        ({"trainer": "TensorParallelTrainer"}, 8, 8),
        ({"trainer": "TensorParallelTrainer", "tensor_parallel": {"backend": "package"}}, 8, 1),
        ({"trainer": "BasicTrainer"}, 8, 1),
    ],
)
def test_the_number_of_processes(values: dict[str, Any], num_gpus: int, expected: int, monkeypatch) -> None:
    monkeypatch.setattr(launcher, "count_gpus", lambda: num_gpus)
    assert train.choose_num_processes(config(**values)) == expected
    train.check_processes(config(**values), expected, is_given=False)


@pytest.mark.parametrize(
    "values, num, key",
    [
        ({"num_processes": 2}, 4, "num_processes"),
        ({"trainer": "BasicTrainer"}, 2, "trainer"),
        ({"tensor_parallel_size": 2, "trainer": "TensorParallelTrainer"}, 4, "tensor_parallel_size"),
        ({"tensor_parallel_size": 2}, 3, "tensor_parallel_size"),
    ],
)
def test_an_unfit_number_of_processes_is_refused(values: dict[str, Any], num: int, key: str) -> None:
    with pytest.raises(UserError, match=rf"^error\[CONFIG\] {key}") as error:
        train.check_processes(config(**values), num, is_given=True)
    assert str(num) in error.value.what


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(launcher, "count_gpus", lambda: 1)
    with pytest.raises(UserError, match="there are 1"):
        train.choose_num_processes(config(num_processes=2))
