"""The pages in docs/ say what the code says: quoted lines, metric names, flags, links.

A page refers to code as [`ppo.py: main`](../ppo.py) followed by a quote of a line there, in backticks: the
file, the function or class (none: the whole file), the code. There is no line number, so that an edit of one
file does not rewrite twenty pages.
"""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
SCRIPTS = ("sft", "reward", "gvm_td", "dvpo", "ppo", "rpo", "dro", "kto", "dpo", "grpo", "remax")
COMMANDS = {  # of evaluate.py: the class of their flags, and their page
    "Values": "docs/evaluate.md",
    "Responses": "docs/evaluate_responses.md",
    "Judge": "docs/evaluate_judge.md",
    "All": "docs/evaluate_all.md",
    "LengthControlled": "docs/evaluate_benchmarks.md",
}


def command_of(name: str) -> str:
    """LengthControlled -> length_controlled: the command, and its file in evaluation/."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


HOME = {name: f"evaluation/{command_of(name)}" for name in COMMANDS}  # where the class is
REFERENCE = re.compile(r"\[`([\w./]+\.py)(?:: (\w+))?`\]\(([\w./]+)\)\s+(`+)(.+?)\4(?!`)")
NUMBERED = re.compile(r"[\w./]+\.py(?::\d+|#L\d+)")  # a line number, in whatever form: it would drift
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
METRIC = re.compile(r"[a-z_]+/[a-z0-9_<> ]+")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FOREIGN = {  # flags of other programs: which
    "--help": "argparse and tyro",
    "--logdir": "tensorboard",
    "--annotators_config": "alpaca_eval",
    "--max_instances": "alpaca_eval",
    "--model_outputs": "alpaca_eval",
    "--reference_outputs": "alpaca_eval",
    "--apply_chat_template": "lm_eval",
    "--batch_size": "lm_eval",
    "--gen_kwargs": "lm_eval",
    "--log_samples": "lm_eval",
    "--model_args": "lm_eval",
    "--output_path": "lm_eval and alpaca_eval",
    "--tasks": "lm_eval",
    "--model-list": "FastChat",
    "--control-features": "arena-hard-auto",
    "--judge-names": "arena-hard-auto",
    "--local-dir": "hf download",
    "--repo-type": "hf download",
    "--nnodes": "torchrun",
    "--nproc_per_node": "torchrun",
    "--shutdown-timeout": "torchrun",
    "--signals-to-handle": "torchrun",
    "--max-restarts": "torchrun",
    "--rdzv_backend": "torchrun",
    "--rdzv_endpoint": "torchrun",
    "--dist": "pytest-xdist",
    "--huber-delta": "the script that docs/first_fork.md makes",
}
PROGRAMS = sorted(  # what has flags and is no script
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "paper", "benchmarks", "tests")
    for path in (ROOT / folder).glob("*.py")
)
# they pass flags on to a script
PASS_ON = ("tools/plan_memory.py", "benchmarks/gpu.py", "paper/semi_online.py")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- references to code


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
        problems += [f"{name_of(page)}: {problem}" for problem in wrong_references(text, read_source)]
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


# --- metrics


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
    source = 'o = {"a/b": 1, **{f"a/c_{k}": v for k, v in x}}\no["a/d"] = 1\n'
    source += 'run.metrics(1, o | {"runs": "runs/f"})\n'
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


# --- flags


@functools.cache
def args_of(script: str, name: str = "Args") -> dict[str, str]:
    """Flags and defaults of a script (of evaluate.py: of the command with that class), from the source."""
    tree = ast.parse(read_source(f"{script}.py"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    return {
        "--" + node.target.id.replace("_", "-"): ast.unparse(node.value) if node.value else ""
        for node in fields
    }


@functools.cache
def flags_of(script: str, name: str = "Args") -> frozenset[str]:
    """All flags of a script: those of `args_of`, and tyro's `--no-x` for the ones that are true or false."""
    opposites = {
        f"--no-{flag.removeprefix('--')}"
        for flag, default in args_of(script, name).items()
        if default in ("True", "False")
    }
    return frozenset(set(args_of(script, name)) | opposites)


def flags_in(source: str) -> set[str]:
    """The flags in a source: those of argparse's add_argument, or the fields of tyro.cli's dataclass."""
    tree = ast.parse(source)
    flags = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.func, ast.Attribute):
            continue
        first = node.args[0]
        if node.func.attr == "add_argument" and isinstance(first, ast.Constant):
            flags.add(first.value)
        if ast.unparse(node.func) == "tyro.cli" and isinstance(first, ast.Name):
            for owner in ast.walk(tree):
                if isinstance(owner, ast.ClassDef) and owner.name == first.id:
                    fields = [field for field in owner.body if isinstance(field, ast.AnnAssign)]
                    flags |= {"--" + field.target.id.replace("_", "-") for field in fields}
    return {flag for flag in flags if flag.startswith("--")}


