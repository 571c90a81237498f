"""evaluate.py judge as MT-Bench and Arena-Hard judge, with several judges, before anything is asked; and the
numbers beside those of FastChat and arena-hard-auto."""

import base64
import importlib.util
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from judge_server import run, serving, write

from evaluation import benchmarks, verdicts, win_rates

NOWHERE = "http://127.0.0.1:9/v1"


def lines(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


# --- the packages' numbers -----------------------------------------------------------------------------


def scripted_judgements():
    """(rows of FastChat's single and pair files, of arena-hard-auto's), drawn by a seed."""
    draw = random.Random(3)
    arena = []
    labels = ["A>>B", "A>B", "A=B", "B>A", "B>>A", "A<<B", "B=A", "A<B", None]
    for model in ("m1", "m2"):
        for i in range(60):
            first = {"score": draw.choice(labels)}
            second = {"score": draw.choice(labels)} if i != 7 else None
            row = {"uid": str(i), "category": "hard_prompt", "judge": "j", "model": model, "baseline": "base"}
            arena.append(row | {"games": [first, second]})
    single = []
    pair = []
    for model in ("m1", "m2"):
        for question in range(81, 161):
            for turn in (1, 2):
                row = {"question_id": question, "model": model, "judge": ["gpt-4", "single-v1"], "turn": turn}
                category = ["writing", "math", "coding", "stem"][question % 4]
                score = draw.choice([-1, 1, 3, 7.5, 8, 10])
                single.append(row | {"score": score, "category": category, "judgment": "", "user_prompt": ""})
    winners = ["model_1", "model_2", "tie", "error"]
    for question in range(81, 161):
        for turn in (1, 2):
            row = {"question_id": question, "model_1": "m1", "model_2": "base", "judge": ["gpt-4", "pair-v2"]}
            one, other = draw.choice(winners), draw.choice(winners)
            pair.append(row | {"g1_winner": one, "g2_winner": other, "turn": turn})
    return single, pair, arena


# of m1 and m2: first turn, second turn, average
FASTCHAT_SINGLE = {"m1": [5.895161, 6.431034, 6.154167], "m2": [5.569444, 6.216418, 5.881295]}
FASTCHAT_PAIR = [15, 9, 61, 0.176471, 0.105882, 0.535294]
# mean of the battles of m1 and m2, null judgements, quantiles of 1,000 bootstraps in place of its 100
ARENA_HARD = {
    "mean": [0.4620253164556962, 0.5111111111111111],
    "null": 29,
    "lower": [0.402, 0.450],
    "upper": [0.525, 0.567],
}


def test_numbers_of_fastchat_and_arena_hard(tmp_path):
    """On these rows FastChat 0.2.36's show_result.py and load_judgments of arena-hard-auto v2.0's show_result.py
    (commit 005ac12) gave the numbers below; each file is read by `--judgements`."""
    single, pair, arena = scripted_judgements()
    files = [write(tmp_path / name, rows) for name, rows in (("s", single), ("p", pair), ("a", arena))]
    files = [str(Path(file).rename(f"{file}.jsonl")) for file in files]
    found = {}
    for mode, file in zip(("mt-bench", "mt-bench-pairwise", "arena-hard"), files, strict=True):
        flags = dict(mode=mode, judgements=(file,), responses=(), judge_model=())
        out, error = run(NOWHERE, (), tmp_path / mode, **flags)
        assert error is None
        found[mode] = out["benchmark"]
    one, two = found["mt-bench"]
    for of, name in ((one, "m1"), (two, "m2")):
        assert of["model"] == name
        assert [of["turn_1"]["mean"], of["turn_2"]["mean"], of["mean"]] == pytest.approx(
            FASTCHAT_SINGLE[name], abs=1e-6
        )
    (of,) = found["mt-bench-pairwise"]
    assert [of[key] for key in ("win", "loss", "tie")] == FASTCHAT_PAIR[:3]
    rates = [of[key] for key in ("win_rate", "loss_rate", "win_rate_adjusted")]
    assert rates == pytest.approx(FASTCHAT_PAIR[3:], abs=1e-6)
    one, two = found["arena-hard"]
    assert [one["win_rate"], two["win_rate"]] == pytest.approx(ARENA_HARD["mean"], abs=1e-12)
    assert one["unparsable"] + two["unparsable"] == ARENA_HARD["null"]
    for of, low, high in zip((one, two), ARENA_HARD["lower"], ARENA_HARD["upper"], strict=True):
        assert of["ci90_of_scores"] == pytest.approx([low, high], abs=0.015)  # both are drawn
        low, high = of["ci95"]
        assert low < of["ci90_of_scores"][0] and of["ci90_of_scores"][1] < high


def test_fastchat_reads_our_files(tmp_path):
    """FastChat's own show_result.py on the rows as `--judgements` reads them, and on a file that we wrote."""
    pytest.importorskip("pandas", reason="FastChat's show_result needs it: pip install pandas")
    spec = importlib.util.find_spec("fastchat")
    if spec is None:
        pytest.skip("pip install --no-deps fschat")
    tool = Path(spec.submodule_search_locations[0], "llm_judge/show_result.py")
    single, pair, _ = scripted_judgements()

    def show(rows, *flags):
        file = write(tmp_path / "rows.jsonl", rows)
        command = [sys.executable, str(tool), "--input-file", file, *flags]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    said = show(single, "--mode", "single")
    for model in ("m1", "m2"):
        ours = benchmarks.mt_bench_scores([row for row in single if row["model"] == model])
        for value in (ours["turn_1"]["mean"], ours["turn_2"]["mean"], ours["mean"]):
            assert f"{value:.6f}" in said
    said = show(pair, "--mode", "pairwise-baseline", "--baseline-model", "base")
    ours = benchmarks.mt_bench_pairs(pair)
    assert f"{ours['win_rate_adjusted']:.6f}" in said
    assert re.search(rf"{ours['win']} +{ours['loss']} +{ours['tie']} ", said)


def test_arena_scores_by_hand():
    """First game: the baseline is A. A strong verdict counts three times."""
    games = [{"score": "A>>B"}, {"score": "A>B"}]  # the baseline much better; the model a little
    assert benchmarks.arena_scores(games) == [1.0, 0.0, 0.0, 0.0]
    assert benchmarks.arena_scores([{"score": "B>A"}, {"score": "A=B"}]) == [0.5, 1.0]
    assert benchmarks.arena_scores([{"score": "A<<B"}, {"score": "B<A"}]) == [1.0, 1.0, 1.0, 1.0]
    assert benchmarks.arena_scores([{"score": None}, {"score": "A>B"}]) is None
    assert benchmarks.arena_scores([None, {"score": "A>B"}]) is None
    rows = [{"games": games}, {"games": [{"score": "B>A"}, {"score": "A=B"}]}, {"games": [None, None]}]
    out = benchmarks.arena_hard_rate(rows)
    assert out["win_rate"] == pytest.approx(2.5 / 6)
    assert (out["n"], out["unparsable"]) == (2, 1)
    assert out["ci95"] == [0.25, 0.75]  # two prompts of 1 / 4 and 1.5 / 2: the ends are one of them twice
    assert math.isnan(benchmarks.arena_hard_rate([])["win_rate"])


def test_mt_bench_scores_by_hand():
    """-1 is left out; the mean is over judgements, not over the means of turns or categories."""
    scores = [(81, 1, "writing", 8), (81, 2, "writing", 4), (82, 1, "writing", -1), (111, 1, "math", 9.5)]
    rows = [dict(zip(("question_id", "turn", "category", "score"), row, strict=True)) for row in scores]
    out = benchmarks.mt_bench_scores(rows)
    assert out["mean"] == pytest.approx(21.5 / 3)
    assert (out["n"], out["unparsable"]) == (3, 1)
    assert out["turn_1"]["mean"] == 8.75
    assert out["turn_2"]["mean"] == 4
    assert {name: of["mean"] for name, of in out["categories"].items()} == {"writing": 6, "math": 9.5}
    # by hand: the two questions' sums of distances from the mean are -+7/3; 1.96 sqrt(2 * 98 / 9) / 3
    half = 1.96 * math.sqrt(2 * 2 * (7 / 3) ** 2) / 3
    assert out["ci95"] == pytest.approx([21.5 / 3 - half, 21.5 / 3 + half])


def test_kappa_by_hand():
    """Cohen 1960: 20 of 25 and 15 of 25 agree, so 0.7 of 50; chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5; kappa 0.4."""
    table = [("yes", "yes", 20), ("yes", "no", 5), ("no", "yes", 10), ("no", "no", 15)]
    one = [a for a, _, n in table for _ in range(n)] + [None, "yes"]
    other = [b for _, b, n in table for _ in range(n)] + ["yes", None]
    out = win_rates.agreement(one, other)
    assert (out["n"], out["share"], out["kappa"]) == (50, 0.7, pytest.approx(0.4))
    assert win_rates.agreement(["a", "b"], ["b", "a"])["kappa"] == pytest.approx(-1.0)
    assert math.isnan(win_rates.agreement(["a"], ["a"])["kappa"])
    assert math.isnan(win_rates.agreement([None], ["a"])["share"])


# --- verdicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "text", "verdict"),
    [
        ("mt-bench", "Fine.\nScore: 7", 7),
        ("mt-bench", "Rating: [[5]]", 5),
        ("mt-bench", "So I rate it [[7.5]].", 7.5),
        ("mt-bench", "**Rating: 10/10**", 10),
        ("mt-bench", "Score: high. Rating: [[3]]", 3),
        ("mt-bench", "[[5]] at first, [[6]] then", None),
        ("mt-bench", "Score: 11", None),
        ("mt-bench", "[[0]]", None),
        ("mt-bench", "Score: 7/5", None),
        ("mt-bench", "Score: 7 to 8", None),
        ("mt-bench", "7", None),
        ("mt-bench", "see [1]", None),
        ("mt-bench-pairwise", "Final verdict: [[C]]", "neutral"),
        ("mt-bench-pairwise", "... therefore [[B]]", "B"),
        ("mt-bench-pairwise", 'Write "[[A]]" if A is better, "[[B]]" if B is', None),
        ("score", "[[4]]", 4),
        ("score", "Score: 3 Evaluation evidence: it answers half of it.", 3),  # 2502.16944's prompt
        ("arena-hard", "My final verdict is tie: [[A=B]]", "A=B"),
        ("arena-hard", "Verdict: A>>B", "A>>B"),
        ("arena-hard", "**Verdict:** `B>A`", "B>A"),
        ("arena-hard", "[[a<<b]]", "B>>A"),
        ("arena-hard", "[[B=A]]", "A=B"),
        ("arena-hard", "Verdict: A>B>A", None),
        ("arena-hard", "[[A>A]]", None),
        ("arena-hard", "Verdict: A", None),
        ("arena-hard", "[[A>B]] or [[B>A]]", None),
    ],
)
def test_verdicts_of_other_prompts(mode, text, verdict):
    assert verdicts.parse_verdict(mode, text) == verdict


