"""paper/: the commands of the papers' tables, on the embedded world and on your own data; verdicts, and
tables put into a page."""

import dataclasses
import gzip
import importlib
import json
import random
import statistics
import types
from pathlib import Path

import helpers
import pytest

import evaluate
from common.cli import parse
from paper import decoding, frontiers, real_policies, real_values, report, tables, variants
from tools.jobs import Jobs


def parsed(words: list[str]):
    """The arguments of a command of one of our scripts, as the script would read them."""
    name, *flags = words
    if name == "evaluate.py":
        command, *flags = flags
        arguments, defaults, _ = evaluate.COMMANDS[command]
        return parse(arguments, defaults, flags)
    script = importlib.import_module(name.removesuffix(".py"))
    return parse(script.Args, script.REVIEWS, flags)


# --- on the embedded world ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_commands_of_the_papers_tables(quick, tmp_path):
    """Each table's jobs exist, what they need too, and every command is one its script accepts."""
    commands = tables.commands(quick)
    wanted = [(0, job) for table in report.TABLES.values() for job in table.jobs]
    jobs = Jobs(tmp_path, commands, wanted, set())
    names = {job.name for job in jobs.order}
    assert names == set(commands), set(commands) - names  # no job is made for nothing
    for job in jobs.order:
        words = jobs.words(job)
        for word in words:
            if str(tmp_path) in word and "/data/" not in word:
                folder = Path(word).relative_to(tmp_path)
                needed = folder.parts[1] if folder.parts[0] == "seed0" else folder.parts[0]
                assert needed in commands, word
        if words[0] == "paper/tables.py":
            continue
        args = parsed([*words, "--run-dir", "x"])
        if words[0] != "evaluate.py":
            assert dataclasses.asdict(args)["steps"] > 0
    timed = tables.timed(commands["ppo"])
    assert timed[timed.index("--steps") + 1] == "6"
    assert timed[timed.index("--eval-every") + 1] == "0"


@pytest.mark.parametrize("broken", ["", "sft", "dvpo"])
def test_the_tables_end_with_an_error_where_nothing_was_learned(broken, tmp_path):
    before = {"step": 0, "eval/reward": -0.1, "eval/grammatical": 0.98}
    after = {"step": 20, "eval/reward": 2.3, "eval/grammatical": 0.97}
    garbage = {"step": 20, "eval/reward": 0.1, "eval/grammatical": 0.0}
    last = {"sft": after, "seed0/dvpo": after, "seed1/dvpo": after}
    if broken == "sft":
        last["sft"] = garbage
    elif broken == "dvpo":
        last["seed1/dvpo"] = garbage
    for folder, row in last.items():
        (tmp_path / folder).mkdir(parents=True)
        rows = [before, row, {"step": 20, "sft/loss": 1.0}]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = {"sft": "sft: 0 % of the reviews", "dvpo": "dvpo, seed 1: the true reward rose by"}
    if broken:
        message = f"^error: this installation does not work: {messages[broken]}"
        with pytest.raises(SystemExit, match=message):
            tables.require_sound(tmp_path, [0, 1], ["dvpo", "reward"])
    else:
        tables.require_sound(tmp_path, [0, 1], ["dvpo", "reward"])


def test_scripts_of_the_variants_exist():
    assert all((helpers.ROOT / method.script).exists() for method in variants.METHODS.values())


# --- on your own model and data -----------------------------------------------------------------------------


def test_data_and_commands_of_the_real_values(tmp_path):
    """No answer of a held-out policy is trained on; pairs are --gap apart, in the right order, and few of a
    prompt; every command is one its script accepts."""
    rows = []
    for i, split in enumerate(["train"] * 6 + ["test"] * 2):
        for j in range(6):
            row = {"prompt": f"q{i}", "response": f"answer {j}", "reward": float(j), "policy": f"p{j}"}
            rows.append(row | {"split": split})
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = types.SimpleNamespace(
        scored=file,
        held_out=["p4", "p5"],
        gap=2.0,
        max_characters=50,
        run_dir=tmp_path,
        out=tmp_path,
        all_policies=True,
        model="m",
        layers=2,
        lr=1e-4,
        epochs=1,
        batch_size=8,
        max_prompt_length=8,
        max_response_length=8,
        critic="",
        context_pairs=[0, 1],
    )
    real_values.write_data(args)

    def written(name):
        text = gzip.decompress((tmp_path / f"{name}.jsonl.gz").read_bytes())
        return [json.loads(line) for line in text.splitlines()]

    known = written("known")
    assert {row["policy"] for row in known} == {"p0", "p1", "p2", "p3"}
    assert len(known) == 24
    test_pairs = written("known_test_pairs")
    assert {row["prompt"] for row in test_pairs} == {"q6", "q7"}
    assert len(test_pairs) == 2 * 3
    assert len(written("known_train_pairs")) == 6 * 2
    assert not written("strange_pairs")  # p4 and p5 are 1 apart
    for name in ("known_train_pairs", "all_test_pairs"):
        for row in written(name):
            assert int(row["chosen"][-1]) - int(row["rejected"][-1]) >= 2

    commands, judging = real_values.commands(args)
    jobs = Jobs(tmp_path, commands, [(0, job) for job in judging], {"data"})
    assert {job.name for job in jobs.order} == set(commands)
    for job in jobs.order:
        words = jobs.words(job)
        if words[0] != "paper/real_values.py":
            parsed(words)


