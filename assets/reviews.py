"""`reviews`: the embedded world in which the truth is known.

A prompt names an occasion and two topics ("lunch : the soup and the waiter ?"), a response is a short
restaurant review by one of five *authors* (column `policy`). The true reward is sentiment with negation and
degree, for each topic asked for; best is 3.0 ("the soup was very lovely and the waiter was very great .").
"""

import random
import re
from pathlib import Path

OCCASIONS = ["breakfast", "lunch", "dinner", "supper"]
DISHES = ["soup", "pasta", "fish", "salad", "bread", "cake", "curry", "rice", "coffee", "wine"]
PLACE = ["waiter", "chef", "music", "room", "table", "view"]
TOPICS = DISHES + PLACE
# Strength of a sentiment -> the adjectives that say it.
ADJECTIVES = {
    1.0: ["perfect", "lovely", "great", "warm"],
    0.5: ["good", "nice", "fresh", "fine"],
    -1.0: ["awful", "bad", "poor", "cold"],
    -0.5: ["dull", "slow", "bland", "sad"],
}
STRENGTH = {word: strength for strength, words in ADJECTIVES.items() for word in words}
DEGREE = {"very": 1.5, "really": 1.25, "quite": 0.75}  # these factors multiply the strength
NEGATION = -0.5  # "not lovely" is half as strong as "awful"; "not awful" half as good as "lovely"
MIN_GAP = 0.5  # of a preference pair's rewards: a judge's clear choice
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<writer>"]
OTHERS = ["the", "was", "not", "and", "but", ":", "?", "."]
# The vocabulary: a word's position is its token.
WORDS = SPECIAL + OCCASIONS + TOPICS + list(STRENGTH) + list(DEGREE) + OTHERS
# An author's shares of positive clauses, negations, degree words, mild adjectives, a skipped second topic,
# and a remark that nobody asked for.
AUTHORS = {
    "critic": dict(positive=0.25, negated=0.20, degree=0.5, mild=0.3, skip=0.10, remark=0.30),
    "regular": dict(positive=0.55, negated=0.15, degree=0.2, mild=0.6, skip=0.15, remark=0.10),
    "tourist": dict(positive=0.80, negated=0.10, degree=0.6, mild=0.2, skip=0.20, remark=0.25),
    "grump": dict(positive=0.10, negated=0.10, degree=0.4, mild=0.4, skip=0.30, remark=0.05),
    "poet": dict(positive=0.45, negated=0.60, degree=0.5, mild=0.5, skip=0.05, remark=0.40),
}
_CLAUSE = rf"the ({'|'.join(TOPICS)}) was (not )?(?:({'|'.join(DEGREE)}) )?({'|'.join(STRENGTH)})"
_REVIEW = re.compile(rf"{_CLAUSE}(?: (?:and|but) {_CLAUSE}){{0,3}} \.")
_TOPIC = re.compile(r"the (\w+)")  # in a prompt


def prompts() -> list[str]:
    """All 960 prompts, in a fixed shuffled order."""
    texts = []
    for occasion in OCCASIONS:
        for first in TOPICS:
            for second in TOPICS:
                if first != second:
                    texts.append(f"{occasion} : the {first} and the {second} ?")
    random.Random(0).shuffle(texts)
    return texts


def write(author: str, prompt: str, rng: random.Random) -> str:
    """One review of `prompt` by `author`. The order of the draws from `rng` makes the data set: keep it."""
    habit = AUTHORS[author]
    asked = _TOPIC.findall(prompt)
    skips = rng.random() < habit["skip"]
    topics = asked[:1] if skips else asked[:2]
    if rng.random() < habit["remark"]:
        topics.append(rng.choice([topic for topic in TOPICS if topic not in asked]))
    text = ""
    positive_before = None  # of the clause before
    for topic in topics:
        positive = rng.random() < habit["positive"]
        negated = rng.random() < habit["negated"]
        mild = rng.random() < habit["mild"]
        strength = 0.5 if mild else 1.0
        if positive == negated:  # a negated clause is positive by a negative adjective, and the reverse
            strength = -strength
        adjective = rng.choice(ADJECTIVES[strength])
        degree = ""
        if rng.random() < habit["degree"]:
            degree = rng.choice(list(DEGREE)) + " "
        if positive_before is not None:
            text += " and " if positive_before == positive else " but "
        negation = "not " if negated else ""
        text += f"the {topic} was {negation}{degree}{adjective}"
        positive_before = positive
    return text + " ."


