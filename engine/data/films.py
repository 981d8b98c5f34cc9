"""The embedded data set: dialogues about films, their reward, and a tokenizer."""

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NUM_PROMPTS = {"train": 3500, "test": 512}
SEEDS = {"train": 2305, "test": 18290}
MULTI_TURN_SHARE = 0.25  # about 0.3 of train in the end: duplicates are redrawn, and most of these have one turn
FOLLOW_UP_SHARE = 0.6  # of the multi-turn prompts: the last question is about the film of the turn before
SECOND_PAIR_EVERY = 20  # training prompts
MIN_GAP = 0.5  # between the rewards of chosen and rejected
NUM_SENTENCES = (1, 2, 2, 3)  # per response; repeats are weights
VOCAB_SIZE = 832  # the minimum for one token per word
TOKENIZER = Path(__file__).with_name("film_tokenizer.json")  # to train it takes a quarter of a second

# Words for the {slots} of the sentences below.
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
WORD_LISTS = {slot: words.split("|") for slot, words in WORDS.items()}
PRAISE_AND_FAULT = {"praise": "fault", "liked": "disliked", "watch": "skip", "deserves": "wastes"}
OPPOSITES = PRAISE_AND_FAULT | {fault: praise for praise, fault in PRAISE_AND_FAULT.items()}

# Positive sentences. Negative responses fill each slot from its opposite.
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
# Kinds of sentences: the first by kind of question, and the later ones. Repeats are weights.
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
# Earlier turns, as question and response: about a film with a follow-up question, and about none.
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
# A title is "The", an adjective, a noun.
TITLE_ADJECTIVES = "Silver|Hidden|Last|Golden|Distant|Broken|Winter|Crimson|Northern|Paper|Glass|Seventh|Blue|Long"
TITLE_NOUNS = "Harbor|Orchard|Lantern|Bridge|River|Garden|Letter|Island|Summer|Train|Mirror|Station|Forest|Song"

SLOT = re.compile(r"\{(\w+)\}")
SIGN = {word: 1 for praise in PRAISE_AND_FAULT for word in WORD_LISTS[praise]}
SIGN |= {word: -1 for fault in PRAISE_AND_FAULT.values() for word in WORD_LISTS[fault]}
JUDGEMENT = re.compile(rf"\b(not )?({'|'.join(SIGN)})\b")


@cache
def film_rows(split: str) -> tuple[dict[str, str], ...]:
    """The preference pairs of a split, the same on every call.

    Chosen and rejected are two independent responses, ordered by film_reward(). The SFT target is one of them at
    random, with a mean reward of about 0: SFT learns the form and no sentiment. Titles of test films are new
    combinations of the training titles' words.

    Args:
        split: "train" or "test".

    Returns:
        Rows with prompt, chosen, rejected and sft_target.
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
        prompt, kind, topic = _draw_prompt(rng, titles)
        if prompt in prompts:
            continue
        prompts.add(prompt)
        for _ in range(2 if split == "train" and len(prompts) % SECOND_PAIR_EVERY == 0 else 1):
            gap = 0.0
            while abs(gap) < MIN_GAP:
                first, second = _draw_response(rng, kind, topic), _draw_response(rng, kind, topic)
                gap = _sentiment(first) - _sentiment(second)  # both are well-formed
            chosen, rejected = (first, second) if gap > 0 else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "sft_target": first})
    return tuple(rows)


def film_reward(response: str) -> float:
    """The ground-truth reward: (praise - fault) / (praise + fault), in words of judgement.

    "not" inverts the next word. Without words of judgement the reward is 0. Responses of another form get -1, the
    minimum: so word salad, repetition and cut-off text never score, and a policy must keep the form learned by SFT.
    """
    return _sentiment(response) if is_well_formed(response) else -1.0


def _sentiment(response: str) -> float:
    """The reward of a well-formed response."""
    signs = [-SIGN[word] if negation else SIGN[word] for negation, word in JUDGEMENT.findall(response)]
    return sum(signs) / max(len(signs), 1)


def is_well_formed(response: str) -> bool:
    """Whether a response has the form of the data.

    It is one to three different complete sentences of the grammar.
    """
    sentences = re.findall(r" [^.!]+[.!]", response)
    return (
        "".join(sentences) == response
        and 1 <= len(sentences) == len(set(sentences)) <= max(NUM_SENTENCES)
        and all(SENTENCE.fullmatch(sentence) for sentence in sentences)
    )


def film_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer of train_film_tokenizer(), read from a file.

    EOS is <|endoftext|>; there is no BOS and no padding token.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(TOKENIZER)),
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def train_film_tokenizer() -> "Tokenizer":
    """A byte-level BPE, trained on the training split: what its save(TOKENIZER) has written."""
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


def _draw_prompt(rng: Random, titles: list[str]) -> tuple[str, str, str]:
    """A prompt, the kind of its last question, and its aspect ("" if none)."""
    film, other_film = rng.sample(titles, 2)
    kind = rng.choice(list(QUESTIONS))
    topic = rng.choice(WORD_LISTS["aspect"]) if kind == "aspect" else ""
    last_question = rng.choice(QUESTIONS[kind])
    earlier: list[tuple[str, str]] = []
    if rng.random() < MULTI_TURN_SHARE:
        other_kind = rng.choice(("opinion", "advice"))
        question = rng.choice(QUESTIONS[other_kind]).replace("{film}", other_film)
        earlier = [(question, _draw_response(rng, other_kind)[1:]), *rng.sample(SMALL_TALK, rng.randrange(3))]
        rng.shuffle(earlier)
        if rng.random() < FOLLOW_UP_SHARE:
            earlier.append(rng.choice(FILM_TALK))
            last_question = rng.choice(FOLLOW_UPS[kind])
    dialogue = "".join(f"\n\nHuman: {question}\n\nAssistant: {response}" for question, response in earlier)
    dialogue += f"\n\nHuman: {last_question}\n\nAssistant:"
    return _fill(rng, dialogue.replace("{film}", film).replace("{aspect}", topic), set()), kind, topic


def _draw_response(rng: Random, kind: str, topic: str = "") -> str:
    """A response to a question, in a good, bad or mixed mood.

    Its first sentence is about the topic.
    """
    mood = rng.choice((0.05, 0.5, 0.95))
    used = {topic}
    response = ""
    for i in range(rng.choice(NUM_SENTENCES)):
        group = rng.choice(CONTINUATIONS if i else OPENINGS[kind])
        sentence = rng.choice([sentence for sentence in SENTENCES[group] if sentence not in used])
        used.add(sentence)
        if topic and not i:
            sentence = sentence.replace("{aspect}", topic, 1)
        response += " " + _fill(rng, sentence, used, positive=rng.random() < mood)
    return response


def _fill(rng: Random, text: str, used: set[str], positive: bool = True) -> str:
    """Fill each slot of a text with a word. Used words are skipped, so no response repeats itself."""

    def draw(slot: re.Match[str]) -> str:
        words = WORD_LISTS[slot[1] if positive else OPPOSITES.get(slot[1], slot[1])]
        word = rng.choice([word for word in words if word not in used])
        used.add(word)
        return word

    return SLOT.sub(draw, text)


def _pattern(sentence: str) -> str:
    """A regular expression for a sentence in any mood."""

    def either(slot: re.Match[str]) -> str:
        return f"(?:{WORDS[slot[1]]}|{WORDS[OPPOSITES.get(slot[1], slot[1])]})"

    return SLOT.sub(either, sentence.replace(".", r"\."))


SENTENCE = re.compile(f" (?:{'|'.join(_pattern(sentence) for group in SENTENCES.values() for sentence in group)})")