@pytest.mark.parametrize("scored", ["s.jsonl", ""])
def test_commands_of_the_real_policies(tmp_path, scored):
    """Every command is one its script accepts, each part of the data goes to one stage, and all that is
    measured is trained."""
    args = types.SimpleNamespace(
        model="m",
        pairs="p.jsonl",
        scored=scored,
        reward=["a:b"],
        only=[*real_policies.NAMES],
        steps=3,
        rl_steps=2,
        threshold=0.0,
        prompts=4,
        flags="--max-response-length 8",
        offline_flags="",
        rl_flags="--epochs 1",
    )
    commands, wanted = real_policies.commands(args)
    assert wanted == [name for name in real_policies.NAMES if scored or name not in ("kto", "dro", "rpo")]
    jobs = Jobs(tmp_path, commands, [(0, "measured")], set())
    assert {job.name for job in jobs.order} == {*wanted, "reward", "gvm", "measured"}
    for job in jobs.order:
        found = parsed(jobs.words(job))
        if job.name == "measured":
            assert found.max_response_length == 8
            assert found.part == "rl"
        elif job.name == "sft":
            assert found.part == "sft"
        elif job.name in real_policies.ONLINE:
            assert found.part == "rl"
        else:
            assert found.part == "value"


def decoding_args(**given):
    """The arguments of paper/decoding.py that make its commands."""
    args = dict(model="", gvm="", trained="", dataset="reviews", part="all", reward=["a:b"], prompts=4)
    args |= dict(samples=2, batch_size=4, max_prompt_length=8, max_response_length=8, best_of=[4])
    args |= dict(guides=["8:0.5", "8:inf"], seeds=[0])
    return types.SimpleNamespace(**args | given)


@pytest.mark.parametrize("world", [True, False])
def test_commands_of_decoding(tmp_path, world):
    """Every command is one its script accepts; of a model of one's own nothing is trained."""
    args = decoding_args()
    if not world:
        args = decoding_args(model="m", gvm="g", trained="t", dataset="d.jsonl")
    commands, wanted = decoding.commands(args)
    assert wanted == ["plain", "best_4", "guided_8_0p5", "guided_8_inf", "trained"]
    jobs = Jobs(tmp_path, commands, [(3, job) for job in [*wanted, "time"]], set())
    assert {job.name for job in jobs.order} == set(commands)
    assert ("gvm" in commands) == world
    for job in jobs.order:
        words = jobs.words(job)
        if job.name == "time":
            continue
        found = parsed([*words, "--run-dir", "x"])
        assert found.seed == 3
        assert found.split_seed == (3 if world else 0)
        if job.name == "guided_8_inf":
            assert found.guide_beta == float("inf")
            assert found.gvm == (str(tmp_path / "seed3/gvm/model") if world else "g")


def test_table_of_decoding():
    """Differences are paired, by seed or with one seed by prompt; times within a round."""

    def method(*rewards):
        found = []
        for reward in rewards:
            found.append({"means": {"length": 3.0, "characters": 1.0, "good": reward}, "rewards": []})
        return found

    numbers = {"world": True, "samples": 2, "seeds": [0, 1, 2]}
    numbers["methods"] = {"plain": method(0.0, 1.0, 2.0), "best_4": method(1.0, 2.5, 2.5)}
    numbers["times"] = {"plain": [[[1.0, 10], [4.0, 20]]] * 3, "best_4": [[[3.0, 10], [8.0, 10]]] * 3}
    assert decoding.differences_of(numbers, "best_4", "plain") == [1.0, 1.5, 0.5]
    assert decoding.seconds_ratios(numbers, "best_4") == [3.5] * 3  # of 3 and 4
    table = decoding.report(numbers)
    assert "| best of 4 | 3.00 ± 0.00 | 2.00 ± 0.87 |  | +1.00 ± 1.24, not separated | 3.5 ± 0.0 |" in table
    assert decoding.interval([1.0, 1.1, 0.9]) == "+1.00 ± 0.25"
    numbers["methods"] = {"plain": method(0.0), "best_4": method(1.0)}
    numbers["methods"]["plain"][0]["rewards"] = [0.0, 2.0, 1.0, 1.0]
    numbers["methods"]["best_4"][0]["rewards"] = [3.0, 3.0, 1.0, 2.0]
    assert decoding.differences_of(numbers, "best_4", "plain") == [2.0, 0.5]


