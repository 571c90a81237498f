"""Evaluates what the other scripts train: value models, policies' responses, and responses by a judge. Trains nothing.

    python evaluate.py values --models runs/gvm_td/model runs/reward/model         # whose values prefer the better answer?
    python evaluate.py responses --models runs/sft/model runs/dvpo/model           # what do policies answer to the same prompts?
    torchrun --nproc_per_node=8 evaluate.py responses --models runs/sft/model runs/dpo/model --dataset prompts.jsonl
    python evaluate.py judge --judge-model NAME --responses runs/evaluate/sft/responses.jsonl runs/evaluate/dvpo/responses.jsonl

`values` (2502.16944 appendix E) asks of a GVM, a PPO critic or a reward model how often the chosen response of a pair has the
strictly higher mean, percentile, last or backed-up token value; two baselines that read no text stand in the same table, and
each token can be coloured by its value (Figure 3). A model in a run of gvm_td.py or reward.py is asked about that run's own
held-out pairs, so the table is the one the run logged. `responses` writes what models answer, also in the forms that AlpacaEval
and MT-bench read, with text metrics and rewards of it. `judge` asks a language model which of two files of responses is better,
each pair in both orders, or for scores from 1 to 5.

docs/evaluate.md explains every number and file; `python evaluate.py values --help` lists the flags.
"""

import collections
import dataclasses
import gc
import hashlib
import html
import json
import os
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import AutoConfig

from common import fsdp
from common.data import add_context, encode_prompt, fail, hold_out, note, prompt_hash, read_rows, tokenize
from common.log import parse
from common.models import Reward, load_model, load_tokenizer, resolve, response_values, run_micro_batches, sequence_scores
from optional import answers, text_metrics
from optional.judge import (
    Cache,
    ask_all,
    average,
    fill,
    pair_points,
    pairwise_summary,
    parse_verdict,
    prepare,
    question_key,
    read_responses,
)
from optional.text_metrics import mean

# --- values ------------------------------------------------------------------------------------------------------------------


@dataclass
class Values:
    """Pair accuracy of value and reward models, pictures of token values."""

    models: tuple[str, ...] = ("reviews",)
    """GVMs, PPO critics or reward models: folders or hub ids; each reads the text by its own tokenizer"""
    like: str = ""
    """run of gvm_td.py or reward.py whose held-out pairs are judged, read as it read them; default: the first model's run"""
    dataset: str = ""
    """pairs or scored responses: hub id, or local .jsonl / .json / .parquet (.gz too); RewardBench's files as they are"""
    source: Literal["preference", "scores"] = "preference"
    """what it holds: prompt, chosen, rejected, or prompt, response, reward (all pairs of a prompt at least --gap apart)"""
    split: str = "train"
    """the hub's split, or the value to keep of a local file's `split` column"""
    reward: str = ""
    """reward model or `module:function` whose scores replace the data set's own, with --source scores"""
    gap: float = 0.0
    """smallest difference of scores that makes a pair"""
    max_pairs: int = 0
    """a random sample of so many pairs; 0: all"""
    fraction: float = 1.0
    """share of the prompts to judge: those that a run with this --eval-fraction holds out"""
    columns: dict[str, str] = field(default_factory=dict)
    """our column names and yours, e.g. `--columns chosen better rejected worse`"""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """share of the prompts: 30 % sft, 50 % value, 20 % rl, disjoint (2502.16944)"""
    split_seed: int = 0
    """seed of `--part` and of `--fraction`; the same in every script"""
    skip_bad_rows: bool = False
    """drop and count unusable rows (an empty response is one) instead of stopping at the first"""
    max_characters: int = 0
    """drop (and count) pairs with a longer response; 0: no limit"""
    max_prompt_length: int = 1024
    """tokens; longer prompts are dropped and counted"""
    max_response_length: int = 1024
    """tokens; longer responses are cut"""
    context_pairs: int = -1
    """question-answer pairs by the same policy before each prompt; -1: as each model was trained"""
    lam: float = 0.95
    """lambda of the backup of a response's token values to one score"""
    micro_batch_size: int = 8
    """responses a forward pass, a rank"""
    text: tuple[str, ...] = ()
    """a prompt and responses to it, to be drawn token by token"""
    draw: int = 2
    """pairs drawn token by token"""
    run_dir: str = "runs/evaluate"
    """values.json, values.md, values.jsonl and the pictures go here"""
    seed: int = 0
    """seed of the context pairs"""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """compute type; auto: bf16 on a GPU, float32 on a CPU"""
    shard_size: int = 0
    """ranks a model is sharded over; 0: all"""


