"""Sizes: rows, lengths, truncation, and tokens fed in each layout."""

from collections.abc import Callable, Sequence

import numpy as np

from engine.data.examples import Example, TokenizedExample
from engine.data.held_out import MAX_PROMPTS, SHARE_OF_PROMPTS
from engine.inspect.collecting import Data, pairs_of
from engine.inspect.findings import Histogram, Section, Table, format_share
from engine.inspect.responses import is_prompt_cut, is_response_cut
from engine.step.layout import num_fed_tokens

HELD_OUT = f"{SHARE_OF_PROMPTS:.0%} of the prompts, at most {MAX_PROMPTS},"
NUM_BARS = 12
BARS = " ▁▂▃▄▅▆▇█"


def row_counts(data: Data) -> Section:
    """Rows, prompts, examples and dropped rows of each data set and split, with the reasons."""
    unit = "pairs" if data.has_pairs else "examples"
    rows, notes = [], []
    for split in data.splits:
        kept = [*split.kept]
        num_prompts = len({each.example.prompt_index for each in kept})
        numbers = (split.counts.rows, num_prompts, sum(len(pairs_of(each)) for each in kept), split.dropped.total())
        rows.append([split.name, *(f"{number:,}" for number in numbers)])
        num_joined = sum(each.earlier is not None for each in kept)
        if num_joined:
            notes.append(f"{split.name}: training joins the turns of dialogues to {len(kept) - num_joined:,} examples")
        for reason, number in split.dropped.items():
            notes.append(f"{split.name}: {number:,} dropped: {reason}")
            notes += [f"  {place}" for place in split.counts.places.get(reason, ())]
    if not any(split.dropped for split in data.splits):
        notes.append("no row is dropped")
    if data.holds_out:
        notes.append(f"training holds out {HELD_OUT} of train, as there is no test split")
    return Section("Rows", Table(["", "rows", "prompts", unit, "dropped"], rows), notes)


# ---- Lengths ----


def lengths(data: Data) -> Section:
    """The distribution of prompts and responses, before truncation."""
    end = ", end of text included" if data.has_responses else ""
    section = Section("Lengths", notes=[f"in tokens, before truncation{end}"])
    rows = []
    by_role: dict[str, list[np.ndarray]] = {}
    for split in data.splits:
        kept = [*split.kept]
        columns = {"prompt": [len(each.prompt) for each in kept]}
        for index, role in enumerate(data.roles):
            columns[role] = [len(response) for each in kept for response in each.responses[index :: len(data.roles)]]
        for role, values in columns.items() if kept else ():
            sizes = np.array(values)
            by_role.setdefault(role, []).append(sizes)
            numbers = [sizes.mean(), *np.percentile(sizes, [50, 90, 99]), sizes.max()]
            rows.append([f"{split.name} {role}", *(f"{number:,.0f}" for number in numbers), bars(sizes)])
    section.table = Table(["", "mean", "50%", "90%", "99%", "max", "0 to 99%"], rows, has_bars=True)
    name = "max_length" if data.has_responses else "max_prompt_length"
    limit = name, float(getattr(data.settings, name))
    for role, arrays in by_role.items():
        section.histograms.append(Histogram(f"Length of {role}", "tokens", np.concatenate(arrays), mark=limit))
    return section


