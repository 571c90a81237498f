"""Mutated command lines: each sets a run up as far as the loading of a model, or is refused in one `error:` line.

    python tests/fuzz_commands.py               # 150 command lines; tests/test_input.py has the first 40
    python tests/fuzz_commands.py --only 17     # one of them, and what became of it

A case is a number: it seeds the choice of a script or a command of evaluate.py, of its flags and of what is wrong
with them. Each runs in a process of its own, in which loading a model ends it. Usage errors of the argument
parser (exit code 2) are refusals as well.
"""

import argparse
import contextlib
import functools
import importlib
import io
import os
import random
import sys
import tempfile
import typing
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests")]
)  # for the processes that it starts
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers

COUNT = 150
READY = "setup is done"  # what a process says instead of loading a model
# Scripts as in helpers.ARGS; of each command of evaluate.py flags that are right. `{n}` is the number of the case.
EVALUATE = {
    "values": "--models reviews --dataset pairs.jsonl --max-prompt-length 24 --run-dir runs/{n}",
    "responses": "--models reviews --dataset prompts.jsonl --max-prompt-length 24 --run-dir runs/{n}",
    "judge": "--responses a.jsonl b.jsonl --judge-model j --dry-run --run-dir runs/{n}",
    "all": "--models reviews --dataset prompts.jsonl --responses-flags=--max-prompt-length=24 --dry-run --run-dir runs/{n}",
}
FLAGS = {}
for _script in helpers.SCRIPTS:
    _words = []
    for _name, _value in helpers.ARGS[_script].items():
        if _value not in ((), None, ""):
            _words += [f"--{_name.replace('_', '-')}", str(_value)]
    FLAGS[_script] = [*_words, "--run-dir", "runs/{n}"]
FLAGS |= {f"evaluate {name}": words.split() for name, words in EVALUATE.items()}

# Values that no number of any flag may have; of --threshold and --guide-beta some are right.
NEVER = [
    "nan",
    "-inf",
    "-1e308",
    "-7",
    "-0.001",
    "1e400",
    "inf",
    "x",
    "",
    "1,5",
    "--",
    "9" * 30,
    "9" * 5000,
    "0x10",
]
# Values that some flags may have and others not: right, or one line.
SOMETIMES = ["0", "1", "2", "3", "0.5", "1e-300", "1e308", "2147483647", "100", "-1", "1e3", "True", "٣"]