STATISTICS = ("mean", "p1", "p5", "p10", "p90", "p95", "p99", "last")
COLUMNS = (*STATISTICS, "backup", "score")  # the last: of a reward model or baseline, which give one number a response


def response_statistics(values: list[float]) -> dict[str, float]:
    """Mean, percentiles (linear interpolation) and last of one response's token values (2502.16944 appendix E)."""
    percentiles = np.percentile(values, [int(name[1:]) for name in STATISTICS[1:-1]])
    return dict(zip(STATISTICS, [float(np.mean(values)), *percentiles.tolist(), float(values[-1])], strict=True))


def pair_accuracy(chosen: list[list[float]], rejected: list[list[float]]) -> dict[str, float]:
    """Share of pairs whose chosen response has the strictly higher statistic of its token values; a tie is not a win."""
    pairs = [(response_statistics(c), response_statistics(r)) for c, r in zip(chosen, rejected, strict=True)]
    return {name: sum(c[name] > r[name] for c, r in pairs) / len(pairs) for name in STATISTICS}


def make_pairs(rows: list[dict], gap: float) -> list[tuple[dict, dict]]:
    """All (better, worse) pairs of responses to one prompt (where rows came in pairs: of that pair), `gap` of reward apart."""
    groups = {}
    for row in rows:
        groups.setdefault(row.get("pair", json.dumps(row["prompt"])), []).append(row)
    return [(a, b) for group in groups.values() for a in group for b in group if a["reward"] - b["reward"] >= max(gap, 1e-9)]


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text each token adds to the response."""
    texts = [tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
    return [b[len(a) :] for a, b in zip(texts, texts[1:], strict=False)]


def colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    """Red at `low`, white in the middle, green at `high`."""
    x = 0.5 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    red, white, green = (230, 90, 80), (250, 250, 245), (80, 175, 95)
    a, b, y = (red, white, 2 * x) if x < 0.5 else (white, green, 2 * x - 1)
    return tuple(round(p + (q - p) * y) for p, q in zip(a, b, strict=True))


def draw_values(texts: list[tuple[str, list[str], list[float]]], path: str) -> str:
    """Colours each token by its value, as 2502.16944 Figure 3: writes path.html and path.png, returns it for a terminal.

    `texts` holds (title, tokens, one value a token); the scale runs from the lowest (red) to the highest (green) of them all.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    everything = [value for _, _, values in texts for value in values]
    low, high, width = min(everything), max(everything), 90
    terminal, page, lines = [], [f"<p>red {low:.2f} to green {high:.2f}; hover for the value</p>"], []
    for title, tokens, values in texts:
        cells = [(token, value, colour(value, low, high)) for token, value in zip(tokens, values, strict=True)]
        terminal.append(f"{title}\n" + "".join(f"\033[48;2;{r};{g};{b};38;2;0;0;0m{t}\033[0m" for t, _, (r, g, b) in cells))
        spans = "".join(f'<span style="background:rgb{c}" title="{v:.3f}">{html.escape(t)}</span>' for t, v, c in cells)
        page.append(f"<h4>{html.escape(title)}</h4><p>{spans}</p>")
        lines += [[(0, title, None)], []]
        x = 0
        for token, _, c in cells:
            if x and x + len(token) > width:
                lines.append([])
                x = 0
            lines[-1].append((x, token.replace("\n", " "), tuple(v / 255 for v in c)))
            x += len(token)
    style = "body{font:16px/2 monospace;max-width:60em;margin:2em auto} span{white-space:pre-wrap}"
    page.insert(0, f'<!doctype html><meta charset="utf-8"><style>{style}</style>')
    Path(f"{path}.html").write_text("".join(page), encoding="utf-8")
    figure = plt.figure(figsize=(width * 0.105, 0.32 * len(lines) + 0.2))
    for i, line in enumerate(lines):
        for x, token, c in line:
            box = dict(facecolor=c, edgecolor="none", pad=1.5) if c else None
            style = dict(family="monospace", fontsize=11, va="center", parse_math=False, bbox=box)
            figure.text(0.01 + 0.98 * x / width, 1 - (i + 0.7) / (len(lines) + 0.5), token, weight=None if c else "bold", **style)
    figure.savefig(f"{path}.png", dpi=110)
    plt.close(figure)
    return "\n".join(terminal)