def test_the_page_has_the_table_of_the_decoding_numbers():
    numbers = json.loads((helpers.ROOT / "docs/results/data/decoding.json").read_text())
    page = (helpers.ROOT / "docs/results/decoding.md").read_text(encoding="utf-8")
    assert decoding.report(numbers) in page


# --- the report ---------------------------------------------------------------------------------------------


def test_verdict():
    """By the 95 % t interval of the differences; the same sign in three seeds is not enough."""
    # mean 0.2, deviation 0.1: half of the interval is 4.303 * 0.1 / sqrt(3) = 0.248
    assert report.verdict([0.1, 0.2, 0.3]) == "not separated (+0.2 ± 0.25, 3 seeds)"
    assert report.verdict([0.19, 0.2, 0.21]) == "**holds** (+0.2 ± 0.025, 3 seeds)"
    assert report.verdict([-0.19, -0.2, -0.21]) == "**does not hold** (-0.2 ± 0.025, 3 seeds)"
    assert report.verdict([1.0]) == "one seed, no interval (+1)"


def test_intervals_are_those_of_students_t():
    """Covered in 95 % of samples, for every number of seeds that the table of quantiles has."""
    rng = random.Random(0)
    for count in (2, 3, 5, 10, 21):
        covered = 0
        for _ in range(4000):
            values = [rng.gauss(1.0, 3.0) for _ in range(count)]
            covered += abs(statistics.fmean(values) - 1.0) < report.half_interval(values)
        assert abs(covered / 4000 - 0.95) < 0.012, count


def test_a_drop_has_its_size():
    """In per cent of what was gained over the SFT policy."""
    gains = [0.8, 0.7, 0.9]
    assert report.share_of_gain([0.4, 0.35, 0.45], gains) == "50 % of the gain over SFT"
    assert report.share_of_gain([-0.2, -0.2, -0.2], gains) == "-25 % of the gain over SFT"


# --- frontiers ----------------------------------------------------------------------------------------------


def test_commands_of_the_frontiers(tmp_path):
    """Every command is one its script accepts, and every policy of a seed is of that seed."""
    commands = frontiers.commands()
    wanted = [(7, f"measured_{name}") for name in ("sft", *frontiers.METHODS)]
    jobs = Jobs(tmp_path, commands, wanted, set())
    assert {job.name for job in jobs.order} == set(commands)
    for job in jobs.order:
        found = parsed(jobs.words(job))
        assert (found.seed, found.split_seed) == (7, 7), job.name
        if job.name not in ("sft", "measured_sft"):
            text = " ".join(jobs.words(job))
            assert str(tmp_path / "seed7") in text
        assert getattr(found, "eval_every", 1) > 0, f"{job.name}: an online script would not measure its KL"
    found = parsed(jobs.words(next(job for job in jobs.order if job.name == "rpo_sample_0_3")))
    assert (found.partition, found.tau) == ("sample", 0.3)
    found = parsed(jobs.words(next(job for job in jobs.order if job.name == "grpo_0_02")))
    assert found.beta == 0.02


def runs_of(method: str, seed: int, points: list[tuple[float, float]], start: float = 0.0) -> list[dict]:
    """Rows of a method, (KL, reward) each; `start` is the reward of its SFT policy."""
    about = {"seed": seed, "method": method, "start": start}
    return [about | {"kl": kl, "reward": reward} for kl, reward in points]


def test_the_reward_at_a_kl_is_between_its_neighbours():
    rows = runs_of("sft", 0, [(0.0, -7.0)]) + runs_of("rpo_none", 0, [(4.0, 2.0), (1.0, 1.0)], start=-1.0)
    rows += runs_of("rpo_none", 1, [(0.5, 9.0)]) + runs_of("ppo", 0, [(0.5, 9.0)], start=-2.0)
    points = frontiers.frontier(rows, 0, "rpo_none")
    assert points == [(0.0, -1.0), (1.0, 1.0), (4.0, 2.0)]
    assert frontiers.reward_at(points, 0.5) == pytest.approx(0.0)
    assert frontiers.reward_at(points, 2.0) == pytest.approx(1.0 + 1 / 3)
    assert frontiers.reward_at(points, 4.0) == 2.0
    assert frontiers.reward_at(points, 4.1) is None


