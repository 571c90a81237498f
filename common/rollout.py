"""Rollouts: responses sampled from a policy, and the check that what samples is what trains."""

import inspect
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import transformers
from torch.distributed.tensor import DTensor
from transformers.cache_utils import DynamicLayer

from common import distributed, sharding
from common.batches import run_micro_batches
from common.cli import fail, note
from common.tokenization import stop_token

# The names that a decoder's forward has for its key-value cache: transformers from 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")

# The sampler reads a response token by token, from a cache and beside padding; training reads it whole. The two
# log-probabilities of a token are equal but for rounding. What the mean |difference| may be, in nats per token, by the
# type that computes: a right run measures 1e-6 in float32 and up to 0.05 in bfloat16, whose logits between 16 and 32
# are 0.125 apart; the faults known give 0.3 to 7 (docs/metrics.md, "Is what samples what trains?").
TOLERANCE = {
    torch.float64: 1e-5,  # the sampler's numbers are kept in float32
    torch.float32: 1e-3,
    torch.bfloat16: 0.2,
}

PROBE_TOKENS = 16
PROBE_SIZE = 8  # sequences a forward pass: without gradient, so little memory
DISTURBANCES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)


# --- the key-value cache ---------------------------------------------------------------------------------------------

ROOM = 16  # tokens; one copy each time they are used up, and at most so many too many


