"""The house: which file may import which, what must be the same in every script, and where two scripts may differ.

These are rules about the source, read from the source: no number of lines, no density.
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPTS

ROOMS = ("common", "evaluation", "tools", "paper", "benchmarks", "assets")
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
)


def source(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


# --- arrows -------------------------------------------------------------------------------------------------------------

# A room and the rooms whose files it may import. Arrows run down; none leads back up.
MAY_IMPORT = {
    "script": {"common", "assets"},
    "evaluate": {"evaluation", "common"},
    "evaluation": {"evaluation", "common", "assets"},
    "common": {"common", "assets"},
    "assets": {"assets"},
    "tools": {"tools", "script", "common", "assets"},
    "paper": {"paper", "tools", "script", "common", "assets"},
    "benchmarks": {"benchmarks", "tools", "script", "common", "assets"},
}
# Files that import by a name which is not written there, and what they import so.
BY_NAME = {
    "common/rewards.py": "the user's module:function",
    "tools/plan_memory.py": "the script that is planned",
    "benchmarks/speed_side.py": "the script that is timed",
}


def room_of(file: str) -> str:
    if "/" in file:
        return file.split("/")[0]
    return "evaluate" if file == "evaluate.py" else "script"


def modules_imported(text: str) -> tuple[set[str], bool]:
    """(every module that a source imports, at the top, inside functions or by importlib; whether one has no name there)."""
    found = set()
    by_name = False
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # `from common import data`
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(("import_module", "__import__")):
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    found.add(name.value)
                else:
                    by_name = True
    return found, by_name


def files_imported(text: str) -> set[str]:
    """The project's own files among what a source imports."""
    found, _ = modules_imported(text)
    return {module.replace(".", "/") + ".py" for module in found} & set(FILES)


def wrong_arrows(file: str, text: str) -> list[str]:
    room = room_of(file)
    wrong = []
    for other in sorted(files_imported(text) - {file}):
        if room_of(other) not in MAY_IMPORT[room] or (room, room_of(other)) == ("script", "script"):
            wrong.append(f"{file} imports {other}")
    if modules_imported(text)[1] and file not in BY_NAME:
        wrong.append(f"{file} imports a module whose name is not written there")
    return wrong