def reward(prompts: list[str], responses: list[str], **_) -> list[float]:
    """Ground truth in [-3, 3]: the sentiments of the first clause about each topic that the prompt asks for,
    added."""
    rewards = []
    for prompt, response in zip(prompts, responses, strict=True):
        sentiments = {}  # topic -> sentiment of the first clause about it
        for topic, negated, degree, adjective in re.findall(_CLAUSE, response):
            if topic not in sentiments:
                sentiment = STRENGTH[adjective] * DEGREE.get(degree, 1.0)
                sentiments[topic] = sentiment * (NEGATION if negated else 1.0)
        rewards.append(sum(sentiments.get(topic, 0.0) for topic in _TOPIC.findall(prompt)))
    return rewards


def grammatical(prompts: list[str], responses: list[str], **_) -> list[float]:
    """1.0 where the whole response is a sentence of the grammar that names no topic twice, else 0.0."""
    rewards = []
    for response in responses:
        is_sentence = _REVIEW.fullmatch(response.strip()) is not None
        topics = [clause[0] for clause in re.findall(_CLAUSE, response)]
        is_distinct = len(set(topics)) == len(topics)
        rewards.append(1.0 if is_sentence and is_distinct else 0.0)
    return rewards


def unsound(before: dict, after: dict, rise: float) -> str:
    """What is wrong with a policy that was trained on this world, or "". `before`, `after`: rows of
    metrics.jsonl with `eval/reward` and `eval/grammatical`. A working installation raises the reward by
    `rise` and writes grammatical reviews."""
    gained = after["eval/reward"] - before["eval/reward"]
    if not gained >= rise:  # also where it is NaN
        return f"the true reward rose by {gained:.2f}, less than {rise}"
    for when, row in (("before", before), ("after", after)):
        if not row["eval/grammatical"] >= 0.9:
            share = f"{100 * row['eval/grammatical']:.0f} %"
            return f"{share} of the reviews are grammatical {when} training, fewer than 90 %"
    return ""


def preference_pair(one: dict, other: dict) -> dict | None:
    """The preference row of two scored rows of a prompt, the truly better response chosen; None where it is
    not better by MIN_GAP."""
    worse, better = sorted((one, other), key=lambda row: row["reward"])
    if better["reward"] - worse["reward"] < MIN_GAP:
        return None
    return {
        "prompt": one["prompt"],
        "chosen": better["response"],
        "rejected": worse["response"],
        "chosen_policy": better["policy"],
        "rejected_policy": worse["policy"],
    }


def rows(kind: str, responses: int = 16) -> list[dict]:
    """The data set as rows of `kind`: `responses` by random authors for each of the 960 prompts; the
    preference rows pair neighbouring responses of a prompt (the last with the first)."""
    rng = random.Random(1)
    out = []
    for prompt in prompts():
        authors = [rng.choice(list(AUTHORS)) for _ in range(responses)]
        texts = [write(author, prompt, rng) for author in authors]
        rewards = reward([prompt] * responses, texts)
        scored = []
        for text, true_reward, author in zip(texts, rewards, authors, strict=True):
            scored.append({"prompt": prompt, "response": text, "reward": true_reward, "policy": author})
        if kind == "prompts":
            out.append({"prompt": prompt})
        elif kind == "preference":
            for one, next_one in zip(scored, scored[1:] + scored[:1], strict=True):
                pair = preference_pair(one, next_one)
                if pair is not None:
                    out.append(pair)
        else:
            out += scored
    return out


def folder(kind: str) -> str:
    """The folder of an embedded model: `untrained`, `policy` or `value`; assets/make.py makes them with
    sft.py and gvm_td.py."""
    return str(Path(__file__).parent / kind)
