"""Rollouts: responses sampled from a policy, and the check that what samples is what trains."""

import inspect
import math
import weakref
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import distributed, sharding
from common.batches import run_micro_batches
from common.checks import disturbed, one_line, tolerance
from common.cli import fail, note
from common.tokenization import stop_tokens

# Policies whose first rollout was compared with them, and agreed.
COMPARED = weakref.WeakSet()

# The names that a decoder's forward has for its key-value cache: transformers from 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")

# For `check_sampler`: how many tokens it samples, and by how much it moves the trained weights, the least
# that is enough.
PROBE_TOKENS = 16
DISTURBANCES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
# Sequences per forward pass when log-probabilities are compared: without gradient, so little memory.
PROBE_SIZE = 8


# --- the key-value cache ------------------------------------------------------------------------------------

ROOM = 16  # tokens of room added at a time: one copy of the cache per 16 tokens, at most 15 columns unused


class RoomyLayer(DynamicLayer):
    """A DynamicLayer that keeps its keys and values in the first columns of larger tensors, with room for
    later tokens.

    `room` is (keys, values), each [B, heads, a multiple of ROOM, head size]. transformers' own layer copies
    the whole cache for each token; its static cache has every token attend to the greatest length.
    """

    room = ()

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends the keys and values of new tokens, [B, heads, new tokens, head size]; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        if used == 0 or end > self.room[0].shape[-2]:
            self.enlarge(key_states, value_states, used, end)
        self.room[0][:, :, used:end] = key_states
        self.room[1][:, :, used:end] = value_states
        self.show(end)
        return self.keys, self.values

    def enlarge(self, key_states, value_states, used: int, end: int) -> None:
        """New tensors with room for `end` columns, up to a multiple of ROOM; the `used` ones are copied."""
        if used:
            old = (self.keys, self.values)
        else:
            old = (key_states[:, :, :0], value_states[:, :, :0])
        columns = math.ceil(end / ROOM) * ROOM
        self.room = tuple(F.pad(x, (0, 0, 0, columns - used)) for x in old)

    def show(self, end: int) -> None:
        """The first `end` columns are what the layer holds: views, no copies."""
        self.keys = self.room[0][:, :, :end]
        self.values = self.room[1][:, :, :end]

    def reorder_cache(self, beam_idx):
        """Keeps the rows `beam_idx` of the batch: transformers' name, as beam search asks for it."""
        if self.room:  # a layer that reads another's keys has none
            used = self.get_seq_length()
            self.room = tuple(room[beam_idx] for room in self.room)
            self.show(used)


def roomy(config):
    """A DynamicCache, its plain layers (not those of a sliding window) with room."""
    cache = transformers.DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# --- one batch of one rank ----------------------------------------------------------------------------------


