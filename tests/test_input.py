"""Each bad input ends with one line that names the place and the mend, before a model is loaded where that can be."""

import functools
import gzip
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import fuzz_commands
import fuzz_data
import helpers
import pytest

from common import cli, formats
from common.data import read_rows
from common.rewards import Reward

GOOD = [
    {"prompt": f"lunch : the {topic} ?", "response": "the soup was warm ."}
    for topic in ("soup", "fish", "cake", "rice")
]
SCORED = [row | {"reward": float(i)} for i, row in enumerate(GOOD)]
PAIRS = [
    {"prompt": row["prompt"], "chosen": "the soup was warm .", "rejected": "the soup was cold ."}
    for row in GOOD
]
ROWS = {
    "sft": GOOD,
    "reward": PAIRS,
    "gvm_td": SCORED,
    "dvpo": GOOD,
    "ppo": GOOD,
    "rpo": SCORED,
    "dro": SCORED,
    "dpo": PAIRS,
}
ROWS |= {"kto": [row | {"label": i % 2 == 0} for i, row in enumerate(GOOD)], "grpo": GOOD, "remax": GOOD}


def fails(world, script, patch=helpers.no_models, processes=0, **args):
    """The one line a run with `args` stops with."""
    run_dir = world.path("runs/bad")
    shutil.rmtree(run_dir, ignore_errors=True)
    return world.run(
        script, processes, patch, **helpers.ARGS[script] | dict(run_dir="runs/bad") | args
    ).error()


