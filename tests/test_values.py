"""evaluate.py values: the table a run logged, statistics by hand, subsets, files of others, pictures."""

import functools
import json

import helpers
import numpy as np
import pytest

from common import distributed
from common.measures import response_statistics
from evaluation import values as asked
from evaluation.reward_bench import NO_TIES_SCORE

TINY = ["--steps", "3", "--save-every", "0", "--eval-every", "0"]


@pytest.fixture(scope="session")  # as `world` is: pytest-xdist may leave a module and come back
def runs(world):
    """A GVM from pairs, one from scores with context on held-out scores, and a reward model."""
    world.command("gvm_td", *TINY, "--run-dir", "runs/v-pairs", "--source", "preference").ok()
    scored = ["--dataset", "scored.jsonl", "--source", "scores"]
    scored += ["--eval-fraction", "0.3", "--eval-gap", "0.5"]
    scored += ["--context-pairs", "2", "--context-length", "8", "--normalise-values"]
    scored += ["--max-prompt-length", "24", "--max-response-length", "9"]
    scored += ["--lr", "1e-3", "--seed", "5", "--precision", "fp64"]
    world.command("gvm_td", *TINY, "--run-dir", "runs/v-scores", *scored).ok()
    world.command(
        "reward", *TINY, "--run-dir", "runs/v-reward", "--dataset", "pairs.jsonl", "--eval-fraction", "0.3"
    ).ok()
    return world


def table(world, run_dir):
    return json.loads(world.path(f"{run_dir}/values.json").read_text())["accuracy"]


@pytest.mark.parametrize("run, precision", [("v-pairs", "fp32"), ("v-scores", "fp64")])
def test_the_table_of_a_gvm_is_the_one_its_run_logged(runs, run, precision):
    """To the last digit, baselines too: the same held-out pairs, context, length limits and sums."""
    argv = ["--models", f"runs/{run}/model", "--run-dir", f"runs/{run}-judged", "--precision", precision]
    runs.command("evaluate", "values", *argv).ok()
    logged = json.loads(runs.path(f"runs/{run}/accuracy.json").read_text())
    found = table(runs, f"runs/{run}-judged")
    mine = found[f"runs/{run}/model"]
    shares = {key: mine["all"][key] for key in asked.STATISTICS}
    assert shares == {key: logged[key] for key in asked.STATISTICS}
    assert mine["all"]["pairs"] == logged["pairs"] > 0
    assert len(set(shares.values())) > 1
    assert found["baseline: the longer one"]["all"]["score"] == logged["baseline_length"]
    assert found["baseline: the better policy"]["all"]["score"] == logged["baseline_policy"]


def test_a_reward_model_and_a_critic_on_the_pairs_of_a_run(runs):
    """The reward model's accuracy is the one reward.py logged; --like judges any model on the same pairs."""
    argv = ["--models", "runs/v-reward/model", "runs/v-pairs/model"]
    argv += ["--like", "runs/v-reward", "--run-dir", "runs/v-like"]
    runs.command("evaluate", "values", *argv).ok()
    logged = json.loads(runs.path("runs/v-reward/accuracy.json").read_text())
    found = table(runs, "runs/v-like")
    reward = found["runs/v-reward/model"]["all"]
    gvm = found["runs/v-pairs/model"]["all"]
    # float32 there
    assert reward == {
        "score": pytest.approx(logged["accuracy"], abs=1e-7),
        "pairs": logged["pairs"],
    }
    assert gvm["pairs"] == logged["pairs"]
    assert "score" not in gvm
    assert found["baseline: the longer one"]["all"]["score"] == logged["baseline_length"]


