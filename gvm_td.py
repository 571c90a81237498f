"""GVM-TD: pretrains a token-level Global Value Model by temporal differences, offline. dvpo.py then uses it, frozen.

Paper: 2502.16944 (DVPO), equation 1 and appendix E; v1 for `--normalise-values` (equation 2) and `--context-pairs` (section 3.2).
The model's output at the last prompt token is V(s_1), at response token y_t it is Q(s_t, a_t). The response's score S
arrives with the last token, intermediate rewards are 0. Targets, without gradient:

    G_T = S,   G_t = gamma * ((1 - lam) * Q_{t+1} + lam * G_{t+1}) for t < T,   and (1 - lam) * Q_1 + lam * G_1 for V(s_1)
    loss = mean over response tokens and the last prompt token of (Q_t - G_t)^2

lam 0 is the paper's equation 1, lam 1 is Monte Carlo. S is +1 / -1 for chosen / rejected (`--source preference`), a given
score standardised over the training set (`--source scores`), or a reward model's (`--reward`, standardised too).

    python gvm_td.py                                                   # the embedded world, one CPU
    python gvm_td.py --model runs/sft/model --dataset pairs.jsonl --source preference
    torchrun --nproc_per_node=8 gvm_td.py --model meta-llama/Llama-3.2-3B-Instruct --dataset openbmb/UltraFeedback \
        --source scores --part value --micro-batch-size 4 --gradient-checkpointing

Watch `eval/accuracy_mean` and `eval/accuracy_last` against the length and policy baselines printed beside them: a value
model that does not beat "the longer one wins" has learned length. docs/gvm_td.md explains the rest.
"""

import gc
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common import distributed, sharding, value_heads
from common.batches import batch_indices, collate, micro_batches, run_micro_batches
from common.checkpoints import export, load_checkpoint, save_checkpoint
from common.cli import fail, note, parse
from common.context import add_context
from common.data import hold_out, read_rows
from common.log import Run
from common.measures import make_pairs, pair_accuracy
from common.meter import mfu, peak_memory_gb, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.pictures import draw_values, token_texts
from common.pretrained import resolve
from common.rewards import Reward
from common.tokenization import load_tokenizer, tokenize
from common.value_heads import response_values


@dataclass
class Args:
    model: str = "reviews"
    """Model to start from: a hub id or a local folder, usually the SFT policy. `reviews` is the embedded one."""
    dataset: str = "reviews"
    """Data to train on: a hub id, or a local .jsonl, .json or .parquet file (.gz too), with the columns that
    docs/data.md lists for this script. `reviews` is the embedded world."""
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
    """What the held-out data holds; by default the same as `--source`. From scores, all pairs of a prompt at
    least `--eval-gap` apart are made."""
    eval_gap: float = 0.0
    """Smallest difference of scores that makes a held-out pair."""
    eval_fraction: float = 0.05
    """Share of the prompts that is held out where no `--eval-dataset` is given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names and yours, in pairs: `--columns prompt question response answer`."""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """Share of the prompts to use: sft is 30 %, value 50 %, rl 20 %, disjoint by prompt (2502.16944)."""
    split_seed: int = 0
    """Seed of the split into parts and held-out prompts. It must be the same in all scripts of an experiment."""
    skip_bad_rows: bool = False
    """Drop and count unusable rows instead of stopping at the first."""
    max_characters: int = 0
    """Drop and count rows with a response longer than this many characters. 0: no limit."""
    layers: int = 0
    """Keep only the first N layers of the backbone. 0: all."""
    context_pairs: int = 0
    """Question-answer pairs by the same policy that are put before each prompt (2502.16944 v1, section 3.2)."""
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
    """Responses (in preference data: pairs) per forward pass on one rank. It changes memory and speed, not the
    result."""
    max_prompt_length: int = 512
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 512
    """Longest response, in tokens; a longer one is cut there."""
    lr: float = 2e-6
    """Peak learning rate (2502.16944: 2e-6)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a cosine."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    gamma: float = 1.0
    """Discount. A GVM and the script that uses it must have the same."""
    lam: float = 0.95
    """Lambda of the returns (gvm_td.py) or of GAE: 0 is one step (2502.16944, equation 1), 1 is Monte Carlo;
    the authors' released trainer uses 0.95."""
    normalise_values: bool = False
    """Batch-normalise the predictions before the loss (2502.16944 v1, equation 2); this is folded into the
    exported head."""
    eval_every: int = 100
    """Optimizer steps between evaluations. 0: evaluate only at the end."""
    save_every: int = 200
    """Steps between checkpoints for `--resume`. 0: none."""
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


