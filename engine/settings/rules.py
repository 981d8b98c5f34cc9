"""Rules across keys: one function a rule. Those of online training are in online_rules.py."""

from collections.abc import Mapping
from typing import Any

from engine.settings.choices import BITSANDBYTES_OPTIMIZERS
from engine.settings.endpoint import wrong_endpoint
from engine.settings.messages import shown
from engine.settings.online_rules import is_online
from engine.settings.presets import tiny_architecture
from engine.settings.rule_table import RULES, Problem, rule

SMALLEST_TOKENIZER = 259  # bytes, and the special tokens of engine/data/tokenizer_training.py


def broken_rules(values: Mapping[str, Any]) -> dict[str, str]:
    """The problems, by key, of all rules with valid values for every key."""
    problems: dict[str, str] = {}
    for each in RULES:
        if all(key in values or key.endswith("?") for key in each.keys):
            problem = each.problem(*(values.get(key.removesuffix("?")) for key in each.keys))
            if problem:
                problems.setdefault(each.keys[0], problem)
    return problems


# ---- Data and steps ----


@rule("n_epochs", "n_examples")
def training_ends(n_epochs: int | None, n_examples: int | None) -> Problem:
    is_endless = n_epochs is None and n_examples is None
    return "is null and n_examples too, so training would never end: give one of them" if is_endless else None


@rule("weights", "datasets")
def weights_are_of_datasets(weights: list[float] | None, datasets: list[str]) -> Problem:
    if weights is None or len(weights) == len(datasets):
        return None
    return f"must have one number for each of datasets ({len(datasets)}), not {len(weights)}"


@rule("max_prompt_length", "max_length")
def prompt_leaves_room(max_prompt_length: int, max_length: int) -> Problem:
    if max_prompt_length < max_length:
        return None
    return f"must be below max_length ({max_length}), not {max_prompt_length}, to leave room for a response"


@rule("gradient_accumulation_steps", "batch_size")
def microbatches_have_examples(num_microbatches: int, batch_size: int) -> Problem:
    is_broken = num_microbatches > batch_size
    return f"must be at most batch_size ({batch_size}), not {num_microbatches}" if is_broken else None


@rule("n_eval_model_samples", "n_eval_examples", "sample_during_eval")
def samples_are_of_eval_examples(num_samples: int, num_examples: int, samples: bool) -> Problem:
    is_broken = samples and num_samples > num_examples
    return f"must be at most n_eval_examples ({num_examples}), not {num_samples}" if is_broken else None


@rule("win_rate.prompts", "n_eval_examples")
def win_rates_are_of_eval_examples(num_prompts: int | None, num_examples: int) -> Problem:
    if num_prompts is None or num_prompts <= num_examples:
        return None
    return f"must be at most n_eval_examples ({num_examples}), not {num_prompts}"


@rule("win_rate.endpoint", "win_rate.judge")
def endpoint_is_of_a_server(options: dict[str, Any] | None, judge: str | None) -> Problem:
    return wrong_endpoint(judge, options)


@rule("mixed_precision", "model.policy_dtype")
def mixed_precision_is_over_fp32(mixed_precision: str | None, policy_dtype: str) -> Problem:
    if mixed_precision is None or policy_dtype == "float32":
        return None
    return f"{mixed_precision} needs model.policy_dtype=float32, not {policy_dtype}: leave one of them out"


@rule("resume", "local_run_dir")
def auto_resume_has_a_directory(resume: str | None, local_run_dir: str | None) -> Problem:
    is_broken = resume == "auto" and local_run_dir is None
    return "auto needs local_run_dir, the run to continue" if is_broken else None


@rule("model.name_or_path", "model.architecture")
def tiny_model_has_no_name(name: str, architecture: dict[str, Any] | None) -> Problem:
    if name == "tiny" or architecture != tiny_architecture():
        return None
    return f"{shown(name)} would be ignored, as model=tiny makes its own model: add model=blank_model"


@rule("min_lr", "lr", "lr_schedule")
def decay_goes_down(min_lr: float, lr: float, schedule: str) -> Problem:
    if schedule == "constant" or min_lr <= lr:
        return None
    return f"must be at most lr ({lr:g}), not {min_lr:g}; a tenth of lr is usual"


# ---- Pretraining ----


