"""How much a forward pass keeps, and what fits: by hand."""

import math

import pytest
import torch

import engine.memory
from engine.memory import FEWEST_TOKENS, SHARE, fitting, most_useful, saved_bytes
from tests.runs import Program
from trainers import BasicTrainer

CPU = torch.device("cpu")
STATE = 10**6
# Eleven blocks and the rest, 100 bytes each, hold 1200 bytes of a token; with n > 0 blocks checkpointed,
# 1200 - n * 100 * 11 / 12 + 100.
BYTES, BLOCKS, MOST = 1200, 11, 2048


def fits(room: float, wanted: int = 1000, checkpointed: int | None = None) -> tuple[int, int]:
    """What fits into room bytes of activations."""
    memory = math.ceil(STATE + room / SHARE)
    return fitting(memory, STATE, BYTES, BLOCKS, wanted=wanted, most=MOST, checkpointed=checkpointed)


def test_a_storage_is_counted_once_and_whole() -> None:
    values = torch.ones(10, requires_grad=True)  # 40 bytes
    big = torch.ones(100, dtype=torch.float64)  # 800 bytes

    def forward() -> torch.Tensor:
        exponentials = values.exp()  # keeps its output: 40 bytes
        product = values[:5] * exponentials.view(2, 5)[1]  # keeps parts of both, which are there already
        return (product * big[::20]).sum()  # keeps the factor that has no gradient, not the other

    assert saved_bytes(forward) == 40 + 40 + 800
    assert saved_bytes(lambda: (values + 1).sum()) == 0


def test_auto_recomputes_nothing_where_what_is_wanted_fits() -> None:
    assert fits(1000 * 1200) == (1000, 0)


@pytest.mark.parametrize("blocks, held", [(4, 1300 - 4 * 100 * 11 / 12), (11, 1300 - 11 * 100 * 11 / 12)])
def test_auto_recomputes_as_few_blocks_as_it_takes(blocks: int, held: float) -> None:
    assert fits(1000 * held) == (1000, blocks)


def test_with_more_memory_more_fits_and_less_is_recomputed() -> None:
    rooms = [room * 10**4 for room in range(1, 400)]
    for count in (0, 5, BLOCKS):
        tokens = [fits(room, checkpointed=count)[0] for room in rooms]
        assert tokens == sorted(tokens) and len(set(tokens)) > 40
    blocks = [fits(room)[1] for room in rooms]
    assert blocks == sorted(blocks, reverse=True) and {0, 2, 5, BLOCKS} <= set(blocks)


@pytest.mark.parametrize("count", [0, 1, 7, BLOCKS])
def test_a_given_count_is_kept_whether_it_suffices_or_not(count: int) -> None:
    assert fits(0, checkpointed=count) == (FEWEST_TOKENS, count)
    assert fits(10**9, checkpointed=count) == (MOST, count)


def test_auto_keeps_to_the_bounds() -> None:
    assert fits(10**9) == (MOST, 0)
    assert fits(0) == (FEWEST_TOKENS, BLOCKS)
    assert fits(-(10**5)) == (FEWEST_TOKENS, BLOCKS)  # not even the weights fit


def test_auto_makes_more_fit_than_a_cpu_would_run_at_a_time() -> None:
    """Such as an example that is longer than that, or the token_budget of the config."""
    wanted = 2 * MOST
    _, blocks = fits(wanted * 1000, wanted=wanted)
    assert blocks > 0


def test_a_cpu_runs_as_many_tokens_as_outweigh_the_gradients() -> None:
    assert most_useful(False, gradients=10**6, bytes_per_token=200.0) == 10**4
    assert most_useful(False, gradients=10**4, bytes_per_token=200.0) == 2048


def test_there_is_some_memory() -> None:
    assert 2**28 < engine.memory.total_memory(CPU) < 2**50


@pytest.mark.parametrize(
    "loss, copies",
    [(("loss=sft",), 4), (("loss=dpo", "loss.beta=0.1"), 4), (("loss=dpo", "loss.beta=0.1", "reference=live"), 5)],
)
def test_a_run_leaves_room_for_gradients_optimizer_and_reference(
    program: Program, monkeypatch: pytest.MonkeyPatch, loss: tuple[str, ...], copies: int
) -> None:
    """The memory is what these and the weights take (AdamW keeps two numbers of each weight), and 1000 tokens."""
    budgets = []
    fit_memory = BasicTrainer.fit_memory

    def fit(trainer: BasicTrainer) -> tuple[int, int]:
        weights = sum(parameter.nbytes for parameter in trainer.policy.parameters())
        per_token = weights / 1000
        monkeypatch.setattr(trainer, "bytes_per_token", lambda: per_token)
        total = copies * weights + 1000.5 * per_token / SHARE
        monkeypatch.setattr(trainer, "hardware", lambda: (False, int(total)))
        budgets.append(fit_memory(trainer))
        return budgets[-1]

    monkeypatch.setattr(BasicTrainer, "fit_memory", fit)
    options = ("optimizer=AdamW", "activation_checkpointing=false", "n_examples=4", "do_first_eval=false", "debug=true")
    program.ok(*loss, *options)
    assert budgets == [(1000, 0)]
