"""Rewards: a model's folder, another tokenizer, a function."""

import copy
import sys

import chat_templates
import helpers
import pytest
import torch
import transformers
from chat_templates import assistant, user
from random_models import ARGS, EOS, plain

from common.rewards import Reward

pytestmark = pytest.mark.usefixtures("group")


ENDED = [([], [EOS])] * 2


def conversation(tokenizer, prompt, text):
    """The tokens of the template's own rendering."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return tokenizer.apply_chat_template(chat, return_dict=False)


ROWS = [{"prompt": "lunch : the soup ?", "row": 3}, {"prompt": "dinner : the view and the wine ?", "row": 4}]
TEXTS = ["the soup was warm .", "the view was not bad and the wine was good ."]


def test_a_frozen_reward_model_is_read_where_its_own_config_says(folders, tokenizer, tmp_path):
    """Its config's padding token decides where transformers reads the score, also where our tokenizer pads
    with another."""
    model = plain(folders, "reward")
    model.config.pad_token_id = 9
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = Reward(str(tmp_path), tokenizer, ARGS, ROWS)(ROWS, ENDED, TEXTS)
    for score, row, text in zip(found, ROWS, TEXTS, strict=True):
        ids = conversation(tokenizer, row["prompt"], text)
        assert 9 not in ids
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits.item()
        assert score.item() == pytest.approx(expected, abs=1e-5)


def test_a_reward_folder_is_standardised(folders, tokenizer, tmp_path):
    """(score - score_mean) / score_std of the config."""
    model = plain(folders, "reward")
    model.config.score_mean = 0.5
    model.config.score_std = 2.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = Reward(str(tmp_path), tokenizer, ARGS, ROWS)(ROWS, ENDED, TEXTS)
    for score, row, text in zip(found, ROWS, TEXTS, strict=True):
        ids = conversation(tokenizer, row["prompt"], text)
        with torch.no_grad():
            raw = model(input_ids=torch.tensor([ids])).logits.item()
        assert score.item() == pytest.approx((raw - 0.5) / 2.0, abs=1e-5)


def test_a_cut_response_is_given_no_end(folders, tokenizer):
    """It is read as far as it was written."""
    model = plain(folders, "reward")
    whole, cut = Reward(folders["reward"], tokenizer, ARGS, ROWS)(
        ROWS[:1] * 2, [([], [EOS]), ([], [7])], TEXTS[:1] * 2
    )
    ids = conversation(tokenizer, ROWS[0]["prompt"], TEXTS[0])
    assert ids[-1] == EOS
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids[:-1]])).logits.item()
    assert cut.item() == pytest.approx(expected, abs=1e-5) and cut != whole


def write_functions(tmp_path, monkeypatch, text: str) -> None:
    (tmp_path / "judge_of_tests.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judge_of_tests", raising=False)


def test_a_reward_function_gets_every_column(tokenizer, tmp_path, monkeypatch):
    """In order; a column of the data may be named as ours are inside (`doc_ids`), or be a given answer."""
    write_functions(
        tmp_path,
        monkeypatch,
        "def f(prompts, responses, gold, **others):\n"
        "    assert sorted(others) == ['doc_ids', 'response', 'row']\n"
        "    return [10 * p + g + len(r) for p, r, g in zip(map(len, prompts), responses, gold)]\n"
        "def only_gold(prompts, responses, gold):\n    return gold\n",
    )
    rows = []
    for i in (1, 2, 3):
        tokens = {"prompt_ids": [1], "opening_ids": [1]}
        rows.append({"prompt": "p" * i, "gold": i / 8, "row": i, "doc_ids": "7", "response": "z", **tokens})
    texts = ["a", "bb", "cccc"]
    score = Reward("judge_of_tests:f", tokenizer, ARGS, rows)
    assert score(rows, ENDED, texts).tolist() == [11.125, 22.25, 34.375] and score.label == "f"
    assert Reward("judge_of_tests:only_gold", tokenizer, ARGS, rows)(rows, ENDED, texts).tolist() == [
        0.125,
        0.25,
        0.375,
    ]


BAD = {
    "nan": ("return [0.0, float('nan')]", "gave nan, not a finite number, for row 4, response 'bb'"),
    "none": ("return [0.0, None]", "gave None, not a finite number, for row 4"),
    "text": ("return ['1', '2']", "gave '1', not a finite number, for row 3"),
    "short": ("return [1.0]", "gave 1 rewards for 2 responses"),
    "one": ("return 1.0", "gave float for 2 responses"),
    "raises": (
        "return [1 / 0]",
        r"raised ZeroDivisionError: division by zero \(judge_of_tests.py, line 2\) for rows 3, 4",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_reward_function_must_not_give_is_one_line(tokenizer, tmp_path, monkeypatch, kind):
    body, message = BAD[kind]
    write_functions(tmp_path, monkeypatch, f"def {kind}(prompts, responses, **others):\n    {body}\n")
    with pytest.raises(SystemExit, match=f"^error: --reward judge_of_tests:{kind} {message}") as stop:
        Reward(f"judge_of_tests:{kind}", tokenizer, ARGS, ROWS)(ROWS, ENDED, ["a", "bb"])
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("kind", ["list", "array", "tensor", "bool"])
def test_numbers_of_any_library_are_numbers(tokenizer, tmp_path, monkeypatch, kind):
    wrapped = {"list": "[1, 2.5]", "array": "numpy.array([1, 2.5])", "tensor": "torch.tensor([1, 2.5])"}
    body = wrapped.get(kind, "[True, False]")
    write_functions(
        tmp_path,
        monkeypatch,
        f"import numpy, torch\ndef f(prompts, responses, **others):\n    return {body}\n",
    )
    found = Reward("judge_of_tests:f", tokenizer, ARGS, ROWS)(ROWS, ENDED, ["a", "bb"]).tolist()
    assert found == ([1.0, 0.0] if kind == "bool" else [1.0, 2.5])


def test_a_function_that_does_not_fit_the_data_is_one_line_at_the_start(tokenizer, tmp_path, monkeypatch):
    write_functions(
        tmp_path,
        monkeypatch,
        "def f(prompts, responses, gold):\n    return gold\ndef any(prompts, responses, **others):\n    return [1.0]\n",
    )
    with pytest.raises(SystemExit, match="judge_of_tests:f takes 'gold', which is no column of the data"):
        Reward("judge_of_tests:f", tokenizer, ARGS, ROWS)
    with pytest.raises(SystemExit, match="column 'responses' is the name of an argument"):
        Reward("judge_of_tests:any", tokenizer, ARGS, [{"prompt": "a", "responses": ["b"]}])
    for name in ("judge_of_tests:missing", "no_such_module:f"):
        with pytest.raises(SystemExit, match=f"--reward {name}"):
            Reward(name, tokenizer, ARGS, ROWS)


def test_a_template_that_refuses_a_row_is_one_line_at_the_start(folders, tokenizer, tmp_path):
    """Before the first rollout."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    other = copy.deepcopy(tokenizer)
    other.chat_template = refusing + tokenizer.chat_template
    plain(folders, "reward").save_pretrained(tmp_path), other.save_pretrained(tmp_path)
    system = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "lunch"}]
    with pytest.raises(SystemExit, match=f"--reward {tmp_path}, row 8 of the data: .*no system role"):
        Reward(str(tmp_path), tokenizer, ARGS, [*ROWS, {"prompt": system, "row": 8}])


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "llama3_1", "gemma", "phi3", "deepseek_r1_distill", "zephyr"]
)
def test_scores_are_those_of_a_plain_call_on_the_rendered_conversation(tmp_path, tokenizer, name):
    """Of public templates, the end included with what is written after it (ChatML's line feed, Qwen3's think
    block), whatever stands beside in the batch."""
    pytest.importorskip("trl")
    own = chat_templates.tokenizer(chat_templates.template(name))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(own),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=own.pad_token_id,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path), own.save_pretrained(tmp_path)
    two_turns = [user("2+2?"), assistant("Four."), user("And 3+3? Slowly, please.")]
    rows = [{"prompt": "2+2?", "row": 1}, {"prompt": two_turns, "row": 2}, {"prompt": "Why?", "row": 3}]
    texts = ["Four, of course.", "Six.", "<think>\nHm.\n</think>\n\nBecause."]
    found = Reward(str(tmp_path), tokenizer, ARGS, rows)(rows, [([], [EOS])] * 3, texts)
    for row, text, score in zip(rows, texts, found, strict=True):
        before = [user(row["prompt"])] if isinstance(row["prompt"], str) else row["prompt"]
        ids = own.apply_chat_template([*before, assistant(text)], return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert score.item() == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)
    assert found.std() > 0.05


