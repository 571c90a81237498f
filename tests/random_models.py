"""Random policy, value and reward models that tests of several rooms compare with plain transformers."""

import math
from types import MethodType, SimpleNamespace

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
)

from assets import reviews
from common.logprobs import OutputForm, response_logprobs
from common.tokenization import load_tokenizer

PAD, BOS, EOS = (reviews.SPECIAL.index(f"<{role}>") for role in ("pad", "bos", "eos"))
ARGS = SimpleNamespace(
    precision="fp32", shard_size=0, gradient_checkpointing=False, micro_batch_size=3, lora_rank=0
)
KINDS = {
    "policy": AutoModelForCausalLM,
    "value": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}


def make_folders(root) -> dict[str, str]:
    """A folder of each kind under `root`, with weights so large that no distribution is uniform, and dropout
    in the config."""
    folders = {}
    for seed, (kind, auto) in enumerate(KINDS.items()):
        config = LlamaConfig(
            vocab_size=len(reviews.WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            attention_dropout=0.3,
            num_labels=1,
            classifier_dropout=0.3,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        torch.manual_seed(seed)
        model = auto.from_config(config)
        if kind == "policy":  # the pad token would be a popular one, were it not forbidden
            with torch.no_grad():
                model.lm_head.weight[PAD] = 2 * model.lm_head.weight[10]
        else:
            torch.nn.init.normal_(model.score.weight)
        if kind == "value":
            torch.nn.init.constant_(model.score.bias, 0.7)
        folders[kind] = str(root / kind)
        model.save_pretrained(folders[kind])
        load_tokenizer(reviews.folder("untrained")).save_pretrained(folders[kind])
    return folders


def plain(folders: dict[str, str], kind: str):
    """The model of that kind as transformers alone opens it."""
    return KINDS[kind].from_pretrained(folders[kind]).eval()


def sample_sequences(seed=0, sizes=((3, 1), (7, 9), (1, 4), (5, 6), (7, 2))):
    """Ragged (prompt, response) pairs of random words; no pad among the response tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, len(reviews.WORDS), (n,), generator=generator).tolist()

    sequences = []
    for prompt_length, response_length in sizes:
        prompt = draw(prompt_length)
        response = draw(response_length)
        sequences.append((prompt, response))
    return sequences


def expected_logprobs(model, prompt, response, temperature=1.0):
    """One sequence through plain transformers: log-probability of each response token and entropy before it,
    pad excluded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
    logits[:, PAD] = -math.inf
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    picked = torch.stack([row[token] for row, token in zip(table, response, strict=True)])
    entropy = -(table.exp() * table).nan_to_num(0.0).sum(-1)
    return picked.float(), entropy.float()


def as_policy(model, forbidden=None):
    """A plain transformers model with our log-probabilities on it; `forbidden`: a token of probability zero."""
    model.response_logprobs = MethodType(response_logprobs, model)
    model.output_form = OutputForm()
    model.forbidden_tokens = None if forbidden is None else torch.tensor([forbidden])
    return model
