"""Saved bytes of a forward pass and the tokens that fit, by hand."""

import ctypes
import gc
import math
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine.placement.memory
import trainers
from engine.data.examples import Example
from engine.data.films import film_tokenizer
from engine.placement.memory import (
    FEWEST_TOKENS,
    MALLOC_VARIABLES,
    MMAP_THRESHOLD,
    SHARE,
    TRIM_THRESHOLD,
    keep_freed_memory,
    max_efficient_tokens,
    saved_bytes,
    tokens_that_fit,
)
from engine.placement.placement import Placement
from engine.placement.token_budget import halve_budget
from engine.step.microbatches import Batch, MicrobatchRunner
from tests.configs import make_settings
from tests.models import tiny_model
from tests.runs import Program
from utils import UserError

CPU = torch.device("cpu")
STATE = 10**6
# Eleven layers and the rest, 100 bytes each: 1200 bytes of activations a token. With n > 0 checkpointed layers:
# 1200 - n * 100 * 11 / 12 + 100.
BYTES_PER_TOKEN, LAYERS, MAX_TOKENS = 1200, 11, 2048


def fits(room: float, wanted: int = 1000, checkpointed: int | None = None) -> tuple[int, int]:
    """Tokens and checkpointed layers for `room` bytes of activations."""
    memory = math.ceil(STATE + room / SHARE)
    return tokens_that_fit(
        memory, STATE, BYTES_PER_TOKEN, LAYERS, wanted=wanted, most=MAX_TOKENS, checkpointed=checkpointed
    )


def test_a_storage_is_counted_once_in_full() -> None:
    values = torch.ones(10, requires_grad=True)  # 40 bytes
    big = torch.ones(100, dtype=torch.float64)  # 800 bytes

    def forward() -> torch.Tensor:
        exponentials = values.exp()  # keeps its output: 40 bytes
        product = values[:5] * exponentials.view(2, 5)[1]  # keeps parts of both, already counted
        return (product * big[::20]).sum()  # keeps the factor without a gradient only

    assert saved_bytes(forward) == 40 + 40 + 800
    assert saved_bytes(lambda: (values + 1).sum()) == 0


def test_counting_keeps_no_parameter() -> None:
    """A hook lives as long as its parameter."""

    class Hook:
        def __call__(self, gradient: torch.Tensor) -> None: ...

    def count() -> weakref.ref[Hook]:
        model, hook = tiny_model("llama"), Hook()
        model.get_input_embeddings().weight.register_hook(hook)
        input_ids = torch.zeros(1, 4, dtype=torch.int64)
        assert saved_bytes(lambda: model(input_ids, use_cache=False).logits.sum()) > 0
        return weakref.ref(hook)

    hook = count()
    gc.collect()
    assert hook() is None


GROWTH = """
import ctypes, process_start
process_start.forget_old_shapes()
import torch

fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
MemoryInfo = type("MemoryInfo", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
library = ctypes.CDLL(None)
library.mallinfo2.restype = MemoryInfo
torch.set_num_threads(1)
weight = torch.ones(256, 256, dtype=torch.bfloat16)

def used(rows):
    for number in rows:
        torch.ones(number, 256, dtype=torch.bfloat16) @ weight
    return library.mallinfo2().uordblks

start = used(range(100, 200))
print(used(range(200, 600)) - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="another C library, or an old one")
def test_rows_of_new_lengths_take_no_memory() -> None:
    """By default, kernels of 400 lengths take 200 MB."""

    def growth(**chosen: str) -> int:
        names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
        environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
        command = [sys.executable, "-c", GROWTH]
        return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    assert growth() < 5e6
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert growth(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024") > 5e7  # a user's own choice


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_freed_memory_serves_the_next_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of 64 MB has 16,384 pages."""
    for name in MALLOC_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    set_option = ctypes.CDLL(None).mallopt
    try:
        set_option(MMAP_THRESHOLD, 2**25)
        keep_freed_memory(torch.device("cuda"))
        assert min(new_pages() for _ in range(3)) > 10_000
        keep_freed_memory(torch.device("cpu"))
        assert min(new_pages() for _ in range(20)) < 1_000  # alignment costs bytes, so the first ones do not fit
    finally:
        set_option(MMAP_THRESHOLD, 2**25)
        set_option(TRIM_THRESHOLD, 2**26)


@pytest.mark.parametrize("name", [None, *MALLOC_VARIABLES])
def test_a_users_own_choice_of_malloc_stays(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in MALLOC_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "1")
    options: dict[int, int] = {}
    library = SimpleNamespace(mallopt=lambda option, value: options.setdefault(option, value))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    keep_freed_memory(torch.device("cpu"))
    assert len(options) == (2 if name is None else 0)


