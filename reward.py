"""A scalar reward model from preference pairs: Bradley-Terry.

Trains `AutoModelForSequenceClassification` with one label, the form most reward models on the hub have, to

    loss = -mean over pairs of log sigmoid(r(x, chosen) - r(x, rejected))              (2203.02155 eq. 1)

The exported config carries `score_mean` and `score_std` over the training responses (of at most 500 pairs).
ppo.py and gvm_td.py then use standardised scores, so that a KL coefficient means the same with any reward
model.

    python reward.py                                                   # the embedded world, one CPU
    python reward.py --model runs/sft/model --dataset pairs.jsonl
    torchrun --nproc_per_node=8 reward.py --model meta-llama/Llama-3.2-3B-Instruct \
        --dataset openbmb/UltraFeedback --part value --micro-batch-size 2 --gradient-checkpointing

Watch `eval/accuracy` against `baseline/length`. A training loss far below the held-out one is over-fitting
(two epochs are already many). docs/reward.md explains the rest.
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
from common.positions import longest_of
from common.pretrained import resolve
from common.templates import text_of
from common.tokenization import load_tokenizer, tokenize
from common.value_heads import sequence_scores


@dataclass
class Args:
    model: str = "reviews"
    """Model to start from: a hub id or a local folder, usually the SFT policy. `reviews` is the embedded
    one."""
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
    layers: int = 0
    """Keep only the first N layers of the backbone. 0: all."""
    run_dir: str = "runs/reward"
    """Folder of the run: arguments, metrics, samples, checkpoints, the exported model."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    epochs: int = 2
    """Passes over the data (2502.16944: 2)."""
    steps: int = 0
    """Optimizer steps. 0: as many as `--epochs` gives."""
    batch_size: int = 32
    """Responses (in preference data: pairs) per optimizer step, over all ranks."""
    micro_batch_size: int = 4
    """Responses (in preference data: pairs) per forward pass on one rank. It changes memory and speed, not
    the result."""
    max_prompt_length: int = 512
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 512
    """Longest response, in tokens; a longer one is cut there."""
    lr: float = 2e-5
    """Peak learning rate (2502.16944: 2e-5)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a
    cosine."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    eval_every: int = 100
    """Optimizer steps between evaluations. 0: evaluate only at the end."""
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
    steps=200,
    batch_size=64,
    micro_batch_size=64,
    max_prompt_length=16,
    max_response_length=32,
    lr=2e-3,
    eval_every=100,
    save_every=100,
)


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of -log sigmoid(chosen - rejected), scores [B] each (2203.02155 eq. 1)."""
    return -F.logsigmoid(chosen - rejected).sum()


