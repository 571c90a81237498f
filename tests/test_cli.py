"""The command line: --help, defaults of the embedded world and of the papers, plain python, torchrun."""

import ast
import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
import typing

import helpers
import pytest

import evaluate
from common import cli
from common.cli import parse

TINY = "--steps 2 --batch-size 4 --eval-every 2 --save-every 2".split()
OFFLINE = [*TINY, "--eval-fraction", "0.02"]
ONLINE = [*TINY, *"--mini-batch-size 2 --epochs 1 --max-response-length 8 --eval-prompts 4".split()]
FLAGS = {"sft": OFFLINE, "reward": OFFLINE, "gvm_td": OFFLINE, "dvpo": ONLINE, "ppo": ONLINE, "rpo": OFFLINE}
FLAGS |= {
    "dro": OFFLINE,
    "kto": OFFLINE,
    "dpo": OFFLINE,
    "grpo": [*ONLINE, "--group-size", "2"],
    "remax": ONLINE,
}
FILES = {  # the same on the small files: torchrun's workers are slow enough to start
    "sft": "--dataset scored.jsonl --eval-fraction 0.2",
    "reward": "--dataset pairs.jsonl --eval-fraction 0.2",
    "gvm_td": "--dataset pairs.jsonl --eval-fraction 0.2",
    "dvpo": "--dataset prompts.jsonl",
    "ppo": "--dataset prompts.jsonl --reward assets.reviews:reward",
    "rpo": "--dataset scored.jsonl --eval-fraction 0.2",
    "dro": "--dataset scored.jsonl --eval-fraction 0.2",
    "kto": "--dataset labels.jsonl --eval-fraction 0.2",
    "dpo": "--dataset pairs.jsonl --eval-fraction 0.2",
    "grpo": "--dataset prompts.jsonl --reward assets.reviews:reward",
    "remax": "--dataset prompts.jsonl --reward assets.reviews:reward",
}
# with data of one's own the defaults are for models of more than the embedded one's 512 positions
LENGTHS = ("--max-prompt-length", "64", "--max-response-length", "64")
PAPER = {  # 2502.16944; the others' own papers
    "dro": dict(
        lr=1e-4, lr_schedule="linear", warmup_steps=150, tau=1.0, shared_encoder=False, rescale_lr=True
    ),
    "kto": dict(lr=5e-6, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
    "dpo": dict(lr=1e-6, beta=0.1, batch_size=64, warmup_steps=150),
    "grpo": dict(lr=1e-6, beta=0.04, epochs=1, clip=0.2, scale_std=True, aggregation="grpo"),
    "remax": dict(lr=1e-6, epochs=1),
    "rpo": dict(
        lr=1e-4,
        lr_schedule="linear",
        warmup_steps=150,
        tau=1.0,
        partition="reference",
        length_normalise=False,
    ),
    "sft": dict(lr=2e-5, lr_schedule="cosine", batch_size=16, epochs=3),
    "reward": dict(lr=2e-5, lr_schedule="linear", epochs=2),
    "gvm_td": dict(lr=2e-6, batch_size=32),
    "dvpo": dict(
        lr=2e-6, batch_size=8, mini_batch_size=2, epochs=4, max_response_length=1024, beta=0.05, clip=0.2
    ),
    "ppo": dict(
        lr=2e-6, batch_size=8, mini_batch_size=2, epochs=4, max_response_length=1024, beta=0.05, clip=0.2
    ),
}


def fields(script):
    """name -> docstring of the fields of a script's Args."""
    tree = ast.parse((helpers.ROOT / f"{script}.py").read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {
        field.target.id: doc.value.value for field, doc in zip(args.body[::2], args.body[1::2], strict=True)
    }


def squeeze(text):
    return re.sub(r"[^a-z0-9]", "", text.lower())


@pytest.mark.parametrize("script", helpers.SCRIPTS)
def test_help(world, script):
    """--help ends well and shows every field with its docstring."""
    result = world.command(script, "--help").ok()
    text = squeeze(result.output)
    for name, doc in fields(script).items():
        assert f"--{name.replace('_', '-')}" in result.output, name
        assert squeeze(doc) in text, name


@pytest.mark.parametrize("script", helpers.SCRIPTS)
def test_defaults(script):
    """The embedded world's defaults hold for it alone, the paper's for all other data, and a flag wins over both."""

    module = importlib.import_module(script)
    of = lambda *argv: parse(module.Args, module.REVIEWS, list(argv))
    assert vars(of()) == vars(module.Args(**module.REVIEWS))
    assert vars(of("--lr", "0.5", "--part", "all")) == vars(module.Args(**module.REVIEWS)) | {
        "lr": 0.5,
        "part": "all",
    }
    default = of("--dataset", "answers.jsonl")
    assert vars(default) == vars(module.Args()) | {"dataset": "answers.jsonl"}
    assert {name: getattr(default, name) for name in PAPER[script]} == PAPER[script]
    if script == "gvm_td":
        assert default.max_prompt_length + default.max_response_length == 1024
    assert of("--dataset", "answers.jsonl", "--columns", "prompt", "question").columns == {
        "prompt": "question"
    }


@pytest.mark.parametrize("script", helpers.SCRIPTS)
def test_sizes_must_be_positive(script):
    """A batch size, length or learning rate of zero or less is refused in one line."""

    module = importlib.import_module(script)
    flags = ["batch-size", "micro-batch-size", "max-prompt-length", "max-response-length", "lr", "keep"]
    for flag in flags + ["mini-batch-size"] * (script in helpers.ONLINE):
        for value in ("0", "-1"):
            with pytest.raises(SystemExit, match=rf"--{flag} is {value}(\.0)?; it must be above 0"):
                parse(module.Args, module.REVIEWS, [f"--{flag}={value}"])
    with pytest.raises(SystemExit, match=r"--steps is -1"):
        parse(module.Args, module.REVIEWS, ["--steps=-1"])


def test_unknown_part(world):
    """--part takes the parts there are; the message names them."""
    result = world.command("sft", "--part", "best")
    assert result.codes == [2] and all(
        part in result.output for part in ("--part", "best", "sft", "value", "rl")
    )
    assert "Traceback" not in result.output


COMMANDS = [importlib.import_module(script).Args for script in helpers.SCRIPTS]
COMMANDS += [flags for flags, _, _ in evaluate.COMMANDS.values()]


def numbers_of(command):
    """The fields of a dataclass of flags that are numbers, or tuples of them."""
    types = typing.get_type_hints(command)
    return [
        field
        for field in dataclasses.fields(command)
        if {int, float} & {types[field.name], *typing.get_args(types[field.name])}
    ]


def test_every_number_has_a_range():
    """Of each flag of each command that is a number, what it may be stands in cli.RANGES; and no more stands there."""
    found = {field.name for command in COMMANDS for field in numbers_of(command)}
    assert found == set(cli.RANGES)
    assert len(found) > 60


def test_defaults_are_in_range():
    """A default lies outside its range only where it has a meaning of its own."""
    outside = set()
    for command in COMMANDS:
        for field in numbers_of(command):
            try:
                for each in field.default if isinstance(field.default, tuple) else (field.default,):
                    if each is not None:
                        cli.check_number(field.name, each)
            except SystemExit:
                outside.add((field.name, field.default))
    assert outside == {("steps", 0), ("temperature", 0.0), ("context_pairs", -1)}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__module__.split(".")[-1])
def test_numbers_out_of_range(command):
    """No number of any command may be nan or far below zero, and none but --guide-beta inf."""
    for field in numbers_of(command):
        types = typing.get_type_hints(command)[field.name]
        is_whole = float not in {types, *typing.get_args(types)}
        for value in (-7, 2**31) if is_whole else (-7.0, math.nan, math.inf):
            allowed = (field.name, value) in (("guide_beta", math.inf), ("threshold", -7.0))
            required = {
                each.name: "x" for each in dataclasses.fields(command) if each.default is each.default_factory
            }
            given = (value,) if isinstance(field.default, tuple) else value
            args = command(**required | {field.name: given})
            if allowed:
                cli.check(args)
                continue
            with pytest.raises(SystemExit) as end:
                cli.check(args)
            flag = field.name.replace("_", "-")
            assert str(end.value).startswith(f"error: --{flag} is {value}; it must be "), field.name
            assert "\n" not in str(end.value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("gamma", (0.5, 1), (0, 1.01)),  # (0, 1]
        ("lora_dropout", (0, 0.99), (-0.01, 1)),  # [0, 1)
        ("clip", (0.01, 0.99), (0, 1)),  # (0, 1)
        ("lam", (0, 1), (-0.01, 1.01)),  # [0, 1]
        ("guide_beta", (0.1, math.inf), (0, math.nan)),  # (0, inf]
        ("seed", (0, 2**31 - 1), (-1, 2**31)),
        ("a_flag_of_yours", (-5, 1e300), (math.nan, -math.inf)),
    ],
)
def test_ends_of_intervals(name, good, bad):
    """Square brackets are with their end, round ones without."""
    for value in good:
        cli.check_number(name, value)
    for value in bad:
        with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} is "):
            cli.check_number(name, value)


