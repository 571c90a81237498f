"""Is what was opened what we take it for? Each model is compared once, when it is opened, with its own forward.

Names of model families, of config entries, of arguments say little: what is compared are numbers, of a few
random tokens. A model is right by them, or the run ends with one line.
"""

import math
import random
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from common import distributed, sharding, value_heads
from common.batches import collate
from common.cli import fail
from common.logprobs import OutputForm, trunk
from common.tokenization import special_tokens, stop_tokens
from common.value_heads import response_values, sequence_scores

# The mean |difference| of two log-probabilities of a token that is still rounding, in nats, by the type that
# computes: a right model measures up to 1e-5 in float32 and 0.05 in bfloat16, whose logits between 16 and 32
# are 0.125 apart; the faults known give 0.3 and more (docs/metrics.md, "Is what samples what trains?").
TOLERANCE = {
    torch.float64: 1e-5,  # the sampler's numbers are kept in float32
    torch.float32: 1e-3,
    torch.bfloat16: 0.2,
}

# (prompt, response) lengths of the random sequences: unequal, so that there is padding
LENGTHS = ((5, 11), (3, 6), (7, 1))


# --- what all checks need -----------------------------------------------------------------------------------


def tolerance(model) -> float:
    """The mean |difference| that is still rounding, in nats per token, by the type that computes."""
    return TOLERANCE[model.compute_dtype]


@contextmanager
def one_line(message: str):
    """What a library raises inside ends the run with `message` and the error's first line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # says more by itself, and is no fault of the model
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        fail(f"{message} ({type(error).__name__}: {lines[0]})")


def random_sequences(tokens: list[int]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of LENGTHS, of some of `tokens`, the same in every process."""
    draw = random.Random(0)
    return [
        ([draw.choice(tokens) for _ in range(prompt)], [draw.choice(tokens) for _ in range(response)])
        for prompt, response in LENGTHS
    ]


def plain_tokens(tokenizer, vocabulary: int) -> list[int]:
    """The tokens of text that a model with so many embeddings knows: special ones may mean an image to it."""
    special = special_tokens(tokenizer)
    return [
        token
        for token in sorted(tokenizer.get_vocab().values())
        if token < vocabulary and token not in special
    ]


def agreed(value):
    """Rank 0's value, on every rank: what is measured decides how all of them compute."""
    return distributed.all_gather_object(value)[0]


