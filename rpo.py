"""RPO: Reward Partitioning Optimization, offline, from (prompt, response, scalar reward), without pairs and
without a value model.

Paper: 2506.13702 (not Robust Policy Optimization, nor Reward-aware Preference Optimization). All
KL-regularised objectives share the optimum pi*(y|x) = pi_ref(y|x) exp(r(x, y) / tau) / Z(x). Its log-ratio is
known up to Z = E[exp(r / tau)] under pi_ref, and Z is estimated from the responses at hand: over all training
responses y_1 .. y_n to x, once, in log space,

    V(x) = tau * logsumexp_j(log pi_ref(y_j|x) + r_j / tau)
    loss = 0.5 * (log pi(y|x) - log pi_ref(y|x) - (r - V(x)) / tau)^2,  mean over responses

So the targets of one prompt are those of a distribution over its responses:
sum_j exp(log pi_ref(y_j|x) + (r_j - V) / tau) = 1. A prompt with a single response has the target log pi = 0
whatever its reward: such prompts are dropped and counted. That V is Z only if the responses are all there are.
`--partition sample` takes the mean over responses drawn from pi_ref, `--partition self-normalised` the sum
divided by that of pi_ref.

    python rpo.py                                                      # the embedded world, one CPU
    python rpo.py --model runs/sft/model --dataset scored.jsonl --lr 1e-5
    torchrun --nproc_per_node=8 rpo.py --model runs/sft/model --dataset openbmb/UltraFeedback --part value \
        --lr 5e-7 --gradient-checkpointing

Watch `eval/pair_accuracy` (does the policy's own log-ratio order held-out answers?) and `eval/kl`; read
samples.jsonl. Where `rpo/target` is far from 0 on average, it asks the impossible of a policy: tens of nats
for long answers. docs/rpo.md explains the rest, and which estimate of V to use when.
"""

