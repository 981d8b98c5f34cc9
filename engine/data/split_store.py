"""Splits on disk: tables of examples, found by what they follow from, so that a later run reads no rows.

A split is a directory of `examples.arrow`, the columns of a table, and `meta.json`. Its tokens are those of a token
store. It is stale once a source of its rows, a setting, the tokenizer or the code that reads rows has changed.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.chat_templates import template_to_record
from engine.data.encoding import eos_token_id, token_prefix
from engine.data.example_table import NUM_RESPONSES, ExampleTable, TurnTable
from engine.data.examples import Example, Split
from engine.data.read_sources import are_unchanged
from engine.data.rows import RowCounts
from engine.data.token_cache import read_texts, tokenizer_state
from engine.data.token_store import (
    install_store,
    read_arrow,
    remove_leftovers,
    to_arrow,
    to_numpy,
    write_arrow,
    write_meta,
)
from utils import content_hash

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

    from engine.settings.schema import Settings

EXAMPLES = "examples.arrow"
TURN = "turn_"  # before the name of a column of turns, which are lists
# Settings that examples follow from, beside datasets.
KEYS = (
    *("data_dir", "format", "chat_template", "sft_turns", "test_fraction", "on_bad_row"),
    *("max_length", "max_prompt_length"),
)
CODE = sorted(Path(__file__).parent.glob("*.py"))


class SplitStore:
    """The place of a split on disk.

    Args:
        settings: see load_split.
        split, batch: of the examples.
        loaders: the functions that read its data sets.
    """

    def __init__(
        self,
        settings: "Settings",
        tokenizer: "PreTrainedTokenizerBase",
        split: str,
        batch: str,
        loaders: Sequence[Callable[..., Any]],
    ):
        self._cache_dir = Path(settings.cache_dir or "")
        self._tokenizer = tokenizer
        state = content_hash([tokenizer_state(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map])
        values = {"datasets": [*settings.datasets], **{name: getattr(settings, name) for name in KEYS}}
        self._inputs: dict[str, Any] = {
            "settings": values,
            "split": split,
            "batch": batch,
            "tokenizer": [state, token_prefix(tokenizer), eos_token_id(tokenizer), tokenizer.bos_token_id],
            "template": template_to_record(settings.chat_template),
            "code": _hash_code(*loaders),
            "versions": [version("transformers"), version("tokenizers")],
            "day": _day(tokenizer.chat_template, template_to_record(settings.chat_template)),
        }
        name = content_hash([values, split, batch, self._inputs["tokenizer"]])
        self.path = self._cache_dir / "examples" / name

    @staticmethod
    def holds(batch: str) -> bool:
        """Whether examples of this kind make a table."""
        return batch in NUM_RESPONSES

    def read(self, *, is_quiet: bool = False) -> Split | None:
        """The split; None if it is missing, stale or damaged. Its notices are printed unless it is_quiet."""
        found = read_arrow(self.path, self._inputs, EXAMPLES)
        if found is None or not are_unchanged(found[0]["sources"]):
            return None
        meta, arrays = found
        encoded = read_texts(self._cache_dir, meta["texts"], token_prefix(self._tokenizer))
        if encoded is None:
            return None
        turns = _read_turns({name: arrays.pop(name) for name in [*arrays] if name.startswith(TURN)})
        columns = {name: to_numpy(values) for name, values in arrays.items()}
        for line in [] if is_quiet else meta["notices"]:
            print(line, flush=True)
        examples = ExampleTable(columns, encoded.tokens, Example, meta["fingerprint"], encoded.key, turns)
        return Split(examples, meta["counts"], meta["sizes"])

    def write(self, split: Split, counts: RowCounts) -> None:
        """Store a split. It only saves time, so a run goes on without it, as beside a read-only cache.

        Args:
            counts: of its rows, with their sources and notices.
        """
        examples = split.examples
        assert isinstance(examples, ExampleTable)
        temporary = self.path.with_name(f".{self.path.name}.{secrets.randbelow(10**15)}.tmp")
        meta = {
            "inputs": self._inputs,
            "sources": counts.sources,
            "notices": counts.notices,
            "texts": examples.texts,
            "counts": split.counts,
            "sizes": split.sizes,
            "fingerprint": examples.fingerprint,
        }
        try:
            remove_leftovers(self.path)
            temporary.mkdir(parents=True)
            write_arrow(temporary / EXAMPLES, {**examples.columns, **_lists(examples.turns)})
            write_meta(temporary, meta)
            install_store(temporary, self.path, self._inputs, may_stay=False)
        except OSError as error:
            print(f"note: {self.path} cannot be written ({error}), so the next run reads the rows again", flush=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _lists(turns: TurnTable | None) -> "dict[str, pyarrow.Array]":
    """The columns of turns, a list for each example."""
    if turns is None:
        return {}
    import pyarrow

    return {
        TURN + name: pyarrow.LargeListArray.from_arrays(to_arrow(turns.offsets), to_arrow(values))
        for name, values in turns.columns.items()
    }


def _read_turns(lists: "dict[str, pyarrow.Array]") -> TurnTable | None:
    """What _lists() has made."""
    if not lists:
        return None
    offsets = next(iter(lists.values())).offsets
    columns = {name.removeprefix(TURN): to_numpy(values.values) for name, values in lists.items()}
    return TurnTable(to_numpy(offsets), columns)


def _hash_code(*loaders: Callable[..., Any]) -> str:
    """A hash of the code that makes examples of rows, with the files of loaders."""
    files = {loader.__code__.co_filename for loader in loaders if hasattr(loader, "__code__")}
    return content_hash([_hash_files(*CODE), *(_hash_files(Path(file)) for file in sorted(files))])


@cache
def _hash_files(*files: Path) -> str:
    return content_hash([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def _day(*templates: Any) -> str | None:
    """Today, if a chat template writes the date."""
    return str(date.today()) if "strftime_now" in json.dumps(templates) else None
