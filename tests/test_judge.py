"""evaluate.py judge against servers that answer by script: verdicts, orders, retries, cache, report."""

import ast
import contextlib
import dataclasses
import email.utils
import json
import math
import os
import re
import runpy
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import pytest

openai = pytest.importorskip("openai", reason="the judge needs openai: pip install openai")

from judge_server import FAST, run, serving, write

import evaluate
from evaluation import asking, verdicts, win_rates


@pytest.fixture
def pair(tmp_path):
    """Two files of ten responses: the first is the better one for prompts 0 to 6, the second for 7 to 9."""
    one = []
    two = []
    for i in range(10):
        first, second = ("good", "bad") if i < 7 else ("bad", "good")
        one.append({"prompt": f"q{i}?", "response": f"one {first} {i}"})
        two.append({"prompt": f"q{i}?", "response": f"two {second} {i}"})
    return write(tmp_path / "one.jsonl", one), write(tmp_path / "two.jsonl", two)


def shown(question):
    """(answer A, answer B) of a question of ours."""
    return tuple(re.search(rf"<answer_{x}>\n(.*?)\n</answer_{x}>", question, re.S)[1] for x in "ab")


def honest(question, *_):
    """Prefers what says that it is good."""
    a, b = shown(question)
    return "Because.\n\n**Verdict:** " + ("A" if "good" in a else "B" if "good" in b else "neutral")


def lines(folder):
    return Path(folder, "judgements.jsonl").read_text().splitlines()


# --- parsing and templates -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: A", "A"),
        ("verdict: b", "B"),
        ("VERDICT: NEUTRAL.", "neutral"),
        ("**Verdict:** B", "B"),
        ("**Verdict: A**", "A"),
        ("### Final verdict: `B`", "B"),
        ("Verdict: [[A]]", "A"),
        ("Verdict: answer B.", "B"),
        ("Verdict:\n\nA\n", "A"),
        ("Verdict: tie", "neutral"),
        ("*Verdict*: **A**\n\nI hope that helps.", "A"),
        ("Verdict: A\nNo, wait.\nVerdict: B", "B"),
        ("<think>Verdict: A</think>\nVerdict: B", "B"),
        ("Verdict：A", "A"),
        # no guesses
        ("", None),
        ("A", None),
        ("Answer A is better.", None),
        ("Verdict: A|B|neutral", None),
        ("Verdict: A or B", None),
        ("Verdict: a close call", None),
        ("Verdict: Both", None),
        ("Verdict: A/B", None),
        ("Verdict: A\nVerdict: unclear", None),
        ("<think>Verdict: A", None),
        ("Verdict: C", None),
        ("Verdict:", None),
        ("Verdict: A tie", None),
        ("Score: 4", None),
    ],
)
def test_verdicts(text, verdict):
    assert verdicts.parse_verdict("pairwise", text) == verdict


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 4", 4),
        ("**Score:** 5/5", 5),
        ("score: **1**.", 1),
        ("Score: 3 out of 5", 3),
        ("Score: 2\nScore: 4.0", 4),
        ("Score: [[2]]", 2),
        ("Score: 0", None),
        ("Score: 6", None),
        ("Score: 45", None),
        ("Score: 4.5", None),
        ("Score: 4,5", None),
        ("Score: 1-5", None),
        ("Score: 4/10", None),
        ("Score: -3", None),
        ("4", None),
        ("Score: four", None),
        ("Score: 3 or 4", None),
        ("Verdict: A", None),
    ],
)
def test_scores(text, score):
    assert verdicts.parse_verdict("score", text) == score


def test_fill_leaves_braces_of_answers_alone():
    template = "{prompt}|{answer_a}|{answer_b}|{other}"
    assert (
        verdicts.fill(template, prompt="{answer_a}", answer_a="{answer_b} {}", answer_b=r"\1")
        == r"{answer_a}|{answer_b} {}|\1|{other}"
    )
    for mode, text in (("pairwise", verdicts.PAIRWISE), ("score", verdicts.SCORE)):
        parts = (
            dict(prompt="P", answer="R") if mode == "score" else dict(prompt="P", answer_a="R", answer_b="S")
        )
        filled = verdicts.fill(text, **parts)
        assert "{" not in filled
        assert filled.count("P\n")
        assert "\nR\n" in filled
        # a judge that repeats its instructions has said nothing
        assert verdicts.parse_verdict(mode, filled) is None


