"""The judge's numbers: win rates, mean scores, their intervals, and how far two judges agree."""

import collections
import math
import statistics

from evaluation import text_metrics
from evaluation.verdicts import WINNER

Z95 = statistics.NormalDist().inv_cdf(0.975)  # 1.96
POINTS = {"A": 1.0, "neutral": 0.5, "B": 0.0}  # of the answer that stands as A


def wilson(mean: float, n: int) -> list[float]:
    """95 % score interval of the mean of n outcomes in [0, 1] (Wilson 1927). Ties only lower the variance
    below the mean (1 - mean) of zeros and ones: with them it is wider than need be, never narrower. It is
    not empty at 0 or 1. NaN where n is 0."""
    n = n or math.nan
    centre = mean + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(mean * (1 - mean) / n + (Z95 / (2 * n)) ** 2)
    scale = 1 + Z95**2 / n
    return [(centre - half) / scale, (centre + half) / scale]


def average(values: list[float]) -> dict:
    """Mean and its normal 95 % interval, NaN where undefined. For scores, which spread less than their scale
    allows; wilson is for outcomes in [0, 1]."""
    n = len(values)
    mean = statistics.fmean(values) if values else math.nan
    half = Z95 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return {"n": n, "mean": mean, "ci95": [mean - half, mean + half]}


def ratio(a: int, b: int) -> float:
    """a / b; NaN where b is 0."""
    return a / b if b else math.nan


def pair_points(row: dict) -> float | None:
    """1, 0.5 or 0 points in either order, averaged: the first response's, which is A in the first verdict
    and B in the second. None where a verdict is missing: half a pair would carry the position bias."""
    if row["responses"][0] == row["responses"][1]:
        return 0.5  # never asked
    first, second = row["judged"]
    if first is None or second is None:
        return None
    return (POINTS[WINNER[first]] + 1 - POINTS[WINNER[second]]) / 2


def pairwise_summary(rows: list[dict]) -> dict:
    """Numbers from rows with `responses`, `judged` (two verdicts, the second with the responses swapped) and
    `points` (of pair_points). Rates are in [0, 1], NaN where undefined."""
    known = [row for row in rows if row["points"] is not None]
    rate = average([row["points"] for row in known])["mean"]
    wins = sum(row["points"] > 0.5 for row in known)
    losses = sum(row["points"] < 0.5 for row in known)

    # not of equal responses
    verdicts = [[WINNER[word] for word in row["judged"]] for row in known if None not in row["judged"]]
    contradictory = sum(both in (["A", "A"], ["B", "B"]) for both in verdicts)
    said = collections.Counter(verdict for both in verdicts for verdict in both)

    longer_won = 0
    longer_won_or_lost = 0
    for row in known:
        first, second = row["responses"]
        agreement = (len(first) - len(second)) * (row["points"] - 0.5)  # above 0 where the longer one won
        if agreement > 0:
            longer_won += 1
        if agreement != 0:
            longer_won_or_lost += 1
    return {
        "pairs": len(rows),
        "judged": len(known),
        "identical": len(known) - len(verdicts),
        "win_rate": rate,
        "ci95": wilson(rate, len(known)),
        "wins": wins,
        "ties": len(known) - wins - losses,
        "losses": losses,
        "win_rate_without_ties": ratio(wins, wins + losses),
        "contradictory": ratio(contradictory, len(verdicts)),
        "says_a": ratio(said["A"], said["A"] + said["B"]),
        "longer_wins": ratio(longer_won, longer_won_or_lost),
    }


def clustered_average(values: list[float], clusters: list) -> dict:
    """As `average`, with the interval of means over clusters: two turns of one question are not independent."""
    if not values:
        return average([])
    found = text_metrics.mean(values, questions=clusters)
    half = math.nan if found["ci95"] is None else found["ci95"]
    mean = found["mean"]
    return {"n": len(values), "mean": mean, "ci95": [mean - half, mean + half]}


def outcome(points: float | None) -> str | None:
    """What a pair's points say of the first response: win, tie or loss; None where they are missing."""
    if points is None:
        return None
    if points == 0.5:
        return "tie"
    return "win" if points > 0.5 else "loss"


def agreement(one: list, other: list) -> dict:
    """How far two judges agree, over what both judged: `share` of equal outcomes, and Cohen's `kappa`
    (Cohen 1960), (share - chance) / (1 - chance), with the chance that judges agree who say the same words as
    often, but at random. kappa is 1 for equal, 0 for chance, NaN where chance is 1. None: not judged."""
    both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    n = len(both)
    share = ratio(sum(a == b for a, b in both), n)
    of_one = collections.Counter(a for a, _ in both)
    of_other = collections.Counter(b for _, b in both)
    chance = ratio(sum(of_one[word] * of_other[word] for word in of_one), n * n)
    kappa = math.nan if chance == 1 else (share - chance) / (1 - chance)
    return {"n": n, "share": share, "kappa": kappa}
