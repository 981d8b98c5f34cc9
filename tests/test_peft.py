"""LoRA and QLoRA on the command line: exact references, small checkpoints, exact resume, merging."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import export
from engine.export.saved_models import load_saved
from engine.models.adapter_targets import lora_config
from engine.models.adapters import Adapter, as_reference, inject, is_trained
from engine.models.layers import find_layers
from engine.models.parameters import num_weights
from engine.settings.schema import LoraSettings
from engine.step.heads import response_logps
from engine.step.layout import lay_out
from tests.configs import make_settings
from tests.models import pair_examples, tiny_model
from tests.quick import slow_except
from tests.ranks import make_trainer, trajectory
from tests.runs import QUICK, Program, Run

DPO = ("loss=dpo", "loss.beta=0.1")
SIZES = "hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4"
ARCHITECTURES = {
    "llama": f"{{model_type: llama, {SIZES}}}",
    "qwen2": f"{{model_type: qwen2, {SIZES}, num_key_value_heads: 2, tie_word_embeddings: true}}",
    "gpt_neox": f"{{model_type: gpt_neox, {SIZES}}}",
    "gpt2": "{model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 4, n_positions: 512}",
}
TINY = ("model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films")
MODEL = {name: (*TINY, f"model.architecture={value}") for name, value in ARCHITECTURES.items()}
LLAMA = MODEL["llama"]
LORA = ("peft=lora", "peft.rank=4")
QLORA = ("peft=qlora", "peft.rank=4")
SHORT = (*(key for key in QUICK if not key.startswith("n_")), "n_examples=8", "n_eval_examples=4")


def run(program: Program, *overrides: str) -> Run:
    return program.ok(*overrides, defaults=SHORT)


def refused(program: Program, *overrides: str) -> str:
    """Run the program; returns its one-line error."""
    result = program(*overrides, defaults=SHORT)
    assert result.status in (2, 4) and result.err.count("\n") == 1, result.err
    return result.err


def adapter(run: Run, checkpoint: str = "LATEST") -> dict[str, torch.Tensor]:
    return load_file(run.dir / checkpoint / "adapter_model.safetensors")


def assert_starts_at_zero(run: Run) -> None:
    for split, row in (("eval", run.evals[0]), ("train", run.steps[0])):
        assert row[f"rewards_{split}/margins"] == row[f"rewards_{split}/chosen"] == 0
        assert row[f"loss/{split}"] == pytest.approx(math.log(2), abs=1e-7)
    assert run.steps[1]["rewards_train/margins"] != 0


# ---- The reference ----


PAIRED = [
    (architecture, peft, ("cached", "live")[(row + column) % 2])
    for row, architecture in enumerate(ARCHITECTURES)
    for column, peft in enumerate(("lora", "qlora"))
]


@pytest.mark.parametrize(
    ("architecture", "peft", "reference"),  # each pair of values
    slow_except(PAIRED, *PAIRED[::4], *PAIRED[3::4]),
)
def test_step_0_is_exact(program: Program, architecture: str, peft: str, reference: str) -> None:
    result = run(program, *DPO, *MODEL[architecture], f"peft={peft}", f"reference={reference}", "batch_size=2")
    assert_starts_at_zero(result)
    assert "the base model" in result.out and "adapters off" in result.out


# Dtypes of weights, products, storage and adapters, with samples and both kinds of reference.
COMBINATIONS = {
    "lora-bf16": (*LORA, "model.policy_dtype=bfloat16", "reference=live"),
    "lora-bf16-bias-head": (*LORA, "model.policy_dtype=bfloat16", "peft.bias=all", "peft.full_modules=[lm_head]"),
    "lora-mixed": (*LORA, "mixed_precision=bfloat16", "reference=live"),
    "lora-mixed-bias-head": (*LORA, "mixed_precision=bfloat16", "peft.bias=lora_only", "peft.full_modules=[lm_head]"),
    "lora-fp64": (*LORA, "model.policy_dtype=float64", "reference=live"),
    "qlora-bf16": (*QLORA, "model.policy_dtype=bfloat16", "peft.storage_dtype=bfloat16"),
    "qlora-mixed": (*QLORA, "mixed_precision=bfloat16", "peft.storage_dtype=float32", "reference=live"),
    "qlora-products": (*QLORA, "peft.compute_dtype=bfloat16", "peft.quant_type=fp4", "peft.double_quant=false"),
    "qlora-fp64": (*QLORA, "model.policy_dtype=float64", "peft.bias=all"),
    "qlora-int8-mixed": (*QLORA, "peft.quant_type=int8", "mixed_precision=bfloat16", "reference=live"),
    "qlora-other-reference": (*QLORA, "model.reference_dtype=bfloat16"),
    "lora-dora-live": (*LORA, "peft.dora=true", "peft.rslora=true", "reference=live"),
    "qlora-dora-mixed": (*QLORA, "peft.dora=true", "mixed_precision=bfloat16", "reference=live"),
    "lora-head-live": (*LORA, "peft.full_modules=[lm_head,norm]", "peft.bias=all", "reference=live"),
    "qlora-padded": (*QLORA, "batching=padded", "mixed_precision=bfloat16"),
    "qlora-checkpointed": (*QLORA, "activation_checkpointing=true", "peft.full_modules=[embed_tokens]"),
}


QUICK_COMBINATIONS = ("lora-mixed", "lora-bf16-bias-head", "qlora-mixed", "qlora-products", "qlora-int8-mixed")


@pytest.mark.parametrize("name", slow_except(COMBINATIONS, *QUICK_COMBINATIONS))
def test_combinations_of_dtypes_train(program: Program, name: str) -> None:
    sampled = ("sample_during_eval=true", "n_eval_model_samples=2", "max_length=270") if "padded" not in name else ()
    result = run(program, *DPO, *MODEL["qwen2" if "bias" in name else "llama"], *COMBINATIONS[name], *sampled)
    if "other" not in name:
        assert_starts_at_zero(result)


def test_frozen_weights_have_their_compute_dtype(tmp_path: Path) -> None:
    """Exceptions: the head, weights tied to it, and trained weights."""
    for model, more, wide in (
        ("llama", (), {"lm_head.weight"}),
        ("llama", ("peft.full_modules=[embed_tokens]",), {"lm_head.weight", "model.embed_tokens.weight"}),
        ("qwen2", (), {"model.embed_tokens.weight"}),
    ):
        overrides = ("peft=lora", "peft.rank=2", "mixed_precision=bfloat16", *more)
        policy = make_trainer((model, "sft", overrides), tmp_path).policy
        found = {name for name, p in policy.named_parameters() if p.dtype == torch.float32 and ".lora_" not in name}
        assert found == wide


@pytest.mark.slow
def test_an_unquantised_base_shares_the_reference_of_the_full_model(program: Program) -> None:
    archive = f"model.archive={run(program, 'loss=sft', *LLAMA, 'seed=11').dir}"
    assert "all log-probs are in" not in run(program, *DPO, *LLAMA, archive).out
    assert "all log-probs are in" in run(program, *DPO, *LLAMA, archive, *LORA).out
    assert "all log-probs are in" not in run(program, *DPO, *LLAMA, archive, *QLORA, "peft.quant_type=fp4").out


def test_new_dora_has_a_reference_of_its_own(program: Program) -> None:
    """It rescales the weights, so its log-probs differ from the base model's in the last bits."""
    cache = f"cache_dir={program.directory / 'cache'}"
    base = run(program, *DPO, *LLAMA, *LORA, "n_examples=4", cache)
    dora = run(program, *DPO, *LLAMA, *LORA, "peft.dora=true", "n_examples=4", cache)
    assert "log-probs computed in" in base.out and "log-probs computed in" in dora.out
    assert "adapters off" not in dora.out and "with new DoRA" in dora.out


