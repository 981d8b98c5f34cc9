"""Where a step's time on a CPU goes, by the names of its operations.

Times are of one thread, and of operations without those that they call. Time outside of all operations is Python's.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.gpu_profile import HEAD, head_marked, most, trace_events

ATTENTION, ROUNDING, OPTIMIZER, PYTHON = "attention", "rounding of weights", "optimizer", "Python"
MARKED = (HEAD, ATTENTION, ROUNDING)
# Of operations outside of marks, by name; the first match counts.
GROUPS = {
    OPTIMIZER: r"^Optimizer\.step|^aten::(linalg_vector_norm|_foreach|_fused_adam)",
    "GEMM": r"^aten::(mm|addmm|bmm|baddbmm|matmul|linear|mv)|^mkldnn|^onednn",
    "embeddings": r"^aten::(embedding|index)",
    "casts and copies": r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|fill_|zero_|zeros|empty)",
    "elementwise": r"^(aten|torch)",
    PYTHON: r"",  # wrappers of autograd, and the like
}
Interval = tuple[float, float, str]  # start, end, name; microseconds


def grouped_seconds(step: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of a step by group, and its longest operations."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU]) as profiler, _marked(), record_function("step"):
        step()
    return group_events(trace_events(profiler))


@contextmanager
def _marked() -> Iterator[None]:
    """Mark the head, attention and the rounding of weights in the profile."""
    from torch.profiler import record_function

    from engine.models import precision
    from engine.step import attention

    def mark(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*arguments: Any, **options: Any) -> Any:
            with record_function(name):
                return original(*arguments, **options)

        return marked

    function = attention._PackedAttention
    targets: list[tuple[str, Any, str]] = [(ROUNDING, precision, "cast")]
    targets += [(ATTENTION, function, "forward"), (ATTENTION, function, "backward")]
    with ExitStack() as stack:
        stack.enter_context(head_marked())
        for group, owner, name in targets:
            marked = mark(group, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, staticmethod(marked) if owner is function else marked))
        yield


def group_events(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Group the operations inside of `step` in a trace in Chrome's format; times there are in microseconds."""
    wanted = ("cpu_op", "user_annotation")
    found = [event for event in events if event.get("cat") in wanted]
    whole = next(event for event in found if event["name"] == "step")
    intervals = sorted(
        (
            (event["ts"], event["ts"] + event["dur"], event["name"])
            for event in found
            if event["tid"] == whole["tid"] and whole["ts"] <= event["ts"] < whole["ts"] + whole["dur"]
        ),
        key=lambda interval: (interval[0], -interval[1]),
    )
    groups: dict[str, float] = defaultdict(float)
    longest: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for group, name, seconds in _own_seconds(intervals):
        groups[group] += seconds
        longest[f"{group}: {name[:120]}"][0] += seconds
        longest[f"{group}: {name[:120]}"][1] += 1
    total = sum(groups.values())
    return {
        "seconds": {name: round(value, 5) for name, value in sorted(groups.items(), key=lambda item: -item[1])},
        "shares": {name: round(value / total, 3) for name, value in groups.items()},
        "total": round(total, 5),
        "longest": most(longest, 30),
    }


def _own_seconds(intervals: list[Interval]) -> Iterator[tuple[str, str, float]]:
    """Yield (group, name, seconds without nested operations) of nested intervals, in order."""
    stack: list[list[Any]] = []  # group, name, end, seconds

    def close(until: float) -> Iterator[tuple[str, str, float]]:
        while stack and stack[-1][2] <= until:
            group, name, _, seconds = stack.pop()
            yield group, name, seconds

    for start, end, name in intervals:
        yield from close(start)
        group = name if name in MARKED else _group_of(name)
        if stack:
            stack[-1][3] -= (end - start) / 1e6
            if stack[-1][0] in (*MARKED, OPTIMIZER):  # all that they call
                group = stack[-1][0]
        stack.append([group, name, end, (end - start) / 1e6])
    yield from close(float("inf"))


def _group_of(name: str) -> str:
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name))


def print_profile(name: str, found: dict[str, Any]) -> None:
    shares = sorted(found["shares"].items(), key=lambda item: -item[1])
    print(f"\n{name}, {found['total']:.3f} s: " + ", ".join(f"{group} {share:.0%}" for group, share in shares))
