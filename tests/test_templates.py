"""Real chat templates: what a model reads is what its template writes, cut where the answer begins; or one line."""

import chat_templates
import pytest
from chat_templates import CONVERSATIONS, assistant, user

from common import templates
from common.tokenization import encode_answer, encode_prompt, stop_tokens, tokenize

NAMES = chat_templates.names()
# template, conversation -> why it is refused
REFUSED = {
    ("gemma", "system"): "System role not supported",
    ("mistral", "system"): "must alternate",
}
# templates of models of pictures, which take no text as the content of a message
PARTS_ALONE = ("idefics3", "llava_next", "smolvlm")
for each in PARTS_ALONE:
    REFUSED |= {(each, conversation): "the model's chat template" for conversation in CONVERSATIONS}


def whole_conversation(tokenizer, prompt, answer) -> list[int]:
    """transformers' own rendering, in tokens."""
    messages = [user(prompt)] if isinstance(prompt, str) else list(prompt)
    if messages[-1]["role"] == "assistant":
        messages[-1] = assistant(messages[-1]["content"] + answer)
    else:
        messages.append(assistant(answer))
    return tokenizer.apply_chat_template(messages, return_dict=False)


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_answer_are_the_templates_own_rendering(name, conversation):
    """All tokens, in order; the answer whole, with one end, and nothing of it in the prompt, which is what is
    sampled from, or a beginning of it where the template writes something else before an answer."""
    tokenizer = chat_templates.tokenizer(chat_templates.template(name))
    prompt, answer = CONVERSATIONS[conversation]
    try:
        prompt_ids, answer_ids, rest = encode_answer(tokenizer, prompt, answer)
    except (ValueError, SystemExit) as error:
        assert "\n" not in str(error)
        assert (name, conversation) in REFUSED, f"refused: {error}"
        assert REFUSED[name, conversation] in str(error)
        return
    assert (name, conversation) not in REFUSED

    text = tokenizer.decode(answer_ids)
    opening = encode_prompt(tokenizer, prompt)
    assert squeezed(answer) in squeezed(tokenizer.decode(opening) + text)
    assert squeezed(answer) not in squeezed(tokenizer.decode(prompt_ids))
    stops = stop_tokens(tokenizer)
    assert answer_ids[-1] in stops and not set(answer_ids[:-1]) & set(stops)

    if "DAY" in name:
        return
    ids = prompt_ids + answer_ids + rest
    rendered = whole_conversation(tokenizer, prompt, answer)
    own_end = rendered[len(prompt_ids) :][: len(answer_ids)] != answer_ids  # the template writes none
    if own_end:
        ids = prompt_ids + answer_ids[:-1] + rest
    continued = prompt_ids == opening
    if squeezed(answer) in squeezed(tokenizer.decode(rendered)):
        assert without_day(tokenizer, ids) == without_day(tokenizer, rendered)
        if not continued:
            shared = tokenizer.decode(prompt_ids)
            assert tokenizer.decode(opening).startswith(shared)
    else:  # it leaves out a part of the answer, which so continues what asks for it
        assert continued


def without_day(tokenizer, ids) -> str:
    """The text, without the day that some templates write."""
    import re

    return re.sub(r"\d{4}-\d\d-\d\d|\d\d \w{3} \d{4}", "DAY", tokenizer.decode(ids))


def test_there_are_enough_real_templates():
    if len(NAMES) == len(chat_templates.OTHERS):
        pytest.skip("TRL, which ships most of the templates, is not installed")
    assert len(NAMES) >= 35


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}


def of(name):
    return chat_templates.tokenizer(chat_templates.template(name))


@pytest.fixture(scope="module", autouse=True)
def trl():
    pytest.importorskip("trl")


def test_tools_and_calls_are_written_by_the_template():
    """In the prompt, and as an answer; a template that does not write them is one line."""
    tokenizer = of("qwen3")
    asked = [user("Weather in Oslo?"), CALL, {"role": "tool", "name": "weather", "content": "7 C"}]
    prompt = tokenizer.decode(encode_prompt(tokenizer, asked, TOOLS))
    assert "<tools>" in prompt and '"city": "Oslo"' in prompt and "7 C" in prompt
    _, answer_ids, _ = encode_answer(tokenizer, "Weather in Oslo?", [CALL], TOOLS)
    answer = tokenizer.decode(answer_ids)
    assert "<tool_call>" in answer and '"city": "Oslo"' in answer and answer.endswith("<|im_end|>")
    for name in ("zephyr", "gemma"):
        with pytest.raises(ValueError, match="leaves out the tool 'weather'"):
            encode_prompt(of(name), "Weather in Oslo?", TOOLS)
        with pytest.raises(ValueError, match="leaves out a part of the answer: 'weather'|refuses it"):
            encode_answer(of(name), "Weather in Oslo?", [CALL])


