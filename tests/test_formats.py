"""The field's formats are read as what they are, or refused in one line; conversations, pairs, files, rows."""

import copy
import datetime
import gzip
import json
import random

import datasets
import pytest
from formats import CHAT, FORMATS, PAGE, Q2, TOOL, A, B, Q, assistant, page_with, system, table, user

from common import data
from common.data import hold_out, hold_out_prompts, once_per_prompt, prompt_key, read_rows


def write(path, *rows) -> str:
    """A .jsonl file; rows that are text are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("each", FORMATS, ids=lambda each: each.name.replace("/", "-"))
def test_formats_of_the_field(tmp_path, each):
    """Exactly: prompts, answers and numbers; nothing silently otherwise."""
    filler = {
        "prompt": "never read",
        "response": "x",
        "chosen": "x",
        "rejected": "y",
        "reward": 1.0,
        "label": True,
    }
    name = write(tmp_path / "d.jsonl", each.row)
    if isinstance(each.found, str):
        with pytest.raises(SystemExit) as stop:
            read_rows(name, each.kind, columns=each.columns, train_on="all")
        assert each.found in str(stop.value) and "row 1" in str(stop.value) and "\n" not in str(stop.value)
        return
    if not each.found:  # beside a row of ours, as a file without a row is an error
        name = write(tmp_path / "e.jsonl", each.row, filler)
    rows = read_rows(name, each.kind, columns=each.columns, train_on="all")
    rows = [row for row in rows if row["prompt"] != "never read"]
    assert len(rows) == len(each.found)
    for row, expected in zip(rows, each.found, strict=True):
        assert {key: row[key] for key in expected} == expected


@pytest.mark.parametrize("each", FORMATS, ids=lambda each: each.name.replace("/", "-"))
def test_formats_are_the_same_from_parquet(tmp_path, each):
    """Where every row has every key of any, None where it has none."""
    if isinstance(each.found, str):
        pytest.skip("refused")
    other = {"prompt": "other", "more": None}
    try:
        datasets.Dataset.from_list([each.row, {key: None for key in each.row}]).to_parquet(
            tmp_path / "d.parquet"
        )
    except Exception as error:  # pyarrow: mixed types in a column, as JSON has them
        pytest.skip(f"no parquet file can hold it: {type(error).__name__}")
    assert other
    rows = (
        read_rows(
            str(tmp_path / "d.parquet"), each.kind, columns=each.columns, train_on="all", skip_bad_rows=True
        )
        if each.found
        else []
    )
    assert len(rows) == len(each.found)
    for row, expected in zip(rows, each.found, strict=True):
        for key in ("prompt", "response", "chosen", "rejected", "reward", "label"):
            assert row.get(key) == expected.get(key, row.get(key))


def test_enough_formats_are_read_right():
    assert len(FORMATS) >= 43
    assert sum(not isinstance(each.found, str) for each in FORMATS) >= len(FORMATS) * 36 / 43


def test_the_page_has_the_table():
    page = PAGE.read_text()
    assert page == page_with(table(), page), "python tests/formats.py --write"


# --- conversations ------------------------------------------------------------------------------------------


def test_every_answer_or_the_last(tmp_path, capsys):
    name = write(tmp_path / "d.jsonl", {"messages": CHAT}, {"messages": CHAT[:2]})
    rows = read_rows(name, "sft", train_on="all")
    assert [(len(row["prompt"]), row["response"], row["row"]) for row in rows] == [
        (1, A, 1),
        (3, B, 1),
        (1, A, 2),
    ]
    assert "2 conversations; every answer is trained, 3 in all" in capsys.readouterr().out
    rows = read_rows(name, "sft", train_on="last")
    assert [(len(row["prompt"]), row["response"]) for row in rows] == [(3, B), (1, A)]


BAD_CONVERSATIONS = {
    "ends with the user": ("sft", {"messages": [*CHAT, user("thanks!")]}, "ends with a message of the user"),
    "one message": ("sft", {"messages": [assistant(A)]}, "one message"),
    "odd role": ("sft", {"messages": [user(Q), {"role": "narrator", "content": "x"}]}, "the role 'narrator'"),
    "no role": ("sft", {"messages": [user(Q), {"role": None, "content": "x"}]}, "the role None"),
    "null content": (
        "sft",
        {"messages": [user(Q), {"role": "assistant", "content": None}]},
        "a message of the assistant has no content",
    ),
    "null content before the answer": (
        "sft",
        {"messages": [user(Q), assistant(A), {"role": "user", "content": None}, assistant(B)]},
        "a message of the user has no content",
    ),
    "content of no parts": ("sft", {"messages": [user([]), assistant(A)]}, "the user has no content"),
    "a call in the old form": (
        "sft",
        {"messages": [user(Q), assistant("", function_call={"name": "f", "arguments": "{}"}), user(Q)]},
        "use `tool_calls`",
    ),
    "arguments that are no JSON": (
        "sft",
        {"messages": [user(Q), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])]},
        "arguments of a call of a tool are no JSON",
    ),
    "two system messages": (
        "sft",
        {"system": "Be brief.", "messages": [system("Be long."), *CHAT]},
        "different system messages",
    ),
    "half a character in a call": (
        "sft",
        {"messages": [user(Q), assistant("", tool_calls=[{"function": {"name": "\ud83d"}}])]},
        "half a character",
    ),
    "another answer beside": (
        "sft",
        {"messages": CHAT, "response": "No."},
        "messages ends with an answer, which is not the one in `response`",
    ),
    "another question beside": (
        "sft",
        {"prompt": "Unasked?", "messages": CHAT},
        "messages does not hold the prompt",
    ),
    "half of an answer trained": (
        "sft",
        {"messages": [user(Q), assistant(A, weight=0), assistant(B, weight=1)]},
        "some have a `weight` of 0",
    ),
    "a choice of neither side": (
        "preference",
        {"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 7},
        "names neither side and no tie",
    ),
    "rounds that are none": (
        "preference",
        {"prompt": '["a", b]', "response_a": '["a"]', "response_b": '["b"]', "winner_model_a": 1},
        "no JSON lists",
    ),
    "rounds of other numbers": (
        "preference",
        {"prompt": '["a"]', "response_a": '["a"]', "response_b": '["b", "c"]', "winner_model_a": 1},
        "a text for each round",
    ),
    "content is a number": (
        "sft",
        {"messages": [user(Q), {"role": "assistant", "content": 7}]},
        "of the type int",
    ),
    "pair ends with the user": (
        "preference",
        {
            "chosen": [user(Q), assistant(A), user("thanks!")],
            "rejected": [user(Q), assistant(B), user("thanks!")],
        },
        "chosen ends with a message of the user",
    ),
    "a conversation and its beginning": (
        "preference",
        {"chosen": CHAT, "rejected": CHAT[:2]},
        "one goes on where the other ends",
    ),
    "other prompts": (
        "preference",
        {"chosen": [user(Q), assistant(A)], "rejected": [user(Q2), assistant(B)]},
        "do not begin with one prompt",
    ),
    "another prompt beside": (
        "preference",
        {"prompt": Q2, "chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]},
        "chosen does not begin with the prompt",
    ),
    "tools that are none": ("sft", {"messages": CHAT, "tools": "weather"}, "tools is text that is no JSON"),
    "a tool without a name": (
        "sft",
        {"messages": CHAT, "tools": [{**TOOL, "function": {"name": 7}}]},
        "a tool's name is no text",
    ),
    "answer by the user": (
        "sft",
        {"prompt": Q, "response": [user(A), assistant(B)]},
        "begins with a message of the user",
    ),
}


@pytest.mark.parametrize("case", BAD_CONVERSATIONS)
def test_a_fault_of_a_conversation_is_its_rows(tmp_path, case):
    kind, row, message = BAD_CONVERSATIONS[case]
    good = {"prompt": Q, "response": A, "chosen": A, "rejected": B}
    name = write(tmp_path / "d.jsonl", good, row)
    with pytest.raises(SystemExit, match=f"row 2: .*{message}.*--skip-bad-rows") as stop:
        read_rows(name, kind, train_on="all")
    assert "\n" not in str(stop.value)
    assert [row["row"] for row in read_rows(name, kind, train_on="all", skip_bad_rows=True)] == [1]


def test_a_pair_with_a_prompt_and_whole_conversations_keeps_the_turns_between(tmp_path):
    pair = {"prompt": Q, "chosen": CHAT, "rejected": [*CHAT[:3], assistant("No.")]}
    (row,) = read_rows(write(tmp_path / "d.jsonl", pair), "preference")
    assert (row["prompt"], row["chosen"], row["rejected"]) == (CHAT[:3], B, "No.")


def test_an_answer_of_several_messages_is_said(tmp_path, capsys):
    row = {"prompt": [user(Q)], "response": CHAT[1:], "reward": 1.0}
    (row,) = read_rows(write(tmp_path / "d.jsonl", row), "scored")
    assert row["response"] == CHAT[1:]
    assert "in 1 rows an answer is several messages" in capsys.readouterr().out


def test_an_answer_of_several_turns_is_trained_turn_by_turn(tmp_path):
    """Of SFT: each answer and nothing of the user's; not those of the prompt, nor of weight 0."""
    row = {"prompt": CHAT[:3], "completion": [CHAT[3], user("Why?"), assistant("Physics.")]}
    rows = read_rows(write(tmp_path / "d.jsonl", row), "sft")
    assert [(len(row["prompt"]), row["response"]) for row in rows] == [(3, B), (5, "Physics.")]
    (last,) = read_rows(str(tmp_path / "d.jsonl"), "sft", train_on="last")
    assert last["response"] == "Physics."
    skipped = {"messages": [CHAT[0], assistant(A, weight=0), *CHAT[2:]]}
    (row,) = read_rows(write(tmp_path / "e.jsonl", skipped), "sft")
    assert row["response"] == B and len(row["prompt"]) == 3