def test_a_bare_verdict_counts_with_a_template_of_ones_own():
    """2506.13702 v1's prompt asks for the word alone."""
    for text, verdict in (("Neutral", "neutral"), ("A", "A"), (" **B**\n", "B"), ("A, as B is short", None)):
        assert verdicts.parse_verdict("pairwise", text) is None
        assert verdicts.parse_verdict("pairwise", text, bare=True) == verdict


def test_a_judge_that_repeats_our_prompts_has_said_nothing():
    prompts = [verdicts.mt_bench_prompt(*key) for key in benchmarks.PROMPT_NAMES]
    for mode, text in [
        ("arena-hard", verdicts.FIVE_LEVELS),
        *(("mt-bench", prompt) for prompt in prompts[:4]),
        *(("mt-bench-pairwise", prompt) for prompt in prompts[4:]),
    ]:
        assert verdicts.parse_verdict(mode, text) is None, text


# --- MT-Bench ------------------------------------------------------------------------------------------

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["w1?", "w2?"]},
    {"question_id": 111, "category": "math", "turns": ["m1?", "m2?"]},
    {"question_id": 130, "category": "stem", "turns": ["s1?"]},
]
REFERENCES = [{"question_id": 111, "choices": [{"index": 0, "turns": ["ref one", 2]}]}]