@rule("document_mask", "batching", "loss.name")
def padded_rows_are_one_document(document_mask: bool, batching: str, loss: str) -> Problem:
    if not document_mask or batching == "packed" or not learns_windows(loss):
        return None
    return "true needs batching=packed: a padded row is one text"


@rule("max_length", "document_mask", "loss.name")
def windows_have_targets(max_length: int, document_mask: bool, loss: str) -> Problem:
    if max_length > 1 or not document_mask or not learns_windows(loss):
        return None
    return "must be at least 2 with document_mask: a window of one token may have nothing to predict"


@rule("tokenizer.train", "loss.name", "model.architecture", "model.archive")
def trained_tokenizer_is_of_a_new_model(
    size: int | None, loss: str, architecture: dict[str, Any] | None, archive: str | None
) -> Problem:
    if size is None or (learns_windows(loss) and architecture is not None and archive is None):
        return None
    if not learns_windows(loss):
        return f"{size} is for loss=pretrain, not loss={loss}: leave it out, and give the tokenizer of that run"
    return f"{size} needs a new model, as a trained one has a tokenizer: model=15m, model.archive=null"


@rule("tokenizer.train", "loss.name")
def byte_level_tokenizer_has_all_bytes(size: int | None, loss: str) -> Problem:
    if size is None or size >= SMALLEST_TOKENIZER:
        return None
    return f"must be at least {SMALLEST_TOKENIZER}, one for each byte and the special tokens, not {size}"


def learns_windows(loss: str) -> bool:
    """Whether a loss learns windows of text."""
    from losses import LOSSES  # imports torch, which takes seconds

    return LOSSES[loss].batch == "tokens"


# ---- Processes ----


@rule("num_processes", "trainer")
def basic_trainer_is_one_process(num_processes: int | None, trainer: str) -> Problem:
    is_broken = trainer == "BasicTrainer" and num_processes not in (None, 1)
    return f"must be null or 1 with trainer=BasicTrainer, not {num_processes}" if is_broken else None


@rule("tensor_parallel_size", "trainer")
def basic_trainer_splits_no_products(size: int | None, trainer: str) -> Problem:
    is_broken = trainer == "BasicTrainer" and size not in (None, 1)
    return f"must be null or 1 with trainer=BasicTrainer, not {size}" if is_broken else None


@rule("tensor_parallel.backend", "trainer")
def package_is_of_tensor_parallel(backend: str, trainer: str) -> Problem:
    is_broken = backend == "package" and trainer != "TensorParallelTrainer"
    return f"package needs trainer=TensorParallelTrainer, not {trainer}" if is_broken else None


@rule("compile", "tensor_parallel.backend")
def package_does_not_compile(compiles: bool, backend: str) -> Problem:
    return "true needs tensor_parallel.backend=native" if compiles and backend == "package" else None


@rule("activation_checkpointing", "tensor_parallel.backend")
def package_does_not_checkpoint_activations(checkpointing: str | bool | int, backend: str) -> Problem:
    if checkpointing in (False, 0) or backend == "native":
        return None
    reason = "the devices of one process would wait for each other"
    return f"{shown(checkpointing)} needs tensor_parallel.backend=native: {reason}"


@rule("num_processes", "tensor_parallel.backend")
def package_is_one_process(num_processes: int | None, backend: str) -> Problem:
    if backend == "native" or num_processes in (None, 1):
        return None
    return f"must be null or 1 with tensor_parallel.backend=package, not {num_processes}: set tensor_parallel_size"


@rule("plan", "tensor_parallel.backend")
def package_has_no_plan(plan: bool, backend: str) -> Problem:
    return "true needs tensor_parallel.backend=native" if plan and backend == "package" else None


@rule("fsdp.replicas", "trainer")
def replicas_are_of_fsdp(replicas: int, trainer: str) -> Problem:
    is_broken = replicas > 1 and trainer != "FSDPTrainer"
    return f"must be 1 with trainer={trainer}, not {replicas}" if is_broken else None


@rule("fsdp.cpu_offload", "trainer")
def offload_is_of_fsdp(cpu_offload: bool, trainer: str) -> Problem:
    is_broken = cpu_offload and trainer != "FSDPTrainer"
    return f"needs trainer=FSDPTrainer, not {trainer}" if is_broken else None


@rule("deterministic", "fsdp.replicas")
def deterministic_has_no_replicas(deterministic: bool, replicas: int) -> Problem:
    return f"true needs fsdp.replicas=1, not {replicas}" if deterministic and replicas > 1 else None


