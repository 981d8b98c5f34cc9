"""Exports have the logits of the trained model in every format; failures leave no files."""

import base64
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import export
from engine.data.chat_templates import JINJA
from engine.data.films import film_tokenizer
from engine.export.gguf import plan_gguf
from engine.export.meta_llama import byte_characters, load_meta
from engine.export.model_card import model_card
from engine.export.run_record import RunRecord, read_run
from engine.export.saved_models import SavedModel
from engine.models import hub
from engine.settings.options import keys_of
from tests.faults.processes import small_disk
from tests.models import tiny_model
from tests.tokenizer_files import TEXTS, byte_level, sentencepiece, sentencepiece_pieces
from utils import UserError

FORMATS = ("hf", "gguf", "policy_pt")


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_gives_one_line_and_leaves_no_files(run_export, sft_run, tmp_path, form):
    status, _, err = run_export(f"from={sft_run}", f"to={tmp_path / 'complete'}", f"format={form}")
    assert status == 0, err
    size = sum(path.stat().st_size for path in (tmp_path / "complete").iterdir())
    with small_disk(tmp_path / "disk", 2 * size) as disk:
        for room in (0.02, 0.3, 0.6, 0.9, 0.95):
            (disk / "ballast").write_bytes(bytes(int((2 - room) * size)))
            status, _, err = run_export(f"from={sft_run}", f"to={disk / 'model'}", f"format={form}")
            assert (status, err.count("\n")) == (6, 1) and "cannot write" in err, (room, status, err)
            assert [path.name for path in disk.iterdir()] == ["ballast"], room
            (disk / "ballast").unlink()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_of_the_umask(run_export, sft_run, tmp_path, umask):
    before = os.umask(umask)
    try:
        for form in FORMATS:
            assert run_export(f"from={sft_run}", f"to={tmp_path / form}", f"format={form}")[0] == 0
            assert modes(tmp_path / form) == {0o666 & ~umask}
        assert run_export(f"from={sft_run}", f"to={tmp_path / 'x.gguf'}", "format=gguf")[0] == 0
        assert modes(tmp_path) == {0o666 & ~umask}
    finally:
        os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_checkpoints_have_the_mode_of_the_umask(program, tmp_path, umask):
    before = os.umask(umask)
    try:
        full = program.ok("loss=sft", f"local_run_dir={tmp_path / 'full'}").dir / "LATEST"
        adapter = program.ok("loss=sft", "peft=lora", f"local_run_dir={tmp_path / 'lora'}").dir / "LATEST"
    finally:
        os.umask(before)
    assert {"model.safetensors", "optimizer.safetensors", "policy.pt"} <= {path.name for path in full.iterdir()}
    assert (adapter / "adapter_model.safetensors").exists() and (adapter.parent / "base" / "model.safetensors").exists()
    for directory in (full, adapter, adapter.parent / "base"):
        assert modes(directory) == {0o666 & ~umask}


def modes(directory: Path) -> set[int]:
    """The permission bits of the files in a directory."""
    return {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir() if path.is_file()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 43).unsqueeze(0)).logits


def loaded(path: Path, **options: Any):
    return AutoModelForCausalLM.from_pretrained(path, **options)


# ---- Formats ----


def test_hf(sft_run, tmp_path, run_export):
    target = tmp_path / "mine"
    status, out, err = run_export(f"from={sft_run}", f"to={target}")
    assert (status, out, err) == (0, f"exported: {target}\n", "")
    trained = loaded(sft_run / "LATEST")
    model = loaded(target)
    assert torch.equal(logits(model), logits(trained))
    assert model.generation_config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("Hello there")["input_ids"] == film_tokenizer()("Hello there")["input_ids"]
    assert tokenizer.chat_template == JINJA["hh"]  # the template of the films
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert {"README.md", "model.safetensors", "generation_config.json"} <= {path.name for path in target.iterdir()}
    assert not {"optimizer.safetensors", "training_state.json"} & {path.name for path in target.iterdir()}

    card = (target / "README.md").read_text()
    last = json.loads((sft_run / "metrics.jsonl").read_text().splitlines()[-1])
    for part in (
        "# mine",
        "- Loss: sft",
        "- Data: films",
        "Examples trained on: 16",
        f"| loss/eval | {last['loss/eval']:.6g} |",
    ):
        assert part in card
    assert str(sft_run.parent) not in card  # no local path


