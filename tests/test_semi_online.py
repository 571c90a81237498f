"""Semi-online DVPO: what a policy wrote is kept, read again as it was, scored and mixed; a GVM goes on from where it was;
and paper/semi_online.py, which puts these together."""

import json
import shutil
import types

import helpers
import pytest
import torch
from helpers import ARGS, ONLINE, metrics
from safetensors.torch import load_file
from test_gvm_td import SCORED, write

import gvm_td
from assets import reviews
from common import models
from common.tokenization import encode_answer, load_tokenizer, tokenize, were_cut
from paper import semi_online
from tools.jobs import Jobs


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- rollouts.jsonl (that a killed run has each step once: test_resume.py) ----------------------------------------------


@pytest.mark.parametrize("script", ONLINE)
def test_rollouts_hold_every_response_of_training(world, script):
    """One line per response and step, with its prompt and the data's other columns, but nothing of another answer."""
    rows = lines(world.path("prompts.jsonl"))
    for i, row in enumerate(rows):
        row |= {"solution": i, "response": "another answer", "reward": 7.0, "policy": "p", "step": 99}
    args = ARGS[script] | dict(dataset=world.write("asked.jsonl", rows), save_rollouts=True)
    args |= dict(steps=2, max_response_length=6, eval_every=0, run_dir=f"runs/semi-kept-{script}")
    world.run(script, **args).ok()
    run_dir = world.path(f"runs/semi-kept-{script}")
    found = lines(run_dir / "rollouts.jsonl")
    assert [row["step"] for row in found] == [1] * args["batch_size"] + [2] * args["batch_size"]
    asked = {json.dumps(row["prompt"]): row["solution"] for row in rows}
    score = "gvm_score" if script == "dvpo" else "reward"
    for row in found:
        assert asked[json.dumps(row["prompt"])] == row["solution"]
        assert set(row) == {"step", "prompt", "response", "solution", "truncated", "kl", score}
    for step in metrics(run_dir):
        of_step = [row for row in found if row["step"] == step["step"]]
        mean = {key: sum(row[key] for row in of_step) / len(of_step) for key in (score, "kl", "truncated")}
        assert mean[score] == pytest.approx(step["objective/score"], abs=1e-5)
        assert mean["kl"] == pytest.approx(step["objective/kl"], abs=1e-5)
        assert mean["truncated"] == pytest.approx(step["rollout/truncated"], abs=1e-6)
    if score == "reward":
        texts = [row["response"] for row in found]
        expected = helpers.length_reward([], texts)
        assert [row["reward"] for row in found] == pytest.approx(expected, abs=1e-5)


def test_no_rollouts_unless_asked_for(world):
    world.run("dvpo", **ARGS["dvpo"] | dict(steps=1, eval_every=0, run_dir="runs/not-kept")).ok()
    assert not (world.path("runs/not-kept") / "rollouts.jsonl").exists()


# --- answers that were cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [True, False])
def test_a_truncated_response_gets_no_end(template):
    """By a chat template and without one: the tokens are those of the whole answer up to the cut, and nothing follows."""
    tokenizer = load_tokenizer(reviews.folder("policy"))
    if not template:
        tokenizer.chat_template = None
    prompt = "lunch : the soup ?"
    whole_prompt, whole, _ = encode_answer(tokenizer, prompt, "the soup was good .")
    cut_prompt, cut, rest = encode_answer(tokenizer, prompt, "the soup was", truncated=True)
    assert (cut_prompt, cut, rest) == (whole_prompt, whole[:3], [])
    assert were_cut(tokenizer, [whole, cut]) == [False, True]


@pytest.mark.parametrize("truncated", [True, False, None])
def test_tokenize_reads_the_column_truncated(truncated):
    """Of a response; a chosen or rejected one is not what a policy here was cut at."""
    tokenizer = load_tokenizer(reviews.folder("policy"))
    row = {"prompt": "lunch : the soup ?", "response": "the soup was", "chosen": "the soup was"}
    if truncated is not None:
        row["truncated"] = truncated
    (found,) = tokenize([row], tokenizer, ("response", "chosen"), 16, 32, "x")
    assert were_cut(tokenizer, [found["response_ids"]]) == [truncated is True]
    assert were_cut(tokenizer, [found["chosen_ids"]]) == [False]


