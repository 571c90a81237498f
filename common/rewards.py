"""Rewards of finished responses: a reward model, or a function of yours."""

import importlib
import inspect
import math
import traceback
from pathlib import Path

import torch

from common import distributed, positions, templates
from common.batches import run_micro_batches
from common.cli import fail
from common.models import load_model
from common.positions import longest_of
from common.pretrained import resolve
from common.templates import text_of
from common.tokenization import (
    TOKENS,
    encode,
    encode_plain,
    load_tokenizer,
    prompt_text,
    require_end,
    were_cut,
)
from common.value_heads import sequence_scores

# what `tokenize` adds to a row: no columns of the data
OURS = (*TOKENS, "split_by")


def find_function(flag: str, name: str, what: str):
    """The function `module:function` that a flag names. Ends with one line where there is none; `what` the flag takes."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's own module
        fail(f"{flag} {name}: {' '.join(str(error).split())}; give {what}")
    if not callable(found):
        fail(f"{flag} {name} is {type(found).__name__}, not a function")
    return found


def said_by(error: Exception) -> str:
    """An error of the user's own code, in one line, and where it came from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    why = " ".join(str(error).split())
    return f"{type(error).__name__}: {why} ({Path(place.filename).name}, line {place.lineno})"


class Reward:
    """`reward(rows, sequences, texts)` gives [N] rewards, from a reward model or from a function
    `module:function`.

    A function gets (prompts, responses, **other columns of the rows), equally long lists, and returns
    numbers. A model (folder or hub id) reads the conversation as its own chat template writes it, as its card
    has it; an encoder without one gets prompt and response as a pair, which its tokenizer joins by its own
    special tokens. A response that was cut gets no end. The score is standardised by `score_mean`,
    `score_std` of the model's config.
    `rows`: all that will be judged; what cannot be is found at once. `label`: the name of the reward in logs;
    `model`: None for a function. Ends with one line where there is no such model or function, or it does not
    fit the rows.
    """

    def __init__(self, name: str, tokenizer, args, rows: list[dict] = ()):
        self.name = name
        self.policy_tokenizer = tokenizer
        self.model = None
        self.label = "reward_model"
        self.size = args.micro_batch_size
        if ":" in name and not Path(name).exists():
            self.open_function(rows)
            return
        name = resolve(name)
        self.tokenizer = load_tokenizer(name, ends=False)  # of an encoder may have no end of an answer
        self.model = load_model("reward", name, self.tokenizer, args, trained=False)
        self.pairs = self.model.needs_mask and not self.tokenizer.chat_template
        if self.pairs:
            self.model.needs_types = "token_type_ids" in self.tokenizer("a", "b")
        else:
            require_end(self.tokenizer, name)
        for row in rows:
            self.tokens(row, templates.PROBE, cut=False)

    def open_function(self, rows: list[dict]) -> None:
        """Finds the function, and the columns that it will get."""
        self.label = self.name.partition(":")[2]
        self.function = find_function("--reward", self.name, "a model folder, a hub id or module:function")
        if rows:
            self.columns_of(rows)

    def columns_of(self, rows: list[dict]) -> list[str]:
        """The columns of rows that the function gets: all, or those that it names. Ends with one line where it
        takes one that is not there, or the data has one of a name that every function's argument has."""
        parameters = inspect.signature(self.function).parameters
        columns = {key for row in rows for key in row if key not in OURS} - {"prompt"}
        for taken in sorted(columns & {"prompts", "responses"}):
            fail(
                f"--reward {self.name}: the data's column {taken!r} is the name of an argument that every reward "
                "function has; rename the column"
            )
        for parameter in list(parameters.values())[2:]:
            required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if required and parameter.name not in columns:
                fail(f"--reward {self.name} takes {parameter.name!r}, which is no column of the data")
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        return sorted(columns if takes_all else columns & set(parameters))

    def __call__(
        self, rows: list[dict], sequences: list[tuple[list[int], list[int]]], texts: list[str]
    ) -> torch.Tensor:
        """[N] rewards, on every rank, of `texts`, the responses to `rows` (messages where an answer is several).

        `sequences` are the policy's (prompt, response) tokens, whose last says whether a response ended. Ends
        with one line where a reward is not finite.
        """
        if self.model is None:
            return self.of_function(rows, texts)
        cut = were_cut(self.policy_tokenizer, [response for _, response in sequences])
        read = [self.tokens(row, text, c) for row, text, c in zip(rows, texts, cut, strict=True)]
        rewards = self.of_model(read)
        if not torch.isfinite(rewards).all():
            bad = int((~torch.isfinite(rewards)).nonzero()[0])
            fail(f"--reward {self.name} gave {rewards[bad].item()} for the response {texts[bad][:80]!r}")
        return rewards

    def of_function(self, rows: list[dict], texts: list[str]) -> torch.Tensor:
        """[N] numbers of the function: each rank asks for its share, and waits for the others'."""
        mine = list(range(distributed.rank(), len(rows), distributed.world()))
        found = []
        if mine:
            columns = {key: [rows[i].get(key) for i in mine] for key in self.columns_of(rows)}
            prompts = [rows[i]["prompt"] for i in mine]
            try:
                found = self.function(prompts, [text_of(texts[i]) for i in mine], **columns)
            except Exception as error:  # the user's own code
                fail(f"--reward {self.name} raised {said_by(error)} for {self.rows_named(rows, mine)}")
            found = self.numbers(found, rows, texts, mine)
        shares = distributed.all_gather_object(found)
        rewards = [0.0] * len(rows)
        for rank, share in enumerate(shares):
            rewards[rank :: len(shares)] = share
        return torch.tensor(rewards, dtype=torch.float32, device=distributed.device())

    def numbers(self, found, rows: list[dict], texts: list[str], mine: list[int]) -> list[float]:
        """What the function gave, as finite numbers. Ends with one line that names the row that has none."""
        found = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(found, list | tuple) or len(found) != len(mine):
            gave = f"{len(found)} rewards" if isinstance(found, list | tuple) else type(found).__name__
            fail(f"--reward {self.name} gave {gave} for {len(mine)} responses; a number for each is needed")
        numbers = []
        for i, each in zip(mine, found, strict=True):
            each = each.item() if hasattr(each, "item") else each
            if not isinstance(each, int | float) or not math.isfinite(each):
                fail(
                    f"--reward {self.name} gave {each!r}, not a finite number, for "
                    f"{self.rows_named(rows, [i])}, response {texts[i][:80]!r}"
                )
            numbers.append(float(each))
        return numbers

    def rows_named(self, rows: list[dict], some: list[int]) -> str:
        """Which rows of the data those are."""
        numbers = [str(rows[i].get("row")) for i in some]
        return ("row " if len(numbers) == 1 else "rows ") + ", ".join(numbers)

    def tokens(self, row: dict, text: str, cut: bool) -> tuple[list[int], list[int]]:
        """The conversation as the reward model reads it, cut in two before the response (where it is told of
        that), else before the last token. Ends with one line where its template refuses the row."""
        try:
            if self.pairs:
                return self.pair_tokens(row, text)
            if self.tokenizer.chat_template:
                written = templates.judged(self.tokenizer, row["prompt"], text, row.get("tools"), cut)
                ids = encode(self.tokenizer, written)
                return ids[:-1], ids[-1:]
            prompt_ids, answer_ids = encode_plain(self.tokenizer, row["prompt"], text)
        except ValueError as error:
            fail(f"--reward {self.name}, row {row.get('row')} of the data: {error}")
        return prompt_ids, answer_ids + [self.tokenizer.eos_token_id] * (not cut)

    def pair_tokens(self, row: dict, text: str) -> tuple[list[int], list[int]]:
        """(the tokens up to the response, the others) of `tokenizer(prompt, response)`."""
        encoded = self.tokenizer(prompt_text(row["prompt"]), text)
        ids = encoded["input_ids"]
        # one at least: what has no types is not told where the response begins
        types = encoded.get("token_type_ids", [0] + [1] * (len(ids) - 1))
        start = types.index(1)
        return ids[:start], ids[start:]

    def of_model(self, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """[N] standardised scores of the reward model."""
        config = self.model.config
        positions.check(self.model, f"--reward {self.name}", longest_of(sequences))

        def forward(mb):
            return sequence_scores(self.model, **mb)  # [b, 1]

        scores = run_micro_batches(forward, sequences, self.size, config.pad_token_id, 1, model=self.model)
        scores = scores[:, 0]
        std = getattr(config, "score_std", None) or 1.0  # None: a value model's, whose head is standardised
        scores = (scores - getattr(config, "score_mean", 0.0)) / std
        return scores