def backup(values: list[float], gamma: float, lam: float) -> float:
    """One response's token values Q_1 .. Q_T to one score, by the Bellman backup a GVM is trained with: the lambda-return that
    V(s_1) regresses on, Q_T standing where the score S stood (gvm_td.py). lam 0 gives Q_1; lam 1 and gamma 1 give Q_T."""
    target = values[-1]
    for following in reversed(values[1:]):
        target = gamma * ((1 - lam) * following + lam * target)
    return (1 - lam) * values[0] + lam * target


def accuracies(pairs: list[tuple[list[float], list[float]]], gamma: float, lam: float) -> dict[str, float]:
    """Share of pairs whose first response strictly wins, by every statistic of its token values and by the backup."""
    wins = np.mean([backup(c, gamma, lam) > backup(r, gamma, lam) for c, r in pairs])
    return {**pair_accuracy(*zip(*pairs, strict=True)), "backup": float(wins)}


def by_subset(measure, pairs: list, subsets: list) -> dict[str, dict[str, float]]:
    """`measure(pairs)` of all pairs (row `all`), of each named subset, and the plain mean over subsets (row `average`)."""
    table, names = {"all": measure(pairs) | {"pairs": len(pairs)}}, sorted({name for name in subsets if name is not None})
    for name in names:
        part = [pair for pair, subset in zip(pairs, subsets, strict=True) if subset == name]
        table[name] = measure(part) | {"pairs": len(part)}
    if names:
        table["average"] = {key: float(np.mean([table[name][key] for name in names])) for key in table["all"]}
        table["average"]["pairs"] = sum(table[name]["pairs"] for name in names)
    return table


