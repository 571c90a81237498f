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

import gc
import json
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from transformers import AutoConfig

from common import fsdp
from common.data import fail, hold_out, note, read_rows, tokenize
from common.log import parse
from common.models import Reward, load_model, load_tokenizer, resolve, response_values, run_micro_batches, sequence_scores
from optional.answers import responses
from optional.context import add_context
from optional.judge import judge
from optional.pictures import draw_values, token_texts

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