MISSING = [
    "nowhere.jsonl",
    "./nowhere",
    "/nowhere/at/all",
    "",
    ".",
    "empty",
    "rows.csv",
    "a file.jsonl",
    "prompts.jsonl,",
]
TEXTS = {  # flags that name something -> values that name nothing
    "model": MISSING,
    "models": MISSING,
    "ref_model": [value for value in MISSING if value],
    "gvm": [value for value in MISSING if value],
    "critic": [value for value in MISSING if value],
    "dataset": MISSING,
    "eval_dataset": [value for value in MISSING if value],
    "old_dataset": [value for value in MISSING if value],
    "like": [value for value in MISSING if value],
    "reward": [
        "nowhere:f",
        "helpers:nothing",
        ":",
        "helpers:",
        ":f",
        "./nowhere",
        "empty",
        "1:2",
        "helpers:ROOT",
    ],
    "eval_reward": ["nowhere:f", "helpers:nothing", ":", "helpers:", "./nowhere", "helpers:ROOT"],
    "columns": [
        "prompt",
        "prompt nothing",
        "answer prompt",
        "prompt prompt+nothing",
        "prompt ''",
        "'' prompt",
    ],
    "split": ["nothing", ""],
    "part": ["best", ""],
    "precision": ["fp16", ""],
    "run_dir": ["", "prompts.jsonl", "prompts.jsonl/x", "/proc/x"],
    "lr_schedule": ["step"],
    "rollout_engine": ["vllm", "hf"],
    "judge_model": [""],
    "responses": [
        "a.jsonl",
        "nowhere.jsonl nowhere2.jsonl",
        "a.jsonl a.jsonl",
        "empty.jsonl a.jsonl",
        "rows.csv a.jsonl",
    ],
    "endpoint": ["", "x y", "ftp://x"],
    "mode": ["best"],
    "template": ["nowhere.txt", "a.jsonl"],
    "questions": ["nowhere.jsonl", "a.jsonl"],
    "extra": ["", "[]", "3", "{", "nan"],
    "judgements": ["nowhere.jsonl", "a.jsonl"],
    "responses_flags": ["--samples 0", "--nothing", "--models x", "'", "--temperature nan"],
    "judge_flags": ["--tries 0 --judge-model", "--seed 3"],
    "names": ["a b c", "a/b"],
    "text": ["alone"],
    "source": ["nothing"],
}
# Flags that are right alone and say nothing together, by script.
EXCLUDING = {
    "dvpo": [
        "--batch-size 9 --mini-batch-size 4",
        "--beta 0 --kl-target 0.1",
        "--log-odds",
        "--gamma 0.9 --log-odds",
    ],
    "ppo": ["--batch-size 9 --mini-batch-size 4", "--beta 0 --kl-target 0.1", "--eval-prompts 500"],
    "grpo": ["--batch-size 9 --mini-batch-size 4", "--group-size 2", "--group-size 1", "--clip 1.5"],
    "remax": ["--batch-size 9 --mini-batch-size 4", "--clip-high 0", "--beta -1"],
    "kto": [
        "--desirable-weight 0 --undesirable-weight 0",
        "--beta 0",
        "--dataset scored.jsonl --threshold 99",
    ],
    "dpo": ["--beta 0", "--label-smoothing 0.5", "--eval-fraction 0", "--eval-fraction 1"],
    "rpo": ["--tau 0", "--keep-responses 0", "--eval-fraction 0", "--dataset pairs.jsonl"],
    "dro": ["--tau 0", "--keep-responses 1.01", "--eval-fraction 1"],
    "sft": ["--eval-fraction 0", "--eval-fraction 1", "--max-prompt-length 1"],
    "reward": ["--eval-fraction 0", "--eval-fraction 1", "--dataset prompts.jsonl"],
    "gvm_td": [
        "--eval-fraction 0",
        "--eval-gap 100",
        "--max-characters 1",
        "--old-share 1 --old-dataset scored.jsonl",
    ],
    "evaluate values": [
        "--like runs/x --dataset pairs.jsonl",
        "--text alone",
        "--reward a:b",
        "--fraction 0",
    ],
    "evaluate responses": [
        "--samples 2",
        "--decode guided",
        "--decode best-of",
        "--gvm reviews",
        "--pass-at 1",
        "--top-k 3",
    ],
    "evaluate judge": ["--mode mt-bench", "--questions a.jsonl", "--references a.jsonl", "--endpoint a b c"],
    "evaluate all": ["--judge-model j", "--names a b", "--responses-flags=--samples=2"],
}
TRAINED = ["--resume --overwrite", "--shard-size 2", "--learning-rate 1", "--timeout-minutes 0", "--lr"]


class Outcome(NamedTuple):
    """What became of a case. `wrong`: "" where it is as it should be, else what is wrong."""

    number: int
    words: list[str]
    refused: str
    wrong: str


# --- command lines --------------------------------------------------------------------------------------------


def command_of(name: str):
    """The dataclass of its flags."""
    script, _, command = name.partition(" ")
    module = importlib.import_module(script)
    return module.COMMANDS[command][0] if command else module.Args


def number_flags(command) -> dict[str, bool]:
    """Its flags that are numbers, or several -> whether whole ones."""
    found = {}
    for name, type_ in typing.get_type_hints(command).items():
        kinds = {type_, *typing.get_args(type_)}
        if kinds & {int, float}:
            found[name] = float not in kinds
    return found


def is_wrong(flag: str, value: str, is_whole: bool) -> bool | None:
    """Whether the value of a number in NEVER is wrong for this flag; None: right, or one line."""
    if value.isdigit() and not is_whole:
        return None
    if flag == "threshold":  # any finite number
        return value not in ("-1e308", "-7", "-0.001")
    return (flag, value) not in (("guide_beta", "inf"), ("guide_beta", "1e400"))


def command_line(number: int) -> tuple[str, list[str], bool | None]:
    """(script or command, flags, whether they must be refused; None: either is right)."""
    import shlex

    draw = random.Random(number)
    name = draw.choice(sorted(FLAGS))
    words = [word.replace("{n}", str(number)) for word in FLAGS[name]]
    command = command_of(name)
    numbers = number_flags(command)
    what = draw.choice(
        ["never"] * 4 + ["sometimes", "text", "text", "text", "excluding", "excluding", "nothing"]
    )
    if what == "nothing":
        return name, words, False
    if what in ("never", "sometimes"):
        flag = draw.choice(sorted(numbers))
        value = draw.choice(NEVER if what == "never" else SOMETIMES)
        must = is_wrong(flag, value, numbers[flag]) if what == "never" else None
        return name, [*words, f"--{flag.replace('_', '-')}={value}"], must
    if what == "excluding":
        more = draw.choice(EXCLUDING[name] + TRAINED * (" " not in name))
        return name, [*words, *shlex.split(more)], True
    flags = [flag for flag in typing.get_type_hints(command) if flag in TEXTS]
    flag = draw.choice(sorted(flags))
    value = draw.choice(TEXTS[flag])
    values = shlex.split(value) if " " in value else [value]
    if flag.endswith("_flags"):
        return name, [*words, f"--{flag.replace('_', '-')}={value}"], None
    return name, [*words, f"--{flag.replace('_', '-')}", *values], must_be_refused(name, flag, value)