def test_a_prefilled_prompt_stays_prefilled(tmp_path):
    begun = [user(Q), assistant("Soup")]
    pair = {"chosen": [*begun, assistant(" is.")], "rejected": [*begun, assistant(" is not.")]}
    (row,) = read_rows(write(tmp_path / "d.jsonl", pair), "preference")
    assert (row["prompt"], row["chosen"], row["rejected"]) == (begun, " is.", " is not.")


def test_a_conversation_is_one_in_every_form(tmp_path):
    """The same prompts, answers and parts of the data, whatever form a file has it in."""
    turns = [(CHAT[0]["content"], CHAT[1]["content"]), (CHAT[2]["content"], CHAT[3]["content"])]
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT
    ]
    hh = "".join(f"\n\nHuman: {question}\n\nAssistant: {answer}" for question, answer in turns)
    forms = {
        "messages": {"messages": CHAT},
        "roles in capitals": {"messages": [{**m, "role": m["role"].upper()} for m in CHAT]},
        "ShareGPT": {"conversations": sharegpt},
        "JSON in a text": {"conversations": json.dumps(sharegpt)},
        "parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
        "keys without a value": {"messages": [{**m, "name": None, "tool_calls": None} for m in CHAT]},
        "two speakers in each": {"conversation": [{"input": q, "output": a} for q, a in turns]},
        "HH in a response": {"response": hh},
        "HH beside its text": {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "response": CHAT[1:]},
        "prompt and completion": {"prompt": CHAT[:1], "completion": CHAT[1:]},
        "a text and messages": {"prompt": Q, "completion": CHAT[1:]},
        "a text and all messages": {"prompt": Q, "response": CHAT},
        "a prompt beside": {"prompt": Q, "messages": CHAT},
    }
    for form, row in forms.items():
        name = write(tmp_path / "d.jsonl", row)
        for train_on, expected in (
            ("all", [(1, A), (3, CHAT[3]["content"])]),
            ("last", [(3, CHAT[3]["content"])]),
        ):
            rows = read_rows(name, "sft", train_on=train_on)
            assert [(len(row["prompt"]), row["response"]) for row in rows] == expected, form
            assert all(row["prompt"] == CHAT[: len(row["prompt"])] for row in rows), form
            assert {data.row_hash(row, 0) for row in rows} == {data.prompt_hash(Q, 0)}, form