def accuracy_table(tables: dict[str, dict]) -> str:
    """Markdown: a row for each model or baseline, and for each of its subsets."""
    lines = ["| share of pairs | pairs | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, table in tables.items():
        for subset, row in table.items():
            cells = [f"{row[key]:.3f}" if key in row else "" for key in COLUMNS]
            cells = [name if subset == "all" else f"{name}: {subset}", str(row["pairs"]), *cells]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_the_run(args: Values) -> tuple[Values, dict[str, float]]:
    """`args` with the held-out pairs of the run `--like` (or of the run the first model lies in, where no --dataset is given),
    read as that run read them, and the average training reward of each policy in the run."""
    folder = Path(args.like or Path(args.models[0]).parent)
    if args.models[0] == "reviews" and not args.like:
        run = dict(part="value", eval_fraction=0.2, max_prompt_length=16, max_response_length=32, micro_batch_size=64)
        run = dict(dataset="reviews", eval_dataset="", eval_source="preference", eval_gap=0.0) | run
    else:
        run = json.loads((folder / "args.json").read_text()) if (folder / "args.json").is_file() else {}
    if args.like and (args.dataset or "eval_dataset" not in run):
        no_run = f"--like {folder}: no run of gvm_td.py or reward.py is there"
        fail("--like and --dataset exclude each other" if args.dataset else no_run)
    file = folder / "accuracy.json"
    averages = json.loads(file.read_text()).get("policy_averages", {}) if file.is_file() else {}
    if args.dataset or "eval_fraction" not in run:
        return args, averages
    same = "dataset columns part split split_seed skip_bad_rows max_characters max_prompt_length max_response_length reward seed"
    found = {key: run[key] for key in same.split() if key in run}
    if run["eval_dataset"]:
        found |= {"dataset": run["eval_dataset"], "split": run["eval_split"], "part": "all"}
    else:
        found["fraction"] = run["eval_fraction"]
    if "eval_gap" in run:  # gvm_td.py, which judges a sample of at most 2000
        found |= {"source": run["eval_source"] or run["source"], "gap": run["eval_gap"], "max_pairs": 2000}
    scale = 1 if "eval_gap" in run else 2  # reward.py counts pairs
    found["micro_batch_size"] = run["micro_batch_size"] * scale  # the same sums in the same order: the same digits
    return replace(args, **found), averages


def values(args: Values) -> None:
    # --- setup
    if not args.models or len(args.text) == 1:
        fail("--text: give a prompt and at least one response to it" if args.models else "--models: give at least one")
    names = [resolve(name, "value") for name in args.models]
    args, averages = as_the_run(args)
    if not args.dataset and not args.text:
        fail(f"{args.models[0]} lies in no run of gvm_td.py or reward.py; say with --dataset or --like which pairs to judge")

    # --- data
    rows = []
    if args.dataset:
        kind = {"preference": "preference", "scores": "responses" if args.reward else "scored"}[args.source]
        reader = dict(columns=args.columns, part=args.part, split_seed=args.split_seed, skip_bad_rows=args.skip_bad_rows)
        rows = read_rows(args.dataset, kind, split=args.split, **reader)
        if args.max_characters:
            texts = ("chosen", "rejected") if args.source == "preference" else ("response",)
            kept = [row for row in rows if all(len(row[text]) <= args.max_characters for text in texts)]
            note(f"{args.dataset}: dropped {len(rows) - len(kept)} of {len(rows)} rows: response over --max-characters")
            rows = kept
        rows = hold_out(rows, args.fraction, args.split_seed)[1] or fail(f"{args.dataset}: no row is left to judge")
    if rows and args.source == "preference":
        who = lambda row, side: row.get(f"{side}_policy") or row.get(f"{side}_model")  # RewardBench names the second
        rows = [{**row, "response": row[s], "policy": who(row, s), "pair": i, "reward": sign}
                for i, row in enumerate(rows) for s, sign in (("chosen", 1e9), ("rejected", -1e9))]  # fmt: skip

    def with_tokens(rows, tokenizer):
        name = args.dataset or "--text"
        return tokenize(rows, tokenizer, ("response",), args.max_prompt_length, args.max_response_length, name)

    if rows and args.source == "scores" and args.reward:
        tokenizer = load_tokenizer(names[0])
        scorer, rows = Reward(args.reward, tokenizer, args), with_tokens(rows, tokenizer)
        found = scorer(rows, [(row["prompt_ids"], row["response_ids"]) for row in rows], [row["response"] for row in rows])
        rows = [{**row, "reward": score} for row, score in zip(rows, found.tolist(), strict=True)]
        del scorer
        gc.collect()  # sharded modules are in reference cycles
    said = [{"prompt": args.text[0], "response": response} for response in args.text[1:]]

    Path(args.run_dir).mkdir(parents=True, exist_ok=True)
    tables, baselines, saved, pictures = {}, {}, [], []
    for label, name in zip(args.models, names, strict=True):
        # --- models
        tokenizer, config = load_tokenizer(name), AutoConfig.from_pretrained(name)
        kind = "reward" if "SequenceClassification" in str(config.architectures) else "value"
        model = load_model(kind, name, tokenizer, args, trained=False)
        k = getattr(config, "context_pairs", 0) if args.context_pairs < 0 else args.context_pairs

        def predict(rows, read={"value": response_values, "reward": sequence_scores}[kind]):
            """The token values of each response; of a reward model its score alone."""
            sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
            width, dtype = max(len(r) for _, r in sequences) + 1, torch.float64 if args.precision == "fp64" else torch.float32
            forward = lambda mb: read(model, **mb)
            found = run_micro_batches(forward, sequences, args.micro_batch_size, tokenizer.pad_token_id, width, dtype).cpu()
            first = kind == "value"
            ends = [len(r) + 1 if first else 1 for _, r in sequences]
            return [v[first:end].tolist() for v, end in zip(found, ends, strict=True)]

        shown = []
        if rows:
            found = with_tokens(rows, tokenizer)
            pairs = make_pairs(found, args.gap) or fail(f"{args.dataset}: no two responses to a prompt with --gap between them")
            if args.max_pairs:
                pairs = random.Random(0).sample(pairs, min(len(pairs), args.max_pairs))
            judged = [row for pair in pairs for row in pair]
            judged = add_context(judged, k, judged, tokenizer, getattr(config, "context_length", 256), args.seed)
            numbers, subsets = predict(judged), [c.get("subset") for c, _ in pairs]
            numbers = list(zip(numbers[::2], numbers[1::2], strict=True))
            gamma = getattr(config, "gamma", 1.0)
            token_level = lambda pairs: accuracies(pairs, gamma, args.lam)
            score = lambda pairs: {"score": pair_accuracy(*zip(*pairs, strict=True))["last"]}
            tables[label] = by_subset(token_level if kind == "value" else score, numbers, subsets)
            if not baselines:
                longer = lambda pairs: {"score": float(np.mean([len(c["response"]) > len(r["response"]) for c, r in pairs]))}
                of = lambda row: averages.get(row.get("policy"), 0.0)
                better = lambda pairs: {"score": float(np.mean([of(c) > of(r) for c, r in pairs]))}
                baselines["baseline: the longer one"] = by_subset(longer, pairs, subsets)
                if {row.get("policy") for row in judged} & set(averages):
                    baselines["baseline: the better policy"] = by_subset(better, pairs, subsets)
            for (c, r), (c_values, r_values), subset in zip(pairs, numbers, subsets, strict=True):
                texts = {"prompt": c["prompt"], "chosen": c["response"], "rejected": r["response"]}
                saved.append({"model": label, "subset": subset, **texts, "chosen_values": c_values, "rejected_values": r_values})
            if kind == "value":
                for row, token_values in zip(judged[: 2 * args.draw], [v for pair in numbers for v in pair], strict=False):
                    title = f"{('chosen', 'rejected')[len(shown) % 2]}: {json.dumps(row['prompt'], ensure_ascii=False)[:80]}"
                    shown.append((title, token_texts(tokenizer, row["response_ids"]), token_values))
        if said and kind == "value":
            found = with_tokens(said, tokenizer)
            titles = [json.dumps(row["prompt"], ensure_ascii=False)[:80] for row in found]
            shown += zip(titles, [token_texts(tokenizer, row["response_ids"]) for row in found], predict(found), strict=True)

        # --- save
        if shown and fsdp.rank() == 0:
            path = f"{args.run_dir}/values" + (f"_{len(pictures) + 1}" if pictures else "")
            note(f"{label}\n{draw_values(shown, path)}")
            pictures.append(path)
        model = None  # before the next one is loaded
        gc.collect()
    if fsdp.rank() == 0 and tables:
        tables |= baselines
        text = accuracy_table(tables)
        Path(args.run_dir, "values.md").write_text(text + "\n")
        Path(args.run_dir, "values.json").write_text(json.dumps({"settings": vars(args), "accuracy": tables}, indent=1))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in saved]
        Path(args.run_dir, "values.jsonl").write_text("".join(lines), encoding="utf-8")
        note(f"{text}\nties are not wins; the standard error of a share of n pairs is at most 0.5 / sqrt(n)")