def td_targets(values, scores, mask, gamma, lam):
    """lambda-return targets [B, T + 1] of V(s_1), Q_1 .. Q_T (2502.16944 equation 1 at lam 0).

    values [B, T + 1] as the model gives them, without gradient; scores [B] arrive with the last token of mask [B, T].
    Masked positions get 0. There is no discount from V(s_1) to Q_1: no action is taken in between.
    """
    targets = torch.zeros_like(values)
    following = mask.shape[1] - 1
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    for t in reversed(range(mask.shape[1])):
        if t < following:
            bootstrap = gamma * ((1 - lam) * values[:, t + 2] + lam * targets[:, t + 2])
        else:
            bootstrap = torch.zeros_like(scores)
        targets[:, t + 1] = torch.where(last[:, t], scores, torch.where(mask[:, t], bootstrap, 0.0))
    targets[:, 0] = torch.where(mask[:, 0], (1 - lam) * values[:, 1] + lam * targets[:, 1], 0.0)
    return targets


def td_loss(values, scores, mask, gamma, lam):
    """Sum of squared TD errors over response tokens and the last prompt token; values [B, T + 1], scores [B], mask [B, T]."""
    targets = td_targets(values.detach(), scores, mask, gamma, lam)
    return ((values - targets) ** 2 * torch.cat([mask[:, :1], mask], 1)).sum()


def normalise(values, mask, eps=1e-5):
    """(values [B, T + 1] with mean 0 and variance 1 over the valid entries, mean, std), as batch normalisation does
    (2502.16944 v1, equation 2); the gradient flows through mean and std."""
    valid = torch.cat([mask[:, :1], mask], 1)
    mean = values[valid].mean()
    std = (((values - mean)[valid] ** 2).mean() + eps).sqrt()
    return torch.where(valid, (values - mean) / std, 0.0), mean.detach(), std.detach()


