"""Small tokenizers, rows and files for the tests of data."""

import gzip
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine.data.examples import Split, tokenize
from engine.data.files import load_file
from engine.data.preferences import Preferences
from engine.data.row_sources import RowSource
from engine.data.rows import RowCounts
from preference_datasets import DATASETS

# ---- Tokenizers ----

EOS = "<eos>"
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' + m['role'] + '\\n' + m['content'].strip() + eos_token + '\\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer(
    template: str | None = None,
    num_merges: int = 0,
    chat_template: str | None = None,
    text: str = "the cat sat on the mat and the dog sat on the cat",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with special tokens <eos>, <s>, <|user|>.

    Args:
        template: its post-processor: "<s> $A".
        text: to learn the merges from.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS, "<s>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + num_merges,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    if template:
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token="<s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>"]}, replace_extra_special_tokens=False)
    fast.chat_template = chat_template
    return fast


# ---- Preferences and examples ----


def pair(prompt: str, chosen: str, rejected: str, from_template: bool = False) -> Preferences:
    responses = [chosen, rejected]
    return {prompt: {"responses": responses, "pairs": [(0, 1)], "sft_target": chosen, "from_template": from_template}}


def run(data, tokenizer, tmp_path: Path, batch="pairs", mode="keep_end", max_length=512, max_prompt_length=256):
    data = [(preferences, mode) for preferences in (data if isinstance(data, list) else [data])]
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    return tokenize(data, tokenizer, batch, RowCounts(), cache_dir=tmp_path, **limits)


def texts(split: Split, tokenizer) -> list[tuple[str, ...]]:
    """Prompt and responses of each example, with special tokens."""
    return [tuple(map(tokenizer.decode, (example.prompt, *example.responses))) for example in split.examples]


# ---- Rows and files ----


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def load(path: Path, tokenizer, split="train", counts=None, test_fraction=0.0, **options):
    return load_file(path, split, counts or RowCounts(), tokenizer, test_fraction=test_fraction, **options)


def load_rows(tmp_path: Path, rows: list, tokenizer, **options):
    return load(write(tmp_path / "rows.jsonl", rows), tokenizer, **options)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
HH_START = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so\n\nAssistant:"


def se(question: str, *answers: tuple[str, int]) -> dict[str, Any]:
    return {"question": question, "answers": [{"text": text, "pm_score": score} for text, score in answers]}


def shp(scores, label, responses="AB", history="q"):
    row = {"history": history, "human_ref_A": responses[0], "human_ref_B": responses[1], "labels": label}
    return row | {"score_A": scores[0], "score_B": scores[1]}


def load_named(name: str, rows: list, tmp_path: Path, split="train") -> tuple[Preferences, RowCounts]:
    """Run the loader of a data set on rows in data_dir."""
    write(tmp_path / name / f"{split}.jsonl.gz", rows)
    source = RowSource(name, str(tmp_path))
    return DATASETS[name].function(split, source), source.counts
