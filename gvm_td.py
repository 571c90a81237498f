"""GVM-TD: pretrains a token-level Global Value Model by temporal differences, offline, for dvpo.py.

Paper: 2502.16944 (DVPO), equation 1 and appendix E; v1 for `--normalise-values` (equation 2) and
`--context-pairs` (section 3.2). The model's output at the last prompt token is V(s_1), at response token y_t
it is Q(s_t, a_t). The response's score S arrives with the last token; intermediate rewards are 0. Targets,
without gradient:

    G_T = S
    G_t = gamma * ((1 - lam) * Q_{t+1} + lam * G_{t+1})     for t < T
    G_0 = (1 - lam) * Q_1 + lam * G_1                       for V(s_1), which is Q_0 below
    loss = mean over response tokens and the last prompt token of (Q_t - G_t)^2

lam 0 is the paper's equation 1, lam 1 is Monte Carlo. S is +1 / -1 for chosen / rejected
(`--source preference`), a given score standardised over the training set (`--source scores`), or a reward
model's (`--reward`, standardised too).

    python gvm_td.py                                                   # the embedded world, one CPU
    python gvm_td.py --model runs/sft/model --dataset pairs.jsonl --source preference
    torchrun --nproc_per_node=8 gvm_td.py --model meta-llama/Llama-3.2-3B-Instruct \
        --dataset openbmb/UltraFeedback --source scores --part value --micro-batch-size 4 \
        --gradient-checkpointing

Watch `eval/accuracy_mean` and `eval/accuracy_last`, and compare them with the length and policy baselines
that are printed at the end: a value model that does not beat "the longer one wins" has learned length.
docs/gvm_td.md explains the rest.
"""

import gc
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoConfig

from common import distributed, sharding, value_heads
from common.batches import batch_indices, collate, micro_batches, run_micro_batches
from common.checkpoints import export, load_checkpoint, save_checkpoint
from common.cli import fail, note, parse
from common.context import add_context
from common.data import SPLIT_BY, hold_out, read_rows
from common.log import Run
from common.measures import (
    MAX_PAIRS,
    better_policy_wins,
    longer_wins,
    make_pairs,
    pair_accuracy,
    sample_pairs,
    whole_pairs,
)
from common.meter import mfu, peak_memory_gb, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.pictures import draw_values, valued_texts
from common.positions import longest_of
from common.pretrained import load_pretrained, resolve
from common.rewards import Reward
from common.templates import text_of
from common.tokenization import TOKENS, load_tokenizer, tokenize, were_cut
from common.value_heads import response_values

# what a row of scored.jsonl does not have: tokens, and what was of the row of the data
NOT_SCORED = (
    *TOKENS,
    SPLIT_BY,
    "row",
    "split",
    "pair",
    "chosen",
    "rejected",
    "chosen_policy",
    "rejected_policy",
)


