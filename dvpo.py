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
from common.batches import batch_indices, collate, micro_batches, run_micro_batches
from common.checkpoints import export, load_checkpoint, save_checkpoint
from common.cli import fail, parse
from common.context import add_context
from common.data import prompt_hash, read_rows
from common.log import Run
from common.meter import Phases, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.pretrained import resolve
from common.reference import load_reference
from common.rewards import Reward
from common.rollout import check_sampler, note_drift, rollout
from common.tokenization import check_same_tokenizer, load_tokenizer, stop_token, tokenize
from common.value_heads import response_values


@dataclass
class Args:
    model: str = "reviews"
    """policy to start from, usually an SFT model: folder or hub id"""
    ref_model: str = ""
    """reference of the KL penalty; default: `--model` as it starts"""
    gvm: str = "reviews"
    """Global Value Model from gvm_td.py: folder or hub id, with the policy's tokenizer; frozen"""
    dataset: str = "reviews"
    """prompts: hub id, or local .jsonl / .json / .parquet (.gz too) with a column `prompt`"""
    split: str = "train"
    """the hub's split, or the value to keep of a local file's `split` column"""
    columns: dict[str, str] = field(default_factory=dict)
    """our column names and yours, e.g. `--columns prompt question`"""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """share of the prompts: 30 % sft, 50 % value, 20 % rl, disjoint (2502.16944)"""
    split_seed: int = 0
    """seed of `--part`; the same in every script"""
    skip_bad_rows: bool = False
    """drop and count unusable rows instead of stopping at the first"""
    run_dir: str = "runs/dvpo"
    """metrics, samples, checkpoints and the exported model go here"""
    seed: int = 0
    """seed of data order and sampling"""
    steps: int = 1000
    """RL steps: one rollout of `batch-size` and `epochs` passes over it"""
    batch_size: int = 8
    """responses a step, over all ranks (2502.16944: 8)"""
    mini_batch_size: int = 2
    """responses an optimizer step, over all ranks (2502.16944: 2)"""
    micro_batch_size: int = 2
    """responses a forward pass, a rank; changes memory and speed, not the result"""
    rollout_batch_size: int = 0
    """prompts generated at once, a rank; 0: all of the step's"""
    rollout_engine: Literal["torch", "vllm"] = "torch"
    """torch: our own loop; vllm: vLLM in each process, the policy's weights copied into it before each rollout"""
    vllm_cache_gb: float = 4.0
    """GiB of keys and values that vLLM reserves on each GPU, beside its copy of the weights"""
    importance_cap: float = 2.0
    """with vllm: min(policy / sampler, cap) weights each token's advantage; 0: no such weight"""
    epochs: int = 4
    """passes over each rollout (2502.16944: 4)"""
    max_prompt_length: int = 1024
    """tokens; longer prompts are dropped and counted"""
    max_response_length: int = 1024
    """tokens; responses are cut off there (2502.16944: 1024)"""
    temperature: float = 1.0
    """of sampling, and of every log-probability"""
    lr: float = 2e-6
    """peak learning rate of the policy (2502.16944: 2e-6)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """after the warm-up"""
    warmup_steps: int = 10
    """RL steps of linear warm-up"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    beta: float = 0.05
    """KL coefficient (2502.16944 v3: 0.05)"""
    kl_target: float = 0.0
    """mean KL a token, in nats, that an adaptive beta aims at (2502.16944 v1: 0.1, from beta 0.2); 0: beta is fixed"""
    advantage: Literal["gae", "q"] = "gae"
    """gae: 2502.16944 v3, advantage over the state's value; q: v1, whitened action values (docs/dvpo.md: less stable)"""
    centre: bool = False
    """subtract the batch's mean from GAE advantages, as PPO does; a frozen GVM is better without (docs/dvpo.md)"""
    log_odds: bool = False
    """for a GVM trained on +1 / -1: use atanh(V), half the log-odds of being the chosen answer, which does not level off"""
    gamma: float = 1.0
    """discount; a GVM must have been trained with the same"""
    lam: float = 0.95
    """lambda of GAE"""
    clip: float = 0.2
    """of the probability ratio (2502.16944: 0.2)"""
    missing_eos_penalty: float = 0.0
    """subtracted from the reward of a response cut off by the length limit"""
    eval_every: int = 50
    """steps between evaluations on held-out prompts (also before the first and after the last); 0: none"""
    eval_prompts: int = 64
    """prompts held out of training for evaluation"""
    eval_reward: tuple[str, ...] = ()
    """what to report there: reward models or `module:function`s; never trained on"""
    save_every: int = 50
    """steps between checkpoints for --resume; 0: none"""
    keep: int = 2
    """checkpoints kept"""
    resume: bool = False
    """go on from the newest checkpoint of --run-dir; from the start where there is none"""
    overwrite: bool = False
    """replace an earlier run in --run-dir"""
    wandb: bool = False
    """also log to Weights & Biases (offline without WANDB_API_KEY)"""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """compute type; auto: bf16 on a GPU, float32 on a CPU; master weights are float32"""
    lora_rank: int = 0
    """rank of LoRA adapters on every linear layer, through peft; 0: all weights are trained"""
    lora_alpha: float = 32.0
    """their scale is alpha / rank (2502.16944 v1, reward model and GVM: rank 8, alpha 32, dropout 0.1)"""
    lora_dropout: float = 0.0
    """of their input, in the update alone"""
    lora_merge: bool = True
    """export the merged model; --no-lora-merge: the adapters alone, for peft"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, a third more time"""
    offload_frozen: bool = False
    """keep frozen models in the host's memory but for the passes that read them"""
    shard_size: int = 0
    """ranks a model is sharded over (HSDP: replicas of it across nodes); 0: all"""


