"""Encoding by hand: a byte-level tokenizer without merges has one token per byte."""

from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.data import encoding, tokenizer_processes
from engine.data.encoding import Text, encode, encode_texts, token_prefix
from engine.data.preferences import Preferences
from engine.data.special_tokens import MARK, special_token_marker
from engine.data.tokenizer_processes import encode_in_processes, is_plain
from tests.data.samples import EOS, byte_tokenizer, pair, run, texts
from utils import UserError


def test_special_tokens_that_are_words_of_the_vocabulary_stay_plain_text():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        ["<s> a"] * 9, trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert (
        fast.bos_token_id in fast("<s>", split_special_tokens=True)["input_ids"]
    )  # split_special_tokens is not enough
    (ids,) = encode_texts(["<s> <s>"], fast, parse_special_tokens=False)
    assert fast.convert_ids_to_tokens(ids) == ["<", "s", ">", "<", "s", ">"]


@pytest.mark.parametrize("form", ["<s> $A", "<s> $A <eos>", "$A <eos>"])
def test_the_prompt_has_the_tokenizers_bos_and_no_eos(form, tmp_path):
    tokenizer = byte_tokenizer(form)
    bos = "<s>" if form.startswith("<s>") else ""
    assert tokenizer.decode(token_prefix(tokenizer)) == bos
    assert texts(run(pair("p", "a", "b"), tokenizer, tmp_path), tokenizer) == [(bos + "p", "a<eos>", "b<eos>")]


def test_special_tokens_in_text_are_plain_text(with_bos, tmp_path):
    (example,) = run(pair("<s> <|user|>", "a<eos>!", "<eos>!"), with_bos, tmp_path).examples
    special = set(with_bos.all_special_ids)
    assert [token in special for token in example.prompt] == [True] + [False] * len("<s> <|user|>")
    for response, text in zip(example.responses, ("a<eos>!", "<eos>!"), strict=True):
        assert [token in special for token in response] == [False] * len(text) + [True]
        assert with_bos.decode(response) == text + EOS


def test_a_response_that_ends_with_eos_gets_no_second_one(plain, tmp_path):
    data = pair("p<eos>", "a<eos>", "b <eos>\n") | pair("q", "<eos>", "c") | pair("r", "d", "d<eos>")
    split = run(data, plain, tmp_path)
    assert texts(split, plain) == [("p<eos>", "a<eos>", "b <eos>")]
    assert [len(response) for response in split.examples[0].responses] == [2, 3]  # one token for <eos>
    assert split.counts["dropped"] == {"empty response": 1, "chosen equal to rejected": 1}


def test_special_tokens_of_a_template_count_but_marked_ones_do_not(plain, tmp_path):
    prompt = f"<|user|><{MARK}|user|>hi"
    split = run([pair(prompt, "a<|user|>", "b", from_template=True), pair("<|user|>", "a", "b")], plain, tmp_path)
    user = plain.convert_tokens_to_ids("<|user|>")
    assert [int((example.prompt == user).sum()) for example in split.examples] == [1, 0]
    assert plain.decode(split.examples[0].prompt) == "<|user|><|user|>hi"
    assert len(split.examples[0].prompt) == 1 + len("<|user|>hi")
    assert split.examples[0].responses[0].tolist()[-2:] == [user, plain.eos_token_id]


def test_a_template_that_writes_bos_gets_no_second_one(with_bos, tmp_path):
    data = [pair("<s>p", "a", "b", from_template=True), pair("p", "a", "b", from_template=True)]
    assert [text[0] for text in texts(run(data, with_bos, tmp_path), with_bos)] == ["<s>p", "<s>p"]


def test_merges_do_not_cross_from_prompt_to_response(tmp_path):
    tokenizer = byte_tokenizer(num_merges=20)
    assert len(tokenizer("the")["input_ids"]) == 1
    (example,) = run(pair("t", "he", "x"), tokenizer, tmp_path).examples
    assert (len(example.prompt), len(example.responses[0])) == (1, 2 + ("he" not in tokenizer.get_vocab()))


def test_each_distinct_text_is_encoded_once(plain, tmp_path, monkeypatch):
    seen: Counter[str] = Counter()

    def spy(chunk, *args, **kwargs):
        seen.update(chunk)
        return encode_texts(chunk, *args, **kwargs)

    monkeypatch.setattr(encoding, "encode_texts", spy)
    monkeypatch.setattr(encoding, "CHUNK_SIZE", 2)
    data: Preferences = {"p": {"responses": ["a", "b", "c"], "pairs": [(0, 1), (0, 2), (1, 2)], "sft_target": "a"}}
    split = run([data, pair("q", "a", "c")], plain, tmp_path)
    assert seen == {"p": 1, "a": 1, "b": 1, "c": 1, "q": 1}
    assert len(split.examples) == 4


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"error\[CONFIG\] the tokenizer has no end-of-text token"):
        run(pair("p", "a", "b"), tokenizer, tmp_path)


def test_overlapping_special_tokens_are_all_marked():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["ab", "bc"]})
    assert special_token_marker(tokenizer)("xabcab") == f"xa{MARK}b{MARK}ca{MARK}b"


@pytest.mark.parametrize("bos", [None, "<s> $A"])
def test_other_processes_give_the_same_ids(bos, monkeypatch):
    """With marks, literal special tokens, and a special token that the merges learned as a word."""
    tokenizer = byte_tokenizer(bos, num_merges=20)
    bare = ["the cat", "", "<eos>", "a <|user|> b", "é" * 3, f"<{MARK}eos> and <{MARK}s>", "sat on the mat"]
    texts = [Text(from_template, text) for from_template in (False, True) for text in bare * 3]
    expected = encode(texts, tokenizer)
    monkeypatch.setattr(encoding, "MIN_PROCESS_TEXTS", 1)
    monkeypatch.setattr(encoding, "CHUNK_SIZE", 4)
    monkeypatch.setattr(encoding, "num_processes", lambda: 2)
    num_asked, real = Counter[str](), encoding.encode_in_processes

    def spy(*args):
        for one in real(*args):
            num_asked["chunks"] += 1
            yield one

    monkeypatch.setattr(encoding, "encode_in_processes", spy)
    found = encode(texts, tokenizer)
    assert num_asked["chunks"] == 12
    assert found.tokens.tolist() == expected.tokens.tolist() and found.tokens.dtype == np.int32
    assert found.lengths.tolist() == expected.lengths.tolist() and found.prefix == expected.prefix
    for index, text in enumerate(texts):
        one = encode_texts([text.text], tokenizer, text.from_template)[0]
        assert found.response(index).tolist() == [*one, tokenizer.eos_token_id]


def test_a_tokenizer_that_changes_texts_stays_in_this_process(plain):
    class Lower(PreTrainedTokenizerFast):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    assert is_plain(plain)
    assert not is_plain(Lower(tokenizer_object=plain.backend_tokenizer, eos_token="<eos>"))


def test_a_process_that_ends_is_an_error(plain, monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("import sys\nsys.stdin.buffer.read(1)\nsys.exit(3)\n")
    monkeypatch.setattr(tokenizer_processes, "WORKER", tmp_path / "worker.py")
    with pytest.raises(UserError, match=r"error\[MEMORY\] tokenizing: a child process ended with status 3"):
        list(encode_in_processes([(["a"], False)] * 5, plain))
