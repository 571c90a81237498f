"""Log-probabilities of responses, log pi(y | x), and entropies, without ever holding [tokens, vocabulary]."""

import torch
import torch.nn.functional as F

from common import t5
from common.batches import response_positions, run_micro_batches


class TokenLogprobs(torch.autograd.Function):
    """`chunk` rows of logits at a time, in forward and again in backward, but for the last chunk, whose backward is the first to
    come and overwrites what forward left: less time than checkpointed chunks take, and no more memory."""

    @staticmethod
    def logits(hidden, weight, bias, temperature, forbidden):
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if temperature == 1 else logits.div_(temperature)
        if forbidden is not None:
            logits[:, forbidden] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, temperature, forbidden, chunk):
        parts = []
        for h, y in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
            logits = TokenLogprobs.logits(h, weight, bias, temperature, forbidden)
            top = logits.amax(1)
            odds = (logits - top[:, None]).exp_()
            total = odds.sum(1)
            log_total = top + total.log()
            entropy = log_total - torch.linalg.vecdot(odds, logits) / total
            parts.append((logits.gather(1, y[:, None]).squeeze(1) - log_total, entropy, log_total))
        logprobs, entropy, log_total = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, tokens, log_total)
        ctx.rest, ctx.last = (temperature, forbidden, chunk), (odds, total)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """d log p(y) / d logits = onehot(y) - p."""
        (hidden, weight, bias, tokens, log_total), (temperature, forbidden, chunk) = (
            ctx.saved_tensors,
            ctx.rest,
        )
        of_hidden = torch.empty_like(hidden)
        of_weight, of_bias = (
            torch.zeros_like(x) if x is not None and x.requires_grad else None for x in (weight, bias)
        )
        for start in reversed(range(0, len(hidden), chunk)):
            at = slice(start, start + chunk)
            if ctx.last:
                (of_logits, total), ctx.last = ctx.last, None
                of_logits.div_(total[:, None])
            else:
                of_logits = TokenLogprobs.logits(hidden[at], weight, bias, temperature, forbidden)
                of_logits.sub_(log_total[at, None]).exp_()
            scale = grad[at, None] / temperature
            of_logits = of_logits.mul_(-scale).scatter_add_(1, tokens[at, None], scale).to(weight.dtype)
            of_hidden[at] = of_logits @ weight
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, hidden[at])
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        return of_hidden, of_weight, of_bias, None, None, None, None


def token_logprobs(hidden, weight, bias, tokens, temperature=1.0, forbidden=None, chunk=512):
    """Log-probability of each token and entropy of its distribution (without gradient), both [N], from hidden states [N, H],
    without ever holding [N, vocab]. `forbidden`: a token of probability zero."""
    return TokenLogprobs.apply(hidden, weight, bias, tokens, temperature, forbidden, chunk)


def response_logprobs(self, input_ids, prompt_lengths, response_mask, temperature=1.0, prompt_head=None):
    """log pi(y_t | x, y_<t) and the entropy at each step, both [B, T], zero where masked; with `prompt_head`, a linear layer,
    also its output [B] for the prompt: at its last token, or of an encoder the mean over its tokens.
    A decoder gets no attention mask: with padding on the right alone, a causal model never looks at it."""
    at = response_positions(prompt_lengths, response_mask, input_ids.shape[1])
    tokens = input_ids.gather(1, at[:, 1:])
    real = (
        response_mask.flatten().nonzero().squeeze(1)
    )  # no output layer for padding; asked before there is work to wait for
    if self.config.is_encoder_decoder:
        hidden, prompt = t5.hidden_states(self, input_ids, prompt_lengths, tokens)
    else:
        hidden = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden.gather(1, at[:, :-1, None].expand(-1, -1, hidden.shape[-1]))
        prompt = hidden[:, 0]
    layer = self.get_output_embeddings()
    given = (
        hidden.flatten(0, 1)[real],
        layer.weight,
        layer.bias,
        tokens.flatten()[real],
        temperature,
        self.forbidden_token,
    )
    found = [
        x.new_zeros(tokens.numel()).index_put((real,), x).view_as(tokens) for x in token_logprobs(*given)
    ]
    return (
        found
        if prompt_head is None
        else [*found, prompt_head(prompt.to(prompt_head.weight.dtype)).squeeze(-1)]
    )


def sequence_logprobs(model, sequences, size: int, pad_id: int, temperature: float = 1.0):
    """log pi(y | x) [N], summed over tokens, in float64, on every rank. No gradient."""
    forward = lambda mb: (
        model.response_logprobs(**mb, temperature=temperature)[0].double().sum(1, keepdim=True)
    )
    return run_micro_batches(forward, sequences, size, pad_id, 1, torch.float64)[:, 0]
