"""KTO: Kahneman-Tversky Optimisation, offline, from (prompt, response, thumbs up or down). No pairs.

Paper: 2402.01306. With the implied reward h = log pi(y|x) - log pi_ref(y|x) and a reference point z, the
human utility is

    v = lambda_D * sigmoid(beta * (h - z))  for a desirable response      (eq. 8)
    v = lambda_U * sigmoid(beta * (z - h))  for an undesirable one
    loss = mean over responses of (lambda_y - v)

z estimates KL(pi || pi_ref) without sampling: the mean of log pi(y'|x) - log pi_ref(y'|x) over *mismatched*
pairs (a prompt with the response to another), over the whole batch and all ranks, clamped at 0; no gradient
passes through it. Each row keeps one mismatched response for the whole run, so the reference's
log-probabilities of those too are computed once.

    python kto.py                                                      # the embedded world, one CPU
    python kto.py --model runs/sft/model --dataset thumbs.jsonl        # prompt, response, label (a bool)
    python kto.py --model runs/sft/model --dataset scored.jsonl --threshold 0      # label = reward above 0
    torchrun --nproc_per_node=8 kto.py --model runs/sft/model --dataset thumbs.jsonl --desirable-weight 4 \
        --gradient-checkpointing

Watch `eval/label_auc` (does the log-ratio part good from bad?), `eval/kl`, and `kto/log_ratio_desirable`:
where it falls far below 0 with the other, the policy runs away from all of the data. Read samples.jsonl.
docs/kto.md explains the rest.
"""

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
from common.data import hold_out, prompt_key, read_rows
from common.log import Run
from common.logprobs import sequence_logprobs
from common.measures import auc, distinct_2, implied_accuracy
from common.meter import mfu, peak_memory_gb, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.positions import longest_of
from common.pretrained import resolve
from common.reference import load_reference, reference_logprobs
from common.rewards import Reward
from common.rollout import check_sampler, rollout
from common.tokenization import load_tokenizer, require_same_tokenizer, tokenize


@dataclass
class Args:
    model: str = "reviews"
    """Model to start from: a hub id or a local folder, usually the SFT policy. `reviews` is the embedded
    one."""
    ref_model: str = ""
    """Reference policy: a hub id or folder. By default it is `--model` as it starts."""
    dataset: str = "reviews"
    """Data to train on: a hub id (`id:configuration` where it has several), a folder, or local .jsonl, .json or
    .parquet files (.gz too; several with commas between), with the columns
    that docs/data.md lists for this script. `reviews` is the embedded world."""
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
    """Responses (in preference data: pairs) per forward pass on one rank. It changes memory and speed, not
    the result."""
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
    """Use the mean log-probability per token in place of the sum, everywhere. The papers' equations have
    sums; RPO's released code has means."""
    precompute_ref: bool = True
    """Free the reference once the data are scored: one model less in memory, but no `eval/kl`."""
    lr: float = 5e-6
    """Peak learning rate (2402.01306: 5e-6 with AdamW)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a
    cosine."""
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


def mismatched(prompts: list, seed: int) -> list[int]:
    """For each row the index of another: a shuffled cycle, moved on where the two have the same prompt.

    Source: 2402.01306 section 4.1. The same for the whole run. Where there is only one prompt, each row keeps
    itself.
    """
    other = list(range(len(prompts)))
    if all(prompt == prompts[0] for prompt in prompts):
        return other
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    # Twice round the cycle, from its end back: a row gets the next row, or, where both have the same prompt,
    # what the next row got. The second time round, what the first could not know yet is known.
    cycle = order * 2
    for i, j in zip(cycle[-2::-1], cycle[:0:-1], strict=True):
        if prompts[j] == prompts[i]:
            other[i] = other[j]
        else:
            other[i] = j
    return other


