"""Checks of responses: length, truncation, similarity, end of text."""

from collections.abc import Iterator

import numpy as np

from engine.data.examples import TokenizedExample
from engine.inspect.collecting import Compared, Data, DatasetSplit, pairs_of, place_of
from engine.inspect.findings import (
    MAX_PLACES,
    MAX_TRUNCATED_PROMPTS,
    MIN_PAIRS_FOR_LENGTH,
    MIN_SIMILARITY,
    USUAL_LONGER_SHARE,
    Finding,
    Histogram,
    Section,
    Table,
    format_share,
)

EQUAL_BY_TRUNCATION = "Both responses have the same tokens after truncation, so nothing tells them apart."


def is_prompt_cut(each: TokenizedExample) -> bool:
    return len(each.example.prompt) < len(each.prompt)


def is_response_cut(each: TokenizedExample) -> bool:
    return any(map(lambda cut, whole: len(cut) < len(whole), each.example.responses, each.responses))


def without_end_of_text(data: Data) -> Iterator[Finding]:
    """Examples with a response that does not end with the end-of-text token."""
    end = data.tokenizer.eos_token_id
    items = [*data.kept()]
    found = [item for item in items if any(response[-1] != end for response in item[1].example.responses)]
    if found:
        effect = "The policy never sees these responses end, and may learn to run on."
        if data.is_ranked:
            effect = "A score is read at the last token that is left, before the response ends."
        yield _finding("no end of text", found, len(items), _unit(data), f"{effect} Raise max_length.")


def truncated_prompts(data: Data) -> Iterator[Finding]:
    """Many examples with a truncated prompt."""
    items = [*data.kept()]
    found = [item for item in items if is_prompt_cut(item[1])]
    if len(found) > MAX_TRUNCATED_PROMPTS * len(items):
        effect = "The policy responds to less than the writers of the responses saw."
        if not data.has_responses:
            effect = "The policy responds to less than the rows say."
        longest = "max_length" if data.has_responses else "max_prompt_length"
        if data.is_ranked:
            effect = "The model scores responses to less than those who compared them saw."
        yield _finding("truncated prompts", found, len(items), _unit(data), f"{effect} Raise {longest}.")


def _unit(data: Data) -> str:
    return "rankings" if data.is_ranked else "examples"


def equal_after_truncation(data: Data) -> Iterator[Finding]:
    """Pairs with distinct responses, equal after truncation. The trainer drops them."""
    if not data.has_pairs:
        return
    items = [(split, each) for split in data.splits for each in split.examples]
    number = sum(each.num_made_equal for _, each in items)
    if number:
        total = sum(each.num_pairs for _, each in items)
        meaning = f"{EQUAL_BY_TRUNCATION} They are dropped. Raise max_length to keep them."
        places = [place_of(*item) for item in items if item[1].num_made_equal]
        yield Finding("equal after truncation", number, total, "pairs", meaning, places[:MAX_PLACES])


def _finding(
    check: str, found: list[tuple[DatasetSplit, TokenizedExample]], total: int, unit: str, meaning: str
) -> Finding:
    return Finding(check, len(found), total, unit, meaning, [place_of(*item) for item in found[:MAX_PLACES]])


# ---- Chosen against rejected ----


def length_difference(data: Data) -> tuple[Section | None, list[Finding]]:
    """How often, and by how much, the chosen response is longer, before truncation."""
    if not data.has_pairs:
        return None, []
    rows, differences = [], []
    for split in data.splits:
        pairs = (Compared(split, each, pair) for each in split.kept for pair in pairs_of(each))
        lengths = np.array([[*map(len, pair.whole)] for pair in pairs]).reshape(-1, 2)
        if len(lengths):
            difference = lengths[:, 0] - lengths[:, 1]
            differences.append(difference)
            rows.append(_length_row(split.name, lengths, difference))
    every = np.concatenate(differences)
    header = ["", "longer", "shorter", "equal", "mean", "median", "ratio"]
    notes = ["in tokens, before truncation; mean and median of chosen - rejected; ratio of their means"]
    section = Section("Chosen longer than rejected", Table(header, rows), notes)
    section.histograms.append(Histogram("Chosen minus rejected", "tokens", every, mark=("equal", 0)))
    num_longer = int((every > 0).sum())
    low, high = USUAL_LONGER_SHARE
    num_different = int((every != 0).sum())
    is_usual = num_different < MIN_PAIRS_FOR_LENGTH or low <= num_longer / num_different <= high
    if is_usual:
        return section, []
    way = "longer" if num_longer > num_different / 2 else "shorter"
    meaning = (
        f"The policy can learn to write {way} responses in place of better ones."
        " Watch the length of samples; simpo, ln_dpo and ld_dpo count tokens less."
    )
    if data.is_ranked:
        meaning = (
            f"The model can learn to score {way} responses higher in place of better ones."
            " Compare the accuracy of an evaluation with length_eval/accuracy, that of length alone."
        )
    return section, [Finding("length", num_longer, len(every), "pairs have the longer response chosen", meaning)]


def _length_row(name: str, lengths: np.ndarray, difference: np.ndarray) -> list[str]:
    shares = [format_share(int(each.sum()), len(difference)) for each in (difference > 0, difference < 0)]
    equal = format_share(int((difference == 0).sum()), len(difference))
    means = lengths.mean(axis=0)
    sizes = [f"{difference.mean():+.1f}", f"{np.median(difference):+.0f}", f"{means[0] / means[1]:.2f}"]
    return [name, *shares, equal, *sizes]


def similar_pairs(data: Data) -> tuple[Section | None, list[Finding]]:
    """Similarity of chosen and rejected: 1 - edit distance / longer length, in tokens as trained.

    Razin et al. (arXiv 2410.08847): the likelihood of both can fall where responses are alike. Their measure (CHES)
    needs the model's hidden states. The edit distance needs no model, and ranks pairs less well.
    """
    if not data.has_pairs:
        return None, []
    from rapidfuzz.distance import Levenshtein

    items = [*data.compared()]
    values = np.empty(len(items))
    for number, pair in enumerate(items):
        chosen, rejected = (response.tolist() for response in pair.trained)
        values[number] = Levenshtein.normalized_similarity(chosen, rejected)
    section = Section("Similarity of chosen and rejected")
    low, middle, high = np.percentile(values, [10, 50, 90])
    section.notes.append(
        f"1 - edit distance / longer length, in tokens: median {middle:.2f}, 10% below {low:.2f}, 10% above {high:.2f}"
    )
    section.histograms.append(Histogram("Similarity", "", values, mark=("limit", MIN_SIMILARITY)))
    (found,) = np.nonzero(values >= MIN_SIMILARITY)
    if not len(found):
        return section, []
    most = sorted(found.tolist(), key=lambda number: -values[number])[:MAX_PLACES]
    places = [
        f"{place_of(items[number].split, items[number].each)}, similarity {values[number]:.2f}" for number in most
    ]
    effect = (
        "the likelihood of chosen and rejected may fall together (arXiv 2410.08847)."
        " Remove such pairs, or set loss.sft_weight or loss=dpop."
    )
    if data.is_ranked:
        effect = "few tokens decide. Check that these are the ones to be scored."
    meaning = f"Similarity of at least {MIN_SIMILARITY}: {effect}"
    return section, [Finding("similar pairs", len(found), len(items), "pairs", meaning, places)]
