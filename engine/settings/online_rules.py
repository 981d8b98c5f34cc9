"""Rules across keys of online training."""

import inspect
from typing import Any, get_type_hints

from engine.settings.annotations import WrongValue, checked
from engine.settings.keys import keyword_names, pair_option_types
from engine.settings.messages import shown
from engine.settings.rule_table import Problem, rule
from rewards import REWARDS


@rule("rewards")
def rewards_are_known(names: list[str] | None) -> Problem:
    unknown = [name for name in names or [] if name not in REWARDS]
    return f"names {', '.join(unknown)}, and the rewards are {', '.join(REWARDS)}" if unknown else None


@rule("reward_weights", "rewards")
def reward_weights_are_of_rewards(weights: list[float] | None, names: list[str] | None) -> Problem:
    if weights is None or (names is not None and len(weights) == len(names)):
        return "are all 0, so no reward counts" if weights and not any(weights) else None
    return f"must have one number for each of rewards ({0 if names is None else len(names)}), not {len(weights)}"


@rule("reward_options", "rewards")
def reward_options_are_of_rewards(options: dict[str, Any] | None, names: list[str] | None) -> Problem:
    for name in options or {}:
        if name not in (names or []):
            return f"are for {name}, and rewards is {shown(names)}"
    for name in names or []:
        if name in REWARDS and (problem := _wrong_options(name, (options or {}).get(name, {}))):
            return problem
    return None


