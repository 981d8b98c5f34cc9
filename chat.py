"""Talk to a trained model: python chat.py model=RUN, or with prompt= or a pipe from a script; see README.md."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from engine.chat_templates import BOS, JINJA
from engine.commands import REQUIRED, Option, run_command, settle_network
from engine.formats import MARK
from engine.validation import Check, count, number, one_of, optional, path, text
from utils import UserError

if TYPE_CHECKING:  # it takes seconds to import
    import torch
    from transformers import PreTrainedTokenizerBase

    from engine.formats import Message

HUMAN = "\n\nHuman:"  # in HH dialogues, where the next turn would begin
COMMANDS = "/reset forgets the dialogue, /quit or Ctrl-D leaves, Ctrl-C stops an answer"

OPTIONS = {
    "model": Option(REQUIRED, path, "a run, checkpoint, adapter, exported directory, or a name on the hub", True),
    "compare": Option(None, optional(path), "another one, which answers after it", True),
    "prompt": Option(None, optional(text), "answer this and leave", True),
    "stdin": Option("lines", one_of("lines", "whole"), "of a pipe: a prompt in each line, or all of it as one"),
    "system": Option(None, optional(text), "a system prompt", True),
    "temperature": Option(0.7, number(at_least=0), "of sampling; 0: the likeliest token"),
    "top_p": Option(0.95, Check("above 0 and at most 1", number(above=0, below=1 + 1e-9).accepts), "nucleus sampling"),
    "max_new_tokens": Option(512, count, "the longest answer"),
    "seed": Option(
        None, optional(number(at_least=0, below=2**32, integer=True)), "of sampling; null: another each time"
    ),
    "dtype": Option(None, optional(one_of("float32", "float16", "bfloat16")), "of the weights; null: as stored"),
    "base": Option(None, optional(path), "the base model of an adapter, in place of the one that it names", True),
    "chat_template": Option(
        None,
        optional(Check("hh, llama2 or a file", lambda value: value in JINJA or os.path.isfile(str(value)))),
        "hh, llama2 or a Jinja file; null: what the run trained on, else the tokenizer's own, else hh",
        True,
    ),
}


# ---- A model that answers ----


class Speaker:
    """A model with its tokenizer and its side of the dialogue.

    Args:
        name: a run, checkpoint, adapter or model directory, or a name on the hub.
        options: of the command.
    """

    def __init__(self, name: str, options: dict[str, Any]):
        import torch

        from engine.saved_models import ADAPTER_CONFIG, RunRecord, find_saved, load_saved, read_run

        directory = find_saved(name)
        record = RunRecord() if directory is None else read_run(directory)
        self.is_adapter = directory is not None and (directory / ADAPTER_CONFIG).is_file()
        dtype = options["dtype"] and getattr(torch, options["dtype"])
        saved = load_saved(name, dtype=dtype, base=options["base"] if self.is_adapter else None)
        self.name, self.options = name, options
        self.model: Any = saved.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.tokenizer: PreTrainedTokenizerBase = saved.tokenizer
        template = options["chat_template"] or record.chat_template
        own = self.tokenizer.chat_template or JINJA["hh"]
        is_own_hh = isinstance(own, str) and own.removeprefix(BOS) == JINJA["hh"]  # as export.py writes it
        self.is_hh = template == "hh" or (template is None and is_own_hh)
        self.jinja: str | None = None
        if template is not None and not self.is_hh:
            try:
                self.jinja = JINJA[template] if template in JINJA else Path(template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"chat_template: {template}, of which the training data are, cannot be read ({error})"
                raise UserError("CONFIG", problem, "give chat_template=FILE, hh or llama2") from error
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        system = self.options["system"]
        self.messages = [{"role": "system", "content": system}] if system else []

    def prompt_ids(self) -> list[int]:
        """The dialogue up to where the answer begins, as the training data have it; the oldest turns are left out
        where it would not leave half of the context for the answer."""
        from engine.formats import Chat, Row

        chat = Chat(self.tokenizer, "hh" if self.is_hh else None)
        chat.jinja = self.jinja
        context = getattr(self.model.config, "max_position_embeddings", None)
        room = None if context is None else max(context - self.options["max_new_tokens"], context // 2)
        messages = list(self.messages)
        while True:
            prompt, _ = chat.render(Row({}, "the dialogue"), messages, [])
            ids = encode_prompt(self.tokenizer, prompt, chat.is_template)
            if room is None or len(ids) <= room:
                return ids
            first = next(i for i, message in enumerate(messages) if message["role"] == "user")
            if len([message for message in messages if message["role"] == "user"]) == 1:
                problem = f"the prompt has {len(ids)} tokens, and the model {context} positions"
                raise UserError("DATA", problem, "shorten it, or lower max_new_tokens")
            del messages[first : first + 2]  # a question and its answer

    def answer(self, question: str, stop: threading.Event) -> Iterator[str]:
        """Stream the answer to a question in pieces of text. The dialogue keeps what was said until it stopped."""
        import torch
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        if not is_utf8(question):
            raise UserError("DATA", "the prompt is not UTF-8", "convert it, with iconv for example")
        self.messages.append({"role": "user", "content": question.replace(MARK, "")})
        try:
            ids = self.prompt_ids()
        except UserError:
            self.messages.pop()
            raise
        options = self.options
        context = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        samples = options["temperature"] > 0
        own = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        pad = self.tokenizer.pad_token_id
        sampling = {"temperature": float(options["temperature"]), "top_p": float(options["top_p"]), "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=min(options["max_new_tokens"], context - len(ids)),
            do_sample=samples,
            eos_token_id=sorted(ends) or None,
            pad_token_id=max(ends, default=0) if pad is None else pad,
            **(sampling if samples else {}),
        )

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor", **kwargs: Any) -> "torch.Tensor":
                return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        errors: list[Exception] = []

        def generate() -> None:
            try:
                self.model.generation_config = settings  # in place of its own, a repetition penalty for example
                if options["seed"] is not None:
                    torch.manual_seed(options["seed"])
                with torch.no_grad():
                    tensor = torch.tensor([ids], device=self.model.device)
                    self.model.generate(
                        tensor,
                        attention_mask=torch.ones_like(tensor),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Stopped()]),
                    )
            except Exception as error:
                errors.append(error)
                streamer.end()

        own_settings = self.model.generation_config
        thread = threading.Thread(target=generate)
        thread.start()
        said = ""
        try:
            for piece in until_next_turn(streamer) if self.is_hh else streamer:
                piece = piece if said else piece.lstrip()
                said += piece
                if piece:
                    yield piece
        finally:
            stop.set()
            thread.join()
            self.model.generation_config = own_settings
            self.messages.append({"role": "assistant", "content": said.strip()})
        if errors:
            raise errors[0]


def is_utf8(text: str) -> bool:
    """Whether text can be written as UTF-8: bytes of the command line that could not be read as such cannot."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, is_template: bool) -> list[int]:
    """The ids of a prompt, encoded as those of the training data are."""
    from engine.tokenization import encode_texts, token_prefix

    (ids,) = encode_texts([prompt], tokenizer, parse_special_tokens=is_template)
    prefix = token_prefix(tokenizer)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def until_next_turn(pieces: Iterable[str]) -> Iterator[str]:
    """The text before the human's next turn; what may be the beginning of that is held back until it is known."""
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


