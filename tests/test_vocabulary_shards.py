"""An LM head with its vocabulary split among ranks equals the full head."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

import engine.models.wide_products
import engine.step.logprobs
from engine.models.precision import low_weight
from engine.placement.rendezvous import choose_interface
from engine.step.layout import GroupSpan, Microbatch, empty_microbatch, lay_out
from engine.step.logprobs import VocabularyShard, chunked_head, sum_by_response
from engine.step.token_needs import ReferenceHead, TokenNeeds
from tests.models import VOCABULARY, pair_examples

SHARDS = [2, 3]  # of 31 and 30 tokens, and of 21, 21 and 19
# Targets per chunk, for groups of 16, 8, 4 and 6 targets:
# - 10**6: one chunk.
# - 12: the first group needs two slices, 12 + 4, so its logits are recomputed. Then chunks of 8 + 4 and of 6.
# - 2: all groups need several slices.
CHUNKS = [10**6, 12, 2]
CASES = [(bias, chunk) for bias in (False, True) for chunk in CHUNKS]
NEEDS = [(True, False), (False, True), (True, True)]  # of the confidence, of a reference
HIDDEN = 16
Results = dict[str, Tensor]


def head_results(
    batch: Microbatch,
    bias: bool,
    rows: slice = slice(None),
    shard: VocabularyShard | None = None,
    confidence: bool = False,
    compares: bool = False,
) -> Results:
    """Loss, log-probs and gradients of a head, or of some rows of it.

    Args:
        confidence: the loss reads the column "confidence".
        compares: the loss reads the columns "kl" and "reference" of another head.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (batch.input_ids.numel(), HIDDEN), "weight": (VOCABULARY, HIDDEN), "bias": (VOCABULARY,)}
    full = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    if not bias:
        del full["bias"]
    leaves = {name: (x if name == "hidden" else x[rows]).clone().requires_grad_() for name, x in full.items()}

    reference = torch.randn(VOCABULARY + batch.input_ids.numel(), HIDDEN, generator=generator, dtype=torch.float64)
    selected = reference[VOCABULARY:][batch.predict_index]
    needs = TokenNeeds(confidence, ReferenceHead(selected, reference[:VOCABULARY][rows], None) if compares else None)

    def span_loss(token_logps: Tensor, span: GroupSpan, **columns: Tensor) -> Tensor:
        assert batch.rejected is not None
        logps = sum_by_response(token_logps, batch.response_lengths[span.responses])
        chosen, rejected = (
            logps[role[span.examples] - span.responses.start] for role in (batch.chosen, batch.rejected)
        )
        return -F.logsigmoid(0.1 * (chosen - rejected)).sum() / 5 + sum(map(summed, columns.values()))

    arguments = (leaves["hidden"], leaves["weight"], leaves.get("bias"), batch)
    loss, logps = chunked_head(*arguments, span_loss, shard, needs=needs)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    with torch.no_grad():
        _, logps_alone = chunked_head(*arguments, shard=shard)
    return {"loss": loss.detach(), "logps": logps, "logps_alone": logps_alone, **gradients}


def summed(column: Tensor) -> Tensor:
    """Different weights for the tokens of a column, and a scalar."""
    return (column * column.detach().sin()).sum()


def head_of_copies() -> nn.Linear:
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0)))
    return head


def copy_of_shard(group: dist.ProcessGroup) -> Tensor:
    """This rank's bf16 copy of a head's weights."""
    head = head_of_copies()
    mesh = DeviceMesh.from_group(group, "cpu")
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    copy = low_weight(head, torch.bfloat16)
    assert copy is not None
    return copy