def two_sides(rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """The sequences (prompt tokens, response tokens) of the pairs: chosen, rejected, chosen, rejected, ..."""
    sequences = []
    for row in rows:
        sequences.append((row["prompt_ids"], row["chosen_ids"]))
        sequences.append((row["prompt_ids"], row["rejected_ids"]))
    return sequences


def main(args: Args) -> None:
    # Shapes: N training pairs, M held-out ones, B in a micro-batch; L tokens of prompt and response,
    # T tokens of the response.
    # --- setup
    run = Run(args)
    device = distributed.device()
    rank = distributed.rank()
    world = distributed.world()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name, args.template_arguments)
    pad = tokenizer.pad_token_id

    # --- data
    def read_pairs(dataset, split, part):
        """Rows of prompt, chosen and rejected."""
        return read_rows(
            dataset,
            "preference",
            split=split,
            columns=args.columns,
            part=part,
            split_seed=args.split_seed,
            skip_bad_rows=args.skip_bad_rows,
        )

    rows = read_pairs(args.dataset, args.split, args.part)
    if args.eval_dataset:
        held_out = read_pairs(args.eval_dataset, args.eval_split, "all")
    else:
        rows, held_out = hold_out(rows, args.eval_fraction, args.split_seed)
    if not rows or not held_out:
        counts = f"{len(rows)} pairs to learn from, {len(held_out)} held out"
        fail(f"{args.dataset}: {counts}; change --eval-fraction or give --eval-dataset")
    eval_name = args.eval_dataset or f"{args.dataset}, held out"
    max_lengths = (args.max_prompt_length, args.max_response_length)
    rows = tokenize(
        rows, tokenizer, ("chosen", "rejected"), *max_lengths, args.dataset, args.skip_bad_rows, whole=True
    )
    held_out = tokenize(
        held_out, tokenizer, ("chosen", "rejected"), *max_lengths, eval_name, args.skip_bad_rows, whole=True
    )
    sequences = two_sides(rows)  # 2N: those of pair i are 2i and 2i + 1
    eval_sequences = two_sides(held_out)  # 2M
    lengths = []  # of the longer sequence of each pair
    for row in rows:
        longer_response = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        lengths.append(len(row["prompt_ids"]) + longer_response)
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    note(f"{len(rows)} pairs to learn from, {len(held_out)} held out")

    # --- models
    longest = longest_of([*sequences, *eval_sequences])
    model = load_model("reward", name, tokenizer, args, trained=True, layers=args.layers, longest=longest)
    optimizer = adamw(model, args.lr)
    trained = {"model": (model, optimizer)}
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start = state.get("step", 0)
    run.start(start, steps, rows)

    def micro_batch_scores(mb):
        """Scores [B, 1] of a micro-batch."""
        return sequence_scores(model, **mb)

    def predict_scores(sequences):
        """Scores [number of sequences] of all sequences, on every rank."""
        # --micro-batch-size counts pairs.
        found = run_micro_batches(micro_batch_scores, sequences, 2 * args.micro_batch_size, pad, 1)
        return found[:, 0]

    def evaluate_reward_model(step):
        """Held-out accuracy, loss, margin and what length alone would reach, into the logs; returns them."""
        scores = predict_scores(eval_sequences)  # [2M]
        chosen = scores[::2]  # [M]
        rejected = scores[1::2]  # [M]
        metrics = {
            "eval/accuracy": (chosen > rejected).float().mean(),
            "eval/loss": bradley_terry_loss(chosen, rejected) / len(chosen),
            "eval/margin": (chosen - rejected).mean(),
            "baseline/length": np.mean(
                [len(text_of(row["chosen"])) > len(text_of(row["rejected"])) for row in held_out]
            ),
        }
        run.metrics(step, metrics, show=("eval/accuracy", "eval/loss"))
        samples = []
        for i, row in enumerate(held_out[:4]):
            sample = {
                "prompt": row["prompt"],
                "chosen": row["chosen"],
                "rejected": row["rejected"],
                "chosen_score": chosen[i].item(),
                "rejected_score": rejected[i].item(),
            }
            samples.append(sample)
        run.samples(step, samples)
        return metrics

    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        sums = {  # over this rank's pairs; the loss is divided by the size of the batch
            "loss": torch.zeros((), device=device),
            "right": torch.zeros((), device=device),
        }
        # Micro-batches hold positions in the batch, not rows.
        batch_lengths = [lengths[i] for i in batch]
        picks = micro_batches(range(len(batch)), batch_lengths, args.micro_batch_size, rank, world)
        for pick in accumulated(picks, model):
            mb_sequences = two_sides([rows[batch[i]] for i in pick])
            mb = collate(mb_sequences, pad, device)  # input_ids [2B, L], response_mask [2B, T]
            mb_scores = sequence_scores(model, **mb)[:, 0]  # [2B]
            if not pick:
                # A rank with nothing left still joins the collectives: its dummy sequence counts nothing.
                backward(mb_scores.sum() * 0)
                continue
            mb_chosen = mb_scores[::2]  # [B]
            mb_rejected = mb_scores[1::2]  # [B]
            mb_loss = bradley_terry_loss(mb_chosen, mb_rejected)  # []
            backward(mb_loss / len(batch))
            sums["loss"] += mb_loss.detach() / len(batch)
            sums["right"] += (mb_chosen > mb_rejected).sum()
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        total, norm = optimizer_step(model, optimizer, lr, sums["loss"], args.max_grad_norm, where)

        # --- log
        done = step + 1
        seconds = time.perf_counter() - clock
        tokens = 0
        for i in batch:
            tokens += (
                2 * len(rows[i]["prompt_ids"]) + len(rows[i]["chosen_ids"]) + len(rows[i]["rejected_ids"])
            )
        metrics = {
            "reward/loss": total,
            "reward/accuracy": distributed.all_reduce(sums["right"]).item() / len(batch),
            "reward/grad_norm": norm,
            "reward/lr": lr,
            "time/step_s": seconds,
            "perf/update_tokens_per_s": tokens / seconds,
            "memory/state_gb": state_bytes([model], [optimizer]) / 2**30,
            "memory/peak_gb": peak_memory_gb(),
            **mfu(model, tokens, seconds),
        }
        run.metrics(done, metrics, show=("reward/loss", "reward/accuracy"))
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate_reward_model(done)

        # --- save
        if run.saves(done):
            save_checkpoint(args.run_dir, done, trained, {}, args.keep)
            run.stop_if_asked(done)
    final = evaluate_reward_model(steps)
    if rank == 0:
        table = {
            "accuracy": float(final["eval/accuracy"]),
            "loss": float(final["eval/loss"]),
            "margin": float(final["eval/margin"]),
            "baseline_length": float(final["baseline/length"]),
            "pairs": len(held_out),
        }
        Path(args.run_dir, "accuracy.json").write_text(json.dumps(table, indent=1))
        note(
            f"held-out accuracy {table['accuracy']:.3f}; the longer one wins: {table['baseline_length']:.3f}"
        )
    scores = predict_scores(sequences[: 2 * 500])  # a sample: the spread is known to 2 % then
    statistics = {"score_mean": scores.mean().item(), "score_std": scores.std().item()}
    export(model, tokenizer, f"{args.run_dir}/model", args.precision, made_by=(args, __file__), **statistics)
    run.close(f"python ppo.py --model YOUR_POLICY --reward {args.run_dir}/model")


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
