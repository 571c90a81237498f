"""GRPO, Group Relative Policy Optimisation: several responses to each prompt are their own baseline.

There is no critic. Paper: 2402.03300. For the G responses to one prompt, with rewards r_1 .. r_G and the
ratio rho_t = pi(y_t|s_t) / pi_old(y_t|s_t):

    A_i = (r_i - mean(r)) / (std(r) + eps),  the same for every token of response i
    loss = -mean over tokens of min(rho_t A, clip(rho_t, 1 - clip, 1 + clip_high) A) + beta * KL_t    (eq. 3)
    KL_t = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1,  the k3 estimate                     (eq. 4)

--aggregation says what that mean is. `grpo`: of each response, then over responses; `dapo` (2503.14476):
over all tokens of the mini-batch; `dr_grpo` (2503.20783): over responses times --max-response-length, a
constant (use it with --no-scale-std).

    python grpo.py                                                     # the embedded world, one CPU
    python grpo.py --model runs/sft/model --reward runs/reward/model --dataset prompts.jsonl
    torchrun --nproc_per_node=8 grpo.py --model Qwen/Qwen3-4B-Instruct-2507 --reward my_rewards:correct \
        --dataset questions.jsonl --columns prompt question --batch-size 256 --mini-batch-size 64 \
        --gradient-checkpointing

Watch `eval/*` and read samples.jsonl. `rollout/zero_spread` near 1 means that most groups teach nothing (all
right, or all wrong); `rollout/length` should neither collapse nor explode. Our page in docs/ explains every
number and detail.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from common import distributed, offload, vllm
from common.batches import (
    batch_indices,
    collate,
    micro_batches,
    permutation,
    response_mask,
    run_micro_batches,
)
from common.checkpoints import export, load_checkpoint, save_checkpoint
from common.cli import fail, parse
from common.data import hold_out_prompts, read_rows
from common.log import Run
from common.meter import Phases, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.positions import longest_of
from common.pretrained import resolve
from common.reference import load_reference
from common.rewards import Reward
from common.rollout import check_sampler, note_drift, rollout
from common.tokenization import load_tokenizer, require_same_tokenizer, tokenize, were_cut


@dataclass
class Args:
    model: str = "reviews"
    """Model to start from: a hub id or a local folder, usually the SFT policy. `reviews` is the embedded
    one."""
    ref_model: str = ""
    """Reference policy: a hub id or folder. By default it is `--model` as it starts."""
    reward: str = ""
    """Reward model (hub id or folder) or `module:function` that scores responses; in gvm_td.py its scores
    replace the data set's returns."""
    dataset: str = "reviews"
    """Data to train on: a hub id (`id:configuration` where it has several), a folder, or local .jsonl, .json or
    .parquet files (.gz too; several with commas between), with the columns
    that docs/data.md lists for this script. `reviews` is the embedded world."""
    split: str = "train"
    """Split of a hub data set; of a local file, the value that its column `split` must have."""
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
    run_dir: str = "runs/grpo"
    """Folder of the run: arguments, metrics, samples, checkpoints, the exported model."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    steps: int = 1000
    """RL steps, each one rollout of `--batch-size` responses and `--epochs` passes over it."""
    batch_size: int = 64
    """Responses (in preference data: pairs) per step, over all ranks."""
    group_size: int = 8
    """Responses to each prompt (2402.03300: 64)."""
    mini_batch_size: int = 64
    """Responses per optimizer step, over all ranks."""
    micro_batch_size: int = 2
    """Responses (in preference data: pairs) per forward pass on one rank. It changes memory and speed, not
    the result."""
    rollout_batch_size: int = 0
    """Prompts that one rank answers at once. 0: all of the step's."""
    rollout_engine: Literal["torch", "vllm"] = "torch"
    """Who samples. torch: our own loop; vllm: vLLM in each process, with the policy's weights copied into
    it before each rollout."""
    vllm_cache_gb: float = 4.0
    """GiB of keys and values that vLLM reserves on each GPU, in addition to its copy of the weights."""
    importance_cap: float = 2.0
    """With vLLM, each token's advantage is weighted by min(policy / sampler, cap). 0: no such weight."""
    epochs: int = 1
    """Passes over the data; in the online scripts, over each rollout."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    temperature: float = 1.0
    """Temperature of sampling; the online scripts take every log-probability at this temperature too."""
    lr: float = 1e-6
    """Peak learning rate (2402.03300, 2305.18290: 1e-6)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a
    cosine."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    beta: float = 0.04
    """Coefficient of the KL penalty (2402.03300: 0.04). 0 loads no reference."""
    scale_std: bool = True
    """Divide advantages by the group's standard deviation. `--no-scale-std` is Dr. GRPO's choice."""
    aggregation: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """How token losses are averaged. grpo: over each response, then over responses; dapo: over all tokens
    at once; dr_grpo: over a constant."""
    clip: float = 0.2
    """Clip range of the probability ratio around 1 (2502.16944: 0.2); with `--clip-high`, below 1."""
    clip_high: float = 0.2
    """Clip range of the probability ratio above 1 (DAPO: 0.28)."""
    missing_eos_penalty: float = 0.0
    """What is subtracted from the reward of a response that the length limit cut off."""
    eval_every: int = 50
    """RL steps between evaluations on held-out prompts, the first before training. 0: none."""
    eval_prompts: int = 64
    """Number of prompts that are held out of training for evaluations."""
    eval_reward: tuple[str, ...] = ()
    """Reward models (hub ids or folders) or `module:function`s to report in evaluations; never trained on."""
    save_rollouts: bool = False
    """Write every response of training into rollouts.jsonl, data that gvm_td.py reads."""
    save_every: int = 50
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
    offload_frozen: bool = False
    """Keep frozen models in the host's memory except during the passes that read them."""
    shard_size: int = 0
    """Number of ranks that a model is sharded over (HSDP: replicas of it across nodes). 0: all."""
    timeout_minutes: float = 60.0
    """Minutes after which a rank that waits for another gives up: longer than the slowest rollout, load or
    reward of one rank."""


