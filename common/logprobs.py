"""Log-probabilities of responses, log pi(y | x), and entropies, without ever holding [tokens, vocabulary]."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers

from common import t5
from common.batches import response_positions, run_micro_batches


@dataclass(frozen=True)
class OutputForm:
    """How a policy makes logits from its last hidden state h: cap * tanh(scale * head(hidden_scale * h) / cap).

    `checks.measure_output` finds it out by the model's own forward.
    """

    hidden_scale: float = 1.0
    """T5 and muP models scale what the output layer reads"""
    scale: float = 1.0
    """Cohere and Granite scale its logits"""
    cap: float | None = None
    """Gemma 2 bends them, so that they stay below the cap; None: without"""


class TokenLogprobs(torch.autograd.Function):
    """`chunk` rows of logits at a time, in forward and again in backward.

    The last chunk's logits are the exception: backward begins with them, so it overwrites what forward left
    of them. That takes less time than checkpointed chunks, and no more memory. N tokens, hidden size H,
    vocabulary V.
    """

    @staticmethod
    def logits(hidden, weight, bias, scale, cap):
        """[n, V], in float32 (float64 for float64), scaled and capped."""
        logits = F.linear(hidden, weight, bias)
        if logits.dtype != torch.float64:
            logits = logits.float()
        if cap is not None:
            return logits.mul_(scale / cap).tanh_().mul_(cap)
        if scale != 1:
            logits = logits.mul_(scale)
        return logits

    @staticmethod
    def at_temperature(logits, temperature, forbidden):
        """[n, V] in place: divided by the temperature, forbidden tokens left out."""
        if temperature != 1:
            logits = logits.div_(temperature)
        if forbidden is not None:
            # not -inf: 0 * -inf in the entropy would be NaN
            logits = logits.index_fill_(1, forbidden, torch.finfo(logits.dtype).min)
        return logits

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, temperature, forbidden, form, chunk):
        logprobs = []
        entropies = []
        log_totals = []
        for h, y in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
            logits = TokenLogprobs.logits(h, weight, bias, form.scale, form.cap)
            logits = TokenLogprobs.at_temperature(logits, temperature, forbidden)
            top = logits.amax(1)
            odds = (logits - top[:, None]).exp_()
            total = odds.sum(1)
            log_total = top + total.log()  # log of the sum of exp(logits)
            # H = log Z - sum_y p(y) logit(y)
            entropies.append(log_total - torch.linalg.vecdot(odds, logits) / total)
            logprobs.append(logits.gather(1, y[:, None]).squeeze(1) - log_total)
            log_totals.append(log_total)
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, tokens, torch.cat(log_totals))
        ctx.temperature = temperature
        ctx.forbidden = forbidden
        ctx.form = form
        ctx.chunk = chunk
        # of the last chunk; a cap's slope needs the logits themselves, which are gone
        ctx.last = (odds, total) if form.cap is None else None
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, grad, _):
        """d log p(y) / d logits = onehot(y) - p."""
        hidden, weight, bias, tokens, log_total = ctx.saved_tensors
        chunk = ctx.chunk
        form = ctx.form
        grad_hidden = torch.empty_like(hidden)
        # Summed over the chunks in float32: in bfloat16 the sum would lose a digit.
        full = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=full) if weight.requires_grad else None
        grad_bias = torch.zeros_like(bias, dtype=full) if bias is not None and bias.requires_grad else None
        for start in reversed(range(0, len(hidden), chunk)):
            rows = slice(start, start + chunk)
            slope = None  # of the cap
            if ctx.last:  # the last chunk, which comes first; in a second backward it is gone
                probs, total = ctx.last
                ctx.last = None
                probs.div_(total[:, None])
            else:
                logits = TokenLogprobs.logits(hidden[rows], weight, bias, form.scale, form.cap)
                if form.cap is not None:
                    slope = 1 - (logits / form.cap).square_()
                probs = TokenLogprobs.at_temperature(logits, ctx.temperature, ctx.forbidden)
                probs.sub_(log_total[rows, None]).exp_()
            scale = grad[rows, None] / ctx.temperature
            if form.scale != 1:
                scale = scale * form.scale
            # in the memory of the probabilities: scale * (onehot(y) - p)
            grad_logits = probs.mul_(-scale).scatter_add_(1, tokens[rows, None], scale)
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                add_product(grad_weight, grad_logits, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=full)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def add_product(
    total: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, rows: int = 8192
) -> None:
    """total [V, H] += grad_logits [n, V] ^T hidden [n, H], in place, in the type of `total`.

    Where the factors are narrower, `rows` of the product at a time, so that it takes little memory.
    """
    if total.dtype == hidden.dtype:
        total.addmm_(grad_logits.T, hidden)
        return
    for of_total, of_logits in zip(total.split(rows), grad_logits.split(rows, 1), strict=True):
        of_total += of_logits.T @ hidden


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    forbidden: torch.Tensor | None = None,
    form: OutputForm = OutputForm(),
    chunk: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token and entropy of its distribution (without gradient), both [N], in nats.

    From hidden states [N, H] and an output layer (weight [V, H], bias [V]), without ever holding [N, V]:
    `chunk` rows at a time. `forbidden` [n]: tokens of probability zero. `form`: what the model does with the
    hidden states and with the logits.
    """
    if form.hidden_scale != 1:
        hidden = hidden * form.hidden_scale
    return TokenLogprobs.apply(hidden, weight, bias, tokens, temperature, forbidden, form, chunk)


