"""Evaluates what the other scripts train: value models, policies, and their responses. It trains nothing.

    python evaluate.py values --models runs/gvm_td/model runs/reward/model
    python evaluate.py responses --models runs/sft/model runs/dvpo/model
    torchrun --nproc_per_node=8 evaluate.py responses --models runs/sft/model --dataset prompts.jsonl
    python evaluate.py judge --judge-model NAME --responses runs/evaluate/sft/responses.jsonl \\
        runs/evaluate/dvpo/responses.jsonl
    python evaluate.py all --models runs/sft/model runs/dvpo/model --judge-model NAME --gvm runs/gvm_td/model

- `values` (2502.16944 appendix E): whose values prefer the better answer? Of a GVM, a PPO critic or a reward
  model it says how often the chosen response of a pair has the strictly higher mean, percentile, last or
  backed-up token value. Two baselines that read no text stand in the same table, and each token can be
  coloured by its value (Figure 3). A model in a run of gvm_td.py or reward.py is asked about that run's own
  held-out pairs, so the table is the one that the run logged.
- `responses`: what do policies answer to the same prompts? It writes the answers, also in the forms that
  AlpacaEval and MT-bench read, with text metrics and rewards.
- `judge`: which answers does a language model prefer? It compares two files of responses, each pair in both
  orders, or gives scores from 1 to 5.
- `all`: the three of them in one command, one table, and one page with the answers side by side.
- `length_controlled`: AlpacaEval 2's length-controlled win rate from the judge's verdicts, by alpaca_eval.

This file only chooses the command; each stands with its flags in a file of its own in evaluation/.
docs/evaluate.md explains every number and file; `python evaluate.py values --help` lists the flags.
"""

import sys

from common import distributed
from common.cli import fail, parse, parse_alone
from evaluation.all import All, evaluate_all
from evaluation.judge import Judge, judge
from evaluation.length_controlled import LengthControlled, length_controlled
from evaluation.responses import RESPONSES_REVIEWS, Responses, responses
from evaluation.values import Values, values

# Of each command: its flags, which defaults differ on the embedded world, and what it does.
COMMANDS = {
    "values": (Values, {}, values),
    "responses": (Responses, RESPONSES_REVIEWS, responses),
    "judge": (Judge, {}, judge),
    "all": (All, {}, evaluate_all),
    "length_controlled": (LengthControlled, {}, length_controlled),
}


def main(argv: list[str]) -> None:
    """Runs the command that `argv` names, with the flags that follow it."""
    name = argv[0] if argv else ""
    if name in ("--help", "-h"):
        print(__doc__)
        return
    if name not in COMMANDS:
        fail(f"give one of the commands {', '.join(COMMANDS)}: python evaluate.py values --help")
    flags, reviews, command = COMMANDS[name]
    if name in ("judge", "length_controlled"):  # no model of ours: no data set, no processes
        command(parse_alone(flags, argv[1:]))
    else:
        distributed.launch(command, parse(flags, reviews, argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
