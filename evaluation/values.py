"""`evaluate.py values`: do value models prefer the better answer? Pair accuracies, pictures of token values."""

import gc
import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoConfig

from common import distributed
from common.batches import run_micro_batches
from common.cli import fail, note
from common.context import add_context
from common.data import hold_out, read_rows
from common.measures import STATISTICS, make_pairs, pair_accuracy
from common.models import load_model
from common.pictures import draw_values, token_texts
from common.pretrained import resolve
from common.rewards import Reward
from common.tokenization import load_tokenizer, tokenize
from common.value_heads import response_values, sequence_scores


@dataclass
class Values:
    """Pair accuracy of value and reward models, pictures of token values."""

    models: tuple[str, ...] = ("reviews",)
    """GVMs, PPO critics or reward models: hub ids or folders. Each reads the text by its own tokenizer."""
    like: str = ""
    """Run of gvm_td.py or reward.py whose held-out pairs are judged, read as that run read them. By default it
    is the first model's run."""
    dataset: str = ""
    """Pairs or scored responses: a hub id, or a local .jsonl, .json or .parquet file (.gz too); RewardBench's
    files are read as they are."""
    source: Literal["preference", "scores"] = "preference"
    """What the data set holds. preference: prompt, chosen, rejected; scores: prompt, response, reward (all
    pairs of a prompt at least `--gap` apart)."""
    split: str = "train"
    """Split of a hub data set; of a local file, the value that its column `split` must have."""
    reward: str = ""
    """Reward model or `module:function` whose scores replace the data set's own, with `--source scores`."""
    gap: float = 0.0
    """Smallest difference of scores that makes a pair."""
    max_pairs: int = 0
    """Size of a random sample of the pairs. 0: all."""
    fraction: float = 1.0
    """Share of the prompts to judge: those that a run with this `--eval-fraction` holds out."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names and yours, in pairs: `--columns prompt question response answer`."""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """Share of the prompts to use: sft is 30 %, value 50 %, rl 20 %, disjoint by prompt (2502.16944)."""
    split_seed: int = 0
    """Seed of the split into parts and held-out prompts. It must be the same in all scripts of an experiment."""
    skip_bad_rows: bool = False
    """Drop and count unusable rows (an empty response is one) instead of stopping at the first."""
    max_characters: int = 0
    """Drop and count pairs with a response longer than this many characters. 0: no limit."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    context_pairs: int = -1
    """Question-answer pairs by the same policy before each prompt. -1: as each model was trained."""
    lam: float = 0.95
    """Lambda of the backup of a response's token values to one score."""
    micro_batch_size: int = 8
    """Responses per forward pass on one rank."""
    text: tuple[str, ...] = ()
    """A prompt and responses to it, to be drawn token by token."""
    draw: int = 2
    """Number of pairs that are drawn token by token."""
    run_dir: str = "runs/evaluate"
    """Folder of values.json, values.md, values.jsonl and the pictures."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Type that computes; auto is bf16 on a GPU and float32 on a CPU."""
    shard_size: int = 0
    """Number of ranks that a model is sharded over (HSDP: replicas of it across nodes). 0: all."""


COLUMNS = (
    *STATISTICS,
    "backup",
    "score",
)  # the last: of a reward model or baseline, which give one number a response


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
    table, names = (
        {"all": measure(pairs) | {"pairs": len(pairs)}},
        sorted({name for name in subsets if name is not None}),
    )
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
        run = dict(
            part="value", eval_fraction=0.2, max_prompt_length=16, max_response_length=32, micro_batch_size=64
        )
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
    found["micro_batch_size"] = (
        run["micro_batch_size"] * scale
    )  # the same sums in the same order: the same digits
    return replace(args, **found), averages