# --- responses ---------------------------------------------------------------------------------------------------------------


@dataclass
class Responses:
    models: tuple[str, ...] = ("reviews",)
    """policies to compare, one in memory at a time: folders or hub ids"""
    names: tuple[str, ...] = ()
    """a name for each, of its files and in the table; default: `x` of `runs/x/model`, else the last part"""
    dataset: str = "reviews"
    """prompts: hub id, or local .jsonl / .json / .parquet (.gz too); MT-bench's `turns` are asked one after another"""
    split: str = "train"
    """the hub's split, or the value to keep of a local file's `split` column"""
    columns: dict[str, str] = field(default_factory=dict)
    """our column names and yours, e.g. `--columns prompt instruction`"""
    reference: str = "reference"
    """column of the reference answers that some metrics compare with; `response`: the answers of an sft data set"""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """share of the prompts: 30 % sft, 50 % value, 20 % rl, disjoint (2502.16944)"""
    split_seed: int = 0
    """seed of `--part` and `--prompts`; the same in every script"""
    prompts: int = 0
    """this many prompts, those that ppo.py holds out with the same `--part` and `--eval-prompts`; 0: all, in their order"""
    skip_bad_rows: bool = False
    """drop and count unusable rows instead of stopping at the first"""
    metrics: tuple[Literal["rouge_l", "bleu", "meteor", "bertscore", "toxicity"], ...] = ()
    """text metrics beside length and distinct_2; each needs a package of its own"""
    reward: tuple[str, ...] = ()
    """reward models (folder or hub id) or `module:function`s to score the responses with"""
    bertscore_model: str = "roberta-large"
    """encoder of BERTScore: hub id or folder (1904.09675: roberta-large for English)"""
    bertscore_layer: int = 0
    """its layer; 0: the one bert-score's authors tuned for a model of that name"""
    toxicity_model: str = "unitary/toxic-bert"
    """text classifier: hub id or folder (Detoxify's `original`)"""
    toxicity_label: str = "toxic"
    """its label whose probability is reported"""
    run_dir: str = "runs/evaluate"
    """a folder for each model and responses.json go here; finished responses are kept, unfinished ones continued"""
    overwrite: bool = False
    """generate anew what is there already"""
    batch_size: int = 64
    """prompts generated at once, over all ranks"""
    micro_batch_size: int = 8
    """responses a forward pass of reward models, BERTScore and the toxicity classifier"""
    max_prompt_length: int = 1024
    """tokens; prompts longer than this for any of the models are dropped for all, and counted"""
    max_response_length: int = 1024
    """tokens; responses are cut off there"""
    temperature: float = 0.0
    """of sampling; 0: greedy"""
    seed: int = 0
    """seed of sampling"""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """compute type; auto: bf16 on a GPU, float32 on a CPU"""
    shard_size: int = 0
    """ranks a model is sharded over (HSDP: replicas of it across nodes); 0: all"""


