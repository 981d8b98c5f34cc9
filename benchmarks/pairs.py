"""Pairs and rankings of token ids for the benchmarks: HH rows or synthetic ones, in batches, and their work."""

import gzip
import json
import random
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import compose_settings

if TYPE_CHECKING:
    from engine.data.examples import Example

Pair = dict[str, list[int]]  # prompt, and responses from the best to the worst: token ids
PARTS = ("prompt", "chosen", "rejected")


def hh_pairs(data_dir: Path, vocabulary: int, count: int) -> list[Pair]:
    """HH rows, tokenised by a BPE of the vocabulary's size trained on them, truncated to 512/256."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from preference_datasets import load_split

    with gzip.open(data_dir / "hh" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line in file]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    with tempfile.TemporaryDirectory() as cache:
        settings = compose_settings(
            *("loss=dpo", "loss.beta=0.1", "datasets=[hh]", f"data_dir={data_dir.resolve()}", f"cache_dir={cache}"),
            *("max_length=512", "max_prompt_length=256", "test_fraction=0"),
        )
        examples = load_split(settings, tokenizer, "train", "pairs").examples
    pairs = [
        dict(zip(PARTS, (tokens.tolist() for tokens in (example.prompt, *example.responses)), strict=True))
        for example in examples
    ]
    random.Random(0).shuffle(pairs)
    return [pairs[index % len(pairs)] for index in range(count)]


def synthetic_pairs(vocabulary: int, count: int) -> list[Pair]:
    """Random tokens with the lengths of HH: means of about 117 (prompt), 42 (chosen) and 52 (rejected)."""
    rng = random.Random(0)

    def tokens(mean: float, longest: int) -> list[int]:
        length = min(longest, max(2, round(rng.lognormvariate(0, 0.8) * mean / 1.377)))
        return [rng.randrange(2, vocabulary) for _ in range(length)]

    return [{"prompt": tokens(120, 256), "chosen": tokens(43, 256), "rejected": tokens(53, 256)} for _ in range(count)]


def with_more_responses(pairs: list[Pair], num_responses: int) -> list[Pair]:
    """Rankings of num_responses: pairs with responses of the next pairs."""
    others = [pair[name] for pair in pairs for name in PARTS[1:]]
    return [
        {**pair, **{f"more_{n}": others[(2 * index + 2 + n) % len(others)] for n in range(num_responses - 2)}}
        for index, pair in enumerate(pairs)
    ]


def responses_of(pair: Pair) -> list[list[int]]:
    return [tokens for name, tokens in pair.items() if name != "prompt"]


def make_batches(pairs: list[Pair], batch_size: int, grouped: bool) -> list[list[Pair]]:
    """Batches in the order of pairs, or of similar lengths in random order."""
    if grouped:
        pairs = sorted(pairs, key=lambda pair: len(pair["prompt"]) + max(map(len, responses_of(pair))))
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    if grouped:
        random.Random(0).shuffle(batches)
    return batches


def make_example(pair: Pair, responses: Sequence[str] = ("chosen", "rejected"), prompt_index: int = 0) -> "Example":
    """A pair as an example with the named responses."""
    import numpy as np

    from engine.data.examples import Example

    prompt, *others = (np.array(pair[name], np.int32) for name in ("prompt", *responses))
    return Example(prompt, tuple(others), prompt_index=prompt_index)


def make_ranking(pair: Pair) -> "Example":
    """A pair, or more responses, as an example of a reward model."""
    from dataclasses import replace

    from engine.data.rankings import compare_by_rank

    names = [name for name in pair if name != "prompt"]
    return replace(make_example(pair, names), comparisons=compare_by_rank(range(len(names))))


# ---- Work ----


def fed_tokens(pair: Pair, feeds_last_token: bool = False) -> int:
    """Tokens of a pair in a packed row. A score is read at the last token of a response, which is then fed."""
    return sum(map(len, pair.values())) - (0 if feeds_last_token else len(responses_of(pair)))


def padded_tokens(batch: list[Pair]) -> int:
    """Tokens of a batch as TRL pads it: two rows for each pair of responses, as many pairs at a time as prompts."""
    pairs = [pair_lengths for pair in batch for pair_lengths in combinations(row_lengths(pair), 2)]
    parts = [pairs[start : start + len(batch)] for start in range(0, len(pairs), len(batch))]
    return sum(2 * len(part) * max(map(max, part)) for part in parts)


def row_lengths(pair: Pair) -> list[int]:
    """Tokens of each response with its prompt."""
    return [len(pair["prompt"]) + len(response) for response in responses_of(pair)]


def step_flops(model: dict[str, Any], batches: list[list[Pair]], has_lm_head: bool = True) -> float:
    """Mean FLOP of a packed step, forward and backward.

    - 6 for each parameter of a layer and fed token.
    - 6 for each parameter of the head and response token.
    - 12 x hidden size for each pair of a query and a key: attention.
    """
    hidden, num_layers, inner = model["hidden_size"], model["num_hidden_layers"], model["intermediate_size"]
    shared = model.get("num_key_value_heads", model["num_attention_heads"]) / model["num_attention_heads"]
    num_products = 3 if model["model_type"] == "llama" else 2
    weights = ((2 + 2 * shared) * hidden**2 + num_products * hidden * inner) * num_layers
    pairs = [pair for batch in batches for pair in batch]
    fed = sum(fed_tokens(pair, feeds_last_token=not has_lm_head) for pair in pairs)
    targets = sum(len(response) for pair in pairs for response in responses_of(pair)) if has_lm_head else 0
    scores = 0.0
    for pair in pairs:
        prompt, responses = len(pair["prompt"]), map(len, responses_of(pair))
        scores += prompt**2 / 2 + sum(length * prompt + length**2 / 2 for length in responses)
    total = 6 * weights * fed + 6 * hidden * model["vocab_size"] * targets + 12 * hidden * num_layers * scores
    return total / len(batches)
