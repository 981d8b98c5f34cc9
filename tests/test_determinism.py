"""deterministic=true on a GPU, and the memory settings of processes, as far as a CPU can tell."""

import os
from collections.abc import Iterator

import pytest
import torch

import process_start
from engine.placement.determinism import set_deterministic
from engine.run.failures import as_user_error
from tests.runs import Program


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Restores torch's global switches."""
    yield
    torch.use_deterministic_algorithms(False)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_on", [True, False])
def test_torch_is_deterministic_on_gpus_alone(monkeypatch: pytest.MonkeyPatch, is_on: bool, device: str) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(not is_on)  # of the previous job of a sweep
    set_deterministic(is_on, torch.device(device))
    expected = is_on and device == "cuda"
    assert torch.are_deterministic_algorithms_enabled() == expected
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash attention would stay as it is
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if expected else None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_another_workspace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_deterministic(True, torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_no_operation_lacks_a_deterministic_form(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU. The losses are those without it."""
    arguments = (
        "loss=dpo",
        "loss.beta=0.1",
        "sample_during_eval=true",
        "max_length=280",
        "n_eval_model_samples=1",
        "n_examples=8",
    )
    plain = program.ok(*arguments)
    calls = []

    def switch_on(is_on: bool, device: torch.device) -> None:
        calls.append((is_on, device.type))
        torch.use_deterministic_algorithms(True)

    monkeypatch.setattr("trainers.set_deterministic", switch_on)
    run = program.ok(*arguments, "deterministic=true")
    assert calls == [(True, "cpu")]
    assert [row["loss/train"] for row in run.steps] == [row["loss/train"] for row in plain.steps]


def test_an_operation_without_one_is_named() -> None:
    message = "cumsum_cuda does not have a deterministic implementation, but you set 'torch.use_...'"
    error = as_user_error(RuntimeError(message))
    assert error is not None and error.exit_status == 2
    assert "deterministic: cumsum_cuda" in str(error) and "set deterministic=false" in str(error)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_blocks_of_gpu_memory_grow_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    before = dict(os.environ)
    process_start.let_segments_grow()
    assert dict(os.environ) == before
    monkeypatch.delenv(name)
    process_start.let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
