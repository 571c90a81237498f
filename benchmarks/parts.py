"""What single parts of a step cost, divided by what they replaced, in CPU seconds of one thread; the table of
docs/performance.md.

    OMP_NUM_THREADS=1 python benchmarks/parts.py

Each pair takes turns in one process; printed are the medians of `--rounds` and their ratio, ours over the
other. Then what share of an update and of a rollout is matrix products and attention, which are the model's
own and no trainer can leave out.
"""

import argparse
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import batches, distributed, logprobs
from common import rollout as rollout_room
from common.rollout import decode


def llama(hidden: int, layers: int, vocabulary: int, heads: int = 4) -> transformers.LlamaForCausalLM:
    """A random Llama."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=heads,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    # what `decode` and `response_logprobs` read
    model.forbidden_tokens = None
    model.output_form = logprobs.OutputForm()
    return model


def llama_with_logprobs(hidden: int, layers: int, vocabulary: int) -> transformers.LlamaForCausalLM:
    """A random Llama that says log-probabilities as a policy of common/models.py does."""
    model = llama(hidden, layers, vocabulary)
    model.response_logprobs = types.MethodType(logprobs.response_logprobs, model)
    return model


def compare(title: str, rounds: int, ours: Callable, other: Callable) -> None:
    """One row of the table."""
    our_seconds = []
    other_seconds = []
    ours()  # the first of each warms up
    other()
    for _ in range(rounds):
        our_seconds.append(cpu_seconds(ours))
        other_seconds.append(cpu_seconds(other))
    our_median = statistics.median(our_seconds)
    other_median = statistics.median(other_seconds)
    times = f"{1e3 * our_median:,.1f} ms / {1e3 * other_median:,.1f} ms"
    print(f"| {title} | {times} | {our_median / other_median:.2f} |", flush=True)


def cpu_seconds(run: Callable) -> float:
    """Of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


# --- the parts ----------------------------------------------------------------------------------------------


def plain_cache(config) -> transformers.DynamicCache:
    """The cache that `rollout_room.roomy` replaces."""
    return transformers.DynamicCache(config=config)


def with_plain_cache(run: Callable) -> None:
    """`run` with transformers' own cache."""
    with mock.patch.object(rollout_room, "roomy", plain_cache):
        run()