class Filters(NamedTuple):
    """What changes a policy's distribution before a token is drawn; these values change nothing.

    For evaluation alone. The training scripts have no such flags: the log-probabilities of their ratios, KL
    penalties and gradients are of the full distribution, and what a filter samples is another policy's, for
    which they would be wrong.
    """

    top_k: int = 0  # the likeliest k tokens; 0: all
    top_p: float = 1.0  # the fewest likeliest tokens that have this probability together
    # divides the positive logits of tokens that prompt or response hold, multiplies the negative ones
    repetition_penalty: float = 1.0


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
    forbidden: torch.Tensor | None,
    any_greedy: bool = True,
    any_scaled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] from logits [B, V] and their log-probabilities [B], by the inverse CDF.

    A token is the first whose cumulative probability passes the uniform number [B] of its row; at temperature
    0 it is the most likely one, and its log-probability is that at temperature 1. The numbers are drawn per
    *sequence*, so a response depends on neither its rank nor its neighbours in the batch. `forbidden` [n]:
    tokens of probability zero. `any_greedy`, `any_scaled`: whether one of `temperatures` [B] is 0, or neither
    0 nor 1. A caller who knows that none is saves a pass over the logits; asking the device here would wait
    for it at each token.
    """
    # float32 is what the policy's own log-probabilities are computed in, too. A softmax in float64 would draw
    # the same tokens from small vocabularies; of 32,000 entries one draw in some thousands is another.
    full = torch.promote_types(logits.dtype, torch.float32)
    if forbidden is None:
        logits = logits.to(full)
    else:
        logits = logits.to(full, copy=True).index_fill_(1, forbidden, -torch.inf)
    greedy = temperatures == 0
    scaled = logits
    if any_scaled:
        scaled = logits / temperatures.masked_fill(greedy, 1.0).to(logits.dtype)[:, None]
    probs = scaled.softmax(-1)
    # summed in float64: in float32 the sum's last digit is larger than the probability of many a token
    cdf = probs.to(torch.float64, copy=True).cumsum_(-1)
    # the last entry is 1 but for rounding; scaled by it, a number below 1 always finds a token
    tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)
    # beyond the last only where the logits are NaN; `decode` ends the run by their log-probabilities
    tokens = tokens.clamp_(max=logits.shape[1] - 1)
    if any_greedy:
        tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def sample_filtered(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
    forbidden: torch.Tensor | None,
    filters: Filters,
    said: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] as from `sample`, of what `filters` leave, and their log-probabilities [B] *without* filters: so
    they can be compared with the policy's.

    The order is that of transformers' `generate`: penalty, temperature, top-k, top-p. `said` [B, S] are the
    tokens that the penalty counts. A greedy token is the likeliest after the penalty.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if forbidden is not None:  # before top-k, which would count them
        logits.index_fill_(1, forbidden, -torch.inf)
    greedy = temperatures == 0
    heats = temperatures.masked_fill(greedy, 1.0).to(logits.dtype)[:, None]
    scores = logits
    if filters.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(filters.repetition_penalty)(said, scores)
    scores = scores / heats
    if filters.top_k:
        scores = TopKLogitsWarper(filters.top_k)(said, scores)
    if filters.top_p < 1:
        scores = TopPLogitsWarper(filters.top_p)(said, scores)
    # the scores have their temperature by now
    tokens, _ = sample(scores, uniforms, greedy.logical_not().to(temperatures.dtype), None)
    logprobs = (logits / heats).log_softmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def tested_versions() -> str:
    """The end of an error message that a library's change may be the cause of."""
    installed = f"transformers {transformers.__version__} is installed"
    return f"{installed}, requirements.txt has the version that is tested"


def padded_left(prompts: list, pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, mask) of prompts, [B, P] each, padded on the left: responses go on from the last column."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def said_before(policy, prompts: list, device) -> torch.Tensor:
    """[B, S] tokens that a repetition penalty counts before the first token of a response, as transformers'
    `generate` does: the prompt's, of an encoder-decoder the decoder's first.

    Short prompts are padded with their own first token. The padding token may be the one that ends a response
    (where a tokenizer has no other), and is said by no prompt.
    """
    if policy.config.is_encoder_decoder:
        return torch.full((len(prompts), 1), policy.config.decoder_start_token_id, device=device)
    width = max(map(len, prompts))
    rows = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device)


def cache_argument(takes: Collection[str], kind: str) -> str:
    """The name under which a model's forward, with parameters named `takes`, takes its key-value cache.

    Ends with one line where it takes none by a known name, or no attention mask: without them the model would
    run, and sample garbage.
    """
    if "attention_mask" not in takes:
        fail(
            f"a {kind} model's forward takes no attention_mask, so padded prompts cannot be read; "
            f"{tested_versions()}"
        )
    for name in CACHE_NAMES:
        if name in takes:
            return name
    known = " or ".join(CACHE_NAMES)
    fail(
        f"a {kind} model's forward takes no key-value cache as {known}, so it cannot be sampled; "
        f"{tested_versions()}"
    )