class RoomyLayer(DynamicLayer):
    """What DynamicLayer holds, in the first columns of larger tensors [B, heads, a multiple of ROOM, head size]: room for the
    tokens to come. transformers' own copies all of them for each token; a static cache would have every token attend to the
    greatest length."""

    room = ()

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n = self.get_seq_length()
        end = n + key_states.shape[-2]
        if n == 0 or end > self.room[0].shape[-2]:
            old = (self.keys, self.values) if n else (key_states[:, :, :0], value_states[:, :, :0])
            self.room = tuple(F.pad(x, (0, 0, 0, -(-end // ROOM) * ROOM - n)) for x in old)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, n:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if self.room:  # a layer that reads another's keys has none
            n, self.room = self.get_seq_length(), tuple(room[indices] for room in self.room)
            self.keys, self.values = (room[:, :, :n] for room in self.room)


def roomy(config):
    """A DynamicCache, its plain layers (not those of a sliding window) with room."""
    cache = transformers.DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# --- one batch of one rank -------------------------------------------------------------------------------------------


def sample(logits, uniforms, temperatures, forbidden: int | None):
    """Tokens [B] from logits [B, V] by inverse CDF, the first whose cumulative probability passes its uniform number [B], and
    their log-probabilities [B] (greedy: at temperature 1). The numbers are drawn per *sequence*, so a response depends on
    neither its rank nor its neighbours in the batch."""
    logits, greedy = logits.double(), temperatures == 0
    if forbidden is not None:
        logits[:, forbidden] = -torch.inf
    probs = (logits / temperatures.masked_fill(greedy, 1.0)[:, None]).softmax(-1)
    cdf = probs.cumsum(-1)
    tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def tested_versions() -> str:
    return f"transformers {transformers.__version__} is installed, requirements.txt has the version that is tested"


def cache_argument(policy) -> str:
    """The name under which the policy's forward takes its key-value cache.

    Ends with one line where it takes none by a known name, or no attention mask: without them the model would run, and
    sample garbage.
    """
    takes = inspect.signature(policy.forward).parameters
    kind = policy.config.model_type
    if "attention_mask" not in takes:
        fail(
            f"a {kind} model's forward takes no attention_mask, so padded prompts cannot be read; {tested_versions()}"
        )
    for name in CACHE_NAMES:
        if name in takes:
            return name
    known = " or ".join(CACHE_NAMES)
    fail(
        f"a {kind} model's forward takes no key-value cache as {known}, so it cannot be sampled; {tested_versions()}"
    )


def new_cache(policy):
    """An empty cache for a decoder. Ends with one line where a layer's state cannot follow the responses that go on."""
    cache = roomy(policy.config)
    for layer in cache.layers:
        if not hasattr(layer, "batch_select_indices"):
            kind = f"{policy.config.model_type} model caches {type(layer).__name__}s"
            fail(f"a {kind}, which cannot leave out responses that have ended, so it cannot be sampled")
    return cache


def decode(
    policy, prompts: list[list[int]], uniforms, temperatures, stops: list[int], pad: int
) -> list[tuple[list, list]]:
    """A response to each prompt, of at most T tokens for `uniforms` [B, T]; `temperatures` [B]. (tokens, their log-probabilities)
    Equal prompts are read once; a response that has ended leaves the batch, so that a step costs what is unfinished."""
    device = uniforms.device
    takes = inspect.signature(policy.forward).parameters
    cache_name = cache_argument(policy)
    row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    width = max(map(len, row_of))  # padding on the left: responses go on from the last column
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in row_of], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in row_of], device=device)
    encoder_decoder, states, ended = (
        policy.config.is_encoder_decoder,
        mask,
        torch.tensor(stops, dtype=torch.long, device=device),
    )
    feed = torch.full_like(ids[:, :1], policy.config.decoder_start_token_id) if encoder_decoder else ids
    cache = None if encoder_decoder else new_cache(policy)
    alive, logprobs = torch.arange(len(prompts), device=device), torch.zeros_like(uniforms)
    tokens, t = torch.full_like(uniforms, pad, dtype=torch.long), 0
    while t < uniforms.shape[1] and len(alive):
        # by the names that the model has: what a library renames must not vanish on the way
        inputs = {"attention_mask": mask, cache_name: cache, "use_cache": True}
        if encoder_decoder:
            inputs |= dict(
                decoder_input_ids=feed, **({"encoder_outputs": (states,)} if t else {"input_ids": ids})
            )
        else:
            inputs["input_ids"] = feed
            if (
                "position_ids" in takes
            ):  # else it counts by the mask, or `check_sampler` finds out that it does not
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -feed.shape[1] :]
            if "logits_to_keep" in takes:  # else it makes all of them: slower, the same
                inputs["logits_to_keep"] = 1
        out = policy(**inputs)
        logits = out.logits[:, -1]
        if encoder_decoder:
            cache = getattr(out, cache_name)
        if t == 0:  # from here on a row for each response
            rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
            states = out.encoder_last_hidden_state if encoder_decoder else mask
            logits, mask, states = logits[rows], mask[rows], states[rows]
            cache.batch_select_indices(rows)
        token, logprobs[alive, t] = sample(
            logits, uniforms[alive, t], temperatures[alive], policy.forbidden_token
        )
        tokens[alive, t] = token
        rows, t = torch.isin(token, ended).logical_not().nonzero().squeeze(1), t + 1
        if len(rows) < len(alive):
            alive, token, mask, states = alive[rows], token[rows], mask[rows], states[rows]
            cache.batch_select_indices(rows)
        feed, mask = token[:, None], mask if encoder_decoder else F.pad(mask, (0, 1), value=1)
    found = tokens.tolist()
    ends = [next((t + 1 for t, token in enumerate(row) if token in stops), None) for row in found]
    return [(y[:end], p[:end]) for y, p, end in zip(found, logprobs.tolist(), ends, strict=True)]


# --- all prompts, all ranks ------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(
    policy,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature,
    seed: tuple,
    size: int = 0,
    compare=True,
):
    """Sampled response tokens for all prompts (token lists), on every rank: N lists, stop token included (unless cut off); and
    the log-probabilities [N, T] with which they were drawn, 0 after the end.

    `temperature`: a number, or one for each prompt; 0 is greedy. `size` prompts at a time (0: all of this rank's).

    The log-probabilities of a policy's first rollout are compared with the policy's own, and end the run where they differ
    by more than rounding. In later ones a difference is named in the log; with `compare=False` that is left to the caller,
    who has the policy's log-probabilities at hand (`note_drift`).
    """
    stops = sorted({stop_token(tokenizer), tokenizer.eos_token_id})
    responses, sampled = sample_all(
        policy, prompts, max_new_tokens, temperature, seed, size, stops, tokenizer.pad_token_id
    )
    first = not getattr(policy, "sampler_checked", False)
    if responses and (first or compare):
        off = differences(policy, prompts, responses, sampled, temperature)
        if first:
            require_agreement(policy, prompts, off)
            policy.sampler_checked = True
        elif not mean_of(off) <= tolerance(policy):
            note(f"a rollout: {disagreement(policy, mean_of(off))}")
    return responses, sampled


