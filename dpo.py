"""DPO: Direct Preference Optimisation, offline, from pairs of a chosen and a rejected response.

Paper: 2305.18290. With the implied reward h(y) = log pi(y|x) - log pi_ref(y|x), the Bradley-Terry likelihood
of the pairs:

    loss = -mean over pairs of log sigmoid(beta * (h(y_chosen) - h(y_rejected)))                (eq. 7)

    python dpo.py                                                      # the embedded world, one CPU
    python dpo.py --model runs/sft/model --dataset pairs.jsonl
    torchrun --nproc_per_node=8 dpo.py --model runs/sft/model --dataset openbmb/UltraFeedback --part value \
        --gradient-checkpointing

Watch `eval/pair_accuracy` (does the log-ratio order held-out pairs?), `eval/kl`, and `dpo/log_ratio_chosen`:
the loss sees the difference alone, so both can fall together while the policy leaves the data. Read
samples.jsonl. docs/dpo.md explains the rest.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from common import distributed
from common.batches import batch_indices, collate, micro_batches
from common.checkpoints import export, load_checkpoint, save_checkpoint
from common.cli import fail, note, parse
from common.data import hold_out, prompt_key, read_rows
from common.log import Run
from common.logprobs import sequence_logprobs
from common.measures import distinct_2
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
    run_dir: str = "runs/dpo"
    """Folder of the run: arguments, metrics, samples, checkpoints, the exported model."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    epochs: int = 1
    """Passes over the data; in the online scripts, over each rollout."""
    steps: int = 0
    """Optimizer steps. 0: as many as `--epochs` gives."""
    batch_size: int = 64
    """Responses (in preference data: pairs) per step, over all ranks."""
    micro_batch_size: int = 2
    """Responses (in preference data: pairs) per forward pass on one rank. It changes memory and speed, not
    the result."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    beta: float = 0.1
    """Factor of the log-ratios inside the sigmoid (2402.01306, 2305.18290: 0.1)."""
    label_smoothing: float = 0.0
    """Assumed share of pairs that are labelled the wrong way round (conservative DPO)."""
    length_normalise: bool = False
    """Use the mean log-probability per token in place of the sum, everywhere. The papers' equations have
    sums; RPO's released code has means."""
    precompute_ref: bool = True
    """Free the reference once the data are scored: one model less in memory, but no `eval/kl`."""
    lr: float = 1e-6
    """Peak learning rate (2402.03300, 2305.18290: 1e-6)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
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
    batch_size=32,
    micro_batch_size=32,
    max_prompt_length=16,
    max_response_length=32,
    beta=0.5,
    lr=1e-4,
    warmup_steps=20,
    eval_every=100,
    eval_prompts=96,
    save_every=100,
    precompute_ref=False,
    eval_reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


def dpo_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    beta: float,
    label_smoothing: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """Sum over pairs of -log sigmoid(beta * (h_chosen - h_rejected)) (2305.18290 eq. 7); both [B].

    `label_smoothing` is the weight of the same loss with the pair turned round: one number, or [B].
    """
    margin = beta * (chosen_log_ratios - rejected_log_ratios)
    as_labelled = (1 - label_smoothing) * F.logsigmoid(margin)
    turned_round = label_smoothing * F.logsigmoid(-margin)
    return -(as_labelled + turned_round).sum()


def one_row_per_prompt(rows: list[dict]) -> list[dict]:
    """The last row of each prompt, in the order in which the prompts first appear."""
    last = {}
    for row in rows:
        last[prompt_key(row["prompt"])] = row
    return list(last.values())


def main(args: Args) -> None:
    # Shapes: N training pairs, M held-out ones, B in a micro-batch; L tokens of prompt and response,
    # T tokens of the response.
    # --- setup
    if args.beta == 0:  # the loss would be log 2, whatever the policy
        fail(f"--beta is {args.beta}; it must be above 0")
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
        counts = f"{len(rows)} rows to learn from, {len(held_out)} held out"
        fail(f"{args.dataset}: {counts}; change --eval-fraction or give --eval-dataset")
    eval_name = args.eval_dataset or f"{args.dataset}, held out"
    max_lengths = (args.max_prompt_length, args.max_response_length)
    rows = tokenize(rows, tokenizer, ("chosen", "rejected"), *max_lengths, args.dataset, args.skip_bad_rows)
    held_out = tokenize(
        held_out, tokenizer, ("chosen", "rejected"), *max_lengths, eval_name, args.skip_bad_rows
    )
    chosen = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    rejected = [(row["prompt_ids"], row["rejected_ids"]) for row in rows]
    eval_chosen = [(row["prompt_ids"], row["chosen_ids"]) for row in held_out]
    eval_rejected = [(row["prompt_ids"], row["rejected_ids"]) for row in held_out]
    eval_rows = one_row_per_prompt(held_out)[: args.eval_prompts]
    eval_prompts = [row["opening_ids"] for row in eval_rows]
    lengths = []  # of both sequences of a pair
    for row in rows:
        both_prompts = 2 * len(row["prompt_ids"])
        lengths.append(both_prompts + len(row["chosen_ids"]) + len(row["rejected_ids"]))
    steps = args.steps or args.epochs * max(1, len(rows) // args.batch_size)
    note(f"{len(rows)} pairs to learn from, {len(held_out)} held out")

    def scale(sequences):
        """What a summed log-probability is divided by, [N]: the response's length in tokens, or 1."""
        if args.length_normalise:
            divisors = [len(response) for _, response in sequences]
        else:
            divisors = [1] * len(sequences)
        return torch.tensor(divisors, dtype=torch.float64, device=device)

    # --- models
    written = [*chosen, *rejected, *eval_chosen, *eval_rejected]
    longest = longest_of(written, eval_prompts, args.max_response_length)
    judges = [Reward(reward_name, tokenizer, args, eval_rows) for reward_name in args.eval_reward]
    chosen_sums, rejected_sums, eval_chosen_sums, eval_rejected_sums = reference_logprobs(
        ref_name,
        tokenizer,
        args,
        chosen=chosen,
        rejected=rejected,
        eval_chosen=eval_chosen,
        eval_rejected=eval_rejected,
    )
    ref_chosen = chosen_sums / scale(chosen)  # [N]
    ref_rejected = rejected_sums / scale(rejected)  # [N]
    eval_ref_chosen = eval_chosen_sums / scale(eval_chosen)  # [M]
    eval_ref_rejected = eval_rejected_sums / scale(eval_rejected)  # [M]
    policy = load_model("policy", name, tokenizer, args, trained=True, longest=longest)
    optimizer = adamw(policy, args.lr)
    reference = None if args.precompute_ref else load_reference(policy, ref_name, tokenizer, args, longest)
    trained = {"policy": (policy, optimizer)}
    models = [policy]
    optimizers = [optimizer]
    if reference is not None:
        models.append(reference)
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

    def evaluate_pairs(step):
        """How held-out log-ratios order the pairs, and what sampled responses show; into the logs."""
        eval_logprobs_chosen = summed_logprobs_of(policy, eval_chosen) / scale(eval_chosen)  # [M]
        eval_logprobs_rejected = summed_logprobs_of(policy, eval_rejected) / scale(eval_rejected)  # [M]
        h_chosen = eval_logprobs_chosen - eval_ref_chosen  # [M]
        h_rejected = eval_logprobs_rejected - eval_ref_rejected  # [M]
        metrics = {"eval/pair_accuracy": (h_chosen > h_rejected).double().mean()}
        sampled_metrics, samples = judge_samples()
        metrics |= sampled_metrics
        run.metrics(step, metrics, show=tuple(metrics))
        run.samples(step, samples)

    if start == 0 and args.eval_every:
        evaluate_pairs(0)
    for step in range(start, steps):
        # --- update
        clock = time.perf_counter()
        batch = batch_indices(len(rows), args.batch_size, step, args.seed)
        sums = {  # over this rank's pairs, each divided by the size of the batch
            "loss": torch.zeros((), device=device, dtype=torch.float64),
            "log_ratio_chosen": torch.zeros((), device=device, dtype=torch.float64),
            "log_ratio_rejected": torch.zeros((), device=device, dtype=torch.float64),
        }
        picks = micro_batches(batch, lengths, args.micro_batch_size, rank, world)
        for pick in accumulated(picks, policy):
            mb_sequences = [chosen[i] for i in pick] + [rejected[i] for i in pick]
            mb = collate(mb_sequences, pad, device)  # input_ids [2B, L], response_mask [2B, T]
            mb_token_logprobs, _ = policy.response_logprobs(**mb)  # [2B, T]
            if not pick:
                # A rank with nothing left still joins the collectives: its dummy sequence counts nothing.
                backward(mb_token_logprobs.sum() * 0)
                continue
            mb_logprobs = mb_token_logprobs.sum(1) / scale(mb_sequences)  # [2B]
            mb_chosen, mb_rejected = mb_logprobs.split(len(pick))  # [B] each
            h_chosen = mb_chosen - ref_chosen[pick]  # [B]
            h_rejected = mb_rejected - ref_rejected[pick]  # [B]
            mb_loss = dpo_loss(h_chosen, h_rejected, args.beta, args.label_smoothing)  # []
            backward(mb_loss / len(batch))
            sums["loss"] += mb_loss.detach() / len(batch)
            sums["log_ratio_chosen"] += h_chosen.sum().detach() / len(batch)
            sums["log_ratio_rejected"] += h_rejected.sum().detach() / len(batch)
        lr = learning_rate(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        where = f"step {step}, data rows {[rows[i]['row'] for i in batch]}"
        total, norm = optimizer_step(policy, optimizer, lr, sums["loss"], args.max_grad_norm, where)

        # --- log
        means = distributed.all_reduce_dict(sums)  # over the batch
        done = step + 1
        seconds = time.perf_counter() - clock
        tokens = sum(lengths[i] for i in batch)
        metrics = {
            "dpo/loss": total,
            "dpo/log_ratio_chosen": means["log_ratio_chosen"],
            "dpo/log_ratio_rejected": means["log_ratio_rejected"],
            "dpo/grad_norm": norm,
            "dpo/lr": lr,
            "time/step_s": seconds,
            "perf/update_tokens_per_s": tokens / seconds,
            "memory/state_gb": state_bytes(models, optimizers) / 2**30,
            "memory/peak_gb": peak_memory_gb(),
            **mfu(policy, tokens, seconds),
        }
        run.metrics(done, metrics, show=("dpo/loss", "dpo/log_ratio_chosen", "dpo/log_ratio_rejected"))
        if args.eval_every and done % args.eval_every == 0 and done < steps:
            evaluate_pairs(done)

        # --- save
        if run.saves(done):
            save_checkpoint(args.run_dir, done, trained, {}, args.keep)
            run.stop_if_asked(done)
    evaluate_pairs(steps)
    export(policy, tokenizer, f"{args.run_dir}/model", args.precision, made_by=(args, __file__))
    run.close(f"python evaluate.py responses --models {args.run_dir}/model --dataset YOUR_PROMPTS")


if __name__ == "__main__":
    distributed.launch(main, parse(Args, REVIEWS))
