"""Numbers of an evaluation: pair accuracies of values and of log-ratios, diversity."""

import math
import random

import numpy as np
import torch

from common.data import prompt_key
from common.templates import text_of

STATISTICS = ("mean", "p1", "p5", "p10", "p90", "p95", "p99", "last")
PERCENTILES = (1, 5, 10, 90, 95, 99)
MAX_PAIRS = 2000  # of a run of gvm_td.py, and where evaluate.py judges the pairs of such a run


def response_statistics(values: list[float]) -> dict[str, float]:
    """STATISTICS of one response's token values: mean, percentiles (linear interpolation), last.

    They are those of 2502.16944, appendix E.
    """
    percentiles = np.percentile(values, PERCENTILES).tolist()
    numbers = [float(np.mean(values)), *percentiles, float(values[-1])]
    return dict(zip(STATISTICS, numbers, strict=True))


def pair_accuracy(chosen: list[list[float]], rejected: list[list[float]]) -> dict[str, float]:
    """Share of pairs whose chosen response has the strictly higher statistic of token values (ties: no
    win)."""
    pairs = [(response_statistics(c), response_statistics(r)) for c, r in zip(chosen, rejected, strict=True)]
    return {name: sum(c[name] > r[name] for c, r in pairs) / len(pairs) for name in STATISTICS}


def make_pairs(rows: list[dict], gap: float) -> list[tuple[dict, dict]]:
    """All (better, worse) pairs of responses to one prompt, at least `gap` of reward apart and never equal."""
    groups = {}
    for row in rows:
        groups.setdefault(prompt_key(row["prompt"]), []).append(row)
    pairs = []
    for group in groups.values():
        for a in group:
            for b in group:
                if a["reward"] - b["reward"] >= max(gap, 1e-9):
                    pairs.append((a, b))
    return pairs


def whole_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(chosen, rejected) of rows that stand in this order and have one `pair` number. A row whose partner was
    dropped, as one that cannot be written is, is none."""
    return [(a, b) for a, b in zip(rows, rows[1:], strict=False) if a["pair"] == b["pair"]]


def sample_pairs(pairs: list[tuple[dict, dict]], most: int) -> list[tuple[dict, dict]]:
    """At most so many of the pairs, in random order. The seed is fixed: all runs are judged on the same."""
    return random.Random(0).sample(pairs, min(len(pairs), most))


def longer_wins(pairs: list[tuple[dict, dict]]) -> float:
    """Baseline that reads no text: share of pairs whose chosen response has more characters."""
    longer = []
    for chosen, rejected in pairs:
        longer.append(len(text_of(chosen["response"])) > len(text_of(rejected["response"])))
    return float(np.mean(longer))


def better_policy_wins(pairs: list[tuple[dict, dict]], averages: dict[str | None, float]) -> float:
    """Baseline that reads no text: share of pairs whose chosen response is by the policy with the higher
    average reward in training. A policy that training did not see has 0."""
    wins = []
    for chosen, rejected in pairs:
        chosen_average = averages.get(chosen.get("policy"), 0.0)
        rejected_average = averages.get(rejected.get("policy"), 0.0)
        wins.append(chosen_average > rejected_average)
    return float(np.mean(wins))


def implied_accuracy(log_ratios: torch.Tensor, rewards: torch.Tensor, groups: torch.Tensor) -> float:
    """Share of the pairs of responses to one prompt whose better one has the strictly higher log-ratio.

    All [N]; `groups` numbers the prompts from 0. NaN where there is no pair.
    """
    order = torch.argsort(groups).cpu()
    sizes = torch.bincount(groups.cpu()).tolist()
    rewards_by_group = rewards.cpu()[order].split(sizes)
    ratios_by_group = log_ratios.cpu()[order].split(sizes)
    wins = 0
    pairs = 0
    for r, y in zip(rewards_by_group, ratios_by_group, strict=True):  # one prompt at a time: never all N x N
        better = r[:, None] > r[None]
        higher = y[:, None] > y[None]
        wins += (higher & better).sum().item()
        pairs += better.sum().item()
    return wins / pairs if pairs else math.nan


def auc(log_ratios: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of all pairs of a desirable and an undesirable response whose first has the strictly higher
    log-ratio.

    Both [N], `labels` True where desirable. NaN where there is no pair.
    """
    good = log_ratios[labels]
    bad = log_ratios[~labels].sort().values
    pairs = len(good) * len(bad)
    below = torch.searchsorted(bad, good)  # how many of the bad are strictly lower
    return below.double().sum().item() / pairs if pairs else math.nan


def distinct_2(texts: list[str]) -> float:
    """Different pairs of neighbouring words over all pairs of a text (distinct-2, 1510.03055), the mean over
    the texts; 0 for a text of one word, 0.0 without texts.

    1510.03055 takes one ratio of all texts together, which falls with their number; the figures of 2506.13702
    (0.7 to 0.9 over 10,000 answers) are of single texts. So this measures repetition within an answer.
    """
    shares = []
    for text in texts:
        words = text.split()
        pairs = list(zip(words, words[1:], strict=False))
        shares.append(len(set(pairs)) / max(1, len(pairs)))
    return sum(shares) / max(1, len(shares))