# a second row, and what its error must say beside the file and the row
BAD_ROWS = {
    "missing column": ("sft", {"prompt": "lunch ?", "answer": "good"}, "'response'", "--columns response"),
    "no prompt": ("ppo", {"text": "lunch ?"}, "'prompt'", "--columns prompt"),
    "prompt type": ("dvpo", {"prompt": 3}, "prompt is int", "text or chat messages"),
    "response type": (
        "sft",
        {"prompt": "lunch ?", "response": {"a": 1}},
        "response is dict",
        "text or chat messages",
    ),
    "not messages": ("ppo", {"prompt": ["lunch ?"]}, "chat messages", "`role`"),
    "empty prompt": ("ppo", {"prompt": " "}, "prompt is empty"),
    "empty response": ("sft", {"prompt": "lunch ?", "response": " "}, "response is empty"),
    "empty chosen": ("reward", {"prompt": "lunch ?", "chosen": "", "rejected": "no"}, "chosen is empty"),
    "reward NaN": (
        "gvm_td",
        '{"prompt": "lunch ?", "response": "good", "reward": NaN}',
        "reward is nan",
        "finite",
    ),
    "reward inf": (
        "gvm_td",
        '{"prompt": "lunch ?", "response": "good", "reward": -Infinity}',
        "reward is -inf",
        "finite",
    ),
    "reward text": (
        "gvm_td",
        {"prompt": "lunch ?", "response": "good", "reward": "3"},
        "reward is '3'",
        "number",
    ),
    "reward bool": (
        "gvm_td",
        {"prompt": "lunch ?", "response": "good", "reward": True},
        "reward is True",
        "number",
    ),
    "label type": (
        "kto",
        {"prompt": "lunch ?", "response": "good", "label": "yes"},
        "label is 'yes'",
        "true or false",
    ),
    "not JSON": ("sft", '{"prompt": "lunch ?", "resp', "not JSON", "one object"),
    "not an object": ("sft", "[1, 2]", "expected an object"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row(world, case):
    """The error names the file, the row, what is wrong and the mend."""
    script, row, *words = BAD_ROWS[case]
    line = fails(world, script, dataset=world.write("bad.jsonl", [ROWS[script][0], row, ROWS[script][1]]))
    assert line.startswith("error: bad.jsonl, row 2: ") and all(word in line for word in words), line


EQUAL = dict(dataset="equal.jsonl", eval_dataset="pairs.jsonl", eval_split="train", eval_source="preference")
# arguments, and what the error must say
BAD_ARGS = {
    "missing file": ("sft", dict(dataset="nowhere.jsonl"), "nowhere.jsonl", "no such file"),
    "missing file of pairs": ("reward", dict(eval_dataset="nowhere.jsonl"), "nowhere.jsonl", "no such file"),
    "file type": ("sft", dict(dataset="rows.csv"), "rows.csv", ".jsonl, .json or .parquet"),
    "broken .json": ("sft", dict(dataset="broken.json"), "broken.json", "not JSON"),
    "broken .gz": ("sft", dict(dataset="broken.jsonl.gz"), "broken.jsonl.gz"),
    "unknown column": (
        "sft",
        dict(columns={"answer": "response"}),
        "--columns",
        "'answer'",
        "use prompt, response",
    ),
    "unknown split": ("sft", dict(dataset="split.jsonl", split="best"), "split.jsonl", "'best'", "--split"),
    "empty file": ("ppo", dict(dataset="empty.jsonl"), "empty.jsonl", "no usable row"),
    "empty part": ("ppo", dict(dataset="one.jsonl", part="rl"), "one.jsonl", "no usable row", "'rl'"),
    "prompts too long": (
        "dvpo",
        dict(max_prompt_length=3),
        "prompts.jsonl",
        "every prompt is longer",
        "--max-prompt-length 3",
    ),
    "nothing held out": ("sft", dict(eval_fraction=0.0), "scored.jsonl", "0 held out", "--eval-fraction"),
    "all held out": (
        "reward",
        dict(eval_fraction=1.0),
        "pairs.jsonl",
        "0 pairs to learn from",
        "--eval-fraction",
    ),
    "no held-out pair": ("gvm_td", dict(eval_gap=100.0), "no held-out pair", "--eval-dataset"),
    "all prompts held out": ("ppo", dict(eval_prompts=500), "prompts.jsonl", "--eval-prompts"),
    "mini-batch": ("ppo", dict(mini_batch_size=4), "--mini-batch-size 4", "--batch-size 9"),
    "missing model": ("sft", dict(model="runs/no/model"), "runs/no/model", "no model folder"),
    "missing model, one slash": ("sft", dict(model="runs/nowhere"), "runs/nowhere", "hub id"),
    "missing GVM": ("dvpo", dict(gvm="./nowhere"), "./nowhere", "no model folder"),
    "no end token": ("sft", dict(model="runs/no-end"), "runs/no-end", "no end-of-sequence token"),
    "GVM of another tokenizer": ("dvpo", dict(gvm="runs/foreign"), "--gvm runs/foreign", "tokenizer differs"),
    "log-odds of a GVM from scores": ("dvpo", dict(log_odds=True), "--log-odds", "--source preference"),
    "log-odds of discounted values": (
        "dvpo",
        dict(log_odds=True, gvm="runs/signs-discounted", gamma=0.9),
        "--log-odds",
        "--gamma 1",
    ),
    "time-out": ("sft", dict(timeout_minutes=0.0), "--timeout-minutes is 0.0", "above 0"),
    "endless time-out": ("sft", dict(timeout_minutes=float("inf")), "--timeout-minutes is inf", "finite"),
    "broken .parquet": ("sft", dict(dataset="broken.parquet"), "broken.parquet"),
    "reward without a function": (
        "ppo",
        dict(reward="helpers:nothing"),
        "--reward helpers:nothing",
        "module:function",
    ),
    "reward without a module": ("ppo", dict(reward="no.module:f"), "--reward no.module:f"),
    "equal rewards": ("gvm_td", dict(EQUAL), "equal.jsonl", "all rewards are 0.1"),
    "one response a prompt": (
        "rpo",
        dict(dataset="single.jsonl", eval_dataset="equal.jsonl"),
        "--partition none",
    ),
    "rpo, equal rewards": (
        "rpo",
        dict(dataset="equal.jsonl", eval_dataset="scored.jsonl"),
        "all rewards are 0.1",
    ),
    "share of responses": (
        "rpo",
        dict(keep_responses=1.5),
        "--keep-responses is 1.5",
        "above 0 and at most 1",
    ),
    "tau": ("rpo", dict(tau=0.0), "--tau is 0.0", "above 0"),
    "tau of DRO": ("dro", dict(tau=-1.0), "--tau is -1.0", "above 0"),
    "beta": ("kto", dict(beta=0.0), "--beta is 0.0", "above 0"),
    "beta of DPO": ("dpo", dict(beta=0.0), "--beta is 0.0", "above 0"),
    "one kind of label": ("kto", dict(dataset="scored.jsonl", threshold=99.0), "0 desirable", "--threshold"),
    "no label": ("kto", dict(dataset="pairs.jsonl"), "pairs.jsonl, row 1", "'response'"),
    "no reward": ("grpo", dict(reward=""), "--reward", "module:function"),
    "no reward for PPO": ("ppo", dict(reward=""), "--reward", "module:function"),
    "weights of nothing": ("kto", dict(desirable_weight=0.0, undesirable_weight=0.0), "both 0"),
    "adaptive beta of 0": ("ppo", dict(beta=0.0, kl_target=0.1), "--kl-target 0.1", "--beta"),
    "gradients backwards": ("sft", dict(max_grad_norm=-1.0), "--max-grad-norm is -1.0", "above 0"),
    "resume and overwrite": ("sft", dict(resume=True, overwrite=True), "--resume", "--overwrite"),
    "negative beta": ("grpo", dict(beta=-1.0), "--beta is -1.0", "at least 0"),
    "clip of ReMax": ("remax", dict(clip=1.5), "--clip is 1.5", "above 0 and below 1"),
    "group size": ("grpo", dict(group_size=2), "--group-size 2", "--batch-size 9"),
    "group of one": ("grpo", dict(group_size=1), "--group-size is 1", "at least 2"),
    "mini-batch of ReMax": ("remax", dict(mini_batch_size=4), "--mini-batch-size 4", "--batch-size 9"),
    "shard size": ("sft", dict(shard_size=2), "--shard-size 2 does not divide the 1 processes"),
    "held-out prompts too long": ("sft", dict(eval_dataset="long.jsonl", eval_split="train"), "long.jsonl"),
    "all responses too long": ("gvm_td", dict(max_characters=1), "scored.jsonl", "--max-characters"),
    "critic of another tokenizer": (
        "ppo",
        dict(critic="runs/foreign"),
        "--critic runs/foreign",
        "tokenizer differs",
    ),
}


@pytest.fixture(scope="session")  # as `world` is: pytest-xdist may leave a module and come back
def bad_files(world):
    world.write("rows.csv", ["prompt,response"])
    world.path("broken.json").write_text('[{"prompt": "lunch ?"')
    world.path("broken.parquet").write_text("not parquet")
    world.path("broken.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD[0]).encode() * 50)[:40])
    world.write("split.jsonl", [row | {"split": "train"} for row in GOOD])
    world.write("empty.jsonl", [])
    world.write("one.jsonl", GOOD[:1])
    world.write("equal.jsonl", [row | {"reward": 0.1} for row in SCORED * 3])
    world.write("single.jsonl", SCORED)
    world.write("long.jsonl", [row | {"prompt": row["prompt"] * 30} for row in GOOD])

    def endless(config):
        return {key: value for key, value in config.items() if key != "eos_token"}

    def swapped(tokenizer):
        words = tokenizer["model"]["vocab"]
        words["soup"], words["fish"] = words["fish"], words["soup"]
        return tokenizer

    helpers.edit_model(world, "policy", "no-end", tokenizer_config=endless)
    helpers.edit_model(world, "value", "foreign", tokenizer=swapped)


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [pytest.param(s, a, w, id=name) for name, (s, a, *w) in BAD_ARGS.items()],
)
def test_bad_arguments(world, bad_files, script, args, words):
    """The error names what is wrong and the mend."""
    line = fails(world, script, **args)
    assert all(word in line for word in words), line


def test_one_line_from_several_ranks(world):
    """All ranks find the fault and stop; one prints it."""
    line = fails(world, "sft", processes=2, dataset="nowhere.jsonl")
    assert "no such file" in line


def test_dropped_rows_are_counted(world):
    """--skip-bad-rows drops and counts; over-long prompts are dropped and counted, over-long responses cut and counted."""
    rows = GOOD * 8 + [{"prompt": "lunch ?", "response": ""}, {"prompt": 3, "response": "good"}]
    rows += [
        {"prompt": "lunch : " + "the soup and " * 10, "response": "good"},
        GOOD[0] | {"response": "very " * 30 + "good"},
    ]
    name = world.write("mixed.jsonl", rows)
    args = helpers.ARGS["sft"] | dict(
        dataset=name, eval_dataset="scored.jsonl", eval_split="train", steps=1, batch_size=2
    )
    output = world.run("sft", **args, skip_bad_rows=True, run_dir="runs/mixed").ok().output
    assert "mixed.jsonl: dropped 2 bad rows of 36" in output
    assert "mixed.jsonl: dropped 1 of 34 rows: prompt longer than --max-prompt-length 24" in output
    assert "mixed.jsonl: cut 1 answers (3 %) at --max-response-length 16" in output
    assert "33 responses to learn from" in output


def ultrafeedback(*scores):
    """A row of openbmb/UltraFeedback whose answers have these scores."""
    answers = [{"response": f"answer {i}", "overall_score": score} for i, score in enumerate(scores)]
    return {"instruction": "lunch ?", "completions": answers}


# kind, a second row, and what its error must say beside the file and the row
ODD_ROWS = {
    "UltraFeedback with NaN": (
        "preference",
        ultrafeedback(1.0, float("nan"), 3.0),
        "score of an answer is nan",
    ),
    "UltraFeedback with text": ("sft", ultrafeedback(1.0, "N/A"), "score of an answer is 'N/A'"),
    "UltraFeedback with true": ("preference", ultrafeedback(1.0, True), "score of an answer is True"),
    "a rank that is no number": (
        "preference",
        {"prompt": "lunch ?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": "last"}]},
        "score of an answer is 'last'",
    ),
    "a key twice": (
        "sft",
        '{"prompt": "lunch ?", "response": "good", "response": "bad"}',
        "the key 'response' stands twice",
    ),
    "a key twice, deeper": (
        "scored",
        '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "response": "x", "reward": 1}',
        "the key 'content' stands twice",
    ),
    "a split that is no text": (
        "sft",
        {"prompt": "a", "response": "b", "split": 3},
        "`split` is 3, not text",
    ),
    "no split": ("sft", {"prompt": "a", "response": "b"}, "no `split`, which other rows have"),
    "content that is no text": (
        "sft",
        {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]},
        "content of the type int, not text",
    ),
}