def test_who_is_ahead_at_equal_kl():
    """Paired by seed, for the seeds in which both methods get so far; the word comes from the interval."""
    rows = []
    for seed, ahead in enumerate((0.30, 0.31, 0.29)):
        rows += runs_of("dpo", seed, [(2.0, seed + 1.0)], start=seed)
        rows += runs_of("kto", seed, [(2.0, seed + 1.0 + ahead)], start=seed)
    found = frontiers.differences(rows, "kto", "dpo", 2.0)
    assert found == pytest.approx([0.30, 0.31, 0.29])
    assert frontiers.word(found, 3) == "**ahead**: +0.30 ± 0.02"
    back = frontiers.differences(rows, "dpo", "kto", 1.0)
    assert frontiers.word(back, 3) == "**behind**: -0.15 ± 0.01"
    assert frontiers.differences(rows, "kto", "dpo", 3.0) == []
    assert frontiers.word([], 3) == "not reached"
    assert frontiers.word([0.1, 0.2, 0.3], 3) == "not separated: +0.20 ± 0.25"
    assert frontiers.word([0.30, 0.31], 3) == "**ahead**: +0.30 ± 0.06, 2 of 3 seeds"
    assert frontiers.word([0.4], 3) == "+0.40, 1 of 3 seeds: no interval"


def test_further_seeds_are_added_to_those_that_are_there(tmp_path):
    old = runs_of("ppo", 0, [(1.0, 1.0)]) + runs_of("dpo", 2, [(1.0, 1.0)])
    new = runs_of("ppo", 0, [(2.0, 2.0)]) + runs_of("ppo", 1, [(3.0, 3.0)])
    rows = frontiers.merge(old, new)
    assert rows == [new[0], new[1], old[1]]
    frontiers.write_data(tmp_path / "rows.json", rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_tables_go_between_their_marks(tmp_path, monkeypatch, capsys):
    """And nothing else of the page changes; a table without marks stays with the runs."""

    def one(out, seeds):
        return f"| {seeds} | ![curve](curve.png)"

    def two(out, seeds):
        return "x"

    monkeypatch.setattr(
        report, "TABLES", {"one": report.Table(one, ["job"]), "two": report.Table(two, ["job"])}
    )
    record = {"command": [], "seconds": 1, "commit": "abc", "date": "2026-01-01"}
    (tmp_path / "seed0/job").mkdir(parents=True)
    (tmp_path / "seed0/job/job.json").write_text(json.dumps(record))
    (tmp_path / "docs/results").mkdir(parents=True)
    page = tmp_path / "docs/results/page.md"
    page.write_text("before\n<!-- table one -->\nold\n<!-- end one -->\nafter\n")
    for _ in range(2):
        report.write(tmp_path, [0], ["one", "two"], tmp_path / "docs")
        text = page.read_text()
        assert text.startswith("before\n<!-- table one -->\n| [0] | ![curve](../curve.png)\n")  # a folder up
        assert text.endswith("<!-- end one -->\nafter\n")
        assert "old" not in text
        assert "abc" in text
        assert text.count("| [0] |") == 1
    assert (tmp_path / "table-two.md").read_text().startswith("x\n")


def test_the_tables_of_value_models_have_their_own_columns(tmp_path):
    """Those of `evaluate.py values`, which are not those of the offline methods."""
    shares = dict.fromkeys(report.STATISTICS, 0.5)
    names = ["gvm_pairs/model", "gvm_true/model", "gvm_scores/model", "reward/model", "ppo/critic"]
    found = {f"{tmp_path}/seed0/{name}": {"all": shares} for name in names}
    found["baseline: the longer one"] = {"all": {"score": 0.5}}
    found["baseline: the better policy"] = {"all": {"score": 0.75}}
    (tmp_path / "seed0/judged").mkdir(parents=True)
    (tmp_path / "seed0/judged/values.json").write_text(json.dumps({"accuracy": found}))
    lines = report.values(tmp_path, [0]).splitlines()
    assert lines[0] == "| share of held-out pairs | " + " | ".join(report.STATISTICS) + " |"
    assert lines[2] == "| GVM from preferences | " + " | ".join(["0.500"] * 10) + " |"
    last = [cell.strip() for cell in lines[8].split("|")]
    assert last[1] == "the better author wins"
    assert last[2:-1] == [""] * 9 + ["0.750"]
