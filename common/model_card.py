"""The model card: the README.md of an exported folder, in the hub's format.

It says how the model was made and how it is opened, from what the run folder holds. What is not known (a license, a
language, the base of a local folder) is left out and never guessed."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from common.cli import note
from common.tables import markdown
from common.value_heads import learned_signs

OURS = "value-first"  # the tag of our own cards
ROOT = Path(__file__).resolve().parents[1]
DATA_FILES = (".jsonl", ".json", ".parquet", ".gz")
# entries of a base's card that its descendants keep
LICENSE = ("license", "license_name", "license_link")
# arguments that say nothing about the model
NOT_SHOWN = ("run_dir", "resume", "overwrite", "wandb", "keep", "save_every", "timeout_minutes")
SYSTEM = ("time/", "perf/", "memory/")  # metrics that say nothing about the model
CURVE_ROWS = 8
CURVE_COLUMNS = 5
SECRET = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{16,}")

KINDS = {  # kind -> (Auto class without its prefix, the hub's task)
    "policy": ("ModelForCausalLM", "text-generation"),
    "value": ("ModelForTokenClassification", "token-classification"),
    "reward": ("ModelForSequenceClassification", "text-classification"),
}


# --- names ---------------------------------------------------------------------------------------------


def is_local(name: str) -> bool:
    """Whether a model or data set is a folder or file here, by its form or because there is one, and no hub id."""
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return looks_like_a_path or name.endswith(DATA_FILES) or Path(name).exists()


def public(value) -> str:
    """An argument's value as it may be read by all: of a path that does not begin in the working directory the last
    part alone, as the others may name people and machines; no access token."""
    if isinstance(value, dict):
        return " ".join(f"{key} {public(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return " ".join(public(each) for each in value)
    parts = []
    for part in str(value).split(","):
        is_elsewhere = (
            part.startswith(("/", "~")) or ".." in Path(part).parts or re.match(r"[A-Za-z]:\\", part)
        )
        parts.append(re.split(r"[/\\]", part.rstrip("/\\"))[-1] if is_elsewhere else part)
    return SECRET.sub("(left out)", ",".join(parts))


def hub_data_sets(name: str) -> list[str]:
    """The hub ids among data sets with commas between, without their configurations."""
    found = []
    for each in [name] if Path(name).exists() else name.split(","):
        if each and each != "reviews" and not is_local(each):
            found.append(each.partition(":")[0])
    return found


# --- what is known -------------------------------------------------------------------------------------


def read_header(file: str | Path) -> dict:
    """The YAML header of a card; {} of a README without one, or with one that cannot be read, which a note says."""
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        return ModelCard(text).data.to_dict()
    except Exception as error:  # YAML's, and the library's own
        note(f"{file}: its header cannot be read, so no license is taken from it ({type(error).__name__})")
        return {}


def base_of(name: str) -> tuple[str | None, dict[str, str]]:
    """(the hub id that a folder or hub id comes from, or None; the license entries of its card). Reads only what is on this
    machine: of a folder its README.md, of a hub id the README.md that was downloaded with it.

    Of a folder the hub id is known where the card is ours, which passes it on. Another card's `base_model` is not
    this folder's own name.
    """
    if name == "reviews":
        return None, {}
    local = is_local(name)
    file = Path(name).expanduser() / "README.md" if local else try_to_load_from_cache(name, "README.md")
    card = read_header(file) if isinstance(file, str | Path) and Path(file).is_file() else {}
    base = name
    if local:
        base = card.get("base_model") if OURS in (card.get("tags") or []) else None
    return base, {key: card[key] for key in LICENSE if card.get(key)}


def code_version(script: str) -> str:
    """The commit of the code, and whether the files differ from it; "" outside a git checkout."""

    def git(*argv):
        return subprocess.run(["git", "-C", str(ROOT), *argv], capture_output=True, text=True, timeout=20)

    try:
        commit = git("rev-parse", "HEAD")
        if commit.returncode:
            return ""
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
        is_tracked = not git("ls-files", "--error-unmatch", script).returncode
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return ""
    return commit.stdout.strip() + (
        " with changes that are not committed" if changed or not is_tracked else ""
    )


def package_versions(args) -> str:
    names = ["torch", "transformers", "datasets"]
    if args.lora_rank:
        names.append("peft")
    if getattr(args, "rollout_engine", "") == "vllm":
        names.append("vllm")
    found = [f"Python {sys.version.split()[0]}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # it runs from a source tree
            continue
    return ", ".join(found)


def read_metrics(run_dir: str) -> list[dict]:
    """The lines of metrics.jsonl, [] where there is none."""
    file = Path(run_dir, "metrics.jsonl")
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def count_rows(run_dir: str) -> str:
    file = Path(run_dir, "data.json")
    return f"{json.loads(file.read_text())['rows']:,} rows to learn from" if file.is_file() else ""


def kind_of(model) -> str:
    """`policy`, `value` or `reward`, by the model's class."""
    for kind in ("value", "reward"):
        if KINDS[kind][0].removeprefix("Model") in type(model).__name__:
            return kind
    return "policy"


