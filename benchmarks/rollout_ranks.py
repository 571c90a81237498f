"""A rollout on several ranks: parameters gathered once (ours), gathered anew for each token, and a model that is not sharded.

    torchrun --nproc_per_node=2 benchmarks/rollout_ranks.py --hidden-size 512 --layers 8 --tokens 64 --pairs 5

Each rank generates `--batch` responses of `--tokens` tokens from a random Llama; the three take turns. Prints seconds and ratios:
medians, and the range over the rounds.
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
    layers: int = 8
    vocabulary: int = 8192
    batch: int = 16
    """responses a rank"""
    tokens: int = 64
    pairs: int = 5
    seed: int = 0
    # what load_model reads
    precision: str = "auto"
    shard_size: int = 0
    lora_rank: int = 0
    gradient_checkpointing: bool = False


def main(args: Args) -> None:
    folder = [tempfile.mkdtemp() if distributed.rank() == 0 else None]
    dist.broadcast_object_list(folder)
    tokenizer = tokenization.load_tokenizer(reviews.folder("policy"))
    shape = dict(
        hidden_size=args.hidden_size,
        intermediate_size=8 * args.hidden_size // 3,
        num_hidden_layers=args.layers,
    )
    shape |= dict(num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    config = LlamaConfig(vocab_size=args.vocabulary, **shape)
    if distributed.rank() == 0:
        LlamaForCausalLM(config).save_pretrained(folder[0])
    dist.barrier()
    sharded = models.load_model("policy", folder[0], tokenizer, args, trained=True)
    plain = AutoModelForCausalLM.from_pretrained(folder[0], dtype=distributed.dtypes(args.precision)[0])
    plain = plain.to(distributed.device()).eval()
    plain.forbidden_token = sharded.forbidden_token
    generator = torch.Generator().manual_seed(distributed.rank())
    prompts = [
        torch.randint(5, args.vocabulary, (16,), generator=generator).tolist() for _ in range(args.batch)
    ]
    uniforms = torch.rand(args.batch, args.tokens, generator=generator, dtype=torch.float64).to(
        distributed.device()
    )
    temperatures = torch.ones(args.batch, dtype=torch.float64, device=distributed.device())

    def seconds(model, context) -> float:
        dist.barrier()
        start = time.perf_counter()
        with torch.no_grad(), context:
            found = decode(model, prompts, uniforms, temperatures, [-1], 0)  # no token ends a response
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        assert all(len(response) == args.tokens for response, _ in found)
        return time.perf_counter() - start

    rounds = []
    for i in range(args.pairs + 1):
        gathered = seconds(sharded, sharding.gathered(sharded))
        each = seconds(sharded, contextlib.nullcontext())
        sharding.reshard(sharded)
        rounds += [(gathered, each, seconds(plain, contextlib.nullcontext()))] * (i > 0)  # the first warms up
    if distributed.rank() == 0:
        spread = lambda x: f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})"
        names = ("gathered once", "gathered for each token", "not sharded")
        for name, times in zip(names, zip(*rounds, strict=True), strict=True):
            print(f"{name}: {spread(times)} s")
        print(f"gathered for each token / once: {spread([b / a for a, b, _ in rounds])}")
        print(f"gathered once / not sharded: {spread([a / c for a, _, c in rounds])}")
    del sharded, plain


if __name__ == "__main__":
    distributed.launch(main, tyro.cli(Args))