@rule("deterministic", "trainer", "tensor_parallel_size")
def deterministic_splits_no_products(deterministic: bool, trainer: str, size: int | None) -> Problem:
    if not deterministic or (trainer != "TensorParallelTrainer" and size in (None, 1)):
        return None
    return "true sums gradients across processes of FSDPTrainer, not across slices of matrix products"


# ---- Optimizers ----


@rule("optimizer", "trainer")
def adafactor_is_of_one_process(optimizer: str, trainer: str) -> Problem:
    if optimizer != "Adafactor" or trainer == "BasicTrainer":
        return None
    return f"Adafactor reads full matrices, and processes hold shards: choose another with trainer={trainer}"


@rule("optimizer", "trainer")
def bitsandbytes_is_of_one_process(optimizer: str, trainer: str) -> Problem:
    if optimizer not in BITSANDBYTES_OPTIMIZERS or trainer == "BasicTrainer":
        return None
    return f"{optimizer} cannot share its state among processes: choose another with trainer={trainer}"


# ---- Adapters and frozen parameters ----


@rule("peft.name", "trainer")
def adapters_are_not_split(peft: str, trainer: str) -> Problem:
    if peft == "none" or trainer != "TensorParallelTrainer":
        return None
    return f"{peft} is for trainer=BasicTrainer and FSDPTrainer: adapters' matrices are too small to be split"


@rule("tensor_parallel_size", "peft.name", "trainer")
def adapters_are_not_split_under_fsdp(size: int | None, peft: str, trainer: str) -> Problem:
    if peft == "none" or trainer != "FSDPTrainer" or size in (None, 1):
        return None
    return f"must be null or 1 with peft={peft}, not {size}: adapters' matrices are too small to be split"


@rule("peft.alpha", "peft.scaling")
def scale_is_given_once(alpha: float | None, scaling: float | None) -> Problem:
    if alpha is None or scaling is None:
        return None
    return f"{alpha:g} and peft.scaling={scaling:g} say the same: leave one of them null"


@rule("peft.rslora", "peft.scaling")
def rslora_has_alpha(rslora: bool, scaling: float | None) -> Problem:
    if not rslora or scaling is None:
        return None
    return f"true changes the meaning of alpha, and peft.scaling={scaling:g} replaces alpha: leave one of them out"


@rule("peft.dora", "trainer")
def dora_has_full_weights(dora: bool, trainer: str) -> Problem:
    is_broken = dora and trainer != "BasicTrainer"
    return "true needs full weights, and processes hold shards: trainer=BasicTrainer" if is_broken else None


@rule("peft.bias", "model.policy_dtype", "trainer")
def shards_have_one_dtype(bias: str, dtype: str, trainer: str) -> Problem:
    if bias == "none" or dtype != "bfloat16" or trainer != "FSDPTrainer":
        return None
    return (
        f"{bias} trains in {dtype} beside adapters in fp32, and shards cannot mix: set mixed_precision={dtype} instead"
    )


@rule("peft.storage_dtype", "mixed_precision", "trainer", "peft.quant_type")
def packed_weights_are_not_cast(storage: str, mixed_precision: str | None, trainer: str, quant_type: str) -> Problem:
    is_cast = trainer == "FSDPTrainer" and mixed_precision is not None and storage not in ("uint8", mixed_precision)
    if not is_cast or quant_type == "int8":
        return None
    cast = f"FSDPTrainer would cast them to mixed_precision={mixed_precision}, and lose them"
    return f"{storage} holds packed weights as numbers; {cast}: uint8 or {mixed_precision}"


@rule("freeze.first_n_layers", "peft.name")
def adapters_freeze_all_layers(num_layers: int, peft: str) -> Problem:
    if num_layers == 0 or peft == "none":
        return None
    return f"{num_layers} is for peft=none: {peft} freezes all but peft.full_modules and peft.bias"


@rule("freeze.patterns", "peft.name")
def adapters_freeze_all_parameters(patterns: list[str], peft: str) -> Problem:
    if not patterns or peft == "none":
        return None
    return f"is for peft=none: {peft} freezes all but peft.full_modules and peft.bias"


@rule("freeze.first_n_layers", "tensor_parallel.backend")
def package_freezes_no_layers(num_layers: int, backend: str) -> Problem:
    return f"{num_layers} needs tensor_parallel.backend=native" if num_layers and backend == "package" else None