def sample_all(
    policy, prompts, max_new_tokens: int, temperature, seed: tuple, size: int, stops: list[int], pad: int
):
    """What `rollout` returns, of any `stops`: each rank samples its share of the prompts, and all get all of it."""
    temperatures = torch.as_tensor(temperature, dtype=torch.float64, device=distributed.device()).expand(
        len(prompts)
    )
    mine = sorted(range(distributed.rank(), len(prompts), distributed.world()), key=lambda i: len(prompts[i]))
    seeds = [((seed[0] * 1_000_003 + seed[1]) * 1_000_003 + i) % 2**63 for i in mine]
    found, training, engine = [], policy.training, getattr(policy, "engine", None)
    policy.eval()
    if engine:
        found = engine.generate(
            policy, [prompts[i] for i in mine], seeds, temperatures[mine].tolist(), max_new_tokens, stops
        )
    else:
        with sharding.gathered(policy):
            for start in range(0, len(mine), size or len(mine) or 1):
                at = slice(start, start + (size or len(mine)))
                uniforms = [
                    torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(number))
                    for number in seeds[at]
                ]
                uniforms = torch.stack(uniforms).double().to(distributed.device())
                found += decode(
                    policy, [prompts[i] for i in mine[at]], uniforms, temperatures[mine[at]], stops, pad
                )
    policy.train(training)
    merged = {
        i: f
        for part in distributed.all_gather_object(dict(zip(mine, found, strict=True)))
        for i, f in part.items()
    }
    sampled = torch.zeros(len(prompts), max((len(tokens) for tokens, _ in merged.values()), default=0))
    for i, (tokens, logprobs) in merged.items():
        sampled[i, : len(tokens)] = torch.tensor(logprobs)
    return [merged[i][0] for i in range(len(prompts))], sampled.to(distributed.device())


# --- is what samples what trains? ------------------------------------------------------------------------------------


@torch.no_grad()
def check_sampler(
    policy, tokenizer, prompts: list[list[int]], max_new_tokens: int, temperature: float
) -> None:
    """Ends the run with one line, before its first update, where the sampler's log-probabilities are not the policy's.

    Four of the `prompts`, two of them longer (so that there is padding), are answered twice: with the weights as
    they are, and with all trained ones disturbed. The second finds an engine that keeps older weights and a sampler that
    leaves out LoRA's adapters, which begin as zeros. Afterwards the weights are what they were, bit for bit.
    """
    if not prompts:
        return
    by_length = sorted(prompts, key=len)
    middle = len(by_length) // 2
    longer = by_length[middle : middle + 2]
    if len(longer[0]) == len(by_length[0]):
        longer = by_length[-2:]
    asked = by_length[:2] + longer
    limit = min(PROBE_TOKENS, max_new_tokens)

    def answer():
        """Responses of exactly `limit` tokens: none ends early, so there are always some that read the cache."""
        return sample_all(policy, asked, limit, temperature, (0, 0), 0, [], tokenizer.pad_token_id)

    responses, sampled = answer()
    require_agreement(policy, asked, differences(policy, asked, responses, sampled, temperature))
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        return
    for amount in DISTURBANCES:
        with disturbed(policy, amount):
            moved = mean_of(differences(policy, asked, responses, sampled, temperature))
            if moved < 5 * tolerance(policy):
                continue  # too little to tell the two policies apart
            responses, sampled = answer()
            off = mean_of(differences(policy, asked, responses, sampled, temperature))
        if not off <= moved / 4:  # rounding grows with the disturbance too, so this is no matter of tolerance
            fail(
                f"the trained weights were moved so that log-probabilities change by {moved:.3g} nats a token, and the sampler's"
                f" are {off:.3g} off: it leaves out LoRA adapters or keeps older weights; {tested_versions()}"
            )
        return
    note(
        "the sampler could not be checked with other weights: moving the trained ones hardly changes the policy"
    )


