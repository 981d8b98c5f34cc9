"""Renders chat templates in a child process, so that none can loop or grow without end.

Jinja's sandbox keeps a template from files and code, but not from processor time and memory.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

MAX_SECONDS = 10  # processor time of one request
MAX_BYTES = 2 * 2**30  # memory of the child
IDLE_SECONDS = 20
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateLimit(Exception):
    """A template exceeds a limit of time, memory or length."""


class TemplateProcess:
    """The child: starts with the first request, ends when idle or when this process is gone."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, variables: dict[str, Any], texts: list[dict[str, Any]]) -> list[str]:
        """Render texts by one template.

        Args:
            variables: arguments of transformers' render_jinja_template for all texts, chat_template among them.
            texts: other arguments of each text: conversations (a list of one), add_generation_prompt.

        Raises:
            TemplateLimit: if a limit is exceeded.
            ValueError: with the message of an error that the template raises.
        """
        line = json.dumps({"variables": variables, "texts": texts}).encode() + b"\n"
        reply = self._exchange(line)
        while reply is None:
            reply = self._exchange(line)
        if "limit" in reply:
            self.close()
            raise TemplateLimit(reply["limit"])
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["texts"]

    def _exchange(self, line: bytes) -> dict[str, Any] | None:
        """Send a request; returns the reply, or None if the child was idle and has ended."""
        if self._child is None:
            self._child = self._start()
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        reply = b""
        try:
            try:
                child.stdin.write(line)
                child.stdin.flush()
                reply = child.stdout.readline()
            except BrokenPipeError:
                pass
            if reply.endswith(b"\n"):
                return json.loads(reply)
        except BaseException:  # else the next request would read this reply
            self.close()
            raise
        self._explain_end(child)
        return None

    def _start(self) -> "subprocess.Popen[bytes]":
        limits = [str(limit) for limit in (MAX_SECONDS, MAX_BYTES, IDLE_SECONDS)]
        # -P: modules beside the worker have names of the standard library. Signals of the terminal reach only parents.
        command = [sys.executable, "-P", str(WORKER), *limits]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def _explain_end(self, child: "subprocess.Popen[bytes]") -> None:
        """Raise an error unless the child ended because it was idle."""
        status = child.wait()
        self.close()
        if status == -signal.SIGXCPU:
            raise TemplateLimit(f"takes more than {MAX_SECONDS} s of processor time")
        if status < 0 and status != -signal.SIGALRM:  # short memory, or a stack that overflows
            raise TemplateLimit(f"ended its process with {signal.Signals(-status).name}")
        if status >= 0:
            raise RuntimeError(f"the process that renders chat templates ended with status {status}")

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def render_texts(variables: dict[str, Any], texts: list[dict[str, Any]]) -> list[str]:
    """Render texts in the child of this process; see TemplateProcess.render."""
    return _template_process(os.getpid()).render(variables, texts)


@functools.cache
def _template_process(pid: int) -> TemplateProcess:
    """The only child of a process, as its start takes a second; a fork gets its own."""
    return TemplateProcess()