@functools.cache
def program_flags(program: str) -> frozenset[str]:
    return frozenset(flags_in(read_source(program)))


@functools.cache
def script_flags() -> frozenset[str]:
    """The flags of all scripts and of the commands of evaluate.py."""
    of_scripts = [flags_of(script) for script in SCRIPTS]
    of_commands = [flags_of(HOME[name], name) for name in COMMANDS]
    return frozenset().union(*of_scripts, *of_commands)


@functools.cache
def all_flags() -> frozenset[str]:
    return script_flags().union(FOREIGN, *(program_flags(program) for program in PROGRAMS))


@functools.cache
def called() -> dict[str, frozenset[str]]:
    """How a command line calls what is ours, and the flags that may follow."""
    calls = {f"{script}.py": flags_of(script) for script in SCRIPTS}
    for name in COMMANDS:
        calls[f"evaluate.py {command_of(name)}"] = flags_of(HOME[name], name)
    for program in PROGRAMS:
        passed_on = script_flags() if program in PASS_ON else frozenset()
        calls[program] = program_flags(program) | passed_on
    return calls


def wrong_commands(text: str) -> list[str]:
    """The lines of the code blocks of a page that give a program a flag it does not have."""
    problems = []
    for block in FENCE.findall(text):
        for command in block.replace("\\\n", " ").splitlines():
            for call, flags in called().items():
                _, found, rest = command.partition(f" {call} ")
                rest = re.sub(r'"[^"]*"', "", rest)  # in quotes: options that it passes on
                wrong = set(FLAG.findall(rest)) - flags - {"--help"}
                if found and wrong:
                    problems.append(f"{call} has no {sorted(wrong)}: {command.strip()}")
    return problems


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
        assert set(table) == set(flags) or f"evaluate.py {command_of(name)} --help" in text, (
            f"{page}: {set(flags) - set(table)}"
        )


def test_flags_on_the_pages_exist():
    problems = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        unknown = sorted(set(FLAG.findall(text)) - all_flags())
        problems += [f"{name_of(page)}: nothing has {flag}" for flag in unknown]
        problems += [f"{name_of(page)}: {problem}" for problem in wrong_commands(text)]
    assert not problems, "\n".join(problems)


def test_flags_are_read_from_the_source():
    argparse_source = 'p.add_argument("--one", type=int)\np.add_argument("name")\n'
    assert flags_in(argparse_source) == {"--one"}
    tyro_source = "class Options:\n    on_it: int = 1\n\nclass Other:\n    x: int\n\ntyro.cli(Options)\n"
    assert flags_in(tyro_source) == {"--on-it"}
    assert "--no-precompute-ref" in flags_of("rpo") and "--no-tau" not in flags_of("rpo")
    for program, flag in (
        ("tools/plan_memory.py", "--gpus"),
        ("paper/tables.py", "--only"),
        ("benchmarks/speed.py", "--size"),
    ):
        assert flag in program_flags(program), f"{program}: found only {sorted(program_flags(program))}"


def test_a_flag_that_is_wrong_is_found():
    for wrong in (
        "python rpo.py --gvm x",
        "OMP_NUM_THREADS=1 python benchmarks/speed.py --gpus 8",
        "python evaluate.py values --judge x",
        "python tools/plan_memory.py --algorithm ppo --nothing 1",
        "python rpo.py \\\n    --nothing",
    ):
        assert len(wrong_commands(f"```\n{wrong}\n```\n")) == 1, wrong
    right = "torchrun --nproc_per_node=2 rpo.py --no-precompute-ref\npython tools/plan_memory.py --gpus 8 --model x\n"
    assert wrong_commands(f"```\n{right}```\n") == []
    assert "--nothing" not in all_flags()