# The prompts that the online scripts hold out of the embedded world.
RESPONSES_REVIEWS = dict(
    part="rl", prompts=96, reference="response", batch_size=96, max_prompt_length=16, max_response_length=32, temperature=1.0,
    reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)  # fmt: skip


def distinct_2(texts):
    """Different pairs of neighbouring words over all pairs, in all texts together: diversity (1510.03055)."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def fingerprint(name):
    """The contents of a model: a hash of its local weights and configuration, or the hub's commit."""
    files, digest = sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("config.json")]), hashlib.sha256()
    for file in files:
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest() if files else f"{name}@{AutoConfig.from_pretrained(name)._commit_hash}"


def responses(args: Responses) -> None:
    # --- setup: all that can be wrong without a model
    names, first = args.names or answers.short_names(args.models), fsdp.rank() == 0
    if not args.models or len(names) != len(args.models) or len(set(names)) < len(names) or any("/" in n for n in names):
        fail(f"--models: {len(args.models)} models with the names {', '.join(names)}; give each its own with --names")
    if args.prompts < 0:
        fail(f"--prompts is {args.prompts}; it must not be negative")
    labels = [name.partition(":")[2] or answers.short_names([name])[0] for name in args.reward]
    columns = ["length", "characters", "truncated", "distinct_2", *labels, *args.metrics]
    if len(set(columns)) < len(columns):
        fail(f"--reward, --metrics: two columns of the same name among {', '.join(columns)}")
    text_metrics.check(args.metrics, args)
    folders = [resolve(model) for model in args.models]
    tokenizers = [load_tokenizer(folder) for folder in folders]
    rows = answers.read_questions(args)
    for name, tokenizer in zip(names, tokenizers, strict=True):  # what one of them cannot take is asked of none
        rows = tokenize(rows, tokenizer, (), args.max_prompt_length, 1, f"{args.dataset}, tokens of {name}")
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    settings = {"max_response_length": args.max_response_length, "precision": str(fsdp.dtypes(args.precision)[0])}
    settings |= {"temperature": args.temperature}
    settings |= {"seed": args.seed, "batch_size": args.batch_size} if args.temperature else {}
    state = []
    for name, folder, tokenizer in zip(names, folders, tokenizers, strict=True) if first else ():
        asked = [[encode_prompt(tokenizer, row["prompt"]), row["turns"]] for row in rows]
        made = {"weights": fingerprint(folder), "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest()}
        state.append(answers.kept(Path(args.run_dir, name), made | settings, batches, args.overwrite))
    state = fsdp.all_gather_object(state)[0]
    rewards = [Reward(name, tokenizers[0], args) for name in args.reward]
    for reward in rewards:
        reward.same = False  # a reward model reads the text by its own template: the same for policies of any tokens

    # --- generate and score
    found, texts, references = {}, {}, {}
    for name, folder, tokenizer, (records, whole) in zip(names, folders, tokenizers, state, strict=True):
        out = Path(args.run_dir, name)
        policy = load_model("policy", folder, tokenizer, args, trained=False) if whole < len(batches) else None
        for number in tqdm(range(whole, len(batches)), desc=name, disable=None if first else True):
            new = answers.answer(policy, tokenizer, batches[number], name, args, number)
            records += new
            with open(out / "responses.jsonl" if first else os.devnull, "a", encoding="utf-8") as file:  # closed, so flushed
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in new)
        policy = None
        gc.collect()  # sharded modules are in reference cycles
        if first:
            answers.export(out, name, rows, records, args.dataset)
        texts[name], references[name] = ([record[key] for record in records] for key in ("response", "reference"))
        found[name] = {"length": mean(r["length"] for r in records), "characters": mean(map(len, texts[name]))}
        found[name] |= {"truncated": mean(r["truncated"] for r in records)}
        found[name] |= {"distinct_2": {"mean": distinct_2(texts[name]), "ci95": None, "n": len(records)}}
        asked = [row for row in rows for _ in row["turns"]]
        asked = [row | {"prompt": record["prompt"]} for row, record in zip(asked, records, strict=True)]
        for label, reward in zip(labels, rewards, strict=True):
            found[name][label] = mean(reward(asked, [], texts[name]).tolist(), reward.name)
    if first:  # the others need not wait for what is computed here alone
        for name in names:
            scores = {metric: text_metrics.METRICS[metric](texts[name], references[name], args) for metric in args.metrics}
            found[name] |= scores
        result = {"dataset": args.dataset, "paths": dict(zip(names, args.models, strict=True)), **settings, "models": found}
        Path(args.run_dir, "responses.json").write_text(json.dumps(result, indent=1))
        note(answers.table(found))


