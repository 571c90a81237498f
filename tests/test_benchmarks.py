"""tools/ and paper/: the runner of jobs, the commands of the papers' tables, verdicts, and tables put into a page."""

import dataclasses
import gzip
import importlib
import json
import re
import types

import helpers
import pytest

import evaluate
from assets import reviews
from common.cli import parse
from paper import real_policies, real_values, variants
from paper import report as paper_report
from paper import tables as paper_tables
from tools import demo
from tools.jobs import Jobs

SCRIPT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
needs = [pathlib.Path(x) for x in sys.argv[1:] if x.endswith("/model")]
if "--fail" in sys.argv or not all((need / "x").exists() for need in needs):
    sys.exit(3)
(folder / "model").mkdir(exist_ok=True)
(folder / "model/x").write_text((folder / "model/x").read_text() + "." if (folder / "model/x").exists() else ".")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_jobs_wait_for_what_they_need_and_resume(script, tmp_path, capsys):
    """Each once, shared ones once for all seeds, in an order that holds; nothing twice on a second call; a changed one anew."""
    commands = {
        "base": [script],
        "a": [script, "{out}/base/model"],
        "b": [script, "{home}/a/model", "--seed", "{seed}"],
    }
    out = tmp_path / "out"

    def go():
        Jobs(out, commands, [(0, "b"), (1, "b"), (0, "a")], {"base"}).run(2)
        return {str(path.relative_to(out).parents[1]): path.read_text() for path in sorted(out.glob("**/x"))}

    assert go() == {"base": ".", "seed0/a": ".", "seed0/b": ".", "seed1/a": ".", "seed1/b": "."}
    assert "[5/5]" in capsys.readouterr().out
    assert set(go().values()) == {"."}
    record = json.loads((out / "seed1/b/job.json").read_text())
    assert record["command"][1:] == [str(out / "seed1/a/model"), "--seed", "1"] and record["seconds"] >= 0
    commands["b"].append("--more")
    assert go() == {"base": ".", "seed0/a": ".", "seed0/b": "..", "seed1/a": ".", "seed1/b": ".."}


def test_a_failed_job_takes_only_what_needs_it(script, tmp_path, capsys):
    """The others are finished, the end says in one line each what is missing, and the next call goes on."""
    commands = {"bad": [script, "--fail"], "after": [script, "{home}/bad/model"], "good": [script]}
    jobs = lambda: Jobs(tmp_path / "out", commands, [(0, "after"), (0, "good")], set())
    with pytest.raises(SystemExit) as stopped:
        jobs().run(1)
    assert "2 of 3 runs are missing" in str(stopped.value) and "bad.log" in str(stopped.value)
    assert (tmp_path / "out/seed0/good/model/x").exists() and not (
        tmp_path / "out/seed0/after/job.json"
    ).exists()
    commands["bad"].remove("--fail")
    jobs().run(1)
    assert (tmp_path / "out/seed0/after/model/x").exists() and (
        tmp_path / "out/seed0/good/model/x"
    ).read_text() == "."


@pytest.mark.parametrize("quick", [False, True])
def test_commands_of_the_papers_tables(quick, tmp_path):
    """Each table's jobs exist, what they need too, and every command is one its script accepts."""
    commands = paper_tables.commands(quick)
    wanted = [(0, job) for _, needs in paper_report.TABLES.values() for job in needs]
    jobs = Jobs(tmp_path, commands, wanted, set())
    names = {name for _, name in jobs.order}
    assert names == set(commands), set(commands) - names  # no job is made for nothing
    for job in jobs.order:
        words = jobs.words(job)
        for word in words:
            if str(tmp_path) in word and "/data/" not in word:
                assert word.removeprefix(f"{tmp_path}/").removeprefix("seed0/").split("/")[0] in commands, (
                    word
                )
        if words[0] in ("paper/tables.py",):
            continue
        module, argv = importlib.import_module(words[0].removesuffix(".py")), [*words[1:], "--run-dir", "x"]
        if words[0] == "evaluate.py":
            arguments, defaults, _ = module.COMMANDS[argv[0]]
            args = parse(arguments, defaults, argv[1:])
        else:
            args = parse(module.Args, module.REVIEWS, argv)
            assert dataclasses.asdict(args)["steps"] > 0
    timed = commands["ppo"]
    assert "--steps" in timed and "--eval-every" in timed  # what the timed runs change