def test_a_pair_is_one_in_every_form(tmp_path):
    """Answers to one prompt of several messages."""
    other = [*CHAT[:3], assistant(B + "!")]
    hh = {}
    for side, messages in (("chosen", CHAT), ("rejected", other)):
        names = {"user": "Human", "assistant": "Assistant"}
        hh[side] = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)
    forms = {
        "answers": {"prompt": CHAT[:3], "chosen": CHAT[3]["content"], "rejected": B + "!"},
        "answers as messages": {"prompt": CHAT[:3], "chosen": CHAT[3:], "rejected": other[3:]},
        "conversations": {"chosen": CHAT, "rejected": other},
        "conversations and their prompt": {"prompt": CHAT[:3], "chosen": CHAT, "rejected": other},
        "conversations and their first question": {"prompt": Q, "chosen": CHAT, "rejected": other},
        "one of them whole": {"prompt": CHAT[:3], "chosen": CHAT, "rejected": B + "!"},
        "HH": hh,
        "a choice": {"conversation_a": other, "conversation_b": CHAT, "winner": "model_b"},
        "a choice of answers": {
            "context": CHAT[:3],
            "response1": CHAT[3]["content"],
            "response2": B + "!",
            "overall_preference": -1,
        },
    }
    for form, pair in forms.items():
        (row,) = read_rows(write(tmp_path / "d.jsonl", pair), "preference")
        assert (row["prompt"], row["chosen"], row["rejected"]) == (CHAT[:3], CHAT[3]["content"], B + "!"), (
            form
        )


