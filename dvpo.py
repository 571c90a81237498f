"""DVPO: PPO whose critic is a Global Value Model, trained offline (gvm_td.py) and frozen. No critic to train, no reward model.

Paper: 2502.16944 (Decoupled Value Policy Optimization). With s_t = (x, y_<t), a_t = y_t, one forward pass of the GVM gives
V(s_1) at the last prompt token and Q(s_t, a_t) = V(s_{t+1}) at each response token.

    --advantage gae: r_t = -beta * kl_t, plus Q(s_T, a_T) at the last token, GAE over V(s_t)     (v3: the value of the action
                     against the value of the state)
    --advantage q:   A_t = (Q_t - mean) / std, plus sum_{j>=t} gamma^{j-t} * (-beta * kl_j)            (v1, equations 2-3)
    policy loss = -mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                     (1707.06347 eq. 7)

Differences from ppo.py:
 1. `--gvm` takes the place of `--reward` and `--critic`: it is frozen, has no optimizer and no gradient.
 2. The score of a finished response is the GVM's own estimate, its value at the last token.
 3. The values do not move during the update: no value loss, no value clipping, no critic learning rate. As V is that of the
    policies behind the offline data, advantages are scaled but, without `--centre`, not centred.
 4. A GVM trained with `--context-pairs k` reads k of the current policy's earlier answers before each prompt.

    python dvpo.py                                                     # the embedded world, one CPU
    python dvpo.py --model runs/sft/model --gvm runs/gvm_td/model --dataset prompts.jsonl
    torchrun --nproc_per_node=8 dvpo.py --model meta-llama/Llama-3.2-3B-Instruct --gvm runs/gvm_td/model \
        --dataset openbmb/UltraFeedback --part rl --batch-size 64 --mini-batch-size 16 --gradient-checkpointing

Watch `eval/*` and read samples.jsonl rather than trust `objective/score`, which can be flattered; `objective/kl` should stay
below a few nats a response, `rollout/length` neither collapse nor explode. Our page in docs/ explains every number and detail.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

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
from common.context import add_context
from common.data import hold_out_prompts, read_rows
from common.log import Run
from common.meter import Phases, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.pretrained import resolve
from common.reference import load_reference
from common.rewards import Reward
from common.rollout import check_sampler, note_drift, rollout
from common.tokenization import load_tokenizer, require_same_tokenizer, stop_token, tokenize
from common.value_heads import response_values


@dataclass
class Args:
    model: str = "reviews"
    """Model to start from: a hub id or a local folder, usually the SFT policy. `reviews` is the embedded one."""
    ref_model: str = ""
    """Reference policy: a hub id or folder. By default it is `--model` as it starts."""
    gvm: str = "reviews"
    """Global Value Model from gvm_td.py, frozen: a hub id or folder with the policy's tokenizer. `reviews` is
    the embedded one."""
    dataset: str = "reviews"
    """Data to train on: a hub id, or a local .jsonl, .json or .parquet file (.gz too), with the columns that
    docs/data.md lists for this script. `reviews` is the embedded world."""
    split: str = "train"
    """Split of a hub data set; of a local file, the value that its column `split` must have."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names and yours, in pairs: `--columns prompt question response answer`."""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """Share of the prompts to use: sft is 30 %, value 50 %, rl 20 %, disjoint by prompt (2502.16944)."""
    split_seed: int = 0
    """Seed of the split into parts and held-out prompts. It must be the same in all scripts of an experiment."""
    skip_bad_rows: bool = False
    """Drop and count unusable rows instead of stopping at the first."""
    run_dir: str = "runs/dvpo"
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
    """Responses (in preference data: pairs) per forward pass on one rank. It changes memory and speed, not the
    result."""
    rollout_batch_size: int = 0
    """Prompts that one rank answers at once. 0: all of the step's."""
    rollout_engine: Literal["torch", "vllm"] = "torch"
    """Who samples. torch: our own loop; vllm: vLLM in each process, with the policy's weights copied into it
    before each rollout."""
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
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a cosine."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    beta: float = 0.05
    """Coefficient of the KL penalty (2502.16944 v3: 0.05). In remax.py, 0 loads no reference."""
    kl_target: float = 0.0
    """Mean KL per token, in nats, that an adaptive beta aims at (2502.16944 v1: 0.1, from beta 0.2). 0: beta
    is fixed."""
    advantage: Literal["gae", "q"] = "gae"
    """gae: advantage over the state's value (2502.16944 v3); q: whitened action values (v1; less stable, see
    docs/dvpo.md)."""
    centre: bool = False
    """Subtract the batch's mean from GAE advantages, as PPO does. With a frozen GVM it is better not to
    (docs/dvpo.md)."""
    log_odds: bool = False
    """For a GVM trained on +1 and -1: use atanh(V), half the log-odds of being the chosen answer, which does
    not level off."""
    gamma: float = 1.0
    """Discount. A GVM and the script that uses it must have the same."""
    lam: float = 0.95
    """Lambda of the returns (gvm_td.py) or of GAE: 0 is one step (2502.16944, equation 1), 1 is Monte Carlo;
    the authors' released trainer uses 0.95."""
    clip: float = 0.2
    """Clip range of the probability ratio around 1 (2502.16944: 0.2)."""
    missing_eos_penalty: float = 0.0
    """What is subtracted from the reward of a response that the length limit cut off."""
    eval_every: int = 50
    """RL steps between evaluations on held-out prompts, the first before training. 0: none."""
    eval_prompts: int = 64
    """Number of prompts that are held out of training for evaluations."""
    eval_reward: tuple[str, ...] = ()
    """Reward models (hub ids or folders) or `module:function`s to report in evaluations; never trained on."""
    save_every: int = 50
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
    offload_frozen: bool = False
    """Keep frozen models in the host's memory except during the passes that read them."""
    shard_size: int = 0
    """Number of ranks that a model is sharded over (HSDP: replicas of it across nodes). 0: all."""


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
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def token_rewards(kl, score, mask, beta):
    """Rewards [B, T]: -beta * kl_t at each token, plus score [B] at the last one (1909.08593 eq. 2). mask [B, T]."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(mask, -beta * kl, 0.0) + torch.where(last, score[:, None], 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimates [B, T] (1506.02438 eq. 16) from rewards and V(s_t), all [B, T], padded on the right.

    The value after a response's last token is 0. Masked positions get 0.
    """
    advantages = torch.zeros_like(rewards)
    running = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = running
    return advantages


