"""Template drift: tokens as trained against those of the tokenizer's own chat template."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.data.chat import Chat, Message
from engine.data.encoding import Text, encode
from engine.data.rows import Row
from engine.data.special_tokens import MARK
from engine.inspect.collecting import Data, DatasetSplit, place_of
from engine.inspect.findings import MAX_PLACES, Finding
from engine.inspect.tokens import TokenTexts
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE: list[Message] = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Name two colours."},
]
PROBE_RESPONSE: Message = {"role": "assistant", "content": "Red and blue."}
MAX_COMPARED = 500  # examples of a data set and split


def template_drift(data: Data, hh_datasets: set[str], notes: list[str]) -> Iterator[Finding]:
    """Compare a dialogue, and examples, with the tokenizer's own chat template.

    Args:
        hh_datasets: short names of data sets in the format of HH.
        notes: gets the reason where nothing is compared.
    """
    if not data.tokenizer.chat_template:
        notes.append("template drift: the tokenizer has no chat template to compare with")
        return
    for split in data.splits:
        kept = [*split.kept]
        num_written = sum(each.prompt_text.from_template for each in kept)
        if split.split == "test" and any(each.name == f"{split.dataset} train" for each in data.splits):
            continue  # the forms are those of train
        if num_written < len(kept):
            yield _plain_text(data, split, len(kept) - num_written, len(kept), split.dataset in hh_datasets)
        if num_written:
            try:
                yield from _compare(data, split, num_written)
            except UserError as error:
                notes.append(f"template drift: {split.name} is not compared: {error.what}")


def _plain_text(data: Data, split: DatasetSplit, number: int, total: int, is_hh: bool) -> Finding:
    form = "the format of HH" if is_hh or data.settings.chat_template == "hh" else "plain text"
    meaning = (
        f"{split.dataset} is trained as {form}. The tokenizer has a chat template, and other programs will write"
        " prompts by it. Give messages, or export with the template that was trained."
    )
    return Finding("template drift", number, total, f"examples of {split.name}", meaning)


def _compare(data: Data, split: DatasetSplit, num_written: int) -> Iterator[Finding]:
    tokenizer, setting = data.tokenizer, data.settings.chat_template
    trained = trained_ids(tokenizer, Chat(tokenizer, setting))
    own = own_ids(tokenizer, "".join(_rendered(Chat(tokenizer, None))))
    difference = first_difference(tokenizer, trained, own)
    if difference is not None:
        template = f"chat_template={setting}" if setting else "the chat template, as trained,"
        meaning = f"{template} gives other tokens than the tokenizer's own template; other programs use that one."
        places = [f"a dialogue of three messages and a response: {difference}"]
        yield Finding("template drift", num_written, num_written, f"examples of {split.name}", meaning, places)
        return
    found: list[str] = []
    written = [each for each in split.kept if each.prompt_text.from_template][:MAX_COMPARED]
    for each in written if setting is None else ():
        texts = [each.prompt_text.text, *(text.text for text in each.response_texts)]
        if any(MARK in text for text in texts):
            continue  # reported as literal special tokens
        for text, response in zip(texts[1:], each.responses, strict=True):
            ids = [*each.prompt.tolist(), *response.tolist()]
            difference = first_difference(tokenizer, ids, own_ids(tokenizer, texts[0] + text))
            if difference is not None:
                found.append(f"{place_of(split, each, 40)}: {difference}")
                break
    if found:
        meaning = (
            "Prompt and response are tokenized apart, as in generation; the whole dialogue at once gives other tokens"
            " at their border. A template with a special token or newline before the response avoids it."
        )
        unit = f"examples of {split.name} compared"
        yield Finding("template drift", len(found), len(written), unit, meaning, found[:MAX_PLACES])


def _rendered(chat: Chat) -> tuple[str, str]:
    """The texts of the probe: its prompt and its response."""
    prompt, (response,) = chat.render(Row({}, "a probe of three messages"), PROBE, [PROBE_RESPONSE])
    return prompt, response


def trained_ids(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> list[int]:
    """The probe as trained: prompt and response encoded apart, with prefix and end of text."""
    encoded = encode([Text(chat.is_template, text) for text in _rendered(chat)], tokenizer)
    return [*encoded.prompt(0).tolist(), *encoded.response(1).tolist()]


def own_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """A dialogue encoded at once, as apply_chat_template does."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def first_difference(tokenizer: "PreTrainedTokenizerBase", trained: list[int], own: list[int]) -> str | None:
    """Both sequences around their first difference; None if they are equal but for what follows the response."""
    texts = TokenTexts(tokenizer)
    trained, own = _without_tail(trained, texts), _without_tail(own, texts)
    if trained == own:
        return None
    pairs = enumerate(zip(trained, own, strict=False))
    start = next((number for number, (left, right) in pairs if left != right), min(len(trained), len(own)))
    begin = max(start - 2, 0)
    sides = ["|".join(texts[token] for token in ids[begin : start + 3]) for ids in (trained, own)]
    return f"token {start}: trained {sides[0]!r}, own template {sides[1]!r}"


def _without_tail(ids: list[int], texts: TokenTexts) -> list[int]:
    """Ids without end of text and white space at the end: templates put different ones behind a response."""
    end = len(ids)
    while end and (ids[end - 1] == texts.end_of_text or not texts.plain(ids[end - 1]).strip()):
        end -= 1
    return ids[:end]