def test_messages_of_the_assistant_in_a_row_are_one_answer(tmp_path):
    """Otherwise the second would be read as the end of the first, in one message."""
    row = {"messages": [user(Q), assistant(A), assistant(B), user(Q2), assistant("Snow.")]}
    name = write(tmp_path / "d.jsonl", row)
    both = [(row["prompt"], row["response"]) for row in read_rows(name, "sft")]
    assert both == [
        (row["messages"][:1], [assistant(A), assistant(B)]),
        (row["messages"][:4], "Snow."),
    ]
    turned = [*row["messages"][3:], *row["messages"][:3]]  # they are the last answer
    read = read_rows(write(tmp_path / "f.jsonl", {"messages": turned}), "sft")
    assert [row["response"] for row in read] == ["Snow.", [assistant(A), assistant(B)]]
    name = write(tmp_path / "e.jsonl", {"messages": row["messages"][:3], "reward": 1.0})
    for kind in ("sft", "scored"):
        (read,) = read_rows(name, kind, train_on="last")
        assert (read["prompt"], read["response"]) == ([user(Q)], [assistant(A), assistant(B)])


def test_a_response_may_be_a_whole_conversation(tmp_path):
    """Where no prompt is given: SFT on the better side of pairs."""
    hh = f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {Q2}\n\nAssistant: {B}"
    for number, chosen in enumerate((CHAT, hh)):
        name = write(tmp_path / f"{number}.jsonl", {"chosen": chosen, "rejected": "never read"})
        rows = read_rows(name, "sft", columns={"response": "chosen"})
        assert [(row["prompt"], row["response"]) for row in rows] == [(CHAT[:1], A), (CHAT[:3], B)]
        (last,) = read_rows(name, "sft", columns={"response": "chosen"}, train_on="last")
        assert (last["prompt"], last["response"]) == (CHAT[:3], B)
    no_answer = write(tmp_path / "e.jsonl", {"response": CHAT[:3]})
    with pytest.raises(SystemExit, match="response ends with a message of the user"):
        read_rows(no_answer, "sft")


def test_an_answer_of_weight_0_is_not_trained_as_the_last_one_either(tmp_path, capsys):
    rows = [{"messages": CHAT}, {"messages": [*CHAT[:3], assistant(B, weight=0)]}]
    name = write(tmp_path / "d.jsonl", *rows)
    assert [row["row"] for row in read_rows(name, "sft", train_on="last")] == [1]
    assert "1 rows dropped" in capsys.readouterr().out
    assert [row["row"] for row in read_rows(name, "sft")] == [1, 1, 2]


def test_equal_sides_are_a_tie(tmp_path, capsys):
    """They teach nothing, as texts and as conversations."""
    rows = [{"prompt": Q, "chosen": A, "rejected": B}, {"prompt": Q, "chosen": A, "rejected": A}]
    rows += [{"chosen": CHAT, "rejected": CHAT}]
    read = read_rows(write(tmp_path / "d.jsonl", *rows), "preference")
    assert [row["row"] for row in read] == [1]
    assert "2 rows dropped: a tie" in capsys.readouterr().out


def test_what_files_note_beside_a_message_does_not_part_two_conversations(tmp_path):
    sides = {
        side: [{**user(Q), "turn": number}, assistant(text)]
        for number, (side, text) in enumerate((("chosen", A), ("rejected", B)))
    }
    (row,) = read_rows(write(tmp_path / "d.jsonl", sides), "preference")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([{**user(Q), "turn": 0}], A, B)


