"""Train a tokenizer on the text of a run: byte-level BPE, so any text has tokens."""

import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.rows import RowCounts
from engine.data.text_files import ReadNamed, TextData
from engine.data.token_store import unwritable
from utils import UserError, content_hash, install_directory, one_at_a_time

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.settings.schema import Settings

TRAINING_VERSION = 1  # raise it when tokenizers are trained differently
BOS, EOS, PAD = SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
# Words, numbers of up to three digits, and spaces: the pattern of Llama 3.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(settings: "Settings", read_named: ReadNamed) -> "PreTrainedTokenizerBase":
    """A tokenizer with tokenizer.train tokens, trained on the training text or read from the cache.

    Args:
        read_named: see TextData.

    Raises:
        UserError: DATA for unreadable data or too little text; STORAGE if it cannot be written.
    """
    from transformers import PreTrainedTokenizerFast

    assert settings.cache_dir is not None  # the run has named it
    data = [TextData(name, read_named) for name in settings.datasets]
    how = [TRAINING_VERSION, settings.tokenizer.train, settings.text_field, settings.test_fraction, settings.on_bad_row]
    inputs = [*how, [each.state for each in data]]
    directory = Path(settings.cache_dir) / "tokenizers" / content_hash(inputs)
    if not directory.is_dir():
        with one_at_a_time(directory, f"waiting for another run, which fills {directory}"):
            if not directory.is_dir():
                _train(settings, data, directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def _train(settings: "Settings", data: Sequence[TextData], directory: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    assert settings.tokenizer.train is not None
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.tokenizer.train,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    print(f"training a tokenizer of {settings.tokenizer.train:,} tokens", flush=True)
    tokenizer.train_from_iterator(_train_texts(settings, data), trainer)
    if tokenizer.get_vocab_size() != settings.tokenizer.train:
        problem = (
            f"tokenizer.train: the text gives {tokenizer.get_vocab_size():,} tokens, not {settings.tokenizer.train:,}"
        )
        raise UserError("DATA", problem, "lower it, or add text")
    first = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, first)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    temporary = directory.with_name(f".{directory.name}.{secrets.randbelow(10**15)}.tmp")
    try:
        temporary.mkdir(parents=True)
        fast.save_pretrained(temporary)
        install_directory(temporary, directory)
    except OSError as error:
        if not directory.is_dir():  # else another run was faster, where the disk has no locks
            raise unwritable(directory, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train_texts(settings: "Settings", data: Sequence[TextData]) -> Iterator[str]:
    counts = RowCounts(on_bad_row=settings.on_bad_row)
    for each in data:
        for document in each.documents(settings.text_field, settings.test_fraction, counts):
            if document.split == "train":
                yield document.text
