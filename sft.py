"""Supervised fine-tuning: the policy every other script starts from.

Maximises the likelihood of the responses. The loss is on response tokens only, with the end-of-answer token:

    loss = -mean over response tokens of log pi(y_t | x, y_<t)

    python sft.py                                                      # the embedded world, one CPU
    python sft.py --model HuggingFaceTB/SmolLM2-135M --dataset answers.jsonl
    torchrun --nproc_per_node=8 sft.py --model meta-llama/Llama-3.2-3B --dataset openbmb/UltraFeedback \
        --part sft --micro-batch-size 2 --gradient-checkpointing

Watch `eval/loss`: where it rises while `sft/loss` falls, there are too many epochs. Read samples.jsonl.
docs/sft.md explains the rest.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from common import distributed
from common.batches import batch_indices, collate, micro_batches, run_micro_batches
from common.checkpoints import export, load_checkpoint, save_checkpoint
from common.cli import fail, note, parse
from common.data import hold_out, prompt_key, read_rows
from common.log import Run
from common.meter import mfu, peak_memory_gb, state_bytes
from common.models import load_model
from common.optimizer import accumulated, adamw, backward, learning_rate, optimizer_step
from common.positions import longest_of
from common.pretrained import resolve
from common.rewards import Reward
from common.rollout import check_sampler, rollout
from common.tokenization import load_tokenizer, tokenize


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
    train_on: Literal["all", "last"] = "all"
    """Which answers of a conversation are trained: all of them, or the last."""
    split_seed: int = 0
    """Seed of the split into parts and held-out prompts. It must be the same in all scripts of an
    experiment."""
    skip_bad_rows: bool = False
    """Drop and count unusable rows instead of stopping at the first."""
    run_dir: str = "runs/sft"
    """Folder of the run: arguments, metrics, samples, checkpoints, the exported model."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    epochs: int = 3
    """Passes over the data (2502.16944: 3)."""
    steps: int = 0
    """Optimizer steps. 0: as many as `--epochs` gives."""
    batch_size: int = 16
    """Responses per optimizer step, over all ranks (2502.16944: 16)."""
    micro_batch_size: int = 4
    """Responses (in preference data: pairs) per forward pass on one rank. It changes memory and speed, not
    the result."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    lr: float = 2e-5
    """Peak learning rate (2502.16944: 2e-5)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up: constant, or down to 0 at the end on a line or a
    cosine."""
    warmup_steps: int = 10
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
    part="sft",
    steps=500,
    batch_size=64,
    micro_batch_size=64,
    max_prompt_length=16,
    max_response_length=32,
    lr=6e-3,
    eval_every=250,
    eval_prompts=64,
    save_every=100,
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def nll_loss(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over response tokens of the negative log-likelihood; logprobs and mask [B, T]."""
    return -(logprobs * mask).sum()


def one_row_per_prompt(rows: list[dict]) -> list[dict]:
    """The last row of each prompt, in the order in which the prompts first appear."""
    last = {}
    for row in rows:
        last[prompt_key(row["prompt"])] = row
    return list(last.values())