def must_be_refused(name: str, flag: str, value: str) -> bool | None:
    """Whether a text of TEXTS is wrong for this script; None: some of them are right."""
    if flag == "dataset" and value == "" and name == "evaluate values":
        return None  # the data of the model's run
    if name in ("evaluate all", "evaluate judge") and flag in ("run_dir", "models"):
        return True if value == "" else None  # a dry run opens neither
    if flag == "split":
        return True if value == "" else None  # a file without splits is used whole
    if flag in ("gvm", "names", "text", "old_dataset", "endpoint"):
        return None  # a file where nothing reads it, a name for each
    return True


# --- verdicts -------------------------------------------------------------------------------------------------


def ready(*_, **__):
    """In place of `load_model`: the setup was right."""
    print(READY, flush=True)
    os._exit(0)


def run_setup(name: str, argv: list[str]) -> None:
    """What `python script.py argv` does, up to the loading of a model."""
    from common import cli, distributed

    script, _, command = name.partition(" ")
    module = importlib.import_module(script)
    if command:
        for part in ("values", "responses", "all"):
            importlib.import_module(f"evaluation.{part}").load_model = ready
        helpers.replace_load_model(module, ready)
        module.main([command, *argv])
    else:
        helpers.replace_load_model(module, ready)
        distributed.launch(module.main, cli.parse(module.Args, module.REVIEWS, argv))


def parse_here(name: str, argv: list[str]) -> str | None:
    """What the parser alone ends with, in this process, which is much faster; None where it lets the flags pass."""
    from common import cli

    script, _, command = name.partition(" ")
    module = importlib.import_module(script)
    flags, reviews, _ = module.COMMANDS[command] if command else (module.Args, module.REVIEWS, None)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if command in ("judge", "length_controlled"):
                cli.parse_alone(flags, argv)
            else:
                cli.parse(flags, reviews, argv)
    except SystemExit as end:
        return "usage" if end.code == 2 else str(end.code)
    return None


def case(number: int, world) -> Outcome:
    """The verdict on one case."""
    name, words, must_refuse = command_line(number)
    shown = [name, *(word[:60] for word in words)]
    line = parse_here(name, words)
    if line is not None:
        one = line == "usage" or (line.startswith("error: ") and len(line.splitlines()) == 1)
        wrong = "" if one and must_refuse is not False else f"refused: {line}"
        return Outcome(number, shown, line, wrong)
    result = helpers.Job(world.folder, functools.partial(run_setup, name, words), 0).wait()
    (code,) = result.codes
    if code == 0:
        why = "accepted" if must_refuse else ""
        return Outcome(number, shown, "", why)
    if code == 2 and "Traceback" not in result.output:
        why = f"refused as usage: {result.output[-600:]}" if must_refuse is False else ""
        return Outcome(number, shown, "usage", why)
    try:
        line = result.error()
    except AssertionError:
        return Outcome(number, shown, "", f"exit code {code}: {result.output[-1500:]}")
    return Outcome(number, shown, line, f"refused: {line}" if must_refuse is False else "")


def make_world(folder: Path):
    """The files that command lines name."""
    helpers.make_world(folder)
    world = helpers.World(folder)
    for name, answer in (("a", "warm"), ("b", "cold")):
        world.write(
            f"{name}.jsonl", [{"prompt": f"soup {i} ?", "response": f"{answer} {i} ."} for i in range(3)]
        )
    world.write("empty.jsonl", [])
    world.write("rows.csv", ["prompt,response"])
    world.path("empty").mkdir()
    return world


def cases(numbers) -> list[Outcome]:
    """Of each number its verdict."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        return [case(number, world) for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help="number of command lines")
    parser.add_argument("--only", type=int, help="this one alone")
    options = parser.parse_args()
    outcomes = cases([options.only] if options.only is not None else range(options.count))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    for outcome in outcomes if options.only is not None else wrong:
        print(f"{outcome.number}: {' '.join(outcome.words)}\n    {outcome.refused}\n    {outcome.wrong}")
    refused = sum(bool(outcome.refused) for outcome in outcomes)
    print(f"{len(outcomes)} command lines: {refused} refused, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    # as a module that the processes find by its name
    import fuzz_commands

    fuzz_commands.main()
