"""Python code of responses runs with its tests, within limits."""

import errno
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from engine.data.examples import PromptRow
from engine.rewards import python_tests
from engine.rewards.python_tests import WORKER, PythonTestsReward, code_of
from engine.rewards.samples import MissingColumn, samples_of
from rewards import PythonTests
from utils import UserError

MEMORY_MB = 256


@pytest.fixture(scope="module")
def reward() -> PythonTestsReward:
    return PythonTestsReward(PythonTests(seconds=2, memory_mb=MEMORY_MB, processes=2))


def rewards_of(reward: PythonTestsReward, *codes: str, tests: Any = "") -> list[Any]:
    return [*reward(samples_of(PromptRow("", {"tests": tests}), [(code, False) for code in codes]))]


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ("assert add(1, 2) == 3", [1, 0]),
        (["assert add(1, 2) == 3", "assert add(0, 0) == 0"], [1, 0]),
        (["assert add(0, 0) == 0", "assert add(1, 2) == 3"], [1, 0]),
        ("def test_add():\n    assert add(1, 2) == 3", [1, 0]),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(add(1, 2), 3)", [1, 0]),
    ],
)
def test_code_that_passes_and_code_that_fails(reward, tests, expected):
    codes = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"]
    assert rewards_of(reward, *codes, tests=tests) == expected


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("x = 1", "x = 1"),
        ("First:\n```\nx = 0\n```\nBetter:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nx = '''`a`'''\n```", "x = '''`a`'''\n"),
        ("An open block:\n```python\nx = 1", "An open block:\n```python\nx = 1"),
    ],
)
def test_code_of_a_response(response, code):
    assert code_of(response) == code


@pytest.mark.parametrize(
    "code",
    [
        "def (",
        "1 / 0",
        "import os; os._exit(0)",  # before the tests
        "raise SystemExit(0)",
        "import os; [os.write(number, b'passed') for number in (1, 3)]; os._exit(0)",
        "open('/proc/self/fd/0').read()[0]",  # the request
        "bytearray(10**9)",
        "x = [0]\nwhile True: x *= 2",
        "def f(): f()\nf()",
        "open('x', 'w').write('x' * 10**8)",
        "import threading; threading.Thread(target=print).start()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.kill(os.getppid(), 9)",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os\nwhile True: os.fork()",
    ],
)
def test_code_that_gets_nowhere(reward, code):
    assert rewards_of(reward, code) == [0]


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal\nfor number in (15, 24): signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
        "while True: print('x' * 10**5)",
        "import os\nwhile True: [os.write(number, b'x' * 10**5) for number in range(1, 4)]",  # its reply, too
    ],
)
def test_code_without_an_end(reward, code):
    start = time.monotonic()
    assert rewards_of(reward, code) == [0]
    assert time.monotonic() - start < 60


def test_a_fork_bomb_that_does_not_ask_python(reward):
    code = "import ctypes\nlibc = ctypes.CDLL(None)\nfound = {libc.fork() for _ in range(100)}"
    assert rewards_of(reward, code, tests="assert found == {-1}") == [1]


def test_a_connection_that_does_not_ask_python(reward):
    if reward.has_network:
        pytest.skip("the kernel gives no network namespace here")
    code = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nsocket = libc.socket(2, 1, 0)"
    address = "bytes([2, 0, 0, 9, 127, 0, 0, 1, *[0] * 8])"  # of this machine
    tests = f"assert libc.connect(socket, {address}, 16) == -1 and ctypes.get_errno() == {errno.ENETUNREACH}"
    assert rewards_of(reward, code, tests=tests) == [1]


def test_files(reward, tmp_path):
    """The temporary directory is empty and goes; nothing else is written to."""
    os.chmod(tmp_path, 0o777)
    inside = "import os\nassert os.listdir() == []\nopen('a', 'w').write('x')\nos.mkdir('d')\nos.rename('a', 'd/b')"
    outside = [f"open({str(tmp_path / 'a')!r}, 'w')", f"import os; os.mkdir({str(tmp_path / 'b')!r})"]
    assert rewards_of(reward, inside, *outside, inside) == [1, 0, 0, 1]
    assert [*tmp_path.iterdir()] == []


def test_the_environment_holds_no_keys(reward, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert rewards_of(reward, "import os", tests="assert 'sk-secret' not in os.environ.values()") == [1]


def test_several_run_at_a_time():
    reward = PythonTestsReward(PythonTests(seconds=20, memory_mb=MEMORY_MB, processes=2))
    start = time.monotonic()
    assert rewards_of(reward, *["import time; time.sleep(2)"] * 2) == [1, 1]
    assert time.monotonic() - start < 3.9


def test_a_row_without_tests(reward):
    (error,) = reward(samples_of(PromptRow("", {}), [("1", False)]))
    assert isinstance(error, MissingColumn)


@pytest.mark.parametrize("limits", [{"processes": True, "network": False}, {"processes": False, "network": True}])
def test_limits_that_the_kernel_does_not_set(monkeypatch, capsys, limits):
    monkeypatch.setattr(PythonTestsReward, "_run", lambda self, request: json.dumps(limits).encode())
    if limits["processes"]:
        with pytest.raises(UserError, match="the kernel does not limit processes here"):
            PythonTestsReward(PythonTests())
    else:
        assert PythonTestsReward(PythonTests()).has_network
        assert "note: python_tests: the kernel gives no network namespace" in capsys.readouterr().out


def test_a_process_that_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setattr(python_tests, "WORKER", tmp_path / "gone.py")
    with pytest.raises(UserError, match="its process does not start with these limits"):
        PythonTestsReward(PythonTests())


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/usr/bin/python3").exists(), reason="needs root and another Python")
def test_limits_of_another_user_than_root():
    """Root leaves its rights; others make a user namespace."""
    request = {"probes": True, "seconds": 2, "bytes": MEMORY_MB * 2**20}
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        worker = shutil.copy(WORKER, directory)
        run = subprocess.run(
            ["/usr/bin/python3", "-I", worker],
            input=json.dumps(request).encode(),
            capture_output=True,
            user=1234,
            group=1234,
            timeout=20,
        )
    assert not json.loads(run.stdout)["processes"]