@dataclass
class Args:
    model: str = "reviews"
    """Model to start from: a hub id or a local folder, usually the SFT policy. `reviews` is the embedded
    one."""
    dataset: str = "reviews"
    """Data to train on: a hub id (`id:configuration` where it has several), a folder, or local .jsonl, .json or
    .parquet files (.gz too; several with commas between), with the columns
    that docs/data.md lists for this script. `reviews` is the embedded world."""
    source: Literal["preference", "scores"] = "preference"
    """What the data set holds. preference: prompt, chosen, rejected (returns +1 and -1); scores: prompt,
    response, reward."""
    reward: str = ""
    """Reward model (hub id or folder) or `module:function` that scores responses; in gvm_td.py its scores
    replace the data set's returns."""
    split: str = "train"
    """Split of a hub data set; of a local file, the value that its column `split` must have."""
    eval_dataset: str = ""
    """Held-out data. By default `--eval-fraction` of the prompts of `--dataset` are held out."""
    eval_split: str = "test"
    """Split of `--eval-dataset`."""
    eval_source: Literal["", "preference", "scores"] = ""
    """What the held-out data holds; by default the same as `--source`. From scores, all pairs of a prompt
    at least `--eval-gap` apart are made."""
    eval_gap: float = 0.0
    """Smallest difference of scores that makes a held-out pair."""
    eval_fraction: float = 0.05
    """Share of the prompts that is held out where no `--eval-dataset` is given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names and yours, in pairs: `--columns prompt question response answer`."""
    template_arguments: dict[str, str] = field(default_factory=dict)
    """Arguments for the chat template and their values, in pairs: `--template-arguments enable_thinking
    false`."""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """Share of the prompts to use: sft is 30 %, value 50 %, rl 20 %, disjoint by prompt (2502.16944)."""
    split_seed: int = 0
    """Seed of the split into parts and held-out prompts. It must be the same in all scripts of an
    experiment."""
    skip_bad_rows: bool = False
    """Drop and count unusable rows instead of stopping at the first."""
    last_rows: int = 0
    """Use only the last rows of `--dataset`, this many: of a rollouts.jsonl, the newest answers. 0: all."""
    old_dataset: str = ""
    """Scored responses, in our column names, that are mixed into the training data by `--old-share`, such as
    the scored.jsonl of an earlier run: what an earlier GVM learned from, so that a refreshed one does not
    forget it."""
    old_share: float = 0.5
    """Share of the training rows that come from `--old-dataset`; its rows are drawn, or repeated, to fit."""
    max_characters: int = 0
    """Drop and count rows with a response longer than this many characters. 0: no limit."""
    layers: int = 0
    """Keep only the first N layers of the backbone. 0: all."""
    context_pairs: int = 0
    """Question-answer pairs by the same policy that are put before each prompt (2502.16944 v1, section
    3.2)."""
    context_length: int = 256
    """Length, in tokens, that a context pair is cut at."""
    run_dir: str = "runs/gvm_td"
    """Folder of the run: arguments, metrics, samples, checkpoints, the exported model."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    epochs: int = 1
    """Passes over the data; in the online scripts, over each rollout."""
    steps: int = 0
    """Optimizer steps. 0: as many as `--epochs` gives."""
    batch_size: int = 32
    """Responses (in preference data: pairs) per optimizer step, over all ranks."""
    micro_batch_size: int = 4
    """Responses (in preference data: pairs) per forward pass on one rank. It changes memory and speed, not
    the result."""
    max_prompt_length: int = 512
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 512
    """Longest response, in tokens; a longer one is cut there."""
    lr: float = 2e-6
    """Peak learning rate (2502.16944: 2e-6)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a
    cosine."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    gamma: float = 1.0
    """Discount. A GVM and the script that uses it must have the same."""
    lam: float = 0.95
    """Lambda of the returns (gvm_td.py) or of GAE: 0 is one step (2502.16944, equation 1), 1 is Monte
    Carlo; the authors' released trainer uses 0.95."""
    normalise_values: bool = False
    """Batch-normalise the predictions before the loss (2502.16944 v1, equation 2); this is folded into the
    exported head."""
    eval_every: int = 100
    """Optimizer steps between evaluations. 0: evaluate only at the end."""
    save_every: int = 200
    """Steps between checkpoints for `--resume`. 0: none."""
    save_minutes: float = 0.0
    """Minutes between checkpoints, whatever `--save-every` says. 0: not by the clock."""
    keep: int = 2
    """Number of checkpoints that are kept."""
    resume: bool = False
    """Go on from the newest checkpoint of `--run-dir`, or from the start where there is none."""
    overwrite: bool = False
    """Replace an earlier run in `--run-dir`."""
    wandb: bool = False
    """Log to Weights & Biases as well (offline without WANDB_API_KEY)."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Type that computes; auto is bf16 on a GPU and float32 on a CPU. Master weights are float32."""
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer, through peft. 0: all weights are trained."""
    lora_alpha: float = 32.0
    """LoRA's scale is alpha / rank (2502.16944 v1, reward model and GVM: rank 8, alpha 32, dropout 0.1)."""
    lora_dropout: float = 0.0
    """Dropout on the input of LoRA's adapters, during the update alone."""
    lora_merge: bool = True
    """Export the merged model. `--no-lora-merge` exports the adapters alone, for peft."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    shard_size: int = 0
    """Number of ranks that a model is sharded over (HSDP: replicas of it across nodes). 0: all."""
    timeout_minutes: float = 60.0
    """Minutes after which a rank that waits for another gives up: longer than the slowest rollout, load or
    reward of one rank."""


# What works on the embedded world of 0.1 M parameters; a flag on the command line wins.
REVIEWS = dict(
    source="scores",
    eval_source="preference",
    eval_fraction=0.2,
    part="value",
    steps=500,
    batch_size=64,
    micro_batch_size=64,
    max_prompt_length=16,
    max_response_length=32,
    lr=3e-3,
    eval_every=250,
    save_every=100,
)


def td_targets(
    values: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """lambda-return targets [B, T + 1] of V(s_1), Q_1 .. Q_T (2502.16944 equation 1 at lam 0).

    values [B, T + 1] as the model gives them, without gradient; scores [B] arrive with the last token of mask
    [B, T]. Masked positions get 0. There is no discount from V(s_1) to Q_1: no action is taken in between.
    """
    targets = torch.zeros_like(values)
    final = mask.shape[1] - 1
    tokens_left = mask.flip(1).cumsum(1).flip(1)  # [B, T] of the response, from each token on
    last = mask & (tokens_left == 1)  # [B, T]
    for t in reversed(range(mask.shape[1])):
        if t < final:
            bootstrap = gamma * ((1 - lam) * values[:, t + 2] + lam * targets[:, t + 2])  # [B]
        else:
            bootstrap = torch.zeros_like(scores)
        inner = torch.where(mask[:, t], bootstrap, 0.0)
        targets[:, t + 1] = torch.where(last[:, t], scores, inner)
    targets[:, 0] = torch.where(mask[:, 0], (1 - lam) * values[:, 1] + lam * targets[:, 1], 0.0)
    return targets


def td_loss(
    values: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """Sum of squared TD errors over response tokens and the last prompt token (2502.16944 equation 1).

    values [B, T + 1], scores [B], mask [B, T].
    """
    targets = td_targets(values.detach(), scores, mask, gamma, lam)
    valid = torch.cat([mask[:, :1], mask], 1)  # [B, T + 1]
    return ((values - targets) ** 2 * valid).sum()


def normalise(
    values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values [B, T + 1] with mean 0 and variance 1 over the valid entries, mean, std), as batch
    normalisation does.

    Source: 2502.16944 v1, equation 2. mask [B, T]. The gradient flows through mean and std.
    """
    valid = torch.cat([mask[:, :1], mask], 1)
    mean = values[valid].mean()
    std = (((values - mean)[valid] ** 2).mean() + eps).sqrt()
    normal = torch.where(valid, (values - mean) / std, 0.0)
    return normal, mean.detach(), std.detach()