@rule("freeze.patterns", "tensor_parallel.backend")
def package_freezes_no_parameters(patterns: list[str], backend: str) -> Problem:
    return "needs tensor_parallel.backend=native" if patterns and backend == "package" else None


# ---- The moving reference ----


@rule("reference_refresh.every", "reference")
def moving_reference_is_live(every: int | None, reference: str) -> Problem:
    if every is None or reference != "cached":
        return None
    return f"{every} moves the reference, and reference=cached keeps its first log-probs: reference=auto or live"


@rule("reference_refresh.every", "peft.name")
def moving_reference_has_full_weights(every: int | None, peft: str) -> Problem:
    if every is None or peft == "none":
        return None
    return f"{every} needs peft=none, not {peft}: a reference without adapters cannot move to them"


@rule("reference_refresh.mix", "model.reference_dtype", "model.policy_dtype")
def small_moves_need_the_dtype_of_the_policy(mix: float, reference: str | None, policy: str) -> Problem:
    if mix == 1 or reference in (None, policy):
        return None
    return f"{mix:g} needs model.reference_dtype={policy} or null, not {reference}: rounding would lose small moves"


@rule("keep_best", "reference_refresh.every")
def best_checkpoint_has_one_reference(best: str | None, every: int | None) -> Problem:
    if best is None or every is None or best.startswith(("logps", "ground_truth")):
        return None
    return f"{best} is measured against the reference, and reference_refresh.every={every} moves it: logps_eval/chosen"


@rule("sample_during_eval", "loss.name")
def scores_are_not_sampled(samples: bool, loss: str) -> Problem:
    from losses import LOSSES  # imports torch, which takes seconds

    if not samples or LOSSES[loss].head == "lm":
        return None
    return f"true needs a model of text, and loss={loss} trains one of scores: sample_during_eval=false"


# ---- The best checkpoint ----


@rule("keep_best", "save_every", "eval_every")
def best_checkpoint_is_evaluated(best: str | None, save_every: int | None, eval_every: int) -> Problem:
    if best is None or save_every in (None, eval_every):
        return None
    fix = f"leave save_every out, or set it to eval_every ({eval_every})"
    return f"{best} compares checkpoints by an evaluation of each: {fix}"


@rule("keep_best", "loss.name")
def best_is_a_metric_of_the_loss(best: str | None, loss: str) -> Problem:
    from losses import LOSSES  # imports torch, which takes seconds

    batch = LOSSES[loss].batch
    if best is not None and best.startswith(("rewards", "kl")) and batch == "sft":
        return f"{best} is of preference losses, not of {loss}"
    if best is not None and best != "loss/eval" and batch == "tokens":
        return f"{best} is not measured with loss={loss}: loss/eval"
    if batch == "rollout":
        return None  # see best_is_a_metric_of_rollouts
    if best is not None and best.startswith(("rewards", "logps")) and batch == "unpaired":
        return f"{best} is of losses of pairs: {loss} has loss/eval, kl_eval and ground_truth/*"
    if best is not None and best.startswith("logps") and LOSSES[loss].head == "score":
        return f"{best} is of losses of log-probs, not of {loss}"
    return None


@rule("reference", "loss.name")
def token_kl_has_a_live_reference(reference: str, loss: str) -> Problem:
    if reference != "cached" or not _needs_token_kl(loss):
        return None
    return f"cached keeps log-probs of responses, and loss={loss} compares whole distributions: auto or live"


@rule("keep_best", "reference", "loss.name")
def kl_has_a_live_reference(best: str | None, reference: str, loss: str) -> Problem:
    is_live = reference == "live" or (reference == "auto" and (_needs_token_kl(loss) or is_online(loss)))
    if best != "kl_eval" or is_live:
        return None
    return f"{best} needs reference=live, not {reference}: it must be measured in every evaluation"


def _needs_token_kl(loss: str) -> bool:
    from losses import LOSSES  # imports torch, which takes seconds

    return "token kl" in LOSSES[loss].needs


@rule("keep_best", "sample_during_eval", "loss.name")
def best_by_samples_has_samples(best: str | None, samples: bool, loss: str) -> Problem:
    if best is None or samples or not (is_online(loss) or best.startswith(("ground_truth", "kl"))):
        return None
    return f"{best} is measured on samples: sample_during_eval=true"
