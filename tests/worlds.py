"""A world that can be enumerated: two words and an end, at most three tokens; its exact values and gradients."""

from itertools import product

import torch

LIMIT = 3
TEXTS = [y for n in range(1, LIMIT + 1) for y in product(range(3), repeat=n)]
RESPONSES = [y for y in TEXTS if 0 not in y[:-1] and (y[-1] == 0 or len(y) == LIMIT)]
STATES = [()] + [y for n in range(1, LIMIT) for y in product((1, 2), repeat=n)]
MASK = torch.tensor([[t < len(y) for t in range(LIMIT)] for y in RESPONSES])


class World:
    """Scores of the responses, and a behaviour: probabilities of the next token in each state; both drawn at
    random."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.scores = random(len(RESPONSES))
        self.logits = 1.5 * random(len(STATES), 3)
        self.ref_logits = random(len(STATES), 3)


def logprobs_of(logits):
    """[B, T] log-probabilities of the responses' tokens under a table of logits [states, 3]; 0 on padding."""
    table = logits.log_softmax(-1)
    zero = logits.new_zeros(())
    rows = [
        [table[STATES.index(y[:t]), y[t]] if t < len(y) else zero for t in range(LIMIT)] for y in RESPONSES
    ]
    return torch.stack([torch.stack(row) for row in rows])


def dynamic_programming(logits, final, gamma=1.0, step=None):
    """{prefix: value} backwards from the ends: `final` is the reward with the last token, `step` {(state,
    token): reward}."""
    probabilities = logits.softmax(-1)
    values = {y: final[i].item() for i, y in enumerate(RESPONSES)}
    for state in sorted(STATES, key=len, reverse=True):
        values[state] = 0.0
        for token in range(3):
            after = (*state, token)
            # Q(state, token): the final reward as it is, or the discounted value of the next state
            q = values[after] * (gamma if after in STATES else 1.0) + (step[state, token] if step else 0.0)
            values[state] += probabilities[STATES.index(state), token].item() * q
    return values


def table_of(values, gamma=1.0):
    """[B, T + 1] as a value model gives them: V(s_1), then Q(s_t, a_t), which is gamma * V(s_{t+1}) before
    the end."""

    def read(y, t):
        if t > len(y):
            return 0.0
        return values[y[:t]] * (gamma if 0 < t < len(y) else 1.0)

    return torch.tensor([[read(y, t) for t in range(LIMIT + 1)] for y in RESPONSES], dtype=torch.float64)


def exact_gradient(world, beta):
    """d/dlogits of E[S] - beta * KL(pi || ref), both by enumeration."""
    logits = world.logits.clone().requires_grad_()
    logprobs = logprobs_of(logits)
    p = logprobs.sum(1).exp()
    kl = (logprobs - logprobs_of(world.ref_logits)).sum(1)
    (slope,) = torch.autograd.grad((p * (world.scores - beta * kl)).sum(), logits)
    return slope


def kl_of(world):
    """[B, T] log-ratios of behaviour and reference at the responses' tokens; 0 on padding."""
    return logprobs_of(world.logits) - logprobs_of(world.ref_logits)
