"""Model cards: what a run's README.md says, that the hub's library reads it, and what it must not say."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from helpers import ROOT, SCRIPTS
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from common import model_card

STEPS = ["--steps", "3", "--save-every", "0", "--eval-every", "1"]
BASE = """---
license: llama3.2
license_link: LICENSE.txt
base_model: someone/grandparent
language:
- en
---

Text of the base's own card.
"""


@pytest.fixture(scope="session")  # as `world` is: pytest-xdist may leave a module and come back
def runs(world):
    """A GVM from scores, and PPO whose critic starts from it, on a policy with a card of its own."""
    gvm = ["--dataset", "scored.jsonl", "--source", "scores", "--eval-fraction", "0.3", "--eval-gap", "0.5"]
    world.command("gvm_td", *STEPS, *gvm, "--run-dir", "runs/card-gvm").ok()
    make_policy(world, "card-policy", BASE)
    ppo = ["--model", "runs/card-policy", "--critic", "runs/card-gvm/model", "--batch-size", "8"]
    ppo += ["--mini-batch-size", "8", "--dataset", "prompts.jsonl", "--eval-prompts", "4"]
    ppo += ["--reward", "assets.reviews:reward", "--max-response-length", "16"]
    world.command("ppo", *STEPS, *ppo, "--run-dir", "runs/card-ppo").ok()
    return world


def make_policy(world, name, readme):
    from helpers import edit_model

    edit_model(world, "policy", name)
    world.path(f"runs/{name}/README.md").write_text(readme)
    return str(world.path(f"runs/{name}"))


def card_of(runs, folder):
    card = ModelCard.load(runs.path(f"{folder}/README.md"))
    # what the library writes is what it read: the header is one of the hub's
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    return card


def rows_of(text, heading):
    """The cells of the table after a heading, without its first two lines."""
    part = text.partition(heading)[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_global_value_models_card(runs):
    card = card_of(runs, "runs/card-gvm/model")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "token-classification",
        "tags": ["value-first", "gvm_td", "value-model"],
    }
    config = json.loads(runs.path("runs/card-gvm/model/config.json").read_text())
    unit = f"value * {config['return_std']:.6g} + {config['return_mean']:.6g} is in the unit"
    assert unit in card.text and "answers nothing" in card.text
    assert "https://arxiv.org/abs/2502.16944" in card.text
    rows = json.loads(runs.path("runs/card-gvm/data.json").read_text())["rows"]
    assert f"`scored.jsonl`, split `train`, part `all`, {rows:,} rows to learn from" in card.text
    assert ["--source", "scores", "preference"] in rows_of(card.text, "## Arguments")
    assert "--run-dir" not in card.text and "--gamma" not in card.text


def test_the_numbers_are_the_runs(runs):
    text = card_of(runs, "runs/card-gvm/model").text
    lines = [json.loads(line) for line in runs.path("runs/card-gvm/metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "eval/gap" in line]
    course = rows_of(text, "## Course of the run")
    assert [row[0] for row in course] == [str(line["step"]) for line in held_out] == ["1", "2", "3"]
    assert [row[1] for row in course] == [f"{line['eval/accuracy_mean']:.4g}" for line in held_out]
    last = {name: (value, step) for name, value, step in rows_of(text, "## Last numbers")}
    assert last["eval/gap"] == (f"{held_out[-1]['eval/gap']:.4g}", "3")
    losses = [line["value/loss"] for line in lines if "value/loss" in line]
    assert last["value/loss"] == (f"{losses[-1]:.4g}", "3")
    assert not [name for name in last if name.startswith(("time/", "perf/", "memory/"))]


def test_a_policys_and_a_critics_card(runs):
    """The license is the base's; its `base_model` is another model, and its text is not ours."""
    policy = card_of(runs, "runs/card-ppo/model")
    assert policy.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["value-first", "ppo", "policy-model"],
        "license": "llama3.2",
        "license_link": "LICENSE.txt",
    }
    assert "own card" not in policy.text and "grandparent" not in policy.content
    assert "`runs/card-policy` (a local folder)" in policy.text
    critic = card_of(runs, "runs/card-ppo/critic")
    assert critic.data.pipeline_tag == "token-classification" and not critic.data.license
    assert "`runs/card-gvm/model` (a local folder)" in critic.text
    assert "Unit: that of the run's own returns in `ppo.py`" in critic.text
    versions = {name: value for name, value in rows_of(policy.text, "It is a language model")}
    assert f"torch {sys.modules['torch'].__version__}" in versions["versions"]


