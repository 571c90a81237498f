"""How far the sampler's log-probabilities are from the policy's: by rounding alone, and by each known fault.

    python benchmarks/sampler.py                             # the embedded policy, float32 and bf16
    python benchmarks/sampler.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --prompts prompts.jsonl --tokens 64

The tolerances of common/rollout.py rest on this; docs/metrics.md has the table. For each compute type: the
mean |difference| of a token in nats, its 99th percentile and the worst response's mean; then the mean with
the cache, the attention mask or the position ids lost on the way into the model.
"""

import argparse
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import distributed
from common import rollout as rollout_room
from common.data import read_rows
from common.models import load_model
from common.pretrained import resolve
from common.tokenization import encode_prompt, load_tokenizer

# what is lost, and the names that a model's forward has for it
FAULTS = {
    "cache": rollout_room.CACHE_NAMES,
    "attention mask": ("attention_mask",),
    "position ids": ("position_ids",),
}


def lost(policy, names: tuple[str, ...]):
    """Inside, the policy's forward does not get the arguments `names`."""
    real = policy.forward

    def forward(*args, **kwargs):
        kept = {name: value for name, value in kwargs.items() if name not in names}
        return real(*args, **kept)

    # the sampler looks up which arguments a forward takes
    forward.__signature__ = inspect.signature(real)
    return mock.patch.object(policy, "forward", forward)


@torch.no_grad()
def measure(policy, prompts: list[list[int]], tokens: int, temperature: float) -> dict[str, float]:
    """One row of the table: differences in nats, by what they are."""

    def sample():
        """Responses of exactly `tokens` tokens: no token ends one."""
        return rollout_room.sample_all(policy, prompts, tokens, temperature, (0, 0), 0, [], 0)

    responses, sampled = sample()
    right = rollout_room.differences(policy, prompts, responses, sampled, temperature)  # [T_i] per response
    every_token = torch.cat(right)
    worst = max(response.mean().item() for response in right)
    row = {
        "mean": every_token.mean().item(),
        "p99": every_token.quantile(0.99).item(),
        "worst response": worst,
    }
    for fault, names in FAULTS.items():
        with lost(policy, names):
            responses, sampled = sample()
        off = rollout_room.differences(policy, prompts, responses, sampled, temperature)
        row[f"no {fault}"] = rollout_room.mean_of(off)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="reviews", help="a policy: folder or hub id")
    parser.add_argument("--prompts", default="reviews", help="hub id or file with a column `prompt`")
    parser.add_argument("--n", type=int, default=16, help="prompts, the first of the file")
    parser.add_argument("--tokens", type=int, default=16, help="sampled after each prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["fp32", "bf16"],
        choices=["fp64", "fp32", "bf16"],
        help="compute types, a row each",
    )
    args = parser.parse_args()
    name = resolve(args.model)
    tokenizer = load_tokenizer(name)
    rows = read_rows(args.prompts, "prompts", part="all")[: args.n]
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    device = "CPU"
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
        device = torch.cuda.get_device_name()
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    lengths = sorted(len(prompt) for prompt in prompts)
    print(f"{args.model}, {device}: {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens,")
    print(f"{args.tokens} sampled after each at temperature {args.temperature:g}\n")
    faults = " | ".join(f"no {fault}" for fault in FAULTS)
    print(f"| compute type | tolerance | right: mean | p99 | worst response | {faults} |")
    print("|---|---|---|---|---|---|---|---|")
    for precision in args.precision:
        options = SimpleNamespace(
            precision=precision, shard_size=0, gradient_checkpointing=False, lora_rank=0
        )
        policy = load_model("policy", name, tokenizer, options, trained=True)
        row = measure(policy, prompts, args.tokens, args.temperature)
        cells = " | ".join(f"{number:.2g}" for number in row.values())
        print(f"| {precision} | {rollout_room.tolerance(policy):g} | {cells} |", flush=True)
        del policy  # or the process group would go before it
    distributed.mesh.cache_clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
