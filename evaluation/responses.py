"""Answers of policies to a file of prompts: one turn or several, kept batch by batch; and the forms in which AlpacaEval and
MT-bench read them; `evaluate.py responses`. docs/evaluate_responses.md has the formats."""

import gc
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from common import distributed
from common.cli import fail, note
from common.data import hold_out_prompts, read_rows
from common.measures import distinct_2
from common.models import load_model
from common.pretrained import resolve
from common.reference import fingerprint
from common.rewards import Reward
from common.rollout import rollout
from common.tokenization import encode_prompt, load_tokenizer, stop_token, tokenize
from evaluation import text_metrics
from evaluation.text_metrics import WITH_REFERENCE, mean


@dataclass
class Responses:
    models: tuple[str, ...] = ("reviews",)
    """Policies to compare, one in memory at a time: hub ids or folders."""
    names: tuple[str, ...] = ()
    """A name for each model, for its files and the table. By default it is `x` of `runs/x/model`, else the
    last part."""
    dataset: str = "reviews"
    """Prompts: a hub id, or a local .jsonl, .json or .parquet file (.gz too). MT-bench's `turns` are asked one
    after another."""
    split: str = "train"
    """Split of a hub data set; of a local file, the value that its column `split` must have."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names and yours, in pairs: `--columns prompt question response answer`."""
    reference: str = "reference"
    """Column of the reference answers that some metrics compare with; `response`: the answers of an sft data
    set."""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """Share of the prompts to use: sft is 30 %, value 50 %, rl 20 %, disjoint by prompt (2502.16944)."""
    split_seed: int = 0
    """Seed of the split into parts and held-out prompts. It must be the same in all scripts of an experiment."""
    prompts: int = 0
    """Number of prompts, those that ppo.py holds out with the same `--part` and `--eval-prompts`. 0: all, in
    their order."""
    skip_bad_rows: bool = False
    """Drop and count unusable rows instead of stopping at the first."""
    metrics: tuple[Literal["rouge_l", "bleu", "meteor", "bertscore", "toxicity"], ...] = ()
    """Text metrics besides length and distinct_2. Each needs a package of its own."""
    reward: tuple[str, ...] = ()
    """Reward models (hub ids or folders) or `module:function`s to score the responses with."""
    bertscore_model: str = "roberta-large"
    """Encoder of BERTScore: a hub id or folder (1904.09675: roberta-large for English)."""
    bertscore_layer: int = 0
    """Layer of that encoder. 0: the one that bert-score's authors tuned for a model of that name."""
    toxicity_model: str = "unitary/toxic-bert"
    """Text classifier: a hub id or folder (Detoxify's `original`)."""
    toxicity_label: str = "toxic"
    """Label of the classifier whose probability is reported."""
    run_dir: str = "runs/evaluate"
    """Folder of responses.json and of a folder for each model. Finished responses are kept, unfinished ones
    continued."""
    overwrite: bool = False
    """Generate anew what is there already."""
    batch_size: int = 64
    """Prompts that are answered at once, over all ranks."""
    micro_batch_size: int = 8
    """Responses per forward pass of reward models, BERTScore and the toxicity classifier."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens. One that is longer for any of the models is dropped for all, and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    temperature: float = 0.0
    """Temperature of sampling. 0: greedy."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Type that computes; auto is bf16 on a GPU and float32 on a CPU."""
    shard_size: int = 0
    """Number of ranks that a model is sharded over (HSDP: replicas of it across nodes). 0: all."""


