"""Repeats: duplicates, contradictions, near-duplicates, and prompts in both splits."""

from collections.abc import Iterator

import numpy as np

from engine.data.examples import TokenizedExample
from engine.inspect.collecting import Data, DatasetSplit, key_of, place_of, quoted_end
from engine.inspect.findings import (
    MAX_PIECE_PROMPTS,
    MAX_PIECE_SHARE,
    MAX_PLACES,
    MAX_ROWS_FOR_NEAR_DUPLICATES,
    MIN_JACCARD,
    SHINGLE_TOKENS,
    Finding,
)
from utils import progress

# A pair is a candidate if all numbers of a band are equal. With these, 1 in 20,000 pairs at MIN_JACCARD is missed.
NUM_BANDS, BAND_SIZE = 25, 5
ESTIMATE_MARGIN = 0.15  # four standard deviations of the estimate of MinHash
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so each token of a piece changes its number


def duplicates(data: Data) -> Iterator[Finding]:
    """Examples, or pairs of rankings, that repeat one of their split, before truncation, in any data set."""
    seen: set[tuple[str, bytes, object]] = set()
    number, total = 0, 0
    places: list[str] = []
    for item in data.compared():
        split, each, _ = item
        row = each.example.row
        other = each.example.label if row is None else repr(dict(row.columns))  # prompts with other answers differ
        key = split.split, key_of((each.prompt, *item.whole)), other
        total += 1
        if key in seen:
            number += 1
            if len(places) < MAX_PLACES:
                places.append(place_of(split, each))
        seen.add(key)
    if number:
        one = "pair" if data.is_ranked else "example"
        meaning = f"A repeated {one} counts more than others. Remove repeats, or give a row a weight on purpose."
        yield Finding("duplicates", number, total, data.unit, meaning, places)


def contradictions(data: Data) -> Iterator[Finding]:
    """Preferences with their opposite in the same split."""
    if not data.has_pairs and all(each.example.label is None for _, each in data.kept()):
        return
    seen: set[tuple[str, bytes, bool | None]] = set()
    found: dict[tuple[str, bytes], str] = {}
    total = 0
    for item in data.compared():
        split, each, _ = item
        total += 1
        label = each.example.label
        key = split.split, key_of((each.prompt, *item.whole))
        opposite = split.split, key_of((each.prompt, *item.whole[::-1]))
        if (*opposite, None if label is None else not label) in seen:
            found.setdefault(min(key, opposite), place_of(split, each))
        seen.add((*key, label))
    if found:
        effect = "they pull both scores together" if data.is_ranked else "their gradients cancel"
        meaning = f"Two rows ask for opposite things, and {effect}. Keep one of them, or neither."
        yield Finding("contradictions", len(found), total, data.unit, meaning, [*found.values()][:MAX_PLACES])


def prompts_in_both_splits(data: Data) -> Iterator[Finding]:
    """Truncated prompts of the test split in the train split."""
    train = {each.example.prompt.tobytes() for split, each in data.kept() if split.split == "train"}
    test: dict[bytes, str] = {}
    for split, each in data.kept():
        if split.split == "test":
            test.setdefault(each.example.prompt.tobytes(), place_of(split, each))
    shared = [place for prompt, place in test.items() if prompt in train]
    if shared:
        meaning = "The evaluation is too good on prompts that were trained on. Remove them from one of the splits."
        yield Finding("prompts in both splits", len(shared), len(test), "test prompts", meaning, shared[:MAX_PLACES])


# ---- Near-duplicates ----


def near_duplicates(data: Data, is_asked: bool | None, notes: list[str]) -> Iterator[Finding]:
    """Prompts nearly equal to an earlier one of any split.

    MinHash finds candidates. The exact Jaccard index of their pieces decides.

    Args:
        is_asked: None skips large data.
        notes: gets the reason for skipping it.
    """
    if is_asked is None and data.num_rows > MAX_ROWS_FOR_NEAR_DUPLICATES:
        limit = f"more than {MAX_ROWS_FOR_NEAR_DUPLICATES:,}"
        notes.append(f"near-duplicates: skipped for {data.num_rows:,} rows, {limit}; near_duplicates=true runs it")
        return
    if is_asked is False:
        return
    prompts: dict[bytes, tuple[DatasetSplit, TokenizedExample]] = {}
    for split, each in data.kept():
        prompts.setdefault(each.prompt.tobytes(), (split, each))
    items = [*prompts.values()]
    pairs = similar_sets(without_common([pieces(each.prompt) for _, each in items]))
    places: list[str] = []
    across = 0
    for later, earlier in pairs:
        (split, each), (other_split, other) = items[later], items[earlier]
        across += split.split != other_split.split
        if len(places) < MAX_PLACES:
            places.append(f"{place_of(split, each)} is like {quoted_end(other.prompt_text.text)}")
    if pairs:
        meaning = (
            f"Each shares {MIN_JACCARD:.0%} or more of its pieces of {SHINGLE_TOKENS} tokens with an earlier prompt;"
            f" {across:,} with one of the other split. They teach little new, and make the evaluation too good."
        )
        yield Finding("near-duplicates", len(pairs), len(items), "distinct prompts", meaning, places)


def pieces(tokens: np.ndarray) -> np.ndarray:
    """uint32 [pieces]: distinct numbers of all runs of SHINGLE_TOKENS tokens, or of the whole if shorter."""
    length = min(SHINGLE_TOKENS, len(tokens))
    num_pieces = len(tokens) - length + 1
    hashed = np.zeros(num_pieces, np.uint64)
    for offset in range(length):
        hashed = (hashed + tokens[offset : offset + num_pieces].astype(np.uint64) + np.uint64(1)) * MULTIPLIER
        hashed ^= hashed >> np.uint64(29)
    return np.unique((hashed >> np.uint64(32)).astype(np.uint32))


def without_common(sets: list[np.ndarray]) -> list[np.ndarray]:
    """The sets without the pieces of many; a set with no other pieces stays whole."""
    numbers, counts = np.unique(np.concatenate(sets), return_counts=True)
    common = numbers[counts > max(MAX_PIECE_SHARE * len(sets), MAX_PIECE_PROMPTS)]
    rest = (np.setdiff1d(each, common, assume_unique=True) for each in sets)
    return [left if len(left) else whole for left, whole in zip(rest, sets, strict=True)]


def similar_sets(sets: list[np.ndarray]) -> list[tuple[int, int]]:
    """(later, earlier) of each set that is similar to an earlier one."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=NUM_BANDS * BAND_SIZE, params=(NUM_BANDS, BAND_SIZE))
    empty = MinHash(num_perm=NUM_BANDS * BAND_SIZE, hashfunc=int)  # the pieces are numbers already
    signatures = np.empty((len(sets), NUM_BANDS * BAND_SIZE), empty.hashvalues.dtype)
    found: list[tuple[int, int]] = []
    for number, numbers in enumerate(progress(sets, description="near-duplicates", unit="prompts")):
        signature = empty.copy()
        signature.update_batch(numbers)
        signatures[number] = signature.hashvalues
        candidates = np.array(sorted(index.query(signature)), np.int64)
        estimates = (signatures[candidates] == signature.hashvalues).mean(axis=1)
        likely = candidates[estimates >= MIN_JACCARD - ESTIMATE_MARGIN].tolist()
        earlier = next((other for other in likely if jaccard(numbers, sets[other]) >= MIN_JACCARD), None)
        if earlier is not None:
            found.append((number, earlier))
        index.insert(number, signature)
    return found


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    num_shared = len(np.intersect1d(left, right, assume_unique=True))
    return num_shared / (len(left) + len(right) - num_shared)