@pytest.mark.parametrize("case", ODD_ROWS)
def test_odd_rows(tmp_path, capsys, case):
    """Refused with the row's number; --skip-bad-rows drops and counts that row alone."""
    kind, row, words = ODD_ROWS[case]
    whole = {"preference": PAIRS[0], "sft": GOOD[0], "scored": SCORED[0]}[kind]
    if "split" in case:
        whole = whole | {"split": "train"}
    lines = [each if isinstance(each, str) else json.dumps(each) for each in (whole, row, whole)]
    file = tmp_path / "odd.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as end:
        read_rows(str(file), kind)
    assert str(end.value).startswith(f"error: {file}, row 2: ") and words in str(end.value), end.value
    assert [row["row"] for row in read_rows(str(file), kind, skip_bad_rows=True)] == [1, 3]
    assert "dropped 1 bad rows of 3" in capsys.readouterr().out


def test_a_text_of_json_that_is_no_conversation_stays_a_text(tmp_path):
    """A prompt may look like messages and be none."""
    text = '[{"role": "user", "content": "x"}, 3]'
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": text, "response": "good"}))
    assert [row["prompt"] for row in read_rows(str(file), "sft")] == [text]


def test_any_exception_of_a_row_is_its_error(tmp_path, monkeypatch):
    """Of a nesting that nobody thought of."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GOOD))

    def broken(row, kind):
        if "fish" in row["prompt"]:
            raise KeyError("two\nlines")
        return [row]

    monkeypatch.setattr(formats, "ours", broken)
    with pytest.raises(SystemExit, match="rows.jsonl, row 2: unknown nesting .KeyError") as end:
        read_rows(str(file), "sft")
    assert "\n" not in str(end.value)
    assert len(read_rows(str(file), "sft", skip_bad_rows=True)) == 3


def test_a_damaged_parquet_file_says_one_line(tmp_path):
    """The library logs what it raises, too."""
    (tmp_path / "rows.parquet").write_text("not parquet " * 20)
    code = "from common.data import read_rows; read_rows('rows.parquet', 'sft')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: rows.parquet: cannot be read")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_reward_that_is_no_function():
    """Found before a model is loaded, whatever the user's module does."""
    for name in ("helpers:ROOT", ":f", "helpers:nothing", "nowhere:f"):
        with pytest.raises(SystemExit, match=f"^error: --reward {name}"):
            Reward(name, None, SimpleNamespace(micro_batch_size=1))


