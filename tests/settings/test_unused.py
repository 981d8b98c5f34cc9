"""Settings that change nothing beside the others."""

import pytest

from engine.settings.unused import UNUSED, check_unused
from preference_datasets import DATASETS
from tests.configs import CONFIG_DIR, make_settings
from tests.quick import slow_except
from tests.runs import Program
from utils import UserError

DPO = ("loss=dpo", "loss.beta=0.1")
ONLINE = (
    "rollout.num_responses=4", "rollout.prompts=8", "rollout.epochs=2", "rollout.max_new_tokens=9",
    "rollout.temperature=0.5", "rollout.max_rows=9", "rollout.truncated=mask", "rollout.missing_eos_penalty=1",
    "rollout.max_resamples=1", "rollout.engine=loop", "rollout.overlong_buffer=9", "rewards=[length]",
    "reward_clip=1", "reward_timeout=9", "rollout.offload=true", "ptx.datasets=[films]",
)  # fmt: skip
WARNED = {
    "chat_template": (("chat_template=hh", "datasets=hh"), ("chat_template=hh", f"datasets={__file__}")),
    "sft_turns": (("sft_turns=last", f"datasets={__file__}", *DPO), ("sft_turns=last", f"datasets={__file__}")),
    "test_fraction": (("test_fraction=0.2", "datasets=hh"), ("test_fraction=0.2", f"datasets=[hh,{__file__}]")),
    "reference": (("reference=live",), ("reference=live", *DPO)),
    "model.reference_dtype": (
        ("model.reference_dtype=bfloat16", *DPO, "loss.reference_free=true"),
        ("model.reference_dtype=bfloat16", *DPO),
    ),
    "model.fsdp_policy_mp": (
        ("model.fsdp_policy_mp=bfloat16", "mixed_precision=null", "trainer=FSDPTrainer"),
        ("model.fsdp_policy_mp=bfloat16",),
    ),
    "loss.alpha": (("loss=f_dpo", "loss.alpha=0.6"), ("loss=f_dpo", "loss.alpha=0.3", "loss.divergence=alpha")),
    "loss.beta": (
        ("loss=online_dpo", "loss.beta=0.3", "loss.pair_loss=orpo", "loss.pair_options={odds_ratio_weight:1.0}"),
        ("loss=online_dpo", "loss.beta=0.3"),
    ),
    "loss.kl_horizon": (
        ("loss=ppo", "loss.kl_horizon=9"),
        ("loss=ppo", "loss.kl_horizon=9", "loss.target_kl=3"),
    ),
    "peft.double_quant": (
        ("peft=qlora", "peft.double_quant=false", "peft.quant_type=int8"),
        ("peft=qlora", "peft.double_quant=false"),
    ),
    "peft.storage_dtype": (
        ("peft=qlora", "peft.storage_dtype=bfloat16", "peft.quant_type=int8"),
        ("peft=qlora", "peft.storage_dtype=bfloat16"),
    ),
    "n_eval_model_samples": (("n_eval_model_samples=3", "sample_during_eval=false"), ("n_eval_model_samples=3",)),
    "weights": (("weights=[5]",), ("weights=[5,1]", "datasets=[films,hh]")),
    "max_nonfinite": (("max_nonfinite=3",), ("max_nonfinite=3", "on_nonfinite=skip")),
    "collective_timeout": (("collective_timeout=7",), ("collective_timeout=7", "trainer=FSDPTrainer")),
    "resume_allow": (("resume_allow=[lr]",), ("resume_allow=[lr]", "resume=runs/a")),
    "plan_hardware": (("plan_hardware=h100",), ("plan_hardware=h100", "plan=true")),
    "wandb.entity": (("wandb.entity=me", "wandb.enabled=false"), ("wandb.entity=me",)),
    "wandb.project": (("wandb.project=mine", "debug=true"), ("wandb.project=mine",)),
    "mlflow.tracking_uri": (("mlflow.tracking_uri=a",), ("mlflow.tracking_uri=a", "mlflow.enabled=true")),
    "mlflow.experiment": (
        ("mlflow.experiment=a", "mlflow.enabled=true", "debug=true"),
        ("mlflow.experiment=a", "mlflow.enabled=true"),
    ),
    "trackio.project": (("trackio.project=a",), ("trackio.project=a", "trackio.enabled=true")),
    "save_every": (("save_every=8", "debug=true"), ("save_every=8",)),
    "keep_checkpoints": (("keep_checkpoints=7", "debug=true"), ("keep_checkpoints=7",)),
    "keep_best": (("keep_best=loss/eval", "debug=true"), ("keep_best=loss/eval",)),
    "eval_batch_size": (("eval_batch_size=3", "loss=grpo"), ("eval_batch_size=3", *DPO)),
    **{
        setting.partition("=")[0]: ((setting,), (setting, "-m"))
        for setting in ("sweep.jobs=2", "sweep.gpus_per_job=2", "sweep.dir=a")
    },
    "length_grouping": (("length_grouping=true", "loss=pretrain"), ("length_grouping=true",)),
    "min_lr": (("min_lr=1e-9",), ("min_lr=1e-9", "lr_schedule=linear")),
    "on_bad_reward": (("on_bad_reward=drop",), ("on_bad_reward=drop", "loss=grpo")),
}
REFUSED = {
    "format": (("format=strings", "datasets=[hh,films]"), ("format=strings", f"datasets=[hh,{__file__}]")),
    "data_dir": (("data_dir=.", "datasets=films"), ("data_dir=.", "datasets=[films,shp]")),
    "text_field": (
        ("text_field=body", "datasets=films", "loss=pretrain"),
        ("text_field=body", f"datasets={__file__}", "loss=pretrain"),
    ),
    "document_mask": (("document_mask=false",), ("document_mask=false", "loss=pretrain")),
    "model.tokenizer_name_or_path": (
        ("loss=pretrain", "model=15m", "tokenizer.train=300", "model.tokenizer_name_or_path=gpt2"),
        ("loss=pretrain", "model=15m", "model.tokenizer_name_or_path=gpt2"),
    ),
    "reference_refresh.every": (("reference_refresh.every=4",), ("reference_refresh.every=4", *DPO)),
    "reference_refresh.mix": (
        ("reference_refresh.mix=0.5", *DPO),
        ("reference_refresh.mix=0.5", *DPO, "reference_refresh.every=4"),
    ),
    "rollout.overlong_penalty": (
        ("rollout.overlong_penalty=2", "loss=grpo"),
        ("rollout.overlong_penalty=2", "loss=grpo", "rollout.overlong_buffer=9"),
    ),
    "rollout.top_p": (("rollout.top_p=0.9",), ("rollout.top_p=0.9", "loss=best_of_n")),
    **{setting.partition("=")[0]: ((setting,), (setting, "loss=grpo")) for setting in ONLINE},
    **{
        setting.partition("=")[0]: ((setting, "loss=grpo"), (setting, "loss=ppo"))
        for setting in ("critic.archive=a", "critic.lr=0.1", "critic.max_grad_norm=3")
    },
    "win_rate.judge": (("win_rate.judge=RUN", "sample_during_eval=false", *DPO), ("win_rate.judge=RUN", *DPO)),
    "win_rate.prompts": (("win_rate.prompts=9", "win_rate.judge=null", *DPO), ("win_rate.prompts=9", *DPO)),
    "ptx.weight": (
        ("ptx.weight=3", "loss=grpo"),
        ("ptx.weight=3", "loss=grpo", "ptx.datasets=[films]"),
    ),
    "rollout.vllm_memory": (
        ("rollout.vllm_memory=0.5", "loss=grpo"),
        ("rollout.vllm_memory=0.5", "loss=grpo", "rollout.engine=vllm"),
    ),
    "reward_weights": (
        ("reward_weights=[2]", "rewards=[length]"),
        ("reward_weights=[2]", "rewards=[length]", "loss=grpo"),
    ),
    "reward_options": (
        ("reward_options={length:{most:9}}", "rewards=[length]"),
        ("reward_options={length:{most:9}}", "rewards=[length]", "loss=grpo"),
    ),
}


