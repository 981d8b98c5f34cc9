"""The embedded example: film dialogues of mixed sentiment, their ground-truth reward, and their tokenizer.

The controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, section 6 and figure 2) without its movie
reviews and its classifier: everything is made here from fixed seeds, and the reward is a plain function, so rewards
and win rates of sampled answers are exact. One grammar writes the answers and says which answers are well formed.
"""

import re
from functools import cache
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NUM_PROMPTS = {"train": 3500, "test": 512}
SEEDS = {"train": 2305, "test": 18290}
MULTI_TURN_SHARE = 0.25  # before duplicates, nearly all single-turn, are drawn again: about 0.3 of train after it
FOLLOW_UP_SHARE = 0.6  # of the multi-turn prompts: ask on about the film of the turn before
SECOND_PAIR_EVERY = 20  # of the training prompts
MIN_GAP = 0.5  # between the rewards of chosen and rejected
NUM_SENTENCES = (1, 2, 2, 3)  # in an answer; repeats are weights
VOCAB_SIZE = 832  # just enough that every word of the texts is one token

# What fills the {slots} of the sentences below.
WORDS = {
    "praise": "superb|moving|brilliant|fresh|clever|vivid|gripping|tender|rich|sweet|warm|charming",
    "fault": "dull|hollow|clumsy|tired|flat|weak|messy|cheap|careless|bland|forced|cold",
    "liked": "loved|enjoyed|admired|adored",
    "disliked": "hated|disliked|loathed|resented",
    "watch": "watch",
    "skip": "skip",
    "deserves": "deserves",
    "wastes": "wastes",
    "aspect": "acting|story|music|design|ending|dialogue|editing|cast|script|humor|sound|mood",
    "who": "everyone|families|students",
    "when": "yesterday|last week|on Sunday|with friends",
    "where": "Rome|Lisbon|Vienna|Dublin",
    "hero": "two sisters|three sailors|an old teacher|young doctors",
    "goal": "a lost letter|a way home|an old friend|an old map",
    "number": "two|three",
    "hour": "six|seven|eight|nine",
}
PRAISE_AND_FAULT = {"praise": "fault", "liked": "disliked", "watch": "skip", "deserves": "wastes"}
OPPOSITES = PRAISE_AND_FAULT | {fault: praise for praise, fault in PRAISE_AND_FAULT.items()}

# Written from the side of praise; a negative answer fills each slot from its opposite.
SENTENCES = {
    "opinion": (
        "I {liked} it.",
        "It was {praise} and {praise}.",
        "It was not {fault}.",
        "It is a {praise} film.",
        "What a {praise} film!",
    ),
    "advice": (
        "You should {watch} it.",
        "It {deserves} your evening.",
        "It is a {praise} film for {who}.",
    ),
    "aspect": (
        "The {aspect} was {praise}.",
        "The {aspect} felt {praise}.",
        "The {aspect} was {praise} and {praise}.",
        "The {aspect} was not {fault}.",
        "I {liked} the {aspect}.",
    ),
    "mixed": (
        "The {aspect} was {praise}, but the {aspect} felt {fault}.",
        "Although the {aspect} was {fault}, I {liked} the {aspect}.",
        "I {liked} the {aspect}, but the {aspect} was {fault}.",
    ),
    "neutral": (
        "I saw it {when}.",
        "It opens in {where}.",
        "It follows {hero}.",
        "It runs for {number} hours.",
    ),
}
# What kind of sentence opens the answer to each kind of question, and what may follow; repeats are weights.
OPENINGS = {
    "opinion": ("opinion", "opinion", "opinion", "neutral"),
    "advice": ("advice", "advice", "advice", "neutral"),
    "aspect": ("aspect", "aspect", "aspect", "mixed"),
}
CONTINUATIONS = ("aspect", "aspect", "aspect", "mixed", "neutral")