def test_only_the_columns_of_conversations_are_read_as_such(tmp_path):
    """What is for a reward function comes to it as it is in the file."""
    more = {"tests": [{"input": "1", "output": "2"}], "people": [{"role": "expert"}], "note": "\n\nHuman: x"}
    (row,) = read_rows(write(tmp_path / "d.jsonl", {"prompt": Q, **more}), "prompts")
    assert {key: row[key] for key in more} == more


def test_hh_prompts_that_ask_for_an_answer_are_no_beginning_of_one(tmp_path):
    row = {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "response": A}
    (read,) = read_rows(write(tmp_path / "d.jsonl", row), "sft")
    assert read["prompt"] == [user(Q)]


def test_prompts_of_pairs_of_conversations(tmp_path):
    """What both sides begin with; a tie is a prompt too."""
    pair = {"chosen": CHAT, "rejected": [*CHAT[:3], assistant(B + "!")]}
    tie = {"prompt": Q2, "response_a": A, "response_b": B, "winner": "tie"}
    rows = read_rows(write(tmp_path / "d.jsonl", pair, tie), "prompts")
    assert [row["prompt"] for row in rows] == [CHAT[:3], Q2]


def test_messages_as_json_in_a_text(tmp_path):
    """Of a prompt or a conversation; an answer of JSON is an answer."""
    said = json.dumps([{"role": "user", "content": A}])
    rows = [{"messages": json.dumps(CHAT[:2])}, {"prompt": json.dumps([user(Q)]), "response": said}]
    read = read_rows(write(tmp_path / "d.jsonl", *rows), "sft")
    assert [(row["prompt"], row["response"]) for row in read] == [([user(Q)], A), ([user(Q)], said)]
    code = '[{"input": 1, "output": 2}]'
    (row,) = read_rows(write(tmp_path / "e.jsonl", {"prompt": code, "response": A}), "sft")
    assert row["prompt"] == code


def test_columns_that_are_named_win_over_the_nesting(tmp_path):
    """A reward of one's own is not passed over for that of the completions."""
    many = {"instruction": Q, "completions": [{"response": A, "overall_score": 1.0}], "mine": 5.0}
    with pytest.raises(SystemExit, match="row 1: no 'prompt'"):
        read_rows(write(tmp_path / "d.jsonl", many), "scored", columns={"reward": "mine"})
    ranked = {"prompt": Q, "answers": [{"answer": A, "rank": 1.0}], "mine": 5.0}
    with pytest.raises(SystemExit, match="row 1: no 'response'"):
        read_rows(write(tmp_path / "e.jsonl", ranked), "scored", columns={"reward": "mine"})
    (row,) = read_rows(str(tmp_path / "d.jsonl"), "sft", columns={"prompt": "instruction"})
    assert (row["prompt"], row["response"]) == (Q, A)


def test_equal_sides_with_scores_are_two_rows(tmp_path):
    pair = {"chosen": CHAT, "rejected": CHAT, "score_chosen": 2.0, "score_rejected": 1.0}
    rows = read_rows(write(tmp_path / "d.jsonl", pair), "scored")
    assert [(row["prompt"], row["response"], row["reward"]) for row in rows] == [
        (CHAT[:3], CHAT[3]["content"], 2.0),
        (CHAT[:3], CHAT[3]["content"], 1.0),
    ]


