"""tools/: the runner of jobs and the demo; what every installation is judged by; what is installed."""

import json
import re

import chat_templates
import helpers
import pytest
from transformers import LlamaConfig

from assets import reviews
from tools import demo
from tools.jobs import Jobs, WarmJobs

# A job's script: it needs the file x of each folder that its flags name, and adds a dot to its own.
SCRIPT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
needs = [pathlib.Path(x) for x in sys.argv[1:] if x.endswith("/model")]
print("this is", " ".join(sys.argv))
if "--fail" in sys.argv or not all((need / "x").exists() for need in needs):
    sys.exit(3)
file = folder / "model/x"
file.parent.mkdir(exist_ok=True)
file.write_text((file.read_text() if file.exists() else "") + ".")
"""


# --- the runner of jobs -------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def dots(out):
    """How often each job has run, a dot per run, by folder."""
    return {str(path.relative_to(out).parents[1]): path.read_text() for path in sorted(out.glob("**/x"))}


@pytest.mark.parametrize("runner", [Jobs, WarmJobs])
def test_jobs_wait_for_what_they_need_and_resume(runner, script, tmp_path, capsys):
    """Each once, shared ones once for all seeds, in an order that holds; nothing twice on a second call; a
    changed one anew."""
    commands = {
        "base": [script],
        "a": [script, "{out}/base/model"],
        "b": [script, "{home}/a/model", "--seed", "{seed}"],
    }
    out = tmp_path / "out"

    def run_all():
        runner(out, commands, [(0, "b"), (1, "b"), (0, "a")], {"base"}).run(2)
        return dots(out)

    assert run_all() == {"base": ".", "seed0/a": ".", "seed0/b": ".", "seed1/a": ".", "seed1/b": "."}
    assert "[5/5]" in capsys.readouterr().out
    assert set(run_all().values()) == {"."}
    record = json.loads((out / "seed1/b/job.json").read_text())
    assert record["command"][1:] == [str(out / "seed1/a/model"), "--seed", "1"]
    assert record["seconds"] >= 0
    commands["b"].append("--more")
    assert run_all() == {"base": ".", "seed0/a": ".", "seed0/b": "..", "seed1/a": ".", "seed1/b": ".."}


@pytest.mark.parametrize("runner", [Jobs, WarmJobs])
def test_a_failed_job_takes_only_what_needs_it(runner, script, tmp_path, capsys):
    """The others are finished, the end says in one line each what is missing, and the next call goes on."""
    commands = {"bad": [script, "--fail"], "after": [script, "{home}/bad/model"], "good": [script]}
    out = tmp_path / "out"

    def run_all():
        runner(out, commands, [(0, "after"), (0, "good")], set()).run(1)

    with pytest.raises(SystemExit) as stopped:
        run_all()
    message = str(stopped.value)
    assert "2 of 3 runs are missing" in message
    assert "bad.log" in message
    log = (out / "seed0/bad.log").read_text()
    assert log.startswith("$ python ") and f"this is {script} --fail" in log
    assert (out / "seed0/good/model/x").exists()
    assert not (out / "seed0/after/job.json").exists()
    commands["bad"].remove("--fail")
    run_all()
    assert dots(out) == {"seed0/bad": ".", "seed0/after": ".", "seed0/good": "."}


# --- a machine that does not work is red --------------------------------------------------------------------

SOUND = (  # the evaluations of a run that learned
    {"step": 0, "eval/reward": -0.1, "eval/grammatical": 0.98},
    {"step": 20, "eval/reward": 2.3, "eval/grammatical": 0.97},
)
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
    first, last = SOUND
    found = reviews.unsound(first | before, last | after, rise=1.0)
    if words:
        assert words in found
    else:
        assert found == ""


@pytest.mark.parametrize("fault", [{}, GARBAGE])
def test_the_demo_ends_with_an_error_where_it_learned_nothing(fault, tmp_path, monkeypatch, capsys):
    """Its scripts replaced by what they leave: the table is shown, then the exit code says it."""
    first, last = SOUND
    rows = []
    for row in (first, last | {"step": 10}, last | fault):
        rows.append(row | {"eval/kl": 0.0, "eval/length": 12.0})
    metrics = [*rows, {"step": 1, "objective/score": 0.0}]
    samples = [{"step": row["step"], "prompt": "lunch", "response": "the soup was warm ."} for row in rows]
    (tmp_path / "gvm_td").mkdir()
    (tmp_path / "gvm_td/accuracy.json").write_text('{"mean": 0.9, "last": 0.9, "baseline_length": 0.5}')

    def run(*_):
        return 1.0

    def read(script, name="metrics.jsonl"):
        return metrics if name == "metrics.jsonl" else samples

    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "read", read)
    if fault:
        message = "^error: this installation does not work: the true reward rose by 0.20"
        with pytest.raises(SystemExit, match=message):
            demo.main()
    else:
        demo.main()
    assert "true reward" in capsys.readouterr().out
    assert (tmp_path / "curve.png").exists()


# --- what is installed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["requirements", "requirements-test", "requirements-eval", "requirements-vllm"]
)
def test_requirements_are_pinned(name):
    """An open bound is another library tomorrow. Two files name the same version, but for what vLLM asks
    for."""
    pinned = {}  # versions by file and package
    for file in sorted(helpers.ROOT.glob("requirements*.txt")):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        pinned[file.stem] = dict(line.partition("==")[::2] for line in lines)
    assert len(pinned) == 4
    for package, version in pinned[name].items():
        assert re.fullmatch(r"[\d.]+", version), (package, version)
        expected = pinned["requirements"].get(package, version)
        assert version == expected or (name, package) == ("requirements-vllm", "transformers"), (
            name,
            package,
        )


def test_show_tokens_marks_every_answer_and_nothing_else(tmp_path, capsys, monkeypatch):
    """Of two turns both answers with their ends, in the rows' order; the rest is prompt."""
    from tools import show_tokens

    own = chat_templates.tokenizer(chat_templates.OTHERS["chatml"])
    own.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(own), eos_token_id=own.eos_token_id).save_pretrained(tmp_path)
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}))
    show_tokens.main(show_tokens.Options(str(tmp_path), str(tmp_path / "d.jsonl")))
    shown = capsys.readouterr().out.partition("--- row 1")[2]
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    trained = "[b][<|im_end|>]"
    assert f"{start}{trained}\n---" in shown
    assert shown.endswith(f"{start}b<|im_end|>\n{start}{trained}\n")
    assert shown.count("[") == 4