def answers(name, word):
    """Of a model, as our mt_bench.jsonl."""
    rows = []
    for question in QUESTIONS:
        turns = [f"{name} {word} {turn}" for turn in question["turns"]]
        choices = [{"index": 0, "turns": turns}, {"index": 1, "turns": ["another sample"] * len(turns)}]
        rows.append({"question_id": question["question_id"], "model_id": name, "choices": choices})
    return rows


@pytest.fixture
def mt_bench(tmp_path):
    """The flags of MT-Bench: two models, questions and references."""
    return dict(
        responses=(
            write(tmp_path / "one.jsonl", answers("one", "good")),
            write(tmp_path / "two.jsonl", answers("two", "bad")),
        ),
        questions=write(tmp_path / "question.jsonl", QUESTIONS),
        references=write(tmp_path / "gpt-4.jsonl", REFERENCES),
    )


def test_mt_bench(mt_bench, tmp_path):
    """Each turn once, with what it needs and no more: references for math alone, in turn 2 both turns; then the
    means by turn and category, and FastChat's file."""
    pytest.importorskip("openai", reason="pip install openai")

    def script(question, *_):
        score = 8 if "good" in question else 3
        return f"Well.\nScore: {score - 2 * ('w2?' in question)}"

    with serving(script) as server:
        out, error = run(server, (), tmp_path / "run", mode="mt-bench", **mt_bench)
    assert error is None
    assert len(server.asked) == 10 == out["judgements"]["valid"]
    for question in server.asked:
        second = re.search("[wms]2", question) is not None
        assert ("ref one" in question) == ("m1?" in question)
        assert ("\n2\n" in question) == ("m2?" in question)
        if second:
            assert re.search("[wms]1", question)
            assert "<conversation>" in question
        assert "another sample" not in question
        assert "{" not in question
    one, two = out["benchmark"]
    assert (one["model"], two["model"]) == ("one", "two")
    assert one["mean"] == pytest.approx((4 * 8 + 6) / 5)
    assert (one["turn_1"]["mean"], one["turn_2"]["mean"]) == (8, 7)
    assert {name: of["mean"] for name, of in two["categories"].items()} == {
        "writing": 2,
        "math": 3,
        "stem": 3,
    }

    rows = lines(tmp_path / "run/model_judgment/m_single.jsonl")
    assert len(rows) == 10
    keys = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp", "category"}
    assert all(set(row) == keys for row in rows)
    assert {tuple(row["judge"]) for row in rows if row["question_id"] == 111} == {
        ("m", "ours-single-math-v1"),
        ("m", "ours-single-math-v1-multi-turn"),
    }
    file = str(tmp_path / "run/model_judgment/m_single.jsonl")
    flags = dict(mode="mt-bench", judgements=(file,), responses=(), judge_model=())
    again, error = run(NOWHERE, (), tmp_path / "again", **flags)
    assert error is None
    assert again["benchmark"] == out["benchmark"]


