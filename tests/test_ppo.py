"""PPO by the command line: the critic beside the policy, its start, and resume to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.run import offload
from engine.run.critic import Critic
from losses import LOSSES
from rewards import REWARDS
from tests.quick import slow_except
from tests.runs import ONLINE, QUICK, SMALL, Run, copy_stopped, vowels
from tests.test_online import without_times

PPO = (*SMALL, *QUICK, *ONLINE, "rollout.prompts=8", "rollout.epochs=2", "loss=ppo", "critic.lr=1e-3")
RESUMED = ("n_examples=32", "save_every=4", "keep_checkpoints=null", "do_first_eval=false")
LENGTHS = ("max_length=64", "max_prompt_length=40")
KINDS = ("model", "critic", "critic_optimizer", "optimizer")


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    monkeypatch.setitem(REWARDS, "vowels", vowels)


@pytest.fixture
def ppo(program):
    return lambda *overrides: program(*overrides, defaults=PPO)


def files_of(run: Run, step: int, kinds: tuple[str, ...] = KINDS) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    loaded = {kind: load_file(run.dir / f"step-{step}" / f"{kind}.safetensors") for kind in kinds}
    return {f"{kind}/{name}": tensor for kind, tensors in loaded.items() for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("batching", slow_except(["packed", "padded"], "packed"))
def test_metrics(ppo, batching):
    run = ppo("n_examples=32", f"batching={batching}", "rollout.temperature=0.8")
    assert run.status == 0, run.err
    assert "critic: training " in run.out
    first = run.steps[0]
    assert first["loss/value"] > 0 and first["val/grad_norm"] > 0
    assert first["objective/kl_coef"] == 0.05
    assert first["objective/rlhf_reward"] == first["objective/scores"]
    is_first = ([True] + [False] * 3) * 2
    # The first minibatch has the bits of the rollout: of the policy, and of the critic.
    assert [row["policy/ratio_max"] == 1 for row in run.steps] == is_first
    assert first["val/clipfrac"] == 0
    assert ["val/explained_variance" in row for row in run.steps] == is_first
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    logged = {name.replace("/vowels", "/NAME") for row in run.metrics for name in row}
    assert {name for name in logged if f"`{name}`" not in page} == set()


def test_the_critic_learns_the_returns(ppo, monkeypatch):
    """The first value loss of each iteration is half the mean square of the returns minus the values."""
    seen: list[float] = []
    from engine.run import rollouts

    def record(examples: Any) -> dict[str, float]:
        values, returns = (
            np.concatenate([each for example in examples for each in getattr(example.rollout, name)])
            for name in ("values", "returns")
        )
        seen.append(float(np.mean((values - returns) ** 2)) / 2)
        return {}

    monkeypatch.setattr(rollouts, "critic_metrics", record)
    run = ppo("rollout.prompts=4", "rollout.epochs=1", "n_examples=48", "critic.lr=1e-2", "lr=0")
    assert run.status == 0, run.err
    assert [row["loss/value"] for row in run.steps] == pytest.approx(seen, rel=1e-5)
    assert seen[-1] < seen[0] / 4


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        pytest.param(8, (), marks=pytest.mark.slow),  # between the passes
        (12, ("loss.target_kl=0.001", "loss.kl_horizon=100", "rollout.num_responses=3")),
        pytest.param(  # between iterations
            16, ("loss.target_kl=0.001", "loss.kl_horizon=100"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_resumed_run_is_bitwise_the_same(ppo, tmp_path, monkeypatch, step, settings):
    some = lambda prompt, response, row: vowels(prompt, response, row) if len(response) % 3 else None  # noqa: E731
    monkeypatch.setitem(REWARDS, "vowels", some)
    whole = ppo(*settings, *RESUMED)
    assert whole.status == 0, whole.err
    copy_stopped(whole, tmp_path / "resumed", step)
    resumed = ppo(*settings, *RESUMED, f"local_run_dir={tmp_path / 'resumed'}", "resume=auto")
    assert resumed.status == 0, resumed.err
    assert_same(files_of(resumed, 32), files_of(whole, 32))
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    rollouts = whole.dir / f"step-{step}" / "rollouts.npz"
    assert rollouts.exists() == (step != 16)
    if rollouts.exists():
        assert {"old_logps", "reference_logps", "advantages", "values", "returns"} <= set(np.load(rollouts))


@pytest.mark.slow
def test_the_weight_of_the_kl_moves(ppo):
    run = ppo("n_examples=48", "loss.target_kl=1e-6", "loss.kl_horizon=120", "rollout.num_responses=3")
    assert run.status == 0, run.err
    moved = [row["objective/kl_coef"] for row in run.steps if "objective/kl_coef" in row]
    # The first iteration is at KL 0: beta falls by a fifth of 24 / 120. Later ones are far off, up or down.
    assert moved[:2] == pytest.approx([0.05, 0.05 * 0.96])
    assert moved[2] == pytest.approx(moved[1] * 1.04) or moved[2] == pytest.approx(moved[1] * 0.96)


@pytest.mark.parametrize("loss", slow_except(["rloo", "reinforce_pp", "remax"], "rloo"))
def test_the_weight_of_the_kl_moves_for_other_losses(program, loss):
    run = program.ok(
        f"loss={loss}",
        "n_examples=16",
        "loss.target_kl=100",
        "loss.kl_horizon=100",
        "loss.beta=0.1",
        defaults=(*SMALL, *QUICK, *ONLINE),
    )
    moved = [row["objective/kl_coef"] for row in run.steps if "objective/kl_coef" in row]
    # 12 responses in an iteration, far below the target.
    assert moved == pytest.approx([0.1 * (1 - 0.2 * 12 / 100) ** number for number in range(4)])


def test_a_reward_model_starts_the_critic(ppo, program, tmp_path):
    reward = program.ok(
        "loss=reward", "n_examples=8", f"local_run_dir={tmp_path / 'reward'}", "max_length=64", "max_prompt_length=40"
    )
    run = ppo(f"critic.archive={tmp_path / 'reward'}", "critic.lr=0", "n_examples=8")
    assert run.status == 0, run.err
    found = {name.removeprefix("critic/"): each for name, each in files_of(run, 8, ("critic",)).items()}
    expected = load_file(reward.dir / "step-8" / "model.safetensors")
    assert_same(found, expected)
    pins = list((tmp_path / "reward").glob("step-8.used-by/*.json"))
    assert len(pins) == 1  # the run needs it to resume


def test_a_model_of_text_is_no_archive_of_a_critic(ppo, program, tmp_path):
    program.ok("n_examples=8", f"local_run_dir={tmp_path / 'sft'}", *LENGTHS)
    step = tmp_path / "sft" / "step-8"
    for archive, found in ((tmp_path / "sft", step), (step / "policy.pt", step / "policy.pt")):
        run = ppo(f"critic.archive={archive}", "n_examples=8")
        assert run.status == 2, run.err
        assert f"critic.archive: {found} is a model of text, not a reward model" in run.err


def test_a_policy_starts_the_critic(ppo, program, tmp_path):
    """Its layers, and a small new head."""
    program.ok("n_examples=8", f"local_run_dir={tmp_path / 'sft'}", *LENGTHS)
    run = ppo(f"model.archive={tmp_path / 'sft'}", "critic.lr=0", "n_examples=8")
    assert run.status == 0, run.err
    found, expected = files_of(run, 8, ("critic",)), load_file(tmp_path / "sft" / "step-8" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[f"critic/{name}"], expected[name])
    assert 0 < found["critic/score.weight"].std() < 0.01


def test_frozen_layers_are_frozen_in_both(ppo):
    run = ppo("freeze.first_n_layers=1", "n_examples=16", "save_every=4", "keep_checkpoints=null")
    assert run.status == 0, run.err
    before, after = (files_of(run, step, ("model", "critic")) for step in (4, 16))
    for kind in ("model", "critic"):
        name = f"{kind}/model.layers.{{}}.mlp.up_proj.weight"
        assert torch.equal(before[name.format(0)], after[name.format(0)])
        assert not torch.equal(before[name.format(1)], after[name.format(1)])


def test_adapters(ppo, tmp_path):
    """Policy and critic train adapters, each its own; the run resumes to the bit."""
    whole = ppo("peft=lora", *RESUMED)
    assert whole.status == 0, whole.err
    critic = files_of(whole, 32, ("critic",))
    assert any("lora_A" in name for name in critic) and any("score" in name for name in critic)
    assert not any("embed" in name for name in critic)
    copy_stopped(whole, tmp_path / "resumed", 12)
    resumed = ppo("peft=lora", *RESUMED, f"local_run_dir={tmp_path / 'resumed'}", "resume=auto")
    assert resumed.status == 0, resumed.err
    kinds = ("adapter_model", "critic", "critic_optimizer", "optimizer")
    assert_same(files_of(resumed, 32, kinds), files_of(whole, 32, kinds))


def test_a_critic_that_breaks_ends_the_run(ppo, monkeypatch):
    def broken(self: Critic, *arguments: Any) -> dict[str, torch.Tensor]:
        return {
            "loss/value": torch.tensor(torch.nan),
            "val/clipfrac": torch.tensor(0.0),
            "val/grad_norm": torch.tensor(1.0),
        }

    monkeypatch.setattr(Critic, "clip_gradients", broken)
    run = ppo()
    assert run.status == 5 and "update 1 has loss nan and gradient norm 1.0" in run.err


@pytest.mark.slow
def test_the_entropy_bonus_keeps_the_policy_varied(ppo):
    settings = ("lr=3e-3", "n_examples=96", "loss.beta=0", "do_first_eval=false")
    entropies = []
    for bonus in (0, 1):
        run = ppo(*settings, f"loss.entropy_bonus={bonus}")
        assert run.status == 0, run.err
        assert run.steps[0]["policy/ratio_max"] == 1
        entropies.append([row["objective/entropy"] for row in run.steps if "objective/entropy" in row][-1])
    assert entropies[0] < entropies[1]


def test_offloaded_models_train_the_same(ppo, monkeypatch):
    """A CPU has one memory, so nothing moves; as if it had two, each phase moves what it needs."""
    plain = ppo("n_examples=16", "rollout.offload=true")
    moves: list[tuple[str, str]] = []
    monkeypatch.setattr(offload, "moves_from", lambda device: True)
    start = offload.Offload.start

    def counted(self: offload.Offload, *arguments: Any) -> None:
        start(self, *arguments)
        moves.clear()

        def recording(name: str, move: offload.Move) -> offload.Move:
            def moved(device: torch.device) -> None:
                moves.append((name, device.type))
                move(device)

            return moved

        self._parts = {name: recording(name, move) for name, move in self._parts.items()}

    monkeypatch.setattr(offload.Offload, "start", counted)
    found = ppo("n_examples=16", "rollout.offload=true", "do_first_eval=false")
    assert plain.status == found.status == 0, plain.err + found.err
    assert_same(files_of(found, 16), files_of(plain, 16))
    names = [name for name, _ in moves]
    # One iteration and one evaluation: each moves the optimizers away and back.
    assert names.count("optimizers") == 4 and names.count("critic") >= 4 and names.count("reference") >= 4


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["loss=reinforce_pp", "loss.baseline=group", "loss.target_kl=6"], "loss.target_kl: needs loss.baseline=batch"),
        (["loss.target_kl=6", "loss.beta=0"], "loss.target_kl: 6 needs loss.beta above 0"),
        (["loss=grpo", "critic.lr=1e-4"], "critic.lr: 0.0001 would change nothing: loss=grpo has no critic"),
        (["rollout.offload=true", "reference_refresh.every=3"], "rollout.offload: true moves the reference away"),
        (["trainer=TensorParallelTrainer", "tensor_parallel.backend=package"], "loss.name: ppo has a critic"),
        (["critic.archive=/none/such"], "critic.archive: /none/such does not exist"),
        (["loss.gae_lambda=2"], "loss.gae_lambda"),
    ],
)
def test_settings_that_cannot_work(ppo, settings, problem):
    run = ppo(*settings)
    assert run.status in (2, 4) and problem in run.err, run.err


def test_stored_responses_are_learned_beside_sampled_ones(ppo, tmp_path):
    """They keep the policy near them; the run resumes to the bit, and its gradient is that of both losses."""
    mixed = ("ptx.datasets=[films]", "ptx.weight=2", *RESUMED)
    plain, whole = ppo(*RESUMED), ppo(*mixed)
    assert plain.status == whole.status == 0, plain.err + whole.err
    assert "ptx: " in whole.out and all("loss/ptx" not in row for row in plain.steps)
    losses = [row["loss/ptx"] for row in whole.steps]
    assert losses[-1] < losses[0]
    copy_stopped(whole, tmp_path / "resumed", 12)
    resumed = ppo(*mixed, f"local_run_dir={tmp_path / 'resumed'}", "resume=auto")
    assert resumed.status == 0, resumed.err
    assert_same(files_of(resumed, 32), files_of(whole, 32))
    assert without_times(resumed.metrics) == without_times(whole.metrics)


@pytest.mark.parametrize("batching", slow_except(["packed", "padded"], "packed"))
def test_the_stored_loss_alone_is_sft(ppo, program, monkeypatch, batching):
    """Without a loss of its own, each step is one of SFT with the factor ptx.weight."""

    def no_loss(logps: torch.Tensor, *arguments: Any, clip_low: float, clip_high: float, entropy_bonus: float) -> Any:
        return 0 * logps

    monkeypatch.setitem(LOSSES, "ppo", replace(LOSSES["ppo"], function=no_loss))
    common = ("n_examples=12", "optimizer=SGD", "do_first_eval=false", f"batching={batching}", "max_grad_norm=1000")
    mixed = ppo(*common, "rollout.prompts=4", "rollout.epochs=1", "ptx.datasets=[films]", "ptx.weight=2", "lr=0.05")
    assert mixed.status == 0, mixed.err
    sft = program.ok(*common, "loss=sft", "loss.average_log_prob=true", "lr=0.1", *LENGTHS)
    losses = [[row[name] for row in run.steps] for run, name in ((mixed, "loss/ptx"), (sft, "loss/train"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    found, expected = files_of(mixed, 12, ("model",)), files_of(sft, 12, ("model",))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_the_demo_raises_the_reward(program):
    """From the SFT model of the demo: praise in nearly all responses, at a small distance."""
    sft = program.ok("+experiment=demo_sft", "sample_during_eval=false", "do_first_eval=false", defaults=())
    run = program.ok("+experiment=demo_ppo", f"model.archive={sft.dir}", defaults=())
    before, after = (row for row in run.metrics if "rewards_eval/sampled" in row)
    assert before["rewards_eval/sampled"] < 0.1
    assert after["rewards_eval/sampled"] >= 0.85
    assert after["kl_eval"] <= 2.5
    explained = [row["val/explained_variance"] for row in run.steps if "val/explained_variance" in row]
    assert np.mean(explained[-10:]) > np.mean(explained[:10])
