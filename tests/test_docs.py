"""The pages in docs/ say what the code says: quoted lines, metric names, flags, links.

A page refers to code as [`ppo.py: main`](../ppo.py) followed by a quote of a line there, in backticks: the file, the
function or class (none: the whole file), the code. No line number, so that an edit of one file does not rewrite twenty pages.
"""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md")) + [page for page in [ROOT / "README.md"] if page.exists()]
SCRIPTS = ("sft", "reward", "gvm_td", "dvpo", "ppo", "rpo", "dro", "kto", "dpo", "grpo", "remax")
COMMANDS = {  # of evaluate.py: the class of their flags, and their page
    "Values": "docs/evaluate.md",
    "Responses": "docs/evaluate_responses.md",
    "Judge": "docs/evaluate_judge.md",
}
HOME = {name: f"evaluation/{name.lower()}" for name in COMMANDS}  # where the class is
REFERENCE = re.compile(r"\[`([\w./]+\.py)(?:: (\w+))?`\]\(([\w./]+)\)\s+(`+)(.+?)\4(?!`)")
NUMBERED = re.compile(r"[\w./]+\.py(?::\d+|#L\d+)")  # a line number, in whatever form: it would drift
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
METRIC = re.compile(r"[a-z_]+/[a-z0-9_<> ]+")
OTHERS = {
    "--help",
    "--logdir",
    "--nnodes",
    "--nproc_per_node",
    "--rdzv_backend",
    "--rdzv_endpoint",
}  # not the scripts'
OTHERS |= {"--model_outputs"}  # of alpaca_eval
OTHERS |= {
    "--algorithm",
    "--gpus",
    "--gpus-a-node",
    "--largest",
    "--validate",
    "--table",
    "--intra",
    "--inter",
}  # memory.py's
OTHERS |= {
    "--n",
    "--size",
    "--only",
    "--scaling",
    "--vocabulary",
    "--hidden-size",
    "--tokens",
}  # of benchmarks
OTHERS |= {
    "--no-partition",
    "--no-scale-std",
    "--no-lora-merge",
    "--no-precompute-ref",
    "--no-rescale-lr",
}  # tyro's opposites


# --- references to code ----------------------------------------------------------------------------------------------