def test_an_answer_of_several_messages_is_whole():
    tokenizer = of("qwen2_5")
    answer = [assistant("Four."), user("Sure?"), assistant("Yes.")]
    prompt_ids, answer_ids, rest = encode_answer(tokenizer, "2+2?", answer)
    assert tokenizer.decode(prompt_ids).endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(answer_ids) == (
        "Four.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    )


def test_thoughts_in_a_field_of_their_own_are_trained():
    thinking = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    tokenizer = of("qwen3")
    _, answer_ids, _ = encode_answer(tokenizer, "2+2?", [thinking])
    assert tokenizer.decode(answer_ids) == "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"
    with pytest.raises(ValueError, match="leaves out a part of the answer: 'Two and two.'"):
        encode_answer(of("zephyr"), "2+2?", [thinking])


def test_both_sides_of_a_pair_have_the_prompt_that_both_begin_with():
    """R1 opens a thought, which one side has and the other has not."""
    tokenizer = of("deepseek_r1_distill")
    row = {"prompt": "2+2?", "chosen": "<think>\nAdd.\n</think>\n\n4", "rejected": "5", "row": 1}
    (row,) = tokenize([row], tokenizer, ("chosen", "rejected"), 999, 99, "d")
    assert tokenizer.decode(row["opening_ids"]).endswith("<｜Assistant｜><think>\n")
    assert tokenizer.decode(row["prompt_ids"]).endswith("<｜Assistant｜>")
    end = tokenizer.eos_token
    assert tokenizer.decode(row["chosen_ids"]) == f"<think>\nAdd.\n</think>\n\n4{end}"
    assert tokenizer.decode(row["rejected_ids"]) == f"5{end}"


@pytest.mark.parametrize(
    "text", ["4<|endoftext|>", "<|endoftext|>4", "4<|im_end|>5", "4<|im_end|><|im_end|>"]
)
def test_the_text_of_an_end_or_of_padding_is_a_fault_of_its_row(text, capsys):
    """Never a token of probability zero in a loss, nor an end in the middle."""
    rows = [{"prompt": "2+2?", "response": answer, "row": i} for i, answer in enumerate(("4", text, "6"), 7)]
    with pytest.raises(SystemExit, match="d, row 8: the answer holds '<|.*--skip-bad-rows"):
        tokenize(rows, of("qwen2_5"), ("response",), 999, 99, "d")
    kept = tokenize(rows, of("qwen2_5"), ("response",), 999, 99, "d", skip_bad_rows=True)
    assert [row["row"] for row in kept] == [7, 9]
    assert "d: dropped 1 bad rows of 3" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n"])
def test_an_end_that_is_there_already_is_not_written_twice(end, capsys):
    tokenizer = of("qwen2_5")
    (row,) = tokenize([{"prompt": "2+2?", "response": f"4{end}"}], tokenizer, ("response",), 999, 99, "d")
    assert tokenizer.decode(row["response_ids"]) == "4<|im_end|>" and row["response"] == "4"
    assert "1 answers end with the text of an end token" in capsys.readouterr().out


def test_template_arguments_reach_every_rendering(tmp_path, capsys):
    tokenizer = of("qwen3")
    templates.prepare(tokenizer, {"enable_thinking": "false"}, "it")
    opening = tokenizer.decode(encode_prompt(tokenizer, "2+2?"))
    assert opening.endswith("<think>\n\n</think>\n\n")
    _, answer_ids, _ = encode_answer(tokenizer, "2+2?", "4")
    assert tokenizer.decode(answer_ids) == "4<|im_end|>"
    with pytest.raises(
        SystemExit, match="--template-arguments enable_thinkng: the chat template of it has no such"
    ):
        templates.prepare(tokenizer, {"enable_thinkng": "false"}, "it")
    values = {"true": True, "False": False, "3": 3, "[1]": [1], "a b": "a b", "None": None, "null": None}
    assert {text: templates.value_of(text) for text in values} == values


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer"])
def test_a_template_that_writes_the_day_writes_one_day(name, monkeypatch, capsys):
    """A run that is resumed tomorrow has the prompts of today."""
    import datetime

    from transformers.utils import chat_template_utils

    found = []
    for day in (datetime.datetime(2026, 1, 2), datetime.datetime(2031, 12, 31)):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return day

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        chat_template_utils._compile_jinja_template.cache_clear()
        tokenizer = of(name)
        templates.prepare(tokenizer, {}, "it")
        found.append(encode_prompt(tokenizer, "2+2?"))
    assert found[0] == found[1]
    assert "it: its chat template writes the day; here it is always 26 July 2024" in capsys.readouterr().out


def test_a_prompt_of_one_message_is_that_of_its_text():
    tokenizer = of("llama3_1")
    assert encode_prompt(tokenizer, "2+2?") == encode_prompt(tokenizer, [user("2+2?")])


def test_sentencepiece_s_leading_space_is_the_templates():
    """`[/INST] Four` is one text: its tokens are not those of two."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "▁", "▁Four", "Four", "▁two", "two", "."]
    core = Tokenizer(models.Unigram([(piece, -1.0 * i) for i, piece in enumerate(pieces)], unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.chat_template = chat_templates.OTHERS["mistral"]
    prompt_ids, answer_ids, _ = encode_answer(tokenizer, "two", "Four.")
    chat = [user("two"), assistant("Four.")]
    assert prompt_ids + answer_ids == tokenizer.apply_chat_template(chat, return_dict=False)