def test_the_message_says_the_interval():
    """In words."""
    with pytest.raises(SystemExit, match="^error: --gamma is 2.0; it must be above 0 and at most 1$"):
        cli.check_number("gamma", 2.0)
    with pytest.raises(SystemExit, match="^error: --max-grad-norm is nan; it must be above 0 and finite$"):
        cli.check_number("max_grad_norm", math.nan)


def test_flags_that_exclude_each_other():
    """--resume goes on with a run, --overwrite replaces it."""
    module = importlib.import_module("sft")
    parse(module.Args, module.REVIEWS, ["--resume"])
    with pytest.raises(SystemExit, match="--resume .* --overwrite"):
        parse(module.Args, module.REVIEWS, ["--resume", "--overwrite"])


def test_log_odds(world):
    """--log-odds scores a response with atanh of the GVM's last value."""
    found = []
    for log_odds in (False, True):
        args = helpers.ARGS["dvpo"] | dict(
            steps=1, batch_size=1, mini_batch_size=1, eval_every=0, log_odds=log_odds, gvm="runs/signs"
        )
        world.run("dvpo", **args, run_dir=f"runs/odds-{log_odds}").ok()
        found += [helpers.metrics(world.path(f"runs/odds-{log_odds}"))[0]["objective/score"]]
    assert found[1] == pytest.approx(math.atanh(max(-0.99, min(0.99, found[0]))), rel=1e-5)