# --- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "n"), [(0.5, 10), (0.0, 5), (1.0, 7), (0.675, 200), (0.9, 3)])
def test_wilson_inverts_the_score_test(mean, n):
    """Its ends are the p with |mean - p| = 1.96 sqrt(p (1 - p) / n), found here by bisection."""

    def end(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            if abs(mean - middle) <= 1.959963984540054 * math.sqrt(middle * (1 - middle) / n):
                inside = middle
            else:
                outside = middle
        return inside

    low, high = win_rates.wilson(mean, n)
    assert low == pytest.approx(end(mean, 0.0), abs=1e-6)
    assert high == pytest.approx(end(mean, 1.0), abs=1e-6)


def test_average():
    values = [1, 5, 4, 4, 2]
    out = win_rates.average(values)
    half = 1.959963984540054 * math.sqrt(2.7) / math.sqrt(5)  # variance 2.7, by hand
    assert out["mean"] == 3.2
    assert statistics.variance(values) == pytest.approx(2.7)
    assert out["ci95"] == pytest.approx([3.2 - half, 3.2 + half])
    assert math.isnan(win_rates.average([3])["ci95"][0])
    assert math.isnan(win_rates.average([])["mean"])
    assert all(map(math.isnan, win_rates.wilson(math.nan, 0)))


def test_pairwise_numbers_by_hand():
    """Verdict, verdict of the swapped pair, points of the first."""
    table = [
        ("A", "B", 1.0),
        ("A", "A", 0.5),
        ("A", "neutral", 0.75),
        ("B", "A", 0.0),
        ("neutral", "neutral", 0.5),
        ("A", None, None),
    ]
    rows = [{"responses": ["long one", "short"], "judged": [x, y]} for x, y, _ in table] + [
        {"responses": ["s", "s"], "judged": [None] * 2}
    ]
    for row, points in zip(rows, [p for _, _, p in table] + [0.5], strict=True):
        row["points"] = win_rates.pair_points(row)
        assert row["points"] == points
    out = win_rates.pairwise_summary(rows)
    assert (out["pairs"], out["judged"], out["identical"]) == (7, 6, 1)
    assert (out["wins"], out["ties"], out["losses"]) == (2, 3, 1)
    assert out["win_rate"] == pytest.approx((1 + 0.5 + 0.75 + 0 + 0.5 + 0.5) / 6)
    assert out["ci95"] == win_rates.wilson(out["win_rate"], 6)
    assert out["win_rate_without_ties"] == pytest.approx(2 / 3)
    assert out["contradictory"] == pytest.approx(1 / 5)
    assert out["says_a"] == pytest.approx(5 / 7)
    assert out["longer_wins"] == pytest.approx(2 / 3)


# --- judging -------------------------------------------------------------------------------------------


def test_each_pair_once_in_each_order(pair, tmp_path):
    """Every question once, its twin swapped; either order is first for some; never more than --concurrency
    at once."""
    full = threading.Barrier(FAST["concurrency"])  # passes when so many questions are under way

    def script(question, number, before):
        if number < FAST["concurrency"]:
            full.wait(30)
            time.sleep(0.5)  # one too many would come now
        return honest(question)

    with serving(script) as server:
        out, error = run(server, pair, tmp_path / "run")
    assert error is None
    assert len(server.asked) == len(set(server.asked)) == 20 == len(lines(tmp_path / "run"))
    both = [shown(question) for question in server.asked]
    assert {(b, a) for a, b in both} == set(both)
    assert server.most == FAST["concurrency"]
    first = {}
    for a, _ in both:
        first.setdefault(a.split()[-1], a.split()[0])
    assert set(first.values()) == {"one", "two"}
    assert (out["wins"], out["ties"], out["losses"], out["win_rate"], out["contradictory"]) == (
        7,
        0,
        3,
        0.7,
        0.0,
    )
    assert out["ci95"] == pytest.approx(win_rates.wilson(0.7, 10))
    assert out["says_a"] == 0.5
    assert out["judgements"] == dict(
        wanted=20, cached=0, valid=20, unparsable=0, failed=0, not_asked=0, cut=0
    )
    rows = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["points"] for row in rows} == {f"q{i}?": float(i < 7) for i in range(10)}


