"""Decoding by value: a frozen Global Value Model chooses among a policy's responses, or among its tokens.

No policy is trained.

    best of n: n responses are sampled, and the one with the highest Q at its last token is kept.
    guided:    at each step the policy's k likeliest tokens are re-weighted,
                   p(a | s) = pi(a | s) exp(Q(s, a) / beta) / (sum of the same over the k candidates)

Among all p, sum_a p(a) Q(s, a) - beta * KL(p || pi) is greatest at p proportional to pi exp(Q / beta). With
the soft values Q* of the best policy itself that is the policy with the greatest reward minus beta * KL. A GVM
has the values of the policies that wrote its data, so what is sampled here is one step of improvement over
those, no optimum; 2310.17022 does the same with the values of the policy that it decodes.
"""

import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoConfig

from common import distributed, sharding
from common.batches import collate, run_micro_batches
from common.checks import one_line, plain_tokens, random_sequences, tolerance
from common.cli import fail
from common.pretrained import load_pretrained
from common.rollout import (
    PROBE_SIZE,
    RoomyLayer,
    cache_argument,
    decoder_logits,
    differences,
    padded_left,
    require_agreement,
    rollout,
    roomy,
    sample,
    seeds_of,
    tested_versions,
    uniform_numbers,
)
from common.tokenization import stop_tokens
from common.value_heads import learned_signs, response_values

# Values are of standardised scores. Where those of a batch differ by less than this, rounding is measured
# against it and not against their spread.
LEAST_SPREAD = 0.1


class Decoded(NamedTuple):
    """A response and what the GVM and the policy say of it."""

    tokens: list[int]
    value: float  # Q at the last token, in the GVM's units
    kl: float  # nats: KL(p || pi) along the response, or a bound of it


class Guide(NamedTuple):
    """What re-weights the tokens of a policy."""

    gvm: torch.nn.Module
    candidates: int  # k
    beta: float  # in the GVM's units; inf: no re-weighting
    log_odds: bool  # atanh(Q) in place of Q


# --- the GVM ------------------------------------------------------------------------------------------------


def check_gvm_config(name: str, log_odds: bool) -> None:
    """Ends with one line where the GVM in `name` reads more than a prompt and its answer, or has no log-odds."""
    config = load_pretrained("configuration", AutoConfig, name)
    pairs = getattr(config, "context_pairs", 0)
    if pairs:
        fail(
            f"--gvm {name}: trained with --context-pairs {pairs}, it first reads other answers of the policy, "
            "and there are none before decoding; take a GVM without them"
        )
    if log_odds and not (learned_signs(config) and getattr(config, "gamma", 1.0) == 1):
        fail(
            "--log-odds is for a GVM whose returns were +1 and -1 (gvm_td.py --source preference) with "
            f"--gamma 1, and {name} is none"
        )


def require_close(found: torch.Tensor, expected: torch.Tensor, gvm, what: str) -> None:
    """Ends with one line where values differ from those of a full forward pass by more than rounding."""
    spread = max(expected.double().std(correction=0).item(), LEAST_SPREAD)
    off = (found.double() - expected.double()).abs().mean().item() / spread
    if not off <= tolerance(gvm):  # nor NaN
        fail(
            f"{what}: a {gvm.config.model_type} model's values of candidates, through its cache, are "
            f"{off:.2g} of their spread off those of a full forward pass, so it cannot guide; "
            f"--decode best-of needs no cache; {tested_versions()}"
        )


@torch.no_grad()
def check_guide(gvm, name: str, tokenizer) -> None:
    """Compares the values of candidates, side by side through the cache, with those of each in a sequence of
    its own: three prompts of other lengths, three candidates, two steps. Ends with one line where they differ
    or the family's cache cannot be used so."""
    kind = gvm.config.model_type
    cache = roomy(gvm.config)
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not RoomyLayer}
    if others:
        fail(
            f"--gvm {name}: a {kind} model has layers whose cache cannot hold candidates side by side "
            f"({', '.join(sorted(others))}: a sliding window or a recurrent layer), so it cannot guide; "
            "--decode best-of needs no cache"
        )
    device = distributed.device()
    vocabulary = gvm.get_input_embeddings().num_embeddings
    sequences = random_sequences(plain_tokens(tokenizer, vocabulary))
    prompts = [prompt for prompt, _ in sequences]
    drawn = [token for _, response in sequences for token in response]
    drawn = torch.tensor(drawn, device=device)[:18].view(2, 3, 3)  # step, prompt, candidate
    choice = torch.tensor([0, 1, 2], device=device)  # of each prompt, which candidate is kept
    found = []
    expected = []
    kept = [[], [], []]
    with one_line(f"--gvm {name}: a {kind} model cannot value candidates side by side"):
        ids, mask = padded_left(prompts, tokenizer.pad_token_id, device)
        read_prompts(gvm, ids, mask, cache)
        for candidates in drawn:
            found.append(candidate_values(gvm, candidates, mask, cache))
            for i, prompt in enumerate(prompts):
                for token in candidates[i].tolist():
                    alone = collate([(prompt, [*kept[i], token])], tokenizer.pad_token_id, device)
                    expected.append(response_values(gvm, **alone)[0, -1])
                kept[i].append(candidates[i, choice[i]].item())
            keep_candidate(cache, 3, choice)
            mask = F.pad(mask, (0, 1), value=1)
    found = torch.stack(found).flatten()
    require_close(found, torch.stack(expected), gvm, f"--gvm {name}")
    sharding.reshard(gvm)