@contextmanager
def disturbed(model, amount: float, part=None):
    """Inside, each trained weight is off by about `amount` of its tensor's root mean square (of 0.01 where
    that is 0); only those of the module `part`, where one is given. A copy of them is kept meanwhile."""
    sharding.reshard(model)  # or a root that is still gathered would keep the weights of before
    weights = []  # this rank's part of each
    for parameter in (part or model).parameters():
        if parameter.requires_grad:
            weights.append(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            if weight.numel():
                size = weight.square().mean().sqrt()
                size = torch.where(size > 0, size, 0.01)
                # a sine over the entries' numbers: nothing random, so that replicas stay equal
                wave = torch.arange(weight.numel(), dtype=weight.dtype, device=weight.device).sin_()
                weight.add_(wave.view_as(weight).mul_(amount * size))
    try:
        yield
    finally:
        sharding.reshard(model)
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


# --- policies -----------------------------------------------------------------------------------------------


@torch.no_grad()
def check_policy(policy, name: str, tokenizer) -> None:
    """Finds out how the policy makes its logits, and which tokens it must not sample; then compares
    `response_logprobs` of a padded batch, as it is called in training, with log_softmax of the model's own
    logits of each sequence alone; of a trained one, runs backward once.

    Ends with one line where they differ by more than rounding, or the model cannot be used.
    """
    training = policy.training
    policy.eval()
    kind = policy.config.model_type
    vocabulary = policy.get_input_embeddings().num_embeddings
    sequences = random_sequences(plain_tokens(tokenizer, vocabulary))
    with one_line(f"{name}: a {kind} model's forward fails"):
        form, width = agreed(measure_output(policy, name, sequences))
        policy.output_form = form
        if width < vocabulary:  # the rest of its rows are no tokens
            policy.forbidden_tokens = forbidden_tokens(policy, tokenizer, width)
            sequences = random_sequences(plain_tokens(tokenizer, width))
        own = [own_logprobs(policy, *sequence) for sequence in sequences]
        prompt, response = sequences[0]
        half = own_logprobs(policy, prompt, response[: len(response) // 2])
    if not mean_difference([half], own[:1]) <= tolerance(policy):  # nor NaN
        fail(
            f"{name}: a {kind} model's logits change with later tokens (an encoder's do), so it is no policy"
        )

    if training:
        policy.train()
        quiet_routers(policy)
    batch = collate(sequences, tokenizer.pad_token_id, distributed.device())
    with one_line(f"{name}: a {kind} model's forward fails"):
        before = random_state()
        ours, _ = policy.response_logprobs(**batch)
    if random_state() != before:
        fail(
            f"{name}: a {kind} model draws random numbers in its forward pass in training (random routing?), "
            "so the log-probabilities that train are not those of what is sampled"
        )
    mean = mean_difference(own, ours)
    if not mean <= tolerance(policy):  # nor NaN
        fail(
            f"{name}: a {kind} model: its log-probabilities of a padded batch in training are {mean:.3g} nats "
            "a token off log_softmax of its own logits, so it cannot be trained here"
        )
    if training:
        check_backward(policy, name, batch)
    sharding.reshard(policy)


def check_backward(policy, name: str, batch: dict) -> None:
    """Ends with one line where the gradient of log-probabilities cannot be computed, or is not finite."""
    kind = policy.config.model_type
    with one_line(f"{name}: a {kind} model's backward pass fails"), torch.enable_grad():
        policy.response_logprobs(**batch)[0].sum().backward()
    finite = torch.ones((), device=distributed.device())
    for parameter in policy.parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            finite *= torch.isfinite(local).all()
            parameter.grad = None
    if distributed.all_reduce(finite).item() < distributed.world():
        fail(
            f"{name}: a {kind} model's gradients of log-probabilities are not finite, so it cannot be trained"
        )


def mean_difference(rows, others) -> float:
    """The mean |difference| over the tokens of `rows`; each of `others` begins with the tokens of its row."""
    off = [(row - other[: len(row)]).abs() for row, other in zip(rows, others, strict=True)]
    return torch.cat(off).double().mean().item()


def quiet_routers(model) -> None:
    """In place: the noise that routers of a mixture of experts add in training is 0. Where it does more than
    that (Phi-3.5-MoE), the comparison with the model's own logits finds it."""
    for module in model.modules():
        for key, value in vars(module).items():
            if "jitter" in key and isinstance(value, float):
                setattr(module, key, 0.0)


def measure_output(policy, name: str, sequences) -> tuple[OutputForm, int]:
    """(how logits come from the last hidden state, how many there are), from the model's own forward.

    The forward runs once, and what the output layer reads is replaced on its way in: by multiples of it from
    tiny to huge, so that a scale shows in the small ones and a cap in the large ones.
    """
    kind = policy.config.model_type
    layer = output_layer(policy, name)
    seen = {}

    def keep_hidden(module, inputs, output):
        seen["hidden"] = output[0]

    def multiply(module, inputs):
        seen["read"] = inputs[0]
        length = inputs[0].shape[-2]
        factors = torch.logspace(-3, 3, length, device=inputs[0].device).to(inputs[0].dtype)
        return (inputs[0] * factors[:, None],)

    def keep_raw(module, inputs, output):
        seen["raw"] = output

    decoder = policy.get_decoder()
    if decoder is policy:
        decoder = trunk(policy)
    hooks = [
        decoder.register_forward_hook(keep_hidden),
        layer.register_forward_pre_hook(multiply),
        layer.register_forward_hook(keep_raw),
    ]
    try:
        own = own_logits(policy, *sequences[0])
    finally:
        for hook in hooks:
            hook.remove()
    if "hidden" not in seen or "raw" not in seen:
        fail(
            f"{name}: a {kind} model's logits do not come from its output layer, so it cannot be a policy here"
        )
    if own.isnan().any():
        fail(f"{name}: a {kind} model gives logits that are not numbers, so it cannot be a policy here")
    width = own.shape[-1]
    read = seen["read"]
    own = own.double()
    raw = seen["raw"][..., : own.shape[-1]].double()
    numbers = numbers_of(policy.config)
    rounding = 2e-2 if policy.compute_dtype == torch.bfloat16 else 1e-4
    hidden_scale = ratio(seen["hidden"].double(), read.double(), numbers, rounding)
    # where the output layer read the least, a cap does nothing yet
    slope = (raw[..., :1, :] * own[..., :1, :]).sum() / raw[..., :1, :].square().sum()
    cap = None
    if own.abs().max() < 0.5 * slope.abs() * raw.abs().max():
        cap = nearest(own.abs().max().item(), numbers, rounding)
        inside = own.abs() < 0.9 * (cap or 0)
        raw = raw[inside]
        own = (own[inside] / (cap or 1)).atanh() * (cap or 1)
    scale = ratio(raw, own, numbers, rounding)
    if not hidden_scale or not scale:
        fail(
            f"{name}: between the last hidden state and the logits of a {kind} model is more than a linear "
            "layer, and a scale or a cap that its configuration names, so it cannot be a policy here"
        )
    return OutputForm(hidden_scale, scale, cap), width


def output_layer(policy, name: str) -> torch.nn.Linear:
    """The layer that makes logits. Ends with one line where that is no single linear layer."""
    layer = policy.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        kind = policy.config.model_type
        fail(f"{name}: a {kind} model has no linear output layer, so it cannot be a policy here")
    return layer


def numbers_of(config) -> list[float]:
    """The positive numbers of a configuration and of those inside it, by which it may scale or cap."""
    found = {1.0}

    def visit(value):
        if isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
            found.add(float(value))

    visit(config.to_dict())
    return sorted(found)


def nearest(measured: float, numbers: list[float], rounding: float) -> float | None:
    """The one of `numbers` that was measured, but for rounding; None where it is none of them."""
    best = min(numbers, key=lambda number: abs(number - measured))
    return best if abs(best - measured) <= rounding * best else None


def ratio(x: torch.Tensor, y: torch.Tensor, numbers: list[float], rounding: float) -> float | None:
    """The factor by which y is x, exactly as the configuration's `numbers` have it: one of them, its inverse,
    its root or the inverse of that. None where y is no multiple of x, or by no such factor."""
    if x.shape != y.shape or not x.numel():
        return None
    slope = (x * y).sum() / x.square().sum()
    if not (y - slope * x).norm() <= rounding * y.norm():  # nor NaN
        return None
    factors = [1.0]
    for number in numbers:
        factors += [number, 1 / number, number**0.5, number**-0.5]
    return nearest(slope.item(), factors, rounding)


def forbidden_tokens(policy, tokenizer, width: int) -> torch.Tensor | None:
    """[n], the tokens that a policy must not sample: the padding, where it is no end of an answer; those that
    its tokenizer has no text for; those beyond the `width` that it gives logits of. None where there are
    none."""
    known = set(tokenizer.get_vocab().values())
    if tokenizer.pad_token_id not in stop_tokens(tokenizer):
        known.discard(tokenizer.pad_token_id)
    rows = policy.get_output_embeddings().weight.shape[0]
    forbidden = [token for token in range(rows) if token not in known or token >= width]
    return torch.tensor(forbidden, device=distributed.device()) if forbidden else None


def own_logits(policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[1, L, V] of prompt and response, by the model's own forward; of an encoder-decoder [1, T, V]."""
    device = distributed.device()
    if policy.config.is_encoder_decoder:
        start = policy.config.decoder_start_token_id
        ids = torch.tensor([prompt], device=device)
        decoder_ids = torch.tensor([[start, *response[:-1]]], device=device)
        return policy(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits
    ids = torch.tensor([prompt + response], device=device)
    return policy(input_ids=ids, use_cache=False).logits


def own_logprobs(policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[T] log-probabilities of the response by the model's own logits, without the forbidden tokens."""
    logits = own_logits(policy, prompt, response)[0].double()
    if not policy.config.is_encoder_decoder:
        logits = logits[len(prompt) - 1 : -1]  # what is read just before each token
    if policy.forbidden_tokens is not None:
        inside = policy.forbidden_tokens[policy.forbidden_tokens < logits.shape[-1]]
        logits[:, inside] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor([response], device=logits.device).T)[:, 0]


def random_state() -> list:
    """Where the random numbers of this process stand."""
    states = [random.getstate(), torch.get_rng_state().tolist()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state().tolist())
    return states


# --- value and reward models --------------------------------------------------------------------------------


@torch.no_grad()
def check_head(model, kind: str, name: str, tokenizer) -> None:
    """Compares what a value or reward model says of sequences side by side, with padding, as it is called in
    training, with what it says of each alone; finds out whether it has to be told what is padding (an
    encoder: `model.needs_mask`).

    A value model must not read later tokens: its value of a prompt would know the answer. Ends with one line
    where it does, or where the numbers differ by more than rounding.
    """
    model.needs_mask = False
    model.needs_types = False  # rewards.Reward finds out
    if kind == "prompt value":
        return  # it reads prompts alone, with a mask
    family = model.config.model_type
    vocabulary = model.get_input_embeddings().num_embeddings
    pad = model.config.get_text_config().pad_token_id if kind == "reward" else tokenizer.pad_token_id
    sequences = random_sequences([token for token in plain_tokens(tokenizer, vocabulary) if token != pad])
    training = model.training
    limit = TOLERANCE[model.compute_dtype]
    # a head that is not trained yet is zero: moved, it shows what it reads
    what = f"{name}: a {family} model's forward fails"
    with one_line(what), disturbed(model, 0.1, part=value_heads.head(model)):
        model.eval()
        alone = outputs_alone(model, kind, sequences, pad)
        if training:
            model.train()
            quiet_routers(model)
        before = random_state()
        off = error_beside(model, kind, sequences, pad, alone)
        drew = random_state() != before
        if kind == "reward" and not off <= limit and not drew:
            model.needs_mask = True
            model.train(training)
            off = error_beside(model, kind, sequences, pad, outputs_alone(model, kind, sequences, pad))
    if drew:
        fail(
            f"{name}: a {family} model draws random numbers in its forward pass in training (random routing?)"
        )
    if math.isnan(off):
        fail(f"{name}: a {family} model gives numbers that are not finite, so it is no {kind} model here")
    if off <= limit:
        if model.needs_mask and training:
            fail(
                f"{name}: a {family} model reads later tokens too (an encoder); those are called with special "
                "tokens of their own, so one can be a --reward here, but reward.py trains decoders"
            )
        return
    if kind == "value":
        fail(
            f"{name}: a {family} model's value of a token changes with later tokens (an encoder does that) by "
            f"{off:.2g} of its spread: its value of a prompt would know the answer, so it is no value model"
        )
    fail(
        f"{name}: a {family} model's scores beside longer texts are {off:.2g} of their spread off those of "
        "each text alone, so padding changes them and it is no reward model here"
    )


def outputs_alone(model, kind: str, sequences, pad: int) -> torch.Tensor:
    """The scores of sequences one by one; of a value model its values of the prompt and of the whole."""
    device = distributed.device()
    found = []
    for prompt, response in sequences:
        whole = collate([(prompt, response)], pad, device)
        if kind == "reward":
            found.append(sequence_scores(model, **whole)[:, 0])
        else:
            # the last prompt token as if it were a response: its value, with nothing after it
            start = collate([(prompt[:-1], prompt[-1:])], pad, device)
            found.append(response_values(model, **start)[0, 1:])
            found.append(response_values(model, **whole)[0])
    return torch.cat(found).double()


def error_beside(model, kind: str, sequences, pad: int, alone: torch.Tensor) -> float:
    """The mean |difference| of outputs in a padded batch from `alone`, divided by the spread of those."""
    batch = collate(sequences, pad, distributed.device())
    if kind == "reward":
        beside = sequence_scores(model, **batch)[:, 0]
    else:
        found = []
        for row, (_, response) in zip(response_values(model, **batch), sequences, strict=True):
            found += [row[:1], row[: len(response) + 1]]
        beside = torch.cat(found)
    return ((alone - beside.double()).abs().mean() / alone.std()).item()