def decoder_logits(policy, takes, cache_name: str, feed, mask, cache) -> torch.Tensor:
    """Logits [b, V] after the tokens `feed` [b, n]: the whole prompts first, then one token per response.

    `mask` [b, columns so far] says what is padding; the cache gets the new keys and values, in place. `takes`
    are the names of the forward's parameters: arguments go by the names that the model has, so that what a
    library renames is missed.
    """
    read = feed.shape[1]
    # where all layers are recurrent there is nothing to attend to but the new tokens
    attends = any(isinstance(layer, DynamicLayer) for layer in cache.layers)
    seen = mask if attends else mask[:, -read:]
    inputs = {"input_ids": feed, "attention_mask": seen, cache_name: cache, "use_cache": True}
    if "position_ids" in takes:  # else it counts by the mask, or `check_sampler` finds out that it does not
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -read:]
    if "logits_to_keep" in takes:  # else it makes all of them: slower, the same
        inputs["logits_to_keep"] = 1
    return policy(**inputs).logits[:, -1]


def encoder_decoder_logits(policy, cache_name: str, ids, encoder_states, feed, mask, cache):
    """(logits [b, V], cache, encoder's states [b, P, H]) after the decoder's tokens `feed` [b, 1].

    The encoder reads the prompts `ids` where `encoder_states` is None, at the first token; later calls give
    its states. `mask` [b, P] is the prompts'. The model makes the cache.
    """
    inputs = {"attention_mask": mask, cache_name: cache, "use_cache": True, "decoder_input_ids": feed}
    if encoder_states is None:
        inputs["input_ids"] = ids
    else:
        inputs["encoder_outputs"] = (encoder_states,)
    out = policy(**inputs)
    return out.logits[:, -1], getattr(out, cache_name), out.encoder_last_hidden_state


def decode(
    policy: transformers.PreTrainedModel,
    prompts: list[list[int]],
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
    stops: list[int],
    pad: int,
    filters: Filters | None = None,
) -> list[tuple[list[int], list[float]]]:
    """A response to each of B prompts: (its tokens, their log-probabilities), of at most T tokens.

    `uniforms` [B, T] are the random numbers. `temperatures` [B]: 0 is greedy. A response ends with the first
    of `stops`, which belongs to it. Equal prompts are read once; a response that has ended leaves the batch,
    so that a step costs what is unfinished. With `filters` the log-probabilities are those without them.
    """
    device = uniforms.device
    takes = inspect.signature(policy.forward).parameters
    cache_name = cache_argument(takes, policy.config.model_type)
    encoder_decoder = policy.config.is_encoder_decoder
    heats = set(temperatures.tolist())
    any_greedy = 0.0 in heats
    any_scaled = bool(heats - {0.0, 1.0})
    forbidden = getattr(policy, "forbidden_tokens", None)
    ends = torch.tensor(stops, dtype=torch.long, device=device)

    # the different prompts, P columns
    row_of = {}
    for prompt in prompts:
        row_of.setdefault(tuple(prompt), len(row_of))
    ids, mask = padded_left([*row_of], pad, device)
    encoder_states = None
    if encoder_decoder:
        feed = torch.full_like(ids[:, :1], policy.config.decoder_start_token_id)
        cache = None
    else:
        feed = ids
        cache = roomy(policy.config)

    tokens = torch.full_like(uniforms, pad, dtype=torch.long)  # [B, T]
    logprobs = torch.zeros_like(uniforms)  # [B, T]
    prompt_tokens = said_before(policy, prompts, device) if filters else None  # [B, S]
    # the responses that go on, by their place among the B: [b]
    alive = torch.arange(len(prompts), device=device)
    for t in range(uniforms.shape[1]):
        if encoder_decoder:
            logits, cache, encoder_states = encoder_decoder_logits(
                policy, cache_name, ids, encoder_states, feed, mask, cache
            )
        else:
            logits = decoder_logits(policy, takes, cache_name, feed, mask, cache)
        if t == 0:  # so far there was a row per different prompt, from here on there is one per response
            copies = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
            logits = logits[copies]
            mask = mask[copies]
            if encoder_decoder:
                encoder_states = encoder_states[copies]
            cache.reorder_cache(copies)
            if forbidden is not None:  # some models give fewer logits than their output layer has rows
                forbidden = forbidden[forbidden < logits.shape[1]]

        if filters is None:
            token, token_logprobs = sample(
                logits, uniforms[alive, t], temperatures[alive], forbidden, any_greedy, any_scaled
            )
        else:
            said = torch.cat([prompt_tokens[alive], tokens[alive, :t]], 1)
            token, token_logprobs = sample_filtered(
                logits, uniforms[alive, t], temperatures[alive], forbidden, filters, said
            )
        tokens[alive, t] = token
        logprobs[alive, t] = token_logprobs.to(logprobs.dtype)

        unfinished = torch.isin(token, ends).logical_not().nonzero().squeeze(1)
        if len(unfinished) == 0:
            break
        if len(unfinished) < len(alive):
            alive = alive[unfinished]
            token = token[unfinished]
            mask = mask[unfinished]
            if encoder_decoder:
                encoder_states = encoder_states[unfinished]
            cache.reorder_cache(unfinished)
        feed = token[:, None]
        if not encoder_decoder:  # an encoder's mask is of the prompts alone
            mask = F.pad(mask, (0, 1), value=1)

    if logprobs.isnan().any():
        kind = policy.config.model_type
        fail(f"the policy (a {kind} model) gives logits that are not a number, so nothing can be sampled")
    responses = []
    for row, row_logprobs in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        end = next((t + 1 for t, token in enumerate(row) if token in stops), None)  # None: cut off at T
        responses.append((row[:end], row_logprobs[:end]))
    return responses


