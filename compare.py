"""Compare two models in a browser, or chat with one: python compare.py model=RUN against=OTHER; see docs/compare.md."""

import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le
from pydantic import Field

from chat import ChatModel, DialogueOptions, load_models
from engine.settings.options import run_command
from engine.settings.value_types import ExistingFile, PossiblePath
from utils import UserError

if TYPE_CHECKING:  # it takes seconds to import
    from engine.compare.session import Session
    from engine.compare.votes import VoteFile
    from engine.data.chat import Message

USAGE = "python compare.py model=RUN [against=OTHER] [key=value ...]: blind votes, or a chat, in a browser"
VOTES = "votes.jsonl"
Port = Annotated[int, Ge(0), Le(65535)]


class CompareOptions(DialogueOptions):
    against: PossiblePath | None = Field(None, description="the other model; null: a chat with one")
    prompts: ExistingFile | None = Field(
        None, description="prompts to offer: .txt, a question in each line, or rows of any form"
    )
    votes: PossiblePath | None = Field(
        None, description=f"the file of votes, which train.py reads; it is continued; null: {VOTES}"
    )
    port: Port = Field(8765, description="of the page, on this machine only; 0: a free one")


class Responder:
    """A loaded model, for the page."""

    def __init__(self, model: ChatModel, identity: str):
        self.name, self.identity, self._model = model.name, identity, model

    @property
    def was_cut(self) -> bool:
        return self._model.was_cut

    def respond(self, messages: "list[Message]", stop: threading.Event) -> Iterator[str]:
        """Stream the response to the last of the messages."""
        self._model.messages = list(messages[:-1])
        return self._model.respond(messages[-1]["content"], stop)


def compare(options: CompareOptions) -> None:
    """Load the models, and serve the page until a signal."""
    if options.against is None and (options.prompts or options.votes):
        raise UserError("CONFIG", "prompts and votes are for two models", "add against=OTHER, or leave them out")

    from engine.compare.server import listen, serve
    from engine.compare.votes import VoteFile

    votes = None
    with listen(options.port) as listener:
        if options.against is not None:
            votes = VoteFile(Path(options.votes or VOTES).expanduser())
        try:
            session = make_session(options, votes)
            try:
                serve(session, listener)
            finally:
                session.close()
        finally:
            if votes is not None:
                votes.close()
                if votes.rows:
                    print(f"votes: {len(votes.rows)} rows in {votes.path}", flush=True)


def make_session(options: CompareOptions, votes: "VoteFile | None") -> "Session":
    from engine.compare.prompts import read_prompts
    from engine.compare.session import Session
    from engine.compare.votes import check_rows, preference_columns

    names = [options.model] if options.against is None else [options.model, options.against]
    models = load_models(names, options)
    responders = [Responder(model, identity_of(name)) for model, name in zip(models, names, strict=True)]
    chat = models[0].chat
    if votes is not None:
        check_rows(votes, has_messages=chat.is_template)
    prompts = [] if options.prompts is None else read_prompts(Path(options.prompts), models[0].tokenizer)
    columns = partial(preference_columns, chat)
    return Session(responders, system=options.system, votes=votes, columns=columns, prompts=prompts)


def identity_of(name: str) -> str:
    """The checkpoint behind a name: a run has another one later."""
    from engine.export.saved_models import find_saved

    directory = find_saved(name)
    return name if directory is None else str(directory.resolve())


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return run_command(compare, USAGE, CompareOptions, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