def assert_complete(folder, script):
    """A run folder of two steps with all that a run leaves."""
    args = json.loads((folder / "args.json").read_text())
    assert args["steps"] == 2
    assert args["dataset"] != "reviews" or args["part"] == importlib.import_module(script).REVIEWS["part"]
    assert {row["step"] for row in helpers.metrics(folder)} >= {1, 2}
    assert any(key.startswith("eval/") for row in helpers.metrics(folder) for key in row)
    if script != "gvm_td":
        assert helpers.samples(folder)
    assert list(folder.glob("events.*")) and list((folder / "checkpoints/step-000002").glob("rng-*"))
    for name in ("model", "critic") if script == "ppo" else ("model",):
        files = {path.name for path in (folder / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
        assert not any(file.endswith(".bin") for file in files)
    if script in helpers.ONLINE + ("sft", "rpo"):
        assert (folder / "model/generation_config.json").exists()


@pytest.mark.parametrize("script", [s for s in helpers.SCRIPTS if s != "reward"])
def test_plain(world, script):
    """`python script.py` on the embedded world leaves a complete run folder."""
    world.command(script, *FLAGS[script], "--run-dir", f"runs/plain-{script}").ok()
    assert_complete(world.path(f"runs/plain-{script}"), script)


def test_plain_process(world):
    """The same from a real shell, from another folder than the repository, and without a word on stderr but its bar."""
    flags = [*FLAGS["reward"], "--run-dir", "runs/plain-reward"]
    command = [sys.executable, str(helpers.ROOT / "reward.py"), *flags]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=world.folder, capture_output=True, text=True, timeout=helpers.TIMEOUT, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert_complete(world.path("runs/plain-reward"), "reward")


@pytest.mark.parametrize("script", helpers.SCRIPTS)
def test_torchrun(world, script):
    """Two ranks under torchrun, fresh interpreters both, end with status 0 and a clean exit."""
    flags = [*FLAGS[script], *FILES[script].split(), *LENGTHS, "--run-dir", f"runs/torchrun-{script}"]
    result = world.command(script, *flags, processes=2).ok()
    assert "terminate called" not in result.output and "Traceback" not in result.output, result.output
    assert_complete(world.path(f"runs/torchrun-{script}"), script)