def test_an_unparsable_score_is_fastchats_minus_one(mt_bench, tmp_path):
    pytest.importorskip("openai", reason="pip install openai")
    vague = lambda question, *_: "No idea." if "m1?" in question and "m2?" not in question else "[[6]]"
    with serving(vague) as server:
        out, error = run(server, (), tmp_path / "run", mode="mt-bench", **mt_bench)
    assert error is None
    assert out["judgements"]["unparsable"] == 2
    rows = lines(tmp_path / "run/model_judgment/m_single.jsonl")
    assert sorted(row["score"] for row in rows) == [-1, -1] + [6] * 8
    assert [of["mean"] for of in out["benchmark"]] == [6, 6]


def test_fastchats_own_prompts(mt_bench, tmp_path):
    """`--template judge_prompts.jsonl`: its system prompt, its text, its names."""
    pytest.importorskip("openai", reason="pip install openai")
    prompts = []
    for (pairwise, turn, reference), name in benchmarks.PROMPT_NAMES.items():
        parts = ["question", "answer_a", "answer_b"] if pairwise else ["question", "answer"]
        if turn == 2:
            parts = ["question_1", "question_2"]
            parts += ["answer_a_2", "answer_b_2"] if pairwise else ["answer_1", "answer_2"]
        parts += ["ref_answer_1"] * reference + ["ref_answer_2"] * (reference and turn == 2)
        template = name + ": " + "|".join(f"{{{part}}}" for part in parts)
        prompts.append({"name": name, "system_prompt": f"system of {name}", "prompt_template": template})
    file = write(tmp_path / "judge_prompts.jsonl", prompts)
    with serving(lambda *_: "Rating: [[9]]") as server:
        _, error = run(server, (), tmp_path / "run", mode="mt-bench", template=file, **mt_bench)
        assert error is None
        assert "single-math-v1-multi-turn: m1?|m2?|one good m1?|one good m2?|ref one|2" in server.asked
        assert "single-v1: w1?|one good w1?" in server.asked
        for body in server.bodies:
            system, user = body["messages"]
            assert (system["role"], user["role"]) == ("system", "user")
            assert system["content"] == "system of " + user["content"].partition(":")[0]
        server.script = lambda *_: "[[C]]"
        run(server, (), tmp_path / "pairs", mode="mt-bench-pairwise", template=file, **mt_bench)
    assert "pair-v2-multi-turn: w1?|w2?|two bad w2?|one good w2?" in server.asked
    write(tmp_path / "judge_prompts.jsonl", prompts[1:])
    _, error = run(NOWHERE, (), tmp_path / "run", mode="mt-bench", template=file, **mt_bench)
    assert "lacks single-v1;" in error


def conversation(question, letter):
    """The answers of a side in a question of ours, of turn 1 or 2."""
    for tag in (f"answer_{letter}", f"conversation_{letter}"):
        found = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", question, re.S)
        if found:
            return found[1]


def test_mt_bench_pairs(mt_bench, tmp_path):
    """Both turns in both orders; FastChat's rule: a win where both orders say so."""
    pytest.importorskip("openai", reason="pip install openai")

    def script(question, *_):
        if "w2?" in question:
            return "Verdict: A"  # position alone
        return "Verdict: " + ("A" if "good" in conversation(question, "a") else "B")

    with serving(script) as server:
        out, error = run(server, (), tmp_path / "run", mode="mt-bench-pairwise", **mt_bench)
    assert error is None
    assert len(server.asked) == 10
    two = [question for question in server.asked if "m2?" in question]
    assert len(two) == 2
    assert all("good m1?" in question and "bad m2?" in question for question in two)
    (of,) = out["benchmark"]
    assert [of[key] for key in ("win", "tie", "loss")] == [4, 1, 0]
    assert of["win_rate_adjusted"] == 0.9
    assert of["turn_2"]["win_rate_adjusted"] == 0.75
    assert (out["wins"], out["ties"], out["contradictory"]) == (4, 1, 0.2)
    rows = lines(tmp_path / "run/model_judgment/m_pair.jsonl")
    assert {(row["model_1"], row["model_2"]) for row in rows} == {("one", "two")}
    (tie,) = [row for row in rows if row["question_id"] == 81 and row["turn"] == 2]
    assert (tie["g1_winner"], tie["g2_winner"]) == ("model_1", "model_2")
    assert [row["g2_winner"] for row in rows if row is not tie] == ["model_1"] * 4


