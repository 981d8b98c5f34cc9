"""Child process that renders chat templates within limits of the kernel: a line of JSON in, a line of JSON out.

engine/data/template_process.py starts it as a script, so it imports no module of this program.
"""

import contextlib
import json
import resource
import signal
import sys
import time
from typing import Any

MAX_ADDED = 100_000  # characters a template may add to
MAX_GROWTH = 10  # times its input


def render(variables: dict[str, Any], texts: list[dict[str, Any]], max_length: int) -> dict[str, Any]:
    """The reply: {"texts"}, {"error": what the template raises}, or {"limit": what it exceeds}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered = [render_jinja_template(**variables, **text)[0][0] for text in texts]
    except MemoryError:
        raise
    except Exception as error:  # templates raise anything
        return {"error": (str(error) or type(error).__name__)[:1000]}
    if max(map(len, rendered)) > max_length:
        return {"limit": f"writes more than {max_length:,} characters"}
    return {"texts": rendered}


def lower_limit(kind: int, value: int) -> None:
    """Lower a soft limit of this process; a lower hard limit stays."""
    _, hard = resource.getrlimit(kind)
    with contextlib.suppress(ValueError, OSError):  # macOS limits time, not memory
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def serve(max_seconds: int, max_bytes: int, idle_seconds: int) -> None:
    """Reply to each request until stdin ends or stays silent."""
    lower_limit(resource.RLIMIT_CORE, 0)
    import transformers.utils.chat_template_utils  # noqa: F401  before memory is limited

    lower_limit(resource.RLIMIT_AS, max_bytes)
    while True:
        signal.alarm(idle_seconds)  # ends this process
        line = sys.stdin.buffer.readline()
        signal.alarm(0)
        if not line:
            return
        lower_limit(resource.RLIMIT_CPU, int(time.process_time()) + max_seconds + 1)
        try:
            reply = json.dumps(render(**json.loads(line), max_length=MAX_ADDED + MAX_GROWTH * len(line)))
        except MemoryError:
            reply = json.dumps({"limit": f"needs more than {max_bytes / 2**30:g} GB of memory"})
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