def test_statistics_and_backup_by_hand():
    """Ragged responses against numpy and against the equation; a response of one token has one value for
    everything."""
    rng = np.random.default_rng(0)
    pairs = [
        (rng.normal(size=n).tolist(), rng.normal(size=m).tolist())
        for n, m in ((1, 7), (5, 1), (40, 3), (2, 2), (1, 1))
    ]
    found = asked.accuracies(pairs, 0.9, 0.7)

    def last(q):
        return q[-1]

    def by_hand(q):  # G_T = Q_T; G_t = gamma ((1 - lam) Q_{t+1} + lam G_{t+1}); (1 - lam) Q_1 + lam G_1
        def g(t):
            return q[-1] if t == len(q) - 1 else 0.9 * (0.3 * q[t + 1] + 0.7 * g(t + 1))

        return 0.3 * q[0] + 0.7 * g(0)

    measures = {"mean": np.mean, "last": last, "backup": by_hand}
    for percent in (1, 5, 10, 90, 95, 99):
        measures[f"p{percent}"] = functools.partial(np.percentile, q=percent)
    for name, measure in measures.items():
        assert found[name] == pytest.approx(np.mean([measure(a) > measure(b) for a, b in pairs])), name
        assert asked.backup([0.25], 0.9, 0.7) == pytest.approx(0.25)
    q = rng.normal(size=6).tolist()
    assert asked.backup(q, 0.9, 0.7) == pytest.approx(by_hand(q))
    assert asked.backup(q, 1.0, 1.0) == q[-1]
    assert asked.backup(q, 1.0, 0.0) == q[0]
    tie = [0.5, 1.5]
    assert set(asked.accuracies([(tie, tie)], 1.0, 0.95).values()) == {0.0}  # ties are not wins


def test_subsets():
    """Per-subset shares, and an average over subsets that does not depend on their sizes; rows without a
    subset count in all."""

    def right(pairs):
        return {"last": float(np.mean(pairs))}

    found = asked.by_subset(right, [1, 1, 1, 0, 0], ["chat", "chat", "chat", "code", None])
    assert {name: (row["last"], row["pairs"]) for name, row in found.items()} == {
        "all": (0.6, 5),
        "chat": (1.0, 3),
        "code": (0.0, 1),
        "average": (0.5, 4),
    }
    assert list(asked.by_subset(right, [1], [None])) == ["all"]


def test_rewardbench_file_and_pictures(runs):
    """A file as RewardBench has it, with an answer of one word; pictures of pairs and of any text; values
    kept by pair."""
    great = "the soup was great ."
    word = "."
    awful = "the soup was awful ."
    long = "the wine was very good and the soup was dull ."
    rows = []
    for i, (chosen, rejected, subset) in enumerate(
        [(great, word, "x"), (awful, long, "y"), (long, word, "y")]
    ):
        row = {"prompt": "lunch : the soup and the wine ?", "chosen": chosen, "rejected": rejected}
        rows.append(row | {"subset": subset, "chosen_model": "m", "id": i})
    file = runs.write("rewardbench.jsonl", rows)
    text = ["--text", "lunch : the soup and the wine ?", "the soup was great .", "the wine was bad ."]
    argv = ["--models", "reviews", "runs/v-reward/model", "--dataset", file]
    argv += ["--run-dir", "runs/v-bench", "--draw", "1", *text]
    output = runs.command("evaluate", "values", *argv).ok().output
    found = table(runs, "runs/v-bench")
    assert {name: row["pairs"] for name, row in found["reviews"].items()} == {
        "all": 3,
        "x": 1,
        "y": 2,
        "average": 3,
    }
    assert list(found["runs/v-reward/model"]["x"]) == ["score", "pairs"]
    assert found["baseline: the longer one"]["y"]["score"] == 0.5
    assert "baseline: the better policy" not in found
    page = runs.path("runs/v-bench/values.html").read_text()
    assert page.count("<h4>") == 4
    assert "great" in page
    assert runs.path("runs/v-bench/values.png").stat().st_size > 5000
    assert "reviews: x | 1 |" in output
    kept = [json.loads(line) for line in runs.path("runs/v-bench/values.jsonl").read_text().splitlines()]
    assert len(kept) == 6
    assert [len(row["rejected_values"]) for row in kept[:3]] == [2, 12, 2]
    assert response_statistics(kept[0]["chosen_values"])["last"] == kept[0]["chosen_values"][-1]