def test_rollouts_come_back_as_the_tokens_that_were_sampled(world):
    """On the embedded world, whose words are tokens: cut answers too, and gvm_td.py's judge is told so."""
    args = ARGS["dvpo"] | dict(
        steps=1, max_response_length=9, eval_every=0, run_dir="runs/semi-cut", save_rollouts=True
    )
    world.run("dvpo", **args).ok()
    tokenizer = load_tokenizer(reviews.folder("policy"))
    rows = lines(world.path("runs/semi-cut") / "rollouts.jsonl")
    assert {row["truncated"] for row in rows} == {True, False}
    rows = tokenize(rows, tokenizer, ("response",), 24, 16, "rollouts")  # a longer limit cuts nothing itself
    told = []

    def judge(rows, sequences, texts):
        told.extend(were_cut(tokenizer, [response for _, response in sequences]))
        return torch.zeros(len(rows))

    before = [(row["response"], row["truncated"]) for row in rows]
    gvm_td.judge_rows(rows, judge, tokenizer)
    assert told == [truncated for _, truncated in before]
    assert [(row["response"], row["truncated"]) for row in rows] == before


# --- scored and mixed ---------------------------------------------------------------------------------------------------


def test_scored_rows_are_data_again(world):
    """gvm_td.py --reward writes what it learned from, and reads it as scored responses with the same rewards."""
    args = ARGS["gvm_td"] | dict(reward="helpers:length_reward", steps=1, max_response_length=8)
    world.run("gvm_td", **args, run_dir="runs/scoring").ok()
    rows = lines(world.path("runs/scoring") / "scored.jsonl")
    expected = helpers.length_reward([], [row["response"] for row in rows])
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert any(row["truncated"] for row in rows) and not all(row["truncated"] for row in rows)
    assert not any(key.endswith("_ids") for row in rows for key in row)
    again = gvm_td.read_source(
        str(world.path("runs/scoring/scored.jsonl")), "train", "scores", "all", gvm_td.Args()
    )
    assert [row["reward"] for row in again] == [row["reward"] for row in rows]


@pytest.mark.parametrize(("share", "old"), [(0.0, 0), (0.5, 20), (0.8, 80)])
def test_old_rows_make_up_their_share(tmp_path, share, old):
    """Of 15 rows each is there as often as any other, but for one."""
    tokenizer = load_tokenizer(reviews.folder("policy"))
    args = gvm_td.Args(old_dataset=write(tmp_path, "old.jsonl", SCORED), old_share=share)
    rows = gvm_td.load_old_rows(20, tokenizer, args)
    assert len(rows) == old
    times = [sum(row["row"] == number for row in rows) for number in range(1, 16)]
    assert max(times) - min(times) <= 1
    assert all(row["response_ids"] for row in rows)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_cannot_be_is_refused(tmp_path, share):
    args = gvm_td.Args(old_dataset=write(tmp_path, "old.jsonl", SCORED), old_share=share)
    with pytest.raises(SystemExit, match="--old-share"):
        gvm_td.load_old_rows(20, None, args)


def test_last_rows(tmp_path):
    """The newest answers are the last of the file."""
    args = gvm_td.Args(
        dataset=write(tmp_path, "scored.jsonl", SCORED), source="scores", last_rows=4, eval_fraction=0.4
    )
    training, held_out = gvm_td.read_training_and_held_out(args)
    assert sorted(row["row"] for row in training + held_out) == [12, 13, 14, 15]


# --- a GVM that goes on -------------------------------------------------------------------------------------------------


def test_a_gvm_that_goes_on_starts_with_its_values_and_keeps_its_unit(world):
    """With a learning rate too small to move a weight, on other scores: the same head, the same return_mean and std."""
    args = ARGS["gvm_td"] | dict(reward="helpers:length_reward")
    world.run("gvm_td", **args, run_dir="runs/semi-first").ok()
    again = args | dict(model="runs/semi-first/model", reward="assets.reviews:reward", lr=1e-30, steps=1)
    again |= dict(old_dataset="runs/semi-first/scored.jsonl", run_dir="runs/semi-second")
    world.run("gvm_td", **again).ok()
    first, second = (
        load_file(world.path(f"runs/{run}/model/model.safetensors")) for run in ("semi-first", "semi-second")
    )
    assert first.keys() == second.keys()
    assert first["score.weight"].abs().max() > 0
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-9)
    configs = [
        json.loads(world.path(f"runs/{run}/model/config.json").read_text())
        for run in ("semi-first", "semi-second")
    ]
    for key in ("return_mean", "return_std", "gamma"):
        assert configs[0][key] == configs[1][key]
    assert configs[0]["return_std"] != 1