def test_one_question_at_a_time(pair, tmp_path):
    with serving(honest) as server:
        run(server, pair, tmp_path / "run", concurrency=1, prompts=3)
    assert server.most == 1
    assert len(server.asked) == 6


def test_a_judge_that_always_says_a(pair, tmp_path):
    """Position alone gives no side a win, and shows."""
    with serving(lambda *_: "Verdict: A") as server:
        out, error = run(server, pair, tmp_path / "run")
    assert error is None
    assert (out["win_rate"], out["ties"], out["contradictory"], out["says_a"]) == (
        0.5,
        10,
        1.0,
        1.0,
    )
    assert out["ci95"][1] - out["ci95"][0] > 0.4  # no certainty from ten ties
    assert out["win_rate_without_ties"] is None


def test_seed_decides_the_prompts_and_the_order(pair, tmp_path):
    def asked(seed, folder):
        with serving(honest) as server:
            run(server, pair, tmp_path / folder, seed=seed, prompts=5, concurrency=1)
        return server.asked

    assert asked(0, "a") == asked(0, "b") != asked(1, "c")


def test_request(pair, tmp_path, monkeypatch):
    """The key comes from the environment, the settings from the flags; --extra adds to them and takes
    away."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with serving(honest) as server:
        _, error = run(server, pair, tmp_path / "run", prompts=1, extra='{"max_tokens": null, "top_p": 0.5}')
        assert error is None
        assert server.keys[0] == "Bearer sk-test"
        assert {
            key: server.bodies[0].get(key) for key in ("model", "temperature", "max_tokens", "top_p")
        } == {"model": "m", "temperature": 0.0, "max_tokens": None, "top_p": 0.5}
        monkeypatch.delenv("OPENAI_API_KEY")
        run(server, pair, tmp_path / "run", prompts=1)  # other settings: other questions
        assert server.keys[-1] == "Bearer none"
        assert len(server.asked) == 4
        run(server, pair, tmp_path / "run", prompts=1, judge_model=("other",))
        assert len(server.asked) == 6


# --- faults --------------------------------------------------------------------------------------------

FAULTS = {
    "busy": (429, {"retry-after": "0.05"}, '{"error": {"message": "slow down"}}'),
    "broken": (500, {}, "oops"),
    "overloaded": (503, {"content-type": "text/html"}, "<html>"),
    "not json": (200, {}, '{"choices": [{"mess'),
    "no answer": (200, {}, '{"error": {"message": "upstream"}}'),
    "a page": (200, {"content-type": "text/html"}, "<html>login</html>"),
    "a list": (200, {}, "[]"),
    "nothing": (200, {}, ""),
    "slow": 1.5,
    "cut": "cut",
    "half": "half",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass(pair, tmp_path, fault):
    """A question whose first tries meet a fault is asked again; all are judged once, and no more is asked
    than needed."""
    slow = fault == "slow"  # the others wait long enough for any machine
    faults = 1 if slow else 2

    def bad(question):
        return "q3?" in question and "one good 3" in shown(question)[0]

    def script(question, _, before):
        return FAULTS[fault] if bad(question) and before < faults else honest(question)

    with serving(script) as server:
        out, error = run(server, pair, tmp_path / "run", **(dict(timeout=1.0, tries=10) if slow else {}))
    assert error is None
    assert out["judgements"]["valid"] == 20
    assert len(lines(tmp_path / "run")) == 20
    assert len(server.asked) == 22 if not slow else len(server.asked) >= 21
    assert out["win_rate"] == 0.7


def test_everything_at_once(pair, tmp_path):
    """Every first try fails, in all quick ways by turns."""
    quick = [fault for name, fault in FAULTS.items() if name != "slow"]

    def script(question, number, before):
        return honest(question) if before else quick[number % len(quick)]

    with serving(script) as server:
        out, error = run(server, pair, tmp_path / "run")
    assert error is None
    assert out["judgements"]["valid"] == 20
    assert server.most <= FAST["concurrency"]
    assert len(server.asked) == 40
    assert len(lines(tmp_path / "run")) == 20


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed(pair, tmp_path, form):
    """By all workers: nobody asks before the server wants to be asked."""
    said = threading.Event()
    least = 0.5 if form == "seconds" else 1.0  # a date has whole seconds

    def script(question, number, before):
        if number == 0:
            said.set()
            value = "0.5" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
            return 429, {"retry-after": value}, "{}"
        said.wait(30)
        time.sleep(0.05)
        return honest(question)

    with serving(script) as server:
        _, error = run(server, pair, tmp_path / "run", concurrency=2, prompts=3)
    early = [t for t in server.times[1:] if t < server.times[0] + least - 0.01]
    assert error is None
    assert len(server.asked) == 7
    assert len(early) <= 2  # the one under way; one that its answer let go before


def test_a_server_that_asks_for_too_long_a_wait(pair, tmp_path):
    with serving(lambda *_: (429, {"retry-after": "3600"}, '{"error": {"message": "quota"}}')) as server:
        out, error = run(server, pair, tmp_path / "run", max_wait=1.0)
    assert out is None
    assert len(server.asked) <= 2 * FAST["concurrency"]
    assert "asks to wait 3600 s" in error
    assert "\n" not in error


def test_pauses_grow_and_are_random(pair, tmp_path, monkeypatch):
    """Between half and all of --backoff, doubled each time, --max-wait at most."""
    slept = []
    sleep = asking.asyncio.sleep

    def note_sleep(seconds):
        slept.append(seconds)
        return sleep(0)

    monkeypatch.setattr(asking.asyncio, "sleep", note_sleep)
    with serving(lambda *_: (500, {}, "")) as server:
        run(server, pair, tmp_path / "run", concurrency=1, tries=6, backoff=1.0, max_wait=10.0, prompts=1)
    assert len(server.asked) == 12
    assert len(slept) == 10
    assert all(peak / 2 <= s <= peak for s, peak in zip(slept, [1, 2, 4, 8, 10] * 2, strict=True))
    assert len(set(slept)) == 10


def test_unparsable_answers_are_kept_and_counted(pair, tmp_path):
    """Asked again only with --retry-unparsable; their pairs have no result."""

    def vague(question, *_):
        return "I like both." if "q1?" in question else honest(question)

    with serving(vague) as server:
        out, error = run(server, pair, tmp_path / "run")
        assert error is None
        assert len(server.asked) == 20
        assert out["judgements"]["unparsable"] == 2
        assert out["judged"] == 9
        again, _ = run(server, pair, tmp_path / "run")
        assert len(server.asked) == 20
        assert again["judgements"] == out["judgements"] | {"cached": 20}
        assert again["win_rate"] == out["win_rate"]
        server.script = honest
        out, _ = run(server, pair, tmp_path / "run", retry_unparsable=True)
        assert len(server.asked) == 22
        assert out["judgements"]["valid"] == 20
        assert out["judgements"]["cached"] == 18
        run(server, pair, tmp_path / "run", retry_unparsable=True)
        assert len(server.asked) == 22


def test_an_answer_without_text(pair, tmp_path):
    """A reasoning model that ran out of tokens: no text, cut off."""
    choice = {"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "length"}
    with serving(lambda *_: (200, {}, json.dumps({"choices": [choice]}))) as server:
        out, error = run(server, pair, tmp_path / "run")
    assert error is None
    assert out["judgements"]["unparsable"] == out["judgements"]["cut"] == len(server.asked) == 20
    assert out["win_rate"] is None
    assert out["judged"] == 0


def test_a_question_that_always_fails_is_reported(pair, tmp_path):
    """After --tries tries, as failed, not cached; the others are judged; the same command asks for it
    alone."""

    def poison(question, *_):
        return (500, {}, "boom") if "q4?" in question else honest(question)

    with serving(poison) as server:
        out, error = run(server, pair, tmp_path / "run")
        assert "2 of 20 judgements are missing" in error
        assert "HTTP 500" in error
        assert "boom" in error
        assert "\n" not in error
        assert out["judgements"] == dict(
            wanted=20, cached=0, valid=18, unparsable=0, failed=2, not_asked=0, cut=0
        )
        assert out["judged"] == 9
        assert sum(out["failures"].values()) == 2
        assert len(server.asked) == 18 + 2 * FAST["tries"]
        server.asked.clear()
        server.script = honest
        out, error = run(server, pair, tmp_path / "run")
    assert error is None
    assert len(server.asked) == 2
    assert out["judgements"]["valid"] == 20
    assert out["judgements"]["cached"] == 18


def test_a_question_that_is_too_long_stops_nothing(pair, tmp_path):
    """A 400 is not tried again, and ends the run only where nothing else is answered either."""
    too_long = (400, {}, '{"error": {"message": "maximum context length"}}')
    with serving(lambda question, *_: honest(question) if "q2?" not in question else too_long) as server:
        out, error = run(server, pair, tmp_path / "run")
    assert len(server.asked) == 20
    assert out["judgements"]["failed"] == 2
    assert "maximum context length" in error
    with serving(lambda *_: (400, {}, '{"error": {"message": "unsupported parameter"}}')) as server:
        out, error = run(server, pair, tmp_path / "none")
    assert out is None
    assert len(server.asked) <= 2 * FAST["concurrency"]
    assert "unsupported parameter" in error
    assert "\n" not in error


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_or_model_ends_at_once(pair, tmp_path, status):
    with serving(lambda *_: (status, {}, '{"error": {"message": "no such\\nthing"}}')) as server:
        out, error = run(server, pair, tmp_path / "run")
    assert out is None
    assert len(server.asked) <= FAST["concurrency"]
    assert lines(tmp_path / "run") == []
    assert error.startswith(f"error: {server.endpoint}: HTTP {status}")
    assert "no such" in error
    assert "\n" not in error


def test_no_server(pair, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    out, error = run(endpoint, pair, tmp_path / "run")
    assert out is None
    assert error.startswith(f"error: {endpoint}: no connection")
    assert f"({FAST['tries']} tries)" in error


def test_a_server_that_dies_on_the_way(pair, tmp_path):
    """What is there is reported, what is missing counted; the next run asks for that alone."""
    with serving(lambda question, number, before: honest(question) if number < 9 else "cut") as server:
        out, error = run(server, pair, tmp_path / "run")
        counts = out["judgements"]
        assert counts["valid"] == 9 == len(lines(tmp_path / "run"))
        assert counts["failed"] + counts["not_asked"] == 11
        assert counts["not_asked"]
        assert "11 of 20 judgements are missing" in error
        assert "no connection" in error
        assert len(server.asked) <= 9 + (FAST["concurrency"] * 2 - 1) * FAST["tries"]
        server.asked.clear()
        server.script = honest
        out, error = run(server, pair, tmp_path / "run")
    assert error is None
    assert len(server.asked) == 11
    assert out["judgements"]["valid"] == 20
    assert out["win_rate"] == 0.7


def test_a_torn_line_is_survived(pair, tmp_path):
    """The line is asked for again, and what comes after it is on a line of its own."""
    with serving(honest) as server:
        before, _ = run(server, pair, tmp_path / "run")
        file = tmp_path / "run/judgements.jsonl"
        file.write_bytes(file.read_bytes()[:-40])
        for asked in (1, 0):
            server.asked.clear()
            out, error = run(server, pair, tmp_path / "run")
            assert error is None
            assert len(server.asked) == asked
            assert out["judgements"]["valid"] == 20
        assert out["win_rate"] == before["win_rate"]


def test_interrupted(pair, tmp_path):
    """Ctrl-C: what is there is reported, the rest is missing."""

    def script(question, number, before):
        if number == 10:
            os.kill(os.getpid(), 2)
            return 30.0
        return honest(question)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
    with serving(script) as server:
        out, error = run(server, pair, tmp_path / "run", concurrency=1)
    signal.signal(signal.SIGINT, before)
    assert out["judgements"]["valid"] == 10
    assert "10 of 20 judgements are missing (interrupted)" in error


# --- files ---------------------------------------------------------------------------------------------


def test_scores_and_forms_of_files(tmp_path, capsys):
    """Our rows, chat messages, alpaca_eval's list; prompts of one file alone, second and empty responses;
    paired difference."""
    chat = [{"role": "user", "content": "q1"}]
    talk = [{"role": "system", "content": "Be brief."}, *chat]
    rows = [("q0", "5"), (chat, "4"), (talk, "3"), ("q0", "1"), ("q3", ""), ("mine", "5")]
    ours = write(tmp_path / "a.jsonl", [{"prompt": p, "response": r, "model": "x"} for p, r in rows])
    alpaca = [("q0", "4"), ("q1", "2"), ("[system]\nBe brief.\n\n[user]\nq1", "3"), ("q3", "2")]
    (tmp_path / "b.json").write_text(
        json.dumps([{"instruction": p, "output": r, "generator": "y"} for p, r in alpaca])
    )

    def answer(question):
        return re.search(r"<answer>\n(.*?)\n</answer>", question, re.S)[1]

    with serving(lambda question, *_: f"Score: {answer(question) or 1}") as server:
        out, error = run(server, (ours, str(tmp_path / "b.json")), tmp_path / "run", mode="score")
    assert error is None
    assert len(server.asked) == 8  # both files answer one prompt with 3: one question
    assert out["judgements"]["valid"] == 9
    assert out["not_in_every_file"] == [1, 0]
    first, second = out["files"]
    assert first["histogram"] == [1, 0, 1, 1, 2]
    assert first["mean"] == 3.6
    assert first["n"] == 5
    assert second["histogram"] == [0, 2, 1, 1, 0]
    assert second["mean"] == 2.75
    assert out["difference"] == {
        "n": 4,
        "mean": 0.5,
        "ci95": pytest.approx(win_rates.average([1, 2, 0, -1])["ci95"]),
    }
    said = capsys.readouterr().out
    assert "1 of its prompts are not in every file" in said
    assert "1 further responses" in said
    assert "first - second: mean 0.500" in said


def test_equal_responses_are_a_tie_unasked(tmp_path):
    same = {"prompt": "p", "response": "same"}
    good = {"prompt": "q", "response": "good"}
    alone = {"prompt": "z", "response": "z"}
    one = write(tmp_path / "a.jsonl", [same, good, alone])
    two = write(tmp_path / "b.jsonl", [{"prompt": "q", "response": "bad"}, same])
    with serving(honest) as server:
        out, error = run(server, (one, two), tmp_path / "run")
    assert error is None
    assert len(server.asked) == 2
    assert out["not_in_every_file"] == [1, 0]
    assert (out["pairs"], out["wins"], out["ties"], out["identical"], out["win_rate"]) == (2, 1, 1, 1, 0.75)


def test_template(pair, tmp_path):
    file = tmp_path / "t.txt"
    file.write_text(
        "Which? {prompt} <answer_a>\n{answer_a}\n</answer_a><answer_b>\n{answer_b}\n</answer_b> "
        "Say `Verdict: X`."
    )
    with serving(honest) as server:
        out, error = run(server, pair, tmp_path / "run", template=str(file))
        assert error is None
        assert server.asked[0].startswith("Which? q")
        assert out["win_rate"] == 0.7
        file.write_text("{prompt} {answer_a}")
        assert "must hold {answer_b}" in run(server, pair, tmp_path / "run", template=str(file))[1]


def test_arguments_and_files_that_make_no_sense(pair, tmp_path, monkeypatch):
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "p", "response": "r"}, {"prompt": "p", "text": "r"}])
    other = write(tmp_path / "other.jsonl", [{"prompt": "p", "response": "r"}])
    for files, changes, words in [
        (pair[:1], {}, "takes two files or more, not 1"),
        ((pair[0], "none.jsonl"), {}, "none.jsonl: no such file"),
        ((pair[0], bad), {}, "bad.jsonl, row 2: no 'response'"),
        ((pair[0], other), {}, "no prompt is in both"),
        (pair, {"concurrency": 0}, "--concurrency"),
        (pair, {"extra": "[1]"}, "--extra"),
        (pair, {"extra": "{"}, "--extra"),
        (pair, {"endpoint": ("localhost:8000",)}, "begins with http"),
        (pair, {"template": "none"}, "--template none: no such file"),
    ]:
        _, error = run("http://127.0.0.1:9/v1", files, tmp_path / "run", **changes)
        assert words in error and "\n" not in error, error
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in run("http://127.0.0.1:9/v1", pair, tmp_path / "run")[1]


def test_command_line(pair, tmp_path, monkeypatch, capfd):
    """As from a shell: nothing but a bar on stderr, and that only on a terminal; --help explains every
    field."""
    with serving(honest) as server:
        flags = ["--responses", *pair, "--judge-model", "m", "--endpoint", server.endpoint]
        flags += ["--run-dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "judge", *flags, "--prompts", "2"])
        runpy.run_path(str(helpers.ROOT / "evaluate.py"), run_name="__main__")
    out, err = capfd.readouterr()
    assert "win rate" in out
    assert err == ""
    assert (tmp_path / "out/judge.json").exists()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "judge", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(helpers.ROOT / "evaluate.py"), run_name="__main__")

    def squeeze(text):
        return re.sub(r"[^a-z0-9]", "", text.lower())

    text = squeeze(capfd.readouterr().out)
    tree = ast.parse((helpers.ROOT / "evaluation/judge.py").read_text())
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Judge")
    assert end.value.code == 0
    assert len(body) == 2 * len(dataclasses.fields(evaluate.Judge)) + 1
    for field, doc in zip(body[1::2], body[2::2], strict=True):
        assert squeeze(field.target.id) in text and squeeze(doc.value.value) in text, field.target.id


# --- a real server -------------------------------------------------------------------------------------

MODEL = os.environ.get("VALUE_FIRST_CHAT_MODEL", "")


@pytest.mark.skipif(not MODEL, reason="VALUE_FIRST_CHAT_MODEL names no folder of a chat model")
@pytest.mark.parametrize("mode", ["pairwise", "score"])
def test_transformers_serve(tmp_path, mode):
    """A small model behind a real server: everything is answered and counted, and asked once. It may well be
    a bad judge."""
    pytest.importorskip("uvicorn", reason='pip install "transformers[serving]"')
    pytest.importorskip("fastapi", reason='pip install "transformers[serving]"')
    questions = {
        "Name a fruit.": ("An apple.", "A hammer."),
        "What is 2 + 2?": ("4", "It is 5, I think."),
        "Say hello.": ("Hello!", "No."),
    }
    files = tuple(
        write(tmp_path / f"{i}.jsonl", [{"prompt": q, "response": r[i]} for q, r in questions.items()])
        for i in (0, 1)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tool = str(Path(sys.executable).with_name("transformers"))
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [tool, "serve", "--host", "127.0.0.1", "--port", str(port), MODEL], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        endpoint = f"http://127.0.0.1:{port}/v1"
        settings = dict(mode=mode, judge_model=(MODEL,), max_tokens=96, timeout=300.0, concurrency=1)
        out, error = run(endpoint, files, tmp_path / "run", **settings)
        assert error is None, (tmp_path / "log").read_text()[-2000:]
        counts = out["judgements"]
        assert counts["wanted"] == counts["valid"] + counts["unparsable"] == len(lines(tmp_path / "run")) == 6
        again, _ = run("http://127.0.0.1:9/v1", files, tmp_path / "run", **settings)  # from the cache alone
        assert again["judgements"] == counts | {"cached": 6}
    finally:
        server.terminate()
        server.wait(30)


def test_a_second_run_in_the_folder_is_one_line(pair, tmp_path):
    """While another process holds it. The lock is of processes: in this one it would be granted again."""
    code = "import sys; from pathlib import Path; from common.lock import lock\n"
    code += "lock(Path(sys.argv[1])); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    holder.stdout.readline()
    try:
        with serving(lambda *_: "Verdict: A") as server:
            _, error = run(server, pair, tmp_path / "run")
        assert f"another run writes there (process {holder.pid} on " in error
        assert not server.asked
    finally:
        holder.communicate("\n")
    with serving(lambda *_: "Verdict: A") as server:
        _, error = run(server, pair, tmp_path / "run")
    assert error is None