def whiten(x, mask, centre=True, eps=1e-8):
    """x [B, T] with standard deviation 1 and, with `centre`, mean 0 over the masked-in entries; 0 elsewhere."""
    mean = x[mask].mean()
    std = ((x[mask] - mean) ** 2).mean().sqrt()
    return torch.where(mask, (x - mean * centre) / (std + eps), 0.0)


def importance_weights(logprobs, sampled, mask, cap):
    """min(pi / mu, cap) at each token [B, T], a truncated importance weight (fengyao.notion.site/off-policy-rl). Its sampler mu
    drew it with log-probability `sampled`, the policy gives it `logprobs`. 1 where masked, and everywhere for `cap` 0."""
    if not cap:
        return torch.ones_like(logprobs)
    return torch.where(mask, logprobs - sampled, 0.0).exp().clamp(max=cap)


def kl_estimates(logprobs, ref_logprobs, mask):
    """Per-token estimates [B, T] of KL(pi || pi_ref) at tokens sampled from pi: k1 = log-ratio (unbiased, either sign) and
    k3 = exp(-k1) - 1 + k1 (unbiased, never negative). Masked before exp."""
    k1 = torch.where(mask, logprobs - ref_logprobs, 0.0)
    return k1, torch.expm1(-k1) + k1


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Sum over tokens of the clipped surrogate (1707.06347 eq. 7), and sums for the log: clipped tokens, k3 of old against new,
    ratio. All inputs [B, T]."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    clipped = ((ratio - 1).abs() > clip) & mask
    stats = torch.stack([clipped.sum(), ((ratio - 1 - log_ratio) * mask).sum(), (ratio * mask).sum()])
    return (loss * mask).sum(), stats.detach()