def test_a_card_has_no_local_paths():
    model = {"name_or_path": "models/llama", "archive": "runs/secret/sft", "tokenizer_name_or_path": "/home/me/tok"}
    config = {"chat_template": "/home/me/mine.jinja", "datasets": ["/home/me/x.jsonl"], "model": model}
    card = model_card("mine", SavedModel(tiny_model("llama"), byte_level()), RunRecord(config, 4))
    assert "mine.jinja" in card and "x.jsonl" in card and "weights of sft" in card
    assert not any(part in card for part in ("/home", "secret", "base_model"))


def test_a_record_takes_the_template_of_the_config_or_of_the_data_sets(tmp_path):
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / "training_state.json").write_text('{"counters": {"examples": 4}}')
    for config, expected in (
        ("{datasets: [a, b], chat_template: null}", "form of a, b"),
        ("{datasets: [a, b], chat_template: llama2}", "llama2"),
        ("{}", "form of "),
    ):
        (tmp_path / "config.yaml").write_text(config)
        record = read_run(tmp_path / "step-4", lambda names: f"form of {', '.join(names)}")
        assert (record.chat_template, record.num_examples) == (expected, 4)
    (tmp_path / "config.yaml").write_text("[no mapping]")
    with pytest.raises(UserError, match="cannot be read") as error:
        read_run(tmp_path / "step-4", lambda names: None)
    assert error.value.code == "CHECKPOINT"


def test_dtypes(sft_run, tmp_path, run_export):
    assert run_export(f"from={sft_run}/LATEST", f"to={tmp_path}/x", "dtype=bfloat16")[0] == 0
    model = loaded(tmp_path / "x")
    assert model.dtype == torch.bfloat16
    trained = loaded(sft_run / "LATEST")
    torch.testing.assert_close(logits(model.float()), logits(trained), atol=0.02, rtol=0.02)


def test_policy_pt_is_an_archive_for_later_runs(sft_run, tmp_path, run_export, program):
    assert run_export(f"from={sft_run}", f"to={tmp_path}/x.pt", "format=policy_pt")[0] == 0
    policy = torch.load(tmp_path / "x.pt", weights_only=True)
    assert policy["step_idx"] == 16 and policy["metrics"]["loss/eval"] > 0
    expected = torch.load(sft_run / "LATEST" / "policy.pt", weights_only=True)
    assert policy["state"].keys() == expected["state"].keys()
    assert all(torch.equal(policy["state"][name], tensor) for name, tensor in expected["state"].items())
    program.ok("loss=dpo", "loss.beta=0.1", f"model.archive={tmp_path}/x.pt", "debug=true", "n_examples=4")


@pytest.mark.parametrize("to", ["folder", "x.gguf"])
def test_gguf(sft_run, tmp_path, run_export, to):
    status, out, err = run_export(f"from={sft_run}", f"to={tmp_path}/{to}", "format=gguf", "dtype=q8_0")
    assert (status, err) == (0, "")
    assert out.startswith("note: 2 tensors stay in f16")  # intermediate_size is 48
    reader = gguf.GGUFReader(tmp_path / (to if "." in to else "folder/folder-q8_0.gguf"))
    field = reader.get_field("tokenizer.chat_template")
    assert field is not None and field.contents() == JINJA["hh"]
    weights = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    trained = loaded(sft_run / "LATEST")
    expected = trained.model.embed_tokens.weight.detach().numpy()
    assert np.abs(weights["token_embd.weight"] - expected).max() <= np.abs(expected).max() / 127
    modelfile = tmp_path / ("x.Modelfile" if "." in to else "folder/Modelfile")
    assert modelfile.read_text().startswith(f"FROM ./{'x' if '.' in to else 'folder-q8_0'}.gguf\nTEMPLATE ")
    assert len(list(modelfile.parent.iterdir())) == 2