# --- judge -------------------------------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Asks a language model which of two files of responses is better, or for scores from 1 to 5."""

    responses: tuple[str, ...]
    """files of prompt, response (.jsonl, .json, .parquet) or alpaca_eval's instruction, output: two, for scores any number"""
    judge_model: str
    """the judge's name at the endpoint"""
    endpoint: str = "http://localhost:8000/v1"
    """of any OpenAI-compatible server; its key is read from OPENAI_API_KEY"""
    mode: Literal["pairwise", "score"] = "pairwise"
    """pairwise: A, B or neutral, each pair in both orders; score: 1 to 5, each response by itself"""
    template: str = ""
    """file with a prompt of your own: {prompt}, and {answer_a} and {answer_b}, or {answer} for scores; default: ours"""
    run_dir: str = "runs/judge"
    """judgements.jsonl (the cache), results.jsonl and judge.json go here"""
    prompts: int = 0
    """judge this many prompts, drawn by `--seed`; 0: all"""
    seed: int = 0
    """of the prompts drawn, their order and which order of a pair is asked first"""
    temperature: float = 0.0
    """of the judge"""
    max_tokens: int = 1024
    """of a judge's answer, its reasoning included"""
    extra: str = "{}"
    """JSON that is added to each request; null takes a field out: {"max_tokens": null, "max_completion_tokens": 4096}"""
    concurrency: int = 8
    """questions under way at the same time"""
    timeout: float = 120.0
    """seconds for one try, from connecting to the last byte"""
    tries: int = 6
    """tries per question, in one run of this command"""
    backoff: float = 1.0
    """seconds before the second try at most (random down to half); doubled for each further one"""
    max_wait: float = 120.0
    """longest pause between two tries; a server that asks for a longer one (Retry-After) gets no further try"""
    retry_unparsable: bool = False
    """ask again where the judge's answer had no verdict or score; in vain at temperature 0, mostly"""


