"""Supervised fine-tuning: the policy every other script starts from.

Maximises the likelihood of the responses; the loss is on response tokens only, the end-of-answer token included:

    loss = -mean over response tokens of log pi(y_t | x, y_<t)

    python sft.py                                                      # the embedded world, one CPU
    python sft.py --model HuggingFaceTB/SmolLM2-135M --dataset answers.jsonl
    torchrun --nproc_per_node=8 sft.py --model meta-llama/Llama-3.2-3B --dataset openbmb/UltraFeedback --part sft \
        --micro-batch-size 2 --gradient-checkpointing

Watch `eval/loss`: where it rises while `sft/loss` falls, there are too many epochs. Read samples.jsonl. docs/sft.md explains
the rest.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from common import distributed
from common.batches import batch_indices, collate, micro_batches, run_micro_batches
from common.checkpoints import export, load_checkpoint, save_checkpoint
from common.cli import fail, note, parse
from common.data import hold_out, read_rows
from common.log import Run
from common.meter import mfu, peak_memory_gb, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.pretrained import resolve
from common.rewards import Reward
from common.rollout import check_sampler, rollout
from common.tokenization import load_tokenizer, tokenize


@dataclass
class Args:
    model: str = "reviews"
    """model to start from: folder or hub id"""
    dataset: str = "reviews"
    """prompt, response (or completion): hub id, or local .jsonl / .json / .parquet (.gz too)"""
    split: str = "train"
    """the hub's split, or the value to keep of a local file's `split` column"""
    eval_dataset: str = ""
    """held-out data; default: `--eval-fraction` of the prompts of `--dataset`"""
    eval_split: str = "test"
    """split of --eval-dataset"""
    eval_fraction: float = 0.05
    """share of the prompts held out where there is no --eval-dataset"""
    columns: dict[str, str] = field(default_factory=dict)
    """our column names and yours, e.g. `--columns prompt question response answer`"""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """share of the prompts: 30 % sft, 50 % value, 20 % rl, disjoint (2502.16944)"""
    split_seed: int = 0
    """seed of `--part` and of the held-out prompts; the same in every script"""
    skip_bad_rows: bool = False
    """drop and count unusable rows instead of stopping at the first"""
    run_dir: str = "runs/sft"
    """metrics, samples, checkpoints and the exported model go here"""
    seed: int = 0
    """seed of the data order"""
    epochs: int = 3
    """passes over the data (2502.16944: 3)"""
    steps: int = 0
    """optimizer steps; 0: what `--epochs` gives"""
    batch_size: int = 16
    """responses an optimizer step, over all ranks (2502.16944: 16)"""
    micro_batch_size: int = 4
    """responses a forward pass, a rank; changes memory and speed, not the result"""
    max_prompt_length: int = 1024
    """tokens; longer prompts are dropped and counted"""
    max_response_length: int = 1024
    """tokens; longer responses are cut"""
    lr: float = 2e-5
    """peak learning rate (2502.16944: 2e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """after the warm-up (2502.16944: cosine)"""
    warmup_steps: int = 10
    """optimizer steps of linear warm-up"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    temperature: float = 1.0
    """of the samples"""
    eval_every: int = 100
    """optimizer steps between evaluations (also after the last); 0: only after the last"""
    eval_prompts: int = 16
    """held-out prompts to sample answers to"""
    eval_reward: tuple[str, ...] = ()
    """what to report of those: reward models or `module:function`s"""
    save_every: int = 200
    """optimizer steps between checkpoints for --resume; 0: none"""
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
    shard_size: int = 0
    """ranks a model is sharded over (HSDP: replicas of it across nodes); 0: all"""


# What works on the embedded world of 0.1 M parameters; a flag on the command line wins.
REVIEWS = dict(
    eval_fraction=0.2, part="sft", steps=500, batch_size=64, micro_batch_size=64, max_prompt_length=16, max_response_length=32,
    lr=6e-3, eval_every=250, eval_prompts=64, save_every=100,
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)  # fmt: skip




def nll_loss(logprobs, mask):
    """Sum over response tokens of the negative log-likelihood; logprobs and mask [B, T]."""
    return -(logprobs * mask).sum()


def main(args: Args) -> None:
    # --- setup
    run = Run(args)
    device, rank, world = distributed.device(), distributed.rank(), distributed.world()
    name = resolve(args.model, "untrained")
    tokenizer = load_tokenizer(name)
    pad = tokenizer.pad_token_id

    # --- data
    def read(dataset, split, part):
        reader = dict(columns=args.columns, split_seed=args.split_seed, skip_bad_rows=args.skip_bad_rows)
        return read_rows(dataset, "sft", split=split, part=part, **reader)

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
    sequences, eval_sequences = ([(row["prompt_ids"], row["response_ids"]) for row in part] for part in (rows, held_out))
    eval_rows = list({str(row["prompt"]): row for row in held_out}.values())[: args.eval_prompts]
    lengths = [len(p) + len(r) for p, r in sequences]
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    note(f"{len(rows)} responses to learn from, {len(held_out)} held out, {steps} steps")

    # --- models
    eval_rewards = [Reward(name, tokenizer, args) for name in args.eval_reward]
    policy = load_model("policy", name, tokenizer, args, trained=True)
    optimizer = adamw(policy, args.lr)
    state = load_checkpoint(args.run_dir, {"policy": (policy, optimizer)}) if args.resume else {}
    start = state.get("step", 0)
    check_sampler(policy, tokenizer, [row["prompt_ids"] for row in eval_rows], args.max_response_length, args.temperature)
    run.start(start, steps)

    def evaluate(step):
        width = max(len(r) for _, r in eval_sequences)
        forward = lambda mb: policy.response_logprobs(**mb)[0]  # noqa: E731
        logprobs = run_micro_batches(forward, eval_sequences, args.micro_batch_size, pad, width)
        out = {"eval/loss": -logprobs.sum() / sum(len(r) for _, r in eval_sequences)}
        prompts = [row["prompt_ids"] for row in eval_rows]
        responses, _ = rollout(policy, tokenizer, prompts, args.max_response_length, args.temperature, (0, 0))
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = {r.label: r(eval_rows, list(zip(prompts, responses, strict=True)), texts) for r in eval_rewards}
        out |= {f"eval/{key}": value.mean() for key, value in scores.items()}
        out["eval/length"] = sum(map(len, responses)) / max(1, len(responses))
        run.metrics(step, out, show=tuple(out))
        run.samples(step, [
            {"prompt": row["prompt"], "response": text, "length": len(responses[i])} | {k: v[i].item() for k, v in scores.items()}
            for i, (row, text) in enumerate(zip(eval_rows[:8], texts, strict=False))
        ])  # fmt: skip

    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        count = sum(len(sequences[i][1]) for i in batch)  # over all ranks and micro-batches
        loss = torch.zeros((), device=device)
        picks = micro_batches(batch, lengths, args.micro_batch_size, rank, world)
        for pick in accumulated(picks, policy):
            mb = collate([sequences[i] for i in pick], pad, device)
            logprobs, _ = policy.response_logprobs(**mb)
            mb_loss = nll_loss(logprobs, mb["response_mask"])
            backward(mb_loss / count)
            loss += mb_loss.detach() / count
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        total, norm = optimizer_step(policy, optimizer, lr, loss, args.max_grad_norm, where)

        # --- log
        done, seconds, tokens = step + 1, time.perf_counter() - clock, sum(lengths[i] for i in batch)
        run.metrics(done, {
            "sft/loss": total, "sft/grad_norm": norm, "sft/lr": lr, "time/step_s": seconds,
            "perf/update_tokens_per_s": tokens / seconds, "memory/state_gb": state_bytes([policy], [optimizer]) / 2**30,
            "memory/peak_gb": peak_memory_gb(), **mfu(policy, tokens, seconds),
        }, show=("sft/loss",))  # fmt: skip
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate(done)

        # --- save
        if args.save_every and (done % args.save_every == 0 or done == steps):
            save_checkpoint(args.run_dir, done, {"policy": (policy, optimizer)}, {}, args.keep)
    evaluate(steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision)
    run.close()


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