def test_signs_and_scores_are_two_units(world, capsys):
    """A GVM from +1 and -1 that goes on from scores takes theirs; one from scores that goes on from pairs has 0 and 1."""
    from_scores = "runs/unit-scores"
    world.run("gvm_td", **ARGS["gvm_td"] | dict(steps=1, run_dir=from_scores)).ok()
    pairs = gvm_td.Args(source="preference")
    scores = gvm_td.Args(source="scores")
    config = json.loads(world.path(f"{from_scores}/model/config.json").read_text())
    folder = str(world.path(f"{from_scores}/model"))
    assert gvm_td.unit_of_model(folder, scores) == (config["return_mean"], config["return_std"])
    assert capsys.readouterr().out == ""
    assert gvm_td.unit_of_model(folder, pairs) is None
    assert "another unit" in capsys.readouterr().out
    assert gvm_td.unit_of_model(reviews.folder("policy"), scores) is None  # no GVM
    rows = [{"reward": reward} for reward in (1.0, 3.0)]
    found, mean, std = gvm_td.standardised_scores(rows, scores, (1.0, 4.0))
    assert (found.tolist(), mean, std) == ([0.0, 0.5], 1.0, 4.0)


def test_a_critic_from_a_gvm_starts_in_the_unit_of_the_reward():
    """value * return_std + return_mean, once; a model without them stays as it is."""
    model = torch.nn.Module()
    model.score = torch.nn.Linear(3, 1)
    model.config = types.SimpleNamespace(return_mean=0.5, return_std=2.0)
    hidden = torch.randn(4, 3)
    expected = model.score(hidden) * 2.0 + 0.5
    for _ in range(2):  # the second call changes nothing
        models.to_reward_unit(model)
        torch.testing.assert_close(model.score(hidden), expected)
    assert model.config.return_mean is None


def test_ppo_starts_its_critic_from_a_gvm(world):
    """Its first values are the GVM's own, in the unit of the reward."""
    world.run(
        "gvm_td", **ARGS["gvm_td"] | dict(reward="helpers:length_reward", run_dir="runs/critic-gvm")
    ).ok()
    config = json.loads(world.path("runs/critic-gvm/model/config.json").read_text())
    args = dict(steps=1, eval_every=0)
    world.run(
        "ppo", **ARGS["ppo"] | args | dict(critic="runs/critic-gvm/model", run_dir="runs/critic-ppo")
    ).ok()
    world.run(
        "dvpo", **ARGS["dvpo"] | args | dict(gvm="runs/critic-gvm/model", run_dir="runs/critic-dvpo")
    ).ok()
    (as_critic,) = (
        row["critic/value"] for row in metrics(world.path("runs/critic-ppo")) if "critic/value" in row
    )
    # both drew the same answers; dvpo logs Q(s_t, a_t), which is V(s_{t+1}), so only the unit is to be told apart
    (as_gvm,) = (row["gvm/value"] for row in metrics(world.path("runs/critic-dvpo")) if "gvm/value" in row)
    in_reward_unit = as_gvm * config["return_std"] + config["return_mean"]
    assert abs(as_critic - in_reward_unit) < 0.25 * abs(as_critic - as_gvm)
    exported = json.loads(world.path("runs/critic-ppo/critic/config.json").read_text())
    assert exported.get("return_std") is None


# --- the recipe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "every", "most", "stages"),
    [
        (60, 15, 1000, [15, 15, 15, 15]),
        (60, 15, 2, [15, 15, 30]),
        (60, 8, 1000, [8] * 7 + [4]),
        (60, 60, 9, [60]),
        (60, 15, 0, [60]),
    ],
)
def test_stages(steps, every, most, stages):
    assert semi_online.stage_steps(steps, every, most) == stages


def test_curves_of_stages_are_one_curve(tmp_path):
    """The evaluation before a stage is that after the one before; those between the usual steps are left out."""
    for stage, steps in (("a", (0, 5, 8)), ("b", (0, 2, 7))):
        (tmp_path / stage).mkdir()
        rows = [{"step": step, "eval/reward": step, "eval/kl": 1.0} for step in steps]
        rows.append({"step": steps[-1], "objective/kl": 0.0})
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = semi_online.joined_curve(tmp_path, ["a", "b"], every=5)
    assert curve == [
        {"step": step, "reward": own, "kl": 1.0} for step, own in ((0, 0), (5, 5), (10, 2), (15, 7))
    ]


