"""PPO for language models: policy and critic trained together, a reward model at the end of each response.

Papers: 1707.06347 (PPO), 1909.08593 (the language-model form). Per token, with s_t = (x, y_<t) and a_t =
y_t:

    r_t = -beta * (log pi(a_t|s_t) - log pi_ref(a_t|s_t)),  plus the reward model's score at the last token
    A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V(s_{t+l+1}) - V(s_{t+l}))        (GAE, 1506.02438 eq. 16)
    policy loss = -mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)            (1707.06347 eq. 7)
    critic loss = 0.5 * mean_t max((V - R)^2, (V_clipped - R)^2),  R = A + V_old

    python ppo.py                                                      # the embedded world, one CPU
    python ppo.py --model runs/sft/model --reward runs/reward/model --dataset prompts.jsonl
    torchrun --nproc_per_node=8 ppo.py --model meta-llama/Llama-3.2-3B-Instruct --reward runs/reward/model \
        --dataset openbmb/UltraFeedback --part rl --batch-size 64 --mini-batch-size 16 \
        --gradient-checkpointing

Watch `eval/*` and read samples.jsonl rather than trust `objective/score`, which the policy may come to
exploit. `objective/kl` should stay below a few nats per response; `rollout/length` should neither collapse
nor explode. Our page in docs/ explains every number and detail.
"""

