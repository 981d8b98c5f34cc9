"""Contents of checkpoints, and their restoration, in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.films import film_tokenizer
from engine.models.archives import STATE_FILE, find_corruption
from engine.models.optimizers import build_optimizer
from engine.models.parameters import named_aliases
from engine.placement.placement import Placement
from engine.run.checkpoint_contents import start_save
from engine.run.checkpoint_reader import restore_checkpoint
from engine.run.checkpoint_writer import CheckpointWriter, Contents
from tests.configs import make_settings
from tests.models import tiny_model
from utils import UserError

TOKENIZER = film_tokenizer()


def trained(seed: int, optimizer: str = "AdamW") -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """A model after one step on random gradients, and its optimizer."""
    model = tiny_model("qwen2")  # with tied weights
    built = build_optimizer(optimizer, [{"params": list(model.parameters())}], 1e-2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    built.step()
    return model, built


@pytest.fixture
def placement(tmp_path: Path) -> Placement:
    return Placement(make_settings(), TOKENIZER, tmp_path)


class Recorder:
    """Stands in for the writer: keeps the arguments of start()."""

    def start(
        self, num_examples: int, contents: Contents, write_rest: Callable, extra_bytes: int, is_best: bool
    ) -> None:
        self.num_examples, self.contents, self.write_rest = num_examples, contents, write_rest
        self.extra_bytes, self.is_best = extra_bytes, is_best


def start(
    writer: Any,
    placement: Placement,
    seed: int = 0,
    policy_pt_metrics: dict[str, float] | None = None,
    is_best: bool = False,
) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """Start a save of a trained model."""
    model, optimizer = trained(seed)
    placement.aliases = named_aliases(model)
    state = {
        "counters": {"examples": 8, "updates": 2}, "settings": {"optimizer": "AdamW"}, "evaluation_due": False,
        "log_sizes": {}, "data": "", "token_budget": 1, "best": {},
    }  # fmt: skip
    start_save(
        writer, placement, model, optimizer, TOKENIZER, state, policy_pt_metrics=policy_pt_metrics, is_best=is_best
    )
    return model, optimizer


def save(placement: Placement, tmp_path: Path, seed: int = 0) -> tuple[Path, PreTrainedModel, torch.optim.Optimizer]:
    writer = CheckpointWriter(tmp_path, None)
    saved = start(writer, placement, seed)
    checkpoint = writer.finished(wait=True)
    assert checkpoint is not None
    return checkpoint, *saved


def test_a_restored_model_and_optimizer_are_the_saved_ones(placement: Placement, tmp_path: Path) -> None:
    checkpoint, model, optimizer = save(placement, tmp_path, seed=1)
    again, other = trained(seed=2)
    restore_checkpoint(checkpoint, placement, again, other)
    for (name, value), restored in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(value, restored), name
        state = other.state[restored]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[key], expected) for key, expected in optimizer.state[value].items()), name
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_a_checkpoint_is_complete(placement: Placement, tmp_path: Path) -> None:
    checkpoint, *_ = save(placement, tmp_path)
    assert checkpoint.name == "step-8" and find_corruption(checkpoint) is None
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= {"model.safetensors", "optimizer.safetensors", "config.json", "generation_config.json"}
    assert "tokenizer.json" in files and "policy.pt" not in files
    assert json.loads((checkpoint / STATE_FILE).read_text())["counters"] == {"examples": 8, "updates": 2}
    assert json.loads((checkpoint / "config.json").read_text())["hidden_size"] == 32


@pytest.mark.parametrize("metrics", [None, {}, {"loss/eval": 0.5}])
def test_policy_pt_is_for_those_who_ask(placement: Placement, tmp_path: Path, metrics: dict[str, float] | None) -> None:
    recorder = Recorder()
    model, _ = start(recorder, placement, policy_pt_metrics=metrics, is_best=metrics is None)
    assert recorder.num_examples == 8 and recorder.is_best == (metrics is None)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert recorder.extra_bytes == (0 if metrics is None else num_bytes)
    save_file(recorder.contents.files["model.safetensors"], tmp_path / "model.safetensors")
    recorder.write_rest(tmp_path)
    assert (tmp_path / "policy.pt").exists() == (metrics is not None)
    if metrics is not None:
        written = torch.load(tmp_path / "policy.pt", weights_only=True)
        assert (written["step_idx"], written["metrics"]) == (8, metrics)
        assert written["state"].keys() == model.state_dict().keys()


def test_settings_of_the_moment_are_saved(placement: Placement, tmp_path: Path) -> None:
    """Sampling changes the model's settings while the writer runs."""
    recorder = Recorder()
    model, _ = start(recorder, placement)
    model.config.use_cache = not model.config.use_cache
    before, model.generation_config.top_k = model.generation_config.top_k, 7
    recorder.write_rest(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] != model.config.use_cache
    assert json.loads((tmp_path / "generation_config.json").read_text()).get("top_k") == before != 7


# ---- Unfit checkpoints ----


def test_the_state_of_another_optimizer_is_left_out(placement: Placement, tmp_path: Path, capsys) -> None:
    checkpoint, model, _ = save(placement, tmp_path, seed=1)
    again, other = trained(seed=2, optimizer="SGD")
    capsys.readouterr()
    restore_checkpoint(checkpoint, placement, again, other)
    line = "optimizer: the state of SGD is reset, as the checkpoint holds the state of AdamW\n"
    assert capsys.readouterr().out == line
    assert torch.equal(model.get_input_embeddings().weight, again.get_input_embeddings().weight)
    assert not any(other.state.values())


def change_weights(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


NORM = "model.norm.weight"
CHANGES: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda weights: weights.pop(NORM), f"it lacks {NORM}"),
    (lambda weights: weights.update({"other.weight": torch.ones(1)}), "other.weight"),
    *(
        (lambda weights, shape=shape: weights.update({NORM: torch.ones(shape)}), rf"{NORM} has the shape \[{shown}\]")
        for shape, shown in (((31,), "31"), ((1,), "1"), ((1, 32), "1, 32"))
    ),
]


@pytest.mark.parametrize("change, message", CHANGES)
def test_weights_of_another_model_are_refused(
    placement: Placement, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    checkpoint, model, optimizer = save(placement, tmp_path)
    change_weights(checkpoint, change)
    with pytest.raises(UserError, match=message) as raised:
        restore_checkpoint(checkpoint, placement, model, optimizer)
    assert raised.value.code == "CHECKPOINT" and str(checkpoint) in str(raised.value)


def test_a_lack_of_memory_is_no_damage(placement: Placement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, model, optimizer = save(placement, tmp_path)

    def fail(*arguments: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(placement, "restore", fail)
    with pytest.raises(MemoryError, match="no room"):
        restore_checkpoint(checkpoint, placement, model, optimizer)
