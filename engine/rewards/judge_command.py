"""Judge the responses of two models: a mode of evaluate.py."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from engine.models.hub import settle_network
from engine.settings.endpoint import Endpoint, is_url, wrong_endpoint
from engine.settings.options import Options
from engine.settings.value_types import Count, NonNegative, PossiblePath, Seed, Text
from utils import UserError, write_atomically

if TYPE_CHECKING:  # it takes seconds to import
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from engine.data.examples import Example
    from engine.export.run_record import RunRecord
    from engine.rewards.comparing import Judged, Pair, PairJudge
    from engine.settings.schema import Settings

GROUND_TRUTH = "ground_truth"


class JudgeOptions(Options):
    """Options of judging the responses of two models."""

    model: PossiblePath = Field(description="a run, checkpoint, adapter, exported directory, or a name on the hub")
    against: PossiblePath = Field(description="the other model")
    judge: Text = Field(
        description="ground_truth, the reward of the data set; the path or name of a reward model; or http(s)://..., a "
        "model on an OpenAI-compatible server"
    )
    data: PossiblePath | None = Field(
        None,
        description="prompts: a file of rows, or a named data set (its test split); null: held-out prompts of the run",
    )
    prompts: Count | None = Field(None, description="how many; null: 256 at most, and 64 with a server")
    to: PossiblePath | None = Field(
        None, description="also write the pairs with their verdicts, as JSON lines; a server needs it, for its replies"
    )
    endpoint: dict[str, Any] | None = Field(
        None, description="options of a server, such as endpoint.model=gpt-4.1-mini; docs/evaluate.md has all"
    )
    temperature: NonNegative = Field(1.0, description="of sampling; 0: the likeliest token")
    max_length: Count | None = Field(None, description="tokens of prompt and response; null: the run's, else 512")
    max_prompt_length: Count | None = Field(
        None, description="tokens kept of a longer prompt; null: the run's, else 256"
    )
    max_rows: Count = Field(64, description="responses at a time")
    seed: Seed = Field(0, description="of the samples")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="of the weights; null: as stored")


@dataclass(frozen=True)
class Project:
    """What the engine does not import.

    Args:
        settings: overrides of keys -> settings of prompts.
        load_prompts: settings, a tokenizer and a split -> its prompts.
        ground_truth: names of data sets -> their reward, if there is one.
        chat_form: names of data sets -> their common chat template.
        dataset_names: beside paths.
    """

    settings: "Callable[[dict[str, Any]], Settings]"
    load_prompts: "Callable[[Settings, PreTrainedTokenizerBase, Literal['train', 'test']], Sequence[Example]]"
    ground_truth: Callable[[Sequence[str]], Callable[[str], float] | None]
    chat_form: Callable[[Sequence[str]], str | None]
    dataset_names: Sequence[str]


@dataclass(frozen=True)
class Responses:
    """The prompts of a model and its responses.

    Args:
        num_prompts: of the data; examples are some of them.
        texts: without special tokens.
        are_truncated: whether each has no end-of-text token.
    """

    num_prompts: int
    examples: "Sequence[Example]"
    settings: "Settings"
    tokenizer: "PreTrainedTokenizerBase"
    texts: list[str]
    are_truncated: list[bool]


# Keys of a run that decide its prompts.
DATA_KEYS = ("datasets", "data_dir", "format", "on_bad_row", "sft_turns", "test_fraction", "seed")
LENGTH_KEYS = ("max_length", "max_prompt_length")


def judge_models(options: JudgeOptions, project: Project) -> None:
    """Sample responses of both models to the same prompts, judge them, and print the result."""
    target = None if options.to is None else Path(options.to).expanduser()
    check_options(options, target)
    models = (options.model, options.against)
    settle_network([*models, *([] if options.judge == GROUND_TRUTH or is_url(options.judge) else [options.judge])])

    from engine.export.run_record import RunRecord, read_run
    from engine.export.saved_models import find_saved

    directories = [find_saved(name) for name in models]
    if options.judge != GROUND_TRUTH and not is_url(options.judge):
        find_saved(options.judge)  # before minutes of sampling
    records = [RunRecord() if each is None else read_run(each, project.chat_form) for each in directories]
    keys, split = prompt_keys(options, records, project)
    reward = project.ground_truth(keys["datasets"])
    if options.judge == GROUND_TRUTH and reward is None:
        problem = f"judge: ground_truth needs a data set with one, and {','.join(keys['datasets'])} has none"
        raise UserError("CONFIG", problem, "give a reward model or a server")
    cache = Path(project.settings(keys).cache_dir or "") / "judge"
    judge = endpoint_judge(options, cache) if is_url(options.judge) else None  # a wrong url fails before sampling
    both = [
        respond(name, number, options, record, keys, split, project)
        for number, (name, record) in enumerate(zip(models, records, strict=True))
    ]
    if judge is None:
        judge = score_judge(options, both[0], reward, project)
    pairs = pairs_of(both)

    from engine.rewards.comparing import judge_pairs

    judged = judge_pairs(judge, pairs, ("model", "against"))
    if target is not None:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in judged.lines)
        write_atomically(target, lines.encode(errors="backslashreplace"))
    print_result(options, judged, len(pairs))


def check_options(options: JudgeOptions, target: Path | None) -> None:
    """Refuse options before models are loaded."""
    if problem := wrong_endpoint(options.judge, options.endpoint):
        fix = "correct it; docs/evaluate.md has all options of a server"
        raise UserError("CONFIG", f"endpoint{'' if problem.startswith('.') else ' '}{problem}", fix)
    if target is not None and target.exists():
        raise UserError("CONFIG", f"to: {target} exists", "give another file, or remove it")
    if target is not None and not target.parent.is_dir():
        raise UserError("CONFIG", f"to: {target.parent} is not a directory", "make it, or give another file")
    if target is None and is_url(options.judge):
        raise UserError("CONFIG", "to: a server's replies need a file", "add to=FILE.jsonl")


def prompt_keys(
    options: JudgeOptions, records: "Sequence[RunRecord]", project: Project
) -> tuple[dict[str, Any], Literal["train", "test"]]:
    """The keys of train.py that decide the prompts, and the split to read.

    Raises:
        UserError: CONFIG without a run to take prompts from.
    """
    of_run = next((record.config for record in records if record.config.get("datasets")), {})
    lengths = {key: of_run[key] for key in LENGTH_KEYS if isinstance(of_run.get(key), int)}
    lengths |= {key: value for key in LENGTH_KEYS if (value := getattr(options, key)) is not None}
    if options.data is not None:
        is_named = options.data in project.dataset_names
        keys = {"datasets": [options.data if is_named else str(Path(options.data).expanduser())], **lengths}
        data_dir = {"data_dir": of_run["data_dir"]} if is_named and of_run.get("data_dir") else {}
        return keys | data_dir | ({} if is_named else {"test_fraction": 0}), "test" if is_named else "train"
    if not of_run:
        problem = f"data: neither {options.model} nor {options.against} is of a run with held-out prompts"
        raise UserError("CONFIG", problem, "give data=FILE")
    return {key: of_run[key] for key in DATA_KEYS if of_run.get(key) is not None} | lengths, "test"


def respond(
    name: str,
    number: int,
    options: JudgeOptions,
    record: "RunRecord",
    keys: dict[str, Any],
    split: Literal["train", "test"],
    project: Project,
) -> Responses:
    """Sample a response of a model to each prompt. The model is freed again.

    Args:
        number: of the model; part of the seed.
    """
    import torch
    import transformers

    from engine.data.chat_templates import JINJA
    from engine.export.saved_models import check_finite, load_saved
    from engine.models.score_head import has_score_head
    from engine.step.sources import choose_eval_examples

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    saved = load_saved(name, dtype=options.dtype and getattr(torch, options.dtype), show_progress=sys.stderr.isatty())
    if has_score_head(saved.model):
        problem = f"{('model', 'against')[number]}: {name} is a reward model, and writes no responses"
        raise UserError("CONFIG", problem, f"judge={name} lets it judge; data=FILE to=FILE without against scores")
    check_finite(saved.model, "give another checkpoint", show_progress=sys.stderr.isatty())
    tokenizer = saved.tokenizer
    if tokenizer.eos_token_id is None:
        raise UserError("CHECKPOINT", f"the tokenizer of {name} has no end-of-text token", "name one in its directory")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = record.chat_template if record.chat_template in JINJA else None
    if record.chat_template is not None and template is None:
        tokenizer.chat_template = record.template_text()
    settings = project.settings({**keys, "chat_template": template})
    count = options.prompts or (64 if is_url(options.judge) else 256)
    prompts = project.load_prompts(settings, tokenizer, split)
    examples = choose_eval_examples(prompts, count, settings.seed)
    responses = sample(saved.model, tokenizer, examples, settings, options, number)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    are_truncated = [int(response[-1]) != tokenizer.eos_token_id for response in responses]
    return Responses(len(prompts), examples, settings, tokenizer, texts, are_truncated)


def sample(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Sequence[Example]",
    settings: "Settings",
    options: JudgeOptions,
    number: int,
) -> "list[np.ndarray]":
    """A response of a model to each prompt, int32 [response tokens].

    Args:
        number: of the model; part of the seed.
    """
    import torch

    from engine.models.group_sampling import Sampling
    from engine.models.sampling_engines import Loop

    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    positions = getattr(model.config, "max_position_embeddings", None) or settings.max_length
    sampling = Sampling(
        1,
        settings.max_length - settings.max_prompt_length,
        min(settings.max_length, positions),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        temperature=float(options.temperature),
        max_rows=options.max_rows,
    )
    seeds = [[options.seed, number, index] for index in range(len(examples))]
    sampled = Loop().sample(model, [example.prompt for example in examples], seeds, sampling).tokens
    return [group[0] for group in sampled]


def pairs_of(both: Sequence[Responses]) -> "list[Pair]":
    """The responses of both models by prompt. Prompts are shown as the first model reads them.

    Raises:
        UserError: DATA if the models do not have the same prompts.
    """
    from engine.rewards.comparing import Pair, row_of

    first, second = both
    # Of other numbers of prompts, other ones were chosen.
    if first.num_prompts != second.num_prompts:
        problem = f"data: the models have {first.num_prompts:,} and {second.num_prompts:,} prompts"
        raise UserError("DATA", problem, "give data of prompts that both chat templates write differently")
    shown = first.tokenizer.batch_decode([example.prompt for example in first.examples], skip_special_tokens=True)
    return [
        Pair(prompt, row_of(example, first.tokenizer), texts, are_truncated)
        for prompt, example, texts, are_truncated in zip(
            shown,
            first.examples,
            zip(first.texts, second.texts, strict=True),
            zip(first.are_truncated, second.are_truncated, strict=True),
            strict=True,
        )
    ]


# ---- Judges ----


def endpoint_judge(options: JudgeOptions, cache: Path) -> "PairJudge":
    from engine.judges.pairwise import PairwiseJudge
    from engine.rewards.comparing import EndpointJudge

    return EndpointJudge(PairwiseJudge("judge", options.judge, Endpoint(**options.endpoint or {}), cache))


def score_judge(
    options: JudgeOptions, responses: Responses, reward: Callable[[str], float] | None, project: Project
) -> "PairJudge":
    """The judge by the ground truth, or by a reward model."""
    import torch

    from engine.rewards.comparing import ScoreJudge, ground_truth_judge
    from engine.rewards.reward_model import RewardModelReward
    from rewards import RewardModel

    if options.judge == GROUND_TRUTH:
        assert reward is not None  # judge_models() has seen to it
        return ground_truth_judge(reward)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = RewardModel(path=options.judge, normalize=False)
    arguments = (model, responses.settings, responses.tokenizer, device, project.chat_form)
    return ScoreJudge(RewardModelReward(*arguments, key="judge"))


# ---- Printing ----


def print_result(options: JudgeOptions, judged: "Judged", num_pairs: int) -> None:
    from engine.judges.win_rates import Estimate
    from engine.rewards.comparing import describe_left_out

    print(f"{options.model} against {options.against}: {num_pairs:,} prompts, judged by {options.judge}")
    if left_out := describe_left_out(judged):
        print(f"  {left_out}")
    result = judged.result
    if result is None:
        raise UserError("DATA", "judge: no pair has a verdict", "read the replies in the file of to=")

    def line(name: str, estimate: Estimate) -> str:
        return f"  {name:<17}  {estimate.value:.3f}   (95 % interval: {estimate.low:.3f} to {estimate.high:.3f})"

    print(line("win rate", result.rate) + f"   {result.wins:,} won, {result.ties:,} tied, {result.losses:,} lost")
    if result.length_controlled is None:
        print("  at equal lengths   unknown: too few decided pairs, or lengths separate wins from losses")
    else:
        print(line("at equal lengths", result.length_controlled))
    print(f"  sign test          p = {result.p_value:.2g}   ({result.wins + result.losses:,} decided pairs)")
    print(f"  length             {result.length_difference:+.1f} characters")
    if options.to is not None:
        print(f"  pairs              {options.to}")
