"""Evaluates what the other scripts train: value models, policies' responses, and responses by a judge. Trains nothing.

    python evaluate.py values --models runs/gvm_td/model runs/reward/model         # whose values prefer the better answer?
    python evaluate.py responses --models runs/sft/model runs/dvpo/model           # what do policies answer to the same prompts?
    torchrun --nproc_per_node=8 evaluate.py responses --models runs/sft/model runs/dpo/model --dataset prompts.jsonl
    python evaluate.py judge --judge-model NAME --responses runs/evaluate/sft/responses.jsonl runs/evaluate/dvpo/responses.jsonl

`values` (2502.16944 appendix E) asks of a GVM, a PPO critic or a reward model how often the chosen response of a pair has the
strictly higher mean, percentile, last or backed-up token value; two baselines that read no text stand in the same table, and
each token can be coloured by its value (Figure 3). A model in a run of gvm_td.py or reward.py is asked about that run's own
held-out pairs, so the table is the one the run logged. `responses` writes what models answer, also in the forms that AlpacaEval
and MT-bench read, with text metrics and rewards of it. `judge` asks a language model which of two files of responses is better,
each pair in both orders, or for scores from 1 to 5.

docs/evaluate.md explains every number and file; `python evaluate.py values --help` lists the flags.
"""

import sys

import tyro

from common import distributed
from common.cli import fail, parse
from evaluation.judge import Judge, judge
from evaluation.responses import RESPONSES_REVIEWS, Responses, responses
from evaluation.values import Values, values

COMMANDS = {  # their flags, what differs on the embedded world, and what they do
    "values": (Values, {}, values),
    "responses": (Responses, RESPONSES_REVIEWS, responses),
    "judge": (Judge, {}, judge),
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        arguments, reviews, main = COMMANDS[sys.argv[1]]
        if arguments is Judge:  # no model of ours
            main(tyro.cli(Judge, args=sys.argv[2:]))
        else:
            distributed.launch(main, parse(arguments, reviews, sys.argv[2:]))
    elif sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
    else:
        fail(f"give one of the commands {', '.join(COMMANDS)}: python evaluate.py values --help")
