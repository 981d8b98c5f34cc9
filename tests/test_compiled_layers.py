"""Compiled layers: passes without gradients run the graph of training, and leave no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from engine.models.compiled_layers import as_in_training, check_compiler
from tests.runs import Program
from utils import UserError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen, self.dropout = nn.Linear(2, 2), nn.Linear(2, 2), nn.Dropout(0.5)
        self.frozen.requires_grad_(False)
        self.inner = nn.Dropout(0.0)
        self.eval()


class Recorder:
    """In place of a compiled layer: it records what a compiler would look at."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.calls = layer, list[dict[str, Any]]()

    def __call__(self, hidden: Tensor, **options: Any) -> tuple[Tensor, str]:
        layer = self.layer
        self.calls.append(
            {
                "grad": torch.is_grad_enabled(),
                "hidden": hidden.requires_grad,
                "weights": [parameter.requires_grad for parameter in layer.parameters()],
                "training": [layer.training, layer.inner.training, layer.dropout.training],
            }
        )
        return layer.frozen(layer.trained(hidden)), "kept"


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(Layer())


def wrapped(recorder: Recorder, has_trained_input: bool = True) -> Callable[..., Any]:
    return as_in_training(recorder, recorder.layer, has_trained_input)


@pytest.mark.parametrize("has_trained_input", [True, False])
def test_a_pass_without_gradients_looks_like_training(recorder: Recorder, has_trained_input: bool) -> None:
    call, hidden, layer = wrapped(recorder, has_trained_input), torch.ones(1, 2), recorder.layer
    with torch.no_grad():
        output, text = call(hidden, attention_mask=None)
        assert not torch.is_grad_enabled()
    assert text == "kept" and output.grad_fn is None and not output.requires_grad
    assert recorder.calls == [
        {
            "grad": True,
            "hidden": has_trained_input,
            "weights": [True, True, False, False],
            "training": [True, True, False],  # dropout stays off
        }
    ]
    assert not hidden.requires_grad and not layer.training and not layer.inner.training
    torch.testing.assert_close(output, layer.frozen(layer.trained(hidden)).detach(), rtol=0, atol=0)


def test_copies_of_trained_weights_require_gradients_meanwhile(recorder: Recorder) -> None:
    """Such as those of mixed precision, which are no parameters."""
    call, layer = wrapped(recorder), recorder.layer
    copy = layer.trained.weight.detach().clone()
    layer.trained._parameters["weight"] = copy  # type: ignore[assignment]
    with torch.no_grad():
        call(torch.ones(1, 2))
    assert recorder.calls[0]["weights"] == [True, True, False, False] and not copy.requires_grad


def test_a_failure_leaves_the_layer_as_it_was(recorder: Recorder) -> None:
    call, layer = wrapped(recorder), recorder.layer
    layer.trained.requires_grad_(False)
    with torch.no_grad(), pytest.raises(RuntimeError):
        call(torch.ones(1, 3))
    assert not layer.training and not layer.trained.weight.requires_grad


def test_training_and_sampling_are_left_alone(recorder: Recorder) -> None:
    call, hidden = wrapped(recorder), torch.ones(1, 2)
    assert call(hidden)[0].requires_grad
    with torch.no_grad():
        assert not call(hidden, past_key_values=DynamicCache())[0].requires_grad
    assert [each["grad"] for each in recorder.calls] == [True, False]
    assert [each["training"][0] for each in recorder.calls] == [False, False]


@pytest.mark.parametrize("variable", ["CXX", "CC"])
def test_compiling_without_a_compiler_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config  # slow to import

    device = torch.device("cuda" if variable == "CC" else "cpu")
    monkeypatch.setattr("engine.models.compiled_layers.has_c_compiler", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with config.patch({"cpp.cxx": (None, "g++")}):
        with pytest.raises(UserError, match=rf"no C(\+\+)? compiler was found; fix: .*{variable}") as caught:
            check_compiler(device)
        assert caught.value.exit_status == 2
        monkeypatch.setattr("engine.models.compiled_layers.has_c_compiler", lambda: True)
        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        check_compiler(device)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_reference_and_evaluation_compile_nothing_of_their_own(reference: str, program: Program) -> None:
    from torch._dynamo.utils import counters  # slow to import

    torch._dynamo.reset()
    counters.clear()
    common = ("loss=dpo", "loss.beta=0.1", "mixed_precision=bfloat16", f"reference={reference}")
    run = program.ok(*common, "n_examples=8", "n_eval_examples=4", "compile=true")
    assert run.steps[0]["rewards_train/margins"] == run.evals[0]["rewards_eval/margins"] == 0
    assert counters["stats"]["unique_graphs"] <= 6  # 4 parts of a layer, and lengths of rows that guards tell apart
