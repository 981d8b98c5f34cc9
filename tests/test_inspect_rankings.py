"""inspect_data.py loss=reward: findings count the pairs of rankings, and nothing is said of a policy."""

from pathlib import Path

import pytest

from engine.inspect.page import format_page
from engine.inspect.terminal import Terminal, format_inspection
from tests.inspections import Inspector, Tags, clean_rows, table, words


@pytest.fixture
def inspector(tmp_path: Path, cache: Path) -> Inspector:
    return Inspector(tmp_path, cache)


def test_pairs_for_a_reward_model_have_the_same_findings(inspector: Inspector) -> None:
    assert inspector.checks("loss=reward") == {}
    row = inspector.train[3]
    inspector.train += [row, row, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}]
    inspector.train[5]["rejected"] = inspector.train[5]["chosen"].replace(inspector.train[5]["chosen"][5], "X", 1)
    inspector.test[0]["prompt"] = inspector.train[7]["prompt"]
    expected = {"prompts in both splits": 1, "contradictions": 1, "duplicates": 2, "similar pairs": 1}
    assert inspector.checks("loss=reward") == inspector.checks() == expected


def test_the_pairs_of_a_ranking_are_counted(inspector: Inspector) -> None:
    for rows in (inspector.train, inspector.test):
        rows[:] = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in rows]
    responses = [" " + words(5, index) for index in range(4)]
    inspector.train[0] = {"prompt": "p", "responses": responses, "scores": [2, 1, 1, 0]}
    inspector.train[1] = {"prompt": "p", "responses": responses[:2]}
    inspector.train[2] = {"prompt": "p", "responses": responses[3:1:-1]}
    inspection = inspector("loss=reward")
    assert table(inspection, "Rows")["rows train"] == {"rows": "40", "prompts": "38", "pairs": "44", "dropped": "0"}
    assert table(inspection, "Lengths")["rows train response"]["mean"]
    found = {finding.check: finding for finding in inspection.findings}
    assert {*found} == {"duplicates", "contradictions"}
    for finding in found.values():
        assert (finding.number, finding.total, finding.unit) == (1, 54, "pairs") and finding.places == [
            "rows train: 'p'"
        ]
    assert "gradients" not in found["contradictions"].meaning


def test_a_reward_model_has_meanings_of_its_own(inspector: Inspector) -> None:
    for row in inspector.train:
        row["chosen"], row["rejected"] = sorted((row["chosen"], row["rejected"]), key=len, reverse=True)
    start = " " + words(40, "start")
    inspector.train[3] |= {"chosen": start + " yes", "rejected": start + " no"}
    inspector.train[5] |= {"chosen": start + " yes"}
    row = inspector.train[7]
    row["rejected"] = row["chosen"].replace(row["chosen"][5], "X", 1)
    inspection = inspector("loss=reward", "max_length=100", "max_prompt_length=20", examples=100)
    found = {finding.check: finding for finding in inspection.findings}
    numbers = [found[check].number for check in ("equal after truncation", "similar pairs", "no end of text")]
    assert len(found) == 5 and numbers == [1, 1, 1]
    assert "those who compared them" in found["truncated prompts"].meaning
    assert "read at the last token" in found["no end of text"].meaning
    assert "length_eval/accuracy" in found["length"].meaning
    assert not any("policy" in finding.meaning.lower() for finding in found.values())
    assert not any("likelihood" in finding.meaning for finding in found.values())
    part = next(
        part for example in inspection.examples for part in example.parts if part.num_cut and part.role != "prompt"
    )
    assert part.tokens[-1].is_used and not part.tokens[-1].is_special


def test_a_ranking_is_shown_as_it_is_fed(inspector: Inspector) -> None:
    row = {"prompt": "a prompt", "responses": [" so", " or so", " not", " no"], "scores": [1, 2, 1, 0]}
    inspector.train = [row]
    inspection = inspector("loss=reward")
    assert inspector("loss=reward", "batching=padded").examples == inspection.examples
    (example,) = inspection.examples
    ids = [inspector.tokenizer(text)["input_ids"] for text in (row["prompt"], *row["responses"])]
    expected = [ids[0], *([*each, inspector.tokenizer.eos_token_id] for each in ids[1:])]
    assert [[token.id for token in part.tokens] for part in example.parts] == expected
    assert [part.role for part in example.parts] == [
        "prompt",
        "response 1 better than 4",
        "response 2 better than 1, 3, 4",
        "response 3 better than 4",
        "response 4",
    ]
    used = [[index for index, token in enumerate(part.tokens) if token.is_used] for part in example.parts]
    assert used == [[], *([len(part.tokens) - 1] for part in example.parts[1:])]
    shown = [format_inspection(inspection, Terminal()), Tags(format_page(inspection)).text]
    assert not any("trained on" in text or "masked" in text for text in shown)
    assert all("tokens, scored at the last" in text for text in shown)
    # The last token of a response is fed: a score is read there.
    fed = [int(row["tokens"]) for row in table(inspection, "Tokens fed").values()]
    sizes = [*map(len, expected)]
    assert fed == [sum(sizes), sum(sizes) + 3 * sizes[0], 4 * (sizes[0] + max(sizes[1:]))]


def test_held_out_prompts_are_told(inspector: Inspector) -> None:
    def notes(*more: str) -> list[str]:
        return [note for section in inspector(*more).sections for note in section.notes if "out" in note]

    told = [
        "training holds out 5% of the prompts, at most 256, of train, as there is no test split",
        "held-out prompts are counted too",
    ]
    inspector.test = []
    assert notes("loss=reward", "test_fraction=0") == told
    assert notes("test_fraction=0") == []


def test_prompts_without_an_order_have_places(inspector: Inspector) -> None:
    inspector.train += [{**clean_rows("more", 1)[0], "prompt": inspector.train[4]["prompt"]}]
    notes = inspector("loss=reward", "loss.ranking=plackett_luce").sections[0].notes
    assert notes[0].startswith("rows train: 1 dropped: prompt without one order of its responses")
    assert inspector.train[4]["prompt"][-20:] in notes[1]