import random
import time
from collections import Counter
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
from common.measures import distinct_2, implied_accuracy
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
    run_dir: str = "runs/rpo"
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
    tau: float = 1.0
    """Temperature of the optimum, in standard deviations of the reward (2405.19107, 2506.13702: 1)."""
    partition: Literal["reference", "sample", "self-normalised", "none"] = "reference"
    """Estimate of V(x) = tau log Z(x) that is subtracted from the reward. reference: the paper's sum weighted
    with pi_ref; sample: the mean, for responses drawn from pi_ref; self-normalised: the sum divided by that of
    the weights; none: 0, the paper's ablation."""
    length_normalise: bool = False
    """Use the mean log-probability per token in place of the sum, everywhere. The papers' equations have
    sums; RPO's released code has means."""
    keep_responses: float = 1.0
    """Share of the responses of each prompt that is kept, at random (an ablation)."""
    reward_noise: float = 0.0
    """Standard deviation of Gaussian noise on the standardised rewards of the training responses (an
    ablation)."""
    precompute_ref: bool = True
    """Free the reference once the data are scored: one model less in memory, but no `eval/kl`."""
    lr: float = 1e-4
    """Peak learning rate (2405.19107, 2506.13702: 1e-4 for T5 of 0.1 to 3 B parameters; docs/rpo.md on
    decoders of 7 B)."""
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
    tau=0.3,
    lr=1e-3,
    warmup_steps=20,
    eval_every=100,
    eval_prompts=96,
    save_every=100,
    precompute_ref=False,
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def log_sum_by_group(terms: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """log sum exp of the terms of each prompt, [number of prompts]; terms and groups [N]."""
    prompts = int(groups.max()) + 1
    top = torch.full((prompts,), -torch.inf, dtype=terms.dtype, device=terms.device)
    # The largest term of each prompt is taken out before exp, which would underflow.
    top = top.scatter_reduce(0, groups, terms, "amax")
    total = torch.zeros_like(top).scatter_add(0, groups, (terms - top[groups]).exp())
    return top + total.log()


def partition_values(
    ref_logprobs: torch.Tensor,
    rewards: torch.Tensor,
    groups: torch.Tensor,
    tau: float,
    partition: str = "reference",
) -> torch.Tensor:
    """V(x) [N] of each response's prompt, an estimate of tau log Z(x) from the prompt's responses.

    Source: 2506.13702 for `reference`, the sum of pi_ref(y_j) exp(r_j / tau), and for `none`. ref_logprobs and
    rewards [N], groups [N] integers, one for each prompt. In float64 and log space: exp of a summed
    log-probability is 0 in float32 below -104.
    """
    ref_logprobs = ref_logprobs.double()
    tilts = rewards.double() / tau  # [N]
    if partition == "none":
        return torch.zeros_like(tilts)
    if partition == "reference":
        log_z = log_sum_by_group(ref_logprobs + tilts, groups)
    elif partition == "sample":
        # Responses drawn from pi_ref come as often as pi_ref has them: a weight would count it twice.
        count = log_sum_by_group(torch.zeros_like(tilts), groups)
        log_z = log_sum_by_group(tilts, groups) - count
    else:
        weight = log_sum_by_group(ref_logprobs, groups)
        log_z = log_sum_by_group(ref_logprobs + tilts, groups) - weight
    return (tau * log_z)[groups]


def rpo_loss(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over responses of half the squared distance of log-ratio and target (2506.13702); all [B]."""
    return 0.5 * ((logprobs - ref_logprobs - targets) ** 2).sum()


def thin(rows: list[dict], share: float, seed: int) -> list[dict]:
    """`share` of the responses of each prompt, at random, at least one; in the order they had."""
    groups = {}  # the positions of each prompt's rows
    for i, row in enumerate(rows):
        groups.setdefault(prompt_key(row["prompt"]), []).append(i)
    rng = random.Random(seed)
    kept = set()
    for group in groups.values():
        count = max(1, round(share * len(group)))
        kept.update(rng.sample(group, count))
    return [row for i, row in enumerate(rows) if i in kept]


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
    def read_scored(dataset, split, part):
        """Rows of prompt, response and reward."""
        return read_rows(
            dataset,
            "scored",
            split=split,
            columns=args.columns,
            part=part,
            split_seed=args.split_seed,
            skip_bad_rows=args.skip_bad_rows,
        )

    rows = read_scored(args.dataset, args.split, args.part)
    if args.eval_dataset:
        held_out = read_scored(args.eval_dataset, args.eval_split, "all")
    else:
        rows, held_out = hold_out(rows, args.eval_fraction, args.split_seed)
    if not rows or not held_out:
        counts = f"{len(rows)} rows to learn from, {len(held_out)} held out"
        fail(f"{args.dataset}: {counts}; change --eval-fraction or give --eval-dataset")
    eval_name = args.eval_dataset or f"{args.dataset}, held out"
    max_lengths = (args.max_prompt_length, args.max_response_length)
    rows = tokenize(rows, tokenizer, ("response",), *max_lengths, args.dataset, args.skip_bad_rows)
    held_out = tokenize(held_out, tokenizer, ("response",), *max_lengths, eval_name, args.skip_bad_rows)
    rows = thin(rows, args.keep_responses, args.seed)
    count = Counter(prompt_key(row["prompt"]) for row in rows)
    single = sum(n == 1 for n in count.values())
    if single and args.partition != "none":
        # V would hold nothing but the response's own reward, which then cancels: the target is log pi = 0
        # with `reference` and a log-ratio of 0 with the others, whatever the reward.
        note(f"{args.dataset}: dropped {single} of {len(count)} prompts with a single response")
        rows = [row for row in rows if count[prompt_key(row["prompt"])] > 1]
        if not rows:
            why = "every prompt has a single response; RPO needs several, --partition none does not"
            fail(f"{args.dataset}: {why}")
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)  # [N]
    mean = rewards.mean()
    std = rewards.std()
    if rewards.max() == rewards.min():  # their deviation need not be 0: 0.1 has no exact mean
        fail(f"{args.dataset}: all rewards are {rewards[0].item()}; there is nothing to learn")
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(len(rows), generator=generator, dtype=torch.float64)  # [N]
    rewards = ((rewards - mean) / std + args.reward_noise * noise).to(device)
    held_out_rewards = [row["reward"] for row in held_out]
    held_out_rewards = torch.tensor(held_out_rewards, dtype=torch.float64, device=device)  # [M]
    groups = prompt_groups(rows).to(device)  # [N]
    eval_groups = prompt_groups(held_out).to(device)  # [M]
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    eval_sequences = [(row["prompt_ids"], row["response_ids"]) for row in held_out]
    eval_rows = one_row_per_prompt(held_out)[: args.eval_prompts]
    eval_prompts = [row["opening_ids"] for row in eval_rows]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    learned_from = f"{len(rows)} responses to {int(groups.max()) + 1} prompts to learn from"
    note(f"{learned_from}, {len(held_out)} held out")

    def scale(sequences):
        """What a summed log-probability is divided by, [N]: the response's length in tokens, or 1."""
        if args.length_normalise:
            divisors = [len(response) for _, response in sequences]
        else:
            divisors = [1] * len(sequences)
        return torch.tensor(divisors, dtype=torch.float64, device=device)

    # --- models
    longest = longest_of([*sequences, *eval_sequences], eval_prompts, args.max_response_length)
    judges = [Reward(reward_name, tokenizer, args, eval_rows) for reward_name in args.eval_reward]
    ref_sums, eval_ref_sums = reference_logprobs(
        ref_name, tokenizer, args, train=sequences, held_out=eval_sequences
    )
    ref_logprobs = ref_sums / scale(sequences)  # [N]
    eval_ref_logprobs = eval_ref_sums / scale(eval_sequences)  # [M]
    policy = load_model("policy", name, tokenizer, args, trained=True, longest=longest)
    optimizer = adamw(policy, args.lr)
    reference = None if args.precompute_ref else load_reference(policy, ref_name, tokenizer, args, longest)
    trained = {"policy": (policy, optimizer)}
    models = [policy]
    optimizers = [optimizer]
    if reference is not None:
        models.append(reference)
    values = partition_values(ref_logprobs, rewards, groups, args.tau, args.partition)  # [N]
    targets = (rewards - values) / args.tau  # [N]
    unit = "nats per token" if args.length_normalise else "nats"
    spread = targets.std().item()
    note(f"targets of the log-ratio: {targets.mean().item():+.3g} {unit} on average, spread {spread:.3g}")
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

    def evaluate_scored(step):
        """Held-out pair accuracy of the log-ratios, and what sampled responses show; into the logs."""
        eval_logprobs = summed_logprobs_of(policy, eval_sequences) / scale(eval_sequences)  # [M]
        log_ratios = eval_logprobs - eval_ref_logprobs  # [M]
        metrics = {"eval/pair_accuracy": implied_accuracy(log_ratios, held_out_rewards, eval_groups)}
        sampled_metrics, samples = judge_samples()
        metrics |= sampled_metrics
        run.metrics(step, metrics, show=tuple(metrics))
        run.samples(step, samples)

    if start == 0 and args.eval_every:
        evaluate_scored(0)
    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        sums = {  # over this rank's responses, each divided by the size of the batch
            "loss": torch.zeros((), device=device, dtype=torch.float64),
            "log_ratio": torch.zeros((), device=device, dtype=torch.float64),
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
            mb_ref_logprobs = ref_logprobs[pick]  # [B]
            mb_loss = rpo_loss(mb_logprobs, mb_ref_logprobs, targets[pick])  # []
            backward(mb_loss / len(batch))
            sums["loss"] += mb_loss.detach() / len(batch)
            sums["log_ratio"] += (mb_logprobs - mb_ref_logprobs).sum().detach() / len(batch)
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        total, norm = optimizer_step(policy, optimizer, lr, sums["loss"], args.max_grad_norm, where)

        # --- log
        means = distributed.all_reduce_dict(sums)  # over the batch
        done = step + 1
        seconds = time.perf_counter() - clock
        tokens = sum(lengths[i] for i in batch)
        metrics = {
            "rpo/loss": total,
            "rpo/log_ratio": means["log_ratio"],
            "rpo/target": targets[batch].mean(),
            "rpo/value": values[batch].mean(),
            "rpo/grad_norm": norm,
            "rpo/lr": lr,
            "time/step_s": seconds,
            "perf/update_tokens_per_s": tokens / seconds,
            "memory/state_gb": state_bytes(models, optimizers) / 2**30,
            "memory/peak_gb": peak_memory_gb(),
            **mfu(policy, tokens, seconds),
        }
        run.metrics(done, metrics, show=("rpo/loss", "rpo/log_ratio"))
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate_scored(done)

        # --- save
        if run.saves(done):
            save_checkpoint(args.run_dir, done, trained, {}, args.keep)
            run.stop_if_asked(done)
    evaluate_scored(steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision, made_by=(args, __file__))
    run.close(f"python evaluate.py responses --models {args.run_dir}/model --dataset YOUR_PROMPTS")


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