def ask(speakers: list[Speaker], question: str) -> bool:
    """Print the answer of each, under its name if there are several; False if Ctrl-C stopped one.

    Only the answer that is being written is stopped, so that all speakers keep the same questions.
    """
    is_complete = True
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"== {speaker.name}")
        stop = threading.Event()

        def interrupt(*_: Any, stop: threading.Event = stop) -> None:
            nonlocal is_complete
            is_complete = False
            stop.set()

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            for piece in speaker.answer(question, stop):
                print(piece, end="", flush=True)
        finally:
            signal.signal(signal.SIGINT, previous)
        print(flush=True)
    return is_complete


def chat(options: dict[str, Any]) -> None:
    """Load the models, and answer the prompt, the lines of a pipe, or whoever sits at the terminal."""
    names = [name for name in (options["model"], options["compare"]) if name is not None]
    settle_network([*names, options["base"]])
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    speakers = [Speaker(name, options) for name in names]
    if options["base"] and not any(speaker.is_adapter for speaker in speakers):
        raise UserError("CONFIG", f"base: {' and '.join(names)} is no adapter, so it has no base", "leave base out")
    if options["prompt"] is not None:
        if not ask(speakers, options["prompt"]):
            raise KeyboardInterrupt
    elif not sys.stdin.isatty():
        answer_pipe(speakers, sys.stdin, options["stdin"])
    else:
        converse(speakers)


def answer_pipe(speakers: list[Speaker], source: TextIO, mode: str) -> None:
    """Answer each line by itself, or the whole text."""
    try:
        for prompt in [source.read()] if mode == "whole" else source:
            if prompt.strip():
                for speaker in speakers:
                    speaker.reset()
                if not ask(speakers, prompt.strip()):
                    raise KeyboardInterrupt
    except UnicodeDecodeError as error:
        raise UserError("DATA", f"stdin is not UTF-8 ({error})", "convert it, with iconv for example") from error


def converse(speakers: list[Speaker]) -> None:
    """A dialogue at the terminal."""
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  makes input() edit lines and remember them
    print(f"{' and '.join(speaker.name for speaker in speakers)}: {COMMANDS}")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the prompt: this line is not meant
            print()
            continue
        if question == "/quit":
            return
        if question == "/reset":
            for speaker in speakers:
                speaker.reset()
            print("the dialogue is forgotten")
        elif question.startswith("/"):
            print(COMMANDS)
        elif question:
            try:
                ask(speakers, question)
            except UserError as error:  # of this question; the dialogue goes on
                print(error, file=sys.stderr)


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    usage = f"python chat.py model=RUN [key=value ...]: talk to a model; {COMMANDS}"
    return run_command(chat, usage, OPTIONS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