# --- candidates side by side --------------------------------------------------------------------------------


def read_prompts(gvm, ids: torch.Tensor, mask: torch.Tensor, cache) -> None:
    """Puts the keys and values of padded prompts [B, P] into the GVM's cache."""
    takes = inspect.signature(gvm.forward).parameters
    cache_name = cache_argument(takes, gvm.config.model_type)
    inputs = {"input_ids": ids, "attention_mask": mask, cache_name: cache, "use_cache": True}
    if "position_ids" in takes:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    gvm(**inputs)


def candidate_mask(mask: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """[b, 1, k, C + k], what is added to attention scores: each of k = `count` candidates sees the cached
    columns that are no padding (`mask` [b, C]) and itself, but no other candidate."""
    rows, columns = mask.shape
    cached = mask.bool()[:, None, None, :].expand(rows, 1, count, columns)
    itself = torch.eye(count, dtype=torch.bool, device=mask.device).expand(rows, 1, count, count)
    visible = torch.cat([cached, itself], -1)
    hidden = torch.zeros(visible.shape, dtype=dtype, device=mask.device)
    return hidden.masked_fill_(visible.logical_not(), torch.finfo(dtype).min)


def candidate_values(gvm, candidates: torch.Tensor, mask: torch.Tensor, cache) -> torch.Tensor:
    """Q(s, a) [b, k] of the tokens `candidates` [b, k] after what the cache holds (`mask` [b, C]).

    One forward pass. All k stand at the same position. The cache has k columns more afterwards;
    `keep_candidate` leaves one of them.
    """
    takes = inspect.signature(gvm.forward).parameters
    cache_name = cache_argument(takes, gvm.config.model_type)
    inputs = {"input_ids": candidates, cache_name: cache, "use_cache": True}
    inputs["attention_mask"] = candidate_mask(mask, candidates.shape[1], gvm.compute_dtype)
    if "position_ids" in takes:  # else `check_guide` finds out whether it counts rightly
        inputs["position_ids"] = mask.sum(1, keepdim=True).expand_as(candidates)
    return gvm(**inputs).logits.squeeze(-1)


def keep_candidate(cache, count: int, choice: torch.Tensor) -> None:
    """Of the `count` candidates that were read last, leaves the column of number `choice` [b] in the cache."""
    rows = torch.arange(len(choice), device=choice.device)
    for layer in cache.layers:
        if not layer.room:  # a layer that reads another's keys has none
            continue
        first = layer.get_seq_length() - count
        for room in layer.room:
            room[:, :, first] = room[rows, :, first + choice]
        layer.show(first + 1)


# --- re-weighted tokens -------------------------------------------------------------------------------------


def reweighted(
    logits: torch.Tensor, candidates: torch.Tensor, values: torch.Tensor, beta: float
) -> torch.Tensor:
    """[b, V]: logits + Q / beta at the candidates, minus infinity elsewhere; the logits of p at temperature 1.

    `logits` [b, V] are the policy's; `candidates` and `values` [b, k] are tokens and their Q.
    """
    scores = logits.gather(1, candidates) + values / beta
    return torch.full_like(logits, -torch.inf).scatter(1, candidates, scores)


def step_kl(scores: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(p || pi) [b] of one step, in nats, exact: p is softmax(scores / temperature), pi the same of the
    policy's logits over all tokens; all [b, V]. At temperature 0, p is certain of the best token and pi is
    taken at temperature 1."""
    if temperature == 0:
        best = scores.argmax(-1, keepdim=True)
        return -logits.log_softmax(-1).gather(1, best).squeeze(1)
    log_p = (scores / temperature).log_softmax(-1)
    log_pi = (logits / temperature).log_softmax(-1)
    p = log_p.exp()
    # where p is 0 the log-ratio is minus infinity, or not a number for a token that pi does not have either
    return torch.where(p > 0, p * (log_p - log_pi), 0.0).sum(-1)


def decode_guided(
    policy,
    guide: Guide,
    prompts: list[list[int]],
    uniforms: torch.Tensor,
    temperature: float,
    stops: list[int],
    pad: int,
) -> list[tuple[list[int], list[float], list[float], float]]:
    """A response to each of B prompts: (its tokens; pi's log-probability and Q of each; the sum of its steps'
    KL). `common/rollout.py: decode` with re-weighted logits, and the GVM's cache beside the policy's.

    `uniforms` [B, T] are the random numbers; without re-weighting and with all tokens as candidates they draw
    what `decode` draws. Temperature 0 takes the token with the highest score.
    """
    device = uniforms.device
    takes = inspect.signature(policy.forward).parameters
    cache_name = cache_argument(takes, policy.config.model_type)
    temperatures = torch.full((len(prompts),), temperature, dtype=torch.float64, device=device)
    ends = torch.tensor(stops, dtype=torch.long, device=device)

    # the different prompts, each read once
    row_of = {}
    for prompt in prompts:
        row_of.setdefault(tuple(prompt), len(row_of))
    feed, mask = padded_left([*row_of], pad, device)
    copies = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
    cache = roomy(policy.config)
    gvm_cache = roomy(guide.gvm.config)
    read_prompts(guide.gvm, feed, mask, gvm_cache)
    gvm_cache.reorder_cache(copies)

    tokens = torch.full_like(uniforms, pad, dtype=torch.long)  # [B, T]
    logprobs = torch.zeros_like(uniforms)  # [B, T] of pi
    values = torch.zeros_like(uniforms)  # [B, T]
    kl = torch.zeros_like(uniforms[:, 0])  # [B]
    alive = torch.arange(len(prompts), device=device)  # the responses that go on: [b]
    for t in range(uniforms.shape[1]):
        logits = decoder_logits(policy, takes, cache_name, feed, mask, cache)  # [b, V]
        if t == 0:  # so far there was a row per different prompt, from here on there is one per response
            logits = logits[copies]
            mask = mask[copies]
            cache.reorder_cache(copies)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        allowed = logits.shape[1]
        if policy.forbidden_tokens is not None:
            forbidden = policy.forbidden_tokens[policy.forbidden_tokens < logits.shape[1]]
            logits.index_fill_(1, forbidden, -torch.inf)
            allowed -= len(forbidden)

        count = min(guide.candidates, allowed)
        candidates = logits.topk(count).indices  # [b, k]
        candidate_q = candidate_values(guide.gvm, candidates, mask, gvm_cache).to(logits.dtype)  # [b, k]
        used = candidate_q
        if guide.log_odds:
            used = torch.atanh(candidate_q.clamp(-0.99, 0.99))
        scores = reweighted(logits, candidates, used, guide.beta)  # [b, V]
        token, _ = sample(scores, uniforms[alive, t], temperatures[alive], None)
        choice = (candidates == token[:, None]).long().argmax(1)  # [b]
        keep_candidate(gvm_cache, count, choice)

        log_pi = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, token[:, None]).squeeze(1)
        tokens[alive, t] = token
        logprobs[alive, t] = log_pi.double()
        values[alive, t] = candidate_q.gather(1, choice[:, None]).squeeze(1).double()
        kl[alive] += step_kl(scores, logits, temperature).double()

        unfinished = torch.isin(token, ends).logical_not().nonzero().squeeze(1)
        if len(unfinished) == 0:
            break
        if len(unfinished) < len(alive):
            alive = alive[unfinished]
            token = token[unfinished]
            mask = mask[unfinished]
            cache.reorder_cache(unfinished)
            gvm_cache.reorder_cache(unfinished)
        feed = token[:, None]
        mask = F.pad(mask, (0, 1), value=1)

    if kl.isnan().any() or values.isnan().any():
        fail("the policy's logits or the GVM's values are not a number, so nothing can be sampled")
    found = []
    for i, row in enumerate(tokens.tolist()):
        end = next((t + 1 for t, token in enumerate(row) if token in stops), len(row))
        found.append((row[:end], logprobs[i, :end].tolist(), values[i, :end].tolist(), kl[i].item()))
    return found


# --- all prompts, all ranks ---------------------------------------------------------------------------------


@torch.no_grad()
def guided(
    policy,
    guide: Guide,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seed: tuple[int, int],
) -> list[Decoded]:
    """A response to each prompt (token lists), on every rank, each token drawn from p. Each rank samples its
    share with `rollout`'s random numbers.

    The policy's log-probabilities and the GVM's values of what was drawn are compared with those of full
    forward passes, and end the run where they differ by more than rounding.
    """
    kind = policy.config.model_type
    if policy.config.is_encoder_decoder:
        fail(f"--decode guided: a {kind} policy is an encoder-decoder; --decode best-of works with it")
    gvm = guide.gvm
    device = distributed.device()
    pad = tokenizer.pad_token_id
    # prompts of similar length are sampled together: little padding
    mine = sorted(range(distributed.rank(), len(prompts), distributed.world()), key=lambda i: len(prompts[i]))
    found = []
    what = f"a {kind} model cannot be guided by a {gvm.config.model_type} model"
    with one_line(what), sharding.gathered(policy), sharding.gathered(gvm):
        if mine:
            uniforms = uniform_numbers(seeds_of(seed, mine), max_new_tokens, device)  # [B, T]
            asked = [prompts[i] for i in mine]
            stops = stop_tokens(tokenizer)
            found = decode_guided(policy, guide, asked, uniforms, temperature, stops, pad)
    of_prompt = {}
    for of_rank in distributed.all_gather_object(dict(zip(mine, found, strict=True))):
        of_prompt.update(of_rank)

    in_order = [of_prompt[i] for i in range(len(prompts))]
    responses = [tokens for tokens, _, _, _ in in_order]
    width = max(len(response) for response in responses)
    sampled = torch.zeros(len(prompts), width, device=device)  # [N, T] log pi of what was drawn
    for i, (tokens, logprobs, _, _) in enumerate(in_order):
        sampled[i, : len(tokens)] = torch.tensor(logprobs)
    require_agreement(policy, prompts, differences(policy, prompts, responses, sampled, temperature))
    sequences = list(zip(prompts, responses, strict=True))
    table = token_values(gvm, sequences, PROBE_SIZE, pad)  # [N, T]
    own = torch.cat([table[i, : len(response)] for i, response in enumerate(responses)])
    through_cache = torch.tensor([value for _, _, values, _ in in_order for value in values])
    require_close(through_cache.to(device), own, gvm, "--gvm")
    return [Decoded(tokens, values[-1], kl) for tokens, _, values, kl in in_order]


def token_values(gvm, sequences, size: int, pad: int) -> torch.Tensor:
    """Q [N, T] of the response tokens of (prompt, response) pairs, on every rank; 0 after the end. `size`
    sequences per forward pass."""
    width = max(len(response) for _, response in sequences)

    def action_values(mb):
        return response_values(gvm, **mb)[:, 1:]

    return run_micro_batches(action_values, sequences, size, pad, width)


def best_of_kl(count: int) -> float:
    """Upper bound of KL(best of n || policy) in nats: log n - (n - 1) / n. Others have it as the value;
    2401.01879 shows that it is a bound."""
    return math.log(count) - (count - 1) / count


@torch.no_grad()
def best_of(
    policy,
    gvm,
    tokenizer,
    prompts: list[list[int]],
    count: int,
    max_new_tokens: int,
    temperature: float,
    seed: tuple[int, int],
    micro_batch_size: int,
) -> list[Decoded]:
    """Of `count` sampled responses to each prompt the one with the highest Q at its last token, on every rank.

    The first of them is plain sampling's, and the n of a smaller `count` are among those of a larger one.
    """
    # The responses of number j stand at j * N. As many are sampled at once as without a choice.
    size = math.ceil(len(prompts) / distributed.world())
    responses, _ = rollout(policy, tokenizer, prompts * count, max_new_tokens, temperature, seed, size)
    sequences = list(zip(prompts * count, responses, strict=True))
    values = token_values(gvm, sequences, micro_batch_size, tokenizer.pad_token_id)  # [count * N, T]
    last = torch.tensor([len(response) - 1 for response in responses], device=values.device)
    scores = values.gather(1, last[:, None]).view(count, len(prompts))
    if scores.isnan().any():
        fail("the GVM's values are not a number, so none is the highest")
    chosen = []
    for i, number in enumerate(scores.argmax(0).tolist()):
        response = responses[number * len(prompts) + i]
        chosen.append(Decoded(response, scores[number, i].item(), best_of_kl(count)))
    return chosen