def test_rewardbenchs_sections(runs):
    """Rows of sections for every model and baseline, and what is missing of the benchmark, in the notes."""
    rows = []
    for i, name in enumerate(["hep-cpp", "math-prm", "math-prm", "alpacaeval-easy"]):
        good, bad = ("the soup was great .", "the soup was awful .")[:: 1 if i != 1 else -1]
        rows.append(
            {"prompt": "lunch : the soup ?", "chosen": good, "rejected": bad, "subset": name, "id": i}
        )
    file = runs.write("sections.jsonl", rows)
    argv = ["--models", "reviews", "runs/v-reward/model", "--dataset", file, "--draw", "0"]
    output = runs.command("evaluate", "values", *argv, "--run-dir", "runs/v-sections").ok().output
    found = table(runs, "runs/v-sections")
    assert list(found["reviews"]) == ["all", "alpacaeval-easy", "hep-cpp", "math-prm", "average"] + [
        "section Chat",
        "section Reasoning",
    ]
    mine = found["reviews"]
    weighted = (984 * mine["math-prm"]["mean"] + 164 * mine["hep-cpp"]["mean"]) / 1148
    assert mine["section Reasoning"]["mean"] == pytest.approx(weighted)
    assert 0 < weighted < 1
    assert mine["section Reasoning"]["pairs"] == 3
    assert found["baseline: the longer one"]["section Chat"] == {"score": 0.0, "pairs": 1}
    assert set(found["runs/v-reward/model"]["section Reasoning"]) == {"score", "pairs"}
    assert "reviews: RewardBench: no subset of the section Safety, so no total" in output
    assert "runs/v-reward/model: RewardBench: math-prm has 2 pairs here and 447 in the benchmark" in output


GREAT = "the soup was great ."
GOOD = "the soup was good and the wine was lovely ."
AWFUL = "the soup was awful ."
BAD = "the wine was bad and the soup was dull ."


def version_2_rows():
    """RewardBench 2 in small, in the columns of its file: each subset, a long prompt, Ties with both rows."""
    rows = []
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        for chosen, rejected in ((GREAT, [AWFUL, BAD, "."]), (AWFUL, [GREAT, BAD, AWFUL])):
            rows.append({"id": str(len(rows)), "subset": subset, "chosen": [chosen], "rejected": rejected})
    rows.append({"id": "ref:0", "subset": "Ties", "chosen": [GREAT], "rejected": [AWFUL, BAD]})
    rows.append({"id": "tied:0", "subset": "Ties", "chosen": [GREAT, GOOD], "rejected": [AWFUL, BAD]})
    for row in rows:
        right = len(row["chosen"])
        wrong = len(row["rejected"])
        row |= {"prompt": "lunch : the soup and the wine ?", "models": ["m"], "additional_metadata": None}
        row |= {"num_correct": right, "num_incorrect": wrong, "total_completions": right + wrong}
    return rows