def test_the_frozen_copy_of_adapters_has_no_dropout() -> None:
    lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    model, batch = tiny_model("llama"), lay_out(pair_examples(), "padded")
    inject(model, Adapter(lora, [], None, True, None, ""), with_copy=True)
    model.train()
    policy = [response_logps(model, batch) for _ in range(2)]
    with as_reference(model):
        reference = [response_logps(model, batch) for _ in range(2)]
    assert torch.equal(*reference) and not torch.equal(*policy)


@pytest.mark.parametrize("reference", slow_except(["cached", "live"], "live"))
def test_a_run_resumes_in_place_on_the_base_that_it_saved(program: Program, reference: str) -> None:
    run_dir = program.directory / "in-place"
    common = (
        *DPO,
        *LORA,
        f"reference={reference}",
        "save_every=4",
        "keep_checkpoints=null",
        f"local_run_dir={run_dir}",
    )
    before = adapter(run(program, *common))
    shutil.rmtree(run_dir / "step-8")
    resumed = run(program, *common, "resume=auto")
    assert "resumed from" in resumed.out and (run_dir / "base").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(resumed).items())


@pytest.mark.slow
def test_cached_and_live_references_give_the_same_run(program: Program) -> None:
    for peft in (LORA, QLORA):
        cached, live = (run(program, *DPO, *LLAMA, *peft, f"reference={kind}") for kind in ("cached", "live"))
        for row, other in zip(cached.steps, live.steps, strict=True):
            assert row["loss/train"] == pytest.approx(other["loss/train"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [LORA, (*QLORA, "activation_checkpointing=true")])
def test_compiled_layers_train_as_plain_ones(peft: tuple[str, ...], tmp_path: Path) -> None:
    losses, norms, weights = zip(
        *(
            trajectory(
                ("llama", "dpo", (*peft, "reference=live", "n_epochs=1", f"compile={compiled}")), tmp_path / compiled
            )
            for compiled in ("false", "true")
        ),
        strict=True,
    )
    assert losses[1][0].item() == pytest.approx(math.log(2), abs=1e-7)  # margins are 0
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=1e-6)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


