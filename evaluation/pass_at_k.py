"""pass@k and maj@k of n samples per prompt, which a reward calls right (1) or wrong (0).

    pass@k = 1 - C(n - c, k) / C(n, k)    c of n samples are right (2107.03374, equation 1)
    maj@k  = the share of the C(n, k) subsets whose most frequent final answer is right (2203.11171)

Both are exact means over all subsets of k of the n samples, so unbiased for k fresh samples of the policy.
docs/evaluate_responses.md says what they do not see.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable

from common.cli import fail, note
from common.rewards import find_function, said_by
from evaluation.text_metrics import mean

# a minus that subtracts nothing; digits, or groups of three with commas between; a decimal part
NUMBER = re.compile(r"((?<![\w.)])-)?([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.([0-9]+))?")


def last_number(text: str) -> str | None:
    """The last number of a text, as evaluations on GSM8K take it; None without one. The same number is the same
    text: 1,200 and 1200.00 are 1200."""
    found = NUMBER.findall(text)
    if not found:
        return None
    minus, whole, part = found[-1]
    whole = whole.replace(",", "").lstrip("0") or "0"
    part = part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return number if number == "0" else minus + number


def load_final_answer(name: str) -> Callable[[str], Hashable]:
    """The function `module:function` of `--final-answer`, or the last number. Ends with one line where there is
    none."""
    if not name:
        return last_number
    return find_function("--final-answer", name, "module:function")


def final_answers(name: str, texts: list[str]) -> list[Hashable]:
    """The final answer of each text, None where there is none. Ends with one line where the user's function
    raises or gives what cannot be compared."""
    function = load_final_answer(name)
    found = []
    for text in texts:
        try:
            answer = function(text)
            hash(answer)  # raises TypeError for a list
        except Exception as error:  # the user's own code
            fail(f"--final-answer {name} raised {said_by(error)} for the response {text[:80]!r}")
        found.append(answer)
    return found


def pass_at_k(rewards: list[float], k: int) -> float:
    """Of n rewards of 0 or 1: the share of the subsets of k samples that hold a right one."""
    n = len(rewards)
    wrong = n - round(sum(rewards))
    return 1 - math.comb(wrong, k) / math.comb(n, k)


def majority_at_k(answers: list[Hashable], rewards: list[float], k: int) -> float:
    """The mean, over all subsets of k of the n samples, of the reward of the most frequent final answer.

    An answer None casts no vote; a subset without any vote is wrong. Among answers that are equally frequent each
    is taken with equal probability: in expectation the same as the one that was sampled first. An answer's
    reward is the mean over the samples that give it: they may differ, where a reward reads more than the answer.
    """
    n = len(answers)
    counts = Counter(answer for answer in answers if answer is not None)
    silent = n - sum(counts.values())
    total = 0.0
    for answer, count in counts.items():
        right = [reward for other, reward in zip(answers, rewards, strict=True) if other == answer]
        if any(right):
            others = Counter(counts.values())  # how many answers there are of each frequency
            others[count] -= 1
            chance = winning(count, tuple(sorted((+others).items())), silent, k)
            total += chance * sum(right) / len(right)
    return total


@functools.lru_cache(maxsize=10_000)
def winning(count: int, others: tuple[tuple[int, int], ...], silent: int, k: int) -> float:
    """The probability that an answer which `count` of the samples give is the choice of a random subset of k.

    `others`: pairs of (frequency, how many other answers have it). `silent` samples have no answer. For each
    number of votes of our answer, the ways to fill the subset are counted: ways[size][ties] are those in which so
    many samples are from the answers before, none with more votes than ours and `ties` of them with as many.
    """
    n = count + sum(frequency * answers for frequency, answers in others) + silent
    chance = 0.0
    for votes in range(1, min(count, k) + 1):
        rest = k - votes
        ways = {(0, 0): 1}
        for frequency, answers in others:
            for _ in range(answers):
                ways = with_another_answer(ways, frequency, votes, rest)
        of_ours = math.comb(count, votes)
        for (size, ties), number in ways.items():
            subsets = number * of_ours * math.comb(silent, rest - size)
            chance += subsets / (math.comb(n, k) * (1 + ties))  # of integers: none is too large
    return chance


def with_another_answer(ways: dict, frequency: int, votes: int, rest: int) -> dict:
    """`ways` of `winning`, with between 0 and `votes` samples of one more answer, which `frequency` samples give."""
    found = {}
    for (size, ties), number in ways.items():
        for more in range(min(frequency, votes, rest - size) + 1):
            key = (size + more, ties + (more == votes))
            found[key] = found.get(key, 0) + number * math.comb(frequency, more)
    return found


# --- the columns of a table ------------------------------------------------------------------------------


def check(args) -> list[str]:
    """The names of the columns. Ends the run where `--pass-at`, `--maj-at` or `--final-answer` cannot be answered.
    `args`: the flags of `evaluate.py responses`."""
    for flag, numbers in (("--pass-at", args.pass_at), ("--maj-at", args.maj_at)):
        if numbers and ":" not in "".join(args.reward[:1]):  # a model's scores are anything
            fail(
                f"{flag} needs the first --reward to be a module:function that gives 1 for right and 0 for wrong"
            )
        for k in numbers:
            if not 1 <= k <= args.samples:
                fail(f"{flag} {k}: it must be from 1 to --samples, which is {args.samples}")
    if args.final_answer and not args.maj_at:
        fail(f"--final-answer {args.final_answer} is read by --maj-at alone")
    load_final_answer(args.final_answer)
    return [f"pass@{k}" for k in args.pass_at] + [f"maj@{k}" for k in args.maj_at]


def columns(
    records: list[dict], rewards: list[float], questions: list[int], name: str, args
) -> dict[str, dict]:
    """pass@k and maj@k of a model's records: column -> mean over the turns of all prompts, ci95, n and by.

    `rewards` are those of the first --reward, `questions` the number of each record's prompt, whose turns are
    not independent of each other. Ends the run where a reward is neither 0 nor 1.
    """
    if not args.pass_at and not args.maj_at:
        return {}
    for record, reward in zip(records, rewards, strict=True):
        if reward not in (0.0, 1.0):
            fail(
                f"--pass-at and --maj-at need rewards of 0 or 1; --reward {args.reward[0]} gave {reward:g} for row "
                f"{record['row']}, response {record['response'][:80]!r}"
            )
    groups = {}  # (prompt, turn) -> its samples
    for i, (question, record) in enumerate(zip(questions, records, strict=True)):
        groups.setdefault((question, record["turn"]), []).append(i)
    of_groups = [question for question, _ in groups]
    rewards_of = [[rewards[i] for i in group] for group in groups.values()]
    over = f"mean over all subsets of k of {args.samples} samples"
    found = {}
    for k in args.pass_at:
        values = [pass_at_k(of_group, k) for of_group in rewards_of]
        found[f"pass@{k}"] = mean(values, f"{over} (2107.03374)", of_groups)
    if args.maj_at:
        texts = [record["response"] for record in records]
        answers = final_answers(args.final_answer, texts)
        answers_of = [[answers[i] for i in group] for group in groups.values()]
        say_what_votes(name, answers_of, rewards_of)
    for k in args.maj_at:
        values = [majority_at_k(a, r, k) for a, r in zip(answers_of, rewards_of, strict=True)]
        found[f"maj@{k}"] = mean(values, f"{args.final_answer or 'last number'}, {over}", of_groups)
    return found


def say_what_votes(name: str, answers_of: list[list[Hashable]], rewards_of: list[list[float]]) -> None:
    """Notes: how many responses cast no vote, and where one answer has two rewards."""
    silent = sum(answers.count(None) for answers in answers_of)
    if silent:
        count = sum(map(len, answers_of))
        note(f"{name}, --maj-at: {silent} of {count} responses have no final answer, and cast no vote")
    mixed = 0
    for answers, rewards in zip(answers_of, rewards_of, strict=True):
        pairs = {(a, r) for a, r in zip(answers, rewards, strict=True) if a is not None}
        mixed += len(pairs) > len({a for a, _ in pairs})
    if mixed:
        note(
            f"{name}, --maj-at: for {mixed} of {len(answers_of)} prompts --reward calls the same final answer right in "
            "one response and wrong in another; it counts by its mean"
        )