def bars(values: np.ndarray) -> str:
    """A small histogram of values from 0 to their 99th percentile, one character a bin."""
    counts, _ = np.histogram(values, NUM_BARS, (0, max(float(np.percentile(values, 99)), 1)))
    heights = np.ceil(counts / max(counts.max(), 1) * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


# ---- Truncation ----


def truncation(data: Data) -> Section:
    """How many examples are truncated, where, and by how much."""
    settings = data.settings
    rows = []
    limits = f"max_prompt_length={settings.max_prompt_length}"
    if data.has_responses:
        limits = f"max_length={settings.max_length}, {limits}"
    notes = [f"{limits}; shares that are cut; median: tokens lost where there is a cut"]
    for split in data.splits:
        kept = [*split.kept]
        if not kept:
            continue
        prompts, responses = [*filter(is_prompt_cut, kept)], [*filter(is_response_cut, kept)]
        num_tokens = sum(map(_num_whole, kept))
        num_cut = num_tokens - sum(map(_num_left, kept))
        row = [split.name, format_share(len(prompts), len(kept)), _median(prompts, _cut_of_prompt)]
        if data.has_responses:
            row += [format_share(len(responses), len(kept)), _median(responses, _cut_of_responses)]
        rows.append([*row, format_share(num_cut, num_tokens)])
        if prompts:
            keeps_start = prompts[0].num_front >= settings.max_prompt_length
            notes.append(f"{split.name}: prompts lose their {'end' if keeps_start else 'start (after BOS)'}")
    header = ["", "prompts", "median"]
    if data.has_responses:
        notes.append("responses lose their end")
        header += ["responses", "median"]
    return Section("Truncation", Table([*header, "tokens"], rows), notes)


def _num_whole(each: TokenizedExample) -> int:
    return len(each.prompt) + sum(map(len, each.responses))


def _num_left(each: TokenizedExample) -> int:
    return len(each.example.prompt) + sum(map(len, each.example.responses))


def _cut_of_prompt(each: TokenizedExample) -> int:
    return len(each.prompt) - len(each.example.prompt)


def _cut_of_responses(each: TokenizedExample) -> int:
    return _num_whole(each) - _num_left(each) - _cut_of_prompt(each)


def _median(items: Sequence[TokenizedExample], size: Callable[[TokenizedExample], int]) -> str:
    return f"{np.median([size(each) for each in items]):,.0f}" if items else "-"


# ---- Tokens fed ----


def fed_tokens(data: Data) -> list[Section]:
    """Tokens fed in one epoch by each layout, in batches of random order; none without responses."""
    if not data.has_responses:
        return []
    rng = np.random.default_rng(data.settings.seed)
    kept = [each for split, each in data.kept() if split.split == "train"]
    examples = [each.example for each in kept]
    packed = sum(num_fed_tokens(example, feeds_last_token=data.is_ranked) for example in examples)
    packed -= sum(num_fed_tokens(each.earlier) for each in kept if each.earlier is not None)  # inside a later prompt
    separate = sum(_num_separate(example) for example in examples)
    padded = _num_padded(examples, rng.permutation(len(examples)), data.settings.batch_size)
    formula = "2P+C+R" if data.batch == "pairs" else "P+R"
    rows = [
        ["packed, each prompt once", f"{packed:,}", "1.00"],
        [f"a row per response ({formula})", f"{separate:,}", f"{separate / packed:.2f}"],
        ["the same, padded to the longest of a batch", f"{padded:,}", f"{padded / packed:.2f}"],
    ]
    shared, unpadded = (1 - less / more for less, more in ((packed, separate), (separate, padded)))
    notes = [
        f"one epoch of train, batch_size={data.settings.batch_size}; batching={data.settings.batching} is set",
        f"each prompt once saves {shared:.0%} of a row per response; no padding saves {unpadded:.0%} of padded rows",
    ]
    if data.holds_out:
        notes.append("held-out prompts are counted too")
    return [Section("Tokens fed", Table(["", "tokens", "times packed"], rows), notes)]


def _num_separate(example: Example) -> int:
    return sum(len(example.prompt) + len(response) for response in example.responses)


def _num_padded(examples: Sequence[Example], order: np.ndarray, batch_size: int) -> int:
    """Tokens of all batches, each padded to its longest row."""
    num_rows = np.array([len(each.responses) for each in examples])[order]
    longest = np.array([len(each.prompt) + max(map(len, each.responses)) for each in examples])[order]
    starts = np.arange(0, len(longest), batch_size)
    return int((np.maximum.reduceat(longest, starts) * np.add.reduceat(num_rows, starts)).sum())