def test_interval():
    """Student's t: 1, 2, 3 have mean 2 and standard error 1 / sqrt(3); 4.303 is the quantile of 2 degrees of freedom."""
    assert semi_online.interval([1.0, 2.0, 3.0]) == "+2.00 ± 2.48"
    assert semi_online.interval([-1.0]) == "-1.00 (1 seed)"


def test_seeds_are_added_to_the_file(tmp_path):
    file = tmp_path / "data/semi_online.json"
    settings = {"reward": "r", "steps": 2}
    semi_online.add_to_file(file, settings, {"0": {"PPO": {"x": 1 / 3}}})
    found = semi_online.add_to_file(file, settings, {"10": {"PPO": {"x": 2}}, "0": {"frozen GVM": {"x": 3}}})
    assert found["runs"] == {"0": {"PPO": {"x": 0.3333}, "frozen GVM": {"x": 3}}, "10": {"PPO": {"x": 2}}}
    assert json.loads(file.read_text()) == found
    with pytest.raises(SystemExit, match="other settings"):
        semi_online.add_to_file(file, settings | {"steps": 3}, {})


def test_the_recipe_from_end_to_end(world, monkeypatch, tmp_path):
    """Small, in this installation: every stage runs and goes on from what it should; the same command runs nothing again;
    the report and the picture are there."""
    ran = []

    def run_in_server(self, job):
        ran.append(job.name)
        words = self.words(job)
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        world.command(words[0].removesuffix(".py"), *words[1:], "--run-dir", str(folder)).ok()
        (folder / "job.json").write_text(json.dumps({"command": words, "seconds": 1.0}))
        return 1.0

    monkeypatch.setattr(Jobs, "_run", run_in_server)
    monkeypatch.setenv("PYTHONPATH", "")
    out = tmp_path / "semi"
    sizes = "--max-prompt-length 24 --max-response-length 16 --micro-batch-size 16 --lr 1e-3 --warmup-steps 0"
    argv = ["--model", reviews.folder("policy"), "--offline", "scored.jsonl", "--prompts", "prompts.jsonl"]
    argv += ["--reward", "helpers:length_reward", "--steps", "4", "--refresh-every", "2", "--eval-every", "2"]
    argv += ["--flags", sizes, "--gvm-flags", "--steps 2 --batch-size 8 --eval-fraction 0.4"]
    argv += ["--rl-flags", "--batch-size 24 --mini-batch-size 12 --epochs 1 --eval-prompts 8"]
    argv += ["--answers", "40", "--seeds", "3", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["semi_online.py", *argv])
    semi_online.main()
    slug = "every2_most1000_old50_answers40"
    assert ran == ["gvm", "frozen", "start_2", f"gvm_{slug}_1", f"policy_{slug}_1", "ppo", "ppo_gvm"]
    home = out / "seed3"
    args = {job: json.loads((home / job / "args.json").read_text()) for job in ran}
    assert args[f"gvm_{slug}_1"]["model"] == str(home / "gvm/model")
    assert args[f"gvm_{slug}_1"]["dataset"] == str(home / "start_2/rollouts.jsonl")
    last = args[f"policy_{slug}_1"]
    assert last["model"] == str(home / "start_2/model")
    assert last["gvm"] == str(home / f"gvm_{slug}_1/model")
    assert last["ref_model"] == reviews.folder("policy")  # the first reference
    assert last["seed"] != args["start_2"]["seed"] == 3
    assert args["ppo_gvm"]["critic"] == str(home / "gvm/model")
    found = json.loads((out / "semi_online.json").read_text())["runs"]["3"]
    assert [row["step"] for row in found["semi-online"]["curve"]] == [0, 2, 4]
    assert found["semi-online"]["scored answers"]["own"] == 40
    assert found["PPO"]["scored answers"] == {"offline": 0, "own": 4 * 24}
    assert (
        found["frozen GVM"]["scored answers"]["own"] == 0 < found["frozen GVM"]["scored answers"]["offline"]
    )
    assert "| semi-online | frozen GVM | 1 |" in (out / "semi_online.md").read_text()
    assert (out / "semi_online.png").stat().st_size > 1000

    ran.clear()
    semi_online.main()
    assert ran == []
    shutil.rmtree(home / f"gvm_{slug}_1")
    (home / "frozen/job.json").unlink()  # as of a job that was killed
    semi_online.main()
    assert ran == ["frozen", f"gvm_{slug}_1"]