QUESTIONS = {
    "opinion": (
        "What did you think of {film}?",
        "Did you like {film}?",
        "How was {film}?",
        "Have you seen {film}?",
        "Tell me about {film}.",
        "Any thoughts on {film}?",
        "What is your opinion of {film}?",
        "I keep hearing about {film}. Is it any good?",
    ),
    "advice": (
        "Would you recommend {film}?",
        "Should I see {film} tonight?",
        "Is {film} worth my time?",
        "Is {film} something for {who}?",
        "I have an evening off. Should I spend it on {film}?",
    ),
    "aspect": (
        "How was the {aspect} in {film}?",
        "What did you make of the {aspect} in {film}?",
        "Was the {aspect} in {film} any good?",
        "Tell me about the {aspect} in {film}.",
        "I care most about the {aspect}. How is it in {film}?",
    ),
}
FOLLOW_UPS = {
    "opinion": ("Did you like it?", "And what did you think of it?", "Is it any good?"),
    "advice": ("Should I see it, then?", "Would you recommend it to {who}?", "Is it worth my time?"),
    "aspect": ("And the {aspect}?", "What about the {aspect}?", "How was the {aspect} in it?"),
}
# Earlier turns, as question and answer: talk about a film, to be followed up, and talk about none.
FILM_TALK = (
    ("What is {film} about?", "It follows {hero} on the way to {where} to look for {goal}. It is set in the winter."),
    ("Where can I see {film}?", "It is on tonight at {hour}, in the small cinema by the station."),
    ("How long is {film}?", "It runs for {number} hours, with a short break in the middle."),
    ("Who is in {film}?", "The lead is new to me. It is the story of {hero}."),
)
SMALL_TALK = (
    ("Can you help me to find a film for tonight?", "Of course. Do you want something light or something serious?"),
    ("Something serious, but not too long.", "Then let us see what is on. There are a few new films this week."),
    ("I would like to go with my sister.", "Good idea. I saw one {when}, and we talked about it for hours."),
    ("The last one I saw was about {hero}.", "I know that one. It was filmed in {where}, I think."),
    ("Is the cinema by the station open?", "Yes, it opens at {hour}, and there are seats left for the late showing."),
)
# A title is The, one of these, one of those.
TITLE_ADJECTIVES = "Silver|Hidden|Last|Golden|Distant|Broken|Winter|Crimson|Northern|Paper|Glass|Seventh|Blue|Long"
TITLE_NOUNS = "Harbor|Orchard|Lantern|Bridge|River|Garden|Letter|Island|Summer|Train|Mirror|Station|Forest|Song"

SLOT = re.compile(r"\{(\w+)\}")
SIGN = {word: 1 for praise in PRAISE_AND_FAULT for word in WORDS[praise].split("|")}
SIGN |= {word: -1 for fault in PRAISE_AND_FAULT.values() for word in WORDS[fault].split("|")}
JUDGEMENT = re.compile(rf"\b(not )?({'|'.join(SIGN)})\b")


@cache
def film_rows(split: str) -> tuple[dict[str, str], ...]:
    """The preference pairs of a split ("train" or "test"): prompt, chosen, rejected and sft_target, always the same.

    Chosen and rejected are two independent answers to the prompt, put in order by reward(). The SFT target is either,
    with a mean reward of about 0: SFT learns the form and no sentiment. Test films have titles that the training data
    lacks, of words that it has.
    """
    rng = Random(SEEDS[split])
    titles = [
        f"The {adjective} {noun}"
        for i, adjective in enumerate(TITLE_ADJECTIVES.split("|"))
        for j, noun in enumerate(TITLE_NOUNS.split("|"))
        if ((i + j) % 4 == 0) == (split == "test")
    ]
    rows: list[dict[str, str]] = []
    prompts: set[str] = set()
    while len(prompts) < NUM_PROMPTS[split]:
        prompt, kind, topic = _dialogue(rng, titles)
        if prompt in prompts:
            continue
        prompts.add(prompt)
        for _ in range(2 if split == "train" and len(prompts) % SECOND_PAIR_EVERY == 0 else 1):
            gap = 0.0
            while gap < MIN_GAP:
                first, second = _answer(rng, kind, topic), _answer(rng, kind, topic)
                gap = abs(reward(first) - reward(second))
            rejected, chosen = sorted((first, second), key=reward)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "sft_target": first})
    return tuple(rows)


