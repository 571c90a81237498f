"""What comes from elsewhere is data: code in a model's folder is not run and nobody is asked whether to."""

import ast
import io
import json
import shutil
import sys

import helpers
import pytest

CODE = """
import os
os.mkdir({file!r})
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "llama2"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(world, name, part):
    """The embedded policy whose `part` says that it needs the code beside it; returns what that code would make."""
    from assets import reviews

    folder = world.path(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(reviews.folder("policy"), folder)
    made = folder / "owned"
    (folder / "evil.py").write_text(CODE.format(file=str(made)))
    file = folder / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    written = json.loads(file.read_text())
    if part == "tokenizer":
        written["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        written["tokenizer_class"] = "Tokenizer"
    elif part == "model":  # of a type that transformers knows
        written["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    else:
        written["model_type"] = "llama2"
        written["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    file.write_text(json.dumps(written))
    return made


def says_yes(module):
    """A `y` waits on the standard input, as where a script is piped into."""
    sys.stdin = io.StringIO("y\n" * 9)


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
def test_code_in_a_models_folder_is_not_run(world, part):
    """Also where a `y` waits on the standard input. A model that transformers knows is opened by its own class."""
    made = with_code(world, f"evil-{part}", part)
    args = helpers.ARGS["sft"] | dict(model=f"evil-{part}", steps=1, run_dir=f"runs/evil-{part}")
    found = world.run("sft", patch=says_yes, **args)
    assert not made.exists()
    assert "Do you wish to run" not in found.output
    if part == "config":
        assert found.error().startswith("error: evil-config: no ")
    elif any(found.codes):
        found.error()


def test_nothing_is_opened_that_could_bring_code():
    """Every `from_pretrained` of the product says that it runs no code; GenerationConfig has none."""
    checked = 0
    for room in (".", "common", "evaluation", "tools"):
        for file in (helpers.ROOT / room).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                opens = called.endswith((".from_pretrained", "transformers.pipeline"))
                if opens and "GenerationConfig" not in called:
                    words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert words.get("trust_remote_code") == "False", f"{file.name}:{node.lineno} {called}"
                    checked += 1
    assert checked >= 5
