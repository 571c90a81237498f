"""What a run says to somebody who runs it for the first time, on data of their own."""

import json

import helpers
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.data import hold_out
from common.tokenization import load_tokenizer, require_known_words


def command(world, script, *flags):
    """Its output, with a tiny model's lengths."""
    lengths = ("--max-prompt-length", "64", "--max-response-length", "64")
    return world.command(script, *lengths, *flags)


def test_the_first_and_the_last_lines(world):
    """How long the run is and which rate it reaches; where the model is and what to run with it; evaluations say
    that they are."""
    flags = ["--dataset", "pairs.jsonl", "--eval-fraction", "0.2", "--eval-prompts", "2", "--batch-size", "4"]
    flags += ["--steps", "3", "--run-dir", "runs/first", "--lr", "1e-5"]
    lines = command(world, "dpo", *flags).ok().output.splitlines()
    plan = next(line for line in lines if line.startswith("first: 3 steps of 4"))
    assert "learning rate 1e-05 after 0 steps of warm-up, not 150, then" in plan
    rates = [row["dpo/lr"] for row in helpers.metrics(world.path("runs/first")) if "dpo/lr" in row]
    assert max(rates) == pytest.approx(1e-5)
    assert any(line.startswith("first 3/3 held out: ") for line in lines)
    assert any(line.startswith("first 3/3 loss") for line in lines)
    assert "first: done. The model is in runs/first/model; next: python evaluate.py responses" in lines[-2]
    assert "runs/first/checkpoints (" in lines[-1] and "is for --resume with more steps alone" in lines[-1]


def test_half_of_a_pair_is_said(world):
    """The embedded policy on data of one's own; on a text it does not know, the run ends."""
    flags = ["--steps", "1", "--batch-size", "4", "--eval-fraction", "0.2", "--run-dir", "runs/half"]
    output = command(world, "dpo", "--dataset", "pairs.jsonl", "--overwrite", *flags).ok().output
    assert (
        "--model is not given: the embedded toy policy of restaurant reviews is trained on pairs.jsonl"
        in output
    )
    text = {"prompt": "Explain how tides come about!", "response": "The moon attracts the sea's water."}
    world.write("tides.jsonl", [text] * 8)
    reward = ["--reward", "assets.reviews:reward", "--eval-prompts", "1"]
    line = command(world, "ppo", "--dataset", "tides.jsonl", *reward, "--run-dir", "runs/tides").error()
    assert "% of its tokens are unknown to the model's tokenizer; give its --model" in line
    helpers.edit_model(world, "policy", "mine")
    output = (
        world.command("sft", "--model", "runs/mine", "--steps", "1", "--run-dir", "runs/other-half")
        .ok()
        .output
    )
    assert "--dataset is not given: runs/mine is trained on the embedded restaurant reviews" in output


def test_some_unknown_words_are_said(capsys):
    from assets import reviews

    tokenizer = load_tokenizer(reviews.folder("policy"))
    known = tokenizer("the room was good", add_special_tokens=False)["input_ids"]
    require_known_words(tokenizer, [{"prompt_ids": known * 4, "x_ids": [tokenizer.unk_token_id]}], "d")
    assert "d: 6 % of its tokens are unknown" in capsys.readouterr().out
    require_known_words(tokenizer, [{"prompt_ids": known * 40, "x_ids": [tokenizer.unk_token_id]}], "d")
    assert not capsys.readouterr().out


def test_few_held_out_rows_are_said(capsys):
    rows = [{"prompt": str(i)} for i in range(40)]
    _, held_out = hold_out(rows, 0.05, 0)
    assert f"only {len(held_out)} rows are held out" in capsys.readouterr().out
    hold_out(rows * 20, 0.5, 0)
    assert not capsys.readouterr().out


def test_what_is_cut_is_said_of_which_data_and_with_its_share(world):
    rows = [json.loads(line) for line in world.path("scored.jsonl").read_text().splitlines()]
    world.write("long-and-short.jsonl", rows)
    flags = [
        "--dataset",
        "long-and-short.jsonl",
        "--eval-fraction",
        "0.3",
        "--steps",
        "1",
        "--batch-size",
        "4",
    ]
    flags += ["--max-response-length", "8", "--run-dir", "runs/cut", "--eval-prompts", "2"]
    output = world.command("sft", *flags).ok().output
    assert "long-and-short.jsonl: cut " in output and "long-and-short.jsonl, held out: cut " in output
    assert " %) at --max-response-length 8" in output


def test_tensorboard_shows_samples_and_the_values_picture(world):
    args = helpers.ARGS["sft"] | dict(steps=1, run_dir="runs/board")
    world.run("sft", **args).ok()
    events = EventAccumulator(str(world.path("runs/board")), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    assert "samples/text_summary" in events.Tags()["tensors"]
    args = helpers.ARGS["gvm_td"] | dict(steps=1, run_dir="runs/board-values")
    world.run("gvm_td", **args).ok()
    events = EventAccumulator(str(world.path("runs/board-values")), size_guidance={"images": 0})
    events.Reload()
    assert "values" in events.Tags()["images"]
    assert not world.path("runs/board-values/samples.jsonl").exists()
