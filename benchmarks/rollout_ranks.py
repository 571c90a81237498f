"""A rollout on several ranks: parameters gathered once (ours), gathered anew for each token, and a model that
is not sharded.

    torchrun --nproc_per_node=2 benchmarks/rollout_ranks.py --hidden-size 512 --layers 8 --tokens 64 --pairs 5

Each rank generates `--batch` responses of `--tokens` tokens from a random Llama; the three take turns. Prints
seconds and ratios: medians, and the range over the rounds.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assets import reviews
from common import distributed, models, sharding, tokenization
from common.rollout import decode


@dataclass
class Args:
    hidden_size: int = 512
    """Hidden size of the random Llama."""
    layers: int = 8
    """Its layers."""
    vocabulary: int = 8192
    """Its vocabulary."""
    batch: int = 16
    """Responses per rank."""
    tokens: int = 64
    """Tokens per response."""
    pairs: int = 5
    """Timed rounds; one more goes before them."""
    seed: int = 0
    """Seed of the weights."""
    # what load_model reads
    precision: str = "auto"
    """Compute type: auto, bf16, fp32 or fp64."""
    shard_size: int = 0
    timeout_minutes: float = 60.0
    """Ranks per replica; 0: all."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0: none."""
    gradient_checkpointing: bool = False
    """Of no effect here: nothing is trained."""


def make_model(args: Args, folder: str) -> None:
    """A random Llama in a folder."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden_size,
        intermediate_size=8 * args.hidden_size // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def spread(values: list[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratios(numerators: list[float], denominators: list[float]) -> str:
    """The median and the range of the rounds' ratios."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def main(args: Args) -> None:
    folder = [tempfile.mkdtemp() if distributed.rank() == 0 else None]
    dist.broadcast_object_list(folder)
    folder = folder[0]
    if distributed.rank() == 0:
        make_model(args, folder)
    dist.barrier()
    tokenizer = tokenization.load_tokenizer(reviews.folder("policy"))
    sharded = models.load_model("policy", folder, tokenizer, args, trained=True)
    compute_type, _ = distributed.dtypes(args.precision)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_type)
    plain = plain.to(distributed.device()).eval()
    plain.forbidden_tokens = sharded.forbidden_tokens  # that `decode` reads

    generator = torch.Generator().manual_seed(distributed.rank())
    prompts = []
    for _ in range(args.batch):
        prompts.append(torch.randint(5, args.vocabulary, (16,), generator=generator).tolist())
    uniforms = torch.rand(args.batch, args.tokens, generator=generator, dtype=torch.float64)  # [B, T]
    uniforms = uniforms.to(distributed.device())
    temperatures = torch.ones(args.batch, dtype=torch.float64, device=distributed.device())

    def seconds(model, context) -> float:
        """Of one rollout on all ranks."""
        dist.barrier()
        start = time.perf_counter()
        with torch.no_grad(), context:
            found = decode(model, prompts, uniforms, temperatures, [-1], 0)  # no token ends a response
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        assert all(len(response) == args.tokens for response, _ in found)
        return time.perf_counter() - start

    once = []
    each_token = []
    not_sharded = []
    for number in range(args.pairs + 1):
        once_seconds = seconds(sharded, sharding.gathered(sharded))
        each_seconds = seconds(sharded, contextlib.nullcontext())
        sharding.reshard(sharded)
        plain_seconds = seconds(plain, contextlib.nullcontext())
        if number > 0:  # the first warms up
            once.append(once_seconds)
            each_token.append(each_seconds)
            not_sharded.append(plain_seconds)
    if distributed.rank() == 0:
        print(f"gathered once: {spread(once)} s")
        print(f"gathered for each token: {spread(each_token)} s")
        print(f"not sharded: {spread(not_sharded)} s")
        print(f"gathered for each token / once: {ratios(each_token, once)}")
        print(f"gathered once / not sharded: {ratios(once, not_sharded)}")


if __name__ == "__main__":
    distributed.launch(main, tyro.cli(Args))