def later_rewards(rewards, mask, gamma):
    """Discounted sum [B, T] of each response's rewards from token t on: GAE with lambda 1 and no value."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def next_beta(beta, kl, target, batch_size, horizon=10_000):
    """Adaptive KL coefficient (1909.08593 section 2.2): proportional, error clipped to 20 %, time constant in responses."""
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * batch_size / horizon)


def main(args: Args) -> None:
    # --- setup
    if args.batch_size % args.mini_batch_size:
        fail(f"--mini-batch-size {args.mini_batch_size} does not divide --batch-size {args.batch_size}")
    run = Run(args)
    device, rank, world = distributed.device(), distributed.rank(), distributed.world()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name)
    ref_name = resolve(args.ref_model or args.model)
    require_same_tokenizer(tokenizer, ref_name, "--ref-model")
    pad, limit = tokenizer.pad_token_id, args.max_response_length
    stops = {stop_token(tokenizer), tokenizer.eos_token_id}
    gvm_name = resolve(args.gvm, "value")
    require_same_tokenizer(tokenizer, gvm_name, "--gvm")

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
    rows = tokenize(rows, tokenizer, (), args.max_prompt_length, limit, args.dataset)
    rows, eval_rows = hold_out_prompts(rows, args.eval_prompts, args.split_seed)
    if not rows:
        fail(
            f"{args.dataset}: all {len(eval_rows)} prompts are held out for evaluation; lower --eval-prompts"
        )

    # --- models
    eval_rewards = [Reward(name, tokenizer, args) for name in args.eval_reward]
    policy = load_model("policy", name, tokenizer, args, trained=True)
    policy.engine, cap = vllm.start(policy, name, args)
    optimizer = adamw(policy, args.lr)
    gvm = load_model("value", gvm_name, tokenizer, args, trained=False)
    if getattr(gvm.config, "gamma", args.gamma) != args.gamma:
        fail(f"--gamma {args.gamma}, but {args.gvm} was trained with {gvm.config.gamma}")
    context_pairs, context_length = (
        getattr(gvm.config, key, 0) for key in ("context_pairs", "context_length")
    )
    reference = load_reference(policy, ref_name, tokenizer, args)
    models, optimizers = [policy, gvm, reference], [optimizer]
    trained = {"policy": (policy, optimizer)}
    if args.offload_frozen:
        offload.park([*models, *(r.model for r in eval_rewards)])
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start, beta = state.get("step", 0), state.get("beta", args.beta)
    pool = state.get("pool", [])  # the policy's earlier answers, for a GVM with context
    check_sampler(policy, tokenizer, [row["prompt_ids"] for row in rows], limit, args.temperature)
    run.start(start, args.steps)

    def score(model, sequences):
        """Log-probabilities [N, T] of the responses under a policy, on every rank."""
        forward = lambda mb: model.response_logprobs(**mb, temperature=args.temperature)[0]
        width = max(len(r) for _, r in sequences)
        return run_micro_batches(forward, sequences, args.micro_batch_size, pad, width, model=model)

    def evaluate(step):
        """The policy on the held-out prompts, sampled with the same random numbers each time."""
        prompts = [row["prompt_ids"] for row in eval_rows]
        responses, _ = rollout(
            policy, tokenizer, prompts, limit, args.temperature, (0, 0), args.rollout_batch_size
        )
        sequences = list(zip(prompts, responses, strict=True))
        mask = response_mask(responses, device)
        kl, _ = kl_estimates(score(policy, sequences), score(reference, sequences), mask)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = {f"eval/{r.label}": r(eval_rows, sequences, texts) for r in eval_rewards}
        out = {key: value.mean() for key, value in scores.items()}
        out |= {"eval/kl": kl.sum(1).mean(), "eval/length": mask.sum(1).float().mean()}
        run.metrics(step, out, show=tuple(out))
        run.samples(
            step,
            [
                {
                    "prompt": row["prompt"],
                    "response": text,
                    "kl": kl[i].sum().item(),
                    "length": len(responses[i]),
                }
                | {key.split("/")[1]: value[i].item() for key, value in scores.items()}
                for i, (row, text) in enumerate(zip(eval_rows[:8], texts, strict=False))
            ],
        )

    if start == 0 and args.eval_every and eval_rows:
        evaluate(0)
    for step in range(start, args.steps):
        # --- rollout
        phases = Phases()
        batch = [rows[i] for i in batch_indices(len(rows), args.batch_size, step, args.seed)]
        prompts = [row["prompt_ids"] for row in batch]
        seed = (args.seed, step + 1)
        responses, sampled = rollout(
            policy, tokenizer, prompts, limit, args.temperature, seed, args.rollout_batch_size, compare=False
        )
        sequences = list(zip(prompts, responses, strict=True))
        lengths = [len(p) + len(r) for p, r in sequences]
        mask = response_mask(responses, device)
        truncated = torch.tensor([r[-1] not in stops for r in responses], device=device)
        phases.end("rollout")

        # --- reward
        logprobs, ref_logprobs = score(policy, sequences), score(reference, sequences)
        kl, k3 = kl_estimates(logprobs, ref_logprobs, mask)
        answers = [{"prompt_ids": p, "response_ids": r} for p, r in sequences]
        contexts = add_context(
            answers, context_pairs, pool or answers, tokenizer, context_length, args.seed + step
        )
        pool = answers if context_pairs else []
        read = [(row["prompt_ids"], row["response_ids"]) for row in contexts]
        values = run_micro_batches(
            lambda mb: response_values(gvm, **mb),
            read,
            args.micro_batch_size,
            pad,
            mask.shape[1] + 1,
            model=gvm,
        )
        if args.log_odds:
            values = torch.atanh(values.clamp(-0.99, 0.99))
        scores = values.gather(1, mask.sum(1, keepdim=True)).squeeze(1)  # Q(s_T, a_T)
        final = scores - args.missing_eos_penalty * truncated

        # --- advantage
        if args.advantage == "gae":
            old_values = values[:, :-1] / args.gamma  # V(s_{t+1}) = Q(s_t, a_t) / gamma
            old_values[:, 0] = values[:, 0]
            advantages = gae(token_rewards(kl, final, mask, beta), old_values, mask, args.gamma, args.lam)
            advantages = whiten(advantages, mask, args.centre)
        else:
            penalties = token_rewards(kl, final - scores, mask, beta)
            advantages = whiten(values[:, 1:], mask) + later_rewards(penalties, mask, args.gamma)
        advantages = advantages * importance_weights(logprobs, sampled, mask, cap)
        phases.end("scoring")

        # --- update
        totals, norms = torch.zeros(5, device=device), []
        lr = learning_rate(step, args.steps, args.lr, args.warmup_steps, args.lr_schedule)
        for epoch in range(args.epochs):
            order = permutation(args.batch_size, step * args.epochs + epoch, args.seed + 1)
            for first in range(0, args.batch_size, args.mini_batch_size):
                mini_batch = order[first : first + args.mini_batch_size]
                tokens = mask[mini_batch].sum()  # over all ranks and micro-batches
                loss = torch.zeros((), device=device)
                picks = micro_batches(mini_batch, lengths, args.micro_batch_size, rank, world)
                for pick in accumulated(picks, policy):
                    mb = collate([sequences[i] for i in pick], pad, device)
                    mb_mask, at = mb["response_mask"], torch.tensor(pick or [0], device=device)
                    mb_old, mb_advantages = (x[at, : mb_mask.shape[1]] for x in (logprobs, advantages))
                    mb_logprobs, mb_entropy = policy.response_logprobs(**mb, temperature=args.temperature)
                    mb_loss, stats = policy_loss(mb_logprobs, mb_old, mb_advantages, mb_mask, args.clip)
                    backward(mb_loss / tokens)
                    loss += mb_loss.detach() / tokens
                    totals += torch.cat([stats, mb_entropy.detach().sum()[None], mb_mask.sum()[None]])
                where = f"step {step}, epoch {epoch}, data rows {[batch[i]['row'] for i in mini_batch]}"
                total, norm = optimizer_step(policy, optimizer, lr, loss, args.max_grad_norm, where)
                norms.append((total, norm))
        clipped, approx_kl, ratio, entropy, count = distributed.all_reduce(totals).tolist()
        phases.end("update")

        # --- log
        done, response_tokens, means = step + 1, int(mask.sum()), torch.tensor(norms).mean(0).tolist()
        note_drift(policy, sampled, logprobs, mask, done)
        metrics = {
            "objective/score": scores.mean(),
            "objective/kl": kl.sum(1).mean(),
            "objective/kl_k3": k3.sum(1).mean(),
            "objective/beta": beta,
            "objective/entropy": entropy / count,
            "rollout/mismatch": kl_estimates(sampled, logprobs, mask)[1].sum() / response_tokens,
            "rollout/length": mask.sum(1).float().mean(),
            "rollout/truncated": truncated.float().mean(),
            "policy/loss": means[0],
            "policy/grad_norm": means[1],
            "policy/clip_fraction": clipped / count,
            "policy/approx_kl": approx_kl / count,
            "policy/ratio": ratio / count,
            "policy/lr": lr,
            "gvm/value": values[:, 1:][mask].mean(),
            "gvm/value_std": values[:, 1:][mask].std(),
            "gvm/start": values[:, 0].mean(),
            "memory/state_gb": state_bytes(models, optimizers) / 2**30,
            **phases.metrics(policy, response_tokens, args.epochs * sum(lengths)),
        }
        run.metrics(done, metrics, show=("objective/score", "objective/kl", "rollout/length"))
        if args.kl_target:
            beta = next_beta(beta, float(kl[mask].mean()), args.kl_target, args.batch_size)
        if args.eval_every and eval_rows and done % args.eval_every == 0 and done < args.steps:
            evaluate(done)

        # --- save
        if args.save_every and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(args.run_dir, done, trained, {"beta": beta, "pool": pool}, args.keep)
    if args.eval_every and eval_rows:
        evaluate(args.steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision)
    run.close()


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