# What works on the embedded world of 0.1 M parameters; a flag on the command line wins.
REVIEWS = dict(
    part="rl", steps=40, batch_size=256, mini_batch_size=64, micro_batch_size=64, max_prompt_length=16,
    max_response_length=32, beta=0.1, lr=3e-4, warmup_steps=0, eval_every=10, eval_prompts=96, save_every=20,
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)  # fmt: skip




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
    check_same_tokenizer(tokenizer, ref_name, "--ref-model")
    pad, limit = tokenizer.pad_token_id, args.max_response_length
    stops = {stop_token(tokenizer), tokenizer.eos_token_id}
    gvm_name = resolve(args.gvm, "value")
    check_same_tokenizer(tokenizer, gvm_name, "--gvm")

    # --- data
    rows = read_rows(
        args.dataset, "prompts", split=args.split, columns=args.columns, part=args.part, split_seed=args.split_seed,
        skip_bad_rows=args.skip_bad_rows,
    )  # fmt: skip
    rows = tokenize(rows, tokenizer, (), args.max_prompt_length, limit, args.dataset)
    rows.sort(key=lambda row: prompt_hash(row["prompt"], args.split_seed + 1))
    eval_rows = rows[: args.eval_prompts]
    rows = rows[len(eval_rows) :]
    if not rows:
        fail(f"{args.dataset}: all {len(eval_rows)} prompts are held out for evaluation; lower --eval-prompts")

    # --- models
    eval_rewards = [Reward(name, tokenizer, args) for name in args.eval_reward]
    policy = load_model("policy", name, tokenizer, args, trained=True)
    policy.engine, cap = vllm.start(policy, name, args)
    optimizer = adamw(policy, args.lr)
    gvm = load_model("value", gvm_name, tokenizer, args, trained=False)
    if getattr(gvm.config, "gamma", args.gamma) != args.gamma:
        fail(f"--gamma {args.gamma}, but {args.gvm} was trained with {gvm.config.gamma}")
    context_pairs, context_length = (getattr(gvm.config, key, 0) for key in ("context_pairs", "context_length"))
    reference = load_reference(policy, ref_name, tokenizer, args)
    models, optimizers = [policy, gvm, reference], [optimizer]
    trained = {"policy": (policy, optimizer)}
    offload.park(args.offload_frozen, [*models, *(r.model for r in eval_rewards)])
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start, beta = state.get("step", 0), state.get("beta", args.beta)
    pool = state.get("pool", [])  # the policy's earlier answers, for a GVM with context
    check_sampler(policy, tokenizer, [row["prompt_ids"] for row in rows], limit, args.temperature)
    run.start(start, args.steps)

    def score(model, sequences):
        """Log-probabilities [N, T] of the responses under a policy, on every rank."""
        forward = lambda mb: model.response_logprobs(**mb, temperature=args.temperature)[0]  # noqa: E731
        width = max(len(r) for _, r in sequences)
        return run_micro_batches(forward, sequences, args.micro_batch_size, pad, width, model=model)

    def evaluate(step):
        """The policy on the held-out prompts, sampled with the same random numbers each time."""
        prompts = [row["prompt_ids"] for row in eval_rows]
        responses, _ = rollout(policy, tokenizer, prompts, limit, args.temperature, (0, 0), args.rollout_batch_size)
        sequences = list(zip(prompts, responses, strict=True))
        mask = collate(sequences, pad, device)["response_mask"]
        kl, _ = kl_estimates(score(policy, sequences), score(reference, sequences), mask)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = {f"eval/{r.label}": r(eval_rows, sequences, texts) for r in eval_rewards}
        out = {key: value.mean() for key, value in scores.items()}
        out |= {"eval/kl": kl.sum(1).mean(), "eval/length": mask.sum(1).float().mean()}
        run.metrics(step, out, show=tuple(out))
        run.samples(step, [
            {"prompt": row["prompt"], "response": text, "kl": kl[i].sum().item(), "length": len(responses[i])}
            | {key.split("/")[1]: value[i].item() for key, value in scores.items()}
            for i, (row, text) in enumerate(zip(eval_rows[:8], texts, strict=False))
        ])  # fmt: skip

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
        mask = collate(sequences, pad, device)["response_mask"]
        truncated = torch.tensor([r[-1] not in stops for r in responses], device=device)
        phases.end("rollout")

        # --- reward
        logprobs, ref_logprobs = score(policy, sequences), score(reference, sequences)
        kl, k3 = kl_estimates(logprobs, ref_logprobs, mask)
        answers = [{"prompt_ids": p, "response_ids": r} for p, r in sequences]
        contexts = add_context(answers, context_pairs, pool or answers, tokenizer, context_length, args.seed + step)
        pool = answers if context_pairs else []
        read = [(row["prompt_ids"], row["response_ids"]) for row in contexts]
        values = run_micro_batches(
            lambda mb: response_values(gvm, **mb), read, args.micro_batch_size, pad, mask.shape[1] + 1, model=gvm
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
            order = batch_indices(args.batch_size, args.batch_size, step * args.epochs + epoch, args.seed + 1)
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
            "objective/score": scores.mean(), "objective/kl": kl.sum(1).mean(), "objective/kl_k3": k3.sum(1).mean(),
            "objective/beta": beta, "objective/entropy": entropy / count,
            "rollout/mismatch": kl_estimates(sampled, logprobs, mask)[1].sum() / response_tokens,
            "rollout/length": mask.sum(1).float().mean(), "rollout/truncated": truncated.float().mean(),
            "policy/loss": means[0], "policy/grad_norm": means[1], "policy/clip_fraction": clipped / count,
            "policy/approx_kl": approx_kl / count, "policy/ratio": ratio / count, "policy/lr": lr,
            "gvm/value": values[:, 1:][mask].mean(), "gvm/value_std": values[:, 1:][mask].std(), "gvm/start": values[:, 0].mean(),
            "memory/state_gb": state_bytes(models, optimizers) / 2**30,
            **phases.metrics(policy, response_tokens, args.epochs * sum(lengths)),
        }  # fmt: skip
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