def normalised_slopes(
    values: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """`--normalise-values`: (d loss / d value [B, T + 1], loss, mean, std) of a whole batch.

    Its statistics are those of the whole batch, which no micro-batch knows. So the loss is differentiated by
    the values first, and each micro-batch then sends its slopes backward. values [B, T + 1], scores [B], mask
    [B, T].
    """
    values = values.requires_grad_()
    normal, mean, std = normalise(values, mask)
    (slopes,) = torch.autograd.grad(td_loss(normal, scores, mask, gamma, lam), values)
    loss = td_loss(normal.detach(), scores, mask, gamma, lam)
    return slopes, loss, mean.item(), std.item()


# --- the steps of the data section, in their order


def read_source(dataset: str, split: str, source: str, part: str, args: Args) -> list[dict]:
    """Rows of a data set that holds `source`: preference pairs, or responses with scores.

    Drops and counts rows with a response over `--max-characters`; ends the run where none is left.
    """
    if source == "preference":
        kind = "preference"
        texts = ("chosen", "rejected")
    elif args.reward:
        kind = "responses"  # the reward model's scores replace the data set's, which need none
        texts = ("response",)
    else:
        kind = "scored"
        texts = ("response",)
    rows = read_rows(
        dataset,
        kind,
        split=split,
        columns=args.columns,
        part=part,
        split_seed=args.split_seed,
        skip_bad_rows=args.skip_bad_rows,
    )
    if not args.max_characters:
        return rows
    kept = [row for row in rows if all(len(text_of(row[text])) <= args.max_characters for text in texts)]
    dropped = f"{len(rows) - len(kept)} of {len(rows)} rows"
    note(f"{dataset}: dropped {dropped}: response over --max-characters {args.max_characters}")
    if not kept:
        why = f"every response is over --max-characters {args.max_characters}"
        fail(f"{dataset}: no usable row: {why}")
    return kept


def read_training_and_held_out(args: Args) -> tuple[list[dict], list[dict]]:
    """(training rows of `--source`, held-out rows of `--eval-source`), as the data sets give them.

    Without `--eval-dataset` they are disjoint by prompt. Where the two sources differ then, the data set is
    read as both, and the same prompts are held out of each.
    """
    eval_source = args.eval_source or args.source
    rows = read_source(args.dataset, args.split, args.source, args.part, args)
    if args.last_rows:
        rows = rows[-args.last_rows :]
    if args.eval_dataset:
        held_out = read_source(args.eval_dataset, args.eval_split, eval_source, "all", args)
        return rows, held_out
    training, held_out = hold_out(rows, args.eval_fraction, args.split_seed)
    if eval_source != args.source:
        rows_to_judge = read_source(args.dataset, args.split, eval_source, args.part, args)
        _, held_out = hold_out(rows_to_judge, args.eval_fraction, args.split_seed)
    return training, held_out


def two_responses(pairs: list[dict]) -> list[dict]:
    """Two rows for each preference pair, chosen before rejected: each with its `response`, its `policy`, and
    as `reward` the return +1 or -1."""
    rows = []
    for i, pair in enumerate(pairs):
        chosen = {"response": pair["chosen"], "reward": 1.0, "policy": pair.get("chosen_policy")}
        rejected = {"response": pair["rejected"], "reward": -1.0, "policy": pair.get("rejected_policy")}
        rows.append({**pair, **chosen, "pair": i})
        rows.append({**pair, **rejected, "pair": i})
    return rows


def load_old_rows(count: int, tokenizer, args: Args) -> list[dict]:
    """Scored rows of `--old-dataset` that make up `--old-share` beside `count` other rows: all of them as often
    as they fit in, then a part, drawn at random. Their rewards stay as they are; with tokens."""
    if not 0 <= args.old_share < 1:
        fail(f"--old-share is {args.old_share}; it must be at least 0 and below 1")
    wanted = round(count * args.old_share / (1 - args.old_share))
    if not wanted:
        return []
    rows = read_rows(args.old_dataset, "scored", skip_bad_rows=args.skip_bad_rows)
    max_lengths = (args.max_prompt_length, args.max_response_length)
    rows = tokenize(rows, tokenizer, ("response",), *max_lengths, args.old_dataset, args.skip_bad_rows)
    drawn = rows * (wanted // len(rows))
    drawn += random.Random(args.seed).sample(rows, wanted % len(rows))
    note(f"{wanted} rows of {args.old_dataset} beside {count} of {args.dataset}")
    return drawn


def load_training_rows(training: list[dict], tokenizer, args: Args) -> list[dict]:
    """A row for each training response, with `reward`, `prompt_ids` and `response_ids`.

    Ends the run where `training`, the rows that were read, is empty, or where every prompt is too long.
    """
    if not training:
        fail(f"{args.dataset}: every prompt is held out; lower --eval-fraction")
    rows = two_responses(training) if args.source == "preference" else training
    max_lengths = (args.max_prompt_length, args.max_response_length)
    return tokenize(rows, tokenizer, ("response",), *max_lengths, args.dataset, args.skip_bad_rows)


def no_pair_message(args: Args) -> str:
    """What a run that has nothing to evaluate on ends with."""
    remedy = "raise --eval-fraction, lower --eval-gap or give --eval-dataset"
    return f"{args.eval_dataset or args.dataset}: no held-out pair to evaluate on; {remedy}"


def load_held_out_rows(held_out: list[dict], tokenizer, args: Args) -> list[dict]:
    """A row for each held-out response, with `prompt_ids` and `response_ids`; of pairs, chosen before
    rejected.

    Ends the run where `held_out`, the rows that were read, is empty, or where every prompt is too long.
    """
    if not held_out:
        fail(no_pair_message(args))
    eval_source = args.eval_source or args.source
    rows = two_responses(held_out) if eval_source == "preference" else held_out
    max_lengths = (args.max_prompt_length, args.max_response_length)
    eval_name = args.eval_dataset or f"{args.dataset}, held out"
    return tokenize(rows, tokenizer, ("response",), *max_lengths, eval_name, args.skip_bad_rows)


def judge_rows(rows: list[dict], judge: Callable, tokenizer) -> None:
    """Replaces the `reward` of each row by the judge's, in place; of a response that was cut, as it is now: its
    `response` is that text then, and `truncated` says so."""
    cut = were_cut(tokenizer, [row["response_ids"] for row in rows])
    texts = []
    for row, unfinished in zip(rows, cut, strict=True):
        shortened = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        texts.append(shortened if unfinished else row["response"])
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    rewards = judge(rows, sequences, texts).tolist()
    for row, text, unfinished, reward in zip(rows, texts, cut, rewards, strict=True):
        row["response"] = text
        row["truncated"] = unfinished
        row["reward"] = reward


def load_pairs(held_out: list[dict], args: Args) -> list[tuple[dict, dict]]:
    """At most MAX_PAIRS (better, worse) pairs of the held-out responses, drawn at random, in random order.

    Preference data are pairs already, whatever `--eval-gap` says. From scores, any two responses to one
    prompt make a pair whose rewards differ, by at least `--eval-gap`. Ends the run where there is no pair.
    """
    eval_source = args.eval_source or args.source
    if eval_source == "preference":
        pairs = whole_pairs(held_out)
    else:
        pairs = make_pairs(held_out, args.eval_gap)
    if not pairs:
        fail(no_pair_message(args))
    return sample_pairs(pairs, MAX_PAIRS)


def unit_of_model(name: str, args: Args) -> tuple[float, float] | None:
    """(mean, std) by which scores became the returns of `--model`, where that is a GVM from scores and this run
    is from scores too; else None.

    A GVM that goes on keeps its unit: its head stays what it is, and a value, and dvpo.py's --beta, mean after
    a refresh what they meant before it. Returns of +1 and -1 are no scores, whatever their mean and std.
    """
    config = load_pretrained("configuration", AutoConfig, name)
    mean = getattr(config, "return_mean", None)
    std = getattr(config, "return_std", None)
    if mean is None or std is None:  # no GVM
        return None
    of_signs = value_heads.learned_signs(config)
    signs_here = args.source == "preference" and not args.reward
    if of_signs or signs_here:
        if of_signs != signs_here:
            note(
                f"{name}: its values are in another unit than this run's returns, which it has to learn anew"
            )
        return None
    return mean, std


def standardised_scores(
    rows: list[dict], args: Args, unit: tuple[float, float] | None = None
) -> tuple[torch.Tensor, float, float]:
    """(standardised scores [N] in float64, mean, std) of the training responses.

    mean and std are those of `unit` where it is given, else of the scores. The returns +1 and -1 of preference
    pairs stay as they are: mean 0, std 1. Ends the run where all are equal.
    """
    scores = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    if args.source == "preference" and not args.reward:
        mean = 0.0
        std = 1.0
    elif unit is not None:
        mean, std = unit
    else:
        mean = scores.mean().item()
        std = scores.std().item()
    if scores.max() == scores.min():  # their deviation need not be 0: 0.1 has no exact mean
        fail(f"{args.dataset}: all rewards are {scores[0].item()}; there is nothing to learn")
    return (scores - mean) / std, mean, std


def policy_averages(rows: list[dict]) -> dict[str | None, float]:
    """The mean reward of each policy's training responses; None is the policy of rows that name none."""
    rewards = {}
    for row in rows:
        rewards.setdefault(row.get("policy"), []).append(row["reward"])
    return {policy: float(np.mean(of_policy)) for policy, of_policy in rewards.items()}


def write_scored(path: Path, rows: list[dict]) -> None:
    """Writes scored.jsonl: the training responses with the rewards that `--reward` gave, in the form that
    `--old-dataset`, rpo.py and dro.py read. A response that was cut says so, and is the text that was judged."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            line = {key: value for key, value in row.items() if key not in NOT_SCORED}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# --- what is written at the end


def baseline_accuracies(
    pairs: list[tuple[dict, dict]], averages: dict[str | None, float]
) -> dict[str, float]:
    """Share of the pairs that two rules order rightly: the longer response wins; the better policy's wins, where
    rows name policies."""
    shares = {"baseline_length": longer_wins(pairs)}
    if any(policy is not None for policy in averages):
        shares["baseline_policy"] = better_policy_wins(pairs, averages)
    return shares


def write_table(path: Path, shares: dict[str, float], pairs: int, averages: dict[str | None, float]) -> None:
    """Writes accuracy.json: `shares` (accuracies and baselines), the number of pairs, each policy's average
    reward; and prints the shares."""
    named = {policy: average for policy, average in averages.items() if policy is not None}
    table = {**shares, "pairs": pairs, "policy_averages": named}
    path.write_text(json.dumps(table, indent=1))
    said = ", ".join(f"{key} {value:.3f}" for key, value in shares.items())
    note(f"accuracy on held-out pairs: {said}")


def write_pictures(path: str, rows: list[dict], values: list[list[float]], tokenizer) -> None:
    """Colours the tokens of the first two pairs by their values: into files, and for the terminal.

    rows and values: chosen, rejected, chosen, ..., with one value per response token.
    """
    texts = []
    for i, row in enumerate(rows[:4]):  # two pairs
        side = "chosen" if i % 2 == 0 else "rejected"
        title = f"{side}: {json.dumps(row['prompt'], ensure_ascii=False)[:80]}"
        texts.append((title, valued_texts(tokenizer, row["response_ids"], values[i])))
    note(draw_values(texts, path))


def fold_normalisation(model, mean: float, std: float) -> None:
    """`--normalise-values`: changes the model's head, in place, so that it gives (value - mean) / std
    itself."""
    sharding.reshard(model)  # after a forward without gradient the root holds gathered copies
    head = value_heads.head(model)
    head.weight.data.div_(std)
    head.bias.data.sub_(mean).div_(std)


def main(args: Args) -> None:
    # Shapes: N training responses, M held-out ones, B in a micro-batch; L tokens of prompt and response,
    # T tokens of the response. Values are [B, T + 1]: V(s_1), then Q of each token.
    # --- setup
    run = Run(args)
    device = distributed.device()
    rank = distributed.rank()
    world = distributed.world()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name, args.template_arguments)
    pad = tokenizer.pad_token_id

    # --- data
    training, held_out = read_training_and_held_out(args)
    rows = load_training_rows(training, tokenizer, args)
    held_out_rows = load_held_out_rows(held_out, tokenizer, args)
    if args.reward:
        judge = Reward(args.reward, tokenizer, args, [*rows, *held_out_rows])
        judge_rows(rows, judge, tokenizer)
        if (args.eval_source or args.source) == "scores":  # pairs have their order already
            judge_rows(held_out_rows, judge, tokenizer)
        del judge
        gc.collect()  # sharded modules are in reference cycles
        if rank == 0:
            write_scored(Path(args.run_dir, "scored.jsonl"), rows)
    averages = policy_averages(rows)
    if args.old_dataset:
        rows += load_old_rows(len(rows), tokenizer, args)
    pairs = load_pairs(held_out_rows, args)
    unit = unit_of_model(name, args)
    scores, score_mean, score_std = standardised_scores(rows, args, unit)  # [N]
    scores = scores.to(device, torch.float64 if args.precision == "fp64" else torch.float32)
    eval_rows = []  # chosen, rejected, chosen, rejected, ...
    for chosen, rejected in pairs:
        eval_rows.append(chosen)
        eval_rows.append(rejected)
    # Each response's context comes from the other responses of its policy among the same rows.
    rows = add_context(rows, args.context_pairs, rows, tokenizer, args.context_length, args.seed)
    eval_rows = add_context(
        eval_rows, args.context_pairs, eval_rows, tokenizer, args.context_length, args.seed
    )
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    eval_sequences = [(row["prompt_ids"], row["response_ids"]) for row in eval_rows]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    note(f"{len(rows)} responses to learn from, {len(pairs)} held-out pairs")

    # --- models
    longest = longest_of([*sequences, *eval_sequences])
    model = load_model("value", name, tokenizer, args, trained=True, layers=args.layers, longest=longest)
    optimizer = adamw(model, args.lr)
    trained = {"model": (model, optimizer)}
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start = state.get("step", 0)
    value_mean = state.get("value_mean", 0.0)  # of the last batch, with --normalise-values
    value_std = state.get("value_std", 1.0)
    run.start(start, steps, rows)

    def micro_batch_values(mb):
        """Values [B, T + 1] of a micro-batch."""
        return response_values(model, **mb)

    def predict_values(sequences):
        """Values [number of sequences, T + 1] of all sequences, on every rank; no gradient."""
        width = max(len(response) for _, response in sequences) + 1
        return run_micro_batches(
            micro_batch_values, sequences, args.micro_batch_size, pad, width, scores.dtype
        )

    def evaluate_values(step):
        """Appendix E's accuracy table on the held-out pairs, into the logs; returns it and the token
        values."""
        predicted = (predict_values(eval_sequences) - value_mean) / value_std  # [M, T + 1]
        values = []  # of each response, one per token
        for row, (_, response) in zip(predicted.cpu(), eval_sequences, strict=True):
            values.append(row[1 : len(response) + 1].tolist())
        chosen = values[::2]
        rejected = values[1::2]
        accuracy = pair_accuracy(chosen, rejected)
        gaps = [np.mean(c) - np.mean(r) for c, r in zip(chosen, rejected, strict=True)]
        metrics = {f"eval/accuracy_{key}": share for key, share in accuracy.items()}
        metrics["eval/gap"] = np.mean(gaps)
        run.metrics(step, metrics, show=("eval/accuracy_mean", "eval/accuracy_last"))
        return accuracy, values

    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        batch_sequences = [sequences[i] for i in batch]
        batch_lengths = [lengths[i] for i in batch]
        batch_scores = scores[batch]  # [batch_size]
        count = sum(len(sequences[i][1]) + 1 for i in batch)  # over all ranks and micro-batches
        loss = torch.zeros((), device=device)  # []
        if args.normalise_values:  # an ablation
            batch_mask = collate(batch_sequences, pad, device)["response_mask"]  # [batch_size, T]
            batch_values = predict_values(batch_sequences)  # [batch_size, T + 1]
            slopes, batch_loss, value_mean, value_std = normalised_slopes(
                batch_values, batch_scores, batch_mask, args.gamma, args.lam
            )
            # Every rank has the loss of the whole batch; the sum over ranks is to count it once.
            loss = batch_loss / count / world
        # Micro-batches hold positions in the batch, not rows.
        picks = micro_batches(range(len(batch)), batch_lengths, args.micro_batch_size, rank, world)
        for pick in accumulated(picks, model):
            mb = collate([batch_sequences[i] for i in pick], pad, device)  # input_ids [B, L]
            mb_mask = mb["response_mask"]  # [B, T]
            mb_values = response_values(model, **mb)  # [B, T + 1]
            if not pick:
                # A rank with nothing left still joins the collectives: its dummy sequence counts nothing.
                backward(mb_values.sum() * 0)
            elif args.normalise_values:
                mb_slopes = slopes[pick, : mb_values.shape[1]]  # [B, T + 1]
                backward((mb_values * mb_slopes).sum() / count)
            else:
                mb_loss = td_loss(mb_values, batch_scores[pick], mb_mask, args.gamma, args.lam)  # []
                backward(mb_loss / count)
                loss += mb_loss.detach() / count
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        total, norm = optimizer_step(model, optimizer, lr, loss, args.max_grad_norm, where)

        # --- log
        done = step + 1
        seconds = time.perf_counter() - clock
        tokens = sum(batch_lengths)
        metrics = {
            "value/loss": total,
            "value/grad_norm": norm,
            "value/lr": lr,
            "time/step_s": seconds,
            "perf/update_tokens_per_s": tokens / seconds,
            "memory/state_gb": state_bytes([model], [optimizer]) / 2**30,
            "memory/peak_gb": peak_memory_gb(),
            **mfu(model, tokens, seconds),
        }
        run.metrics(done, metrics, show=("value/loss",))
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate_values(done)

        # --- save
        if run.saves(done):
            extra = {"value_mean": value_mean, "value_std": value_std}
            save_checkpoint(args.run_dir, done, trained, extra, args.keep)
            run.stop_if_asked(done)
    accuracy, values = evaluate_values(steps)
    if rank == 0:
        shares = accuracy | baseline_accuracies(pairs, averages)
        write_table(Path(args.run_dir, "accuracy.json"), shares, len(pairs), averages)
        write_pictures(f"{args.run_dir}/values", eval_rows, values, tokenizer)
        run.picture("values", f"{args.run_dir}/values.png", steps)
    if args.normalise_values:
        fold_normalisation(model, value_mean, value_std)
    export(
        model,
        tokenizer,
        f"{args.run_dir}/model",
        args.precision,
        made_by=(args, __file__),
        gamma=args.gamma,
        return_mean=score_mean,
        return_std=score_std,
        context_pairs=args.context_pairs,
        context_length=args.context_length,
    )
    run.close(f"python dvpo.py --model YOUR_POLICY --gvm {args.run_dir}/model")


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