def test_a_folder_that_cannot_be_made(tmp_path):
    """--run-dir under a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="^error: --run-dir .*file/run: no such folder can be made"):
        cli.make_folder(tmp_path / "file" / "run")


def test_mutated_files():
    """The first of the files of `make fuzz`: read right, or refused in one line."""
    outcomes = fuzz_data.cases(range(60))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    assert not wrong, "\n".join(f"{each.number}: {each.what}: {each.wrong}" for each in wrong)
    assert 15 < sum(bool(outcome.refused) for outcome in outcomes) < 45  # so both kinds are tried


def test_mutated_command_lines():
    """The first of its command lines: set up as far as a model, or refused in one line."""
    outcomes = fuzz_commands.cases(range(40))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    assert not wrong, "\n".join(f"{each.number}: {' '.join(each.words)}: {each.wrong}" for each in wrong)
    assert 20 < sum(bool(outcome.refused) for outcome in outcomes) < 40


@pytest.mark.parametrize("processes", [0, 2])
def test_pickled_weights_are_refused(world, processes):
    """A folder with pytorch_model.bin alone is not read, and the run ends, also where rank 0 alone finds it out."""
    import torch
    from safetensors.torch import load_file

    folder = world.path("runs/pickled")
    if not folder.exists():
        helpers.edit_model(world, "policy", "pickled")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    args = helpers.ARGS["sft"] | dict(model="runs/pickled", run_dir="runs/unpickled", overwrite=True)
    result = world.run("sft", processes, **args)
    assert (
        all(result.codes)
        and "safetensors" in result.output
        and not (world.path("runs/unpickled") / "model").exists()
    )
    if not processes:
        assert "runs/pickled" in result.error()


def test_reward_that_is_no_number(world):
    """Ends the run with one line that quotes the response."""
    line = fails(world, "ppo", patch=None, reward="helpers:nan_reward", eval_every=0)
    assert all(word in line for word in ("--reward helpers:nan_reward", "nan", "response")), line


def test_reward_function_raises_on_one_rank(world):
    """An exception ends every rank, with the traceback its author needs; none waits for ever."""
    args = helpers.ARGS["ppo"] | dict(reward="helpers:raising_reward", eval_every=0, run_dir="runs/raises")
    result = world.run("ppo", 2, **args)
    assert all(result.codes) and "no such judge" in result.output


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_stops_before_the_step(world, what):
    """A loss of inf or a NaN in the gradient names step and rows, changes no weight and no checkpoint: the run can go on."""
    args = helpers.ARGS["sft"] | dict(save_every=1, run_dir=f"runs/infinite-{what}")
    folder = world.path(args["run_dir"])
    broken = functools.partial(helpers.not_finite, what=what, at=2)
    line = world.run("sft", 2, broken, **args).error()
    assert "step 2, data rows [" in line and ("loss inf" if what == "loss" else "gradient norm nan") in line
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert not (folder / "model").exists() and [row["step"] for row in helpers.metrics(folder)] == [1, 2]
    if what == "loss":
        world.run("sft", 2, **args, resume=True).ok()
        assert [row["step"] for row in helpers.metrics(folder)] == [1, 2, 3, 3]