def trunk(policy) -> torch.nn.Module:
    """What makes the last hidden states of a decoder: transformers' base model."""
    if policy.base_model is not policy:
        return policy.base_model
    # a family that names another base model than it has (Llama 4)
    return next(child for child in policy.children() if isinstance(child, transformers.PreTrainedModel))


def response_logprobs(
    self,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float = 1.0,
    prompt_head: torch.nn.Linear | None = None,
) -> list[torch.Tensor]:
    """[log pi(y_t | x, y_<t), the entropy at each step], both [B, T], zero where masked, of a batch that
    `collate` made.

    With `prompt_head`, a linear layer, also its output [B] for the prompt: at its last token, or of an
    encoder the mean over its tokens. A method of the policy (`self`): models.load_model binds it, as FSDP
    needs one.
    """
    # A decoder gets no attention mask: with padding on the right alone, a causal model never looks at it.
    positions = response_positions(prompt_lengths, response_mask, input_ids.shape[1])  # [B, T + 1]
    tokens = input_ids.gather(1, positions[:, 1:])  # [B, T]
    # No output layer for padding. Asked here, before there is work on the device to wait for.
    real = response_mask.flatten().nonzero().squeeze(1)
    if self.config.is_encoder_decoder:
        hidden, prompt = t5.hidden_states(self, input_ids, prompt_lengths, tokens)
    else:
        hidden = trunk(self)(input_ids=input_ids, use_cache=False).last_hidden_state
        # what is read just before each token
        before = positions[:, :-1, None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, before)  # [B, T, H]
        prompt = hidden[:, 0]
    layer = self.get_output_embeddings()
    found = token_logprobs(
        hidden.flatten(0, 1)[real],
        layer.weight,
        layer.bias,
        tokens.flatten()[real],
        temperature,
        self.forbidden_tokens,
        self.output_form,
    )
    results = []
    for of_real in found:  # log-probabilities, then entropies: back to [B, T]
        flat = of_real.new_zeros(tokens.numel()).index_put((real,), of_real)
        results.append(flat.view_as(tokens))
    if prompt_head is not None:
        results.append(prompt_head(prompt.to(prompt_head.weight.dtype)).squeeze(-1))
    return results


def sequence_logprobs(
    model,
    sequences: list[tuple[list[int], list[int]]],
    size: int,
    pad_id: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log pi(y | x) [N], summed over tokens, in float64, on every rank, without gradient; `size` sequences at
    once."""

    def forward(mb):
        logprobs, _ = model.response_logprobs(**mb, temperature=temperature)
        return logprobs.double().sum(1, keepdim=True)

    return run_micro_batches(forward, sequences, size, pad_id, 1, torch.float64)[:, 0]