def judge(args: Judge) -> None:
    # --- questions
    template, sampling = prepare(args)
    pairwise, files = args.mode == "pairwise", [read_responses(file) for file in args.responses]
    shared, union = set.intersection(*map(set, files)), set.union(*map(set, files))
    alone = [len(set(file) - shared) for file in files]
    for name, count in zip(args.responses, alone, strict=True):
        if count:
            note(f"{name}: {count} of its prompts are not in every file" + (": left out" if pairwise else ""))
    drawn = sorted(shared if pairwise else union, key=lambda prompt: prompt_hash(prompt, args.seed))[: args.prompts or None]
    rows = [{"prompt": p, "responses": [file.get(p) for file in files]} for p in drawn] or fail("no prompt is in both files")
    questions = {}  # (row, which): which file's response, or of a pair 1 where the two are swapped
    for i, (prompt, texts) in enumerate(row.values() for row in rows):
        if not pairwise:
            questions |= {(i, j): fill(template, prompt=prompt, answer=text) for j, text in enumerate(texts) if text is not None}
        elif texts[0] != texts[1]:
            for j in (0, 1) if prompt_hash(prompt, args.seed + 1) < 0.5 else (1, 0):
                questions[i, j] = fill(template, prompt=prompt, answer_a=texts[j], answer_b=texts[1 - j])

    # --- answers
    folder = Path(args.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cache = Cache(folder / "judgements.jsonl")
    keys = {which: question_key(args.judge_model, text, sampling) for which, text in questions.items()}
    for key in set(keys.values()) & set(cache.answers) if args.retry_unparsable else ():
        if parse_verdict(args.mode, cache.answers[key][0]) is None:
            del cache.answers[key]
    cached = sum(key in cache.answers for key in keys.values())
    failed, stop = ask_all({keys[which]: text for which, text in questions.items()}, cache, sampling, args)
    answers = {which: cache.answers[key] for which, key in keys.items() if key in cache.answers}
    if questions and not answers:
        fail(f"{args.endpoint}: {stop or next(iter(failed.values()))}")

    # --- numbers
    judged = {which: parse_verdict(args.mode, answer) for which, (answer, _) in answers.items()}
    for i, row in enumerate(rows):
        row["judged"] = [judged.get((i, j)) for j in range(len(files))]
    lost, valid = sum(key in failed for key in keys.values()), sum(value is not None for value in judged.values())
    counts = {"wanted": len(keys), "cached": cached, "valid": valid, "unparsable": len(judged) - valid, "failed": lost}
    counts |= {"not_asked": len(keys) - len(judged) - lost, "cut": sum(finish == "length" for _, finish in answers.values())}
    failures = collections.Counter(failed.values())
    summary = {"args": dataclasses.asdict(args), "not_in_every_file": alone, "judgements": counts, "failures": failures}
    if pairwise:
        for row in rows:
            row["points"] = pair_points(row)
        summary |= pairwise_summary(rows)
        note("{judged} of {pairs} pairs: {wins} wins, {ties} ties, {losses} losses of the first file\n"
             "win rate {win_rate:.3f} (95 %: {ci95[0]:.3f} to {ci95[1]:.3f}), without ties {win_rate_without_ties:.3f}\n"
             "the two orders contradict: {contradictory:.3f}; A of A and B: {says_a:.3f}; the longer one wins: {longer_wins:.3f}"
             .format(**summary))  # fmt: skip
    else:
        line = "{label}: mean {mean:.3f} (95 %: {ci95[0]:.3f} to {ci95[1]:.3f}) of {n}"
        summary["files"] = []
        for name, *scores in zip(args.responses, *(row["judged"] for row in rows), strict=True):
            scores = [score for score in scores if score]
            summary["files"].append(average(scores) | {"histogram": [scores.count(k) for k in range(1, 6)]})
            note((line + ", 1 to 5: {histogram}").format(label=name, **summary["files"][-1]))
        if len(files) == 2:
            summary["difference"] = average([x - y for x, y in (row["judged"] for row in rows) if x and y])
            note(line.format(label="first - second", **summary["difference"]))
    note("judgements: " + ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in counts.items()))
    with open(folder / "results.jsonl", "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    strict = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # NaN is not JSON
    (folder / "judge.json").write_text(json.dumps(strict, indent=1) + "\n", encoding="utf-8")
    if len(judged) < len(keys):
        why = stop or ", ".join(f"{count} x {reason}" for reason, count in failures.most_common(3))
        fail(f"{len(keys) - len(judged)} of {len(keys)} judgements are missing ({why}); the same command asks for them again")


COMMANDS = {  # their flags, what differs on the embedded world, and what they do
    "values": (Values, {}, values),
    "responses": (Responses, RESPONSES_REVIEWS, responses),
    "judge": (Judge, {}, judge),
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        arguments, reviews, main = COMMANDS[sys.argv[1]]
        if arguments is Judge:  # no model of ours
            main(tyro.cli(Judge, args=sys.argv[2:]))
        else:
            fsdp.launch(main, parse(arguments, reviews, sys.argv[2:]))
    elif sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
    else:
        fail(f"give one of the commands {', '.join(COMMANDS)}: python evaluate.py values --help")