# --- all prompts, all ranks ---------------------------------------------------------------------------------


@torch.no_grad()
def rollout(
    policy: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float | list[float],
    seed: tuple[int, int],
    size: int = 0,
    compare: bool = True,
    filters: Filters | None = None,
) -> tuple[list[list[int]], torch.Tensor]:
    """Sampled response tokens for all prompts (token lists), on every rank: N lists, stop token included
    (unless cut off); and the log-probabilities [N, T] with which they were drawn, 0 after the end.

    `temperature`: a number, or one for each prompt; 0 is greedy. `seed`: two numbers, the run's and the
    step's. `size` prompts at a time (0: all of this rank's). `filters`: what narrows the distribution that is
    sampled; the log-probabilities stay those without them.

    The log-probabilities of a policy's first rollout, and of every rollout of a frozen one, are compared with
    the policy's own, and end the run where they differ by more than rounding. In later ones of a trained
    policy a difference is named in the log; with `compare=False` that is left to the caller, who has the
    policy's log-probabilities at hand (`note_drift`). vLLM has those of the filtered distribution alone, so
    with its filters there is nothing to compare: `check_sampler` is for that.
    """
    with one_line(f"a {policy.config.model_type} model cannot be sampled"):
        responses, sampled = sample_all(
            policy,
            prompts,
            max_new_tokens,
            temperature,
            seed,
            size,
            stop_tokens(tokenizer),
            tokenizer.pad_token_id,
            filters,
        )
    if filters and getattr(policy, "engine", None):
        return responses, sampled
    first = policy not in COMPARED
    if responses and (first or compare):
        off = differences(policy, prompts, responses, sampled, temperature)
        if first or policy.frozen:
            require_agreement(policy, prompts, off)
            COMPARED.add(policy)
        elif not mean_of(off) <= tolerance(policy):
            note(f"a rollout: {disagreement(policy, mean_of(off))}")
    return responses, sampled


