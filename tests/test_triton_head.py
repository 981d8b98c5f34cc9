"""The kernels of the head and their readable twin, softmax_, against each other and against autograd in fp64.

Without a GPU the kernels run under Triton's interpreter, in another process. The first import of triton chooses the
interpreter. In this process transformers may have imported it, and other tests need the compiler.
"""

import importlib.util
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.step.logprobs
from engine.step import head_kernels
from engine.step.head_kernels import gradient_of_logits, has_triton, normalize
from engine.step.layout import lay_out
from engine.step.logprobs import chunked_head, softmax_
from tests.models import VOCABULARY, pair_examples
from utils import has_c_compiler

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the gradient's cast to its dtype: half a unit in the last place, and one more where last bits in fp32 differ.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Kernels:
    """Runs functions on a device, in a process with working kernels."""

    def __init__(self, device: str, pool: ProcessPoolExecutor | None = None):
        self.device = torch.device(device)
        self.pool = pool

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        # Torch shares the memory of tensors with the other process. Writes to `out` there are visible here.
        return function(*arguments) if self.pool is None else self.pool.submit(function, *arguments).result(60)


@pytest.fixture(scope="module", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    pytest.importorskip("triton")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield Kernels("cuda")
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result(60)  # the first call starts the process, with this environment
        yield Kernels("cpu", pool)


def random_case(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and targets."""
    generator = torch.Generator().manual_seed(rows * vocabulary)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[-1] = vocabulary - 1  # in the tail of the last block
    return logits, targets


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of targets and the gradient of their sum with respect to logits in fp64, by autograd."""
    logits = logits.detach().double().requires_grad_()
    token_logps = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (gradient,) = torch.autograd.grad(token_logps.sum(), logits)
    return token_logps.detach(), gradient


def assert_close(actual: Tensor, expected: Tensor, relative: float, absolute: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=absolute)


@pytest.mark.parametrize("vocabulary", [7, 1000, 50257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_twin_matches_log_softmax_and_its_gradient(vocabulary: int, dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    logits, targets = random_case(3, vocabulary, dtype)
    truth, gradient = exact(logits, targets)
    for out_dtype in [dtype, torch.bfloat16, torch.float16]:
        token_logps, gradient_in = softmax_(logits.clone(), targets)
        out = gradient_in(out_dtype)
        assert token_logps.dtype == dtype and out.dtype == out_dtype
        assert_close(token_logps, truth, tolerance, tolerance)
        assert_close(out, gradient, tolerance + ROUNDING[out_dtype], 1e-6 if out_dtype == torch.float16 else tolerance)


@pytest.mark.parametrize("rows, vocabulary", [(1, 7), (5, 7), (2, 1000), (3, 8192), (2, 50257)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_match_their_twin_and_autograd(
    kernels: Kernels, rows: int, vocabulary: int, dtype: torch.dtype
) -> None:
    logits, targets = (tensor.to(kernels.device) for tensor in random_case(rows, vocabulary, dtype))
    truth, gradient = exact(logits, targets)
    twin_logps, twin_gradient = softmax_(logits.to(torch.float32, copy=True), targets)
    twin = twin_gradient(torch.float32)
    normalizer, target_logits = kernels(normalize, logits, targets)
    assert normalizer.dtype == target_logits.dtype == torch.float32
    assert_close(normalizer, logits.double().logsumexp(-1), 1e-6, 1e-6)
    assert torch.equal(target_logits, logits.gather(-1, targets[:, None]).squeeze(-1).float())
    assert_close(target_logits - normalizer, twin_logps, 3e-6, 3e-6)
    assert_close(target_logits - normalizer, truth, 3e-6, 3e-6)
    for out_dtype in [torch.float32, torch.bfloat16]:
        out = torch.full_like(logits, torch.nan, dtype=out_dtype)
        kernels(gradient_of_logits, logits, normalizer, targets, out)
        assert_close(out, twin, 1e-5 + ROUNDING[out_dtype], 1e-6)
        assert_close(out, gradient, 3e-6 + ROUNDING[out_dtype], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_rows_are_overwritten_in_place(kernels: Kernels, dtype: torch.dtype) -> None:
    logits, targets = (tensor.to(kernels.device) for tensor in random_case(4, 1000, dtype))
    buffer = torch.full((4, 1003), 9.0, dtype=dtype, device=kernels.device)
    view = buffer[:, 1:1001]
    view.copy_(logits)
    normalizer, target_logits = kernels(normalize, view, targets)
    assert_close(normalizer, logits.double().logsumexp(-1), 1e-6, 1e-6)
    assert torch.equal(target_logits, logits.gather(-1, targets[:, None]).squeeze(-1).float())
    packed = torch.empty_like(logits)  # another row stride than the view
    kernels(gradient_of_logits, view, normalizer, targets, packed)
    kernels(gradient_of_logits, view, normalizer, targets, view)
    assert_close(view, exact(logits, targets)[1], 3e-6 + ROUNDING[dtype], 1e-6)
    assert torch.equal(packed, view)
    assert (buffer[:, 0] == 9).all() and (buffer[:, 1001:] == 9).all()


def test_extreme_logits(kernels: Kernels) -> None:
    vocabulary = 20000
    logits = torch.zeros(7, vocabulary, device=kernels.device)
    logits[0, 3] = 1e4  # the maximum in the first block, in the last, everywhere
    logits[1, -1] = 1e4
    logits[2] = -1e4
    logits[3] = torch.linspace(-1e4, 1e4, vocabulary)  # rising
    logits[4, 0] = 3e38
    logits[5, :-5] = -torch.inf  # in full blocks, from the first on
    logits[6, 17] = torch.nan
    targets = torch.tensor([3, 5, 7, 19990, 0, 19999, 1], device=kernels.device)
    normalizer, target_logits = kernels(normalize, logits, targets)
    assert_close(normalizer[:6], logits[:6].double().logsumexp(-1), 1e-6, 0)
    assert target_logits.tolist()[:2] == [1e4, 0]
    out = torch.empty_like(logits)
    kernels(gradient_of_logits, logits, normalizer, targets, out)
    _, gradient = exact(logits, targets)
    # The normalizer of logits about 1e4 is rounded to 1e-3, and with it the softmax.
    assert_close(out[:6], gradient[:6], 1e-3, 1e-6)
    assert normalizer[6].isnan() and out[6].isnan().all()  # never a finite loss from a broken model


def far_rows(device: torch.device) -> tuple[Tensor, Tensor]:
    """Normalizers and in-place gradients of three rows. The last row starts past 2**31 logits."""
    logits, targets = (tensor.to(device) for tensor in random_case(3, 1000, torch.bfloat16))
    stride = 2**30 + 8
    storage = torch.empty(2 * stride + 1000, dtype=logits.dtype, device=device)  # only written pages take memory
    far = storage.as_strided((3, 1000), (stride, 1))
    far.copy_(logits)
    normalizer, _ = normalize(far, targets)
    gradient_of_logits(far, normalizer, targets, far)
    return normalizer, far.clone()


def test_offsets_past_32_bits(kernels: Kernels) -> None:
    normalizer, gradient = kernels(far_rows, kernels.device)
    logits, targets = random_case(3, 1000, torch.bfloat16)
    assert_close(normalizer.cpu(), logits.double().logsumexp(-1), 1e-6, 1e-6)
    assert_close(gradient.cpu(), exact(logits, targets)[1], 3e-6 + ROUNDING[torch.bfloat16], 1e-6)


def compile_for_a_gpu(name: str, dtype: str, divisible: tuple[str, ...]) -> str:
    """Compile a kernel for pointers of 16 bytes, without a GPU.

    Args:
        divisible: numbers that are multiples of 16.

    Returns:
        its PTX.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(head_kernels, f"_{name}_kernel")
    block, warps = (getattr(head_kernels, f"{name.upper()}_{value}") for value in ("BLOCK", "WARPS"))
    pointers = {"logits": f"*{dtype}", "targets": "*i64", "out": "*bf16"}
    signature = {
        name: "i32" if name in ("vocabulary", "row_stride", "out_stride") else pointers.get(name, "*fp32")
        for name in kernel.arg_names
        if name != "block"
    }
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | {*divisible}
    hints = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(kernel, {**signature, "block": "constexpr"}, {"block": block}, hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["normalize", "gradient"])
def test_kernels_compile_for_a_gpu(name: str, dtype: str, tmp_path, monkeypatch) -> None:
    """The compiler is stricter than the interpreter, and needs no GPU. Rows of 16 logits are loaded in wide pieces."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "ld.global.v4" not in compile_for_a_gpu(name, dtype, ("row_stride", "out_stride"))
    ptx = compile_for_a_gpu(name, dtype, ("vocabulary", "row_stride", "out_stride"))
    assert "ld.global.v4" in ptx and ("st.global.v4" in ptx) == (name == "gradient")


def test_padding_of_minus_infinity_is_no_token(kernels: Kernels) -> None:
    """The head pads rows to a multiple."""
    logits, targets = (tensor.to(kernels.device) for tensor in random_case(3, 1000))
    padded = torch.nn.functional.pad(logits, (0, 24), value=-torch.inf)
    normalizer, _ = kernels(normalize, padded, targets)
    assert_close(normalizer, logits.double().logsumexp(-1), 1e-6, 1e-6)
    out = torch.full_like(padded, torch.nan, dtype=torch.bfloat16)
    kernels(gradient_of_logits, padded, normalizer, targets, out)
    assert_close(out[:, :1000], exact(logits, targets)[1], 3e-6 + ROUNDING[torch.bfloat16], 1e-6)
    assert (out[:, 1000:] == 0).all()


def test_without_triton_there_are_no_kernels(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("triton_head_alone", head_kernels.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.has_triton(torch.device("cuda"))


def test_compilers_are_looked_up_once(monkeypatch) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr(shutil, "which", looked_up.append)
    monkeypatch.delenv("CC", raising=False)
    has_c_compiler.cache_clear()
    assert not has_triton(torch.device("cuda")) and not has_triton(torch.device("cuda", 1))
    has_c_compiler.cache_clear()
    assert len(looked_up) in (0, 2)  # none without Triton


def test_kernels_are_for_gpus_only() -> None:
    assert not has_triton(torch.device("cpu"))
    assert has_triton(torch.device("cuda", 1)) == (importlib.util.find_spec("triton") is not None)


def head_results(device: torch.device, has_kernels: bool) -> list[Tensor]:
    """Loss, log-probs and gradients of the head, with or without the kernels."""
    batch = lay_out(pair_examples()).to(device)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = leaves = [
        torch.randn(count, 16, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for count in (batch.num_tokens, VOCABULARY)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.step.logprobs, "has_triton", lambda device: has_kernels)
        loss, logps = chunked_head(hidden, weight, None, batch, lambda logps, span: (0.1 * logps).sigmoid().sum())
    loss.backward()
    return [loss.detach(), logps, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_the_head_is_the_same_with_and_without_kernels(kernels: Kernels) -> None:
    ours = kernels(head_results, kernels.device, True)
    plain = head_results(kernels.device, False)
    assert len(ours) == 4
    for value, expected in zip(ours, plain, strict=True):
        tolerance = 1e-5 if value.dtype == torch.float32 else 0.01
        assert ((value - expected).float().norm() / expected.float().norm()).item() < tolerance