def kto_loss(
    log_ratios: torch.Tensor,
    labels: torch.Tensor,
    reference_point: torch.Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """Sum over responses of lambda_y - v (2402.01306 eq. 8); log_ratios [B], labels [B] bool, reference_point
    a number."""
    up = labels.to(log_ratios.dtype)
    sign = 2 * up - 1
    weight = desirable_weight * up + undesirable_weight * (1 - up)
    return (weight * (1 - torch.sigmoid(sign * beta * (log_ratios - reference_point)))).sum()


def prompt_groups(rows: list[dict]) -> torch.Tensor:
    """The number of each row's prompt, [N]: prompts count from 0 in the order in which they first appear."""
    numbers = {}
    groups = []
    for row in rows:
        prompt = prompt_key(row["prompt"])
        if prompt not in numbers:
            numbers[prompt] = len(numbers)
        groups.append(numbers[prompt])
    return torch.tensor(groups)


def one_row_per_prompt(rows: list[dict]) -> list[dict]:
    """The last row of each prompt, in the order in which the prompts first appear."""
    last = {}
    for row in rows:
        last[prompt_key(row["prompt"])] = row
    return list(last.values())


def main(args: Args) -> None:
    # Shapes: N training responses, M held-out ones, B in a micro-batch; L tokens of prompt and response,
    # T tokens of the response.
    # --- setup
    if args.beta == 0:  # the loss would be a constant, whatever the policy
        fail(f"--beta is {args.beta}; it must be above 0")
    weights = (args.desirable_weight, args.undesirable_weight)
    if max(weights) == 0:
        fail("--desirable-weight and --undesirable-weight are both 0; there is nothing to learn")
    run = Run(args)
    device = distributed.device()
    rank = distributed.rank()
    world = distributed.world()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name, args.template_arguments)
    ref_name = resolve(args.ref_model or args.model)
    require_same_tokenizer(tokenizer, ref_name, "--ref-model")
    pad = tokenizer.pad_token_id

    # --- data
    def read_labelled(dataset, split, part):
        """Rows of prompt, response and label; with --threshold the label comes from their reward."""
        rows = read_rows(
            dataset,
            "labelled" if args.threshold is None else "scored",
            split=split,
            columns=args.columns,
            part=part,
            split_seed=args.split_seed,
            skip_bad_rows=args.skip_bad_rows,
        )
        if args.threshold is not None:
            for row in rows:
                row["label"] = row["reward"] > args.threshold
        return rows

    rows = read_labelled(args.dataset, args.split, args.part)
    if args.eval_dataset:
        held_out = read_labelled(args.eval_dataset, args.eval_split, "all")
    else:
        rows, held_out = hold_out(rows, args.eval_fraction, args.split_seed)
    if not rows or not held_out:
        counts = f"{len(rows)} rows to learn from, {len(held_out)} held out"
        fail(f"{args.dataset}: {counts}; change --eval-fraction or give --eval-dataset")
    eval_name = args.eval_dataset or f"{args.dataset}, held out"
    max_lengths = (args.max_prompt_length, args.max_response_length)
    rows = tokenize(rows, tokenizer, ("response",), *max_lengths, args.dataset, args.skip_bad_rows)
    held_out = tokenize(held_out, tokenizer, ("response",), *max_lengths, eval_name, args.skip_bad_rows)
    labels = torch.tensor([row["label"] for row in rows], device=device)  # [N]
    good = int(labels.sum())
    bad = int((~labels).sum())
    if not good or not bad:
        counts = f"{good} desirable and {bad} undesirable responses"
        fail(f"{args.dataset}: {counts}; KTO needs both (see --threshold)")
    undesirable = args.undesirable_weight * bad
    balance = args.desirable_weight * good / (undesirable or 1)  # a weight may be 0
    if not 1 <= balance <= 1.5:
        ratio = f"(lambda_D * {good}) / (lambda_U * {bad})"
        note(f"weights: {ratio} is {balance:.2f}; 2402.01306 advises 1 to 1.5")
    eval_labels = torch.tensor([row["label"] for row in held_out], device=device)  # [M]
    # What orders the pairs of responses to one held-out prompt.
    better = "label" if args.threshold is None else "reward"
    held_out_rewards = [row[better] for row in held_out]
    held_out_rewards = torch.tensor(held_out_rewards, dtype=torch.float64, device=device)  # [M]
    eval_groups = prompt_groups(held_out).to(device)  # [M]
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    eval_sequences = [(row["prompt_ids"], row["response_ids"]) for row in held_out]
    others = mismatched([row["prompt_ids"] for row in rows], args.seed)
    mismatches = [(rows[i]["prompt_ids"], rows[j]["response_ids"]) for i, j in enumerate(others)]
    eval_rows = one_row_per_prompt(held_out)[: args.eval_prompts]
    eval_prompts = [row["opening_ids"] for row in eval_rows]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    learned_from = f"{good} desirable and {bad} undesirable responses to learn from"
    note(f"{learned_from}, {len(held_out)} held out")

    def scale(sequences):
        """What a summed log-probability is divided by, [N]: the response's length in tokens, or 1."""
        if args.length_normalise:
            divisors = [len(response) for _, response in sequences]
        else:
            divisors = [1] * len(sequences)
        return torch.tensor(divisors, dtype=torch.float64, device=device)

    # --- models
    longest = longest_of([*sequences, *eval_sequences, *mismatches], eval_prompts, args.max_response_length)
    judges = [Reward(reward_name, tokenizer, args, eval_rows) for reward_name in args.eval_reward]
    ref_sums, eval_ref_sums, mismatched_ref_sums = reference_logprobs(
        ref_name, tokenizer, args, train=sequences, held_out=eval_sequences, mismatched=mismatches
    )
    ref_logprobs = ref_sums / scale(sequences)  # [N]
    eval_ref_logprobs = eval_ref_sums / scale(eval_sequences)  # [M]
    mismatched_ref_logprobs = mismatched_ref_sums / scale(mismatches)  # [N]
    policy = load_model("policy", name, tokenizer, args, trained=True, longest=longest)
    optimizer = adamw(policy, args.lr)
    reference = None if args.precompute_ref else load_reference(policy, ref_name, tokenizer, args, longest)
    trained = {"policy": (policy, optimizer)}
    models = [policy]
    optimizers = [optimizer]
    if reference is not None:
        models.append(reference)
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start = state.get("step", 0)
    check_sampler(policy, tokenizer, eval_prompts, args.max_response_length, args.temperature)
    run.start(start, steps, rows)

    def summed_logprobs_of(model, sequences, temperature=1.0):
        """log pi(y | x) [N], summed over the response's tokens, on every rank; no gradient."""
        return sequence_logprobs(model, sequences, args.micro_batch_size, pad, temperature)

    def judge_samples():
        """Samples a response to each evaluation prompt; returns (metrics, rows for samples.jsonl)."""
        # The seed is the same in every evaluation, so that what differs comes from the policy.
        responses, _ = rollout(
            policy, tokenizer, eval_prompts, args.max_response_length, args.temperature, (0, 0)
        )
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        sampled = list(zip(eval_prompts, responses, strict=True))
        judged = {}  # by name, a number for each response
        for judge in judges:
            judged[judge.label] = judge(eval_rows, sampled, texts)
        metrics = {f"eval/{label}": rewards.mean() for label, rewards in judged.items()}
        metrics["eval/length"] = sum(len(response) for response in responses) / max(1, len(responses))
        metrics["eval/distinct_2"] = distinct_2(texts)
        if reference is not None:
            policy_logprobs = summed_logprobs_of(policy, sampled, args.temperature)
            judged["kl"] = policy_logprobs - summed_logprobs_of(reference, sampled, args.temperature)
            metrics["eval/kl"] = judged["kl"].mean()
        samples = []
        for i, row in enumerate(eval_rows[:8]):
            sample = {"prompt": row["prompt"], "response": texts[i], "length": len(responses[i])}
            for label, numbers in judged.items():
                sample[label] = numbers[i].item()
            samples.append(sample)
        return metrics, samples

    def evaluate_labelled(step):
        """Held-out pair accuracy and label AUC, and what sampled responses show; into the logs."""
        eval_logprobs = summed_logprobs_of(policy, eval_sequences) / scale(eval_sequences)  # [M]
        log_ratios = eval_logprobs - eval_ref_logprobs  # [M]
        metrics = {
            "eval/pair_accuracy": implied_accuracy(log_ratios, held_out_rewards, eval_groups),
            "eval/label_auc": auc(log_ratios, eval_labels),
        }
        sampled_metrics, samples = judge_samples()
        metrics |= sampled_metrics
        run.metrics(step, metrics, show=tuple(metrics))
        run.samples(step, samples)

    if start == 0 and args.eval_every:
        evaluate_labelled(0)
    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        batch_mismatches = [mismatches[i] for i in batch]
        mismatched_logprobs = summed_logprobs_of(policy, batch_mismatches) / scale(batch_mismatches)
        drift = mismatched_logprobs - mismatched_ref_logprobs[batch]  # [batch_size], on every rank
        reference_point = drift.mean().clamp(min=0)  # [], the same on all ranks
        sums = {  # over this rank's responses
            "loss": torch.zeros((), device=device, dtype=torch.float64),
            "desirable": torch.zeros((), device=device, dtype=torch.float64),
            "undesirable": torch.zeros((), device=device, dtype=torch.float64),
        }
        picks = micro_batches(batch, lengths, args.micro_batch_size, rank, world)
        for pick in accumulated(picks, policy):
            mb_sequences = [sequences[i] for i in pick]
            mb = collate(mb_sequences, pad, device)  # input_ids [B, L], response_mask [B, T]
            mb_token_logprobs, _ = policy.response_logprobs(**mb)  # [B, T]
            if not pick:
                # A rank with nothing left still joins the collectives: its dummy sequence counts nothing.
                backward(mb_token_logprobs.sum() * 0)
                continue
            mb_logprobs = mb_token_logprobs.sum(1) / scale(mb_sequences)  # [B]
            mb_log_ratios = mb_logprobs - ref_logprobs[pick]  # [B]
            mb_labels = labels[pick]  # [B]
            mb_loss = kto_loss(mb_log_ratios, mb_labels, reference_point, args.beta, *weights)  # []
            backward(mb_loss / len(batch))
            sums["loss"] += mb_loss.detach()
            sums["desirable"] += (mb_log_ratios * mb_labels).sum().detach()
            sums["undesirable"] += (mb_log_ratios * ~mb_labels).sum().detach()
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        loss = sums["loss"] / len(batch)
        total, norm = optimizer_step(policy, optimizer, lr, loss, args.max_grad_norm, where)

        # --- log
        done = step + 1
        seconds = time.perf_counter() - clock
        tokens = sum(lengths[i] for i in batch)
        totals = distributed.all_reduce_dict(sums)
        desirable_count = int(labels[batch].sum())
        undesirable_count = len(batch) - desirable_count
        desirable_mean = totals["desirable"] / desirable_count if desirable_count else math.nan
        undesirable_mean = totals["undesirable"] / undesirable_count if undesirable_count else math.nan
        metrics = {
            "kto/loss": total,
            "kto/reference_point": reference_point,
            "kto/grad_norm": norm,
            "kto/lr": lr,
            "kto/log_ratio_desirable": desirable_mean,
            "kto/log_ratio_undesirable": undesirable_mean,
            "time/step_s": seconds,
            "perf/update_tokens_per_s": tokens / seconds,
            "memory/state_gb": state_bytes(models, optimizers) / 2**30,
            "memory/peak_gb": peak_memory_gb(),
            **mfu(policy, tokens, seconds),
        }
        run.metrics(done, metrics, show=("kto/loss", "kto/log_ratio_desirable", "kto/log_ratio_undesirable"))
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate_labelled(done)

        # --- save
        if run.saves(done):
            save_checkpoint(args.run_dir, done, trained, {}, args.keep)
            run.stop_if_asked(done)
    evaluate_labelled(steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision, made_by=(args, __file__))
    run.close(f"python evaluate.py responses --models {args.run_dir}/model --dataset YOUR_PROMPTS")


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