@pytest.mark.parametrize("to", ["x{}.gguf", "a{b}"])
def test_gguf_takes_any_name(sft_run, tmp_path, run_export, to):
    status, out, err = run_export(f"from={sft_run}", f"to={tmp_path}/{to}", "format=gguf")
    assert (status, err) == (0, "")
    written = tmp_path / (to if to.endswith(".gguf") else f"{to}/{to}-f32.gguf")
    modelfile = tmp_path / (to.replace(".gguf", ".Modelfile") if to.endswith(".gguf") else f"{to}/Modelfile")
    assert out == f"for Ollama: {modelfile}\nexported: {written}\n" and gguf.GGUFReader(written).tensors
    written.unlink()
    status, _, err = run_export(f"from={sft_run}", f"to={tmp_path}/{to}", "format=gguf")
    assert status == 2 and " exists; fix: " in err and modelfile.exists()  # the Modelfile of another model


def test_a_target_without_a_name_is_refused(tmp_path, run_export, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run_export("from=x", "to=.")
    assert (status, err) == (2, "error[CONFIG] to: . has no name; fix: give a new directory\n")


def test_the_tokenizers_template_stays_unless_another_is_given(sft_run, tmp_path, run_export):
    plain = tmp_path / "plain"
    shutil.copytree(sft_run / "LATEST", plain)  # without a run directory
    (plain / "chat_template.jinja").write_text("{{ messages }}")
    for arguments, expected in (((), "{{ messages }}"), (("chat_template=llama2",), JINJA["llama2"])):
        target = tmp_path / f"to{len(arguments)}"
        assert run_export(f"from={plain}", f"to={target}", *arguments)[0] == 0
        assert AutoTokenizer.from_pretrained(target).chat_template == expected


def test_push_to_hub(sft_run, tmp_path, run_export, monkeypatch):
    calls: list[Any] = []

    class FakeApi:
        def whoami(self):
            calls.append("whoami")

        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, folder_path, repo_id):
            calls.append(sorted(path.name for path in folder_path.iterdir()))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(export, "settle_network", lambda names: None)
    status, out, _ = run_export(f"from={sft_run}", f"to={tmp_path}/x", "format=policy_pt", "push_to_hub=me/tiny")
    assert (status, out.splitlines()[-1]) == (0, "uploaded: https://huggingface.co/me/tiny")
    assert calls == ["whoami", ("me/tiny", {"private": True, "exist_ok": True}), ["policy.pt"]]
    monkeypatch.setattr(FakeApi, "whoami", lambda self: 1 / 0)
    status, _, err = run_export(f"from={sft_run}", f"to={tmp_path}/y", "push_to_hub=me/tiny")
    assert status == 2 and "push_to_hub: you are not logged in to the hub" in err
    assert not (tmp_path / "y").exists()


# ---- Adapters ----


def save_base(path: Path, architecture: str, dtype: torch.dtype = torch.float32):
    model = tiny_model(architecture, dtype, vocab_size=400)
    model.save_pretrained(path)
    byte_level().save_pretrained(path)
    return model


