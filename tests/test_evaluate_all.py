"""evaluate.py all: answers, values and verdicts of two models in one table and one page; what stops it, and how it goes on."""

import json

import pytest

pytest.importorskip("openai", reason="the judge needs openai: pip install openai")

from judge_server import serving


def prefers_long(question, number, before):
    """A judge's words: the answer with more characters is better."""
    a = question.partition("<answer_a>\n")[2].partition("\n</answer_a>")[0]
    b = question.partition("<answer_b>\n")[2].partition("\n</answer_b>")[0]
    verdict = "neutral"
    if len(a) != len(b):
        verdict = "A" if len(a) > len(b) else "B"
    return f"I counted <b>letters</b>.\nVerdict: {verdict}"


def flags(server, run_dir, *more):
    """The embedded policy beside one that was trained a little further, six prompts, one judge."""
    words = [
        "all",
        "--models",
        "reviews",
        "runs/evaluate_all_policy/model",
        "--names",
        "reviews",
        "trained",
        "--run-dir",
        run_dir,
    ]
    words += [
        "--judge-model",
        "long",
        "--endpoint",
        server.endpoint,
        "--responses-flags=--prompts 6 --batch-size 6",
    ]
    return [*words, "--judge-flags=--backoff 0.01 --tries 2", *more]


@pytest.fixture(scope="module")
def trained(world):
    """A policy after a few steps: other answers than the embedded one's."""
    world.run("sft", steps=3, lr=1e-2, run_dir="runs/evaluate_all_policy", eval_every=0).ok()


def lines(world, file):
    return [json.loads(line) for line in world.path(file).read_text().splitlines()]


def read(world, run_dir):
    folder = world.path(run_dir)
    return json.loads((folder / "all.json").read_text()), (folder / "all.html").read_text(encoding="utf-8")


def test_answers_values_and_verdicts_in_one_table(world, trained):
    with serving(prefers_long) as server:
        more = ["--gvm", "reviews", "--value-models", "reviews", "--values-flags=--draw 0"]
        found = world.command("evaluate", *flags(server, "runs/all", *more)).ok()
        asked = len(server.asked)
        again = world.command("evaluate", *flags(server, "runs/all", *more)).ok()
    assert "12 to be written" in found.output and "at the speed of reviews" in found.output
    assert "0 to be written" in again.output
    assert len(server.asked) == asked + 2  # the try of the judge alone

    result, page = read(world, "runs/all")
    answers = lines(world, "runs/all/answers/trained/responses.jsonl")
    assert result["answers"]["trained"]["length"]["n"] == len(answers) == 6
    rows = lines(world, "runs/all/judge/trained/results.jsonl")
    points = [
        1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5
        for a, b in (row["responses"] for row in rows)
    ]
    assert result["judge"]["long"]["trained"]["win_rate"] == pytest.approx(sum(points) / 6)
    assert result["values"]["reviews"]["all"]["mean"] > 0.9
    # the last values of the table are those of the values command's own reading of the answers
    assert -3 < result["answers"]["trained"]["last value"]["mean"] < 3
    table = world.path("runs/all/all.md").read_text()
    assert "win rate over reviews, long" in table and f"{sum(points) / 6:.3f}" in table

    # the page: six prompts, each with two answers in colour, a verdict and the judge's words, all escaped
    assert page.count("<section") == 6
    assert page.count('class="answer"') == 12
    assert page.count('class="verdict ') == 6
    assert page.count("&lt;b&gt;letters") == 2 * sum(a != b for a, b in (row["responses"] for row in rows))
    assert page.count('<i class="c') == sum(
        len(of_answer) for of_answer in token_values(world, "reviews", "trained")
    )


def token_values(world, *names):
    """Of each answer of the models the tokens with their values."""
    found = []
    for name in names:
        found += json.loads(world.path(f"runs/all/answers/{name}/token_values.json").read_text())["tokens"]
    return found


def test_the_page_shows_as_many_prompts_as_it_says(world, trained):
    with serving(prefers_long) as server:
        world.command("evaluate", *flags(server, "runs/all_four", "--page-prompts", "4")).ok()
    _, page = read(world, "runs/all_four")
    assert page.count("<section") == 4
    assert "2 more prompts" in page


def test_a_dry_run_spends_nothing(world, trained):
    with serving(prefers_long) as server:
        found = world.command("evaluate", *flags(server, "runs/all_dry", "--dry-run")).ok()
        assert not server.asked
    assert "at most 12 questions" in found.output
    assert not world.path("runs/all_dry").exists()


def test_a_judge_that_is_not_there_ends_the_run_before_any_answer(world, trained):
    def refuses(question, number, before):
        return 401, {}, '{"error": "no key"}'

    with serving(refuses) as server:
        found = world.command("evaluate", *flags(server, "runs/all_refused"))
    assert "no answer to a try; nothing was spent on answers yet" in found.output.splitlines()[-1]
    assert found.codes == [1]
    assert not world.path("runs/all_refused/answers").exists()


def test_a_judge_that_dies_loses_nothing(world, trained):
    def dies(question, number, before):
        return prefers_long(question, number, before) if number < 6 else (401, {}, "{}")

    with serving(dies) as server:
        found = world.command("evaluate", *flags(server, "runs/all_dies"))
    assert "judgements are missing (trained)" in found.output.splitlines()[-1]
    _, page = read(world, "runs/all_dies")
    assert page.count('class="verdict missing') > 0
    with serving(prefers_long) as server:
        world.command("evaluate", *flags(server, "runs/all_dies")).ok()
        assert len(server.asked) < 2 + 12
    _, page = read(world, "runs/all_dies")
    assert page.count('class="verdict missing') == 0


def test_two_ranks_write_the_same_answers(world, trained):
    with serving(prefers_long) as server:
        more = ("--gvm", "reviews")
        world.command("evaluate", *flags(server, "runs/all", *more)).ok()
        world.command("evaluate", *flags(server, "runs/all_ranks", *more), processes=2).ok()
    for name in ("reviews", "trained"):
        one, two = (
            [row["response"] for row in lines(world, f"{run}/answers/{name}/responses.jsonl")]
            for run in ("runs/all", "runs/all_ranks")
        )
        assert one == two
    assert read(world, "runs/all_ranks")[1].count('class="verdict ') == 6


@pytest.mark.parametrize(
    "more, error",
    [
        (["--models", "reviews", "--names", "one"], "nothing to compare"),
        (["--endpoint", "http://a/v1", "http://b/v1"], "2 of them for 1 judges"),
        (["--judge-model", "a/b", "a_b", "--endpoint", "http://a/v1"], "two judges of the same name"),
        (["--page-prompts", "-1"], "--page-prompts is -1; it must be at least 0"),
        (["--responses-flags=--models x"], "is a flag of `evaluate.py all` itself"),
        (["--responses-flags=--dataset x"], "--dataset is a flag of"),
        (["--responses-flags=--prompts '6"], "No closing quotation"),
    ],
)
def test_flags_that_do_not_fit(world, trained, more, error):
    with serving(prefers_long) as server:
        found = world.command("evaluate", *flags(server, "runs/all_wrong"), *more)
    assert error in found.error()