from dataclasses import dataclass, field
from pathlib import Path
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
from common.models import load_model, to_reward_unit
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.positions import longest_of
from common.pretrained import resolve
from common.reference import load_reference
from common.rewards import Reward
from common.rollout import check_sampler, note_drift, rollout
from common.tokenization import load_tokenizer, require_same_tokenizer, tokenize, were_cut
from common.value_heads import response_values


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
    critic: str = ""
    """What the critic starts from, a GVM of gvm_td.py for one. By default it is the reward model where that is a
    model, else the policy."""
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
    run_dir: str = "runs/ppo"
    """Folder of the run: arguments, metrics, samples, checkpoints, the exported model."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    steps: int = 1000
    """RL steps, each one rollout of `--batch-size` responses and `--epochs` passes over it."""
    batch_size: int = 8
    """Responses per RL step, over all ranks (2502.16944: 8)."""
    mini_batch_size: int = 2
    """Responses per optimizer step, over all ranks (2502.16944: 2)."""
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
    epochs: int = 4
    """Passes over each rollout (2502.16944: 4)."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    temperature: float = 1.0
    """Temperature of sampling; the online scripts take every log-probability at this temperature too."""
    lr: float = 2e-6
    """Peak learning rate (2502.16944: 2e-6)."""
    critic_lr: float = 2e-6
    """Peak learning rate of the critic."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a
    cosine."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    beta: float = 0.05
    """Coefficient of the KL penalty (2502.16944 v3: 0.05). In remax.py, 0 loads no reference."""
    kl_target: float = 0.0
    """Mean KL per token, in nats, that an adaptive beta aims at (2502.16944 v1: 0.1, from beta 0.2). 0:
    beta is fixed."""
    gamma: float = 1.0
    """Discount. A GVM and the script that uses it must have the same."""
    lam: float = 0.95
    """Lambda of the returns (gvm_td.py) or of GAE: 0 is one step (2502.16944, equation 1), 1 is Monte
    Carlo; the authors' released trainer uses 0.95."""
    clip: float = 0.2
    """Clip range of the probability ratio around 1 (2502.16944: 0.2); with `--clip-high`, below 1."""
    value_clip: float = 0.2
    """Clip range of the critic's change from its old value."""
    value_coef: float = 0.1
    """Coefficient of the critic's loss."""
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
    beta=0.1,
    lr=3e-4,
    warmup_steps=0,
    eval_every=10,
    eval_prompts=96,
    save_every=20,
    critic_lr=1e-3,
    reward="assets.reviews:reward",
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def token_rewards(kl: Tensor, final_rewards: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Rewards [B, T]: -beta * kl_t at each token, plus final_rewards [B] at the last one (1909.08593 eq. 2).

    kl and mask [B, T]; a response's tokens begin in column 0. Masked positions get 0.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)  # [T]
    lengths = mask.sum(1, keepdim=True)  # [B, 1]
    is_last = positions == lengths - 1  # [B, T]
    penalties = torch.where(mask, -beta * kl, 0.0)
    return penalties + torch.where(is_last, final_rewards[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates [B, T] (1506.02438 eq. 16), from rewards and V(s_t), all [B, T].

    The value after a response's last token is 0. Masked positions, all of them on the right, get 0.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])  # [B]
    next_value = torch.zeros_like(rewards[:, 0])  # [B]
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(mask[:, t], advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages


def whiten(x: Tensor, mask: Tensor, centre: bool = True, eps: float = 1e-8) -> Tensor:
    """x [B, T] divided by the root mean square of the unmasked entries of all rows; 0 where masked.

    With `centre` their mean is subtracted before, so that this is their standard deviation. Without it the
    deviation would be no measure of size: of entries that are nearly equal it is nearly 0.
    """
    if centre:
        x = x - x[mask].mean()
    size = (x[mask] ** 2).mean().sqrt()
    return torch.where(mask, x / (size + eps), 0.0)


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


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (1707.06347 eq. 7), summed over tokens, and sums for the log.

    All inputs [B, T]. The log's sums, without gradient: `clipped`, the tokens whose ratio is outside 1 +-
    clip; `approx_kl`, k3 of the old policy against the new, in nats; `ratio`.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped_losses = -advantages * ratio
    clipped_losses = -advantages * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.maximum(unclipped_losses, clipped_losses)
    is_clipped = ((ratio - 1).abs() > clip) & mask
    sums = {
        "clipped": is_clipped.sum(),
        "approx_kl": ((ratio - 1 - log_ratio) * mask).sum().detach(),
        "ratio": (ratio * mask).sum().detach(),
    }
    return (losses * mask).sum(), sums


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Clipped value loss (of 1909.08593's code), summed over tokens. All inputs [B, T].

    Half the larger of two squared errors: that of V, and that of V kept within `clip` of its old value.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    unclipped_errors = (values - returns) ** 2
    clipped_errors = (clipped_values - returns) ** 2
    return 0.5 * (torch.maximum(unclipped_errors, clipped_errors) * mask).sum()


def next_beta(beta: float, kl: float, target: float, batch_size: int, horizon: int = 10_000) -> float:
    """Adaptive KL coefficient (1909.08593 section 2.2): it rises while the mean KL per token is above target.

    The relative error is clipped to 20 %; `horizon` is the controller's time constant, in responses.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + error * batch_size / horizon)


def main(args: Args) -> None:
    # Shapes: B is --batch-size, the responses of a step, and T the length of the longest of them, in tokens.
    # Every rank holds the [B, T] tensors whole and computes its share of what is in them. A micro-batch has
    # [b, t], and its names begin with mb_. An evaluation has [N, T], of N held-out prompts. [] is one number.

    # --- setup
    if args.batch_size % args.mini_batch_size:
        fail(f"--mini-batch-size {args.mini_batch_size} does not divide --batch-size {args.batch_size}")
    if args.kl_target and args.beta == 0:
        fail(f"--kl-target {args.kl_target} adapts --beta by factors, so from 0 it stays 0; give one above 0")
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
    reward_is_model = ":" not in args.reward or Path(args.reward).exists()
    critic_start = args.critic or (args.reward if reward_is_model else args.model)
    critic_name = resolve(critic_start)
    require_same_tokenizer(tokenizer, critic_name, "--critic")

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
    critic = load_model("value", critic_name, tokenizer, args, trained=True, longest=longest)
    to_reward_unit(critic)  # where it is a GVM, whose values are of standardised scores
    critic_optimizer = adamw(critic, args.critic_lr)
    reference = load_reference(policy, ref_name, tokenizer, args, longest)
    models = [policy, critic, reference]  # those in memory: counted in the log, and parked if frozen
    if reward_is_model:
        models.append(reward.model)
    optimizers = [optimizer, critic_optimizer]
    # what a checkpoint holds
    trained = {"policy": (policy, optimizer), "critic": (critic, critic_optimizer)}
    if args.offload_frozen:
        offload.park(models + [eval_reward.model for eval_reward in eval_rewards])
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start = state.get("step", 0)
    # an adaptive beta goes on where it was; a fixed one is what the command line says
    beta = state.get("beta", args.beta) if args.kl_target else args.beta
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

    def critic_values(mb):
        """V(s_1), then V(s_{t+1}) after each token, [b, t + 1], of a micro-batch."""
        return response_values(critic, **mb)

    def evaluate(step):
        """Answers the held-out prompts, with the same random numbers each time; logs rewards, KL, length."""
        prompts = [row["opening_ids"] for row in eval_rows]
        seed = (0, 0)  # no training step has it: theirs are (--seed, 1), (--seed, 2), ...
        responses, sampler_logprobs = rollout(
            policy, tokenizer, prompts, limit, args.temperature, seed, args.rollout_batch_size, compare=False
        )
        sequences = list(zip(prompts, responses, strict=True))
        mask = response_mask(responses, device)  # [N, T]
        logprobs = logprobs_of(policy, sequences)  # [N, T]
        note_drift(policy, sampler_logprobs, logprobs, mask, step)
        ref_logprobs = logprobs_of(reference, sequences)  # [N, T]
        kl, _ = kl_estimates(logprobs, ref_logprobs, mask)  # [N, T]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        rewards = {}  # by label, each [N]
        for eval_reward in eval_rewards:
            rewards[eval_reward.label] = eval_reward(eval_rows, sequences, texts)
        metrics = {f"eval/{label}": reward.mean() for label, reward in rewards.items()}
        metrics["eval/kl"] = kl.sum(1).mean()
        metrics["eval/length"] = mask.sum(1).float().mean()
        run.metrics(step, metrics, show=tuple(metrics))
        samples = []
        for i, row in enumerate(eval_rows[:8]):  # enough to read
            sample = {
                "prompt": row["prompt"],
                "response": texts[i],
                "kl": kl[i].sum().item(),
                "length": len(responses[i]),
            }
            for label, reward in rewards.items():
                sample[label] = reward[i].item()
            samples.append(sample)
        run.samples(step, samples)

    if start == 0 and args.eval_every and eval_rows:
        evaluate(0)

    for step in range(start, args.steps):
        # --- rollout
        phases = Phases()
        drawn = batch_indices(len(rows), args.batch_size, step, args.seed)
        batch = [rows[i] for i in drawn]
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
        logprobs = logprobs_of(policy, sequences)  # [B, T]
        ref_logprobs = logprobs_of(reference, sequences)  # [B, T]
        kl, k3 = kl_estimates(logprobs, ref_logprobs, mask)  # [B, T] each; kl is the log-ratio, k1
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = reward(batch, sequences, texts)  # [B]
        final_rewards = scores - args.missing_eos_penalty * truncated  # [B]
        # [B, T + 1]: column 0 is V(s_1), the output at the last prompt token; column t is V(s_{t+1}), the
        # output at the response's token t; 0 where masked
        columns = mask.shape[1] + 1
        values = run_micro_batches(
            critic_values, sequences, args.micro_batch_size, pad, columns, model=critic
        )

        # --- advantage
        state_values = values[:, :-1]  # [B, T] V(s_t), the output at the token before a_t
        rewards = token_rewards(kl, final_rewards, mask, beta)  # [B, T]
        advantages = gae(rewards, state_values, mask, args.gamma, args.lam)  # [B, T]
        returns = advantages + state_values  # [B, T] what the critic regresses on
        residuals = (returns - state_values)[mask]  # [tokens]
        explained_variance = 1 - residuals.var() / (returns[mask].var() + 1e-8)
        advantages = whiten(advantages, mask)
        advantages = advantages * importance_weights(logprobs, sampler_logprobs, mask, importance_cap)
        phases.end("scoring")

        # --- update
        lr = learning_rate(step, args.steps, args.lr, args.warmup_steps, args.lr_schedule)
        critic_lr = learning_rate(step, args.steps, args.critic_lr, args.warmup_steps, args.lr_schedule)
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
                # one denominator per optimizer step: the response tokens of all ranks and micro-batches
                mini_batch_tokens = mask[mini_batch].sum()  # []
                loss = torch.zeros((), device=device)  # [], this rank's share
                critic_loss = torch.zeros((), device=device)  # [], this rank's share
                # this rank's micro-batches, each a list of indices into the batch
                rank_micro_batches = micro_batches(mini_batch, lengths, args.micro_batch_size, rank, world)
                for mb_indices in accumulated(rank_micro_batches, policy, critic):
                    # mb: input_ids [b, prompt and response], prompt_lengths [b], response_mask [b, t]
                    mb = collate([sequences[i] for i in mb_indices], pad, device)
                    mb_mask = mb["response_mask"]  # [b, t]
                    width = mb_mask.shape[1]  # t, the longest response of the micro-batch
                    # A rank that has run out of responses gets an empty micro-batch, yet must join the
                    # forward and backward passes of the others. collate then makes a dummy, all masked, and
                    # any row of the [B, T] tensors will do beside it: [0].
                    mb_rows = torch.tensor(mb_indices or [0], device=device)  # [b]
                    mb_old_logprobs = logprobs[mb_rows, :width]  # [b, t]
                    mb_advantages = advantages[mb_rows, :width]  # [b, t]
                    # [b, t] each
                    mb_logprobs, mb_entropy = policy.response_logprobs(**mb, temperature=args.temperature)
                    mb_loss, mb_sums = policy_loss(
                        mb_logprobs, mb_old_logprobs, mb_advantages, mb_mask, args.clip
                    )
                    backward(mb_loss / mini_batch_tokens)
                    loss += mb_loss.detach() / mini_batch_tokens
                    mb_old_values = state_values[mb_rows, :width]  # [b, t]
                    mb_returns = returns[mb_rows, :width]  # [b, t]
                    mb_values = critic_values(mb)[:, :-1]  # [b, t]
                    mb_critic_loss = value_loss(
                        mb_values, mb_old_values, mb_returns, mb_mask, args.value_clip
                    )
                    backward(args.value_coef * mb_critic_loss / mini_batch_tokens)
                    critic_loss += mb_critic_loss.detach() / mini_batch_tokens
                    for name, mb_sum in mb_sums.items():
                        sums[name] += mb_sum
                    sums["entropy"] += mb_entropy.detach().sum()
                    sums["tokens"] += mb_mask.sum()
                data_rows = [batch[i]["row"] for i in mini_batch]
                where = f"step {step}, epoch {epoch}, data rows {data_rows}"  # said if the loss is not finite
                mini_batch_loss, norm = optimizer_step(policy, optimizer, lr, loss, args.max_grad_norm, where)
                mini_batch_critic_loss, critic_norm = optimizer_step(
                    critic, critic_optimizer, critic_lr, critic_loss, args.max_grad_norm, where
                )
                losses_and_norms.append((mini_batch_loss, norm, mini_batch_critic_loss, critic_norm))
        totals = distributed.all_reduce_dict(sums)  # floats, of all ranks
        phases.end("update")

        # --- log
        done = step + 1
        means = torch.tensor(losses_and_norms).mean(0).tolist()
        mean_loss, mean_norm, mean_critic_loss, mean_critic_norm = means
        note_drift(policy, sampler_logprobs, logprobs, mask, done)
        _, mismatch = kl_estimates(sampler_logprobs, logprobs, mask)  # [B, T], the sampler against the policy
        response_tokens = int(mask.sum())
        update_tokens = args.epochs * sum(lengths)
        metrics = {
            "objective/score": scores.mean(),
            "objective/kl": kl.sum(1).mean(),
            "objective/kl_k3": k3.sum(1).mean(),
            "objective/beta": beta,
            "objective/entropy": totals["entropy"] / totals["tokens"],
            "rollout/mismatch": mismatch.sum() / response_tokens,
            "rollout/length": mask.sum(1).float().mean(),
            "rollout/truncated": truncated.float().mean(),
            "policy/loss": mean_loss,
            "policy/grad_norm": mean_norm,
            "policy/clip_fraction": totals["clipped"] / totals["tokens"],
            "policy/approx_kl": totals["approx_kl"] / totals["tokens"],
            "policy/ratio": totals["ratio"] / totals["tokens"],
            "policy/lr": lr,
            "critic/loss": mean_critic_loss,
            "critic/grad_norm": mean_critic_norm,
            "critic/explained_variance": explained_variance,
            "critic/value": state_values[mask].mean(),
            "critic/lr": critic_lr,
            "memory/state_gb": state_bytes(models, optimizers) / 2**30,
            **phases.metrics(policy, response_tokens, update_tokens),
        }
        run.metrics(done, metrics, show=("objective/score", "objective/kl", "rollout/length"))
        if args.save_rollouts:
            numbers = {"reward": scores, "kl": kl.sum(1)}  # [B] each
            run.rollouts(done, batch, texts, is_truncated, numbers)
        if args.kl_target:
            mean_kl = float(kl[mask].mean())  # per token
            beta = next_beta(beta, mean_kl, args.kl_target, args.batch_size)
        if args.eval_every and eval_rows and done % args.eval_every == 0 and done < args.steps:
            evaluate(done)

        # --- save
        if run.saves(done):
            save_checkpoint(args.run_dir, done, trained, {"beta": beta}, args.keep)
            run.stop_if_asked(done)
    if args.eval_every and eval_rows:
        evaluate(args.steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision, made_by=(args, __file__))
    made_by = (args, __file__, critic_start)
    export(critic, tokenizer, f"{args.run_dir}/critic", args.precision, made_by=made_by)
    run.close(f"python evaluate.py responses --models {args.run_dir}/model --dataset YOUR_PROMPTS")


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
