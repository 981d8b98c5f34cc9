"""An LM head whose vocabulary is split among processes gives what the whole one gives."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

import engine.logprobs
from engine.batching import Microbatch, Part, lay_out, lay_out_nothing
from engine.distributed import choose_interface
from engine.logprobs import VocabularyShard, chunked_head
from tests.models import VOCABULARY, pair_examples

SHARDS = [2, 3]  # of 31 and 30 tokens, and of 21, 21 and 19
# Targets whose logits are held at a time. Groups have 16, 8, 4 and 6: all at once, two spans, a chunk and another, and
# spans only.
CHUNKS = [10**6, 12, 2]
CASES = [(bias, chunk) for bias in (False, True) for chunk in CHUNKS]
HIDDEN = 16
Results = dict[str, Tensor]


def head_results(
    batch: Microbatch, bias: bool, own: slice = slice(None), shard: VocabularyShard | None = None
) -> Results:
    """Loss, log-probs and gradients of a head, or of the part of it that is own."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (batch.input_ids.numel(), HIDDEN), "weight": (VOCABULARY, HIDDEN), "bias": (VOCABULARY,)}
    full = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    if not bias:
        del full["bias"]
    leaves = {name: (x if name == "hidden" else x[own]).clone().requires_grad_() for name, x in full.items()}

    def objective(logps: Tensor, part: Part) -> Tensor:
        assert batch.rejected is not None
        chosen, rejected = (
            logps[role[part.examples] - part.responses.start] for role in (batch.chosen, batch.rejected)
        )
        return -F.logsigmoid(0.1 * (chosen - rejected)).sum() / 5

    arguments = (leaves["hidden"], leaves["weight"], leaves.get("bias"), batch)
    loss, logps = chunked_head(*arguments, objective, shard)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    with torch.no_grad():
        _, logps_alone = chunked_head(*arguments, shard=shard)
    return {"loss": loss.detach(), "logps": logps, "logps_alone": logps_alone, **gradients}


def run_rank(rank: int, directory: Path) -> None:
    """Compute and save what rank has of all cases; a process calls this."""
    torch.set_num_threads(1)
    choose_interface(is_single_machine=True)
    dist.init_process_group(
        "gloo", f"file://{directory}/store", timedelta(seconds=30), world_size=max(SHARDS), rank=rank
    )
    engine.logprobs.CHUNK_TOKENS = 1
    results = {}
    for num_shards in SHARDS:
        group = dist.new_group(list(range(num_shards)))
        if rank >= num_shards:
            continue
        largest = -(-VOCABULARY // num_shards)
        shard = VocabularyShard(group, largest * rank, largest)
        own = slice(shard.first, shard.first + largest)
        for bias, chunk in CASES:
            # The last process, with fewer logits of each target, must take as many targets at a time as the others.
            engine.logprobs.CHUNK_LOGITS = {"cpu": chunk * largest}
            results[num_shards, bias, chunk] = head_results(lay_out(pair_examples()), bias, own, shard)
        results[num_shards, "nothing"] = head_results(lay_out_nothing(2), True, own, shard)
    torch.save(results, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple, Results]]:
    """What each process has of each case."""
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.set_forkserver_preload([__name__])  # the imports, of seconds, are made once for all
    torch.multiprocessing.start_processes(run_rank, (directory,), nprocs=max(SHARDS), start_method="forkserver")
    return [torch.load(directory / f"{rank}.pt") for rank in range(max(SHARDS))]


def assert_same(ours: Tensor, truth: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias, chunk", CASES)
@pytest.mark.parametrize("num_shards", SHARDS)
def test_a_split_vocabulary_is_the_whole_one(by_rank, num_shards: int, bias: bool, chunk: int) -> None:
    results = [results[num_shards, bias, chunk] for results in by_rank[:num_shards]]
    truth = head_results(lay_out(pair_examples()), bias)
    for name in ("loss", "logps", "logps_alone", "hidden"):  # which all processes have
        for result in results:
            assert_same(result[name], truth[name])
    for name in ("weight", "bias") if bias else ("weight",):
        assert [len(result[name]) for result in results] == ([31, 30] if num_shards == 2 else [21, 21, 19])
        assert_same(torch.cat([result[name] for result in results]), truth[name])


@pytest.mark.parametrize("num_shards", SHARDS)
def test_nothing_is_split_too(by_rank, num_shards: int) -> None:
    """A process without examples meets the others of its group all the same."""
    for results in by_rank[:num_shards]:
        result = results[num_shards, "nothing"]
        assert result["loss"] == 0 and result["logps"].shape == (0,)
        assert not any(result[name].any() for name in ("hidden", "weight", "bias"))