# What works on the embedded world of 0.1 M parameters; a flag on the command line wins.
REVIEWS = dict(
    part="rl",
    steps=40,
    batch_size=256,
    mini_batch_size=64,
    micro_batch_size=64,
    max_prompt_length=16,
    max_response_length=32,
    lr=3e-4,
    warmup_steps=0,
    eval_every=10,
    eval_prompts=96,
    save_every=20,
    reward="assets.reviews:reward",
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def group_advantages(
    rewards: Tensor, group_size: int, scale_std: bool = True, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Advantages [B] in each group (2402.03300 section 4.1), and [B] whether its rewards are all equal.

    rewards [B], the G responses to one prompt next to one another. An advantage is (r - mean) / (std + eps),
    with G - 1 in the deviation's denominator; without `scale_std` it is r - mean (2503.20783).
    """
    groups = rewards.view(-1, group_size)  # [B / G, G]
    is_equal = (groups == groups[:, :1]).all(1, keepdim=True)  # [B / G, 1]
    centred = groups - groups.mean(1, keepdim=True)
    # Equal rewards give exactly 0; the rounding error of their mean over a tiny deviation would not be 0.
    centred = torch.where(is_equal, 0.0, centred)
    if scale_std:
        advantages = centred / (groups.std(1, keepdim=True) + eps)
    else:
        advantages = centred
    return advantages.flatten(), is_equal.expand_as(groups).flatten()


def token_weights(mask: Tensor, aggregation: str, max_length: int) -> Tensor:
    """Weight [N, T] of each token in the loss of a mini-batch of N responses, mask [N, T]; 0 where masked.

    `grpo`: 1 / (N * the response's length); `dapo`: 1 / all tokens; `dr_grpo`: 1 / (N * max_length).
    They are of the whole mini-batch, so neither ranks nor micro-batches change the loss.
    """
    if aggregation == "grpo":
        denominator = len(mask) * mask.sum(1, keepdim=True)  # [N, 1]
    elif aggregation == "dapo":
        denominator = mask.sum()
    else:
        denominator = len(mask) * max_length
    return mask / denominator


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(pi / mu, cap) [B, T] (fengyao.notion.site/off-policy-rl).

    The sampler mu drew each token with `sampler_logprobs`, the policy pi gives it `logprobs`; all [B, T].
    A weight is 1 where masked, and everywhere for cap 0, which is for a sampler that is the policy itself.
    """
    if cap == 0:
        return torch.ones_like(logprobs)
    log_ratio = torch.where(mask, logprobs - sampler_logprobs, 0.0)
    return log_ratio.exp().clamp(max=cap)


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two estimates, k1 and k3, of KL(pi || pi_ref) at each token sampled from pi. All [B, T], in nats.

    k1 is the log-ratio: unbiased, of either sign. k3 = exp(-k1) - 1 + k1 (2402.03300 eq. 4): unbiased, never
    negative. Padding is masked before exp, since 0 * inf would be NaN.
    """
    k1 = torch.where(mask, logprobs - ref_logprobs, 0.0)
    k3 = torch.expm1(-k1) + k1
    return k1, k3


def surrogate_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (2402.03300 eq. 3), a weighted sum over tokens, and sums for the log.

    All inputs [B, T]; advantages may be [B, 1]. The log's sums, without gradient: `clipped`, the tokens
    whose ratio is below 1 - clip or above 1 + clip_high; `approx_kl`, k3 of the old policy against the new,
    in nats; `ratio`.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped_losses = -advantages * ratio
    clipped_losses = -advantages * ratio.clamp(1 - clip, 1 + clip_high)
    losses = torch.maximum(unclipped_losses, clipped_losses)
    is_clipped = ((ratio < 1 - clip) | (ratio > 1 + clip_high)) & mask
    sums = {
        "clipped": is_clipped.sum(),
        "approx_kl": ((ratio - 1 - log_ratio) * mask).sum().detach(),
        "ratio": (ratio * mask).sum().detach(),
    }
    return (losses * weights * mask).sum(), sums


def main(args: Args) -> None:
    # Shapes: B is --batch-size, the responses of a step, and T the length of the longest of them, in tokens.
    # Every rank holds the [B, T] tensors whole and computes its share of what is in them. A micro-batch has
    # [b, t], and its names begin with mb_. An evaluation has [N, T], of N held-out prompts. [] is one number.

    # --- setup
    if args.batch_size % args.mini_batch_size:
        fail(f"--mini-batch-size {args.mini_batch_size} does not divide --batch-size {args.batch_size}")
    if args.batch_size % args.group_size:
        fail(f"--group-size {args.group_size} does not divide --batch-size {args.batch_size}")
    run = Run(args)
    device = distributed.device()
    rank = distributed.rank()
    world = distributed.world()  # number of ranks
    policy_name = resolve(args.model)
    tokenizer = load_tokenizer(policy_name, args.template_arguments)
    ref_name = resolve(args.ref_model or args.model)
    require_same_tokenizer(tokenizer, ref_name, "--ref-model")
    pad = tokenizer.pad_token_id
    limit = args.max_response_length

    # --- data
    rows = read_rows(
        args.dataset,
        "prompts",
        split=args.split,
        columns=args.columns,
        part=args.part,
        split_seed=args.split_seed,
        skip_bad_rows=args.skip_bad_rows,
    )
    response_fields = ()  # the rows are prompts alone
    rows = tokenize(
        rows, tokenizer, response_fields, args.max_prompt_length, limit, args.dataset, args.skip_bad_rows
    )
    rows, eval_rows = hold_out_prompts(rows, args.eval_prompts, args.split_seed)
    if not rows:
        fail(
            f"{args.dataset}: all {len(eval_rows)} prompts are held out for evaluation; lower --eval-prompts"
        )

    # --- models
    longest = longest_of((), [row["opening_ids"] for row in [*rows, *eval_rows]], limit)
    reward = Reward(args.reward, tokenizer, args, [*rows, *eval_rows])
    eval_rewards = [Reward(name, tokenizer, args, eval_rows) for name in args.eval_reward]
    policy = load_model("policy", policy_name, tokenizer, args, trained=True, longest=longest)
    # By default the engine is None, so that rollout samples with our own loop from the policy itself, and
    # the cap is 0, which makes every importance weight 1. Only --rollout-engine vllm, which rounds
    # differently, has both.
    engine, importance_cap = vllm.start(policy, policy_name, args)
    policy.engine = engine  # where rollout looks for it
    optimizer = adamw(policy, args.lr)
    reference = load_reference(policy, ref_name, tokenizer, args, longest) if args.beta else None
    # those in memory: counted in the log, and parked if frozen; a reward that is a function has no model
    models = [model for model in (policy, reference, reward.model) if model is not None]
    optimizers = [optimizer]
    # what a checkpoint holds
    trained = {"policy": (policy, optimizer)}
    if args.offload_frozen:
        offload.park(models + [eval_reward.model for eval_reward in eval_rewards])
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start = state.get("step", 0)
    check_sampler(policy, tokenizer, [row["opening_ids"] for row in rows], limit, args.temperature)
    run.start(start, args.steps, rows)

    def logprobs_of(model, sequences):
        """Log-probabilities [n, T] of n responses' tokens under a policy, on every rank; 0 where masked."""

        def micro_batch_logprobs(mb):
            mb_logprobs, _ = model.response_logprobs(**mb, temperature=args.temperature)
            return mb_logprobs

        width = max(len(response) for _, response in sequences)
        return run_micro_batches(
            micro_batch_logprobs, sequences, args.micro_batch_size, pad, width, model=model
        )

    def evaluate_kl_optional(step):
        """Answers the held-out prompts, with the same random numbers each time; logs rewards, length, KL.

        With --beta 0 no reference is loaded, and the KL is left out.
        """
        prompts = [row["opening_ids"] for row in eval_rows]
        seed = (0, 0)  # no training step has it: theirs are (--seed, 1), (--seed, 2), ...
        # with a reference the policy's log-probabilities are at hand below, and note_drift compares them
        compare = reference is None
        responses, sampler_logprobs = rollout(
            policy, tokenizer, prompts, limit, args.temperature, seed, args.rollout_batch_size, compare
        )
        sequences = list(zip(prompts, responses, strict=True))
        mask = response_mask(responses, device)  # [N, T]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        numbers = {}  # by label, each [N]
        for eval_reward in eval_rewards:
            numbers[eval_reward.label] = eval_reward(eval_rows, sequences, texts)
        metrics = {f"eval/{label}": number.mean() for label, number in numbers.items()}
        metrics["eval/length"] = mask.sum(1).float().mean()
        if reference is not None:
            logprobs = logprobs_of(policy, sequences)  # [N, T]
            note_drift(policy, sampler_logprobs, logprobs, mask, step)
            ref_logprobs = logprobs_of(reference, sequences)  # [N, T]
            kl, _ = kl_estimates(logprobs, ref_logprobs, mask)  # [N, T]
            numbers["kl"] = kl.sum(1)
            metrics["eval/kl"] = kl.sum(1).mean()
        run.metrics(step, metrics, show=tuple(metrics))
        samples = []
        for i, row in enumerate(eval_rows[:8]):  # enough to read
            sample = {"prompt": row["prompt"], "response": texts[i], "length": len(responses[i])}
            for label, number in numbers.items():
                sample[label] = number[i].item()
            samples.append(sample)
        run.samples(step, samples)

    if start == 0 and args.eval_every and eval_rows:
        evaluate_kl_optional(0)

    for step in range(start, args.steps):
        # --- rollout
        phases = Phases()
        drawn = batch_indices(len(rows), args.batch_size // args.group_size, step, args.seed)
        # each row --group-size times, side by side
        batch = [rows[i] for i in drawn for _ in range(args.group_size)]
        prompts = [row["opening_ids"] for row in batch]  # B token lists
        seed = (args.seed, step + 1)  # other random numbers in each step; + 1, since (0, 0) is evaluation's
        # B token lists, and the log-probabilities [B, T] with which the sampler drew the tokens; note_drift
        # compares them with the policy's below, when these are at hand, so compare=False
        responses, sampler_logprobs = rollout(
            policy, tokenizer, prompts, limit, args.temperature, seed, args.rollout_batch_size, compare=False
        )
        sequences = list(zip(prompts, responses, strict=True))  # B (prompt tokens, response tokens)
        lengths = [len(prompt) + len(response) for prompt, response in sequences]  # B
        mask = response_mask(responses, device)  # [B, T] True at the tokens of the responses
        is_truncated = were_cut(tokenizer, responses)
        truncated = torch.tensor(is_truncated, device=device)  # [B]
        phases.end("rollout")

        # --- reward
        # Where a rollout has a single update, the policy that is updated is still the one that sampled. Then
        # the update's own log-probabilities are the old ones, and no pass is spent on them. Not with dropout,
        # which is on during the update alone.
        one_update = args.epochs == 1 and args.mini_batch_size == args.batch_size and not args.lora_dropout
        if one_update:
            update_logprobs = torch.zeros(mask.shape, device=device)  # [B, T], collected during the update
        else:
            old_logprobs = logprobs_of(policy, sequences)  # [B, T]
        if reference is not None:
            ref_logprobs = logprobs_of(reference, sequences)  # [B, T]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = reward(batch, sequences, texts)  # [B]
        final_rewards = scores - args.missing_eos_penalty * truncated  # [B]

        # --- advantage
        # [B] each, one number per response
        response_advantages, is_equal = group_advantages(final_rewards, args.group_size, args.scale_std)
        advantages = response_advantages[:, None].expand(mask.shape)  # [B, T], the same for all its tokens
        phases.end("scoring")

        # --- update
        lr = learning_rate(step, args.steps, args.lr, args.warmup_steps, args.lr_schedule)
        losses_and_norms = []  # one tuple per optimizer step
        sums = {}  # [] each, over this rank's tokens in all epochs
        for name in ("clipped", "approx_kl", "ratio", "entropy", "tokens"):
            sums[name] = torch.zeros((), device=device)
        for epoch in range(args.epochs):
            # args.seed + 1: the order within a batch is drawn apart from the order of the data (args.seed)
            order = permutation(args.batch_size, step * args.epochs + epoch, args.seed + 1)
            for first in range(0, args.batch_size, args.mini_batch_size):
                # indices into the batch, for all ranks
                mini_batch = order[first : first + args.mini_batch_size]
                # one denominator per optimizer step, over all ranks and micro-batches
                weights = torch.zeros(mask.shape, device=device)  # [B, T], 0 outside the mini-batch
                weights[mini_batch] = token_weights(mask[mini_batch], args.aggregation, limit)
                loss = torch.zeros((), device=device)  # [], this rank's share
                # this rank's micro-batches, each a list of indices into the batch
                rank_micro_batches = micro_batches(mini_batch, lengths, args.micro_batch_size, rank, world)
                for mb_indices in accumulated(rank_micro_batches, policy):
                    # mb: input_ids [b, prompt and response], prompt_lengths [b], response_mask [b, t]
                    mb = collate([sequences[i] for i in mb_indices], pad, device)
                    mb_mask = mb["response_mask"]  # [b, t]
                    width = mb_mask.shape[1]  # t, the longest response of the micro-batch
                    # A rank that has run out of responses gets an empty micro-batch, yet must join the
                    # forward and backward passes of the others. collate then makes a dummy, all masked, and
                    # any row of the [B, T] tensors will do beside it: [0].
                    mb_rows = torch.tensor(mb_indices or [0], device=device)  # [b]
                    mb_weights = weights[mb_rows, :width]  # [b, t]
                    mb_advantages = advantages[mb_rows, :width]  # [b, t]
                    mb_sampler_logprobs = sampler_logprobs[mb_rows, :width]  # [b, t]
                    # [b, t] each
                    mb_logprobs, mb_entropy = policy.response_logprobs(**mb, temperature=args.temperature)
                    if one_update:
                        mb_old_logprobs = mb_logprobs.detach()  # [b, t]
                        if mb_indices:
                            update_logprobs[mb_rows, :width] = mb_old_logprobs.to(update_logprobs.dtype)
                    else:
                        mb_old_logprobs = old_logprobs[mb_rows, :width]  # [b, t]
                    mb_advantages = mb_advantages * importance_weights(
                        mb_old_logprobs, mb_sampler_logprobs, mb_mask, importance_cap
                    )
                    mb_loss, mb_sums = surrogate_loss(
                        mb_logprobs,
                        mb_old_logprobs,
                        mb_advantages,
                        mb_weights,
                        mb_mask,
                        args.clip,
                        args.clip_high,
                    )
                    if reference is not None:
                        mb_ref_logprobs = ref_logprobs[mb_rows, :width]  # [b, t]
                        _, mb_k3 = kl_estimates(mb_logprobs, mb_ref_logprobs, mb_mask)  # [b, t]
                        mb_loss = mb_loss + args.beta * (mb_k3 * mb_weights).sum()
                    backward(mb_loss)
                    loss += mb_loss.detach()
                    for name, mb_sum in mb_sums.items():
                        sums[name] += mb_sum
                    sums["entropy"] += mb_entropy.detach().sum()
                    sums["tokens"] += mb_mask.sum()
                data_rows = [batch[i]["row"] for i in mini_batch]
                where = f"step {step}, epoch {epoch}, data rows {data_rows}"  # said if the loss is not finite
                mini_batch_loss, norm = optimizer_step(policy, optimizer, lr, loss, args.max_grad_norm, where)
                losses_and_norms.append((mini_batch_loss, norm))
        totals = distributed.all_reduce_dict(sums)  # floats, of all ranks
        if one_update:
            # each rank has filled the rows of its micro-batches and left the others 0
            logprobs = distributed.all_reduce(update_logprobs)  # [B, T]
        else:
            logprobs = old_logprobs
        if reference is None:
            ref_logprobs = logprobs  # so that the KL in the log is 0
        kl, k3 = kl_estimates(logprobs, ref_logprobs, mask)  # [B, T] each; kl is the log-ratio, k1
        phases.end("update")

        # --- log
        done = step + 1
        mean_loss, mean_norm = torch.tensor(losses_and_norms).mean(0).tolist()
        note_drift(policy, sampler_logprobs, logprobs, mask, done)
        _, mismatch = kl_estimates(sampler_logprobs, logprobs, mask)  # [B, T], the sampler against the policy
        response_tokens = int(mask.sum())
        update_tokens = args.epochs * sum(lengths)
        metrics = {
            "objective/score": scores.mean(),
            "objective/kl": kl.sum(1).mean(),
            "objective/kl_k3": k3.sum(1).mean(),
            "objective/entropy": totals["entropy"] / totals["tokens"],
            "rollout/zero_spread": is_equal.float().mean(),
            "rollout/mismatch": mismatch.sum() / response_tokens,
            "rollout/length": mask.sum(1).float().mean(),
            "rollout/truncated": truncated.float().mean(),
            "policy/loss": mean_loss,
            "policy/grad_norm": mean_norm,
            "policy/clip_fraction": totals["clipped"] / totals["tokens"],
            "policy/approx_kl": totals["approx_kl"] / totals["tokens"],
            "policy/ratio": totals["ratio"] / totals["tokens"],
            "policy/lr": lr,
            "memory/state_gb": state_bytes(models, optimizers) / 2**30,
            **phases.metrics(policy, response_tokens, update_tokens),
        }
        run.metrics(done, metrics, show=("objective/score", "objective/kl", "rollout/length"))
        if args.save_rollouts:
            numbers = {"reward": scores, "kl": kl.sum(1)}  # [B] each
            run.rollouts(done, batch, texts, is_truncated, numbers)
        if args.eval_every and eval_rows and done % args.eval_every == 0 and done < args.steps:
            evaluate_kl_optional(done)

        # --- save
        if run.saves(done):
            save_checkpoint(args.run_dir, done, trained, {}, args.keep)
            run.stop_if_asked(done)
    if args.eval_every and eval_rows:
        evaluate_kl_optional(args.steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision, made_by=(args, __file__))
    run.close(f"python evaluate.py responses --models {args.run_dir}/model --dataset YOUR_PROMPTS")


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
