"""What single parts of a step cost beside what they replaced, in CPU seconds of one thread; the table of docs/performance.md.

    OMP_NUM_THREADS=1 python benchmarks/parts.py

Each pair takes turns in one process; printed are the medians of `--rounds` and their ratio, ours over the other. Then what share
of an update and of a rollout is matrix products and attention, which are the model's own and no trainer can leave out.
"""

import argparse
import statistics
import sys
import time
import types
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

ROUNDS = 7


def llama(hidden, layers, vocabulary, heads=4):
    sizes = dict(
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=heads))
    model.forbidden_token = None
    return model


def compare(title: str, ours, other) -> None:
    seconds = {ours: [], other: []}
    for i in range(ROUNDS + 1):
        for run in (ours, other):
            start = time.process_time()
            run()
            seconds[run] += [time.process_time() - start] * (i > 0)  # the first warms up
    a, b = (statistics.median(seconds[run]) for run in (ours, other))
    print(f"| {title} | {1e3 * a:,.1f} ms / {1e3 * b:,.1f} ms | {a / b:.2f} |", flush=True)


@torch.no_grad()
def rollouts() -> None:
    """Prompts of 24 tokens, 8 responses each; all of full length where nothing else is said."""
    for n, tokens in ((64, 64), (64, 256), (16, 512)):
        model = llama(128, 4, 1024).eval()
        prompts = torch.randint(5, 1000, (n // 8, 24)).repeat_interleave(8, 0)
        uniforms, heat = torch.rand(n, tokens, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        config = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=True, eos_token_id=None, pad_token_id=0
        )
        ours = partial(decode, model, prompts.tolist(), uniforms, heat, [-1], 0)
        theirs = partial(
            model.generate, prompts, attention_mask=torch.ones_like(prompts), generation_config=config
        )
        compare(f"rollout, {n} responses of {tokens} tokens: `decode` / `generate`", ours, theirs)

        def plain(run):
            with mock.patch.object(
                rollout_room, "roomy", lambda config: transformers.DynamicCache(config=config)
            ):
                run()

        stops = list(
            range(10, 10 + 2048 // tokens)
        )  # untrained, every token is about equally likely: half end before tokens / 3
        ragged = partial(decode, model, prompts.tolist(), uniforms, heat, stops, 0)
        compare("the same: `rollout_room.roomy` / `DynamicCache`", ours, partial(plain, ours))
        compare("the same, responses end at different lengths", ragged, partial(plain, ragged))


def output_layer() -> None:
    """1,024 tokens, hidden size 576, vocabulary 49,152: SmolLM2-135M's."""
    hidden, weight = (
        torch.randn(1024, 576, requires_grad=True),
        (0.05 * torch.randn(49152, 576)).requires_grad_(),
    )
    tokens = torch.randint(0, 49152, (1024,))

    def one(h, y):
        logits = F.linear(h, weight).float()
        logprobs = -F.cross_entropy(logits, y, reduction="none")
        with torch.no_grad():
            return logprobs, torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)

    def chunks(each):
        return torch.cat([each(h, y)[0] for h, y in zip(hidden.split(512), tokens.split(512), strict=True)])

    update = lambda: logprobs.token_logprobs(hidden, weight, None, tokens)[0].sum().backward()
    compare(
        "output layer, forward and backward: `TokenLogprobs` / checkpointed chunks",
        update,
        lambda: chunks(partial(checkpoint, one, use_reentrant=False)).sum().backward(),
    )
    compare(
        "the same / whole logits, nothing computed twice, no entropy",
        update,
        lambda: F.cross_entropy(F.linear(hidden, weight), tokens, reduction="sum").backward(),
    )
    with torch.no_grad():
        forward = partial(logprobs.token_logprobs, hidden, weight, None, tokens)
        compare("output layer, forward alone: `TokenLogprobs` / chunks", forward, lambda: chunks(one))


def micro_batches() -> None:
    """64 sequences of 8 to 128 tokens after prompts of 24, 8 a micro-batch."""
    model = llama(128, 4, 1024)
    model.response_logprobs = types.MethodType(logprobs.response_logprobs, model)
    sequences = [(list(range(5, 29)), [5] * length) for length in torch.randint(8, 129, (64,)).tolist()]
    lengths, order = [len(p) + len(r) for p, r in sequences], range(64)

    def update(picks):
        for pick in picks:
            mb = batches.collate([sequences[i] for i in pick], 0, "cpu")
            model.response_logprobs(**mb)[0].sum().backward()
        model.zero_grad()

    mixed = [order[i : i + 8] for i in range(0, 64, 8)]
    ours = partial(update, batches.micro_batches(order, lengths, 8, 0, 1))
    compare("update, lengths 8 to 128: `batches.micro_batches` / as they come", ours, partial(update, mixed))
    compare("the same / one padded batch", ours, partial(update, [order]))


def optimizer_and_fsdp() -> None:
    batch = torch.randint(5, 1000, (64, 20))
    for title, sizes in (("0.1 M", (64, 3, 128)), ("110 M", (768, 12, 16384, 12))):
        model = llama(*sizes)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        make = lambda model=model, **more: torch.optim.AdamW(
            model.parameters(), lr=1e-9, weight_decay=0.0, **more
        )
        compare(f"AdamW, {title} parameters: fused / not", make(fused=True).step, make().step)
    plain, sharded = llama(64, 3, 1024), llama(64, 3, 1024)
    for block in sharded.model.layers:
        fully_shard(block, mesh=distributed.mesh(0))
    fully_shard(sharded, mesh=distributed.mesh(0))

    def step(model):
        model(input_ids=batch, labels=batch).loss.backward()
        model.zero_grad()

    compare(
        "forward and backward, 64 x 20 tokens, one process: plain / FSDP",
        partial(step, plain),
        partial(step, sharded),
    )


def shares() -> None:
    """speed.py's tiny GRPO: prompts of 24 tokens, responses of 64, micro-batches of 8; 64 responses at once in the rollout."""
    model = llama(128, 4, 1024)
    model.response_logprobs = types.MethodType(logprobs.response_logprobs, model)
    prompts = torch.randint(5, 1000, (8, 24)).tolist()
    mb = batches.collate([(prompt, [5] * 64) for prompt in prompts], 0, "cpu")
    uniforms, heat = torch.rand(64, 64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)

    def update():
        model.response_logprobs(**mb)[0].sum().backward()

    def rollout():
        with torch.no_grad():
            decode(model, [prompt for prompt in prompts for _ in range(8)], uniforms, heat, [-1], 0)

    print("\n| | matrix products | attention | all else |\n|---|---|---|---|")
    for run in (update, rollout):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(ROUNDS):
                run()
        spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        products, attention = (
            sum(us for key, us in spent.items() if key.startswith(names)) / sum(spent.values())
            for names in (("aten::mm", "aten::addmm", "aten::bmm"), "aten::_scaled_dot_product")
        )
        print(
            f"| {run.__name__} | {products:.2f} | {attention:.2f} | {1 - products - attention:.2f} |",
            flush=True,
        )


def main() -> None:
    global ROUNDS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    ROUNDS = parser.parse_args().rounds
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("| part | CPU time | ratio |\n|---|---|---|")
    rollouts()
    output_layer()
    micro_batches()
    optimizer_and_fsdp()
    shares()
    distributed.mesh.cache_clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