def values(args: Values) -> None:
    # --- setup
    if not args.models or len(args.text) == 1:
        fail(
            "--text: give a prompt and at least one response to it"
            if args.models
            else "--models: give at least one"
        )
    names = [resolve(name, "value") for name in args.models]
    args, averages = as_the_run(args)
    if not args.dataset and not args.text:
        fail(
            f"{args.models[0]} lies in no run of gvm_td.py or reward.py; say with --dataset or --like which pairs to judge"
        )

    # --- data
    rows = []
    if args.dataset:
        kind = {"preference": "preference", "scores": "responses" if args.reward else "scored"}[args.source]
        reader = dict(
            columns=args.columns, part=args.part, split_seed=args.split_seed, skip_bad_rows=args.skip_bad_rows
        )
        rows = read_rows(args.dataset, kind, split=args.split, **reader)
        if args.max_characters:
            texts = ("chosen", "rejected") if args.source == "preference" else ("response",)
            kept = [row for row in rows if all(len(row[text]) <= args.max_characters for text in texts)]
            note(
                f"{args.dataset}: dropped {len(rows) - len(kept)} of {len(rows)} rows: response over --max-characters"
            )
            rows = kept
        rows = hold_out(rows, args.fraction, args.split_seed)[1] or fail(
            f"{args.dataset}: no row is left to judge"
        )
    if rows and args.source == "preference":
        who = lambda row, side: (
            row.get(f"{side}_policy") or row.get(f"{side}_model")
        )  # RewardBench names the second
        rows = [
            {**row, "response": row[s], "policy": who(row, s), "pair": i, "reward": sign}
            for i, row in enumerate(rows)
            for s, sign in (("chosen", 1e9), ("rejected", -1e9))
        ]

    def with_tokens(rows, tokenizer):
        name = args.dataset or "--text"
        return tokenize(
            rows, tokenizer, ("response",), args.max_prompt_length, args.max_response_length, name
        )

    if rows and args.source == "scores" and args.reward:
        tokenizer = load_tokenizer(names[0])
        scorer, rows = Reward(args.reward, tokenizer, args), with_tokens(rows, tokenizer)
        found = scorer(
            rows,
            [(row["prompt_ids"], row["response_ids"]) for row in rows],
            [row["response"] for row in rows],
        )
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
            width, dtype = (
                max(len(r) for _, r in sequences) + 1,
                torch.float64 if args.precision == "fp64" else torch.float32,
            )
            forward = lambda mb: read(model, **mb)
            found = run_micro_batches(
                forward, sequences, args.micro_batch_size, tokenizer.pad_token_id, width, dtype
            ).cpu()
            first = kind == "value"
            ends = [len(r) + 1 if first else 1 for _, r in sequences]
            return [v[first:end].tolist() for v, end in zip(found, ends, strict=True)]

        shown = []
        if rows:
            found = with_tokens(rows, tokenizer)
            pairs = make_pairs(found, args.gap) or fail(
                f"{args.dataset}: no two responses to a prompt with --gap between them"
            )
            if args.max_pairs:
                pairs = random.Random(0).sample(pairs, min(len(pairs), args.max_pairs))
            judged = [row for pair in pairs for row in pair]
            judged = add_context(
                judged, k, judged, tokenizer, getattr(config, "context_length", 256), args.seed
            )
            numbers, subsets = predict(judged), [c.get("subset") for c, _ in pairs]
            numbers = list(zip(numbers[::2], numbers[1::2], strict=True))
            gamma = getattr(config, "gamma", 1.0)
            token_level = lambda pairs: accuracies(pairs, gamma, args.lam)
            score = lambda pairs: {"score": pair_accuracy(*zip(*pairs, strict=True))["last"]}
            tables[label] = by_subset(token_level if kind == "value" else score, numbers, subsets)
            if not baselines:
                longer = lambda pairs: {
                    "score": float(np.mean([len(c["response"]) > len(r["response"]) for c, r in pairs]))
                }
                of = lambda row: averages.get(row.get("policy"), 0.0)
                better = lambda pairs: {"score": float(np.mean([of(c) > of(r) for c, r in pairs]))}
                baselines["baseline: the longer one"] = by_subset(longer, pairs, subsets)
                if {row.get("policy") for row in judged} & set(averages):
                    baselines["baseline: the better policy"] = by_subset(better, pairs, subsets)
            for (c, r), (c_values, r_values), subset in zip(pairs, numbers, subsets, strict=True):
                texts = {"prompt": c["prompt"], "chosen": c["response"], "rejected": r["response"]}
                saved.append(
                    {
                        "model": label,
                        "subset": subset,
                        **texts,
                        "chosen_values": c_values,
                        "rejected_values": r_values,
                    }
                )
            if kind == "value":
                for row, token_values in zip(
                    judged[: 2 * args.draw], [v for pair in numbers for v in pair], strict=False
                ):
                    title = f"{('chosen', 'rejected')[len(shown) % 2]}: {json.dumps(row['prompt'], ensure_ascii=False)[:80]}"
                    shown.append((title, token_texts(tokenizer, row["response_ids"]), token_values))
        if said and kind == "value":
            found = with_tokens(said, tokenizer)
            titles = [json.dumps(row["prompt"], ensure_ascii=False)[:80] for row in found]
            shown += zip(
                titles,
                [token_texts(tokenizer, row["response_ids"]) for row in found],
                predict(found),
                strict=True,
            )

        # --- save
        if shown and distributed.rank() == 0:
            path = f"{args.run_dir}/values" + (f"_{len(pictures) + 1}" if pictures else "")
            note(f"{label}\n{draw_values(shown, path)}")
            pictures.append(path)
        model = None  # before the next one is loaded
        gc.collect()
    if distributed.rank() == 0 and tables:
        tables |= baselines
        text = accuracy_table(tables)
        Path(args.run_dir, "values.md").write_text(text + "\n")
        Path(args.run_dir, "values.json").write_text(
            json.dumps({"settings": vars(args), "accuracy": tables}, indent=1)
        )
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in saved]
        Path(args.run_dir, "values.jsonl").write_text("".join(lines), encoding="utf-8")
        note(f"{text}\nties are not wins; the standard error of a share of n pairs is at most 0.5 / sqrt(n)")
