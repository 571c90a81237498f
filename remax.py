"""ReMax: REINFORCE whose baseline is the reward of the policy's own greedy response. No critic, one sample a prompt.

Paper: 2310.10505 (algorithm 1); the KL is charged as in ppo.py. For a sampled response y and the greedy one g to the same
prompt, both from one rollout:

    A_t = r(x, y) - r(x, g) - beta * sum_{l >= t} kl_l,  kl_l = log pi(y_l|s_l) - log pi_ref(y_l|s_l)
    loss = -mean over tokens of A_t log pi(y_t|s_t)

Differences from grpo.py: (1) the baseline is the greedy response's reward, not a group's mean, and nothing is divided by a
deviation; (2) the KL is a penalty on the rewards of the tokens that follow, not a term of the loss; (3) the mean over tokens
has a constant denominator, as the paper's sum has. The loss is written with PPO's ratio, whose gradient at ratio 1 is ReMax's, so
that more than one optimizer step on a rollout (--mini-batch-size, --epochs) is possible.

    python remax.py                                                    # the embedded world, one CPU
    python remax.py --model runs/sft/model --reward runs/reward/model --dataset prompts.jsonl
    torchrun --nproc_per_node=8 remax.py --model Qwen/Qwen3-4B-Instruct-2507 --reward my_rewards:correct \
        --dataset questions.jsonl --columns prompt question --batch-size 256 --mini-batch-size 256 --gradient-checkpointing

Watch `eval/*` and read samples.jsonl; `objective/greedy_score` should rise with `objective/score`;
`rollout/length` should neither collapse nor explode. Our page in docs/ explains every number and detail.
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


@dataclass
class Args:
    model: str = "reviews"
    """Model to start from: a hub id or a local folder, usually the SFT policy. `reviews` is the embedded one."""
    ref_model: str = ""
    """Reference policy: a hub id or folder. By default it is `--model` as it starts."""
    reward: str = ""
    """Reward model (hub id or folder) or `module:function` that scores responses; in gvm_td.py its scores
    replace the data set's returns."""
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
    run_dir: str = "runs/remax"
    """Folder of the run: arguments, metrics, samples, checkpoints, the exported model."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    steps: int = 1000
    """RL steps, each one rollout of `--batch-size` responses and `--epochs` passes over it."""
    batch_size: int = 64
    """Responses (in preference data: pairs) per step, over all ranks."""
    mini_batch_size: int = 64
    """Responses per optimizer step, over all ranks."""
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
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a cosine."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    beta: float = 0.05
    """Coefficient of the KL penalty (2502.16944 v3: 0.05). In remax.py, 0 loads no reference."""
    aggregation: Literal["grpo", "dr_grpo", "dapo"] = "dr_grpo"
    """How token losses are averaged. grpo: over each response, then over responses; dapo: over all tokens at
    once; dr_grpo: over a constant."""
    clip: float = 0.2
    """Clip range of the probability ratio below 1."""
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
    mini_batch_size=256,
    micro_batch_size=64,
    max_prompt_length=16,
    max_response_length=32,
    lr=3e-3,
    warmup_steps=0,
    eval_every=10,
    eval_prompts=96,
    save_every=20,
    reward="assets.reviews:reward",
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def remax_advantages(rewards, greedy_rewards, kl, mask, beta):
    """r(x, y) - r(x, greedy) less beta times the KL of this and the later tokens, [B, T]; rewards [B], kl and mask [B, T]
    (2310.10505)."""
    later = torch.where(mask, kl, 0.0).flip(1).cumsum(1).flip(1)
    return torch.where(mask, (rewards - greedy_rewards)[:, None] - beta * later, 0.0)


def token_weights(mask, aggregation, max_length):
    """Weights [N, T] of the tokens of a mini-batch in its loss, mask [N, T]: `grpo` 1 / (N * length), `dapo` 1 / all tokens,
    `dr_grpo` 1 / (N * max_length). Of the whole mini-batch, so neither ranks nor micro-batches change them."""
    whole = {
        "grpo": len(mask) * mask.sum(1, keepdim=True),
        "dapo": mask.sum(),
        "dr_grpo": len(mask) * max_length,
    }[aggregation]
    return mask / whole


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


def surrogate_loss(logprobs, old_logprobs, advantages, weights, mask, clip, clip_high):
    """Weighted sum over tokens of the clipped surrogate (2402.03300 eq. 3), and sums for the log: clipped tokens, k3 of old
    against new, ratio. All inputs [B, T]; advantages may be [B, 1]."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip_high))
    clipped = ((ratio < 1 - clip) | (ratio > 1 + clip_high)) & mask
    stats = torch.stack([clipped.sum(), ((ratio - 1 - log_ratio) * mask).sum(), (ratio * mask).sum()])
    return (loss * weights * mask).sum(), stats.detach()