def note_drift(policy, sampled, logprobs, mask, step: int) -> None:
    """Names in the log a rollout whose log-probabilities `sampled` are not the policy's own `logprobs`; all [N, T]."""
    off = ((sampled - logprobs).abs() * mask).sum() / mask.sum()
    if not off <= tolerance(policy):
        note(f"step {step}: {disagreement(policy, off.item())}")


def tolerance(policy) -> float:
    return TOLERANCE[policy.compute_dtype]


def differences(policy, prompts, responses, sampled, temperature) -> list[torch.Tensor]:
    """|sampler's - policy's log-probability| of each token, a tensor [T_i] a response, on every rank."""
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(prompts)).tolist()
    found = [None] * len(prompts)
    for heat in sorted(set(temperatures)):
        rows = [i for i, other in enumerate(temperatures) if other == heat]
        sequences = [(prompts[i], responses[i]) for i in rows]

        def forward(mb):
            return policy.response_logprobs(**mb, temperature=heat or 1.0)[0]

        scored = run_micro_batches(forward, sequences, PROBE_SIZE, 0, sampled.shape[1], sampled.dtype)
        for i, row in zip(rows, scored, strict=True):
            length = len(responses[i])
            found[i] = (sampled[i, :length] - row[:length]).abs()
    return found


def mean_of(off: list[torch.Tensor]) -> float:
    return torch.cat(off).double().mean().item()


def disagreement(policy, off: float) -> str:
    rounding = (
        f"rounding in {str(policy.compute_dtype).removeprefix('torch.')} gives at most {tolerance(policy):g}"
    )
    return f"the sampler's log-probabilities are {off:.3g} nats a token off the policy's ({rounding})"


def require_agreement(policy, prompts, off: list[torch.Tensor]) -> None:
    """Ends the run where the mean of `off` (`differences`) is beyond rounding."""
    mean = mean_of(off)
    if not mean <= tolerance(policy):  # nor NaN
        fail(f"{disagreement(policy, mean)}: {likeliest_cause(policy, prompts, off)}; {tested_versions()}")


def likeliest_cause(policy, prompts, off: list[torch.Tensor]) -> str:
    """In words, by which tokens disagree: all of them, those after the first, or those of prompts that have padding."""
    if getattr(policy, "engine", None):
        return "vLLM's weights or layers are not the policy's; sample with --rollout-engine torch"
    width = max(map(len, prompts))
    padded = [tokens[0].item() for prompt, tokens in zip(prompts, off, strict=True) if len(prompt) < width]
    whole = [tokens[0].item() for prompt, tokens in zip(prompts, off, strict=True) if len(prompt) == width]
    limit = tolerance(policy)
    if not sum(whole) <= limit * len(whole):
        return "even the first token of the longest prompts, so other weights or another function are sampled than trained"
    if padded and not sum(padded) <= limit * len(padded):
        return "it begins where a prompt is padded on the left, so attention mask or position ids do not reach the model"
    return "the first token agrees and later ones do not, so the key-value cache does not reach the model"


@contextmanager
def disturbed(policy, amount: float):
    """Inside, each trained weight is off by about `amount` of its tensor's root mean square (of 0.01 where that is 0)."""
    sharding.reshard(policy)  # or a root that is still gathered would keep the weights of before
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    trained = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained]
    kept = [weight.clone() for weight in trained]
    for weight in trained:
        if weight.numel():
            size = weight.square().mean().sqrt()
            size = torch.where(size > 0, size, 0.01)
            wave = torch.arange(
                weight.numel(), dtype=weight.dtype, device=weight.device
            ).sin_()  # not random: replicas agree
            weight.add_(wave.view_as(weight).mul_(amount * size))
    try:
        yield
    finally:
        sharding.reshard(policy)
        for weight, before in zip(trained, kept, strict=True):
            weight.copy_(before)
