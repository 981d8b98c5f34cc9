"""Checks a composed config before anything is loaded: every key, the rules across keys, all problems at once."""

import difflib
import errno
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.secrets import keys_with_secrets
from losses import LOSSES
from utils import UserError, clipped

CONFIG_DIR = Path(__file__).resolve().parent.parent / "config"
TINY = CONFIG_DIR / "model" / "tiny.yaml"
TRAINERS = ("BasicTrainer", "FSDPTrainer", "TensorParallelTrainer")
OPTIMIZERS = ("RMSprop", "Adam", "AdamW", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Adafactor")
# Of bitsandbytes.
SMALL_OPTIMIZERS = (
    "Adam8bit", "AdamW8bit", "Lion8bit", "RMSprop8bit", "Adagrad8bit", "AdEMAMix8bit", "LAMB8bit", "PagedAdam8bit",
    "PagedAdamW8bit", "PagedLion8bit", "PagedAdEMAMix8bit", "PagedAdam32bit", "PagedAdamW32bit", "PagedLion32bit",
)  # fmt: skip
# Metrics that a best checkpoint may be chosen by, and whether more is better.
BEST_BY = {
    "loss/eval": False, "kl_eval": False, "rewards_eval/accuracies": True, "rewards_eval/margins": True,
    "rewards_eval/chosen": True, "logps_eval/chosen": True, "ground_truth/policy": True, "ground_truth/win_rate": True,
}  # fmt: skip
PEFT_PRESETS = ("attention_qv", "attention", "all_linear")


# ---- What a value may be ----


@dataclass(frozen=True)
class Check:
    """What one key may hold.

    Args:
        expected: completes "must be ...".
        accepts: whether a value is allowed.
        hint: what to say of a value that is not, beside what was expected; may be empty.
    """

    expected: str
    accepts: Callable[[Any], bool]
    hint: Callable[[Any], str] = lambda value: ""

    def problem(self, value: Any) -> str | None:
        if self.accepts(value):
            return None
        return f"must be {self.expected}, not {shown(value)}{bracketed(self.hint(value))}"


def shown(value: Any) -> str:
    """A value as YAML has it: null and true, not None and True."""
    return clipped(json.dumps(value, ensure_ascii=False, default=str), 500)


def bracketed(hint: str) -> str:
    return f" ({hint})" if hint else ""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of names that name was probably meant to be."""
    lowered = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1)
    return lowered[matches[0]] if matches else None


def did_you_mean(guess: str | None) -> str:
    return f"did you mean {guess}?" if guess else ""


def optional(check: Check) -> Check:
    def accepts(value: Any) -> bool:
        return value is None or check.accepts(value)

    return replace(check, expected=f"null or {check.expected}", accepts=accepts)


def one_of(*names: str, reasons: dict[str, str] | None = None) -> Check:
    """One of names; reasons say why a value that might be expected among them is not."""
    return Check(
        expected=names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}",
        accepts=lambda value: isinstance(value, str) and value in names,
        hint=lambda value: (
            (reasons or {}).get(str(value)) or did_you_mean(nearest(str(value), names) if len(names) > 1 else None)
        ),
    )


def number(
    *, at_least: float | None = None, above: float | None = None, below: float | None = None, integer: bool = False
) -> Check:
    """A finite number in a range; an int will do for a float, a bool for neither."""
    kinds = int if integer else (int, float)
    bounds = {"of at least": at_least, "above": above, "below": below}
    words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    return Check(
        expected=f"{'an integer' if integer else 'a number'} {words}".rstrip(),
        accepts=lambda value: (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and -math.inf < value < math.inf
            and (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (below is None or value < below)
        ),
    )


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not re.search("[\0\ud800-\udfff]", value)


def is_run_name(value: Any) -> bool:
    """A name that adds no level to a path and leaves none, and that a file system takes with a time behind it."""
    is_name = is_text(value) and value.isprintable() and not any(part in value for part in ("/", "\\", ".."))
    return is_name and len(value.encode()) <= 200


def is_possible_path(value: Any) -> bool:
    """Text that a file system can be asked about, whether or not something is there."""
    if not is_text(value):
        return False
    try:
        os.lstat(value)
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def is_model_or_path(value: Any) -> bool:
    """A name that may be on the hub, or a path, told by how it begins, that exists."""
    return is_possible_path(value) and (not value.startswith(("/", "./", "../", "~")) or os.path.exists(value))


def unknown_datasets(value: Any) -> Iterator[str]:
    from preference_datasets import DATASETS  # here, as nothing else in this module needs the data's libraries

    for name in value:
        if name not in DATASETS and not os.path.exists(name):
            guess = did_you_mean(nearest(name, DATASETS))
            yield f"{name} is no existing path and not one of {', '.join(DATASETS)}{guess and ': ' + guess}"


def is_pattern(value: str) -> bool:
    try:
        re.compile(value)
        return True
    except re.error:
        return False


def is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(is_text(item) for item in value)


boolean = Check("true or false", lambda value: isinstance(value, bool))
positive = number(above=0)
non_negative = number(at_least=0)
count = number(at_least=1, integer=True)
count_or_zero = number(at_least=0, integer=True)
text = Check(
    "text",
    is_text,
    hint=lambda value: (
        f"as text: \"'{value}'\", in both quotes"
        if isinstance(value, int | float)
        else "it holds what is no character"
        if isinstance(value, str) and value and not is_text(value)
        else ""
    ),
)
path = replace(
    text,
    accepts=is_possible_path,
    hint=lambda value: (
        "a name in it is too long" if is_text(value) and not is_possible_path(value) else text.hint(value)
    ),
)
anything = Check("anything", lambda value: True)

NO_LOSS_SCALING = {"float16": "float16 would need loss scaling, which is not done here: use bfloat16"}

# ---- Every key ----

CHECKS: dict[str, Check] = {
    "seed": number(at_least=0, below=2**32, integer=True),
    "exp_name": optional(Check("a name without /, \\ and .., of at most 200 bytes", is_run_name, hint=text.hint)),
    "local_dirs": Check(
        "a list of paths such as [/scr,.cache]",
        lambda value: is_list_of_text(value) and all(map(is_possible_path, value)),
    ),
    "local_run_dir": optional(path),
    "cache_dir": optional(path),
    "resume": optional(replace(path, expected="auto or a path")),
    "resume_allow": Check("a list of keys such as [lr]", lambda value: value == [] or is_list_of_text(value)),
    "debug": boolean,
    "datasets": Check(
        "a list of names and paths such as [hh,shp], each once",
        lambda value: is_list_of_text(value) and len(set(value)) == len(value) and not any(unknown_datasets(value)),
        hint=lambda value: ", ".join(unknown_datasets(value)) if is_list_of_text(value) else "",
    ),
    "data_dir": optional(Check("an existing directory", lambda value: is_text(value) and os.path.isdir(value))),
    "format": optional(one_of("strings", "transcripts", "messages", "sharegpt", "ranked", "alpaca", "dolly")),
    "on_bad_row": one_of("error", "drop"),
    "chat_template": optional(
        Check(
            "hh, llama2 or an existing file",
            lambda value: value in ("hh", "llama2") or (is_text(value) and os.path.isfile(value)),
        )
    ),
    "sft_turns": one_of("all", "last"),
    "test_fraction": number(at_least=0, below=1),
    "max_length": count,
    "max_prompt_length": count,
    "n_epochs": optional(count),
    "n_examples": optional(count),
    "batch_size": count,
    "gradient_accumulation_steps": count,
    "token_budget": optional(count),
    "length_grouping": boolean,
    "batching": one_of("packed", "padded"),
    "trainer": one_of(*TRAINERS),
    "num_processes": optional(count),
    "plan": boolean,
    "plan_hardware": optional(one_of("h200", "h100", "a100", "rtx4090", "rtx3090")),
    "tensor_parallel_size": optional(count),
    "tensor_parallel.backend": one_of("native", "package"),
    "fsdp.replicas": count,
    "fsdp.cpu_offload": boolean,
    "deterministic": boolean,
    "collective_timeout": count,
    "freeze.first_n_layers": count_or_zero,
    "freeze.patterns": Check(
        "a list of regular expressions such as ['embed']",
        lambda value: value == [] or (is_list_of_text(value) and all(map(is_pattern, value))),
    ),
    "optimizer": one_of(*OPTIMIZERS, *SMALL_OPTIMIZERS),
    "lr": non_negative,
    "warmup_steps": count_or_zero,
    "lr_schedule": one_of("constant", "linear", "cosine"),
    "max_grad_norm": positive,
    "on_nonfinite": one_of("abort", "skip", "rollback"),
    "max_nonfinite": count_or_zero,
    "activation_checkpointing": Check(
        "auto, true, false or a number of blocks",
        lambda value: value == "auto" or isinstance(value, bool) or (isinstance(value, int) and value >= 0),
    ),
    "matmul_precision": one_of("highest", "high", "medium"),
    "compile": boolean,
    "reference": one_of("auto", "cached", "live"),
    "do_first_eval": boolean,
    "eval_every": count,
    "n_eval_examples": count,
    "eval_batch_size": count,
    "sample_during_eval": boolean,
    "n_eval_model_samples": count_or_zero,
    "save_every": optional(count),
    "keep_checkpoints": optional(count),
    "keep_best": optional(one_of(*BEST_BY)),
    "minimum_log_interval_secs": non_negative,
    "wandb.enabled": boolean,
    "wandb.entity": optional(text),
    "wandb.project": text,
    "tensorboard": boolean,
    "model.name_or_path": Check("a model's name on the hub or an existing path", is_model_or_path, hint=path.hint),
    "model.tokenizer_name_or_path": optional(
        Check("a tokenizer's name on the hub or an existing path", is_model_or_path, hint=path.hint)
    ),
    "model.archive": optional(path),
    "model.block_name": optional(text),
    "model.policy_dtype": one_of("float32", "bfloat16", "float64", reasons=NO_LOSS_SCALING),
    "model.fsdp_policy_mp": optional(one_of("bfloat16", reasons=NO_LOSS_SCALING)),
    "model.reference_dtype": optional(one_of("float32", "bfloat16", "float16", "float64")),
    "model.architecture": optional(
        Check(
            "values for the transformers config, with model_type",
            lambda value: isinstance(value, dict) and is_text(value.get("model_type")),
        )
    ),
    "model.trust_remote_code": boolean,
    "mixed_precision": optional(one_of("bfloat16", reasons=NO_LOSS_SCALING)),
    "loss.name": one_of(*LOSSES),
    "peft.name": one_of("none", "lora", "qlora"),
}

LORA_CHECKS: dict[str, Check] = {
    "peft.rank": count,
    "peft.alpha": optional(positive),
    "peft.scaling": optional(positive),
    "peft.dropout": number(at_least=0, below=1),
    "peft.bias": one_of("none", "all", "lora_only"),
    "peft.target_modules": Check(
        f"{', '.join(PEFT_PRESETS)} or a list of names such as [q_proj,v_proj]",
        lambda value: value in PEFT_PRESETS or is_list_of_text(value),
    ),
    "peft.full_modules": Check(
        "a list of names such as [lm_head]", lambda value: value == [] or is_list_of_text(value)
    ),
    "peft.rslora": boolean,
    "peft.dora": boolean,
}
PEFT_CHECKS: dict[str, dict[str, Check]] = {
    "none": {},
    "lora": LORA_CHECKS,
    "qlora": LORA_CHECKS
    | {
        "peft.quant_type": one_of("nf4", "fp4", "int8"),
        "peft.double_quant": boolean,
        "peft.compute_dtype": optional(one_of("float32", "bfloat16", reasons=NO_LOSS_SCALING)),
        "peft.storage_dtype": one_of("uint8", "bfloat16", "float16", "float32"),
    },
}

# What the keywords of the shipped losses may be; those of another loss are checked by their annotations.
LOSS_KEYWORDS: dict[str, dict[str, Check]] = {
    "dpo": {"beta": positive, "label_smoothing": number(at_least=0, below=0.5)},
    "cdpo": {"beta": positive, "label_smoothing": number(above=0, below=0.5)},
    "ipo": {"beta": positive},
}
BY_ANNOTATION = {bool: boolean, int: number(integer=True), float: number(), str: text}


def loss_checks(name: str) -> dict[str, Check]:
    """The keys of a loss's YAML: those of every loss, and the keyword arguments of its function."""
    loss = LOSSES[name]
    checks = {"average_log_prob": boolean}
    if loss.batch != "sft":
        checks["sft_weight"] = non_negative
    annotations = get_type_hints(loss.function)
    for keyword, parameter in inspect.signature(loss.function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            by_annotation = BY_ANNOTATION.get(annotations.get(keyword, Any), anything)
            checks[keyword] = LOSS_KEYWORDS.get(name, {}).get(keyword, by_annotation)
    return {f"loss.{key}": check for key, check in checks.items()}


# ---- The rules across keys ----


@dataclass(frozen=True)
class Rule:
    """A rule that several keys keep together; the first of keys is the one reported.

    Args:
        keys: whose values broken takes, once each is good by itself.
        broken: whether the values break the rule.
        problem: what to say then; {0}, {1}, ... are the values.
    """

    keys: tuple[str, ...]
    broken: Callable[..., bool]
    problem: str


RULES = (
    Rule(
        ("n_epochs", "n_examples"),
        lambda n_epochs, n_examples: n_epochs is None and n_examples is None,
        "is null and n_examples too, so training would never end: give one of them",
    ),
    Rule(
        ("max_prompt_length", "max_length"),
        lambda max_prompt_length, max_length: max_prompt_length >= max_length,
        "must be below max_length ({1}), not {0}, to leave room for a response",
    ),
    Rule(
        ("gradient_accumulation_steps", "batch_size"),
        lambda parts, batch_size: parts > batch_size,
        "must be at most batch_size ({1}), not {0}",
    ),
    Rule(
        ("n_eval_model_samples", "n_eval_examples", "sample_during_eval"),
        lambda num_samples, num_examples, sampled: sampled and num_samples > num_examples,
        "must be at most n_eval_examples ({1}), not {0}",
    ),
    Rule(
        ("mixed_precision", "model.policy_dtype"),
        lambda mixed_precision, policy_dtype: mixed_precision is not None and policy_dtype != "float32",
        "{0} needs model.policy_dtype=float32, not {1}: leave one of them out",
    ),
    Rule(
        ("num_processes", "trainer"),
        lambda num_processes, trainer: trainer == "BasicTrainer" and num_processes not in (None, 1),
        "must be null or 1 with trainer=BasicTrainer, not {0}",
    ),
    Rule(
        ("tensor_parallel_size", "trainer"),
        lambda size, trainer: trainer == "BasicTrainer" and size not in (None, 1),
        "must be null or 1 with trainer=BasicTrainer, not {0}",
    ),
    Rule(
        ("tensor_parallel.backend", "trainer"),
        lambda backend, trainer: backend == "package" and trainer != "TensorParallelTrainer",
        "package needs trainer=TensorParallelTrainer, not {1}",
    ),
    Rule(
        ("compile", "tensor_parallel.backend"),
        lambda compiled, backend: compiled and backend == "package",
        "true needs tensor_parallel.backend=native",
    ),
    Rule(
        ("activation_checkpointing", "tensor_parallel.backend"),
        lambda checkpointing, backend: checkpointing not in (False, 0) and backend == "package",
        "{0} needs tensor_parallel.backend=native: the devices of one process would wait for each other",
    ),
    Rule(
        ("num_processes", "tensor_parallel.backend"),
        lambda num_processes, backend: backend == "package" and num_processes not in (None, 1),
        "must be null or 1 with tensor_parallel.backend=package, not {0}: set tensor_parallel_size",
    ),
    Rule(
        ("plan", "tensor_parallel.backend"),
        lambda plan, backend: plan and backend == "package",
        "true needs tensor_parallel.backend=native",
    ),
    Rule(
        ("optimizer", "trainer"),
        lambda optimizer, trainer: optimizer == "Adafactor" and trainer != "BasicTrainer",
        "Adafactor looks at whole matrices, of which processes hold parts: choose another with trainer={1}",
    ),
    Rule(
        ("deterministic", "fsdp.replicas"),
        lambda deterministic, replicas: deterministic and replicas > 1,
        "true needs fsdp.replicas=1, not {1}",
    ),
    Rule(
        ("optimizer", "trainer"),
        lambda optimizer, trainer: optimizer in SMALL_OPTIMIZERS and trainer != "BasicTrainer",
        "{0} cannot share its state among processes: choose another with trainer={1}",
    ),
    Rule(
        ("peft.name", "trainer"),
        lambda peft, trainer: peft != "none" and trainer == "TensorParallelTrainer",
        "{0} is for trainer=BasicTrainer and FSDPTrainer: adapters' matrices are too small to be split, as {1} would",
    ),
    Rule(
        ("tensor_parallel_size", "peft.name", "trainer"),
        lambda size, peft, trainer: peft != "none" and trainer == "FSDPTrainer" and size not in (None, 1),
        "must be null or 1 with peft={1}, not {0}: adapters' matrices are too small to be split",
    ),
    Rule(
        ("peft.alpha", "peft.scaling"),
        lambda alpha, scaling: alpha is not None and scaling is not None,
        "{0} and peft.scaling={1} say the same: leave one of them null",
    ),
    Rule(
        ("peft.rslora", "peft.scaling"),
        lambda rslora, scaling: rslora and scaling is not None,
        "true changes what alpha means, and peft.scaling={1} stands in its place: leave one of them out",
    ),
    Rule(
        ("peft.dora", "trainer"),
        lambda dora, trainer: dora and trainer != "BasicTrainer",
        "true needs whole weights, of which processes hold parts: trainer=BasicTrainer",
    ),
    Rule(
        ("peft.bias", "model.policy_dtype", "trainer"),
        lambda bias, dtype, trainer: bias != "none" and dtype == "bfloat16" and trainer == "FSDPTrainer",
        "{0} trains in {1} beside adapters in fp32, which shards cannot mix: set mixed_precision={1} instead",
    ),
    Rule(
        ("peft.storage_dtype", "mixed_precision", "trainer", "peft.quant_type"),
        lambda storage, mixed_precision, trainer, quant_type: (
            trainer == "FSDPTrainer"
            and mixed_precision
            and quant_type != "int8"
            and storage not in ("uint8", mixed_precision)
        ),
        "{0} holds packed weights as numbers that {2} would cast to mixed_precision={1}, and lose: uint8 or {1}",
    ),
    Rule(
        ("freeze.first_n_layers", "peft.name"),
        lambda layers, peft: layers > 0 and peft != "none",
        "{0} is for peft=none: with {1} the whole model is frozen, all but peft.full_modules and peft.bias",
    ),
    Rule(
        ("freeze.patterns", "peft.name"),
        lambda patterns, peft: patterns and peft != "none",
        "is for peft=none: with {1} the whole model is frozen, all but peft.full_modules and peft.bias",
    ),
    Rule(
        ("freeze.first_n_layers", "tensor_parallel.backend"),
        lambda layers, backend: layers > 0 and backend == "package",
        "{0} needs tensor_parallel.backend=native",
    ),
    Rule(
        ("freeze.patterns", "tensor_parallel.backend"),
        lambda patterns, backend: patterns and backend == "package",
        "needs tensor_parallel.backend=native",
    ),
    Rule(
        ("keep_best", "save_every", "eval_every"),
        lambda best, save_every, eval_every: best and save_every not in (None, eval_every),
        "{0} compares checkpoints by an evaluation of each: leave save_every out, or set it to eval_every ({2})",
    ),
    Rule(
        ("keep_best", "loss.name"),
        lambda best, loss: (
            best and best.startswith(("rewards", "kl")) and loss in LOSSES and LOSSES[loss].batch == "sft"
        ),
        "{0} is of preference losses, not of {1}",
    ),
    Rule(
        ("keep_best", "reference"),
        lambda best, reference: best == "kl_eval" and reference != "live",
        "{0} is measured with reference=live, not {1}",
    ),
    Rule(
        ("keep_best", "sample_during_eval"),
        lambda best, sampled: best and best.startswith(("ground_truth", "kl")) and not sampled,
        "{0} is measured on samples: sample_during_eval=true",
    ),
    Rule(
        ("fsdp.replicas", "trainer"),
        lambda replicas, trainer: replicas > 1 and trainer != "FSDPTrainer",
        "must be 1 with trainer={1}, not {0}",
    ),
    Rule(
        ("fsdp.cpu_offload", "trainer"),
        lambda cpu_offload, trainer: cpu_offload and trainer != "FSDPTrainer",
        "needs trainer=FSDPTrainer, not {1}",
    ),
    Rule(
        ("deterministic", "trainer", "tensor_parallel_size"),
        lambda deterministic, trainer, size: (
            deterministic and (trainer == "TensorParallelTrainer" or size not in (None, 1))
        ),
        "true sums gradients across processes of FSDPTrainer, not across matrix products that are shared",
    ),
    Rule(
        ("resume", "local_run_dir"),
        lambda resume, local_run_dir: resume == "auto" and local_run_dir is None,
        "auto needs local_run_dir, the run to continue",
    ),
    Rule(
        ("model.name_or_path", "model.architecture"),
        lambda name, architecture: name != "tiny" and architecture == OmegaConf.load(TINY).architecture,
        "{0} would not be read, as model=tiny makes its own model: add model=blank_model",
    ),
)


# ---- The whole config ----

EXAMPLES = {"loss.beta": "0.1", "model.name_or_path": "EleutherAI/pythia-70m"}


def validate_config(config: DictConfig) -> None:
    """Raise one UserError that lists every problem of a config; change nothing in it."""
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    read_values(config, "", values, problems)
    loss_is_known = CHECKS["loss.name"].accepts(values.get("loss.name"))
    peft_checks = PEFT_CHECKS.get(str(values.get("peft.name")))
    if peft_checks and not peft_checks.keys() & values.keys():
        problems["peft.name"] = f"must come with the other keys of its group: peft={values['peft.name']}"
        peft_checks = {}
    checks = CHECKS | (loss_checks(values["loss.name"]) if loss_is_known else {}) | (peft_checks or {})

    for key in values:
        is_known = (loss_is_known or not key.startswith("loss.")) and (
            peft_checks is not None or not key.startswith("peft.")
        )
        if key not in checks and is_known:
            inner = [known for known in checks if known.startswith(f"{key}.")]
            problems[key] = f"must hold {', '.join(inner)}" if inner else unknown_key(key, checks)
    for key, check in checks.items():
        if key in values:
            problem = check.problem(values[key])
            # mixed_precision takes its default from another key: one wrong value is one problem.
            group, _, name = key.rpartition(".")
            node = OmegaConf.select(config, group) if group else config
            if problem and not (problem in problems.values() and OmegaConf.is_interpolation(node, name)):
                problems[key] = problem
        elif key not in problems and key.partition(".")[0] not in values:
            problems[key] = "is not set, and every key must be"
    for key in keys_with_secrets(config):
        why = (
            "holds a secret, which would be written with the run: leave it to the environment (HF_TOKEN, WANDB_API_KEY)"
        )
        problems.setdefault(key, why)
    for rule in RULES:
        if all(key in values and key not in problems for key in rule.keys):
            arguments = [values[key] for key in rule.keys]
            if rule.broken(*arguments):
                problems[rule.keys[0]] = rule.problem.format(*map(shown, arguments))

    if problems:
        listed = "; ".join(f"{key}: {problem}" for key, problem in problems.items())
        raise UserError(
            "CONFIG",
            f"{len(problems)} problems: {listed}" if len(problems) > 1 else listed,
            "correct the keys named here; config/ explains every key",
        )


def read_values(node: DictConfig, prefix: str, values: dict[str, Any], problems: dict[str, str]) -> None:
    """Collect the value of every dotted key, or why it has none. A mapping that has a check is one value."""
    for name in node:
        key = prefix + str(name)
        if key == "hydra":
            continue
        if OmegaConf.is_missing(node, name):
            problems[key] = f"is required: add {key}={EXAMPLES.get(key, 'VALUE')}"
            continue
        try:
            value = node[name]
            if isinstance(value, DictConfig) and key not in CHECKS:
                read_values(value, f"{key}.", values, problems)
            elif isinstance(value, DictConfig | ListConfig):
                values[key] = OmegaConf.to_container(value, resolve=True)
            else:
                values[key] = value
        except OmegaConfBaseException as error:
            problems[key] = str(error).partition("\n")[0]


def unknown_key(key: str, known: Collection[str]) -> str:
    """What to say of a key that the composed config does not have."""
    group, _, name = key.partition(".")
    presets = [path for path in sorted((CONFIG_DIR / group).glob("*.yaml")) if name in list(OmegaConf.load(path))]
    if presets:
        return f"not a key of the chosen {group}, only of {', '.join(f'{group}={path.stem}' for path in presets)}"
    by_last_part = {other.rpartition(".")[2]: other for other in known}
    return "unknown key" + bracketed(did_you_mean(nearest(key, known) or by_last_part.get(key.rpartition(".")[2])))


def explain_hydra_error(error: BaseException) -> UserError:
    """One line for what Hydra or OmegaConf raised while it read the command line and composed the config."""
    if isinstance(error, UserError):
        return error
    message, _, advice = str(error).partition("\n")
    help_line = "python train.py --help lists every key"
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, member = error.missing_cfg_file.rpartition("/")
        guess = bracketed(did_you_mean(nearest(member, error.options)))
        return UserError(
            "CONFIG", f"{group}={member}: no such preset{guess}", f"choose one of {', '.join(error.options)}"
        )
    if isinstance(error, OverrideParseException):
        fix = "write key=value, and put a value with special characters in two pairs of quotes: exp_name=\"'a=b'\""
        return UserError("CONFIG", f"cannot read {error.override!r} on the command line", fix)
    unknown = re.match(r"Could not (?:override|delete from config\.) '([^']+)'", message)
    if isinstance(error, ConfigCompositionException) and unknown:
        known = [*CHECKS, *PEFT_CHECKS["qlora"], *(key for name in LOSSES for key in loss_checks(name))]
        known += ["model", "loss", "peft", "wandb"]
        group = unknown[1].partition(".")[0]
        if any(argument.startswith(f"{group}=") and "," in argument for argument in sys.argv[1:]):
            help_line = f"in a sweep over {group}, write ++{unknown[1]}=..."
        return UserError("CONFIG", f"{unknown[1]}: {unknown_key(unknown[1], known)}", help_line)
    if message.startswith("Config group override must be a string or a list"):
        groups = {"", "hydra", *(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())}
        given = [override for override in sys.argv[1:] if override.partition("=")[0].lstrip("+") in groups]
        return UserError(
            "CONFIG",
            f"{', '.join(given) or 'a group'}: a preset must be a string or a list, such as loss=dpo",
            help_line,
        )
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.full_key not in message:
        message = f"{error.full_key}: {message}"
    if error.__cause__:
        message = f"{message}: {error.__cause__}"
    return UserError("CONFIG", message or type(error).__name__, advice or help_line)
