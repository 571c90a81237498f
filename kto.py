"""KTO: Kahneman-Tversky Optimisation, offline, from (prompt, response, thumbs up or down). No pairs.

Paper: 2402.01306. With the implied reward h = log pi(y|x) - log pi_ref(y|x) and a reference point z, the human utility is

    v = lambda_D * sigmoid(beta * (h - z))  for a desirable response      (eq. 8)
    v = lambda_U * sigmoid(beta * (z - h))  for an undesirable one
    loss = mean over responses of (lambda_y - v)

z estimates KL(pi || pi_ref) without sampling: the mean of log pi(y'|x) - log pi_ref(y'|x) over *mismatched* pairs (a prompt with
the response to another), over the whole batch and all ranks, clamped at 0; no gradient passes through it. Each row keeps one
mismatched response for the whole run, so the reference's log-probabilities of those too are computed once.

    python kto.py                                                      # the embedded world, one CPU
    python kto.py --model runs/sft/model --dataset thumbs.jsonl        # prompt, response, label (true or false)
    python kto.py --model runs/sft/model --dataset scored.jsonl --threshold 0      # label = reward above 0
    torchrun --nproc_per_node=8 kto.py --model runs/sft/model --dataset thumbs.jsonl --desirable-weight 4 \
        --gradient-checkpointing

Watch `eval/label_auc` (does the log-ratio part good from bad?), `eval/kl`, and `kto/log_ratio_desirable`: where it falls far
below 0 with the other, the policy runs away from all of the data. Read samples.jsonl. docs/kto.md explains the rest.
"""

import json
import math
import random
import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from common import distributed
from common.batches import batch_indices, collate, micro_batches
from common.checkpoints import export, load_checkpoint, save_checkpoint
from common.cli import fail, note, parse
from common.data import hold_out, read_rows
from common.log import Run
from common.logprobs import sequence_logprobs
from common.measures import auc, distinct_2, implied_accuracy
from common.meter import mfu, peak_memory_gb, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.pretrained import resolve
from common.reference import load_reference, reference_logprobs
from common.rewards import Reward
from common.rollout import check_sampler, rollout
from common.tokenization import load_tokenizer, require_same_tokenizer, tokenize


@dataclass
class Args:
    model: str = "reviews"
    """Model to start from: a hub id or a local folder, usually the SFT policy. `reviews` is the embedded one."""
    ref_model: str = ""
    """Reference policy: a hub id or folder. By default it is `--model` as it starts."""
    dataset: str = "reviews"
    """Data to train on: a hub id, or a local .jsonl, .json or .parquet file (.gz too), with the columns that
    docs/data.md lists for this script. `reviews` is the embedded world."""
    split: str = "train"
    """Split of a hub data set; of a local file, the value that its column `split` must have."""
    threshold: float | None = None
    """For data with `reward` and no `label`: a response with more than this is desirable."""
    eval_dataset: str = ""
    """Held-out data. By default `--eval-fraction` of the prompts of `--dataset` are held out."""
    eval_split: str = "test"
    """Split of `--eval-dataset`."""
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
    run_dir: str = "runs/kto"
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
    max_prompt_length: int = 1024
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    beta: float = 0.1
    """Factor of the log-ratios inside the sigmoid (2402.01306, 2305.18290: 0.1)."""
    desirable_weight: float = 1.0
    """lambda_D; (lambda_D * desirable) / (lambda_U * undesirable) should be 1 to 3/2 (2402.01306, section
    4.2)."""
    undesirable_weight: float = 1.0
    """lambda_U, the weight of undesirable responses."""
    length_normalise: bool = False
    """Use the mean log-probability per token in place of the sum, everywhere. The papers' equations have sums;
    RPO's released code has means."""
    precompute_ref: bool = True
    """Free the reference once the data are scored: one model less in memory, but no `eval/kl`."""
    lr: float = 5e-6
    """Peak learning rate (2402.01306: 5e-6 with AdamW)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a cosine."""
    warmup_steps: int = 150
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    temperature: float = 1.0
    """Temperature of sampling; the online scripts take every log-probability at this temperature too."""
    eval_every: int = 100
    """Optimizer steps between evaluations. 0: evaluate only at the end."""
    eval_prompts: int = 16
    """Number of held-out prompts that evaluations sample responses to."""
    eval_reward: tuple[str, ...] = ()
    """Reward models (hub ids or folders) or `module:function`s to report in evaluations; never trained on."""
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
    eval_fraction=0.2,
    part="value",
    steps=400,
    batch_size=64,
    micro_batch_size=64,
    max_prompt_length=16,
    max_response_length=32,
    threshold=0.0,
    desirable_weight=2.1,
    lr=3e-4,
    warmup_steps=20,
    eval_every=100,
    eval_prompts=96,
    save_every=100,
    precompute_ref=False,
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def mismatched(prompts, seed):
    """For each row the index of another: a shuffled cycle, moved on where the two have the same prompt (2402.01306 section 4.1).

    The same for the whole run. A row that has the only prompt there is keeps itself.
    """
    order, other = list(range(len(prompts))), list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    if all(prompt == prompts[0] for prompt in prompts):
        return other
    cycle = order * 2  # from its end back: the next row, or the one that the next row of the same prompt has
    for i, j in zip(cycle[-2::-1], cycle[:0:-1], strict=True):
        other[i] = other[j] if prompts[j] == prompts[i] else j
    return other