def main(args: Args) -> None:
    # --- setup
    if args.batch_size % args.mini_batch_size:
        fail(f"--mini-batch-size {args.mini_batch_size} does not divide --batch-size {args.batch_size}")
    if args.beta < 0 or not (0 < args.clip < 1 and args.clip_high > 0):
        given = f"--beta {args.beta}, --clip {args.clip}, --clip-high {args.clip_high}"
        fail(f"{given}: beta must not be negative, clip in (0, 1), clip_high above 0")
    run = Run(args)
    device, rank, world = distributed.device(), distributed.rank(), distributed.world()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name)
    ref_name = resolve(args.ref_model or args.model)
    require_same_tokenizer(tokenizer, ref_name, "--ref-model")
    pad, limit = tokenizer.pad_token_id, args.max_response_length
    stops = {stop_token(tokenizer), tokenizer.eos_token_id}

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
    reward = Reward(args.reward, tokenizer, args)
    eval_rewards = [Reward(name, tokenizer, args) for name in args.eval_reward]
    policy = load_model("policy", name, tokenizer, args, trained=True)
    policy.engine, cap = vllm.start(policy, name, args)
    optimizer = adamw(policy, args.lr)
    reference = load_reference(policy, ref_name, tokenizer, args) if args.beta else None
    models = [model for model in (policy, reference, reward.model) if model is not None]
    if args.offload_frozen:
        offload.park([*models, *(r.model for r in eval_rewards)])
    state = load_checkpoint(args.run_dir, {"policy": (policy, optimizer)}) if args.resume else {}
    start = state.get("step", 0)
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
        mask = response_mask([r for _, r in sequences], device)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = {f"eval/{r.label}": r(eval_rows, sequences, texts) for r in eval_rewards}
        out = {key: value.mean() for key, value in scores.items()}
        out["eval/length"] = mask.sum(1).float().mean()
        if reference is not None:
            kl, _ = kl_estimates(score(policy, sequences), score(reference, sequences), mask)
            scores["eval/kl"] = kl.sum(1)
            out["eval/kl"] = kl.sum(1).mean()
        run.metrics(step, out, show=tuple(out))
        run.samples(
            step,
            [
                {"prompt": row["prompt"], "response": text, "length": len(responses[i])}
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
        heat = [args.temperature] * len(prompts) + [0.0] * len(prompts)  # sampled and greedy in one call
        seed = (args.seed, step + 1)
        responses, sampled = rollout(
            policy, tokenizer, prompts * 2, limit, heat, seed, args.rollout_batch_size, compare=False
        )
        sequences, greedy = (
            list(zip(prompts, r, strict=True)) for r in (responses[: len(batch)], responses[len(batch) :])
        )
        lengths = [len(p) + len(r) for p, r in sequences]
        mask = response_mask([r for _, r in sequences], device)
        sampled = sampled[: len(batch), : mask.shape[1]]
        truncated = torch.tensor([r[-1] not in stops for r in responses], device=device).split(len(batch))
        phases.end("rollout")

        # --- reward
        logprobs = score(policy, sequences)
        ref_logprobs = logprobs if reference is None else score(reference, sequences)
        kl, k3 = kl_estimates(logprobs, ref_logprobs, mask)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores, greedy_scores = reward(batch * 2, sequences + greedy, texts).split(len(batch))

        # --- advantage
        final, baseline = (
            s - args.missing_eos_penalty * t for s, t in zip((scores, greedy_scores), truncated, strict=True)
        )
        advantages = remax_advantages(final, baseline, kl, mask, args.beta) * importance_weights(
            logprobs, sampled, mask, cap
        )
        phases.end("scoring")

        # --- update
        totals, norms = torch.zeros(5, device=device), []
        lr = learning_rate(step, args.steps, args.lr, args.warmup_steps, args.lr_schedule)
        for epoch in range(args.epochs):
            order = permutation(args.batch_size, step * args.epochs + epoch, args.seed + 1)
            for first in range(0, args.batch_size, args.mini_batch_size):
                mini_batch = order[first : first + args.mini_batch_size]
                weights = torch.zeros_like(logprobs)
                weights[mini_batch] = token_weights(
                    mask[mini_batch], args.aggregation, limit
                )  # over all ranks and micro-batches
                loss = torch.zeros((), device=device)
                picks = micro_batches(mini_batch, lengths, args.micro_batch_size, rank, world)
                for pick in accumulated(picks, policy):
                    mb = collate([sequences[i] for i in pick], pad, device)
                    mb_mask, at = mb["response_mask"], torch.tensor(pick or [0], device=device)
                    mb_old, mb_weights, mb_advantages = (
                        x[at, : mb_mask.shape[1]] for x in (logprobs, weights, advantages)
                    )
                    mb_logprobs, mb_entropy = policy.response_logprobs(**mb, temperature=args.temperature)
                    clips = args.clip, args.clip_high
                    mb_loss, stats = surrogate_loss(
                        mb_logprobs, mb_old, mb_advantages, mb_weights, mb_mask, *clips
                    )
                    backward(mb_loss)
                    loss += mb_loss.detach()
                    totals += torch.cat([stats, mb_entropy.detach().sum()[None], mb_mask.sum()[None]])
                where = f"step {step}, epoch {epoch}, data rows {[batch[i]['row'] for i in mini_batch]}"
                norms.append(optimizer_step(policy, optimizer, lr, loss, args.max_grad_norm, where))
        clipped, approx_kl, ratio, entropy, count = distributed.all_reduce(totals).tolist()
        phases.end("update")

        # --- log
        done, response_tokens, means = step + 1, int(mask.sum()), torch.tensor(norms).mean(0).tolist()
        note_drift(policy, sampled, logprobs, mask, done)
        metrics = {
            "objective/score": scores.mean(),
            "objective/kl": kl.sum(1).mean(),
            "objective/kl_k3": k3.sum(1).mean(),
            "objective/entropy": entropy / count,
            "objective/greedy_score": greedy_scores.mean(),
            "rollout/mismatch": kl_estimates(sampled, logprobs, mask)[1].sum() / response_tokens,
            "rollout/length": mask.sum(1).float().mean(),
            "rollout/truncated": truncated[0].float().mean(),
            "policy/loss": means[0],
            "policy/grad_norm": means[1],
            "policy/clip_fraction": clipped / count,
            "policy/approx_kl": approx_kl / count,
            "policy/ratio": ratio / count,
            "policy/lr": lr,
            "memory/state_gb": state_bytes(models, [optimizer]) / 2**30,
            **phases.metrics(policy, response_tokens, args.epochs * sum(lengths)),
        }
        run.metrics(done, metrics, show=("objective/score", "objective/kl", "rollout/length"))
        if args.eval_every and eval_rows and done % args.eval_every == 0 and done < args.steps:
            evaluate(done)

        # --- save
        if args.save_every and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(args.run_dir, done, {"policy": (policy, optimizer)}, {}, args.keep)
    if args.eval_every and eval_rows:
        evaluate(args.steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision)
    run.close()


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
