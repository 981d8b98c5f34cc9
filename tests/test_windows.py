"""Windows of text: every token once an epoch, in one order for any number of ranks, and documents apart."""

from collections import Counter

import numpy as np
import pytest

from engine.data.examples import Example
from engine.data.windows import TokenStream, Windows, num_targets
from engine.run.online import examples_to_fit
from engine.step.layout import lay_out, num_fed_tokens
from engine.step.splitting import split_for_ranks
from engine.step.window_source import Blend, TokenWindows, permuted
from tests.configs import make_settings


def stream(*lengths: int, name: str = "text", first: int = 0) -> TokenStream:
    """A stream of documents of these lengths, with the tokens first, first + 1, ..."""
    offsets = np.cumsum([0, *lengths])
    return TokenStream(name, np.arange(first, first + offsets[-1], dtype=np.uint16), offsets)


def source(windows: Windows, **options: object) -> TokenWindows:
    options = {"batch_size": 4, "seed": 0, "n_epochs": 1, "n_examples": None, **options}
    return TokenWindows(windows, **options)  # type: ignore[arg-type]


def predicted(examples: list[Example]) -> Counter[int]:
    return Counter(lay_out(examples).targets.tolist())


# ---- Windows ----


@pytest.mark.parametrize("lengths", [(5, 3, 9, 4), (21,), (3, 3, 3), (8, 9)])
def test_each_token_is_predicted_once_an_epoch(lengths: tuple[int, ...]) -> None:
    """But for the first of the stream; with a document mask, of each document."""
    text = stream(*lengths)
    plain = source(Windows([text], 8, document_mask=False))
    assert predicted([each for batch in plain.batches() for each in batch]) == Counter(range(1, sum(lengths)))
    masked = source(Windows([text], 8, document_mask=True))
    firsts = {*text.offsets.tolist()}
    expected = Counter(token for token in range(sum(lengths)) if token not in firsts)
    assert predicted([each for batch in masked.batches() for each in batch]) == expected


def test_memory_is_measured_on_the_longest_window() -> None:
    windows = Windows([stream(3), stream(5, 30), stream(9)], 16, document_mask=False)
    (longest,) = examples_to_fit(make_settings(), windows)
    assert num_fed_tokens(longest) == max(map(num_fed_tokens, windows)) == 16 > num_fed_tokens(windows[0])


def test_windows_by_hand() -> None:
    windows = Windows([stream(3, 4, 2)], 4, document_mask=True)  # documents at 0, 3 and 7
    assert windows.sizes == [2] and len(windows) == 2
    first, second = windows
    assert first.prompt.tolist() == [0] and first.responses[0].tolist() == [1, 2, 3, 4]
    assert first.documents is not None and first.documents.tolist() == [3]
    assert second.documents is not None and second.documents.tolist() == [3]
    batch = lay_out([first, second])
    assert batch.input_ids.tolist() == [[0, 1, 3, 4, 5, 7]]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 0, 0, 1, 0]]
    assert batch.targets.tolist() == [1, 2, 4, 5, 6, 8]
    assert batch.predict_index.tolist() == [*range(6)]
    assert batch.response_lengths.tolist() == [3, 3] == [num_targets(first), num_targets(second)]
    assert batch.segments is not None and batch.segments.groups == [(1, 1), (1, 0), (1, 1), (1, 0)]


def test_a_document_that_begins_with_the_last_token_of_a_window_is_only_in_the_next() -> None:
    windows = Windows([stream(4, 4)], 4, document_mask=True)  # the second document begins at 4
    assert lay_out([windows[0]]).targets.tolist() == [1, 2, 3]
    assert lay_out([windows[1]]).targets.tolist() == [5, 6, 7]


def test_windows_with_one_first_token_stay_apart() -> None:
    text = TokenStream("text", np.zeros(9, np.uint16), np.array([0, 9]))
    windows = Windows([text], 4, document_mask=True)
    batch = lay_out([windows[0], windows[1]])
    assert batch.num_tokens == 8 == 2 * num_fed_tokens(windows[0])
    assert len(split_for_ranks(2, list(windows), 1, 100)) == 2


# ---- The order ----


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1000])
def test_permutations_have_each_place_once(size: int) -> None:
    orders = [[permuted(place, size, key) for place in range(size)] for key in ("a", "b")]
    assert all(sorted(order) == [*range(size)] for order in orders)
    assert size < 64 or orders[0] != orders[1]


def test_permutations_are_random() -> None:
    """Neighbours land anywhere: their mean distance is a third of the size."""
    places = np.array([permuted(place, 5000, "key") for place in range(5000)])
    assert abs(np.abs(np.diff(places)).mean() / 5000 - 1 / 3) < 0.02
    assert abs(np.corrcoef(places, np.arange(5000))[0, 1]) < 0.05


def test_the_order_is_a_function_of_seed_and_number() -> None:
    windows = Windows([stream(400)], 8, document_mask=False)
    whole = [each.prompt_index for batch in source(windows, n_epochs=3).batches() for each in batch]
    rest = [each.prompt_index for batch in source(windows, n_epochs=3).batches(start=37) for each in batch]
    assert whole[37:] == rest
    assert whole[:50] != whole[50:100] and sorted(whole[:50]) == sorted(whole[50:100]) == [*range(50)]
    assert [source(windows, seed=1).index(number) for number in range(50)] != whole[:50]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_the_windows_of_a_batch(num_ranks: int) -> None:
    windows = Windows([stream(7, 40, 90, 23)], 8, document_mask=True)
    for batch in source(windows, batch_size=8).batches():
        microbatches = split_for_ranks(num_ranks, batch, 1, 1000)
        assert len(microbatches) == num_ranks
        dealt = [each.prompt_index for part in microbatches for each in part]
        assert sorted(dealt) == sorted(each.prompt_index for each in batch)


@pytest.mark.parametrize(
    "weights", [[0.7, 0.3], [1, 1, 1], [5.0, 1.5, 0.25, 0.01], [1], [0.123457, 0.2, 0.9], [1, 2, 3, 4, 5, 6, 7]]
)
def test_blends_are_off_by_less_than_one(weights: list[float]) -> None:
    blend, had = Blend(weights), [0] * len(weights)
    for number in range(3000):
        chosen, before = blend.turn(number)
        assert before == had[chosen]
        had[chosen] += 1
        for count, weight in zip(had, weights, strict=True):
            assert abs(count - (number + 1) * weight / sum(weights)) < 1
    assert blend.counts(3000) == had


def test_a_blend_counts_the_epochs_of_each_stream() -> None:
    streams = [stream(81, name="large"), stream(17, name="small", first=1000)]
    windows = Windows(streams, 8, document_mask=False)
    assert windows.sizes == [10, 2]
    blended = source(windows, weights=[0.5, 0.5], n_epochs=None, n_examples=40)
    indices = [each.prompt_index for batch in blended.batches() for each in batch]
    assert Counter(indices) == {**dict.fromkeys(range(10), 2), 10: 10, 11: 10}
    assert blended.epochs(40) == {"epochs/large": 2.0, "epochs/small": 10.0}
    assert source(windows, n_epochs=2).epochs(6) == {"epochs/large": 0.5, "epochs/small": 0.5}
