"""`reviews`: the embedded world in which the truth is known. A prompt names an occasion and two topics ("lunch : the soup and
the waiter ?"), a response is a short restaurant review by one of five *authors* (column `policy`). The true reward is sentiment
with negation and degree, for each topic asked for; best is 3.0 ("the soup was very lovely and the waiter was very great .")."""

import random
import re
from pathlib import Path

OCCASIONS = ["breakfast", "lunch", "dinner", "supper"]
TOPICS = "soup pasta fish salad bread cake curry rice coffee wine waiter chef music room table view".split()
ADJECTIVES = {1.0: "perfect lovely great warm", 0.5: "good nice fresh fine"}
ADJECTIVES |= {-1.0: "awful bad poor cold", -0.5: "dull slow bland sad"}
STRENGTH = {word: value for value, words in ADJECTIVES.items() for word in words.split()}
DEGREE = {"very": 1.5, "really": 1.25, "quite": 0.75}
NEGATION = -0.5  # "not lovely" is half as strong as "awful"; "not awful" half as good as "lovely"
MIN_GAP = 0.5  # of a preference pair: a judge's clear choice
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<writer>"]
WORDS = (
    SPECIAL
    + OCCASIONS
    + TOPICS
    + list(STRENGTH)
    + list(DEGREE)
    + ["the", "was", "not", "and", "but", ":", "?", "."]
)
# shares of positive clauses, negations, degree words, mild adjectives, a skipped second topic, a remark nobody asked for
AUTHORS = {
    "critic": dict(positive=0.25, negated=0.20, degree=0.5, mild=0.3, skip=0.10, remark=0.30),
    "regular": dict(positive=0.55, negated=0.15, degree=0.2, mild=0.6, skip=0.15, remark=0.10),
    "tourist": dict(positive=0.80, negated=0.10, degree=0.6, mild=0.2, skip=0.20, remark=0.25),
    "grump": dict(positive=0.10, negated=0.10, degree=0.4, mild=0.4, skip=0.30, remark=0.05),
    "poet": dict(positive=0.45, negated=0.60, degree=0.5, mild=0.5, skip=0.05, remark=0.40),
}
_CLAUSE = rf"the ({'|'.join(TOPICS)}) was (not )?(?:({'|'.join(DEGREE)}) )?({'|'.join(STRENGTH)})"
_REVIEW = re.compile(rf"{_CLAUSE}(?: (?:and|but) {_CLAUSE}){{0,3}} \.")


def prompts() -> list[str]:
    """All 960 prompts, in a fixed shuffled order."""
    texts = [f"{o} : the {a} and the {b} ?" for o in OCCASIONS for a in TOPICS for b in TOPICS if a != b]
    random.Random(0).shuffle(texts)
    return texts


def write(author: str, prompt: str, rng: random.Random) -> str:
    """One review of `prompt` by `author`."""
    habit = AUTHORS[author]
    asked = re.findall(r"the (\w+)", prompt)
    topics = asked[: 1 if rng.random() < habit["skip"] else 2]
    if rng.random() < habit["remark"]:
        topics.append(rng.choice([topic for topic in TOPICS if topic not in asked]))
    text, last = "", None
    for topic in topics:
        positive, negated = rng.random() < habit["positive"], rng.random() < habit["negated"]
        strength = (0.5 if rng.random() < habit["mild"] else 1.0) * (1 if positive != negated else -1)
        adjective = rng.choice(ADJECTIVES[strength].split())
        degree = rng.choice(list(DEGREE)) + " " if rng.random() < habit["degree"] else ""
        if last is not None:
            text += " and " if last == positive else " but "
        text += f"the {topic} was {'not ' if negated else ''}{degree}{adjective}"
        last = positive
    return text + " ."


def reward(prompts: list[str], responses: list[str], **_) -> list[float]:
    """Ground truth: for each topic the prompt asks for, the sentiment of the first clause about it. In [-3, 3]."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        first = {}
        for topic, negated, degree, adjective in re.findall(_CLAUSE, response):
            first.setdefault(
                topic, STRENGTH[adjective] * DEGREE.get(degree, 1.0) * (NEGATION if negated else 1.0)
            )
        scores.append(sum(first.get(topic, 0.0) for topic in re.findall(r"the (\w+)", prompt)))
    return scores


def grammatical(prompts: list[str], responses: list[str], **_) -> list[float]:
    """1.0 where the whole response is a sentence of the grammar that names no topic twice, else 0.0."""
    topics = [[clause[0] for clause in re.findall(_CLAUSE, text)] for text in responses]
    whole = [bool(_REVIEW.fullmatch(text.strip())) for text in responses]
    return [float(w and len(t) == len(set(t))) for w, t in zip(whole, topics, strict=True)]


def unsound(before: dict, after: dict, rise: float) -> str:
    """What is wrong with a policy that was trained on this world, or "". `before`, `after`: rows of metrics.jsonl with
    `eval/reward` and `eval/grammatical`. A working installation raises the reward by `rise` and writes grammatical reviews."""
    gained = after["eval/reward"] - before["eval/reward"]
    if not gained >= rise:
        return f"the true reward rose by {gained:.2f}, less than {rise}"
    for when, row in (("before", before), ("after", after)):
        if not row["eval/grammatical"] >= 0.9:
            return f"{100 * row['eval/grammatical']:.0f} % of the reviews are grammatical {when} training, fewer than 90 %"
    return ""


def rows(kind: str, responses: int = 16) -> list[dict]:
    """The data set as rows of `kind`: `responses` by random authors for each of the 960 prompts; the preference rows pair
    neighbouring responses of a prompt, the truly better one as `chosen`, if better by MIN_GAP."""
    rng, out = random.Random(1), []
    for prompt in prompts():
        authors = [rng.choice(list(AUTHORS)) for _ in range(responses)]
        texts = [write(author, prompt, rng) for author in authors]
        columns = zip(texts, reward([prompt] * responses, texts), authors, strict=True)
        scored = [
            {"prompt": prompt, "response": text, "reward": score, "policy": author}
            for text, score, author in columns
        ]
        if kind == "prompts":
            out.append({"prompt": prompt})
        elif kind == "preference":
            for pair in zip(scored, scored[1:] + scored[:1], strict=True):
                low, high = sorted(pair, key=lambda row: row["reward"])
                if high["reward"] - low["reward"] >= MIN_GAP:
                    who = {"chosen_policy": high["policy"], "rejected_policy": low["policy"]}
                    out.append(
                        {"prompt": prompt, "chosen": high["response"], "rejected": low["response"], **who}
                    )
        else:
            out += scored
    return out


def folder(kind: str) -> str:
    """The folder of an embedded model: `untrained`, `policy` or `value`; assets/make.py makes them with sft.py and gvm_td.py."""
    return str(Path(__file__).parent / kind)