def main(args: Args) -> None:
    # Shapes: N sequences, B of them in a micro-batch, L tokens of prompt and response, T of the response.
    # --- setup
    run = Run(args)
    device = distributed.device()
    rank = distributed.rank()
    world = distributed.world()
    name = resolve(args.model, "untrained")
    tokenizer = load_tokenizer(name, args.template_arguments)
    pad = tokenizer.pad_token_id

    # --- data
    def read_responses(dataset, split, part):
        """Rows of prompt and response."""
        return read_rows(
            dataset,
            "sft",
            split=split,
            columns=args.columns,
            part=part,
            split_seed=args.split_seed,
            skip_bad_rows=args.skip_bad_rows,
            train_on=args.train_on,
        )

    rows = read_responses(args.dataset, args.split, args.part)
    if args.eval_dataset:
        held_out = read_responses(args.eval_dataset, args.eval_split, "all")
    else:
        rows, held_out = hold_out(rows, args.eval_fraction, args.split_seed)
    if not rows or not held_out:
        counts = f"{len(rows)} rows to learn from, {len(held_out)} held out"
        fail(f"{args.dataset}: {counts}; change --eval-fraction or give --eval-dataset")
    eval_name = args.eval_dataset or f"{args.dataset}, held out"
    max_lengths = (args.max_prompt_length, args.max_response_length)
    rows = tokenize(rows, tokenizer, ("response",), *max_lengths, args.dataset, args.skip_bad_rows)
    held_out = tokenize(held_out, tokenizer, ("response",), *max_lengths, eval_name, args.skip_bad_rows)
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    eval_sequences = [(row["prompt_ids"], row["response_ids"]) for row in held_out]
    eval_rows = one_row_per_prompt(held_out)[: args.eval_prompts]
    eval_prompts = [row["opening_ids"] for row in eval_rows]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    note(f"{len(rows)} responses to learn from, {len(held_out)} held out")

    # --- models
    longest = longest_of([*sequences, *eval_sequences], eval_prompts, args.max_response_length)
    judges = [Reward(reward_name, tokenizer, args, eval_rows) for reward_name in args.eval_reward]
    policy = load_model("policy", name, tokenizer, args, trained=True, longest=longest)
    optimizer = adamw(policy, args.lr)
    trained = {"policy": (policy, optimizer)}
    state = load_checkpoint(args.run_dir, trained) if args.resume else {}
    start = state.get("step", 0)
    check_sampler(policy, tokenizer, eval_prompts, args.max_response_length, args.temperature)
    run.start(start, steps, rows)

    def held_out_logprobs(mb):
        """Log-probabilities [B, T] of a micro-batch of held-out responses."""
        return policy.response_logprobs(**mb)[0]

    def evaluate_responses(step):
        """Held-out loss, and rewards and lengths of sampled responses; into the logs."""
        eval_lengths = [len(response) for _, response in eval_sequences]
        width = max(eval_lengths)  # T of the longest
        # [N, T]
        logprobs = run_micro_batches(held_out_logprobs, eval_sequences, args.micro_batch_size, pad, width)
        metrics = {"eval/loss": -logprobs.sum() / sum(eval_lengths)}
        # The seed is the same in every evaluation, so that what differs comes from the policy.
        responses, _ = rollout(
            policy, tokenizer, eval_prompts, args.max_response_length, args.temperature, (0, 0)
        )
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        sampled = list(zip(eval_prompts, responses, strict=True))
        judged = {}  # by name, a number for each response
        for judge in judges:
            judged[judge.label] = judge(eval_rows, sampled, texts)
        for label, rewards in judged.items():
            metrics[f"eval/{label}"] = rewards.mean()
        metrics["eval/length"] = sum(len(response) for response in responses) / max(1, len(responses))
        run.metrics(step, metrics, show=tuple(metrics))
        samples = []
        for i, row in enumerate(eval_rows[:8]):
            sample = {"prompt": row["prompt"], "response": texts[i], "length": len(responses[i])}
            for label, rewards in judged.items():
                sample[label] = rewards[i].item()
            samples.append(sample)
        run.samples(step, samples)

    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        count = sum(len(sequences[i][1]) for i in batch)  # over all ranks and micro-batches
        loss = torch.zeros((), device=device)  # []
        picks = micro_batches(batch, lengths, args.micro_batch_size, rank, world)
        for pick in accumulated(picks, policy):
            # A rank with nothing left gets a masked dummy sequence: it joins the collectives, its loss is 0.
            mb = collate([sequences[i] for i in pick], pad, device)  # input_ids [B, L], response_mask [B, T]
            mb_logprobs, _ = policy.response_logprobs(**mb)  # [B, T]
            mb_loss = nll_loss(mb_logprobs, mb["response_mask"])  # []
            backward(mb_loss / count)
            loss += mb_loss.detach() / count
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        total, norm = optimizer_step(policy, optimizer, lr, loss, args.max_grad_norm, where)

        # --- log
        done = step + 1
        seconds = time.perf_counter() - clock
        tokens = sum(lengths[i] for i in batch)
        metrics = {
            "sft/loss": total,
            "sft/grad_norm": norm,
            "sft/lr": lr,
            "time/step_s": seconds,
            "perf/update_tokens_per_s": tokens / seconds,
            "memory/state_gb": state_bytes([policy], [optimizer]) / 2**30,
            "memory/peak_gb": peak_memory_gb(),
            **mfu(policy, tokens, seconds),
        }
        run.metrics(done, metrics, show=("sft/loss",))
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate_responses(done)

        # --- save
        if run.saves(done):
            save_checkpoint(args.run_dir, done, trained, {}, args.keep)
            run.stop_if_asked(done)
    evaluate_responses(steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision, made_by=(args, __file__))
    run.close(f"a policy to train from it, with --model {args.run_dir}/model")


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