@torch.no_grad()
def rollouts(rounds: int) -> None:
    """Prompts of 24 tokens, 8 responses each; all of full length where nothing else is said."""
    for responses, tokens in ((64, 64), (64, 256), (16, 512)):
        model = llama(128, 4, 1024).eval()
        prompts = torch.randint(5, 1000, (responses // 8, 24)).repeat_interleave(8, 0)  # [B, 24]
        uniforms = torch.rand(responses, tokens, dtype=torch.float64)  # [B, T]
        temperatures = torch.ones(responses, dtype=torch.float64)
        config = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=True, eos_token_id=None, pad_token_id=0
        )
        no_stop = [-1]  # no token ends a response
        ours = partial(decode, model, prompts.tolist(), uniforms, temperatures, no_stop, 0)
        mask = torch.ones_like(prompts)
        theirs = partial(model.generate, prompts, attention_mask=mask, generation_config=config)
        title = f"rollout, {responses} responses of {tokens} tokens: `decode` / `generate`"
        compare(title, rounds, ours, theirs)

        # untrained, every token is about equally likely: half end before tokens / 3
        stops = list(range(10, 10 + 2048 // tokens))
        ragged = partial(decode, model, prompts.tolist(), uniforms, temperatures, stops, 0)
        title = "the same: `rollout_room.roomy` / `DynamicCache`"
        compare(title, rounds, ours, partial(with_plain_cache, ours))
        title = "the same, responses end at different lengths"
        compare(title, rounds, ragged, partial(with_plain_cache, ragged))


def output_layer(rounds: int) -> None:
    """1,024 tokens, hidden size 576, vocabulary 49,152: SmolLM2-135M's."""
    hidden = torch.randn(1024, 576, requires_grad=True)  # [N, H]
    weight = (0.05 * torch.randn(49152, 576)).requires_grad_()  # [V, H]
    tokens = torch.randint(0, 49152, (1024,))  # [N]

    def one_chunk(chunk, chunk_tokens):
        """Log-probabilities and entropy of some tokens, through their whole logits."""
        logits = F.linear(chunk, weight).float()
        token_logprobs = -F.cross_entropy(logits, chunk_tokens, reduction="none")
        with torch.no_grad():
            return token_logprobs, torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)

    def in_chunks(of_chunk):
        """Log-probabilities of all tokens, 512 at a time."""
        pairs = zip(hidden.split(512), tokens.split(512), strict=True)
        return torch.cat([of_chunk(chunk, chunk_tokens)[0] for chunk, chunk_tokens in pairs])

    def update():
        logprobs.token_logprobs(hidden, weight, None, tokens)[0].sum().backward()

    def checkpointed_update():
        in_chunks(partial(checkpoint, one_chunk, use_reentrant=False)).sum().backward()

    def whole_update():
        F.cross_entropy(F.linear(hidden, weight), tokens, reduction="sum").backward()

    def forward():
        logprobs.token_logprobs(hidden, weight, None, tokens)

    def forward_in_chunks():
        in_chunks(one_chunk)

    title = "output layer, forward and backward: `TokenLogprobs` / checkpointed chunks"
    compare(title, rounds, update, checkpointed_update)
    title = "the same / whole logits, nothing computed twice, no entropy"
    compare(title, rounds, update, whole_update)
    with torch.no_grad():
        title = "output layer, forward alone: `TokenLogprobs` / chunks"
        compare(title, rounds, forward, forward_in_chunks)


def micro_batches(rounds: int) -> None:
    """64 sequences of 8 to 128 tokens after prompts of 24, 8 a micro-batch."""
    model = llama_with_logprobs(128, 4, 1024)
    prompt = list(range(5, 29))
    sequences = [(prompt, [5] * length) for length in torch.randint(8, 129, (64,)).tolist()]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    order = range(64)

    def update(picks):
        for pick in picks:
            mb = batches.collate([sequences[i] for i in pick], 0, "cpu")
            model.response_logprobs(**mb)[0].sum().backward()
        model.zero_grad()

    by_length = batches.micro_batches(order, lengths, 8, 0, 1)
    as_they_come = [order[start : start + 8] for start in range(0, 64, 8)]
    ours = partial(update, by_length)
    title = "update, lengths 8 to 128: `batches.micro_batches` / as they come"
    compare(title, rounds, ours, partial(update, as_they_come))
    title = "the same / one padded batch"
    compare(title, rounds, ours, partial(update, [order]))


def optimizers(rounds: int) -> None:
    """AdamW's step in one kernel, and as it is without that."""
    models = {"0.1 M": llama(64, 3, 128), "110 M": llama(768, 12, 16384, heads=12)}
    for size, model in models.items():
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        fused = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
        plain = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.0)
        compare(f"AdamW, {size} parameters: fused / not", rounds, fused.step, plain.step)


def fsdp(rounds: int) -> None:
    """A model as it is, and sharded over one process."""
    plain = llama(64, 3, 1024)
    sharded = llama(64, 3, 1024)
    for block in sharded.model.layers:
        fully_shard(block, mesh=distributed.mesh(0))
    fully_shard(sharded, mesh=distributed.mesh(0))
    batch = torch.randint(5, 1000, (64, 20))  # [B, L]

    def step(model):
        model(input_ids=batch, labels=batch).loss.backward()
        model.zero_grad()

    title = "forward and backward, 64 x 20 tokens, one process: plain / FSDP"
    compare(title, rounds, partial(step, plain), partial(step, sharded))


def shares(rounds: int) -> None:
    """speed.py's tiny GRPO: prompts of 24 tokens, responses of 64, micro-batches of 8; 64 responses at once
    in the rollout."""
    model = llama_with_logprobs(128, 4, 1024)
    prompts = torch.randint(5, 1000, (8, 24)).tolist()
    all_prompts = [prompt for prompt in prompts for _ in range(8)]
    mb = batches.collate([(prompt, [5] * 64) for prompt in prompts], 0, "cpu")
    uniforms = torch.rand(64, 64, dtype=torch.float64)  # [B, T]
    temperatures = torch.ones(64, dtype=torch.float64)

    def update():
        model.response_logprobs(**mb)[0].sum().backward()

    @torch.no_grad()
    def rollout():
        decode(model, all_prompts, uniforms, temperatures, [-1], 0)

    print("\n| | matrix products | attention | all else |\n|---|---|---|---|")
    for name, run in {"update": update, "rollout": rollout}.items():
        run()  # the first warms up
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(rounds):
                run()
        spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        products = share_of(spent, ("aten::mm", "aten::addmm", "aten::bmm"))
        attention = share_of(spent, ("aten::_scaled_dot_product",))
        rest = 1 - products - attention
        print(f"| {name} | {products:.2f} | {attention:.2f} | {rest:.2f} |", flush=True)


def share_of(spent: dict[str, float], beginnings: tuple[str, ...]) -> float:
    """Of all time, that of operations whose names begin so."""
    matching = sum(time for name, time in spent.items() if name.startswith(beginnings))
    return matching / sum(spent.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each")
    rounds = parser.parse_args().rounds
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("| part | CPU time | ratio |\n|---|---|---|")
    rollouts(rounds)
    output_layer(rounds)
    micro_batches(rounds)
    optimizers(rounds)
    fsdp(rounds)
    shares(rounds)
    distributed.mesh.cache_clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