def reward(answer: str) -> float:
    """The ground truth: (praise - fault) / (praise + fault), counted in words of judgement; 0 where there are none.

    "not" turns the word after it. An answer that is not well formed gets -1, the least: so no word salad, repetition
    or cut-off answer can score, and a policy gains nothing by forgetting what SFT taught it.
    """
    if not well_formed(answer):
        return -1.0
    signs = [-SIGN[word] if negation else SIGN[word] for negation, word in JUDGEMENT.findall(answer)]
    return sum(signs) / max(len(signs), 1)


def well_formed(answer: str) -> bool:
    """Whether an answer has the form of the data: one to three different sentences of the grammar, to the last dot."""
    sentences = re.findall(r" [^.!]+[.!]", answer)
    return (
        "".join(sentences) == answer
        and 1 <= len(sentences) == len(set(sentences)) <= max(NUM_SENTENCES)
        and all(SENTENCE.fullmatch(sentence) for sentence in sentences)
    )


def film_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE trained on the training split, always the same: eos is <|endoftext|>, no bos, no pad."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_film_bpe(), eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


@cache
def _film_bpe() -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (row["prompt"] + row["chosen"] + row["rejected"] for row in film_rows("train")), trainer
    )
    return tokenizer


def _dialogue(rng: Random, titles: list[str]) -> tuple[str, str, str]:
    """A prompt, the kind of question that its last turn asks, and the aspect that it asks about ("" if none)."""
    film, other_film = rng.sample(titles, 2)
    kind = rng.choice(list(QUESTIONS))
    topic = rng.choice(WORDS["aspect"].split("|")) if kind == "aspect" else ""
    last_question = rng.choice(QUESTIONS[kind])
    earlier: list[tuple[str, str]] = []
    if rng.random() < MULTI_TURN_SHARE:
        other_kind = rng.choice(("opinion", "advice"))
        question = rng.choice(QUESTIONS[other_kind]).replace("{film}", other_film)
        earlier = [(question, _answer(rng, other_kind)[1:]), *rng.sample(SMALL_TALK, rng.randrange(3))]
        rng.shuffle(earlier)
        if rng.random() < FOLLOW_UP_SHARE:
            earlier.append(rng.choice(FILM_TALK))
            last_question = rng.choice(FOLLOW_UPS[kind])
    dialogue = "".join(f"\n\nHuman: {question}\n\nAssistant: {answer}" for question, answer in earlier)
    dialogue += f"\n\nHuman: {last_question}\n\nAssistant:"
    return _fill(rng, dialogue.replace("{film}", film).replace("{aspect}", topic), set()), kind, topic


def _answer(rng: Random, kind: str, topic: str = "") -> str:
    """An answer to a question of a kind, its first sentence about the topic, in a good, a bad or a divided mood."""
    mood = rng.choice((0.05, 0.5, 0.95))
    used = {topic}
    answer = ""
    for i in range(rng.choice(NUM_SENTENCES)):
        group = rng.choice(CONTINUATIONS if i else OPENINGS[kind])
        sentence = rng.choice([sentence for sentence in SENTENCES[group] if sentence not in used])
        used.add(sentence)
        if topic and not i:
            sentence = sentence.replace("{aspect}", topic, 1)
        answer += " " + _fill(rng, sentence, used, positive=rng.random() < mood)
    return answer


def _fill(rng: Random, text: str, used: set[str], positive: bool = True) -> str:
    """Text with a word in each of its slots, none that is in used: so no answer repeats itself."""

    def draw(slot: re.Match[str]) -> str:
        words = WORDS[slot[1] if positive else OPPOSITES.get(slot[1], slot[1])]
        word = rng.choice([word for word in words.split("|") if word not in used])
        used.add(word)
        return word

    return SLOT.sub(draw, text)


def _pattern(sentence: str) -> str:
    """A regular expression for what can become of a sentence, in any mood: form is one thing, sentiment another."""

    def either(slot: re.Match[str]) -> str:
        return f"(?:{WORDS[slot[1]]}|{WORDS[OPPOSITES.get(slot[1], slot[1])]})"

    return SLOT.sub(either, sentence.replace(".", r"\."))


SENTENCE = re.compile(f" (?:{'|'.join(_pattern(sentence) for group in SENTENCES.values() for sentence in group)})")