def test_arrows_run_down():
    assert {f"{script}.py" for script in SCRIPTS} | {"evaluate.py", "common/rollout.py"} <= set(FILES)
    wrong = [arrow for file in FILES for arrow in wrong_arrows(file, source(file))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "file, text",
    [
        ("dvpo.py", "import ppo"),
        ("dvpo.py", "from ppo import gae"),
        ("common/data.py", "import dvpo"),
        ("common/data.py", "def f():\n    from evaluation import values"),
        ("common/data.py", "import importlib\nimportlib.import_module('evaluation.values')"),
        ("common/data.py", "from importlib import import_module\nimport_module(name)"),
        ("evaluation/values.py", "import rpo"),
        ("assets/reviews.py", "from common.data import read_rows"),
        ("benchmarks/speed.py", "from paper import report"),
        ("tools/demo.py", "from benchmarks import speed"),
    ],
)
def test_an_arrow_back_up_is_found(file, text):
    assert len(set(wrong_arrows(file, text))) == 1


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Files from which their own imports lead back to them."""
    found = []
    for start in arrows:
        seen = set()
        left = list(arrows[start])
        while left:
            file = left.pop()
            if file not in seen:
                seen.add(file)
                left += arrows.get(file, ())
        if start in seen:
            found.append(start)
    return found


def test_no_circles():
    arrows = {file: files_imported(source(file)) - {file} for file in FILES}
    assert sum(map(len, arrows.values())) > 100
    assert circles(arrows) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_the_order_to_read_names_every_file_of_common():
    text = source("common/__init__.py")
    for file in FILES:
        if file.startswith("common/") and not file.endswith("__init__.py"):
            assert Path(file).stem in text.replace(",", " ").replace(".", " ").split(), (
                f"common/__init__.py: {file}"
            )


# --- copies -------------------------------------------------------------------------------------------------------------


def functions(text: str, nested: bool) -> list[tuple[str, str]]:
    """(name, exact source) of the functions of a file but `main`, decorators included; `nested`: also those inside others."""
    lines = text.splitlines()
    tree = ast.parse(text)
    nodes = ast.walk(tree) if nested else tree.body
    found = []
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            found.append((node.name, textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))))
    return found


def different_copies(sources: dict[str, str]) -> list[str]:
    """Names of functions that are not the same text in every script that has them."""
    copies = {}
    for text in sources.values():
        for name, code in functions(text, nested=True):
            copies.setdefault(name, set()).add(code)
    return sorted(name for name, texts in copies.items() if len(texts) > 1)


def test_copies_of_a_function_are_identical_byte_for_byte():
    """A function that two scripts hold, nested ones too, is the same text in both, so that a fix reaches every copy.
    What must differ has two names."""
    sources = {script: source(f"{script}.py") for script in SCRIPTS}
    shared = {}
    for script, text in sources.items():
        for name, _ in functions(text, nested=True):
            shared.setdefault(name, set()).add(script)
    shared = {name: scripts for name, scripts in shared.items() if len(scripts) > 1}
    expected = {
        "gae",
        "whiten",
        "token_rewards",
        "kl_estimates",
        "policy_loss",
        "next_beta",
        "evaluate",
        "logprobs_of",
    }
    assert expected <= set(shared), expected - set(shared)
    assert different_copies(sources) == []


@pytest.mark.parametrize("name", ["gae", "logprobs_of", "evaluate"])
def test_a_changed_copy_is_found(name):
    """At the top of a file and inside `main`."""
    sources = {script: source(f"{script}.py") for script in SCRIPTS}
    line = next(line for line in sources["ppo"].splitlines() if line.strip().startswith(f"def {name}("))
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    end = sources["ppo"].index(":\n", sources["ppo"].index(line)) + 2
    sources["ppo"] = sources["ppo"][:end] + f"{indent}changed = True\n" + sources["ppo"][end:]
    assert different_copies(sources) == [name]


# --- the diffs that are lessons -----------------------------------------------------------------------------------------

# Where two scripts may differ; everything else is the same text in both. Blocks: "docstring", "imports", "Args.FIELD", a
# constant or function by its name, and `main` by its banners ("main: models").
MAY_DIFFER = {
    ("ppo", "dvpo"): {
        "docstring",
        "imports",
        "read_gvm_config",
        "Args.run_dir",
        "Args.reward",
        "Args.critic",
        "Args.critic_lr",
        "Args.value_clip",
        "Args.value_coef",
        "Args.gvm",
        "REVIEWS",
        "Args.advantage",
        "Args.centre",
        "Args.log_odds",
        "later_rewards",
        "value_loss",
        "main: setup",
        "main: models",
        "main: reward",
        "main: advantage",
        "main: update",
        "main: log",
        "main: save",
    },
    ("rpo", "dro"): {
        "docstring",
        "imports",
        "Args.run_dir",
        "Args.partition",
        "Args.rescale_lr",
        "Args.shared_encoder",
        "Args.value_lr",
        "REVIEWS",
        "log_sum_by_group",
        "partition_values",
        "prompt_values",
        "rpo_loss",
        "dro_losses",
        "main: data",
        "main: models",
        "main: update",
        "main: log",
        "main: save",
    },
    ("grpo", "remax"): {
        "docstring",
        "Args.run_dir",
        "Args.group_size",
        "Args.scale_std",
        "Args.aggregation",
        "Args.beta",
        "REVIEWS",
        "group_advantages",
        "remax_advantages",
        "main: setup",
        "main: rollout",
        "main: reward",
        "main: advantage",
        "main: update",
        "main: log",
    },
}


def blocks(text: str) -> dict[str, str]:
    """The parts of a script by name. `main` is cut at its banners, `# --- setup` and so on; banners of one name are one block."""
    lines = text.splitlines()
    found = {"docstring": "", "imports": ""}
    for node in ast.parse(text).body:
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
        first = min([node.lineno, *decorators])
        code = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.Import | ast.ImportFrom):
            found["imports"] += code + "\n"
        elif isinstance(node, ast.ClassDef):
            field = None
            for part in node.body:
                if isinstance(part, ast.AnnAssign):
                    field = f"{node.name}.{part.target.id}"
                    found[field] = ""
                key = field or f"{node.name}: docstring"
                found[key] = found.get(key, "") + "\n".join(lines[part.lineno - 1 : part.end_lineno]) + "\n"
        elif isinstance(node, ast.FunctionDef) and node.name == "main":
            banner = "main"
            for line in lines[first - 1 : node.end_lineno]:
                if line.strip().startswith("# --- "):
                    banner = "main: " + line.strip().removeprefix("# --- ").strip(" -")
                found[banner] = found.get(banner, "") + line + "\n"
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = code
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = code
        elif isinstance(node, ast.Expr) and not found["docstring"]:
            found["docstring"] = code
        else:
            found["end"] = code
    return found


@pytest.mark.parametrize("pair", MAY_DIFFER)
def test_scripts_differ_only_where_their_algorithms_do(pair):
    first, second = (blocks(source(f"{script}.py")) for script in pair)
    differ = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert len(first.keys() & second.keys() - differ) > 40  # the lesson is how much is the same
    assert differ - MAY_DIFFER[pair] == set(), "blocks that differ and are not named here"
    assert MAY_DIFFER[pair] - differ == set(), "blocks that are named here and are the same by now"


# --- the command line ---------------------------------------------------------------------------------------------------


def flags(text: str) -> dict[str, tuple[str, str]]:
    """Field of Args -> (default, help), as in the source."""
    body = next(
        node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args"
    ).body
    found = {}
    for field, doc in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(doc, ast.Expr), f"{field.target.id} has no help"
            found[field.target.id] = ast.unparse(field.value), " ".join(ast.literal_eval(doc.value).split())
    return found


def test_the_same_flag_with_the_same_default_has_the_same_help():
    said = {}
    for script in SCRIPTS:
        for name, (default, text) in flags(source(f"{script}.py")).items():
            said.setdefault((name, default), {}).setdefault(text, []).append(script)
    different = {flag: texts for flag, texts in said.items() if len(texts) > 1}
    assert not different, different


def test_help_is_sentences_that_stand_alone():
    """`--help` prints each by itself: no "of the above", no sentence without an end."""
    for script in SCRIPTS:
        for name, (_, text) in flags(source(f"{script}.py")).items():
            assert text.endswith("."), f"{script}.py, --{name}: {text}"
            assert not text.startswith(("of ", "their ", "its ", "after ")), f"{script}.py, --{name}: {text}"


# --- exceptions say why --------------------------------------------------------------------------------------------------


def test_an_exception_from_the_linter_has_its_reason():
    for file in [*FILES, *(f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py"))]:
        for number, line in enumerate(source(file).splitlines(), 1):
            _, noqa, rest = line.partition("# " + "noqa: ")
            assert not noqa or "(" in rest, f"{file}:{number}: say why in brackets after it"
            assert "# " + "fmt: skip" not in line, f"{file}:{number}: let ruff format it"


def test_no_two_files_of_tests_share_a_run_folder():
    """`world` is one folder for all tests of a process: a run that another file's test made would be in the way,
    or not, by the order of the tests."""
    of_folder = {}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        for folder in set(re.findall(r'run_dir="(runs/[\w-]+)"', file.read_text(encoding="utf-8"))):
            of_folder.setdefault(folder, []).append(file.name)
    shared = {folder: files for folder, files in of_folder.items() if len(files) > 1}
    assert not shared
    assert len(of_folder) > 20