def test_arguments_of_calls_are_objects(tmp_path):
    """OpenAI writes them as JSON in a text, which most templates would quote once more."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    row = {"messages": [user(Q), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    (read,) = read_rows(write(tmp_path / "d.jsonl", row), "sft")
    parsed = {**call, "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    assert read["response"] == [assistant("", tool_calls=[parsed])]


def test_what_parquet_fills_in_is_left_out_at_any_depth(tmp_path):
    """Arrow gives each call the arguments of all others."""

    def call(**arguments):
        return [{"type": "function", "function": {"name": "f", "arguments": arguments}}]

    answers = [assistant("", tool_calls=call(city="Oslo")), assistant("", tool_calls=call(day="Monday"))]
    rows = [{"messages": [user(Q), answer]} for answer in answers]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    assert [row["response"] for row in read_rows(str(tmp_path / "d.parquet"), "sft")] == [
        [answer] for answer in answers
    ]


def test_times_in_messages_are_texts(tmp_path):
    """As WildChat has them: prompts go into files of samples, which are JSON."""
    time = datetime.datetime(2024, 7, 26)
    rows = [{"conversation": [{**message, "timestamp": time} for message in CHAT]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    first, second = read_rows(str(tmp_path / "d.parquet"), "sft")
    assert second["prompt"][0] == {**user(Q), "timestamp": "2024-07-26 00:00:00"}
    assert json.dumps(second["prompt"])


def test_what_is_put_before_or_goes_on_is_said(tmp_path, capsys):
    rows = [{"prompt": Q, "response": A, "system": "Be brief."}, {"prompt": CHAT[:2], "response": B}]
    read = read_rows(write(tmp_path / "d.jsonl", *rows), "sft")
    assert [row["prompt"] for row in read] == [[system("Be brief."), user(Q)], CHAT[:2]]
    out = capsys.readouterr().out
    assert "in 1 rows a column holds the system message" in out
    assert "1 prompts end with the beginning of the answer" in out


# --- columns and files --------------------------------------------------------------------------------------


def test_a_column_that_is_not_there_is_one_line(tmp_path):
    """And does not fall back on the file's own of our name."""
    name = write(tmp_path / "d.jsonl", {"prompt": Q, "response": A, "reward": 0.0, "overall_score": 9.0})
    with pytest.raises(SystemExit, match="has no column 'overal_score'; it has overall_score, prompt"):
        read_rows(name, "scored", columns={"reward": "overal_score"})
    with pytest.raises(SystemExit, match="has no column 'inputs'"):
        read_rows(name, "scored", columns={"prompt": "prompt+inputs"})
    only_some = write(tmp_path / "e.jsonl", {"a": Q, "response": A}, {"prompt": "no", "response": A})
    with pytest.raises(SystemExit, match="row 2: no 'prompt'"):
        read_rows(only_some, "sft", columns={"prompt": "a"})


ODD = {
    "an integer of 400 digits": '{"prompt": "a", "response": "b", "reward": 1' + "0" * 400 + "}",
    "an integer of 5,000 digits": '{"prompt": "a", "response": "b", "reward": 1' + "0" * 5000 + "}",
    "a prompt that is a number": '{"prompt": 1' + "0" * 400 + ', "response": "b", "reward": 1}',
    "half a character": '{"prompt": "a", "response": "b \\ud83d", "reward": 1}',
    "half a character in the prompt": '{"prompt": "a \\ud83d", "response": "b", "reward": 1}',
    "half a character in a message": '{"prompt": [{"role": "user", "content": "\\ud83d"}], "response": "b", "reward": 1}',
    "deep nesting": '{"prompt": "a", "response": "b", "reward": 1, "x": '
    + "[" * 100_000
    + "]" * 100_000
    + "}",
    "a torn line": '{"prompt": "a", "respon',
    "not a number": '{"prompt": "a", "response": "b", "reward": NaN}',
    "a number alone": "7",
    "a text alone": '"prompt"',
    "nothing": "null",
    "an empty prompt": '{"prompt": [], "response": "b", "reward": 1}',
    "no content": '{"prompt": [{"role": "user"}], "response": "b", "reward": 1}',
    "a reward in text": '{"prompt": "a", "response": "b", "reward": "1"}',
    "a reward that is true": '{"prompt": "a", "response": "b", "reward": true}',
}


@pytest.mark.parametrize("case", ODD)
def test_a_fault_of_a_row_is_that_rows(tmp_path, case, capsys):
    good = '{"prompt": "a", "response": "b", "reward": 1}'
    name = write(tmp_path / "d.jsonl", good, ODD[case], good)
    with pytest.raises(SystemExit, match="d.jsonl, row 2: ") as stop:
        read_rows(name, "scored")
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 400
    assert [row["row"] for row in read_rows(name, "scored", skip_bad_rows=True)] == [1, 3]
    assert "dropped 1 bad rows of 3" in capsys.readouterr().out