def test_an_old_glibc_gets_the_most_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else blocks of 128 kB and more would come from the system, each time."""
    for variable in MALLOC_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    options: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        if option == MMAP_THRESHOLD and value > 2**25:
            return 0
        options[option] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory(torch.device("cpu"))
    assert options == {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**31 - 1}


def test_auto_recomputes_nothing_if_the_wanted_tokens_fit() -> None:
    assert fits(1000 * 1200) == (1000, 0)


@pytest.mark.parametrize("layers, held", [(4, 1300 - 4 * 100 * 11 / 12), (11, 1300 - 11 * 100 * 11 / 12)])
def test_auto_recomputes_the_minimum_of_layers(layers: int, held: float) -> None:
    assert fits(1000 * held) == (1000, layers)


def test_more_memory_fits_more_tokens_and_recomputes_less() -> None:
    rooms = [room * 10**4 for room in range(1, 400)]
    for count in (0, 5, LAYERS):
        tokens = [fits(room, checkpointed=count)[0] for room in rooms]
        assert tokens == sorted(tokens) and len(set(tokens)) > 40
    layers = [fits(room)[1] for room in rooms]
    assert layers == sorted(layers, reverse=True) and {0, 2, 5, LAYERS} <= set(layers)


@pytest.mark.parametrize("count", [0, 1, 7, LAYERS])
def test_a_given_number_of_layers_is_never_changed(count: int) -> None:
    assert fits(0, checkpointed=count) == (FEWEST_TOKENS, count)
    assert fits(10**9, checkpointed=count) == (MAX_TOKENS, count)


def test_auto_keeps_to_the_bounds() -> None:
    assert fits(10**9) == (MAX_TOKENS, 0)
    assert fits(0) == (FEWEST_TOKENS, LAYERS)
    assert fits(-(10**5)) == (FEWEST_TOKENS, LAYERS)  # not even the weights fit


def test_auto_recomputes_for_long_examples() -> None:
    """Such as a longer example, or the token_budget of the config."""
    wanted = 2 * MAX_TOKENS
    _, layers = fits(wanted * 1000, wanted=wanted)
    assert layers > 0


def test_ranks_agree_on_what_fits_the_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = Placement(make_settings("activation_checkpointing=auto"), film_tokenizer(), tmp_path)
    monkeypatch.setattr(placement, "bytes_per_token", lambda *arguments: 1000.0)
    monkeypatch.setattr(placement, "memory", lambda: (False, 10**9))
    monkeypatch.setattr(placement, "gather_from_data_ranks", lambda fit: [fit, (1700, 2), (1600, 1)])
    runner = SimpleNamespace(policy=tiny_model("llama"))
    assert trainers.fit_memory(placement, runner, []) == (1600, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "budget, sizes, expected",
    [(4096, [(300, 2), (200, 3)], 150), (250, [(300, 2)], 125), (4096, [(300, 1), (200, 2)], 150), (1, [(9, 2)], 1)],
)
def test_a_halved_budget_splits_the_largest_microbatch(
    budget: int, sizes: list[tuple[int, int]], expected: int
) -> None:
    """Half of a budget far above the largest microbatch would split nothing."""
    microbatches = [
        (SimpleNamespace(num_tokens=tokens, num_examples=examples, num_turns=0), None) for tokens, examples in sizes
    ]
    batch = Batch([], budget, microbatches)  # type: ignore[arg-type]
    assert halve_budget(budget, batch, "no room", make_settings("loss=dpo", "loss.beta=0.1").loss) == expected


@pytest.mark.parametrize("num_turns", [0, 5])
def test_one_example_at_a_time_is_the_end_of_halving(num_turns: int) -> None:
    """Earlier turns of a dialogue cannot run apart."""
    microbatches = [(SimpleNamespace(num_tokens=9, num_examples=1 + num_turns, num_turns=num_turns), None)]
    with pytest.raises(UserError, match=r"one example at a time \(no room\)") as raised:
        halve_budget(4096, Batch([], 4096, microbatches), "no room", make_settings("loss=sft").loss)  # type: ignore[arg-type]
    assert raised.value.code == "MEMORY"


def test_sampled_responses_are_halved_until_each_is_alone() -> None:
    def batch(num_samples: int) -> Batch:
        samples = SimpleNamespace(lengths=torch.ones(num_samples))
        return Batch([], 4096, [(SimpleNamespace(num_tokens=100, num_examples=1, num_turns=0, samples=samples), None)])  # type: ignore

    loss = make_settings("loss=grpo").loss
    assert halve_budget(4096, batch(2), "no room", loss) == 50
    with pytest.raises(UserError, match=r"one response at a time \(no room\)") as raised:
        halve_budget(50, batch(1), "no room", loss)
    assert "rollout.max_new_tokens" in raised.value.fix
    with pytest.raises(UserError, match="one example at a time"):  # the loss compares its responses
        halve_budget(50, batch(2), "no room", make_settings("loss=online_dpo").loss)


def test_a_cpu_runs_enough_tokens_to_outweigh_the_gradients() -> None:
    assert max_efficient_tokens(False, gradients=10**6, bytes_per_token=200.0) == 10**4
    assert max_efficient_tokens(False, gradients=10**4, bytes_per_token=200.0) == 2048


def test_total_memory_is_plausible() -> None:
    assert 2**28 < engine.placement.memory.total_memory(CPU) < 2**50


@pytest.mark.parametrize(
    "loss, copies",
    [(("loss=sft",), 4), (("loss=dpo", "loss.beta=0.1"), 4), (("loss=dpo", "loss.beta=0.1", "reference=live"), 5)],
)
def test_a_run_leaves_room_for_gradients_optimizer_and_reference(
    program: Program, monkeypatch: pytest.MonkeyPatch, loss: tuple[str, ...], copies: int
) -> None:
    """Memory holds these, the weights and 1000 tokens; AdamW keeps two numbers per weight."""
    budgets = []
    fit_memory = trainers.fit_memory

    def fit(
        placement: Placement, runner: MicrobatchRunner, examples: Sequence[Example], other_bytes: float
    ) -> tuple[int, int]:
        weights = sum(parameter.nbytes for parameter in runner.policy.parameters())
        per_token = weights / 1000
        monkeypatch.setattr(placement, "bytes_per_token", lambda *arguments: per_token)
        total = copies * weights + 1000.5 * per_token / SHARE
        monkeypatch.setattr(placement, "memory", lambda: (False, int(total)))
        budgets.append(fit_memory(placement, runner, examples, other_bytes))
        return budgets[-1]

    monkeypatch.setattr(trainers, "fit_memory", fit)
    options = ("optimizer=AdamW", "activation_checkpointing=false", "n_examples=4", "do_first_eval=false", "debug=true")
    program.ok(*loss, *options)
    assert budgets == [(1000, 0)]
