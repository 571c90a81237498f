"""The command line; what is said to the user; how a run ends that cannot go on."""

import dataclasses
import math
import os
import threading
import time
from pathlib import Path
from typing import NoReturn

import tyro

# What a number on a command line may be, by the name of its flag: an interval, [ and ] with that end, ( and )
# without it. So nan is in none, inf in that of --guide-beta alone. A flag's default may be given too where it
# lies outside: 0 where that means "all" or "greedy" (--steps, --temperature), -1 for `values --context-pairs`.
RANGES = {
    # --- how long, how much at once
    "steps": "(0, inf)",
    "epochs": "(0, inf)",
    "batch_size": "(0, inf)",
    "mini_batch_size": "(0, inf)",
    "micro_batch_size": "(0, inf)",
    "rollout_batch_size": "[0, inf)",
    "max_prompt_length": "(0, inf)",
    "max_response_length": "(0, inf)",
    "group_size": "[2, inf)",
    # --- data
    "split_seed": "[0, inf)",
    "eval_fraction": "[0, 1]",
    "eval_prompts": "[0, inf)",
    "eval_gap": "[0, inf)",
    "max_characters": "[0, inf)",
    "last_rows": "[0, inf)",
    "old_share": "[0, 1)",
    "keep_responses": "(0, 1]",
    "reward_noise": "[0, inf)",
    "threshold": "(-inf, inf)",
    "context_pairs": "[0, inf)",
    "context_length": "(0, inf)",
    # --- the optimizer
    "lr": "(0, inf)",
    "critic_lr": "(0, inf)",
    "value_lr": "(0, inf)",
    "warmup_steps": "[0, inf)",
    "max_grad_norm": "(0, inf)",
    "lora_rank": "[0, inf)",
    "lora_alpha": "(0, inf)",
    "lora_dropout": "[0, 1)",
    "layers": "[0, inf)",
    # --- the method
    "beta": "[0, inf)",
    "tau": "(0, inf)",
    "kl_target": "[0, inf)",
    "gamma": "(0, 1]",
    "lam": "[0, 1]",
    "clip": "(0, 1)",
    "clip_high": "(0, inf)",
    "value_clip": "(0, inf)",
    "value_coef": "[0, inf)",
    "importance_cap": "[0, inf)",
    "missing_eos_penalty": "[0, inf)",
    "label_smoothing": "[0, 0.5)",
    "desirable_weight": "[0, inf)",
    "undesirable_weight": "[0, inf)",
    # --- sampling
    "temperature": "(0, inf)",
    "top_k": "[0, inf)",
    "top_p": "(0, 1]",
    "repetition_penalty": "(0, inf)",
    "samples": "(0, inf)",
    "best_of": "(0, inf)",
    "guide_candidates": "(0, inf)",
    "guide_beta": "(0, inf]",
    "vllm_cache_gb": "(0, inf)",
    # --- evaluate.py
    "prompts": "[0, inf)",
    "pass_at": "(0, inf)",
    "maj_at": "(0, inf)",
    "bertscore_layer": "[0, inf)",
    "gap": "[0, inf)",
    "fraction": "(0, 1]",
    "max_pairs": "[0, inf)",
    "draw": "[0, inf)",
    "page_prompts": "[0, inf)",
    "max_tokens": "(0, inf)",
    "concurrency": "(0, 1000]",
    "timeout": "(0, 86400]",
    "tries": "(0, 100]",
    "backoff": "[0, 86400]",
    "max_wait": "[0, 86400]",
    # --- the run
    "seed": "[0, inf)",
    "eval_every": "[0, inf)",
    "save_every": "[0, inf)",
    "save_minutes": "[0, inf)",
    "keep": "(0, inf)",
    "shard_size": "[0, inf)",
    "timeout_minutes": "(0, 1000000]",
}
LARGEST = 2**31 - 1  # of whole numbers: what 32 bits hold; seeds are multiplied on the way to 64


# Whether this process is about to end with an error: then a signal has nothing to wait for.
ENDING = threading.Event()


def fail(message: str) -> NoReturn:
    """Stops with one line, without a traceback.

    Of several ranks rank 0 speaks first; torchrun then ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # no tidy end: others may wait in a collective
        ENDING.set()
        if os.environ["RANK"] != "0":
            time.sleep(10)
        os.write(2, f"error: {message}\n".encode())
        os._exit(1)
    raise SystemExit(f"error: {message}")


def note(message: str) -> None:
    """One line for the user, printed by rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def make_folder(folder: str | Path) -> None:
    """Makes `--run-dir`, or a folder in it, where it is not there. Ends with one line where that cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run-dir {folder}: no such folder can be made ({error.strerror})")


def parse(cls, reviews: dict, argv: list[str] | None = None):
    """The command line as `cls`, a dataclass; on the embedded world its defaults have `reviews` on top.

    A flag wins over both. Ends with one line where a number is out of its range, or flags exclude each other.
    """
    args = tyro.cli(cls, args=argv)
    if args.dataset == "reviews":
        args = tyro.cli(cls, args=argv, default=cls(**reviews))
    check(args)
    say_half_of_a_pair(args)
    return args


def parse_alone(cls, argv: list[str] | None = None):
    """The same of a command that reads no data set of ours, and so has no defaults for the embedded world."""
    args = tyro.cli(cls, args=argv)
    check(args)
    return args


def check(args) -> None:
    """Ends with one line where a number of `args`, a dataclass, is out of its range, a text is empty that has a
    default, or flags exclude each other."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(field.default, str) and value == "" != field.default:
            fail(f"--{field.name.replace('_', '-')} is empty; leave it out for {field.default}")
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int | float) and not isinstance(each, bool) and each != field.default:
                check_number(field.name, each)
    if getattr(args, "resume", False) and getattr(args, "overwrite", False):
        fail("--resume goes on with a run and --overwrite replaces it; give one of them")


def check_number(name: str, value: int | float) -> None:
    """Ends with one line where a value is not in its interval of RANGES. One that has none (a flag of your own)
    must be finite."""
    interval = RANGES.get(name, "(-inf, inf)")
    low, high = interval[1:-1].split(", ")
    is_above = value >= float(low) if interval[0] == "[" else value > float(low)
    is_below = value <= float(high) if interval[-1] == "]" else value < float(high)
    if is_above and is_below and not (isinstance(value, int) and abs(value) > LARGEST):
        return
    must = []
    if low != "-inf":
        must.append(f"{'at least' if interval[0] == '[' else 'above'} {low}")
    if high != "inf":
        must.append(f"{'at most' if interval[-1] == ']' else 'below'} {high}")
    if isinstance(value, int) and abs(value) > LARGEST:
        must.append(f"a whole number of 32 bits, at most {LARGEST}")
    elif not math.isfinite(value):
        must.append("finite")
    fail(f"--{name.replace('_', '-')} is {value}; it must be {' and '.join(must)}")


def say_half_of_a_pair(args) -> None:
    """A note where the embedded policy meets data of one's own, or a model of one's own the embedded data."""
    model = getattr(args, "model", "")
    if model == "reviews" and args.dataset != "reviews":
        note(
            f"--model is not given: the embedded toy policy of restaurant reviews is trained on {args.dataset}"
        )
    elif model not in ("", "reviews") and args.dataset == "reviews":
        note(f"--dataset is not given: {model} is trained on the embedded restaurant reviews")
