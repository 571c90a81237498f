"""The field's public data sets in small: their columns and nesting, and what is read of them.

python tests/formats.py --write      # the table of docs/data.md
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

PAGE = Path(__file__).resolve().parents[1] / "docs/data.md"
BEGIN = "<!-- formats -->"
END = "<!-- /formats -->"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


class Format(NamedTuple):
    name: str
    kind: str
    row: dict
    """one row, as the data set has it"""
    found: list[dict] | str
    """what is read of it; text: why it is refused"""
    columns: dict[str, str] = {}
    """`--columns`"""


Q, A, B = "What is warm?", "Soup is.", "Ice is."
Q2, A2, B2 = "And cold?", "Ice is.", "Soup is."
CHAT = [user(Q), assistant(A), user(Q2), assistant(A2)]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
JSON_CALL = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
PAIR = {"prompt": Q, "chosen": A, "rejected": B}
BOTH_TURNS = [{"prompt": [user(Q)], "response": A}, {"prompt": CHAT[:3], "response": A2}]

FORMATS = [
    # one answer, or a conversation
    Format(
        "openbmb/UltraFeedback",
        "scored",
        {
            "source": "x",
            "instruction": Q,
            "models": ["m", "n"],
            "completions": [
                {"response": A, "overall_score": 8.5, "model": "m", "annotations": {}},
                {"response": B, "overall_score": 2.0, "model": "n", "annotations": {}},
            ],
        },
        [
            {"prompt": Q, "response": A, "reward": 8.5, "policy": "m"},
            {"prompt": Q, "response": B, "reward": 2.0, "policy": "n"},
        ],
    ),
    Format("allenai/tulu-3-sft-mixture", "sft", {"id": "1", "messages": CHAT, "source": "x"}, BOTH_TURNS),
    Format(
        "HuggingFaceH4/no_robots",
        "sft",
        {"prompt": Q, "prompt_id": "1", "messages": [user(Q), assistant(A)], "category": "x"},
        [{"prompt": [user(Q)], "response": A}],
    ),
    Format(
        "HuggingFaceH4/ultrachat_200k", "sft", {"prompt": Q, "prompt_id": "1", "messages": CHAT}, BOTH_TURNS
    ),
    Format(
        "teknium/OpenHermes-2.5",
        "sft",
        {
            "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}],
            "source": None,
            "system_prompt": None,
        },
        [{"prompt": [user(Q)], "response": A}],
    ),
    Format(
        "ShareGPT",
        "sft",
        {
            "id": "1",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": Q},
                {"from": "gpt", "value": A},
            ],
        },
        [{"prompt": [system("Be brief."), user(Q)], "response": A}],
    ),
    Format(
        "Open-Orca/SlimOrca",
        "sft",
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": Q, "weight": 0.0},
                {"from": "gpt", "value": A, "weight": 1.0},
            ]
        },
        [
            {
                "prompt": [system("Be brief."), {**user(Q), "weight": 0.0}],
                "response": [assistant(A, weight=1.0)],
            }
        ],
    ),
    Format(
        "Open-Orca/OpenOrca",
        "sft",
        {"id": "1", "system_prompt": "Be brief.", "question": Q, "response": A},
        [{"prompt": [system("Be brief."), user(Q)], "response": A}],
        {"prompt": "question"},
    ),
    Format(
        "LDJnr/Capybara",
        "sft",
        {"source": "x", "conversation": [{"input": Q, "output": A}, {"input": Q2, "output": A2}]},
        BOTH_TURNS,
    ),
    Format(
        "lmsys/lmsys-chat-1m",
        "sft",
        {"conversation_id": "1", "model": "m", "conversation": CHAT, "turn": 2, "language": "English"},
        BOTH_TURNS,
    ),
    Format(
        "allenai/WildChat-1M",
        "sft",
        {
            "conversation_hash": "1",
            "model": "m",
            "conversation": [{**user(Q), "toxic": False}, assistant(A, toxic=False)],
        },
        [{"prompt": [{**user(Q), "toxic": False}], "response": [assistant(A, toxic=False)]}],
    ),
    Format(
        "tatsu-lab/alpaca",
        "sft",
        {"instruction": "Translate.", "input": "Suppe", "output": A, "text": "..."},
        [{"prompt": "Translate.\n\nSuppe", "response": A}],
        {"prompt": "instruction+input", "response": "output"},
    ),
    Format(
        "tatsu-lab/alpaca, no input",
        "sft",
        {"instruction": Q, "input": "", "output": A, "text": "..."},
        [{"prompt": Q, "response": A}],
        {"prompt": "instruction+input", "response": "output"},
    ),
    Format(
        "databricks/databricks-dolly-15k",
        "sft",
        {"instruction": Q, "context": "A kitchen.", "response": A, "category": "x"},
        [{"prompt": f"A kitchen.\n\n{Q}", "response": A}],
        {"prompt": "context+instruction"},
    ),
    Format("GAIR/lima", "sft", {"conversations": [Q, A], "source": "x"}, "no 'prompt' among the columns"),
    Format(
        "OpenAssistant/oasst1",
        "sft",
        {"message_id": "1", "parent_id": None, "text": Q, "role": "prompter"},
        "`text` is one text, in which no prompt and answer can be told apart",
    ),
    Format(
        "OpenAI fine-tuning, with tools",
        "sft",
        {
            "messages": [
                user("Weather?"),
                {"role": "assistant", "tool_calls": JSON_CALL},
                {"role": "tool", "content": "7 C", "tool_call_id": "1"},
                assistant("7."),
            ],
            "tools": [TOOL],
        },
        [
            {"prompt": [user("Weather?")], "response": [assistant("", tool_calls=CALL)], "tools": [TOOL]},
            {
                "prompt": [
                    user("Weather?"),
                    assistant("", tool_calls=CALL),
                    {"role": "tool", "content": "7 C", "tool_call_id": "1"},
                ],
                "response": "7.",
                "tools": [TOOL],
            },
        ],
    ),
    Format(
        "Salesforce/xlam-function-calling-60k",
        "sft",
        {
            "id": 1,
            "query": "Weather?",
            "answers": '[{"name": "weather", "arguments": {}}]',
            "tools": '[{"name": "weather", "parameters": {}}]',
        },
        [
            {
                "prompt": "Weather?",
                "response": '[{"name": "weather", "arguments": {}}]',
                "tools": [{"name": "weather", "parameters": {}}],
            }
        ],
        {"prompt": "query", "response": "answers"},
    ),
    Format(
        "openai/gsm8k",
        "prompts",
        {"question": Q, "answer": "6 #### 6"},
        [{"prompt": Q, "answer": "6 #### 6"}],
        {"prompt": "question"},
    ),
    Format(
        "openai/gsm8k, solutions",
        "sft",
        {"question": Q, "answer": "6 #### 6"},
        [{"prompt": Q, "response": "6 #### 6"}],
        {"prompt": "question", "response": "answer"},
    ),
    Format(
        "AI-MO/NuminaMath-CoT",
        "sft",
        {"source": "x", "problem": Q, "solution": A, "messages": [user(Q), assistant(A)]},
        [{"prompt": [user(Q)], "response": A}],
    ),
    Format(
        "EleutherAI/hendrycks_math",
        "prompts",
        {"problem": Q, "level": "1", "type": "x", "solution": A},
        [{"prompt": Q, "solution": A}],
        {"prompt": "problem"},
    ),
    Format(
        "OpenAI content in parts",
        "sft",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": Q}]},
                {"role": "assistant", "content": [{"type": "text", "text": A}]},
            ]
        },
        [{"prompt": [user(Q)], "response": A}],
    ),
    Format(
        "Content with a picture",
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, assistant(A)]},
        "content of the kind ['image_url'], and not text alone",
    ),
    # pairs
    Format(
        "HuggingFaceH4/ultrafeedback_binarized",
        "preference",
        {
            "prompt": Q,
            "prompt_id": "1",
            "chosen": [user(Q), assistant(A)],
            "rejected": [user(Q), assistant(B)],
            "messages": [user(Q), assistant(A)],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        [{"prompt": [user(Q)], "chosen": A, "rejected": B}],
    ),
    Format(
        "HuggingFaceH4/ultrafeedback_binarized, scores",
        "scored",
        {
            "prompt": Q,
            "prompt_id": "1",
            "chosen": [user(Q), assistant(A)],
            "rejected": [user(Q), assistant(B)],
            "messages": [user(Q), assistant(A)],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        [
            {"prompt": [user(Q)], "response": A, "reward": 8.0},
            {"prompt": [user(Q)], "response": B, "reward": 5.0},
        ],
    ),
    Format(
        "Anthropic/hh-rlhf",
        "preference",
        {
            "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {Q2}\n\nAssistant: {A2}",
            "rejected": f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {Q2}\n\nAssistant: {B2}",
        },
        [{"prompt": CHAT[:3], "chosen": A2, "rejected": B2}],
    ),
    Format(
        "trl-lib/ultrafeedback_binarized",
        "preference",
        {
            "chosen": [user(Q), assistant(A)],
            "rejected": [user(Q), assistant(B)],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        [{"prompt": [user(Q)], "chosen": A, "rejected": B}],
    ),
    Format(
        "TRL, answers as messages",
        "preference",
        {"prompt": [user(Q)], "chosen": [assistant(A)], "rejected": [assistant(B)]},
        [{"prompt": [user(Q)], "chosen": A, "rejected": B}],
    ),
    Format(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        "preference",
        {
            "id": "1",
            "source": "x",
            "chosen": CHAT,
            "rejected": [*CHAT[:3], assistant(B2)],
            "chosen_rating": 5.0,
            "rejected_rating": 2.0,
        },
        [{"prompt": CHAT[:3], "chosen": A2, "rejected": B2}],
    ),
    Format(
        "Skywork/Skywork-Reward-Preference-80K",
        "preference",
        {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)], "source": "x"},
        [{"prompt": [user(Q)], "chosen": A, "rejected": B}],
    ),
    Format(
        "Turns that differ early",
        "preference",
        {"chosen": CHAT, "rejected": [user(Q), assistant(B), user(Q2), assistant(B2)]},
        [{"prompt": [user(Q)], "chosen": CHAT[1:], "rejected": [assistant(B), user(Q2), assistant(B2)]}],
    ),
    Format(
        "Intel/orca_dpo_pairs",
        "preference",
        {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B},
        [{"prompt": [system("Be brief."), user(Q)], "chosen": A, "rejected": B}],
        {"prompt": "question"},
    ),
    Format(
        "argilla/distilabel-intel-orca-dpo-pairs",
        "preference",
        {"system": "", "input": Q, "chosen": A, "rejected": B, "generations": [A, B], "status": "x"},
        [PAIR],
        {"prompt": "input"},
    ),
    Format(
        "PKU-Alignment/PKU-SafeRLHF",
        "preference",
        {
            "prompt": Q,
            "response_0": B,
            "response_1": A,
            "is_response_0_safe": True,
            "better_response_id": 1,
            "safer_response_id": 1,
        },
        [PAIR],
    ),
    Format(
        "nvidia/HelpSteer3",
        "preference",
        {"domain": "x", "context": [user(Q)], "response1": A, "response2": B, "overall_preference": -2},
        [{"prompt": [user(Q)], "chosen": A, "rejected": B}],
    ),
    Format(
        "nvidia/HelpSteer2, preferences",
        "preference",
        {"prompt": Q, "response_1": B, "response_2": A, "preference_strength": 2, "split": "train"},
        [{"prompt": Q, "chosen": A, "rejected": B}],
    ),
    Format(
        "nvidia/HelpSteer3, a tie",
        "preference",
        {"domain": "x", "context": [user(Q)], "response1": A, "response2": B, "overall_preference": 0},
        [],
    ),
    Format(
        "nvidia/HelpSteer2",
        "scored",
        {"prompt": Q, "response": A, "helpfulness": 3, "correctness": 4, "verbosity": 2},
        [{"prompt": Q, "response": A, "reward": 3}],
        {"reward": "helpfulness"},
    ),
    Format(
        "lmarena-ai/arena-human-preference-140k",
        "preference",
        {
            "id": "1",
            "model_a": "m",
            "model_b": "n",
            "winner": "model_b",
            "conversation_a": [user(Q), assistant(B)],
            "conversation_b": [user(Q), assistant(A)],
        },
        [{"prompt": [user(Q)], "chosen": A, "rejected": B}],
    ),
    Format(
        "lmarena-ai/arena-human-preference-55k",
        "preference",
        {
            "id": 1,
            "model_a": "m",
            "model_b": "n",
            "prompt": f'["{Q}", "{Q2}"]',
            "response_a": f'["{A}", "{A2}"]',
            "response_b": f'["{A}", "{B2}"]',
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        [{"prompt": CHAT[:3], "chosen": A2, "rejected": B2}],
    ),
    Format(
        "stanfordnlp/SHP",
        "preference",
        {
            "post_id": "1",
            "history": Q,
            "human_ref_A": B,
            "human_ref_B": A,
            "labels": 0,
            "score_A": 1,
            "score_B": 9,
        },
        [PAIR],
    ),
    Format(
        "allenai/reward-bench-2",
        "best_of",
        {
            "id": "1",
            "prompt": Q,
            "chosen": [A],
            "rejected": [B, "Snow is.", "No."],
            "num_correct": 1,
            "num_incorrect": 3,
            "total_completions": 4,
            "models": ["x"],
            "subset": "Math",
            "additional_metadata": {"category": None},
        },
        [
            {"prompt": Q, "response": A},
            {"prompt": Q, "response": B},
            {"prompt": Q, "response": "Snow is."},
            {"prompt": Q, "response": "No."},
        ],
    ),
    Format(
        "allenai/reward-bench-2",
        "preference",
        {"prompt": Q, "chosen": [A], "rejected": [B, "Snow is.", "No."]},
        "chosen is a list of answers, as in RewardBench 2, and not one; --source best-of reads it",
    ),
    Format(
        "berkeley-nest/Nectar",
        "preference",
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [{"answer": B, "model": "n", "rank": 2.0}, {"answer": A, "model": "m", "rank": 1.0}],
            "turns": 1,
        },
        [{"prompt": [user(Q)], "chosen": A, "rejected": B, "chosen_policy": "m", "rejected_policy": "n"}],
    ),
    Format(
        "allenai/reward-bench",
        "preference",
        {
            "prompt": Q,
            "chosen": A,
            "chosen_model": "m",
            "rejected": B,
            "rejected_model": "n",
            "subset": "x",
            "id": 1,
        },
        [PAIR],
    ),
    Format(
        "trl-lib/kto-mix-14k",
        "labelled",
        {"prompt": [user(Q)], "completion": [assistant(A)], "label": True},
        [{"prompt": [user(Q)], "response": A, "label": True}],
    ),
    Format("trl-lib/tldr", "sft", {"prompt": Q, "completion": f" {A}"}, [{"prompt": Q, "response": f" {A}"}]),
    Format(
        "openai/prm800k",
        "scored",
        {"question": {"problem": Q}, "label": {"steps": []}},
        "no 'prompt' among the columns",
    ),
    Format(
        "lmsys/mt_bench",
        "prompts",
        {"question_id": 81, "category": "writing", "turns": [Q, Q2]},
        [{"prompt": Q, "turns": [Q, Q2]}],
    ),
    Format(
        "tatsu-lab/alpaca_eval",
        "prompts",
        {"instruction": Q, "dataset": "x", "output": A, "generator": "m"},
        [{"prompt": Q}],
        {"prompt": "instruction"},
    ),
    Format(
        "google/IFEval",
        "prompts",
        {"key": 1, "prompt": Q, "instruction_id_list": ["x"], "kwargs": [{}]},
        [{"prompt": Q, "key": 1}],
    ),
    Format(
        "agentica-org/DeepScaleR",
        "prompts",
        {"problem": Q, "answer": "6", "solution": A},
        [{"prompt": Q, "answer": "6"}],
        {"prompt": "problem"},
    ),
]


def table() -> str:
    """The table of docs/data.md."""
    lines = ["| data set | read as | flags | |", "|---|---|---|---|"]
    for each in FORMATS:
        flags = " ".join(f"{ours} {theirs}" for ours, theirs in each.columns.items())
        flags = f"`--columns {flags}`" if flags else ""
        if isinstance(each.found, str):
            verdict = f"refused: {each.found}"
        elif not each.found:
            verdict = "dropped and counted"
        else:
            verdict = "right"
        lines.append(f"| {each.name} | {each.kind} | {flags} | {verdict.replace('|', ' ')} |")
    right = sum(not isinstance(each.found, str) for each in FORMATS)
    return f"{right} of {len(FORMATS)} are read right, the others refused.\n\n" + "\n".join(lines) + "\n"


def page_with(table: str, page: str) -> str:
    """docs/data.md with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="the table of docs/data.md")
    if parser.parse_args().write:
        PAGE.write_text(page_with(table(), PAGE.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
