"""Rounding by thresholds in one kernel, against its readable twin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.models import rounding_kernel
from engine.models.rounding import embedding_thresholds, round_by, weight_thresholds
from engine.models.rounding_kernel import BLOCK
from tests.test_rmsprop_kernel import run  # noqa: F401  the fixture


def both_copies(device: torch.device, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The bits of the kernel's copy and of the twin's."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 10 ** (torch.rand(shape, generator=generator) * 60 - 40)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, -3.4e38])[: values.numel()]
    values.view(-1)[: len(odd)] = odd
    thresholds = weight_thresholds("weight", values)
    if len(shape) == 3:  # embeddings of tokens
        thresholds = embedding_thresholds(torch.arange(shape[0] * shape[1]).view(shape[:2]) % 7, 7, values)
    ours = rounding_kernel.round_by(values.to(device), *(part.to(device) for part in thresholds))
    return ours.cpu().view(torch.int16).tolist(), round_by(values, thresholds).view(torch.int16).tolist()


@pytest.mark.parametrize(
    "shape", [(1,), (7, 3), (BLOCK,), (3, 2 * BLOCK + 5), (2, 3, 40), (0,), (0, 4), (4, 0)], ids=str
)
def test_the_kernel_rounds_as_its_twin(shape: tuple[int, ...], run: Callable[..., Any]) -> None:  # noqa: F811
    ours, twin = run(both_copies, shape)
    assert ours == twin


def test_the_kernel_runs_on_gpus_alone() -> None:
    assert not rounding_kernel.runs_on(torch.zeros(2, 2))


def test_the_kernel_compiles_for_a_gpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is stricter than the interpreter, and needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = {"values": "*fp32", "rows": "*i32", "columns": "*i32", "copy": "*i16", "num_columns": "i32"}
    source = ASTSource(rounding_kernel._round_kernel, {**names, "block": "constexpr"}, {"block": BLOCK})
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