# --- the parts of the page -----------------------------------------------------------------------------


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def method(script: str) -> tuple[str, list[str]]:
    """(first paragraph, arXiv ids in their order) of a script's docstring."""
    text = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8"))) or ""
    papers = list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text)))
    return " ".join(text.split("\n\n")[0].split()), papers


def argument_rows(args) -> list[list[str]]:
    """(flag, value, default) of the arguments that differ from the script's defaults."""
    rows = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        if value != default and field.name not in NOT_SHOWN:
            flag = "--" + field.name.replace("_", "-")
            shown = [f"`{public(each)}`" if public(each) else "" for each in (value, default)]
            rows.append([f"`{flag}`", *shown])
    return rows


def last_rows(lines: list[dict]) -> list[list[str]]:
    """(metric, value, step) of every metric's last line."""
    last = {}
    for line in lines:
        for key, value in line.items():
            if key != "step" and not key.startswith(SYSTEM):
                last[key] = (value, line["step"])
    return [[f"`{key}`", number(value), str(step)] for key, (value, step) in sorted(last.items())]


def curve(lines: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a run's course at a few steps: its evaluations, or where there are fewer than two its training
    metrics."""
    held_out = [line for line in lines if any(key.startswith("eval/") for key in line)]
    chosen = held_out if len(held_out) > 1 else [line for line in lines if line not in held_out]
    if not chosen:
        return [], []
    keys = [key for key in chosen[-1] if key != "step" and not key.startswith(SYSTEM)][:CURVE_COLUMNS]
    count = min(CURVE_ROWS, len(chosen))
    places = {round(i * (len(chosen) - 1) / max(1, count - 1)) for i in range(count)}
    rows = []
    for place in sorted(places):
        line = chosen[place]
        rows.append([str(line["step"]), *(number(line.get(key)) for key in keys)])
    return ["step", *(f"`{key}`" for key in keys)], rows


def what_it_is(kind: str, model, args, script: str) -> str:
    """A sentence or two about the model's outputs and their unit."""
    config = model.config
    if kind == "policy":
        return "It is a language model, a *policy*: it answers prompts."
    if kind == "reward":
        unit = ""
        if getattr(config, "score_std", None):
            unit = (
                f" Over the training responses the scores have the mean {config.score_mean:.4g} and the standard "
                f"deviation {config.score_std:.4g} (`score_mean`, `score_std` in the config)."
            )
        return f"It is a *reward model*: one score for a prompt with its response, read at the end.{unit}"
    text = (
        "It is a *value model* and answers nothing: it has one number for each token. At the last token of the prompt "
        "that is V(s_1), at each token of the response Q(s_t, a_t): how well the answer is expected to end."
    )
    if getattr(args, "normalise_values", False):
        return (
            text
            + " With `--normalise-values` the values have a unit of their own: only their order means something."
        )
    if learned_signs(config):
        return text + " Unit: +1 is a chosen response and -1 a rejected one."
    if getattr(config, "return_std", None) is not None:
        return (
            f"{text} Unit: standardised scores; value * {config.return_std:.6g} + {config.return_mean:.6g} is in the unit "
            "of the training data's scores (`return_std`, `return_mean` in the config)."
        )
    return f"{text} Unit: that of the run's own returns in `{Path(script).name}`."


def how_to_open(kind: str, model, tokenizer, is_adapter: bool) -> list[str]:
    """Lines of Python that open the folder, and of a value or reward model read its numbers."""
    auto = KINDS[kind][0]
    if kind == "policy" and model.config.is_encoder_decoder:
        auto = "ModelForSeq2SeqLM"
    labels = "" if kind == "policy" or not is_adapter else ", num_labels=1"
    package, prefix = ("peft", "AutoPeft") if is_adapter else ("transformers", "Auto")
    lines = ["import torch"] if kind != "policy" else []
    if is_adapter:
        lines += [f"from {package} import {prefix}{auto}", "from transformers import AutoTokenizer"]
    else:
        lines.append(f"from transformers import {prefix}{auto}, AutoTokenizer")
    lines += [
        "",
        'folder = "FOLDER"  # this folder, or its id on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {prefix}{auto}.from_pretrained(folder{labels}).eval()",
    ]
    if kind == "policy" or model.config.is_encoder_decoder or not tokenizer.chat_template:
        return lines
    lines += ["", 'chat = [{"role": "user", "content": "PROMPT"}]']
    if kind == "reward":
        return lines + [
            'chat.append({"role": "assistant", "content": "RESPONSE"})',
            'ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)',
            "with torch.no_grad():",
            "    score = model(input_ids=ids).logits[0, 0]",
        ]
    return lines + [
        "prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)",
        'response = tokenizer("RESPONSE", add_special_tokens=False)["input_ids"]',
        "response.append(tokenizer.eos_token_id)  # or the token with which the template ends an answer",
        "with torch.no_grad():",
        "    values = model(input_ids=torch.tensor([prompt + response])).logits[0, :, 0]",
        "values = values[len(prompt) - 1 :]  # V(s_1), then one Q for each token of the response",
    ]


# --- the page ------------------------------------------------------------------------------------------


def write_card(folder: Path, model, tokenizer, args, script: str, start: str = "") -> None:
    """README.md in `folder`, as `model_card` makes it. Where that fails a note says why, and the folder has none: no
    card is worth a trained model."""
    try:
        text = model_card(model, tokenizer, args, script, start or args.model)
    except Exception as error:
        note(f"{folder.stem}: no model card could be written ({type(error).__name__}: {error})")
        return
    (folder / "README.md").write_text(text, encoding="utf-8")


def model_card(model, tokenizer, args, script: str, start: str) -> str:
    """The card of a model that a run exports: a YAML header as the hub reads it, then Markdown.

    `args`: the run's arguments, whose run folder has metrics.jsonl and data.json; `script`: the file that trained,
    whose docstring names the method and its papers; `start`: the folder or hub id that the weights came from.
    """
    kind = kind_of(model)
    is_adapter = hasattr(model, "lora") and not model.lora_merge
    name = Path(script).stem
    base, license_entries = base_of(start)
    about, papers = method(script)
    old_data = getattr(args, "old_dataset", "")
    task = None if model.config.is_encoder_decoder and kind == "policy" else KINDS[kind][1]
    data = ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(hub_data_sets(args.dataset) + hub_data_sets(old_data))) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        tags=[OURS, name, f"{kind}-model", *(["lora"] if args.lora_rank else [])],
        **license_entries,
    )

    started = f"`{public(start)}`"
    if start == "reviews":
        started += " (the embedded model of the code)"
    elif base != start:
        started += " (a local folder)" + (f", which comes from `{base}`" if base else "")
    used = f"`{public(args.dataset)}`" + (f" and `{public(old_data)}`" if old_data else "")
    used += f", split `{args.split}`, part `{args.part}`"
    facts = [
        ["trained by", f"`{Path(script).name}`"],
        ["started from", started],
        ["data", ", ".join(filter(None, [used, count_rows(args.run_dir)]))],
        ["adapters", f"LoRA, rank {args.lora_rank}, " + ("on their own" if is_adapter else "merged")],
        ["versions", package_versions(args)],
        ["commit of the code", code_version(script)],
    ]
    if not args.lora_rank:
        facts = [row for row in facts if row[0] != "adapters"]
    facts = [row for row in facts if row[1]]

    lines = [f"# {Path(args.run_dir).name or name}", "", about]
    if papers:
        links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
        lines += ["", f"Papers: {links}."]
    lines += ["", what_it_is(kind, model, args, script), "", markdown(["", ""], facts)]
    lines += ["", "## How to open it", "", "```python"]
    lines += [*how_to_open(kind, model, tokenizer, is_adapter), "```"]
    arguments = argument_rows(args)
    lines += ["", "## Arguments that differ from the defaults", ""]
    lines.append(markdown(["flag", "value", "default"], arguments) if arguments else "None.")
    metrics = read_metrics(args.run_dir)
    header, rows = curve(metrics)
    if rows:
        lines += ["", "## Course of the run", "", markdown(header, rows)]
        lines += ["", "## Last numbers", "", markdown(["metric", "value", "step"], last_rows(metrics))]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