def test_data_and_commands_of_the_real_values(tmp_path, monkeypatch):
    """No answer of a held-out policy is trained on; pairs are --gap apart, in the right order, and few of a prompt; every command
    is one its script accepts."""
    rows = [
        {"prompt": f"q{i}", "response": f"answer {j}", "reward": float(j), "policy": f"p{j}", "split": split}
        for i, split in enumerate(["train"] * 6 + ["test"] * 2)
        for j in range(6)
    ]
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = dict(
        scored=file,
        held_out=["p4", "p5"],
        gap=2.0,
        max_characters=50,
        run_dir=tmp_path,
        out=tmp_path,
        all_policies=True,
    )
    args |= dict(
        model="m",
        layers=2,
        lr=1e-4,
        epochs=1,
        batch_size=8,
        max_prompt_length=8,
        max_response_length=8,
        critic="",
    )
    args = types.SimpleNamespace(**args, context_pairs=[0, 1])
    real_values.write_data(args)
    read = lambda name: [
        json.loads(line)
        for line in gzip.decompress((tmp_path / f"{name}.jsonl.gz").read_bytes()).splitlines()
    ]
    assert {row["policy"] for row in read("known")} == {"p0", "p1", "p2", "p3"} and len(read("known")) == 24
    assert {row["prompt"] for row in read("known_test_pairs")} == {"q6", "q7"} and len(
        read("known_test_pairs")
    ) == 2 * 3
    assert len(read("known_train_pairs")) == 6 * 2 and not read("strange_pairs")  # p4 and p5 are 1 apart
    for name in ("known_train_pairs", "all_test_pairs"):
        assert all(int(row["chosen"][-1]) - int(row["rejected"][-1]) >= 2 for row in read(name))
    commands, judging = real_values.commands(args)
    jobs = Jobs(tmp_path, commands, [(0, job) for job in judging], {"data"})
    assert {name for _, name in jobs.order} == set(commands)
    for job in jobs.order:
        words = jobs.words(job)
        if words[0] == "evaluate.py":
            parse(evaluate.Values, {}, words[2:])
        elif words[0] != "paper/real_values.py":
            parse(importlib.import_module(words[0].removesuffix(".py")).Args, {}, words[1:])


@pytest.mark.parametrize("scored", ["s.jsonl", ""])
def test_commands_of_the_real_policies(tmp_path, scored):
    """Every command is one its script accepts, each part of the data goes to one stage, and all that is measured is trained."""
    args = dict(
        model="m",
        pairs="p.jsonl",
        scored=scored,
        reward=["a:b"],
        only=[*real_policies.NAMES],
        steps=3,
        rl_steps=2,
    )
    args |= dict(
        threshold=0.0, prompts=4, flags="--max-response-length 8", offline_flags="", rl_flags="--epochs 1"
    )
    commands, wanted = real_policies.commands(types.SimpleNamespace(**args))
    assert wanted == [name for name in real_policies.NAMES if scored or name not in ("kto", "dro", "rpo")]
    jobs = Jobs(tmp_path, commands, [(0, "measured")], set())
    assert {name for _, name in jobs.order} == {*wanted, "reward", "gvm", "measured"}
    for job in jobs.order:
        words = jobs.words(job)
        if words[0] == "evaluate.py":
            parsed = parse(evaluate.Responses, {}, words[2:])
            assert parsed.max_response_length == 8 and parsed.part == "rl"
        else:
            parsed = parse(importlib.import_module(words[0].removesuffix(".py")).Args, {}, words[1:])
            assert parsed.part == (
                "sft" if job[1] == "sft" else "rl" if job[1] in real_policies.ONLINE else "value"
            )


def test_scripts_of_the_variants_exist():
    assert all((helpers.ROOT / script).exists() for script, *_ in variants.METHODS.values())


def test_verdict():
    """By the sign in every seed; one seed against the others leaves it open."""
    assert paper_report.verdict([0.1, 0.2]).startswith("**holds**")
    assert paper_report.verdict([-0.1, 0.0]).startswith("**does not hold**")
    assert paper_report.verdict([0.5, -0.1, 0.2]) == "not separated: 2 of 3 seeds (+0.2, 3 seeds)"
    assert "1 seed)" in paper_report.verdict([1.0])


def test_tables_go_between_their_marks(tmp_path, monkeypatch, capsys):
    """And nothing else of the page changes; a table without marks stays beside the runs."""
    tables = {"one": (lambda out, seeds: f"| {seeds} |", ["job"]), "two": (lambda *_: "x", ["job"])}
    monkeypatch.setattr(paper_report, "TABLES", tables)
    (tmp_path / "seed0/job").mkdir(parents=True)
    (tmp_path / "seed0/job/job.json").write_text(
        json.dumps(dict(command=[], seconds=1, commit="abc", date="2026-01-01"))
    )
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/results.md"
    page.write_text("before\n<!-- table one -->\nold\n<!-- end one -->\nafter\n")
    for _ in range(2):
        paper_report.write(tmp_path, [0], ["one", "two"], tmp_path / "docs")
        text = page.read_text()
        assert text.startswith("before\n<!-- table one -->\n| [0] |\n") and text.endswith(
            "<!-- end one -->\nafter\n"
        )
        assert "old" not in text and "abc" in text and text.count("| [0] |") == 1
    assert (tmp_path / "table-two.md").read_text().startswith("x\n")