def _wrong_options(name: str, keywords: Any) -> Problem:
    """The problem of the options of a reward, by the annotations of its keyword arguments."""
    reward: Any = REWARDS[name]
    parameters = inspect.signature(reward).parameters.values()
    known = {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    unknown = [key for key in keywords if key not in known] if isinstance(keywords, dict) else [shown(keywords)]
    if unknown:
        return f"give {name} {', '.join(map(str, unknown))}, and it takes {', '.join(known) or 'none'}"
    function = vars(reward).get("__init__", reward) if isinstance(reward, type) else reward
    hints = get_type_hints(function, include_extras=True)
    for key, parameter in known.items():
        if key not in keywords:
            if parameter.default is parameter.empty:
                return f"lack {name}.{key}"
            continue
        try:
            checked(hints.get(key, Any), keywords[key])
        except WrongValue as error:
            return f"{name}.{key} {error}"
    return None


@rule("loss.pair_options", "loss.pair_loss")
def pair_options_are_of_the_pair_loss(options: dict[str, Any] | None, pair_loss: str) -> Problem:
    from losses import LOSSES  # imports torch, which takes seconds

    types, options = pair_option_types(pair_loss), options or {}
    for key, value in options.items():
        if key not in types:
            return f"give loss.pair_loss={pair_loss} {key}, and it takes {', '.join(types) or 'none'}"
        try:
            checked(types[key], value)
        except WrongValue as error:
            return f"{key} of loss.pair_loss={pair_loss} {error}"
    parameters = inspect.signature(LOSSES[pair_loss].function).parameters.values()
    required = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
    missing = [name for name in required if name not in (*options, "beta")]
    return f"lack {', '.join(missing)}, as loss.pair_loss={pair_loss} needs a value" if missing else None


@rule("rollout.overlong_buffer", "rollout.max_new_tokens", "max_length", "max_prompt_length")
def buffers_are_of_responses(buffer: int | None, new_tokens: int | None, max_length: int, max_prompt: int) -> Problem:
    longest = new_tokens or max_length - max_prompt
    if buffer is None or buffer <= longest:
        return None
    return f"must be at most the longest response ({longest} tokens), not {buffer}"


@rule("rollout.prompts", "batch_size")
def iterations_are_whole_batches(num_prompts: int | None, batch_size: int) -> Problem:
    if num_prompts is None or num_prompts % batch_size == 0:
        return None
    return f"must be a multiple of batch_size ({batch_size}), not {num_prompts}"


@rule("loss.name", "tensor_parallel.backend")
def package_has_no_critic(loss: str, backend: str) -> Problem:
    is_broken = backend == "package" and _has_critic(loss)
    return f"{loss} has a critic, and needs tensor_parallel.backend=native" if is_broken else None


@rule("plan", "loss.name")
def plan_has_no_critic(plan: bool, loss: str) -> Problem:
    return f"true counts no critic, and loss={loss} has one" if plan and _has_critic(loss) else None


@rule("rollout.offload", "tensor_parallel.backend")
def package_stays_on_its_devices(offload: bool, backend: str) -> Problem:
    return "true needs tensor_parallel.backend=native" if offload and backend == "package" else None


@rule("rollout.offload", "fsdp.cpu_offload")
def offload_is_given_once(offload: bool, cpu_offload: bool) -> Problem:
    is_broken = offload and cpu_offload
    return "true and fsdp.cpu_offload=true keep models in CPU memory: leave one of them out" if is_broken else None


@rule("loss.target_kl", "loss.beta")
def target_has_a_weight_to_move(target: float | None, beta: float) -> Problem:
    return f"{target:g} needs loss.beta above 0: it scales beta" if target is not None and beta == 0 else None


@rule("loss.target_kl", "loss.baseline")
def target_is_of_the_rewards_weight(target: float | None, baseline: str) -> Problem:
    is_broken = target is not None and baseline == "group"
    return "needs loss.baseline=batch: with group the KL is in the loss, at a fixed weight" if is_broken else None


@rule("rollout.offload", "reference_refresh.every")
def moving_reference_stays(offload: bool, every: int | None) -> Problem:
    is_broken = offload and every is not None
    return f"true moves the reference away, and reference_refresh.every={every} needs it" if is_broken else None


@rule("rollout.num_responses", "loss.name", "loss.baseline?")
def groups_have_others(num_responses: int, loss: str, baseline: str | None) -> Problem:
    if num_responses > 1 or not is_online(loss) or not _compares_group(loss, baseline):
        return None
    return f"must be at least 2 with loss={loss}, not 1: a response is compared with the others of its prompt"


@rule("rollout.max_resamples", "loss.name", "loss.baseline?")
def equal_rewards_teach_nothing(max_resamples: int | None, loss: str, baseline: str | None) -> Problem:
    if max_resamples is None or not is_online(loss) or _compares_group(loss, baseline):
        return None
    chosen = f"loss={loss}" + (f" loss.baseline={baseline}" if baseline else "")
    return f"must be null with {chosen}, not {max_resamples}: it learns from groups of equal rewards too"


def _compares_group(loss: str, baseline: str | None) -> bool:
    from losses import LOSSES  # imports torch, which takes seconds

    compares = LOSSES[loss].compares_group
    return baseline == "group" if compares == "either" else compares


@rule("rollout.num_responses", "loss.name")
def one_response_is_of_the_reference(num_responses: int, loss: str) -> Problem:
    from losses import LOSSES  # imports torch, which takes seconds

    if num_responses == 2 or not LOSSES[loss].samples_reference:
        return None
    return f"must be 2 with loss={loss}, not {num_responses}: one of the policy and one of the reference"


@rule("rollout.top_p", "loss.name")
def ratios_are_of_the_full_softmax(top_p: float, loss: str) -> Problem:
    from losses import LOSSES  # imports torch, which takes seconds

    if top_p == 1 or not is_online(loss) or "clip_low" not in keyword_names(LOSSES[loss].function):
        return None
    return f"must be 1 with loss={loss}, not {top_p:g}: its ratios compare log-probs of the full softmax"


@rule("rollout.max_new_tokens", "max_length")
def responses_fit(num_tokens: int | None, max_length: int) -> Problem:
    if num_tokens is None or num_tokens < max_length:
        return None
    return f"must be below max_length ({max_length}), not {num_tokens}, to leave room for a prompt"


@rule("rollout.engine", "trainer", "deterministic")
def engines_sample_whole_models(engine: str, trainer: str, is_deterministic: bool) -> Problem:
    if engine in ("auto", "loop"):
        return None
    if trainer != "BasicTrainer":
        return f"{engine} samples whole models in one process: trainer=BasicTrainer, not {trainer}"
    return f"{engine} samples other responses in each run: loop with deterministic=true" if is_deterministic else None


@rule("rollout.engine", "peft.name", "peft.dora")
def vllm_gets_merged_weights(engine: str, peft: str, is_dora: bool) -> Problem:
    if engine != "vllm" or (peft in ("none", "lora") and not is_dora):
        return None
    return f"vllm takes the weights of peft=none or lora, not {'DoRA' if is_dora else peft}"


@rule("reference", "loss.name")
def rollouts_have_a_live_reference(reference: str, loss: str) -> Problem:
    if reference != "cached" or not is_online(loss):
        return None
    return f"cached keeps log-probs of stored responses, and loss={loss} samples new ones: auto or live"


@rule("peft.dropout", "loss.name")
def rollouts_have_no_dropout(dropout: float, loss: str) -> Problem:
    if dropout == 0 or not is_online(loss):
        return None
    return f"must be 0 with loss={loss}, not {dropout:g}: log-probs would differ from those of the sampling policy"


@rule("rollout.truncated", "loss.name")
def pairs_stay_whole(truncated: str, loss: str) -> Problem:
    from losses import LOSSES  # imports torch, which takes seconds

    is_broken = truncated == "mask" and LOSSES[loss].learns_pairs
    return (
        f"mask would leave pairs of loss={loss} with one response: rollout.missing_eos_penalty" if is_broken else None
    )


@rule("keep_best", "loss.name")
def best_is_a_metric_of_rollouts(best: str | None, loss: str) -> Problem:
    names = ("rewards_eval/sampled", "rewards_eval/greedy")
    if best is None or is_online(loss) == (best in names) or (is_online(loss) and best in ("kl_eval", "win_rate_eval")):
        return None
    return f"{best} is not measured with loss={loss}" + (f", only {', '.join(names)} are" if is_online(loss) else "")


@rule("length_grouping", "loss.name")
def rollouts_have_no_lengths(groups: bool, loss: str) -> Problem:
    return f"true needs stored responses, and loss={loss} samples them" if groups and is_online(loss) else None


def _has_critic(loss: str) -> bool:
    from losses import LOSSES  # imports torch, which takes seconds

    return LOSSES[loss].value_loss is not None


def is_online(loss: str) -> bool:
    from losses import LOSSES  # imports torch, which takes seconds

    return LOSSES[loss].batch == "rollout"
