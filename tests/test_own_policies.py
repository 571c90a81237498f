"""paper/own_policies.py: who is trained on what, what is kept of a run, and the whole recipe on the embedded
world; the lexicons of paper/text_rewards.py."""

import json
import subprocess
import sys
from types import SimpleNamespace

import helpers
import pytest
from test_paper import parsed

from common.data import hold_out_prompts, read_rows
from paper import own_policies, text_rewards
from tools.jobs import Job, Jobs

ARGS = dict(
    model="reviews",
    dataset="reviews",
    reward="assets.reviews:reward",
    eval_reward=["assets.reviews:grammatical"],
    max_characters=120,
    samples=8,
    prompts=64,
    eval_samples=4,
    max_prompt_length=128,
    max_response_length=32,
    batch_size=32,
    steps=24,
    offline_steps=98,
    evaluations=3,
    flags="--precision fp32 --micro-batch-size 16",
    set=[],
    tune=[],
    tune_seed=0,
    only=[*own_policies.ONLINE, *own_policies.OFFLINE],
    seeds=[1, 2],
    values=True,
)


@pytest.mark.parametrize("tune", [[], ["1e-5", "3e-5"]])
def test_commands(tune, tmp_path):
    """Each is one that its script accepts; all that is wanted can be made, and no job is made for nothing."""
    args = SimpleNamespace(**ARGS | dict(tune=tune))
    commands = own_policies.commands(args)
    wanted = own_policies.wanted_jobs(args)
    jobs = Jobs(tmp_path, commands, wanted, {"prompts"})
    for job in jobs.order:
        words = jobs.words(job)
        if not words[0].startswith("paper/"):
            parsed([*words, "--run-dir", "x"])
    made = {job.name for job in jobs.order}
    if not tune:
        assert made == set(commands)
        assert {job.seed for job in jobs.order} == {1, 2, None}
    else:
        assert {job.seed for job in jobs.order} == {0, None}
        for name in args.only:
            for rate in tune:
                words = commands[own_policies.tuned(name, rate)]
                for flag in ("--lr", "--critic-lr", "--value-lr"):
                    if flag in words:
                        assert words[words.index(flag) + 1] == rate


def test_options_of_one_job():
    changed = own_policies.commands(SimpleNamespace(**ARGS | dict(set=[["grpo", "--lr 7e-7"]])))
    usual = own_policies.commands(SimpleNamespace(**ARGS))
    assert changed["grpo"][-2:] == ["--lr", "7e-7"]
    assert {name for name in usual if usual[name] != changed[name]} == {"grpo"}


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_prompts_are_in_no_training_data(seed, tmp_path):
    """Those of the online scripts, whatever the order of the answers; pairs are in the right order."""
    prompts = [{"prompt": f"question {i}"} for i in range(30)]
    answers = []
    for i in range(30):
        for j in range(8):
            row = {"prompt": f"question {i}", "response": f"answer {i} {j}", "reward": (7 * i + 3 * j) % 5}
            answers.append(row | {"policy": "p", "truncated": j == 0, "rewards": {"a": 1.0}, "solution": i})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers[::-1]))
    args = SimpleNamespace(
        prompt_file=str(tmp_path / "p.jsonl"),
        answers=str(tmp_path / "a.jsonl"),
        prompts=7,
        samples=8,
        data_seed=seed,
        run_dir=tmp_path,
    )
    own_policies.write_data(args)
    _, held_out = hold_out_prompts(prompts, 7, seed)
    held_out = {row["prompt"] for row in held_out}
    reward_of = {row["response"]: row["reward"] for row in answers}
    for name in ("train", "test"):
        rows = read_rows(str(tmp_path / f"{name}.jsonl"), "scored")
        assert len(rows) == 8 * (7 if name == "test" else 23)
        assert all((row["prompt"] in held_out) == (name == "test") for row in rows)
        pairs = read_rows(str(tmp_path / f"{name}_pairs.jsonl"), "preference")
        assert len(pairs) == len(rows) // 2
        assert all((row["prompt"] in held_out) == (name == "test") for row in pairs)
        assert all(reward_of[row["chosen"]] > reward_of[row["rejected"]] for row in pairs)
        for row in [*rows, *pairs]:
            assert row["prompt"] == f"question {row['solution']}"
            assert "rewards" not in row
        assert sum(row["truncated"] for row in rows) == len(rows) // 8
        assert not any("truncated" in row for row in pairs)
    best = read_rows(str(tmp_path / "best.jsonl"), "sft")
    assert len(best) == 23
    for row in best:
        group = [answer["reward"] for answer in answers if answer["prompt"] == row["prompt"]]
        assert row["prompt"] not in held_out
        assert reward_of[row["response"]] == max(group)
    labels = read_rows(str(tmp_path / "train.jsonl"), "labelled")
    assert {row["label"] for row in labels} == {True, False}