def sample_all(
    policy,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float | list[float],
    seed: tuple[int, int],
    size: int,
    stops: list[int],
    pad: int,
    filters: Filters | None = None,
) -> tuple[list[list[int]], torch.Tensor]:
    """What `rollout` returns, of any `stops`: each rank samples its share, and all get all of it."""
    device = distributed.device()
    temperatures = torch.as_tensor(temperature, dtype=torch.float64, device=device).expand(len(prompts))
    # prompts of similar length are sampled together: little padding
    mine = sorted(range(distributed.rank(), len(prompts), distributed.world()), key=lambda i: len(prompts[i]))
    seeds = seeds_of(seed, mine)
    engine = getattr(policy, "engine", None)
    training = policy.training
    policy.eval()
    found = []  # (tokens, log-probabilities) for each of `mine`
    if engine:
        asked = [prompts[i] for i in mine]
        heats = temperatures[mine].tolist()
        found = engine.generate(policy, asked, seeds, heats, max_new_tokens, stops, filters or Filters())
    else:
        lengths = [len(prompts[i]) for i in mine]
        with sharding.gathered(policy):
            for start, end in batches_of(lengths, size, getattr(policy, "pads_prompts", True)):
                batch = mine[start:end]
                uniforms = uniform_numbers(seeds[start:end], max_new_tokens, device)  # [B, T]
                asked = [prompts[i] for i in batch]
                found += decode(policy, asked, uniforms, temperatures[batch], stops, pad, filters)
    policy.train(training)

    of_prompt = {}
    for of_rank in distributed.all_gather_object(dict(zip(mine, found, strict=True))):
        of_prompt.update(of_rank)
    longest = max((len(tokens) for tokens, _ in of_prompt.values()), default=0)
    sampled = torch.zeros(len(prompts), longest)
    for i, (tokens, logprobs) in of_prompt.items():
        sampled[i, : len(tokens)] = torch.tensor(logprobs)
    responses = [of_prompt[i][0] for i in range(len(prompts))]
    return responses, sampled.to(device)


def seeds_of(seed: tuple[int, int], indices: list[int]) -> list[int]:
    """A seed for each of the prompts with the numbers `indices`; `seed`: the run's and the step's."""
    # the prime keeps different triples apart
    return [((seed[0] * 1_000_003 + seed[1]) * 1_000_003 + i) % 2**63 for i in indices]


def uniform_numbers(seeds: list[int], count: int, device) -> torch.Tensor:
    """[B, count] random numbers in [0, 1), each row from the seed of its own sequence."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).double().to(device)


def batches_of(lengths: list[int], size: int, padded: bool) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of batches of at most `size` prompts (0: all), of ascending `lengths`; where they
    are not to be `padded`, of one length each."""
    start = 0
    for end in range(1, len(lengths) + 1):
        is_last = end == len(lengths)
        full = size and end - start == size
        if is_last or full or (not padded and lengths[end] != lengths[start]):
            yield start, end
            start = end


# --- is what samples what trains? ---------------------------------------------------------------------------


@torch.no_grad()
def check_sampler(
    policy: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
) -> None:
    """Ends the run with one line, before its first update, where the sampler's numbers are not the policy's.

    Four of the `prompts`, two of them longer (so that there is padding), are answered three times: with the
    weights as they are, then once more with a response that ends before the others (so that it leaves the
    batch, and the cache), and with all trained weights disturbed. Where padding is what makes them differ, prompts
    of one length are sampled together from then on. The last finds an engine that keeps older
    weights and a sampler that leaves out LoRA's adapters, which begin as zeros. Afterwards the weights are
    what they were, bit for bit.
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

    def answer(stops):
        """Responses of exactly `limit` tokens, but where one of `stops` ends one."""
        return sample_all(policy, asked, limit, temperature, (0, 0), 0, stops, tokenizer.pad_token_id)

    kind = policy.config.model_type
    with one_line(f"a {kind} model cannot be sampled"):
        responses, sampled = answer([])
        off = differences(policy, asked, responses, sampled, temperature)
        if not mean_of(off) <= tolerance(policy) and not getattr(policy, "engine", None):
            # Padding on the left moves what a layer of blocks of tokens reads (DeepSeek V4), so such families
            # are sampled from prompts of one length at a time: here each prompt twice.
            padded_prompts = asked
            asked = [prompt for prompt in asked for _ in range(2)]
            policy.pads_prompts = False
            responses, sampled = answer([])
            apart = differences(policy, asked, responses, sampled, temperature)
            if not mean_of(apart) <= tolerance(policy):
                policy.pads_prompts = True
                require_agreement(policy, padded_prompts, off)
            note(
                f"a {kind} model: prompts of different lengths are sampled apart, as padding changes its answers"
            )
        middle_token = responses[0][limit // 2]
        ended, sampled_beside = answer([middle_token])
        require_agreement(policy, asked, differences(policy, asked, ended, sampled_beside, temperature))
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        return
    for amount in DISTURBANCES:
        with disturbed(policy, amount):
            moved = mean_of(differences(policy, asked, responses, sampled, temperature))
            if moved < 5 * tolerance(policy):
                continue  # too little to tell the two policies apart
            responses, sampled = answer([])
            off = mean_of(differences(policy, asked, responses, sampled, temperature))
        if not off <= moved / 4:  # rounding grows with the disturbance too, so this is no matter of tolerance
            fail(
                f"the trained weights were moved so that log-probabilities change by {moved:.3g} nats a "
                f"token, and the sampler's are {off:.3g} off: "
                f"it leaves out LoRA adapters or keeps older weights; {tested_versions()}"
            )
        return
    note(
        "the sampler could not be checked with other weights: "
        "moving the trained ones hardly changes the policy"
    )


def note_drift(policy, sampled: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor, step: int) -> None:
    """Names in the log a rollout whose log-probabilities `sampled` [N, T] are not the policy's `logprobs`."""
    off = ((sampled - logprobs).abs() * mask).sum() / mask.sum()
    if not off <= tolerance(policy):
        note(f"step {step}: {disagreement(policy, off.item())}")