def main(args: Args) -> None:
    # --- setup
    run = Run(args)
    device, rank, world = distributed.device(), distributed.rank(), distributed.world()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name)
    pad = tokenizer.pad_token_id

    # --- data
    def read(dataset, split, source, part):
        kind = {"preference": "preference", "scores": "responses" if args.reward else "scored"}[source]
        reader = dict(columns=args.columns, split_seed=args.split_seed, skip_bad_rows=args.skip_bad_rows)
        rows = read_rows(dataset, kind, split=split, part=part, **reader)
        if args.max_characters:
            texts = ("chosen", "rejected") if source == "preference" else ("response",)
            kept = [row for row in rows if all(len(row[text]) <= args.max_characters for text in texts)]
            dropped = f"{len(rows) - len(kept)} of {len(rows)} rows: response over --max-characters {args.max_characters}"
            note(f"{dataset}: dropped {dropped}")
            rows = kept or fail(
                f"{dataset}: no usable row: every response is over --max-characters {args.max_characters}"
            )
        return rows

    def with_tokens(rows, dataset):
        return tokenize(
            rows, tokenizer, ("response",), args.max_prompt_length, args.max_response_length, dataset
        )

    eval_source = args.eval_source or args.source
    rows = read(args.dataset, args.split, args.source, args.part)
    if args.eval_dataset:
        held_out = read(args.eval_dataset, args.eval_split, eval_source, "all")
    else:
        rows, held_out = hold_out(rows, args.eval_fraction, args.split_seed)
        if eval_source != args.source:
            held_out = hold_out(
                read(args.dataset, args.split, eval_source, args.part), args.eval_fraction, args.split_seed
            )[1]
    if args.source == "preference":
        signs = (("chosen", 1.0), ("rejected", -1.0))
        rows = [
            {**row, "response": row[s], "reward": v, "policy": row.get(f"{s}_policy")}
            for row in rows
            for s, v in signs
        ]
    rows = with_tokens(
        rows or fail(f"{args.dataset}: every prompt is held out; lower --eval-fraction"), args.dataset
    )
    eval_name = args.eval_dataset or args.dataset
    no_pairs = f"{eval_name}: no held-out pair to evaluate on; raise --eval-fraction, lower --eval-gap or give --eval-dataset"
    if not held_out:
        fail(no_pairs)
    if eval_source == "preference":
        held_out = [
            {**row, "response": row[s], "policy": row.get(f"{s}_policy"), "pair": i, "reward": sign}
            for i, row in enumerate(held_out)
            for s, sign in (("chosen", 1e9), ("rejected", -1e9))
        ]
    held_out = with_tokens(held_out, eval_name)
    if args.reward:
        judge = Reward(args.reward, tokenizer, args)
        for part in (rows, held_out) if eval_source == "scores" else (rows,):
            found = judge(
                part,
                [(row["prompt_ids"], row["response_ids"]) for row in part],
                [row["response"] for row in part],
            )
            for row, score in zip(part, found.tolist(), strict=True):
                row["reward"] = score
        del judge
        gc.collect()  # sharded modules are in reference cycles
    pairs = make_pairs(held_out, args.eval_gap)
    eval_rows = [
        row for pair in random.Random(0).sample(pairs, min(len(pairs), 2000)) for row in pair
    ] or fail(no_pairs)
    pairs = list(zip(eval_rows[::2], eval_rows[1::2], strict=True))
    scores = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    given = args.source == "preference" and not args.reward  # +1 / -1 are returns as they are
    score_mean, score_std = (0.0, 1.0) if given else (scores.mean().item(), scores.std().item())
    if not score_std > 0:
        fail(f"{args.dataset}: all rewards are {scores[0].item()}; there is nothing to learn")
    scores = ((scores - score_mean) / score_std).to(
        device, torch.float64 if args.precision == "fp64" else torch.float32
    )
    averages = {row.get("policy"): [] for row in rows}
    for row in rows:
        averages[row.get("policy")].append(row["reward"])
    averages = {policy: float(np.mean(values)) for policy, values in averages.items()}
    pool, k = rows, args.context_pairs
    rows = add_context(rows, k, pool, tokenizer, args.context_length, args.seed)
    eval_rows = add_context(eval_rows, k, eval_rows, tokenizer, args.context_length, args.seed)
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    eval_sequences = [(row["prompt_ids"], row["response_ids"]) for row in eval_rows]
    lengths = [len(p) + len(r) for p, r in sequences]
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    note(f"{len(rows)} responses to learn from, {len(pairs)} held-out pairs, {steps} steps")

    # --- models
    model = load_model("value", name, tokenizer, args, trained=True, layers=args.layers)
    optimizer = adamw(model, args.lr)
    state = load_checkpoint(args.run_dir, {"model": (model, optimizer)}) if args.resume else {}
    start = state.get("step", 0)
    value_mean, value_std = state.get("value_mean", 0.0), state.get("value_std", 1.0)
    run.start(start, steps)

    def predict(sequences):
        """Values [N, T + 1] of all sequences, on every rank."""
        width, forward = max(len(r) for _, r in sequences) + 1, lambda mb: response_values(model, **mb)
        return run_micro_batches(forward, sequences, args.micro_batch_size, pad, width, scores.dtype)

    def evaluate(step):
        """The accuracy table of appendix E on the held-out pairs; returns it with the token values."""
        values = (predict(eval_sequences) - value_mean) / value_std
        values = [v[1 : len(r) + 1].tolist() for v, (_, r) in zip(values.cpu(), eval_sequences, strict=True)]
        accuracy = pair_accuracy(values[::2], values[1::2])
        gap = np.mean([np.mean(c) - np.mean(r) for c, r in zip(values[::2], values[1::2], strict=True)])
        metrics = {f"eval/accuracy_{key}": value for key, value in accuracy.items()} | {"eval/gap": gap}
        run.metrics(step, metrics, show=("eval/accuracy_mean", "eval/accuracy_last"))
        return accuracy, values

    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        count = sum(len(sequences[i][1]) + 1 for i in batch)  # over all ranks and micro-batches
        loss, where = (
            torch.zeros((), device=device),
            f"step {step}, data rows {[rows[i]['row'] for i in batch]}",
        )
        if (
            args.normalise_values
        ):  # statistics of the whole batch first, then dloss/dvalue, then each micro-batch backward
            whole = collate([sequences[i] for i in batch], pad, device)["response_mask"]
            values = predict([sequences[i] for i in batch]).requires_grad_()
            normal, mean, std = normalise(values, whole)
            value_mean, value_std = mean.item(), std.item()
            (slope,) = torch.autograd.grad(
                td_loss(normal, scores[batch], whole, args.gamma, args.lam), values
            )
            normal_loss = td_loss(normal.detach(), scores[batch], whole, args.gamma, args.lam) / count / world
        picks = micro_batches(
            range(len(batch)), [lengths[i] for i in batch], args.micro_batch_size, rank, world
        )
        for pick in accumulated(picks, model):
            mb = collate([sequences[batch[i]] for i in pick], pad, device)
            values, mask = response_values(model, **mb), mb["response_mask"]
            if args.normalise_values:
                mb_loss = (values * slope[pick or [0], : values.shape[1]]).sum()
            else:
                mb_loss = td_loss(values, scores[[batch[i] for i in pick or [0]]], mask, args.gamma, args.lam)
            backward(mb_loss / count)
            loss += mb_loss.detach() / count
        if args.normalise_values:
            loss = normal_loss
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        total, norm = optimizer_step(model, optimizer, lr, loss, args.max_grad_norm, where)

        # --- log
        done, seconds, tokens = step + 1, time.perf_counter() - clock, sum(lengths[i] for i in batch)
        run.metrics(
            done,
            {
                "value/loss": total,
                "value/grad_norm": norm,
                "value/lr": lr,
                "time/step_s": seconds,
                "perf/update_tokens_per_s": tokens / seconds,
                "memory/state_gb": state_bytes([model], [optimizer]) / 2**30,
                "memory/peak_gb": peak_memory_gb(),
                **mfu(model, tokens, seconds),
            },
            show=("value/loss",),
        )
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate(done)

        # --- save
        if args.save_every and (done % args.save_every == 0 or done == steps):
            extra = {"value_mean": value_mean, "value_std": value_std}
            save_checkpoint(args.run_dir, done, {"model": (model, optimizer)}, extra, args.keep)
    accuracy, values = evaluate(steps)
    baselines = {
        "length": np.mean([len(c["response"]) > len(r["response"]) for c, r in pairs]),
        "policy": np.mean(
            [averages.get(c.get("policy"), 0) > averages.get(r.get("policy"), 0) for c, r in pairs]
        ),
    }
    if rank == 0:
        table = {
            **accuracy,
            **{f"baseline_{key}": float(value) for key, value in baselines.items()},
            "pairs": len(pairs),
        }
        policies = {policy: value for policy, value in averages.items() if policy is not None}
        Path(args.run_dir, "accuracy.json").write_text(
            json.dumps({**table, "policy_averages": policies}, indent=1)
        )
        note(
            "accuracy on held-out pairs: "
            + ", ".join(f"{key} {value:.3f}" for key, value in table.items() if key != "pairs")
        )
        shown = []
        for i, row in enumerate(eval_rows[:4]):  # two pairs
            title = f"{('chosen', 'rejected')[i % 2]}: {json.dumps(row['prompt'], ensure_ascii=False)[:80]}"
            shown.append((title, token_texts(tokenizer, eval_sequences[i][1]), values[i]))
        note(draw_values(shown, f"{args.run_dir}/values"))
    if args.normalise_values:  # the exported head gives the normalised value
        sharding.reshard(model)  # after a forward without gradient the root holds gathered copies
        head = value_heads.head(model)
        head.weight.data.div_(value_std)
        head.bias.data.sub_(value_mean).div_(value_std)
    export(
        model,
        tokenizer,
        f"{args.run_dir}/model",
        args.precision,
        gamma=args.gamma,
        return_mean=score_mean,
        return_std=score_std,
        context_pairs=k,
        context_length=args.context_length,
    )
    run.close()


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