def test_rewardbench_2(runs):
    """The table is what the values in values.jsonl give; all columns, a reward model and the baseline in one table."""
    rows = version_2_rows()
    long = {**rows[0], "prompt": "lunch : " + "the soup and the wine and " * 40 + "?"}
    file = runs.write("version2.jsonl", [*rows, long])
    argv = ["--models", "reviews", "runs/v-reward/model", "--dataset", file, "--source", "best-of"]
    argv += ["--run-dir", "runs/v-two", "--draw", "1", "--max-prompt-length", "64"]
    output = runs.command("evaluate", "values", *argv).ok().output
    assert "dropped 4 of 51 rows: prompt longer than --max-prompt-length 64" in output
    assert "| share of prompts | prompts | mean |" in output
    assert "| reviews: RewardBench 2 | 12 |" in output
    found = table(runs, "runs/v-two")
    subsets = ["Factuality", "Focus", "Math", "Precise IF", "Safety", "Ties"]
    for name in ("reviews", "runs/v-reward/model", "baseline: the longer one"):
        assert list(found[name]) == ["all", *subsets, "RewardBench 2"]
        total = np.mean([found[name][subset].get("score", 0.0) for subset in subsets])
        assert found[name]["RewardBench 2"].get("score", 0.0) == pytest.approx(total)
    # the chosen answer of every second row is as long as a rejected one, and a longer one is there
    assert found["baseline: the longer one"]["Math"] == {"score": 0.0, "prompts": 2}

    kept = [json.loads(line) for line in runs.path("runs/v-two/values.jsonl").read_text().splitlines()]
    kept = [row for row in kept if row["model"] == "reviews"]
    assert [row["id"] for row in kept] == [row["id"] for row in rows]
    assert [len(values) for values in kept[0]["rejected_values"]] == [6, 11, 2]
    assert (kept[-1]["chosen"], kept[-1]["rejected"]) == ([GREAT, GOOD], [AWFUL, BAD])
    for column, score in (
        ("last", lambda q: q[-1]),
        ("mean", np.mean),
        ("p90", lambda q: np.percentile(q, 90)),
    ):
        wins = []
        for row in kept:
            if row["subset"] == "Math":
                best = max(score(values) for values in row["rejected_values"])
                mine = score(row["chosen_values"][0])
                wins.append(1.0 if mine > best else 0.5 if mine == best else 0.0)
        assert found["reviews"]["Math"][column] == np.mean(wins)
    ref, tied = kept[-2:]
    lowest = min(values[-1] for values in tied["chosen_values"])
    highest = max(values[-1] for values in tied["chosen_values"])
    lead = lowest - max(values[-1] for values in tied["rejected_values"])
    ref_lead = ref["chosen_values"][0][-1] - max(values[-1] for values in ref["rejected_values"])
    smaller = min(lead, ref_lead)
    spread = highest - lowest
    expected = 0.3 * (lead > 0) + 0.3 * (ref_lead > 0) + 0.2 * (lead > spread) + 0.2 * (smaller > spread)
    expected += 0.01 * np.tanh(smaller / spread - 1)
    assert found["reviews"]["Ties"]["last"] == pytest.approx(expected)
    assert runs.path("runs/v-two/values.html").read_text().count("<h4>") == 2


def test_a_prompt_goes_as_a_whole(runs):
    """One long answer takes all answers of its prompt along; half of Ties is said; a sample is one of prompts."""
    file = runs.write("whole.jsonl", version_2_rows())
    argv = ["--models", "reviews", "--dataset", file, "--source", "best-of", "--draw", "0"]
    argv += ["--run-dir", "runs/v-whole"]
    output = runs.command("evaluate", "values", *argv, "--max-characters", str(len(BAD))).ok().output
    assert "dropped 4 of 47 rows: response over --max-characters" in output
    assert f"reviews: RewardBench: {NO_TIES_SCORE}" in output
    found = table(runs, "runs/v-whole")["reviews"]
    assert "Ties" not in found and "RewardBench 2" not in found
    assert found["average"]["prompts"] == 10
    runs.command("evaluate", "values", *argv, "--max-pairs", "5").ok()
    assert len(runs.path("runs/v-whole/values.jsonl").read_text().splitlines()) == 5


def test_a_prompt_without_one_of_its_answers_is_left_out(capsys):
    """As its accuracy would be one of fewer answers, or of another right one."""
    rows = [{"group": group, "answer": i, "answers": 3} for group in (0, 1, 2) for i in range(3)]
    del rows[3]
    whole = asked.whole_groups(rows)
    assert [group[0]["group"] for group in whole] == [0, 2]
    assert [len(group) for group in whole] == [3, 3]
    assert "dropped 1 prompts of 3 of which an answer was dropped" in capsys.readouterr().out


def test_prompts_that_fit_no_rule_are_dropped_and_counted(runs):
    row = {"prompt": "lunch ?", "chosen": [GREAT], "rejected": [AWFUL]}
    bad = [row | {"chosen": [GREAT, GOOD]}, row | {"subset": "Ties", "id": "9"}, row | {"num_correct": 2}]
    file = runs.write("unfit.jsonl", [bad[0], row, *bad[1:], row])
    argv = ["--dataset", file, "--source", "best-of", "--skip-bad-rows", "--run-dir", "runs/v-unfit"]
    output = runs.command("evaluate", "values", *argv).ok().output
    assert "dropped 1 bad rows of 5" in output
    assert "dropped 2 prompts of 4 that RewardBench 2's rules do not fit" in output
    assert table(runs, "runs/v-unfit")["reviews"]["all"]["prompts"] == 2