def test_mt_bench_that_makes_no_sense(mt_bench, tmp_path):
    odd = write(tmp_path / "odd.jsonl", [{"question_id": 999, "choices": [{"turns": ["x"]}]}])
    short = write(tmp_path / "short.jsonl", [{"question_id": 81, "choices": [{"turns": ["x"]}]}])
    no_turns = write(tmp_path / "none.jsonl", [{"question_id": 81, "choices": "x"}])
    three = write(tmp_path / "three.jsonl", [QUESTIONS[0] | {"turns": ["a", "b", "c"]}])
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "p", "response": "r"}])
    for changes, words in [
        ({"references": ""}, "question 111 (math) needs a reference answer"),
        ({"questions": ""}, "needs FastChat's question.jsonl"),
        ({"responses": (odd,)}, "question 999 is not in"),
        ({"responses": (short,)}, "question 81 has 1 answers to 2 turns"),
        ({"responses": (no_turns,)}, "no choices with turns"),
        ({"responses": (plain,)}, "row 1: no 'question_id' among"),
        ({"questions": three}, "turns must be one or two texts"),
        ({"mode": "mt-bench-pairwise", "responses": mt_bench["responses"][:1]}, "two files or more"),
        ({"mode": "pairwise"}, "--questions is for MT-Bench"),
        ({"judgements": (plain,), "responses": (), "judge_model": ()}, "no 'question_id' among"),
        ({"judgements": (plain,)}, "leave out --responses"),
    ]:
        flags = {"mode": "mt-bench"} | mt_bench | changes
        out, error = run(NOWHERE, (), tmp_path / "run", **flags)
        assert out is None
        assert error and words in error and "\n" not in error, error


# --- Arena-Hard ----------------------------------------------------------------------------------------


def arena(name, texts, system=False):
    """Rows of arena-hard-auto's model_answer."""
    rows = []
    for i, text in enumerate(texts):
        messages = [{"role": "system", "content": "Be brief."}] if system else []
        messages += [
            {"role": "user", "content": f"q{i}?"},
            {"role": "assistant", "content": {"answer": text}},
        ]
        rows.append({"uid": f"u{i}", "ans_id": "x", "model": name, "messages": messages, "tstamp": 0.0})
    return rows


def test_arena_hard(tmp_path):
    """Both orders, five levels; the tool's file has the baseline as A in its first game; the number is the one of
    that file. Equal answers are a tie that nobody is asked about."""
    pytest.importorskip("openai", reason="pip install openai")
    files = (
        write(tmp_path / "one.jsonl", arena("dvpo", ["very good", "good", "bad", "same", "lost"])),
        write(tmp_path / "two.jsonl", arena("sft", ["bad", "bad", "good", "same", "bad"], system=True)),
    )
    questions = [
        {"uid": f"u{i}", "category": "coding" if i else "math", "prompt": f"q{i}?"} for i in range(5)
    ]
    worth = {"very good": 3, "good": 2, "bad": 1, "same": 1}

    def script(question, *_):
        assert "Be brief" not in question
        a, b = (conversation(question, letter) for letter in "ab")
        if "lost" in (a, b):
            return "Who knows."
        gap = worth[a] - worth[b]
        return "So: [[" + {2: "A>>B", 1: "A>B", 0: "A=B", -1: "B>A", -2: "B>>A"}[gap] + "]]"

    flags = dict(mode="arena-hard", questions=write(tmp_path / "question.jsonl", questions))
    with serving(script) as server:
        out, error = run(server, files, tmp_path / "run", **flags)
    assert error is None
    assert len(server.asked) == 8
    rows = {row["uid"]: row for row in lines(tmp_path / "run/model_judgment/m/dvpo.jsonl")}
    assert set(rows["u0"]) == {"uid", "category", "judge", "model", "baseline", "games"}
    assert [game["score"] for game in rows["u0"]["games"]] == ["B>>A", "A>>B"]
    assert [game["score"] for game in rows["u3"]["games"]] == ["A=B", "A=B"]
    assert [game["score"] for game in rows["u4"]["games"]] == [None, None]
    shown = rows["u0"]["games"][0]["prompt"][-1]["content"]
    assert conversation(shown, "a") == "bad"  # the baseline
    by_category = {of["category"]: of for of in out["benchmark"]}
    assert by_category["math"]["win_rate"] == 1.0
    assert by_category["coding"]["win_rate"] == pytest.approx((2 * 1 + 0 * 2 + 2 * 0.5) / 6)
    assert by_category["coding"]["unparsable"] == 1
    assert (out["wins"], out["ties"], out["losses"]) == (2, 1, 1)
    file = str(tmp_path / "run/model_judgment/m/dvpo.jsonl")
    flags = dict(mode="arena-hard", judgements=(file,), responses=(), judge_model=())
    again, error = run(NOWHERE, (), tmp_path / "again", **flags)
    assert error is None
    assert again["benchmark"] == out["benchmark"]


