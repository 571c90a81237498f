"""pass@k and maj@k of evaluate.py responses: closed forms against every subset, final answers, real solutions."""

import gzip
import itertools
import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.pass_at_k import columns, last_number, load_final_answer, majority_at_k, pass_at_k

# model-written solutions of GSM8K, each with the reward by its final answer (docs/results/real_models.md)
GSM8K = Path(os.environ.get("GSM8K_SCORED", "gsm8k_scored.jsonl.gz"))


def every_subset(n: int, k: int):
    return list(itertools.combinations(range(n), k))


def vote(answers, rewards, subset) -> float:
    """The reward of the most frequent answer of a subset; of a tie the mean."""
    counts = Counter(answers[i] for i in subset if answers[i] is not None)
    most = max(counts.values(), default=0)
    tied = [answer for answer in counts if counts[answer] == most]
    values = []
    for answer in tied:
        right = [reward for other, reward in zip(answers, rewards, strict=True) if other == answer]
        values.append(sum(right) / len(right))
    return sum(values) / len(values) if values else 0.0


def test_both_are_the_mean_over_every_subset():
    """All k of 200 random cases of up to 8 samples; some answers are missing, some have two rewards."""
    draw = random.Random(0)
    middle = 0
    for _ in range(200):
        n = draw.randint(1, 8)
        answers = [draw.choice([None, "1", "2", "3", "4"]) for _ in range(n)]
        rewards = [float(draw.random() < 0.5) for _ in range(n)]
        for k in range(1, n + 1):
            subsets = every_subset(n, k)
            any_right = sum(any(rewards[i] for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(rewards, k) == pytest.approx(any_right, abs=1e-12)
            majority = sum(vote(answers, rewards, subset) for subset in subsets) / len(subsets)
            assert majority_at_k(answers, rewards, k) == pytest.approx(majority, abs=1e-12)
            middle += 0 < majority < 1
    assert middle > 300


def test_figures_by_hand():
    """Two of four right: pairs without a right one are 1 of 6. Two votes of three; a tie of two; no vote at all."""
    assert pass_at_k([1.0, 0.0, 1.0, 0.0], 2) == pytest.approx(5 / 6)
    assert pass_at_k([0.0] * 4, 4) == 0.0 and pass_at_k([1.0, 0.0, 0.0, 0.0], 4) == 1.0
    assert majority_at_k(["7", "7", "9"], [1.0, 1.0, 0.0], 3) == 1.0
    assert majority_at_k(["7", "7", "9"], [0.0, 0.0, 1.0], 3) == 0.0
    assert majority_at_k(["7", "9"], [1.0, 0.0], 2) == 0.5
    assert majority_at_k(["7", None, None], [1.0, 0.0, 0.0], 3) == 1.0  # two others are silent
    assert majority_at_k([None, None], [1.0, 0.0], 2) == 0.0


def test_the_estimate_is_unbiased():
    """Over all draws of 3 samples from a policy, the mean of pass@2 and maj@2 is that of 2 fresh samples."""
    policy = {"7": (0.5, 1.0), "9": (0.3, 0.0), None: (0.2, 0.0)}  # answer: probability, reward

    def expected(count, value):
        total = 0.0
        for answers in itertools.product(policy, repeat=count):
            rewards = [policy[answer][1] for answer in answers]
            total += math.prod(policy[answer][0] for answer in answers) * value(list(answers), rewards)
        return total

    for estimate in (lambda a, r: pass_at_k(r, 2), lambda a, r: majority_at_k(a, r, 2)):
        assert expected(3, estimate) == pytest.approx(expected(2, estimate), abs=1e-12)
    assert expected(2, lambda a, r: pass_at_k(r, 2)) == pytest.approx(1 - 0.5**2)


def test_many_samples_overflow_nothing():
    """C(4000, 2000) is far beyond a float."""
    assert pass_at_k([1.0] + [0.0] * 3999, 2000) == pytest.approx(0.5)
    half = ["7"] * 600 + ["9"] * 600
    assert majority_at_k(half, [1.0] * 600 + [0.0] * 600, 600) == pytest.approx(0.5)


NUMBERS = {
    "16 - 3 = <<16-3=13>>13 eggs\nA: 26": "26",
    "$1,200.00.": "1200",
    "12,345,678": "12345678",
    "the numbers 1,2,3": "3",  # no groups of three
    "it falls to -3": "-3",
    "16-3": "3",  # a minus that subtracts
    "(2)-1": "1",
    "0.50": "0.5",
    "-0.0": "0",
    "007": "7",
    "9" * 5000: "9" * 5000,
    "none": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:20])
def test_last_number(text):
    assert last_number(text) == NUMBERS[text]


def first_word(text):
    return text.split()[0]


def no_answer(text):
    return [text]


RECORDS = [
    {"row": row, "turn": 0, "response": text}
    for row, texts in ((1, ("a 7", "b 7", "a 9")), (2, ("a", "b 1", "b 2")))
    for text in texts
]
ARGS = dict(pass_at=(1, 3), maj_at=(3,), samples=3, final_answer="", reward=("x:right",))


def test_columns_and_notes(capsys):
    """The interval is that of the prompts; notes count silent responses and answers with two rewards."""
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    questions = [0, 0, 0, 1, 1, 1]
    found = columns(RECORDS, rewards, questions, "m", SimpleNamespace(**ARGS))
    assert list(found) == ["pass@1", "pass@3", "maj@3"]
    assert found["pass@1"]["mean"] == pytest.approx(1 / 3)
    assert found["pass@1"]["n"] == 2 and found["pass@1"]["ci95"] == pytest.approx(0.0)
    assert found["pass@3"]["mean"] == 1.0
    assert found["maj@3"]["mean"] == pytest.approx(1 / 2)  # row 1: 7, half right; row 2: a tie of 1 and 2
    assert "last number" in found["maj@3"]["by"] and "3 samples" in found["maj@3"]["by"]
    said = capsys.readouterr().out
    assert "1 of 6 responses have no final answer" in said
    assert "for 1 of 2 prompts --reward calls the same final answer right in" in said

    words = SimpleNamespace(**ARGS | dict(final_answer="test_pass_at_k:first_word"))
    found = columns(RECORDS, rewards, questions, "m", words)
    assert found["maj@3"]["mean"] == pytest.approx(1 / 2)  # row 1: a, half right; row 2: b, half right
    assert "no final answer" not in capsys.readouterr().out


def test_samples_of_each_turn_are_a_group_of_their_own():
    """Two turns of one prompt: two values, and no interval, which needs another prompt."""
    records = [
        {"row": 1, "turn": turn, "response": "7"} for _sample in range(2) for turn in range(2)
    ]  # as `answer` gives them
    args = SimpleNamespace(**ARGS | dict(pass_at=(2,), maj_at=(), samples=2))
    found = columns(records, [1.0, 0.0, 1.0, 0.0], [0, 0, 0, 0], "m", args)
    assert found["pass@2"]["mean"] == 0.5 and found["pass@2"]["n"] == 2 and found["pass@2"]["ci95"] is None


def test_what_cannot_be_answered_is_one_line(tmp_path, monkeypatch):
    questions = [0, 0, 0, 1, 1, 1]
    with pytest.raises(SystemExit, match=r"error: .*--reward x:right gave 0.5 for row 2, response 'b 1'$"):
        columns(RECORDS, [1.0, 0.0, 0.0, 0.0, 0.5, 0.0], questions, "m", SimpleNamespace(**ARGS))
    for name, words in (
        ("no_answer", "TypeError: .*list.* for the response 'a 7'"),
        ("first_word", r"IndexError: .*test_pass_at_k.py, line \d+\) for the response ''"),
    ):
        records = [record | {"response": ""} for record in RECORDS] if name == "first_word" else RECORDS
        args = SimpleNamespace(**ARGS | dict(final_answer=f"test_pass_at_k:{name}"))
        with pytest.raises(SystemExit, match=f"error: --final-answer test_pass_at_k:{name} raised {words}"):
            columns(records, [0.0] * 6, questions, "m", args)
    for name in ("nowhere:f", "test_pass_at_k:nothing", "nothing"):
        with pytest.raises(SystemExit, match=f"error: --final-answer {name}: .*give module:function"):
            load_final_answer(name)
    (tmp_path / "broken_answers.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="--final-answer broken_answers:f: division by zero; give"):
        load_final_answer("broken_answers:f")
    with pytest.raises(SystemExit, match="--final-answer test_pass_at_k:RECORDS is list, not a function"):
        load_final_answer("test_pass_at_k:RECORDS")


@pytest.mark.skipif(not GSM8K.exists(), reason="needs the file that GSM8K_SCORED names")
def test_real_solutions():
    """Four models' solutions per question as samples: the last number is right where the reward says so, and
    the closed forms are the means over all subsets."""
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) > 5000
    groups = {}
    for row in rows:
        right = last_number(row["response"]) == last_number(row["ground_truth"])
        assert float(right) == row["reward"], row["response"]
        groups.setdefault(row["prompt"], []).append((last_number(row["response"]), row["reward"]))
    for group in groups.values():
        answers, rewards = zip(*group, strict=True)
        for k in range(1, len(group) + 1):
            subsets = every_subset(len(group), k)
            any_right = sum(any(rewards[i] for i in subset) for subset in subsets) / len(subsets)
            majority = sum(vote(answers, rewards, subset) for subset in subsets) / len(subsets)
            assert pass_at_k(rewards, k) == pytest.approx(any_right)
            assert majority_at_k(answers, rewards, k) == pytest.approx(majority)
