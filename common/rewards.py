"""Rewards of finished responses: a reward model, or a function of yours."""

import importlib
from pathlib import Path

import torch

from common import distributed
from common.batches import run_micro_batches
from common.cli import fail
from common.models import load_model
from common.pretrained import resolve
from common.tokenization import encode_prompt, load_tokenizer, same_tokenizer, stop_token
from common.value_heads import sequence_scores


class Reward:
    """`reward(rows, sequences, texts)` gives [N] rewards, from a reward model or from a function
    `module:function`.

    A function gets (prompts, responses, **other columns of the rows), equally long lists, and returns
    numbers. A model (folder or hub id) gets the policy's tokens where the tokenizers agree, else the text by
    its own template; it standardises by `score_mean`, `score_std` of its config. With `by_text` it reads the
    text by its own template in any case, so that policies with different tokenizers are judged alike.
    `label`: the name of the reward in logs; `model`: None for a function. Ends with one line where there is
    no such model or function.
    """

    def __init__(self, name: str, tokenizer, args, by_text: bool = False):
        self.name = name
        self.model = None
        self.label = "reward_model"
        self.size = args.micro_batch_size
        if ":" in name and not Path(name).exists():
            module, _, self.label = name.partition(":")
            try:
                self.function = getattr(importlib.import_module(module), self.label)
            except (ImportError, AttributeError) as error:
                fail(f"--reward {name}: {error}; give a model folder, a hub id or module:function")
            return
        name = resolve(name)
        self.tokenizer = load_tokenizer(name)
        # whether it reads the policy's tokens as they are
        self.same = same_tokenizer(tokenizer, name) and not by_text
        self.model = load_model("reward", name, self.tokenizer, args, trained=False)

    def __call__(
        self, rows: list[dict], sequences: list[tuple[list[int], list[int]]], texts: list[str]
    ) -> torch.Tensor:
        """[N] rewards, on every rank, of `texts`, the responses to `rows`; `sequences` are the policy's
        tokens of both. Ends with one line where a reward is not finite."""
        if self.model is None:
            rewards = self.of_function(rows, texts)
        else:
            if not self.same:
                sequences = self.own_tokens(rows, texts)
            rewards = self.of_model(sequences)
        if not torch.isfinite(rewards).all():
            bad = int((~torch.isfinite(rewards)).nonzero()[0])
            fail(f"--reward {self.name} gave {rewards[bad].item()} for the response {texts[bad][:80]!r}")
        return rewards

    def of_function(self, rows: list[dict], texts: list[str]) -> torch.Tensor:
        """[N] numbers of the function: each rank asks for its share, the sum over ranks puts the rest in."""
        rewards = torch.zeros(len(rows), device=distributed.device())
        mine = list(range(distributed.rank(), len(rows), distributed.world()))
        if mine:
            names = {key for row in rows for key in row if not key.endswith("_ids")} - {"prompt", "response"}
            columns = {key: [rows[i].get(key) for i in mine] for key in names}
            prompts = [rows[i]["prompt"] for i in mine]
            found = self.function(prompts, [texts[i] for i in mine], **columns)
            found = torch.tensor(found, dtype=torch.float32, device=rewards.device)
            rewards[mine] = found.reshape(len(mine))
        return distributed.all_reduce(rewards)

    def own_tokens(self, rows: list[dict], texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """(prompt tokens, response tokens) by the reward model's own tokenizer and template."""
        stop = [stop_token(self.tokenizer)]
        answers = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            (encode_prompt(self.tokenizer, row["prompt"]), answer + stop)
            for row, answer in zip(rows, answers, strict=True)
        ]

    def of_model(self, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """[N] standardised scores of the reward model."""
        config = self.model.config

        def forward(mb):
            return sequence_scores(self.model, **mb)  # [b, 1]

        scores = run_micro_batches(forward, sequences, self.size, config.pad_token_id, 1, model=self.model)
        scores = scores[:, 0]
        std = getattr(config, "score_std", None) or 1.0  # None: a value model's, whose head is standardised
        scores = (scores - getattr(config, "score_mean", 0.0)) / std
        return scores
