"""The token cache: reused if texts and tokenizer are the same, rebuilt if damaged."""

from collections import Counter

import pytest

from engine.data import encoding
from engine.data.encoding import encode_texts
from tests.data.samples import byte_tokenizer, pair, run, texts
from utils import UserError


@pytest.fixture
def num_encoded(monkeypatch) -> Counter[str]:
    """Counts calls of the encoder."""
    calls: Counter[str] = Counter()

    def spy(*args, **kwargs):
        calls["encode"] += 1
        return encode_texts(*args, **kwargs)

    monkeypatch.setattr(encoding, "encode_texts", spy)
    return calls


def test_a_second_run_reads_the_cache(plain, tmp_path, num_encoded):
    data = pair("p", "a", "b")
    first, second = (texts(run(data, plain, tmp_path), plain) for _ in range(2))
    assert first == second == [("p", "a<eos>", "b<eos>")]
    run(data, plain, tmp_path, max_length=4, max_prompt_length=2)  # truncation comes after the cache
    assert num_encoded["encode"] == 1
    (store,) = (tmp_path / "tokens").glob("[!.]*")  # beside its lock
    assert sorted(path.name for path in store.iterdir()) == ["meta.json", "texts.arrow"]


def test_the_cache_key_covers_texts_tokenizer_and_template(plain, with_bos, tmp_path, num_encoded):
    run(pair("p", "a", "b"), plain, tmp_path)
    run(pair("p", "a", "c"), plain, tmp_path)
    run(pair("pa", "", "c") | pair("p", "a", "d"), plain, tmp_path)
    run(pair("p", "a", "b"), with_bos, tmp_path)
    run(pair("p", "a", "b"), byte_tokenizer(num_merges=2), tmp_path)
    run(pair("p", "a", "b", from_template=True), plain, tmp_path)
    assert num_encoded["encode"] == len(list((tmp_path / "tokens").glob("[!.]*"))) == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_cache_is_built_again(plain, tmp_path, num_encoded, damage):
    data = pair("p", "a", "b")
    run(data, plain, tmp_path)
    (path,) = (tmp_path / "tokens").glob("*/texts.arrow")
    good = path.read_bytes()
    flipped = good[:-5] + bytes([good[-5] ^ 1]) + good[-4:]
    path.write_bytes({"flip": flipped, "cut": good[:-5], "empty": b"", "other": b"x" * 100}[damage])
    assert texts(run(data, plain, tmp_path), plain) == [("p", "a<eos>", "b<eos>")]
    assert num_encoded["encode"] == 2
    assert path.read_bytes() == good


def test_an_unwritable_cache_is_an_error(plain, tmp_path):
    (tmp_path / "tokens").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"error\[STORAGE\] cache_dir: .* cannot be written"):
        run(pair("p", "a", "b"), plain, tmp_path)
