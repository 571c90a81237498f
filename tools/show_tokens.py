"""What a script trains on, token by token: the prompt grey, what is trained green; without colours in brackets.

python tools/show_tokens.py --model runs/sft/model --dataset chats.jsonl
python tools/show_tokens.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --kind preference --rows 3
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import read_rows
from common.pictures import shows_colours
from common.pretrained import resolve
from common.tokenization import load_tokenizer, tokenize

ANSWERS = {
    "sft": ("response",),
    "scored": ("response",),
    "labelled": ("response",),
    "preference": ("chosen", "rejected"),
}
GREY = "\033[90m"
GREEN = "\033[32m"
PLAIN = "\033[0m"


@dataclass
class Options:
    model: str
    """The model whose tokenizer and chat template write the conversations: a folder or hub id."""
    dataset: str
    """As a script's --dataset."""
    kind: Literal["sft", "scored", "labelled", "preference"] = "sft"
    """What the data set is read as (docs/data.md)."""
    split: str = "train"
    """Split of the data."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names and yours."""
    train_on: Literal["all", "last"] = "all"
    """Of conversations, as sft.py has it."""
    template_arguments: dict[str, str] = field(default_factory=dict)
    """Arguments for the chat template."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens."""
    max_response_length: int = 1024
    """Longest answer, in tokens."""
    rows: int = 2
    """How many rows to show."""


def marked(tokenizer, prompt_ids: list[int], answer_ids: list[int]) -> str:
    """The text of both, with a mark between tokens of the answer."""
    prompt = tokenizer.decode(prompt_ids)
    tokens = [tokenizer.decode([token]) for token in answer_ids]
    if shows_colours():
        return f"{GREY}{prompt}{PLAIN}{GREEN}{'|'.join(tokens)}{PLAIN}"
    return prompt + "".join(f"[{token}]" for token in tokens)


def main(options: Options) -> None:
    tokenizer = load_tokenizer(resolve(options.model), options.template_arguments)
    rows = read_rows(
        options.dataset,
        options.kind,
        split=options.split,
        columns=options.columns,
        train_on=options.train_on,
    )
    fields = ANSWERS[options.kind]
    lengths = (options.max_prompt_length, options.max_response_length)
    for row in tokenize(rows[: options.rows], tokenizer, fields, *lengths, options.dataset):
        for name in fields:
            print(f"--- row {row['row']}, {name}: {len(row[f'{name}_ids'])} tokens are trained")
            print(marked(tokenizer, row["prompt_ids"], row[f"{name}_ids"]))


if __name__ == "__main__":
    main(tyro.cli(Options))
