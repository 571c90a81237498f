"""The command line; what is said to the user; how a run ends that cannot go on."""

import os
import threading
import time
from typing import NoReturn

import tyro

# Flags that must be above 0, in the scripts that have them. One whose default is 0 may be 0: it is off then.
POSITIVE = (
    "steps",
    "epochs",
    "lr",
    "critic_lr",
    "value_lr",
    "temperature",
    "gamma",
    "lora_alpha",
    "vllm_cache_gb",
    "save_minutes",
    "batch_size",
    "mini_batch_size",
    "micro_batch_size",
    "rollout_batch_size",
    "max_prompt_length",
    "max_response_length",
    "keep",
    "lora_rank",
)


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


def parse(cls, reviews: dict, argv: list[str] | None = None):
    """The command line as `cls`, a dataclass; on the embedded world its defaults have `reviews` on top.

    A flag wins over both. Ends with one line where a number is out of its range.
    """
    args = tyro.cli(cls, args=argv)
    if args.dataset == "reviews":
        args = tyro.cli(cls, args=argv, default=cls(**reviews))
    say_half_of_a_pair(args)
    for name in POSITIVE:
        value = getattr(args, name, 1)
        if value < 0 or (value == 0 and getattr(cls, name) != 0):
            fail(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if getattr(args, "eval_prompts", 0) < 0 or not 0 <= getattr(args, "lora_dropout", 0) < 1:
        fail("--eval-prompts must not be negative, --lora-dropout in [0, 1)")
    return args


def say_half_of_a_pair(args) -> None:
    """A note where the embedded policy meets data of one's own, or a model of one's own the embedded data."""
    model = getattr(args, "model", "")
    if model == "reviews" and args.dataset != "reviews":
        note(
            f"--model is not given: the embedded toy policy of restaurant reviews is trained on {args.dataset}"
        )
    elif model not in ("", "reviews") and args.dataset == "reviews":
        note(f"--dataset is not given: {model} is trained on the embedded restaurant reviews")