def differences(
    policy,
    prompts: list[list[int]],
    responses: list[list[int]],
    sampled: torch.Tensor,
    temperature: float | list[float],
) -> list[torch.Tensor]:
    """|sampler's - policy's log-probability| of each token: [T_i] for each response, on every rank."""
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(prompts)).tolist()
    found = [None] * len(prompts)
    for heat in sorted(set(temperatures)):
        same_heat = [i for i, other in enumerate(temperatures) if other == heat]
        sequences = [(prompts[i], responses[i]) for i in same_heat]

        def forward(mb):
            return policy.response_logprobs(**mb, temperature=heat or 1.0)[0]  # greedy: at temperature 1

        own = run_micro_batches(forward, sequences, PROBE_SIZE, 0, sampled.shape[1], sampled.dtype)
        for i, own_logprobs in zip(same_heat, own, strict=True):
            length = len(responses[i])
            found[i] = (sampled[i, :length] - own_logprobs[:length]).abs()
    return found


def mean_of(off: list[torch.Tensor]) -> float:
    """The mean over all tokens of `differences`."""
    return torch.cat(off).double().mean().item()


def disagreement(policy, off: float) -> str:
    """A mean difference in words, compared with what rounding gives."""
    kind = str(policy.compute_dtype).removeprefix("torch.")
    rounding = f"rounding in {kind} gives at most {tolerance(policy):g}"
    return f"the sampler's log-probabilities are {off:.3g} nats a token off the policy's ({rounding})"


def require_agreement(policy, prompts, off: list[torch.Tensor]) -> None:
    """Ends the run where the mean of `off` (`differences`) is beyond rounding."""
    mean = mean_of(off)
    if not mean <= tolerance(policy):  # nor NaN
        kind = policy.config.model_type
        cause = likeliest_cause(policy, prompts, off)
        fail(f"a {kind} model: {disagreement(policy, mean)}: {cause}; {tested_versions()}")


def likeliest_cause(policy, prompts, off: list[torch.Tensor]) -> str:
    """In words, by which tokens disagree: all of them, those after the first, or those of padded prompts."""
    if getattr(policy, "engine", None):
        return "vLLM's weights or layers are not the policy's; sample with --rollout-engine torch"
    width = max(map(len, prompts))
    padded = []  # the first tokens' differences, of prompts that were padded and of those that were not
    whole = []
    for prompt, tokens in zip(prompts, off, strict=True):
        if len(prompt) < width:
            padded.append(tokens[0].item())
        else:
            whole.append(tokens[0].item())
    limit = tolerance(policy)
    if not sum(whole) <= limit * len(whole):  # nor NaN
        return (
            "even the first token of the longest prompts, "
            "so other weights or another function are sampled than trained"
        )
    if padded and not sum(padded) <= limit * len(padded):
        return (
            "it begins where a prompt is padded on the left, "
            "so attention mask or position ids do not reach the model"
        )
    return (
        "the first token agrees and later ones do not, "
        "so the key-value cache does not reach the model or lost its order"
    )
