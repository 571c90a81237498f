"""Rewards that read the text of an answer and nothing else: `--reward paper.text_rewards:vader`, and others
to judge what a policy that learned from it has become.

A lexicon is a reward that nobody trained, the same for every policy and every seed, and easy to exploit. So
one of them is trained on (`vader`) and the rest only judge: another lexicon (`afinn`), the share of real
words (`real_words`), and whether the answer is about the question (`on_topic`).
Each needs its package: pip install vaderSentiment afinn wordfreq
"""

import functools
import re

from common.cli import fail
from common.tokenization import prompt_text

# occurrences in a billion words of English, as a power of ten (wordfreq's Zipf scale)
RARE = 2.0  # a word below it is hardly one: once in ten million words
COMMON = 5.0  # a word above it says nothing about a topic: the, what, about, people
MISSING = "paper/text_rewards.py needs the package: pip install {}"
STEM = 5  # letters that two forms of a word share: movie and movies, cook and cooking


def vader(prompts: list[str], responses: list[str], **_) -> list[float]:
    """How positive a text is, in (-1, 1): the compound score of VADER (Hutto and Gilbert 2014)."""
    analyser = vader_analyser()
    return [analyser.polarity_scores(response)["compound"] for response in responses]


def afinn(prompts: list[str], responses: list[str], **_) -> list[float]:
    """How positive a text is by AFINN (1103.2903): the mean valence, -5 to 5, of all its words; most are 0."""
    lexicon = afinn_lexicon()
    return [lexicon.score(response) / max(1, len(words_of(response))) for response in responses]


def real_words(prompts: list[str], responses: list[str], **_) -> list[float]:
    """Share of the words of an answer that English has, in [0, 1]; 0 for an answer without a word."""
    shares = []
    for response in responses:
        words = words_of(response)
        known = [word for word in words if zipf(word) >= RARE]
        shares.append(len(known) / max(1, len(words)))
    return shares


def on_topic(prompts: list[str], responses: list[str], **_) -> list[float]:
    """1 where the answer has a word of the prompt that is not a common one, else 0; 1 where the prompt has none.

    Words count as the same by their first letters. It sees an answer that would fit any question; a good one
    in other words it takes for one, too. So compare it with the policy before training.
    """
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        topic = {word[:STEM] for word in words_of(prompt_text(prompt)) if zipf(word) < COMMON}
        said = {word[:STEM] for word in words_of(response)}
        found.append(float(not topic or bool(topic & said)))
    return found


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without digits and signs."""
    return re.findall(r"[^\W\d_]+", text.lower())


@functools.cache
def zipf(word: str) -> float:
    """How frequent a word is in English, on wordfreq's Zipf scale; 0 for one that it does not know."""
    try:
        import wordfreq
    except ImportError:
        fail(MISSING.format("wordfreq"))
    return wordfreq.zipf_frequency(word, "en")


@functools.cache
def vader_analyser():
    """VADER with its own lexicon."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        fail(MISSING.format("vaderSentiment"))
    return SentimentIntensityAnalyzer()


@functools.cache
def afinn_lexicon():
    """AFINN-165, English."""
    try:
        from afinn import Afinn
    except ImportError:
        fail(MISSING.format("afinn"))
    return Afinn()