def test_what_reward_py_trains_is_what_a_plain_call_reads(world):
    """Its own held-out scores, a plain call on the rendered conversation, `--reward` and `evaluate.py values` are
    one number, though the config pads with another token than the tokenizer."""
    # a template that writes something after the end, as ChatML's line feed
    start = helpers.edit_model(world, "policy", "ends-and-goes-on")
    template = world.path(f"{start}/chat_template.jinja")
    template.write_text(template.read_text().replace("<eos>{% endif %}", "<eos> and {% endif %}"))
    args = helpers.ARGS["reward"] | dict(run_dir="runs/plain-call", steps=2, model=start, lr=0.01)
    world.run("reward", **args).ok()
    folder = world.path("runs/plain-call/model")
    own = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    sample = next(s for s in helpers.samples(world.path("runs/plain-call")) if s["step"] == 2)
    for side in ("chosen", "rejected"):
        chat = [user(sample["prompt"]), assistant(sample[side])]
        ids = own.apply_chat_template(chat, return_tensors="pt", return_dict=False)
        assert own.decode(ids[0]).endswith("<eos> and")
        with torch.no_grad():
            raw = model(input_ids=ids).logits.item()
        assert abs(raw) > 0.01
        assert raw == pytest.approx(sample[f"{side}_score"], abs=1e-5)
        row = {"prompt": sample["prompt"], "row": 1}
        score = Reward(str(folder), own, ARGS, [row])([row], [([], [EOS])], [sample[side]]).item()
        standardised = (raw - model.config.score_mean) / model.config.score_std
        assert score == pytest.approx(standardised, abs=1e-5)


def test_an_export_gives_the_same_scores_in_trls_loader(world):
    """As GRPOTrainer scores a batch: the template's text of prompt and completion, padded on the right."""
    data_utils = pytest.importorskip("trl.data_utils")
    args = helpers.ARGS["reward"] | dict(run_dir="runs/for-trl", steps=2)
    world.run("reward", **args).ok()
    folder = str(world.path("runs/for-trl/model"))
    own = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = []
    for row, text in zip(ROWS, TEXTS, strict=True):
        example = {"messages": [user(row["prompt"]), assistant(text)]}
        texts.append(data_utils.apply_chat_template(example, own)["text"])
    batch = own(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        raw = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    expected = (raw - model.config.score_mean) / model.config.score_std
    found = Reward(folder, own, ARGS, ROWS)(ROWS, ENDED, TEXTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