# ---- Checkpoints ----


@pytest.mark.parametrize("peft", slow_except(["lora", "qlora"], "qlora"))
def test_a_resumed_run_is_the_uninterrupted_one(program: Program, peft: str) -> None:
    optimizer = "PagedAdamW8bit" if peft == "qlora" else "AdamW"
    command = (*DPO, *LLAMA, f"peft={peft}", "peft.dropout=0.1", "save_every=4", f"optimizer={optimizer}")
    uninterrupted = run(program, *command, f"local_run_dir={program.directory / 'uninterrupted'}")
    again = run(program, *command, f"resume={uninterrupted.dir}/step-4", f"local_run_dir={program.directory / 'again'}")
    assert all(torch.equal(adapter(again)[name], value) for name, value in adapter(uninterrupted).items())
    assert again.steps[-1]["loss/train"] == uninterrupted.steps[-1]["loss/train"]
    other = program(*command, f"resume={uninterrupted.dir}/step-4", "peft.rank=2", defaults=SHORT)
    assert other.status == 2 and "peft.rank was 16 and is 2" in other.err


@pytest.mark.parametrize("peft", slow_except(["lora", "qlora"], "lora"))
def test_another_base_under_the_same_name_is_refused(program: Program, peft: str) -> None:
    """Also for SFT, without a reference."""
    sft, start = run(program, "loss=sft", *LLAMA), program.directory / "start"
    start.mkdir()
    for path in (sft.dir / "LATEST").iterdir():
        if path.name not in ("manifest.json", "training_state.json", "optimizer.safetensors", "policy.pt"):
            shutil.copy(path, start)
    command = ("loss=sft", *LLAMA, f"peft={peft}", f"model.archive={start}", "save_every=4")
    stopped = run(program, *command)
    again = (*command, f"resume={stopped.dir}/step-4", f"local_run_dir={program.directory / 'again'}")
    weights = load_file(start / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    assert "the base model of the run at" in refused(program, *again)
    shutil.copy(sft.dir / "LATEST" / "model.safetensors", start)
    assert "resumed from" in run(program, *again).out


@pytest.mark.slow
def test_an_sft_adapter_becomes_a_dpo_adapter(program: Program) -> None:
    """The reference is the base with the SFT adapter, never the bare base, for any seed."""
    sft = run(program, "loss=sft", *LLAMA, *QLORA)
    archive = f"model.archive={sft.dir}"
    bare = run(program, *DPO, *LLAMA, *QLORA, "n_eval_examples=64", "eval_batch_size=64")
    for reference, seed in (("live", 3), ("cached", 0)):
        more = (f"seed={seed}", "n_eval_examples=64", f"reference={reference}", "eval_batch_size=64")
        dpo = run(program, *DPO, *LLAMA, *QLORA, archive, *more)
        assert_starts_at_zero(dpo)
        assert f"{sft.dir}/base with {sft.dir}/step-8" in dpo.out
        state = json.loads((dpo.dir / "LATEST" / "training_state.json").read_text())
        assert state["reference_model"].endswith(f"{sft.dir}/step-8") and state["reference"]
    assert dpo.evals[0]["logps_eval/chosen"] > bare.evals[0]["logps_eval/chosen"] + 1
    assert json.loads((dpo.dir / "LATEST" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        sft.dir / "base"
    )
    assert "peft.rank is 4 there, not 8" in refused(program, *DPO, *LLAMA, *QLORA, archive, "peft.rank=8")
    assert "is an adapter" in refused(program, *DPO, *LLAMA, archive)
    assert "does not match the model" in refused(program, *DPO, *MODEL["gpt2"], *QLORA, archive)
    other = run(program, *DPO, *LLAMA, *QLORA, archive, "save_every=4", "keep_checkpoints=null")
    message = refused(
        program, *DPO, *LLAMA, *QLORA, f"model.archive={bare.dir}", f"resume={other.dir}/step-4",
        f"local_run_dir={program.directory / 'x'}", "resume_allow=[model.archive]",
    )  # fmt: skip
    assert "the reference of the run" in message


def test_adapters_on_a_full_checkpoint_name_it_as_their_base(program: Program) -> None:
    sft = run(program, "loss=sft", *LLAMA)
    dpo = run(program, *DPO, *LLAMA, *LORA, f"model.archive={sft.dir}/LATEST/policy.pt")
    assert_starts_at_zero(dpo)
    assert not (dpo.dir / "base").exists()
    config = json.loads((dpo.dir / "LATEST" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(sft.dir / "step-8")


def test_a_moved_run_finds_its_base(program: Program) -> None:
    sft = run(program, "loss=sft", *LLAMA, *LORA)
    moved = Path(shutil.move(sft.dir, program.directory / "moved"))
    assert run(program, *DPO, *LLAMA, *LORA, f"model.archive={moved}").evals
    load_saved(str(moved))
    shutil.rmtree(moved / "base")
    assert "does not exist" in refused(program, *DPO, *LLAMA, *LORA, f"model.archive={moved}")


def published(run: Run, directory: Path, **changed: Any) -> str:
    """Copy the peft files of an adapter, as published by others, with changed settings."""
    directory.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run.dir / "LATEST" / name, directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | changed))
    return f"model.archive={directory}"


def test_an_adapter_stays_on_its_base_model(program: Program) -> None:
    """Its base decides the config too, including the rotary embedding."""
    sft = run(program, "loss=sft", *LLAMA, *LORA)
    other = f"model.architecture={{model_type: llama, {SIZES}, rope_parameters: {{rope_theta: 100.0}}}}"
    message = refused(program, *DPO, *TINY, other, *LORA, f"model.archive={sft.dir}")
    assert f"model.archive: {sft.dir}/base, the base model of " in message
    assert "rope_parameters is {'rope_theta': 10000.0" in message
    program.ok("loss=sft", *LORA, "debug=true", f"model.archive={run(program, 'loss=sft', *LORA).dir}", defaults=SHORT)


def test_adapters_of_other_kinds_are_refused(program: Program) -> None:
    sft = run(program, "loss=sft", *LLAMA, *LORA)
    others: list[dict[str, Any]] = [
        {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 64}}, {"init_lora_weights": "pissa_niter_4"},
        {"layers_to_transform": [0]}, {"exclude_modules": ["o_proj"]}, {"use_qalora": True}, {"of_another_version": 3},
    ]  # fmt: skip
    for number, changed in enumerate(others):
        archive = published(sft, program.directory / str(number), **changed)
        message = refused(program, "loss=sft", *LLAMA, *LORA, archive)
        assert f"has {next(iter(changed))}=" in message and "export.py" in message
    plain = {"init_lora_weights": "gaussian", "revision": "main", "lora_dropout": 0.5, "inference_mode": False}
    run(program, "loss=sft", *LLAMA, *LORA, published(sft, program.directory / "plain", **plain))


def test_an_adapter_without_a_base_takes_the_model_of_the_config(program: Program) -> None:
    sft = run(program, "loss=sft", *LLAMA, *LORA)
    archive = published(sft, program.directory / "adapter", base_model_name_or_path=None)
    assert "names no base model; fix: " in refused(program, "loss=sft", *LLAMA, *LORA, archive)
    base_model = ("model=blank_model", f"model.name_or_path={sft.dir}/base")
    result = run(program, "loss=sft", *base_model, *LORA, archive)
    assert f"names no base model; using model.name_or_path={sft.dir}/base" in result.out
    written = json.loads((result.dir / "LATEST" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == f"{sft.dir}/base"


@pytest.mark.slow
def test_a_run_with_another_model_has_another_base(program: Program) -> None:
    run_dir = program.directory / "run"
    command = ("loss=sft", *LLAMA, *LORA, f"local_run_dir={run_dir}", "resume=auto")
    for seed in (0, 1):
        result = run(program, *command, f"seed={seed}", "n_examples=4")
        full = run(program, "loss=sft", *LLAMA, f"seed={seed}", "lr=0", "n_examples=4")
        base, expected = (load_file(path / "model.safetensors") for path in (run_dir / "base", full.dir / "LATEST"))
        assert all(torch.equal(base[name], value) for name, value in expected.items())
        for path in result.dir.glob("step-*"):  # as if killed before the first save
            shutil.rmtree(path)
        (run_dir / "LATEST").unlink()


VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "scaling-rank": ("peft.scaling=0.5", "peft.target_modules=attention_qv"),
    "biases-head": ("peft.bias=all", "peft.full_modules=[lm_head]"),
    "biases-lora": ("peft.bias=lora_only",),
    "nested": ("peft.target_modules=attention_qv", "peft.full_modules=[mlp,down_proj]"),
    "rs-dora": ("peft.rslora=true", "peft.dora=true", "peft.alpha=3"),
}


@pytest.mark.parametrize(
    "architecture, variant",
    [
        *(("llama", "plain"), ("qwen2", "biases-head"), ("gpt_neox", "scaling-rank"), ("gpt2", "rs-dora")),
        *(("gpt2", "biases-lora"), ("llama", "nested")),
        *slow_except(
            [
                *(("gpt_neox", "biases-head"), ("gpt2", "plain"), ("gpt2", "biases-head"), ("llama", "rs-dora")),
                ("gpt_neox", "biases-lora"),
            ]
        ),
    ],
)
def test_a_checkpoint_is_an_adapter_for_peft_and_merges(variant: str, architecture: str, tmp_path: Path) -> None:
    job = (architecture, "sft", ("peft=lora", "peft.rank=4", *VARIANTS[variant], "n_epochs=1", "lr=1e-2"))
    trainer = make_trainer(job, tmp_path)
    trainer.train()
    trainer.policy.eval().set_attn_implementation("sdpa")

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
        return model.eval()(tokens, use_cache=False).logits

    expected = logits(trainer.policy)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(base) - expected).abs().max() > 0.01  # it was trained
    checkpoint = tmp_path / "LATEST"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not files & {"config.json", "model.safetensors", "policy.pt"}
    loaded = PeftModel.from_pretrained(base, checkpoint)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(load_saved(str(tmp_path)).model), expected, rtol=1e-4, atol=1e-4)


