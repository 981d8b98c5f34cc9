"""Child process that runs the Python code of a response, and its tests, within limits of the kernel.

engine/rewards/python_tests.py starts it as a script, so it imports no module of this program. It reads a request as
JSON from stdin, and writes a line: the token of the request if all tests have passed, else an error.
"""

import contextlib
import ctypes
import json
import os
import resource
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

NOBODY = 65534
NEW_NET, NEW_USER = 0x40000000, 0x10000000  # of unshare(2)
KEEP_CAPABILITIES = 8  # of prctl(2)
CAPABILITY_VERSION, MAY_READ_ALL = 0x20080522, 1 << 2  # of capset(2)
MAX_FILE_BYTES = 10 * 2**20
REFUSED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_network() -> str | None:
    """Move to a network without devices; returns the reason if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return "this system has no namespaces"
    if libc.unshare(NEW_NET if os.geteuid() == 0 else NEW_NET | NEW_USER):
        return os.strerror(ctypes.get_errno())
    return None


def leave_root() -> None:
    """Run as nobody, who may read files as root does. The kernel limits the processes of root in no way."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if libc.capset(struct.pack("<Ii", CAPABILITY_VERSION, 0), struct.pack("<6I", *[MAY_READ_ALL] * 2, *[0] * 4)):
        raise OSError(ctypes.get_errno(), "capset")


def lower_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def confine(seconds: int, num_bytes: int) -> str | None:
    """Give up rights; returns the reason if the network stays."""
    reason = leave_network()
    if os.geteuid() == 0:
        leave_root()
    lower_limit(resource.RLIMIT_CORE, 0)
    lower_limit(resource.RLIMIT_CPU, seconds)
    lower_limit(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)
    lower_limit(resource.RLIMIT_NOFILE, 64)
    lower_limit(resource.RLIMIT_NPROC, 0)  # neither processes nor threads
    with contextlib.suppress(ValueError, OSError):  # macOS limits time, not memory
        lower_limit(resource.RLIMIT_AS, num_bytes)
    return reason


def refuse_calls(directory: str) -> None:
    """Refuse Python's own calls for the network, for processes, and for changes outside a directory."""

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return True
        found = os.path.realpath(os.fsdecode(path))
        return found == os.devnull or os.path.commonpath([found, directory]) == directory

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            paths: tuple[Any, ...] = arguments[:1]
        elif event.startswith(CHANGES):
            paths = tuple(each for each in arguments if isinstance(each, str | bytes))
        else:
            return
        if not all(map(is_inside, paths)):
            raise PermissionError(f"{event} outside the temporary directory is not allowed here")

    sys.addaudithook(hook)


def run(code: str, tests: str) -> None:
    """Run code, then its tests; raise the first error."""
    namespace: dict[str, Any] = {"__name__": "response"}
    exec(compile(code, "response", "exec"), namespace)
    exec(compile(tests, "tests", "exec"), namespace)
    for name, value in [*namespace.items()]:
        if name.startswith("test") and callable(value):
            value()
        elif isinstance(value, type) and "unittest" in sys.modules:
            run_cases(value)


def run_cases(cases: type) -> None:
    import unittest

    if issubclass(cases, unittest.TestCase) and cases is not unittest.TestCase:
        result = unittest.defaultTestLoader.loadTestsFromTestCase(cases).run(unittest.TestResult())
        if not result.wasSuccessful():
            raise AssertionError(f"{cases.__name__} has failed")


def probe() -> dict[str, bool]:
    """Which limits hold against code that does not ask Python."""
    try:
        with socket.socket() as connection:
            connection.settimeout(1)
            connection.connect(("192.0.2.1", 9))  # reserved for documentation
        network = True
    except OSError as error:
        network = "unreachable" not in str(error)
    try:
        child = os.fork()
    except OSError:
        return {"network": network, "processes": False}
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return {"network": network, "processes": True}


def serve(request: dict[str, Any], write: Callable[[str], Any]) -> None:
    confine(request["seconds"], request["bytes"])
    if request.get("probes"):
        write(json.dumps(probe()))
        return
    refuse_calls(os.path.realpath(os.getcwd()))
    try:
        run(request["code"], request["tests"])
    except BaseException as error:  # also SystemExit
        write(f"failed {type(error).__name__}")
    else:
        write(request["token"])


if __name__ == "__main__":
    reply = os.fdopen(os.dup(1), "w")
    request = json.load(sys.stdin)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # the request holds the token
    os.dup2(null, 1)  # the code may print without end
    serve(request, reply.write)
    reply.flush()
    os._exit(0)  # past what the code leaves to do at exit
