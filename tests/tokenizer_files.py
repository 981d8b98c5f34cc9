"""Tokenizers like those of published models, trained quickly on a few sentences."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.export.meta_llama import LLAMA3_SPLIT, find_merges

TEXTS = [
    "the cat sat on the mat and the dog sat on the cat",
    "\n\nHuman: How's the film of 1987?\n\nAssistant: It's fine, we've seen it 12345 times.",
    "def f(x):\n    return x  # twice\r\n\t I'LL SAY: naïve café — 東京 🎬",
]
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: _split(LLAMA3_SPLIT.replace("{1,3}", "")),
    "llama-bpe": lambda: _split(LLAMA3_SPLIT),
}


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(kind: str = "gpt-2", num_merges: int = 60) -> PreTrainedTokenizerBase:
    """A byte-level BPE with <|endoftext|> and <|user|>.

    Args:
        kind: a key of PRE_TOKENIZERS.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + num_merges,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    return fast


def sentencepiece_pieces(num_merges: int = 60) -> list[tuple[str, float, str]]:
    """The content of a SentencePiece BPE model: (piece, score, type)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    characters = sorted({character for text in TEXTS for character in text.replace(" ", "▁") if character > " "})
    trainer = trainers.BpeTrainer(
        vocab_size=len(characters) + num_merges, initial_alphabet=characters, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merged = [piece for piece in by_id if len(piece) > 1]
    pieces = [("<unk>", 0.0, "UNKNOWN"), ("<s>", 0.0, "CONTROL"), ("</s>", 0.0, "CONTROL")]
    pieces += [(f"<0x{byte:02X}>", 0.0, "BYTE") for byte in range(256)]
    pieces += [(piece, -float(rank), "NORMAL") for rank, piece in enumerate(merged)]
    return pieces + [(piece, -1e6 - i, "NORMAL") for i, piece in enumerate(p for p in by_id if len(p) == 1)]


def sentencepiece() -> PreTrainedTokenizerBase:
    """The same model in transformers' form, with merges."""
    pieces = sentencepiece_pieces()
    vocabulary = {piece: index for index, (piece, *_) in enumerate(pieces)}
    ranks = {piece: -score for piece, score, kind in pieces if kind == "NORMAL"}
    return LlamaTokenizer(vocab=vocabulary, merges=find_merges(ranks, vocabulary), add_bos_token=True)