def run_rank(rank: int, directory: Path) -> None:
    """Compute and save the results of one rank. Runs in a process of its own."""
    torch.set_num_threads(1)
    choose_interface(is_single_machine=True)
    dist.init_process_group(
        "gloo", f"file://{directory}/store", timedelta(seconds=30), world_size=max(SHARDS), rank=rank
    )
    engine.step.logprobs.CHUNK_TOKENS = 1
    results: dict[tuple, Results] = {}
    for num_shards in SHARDS:
        group = dist.new_group(list(range(num_shards)))
        if rank >= num_shards:
            continue
        largest = -(-VOCABULARY // num_shards)
        shard = VocabularyShard(group, largest * rank, largest)
        rows = slice(shard.first, shard.first + largest)
        for bias, chunk in CASES:
            # The last rank has fewer logits per target, but must use the same chunks as the others.
            engine.step.logprobs.CHUNK_LOGITS = {"cpu": chunk * largest}
            results[num_shards, bias, chunk] = head_results(lay_out(pair_examples()), bias, rows, shard)
        with pytest.MonkeyPatch.context() as patch:  # rows as on a GPU: the next shard's tokens stand beyond the last
            patch.setattr(engine.models.wide_products, "has_wide_products", lambda device: True)
            results[num_shards, "rows of a GPU"] = head_results(lay_out(pair_examples()), True, rows, shard)
        for needs in NEEDS:
            engine.step.logprobs.CHUNK_LOGITS = {"cpu": 36 * largest}  # of 12 targets, with three buffers
            results[num_shards, needs] = head_results(lay_out(pair_examples()), True, rows, shard, *needs)
        results[num_shards, "copy"] = {"weight": copy_of_shard(group)}
        results[num_shards, "nothing"] = head_results(empty_microbatch(2), True, rows, shard)
    torch.save(results, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple, Results]]:
    """Results by case, for each rank."""
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.set_forkserver_preload([__name__])  # slow imports run once for all ranks
    torch.multiprocessing.start_processes(run_rank, (directory,), nprocs=max(SHARDS), start_method="forkserver")
    return [torch.load(directory / f"{rank}.pt") for rank in range(max(SHARDS))]


def assert_same(ours: Tensor, truth: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias, chunk", CASES)
@pytest.mark.parametrize("num_shards", SHARDS)
def test_a_split_vocabulary_equals_the_full_one(by_rank, num_shards: int, bias: bool, chunk: int) -> None:
    results = [results[num_shards, bias, chunk] for results in by_rank[:num_shards]]
    truth = head_results(lay_out(pair_examples()), bias)
    for name in ("loss", "logps", "logps_alone", "hidden"):  # the same on all ranks
        for result in results:
            assert_same(result[name], truth[name])
    for name in ("weight", "bias") if bias else ("weight",):
        assert [len(result[name]) for result in results] == ([31, 30] if num_shards == 2 else [21, 21, 19])
        assert_same(torch.cat([result[name] for result in results]), truth[name])


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("num_shards", SHARDS)
def test_columns_of_a_split_vocabulary_equal_those_of_the_full_one(
    by_rank, num_shards: int, needs: tuple[bool, bool]
) -> None:
    results = [results[num_shards, needs] for results in by_rank[:num_shards]]
    truth = head_results(lay_out(pair_examples()), True, slice(None), None, *needs)
    for name in ("loss", "logps", "hidden"):
        for result in results:
            assert_same(result[name], truth[name])
    for name in ("weight", "bias"):
        assert_same(torch.cat([result[name] for result in results]), truth[name])


@pytest.mark.parametrize("num_shards", SHARDS)
def test_shards_padded_for_a_gpu_equal_those_without(by_rank, num_shards: int) -> None:
    for results in by_rank[:num_shards]:
        padded, plain = results[num_shards, "rows of a GPU"], results[num_shards, True, CHUNKS[-1]]
        for name, value in padded.items():
            assert_same(value, plain[name])


@pytest.mark.parametrize("num_shards", SHARDS)
def test_shards_are_rounded_like_the_full_weight(by_rank, num_shards: int) -> None:
    full = low_weight(head := head_of_copies(), torch.bfloat16)
    assert full is not None and not torch.equal(full, head.weight.bfloat16())
    copies = [results[num_shards, "copy"]["weight"] for results in by_rank[:num_shards]]
    assert torch.equal(torch.cat(copies), full)


@pytest.mark.parametrize("num_shards", SHARDS)
def test_an_empty_microbatch_runs_on_shards(by_rank, num_shards: int) -> None:
    """A rank without examples still joins the collectives of its group."""
    for results in by_rank[:num_shards]:
        result = results[num_shards, "nothing"]
        assert result["loss"] == 0 and result["logps"].shape == (0,)
        assert not any(result[name].any() for name in ("hidden", "weight", "bias"))
