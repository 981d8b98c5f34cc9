"""Where a step's time on a GPU goes, by the names of its kernels."""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

# The first match counts. Kernels of the LM head are told by their time, see head_marked.
GROUPS = {
    "attention": r"flash|fmha|attention|softmax_warp",
    "gemm": r"gemm|nvjet|cutlass|xmma|sm90_|sm80_|cublas|splitk",
    "dequantize": r"dequant",
    "optimizer": r"multi_tensor|fused_?adam|rmsprop|optimizer",
    "index": r"index|gather|scatter|embedding|sort|radix|unique",
    "copy": r"memcpy|memset|copy",
    "elementwise": r"",
}
HEAD = "head"


def grouped_seconds(step: Callable[[], Any], on_gpu: bool) -> dict[str, Any]:
    """Seconds of a step by group of kernels, the longest kernels, and what the host calls of CUDA."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler, head_marked():
        step()
    return group_events(trace_events(profiler))


def trace_events(profiler: Any) -> list[dict[str, Any]]:
    """The events of a finished torch.profiler.profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


@contextmanager
def head_marked() -> Iterator[None]:
    """Mark the work of the LM head in the profile."""
    import torch

    from engine.step.logprobs import _ChunkedHead

    original = _ChunkedHead.forward

    def marked(*arguments: Any) -> Any:
        with torch.profiler.record_function(HEAD):
            return original(*arguments)

    with patch.object(_ChunkedHead, "forward", staticmethod(marked)):
        yield


def group_events(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Group the kernels of a trace in Chrome's format; times there are in microseconds."""
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    heads = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "gpu_user_annotation" and event["name"] == HEAD
    ]
    groups: dict[str, float] = defaultdict(float)
    longest: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    end_of_last, busy = 0.0, 0.0
    for kernel in sorted(kernels, key=lambda event: event["ts"]):
        start, end = kernel["ts"], kernel["ts"] + kernel["dur"]
        busy += max(0.0, end - max(start, end_of_last))
        end_of_last = max(end_of_last, end)
        is_head = any(first <= start < last for first, last in heads)
        group = HEAD if is_head else _group_of(kernel["name"])
        groups[group] += kernel["dur"] / 1e6
        longest[f"{group}: {kernel['name'][:120]}"][0] += kernel["dur"] / 1e6
        longest[f"{group}: {kernel['name'][:120]}"][1] += 1
    calls: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            calls[event["name"]][0] += event["dur"] / 1e6
            calls[event["name"]][1] += 1
    span = end_of_last - min((event["ts"] for event in kernels), default=0.0)
    return {
        "seconds": {name: round(value, 5) for name, value in sorted(groups.items(), key=lambda item: -item[1])},
        "idle": round(max(0.0, span - busy) / 1e6, 5),
        "span": round(span / 1e6, 5),
        "num_kernels": len(kernels),
        "longest": most(longest, 25),
        "calls_of_the_host": most(calls, 8),
    }


def most(totals: dict[str, list[float]], count: int) -> dict[str, list[float]]:
    """The largest of name -> (seconds, calls)."""
    largest = sorted(totals.items(), key=lambda item: -item[1][0])[:count]
    return {name: [round(seconds, 5), number] for name, (seconds, number) in largest}


def _group_of(name: str) -> str:
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))