def test_no_folder_of_this_machine_is_named(runs):
    for folder in ("card-gvm/model", "card-ppo/model", "card-ppo/critic"):
        text = runs.path(f"runs/{folder}/README.md").read_text()
        assert str(runs.folder) not in text and str(ROOT) not in text


@pytest.mark.parametrize("folder", ["card-gvm/model", "card-ppo/model", "card-ppo/critic"])
def test_the_card_s_own_lines_open_the_folder(runs, folder):
    run_lines(runs, f"runs/{folder}")


def run_lines(runs, folder):
    """Runs the Python of a card in a fresh process, without this repository."""
    text = runs.path(f"{folder}/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"FOLDER"', repr(str(runs.path(folder))))
    code = code.replace("PROMPT", "lunch : the soup ?").replace("RESPONSE", "the soup was great .")
    if "values" in code:
        code += "assert values.shape == (len(response) + 1,) and values.std() > 0\n"
    if "score = " in code:
        code += "assert score.shape == () and score != 0\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=runs.folder, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["reward", "dpo"])
def test_cards_of_adapters(runs, script):
    """Adapters alone are peft's; a reward model's lines find its head."""
    pytest.importorskip("peft")
    argv = ["--dataset", "pairs.jsonl", "--lora-rank", "2", "--no-lora-merge", "--lr", "0.01"]
    argv += ["--max-prompt-length", "24", "--max-response-length", "16"]
    argv += ["--eval-fraction", "0.3"] if script == "reward" else []
    runs.command(script, *STEPS, *argv, "--run-dir", f"runs/card-lora-{script}").ok()
    card = card_of(runs, f"runs/card-lora-{script}/model")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "LoRA, rank 2, on their own" in card.text and "peft " in card.text
    run_lines(runs, f"runs/card-lora-{script}/model")


def test_every_export_of_a_script_has_a_card():
    for script in SCRIPTS:
        calls = []
        for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "export":
                calls.append({keyword.arg for keyword in node.keywords})
        assert calls and all("made_by" in keywords for keywords in calls), script


# --- what is known, and what is not --------------------------------------------------------------------


def test_a_hub_id_passes_through_our_own_cards(world, tmp_path):
    """SFT from a hub id, DVPO from SFT's folder: both come from the hub's model."""
    ours = "---\nbase_model: org/name\nlicense: mit\ntags:\n- value-first\n- sft\n---\n"
    folder = make_policy(world, "card-ours", ours)
    assert model_card.base_of(folder) == ("org/name", {"license": "mit"})
    assert model_card.base_of("org/name") == ("org/name", {})
    assert model_card.base_of("reviews") == (None, {})
    (tmp_path / "README.md").write_text(BASE)
    assert model_card.base_of(str(tmp_path)) == (
        None,
        {"license": "llama3.2", "license_link": "LICENSE.txt"},
    )
    validate_repo_id("org/name")


def test_the_base_may_be_the_folder_that_is_replaced(world):
    """Its card is read before it goes, and its text does not stay."""
    ours = "---\nbase_model: org/name\nlicense: mit\ntags:\n- value-first\n---\nold text\n"
    make_policy(world, "card-again/model", ours)
    argv = ["--model", "runs/card-again/model", "--run-dir", "runs/card-again", "--dataset", "scored.jsonl"]
    argv += ["--max-prompt-length", "24", "--max-response-length", "16", "--eval-prompts", "4"]
    world.command("sft", *STEPS, *argv).ok()
    card = card_of(world, "runs/card-again/model")
    assert (card.data.base_model, card.data.license) == ("org/name", "mit")
    assert "`runs/card-again/model` (a local folder), which comes from `org/name`" in card.text
    assert "old text" not in card.text


@pytest.mark.parametrize("readme", ["", "# A model\n", "---\nnot: [closed\n---\n"])
def test_a_readme_without_a_header_gives_no_license(tmp_path, capsys, readme):
    (tmp_path / "README.md").write_text(readme)
    assert model_card.base_of(str(tmp_path)) == (None, {})
    assert ("cannot be read" in capsys.readouterr().out) == ("closed" in readme)


def test_names_that_all_may_read():
    """Of a path outside the working directory its last part; hub ids, relative paths and numbers as they are."""
    assert model_card.public("/home/someone/data/pairs.jsonl") == "pairs.jsonl"
    assert model_card.public("~/models/base/") == "base"
    assert model_card.public("../../someone/base") == "base"
    assert model_card.public("C:\\Users\\someone\\base") == "base"
    assert model_card.public("a.jsonl,/home/someone/b.jsonl") == "a.jsonl,b.jsonl"
    assert model_card.public(("rewards:mine", "/home/someone/judge")) == "rewards:mine judge"
    assert model_card.public({"prompt": "question", "response": "/x/y"}) == "prompt question response y"
    assert model_card.public("runs/sft/model") == "runs/sft/model"
    assert model_card.public("meta-llama/Llama-3.2-3B") == "meta-llama/Llama-3.2-3B"
    assert model_card.public(1e-6) == "1e-06"
    assert model_card.public("x hf_" + "A" * 34) == "x (left out)"


def test_hub_ids_among_data_sets(tmp_path):
    assert model_card.hub_data_sets("openai/gsm8k:main") == ["openai/gsm8k"]
    assert model_card.hub_data_sets("org/a,rows.jsonl,data/of/mine") == ["org/a"]
    assert model_card.hub_data_sets("reviews") == model_card.hub_data_sets(str(tmp_path)) == []
    assert model_card.hub_data_sets("") == []


def test_the_course_has_few_rows_with_the_first_and_the_last():
    lines = [{"step": step, "a/loss": step / 7, "time/step_s": 1.0} for step in range(1, 101)]
    header, rows = model_card.curve(lines)
    assert header == ["step", "`a/loss`"]
    assert len(rows) == model_card.CURVE_ROWS and (rows[0][0], rows[-1][0]) == ("1", "100")
    assert rows[-1][1] == "14.29"
    one = lines[:4] + [{"step": 4, "eval/x": None}]  # a single evaluation is no course
    assert [row[0] for row in model_card.curve(one)[1]] == ["1", "2", "3", "4"]
    two = one + [{"step": 5, "eval/x": 2.0}]
    assert model_card.curve(two) == (["step", "`eval/x`"], [["4", ""], ["5", "2"]])
    assert model_card.curve([]) == ([], [])


@dataclass
class Args:
    model: str = "reviews"
    lr: float = 1e-6
    columns: dict[str, str] = field(default_factory=dict)
    resume: bool = False


def test_arguments_that_differ():
    assert model_card.argument_rows(Args()) == []
    found = model_card.argument_rows(Args(model="/home/someone/base", columns={"prompt": "a|b"}, resume=True))
    assert found == [["`--model`", "`base`", "`reviews`"], ["`--columns`", "`prompt a|b`", ""]]


def test_a_card_that_cannot_be_written_costs_no_model(tmp_path, capsys):
    """The reason is said, and no half of a card is left."""
    args = SimpleNamespace(model="reviews", dataset=None, lora_rank=0)
    model_card.write_card(tmp_path, SimpleNamespace(), None, args, str(ROOT / "sft.py"))
    assert "no model card could be written (AttributeError" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_code_s_version(tmp_path, monkeypatch):
    """A commit in a git checkout, with what is not committed; nothing outside one."""
    script = tmp_path / "mine.py"
    script.write_text("")
    monkeypatch.setattr(model_card, "ROOT", tmp_path)
    assert model_card.code_version(str(script)) == ""

    def git(*argv):
        names = ["-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *argv], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert re.fullmatch("[0-9a-f]{40}", model_card.code_version(str(script)))
    fork = tmp_path / "fork.py"
    fork.write_text("")
    assert model_card.code_version(str(fork)).endswith(" with changes that are not committed")
    script.write_text("changed")
    assert model_card.code_version(str(script)).endswith(" with changes that are not committed")