def test_arena_hard_against_two_baselines(tmp_path):
    """Their judgements are in two folders: show_result would take those of one for one comparison."""
    pytest.importorskip("openai", reason="pip install openai")
    files = [("dvpo", "good"), ("sft", "bad"), ("ppo", "good too")]
    files = tuple(write(tmp_path / f"{name}.jsonl", arena(name, [word])) for name, word in files)
    with serving(lambda *_: "[[A>B]]") as server:
        out, error = run(server, files, tmp_path / "run", mode="arena-hard")
    assert error is None
    assert [of["against"] for of in out["benchmark"]] == ["sft", "ppo"]
    for baseline in ("sft", "ppo"):
        (row,) = lines(tmp_path / f"run/model_judgment/m_against_{baseline}/dvpo.jsonl")
        assert row["baseline"] == baseline
    assert len(list((tmp_path / "run/model_judgment").rglob("*.jsonl"))) == 2


def test_arena_hard_judgements_that_are_none(tmp_path):
    row = {"uid": "u", "category": "c", "judge": "j", "model": "m", "games": [{"score": "A>B"}] * 2}
    flags = dict(mode="arena-hard", responses=(), judge_model=())
    for rows, words in [
        ([row | {"games": [{"score": "A>C"}] * 2}], "row 1: the verdict 'A>C' is none of"),
        ([row, row | {"games": [None]}], "row 2: games must be two"),
        ([row | {"games": ["x", None]}], "row 1: a game is str, not an object"),
        ([row | {"model": "j"}], "of a judge on itself"),
    ]:
        file = write(tmp_path / "a.jsonl", rows)
        out, error = run(NOWHERE, (), tmp_path / "run", judgements=(file,), **flags)
        assert out is None
        assert words in error and "\n" not in error, error


def test_answers_in_arena_hards_form(tmp_path):
    """What evaluate.py responses writes is what the judge reads again, text and chat prompts."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chat += [{"role": "user", "content": "and?"}]
    rows = [
        {"row": 1, "sample": 0, "prompt": "p", "turns": ["p"], "uid": "abc"},
        {"row": 1, "sample": 1, "prompt": "p", "turns": ["p"], "uid": "abc"},
        {"row": 2, "sample": 0, "prompt": chat, "turns": [chat]},
    ]
    records = [{"response": text} for text in ("first", "second sample", "third")]
    benchmarks.export(tmp_path, "dvpo", rows, records, "data")
    found = lines(tmp_path / "arena_hard.jsonl")
    assert [(row["uid"], row["model"]) for row in found] == [("abc", "dvpo"), ("2", "dvpo")]
    # gen_judgment.py reads messages[-1]["content"]["answer"]
    assert [row["messages"][-1]["content"]["answer"] for row in found] == ["first", "third"]
    assert found[1]["messages"][:-1] == chat
    from evaluation.judge import read_responses

    name, read = read_responses(str(tmp_path / "arena_hard.jsonl"))
    assert name == "dvpo"
    assert list(read.values()) == ["first", "third"]
    assert list(read)[0] == "p"


# --- several judges and files --------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Three models' answers to ten prompts: the first is better than the second for 7, than the third for 2."""
    files = []
    for name, good in (("rpo", 7), ("sft", 0), ("dro", 20)):
        rows = []
        for i in range(10):
            word = "good" if i < good else "bad"
            if name == "sft" and i >= 7:
                word = "good"
            if name == "dro" and i < 2:
                word = "awful"
            rows.append({"prompt": f"q{i}?", "response": f"{name} {word} {i}", "model": name})
        files.append(write(tmp_path / f"{name}.jsonl", rows))
    return tuple(files)


WORTH = {"good": 2, "bad": 1, "awful": 0}


def by_worth(question, *_):
    a, b = (WORTH[conversation(question, letter).split()[1]] for letter in "ab")
    return "Verdict: " + ("A" if a > b else "B" if b > a else "neutral")