def kto_loss(log_ratios, labels, reference_point, beta, desirable_weight, undesirable_weight):
    """Sum over responses of lambda_y - v (2402.01306 eq. 8); log_ratios [B], labels [B] bool, reference_point a number."""
    up = labels.to(log_ratios.dtype)
    sign, weight = 2 * up - 1, desirable_weight * up + undesirable_weight * (1 - up)
    return (weight * (1 - torch.sigmoid(sign * beta * (log_ratios - reference_point)))).sum()


def main(args: Args) -> None:
    # --- setup
    weights = args.desirable_weight, args.undesirable_weight
    if not (args.beta > 0 and min(weights) >= 0 and max(weights) > 0):
        given = f"--beta {args.beta}, --desirable-weight {args.desirable_weight}, --undesirable-weight {args.undesirable_weight}"
        fail(f"{given}: beta must be above 0, the weights not negative nor both 0")
    run = Run(args)
    device, rank, world = distributed.device(), distributed.rank(), distributed.world()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name)
    ref_name = resolve(args.ref_model or args.model)
    require_same_tokenizer(tokenizer, ref_name, "--ref-model")
    pad = tokenizer.pad_token_id

    # --- data
    def read(dataset, split, part):
        reader = dict(columns=args.columns, split_seed=args.split_seed, skip_bad_rows=args.skip_bad_rows)
        rows = read_rows(
            dataset, "labelled" if args.threshold is None else "scored", split=split, part=part, **reader
        )
        return [
            row | {"label": row["label"] if args.threshold is None else row["reward"] > args.threshold}
            for row in rows
        ]

    rows = read(args.dataset, args.split, args.part)
    if args.eval_dataset:
        held_out = read(args.eval_dataset, args.eval_split, "all")
    else:
        rows, held_out = hold_out(rows, args.eval_fraction, args.split_seed)
    if not rows or not held_out:
        counts = f"{len(rows)} rows to learn from, {len(held_out)} held out"
        fail(f"{args.dataset}: {counts}; change --eval-fraction or give --eval-dataset")
    rows, held_out = (
        tokenize(part, tokenizer, ("response",), args.max_prompt_length, args.max_response_length, dataset)
        for part, dataset in ((rows, args.dataset), (held_out, args.eval_dataset or args.dataset))
    )
    labels = torch.tensor([row["label"] for row in rows], device=device)
    good, bad = int(labels.sum()), int((~labels).sum())
    if not good or not bad:
        fail(
            f"{args.dataset}: {good} desirable and {bad} undesirable responses; KTO needs both (see --threshold)"
        )
    balance = args.desirable_weight * good / (args.undesirable_weight * bad or 1)
    if not 1 <= balance <= 1.5:
        note(
            f"weights: (lambda_D * {good}) / (lambda_U * {bad}) is {balance:.2f}; 2402.01306 advises 1 to 1.5"
        )
    eval_labels = torch.tensor([row["label"] for row in held_out], device=device)
    better = (
        "label" if args.threshold is None else "reward"
    )  # what orders the pairs of responses to one held-out prompt
    eval_rewards_given = torch.tensor([row[better] for row in held_out], dtype=torch.float64, device=device)
    order = {}
    eval_groups = torch.tensor(
        [order.setdefault(json.dumps(row["prompt"]), len(order)) for row in held_out], device=device
    )
    sequences, eval_sequences = (
        [(row["prompt_ids"], row["response_ids"]) for row in part] for part in (rows, held_out)
    )
    others = mismatched([row["prompt_ids"] for row in rows], args.seed)
    mismatches = [(p, rows[j]["response_ids"]) for (p, _), j in zip(sequences, others, strict=True)]
    eval_rows = list({str(row["prompt"]): row for row in held_out}.values())[: args.eval_prompts]
    lengths = [len(p) + len(r) for p, r in sequences]
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    note(
        f"{good} desirable and {bad} undesirable responses to learn from, {len(held_out)} held out, {steps} steps"
    )

    def scale(sequences):
        """What a summed log-probability is divided by, [N]."""
        ones = [len(r) if args.length_normalise else 1 for _, r in sequences]
        return torch.tensor(ones, dtype=torch.float64, device=device)

    # --- models
    eval_rewards = [Reward(name, tokenizer, args) for name in args.eval_reward]
    parts = dict(train=sequences, held_out=eval_sequences, mismatched=mismatches)
    sums = reference_logprobs(ref_name, tokenizer, args, **parts)
    ref_logprobs, eval_ref_logprobs, mismatched_ref_logprobs = (
        total / scale(part) for part, total in zip(parts.values(), sums, strict=True)
    )
    policy = load_model("policy", name, tokenizer, args, trained=True)
    optimizer = adamw(policy, args.lr)
    reference = None if args.precompute_ref else load_reference(policy, ref_name, tokenizer, args)
    models = [policy] + [reference] * (reference is not None)
    trained, optimizers = {"policy": (policy, optimizer)}, [optimizer]
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start = state.get("step", 0)
    check_sampler(
        policy,
        tokenizer,
        [row["prompt_ids"] for row in eval_rows],
        args.max_response_length,
        args.temperature,
    )
    run.start(start, steps)

    def score(model, sequences, temperature=1.0):
        return sequence_logprobs(model, sequences, args.micro_batch_size, pad, temperature)

    def evaluate(step):
        log_ratios = score(policy, eval_sequences) / scale(eval_sequences) - eval_ref_logprobs
        out = {"eval/pair_accuracy": implied_accuracy(log_ratios, eval_rewards_given, eval_groups)}
        out["eval/label_auc"] = auc(log_ratios, eval_labels)
        prompts = [row["prompt_ids"] for row in eval_rows]
        responses, _ = rollout(policy, tokenizer, prompts, args.max_response_length, args.temperature, (0, 0))
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        sampled = list(zip(prompts, responses, strict=True))
        scores = {r.label: r(eval_rows, sampled, texts) for r in eval_rewards}
        out |= {f"eval/{key}": value.mean() for key, value in scores.items()}
        out |= {
            "eval/length": sum(map(len, responses)) / max(1, len(responses)),
            "eval/distinct_2": distinct_2(texts),
        }
        if reference is not None:
            scores["kl"] = score(policy, sampled, args.temperature) - score(
                reference, sampled, args.temperature
            )
            out["eval/kl"] = scores["kl"].mean()
        run.metrics(step, out, show=tuple(out))
        run.samples(
            step,
            [
                {"prompt": row["prompt"], "response": text, "length": len(responses[i])}
                | {k: v[i].item() for k, v in scores.items()}
                for i, (row, text) in enumerate(zip(eval_rows[:8], texts, strict=False))
            ],
        )

    if start == 0 and args.eval_every:
        evaluate(0)
    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        pairs = [mismatches[i] for i in batch]
        drift = score(policy, pairs) / scale(pairs) - mismatched_ref_logprobs[batch]
        reference_point = drift.mean().clamp(min=0)  # over the batch on all ranks
        stats = torch.zeros(3, device=device, dtype=torch.float64)
        picks = micro_batches(batch, lengths, args.micro_batch_size, rank, world)
        for pick in accumulated(picks, policy):
            mb, at = (
                collate([sequences[i] for i in pick], pad, device),
                torch.tensor(pick or [0], device=device),
            )
            mb_log_ratios = (
                policy.response_logprobs(**mb)[0].sum(1) / scale([sequences[i] for i in at])
                - ref_logprobs[at]
            )
            mb_loss = kto_loss(mb_log_ratios, labels[at], reference_point, args.beta, *weights) * bool(pick)
            backward(mb_loss / len(batch))
            both = [(mb_log_ratios * (labels[at] == label)).sum() * bool(pick) for label in (True, False)]
            stats += torch.stack([mb_loss, *both]).detach()
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        total, norm = optimizer_step(policy, optimizer, lr, stats[0] / len(batch), args.max_grad_norm, where)

        # --- log
        done, seconds, tokens = step + 1, time.perf_counter() - clock, sum(lengths[i] for i in batch)
        (_, desirable, undesirable), count = distributed.all_reduce(stats).tolist(), int(labels[batch].sum())
        run.metrics(
            done,
            {
                "kto/loss": total,
                "kto/reference_point": reference_point,
                "kto/grad_norm": norm,
                "kto/lr": lr,
                "kto/log_ratio_desirable": desirable / count if count else math.nan,
                "kto/log_ratio_undesirable": undesirable / (len(batch) - count)
                if count < len(batch)
                else math.nan,
                "time/step_s": seconds,
                "perf/update_tokens_per_s": tokens / seconds,
                "memory/state_gb": state_bytes(models, optimizers) / 2**30,
                "memory/peak_gb": peak_memory_gb(),
                **mfu(policy, tokens, seconds),
            },
            show=("kto/loss", "kto/log_ratio_desirable", "kto/log_ratio_undesirable"),
        )
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate(done)

        # --- save
        if args.save_every and (done % args.save_every == 0 or done == steps):
            save_checkpoint(args.run_dir, done, trained, {}, args.keep)
    evaluate(steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision)
    run.close()


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
