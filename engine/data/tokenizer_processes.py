"""Encodes texts in several processes: the tokenizer's threads share a lock, and stop at a few cores."""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORKER = Path(__file__).with_name("tokenizer_worker.py")
MAX_PROCESSES = 32
Request = tuple[Sequence[str], bool]  # texts, and whether their special tokens count
Encoded = tuple[np.ndarray, np.ndarray]  # int32 [all ids], int64 [texts]: their lengths


def num_processes() -> int:
    """Cores of this process, at most MAX_PROCESSES."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


def is_plain(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether its backend alone encodes texts: a subclass may change them."""
    from transformers import PreTrainedTokenizerFast

    same = ("_encode_plus", "set_truncation_and_padding", "__call__")
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name) for name in same
    )


def encode_in_processes(requests: Iterable[Request], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Encoded]:
    """The ids of the texts of each request, in order, without BOS and EOS.

    Args:
        tokenizer: one that is_plain.

    Raises:
        UserError: MEMORY if a process ends.
    """
    count = num_processes()
    state = as_line(tokenizer.backend_tokenizer.to_str())
    idle = SimpleQueue[subprocess.Popen[bytes]]()
    children = [_start() for _ in range(count)]
    for child in children:
        idle.put(child)
    ready = set[int]()  # ids of the processes that have the tokenizer

    def exchange(request: Request) -> Encoded:
        child = idle.get()
        assert child.stdin is not None and child.stdout is not None
        try:
            if child.pid not in ready:
                ready.add(child.pid)
                child.stdin.write(state)
            child.stdin.write(as_line(request))
            child.stdin.flush()
            num_ids, num_texts = json.loads(child.stdout.readline())
            ids, lengths = child.stdout.read(4 * num_ids), child.stdout.read(8 * num_texts)
            return np.frombuffer(ids, np.int32, num_ids), np.frombuffer(lengths, np.int64, num_texts)
        except (BrokenPipeError, ValueError) as error:  # no reply, or a part of one
            problem = f"tokenizing: a child process ended with status {child.wait()}; it may need more memory"
            raise UserError("MEMORY", problem, "free memory, or run on fewer cores (taskset)") from error
        finally:
            idle.put(child)

    waiting = deque[Future[Encoded]]()
    try:
        with ThreadPoolExecutor(count) as threads:
            for request in requests:
                waiting.append(threads.submit(exchange, request))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        for child in children:
            child.kill()
            with suppress(BrokenPipeError):  # text that it never read
                child.communicate()


def as_line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _start() -> subprocess.Popen[bytes]:
    # -P: modules beside the worker have names of the standard library.
    command = [sys.executable, "-P", str(WORKER)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