def test_two_judges_and_three_files(three, tmp_path, monkeypatch, capsys):
    """Each judge at its endpoint with its key, each question once; the first file against the others; agreement
    of outcomes; one table. A judge that always says A agrees by chance."""
    pytest.importorskip("openai", reason="pip install openai")
    monkeypatch.setenv("KEY_ONE", "sk-first-key")
    monkeypatch.setenv("KEY_TWO", "sk-second-key")
    flags = dict(judge_model=("gpt", "claude"), key_variable=("KEY_ONE", "KEY_TWO"))
    with serving(by_worth) as one, serving(lambda *_: "sk-first-key\nVerdict: A") as two:
        flags["endpoint"] = (one.endpoint, two.endpoint)
        out, error = run(NOWHERE, three, tmp_path / "run", **flags)
    assert error is None
    for server, key, model in ((one, "sk-first-key", "gpt"), (two, "sk-second-key", "claude")):
        assert len(server.asked) == len(set(server.asked)) == 40
        assert set(server.keys) == {f"Bearer {key}"}
        assert {body["model"] for body in server.bodies} == {model}
    assert sorted(one.asked) == sorted(two.asked)
    gpt, claude = out["judges"]
    rates = [(of["first"], of["second"], of["win_rate"]) for of in gpt["comparisons"]]
    assert rates == [("rpo", "sft", pytest.approx(0.7)), ("rpo", "dro", pytest.approx(0.45))]
    assert [of["ties"] for of in claude["comparisons"]] == [10, 10]
    sft, dro = out["agreement"]
    assert (sft["judges"], sft["second"], sft["share"], sft["kappa"]) == (["gpt", "claude"], "sft", 0.0, 0.0)
    assert (dro["second"], dro["n"], dro["share"]) == ("dro", 10, 0.5)
    said = capsys.readouterr().out
    assert "| win rate of rpo against | gpt | claude |" in said
    assert "| sft | 0.700 (0.397 to 0.892), 10 pairs | 0.500" in said
    results = lines(tmp_path / "run/results.jsonl")
    assert len(results) == 40
    assert {(row["judge"], *row["files"]) for row in results} == {
        (judge, "rpo", other) for judge in ("gpt", "claude") for other in ("sft", "dro")
    }
    found = lines(tmp_path / "run/verdicts.jsonl")
    assert len(found) == 80
    for row in found:
        assert row["outputs"][0].startswith("rpo")
        assert row["outputs"][1].startswith(row["files"][1])
        assert row["answer"].startswith("Verdict: " if row["judge"] == "gpt" else "***\nVerdict: ")
        if row["judge"] == "gpt":
            seen = row["outputs"] if row["order"] == "AB" else row["outputs"][::-1]
            a, b = (WORTH[text.split()[1]] for text in seen)
            assert row["verdict"] == ("A" if a > b else "B" if b > a else "neutral")
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert "-key" not in file.read_text()


def test_a_judge_that_refuses_leaves_the_other_its_numbers(three, tmp_path):
    pytest.importorskip("openai", reason="pip install openai")
    refused = (401, {}, '{"error": {"message": "no"}}')
    with serving(lambda *_: refused) as one, serving(by_worth) as two:
        flags = dict(judge_model=("a", "b"), endpoint=(one.endpoint, two.endpoint))
        out, error = run(NOWHERE, three[:2], tmp_path / "run", **flags)
        assert "a: 20 of 20 judgements are missing (HTTP 401" in error
        assert "b:" not in error
        a, b = out["judges"]
        assert a["comparisons"][0]["win_rate"] is None
        assert b["comparisons"][0]["win_rate"] == pytest.approx(0.7)
        assert out["agreement"][0]["n"] == 0
        failures = [row["failure"] for row in lines(tmp_path / "run/verdicts.jsonl") if row["judge"] == "a"]
        assert len(failures) == 20 and all("HTTP 401" in failure for failure in failures)
        one.script = by_worth
        two.asked.clear()
        out, error = run(NOWHERE, three[:2], tmp_path / "run", **flags)
    assert error is None
    assert two.asked == []
    assert (out["agreement"][0]["share"], out["agreement"][0]["kappa"]) == (1.0, 1.0)


@pytest.mark.parametrize("mode", ["pairwise", "arena-hard", "mt-bench", "mt-bench-pairwise"])
def test_two_judges_that_behave_badly(three, mt_bench, tmp_path, mode):
    """Every first try of both fails, in all ways by turns; each question is judged once by each."""
    pytest.importorskip("openai", reason="pip install openai")
    faults = [
        (429, {"retry-after": "0.01"}, "{}"),
        (500, {}, "oops"),
        (200, {}, '{"choices": [{"mess'),
        (200, {}, ""),
        (200, {"content-type": "text/html"}, "<html>"),
        "cut",
        "half",
    ]
    verdict = {"arena-hard": "[[A>B]]", "mt-bench": "[[7]]"}.get(mode, "[[A]]")

    def script(question, number, before):
        return verdict if before else faults[number % len(faults)]

    flags = dict(judge_model=("a", "b"), mode=mode, responses=three)
    wanted = 40
    if mode.startswith("mt-bench"):
        flags |= mt_bench
        wanted = 10
    with serving(script) as one, serving(script) as two:
        flags["endpoint"] = (one.endpoint, two.endpoint)
        out, error = run(NOWHERE, (), tmp_path / "run", **flags)
    assert error is None
    assert [judge["judgements"]["valid"] for judge in out["judges"]] == [wanted, wanted]
    assert len(one.asked) == len(two.asked) == 2 * wanted
    found = lines(tmp_path / "run/verdicts.jsonl")
    assert len({(row["judge"], row["prompt"], *row["outputs"], row["order"]) for row in found}) == 2 * wanted
    assert len(lines(tmp_path / "run/judgements.jsonl")) == 2 * wanted
    names = {"pairwise": 0, "arena-hard": 4, "mt-bench": 2, "mt-bench-pairwise": 2}
    assert len(list((tmp_path / "run").glob("model_judgment/**/*.jsonl"))) == names[mode]


