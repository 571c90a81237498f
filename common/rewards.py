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
    """`reward(rows, sequences, texts) -> [N]` from a reward model (folder or hub id) or `module:function`. A function gets
    (prompts, responses, **other columns of the rows), equally long lists, and returns numbers. A model gets the tokens where
    the tokenizers agree, else the text by its own template; with `score_mean`, `score_std` in its config it standardises."""

    def __init__(self, name: str, tokenizer, args):
        self.name, self.model, self.label, self.size = name, None, "reward_model", args.micro_batch_size
        if ":" in name and not Path(name).exists():
            module, _, self.label = name.partition(":")
            try:
                self.function = getattr(importlib.import_module(module), self.label)
            except (ImportError, AttributeError) as error:
                fail(f"--reward {name}: {error}; give a model folder, a hub id or module:function")
            return
        name = resolve(name)
        self.tokenizer, self.same = load_tokenizer(name), same_tokenizer(tokenizer, name)
        self.model = load_model("reward", name, self.tokenizer, args, trained=False)

    def __call__(
        self, rows: list[dict], sequences: list[tuple[list[int], list[int]]], texts: list[str]
    ) -> torch.Tensor:
        if self.model is None:
            scores = torch.zeros(len(rows), device=distributed.device())
            mine = list(range(distributed.rank(), len(rows), distributed.world()))
            names = {key for row in rows for key in row if not key.endswith("_ids")} - {"prompt", "response"}
            if mine:
                columns = {key: [rows[i].get(key) for i in mine] for key in names}
                found = self.function([rows[i]["prompt"] for i in mine], [texts[i] for i in mine], **columns)
                scores[mine] = torch.tensor(found, dtype=torch.float32, device=scores.device).reshape(
                    len(mine)
                )
            scores = distributed.all_reduce(scores)
        else:
            if not self.same:
                stop, answers = (
                    [stop_token(self.tokenizer)],
                    self.tokenizer(texts, add_special_tokens=False)["input_ids"],
                )
                sequences = [
                    (encode_prompt(self.tokenizer, r["prompt"]), a + stop)
                    for r, a in zip(rows, answers, strict=True)
                ]
            config, forward = self.model.config, lambda mb: sequence_scores(self.model, **mb)
            scores = run_micro_batches(
                forward, sequences, self.size, config.pad_token_id, 1, model=self.model
            )[:, 0]
            scores = (scores - getattr(config, "score_mean", 0.0)) / (
                getattr(config, "score_std", None) or 1.0
            )
        if not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).nonzero()[0])
            fail(f"--reward {self.name} gave {scores[bad].item()} for the response {texts[bad][:80]!r}")
        return scores