# The prompts that the online scripts hold out of the embedded world.
RESPONSES_REVIEWS = dict(
    part="rl",
    prompts=96,
    reference="response",
    batch_size=96,
    max_prompt_length=16,
    max_response_length=32,
    temperature=1.0,
    reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def short_names(models):
    """`runs/x/model` is x, anything else its last part."""
    return [(path.parent.name if path.name == "model" else "") or path.name for path in map(Path, models)]


def read_questions(args):
    """One row a prompt, with `turns` (what the user says, one after another) and `references` (one a turn, None for none)."""
    reader = dict(split=args.split, columns=args.columns, part=args.part, split_seed=args.split_seed)
    kind = "sft" if args.reference == "response" else "prompts"
    first, compared = {}, [name for name in args.metrics if name in WITH_REFERENCE]
    for row in read_rows(args.dataset, kind, skip_bad_rows=args.skip_bad_rows, **reader):
        turns, found = row.get("turns"), row.get(args.reference)
        asked = turns if isinstance(turns, list) and turns[0:1] == [row["prompt"]] else [row["prompt"]]
        found = found if isinstance(found, list) else [found]
        if len(asked) > 1 and not all(isinstance(turn, str) for turn in asked):
            fail(f"{args.dataset}, row {row['row']}: turns must be a list of texts")
        if compared and (
            len(found) != len(asked) or not all(isinstance(text, str) and text.strip() for text in found)
        ):
            where = f"{args.dataset}, row {row['row']}: no text in the column {args.reference!r}"
            fail(f"{where}, with which --metrics {compared[0]} compares; name yours with --reference")
        references = found if len(found) == len(asked) else [None] * len(asked)
        first.setdefault(json.dumps(row["prompt"]), {**row, "turns": asked, "references": references})
    rows = list(first.values())
    if args.prompts:
        _, rows = hold_out_prompts(rows, args.prompts, args.split_seed)
    return rows


def kept(out, settings, batches, overwrite):
    """(records, number of batches) of the whole batches in the folder `out`; what a kill left of the next one is cut off.
    Other settings than those that the file was made with end here, unless `overwrite`."""
    file, made, part = out / "responses.jsonl", out / "settings.json", out / "responses.part"
    out.mkdir(parents=True, exist_ok=True)
    lines = (
        file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        if file.exists() and not overwrite
        else []
    )
    before = json.loads(made.read_text()) if made.exists() else {}
    changed = [
        f"{key} {before.get(key)} -> {settings[key]}" for key in settings if before.get(key) != settings[key]
    ]
    if lines and changed:
        hint = "--overwrite replaces them, --run-dir chooses another folder"
        fail(f"{file} holds responses made with other settings ({', '.join(changed)}): {hint}")
    turns = [(row, turn) for batch in batches for row in batch for turn in range(len(row["turns"]))]
    ends = [0, *accumulate(sum(len(row["turns"]) for row in batch) for batch in batches)]
    whole = sum(end <= len(lines) for end in ends) - 1
    records = [json.loads(line) for line in lines[: ends[whole]]]
    for record, (row, turn) in zip(records, turns, strict=False):
        record["reference"] = row["references"][turn]  # another --reference needs no new responses
    part.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    part.rename(file)
    made.write_text(
        json.dumps(settings, indent=1)
    )  # last: a kill before it leaves no old response under new settings
    return records, whole


def answer(policy, tokenizer, batch, name, args, number):
    """Records of one batch, row by row and turn by turn. Each turn goes on top of the model's own answers so far."""
    prompts, records = [row["prompt"] for row in batch], [[] for _ in batch]
    stops = {stop_token(tokenizer), tokenizer.eos_token_id}
    for turn in range(max(len(row["turns"]) for row in batch)):
        asked = [i for i, row in enumerate(batch) if turn < len(row["turns"])]
        for i in asked if turn else ():
            said = [{"role": "user", "content": prompts[i]}] if turn == 1 else prompts[i]
            reply = {"role": "assistant", "content": records[i][-1]["response"]}
            prompts[i] = [*said, reply, {"role": "user", "content": batch[i]["turns"][turn]}]
        ids = [encode_prompt(tokenizer, prompts[i]) for i in asked]
        found, _ = rollout(
            policy,
            tokenizer,
            ids,
            args.max_response_length,
            args.temperature,
            (args.seed, 1000 * number + turn),
        )
        for i, tokens, text in zip(
            asked, found, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True
        ):
            what = {
                "row": batch[i]["row"],
                "turn": turn,
                "prompt": prompts[i],
                "response": text,
                "model": name,
            }
            what |= {
                "length": len(tokens),
                "truncated": tokens[-1] not in stops,
                "reference": batch[i]["references"][turn],
            }
            records[i].append(what)
    return [record for of_row in records for record in of_row]


def export(out, name, rows, records, dataset):
    """The forms that alpaca_eval (first turns) and FastChat's llm_judge read."""
    texts, alpaca, mt_bench = iter(record["response"] for record in records), [], []
    for row in rows:
        turns, prompt = [next(texts) for _ in row["turns"]], row["prompt"]
        prompt = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        alpaca += [
            {
                "instruction": prompt,
                "output": turns[0],
                "generator": name,
                "dataset": row.get("dataset", dataset),
            }
        ]
        answer_id = hashlib.sha256(json.dumps([name, prompt, turns]).encode()).hexdigest()[:22]
        what = {"question_id": row.get("question_id", row["row"]), "answer_id": answer_id, "model_id": name}
        mt_bench += [what | {"choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}]
    (out / "alpaca_eval.json").write_text(json.dumps(alpaca, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in mt_bench]
    (out / "mt_bench.jsonl").write_text("".join(lines), encoding="utf-8")


def table(found):
    """A markdown table, a row a model: mean ± half of the 95 % interval."""
    columns, show = (
        list(next(iter(found.values()))),
        lambda x: f"{x['mean']:.4g}" + (f" ± {x['ci95']:.2g}" if x["ci95"] else ""),
    )
    rows = [["model", "n", *columns], ["---"] * (len(columns) + 2)]
    rows += [
        [name, str(of["length"]["n"]), *(show(of[column]) for column in columns)]
        for name, of in found.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def responses(args) -> None:
    # --- setup: all that can be wrong without a model
    names, first = args.names or short_names(args.models), distributed.rank() == 0
    if (
        not args.models
        or len(names) != len(args.models)
        or len(set(names)) < len(names)
        or any("/" in n for n in names)
    ):
        fail(
            f"--models: {len(args.models)} models with the names {', '.join(names)}; give each its own with --names"
        )
    if args.prompts < 0:
        fail(f"--prompts is {args.prompts}; it must not be negative")
    labels = [name.partition(":")[2] or short_names([name])[0] for name in args.reward]
    columns = ["length", "characters", "truncated", "distinct_2", *labels, *args.metrics]
    if len(set(columns)) < len(columns):
        fail(f"--reward, --metrics: two columns of the same name among {', '.join(columns)}")
    text_metrics.check(args.metrics, args)
    folders = [resolve(model) for model in args.models]
    tokenizers = [load_tokenizer(folder) for folder in folders]
    rows = read_questions(args)
    for name, tokenizer in zip(
        names, tokenizers, strict=True
    ):  # what one of them cannot take is asked of none
        rows = tokenize(rows, tokenizer, (), args.max_prompt_length, 1, f"{args.dataset}, tokens of {name}")
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    settings = {
        "max_response_length": args.max_response_length,
        "precision": str(distributed.dtypes(args.precision)[0]),
    }
    settings |= {"temperature": args.temperature}
    settings |= {"seed": args.seed, "batch_size": args.batch_size} if args.temperature else {}
    state = []
    for name, folder, tokenizer in zip(names, folders, tokenizers, strict=True) if first else ():
        asked = [[encode_prompt(tokenizer, row["prompt"]), row["turns"]] for row in rows]
        made = {
            "weights": fingerprint(folder),
            "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        }
        state.append(kept(Path(args.run_dir, name), made | settings, batches, args.overwrite))
    state = distributed.all_gather_object(state)[0]
    rewards = [Reward(name, tokenizers[0], args) for name in args.reward]
    for reward in rewards:
        reward.same = (
            False  # a reward model reads the text by its own template: the same for policies of any tokens
        )

    # --- generate and score
    found, texts, references = {}, {}, {}
    for name, folder, tokenizer, (records, whole) in zip(names, folders, tokenizers, state, strict=True):
        out = Path(args.run_dir, name)
        policy = (
            load_model("policy", folder, tokenizer, args, trained=False) if whole < len(batches) else None
        )
        for number in tqdm(range(whole, len(batches)), desc=name, disable=None if first else True):
            new = answer(policy, tokenizer, batches[number], name, args, number)
            records += new
            with open(
                out / "responses.jsonl" if first else os.devnull, "a", encoding="utf-8"
            ) as file:  # closed, so flushed
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in new)
        policy = None
        gc.collect()  # sharded modules are in reference cycles
        if first:
            export(out, name, rows, records, args.dataset)
        texts[name], references[name] = (
            [record[key] for record in records] for key in ("response", "reference")
        )
        found[name] = {
            "length": mean(r["length"] for r in records),
            "characters": mean(map(len, texts[name])),
        }
        found[name] |= {"truncated": mean(r["truncated"] for r in records)}
        found[name] |= {"distinct_2": {"mean": distinct_2(texts[name]), "ci95": None, "n": len(records)}}
        asked = [row for row in rows for _ in row["turns"]]
        asked = [row | {"prompt": record["prompt"]} for row, record in zip(asked, records, strict=True)]
        for label, reward in zip(labels, rewards, strict=True):
            found[name][label] = mean(reward(asked, [], texts[name]).tolist(), reward.name)
    if first:  # the others need not wait for what is computed here alone
        for name in names:
            scores = {
                metric: text_metrics.METRICS[metric](texts[name], references[name], args)
                for metric in args.metrics
            }
            found[name] |= scores
        result = {
            "dataset": args.dataset,
            "paths": dict(zip(names, args.models, strict=True)),
            **settings,
            "models": found,
        }
        Path(args.run_dir, "responses.json").write_text(json.dumps(result, indent=1))
        note(table(found))
