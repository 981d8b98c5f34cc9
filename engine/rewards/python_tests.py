"""Run the Python code of responses with its tests, each in a process of its own.

The child (code_worker.py) has limits of the kernel: processor time, memory, file sizes, no processes or threads, and no
network where the kernel lets it have a namespace. They keep accidents in. They are no prison for an attacker.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rewards import BatchReward, PythonTests, Sample
from utils import UserError

WORKER = Path(__file__).with_name("code_worker.py")
BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
MAX_REPLY = 4096  # bytes
# Nothing of this process's environment, as it may hold keys. One thread, as a child may start none.
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class PythonTestsReward(BatchReward):
    """1 for responses with code that passes the tests of their row, else 0.

    Raises:
        UserError: CONFIG if processes cannot be limited here.
    """

    def __init__(self, options: PythonTests):
        self._options = options
        self._num_processes = options.processes or os.cpu_count() or 1
        facts = self._probe()
        if facts["processes"]:
            problem = "rewards: python_tests: the kernel does not limit processes here, so code could start any number"
            raise UserError("CONFIG", problem, "run as another user than root, or on Linux")
        self.has_network = facts["network"]
        if self.has_network:
            print("note: python_tests: the kernel gives no network namespace: only Python's own sockets are refused")

    def __call__(self, samples: Sequence[Sample]) -> Iterable[float | Exception | None]:
        with ThreadPoolExecutor(self._num_processes) as pool:
            return [*pool.map(self._reward, samples)]

    def _reward(self, sample: Sample) -> float | Exception:
        try:
            tests = sample.row["tests"]
        except KeyError as error:
            return error
        token = secrets.token_hex()  # exit statuses and printed words would be easy to forge
        request = {"code": code_of(sample.response), "tests": tests_of(tests), "token": token}
        return float(self._run(request) == token.encode())

    def _probe(self) -> dict[str, bool]:
        reply = self._run({"probes": True})
        try:
            return json.loads(reply)
        except ValueError as error:
            problem = "rewards: python_tests: its process does not start with these limits"
            raise UserError("CONFIG", problem, "raise reward_options.python_tests.memory_mb or seconds") from error

    def _run(self, request: dict[str, Any]) -> bytes:
        """Run a request in a child; returns its reply, empty if it has exceeded a limit."""
        seconds = self._options.seconds
        request |= {"seconds": int(seconds) + 1, "bytes": self._options.memory_mb * 2**20}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, tempfile.TemporaryFile() as stdin:
            os.chmod(directory, 0o777)  # the child of root is nobody
            stdin.write(json.dumps(request).encode())
            stdin.seek(0)
            child = subprocess.Popen(
                [sys.executable, "-I", str(WORKER)],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env={**ENVIRONMENT, "HOME": directory, "TMPDIR": directory},
                start_new_session=True,
            )
            try:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(seconds)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            assert child.stdout is not None
            with child.stdout:
                return os.read(child.stdout.fileno(), MAX_REPLY).strip()


def code_of(response: str) -> str:
    """The last fenced block of a response, or all of it."""
    blocks = BLOCK.findall(response)
    return blocks[-1] if blocks else response


def tests_of(column: Any) -> str:
    """The tests of a row as Python text."""
    return "\n".join(map(str, column)) if isinstance(column, list) else str(column)