def test_the_recipe_on_the_embedded_world(tmp_path):
    """From nothing to the table: nothing is measured twice, even where the runs are gone; a further method is
    added to the file."""
    words = [sys.executable, "paper/own_policies.py", "--model", "reviews", "--dataset", "reviews"]
    words += ["--reward", "assets.reviews:reward", "--eval-reward", "assets.reviews:grammatical"]
    words += ["--samples", "2", "--prompts", "16", "--eval-samples", "2", "--max-prompt-length", "16"]
    words += ["--max-response-length", "12", "--steps", "2", "--offline-steps", "2", "--evaluations", "1"]
    words += ["--batch-size", "8", "--flags", "--micro-batch-size 32", "--no-values", "--seeds", "1"]
    words += ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results.jsonl")]
    words += ["--set", "gvm_scores", "--steps 2 --lr 1e-3", "--only", "dvpo"]

    def recipe():
        done = subprocess.run(words, cwd=helpers.ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = recipe()
    assert "| before |" in out and "| DVPO, GVM from scores |" in out
    text = (tmp_path / "results.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert [(record["seed"], record["name"]) for record in records] == [(1, "dvpo"), (1, "reference")]
    assert str(tmp_path) not in text
    dvpo = records[0]
    assert [point["step"] for point in dvpo["curve"]] == [0, 2]
    assert dvpo["step_seconds"] > 0
    answers = tmp_path / "out/seed1/measured_dvpo/dvpo/responses.jsonl"
    answers = [json.loads(line) for line in answers.open()]
    assert len(answers) == 32
    mean = sum(len(answer["response"]) for answer in answers) / 32
    assert dvpo["measured"]["characters"] == pytest.approx(mean, rel=1e-3)
    for folder in ("out/seed1/gvm_scores", "out/seed1/dvpo"):
        (tmp_path / folder / "job.json").unlink()
    again = recipe()
    assert out.endswith(again) and "seed1" not in again  # the tables alone: no job ran


def test_results_outlive_a_kill(tmp_path):
    """Lines are sorted and none is lost; a record of the same run takes the place of the old one."""
    results = own_policies.Results(tmp_path / "r.jsonl")
    for seed, name in [(2, "ppo"), (1, "ppo"), (1, "dvpo"), (1, "ppo")]:
        results.add({"seed": seed, "name": name, "seconds": seed})
    found = own_policies.Results(tmp_path / "r.jsonl")
    assert [*found.found] == [(1, "dvpo"), (1, "ppo"), (2, "ppo")]
    assert found.seeds(["ppo"]) == [1, 2]
    assert found.seeds(["ppo", "dvpo"]) == [1]
    assert not (tmp_path / "r.part").exists()


def test_folders_of_a_machine_are_not_kept(tmp_path):
    jobs = Jobs(tmp_path / "out", {"grpo": ["grpo.py", "--model", "/a/b/SmolLM2"]}, [(1, "grpo")], set())
    folder = jobs.folder(Job(1, "grpo"))
    folder.mkdir(parents=True)
    command = ["grpo.py", "--model", "/a/b/SmolLM2", "--dataset", f"{tmp_path}/out/prompts/p.jsonl"]
    record = {"command": command, "seconds": 3.0, "commit": "abc", "date": "2026-11-27"}
    (folder / "job.json").write_text(json.dumps(record))
    found = own_policies.provenance(jobs, Job(1, "grpo"))
    assert found["command"] == "grpo.py --model SmolLM2 --dataset OUT/prompts/p.jsonl"


def test_report_of_three_seeds(tmp_path):
    """Tables over the counted seeds alone, paired differences, pictures; a method whose log has no KL has none
    in the table."""
    results = own_policies.Results(tmp_path / "r.jsonl")
    for seed in (0, 1, 2, 3):  # 0 is of the search
        for i, name in enumerate(own_policies.NAMES):
            record = {"seed": seed, "name": name, "seconds": 60.0, "step_seconds": 2.0}
            level = 100.0 if seed == 0 else 0.1 * i + 0.001 * seed * (i + 1)
            numbers = {"reward": level, "grammatical": 0.5, "distinct_2": 0.9, "length": 12.0}
            record["measured"] = numbers
            record["samples"] = [["a | question", "an\nanswer"]]
            record["curve"] = []
            for step in (0, 12, 24):
                point = {"step": step, "reward": level * step / 24, "length": 12.0}
                if name != "sft":
                    point["kl"] = step / 12
                record["curve"].append(point)
            results.add(record)
        shares = {"mean": 0.7, "last": 0.6 + 0.01 * seed}
        for where in ("values", "values_shifted"):
            accuracy = {model: shares for model in own_policies.VALUE_MODELS}
            results.add({"seed": seed, "name": where, "accuracy": accuracy})
    args = SimpleNamespace(**ARGS, out=tmp_path)
    text = own_policies.report(args, results)
    rows = {}  # the first of each method
    for line in text.splitlines():
        rows.setdefault(line.split(" | ")[0].strip("| "), line.split(" | "))
    assert "## online, seeds [1, 2, 3]" in text
    assert rows["RPO"][1] == "0.72 ± 0.01"
    assert rows["RPO"][5] == "2.00 ± 0.00"
    assert rows["SFT, best answers"][5] == "-"
    assert rows["before"][5] == "0"
    assert "- GRPO, reward above PPO: **holds** (+0.306 " in text
    assert "| GRPO | **ahead**: +0.15 ± 0.00 | **ahead**: +0.31 ± 0.01 | not reached | not reached |" in text
    assert "| SFT, best answers | not reached | not reached |" in text  # its log has no KL
    assert "a \\| question" in text
    assert "| as in training | PPO's critic at the end of its run | 0.700 ± 0.000 | 0.620 ± 0.010 |" in text
    assert (tmp_path / "real_online.png").stat().st_size > 5000
    assert (tmp_path / "real_offline.png").stat().st_size > 5000


# --- the lexicons -------------------------------------------------------------------------------------------


def score(name: str, prompt: str, response: str) -> float:
    """One reward of paper/text_rewards.py, or a skipped test where its package is not installed."""
    package = {"vader": "vaderSentiment", "afinn": "afinn"}.get(name, "wordfreq")
    pytest.importorskip(package)
    return getattr(text_rewards, name)([prompt], [response], row=[1])[0]


@pytest.mark.parametrize("name", ["vader", "afinn"])
def test_sentiment(name):
    good = score(name, "?", "What a wonderful, happy day, I love it!")
    bad = score(name, "?", "What a horrible, sad day, I hate it!")
    assert good > 0.3 and bad < -0.3
    assert score(name, "?", "") == 0.0


def test_real_words():
    assert score("real_words", "?", "The refrigerator is cold.") == 1.0
    assert score("real_words", "?", "The zxqvy is blorptic 12 !") == 0.5
    assert score("real_words", "?", "!!! 12") == 0.0


def test_on_topic():
    prompt = "Best way to defrost a refrigerator freezer?"
    assert score("on_topic", prompt, "Unplug it. Freezers thaw within a day.") == 1.0
    assert score("on_topic", prompt, "Hello there, welcome! I am here to help you the best way.") == 0.0
    assert score("on_topic", "What is that?", "Anything.") == 1.0  # the prompt has no topic
    chat = [{"role": "user", "content": prompt}]
    assert score("on_topic", chat, "The refrigerator hums.") == 1.0


@pytest.mark.parametrize("name", ["vader", "afinn", "real_words"])
def test_a_package_that_is_missing(name, monkeypatch):
    """One line that names the pip command, whatever was loaded before."""
    for cached in (text_rewards.vader_analyser, text_rewards.afinn_lexicon, text_rewards.zipf):
        cached.cache_clear()
    for module in ("vaderSentiment", "vaderSentiment.vaderSentiment", "afinn", "wordfreq"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install (vaderSentiment|afinn|wordfreq)$"):
        getattr(text_rewards, name)(["?"], ["word"])