# --- a machine that does not work is red ------------------------------------------------------------------------------


SOUND = [
    {"step": 0, "eval/reward": -0.1, "eval/grammatical": 0.98},
    {"step": 20, "eval/reward": 2.3, "eval/grammatical": 0.97},
]
GARBAGE = {"eval/reward": 0.1, "eval/grammatical": 0.0}  # what the rollouts without a cache gave


@pytest.mark.parametrize(
    "before, after, words",
    [
        ({}, {}, ""),
        ({}, {"eval/reward": 0.8}, "rose by 0.90, less than 1.0"),
        ({}, {"eval/reward": float("nan")}, "rose by nan"),
        ({}, {"eval/grammatical": 0.89}, "89 % of the reviews are grammatical after training"),
        ({"eval/grammatical": 0.01}, {}, "1 % of the reviews are grammatical before training"),
        (GARBAGE, GARBAGE, "rose by 0.00"),
    ],
)
def test_what_no_working_installation_gives_is_named(before, after, words):
    found = reviews.unsound(SOUND[0] | before, SOUND[1] | after, rise=1.0)
    assert (words in found) if words else found == ""


@pytest.mark.parametrize("fault", [{}, GARBAGE])
def test_the_demo_ends_with_an_error_where_it_learned_nothing(fault, tmp_path, monkeypatch, capsys):
    """Its scripts replaced by what they leave: the table is shown, then the exit code says it."""
    rows = [
        row | {"eval/kl": 0.0, "eval/length": 12.0} for row in (SOUND[0], {**SOUND[1], "step": 10}, SOUND[1])
    ]
    rows[-1] |= fault
    metrics = [*rows, {"step": 1, "objective/score": 0.0}]
    samples = [{"step": row["step"], "prompt": "lunch", "response": "the soup was warm ."} for row in rows]
    (tmp_path / "gvm_td").mkdir()
    (tmp_path / "gvm_td/accuracy.json").write_text('{"mean": 0.9, "last": 0.9, "baseline_length": 0.5}')
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "run", lambda *_: 1.0)
    monkeypatch.setattr(
        demo, "read", lambda script, name="metrics.jsonl": metrics if name == "metrics.jsonl" else samples
    )
    if fault:
        with pytest.raises(
            SystemExit, match="^error: this installation does not work: the true reward rose by 0.20"
        ):
            demo.main()
    else:
        demo.main()
    assert "true reward" in capsys.readouterr().out and (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("broken", ["", "sft", "dvpo"])
def test_the_tables_end_with_an_error_where_nothing_was_learned(broken, tmp_path):
    for job, folder in (("sft", "sft"), ("dvpo", "seed0/dvpo"), ("dvpo", "seed1/dvpo")):
        (tmp_path / folder).mkdir(parents=True)
        rows = [
            SOUND[0],
            SOUND[1] | (GARBAGE if job == broken and folder != "seed0/dvpo" else {}),
            {"step": 20, "sft/loss": 1.0},
        ]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if broken:
        name = {"sft": "sft: 0 % of the reviews", "dvpo": "dvpo, seed 1: the true reward rose by"}[broken]
        with pytest.raises(SystemExit, match=f"^error: this installation does not work: {name}"):
            paper_tables.require_sound(tmp_path, [0, 1], ["dvpo", "reward"])
    else:
        paper_tables.require_sound(tmp_path, [0, 1], ["dvpo", "reward"])


# --- what is installed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["requirements", "requirements-test", "requirements-eval", "requirements-vllm"]
)
def test_requirements_are_pinned(name):
    """An open bound is another library tomorrow. Two files name the same version, but for what vLLM asks for."""
    lines = {}
    for file in sorted(helpers.ROOT.glob("requirements*.txt")):
        found = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        lines[file.stem] = dict(line.partition("==")[::2] for line in found)
    assert len(lines) == 4 and all(re.fullmatch(r"[\d.]+", version) for version in lines[name].values()), (
        lines[name]
    )
    for package, version in lines[name].items():
        expected = lines["requirements"].get(package, version)
        assert version == expected or (name, package) == ("requirements-vllm", "transformers"), (
            name,
            package,
        )