def test_qlora_is_merged_into_the_unquantised_base(tmp_path: Path) -> None:
    trainer = make_trainer(("llama", "sft", ("peft=qlora", "peft.rank=4", "n_epochs=1", "lr=1e-2")), tmp_path)
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").model
    merged, policy = load_saved(str(tmp_path)).model.model, trainer.policy.model
    for layer, trained, start in zip(merged.layers, policy.layers, base.layers, strict=True):
        lora, exact = trained.self_attn.q_proj, start.self_attn.q_proj.weight
        expected = exact + 2 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        torch.testing.assert_close(layer.self_attn.q_proj.weight, expected)
        assert (expected - exact).abs().max() > 1e-3
        assert torch.equal(layer.input_layernorm.weight, start.input_layernorm.weight)


@pytest.mark.slow
def test_exports_of_adapters_are_the_merged_model(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ("peft.full_modules=[lm_head]", "lr=1e-2")
    sft = run(program, "loss=sft", *LLAMA, *QLORA, *head)
    expected = load_saved(str(sft.dir)).model.state_dict()
    for target in ("x.pt format=policy_pt", "x.gguf format=gguf dtype=f32"):
        arguments = f"export.py from={sft.dir} to={program.directory}/{target}".split()
        monkeypatch.setattr(sys, "argv", arguments)
        assert export.main() == 0
    state = torch.load(program.directory / "x.pt", weights_only=True)["state"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(program.directory / "x.gguf").tensors}
    for name, theirs in (("lm_head", "output"), ("model.layers.1.mlp.down_proj", "blk.1.ffn_down")):
        assert torch.equal(tensors[f"{theirs}.weight"], expected[f"{name}.weight"])
    again = run(program, *DPO, *LLAMA, *LORA, f"model.archive={program.directory}/x.pt")
    saved = load_file(again.dir / "base" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


# ---- Trained parameters ----


@pytest.mark.parametrize(
    "architecture, preset, expected",
    [
        ("llama", "attention_qv", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("qwen2", "attention", {f"self_attn.{name}_proj" for name in "qkvo"}),
        ("mistral", "[down_proj]", {"mlp.down_proj"}),
        ("gpt_neox", "attention_qv", {"attention.query_key_value"}),
        ("gpt_neox", "attention", {"attention.query_key_value", "attention.dense"}),
        ("gpt2", "attention_qv", {"attn.c_attn"}),
        ("gpt2", "attention", {"attn.c_attn", "attn.c_proj"}),
        ("gpt2", "all_linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_presets_of_target_modules(architecture: str, preset: str, expected: set[str], tmp_path: Path) -> None:
    job = (architecture, "sft", ("peft=lora", "peft.rank=2", f"peft.target_modules={preset}"))
    policy = make_trainer(job, tmp_path).policy
    layer = find_layers(policy, None)[0]
    found = {name.removesuffix(".lora_A") for name, _ in layer.named_modules() if name.endswith(".lora_A")}
    assert found == expected
    lora = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert lora == {name for name, _ in policy.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("architecture", slow_except(["bloom", "falcon"], "falcon"))
def test_self_attention_is_attention(architecture: str, program: Program) -> None:
    sizes = "{model_type: " + architecture + ", hidden_size: 32, num_hidden_layers: 2, n_layer: 2, n_head: 4, "
    model = (*TINY, f"model.architecture={sizes}num_attention_heads: 4}}", "batching=padded")
    for preset, expected in (("attention_qv", ["query_key_value"]), ("attention", ["dense", "query_key_value"])):
        result = run(program, *model, *LORA, f"peft.target_modules={preset}", "n_examples=4")
        config = json.loads((result.dir / "LATEST" / "adapter_config.json").read_text())
        assert config["target_modules"] == [f"self_attention.{name}" for name in expected]


@pytest.mark.parametrize("peft", [LORA, QLORA])
def test_weights_outside_linear_layers_are_reported(peft: tuple[str, ...], program: Program) -> None:
    mixtral = f"model.architecture={{model_type: mixtral, {SIZES}, num_local_experts: 4, num_key_value_heads: 2}}"
    result = run(program, *TINY, mixtral, *peft, "n_examples=4", "batching=padded", "debug=true")
    notice = "peft: 89% of the transformer layers' weights are in no linear layer (mlp.experts.down_proj, mlp"
    assert notice in result.out
    assert "in no linear layer" not in run(program, *LLAMA, *peft, "n_examples=4", "debug=true").out


@pytest.mark.parametrize(
    "bias, model, needs_copy",
    [("all", "llama", False), ("lora_only", "llama", False), ("lora_only", "qwen2", True), ("none", "qwen2", False)],
)
def test_a_second_model_is_loaded_only_if_the_base_is_trained(
    bias: str, model: str, needs_copy: bool, tmp_path: Path
) -> None:
    overrides = ("peft=lora", "peft.rank=2", "reference=live", f"peft.bias={bias}")
    trainer = make_trainer((model, "dpo", overrides), tmp_path)
    assert (trainer.runner.reference.model is not trainer.policy) == needs_copy
    assert any(name.endswith("bias") for name in trainable(trainer.policy)) == needs_copy


def test_shards_of_several_dtypes_are_refused_before_sharding(program: Program) -> None:
    command = (
        *LLAMA,
        "plan=true",
        "trainer=FSDPTrainer",
        "num_processes=2",
        "peft=lora",
        "model.policy_dtype=bfloat16",
    )
    message = refused(program, *command, "peft.full_modules=[input_layernorm]")
    assert "input_layernorm.weight trains in bfloat16 beside adapters in fp32" in message
    assert "fix: set mixed_precision=bfloat16" in message
    program.ok(*command, "peft.full_modules=[lm_head]", defaults=SHORT)


def trainable(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_names_of_trained_parameters() -> None:
    names = (
        "h.q_proj.lora_A.default.weight",
        "h.q_proj.lora_A.reference.weight",
        "h.q_proj.base_layer.weight",
        "h.q_proj.base_layer.bias",
        "h.k_proj.bias",
        "lm_head.weight",
        "lm_head_norm.weight",
    )

    def trained(bias: Literal["none", "all", "lora_only"], *full_modules: str) -> list[str]:
        adapter = Adapter(LoraConfig(bias=bias), [*full_modules], None, False, None, "")
        return [name for name in names if is_trained(name, adapter)]

    assert trained("none") == [names[0]]
    assert trained("lora_only") == [names[0], names[3]]  # of the layers with adapters
    assert trained("all") == [names[0], names[3], names[4]]
    assert trained("none", "lm_head") == [names[0], names[5]]


def test_only_trained_parameters_reach_the_optimizer(tmp_path: Path) -> None:
    overrides = ("peft=lora", "peft.rank=2", "peft.full_modules=[lm_head]", "peft.target_modules=attention_qv")
    trainer = make_trainer(("qwen2", "sft", overrides), tmp_path)
    names = {id(parameter): name for name, parameter in trainer.policy.named_parameters()}
    optimized = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    updated = {names[id(parameter)] for parameter in optimized}
    assert {name for name in updated if ".lora_" not in name} == {"model.embed_tokens.weight"}  # tied to the head
    assert num_weights(trainer.policy)[0] == sum(
        p.numel() for group in trainer.optimizer.param_groups for p in group["params"]
    )


@pytest.mark.parametrize(
    "overrides, alpha",
    [
        (("peft.rank=6", "peft.alpha=null"), 12),
        (("peft.rank=6", "peft.alpha=6"), 6),
        (("peft.rank=6", "peft.alpha=1.5"), 1.5),
        (("peft.rank=6", "peft.alpha=null", "peft.scaling=0.5"), 3),
    ],
)
def test_alpha_is_twice_the_rank_by_default(overrides: tuple[str, ...], alpha: float) -> None:
    settings = make_settings("peft=lora", *overrides).peft
    assert isinstance(settings, LoraSettings)
    config = lora_config(settings, ["q_proj"], has_conv1d=False, base=None, task_type="CAUSAL_LM")
    assert (config.r, config.lora_alpha) == (6, alpha)


def test_every_update_drops_other_activations(tmp_path: Path) -> None:
    """With lr 0 only the mask of dropout can change the loss of one and the same batch."""
    overrides = ("peft=lora", "peft.rank=4", "peft.dropout=0.5", "lr=0", "warmup_steps=0")
    trainer = make_trainer(("llama", "sft", overrides), tmp_path)
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = trainer.prepare(next(trainer.train_batches()))

    def loss(update: int) -> float:
        trainer.counters["updates"] = update
        return trainer.step(batch).values.read()["loss/train"]

    first, second, third, again = (loss(update) for update in (0, 1, 2, 0))
    assert len({first, second, third}) == 3 and again == first


def test_unknown_module_names_are_refused(program: Program) -> None:
    assert "lm_head is not a linear layer inside the transformer layers" in refused(
        program, *LLAMA, *LORA, "peft.target_modules=[lm_head]"
    )
    assert "has no module lm_hat" in refused(program, *LLAMA, *LORA, "peft.full_modules=[lm_hat]")
    assert "is quantised or has an adapter" in refused(program, *LLAMA, *QLORA, "peft.full_modules=[mlp]")


def test_freezing_trains_the_other_parameters(program: Program) -> None:
    result = run(program, *DPO, *LLAMA, "freeze.first_n_layers=1", "freeze.patterns=[embed,norm]", "reference=live")
    assert_starts_at_zero(result)
    weights = load_file(result.dir / "LATEST" / "model.safetensors")
    start = load_file(run(program, *DPO, *LLAMA, "lr=0").dir / "LATEST" / "model.safetensors")
    changed = {name for name, value in weights.items() if not torch.equal(value, start[name])}
    assert changed == {name for name in weights if ("layers.1" in name and "norm" not in name) or "lm_head" in name}
    again = run(
        program, *DPO, *LLAMA, "freeze.first_n_layers=1", "activation_checkpointing=true", "freeze.patterns=[embed]"
    )
    assert again.evals[-1]["loss/eval"] < again.evals[0]["loss/eval"]
    assert "freeze.first_n_layers: 9" in refused(program, *LLAMA, "freeze.first_n_layers=9")
    assert "freeze.patterns: xyz" in refused(program, *LLAMA, "freeze.patterns=[xyz]")
    assert "nothing is left" in refused(program, *LLAMA, "freeze.patterns=['.']")