def warnings_of(*overrides: str) -> list[str]:
    has_experiment = any(override.startswith("+experiment") for override in overrides)
    given = [override for override in overrides if override != "-m"]
    return check_unused(make_settings(*given), DATASETS, has_experiment, is_sweep="-m" in overrides)


def test_dialogues_of_online_training_give_their_last_prompt() -> None:
    (warning,) = warnings_of("loss=grpo", "sft_turns=last", f"datasets={__file__}")
    assert warning == 'warning: sft_turns="last" changes nothing: loss=grpo learns sampled responses, not dialogues'


def test_every_key_has_a_case() -> None:
    assert {*WARNED, *REFUSED} == {each.key for each in UNUSED}


@pytest.mark.parametrize("key", WARNED)
def test_a_setting_without_effect_is_told(key: str) -> None:
    without_effect, _ = WARNED[key]
    (warning,) = warnings_of(*without_effect)
    assert warning.startswith(f"warning: {key}=") and "\n" not in warning


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_without_effect_on_data_is_refused(key: str) -> None:
    without_effect, _ = REFUSED[key]
    with pytest.raises(UserError, match=rf"^error\[CONFIG\] {key}: .* would change nothing: .*; fix: leave"):
        warnings_of(*without_effect)


@pytest.mark.parametrize("key", slow_except([*WARNED, *REFUSED], "reference", "rollout.top_p"))
def test_a_setting_with_an_effect_is_accepted_in_silence(key: str) -> None:
    _, with_effect = (WARNED | REFUSED)[key]
    assert warnings_of(*with_effect) == []


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")))
def test_shipped_experiments_are_silent(experiment: str) -> None:
    path = f"model.name_or_path={CONFIG_DIR}" if "llama7b" in experiment else "seed=0"
    for more in ((), ("sample_during_eval=false", "mixed_precision=null")):
        overrides = more if experiment.startswith(("demo", "pythia")) else ()
        assert warnings_of(f"+experiment={experiment}", path, *overrides) == []


def test_reference_commands_are_silent() -> None:
    common = ("datasets=[hh]", "exp_name=x", "gradient_accumulation_steps=2", "batch_size=64", "eval_batch_size=32")
    model = ("trainer=FSDPTrainer", "sample_during_eval=false", "model=pythia28", "model.fsdp_policy_mp=bfloat16")
    assert warnings_of(*common, *model, "loss=sft") == warnings_of(*common, *model, *DPO) == []


def test_the_program_tells_before_it_trains(program: Program) -> None:
    run = program.ok("collective_timeout=7", "plan=true")
    assert run.out.startswith("warning: collective_timeout=7 changes nothing: trainer=BasicTrainer is one process\n")
    run = program("format=strings")
    assert run.status == 2 and run.err.startswith(
        'error[CONFIG] format: "strings" would change nothing: it is for files'
    )
