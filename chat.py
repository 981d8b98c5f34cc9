"""Chat with a trained model: python chat.py model=RUN, with prompt=TEXT, or with a pipe; see README.md."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pydantic import Field

from engine.data.rows import MARK
from engine.models.hub import settle_network
from engine.settings.options import Options, run_command
from engine.settings.value_types import ChatTemplate, Count, NonNegative, PossiblePath, Probability, Seed, Text
from utils import UserError

if TYPE_CHECKING:  # it takes seconds to import
    import torch
    from transformers import PreTrainedTokenizerBase

    from engine.data.chat import Message
    from engine.export.run_record import RunRecord
    from engine.export.saved_models import SavedModel

HUMAN = "\n\nHuman:"  # begins the next turn of an HH dialogue
COMMANDS = "/reset forgets the dialogue, /quit or Ctrl-D leaves, Ctrl-C stops a response"


class DialogueOptions(Options):
    """Of a model in a dialogue."""

    model: PossiblePath = Field(description="a run, checkpoint, adapter, exported directory, or a name on the hub")
    system: Text | None = Field(None, description="a system prompt")
    temperature: NonNegative = Field(0.7, description="of sampling; 0: the likeliest token")
    top_p: Probability = Field(0.95, description="nucleus sampling")
    max_new_tokens: Count = Field(512, description="the longest response")
    seed: Seed | None = Field(None, description="of sampling; null: another each time")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="of the weights; null: as stored")
    base: PossiblePath | None = Field(None, description="a base model, in place of the one in the adapter's config")
    chat_template: ChatTemplate | None = Field(
        None, description="hh, llama2, chatml or a Jinja file; null: the run's, else the tokenizer's own, else hh"
    )


class ChatOptions(DialogueOptions):
    compare: PossiblePath | None = Field(None, description="a second model, to respond after the first")
    reward_model: PossiblePath | None = Field(None, description="a reward model, to score each response")
    prompt: Text | None = Field(None, description="respond to this and leave")
    stdin: Literal["lines", "whole"] = Field("lines", description="of a pipe: a prompt per line, or all of it as one")
    output: Literal["text", "jsonl"] = Field(
        "text",
        description="of prompt or a pipe: text, or jsonl, a JSON object per prompt: prompt, response, compare, rewards",
    )


# ---- A model in a dialogue ----


class ChatModel:
    """A model with its tokenizer and its copy of the dialogue.

    Args:
        name: a run, checkpoint, adapter or model directory, or a name on the hub.
        options: of the command.
    """

    def __init__(self, name: str, options: DialogueOptions):
        import torch

        from engine.export.dialogues import chat_of
        from engine.models.score_head import has_score_head

        saved, record, self.is_adapter = load(name, options)
        if has_score_head(saved.model):
            problem = f"model: {name} is a reward model: it scores responses, and writes none"
            raise UserError("CONFIG", problem, "reward_model=RUN beside a model of text; evaluate.py scores a file")
        self.name, self.options = name, options
        self.model: Any = saved.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.tokenizer: PreTrainedTokenizerBase = saved.tokenizer
        self.chat = chat_of(self.tokenizer, record, options.chat_template, default="hh")
        self.messages: list[Message] = []
        self.was_cut = False  # whether the last response reached max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget the dialogue."""
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def prompt_ids(self) -> list[int]:
        """The ids of the dialogue up to the next response, encoded like the training data.

        The oldest turns are dropped where they would leave less than max_new_tokens, or half the context if smaller.
        """
        from engine.data.rows import Row

        context = getattr(self.model.config, "max_position_embeddings", None)
        room = None if context is None else max(context - self.options.max_new_tokens, context // 2)
        messages = list(self.messages)
        while True:
            prompt, _ = self.chat.render(Row({}, "the dialogue"), messages, [])
            ids = encode_prompt(self.tokenizer, prompt, self.chat.is_template)
            if room is None or len(ids) <= room:
                return ids
            first = next(i for i, message in enumerate(messages) if message["role"] == "user")
            if len([message for message in messages if message["role"] == "user"]) == 1:
                problem = f"the prompt has {len(ids)} tokens, and the model {context} positions"
                raise UserError("DATA", problem, "shorten it, or lower max_new_tokens")
            del messages[first : first + 2]  # a question and its response

    def respond(self, question: str, stop: threading.Event) -> Iterator[str]:
        """Stream the response to a question in pieces of text; the dialogue keeps the pieces from before a stop."""
        from transformers import TextIteratorStreamer

        if not is_utf8(question):
            raise UserError("DATA", "the prompt is not UTF-8", "convert it, with iconv for example")
        self.messages.append({"role": "user", "content": question.replace(MARK, "")})
        try:
            ids = self.prompt_ids()
        except UserError:
            self.messages.pop()
            raise
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        errors: list[Exception] = []

        def generate() -> None:
            try:
                self._generate(ids, streamer, stop)
            except Exception as error:
                errors.append(error)
                streamer.end()

        model_settings = self.model.generation_config
        thread = threading.Thread(target=generate)
        thread.start()
        said = ""
        try:
            for piece in streamer if self.chat.is_template else until_next_turn(streamer):
                piece = piece if said else piece.lstrip()
                said += piece
                if piece:
                    yield piece
        finally:
            stop.set()
            thread.join()
            self.model.generation_config = model_settings
            self.messages.append({"role": "assistant", "content": said.strip()})
        if errors:
            raise errors[0]

    def _generate(self, ids: list[int], streamer: Any, stop: threading.Event) -> None:
        """Generate behind the prompt until an end token, the limit, or a stop; leaves its settings in the model."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor", **kwargs: Any) -> "torch.Tensor":
                return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

        self.model.generation_config = self._generation_settings(len(ids))  # drops a repetition penalty, for example
        if self.options.seed is not None:
            torch.manual_seed(self.options.seed)
        with torch.no_grad():
            tensor = torch.tensor([ids], device=self.model.device)
            output = self.model.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([Stopped()]),
            )
        settings = self.model.generation_config
        has_end = int(output[0, -1]) in (settings.eos_token_id or [])
        self.was_cut = output.shape[1] - len(ids) >= settings.max_new_tokens and not has_end

    def _generation_settings(self, num_prompt_tokens: int) -> Any:
        from transformers import GenerationConfig

        options = self.options
        context = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        model_ends = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(model_ends if isinstance(model_ends, list) else [model_ends])} - {None}
        pad = self.tokenizer.pad_token_id
        should_sample = options.temperature > 0
        sampling = {"temperature": float(options.temperature), "top_p": float(options.top_p), "top_k": 0}
        return GenerationConfig(
            max_new_tokens=min(options.max_new_tokens, context - num_prompt_tokens),
            do_sample=should_sample,
            eos_token_id=sorted(ends) or None,
            pad_token_id=max(ends, default=0) if pad is None else pad,
            **(sampling if should_sample else {}),
        )


class RewardModel:
    """Scores the last response of a dialogue, by the chat template that it was trained with.

    Scores are normalised if it has mean and standard deviation of its rewards.

    Args:
        name: a reward model: a run, checkpoint, adapter or model directory, or a name on the hub.
    """

    def __init__(self, name: str):
        from engine.export.dialogues import chat_of
        from engine.export.run_record import RunRecord, read_run
        from engine.export.saved_models import find_saved
        from engine.export.scoring import open_reward_model
        from preference_datasets import chat_form

        directory = find_saved(name)
        record = RunRecord() if directory is None else read_run(directory, chat_form)
        options: Any = {"key": "reward_model", "layout": "padded", "show_progress": sys.stderr.isatty()}
        try:
            self._scorer = open_reward_model(name, record, **options)
        except UserError as error:
            if "base=" not in error.fix:
                raise
            fix = f"python export.py from={name} base=PATH to=DIR, and give DIR"  # base is of the other models
            raise UserError(error.code, f"reward_model: {error.what}", fix) from error
        mean, deviation = self._scorer.statistics or (0.0, 0.0)
        if deviation > 0:
            self._scorer.mean, self._scorer.deviation = mean, deviation
        else:
            print(f"reward_model: {name} has no reward_mean and reward_std: its scores are raw", file=sys.stderr)
        self._chat = chat_of(self._scorer.tokenizer, record, default="hh")

    def score(self, messages: "list[Message]") -> float:
        """The score of the last message; says so if tokens are lost to truncation."""
        from engine.data.forms import ParsedRow
        from engine.data.rows import Row

        prompt, responses = self._chat.render(Row({}, "the dialogue"), messages[:-1], messages[-1:])
        row = ParsedRow(prompt, prompt, responses, [], from_template=self._chat.is_template)
        (found,) = self._scorer.score_rows([row])
        if found.prompt_is_truncated or found.truncated_responses:
            lost = "the response" if found.truncated_responses else "the prompt"
            print(f"reward_model: {lost} is truncated, as in training: it is too long", file=sys.stderr)
        return found.scores[0]


def load_models(names: list[str], options: DialogueOptions, also: Sequence[str | None] = ()) -> list[ChatModel]:
    """Load the models of a command.

    Args:
        also: other models of the command, which are loaded later.
    """
    settle_network([*names, options.base, *also])
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    models = [ChatModel(name, options) for name in names]
    if options.base and not any(model.is_adapter for model in models):
        raise UserError("CONFIG", f"base: {' and '.join(names)} is no adapter, so it has no base", "leave base out")
    return models


def load(name: str, options: DialogueOptions) -> "tuple[SavedModel, RunRecord, bool]":
    """Load a model, the record of its training, and whether it is an adapter."""
    import torch

    from engine.export.run_record import RunRecord, read_run
    from engine.export.saved_models import check_finite, find_saved, load_saved
    from engine.models.archives import ADAPTER_CONFIG
    from preference_datasets import chat_form

    directory = find_saved(name)
    record = RunRecord() if directory is None else read_run(directory, chat_form)
    is_adapter = directory is not None and (directory / ADAPTER_CONFIG).is_file()
    dtype = options.dtype and getattr(torch, options.dtype)
    saved = load_saved(name, dtype=dtype, base=options.base if is_adapter else None, show_progress=sys.stderr.isatty())
    fix = "dtype=bfloat16 has a wider range" if options.dtype == "float16" else "chat with another checkpoint"
    check_finite(saved.model, fix, show_progress=sys.stderr.isatty())
    return saved, record, is_adapter


def is_utf8(text: str) -> bool:
    """Whether text can be encoded as UTF-8; undecodable bytes of a command line cannot."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, is_template: bool) -> list[int]:
    """The ids of a prompt, encoded like the training data."""
    from engine.data.encoding import encode_texts, token_prefix

    (ids,) = encode_texts([prompt], tokenizer, parse_special_tokens=is_template)
    prefix = token_prefix(tokenizer)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def until_next_turn(pieces: Iterable[str]) -> Iterator[str]:
    """The text before the human's next turn; a possible beginning of that turn is held back."""
    held = ""
    for piece in pieces:
        held += piece
        if HUMAN in held:
            yield held[: held.index(HUMAN)]
            return
        keep = next(n for n in range(min(len(HUMAN) - 1, len(held)), -1, -1) if HUMAN.startswith(held[len(held) - n :]))
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held.rstrip("\n") if HUMAN.startswith(held) else held


# ---- The dialogue ----


def print_responses(
    models: list[ChatModel], question: str, output: str = "text", reward_model: RewardModel | None = None
) -> bool:
    """Print the response of each model, under its name if there are several, and its reward.

    Ctrl-C stops the current response only, so all models see the same questions. A blank question gets an empty
    response from each: no model is asked.

    Args:
        output: text; or jsonl, one line with the question and all responses.
        reward_model: scores them; None prints no rewards.

    Returns:
        False if Ctrl-C stopped a response.
    """
    is_complete, responses = True, []
    rewards: list[float | None] = []
    for model in models:
        if len(models) > 1 and output == "text":
            print(f"== {model.name}")
        stop = threading.Event()

        def interrupt(*_: Any, stop: threading.Event = stop) -> None:
            nonlocal is_complete
            is_complete = False
            stop.set()

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            pieces = []
            for piece in model.respond(question, stop) if question else ():
                pieces.append(piece)
                if output == "text":
                    print(piece, end="", flush=True)
        finally:
            signal.signal(signal.SIGINT, previous)
        responses.append("".join(pieces).strip())
        if output == "text":
            print(flush=True)
        if reward_model is not None:
            rewards.append(reward_model.score(model.messages) if question and is_complete else None)
            if output == "text" and rewards[-1] is not None:
                print(f"[reward {rewards[-1]:.3f}]", flush=True)
    if output == "jsonl" and is_complete:
        named = zip(("response", "compare"), responses, strict=False)
        named_rewards = zip(("reward", "compare_reward"), rewards, strict=False)
        print(json.dumps({"prompt": question, **dict(named), **dict(named_rewards)}, ensure_ascii=False), flush=True)
    return is_complete


def chat(options: ChatOptions) -> None:
    """Load the models, and respond to the prompt, to a pipe, or at the terminal."""
    if options.output == "jsonl" and options.prompt is None and sys.stdin.isatty():
        raise UserError("CONFIG", "output: jsonl is for prompt=TEXT or a pipe", "python chat.py ... < prompts.txt")
    names = [name for name in (options.model, options.compare) if name is not None]
    models = load_models(names, options, also=[options.reward_model])
    reward_model = None if options.reward_model is None else RewardModel(options.reward_model)
    if options.prompt is not None:
        if not print_responses(models, options.prompt, options.output, reward_model):
            raise KeyboardInterrupt
    elif not sys.stdin.isatty():
        respond_to_pipe(models, sys.stdin, options, reward_model)
    else:
        converse(models, reward_model)


def respond_to_pipe(
    models: list[ChatModel], source: TextIO, options: ChatOptions, reward_model: RewardModel | None
) -> None:
    """Respond to each line as a dialogue of its own, or to the whole text; a blank line gets an empty response."""
    try:
        for prompt in [source.read()] if options.stdin == "whole" else source:
            for model in models:
                model.reset()
            if not print_responses(models, prompt.strip(), options.output, reward_model):
                raise KeyboardInterrupt
    except UnicodeDecodeError as error:
        raise UserError("DATA", f"stdin is not UTF-8 ({error})", "convert it, with iconv for example") from error


def converse(models: list[ChatModel], reward_model: RewardModel | None) -> None:
    """Run a dialogue at the terminal."""
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  gives input() line editing and a history
    print(f"{' and '.join(model.name for model in models)}: {COMMANDS}")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops the line being typed
            print()
            continue
        if question == "/quit":
            return
        if question == "/reset":
            for model in models:
                model.reset()
            print("the dialogue is forgotten")
        elif question.startswith("/"):
            print(COMMANDS)
        elif question:
            try:
                print_responses(models, question, reward_model=reward_model)
            except UserError as error:  # about this question; the dialogue continues
                print(error, file=sys.stderr)


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    usage = f"python chat.py model=RUN [key=value ...]: chat with a model; {COMMANDS}"
    return run_command(chat, usage, ChatOptions, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