def test_judges_that_make_no_sense(three, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-key")
    two = ("http://127.0.0.1:9/v1", "http://127.0.0.2:9/v1")
    for changes, words in [
        ({"judge_model": ()}, "--judge-model: name a judge"),
        ({"judge_model": ("m", "m")}, "a judge is named twice"),
        ({"judge_model": ("a", "b", "c"), "endpoint": two}, "--endpoint: give one for all judges"),
        ({"judge_model": ("a", "b"), "endpoint": two}, "would go to several servers"),
        ({"judge_model": ("a",), "key_variable": ("A", "B")}, "--key-variable: give one"),
        ({"responses": (three[0], three[0])}, "a file is named twice"),
        ({"responses": ()}, "--responses: give files"),
        ({"endpoint": ("http://user:secret-word@/v1",)}, "begins with http"),
        ({"endpoint": ("http://localhost/v1?key=secret-word",)}, "must have no ?"),
    ]:
        out, error = run(NOWHERE, three, tmp_path / "run", **changes)
        assert out is None
        assert error and words in error and "\n" not in error, error
        assert "secret-word" not in error and "sk-test-key" not in error


# --- before and around ---------------------------------------------------------------------------------


def test_dry_run(three, tmp_path, capsys):
    """The number of questions, rough tokens of what is read, the most that may be written; nothing is asked, no
    package is needed, no file is made."""
    flags = dict(judge_model=("a", "b"), dry_run=True, max_tokens=100)
    out, error = run(NOWHERE, three, tmp_path / "run", **flags)
    assert (out, error) == (None, None)
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].startswith("a: 40 questions to ask, 0 in the cache; about ")
    assert said[0].endswith("answers of at most 100 tokens each, 4,000 in all")
    tokens = int(re.search("about ([0-9,]+) tokens", said[0])[1].replace(",", ""))
    prompt = verdicts.fill(verdicts.PAIRWISE, prompt="q0?", answer_a="rpo good 0", answer_b="sft bad 0")
    assert tokens == pytest.approx(40 * len(prompt) / 4, rel=0.01)


def test_the_estimate_counts_what_is_in_the_cache(three, tmp_path, capsys):
    pytest.importorskip("openai", reason="pip install openai")
    with serving(by_worth) as server:
        run(server, three[:2], tmp_path / "run", prompts=4)
        capsys.readouterr()
        run(server, three[:2], tmp_path / "run", dry_run=True)
        assert "m: 12 questions to ask, 8 in the cache" in capsys.readouterr().out
        assert len(server.asked) == 8
        extra = '{"max_tokens": null}'
        run(server, three[:2], tmp_path / "run", dry_run=True, extra=extra)
    assert "20 questions to ask, 0 in the cache" in (said := capsys.readouterr().out)
    assert said.rstrip().endswith("answers without a limit")


KEY = "sk-very-secret-key"
PASSWORD = "pass%40word"
CODED = base64.b64encode(b"user:pass@word").decode()


@pytest.mark.parametrize(
    "place", ["answer", "refused", "busy", "no completion", "finish reason", "cut in half"]
)
@pytest.mark.parametrize("login", ["key", "password"])
def test_no_key_in_any_file_or_line(three, tmp_path, monkeypatch, capfd, place, login):
    """Nor a password of the endpoint, though the server sends back all that it was sent."""
    pytest.importorskip("openai", reason="pip install openai")
    echo = f"you sent {KEY} and pass@word and {PASSWORD} and {CODED}"

    def script(*_):
        if place == "answer":
            return f"{echo}\nVerdict: A"
        if place == "refused":
            return 401, {}, json.dumps({"error": {"message": echo}})
        if place == "busy":
            return 429, {}, json.dumps({"error": {"message": echo}})
        if place == "no completion":
            return 200, {}, json.dumps({"choices": [], "note": echo})
        if place == "cut in half":  # a line on the screen has at most 300 characters of it
            return 401, {}, json.dumps({"error": "x" * 270 + echo})
        message = {"role": "assistant", "content": "Verdict: A"}
        return 200, {}, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": echo}]})

    if login == "key":
        monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # as $(cat file) leaves it in some shells
    with serving(script) as server:
        endpoint = server.endpoint
        if login == "password":
            endpoint = endpoint.replace("http://", f"http://user:{PASSWORD}@")
        _, error = run(endpoint, three[:2], tmp_path / "run", tries=2)
        sent = set(server.keys)
    assert sent == {f"Bearer {KEY}" if login == "key" else f"Basic {CODED}"}
    secrets = ["sk-very"] if login == "key" else ["pass@", "pass%", CODED[:8]]
    texts = [str(error), *capfd.readouterr()]
    texts += [file.read_text() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(texts) > 3
    for text in texts:
        for secret in secrets:
            assert secret not in text
    if place in ("answer", "finish reason"):
        assert error is None
        assert all(row["verdict"] == "A" for row in lines(tmp_path / "run/verdicts.jsonl"))
    else:
        assert error.startswith("error: http://127.0.0.1:")