def read_source(file: str) -> str | None:
    return (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else None


def lines_of(source: str, name: str | None) -> list[str]:
    """The lines of every function or class `name` in a file, however deep; of the whole file for none."""
    lines = source.splitlines()
    if not name:
        return lines
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            found += lines[node.lineno - 1 : node.end_lineno]
    return found


def wrong_references(text: str, read) -> list[str]:
    """What is wrong with the references of a page. `read(file)` gives a file's text or None."""
    problems = []
    for file, name, target, _, code in REFERENCE.findall(text):
        source = read(file)
        where = f"{file}{': ' * bool(name)}{name}"
        if source is None:
            problems.append(f"{where}: no such file")
        elif not target.endswith(file):
            problems.append(f"{where}: its link goes to {target}")
        elif not any(code in line for line in lines_of(source, name)):
            problems.append(
                f"{where}: no line there contains `{code}`; quote the present code or drop the item"
            )
    return problems + [
        f"{found}: a line number drifts; name the function" for found in NUMBERED.findall(text)
    ]


def test_references_quote_code_that_is_there():
    problems = []
    count = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        count += len(REFERENCE.findall(text))
        problems += [f"{page.name}: {problem}" for problem in wrong_references(text, read_source)]
    assert not problems, f"{len(problems)} references to code\n" + "\n".join(problems)
    assert count > 100, "has the form of references changed?"


def test_a_reference_that_is_wrong_is_found():
    source = {"f.py": "a = 1\n\n\ndef f():\n    b = 2\n"}.get
    right = "1. Why. [`f.py: f`](../f.py) `b = 2` and [`f.py`](../f.py) ``a = 1``.\n"
    assert wrong_references(right, source) == []
    for wrong in (
        "[`f.py: f`](../f.py) `a = 1`",
        "[`f.py: g`](../f.py) `b = 2`",
        "[`f.py`](../f.py) `z = 1`",
        "[`g.py`](../g.py) `a = 1`",
        "[`f.py`](../g.py) `a = 1`",
        "f.py:5",
        "[here](../f.py#L5)",
    ):
        assert len(wrong_references(wrong, source)) == 1, wrong


# --- metrics ---------------------------------------------------------------------------------------------------------


def pattern(node) -> str | None:
    """A string node as text; what an f-string puts in becomes <>."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values)
    return None


def logged(source: str) -> set[str]:
    """Names of the form group/name that are keys of a dict, or assigned to one: what goes to run.metrics."""
    nodes = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            nodes += [key for key in node.keys if key is not None]
        elif isinstance(node, ast.DictComp):
            nodes.append(node.key)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            nodes.append(node.slice)
    names = {pattern(node) for node in nodes} - {None}
    return {name for name in names if METRIC.fullmatch(name)}


@functools.cache
def all_logged() -> dict[str, set[str]]:
    files = [f"{script}.py" for script in SCRIPTS] + ["common/meter.py"]
    return {file: logged(read_source(file)) for file in files}


def explained() -> dict[str, list[str]]:
    """The metrics in the tables of metrics.md, and the cells beside each."""
    rows = {}
    for line in (ROOT / "docs/metrics.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        name = cells[0].strip("`") if cells else ""
        if METRIC.fullmatch(name):
            assert name not in rows, f"metrics.md explains {name} twice"
            rows[name] = cells[1:]
    return rows


def test_metrics_are_found_in_the_source():
    source = 'o = {"a/b": 1, **{f"a/c_{k}": v for k, v in x}}\no["a/d"] = 1\nrun.metrics(1, o | {"runs": "runs/f"})\n'
    assert logged(source) == {"a/b", "a/c_<>", "a/d"}
    for file, names in all_logged().items():
        assert len(names) >= (1 if "/" in file else 8), (
            f"{file}: found only {names}; has its log another form?"
        )


def test_every_metric_is_explained():
    rows = explained()
    known = {re.sub("<.*?>", "<>", name) for name in rows}
    missing = [
        f"{file} logs {name}" for file, names in all_logged().items() for name in sorted(names - known)
    ]
    assert not missing, "add a row to a table of docs/metrics.md for each:\n" + "\n".join(missing)
    stale = [name for name in rows if re.sub("<.*?>", "<>", name) not in set.union(*all_logged().values())]
    assert not stale, f"docs/metrics.md explains what no script logs: {stale}"
    for name, cells in rows.items():
        assert len(cells) == 4 and all(cells), (
            f"docs/metrics.md, {name}: formula, unit, healthy range and what a bad value means"
        )


# --- flags -----------------------------------------------------------------------------------------------------------


@functools.cache
def args_of(script: str, name: str = "Args") -> dict[str, str]:
    """Flags of a script (of evaluate.py: of the command with that class) and their defaults, as in the source."""
    tree = ast.parse(read_source(f"{script}.py"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    return {
        "--" + node.target.id.replace("_", "-"): ast.unparse(node.value) if node.value else ""
        for node in fields
    }


def options(page: str) -> dict[str, str]:
    """Rows | `--flag` | default | ... | of a page: flag to default."""
    return dict(re.findall(r"^\| `(--[\w-]+)` \| `?(.*?)`? \|", page, re.M))


def same(said: str, default: str) -> bool:
    """A default as a page says it and as the source does."""
    try:
        return ast.literal_eval(said) == ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return said == default.strip("'\"") or (said == "none" and default in ("''", "()"))


def test_option_tables_have_real_flags_and_defaults():
    for script in SCRIPTS:
        page, flags = (ROOT / f"docs/{script}.md").read_text(encoding="utf-8"), args_of(script)
        table = options(page)
        assert table, f"docs/{script}.md has no option table"
        for flag, default in table.items():
            assert flag in flags, f"docs/{script}.md: {script}.py has no {flag}"
            assert same(default, flags[flag]), (
                f"docs/{script}.md: {flag} defaults to {flags[flag]}, not {default}"
            )
        left_out = set(flags) - set(table)
        assert not left_out or f"python {script}.py --help" in page, (
            f"docs/{script}.md lists neither {left_out} nor --help"
        )


def test_option_tables_of_evaluate():
    """As above, for its commands."""
    for name, page in COMMANDS.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        flags, table = args_of(HOME[name], name), options(text)
        assert table and set(table) <= set(flags), f"{page}: {set(table) - set(flags)}"
        wrong = [
            f"{flag} defaults to {flags[flag]}, not {said}"
            for flag, said in table.items()
            if not same(said, flags[flag])
        ]
        assert not wrong, (page, wrong)
        assert set(table) == set(flags) or f"evaluate.py {name.lower()} --help" in text, (
            f"{page}: {set(flags) - set(table)}"
        )


def test_flags_on_the_pages_exist():
    everywhere = OTHERS.union(
        *(args_of(script) for script in SCRIPTS), *(args_of(HOME[name], name) for name in COMMANDS)
    )
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        unknown = {flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)} - everywhere
        written_elsewhere = page.name in (
            "README.md",
            "results.md",
        )  # they name flags of pip, benchmarks and so on
        assert written_elsewhere or not unknown, f"{page.name}: no script has {sorted(unknown)}"
        for block in FENCE.findall(text):
            for command in block.replace("\\\n", " ").splitlines():
                for script in SCRIPTS:
                    _, called, rest = command.partition(f" {script}.py")
                    wrong = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)) - set(args_of(script)) - OTHERS
                    assert not (called and wrong), (
                        f"{page.name}: {script}.py has no {sorted(wrong)}: {command.strip()}"
                    )


def test_no_page_has_a_gap():
    """Nothing is left for later without saying so."""
    for page in PAGES:
        assert not re.search("PENDING|TODO|FIXME", page.read_text(encoding="utf-8")), page.name


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    dead = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target or target.startswith("mailto:"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            if not file.exists():
                dead.append(f"{page.name}: {target}: no such file")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
                dead.append(f"{page.name}: {target}: no such heading")
    assert not dead, "dead links:\n" + "\n".join(dead)