def test_foreign_flags_are_used_and_are_not_ours():
    """So that the list cannot hide a flag that one of our programs lost."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    ours = script_flags().union(*(program_flags(program) for program in PROGRAMS))
    for flag in FOREIGN:
        assert flag in FLAG.findall(text), f"no page names {flag}"
        assert flag not in ours, flag


def test_no_page_has_a_gap():
    """Nothing is left for later without saying so."""
    for page in PAGES:
        assert not re.search("PENDING|TODO|FIXME", page.read_text(encoding="utf-8")), name_of(page)


# --- links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(text: str, page: Path) -> list[str]:
    """The links of a page that lead nowhere: no such file (from the page's folder) or no such heading."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if path and not file.exists():
            dead.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md":
            there = text if file == page else file.read_text(encoding="utf-8")
            if anchor not in anchors(there):
                dead.append(f"{target}: no such heading")
    return dead


def test_links_lead_somewhere():
    dead = []
    for page in PAGES:
        found = dead_links(page.read_text(encoding="utf-8"), page)
        dead += [f"{name_of(page)}: {problem}" for problem in found]
    assert not dead, "dead links:\n" + "\n".join(dead)


def test_a_link_that_is_dead_is_found():
    page = ROOT / "docs/results/page.md"
    right = "# A b\n[x](../rpo.md#equations) [y](#a-b) [z](https://a.b/c) ![p](../online.png)\n"
    right += "```\n[q](gone)\n```\n"
    assert dead_links(right, page) == []
    for wrong in ("kto.md", "../rpo.md#nothing", "#nothing", "../../docs/gone.png"):
        assert len(dead_links(f"[x]({wrong})", page)) == 1, wrong


FOLDERS = "assets|benchmarks|common|evaluation|paper|tests|tools"
MADE_BY_THE_READER = {"tests/test_my_rpo.py"}  # docs/first_fork.md


def gone_paths(text: str) -> list[str]:
    """The source files that a page names, in text or commands, and that are not there."""
    named = set(re.findall(rf"(?<![\w/.])(?:{FOLDERS})/\w+\.py\b", text))
    return sorted(path for path in named - MADE_BY_THE_READER if not (ROOT / path).exists())


def test_paths_on_the_pages_exist():
    gone = [f"{name_of(page)}: {gone_paths(page.read_text(encoding='utf-8'))}" for page in PAGES]
    gone = [line for line in gone if not line.endswith(": []")]
    assert not gone, "\n".join(gone)
    assert gone_paths("`tests/test_docs.py` and `python tools/gone.py`") == ["tools/gone.py"]


def not_linked(index: str, pages: list[str]) -> list[str]:
    """The pages that an index, docs/README.md, has no link to."""
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", index)}
    return [page for page in pages if page not in linked]


def test_the_index_names_every_page():
    folder = ROOT / "docs"
    pages = [page.relative_to(folder).as_posix() for page in sorted(folder.rglob("*.md"))]
    pages.remove("README.md")
    assert not_linked((folder / "README.md").read_text(encoding="utf-8"), pages) == []
    assert not_linked("[a](a.md) and [b](b.md#x)", ["a.md", "b.md", "results/c.md"]) == ["results/c.md"]
    assert "](docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- results


def missing_numbers(row: str, details: str) -> list[str]:
    """The numbers in the cell "here" of a row of the table of claims that the page with the details lacks."""
    here = row.split("|")[4]
    return [number for number in re.findall(r"[+-]?\d+\.\d+", here) if number.lstrip("+") not in details]


def test_claims_have_the_numbers_of_their_details():
    """docs/results.md repeats what `make tables` writes into docs/results/."""
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    text = page.partition("### Claims\n")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if re.match(r"\| (DVPO|RPO) \|", line)]
    assert len(rows) > 20, "has the form of the table changed?"
    wrong = []
    for row in rows:
        link = re.search(r"\]\((results/\w+\.md)#", row).group(1)
        details = (ROOT / "docs" / link).read_text(encoding="utf-8")
        wrong += [f"{link} does not have {number}: {row}" for number in missing_numbers(row, details)]
    assert not wrong, "\n".join(wrong)
    assert missing_numbers("| a | b | c | **holds** (+1.66 and 2.5) | d |", "(+1.66, 3 seeds)") == ["2.5"]


def paper_cells(text: str) -> list[str]:
    """The cells with the paper's figures of the tables of claims on a page."""
    cells = []
    column = None
    for line in text.splitlines():
        row = [cell.strip() for cell in line.split("|")]
        if "the paper's figures, on its models" in row:
            column = row.index("the paper's figures, on its models")
        elif not line.startswith("|"):
            column = None
        elif column and row[column].strip("-"):
            cells.append(row[column])
    return cells


def test_claims_name_where_the_papers_figures_are():
    """The version and the table, figure, equation or section; both tables of a claim say the same."""
    pages = [ROOT / "docs/results.md", *sorted((ROOT / "docs/results").glob("*.md"))]
    texts = {name_of(page): page.read_text(encoding="utf-8") for page in pages}
    where = re.compile(r"\bv[123]\b.*\b(tables?|figure|equations?|section) ")
    unnamed = []
    cells = {}
    for name, text in texts.items():
        cells[name] = paper_cells(text)
        unnamed += [f"{name}: {cell}" for cell in cells[name] if not where.search(cell)]
    assert not unnamed, "\n".join(unnamed)
    short = cells.pop("docs/results.md")
    assert len(short) > 20, "has the form of the table changed?"
    detailed = {cell for found in cells.values() for cell in found}
    assert detailed <= set(short), detailed - set(short)
