"""Every YAML composes and validates; every rule refuses bad values; every error is one line with its key."""

import contextlib
import re

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from engine.settings.hydra_errors import explain_hydra_error
from engine.settings.keys import key_types
from engine.settings.messages import nearest
from engine.settings.presets import CONFIG_DIR
from engine.settings.reading import read_settings
from engine.settings.schema import Settings
from losses import LOSSES, Loss
from preference_datasets import DATASETS
from tests.quick import slow_except
from utils import UserError

PRESETS = sorted(
    f"{'+' * (path.parent.name == 'experiment')}{path.parent.name}={path.stem}" for path in CONFIG_DIR.glob("*/*.yaml")
)
# Preset -> overrides for its mandatory keys.
MANDATORY = {
    "model=blank_model": ["model.name_or_path=gpt2"],
    **{f"loss={name}": ["loss.beta=0.1"] for name in ("dpo", "cdpo", "ipo")},
}
DPO, CDPO, IPO = (["loss=" + name, "loss.beta=0.1"] for name in ("dpo", "cdpo", "ipo"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose("config", overrides=list(overrides))


def read(config: DictConfig) -> Settings:
    return read_settings(config, DATASETS)


def refused(*overrides: str) -> str:
    """The error message for these overrides."""
    with pytest.raises(UserError) as raised:
        read(composed(*overrides))
    return check_error(raised.value)


def value_of(settings: Settings, key: str):
    """The value of a dotted key, as training reads it."""
    group, _, name = key.rpartition(".")
    if group == "loss" and name in settings.loss.keywords:
        return settings.loss.keywords[name]
    node = getattr(settings, group) if group else settings
    return node[name] if isinstance(node, dict) else getattr(node, name)


def explained(*overrides: str) -> str:
    """The error message for overrides Hydra cannot compose."""
    with pytest.raises(Exception) as raised:
        composed(*overrides)
    return check_error(explain_hydra_error(raised.value))


def check_error(error: UserError) -> str:
    message = str(error)
    assert error.exit_status == 2
    assert re.fullmatch(r"error\[CONFIG\] [^\n]+; fix: [^\n]+", message)
    return message


@pytest.mark.parametrize("preset", slow_except(PRESETS, *PRESETS[::4]))
def test_preset_composes_and_validates(preset):
    settings = read(composed(preset, *MANDATORY.get(preset, [])))
    group, _, name = preset.lstrip("+").partition("=")
    if group == "experiment":
        written = OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml")
        assert isinstance(written, DictConfig)
        for key, value in written.items():
            if key not in ("defaults", "model", "loss", "peft", "wandb", "rollout", "critic"):  # groups
                assert value_of(settings, str(key)) in (value, [value])  # datasets: hh is a list of one
    else:
        expected = {"model": "name_or_path"}.get(group, "name")
        value = value_of(settings, f"{group}.{expected}")
        assert value and (group == "model" or value == name)


def test_reference_and_current_models_have_presets():
    models = {path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")}
    assert models >= {"blank_model", "gpt2-large", "gpt2-xl", "gptj", "llama7b", "pythia28", "pythia69", "tiny"}
    assert models >= {"pythia-70m", "pythia-12b", "llama3-8b", "qwen2.5-0.5b", "qwen3-8b", "mistral-7b", "smollm2-135m"}


def test_presets_build_on_blank_model():
    assert composed("model=pythia-2.8b").model == composed("model=pythia28").model
    assert composed("model=pythia28").model.name_or_path == "EleutherAI/pythia-2.8b"
    tiny = composed().model
    assert (tiny.name_or_path, tiny.tokenizer_name_or_path) == ("tiny", "films")
    assert tiny.architecture.model_type == "llama"


@pytest.mark.parametrize("name", LOSSES)
def test_every_key_is_checked(name):
    def keys(node, prefix=""):
        for key, value in node.items_ex(resolve=False):
            opened = isinstance(value, DictConfig) and prefix + key not in key_types()
            yield from keys(value, f"{prefix}{key}.") if opened else [prefix + key]

    peft = ("none", "lora", "qlora")[[*LOSSES].index(name) % 3]  # its keys depend on no loss
    assert set(keys(composed(f"loss={name}", f"peft={peft}"))) == set(key_types(name, peft))


@pytest.mark.parametrize(
    "path",
    [CONFIG_DIR / "config.yaml", CONFIG_DIR / "model/blank_model.yaml", *CONFIG_DIR.glob("[lp]*/*.yaml")],
    ids=lambda path: path.stem,
)
def test_every_key_has_a_comment_above(path):
    lines = path.read_text().split("\nhydra:")[0].splitlines()
    for above, line, below in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        if re.match(r" *\w+:", line) and line != "defaults:":
            # A mapping is explained by its keys.
            assert above.strip().startswith("#") or below.strip().startswith("#"), f"{path.name}: {line}"


def test_every_model_preset_begins_with_a_comment():
    for path in (CONFIG_DIR / "model").glob("*.yaml"):
        assert path.read_text().startswith("# "), path.name


@pytest.mark.parametrize(
    "overrides",
    [
        ["lr=1", "max_grad_norm=1"],
        ["lr=0", "warmup_steps=0"],
        ["n_epochs=null", "n_examples=10"],
        ["seed=4294967295"],
        ["model.fsdp_policy_mp=bfloat16"],
        ["mixed_precision=bfloat16"],
        ["model.policy_dtype=bfloat16", "model.reference_dtype=float16"],
        ["resume=auto", "local_run_dir=runs/a"],
        ["resume=runs/a/step-100"],
        ["n_eval_model_samples=300", "sample_during_eval=false"],
        ["num_processes=1"],
        *([f"activation_checkpointing={value}"] for value in ("auto", "true", "false", 0, 2)),
        *([f"matmul_precision={value}"] for value in ("highest", "high", "medium")),
        ["length_grouping=true", "batching=padded"],
        ["token_budget=1", "keep_checkpoints=null"],
        ["datasets=hh"],
        [f"datasets={CONFIG_DIR}"],
        ["datasets=[hh,shp,se,stack-exchange-paired,films]"],
        [f"datasets=[{CONFIG_DIR}]", f"data_dir={CONFIG_DIR}", f"chat_template={CONFIG_DIR}/config.yaml"],
        ["chat_template=hh", "format=sharegpt"],
        ["chat_template=llama2", "format=alpaca"],
        ["keep_best=loss/eval", "eval_every=8", "save_every=8"],
        ["peft=qlora", "trainer=FSDPTrainer", "mixed_precision=bfloat16", "peft.storage_dtype=bfloat16"],
        ["trainer=TensorParallelTrainer", "tensor_parallel.backend=package", "activation_checkpointing=0"],
        ["model=blank_model", f"model.name_or_path={CONFIG_DIR}"],
        ["model=tiny", "model.architecture={model_type: gpt2}"],
        [*DPO, "loss.label_smoothing=0.49", "loss.reference_free=true", "loss.sft_weight=1"],
        [*IPO, "loss.average_log_prob=true"],
        ["+hydra.anything=1"],
    ],
    ids=" ".join,
)
def test_accepted(overrides):
    settings = read(composed(*overrides))
    for override in overrides:
        key, _, text = override.partition("=")
        if key not in ("loss", "model", "peft", "model.architecture", "+hydra.anything"):
            value = yaml.safe_load(text)
            assert value_of(settings, key) in (value, [value])  # datasets=hh is a list of one


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        # Types.
        ("lr=abc", 'lr: must be a number of at least 0, not "abc"'),
        ("lr=", 'lr: must be a number of at least 0, not ""'),
        ("lr=null", "lr: must be a number of at least 0, not null"),
        ("lr=true", "lr: must be a number of at least 0, not true"),
        ("lr=nan", "lr: must be a number"),
        ("lr=inf", "lr: must be a number"),
        ("lr=-1e-6", "lr: must be a number of at least 0"),
        ("lr=${nope}", "lr: Interpolation key 'nope' not found"),
        ("lr={a:1}", "lr: must be a number"),
        ("batch_size=4.5", "batch_size: must be an integer of at least 1, not 4.5"),
        ("batch_size=0", "batch_size: must be an integer of at least 1, not 0"),
        ("batch_size=true", "batch_size: must be an integer"),
        ("debug=3", "debug: must be true or false, not 3"),
        ("debug=yes", 'debug: must be true or false, not "yes"'),
        ("wandb=1", "wandb: must hold wandb.enabled, wandb.entity, wandb.project"),
        ("wandb.entity=3", "wandb.entity: must be null or text, not 3 (as text: \"'3'\""),
        ("~lr", "lr: is not set"),
        ("~loss", "loss.name: is not set"),
        # Ranges and names.
        ("seed=-1", "seed: must be an integer of at least 0"),
        ("seed=4294967296", "seed: must be an integer"),
        ("test_fraction=1", "test_fraction: must be a number of at least 0 and below 1, not 1"),
        ("activation_checkpointing=-1", "must be auto, true, false or a number of layers, not -1"),
        ("activation_checkpointing=1.5", "activation_checkpointing: must be auto, true, false or a number of layers"),
        ("activation_checkpointing=some", "activation_checkpointing: must be auto, true"),
        ("activation_checkpointing=null", "activation_checkpointing: must be auto, true"),
        ("matmul_precision=low", "matmul_precision: must be highest, high or medium"),
        ("matmul_precision=null", "matmul_precision: must be"),
        ("length_grouping=1", "length_grouping: must be true or false, not 1"),
        ("max_grad_norm=0", "max_grad_norm: must be a number above 0"),
        ("warmup_steps=-1", "warmup_steps: must be"),
        ("token_budget=0", "token_budget: must be null or an integer of at least 1"),
        ("keep_checkpoints=0", "keep_checkpoints: must be null or"),
        ("eval_every=0", "eval_every: must be"),
        ("save_every=0", "save_every: must be"),
        ("eval_every=null", "eval_every: must be"),
        ("minimum_log_interval_secs=-1", "minimum_log_interval_secs: must be"),
        ("trainer=FSDPTrainr", "trainer: must be"),
        ("optimizer=adamw", "did you mean AdamW?"),
        ("lr_schedule=cosin", "did you mean cosine?"),
        ("batching=pack", "did you mean packed?"),
        ("reference=cache", "did you mean cached?"),
        ("format=string", "did you mean strings?"),
        ("peft.name=lorra", "peft.name: must be"),
        ("peft.name=lora", "peft.name: must come with the other keys"),
        ("exp_name=a/b", "exp_name: must be null or a name without"),
        ("exp_name=..", "exp_name: must be"),
        ("exp_name='a\\b'", "exp_name: must be"),
        ("local_dirs=.cache", "local_dirs: must be a list"),
        ("local_dirs=[]", "local_dirs: must be a list"),
        ("data_dir=/no/such", "data_dir: must be null or an existing directory"),
        ("chat_template=/no/such", "chat_template: must be null or hh, llama2, chatml or an existing file"),
        ("datasets=", "datasets: must be a list"),
        ("datasets=3", "datasets: must be a list"),
        ("datasets=[]", "datasets: must be a list"),
        ("datasets=null", "datasets: must be a list"),
        ("datasets=[hh,3]", "datasets: must be a list"),
        ("datasets=[hh,hh]", "each once"),
        ("datasets=[stack-exchange]", "did you mean stack-exchange-paired?"),
        ("datasets=[/no/such.jsonl]", "datasets: /no/such.jsonl does not exist and is not one of films, hh"),
        ("model.policy_dtype=float16", "would need loss scaling"),
        ("model.policy_dtype=bf16", "model.policy_dtype: must be float32, bfloat16 or float64"),
        ("mixed_precision=float16", "would need loss scaling"),
        ("mixed_precision=float32", "mixed_precision: must be null or bfloat16"),
        ("model.fsdp_policy_mp=float16", "model.fsdp_policy_mp: must be null or bfloat16"),
        ("model.reference_dtype=int8", "model.reference_dtype: must be null or"),
        ("model.name_or_path=/no/such", "model.name_or_path: must be"),
        ("model.tokenizer_name_or_path=./no/such", "model.tokenizer_name_or_path: must be"),
        ("model=gpt2 model.architecture={hidden_size:8}", "model.architecture: must be null or values"),
        # Missing values.
        ("loss=dpo", "loss.beta: is required: add loss.beta=0.1"),
        ("model=blank_model", "model.name_or_path: is required: add model.name_or_path="),
        # Unknown keys.
        ("+bach_size=4", "bach_size: unknown key (did you mean batch_size?)"),
        ("+wandb.projct=x", "wandb.projct: unknown key (did you mean wandb.project?)"),
        ("+qqq.x.y=1", "qqq.x.y: unknown key;"),
        ("+peft.rank=8", "peft.rank: not a key of the chosen peft, only of peft=lora"),
        # Losses.
        ("loss.name=trpo", "loss.name: must be sft, dpo, cdpo"),
        ("loss=dpo loss.beta=0", "loss.beta: must be a number above 0"),
        ("loss=cdpo loss.beta=-0.1", "loss.beta: must be a number above 0"),
        ("loss=ipo loss.beta=0", "loss.beta: must be a number above 0"),
        ("loss=dpo loss.beta=0.1 loss.label_smoothing=0.5", "loss.label_smoothing: must be a number of at least 0"),
        ("loss=cdpo loss.beta=0.1 loss.label_smoothing=0", "loss.label_smoothing: must be a number above 0"),
        ("loss=dpo loss.beta=0.1 loss.reference_free=1", "loss.reference_free: must be true or false"),
        ("loss=dpo loss.beta=0.1 loss.sft_weight=-1", "loss.sft_weight: must be a number of at least 0"),
        ("loss=dpo loss.beta=0.1 +loss.bta=1", "loss.bta: unknown key (did you mean loss.beta?)"),
        ("loss=ipo loss.beta=0.1 +loss.label_smoothing=0.1", "loss.label_smoothing: not a key of the chosen loss"),
        ("loss=ipo loss.beta=0.1 +loss.reference_free=true", "loss.reference_free: not a key of the chosen loss"),
        ("+loss.sft_weight=1", "loss.sft_weight: not a key of the chosen loss"),
        ("loss=f_dpo loss.divergence=kl", "loss.divergence: must be forward_kl, js or alpha, not"),
        ("loss=f_dpo loss.divergence=j", "(did you mean js?)"),
        ("loss=f_dpo loss.alpha=1", "loss.alpha: must be a number above 0 and below 1"),
        ("loss=slic +loss.average_log_prob=true", "loss.average_log_prob: not a key of the chosen loss"),
        ("loss=exo loss.label_smoothing=0", "loss.label_smoothing: must be a number above 0 and below 0.5"),
        ("loss=discopop loss.tau=2", "loss.tau: must be a number above 0 and at most 1"),
        ("loss=cpo +loss.sft_weight=1", "loss.sft_weight: not a key of the chosen loss"),
        ("loss=simpo +loss.average_log_prob=true", "loss.average_log_prob: not a key of the chosen loss"),
        ("loss=orpo +loss.sft_weight=1", "loss.sft_weight: not a key of the chosen loss"),
        ("loss=ln_dpo +loss.average_log_prob=true", "loss.average_log_prob: not a key of the chosen loss"),
        # Across keys.
        ("n_epochs=null", "n_epochs: is null and n_examples too"),
        ("max_prompt_length=512", "max_prompt_length: must be below max_length (512), not 512"),
        ("gradient_accumulation_steps=5", "gradient_accumulation_steps: must be at most batch_size (4), not 5"),
        ("n_eval_model_samples=300", "n_eval_model_samples: must be at most n_eval_examples (256), not 300"),
        ("mixed_precision=bfloat16 model.policy_dtype=bfloat16", "mixed_precision: "),
        ("mixed_precision=bfloat16 model.policy_dtype=float64", "mixed_precision: "),
        ("num_processes=2", "num_processes: must be null or 1 with trainer=BasicTrainer"),
        ("resume=auto", "resume: auto needs local_run_dir"),
        ("peft=lora peft.alpha=8 peft.scaling=1", "peft.alpha: 8 and peft.scaling=1 say the same"),
        ("peft=lora peft.rslora=true peft.scaling=1", "peft.rslora: true changes the meaning of alpha"),
        ("peft=lora peft.target_modules=all", "peft.target_modules: must be attention_qv, attention, all_linear or"),
        ("peft=qlora peft.quant_type=nf8", "peft.quant_type: must be nf4, fp4 or int8"),
        ("peft=qlora peft.compute_dtype=float16", "float16 would need loss scaling"),
        ("peft=qlora trainer=TensorParallelTrainer", "peft.name: qlora is for trainer=BasicTrainer"),
        ("peft=lora trainer=FSDPTrainer tensor_parallel_size=2", "tensor_parallel_size: must be null or 1 with peft"),
        (
            "peft=lora trainer=TensorParallelTrainer tensor_parallel.backend=package tensor_parallel_size=2",
            "peft.name: ",
        ),
        ("peft=lora trainer=FSDPTrainer peft.dora=true", "peft.dora: true needs full weights"),
        ("peft=lora trainer=FSDPTrainer peft.bias=all model.policy_dtype=bfloat16", "peft.bias: "),
        (
            "peft=qlora trainer=FSDPTrainer mixed_precision=bfloat16 peft.storage_dtype=float16",
            "peft.storage_dtype: ",
        ),
        (
            "peft=qlora trainer=FSDPTrainer model.fsdp_policy_mp=bfloat16 peft.storage_dtype=float32",
            "would cast them to mixed_precision=bfloat16, and lose them: uint8 or bfloat16",
        ),
        ("peft=lora freeze.first_n_layers=1", "freeze.first_n_layers: 1 is for peft=none"),
        ("peft=lora freeze.patterns=[x]", "freeze.patterns: is for peft=none"),
        ("freeze.patterns=['(']", "freeze.patterns: must be a list of regular expressions"),
        ("freeze.patterns=['a{99999999999}']", "freeze.patterns: must be a list of regular expressions"),
        ("optimizer=AdamW8bit trainer=FSDPTrainer", "optimizer: AdamW8bit cannot share its state"),
        ("optimizer=SGD8bit", "optimizer: must be"),
        ("keep_best=loss/train", "keep_best: must be null or loss/eval"),
        ("keep_best=loss/eval save_every=8", "keep_best: "),
        ("keep_best=rewards_eval/margins", "keep_best: rewards_eval/margins is of preference losses"),
        ("loss=kto keep_best=rewards_eval/margins", "keep_best: rewards_eval/margins is of losses of pairs: kto has"),
        ("loss=bco keep_best=logps_eval/chosen", "keep_best: logps_eval/chosen is of losses of pairs: bco has"),
        ("keep_best=ground_truth/policy sample_during_eval=false", "keep_best: "),
        ("loss=dpo loss.beta=1 keep_best=kl_eval", "keep_best: "),
        ("model.name_or_path=gpt2", "add model=blank_model"),
    ],
)
def test_refused(overrides, problem):
    message = refused(*overrides.split())
    assert problem in message
    assert "problems:" not in message, "one wrong value is one problem"


def test_all_problems_at_once():
    message = refused("lr=abc", "batch_size=4.5", "debug=3", "n_epochs=null", "+bach_size=4", "loss=dpo")
    assert "6 problems: " in message
    for key in ("lr", "batch_size", "debug", "n_epochs", "bach_size", "loss.beta"):
        assert f" {key}: " in message


def test_the_same_problem_of_two_keys():
    message = refused("debug=3", "model.trust_remote_code=3")
    assert "2 problems: debug: must be true or false, not 3; model.trust_remote_code: must be true or false" in message


@pytest.mark.parametrize("overrides", [[], ["lr=1", *CDPO], ["lr=abc", "n_epochs=null", "loss=dpo", "+x=1"]])
def test_nothing_is_rewritten(overrides):
    config = composed(*overrides)
    before = OmegaConf.to_yaml(config)
    with contextlib.suppress(UserError):
        read(config)
    assert OmegaConf.to_yaml(config) == before


def test_newline_in_a_value_is_escaped():
    config = composed()
    config.optimizer = "Adam\nW"
    with pytest.raises(UserError) as raised:
        read(config)
    check_error(raised.value)


def test_a_new_loss_is_checked_by_its_signature(monkeypatch):
    def margin_loss(chosen, rejected, *, beta: float, steps: int = 1, kind: str = "a"): ...

    monkeypatch.setitem(LOSSES, "margin", Loss(margin_loss, batch="pairs"))

    def with_loss(**keys):
        config = composed()
        config.loss = {"name": "margin", "average_log_prob": False, "sft_weight": 0, **keys}
        return config

    read(with_loss(beta=-1, steps=2, kind="b"))
    with pytest.raises(UserError) as raised:
        read(with_loss(beta="x", steps=1.5, kind=3, step=1))
    message = check_error(raised.value)
    assert "loss.beta: must be a number," in message
    assert "loss.steps: must be an integer," in message
    assert "loss.kind: must be text," in message
    assert "loss.step: unknown key (did you mean loss.steps?)" in message


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["bach_size=4"], "bach_size: unknown key (did you mean batch_size?)"),
        (["model.block=X"], "model.block: unknown key (did you mean model.block_name?)"),
        (["wandb.enable=false"], "did you mean wandb.enabled?"),
        (["modle=tiny"], "did you mean model?"),
        (["beta=0.1", "loss=dpo"], "did you mean loss.beta?"),
        (["loss=dpo", "loss.bta=0.1"], "did you mean loss.beta?"),
        (["loss.beta=0.1"], "loss.beta: not a key of the chosen loss, only of loss="),
        (["loss.beta=0.1"], "loss=cdpo,"),
        (["loss=ipo", "loss.label_smoothing=0.1"], "only of loss=cdpo, loss=dpo"),
        (["~lrr"], "lrr: unknown key (did you mean lr?)"),
        (["hydra.rum.dir=x"], "hydra.rum.dir: unknown key"),
        (["loss=ippo"], "loss=ippo: no such preset (did you mean ppo?); fix: choose one of "),
        (["model=pythia27"], "model=pythia27: no such preset (did you mean pythia28?)"),
        (["peft=zzz"], "peft=zzz: no such preset"),
        (["experiment=demo_sft"], "experiment: has no default to override; fix: add one: +experiment=NAME"),
        (["loss.beta=["], "cannot read 'loss.beta=[' on the command line; fix: write key=value"),
        (["lr"], "cannot read 'lr' on the command line"),
        (["lr=1,2"], "To sweep over it, add --multirun"),
        (["lr='${'"], "Error merging override lr='${': no viable alternative"),
        (["model=null"], "must be a string or a list"),
    ],
    ids=" ".join,
)
def test_hydra_errors_are_explained(overrides, problem):
    assert problem in explained(*overrides)


def test_omegaconf_errors_are_explained():
    config = composed("loss=dpo")
    with pytest.raises(Exception) as missing:
        _ = config.loss.beta
    assert "loss.beta" in check_error(explain_hydra_error(missing.value))
    with pytest.raises(Exception) as unknown:
        _ = config.nope
    assert "'nope'" in check_error(explain_hydra_error(unknown.value))
    assert "ValueError" in check_error(explain_hydra_error(ValueError()))


def test_the_nearest_name_is_suggested():
    assert nearest("adam", ["Adam", "AdamW"]) == "Adam"
    assert nearest("zzz", ["Adam"]) is None