# what may stand anywhere in a file
ANYTHING = [None, 7, 1.5, True, float("nan"), [], {}, "", " ", "x", [None], [[]], [{}], {"a": 1}, 10**400]
ANYTHING += ["\ud83d", ["x"], [7], [{"role": "user"}], [assistant("x")], user("x"), "[{", '[{"role": 7}]']
ANYTHING += ["\n\nHuman:", "\n\nAssistant: x", "\n\nHuman: a\n\nHuman: b"]
COLUMNS = [
    *data.OURS,
    *sorted(data.formats.READ),
    "tools",
    "turns",
    "answers",
    "completions",
    "winner",
    "split",
]
COLUMNS += ["split_by", "system_prompt", "score_chosen", "score_rejected", "weight", "text"]


def places(value, path=()):
    """The paths to all values within a row."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*path, key)
        yield from places(each, (*path, key))


def with_odd_value(row: dict, rng: random.Random) -> dict:
    """The row with anything in one place of it, or in a further column."""
    row = copy.deepcopy(row)
    *above, key = rng.choice([*places(row), (rng.choice(COLUMNS),)])
    holder = row
    for each in above:
        holder = holder[each]
    holder[key] = copy.deepcopy(rng.choice(ANYTHING))
    return row


@pytest.mark.parametrize("kind", data.KINDS)
def test_anything_anywhere_in_a_row_is_read_or_its_fault(kind):
    """What passes has texts, or messages with a known role and a text; all else is one line."""
    rng = random.Random(kind)
    passed = 0
    of_kind = [each for each in FORMATS if each.kind == kind] or FORMATS
    for number in range(1500):
        each = rng.choice(of_kind if number % 2 else FORMATS)
        row = with_odd_value(with_odd_value(each.row, rng), rng)
        try:
            rows = data.rows_of(row, kind, each.columns, rng.choice(["all", "last"]))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            continue
        passed += bool(rows)
        for found in rows:
            assert 0 <= data.row_hash(found, 0) < 1
            for column in data.KINDS[kind]:
                value = found[column]
                if column in ("reward", "label"):
                    assert value == value and abs(value) < 1e308
                    continue
                messages = [user(value)] if isinstance(value, str) else value
                assert all(message["role"] in data.formats.ROLES.values() for message in messages)
                assert all(isinstance(message["content"].encode(), bytes) for message in messages)
        once_per_prompt("d", [{**found, "row": 1} for found in rows])
    assert passed > 20


def test_a_split_that_only_some_rows_name(tmp_path):
    """A row without one is a fault, not one of all splits."""
    row = {"prompt": Q, "response": A}
    name = write(tmp_path / "d.jsonl", row, {**row, "split": "test"}, {**row, "split": "train"})
    with pytest.raises(SystemExit, match="row 1: it has no `split`, which other rows have"):
        read_rows(name, "sft")
    assert [row["row"] for row in read_rows(name, "sft", skip_bad_rows=True)] == [3]


def test_a_row_that_is_none_beside_rows_with_splits(tmp_path):
    row = {"prompt": Q, "response": A, "split": "train"}
    name = write(tmp_path / "d.jsonl", row, "7", '"text"', row)
    with pytest.raises(SystemExit, match="row 2: expected an object with named columns, found int"):
        read_rows(name, "sft")
    assert [row["row"] for row in read_rows(name, "sft", skip_bad_rows=True)] == [1, 4]


def test_bytes_that_are_no_text(tmp_path):
    """In one row they are its fault; a mark at the beginning of the file is none; a torn archive is one line."""
    text = json.dumps({"prompt": Q, "response": A}).encode() + b"\n"
    name = tmp_path / "d.jsonl"
    name.write_bytes(b"\xef\xbb\xbf" + text + text.replace(b"warm", b"w\xffrm"))
    with pytest.raises(SystemExit, match="row 2: prompt holds what is no UTF-8"):
        read_rows(str(name), "sft")
    assert [row["row"] for row in read_rows(str(name), "sft", skip_bad_rows=True)] == [1]
    lines = [json.dumps({"prompt": str(i), "response": hex(hash(str(i)))}) for i in range(500)]
    packed = bytearray(gzip.compress("\n".join(lines).encode()))
    packed[1000:1100] = bytes(100)
    torn = tmp_path / "d.jsonl.gz"
    torn.write_bytes(packed)
    with pytest.raises(SystemExit, match="cannot be read") as stop:
        read_rows(str(torn), "sft")
    assert "\n" not in str(stop.value)


def test_several_files_and_folders(tmp_path):
    row = {"prompt": Q, "response": A}
    a = write(tmp_path / "a.jsonl", row)
    b = tmp_path / "b.jsonl.gz"
    b.write_bytes(gzip.compress(json.dumps({**row, "response": B}).encode()))
    assert [each["response"] for each in read_rows(f"{a},{b}", "sft")] == [A, B]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", row), write(folder / "test.jsonl", {**row, "response": B})
    assert [each["response"] for each in read_rows(str(folder), "sft", split="test")] == [B]
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list([row])})
    saved.save_to_disk(tmp_path / "saved")
    assert [each["response"] for each in read_rows(str(tmp_path / "saved"), "sft")] == [A]
    with pytest.raises(SystemExit, match="it has the splits train"):
        read_rows(str(tmp_path / "saved"), "sft", split="test")
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "one")
    assert len(read_rows(str(tmp_path / "one"), "sft")) == 1


def test_a_data_set_of_several_configurations(tmp_path, monkeypatch):
    for name, answer in (("main", A), ("socratic", B)):
        (tmp_path / "d" / name).mkdir(parents=True)
        write(tmp_path / "d" / name / "train.jsonl", {"question": Q, "answer": answer})
    (tmp_path / "d/README.md").write_text(
        "---\nconfigs:\n"
        + "".join(f"- config_name: {c}\n  data_files: {c}/train.jsonl\n" for c in ("main", "socratic"))
        + "---\n"
    )
    monkeypatch.chdir(tmp_path)
    columns = {"prompt": "question", "response": "answer"}
    assert [row["response"] for row in read_rows("d:socratic", "sft", columns=columns)] == [B]
    with pytest.raises(SystemExit, match="main.*socratic"):
        read_rows("d", "sft", columns=columns)


# --- prompts ------------------------------------------------------------------------------------------------


def test_a_text_and_a_message_of_the_user_are_one_prompt():
    assert prompt_key(Q) == prompt_key([user(Q)]) != prompt_key([user(Q), assistant(A)])
    rows = [{"prompt": f"{i}" if i % 2 else [user(f"{i - i % 2 + 1}")]} for i in range(400)]
    train, held = hold_out(rows, 0.3, 0)
    assert not {prompt_key(r["prompt"]) for r in train} & {prompt_key(r["prompt"]) for r in held}


def test_all_turns_of_a_conversation_are_in_one_part(tmp_path):
    """In training or held out, and of one part in every kind: no turn is held out that others have read."""
    chats = [{"messages": [user(f"{i}?"), *CHAT[1:]]} for i in range(200)]
    name = write(tmp_path / "d.jsonl", *chats)
    train, held = hold_out(read_rows(name, "sft"), 0.3, 0)
    assert len(train) + len(held) == 400 and held
    assert not {row["row"] for row in train} & {row["row"] for row in held}
    asked = read_rows(name, "prompts", part="rl")
    learned = read_rows(name, "sft", part="sft")
    assert not {row["row"] for row in asked} & {row["row"] for row in learned}
    alone = write(tmp_path / "e.jsonl", *({"prompt": f"{i}?", "response": A} for i in range(200)))
    assert {row["row"] for row in read_rows(alone, "sft", part="sft")} == {row["row"] for row in learned}


def test_rows_of_one_prompt_are_held_out_together():
    rows = [{"prompt": str(i // 3), "answer": i} for i in range(60)]
    for count in range(1, 30):
        train, held = hold_out_prompts(rows, count, 0)
        assert count <= len(held) < count + 3
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}


def test_rows_of_one_prompt_are_counted_and_kept_where_they_differ(capsys):
    rows = [
        {"prompt": Q, "response": A, "row": 1},
        {"prompt": [user(Q)], "response": B, "row": 2},
        {"prompt": Q2, "answer": "6", "row": 3},
        {"prompt": Q2, "answer": "7", "row": 4},
        {"prompt": Q2, "answer": "7", "row": 5},
    ]
    assert [row["row"] for row in once_per_prompt("d", rows)] == [2, 3, 5]
    assert "d: 2 rows dropped whose prompt another row has" in capsys.readouterr().out


def test_tools_are_kept(tmp_path):
    name = write(tmp_path / "d.jsonl", {"prompt": Q, "response": A, "tools": json.dumps([TOOL])})
    assert read_rows(name, "sft")[0]["tools"] == [TOOL]