def save_adapter(path: Path, model, base: str, **options: Any):
    """Save an adapter with random weights, so it changes the logits."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    adapted.peft_config["default"].base_model_name_or_path = base
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(path)
    return adapted


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "lora_only"}),
    ],
)
def test_adapters_are_merged_into_their_base(tmp_path, run_export, architecture, options):
    base = save_base(tmp_path / "base", architecture)
    before = logits(base)
    adapted = save_adapter(tmp_path / "adapter", base, str(tmp_path / "base"), **options)
    expected = logits(adapted)
    assert (expected - before).abs().max() > 0.1
    assert run_export(f"from={tmp_path}/adapter", f"to={tmp_path}/merged") == (0, f"exported: {tmp_path}/merged\n", "")
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat")["input_ids"]
    assert "Adapters were merged into base." in (tmp_path / "merged" / "README.md").read_text()


def test_an_adapter_on_an_adapter_and_a_moved_base(tmp_path, run_export):
    base = save_base(tmp_path / "base", "llama")
    first = save_adapter(tmp_path / "first", base, "../base", target_modules=["q_proj"])  # relative to the adapter
    second = save_adapter(tmp_path / "second", first.merge_and_unload(), "/gone", target_modules=["v_proj"])
    status, _, err = run_export(f"from={tmp_path}/second", f"to={tmp_path}/merged")
    assert status == 4
    assert "the base model of" in err and "fix: give it as base=PATH" in err
    assert run_export(f"from={tmp_path}/second", f"to={tmp_path}/merged", f"base={tmp_path}/first")[0] == 0
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(second), atol=1e-4, rtol=1e-5)


def test_long_phases_show_progress_without_a_terminal(tmp_path, run_export, monkeypatch):
    monkeypatch.setattr("utils.Progress.INTERVAL", 0.0)
    base = save_base(tmp_path / "base", "llama")
    save_adapter(tmp_path / "adapter", base, str(tmp_path / "base"), target_modules=["q_proj"])
    _, out, err = run_export(f"from={tmp_path}/adapter", f"to={tmp_path}/x.gguf", "format=gguf")
    assert err == ""
    for line in (
        "merging adapters: 2 of 2 layers",
        "checking weights: 1 of 21 tensors",
        "writing GGUF: 21 of 21 tensors",
    ):
        assert line in out


def test_merged_weights_are_rounded_once(tmp_path, run_export):
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapted = save_adapter(tmp_path / "adapter", base, str(tmp_path / "base"), target_modules=["q_proj"])
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    exact = (
        layer.base_layer.weight.float() + 2 * layer.lora_B.default.weight.float() @ layer.lora_A.default.weight.float()
    )
    assert run_export(f"from={tmp_path}/adapter", f"to={tmp_path}/merged")[0] == 0
    merged = loaded(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, exact.bfloat16())


def test_mismatching_adapters_are_refused(tmp_path, run_export):
    base = save_base(tmp_path / "base", "llama")
    save_adapter(tmp_path / "adapter", base, str(tmp_path / "base"), target_modules=["q_proj"])
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    status, _, err = run_export(f"from={tmp_path}/adapter", f"to={tmp_path}/merged")
    assert status == 4 and "1 of its 4 tensors are not in adapter_model.safetensors" in err
    save_base(tmp_path / "other", "gpt2")
    status, _, err = run_export(f"from={tmp_path}/adapter", f"to={tmp_path}/merged", f"base={tmp_path}/other")
    assert status == 4 and "no adapter can be loaded" in err
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    status, _, err = run_export(f"from={tmp_path}/adapter", f"to={tmp_path}/merged")
    assert status == 4 and "base is stored quantised; fix: give it as base=PATH" in err
    assert not (tmp_path / "merged").exists()


# ---- Errors ----


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["to={0}/x"], 2, "from is required: a run directory"),
        (["from=a", "form=hf", "to=x"], 2, "form: unknown key (did you mean format?)"),
        (["from=a", "to=x", "dtype=int8"], 2, "dtype: must be null or float32, float16, bfloat16"),
        (["from=a", "to={0}/x", "dtype=q8_0"], 2, "dtype: q8_0 is for format=gguf, not hf; fix: choose one of f32"),
        (["from=a", "to={0}"], 2, "exists; fix: give another directory"),
        (["from=meta", "to={0}/x"], 2, "from=meta needs path"),
        (["from={0}", "to={0}/x"], 4, "{0} contains no model"),
        (["from={0}/none", "to={0}/x"], 4, "{0}/none does not exist; fix: correct the path"),
        (["from=" + 300 * "x", "to={0}/x"], 2, "(a name in it is too long)"),
        (["from=no-such-model", "to={0}/x"], 4, "no model can be loaded from no-such-model"),
        (["from={0}", "to={0}/x", "tokenizer=a"], 2, "tokenizer and context are for from=meta"),
    ],
)
def test_errors_are_one_line(tmp_path, run_export, arguments, status, problem):
    (tmp_path / "file").touch()
    found, out, err = run_export(*(argument.format(tmp_path) for argument in arguments))
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert problem.format(tmp_path) in err and err.startswith("error[")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_no_files(sft_run, tmp_path, run_export, monkeypatch):
    def fail(self, path, **options):
        (Path(path) / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    status, _, err = run_export(f"from={sft_run}", f"to={tmp_path}/x")
    assert status == 6 and err.startswith("error[STORAGE] to: cannot write")
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_hub_for_a_base_model_is_found_before_loading(tmp_path, monkeypatch):
    (tmp_path / "run" / "LATEST").mkdir(parents=True)
    (tmp_path / "run" / "LATEST" / "adapter_config.json").write_text('{"base_model_name_or_path": "me/model"}')
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "is_reachable", lambda url: False)
    monkeypatch.setattr(hub, "getproxies", dict)
    hub.settle_network([str(tmp_path)])
    assert "HF_HUB_OFFLINE" not in os.environ
    hub.settle_network([str(tmp_path / "run")])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_nan_and_inf_are_refused(tmp_path, run_export):
    model = save_base(tmp_path / "base", "llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "base")
    status, _, err = run_export(f"from={tmp_path}/base", f"to={tmp_path}/x", "dtype=float16")
    assert status == 5 and "lm_head.weight contains NaN or Inf; fix: dtype=bfloat16" in err
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    assert run_export(f"from={tmp_path}/base", f"to={tmp_path}/x", "format=gguf")[0] == 5
    assert not (tmp_path / "x").exists()


def test_help_lists_every_option(run_export):
    status, out, _ = run_export("--help")
    assert status == 0 and all(f"  {key}=" in out for key in keys_of(export.ExportOptions))


# ---- Meta's checkpoints ----


def save_meta(path: Path, model, num_shards: int, *, splits_vocabulary: bool = False, **params: Any) -> None:
    """Write a model as Meta's files: the inverse of load_meta."""
    config, head_dim = model.config, model.config.head_dim
    state = model.state_dict()
    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
    weights = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], 0 if splits_vocabulary else 1),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
        "rope.freqs": (torch.ones(head_dim // 2), None),
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"layers.{layer}."
        for name, our_name in names.items():
            weight = state[f"{ours}{our_name}.weight"]
            if name in ("wq", "wk"):
                rows = [
                    head * head_dim + half * head_dim // 2 + i
                    for head in range(len(weight) // head_dim)
                    for i in range(head_dim // 2)
                    for half in range(2)
                ]
                weight = weight[rows]
            weights[f"{theirs}attention.{name}.weight"] = (weight, 1 if name == "wo" else 0)
        for name, our_name, dim in (("w1", "gate", 0), ("w2", "down", 1), ("w3", "up", 0)):
            weights[f"{theirs}feed_forward.{name}.weight"] = (state[f"{ours}mlp.{our_name}_proj.weight"], dim)
        weights[f"{theirs}attention_norm.weight"] = (state[f"{ours}input_layernorm.weight"], None)
        weights[f"{theirs}ffn_norm.weight"] = (state[f"{ours}post_attention_layernorm.weight"], None)
    path.mkdir()
    for shard in range(num_shards):
        part = {
            n: w.clone() if dim is None else w.chunk(num_shards, dim)[shard].clone() for n, (w, dim) in weights.items()
        }
        torch.save(part, path / f"consolidated.{shard:02}.pth")
    values = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads}
    values |= {"n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "vocab_size": -1}
    (path / "params.json").write_text(json.dumps(values | params))


def write_sentencepiece(path: Path) -> None:
    from transformers.utils import sentencepiece_model_pb2_new as protobuf

    proto = protobuf.ModelProto()
    for piece, score, kind in sentencepiece_pieces():
        proto.pieces.add(piece=piece, score=score, type=getattr(proto.SentencePiece, kind))
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("num_shards", [1, 2])
def test_meta(tmp_path, run_export, num_shards):
    model = tiny_model("llama", vocab_size=400, rope_parameters={"rope_theta": 10000.0})
    save_meta(tmp_path / "meta", model, num_shards)
    write_sentencepiece(tmp_path / "tokenizer.model")  # in the parent, as in Meta's downloads of LLaMA 1
    status, out, err = run_export("from=meta", f"path={tmp_path}/meta", f"to={tmp_path}/hf")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "context: 2048 positions, inferred from params.json; context=N overrides"
    converted = loaded(tmp_path / "hf")
    assert torch.equal(logits(converted), logits(model))
    assert (converted.config.max_position_embeddings, converted.config.bos_token_id) == (2048, 1)
    tokenizer, expected = AutoTokenizer.from_pretrained(tmp_path / "hf"), sentencepiece()
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    plan_gguf(converted, tokenizer, "f32", name="tiny")


def test_meta_llama3(tmp_path, run_export):
    """Scaled rotary embedding, a vocabulary split among shards, key heads in several shards, a tiktoken file."""
    rope = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    reference = byte_level("llama-bpe")
    vocabulary = {token: i - 1 for token, i in reference.get_vocab().items() if not token.startswith("<|")}
    model = tiny_model("llama", vocab_size=len(vocabulary) + 256, rope_parameters=rope)
    save_meta(tmp_path / "meta", model, 2, splits_vocabulary=True, rope_theta=500000.0, use_scaled_rope=True)
    byte = {character: i for i, character in enumerate(byte_characters())}
    lines = [base64.b64encode(bytes(byte[c] for c in token)) + b" %d\n" % i for token, i in vocabulary.items()]
    (tmp_path / "meta" / "tokenizer.model").write_bytes(b"".join(lines))
    assert run_export("from=meta", f"path={tmp_path}/meta", f"to={tmp_path}/hf")[0] == 0
    converted = loaded(tmp_path / "hf")
    assert torch.equal(logits(converted), logits(model))
    assert converted.config.max_position_embeddings == 131072
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token == "<|end_of_text|>"
    assert tokenizer.convert_tokens_to_ids("<|python_tag|>") == len(vocabulary) + 10
    assert len(tokenizer) == len(vocabulary) + 256
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [len(vocabulary), *(i - 1 for i in reference(text)["input_ids"])]


def test_more_shards_than_key_heads(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=1, rms_norm_eps=1e-5))  # fmt: skip
    save_meta(tmp_path / "meta", model, 1)
    whole = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    split = {"wq": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "output": 0, "tok_embeddings": 1}
    for shard in range(2):  # both have the only key head
        dims = {name: split.get(name.split(".")[-2]) for name in whole}
        part = {name: w if dims[name] is None else w.chunk(2, dims[name])[shard].clone() for name, w in whole.items()}
        torch.save(part, tmp_path / "meta" / f"consolidated.0{shard}.pth")
    byte_level().save_pretrained(tmp_path / "tokenizer")
    saved = load_meta(tmp_path / "meta", tokenizer=str(tmp_path / "tokenizer"), context=64)
    assert torch.equal(logits(saved.model), logits(model))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch touched",)


def test_incomplete_and_unsafe_meta_files_are_refused(tmp_path, run_export, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", vocab_size=400)
    save_meta(tmp_path / "meta", model, 2)
    arguments = ("from=meta", f"path={tmp_path}/meta", f"to={tmp_path}/hf")
    assert "tokenizer.model is missing" in run_export(*arguments)[2]
    write_sentencepiece(tmp_path / "meta" / "tokenizer.model")
    first = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    torch.save({"x": Malicious()}, tmp_path / "meta" / "consolidated.00.pth")
    status, _, err = run_export(*arguments)
    assert status == 4 and "is not a complete LLaMA checkpoint of Meta's" in err
    assert not (tmp_path / "touched").exists()
    torch.save(
        {name: tensor for name, tensor in first.items() if "ffn_norm" not in name},
        tmp_path / "meta" / "consolidated.00.pth",
    )
    assert "consolidated.01.pth has other weights than consolidated.00.pth" in run_export(*arguments)[2]
    torch.save(first, tmp_path / "meta" / "consolidated.00.pth")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    for wrong in ({"n_heads": None}, {"n_layers": 9}, {"dim": 48}):
        (tmp_path / "meta" / "params.json").write_text(json.dumps(params | wrong))
        assert run_export(*arguments)[0] == 4
    (tmp_path / "meta" / "consolidated.00.pth").unlink()
    assert "are missing" in run_export(*arguments)[2]
    assert not (tmp_path / "hf").exists()
