"""A scalar reward model from preference pairs: Bradley-Terry.

Trains `AutoModelForSequenceClassification` with one label, the form most reward models on the hub have, to

    loss = -mean over pairs of log sigmoid(r(x, chosen) - r(x, rejected))                                (2203.02155 eq. 1)

The exported config carries `score_mean` and `score_std` over the training responses (of at most 500 pairs); ppo.py and
gvm_td.py then use standardised scores, so that KL coefficients mean the same beside any of them.

    python reward.py                                                   # the embedded world, one CPU
    python reward.py --model runs/sft/model --dataset pairs.jsonl
    torchrun --nproc_per_node=8 reward.py --model meta-llama/Llama-3.2-3B-Instruct --dataset openbmb/UltraFeedback \
        --part value --micro-batch-size 2 --gradient-checkpointing

Watch `eval/accuracy` against `baseline/length`; a training loss far below the held-out one is over-fitting (two epochs are
already many). docs/reward.md explains the rest.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

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
from common.tokenization import load_tokenizer, tokenize
from common.value_heads import sequence_scores


@dataclass
class Args:
    model: str = "reviews"
    """backbone, usually the SFT policy: folder or hub id"""
    dataset: str = "reviews"
    """prompt, chosen, rejected: hub id, or local .jsonl / .json / .parquet (.gz too)"""
    split: str = "train"
    """the hub's split, or the value to keep of a local file's `split` column"""
    eval_dataset: str = ""
    """held-out pairs; default: `--eval-fraction` of the prompts of `--dataset`"""
    eval_split: str = "test"
    """split of --eval-dataset"""
    eval_fraction: float = 0.05
    """share of the prompts held out where there is no --eval-dataset"""
    columns: dict[str, str] = field(default_factory=dict)
    """our column names and yours, e.g. `--columns chosen better rejected worse`"""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """share of the prompts: 30 % sft, 50 % value, 20 % rl, disjoint (2502.16944)"""
    split_seed: int = 0
    """seed of `--part` and of the held-out prompts; the same in every script"""
    skip_bad_rows: bool = False
    """drop and count unusable rows instead of stopping at the first"""
    layers: int = 0
    """keep only the backbone's first N layers; 0: all"""
    run_dir: str = "runs/reward"
    """metrics, checkpoints and the exported model go here"""
    seed: int = 0
    """seed of the data order"""
    epochs: int = 2
    """passes over the data (2502.16944: 2)"""
    steps: int = 0
    """optimizer steps; 0: what `--epochs` gives"""
    batch_size: int = 32
    """pairs an optimizer step, over all ranks"""
    micro_batch_size: int = 4
    """pairs a forward pass, a rank; changes memory and speed, not the result"""
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped and counted"""
    max_response_length: int = 512
    """tokens; longer responses are cut"""
    lr: float = 2e-5
    """peak learning rate (2502.16944: 2e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """after the warm-up (2502.16944: linear)"""
    warmup_steps: int = 10
    """optimizer steps of linear warm-up"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    eval_every: int = 100
    """optimizer steps between evaluations (also after the last); 0: only after the last"""
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
    eval_fraction=0.2, part="value", steps=200, batch_size=64, micro_batch_size=64, max_prompt_length=16,
    max_response_length=32, lr=2e-3, eval_every=100, save_every=100,
)  # fmt: skip




def bradley_terry_loss(chosen, rejected):
    """Sum over pairs of -log sigmoid(chosen - rejected), scores [B] each (2203.02155 eq. 1)."""
    return -F.logsigmoid(chosen - rejected).sum()


def main(args: Args) -> None:
    # --- setup
    run = Run(args)
    device, rank, world = distributed.device(), distributed.rank(), distributed.world()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name)
    pad = tokenizer.pad_token_id

    # --- data
    def read(dataset, split, part):
        reader = dict(columns=args.columns, split_seed=args.split_seed, skip_bad_rows=args.skip_bad_rows)
        return read_rows(dataset, "preference", split=split, part=part, **reader)

    rows = read(args.dataset, args.split, args.part)
    if args.eval_dataset:
        held_out = read(args.eval_dataset, args.eval_split, "all")
    else:
        rows, held_out = hold_out(rows, args.eval_fraction, args.split_seed)
    if not rows or not held_out:
        counts = f"{len(rows)} pairs to learn from, {len(held_out)} held out"
        fail(f"{args.dataset}: {counts}; change --eval-fraction or give --eval-dataset")
    rows, held_out = (
        tokenize(part, tokenizer, ("chosen", "rejected"), args.max_prompt_length, args.max_response_length, dataset)
        for part, dataset in ((rows, args.dataset), (held_out, args.eval_dataset or args.dataset))
    )

    def sides(rows):
        """The sequences of the pairs: chosen, rejected, chosen, ..."""
        return [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]

    sequences, eval_sequences = sides(rows), sides(held_out)
    lengths = [max(sum(map(len, pair)) for pair in sequences[2 * i : 2 * i + 2]) for i in range(len(rows))]
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    note(f"{len(rows)} pairs to learn from, {len(held_out)} held out, {steps} steps")

    # --- models
    model = load_model("reward", name, tokenizer, args, trained=True, layers=args.layers)
    optimizer = adamw(model, args.lr)
    state = load_checkpoint(args.run_dir, {"model": (model, optimizer)}) if args.resume else {}
    start = state.get("step", 0)
    run.start(start, steps)

    def predict(sequences):
        """Scores [N] of all sequences, on every rank."""
        return run_micro_batches(lambda mb: sequence_scores(model, **mb), sequences, 2 * args.micro_batch_size, pad, 1)[:, 0]

    def evaluate(step):
        scores = predict(eval_sequences)
        chosen, rejected = scores[::2], scores[1::2]
        metrics = {
            "eval/accuracy": (chosen > rejected).float().mean(), "eval/loss": bradley_terry_loss(chosen, rejected) / len(chosen),
            "eval/margin": (chosen - rejected).mean(),
            "baseline/length": np.mean([len(row["chosen"]) > len(row["rejected"]) for row in held_out]),
        }  # fmt: skip
        run.metrics(step, metrics, show=("eval/accuracy", "eval/loss"))
        run.samples(step, [
            {key: row[key] for key in ("prompt", "chosen", "rejected")} | {"chosen_score": c, "rejected_score": r}
            for row, c, r in zip(held_out[:4], chosen.tolist(), rejected.tolist(), strict=False)
        ])  # fmt: skip
        return metrics

    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        loss, right = torch.zeros(2, device=device)
        picks = micro_batches(range(len(batch)), [lengths[i] for i in batch], args.micro_batch_size, rank, world)
        for pick in accumulated(picks, model):
            mb = collate([sequences[2 * batch[i] + side] for i in pick for side in (0, 1)], pad, device)
            scores = sequence_scores(model, **mb)[:, 0]
            # a rank with nothing left still takes part in the collectives
            mb_loss = bradley_terry_loss(scores[::2], scores[1::2]) if pick else scores.sum() * 0
            backward(mb_loss / len(batch))
            loss += mb_loss.detach() / len(batch)
            right += (scores[::2] > scores[1::2]).sum() if pick else 0
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        total, norm = optimizer_step(model, optimizer, lr, loss, args.max_grad_norm, where)

        # --- log
        done, seconds = step + 1, time.perf_counter() - clock
        tokens = sum(sum(map(len, sequences[2 * i + side])) for i in batch for side in (0, 1))
        run.metrics(done, {
            "reward/loss": total, "reward/accuracy": distributed.all_reduce(right).item() / len(batch), "reward/grad_norm": norm,
            "reward/lr": lr, "time/step_s": seconds, "perf/update_tokens_per_s": tokens / seconds,
            "memory/state_gb": state_bytes([model], [optimizer]) / 2**30, "memory/peak_gb": peak_memory_gb(),
            **mfu(model, tokens, seconds),
        }, show=("reward/loss", "reward/accuracy"))  # fmt: skip
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate(done)

        # --- save
        if args.save_every and (done % args.save_every == 0 or done == steps):
            save_checkpoint(args.run_dir, done, {"model": (model, optimizer)}, {}, args.keep)
    result = evaluate(steps)
    scores = predict(sequences[: 2 * 500])  # a sample: the spread is known to 2 % then
    if rank == 0:
        table = {key.split("/")[1] if "eval" in key else key.replace("/", "_"): float(value) for key, value in result.items()}
        Path(args.run_dir, "accuracy.json").write_text(json.dumps({**table, "pairs": len(held_out)}, indent=1))
        note(f"held-out accuracy {result['eval/accuracy']:.3f}; the longer one wins: {result['baseline/length']:.3f}")
    stats = {"score_mean": scores.mean().item(), "score_std": scores.std().item()}
    export(model, tokenizer, f"{args.run_dir}/model", args.precision, **stats)
    run.close()


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