def test_ranks_judge_alike(runs):
    """Three processes and micro-batches of one give the table of one process."""
    argv = dict(models=("reviews",), like="runs/v-reward", precision="fp64", draw=0)
    script = asked.Values(**argv)
    assert script.like == "runs/v-reward"
    for n, size in ((0, 8), (3, 1)):
        call = Call(argv | dict(run_dir=f"runs/v-ranks-{n}", micro_batch_size=size))
        result = helpers.Job(runs.folder, call, n).wait().ok()
        assert result.output.count("| reviews |") == 1  # rank 0 alone speaks
    alone = runs.path("runs/v-ranks-0/values.jsonl").read_text().splitlines()
    together = runs.path("runs/v-ranks-3/values.jsonl").read_text().splitlines()
    for one, other in zip(map(json.loads, alone), map(json.loads, together), strict=True):
        assert one["chosen"] == other["chosen"]
        np.testing.assert_allclose(one["chosen_values"], other["chosen_values"], rtol=0, atol=1e-12)
    assert table(runs, "runs/v-ranks-0") == table(runs, "runs/v-ranks-3")


class Call:
    """What a rank does: picklable."""

    def __init__(self, args):
        self.args = args

    def __call__(self):
        distributed.launch(asked.values, asked.Values(**self.args))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--models", "runs/nothing/model"], "no model folder there"),
        (["--models", "runs/v-pairs/model", "--like", "runs"], "no run of gvm_td.py or reward.py is there"),
        (["--dataset", "pairs.jsonl", "--like", "runs/v-pairs"], "exclude each other"),
        (["--dataset", "pairs.jsonl", "--text", "lunch ?"], "give a prompt and at least one response"),
        (["--dataset", "empty.jsonl"], "row 1: rejected is empty"),
        (["--dataset", "scored.jsonl", "--source", "scores", "--gap", "99"], "no two responses"),
        (["--dataset", "pairs.jsonl", "--models", "runs/v-policy"], "no head that was trained"),
        (["--dataset", "two.jsonl"], "row 1: chosen is a list of answers, as in RewardBench 2"),
        (["--dataset", "pairs.jsonl", "--source", "best-of"], "row 1: chosen is str, not a list of texts"),
        (["--dataset", "two.jsonl", "--source", "best-of"], "row 2: chosen has 2 answers; only rows"),
        (["--dataset", "half.jsonl", "--source", "best-of"], NO_TIES_SCORE),
        (["--dataset", "pairs.jsonl", "--reward", "m:f"], "--reward scores the responses of --source scores"),
    ],
)
def test_bad_input(runs, argv, message):
    runs.write("empty.jsonl", [{"prompt": "lunch ?", "chosen": "the soup was great .", "rejected": ""}])
    row = {"prompt": "lunch ?", "chosen": [GREAT], "rejected": [AWFUL]}
    runs.write("two.jsonl", [row, row | {"chosen": [GREAT, GOOD]}])
    runs.write("half.jsonl", [row | {"subset": "Ties", "id": "ref:0"}])
    if not runs.path("runs/v-policy").exists():
        helpers.edit_model(runs, "policy", "v-policy")
    assert message in runs.command("evaluate", "values", "--run-dir", "runs/v-bad", *argv).error()


def test_a_reward_model_of_another_padding_token_judges_the_same_in_any_batch(world):
    """It is read before the padding of its own config; the tokenizer's would move the place where it is read."""
    world.command("reward", *TINY, "--lr", "0.01", "--run-dir", "runs/v-padded").ok()
    config = world.path("runs/v-padded/model/config.json")
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"pad_token_id": 9}))  # a word
    found = []
    for size in ("1", "5000"):  # all in one batch: they are sorted by length, so that small ones pad little
        argv = ["--models", "runs/v-padded/model", "--like", "runs/v-padded", "--micro-batch-size", size]
        world.command("evaluate", "values", *argv, "--run-dir", f"runs/v-padded-{size}").ok()
        lines = world.path(f"runs/v-padded-{size}/values.jsonl").read_text().splitlines()
        found.append([json.loads(line)["chosen_values"] for line in lines])
    assert len(found[0]) > 4 and np.std(found[0]) > 0.01
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)
