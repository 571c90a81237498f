"""evaluate.py responses: what is generated, kept and refused; text metrics against figures by hand."""

import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate
from common import distributed
from common.data import read_rows
from common.models import load_model
from common.rollout import rollout
from common.tokenization import encode_prompt, load_tokenizer
from evaluation import responses as answers
from evaluation import text_metrics

TURNS = [
    ["lunch : the soup ?", "supper : the fish ?"],
    ["lunch : the waiter ?", "supper : the rice ?"],
    ["dinner ?"],
]
MT_BENCH = [{"question_id": 81 + i, "category": "writing", "turns": turns} for i, turns in enumerate(TURNS)]
SMALL = dict(max_prompt_length=60, max_response_length=8, temperature=0.0, reward=())
OPTIONS = dict(
    micro_batch_size=2, bertscore_model="", bertscore_layer=0, toxicity_model="", toxicity_label="toxic"
)


def needs(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"{package} is not installed")


def wordnet():
    """Whether nltk finds the dictionary."""
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError, OSError):
        return False
    return True


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def run(world, group, monkeypatch):
    """`evaluate.py responses` on prompts.jsonl in this process; returns the folder of the run."""
    monkeypatch.chdir(world.folder)

    def responses(run_dir, **args):
        given = SMALL | dict(dataset="prompts.jsonl", batch_size=7, run_dir=run_dir) | args
        evaluate.responses(evaluate.Responses(**given))
        return world.path(run_dir)

    return responses


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return helpers.make_t5(tmp_path_factory.mktemp("t5"))


# --- metrics -------------------------------------------------------------------------------------------


def test_mean_and_its_interval():
    """1.96 standard errors with n - 1 in the variance; none of a single value."""
    found = text_metrics.mean([1.0, 2.0, 6.0])
    assert found == {"mean": 3.0, "ci95": pytest.approx(1.96 * math.sqrt(7.0 / 3)), "n": 3}
    assert text_metrics.mean([4]) == {"mean": 4.0, "ci95": None, "n": 1}


@needs("rouge_score")
def test_interval_of_several_values_of_a_question():
    """k equal values of each question tell no more than one; of questions alone it is the usual interval."""
    once = text_metrics.mean([1.0, 2.0, 6.0])
    thrice = text_metrics.mean([1.0, 1, 1, 2, 2, 2, 6, 6, 6], questions=[0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert thrice["mean"] == pytest.approx(once["mean"])
    assert thrice["ci95"] == pytest.approx(once["ci95"])
    assert thrice["n"] == 9
    varied = text_metrics.mean([0.0, 2, 1, 3, 5, 7], questions=[4, 4, 9, 9, 1, 1])
    assert varied["ci95"] == pytest.approx(once["ci95"])  # the questions' means are 1, 2, 6
    assert text_metrics.mean([1.0, 3.0], questions=[0, 0])["ci95"] is None


def test_rouge_l():
    """The longest common subsequence, "the cat on mat", is 4 of 5 words written, 4 of 6 asked for. An empty
    text has 0."""
    found = text_metrics.rouge_l(["the cat on a mat", ""], ["The cat sat on the mat.", "x"], None)
    assert found["mean"] == pytest.approx((2 * 0.8 * 4 / 6 / (0.8 + 4 / 6)) / 2)
    assert found["n"] == 2
    assert "rouge-score" in found["by"]


@needs("sacrebleu")
def test_bleu():
    """Precisions 5/6, 4/5, 3/4, 2/3 and no brevity penalty; then one over a corpus, whose counts are
    summed."""
    text = "the cat sat on the mat"
    reference = "the cat sat on the rug"
    assert text_metrics.bleu([text], [reference], None)["mean"] == pytest.approx(100 * (1 / 3) ** 0.25)
    corpus = text_metrics.bleu([text, "a b c d"], [reference, "a b c d e f"], None)
    expected = math.exp(1 - 12 / 10) * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    assert corpus["mean"] == pytest.approx(100 * expected)
    assert corpus["ci95"] > 0
    assert "smooth:exp" in corpus["by"]


@needs("nltk")
@pytest.mark.skipif(not wordnet(), reason="nltk has no WordNet: python -m nltk.downloader wordnet")
def test_meteor():
    """The example of Hugging Face's METEOR, 0.6944; three words in one chunk, one of them a synonym; nothing
    of nothing."""
    text = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert text_metrics.meteor([text], [reference], None)["mean"] == pytest.approx(0.6944, abs=5e-5)
    assert text_metrics.meteor(["the auto broke"], ["the car broke"], None)["mean"] == pytest.approx(
        1 - 0.5 * (1 / 3) ** 3
    )
    assert text_metrics.meteor([""], ["the car"], None)["mean"] == 0


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Random RoBERTa of 3 layers, with roberta-large's kind of tokenizer, as an encoder and as a classifier
    of two kinds."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizer

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
    words.train_from_iterator(["the soup was warm", "a bad waiter"] * 5, trainer)
    state = json.loads(words.to_str())["model"]
    folder = tmp_path_factory.mktemp("encoders")
    tokenizer = RobertaTokenizer(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]])
    torch.manual_seed(0)
    shape = dict(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=600,
    )
    config = RobertaConfig(vocab_size=len(state["vocab"]) + 4, **shape, pad_token_id=1, initializer_range=0.5)
    for kind, labels in (
        ("single_label_classification", ["fine", "toxic"]),
        ("multi_label_classification", ["toxic", "b", "c"]),
    ):
        config.problem_type = kind
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        config.num_labels = len(labels)
        RobertaForSequenceClassification(config).eval().save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


@needs("bert_score")
def test_bertscore(encoders, group):
    """F1 of the best cosine for each token but <s> and </s>, from one layer; 0 of an empty text, whatever is
    in its batch."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(encoders / "single_label_classification")
    pairs = [("the soup was bad", "the waiter was warm"), ("", "a soup"), ("warm soup", "warm soup")]
    args = SimpleNamespace(**OPTIONS | dict(bertscore_model=folder, bertscore_layer=2))
    found = text_metrics.bertscore(*zip(*pairs, strict=True), args)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    def states(text):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            output = model(**encoded, output_hidden_states=True)
        return torch.nn.functional.normalize(output.hidden_states[2][0], dim=-1)  # [tokens, hidden], layer 2

    # bert-score puts a space before RoBERTa's texts
    table = states(" " + pairs[0][0]) @ states(" " + pairs[0][1]).T
    precision = table.max(1).values[1:-1].mean()
    recall = table.max(0).values[1:-1].mean()
    expected = [(2 * precision * recall / (precision + recall)).item(), 0.0, 1.0]
    assert found["mean"] == pytest.approx(statistics.fmean(expected), abs=1e-5)
    assert 0 < expected[0] < 0.999
    assert found["n"] == 3
    assert "layer 2" in found["by"]
    long = text_metrics.bertscore(["soup " * 700], ["soup " * 700], args)  # more tokens than positions: cut
    assert long["mean"] == pytest.approx(1.0, abs=1e-5)


@needs("bert_score")
def test_bertscore_layer(encoders, tmp_path):
    """The authors' choice by the model's name, in a local folder too; else the flag, within the model's
    depth."""
    from transformers import RobertaConfig

    folder = str(encoders / "single_label_classification")
    RobertaConfig(num_hidden_layers=24).save_pretrained(tmp_path / "roberta-large")

    def layer(model, flag):
        return text_metrics.bertscore_layer(SimpleNamespace(bertscore_model=str(model), bertscore_layer=flag))

    assert layer(tmp_path / "roberta-large", 0) == 17
    assert layer(tmp_path / "roberta-large", 3) == 3
    assert layer(folder, 3) == 3
    for flag, words in ((0, "no tuned layer"), (4, "layers 1 to 3"), (-1, "layers 1 to 3")):
        with pytest.raises(SystemExit, match=words):
            layer(folder, flag)
    with pytest.raises(SystemExit, match="--bertscore-model nowhere/x: no such folder"):
        layer("nowhere/x", 1)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_toxicity(encoders, group, kind):
    """The label's probability: softmax over labels that exclude each other, else a sigmoid; long texts are
    cut."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = str(encoders / kind)
    texts = ["the waiter was bad", "soup"]
    args = SimpleNamespace(**OPTIONS | dict(toxicity_model=folder))
    found = text_metrics.toxicity(texts, None, args)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    one_of = kind == "single_label_classification"
    expected = logits.softmax(-1)[:, 1] if one_of else logits.sigmoid()[:, 0]
    assert found["mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert found["n"] == 2
    assert text_metrics.toxicity(["soup " * 700, ""], None, args)["n"] == 2
    with pytest.raises(SystemExit, match="labels of .* are"):
        text_metrics.check(
            ["toxicity"], SimpleNamespace(**OPTIONS | dict(toxicity_model=folder, toxicity_label="rude"))
        )


# --- generation ----------------------------------------------------------------------------------------


def test_files_of_one_turn(world, run, capsys):
    """Two models of different tokenizers: every prompt once, in the file's order; AlpacaEval's list; the
    table."""
    folder = helpers.make_t5(world.path("runs/other/model"))
    out = run("runs/ev-files", models=("reviews", folder), reward=("helpers:length_reward",), metrics=())
    prompts = list(dict.fromkeys(row["prompt"] for row in lines(world.path("prompts.jsonl"))))
    result = json.loads((out / "responses.json").read_text())
    for name in ("reviews", "other"):
        records = lines(out / name / "responses.jsonl")
        assert [record["prompt"] for record in records] == prompts
        assert all(
            set(record) >= {"response", "model", "length", "truncated", "reference"} for record in records
        )
        assert {record["model"] for record in records} == {name}
        assert any(r["truncated"] for r in records)
        assert all(r["length"] == 8 for r in records if r["truncated"])
        alpaca = json.loads((out / name / "alpaca_eval.json").read_text())
        assert alpaca == [
            {
                "instruction": r["prompt"],
                "output": r["response"],
                "generator": name,
                "dataset": "prompts.jsonl",
            }
            for r in records
        ]
        scores = helpers.length_reward(None, [record["response"] for record in records])
        found = result["models"][name]
        assert found["length_reward"]["mean"] == pytest.approx(statistics.fmean(scores))
        assert found["length"]["n"] == len(prompts)
        assert found["characters"]["mean"] == pytest.approx(
            statistics.fmean(len(r["response"]) for r in records)
        )
        assert found["truncated"]["mean"] == pytest.approx(statistics.fmean(r["truncated"] for r in records))
        scored = lines(out / name / "scored.jsonl")
        assert [row["reward"] for row in scored] == pytest.approx(scores)
        assert all(row["rewards"] == {"length_reward": row["reward"]} for row in scored)
    table = capsys.readouterr().out.splitlines()
    assert table[-4] == "| model | n | length | characters | truncated | distinct_2 | length_reward |"
    assert table[-2].startswith("| reviews | 24 |")
    assert table[-1].startswith("| other | 24 |")


def test_embedded_world_gives_the_figures_of_the_other_scripts(run, world):
    """`python evaluate.py responses`: ppo.py's held-out prompts and the same draws as its evaluation before
    step 1."""
    out = run("runs/ev-reviews", **evaluate.RESPONSES_REVIEWS | dict(dataset="reviews"))
    args = helpers.ARGS["ppo"] | dict(
        dataset="reviews", part="rl", eval_prompts=96, steps=1, max_response_length=32
    )
    args |= dict(eval_reward=evaluate.RESPONSES_REVIEWS["reward"], eval_every=1)
    world.run("ppo", **args, run_dir="runs/ev-ppo").ok()
    expected = helpers.metrics(world.path("runs/ev-ppo"))[0]
    found = json.loads((out / "responses.json").read_text())["models"]["reviews"]
    for name in ("reward", "grammatical", "length"):
        assert found[name]["mean"] == pytest.approx(expected[f"eval/{name}"], abs=1e-5), name


def test_two_turns_are_two_calls(world, run, group):
    """The second turn is asked on top of the model's own answer to the first; one question has one turn
    alone."""
    out = run("runs/ev-turns", dataset=world.write("mt.jsonl", MT_BENCH), batch_size=2) / "reviews"
    folder = str(helpers.ROOT / "assets/policy")
    tokenizer = load_tokenizer(folder)
    expected = []
    args = SimpleNamespace(precision="fp32", shard_size=0, lora_rank=0)
    policy = load_model("policy", folder, tokenizer, args, trained=False)
    for question in MT_BENCH:
        chat = []
        turns = []
        for turn in question["turns"]:
            chat += [{"role": "user", "content": turn}]
            tokens = rollout(policy, tokenizer, [encode_prompt(tokenizer, chat)], 8, 0.0, (0, 0))[0][0]
            turns += [tokenizer.decode(tokens, skip_special_tokens=True)]
            chat += [{"role": "assistant", "content": turns[-1]}]
        expected.append((question["question_id"], turns))
    found = lines(out / "mt_bench.jsonl")
    assert [(row["question_id"], row["choices"][0]["turns"]) for row in found] == expected
    assert [len(turns) for _, turns in expected] == [2, 2, 1]
    for row in found:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "reviews"
        assert row["choices"][0]["index"] == 0
        assert len(row["choices"]) == 1
    assert len({row["answer_id"] for row in found}) == 3
    records = lines(out / "responses.jsonl")
    assert [(r["turn"], isinstance(r["prompt"], str)) for r in records] == [(0, True), (1, False)] * 2 + [
        (0, True)
    ]
    assert records[1]["prompt"][1] == {"role": "assistant", "content": records[0]["response"]}
    assert len(json.loads((out / "alpaca_eval.json").read_text())) == 3


def test_samples(world, run):
    """Three responses to each prompt, side by side: other texts, intervals by prompt, one answer in
    AlpacaEval's list, a choice each in MT-bench's, and scored data that the scripts read."""
    args = dict(dataset=world.write("mt.jsonl", MT_BENCH), samples=3, temperature=1.0, batch_size=4)
    folder = run("runs/ev-samples", **args, reward=("helpers:length_reward",))
    out = folder / "reviews"
    records = lines(out / "responses.jsonl")
    asked = [(r["row"], r["sample"], r["turn"]) for r in records]
    turns = {i: len(question["turns"]) for i, question in enumerate(MT_BENCH, 1)}
    assert asked == [
        (row, sample, turn) for row in turns for sample in range(3) for turn in range(turns[row])
    ]
    first = [r["response"] for r in records if r["row"] == 1 and r["turn"] == 0]
    assert len(set(first)) > 1

    found = json.loads((folder / "responses.json").read_text())["models"]["reviews"]["length"]
    expected = text_metrics.mean([r["length"] for r in records], questions=[r["row"] for r in records])
    assert found == expected
    assert found["n"] == 15

    alpaca = json.loads((out / "alpaca_eval.json").read_text())
    firsts = [r["response"] for r in records if r["sample"] == 0 and r["turn"] == 0]
    assert [each["output"] for each in alpaca] == firsts
    for question, row in zip(lines(out / "mt_bench.jsonl"), turns, strict=True):
        choices = []
        for sample in range(3):
            said = [r["response"] for r in records if r["row"] == row and r["sample"] == sample]
            choices.append({"index": sample, "turns": said})
        assert question["choices"] == choices

    scored = read_rows(str(out / "scored.jsonl"), "scored")
    assert [row["response"] for row in scored] == [r["response"] for r in records]
    assert [row["prompt"] for row in scored] == [r["prompt"] for r in records]
    scores = helpers.length_reward(None, [r["response"] for r in records])
    assert [row["reward"] for row in scored] == pytest.approx(scores)
    assert {row["policy"] for row in scored} == {"reviews"}
    with pytest.raises(SystemExit, match=r"samples 3 -> None"):
        run("runs/ev-samples", **args | dict(samples=1))


def test_repetition_penalty_is_that_of_generate(world, run):
    """Greedy answers of transformers' `generate` to each prompt alone, with the same penalty; others without."""
    penalty = 1.3
    out = run("runs/ev-penalty", repetition_penalty=penalty) / "reviews"
    tokenizer = load_tokenizer(str(helpers.ROOT / "assets/policy"))
    model = AutoModelForCausalLM.from_pretrained(helpers.ROOT / "assets/policy").eval()
    records = lines(out / "responses.jsonl")
    for record in records:
        ids = torch.tensor([encode_prompt(tokenizer, record["prompt"])])
        found = model.generate(
            ids,
            do_sample=False,
            max_new_tokens=8,
            repetition_penalty=penalty,
            suppress_tokens=[tokenizer.pad_token_id],
            eos_token_id=tokenizer.eos_token_id,
        )
        text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        assert record["response"] == text
    plain = lines(run("runs/ev-no-penalty") / "reviews/responses.jsonl")
    assert [r["response"] for r in plain] != [r["response"] for r in records]
    assert json.loads((out / "settings.json").read_text())["repetition_penalty"] == penalty


def test_filters_narrow_what_is_sampled(world, run):
    """The likeliest token alone is greedy, by top-k and by top-p; values that change nothing are not among the
    settings, so that responses that were made before the flags are kept."""
    hot = dict(temperature=1.5)
    texts = {}
    for name, args in {
        "greedy": {},
        "k": hot | dict(top_k=1),
        "p": hot | dict(top_p=1e-6),
        "hot": hot,
        "both": hot | dict(top_k=5, top_p=0.9),
        "off": hot | dict(top_k=0, top_p=1.0, repetition_penalty=1.0),
    }.items():
        out = run(f"runs/ev-filter-{name}", **args) / "reviews"
        texts[name] = [record["response"] for record in lines(out / "responses.jsonl")]
        settings = json.loads((out / "settings.json").read_text())
        given = {"top_k", "top_p", "repetition_penalty"} & set(settings)
        assert given == (set() if name == "off" else set(args) - {"temperature"})
    assert texts["k"] == texts["p"] == texts["greedy"]
    assert texts["off"] == texts["hot"]
    assert len({tuple(found) for found in texts.values()}) == 3
    with pytest.raises(SystemExit, match="top_k 5 -> 4"):
        run("runs/ev-filter-both", **hot, top_k=4, top_p=0.9)


TEMPLATES = {
    "as-the-user": "{% if m['role'] != 'assistant' %}<user> {{ m['content'] }} {% else %}",
    "dropped": "{% if m['role'] == 'system' %}{% elif m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}",
    "refused": "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}",
    "lower": "{% if m['role'] == 'system' %}{{ m['content'] | lower }} "
    "{% elif m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}",
    "written": "{% if m['role'] == 'system' %}waiter {{ m['content'] }} "
    "{% elif m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}",
}


def with_template(world, name: str) -> str:
    """The embedded policy, whose template writes system messages by TEMPLATES[name]."""
    folder = f"runs/system-{name}"
    if not world.path(folder).exists():
        helpers.edit_model(world, "policy", f"system-{name}")
        path = world.path(f"{folder}/chat_template.jinja")
        start = "{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}"
        text = path.read_text()
        assert text.count(start) == 1
        path.write_text(text.replace(start, TEMPLATES[name]))
    return folder


def test_system_prompt(world, run):
    """It stands before each prompt as the template writes it, and in the records, so in what is scored and in the
    later turns; not in AlpacaEval's instructions."""
    folder = with_template(world, "written")
    rows = [{"prompt": turns[0], "turns": turns} for turns in TURNS]
    args = dict(
        models=(folder,), dataset=world.write("system.jsonl", rows), reward=("helpers:length_reward",)
    )
    out = run("runs/ev-system", **args, system_prompt="the rice") / f"{Path(folder).name}"
    records = lines(out / "responses.jsonl")
    tokenizer = load_tokenizer(str(world.path(folder)))
    policy = load_model(
        "policy",
        str(world.path(folder)),
        tokenizer,
        SimpleNamespace(precision="fp32", shard_size=0, lora_rank=0),
        trained=False,
    )
    first, second = records[:2]
    messages = [{"role": "system", "content": "the rice"}, {"role": "user", "content": TURNS[0][0]}]
    assert first["prompt"] == messages
    text = f"{tokenizer.bos_token}waiter the rice <user> {TURNS[0][0]} <writer> "
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, first["prompt"]) == ids
    (tokens,), _ = rollout(policy, tokenizer, [ids], 8, 0.0, (0, 0))
    assert first["response"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert [m["role"] for m in second["prompt"]] == ["system", "user", "assistant", "user"]
    assert second["prompt"][2]["content"] == first["response"]
    alpaca = json.loads((out / "alpaca_eval.json").read_text())
    assert [row["instruction"] for row in alpaca] == [turns[0] for turns in TURNS]
    assert lines(out / "scored.jsonl")[0]["prompt"] == messages
    assert json.loads((out / "settings.json").read_text())["system_prompt"] == "the rice"
    with pytest.raises(SystemExit, match="system_prompt the rice -> None"):
        run("runs/ev-system", **args)


@pytest.mark.parametrize(
    "name, words",
    {
        "as-the-user": "writes a system message as the user's",
        "dropped": "leaves out the system message",
        "refused": "refuses it: no system role",
        "lower": "leaves out the system message",
        "reviews": "writes a system message as the assistant's",
        "t5": "has no chat template, which would write it",
        "there is one": "row 1: it has a system message; leave out --system-prompt",
    }.items(),
)
def test_a_system_prompt_that_would_not_be_read_is_refused(world, run, t5, name, words):
    """In one line, before a model is loaded, also with --skip-bad-rows."""
    models = {"reviews": "reviews", "t5": t5, "there is one": with_template(world, "written")}
    model = models.get(name) or with_template(world, name)
    chat = [{"role": "system", "content": "the fish"}, {"role": "user", "content": "lunch ?"}]
    args = dict(dataset=world.write("chat.jsonl", [{"prompt": chat}])) if name == "there is one" else {}
    with pytest.raises(SystemExit, match=f"error: .*{words}$") as error:
        run(
            "runs/ev-bad", models=(model,), names=("m",), system_prompt="The rice", skip_bad_rows=True, **args
        )
    assert "\n" not in str(error.value)


def test_tools_of_a_row_are_written_before_its_prompt(world, run):
    """As in training: the same question with and without tools has other answers, and other settings."""
    folder = world.path(helpers.edit_model(world, "policy", "tools"))
    template = folder / "chat_template.jinja"
    tools = "{% if tools %}the {{ tools[0]['function']['name'] }} {% endif %}"
    template.write_text(template.read_text().replace("{{ bos_token }}", "{{ bos_token }}" + tools))
    row = {"prompt": "lunch : the soup ?"}
    function = {"type": "function", "function": {"name": "rice", "parameters": {}}}
    plain = world.write("plain.jsonl", [row])
    with_tools = world.write("tools.jsonl", [row | {"tools": [function]}])
    args = dict(models=(str(folder),), names=("m",))
    (record,) = lines(run("runs/ev-tools", **args, dataset=with_tools) / "m/responses.jsonl")
    tokenizer = load_tokenizer(str(folder))
    ids = encode_prompt(tokenizer, row["prompt"], [function])
    assert tokenizer.decode(ids).split()[:3] == [tokenizer.bos_token, "the", "rice"]
    ours = SimpleNamespace(precision="fp32", shard_size=0, lora_rank=0)
    policy = load_model("policy", str(folder), tokenizer, ours, trained=False)
    (tokens,), _ = rollout(policy, tokenizer, [ids], 8, 0.0, (0, 0))
    (other,), _ = rollout(policy, tokenizer, [encode_prompt(tokenizer, row["prompt"])], 8, 0.0, (0, 0))
    assert tokens != other
    assert record["response"] == tokenizer.decode(tokens, skip_special_tokens=True)
    with pytest.raises(SystemExit, match=r"made with other settings \(prompts "):
        run("runs/ev-tools", **args, dataset=plain)


def mentions(prompts, responses, **_):
    """1 for a response about the soup or the fish."""
    return [int("soup" in text or "fish" in text) for text in responses]


def halves(prompts, responses, **_):
    return [0.5] * len(responses)


def last_word(text):
    return text.split()[-1] if text.split() else None


def test_pass_and_majority_at_k(world, run, capsys):
    """Columns after the rewards, of prompts and not of responses; pass@1 is the mean reward; two ranks agree."""
    args = dict(
        dataset=world.write("mt.jsonl", MT_BENCH),
        temperature=1.0,
        samples=4,
        precision="fp64",
        reward=("test_responses:mentions", "helpers:length_reward"),
        pass_at=(1, 4),
        maj_at=(1, 3),
        final_answer="test_responses:last_word",
    )
    out = run("runs/ev-pass", **args)
    head = "| distinct_2 | mentions | length_reward | pass@1 | pass@4 | maj@1 | maj@3 |"
    assert head in capsys.readouterr().out
    found = json.loads((out / "responses.json").read_text())["models"]["reviews"]
    assert found["mentions"]["n"] == 20 and found["pass@1"]["n"] == 5
    for column in ("pass@1", "maj@1"):
        assert found[column]["mean"] == pytest.approx(found["mentions"]["mean"])
    assert found["pass@1"]["ci95"] == pytest.approx(found["mentions"]["ci95"])
    groups = {}
    for record in lines(out / "reviews/responses.jsonl"):
        groups.setdefault((record["row"], record["turn"]), []).append(mentions(None, [record["response"]])[0])
    assert found["pass@4"]["mean"] == statistics.fmean(max(group) for group in groups.values())
    assert 0 < found["pass@1"]["mean"] < found["pass@4"]["mean"]
    call = functools.partial(_main, SMALL | dict(batch_size=7) | args | dict(run_dir="runs/ev-pass-2"))
    helpers.Job(world.folder, call, 2).wait().ok()
    assert world.path("runs/ev-pass-2/responses.json").read_bytes() == (out / "responses.json").read_bytes()
    with pytest.raises(SystemExit, match="--reward test_responses:halves gave 0.5 for row 1, response"):
        run("runs/ev-pass", **args | dict(reward=("test_responses:halves",)))


def test_scored_rows_keep_what_is_about_their_prompt(world, run):
    """A solution stays, for the next script's rewards; another answer and its score do not."""
    row = {"prompt": "lunch : the soup ?", "response": "another", "reward": 7.0, "policy": "p", "solution": 3}
    args = dict(dataset=world.write("solved.jsonl", [row]), reward=("helpers:length_reward",))
    (scored,) = lines(run("runs/ev-columns", **args) / "reviews/scored.jsonl")
    assert scored["solution"] == 3
    assert scored["response"] != "another" and scored["reward"] != 7.0 and scored["policy"] == "reviews"
    of_answer = {"prompt", "response", "reward", "policy", "rewards", "truncated"}
    assert set(scored) == of_answer | {"solution"}


def test_batches_do_not_change_greedy_answers(run, t5):
    """Any batch size, decoder and encoder-decoder."""
    args = dict(models=("reviews", t5), names=("a", "b"), prompts=7)
    found = [run(f"runs/ev-batch-{size}", **args, batch_size=size) for size in (1, 3, 64)]
    texts = [[(out / name / "responses.jsonl").read_text() for name in "ab"] for out in found]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0][0].split("\n"))) == 8


def _main(args, patch=None):
    """`responses` as a rank of a group."""
    if patch:
        patch()
    distributed.launch(evaluate.responses, evaluate.Responses(**args))


def test_ranks_give_the_same_files(world, run):
    """Two processes, one of which has nothing in the last batch, write what one does, sampled too."""
    data = world.write("mt.jsonl", MT_BENCH)
    args = dict(
        dataset=data, batch_size=2, temperature=1.0, precision="fp64", reward=("helpers:length_reward",)
    )
    call = functools.partial(_main, SMALL | args | dict(run_dir="runs/ev-ranks-2"))
    helpers.Job(world.folder, call, 2).wait().ok()
    one = run("runs/ev-ranks-1", **args)
    two = world.path("runs/ev-ranks-2")
    assert (one / "reviews/responses.jsonl").read_bytes() == (two / "reviews/responses.jsonl").read_bytes()
    assert (one / "responses.json").read_bytes() == (two / "responses.json").read_bytes()


# --- resumption ----------------------------------------------------------------------------------------


def die(batch):
    """The process ends in the middle of generating that batch."""
    generate = answers.answer
    calls = []

    def dying(*args):
        calls.append(args)
        if len(calls) == batch:
            os._exit(9)
        return generate(*args)

    answers.answer = dying


def test_a_kill_loses_the_batch_at_hand(world, run, monkeypatch):
    """After a kill in the third of four batches two are in the file, and the rest comes as if nothing had
    been; sampled."""
    args = dict(temperature=1.0, models=("reviews",))
    whole = run("runs/ev-whole", **args) / "reviews/responses.jsonl"
    killed = SMALL | dict(dataset="prompts.jsonl", batch_size=7, run_dir="runs/ev-killed") | args
    job = helpers.Job(world.folder, functools.partial(_main, killed, functools.partial(die, 3)), 0)
    assert job.wait().codes == [9]
    file = world.path("runs/ev-killed/reviews/responses.jsonl")
    assert lines(file) == lines(whole)[:14]
    with open(file, "a") as torn:
        # part of a batch, and a line without an end
        torn.write(lines(whole)[14]["response"] + '\n{"row": 1, "resp')
    numbers = []
    generate = answers.answer

    def counting(*given):
        numbers.append(given[-1])
        return generate(*given)

    monkeypatch.setattr(answers, "answer", counting)
    run("runs/ev-killed", **args)
    assert file.read_bytes() == whole.read_bytes()
    assert numbers == [2, 3]


def test_finished_models_are_not_generated_again(world, run, monkeypatch):
    """Nothing is loaded for them; a new --reference is taken over; another model beside them is generated."""
    rows = [{"prompt": "lunch : the soup ?", "mine": "a"}, {"prompt": "dinner ?", "mine": "b"}]
    args = dict(dataset=world.write("named.jsonl", rows))
    load = answers.load_model
    loaded = []

    def counting(*given, **more):
        loaded.append(given)
        return load(*given, **more)

    monkeypatch.setattr(answers, "load_model", counting)
    out = run("runs/ev-done", **args)
    before = lines(out / "reviews/responses.jsonl")
    run("runs/ev-done", **args, reference="mine")
    after = lines(out / "reviews/responses.jsonl")
    assert len(loaded) == 1
    assert [row["reference"] for row in before + after] == [None, None, "a", "b"]
    assert [row | {"reference": None} for row in after] == before
    run("runs/ev-done", **args, models=("reviews", "reviews"), names=("reviews", "again"))
    assert len(loaded) == 2
    assert [row["response"] for row in lines(out / "again/responses.jsonl")] == [
        row["response"] for row in before
    ]
    run("runs/ev-done", **args, overwrite=True)
    assert len(loaded) == 3


CHANGES = {
    "temperature": 0.5,
    "repetition_penalty": 1.2,
    "max_response_length": 9,
    "precision": "fp64",
    "prompts": 5,
    "models": ("runs/changed",),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_settings_are_refused(world, run, change):
    """A file made with other settings, prompts or weights is neither served nor lost; --overwrite replaces
    it."""
    if not world.path("runs/changed").exists():
        helpers.edit_model(world, "policy", "changed", config=lambda old: old | {"rms_norm_eps": 0.5})
    args = dict(names=("x",), run_dir="runs/ev-changed")
    if not world.path("runs/ev-changed/x").exists():
        run(**args)
    before = world.path("runs/ev-changed/x/responses.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"made with other settings \(.*--overwrite replaces") as error:
        run(**args, **{change: CHANGES[change]})
    assert {"prompts": "prompts ", "models": "weights "}.get(change, f"{change} ") in str(error.value)
    assert world.path("runs/ev-changed/x/responses.jsonl").read_bytes() == before
    if change == "models":
        run(**args, models=CHANGES[change], overwrite=True)
        assert world.path("runs/ev-changed/x/responses.jsonl").read_bytes() != before


# --- decoding by value ---------------------------------------------------------------------------------

BY_VALUE = {
    "best-of": dict(decode="best-of", gvm="reviews", best_of=3, temperature=1.0),
    "guided": dict(decode="guided", gvm="reviews", guide_candidates=4, temperature=1.0),
}


@pytest.mark.parametrize("kind", BY_VALUE)
def test_decoding_by_value(world, run, capsys, kind):
    """Records and table have the GVM's value and the KL; settings.json says how and by which GVM; another
    setting of the same --decode is refused."""
    args = BY_VALUE[kind] | dict(dataset=world.write("mt.jsonl", MT_BENCH), reward=("helpers:length_reward",))
    folder = run(f"runs/ev-{kind}", **args)
    records = lines(folder / "reviews/responses.jsonl")
    assert len(records) == 5  # of two turns, too
    found = json.loads((folder / "responses.json").read_text())["models"]["reviews"]
    for column in ("value", "kl"):
        assert found[column]["mean"] == pytest.approx(statistics.fmean(r[column] for r in records))
    assert "| distinct_2 | value | kl | length_reward |" in capsys.readouterr().out
    settings = json.loads((folder / "reviews/settings.json").read_text())
    assert settings["decode"] == kind
    assert settings["gvm"] == answers.fingerprint(str(helpers.ROOT / "assets/value"))
    if kind == "best-of":
        assert settings["best_of"] == 3
        assert {r["kl"] for r in records} == {math.log(3) - 2 / 3}
        assert answers.with_interval(found["kl"]) == "0.4319"  # the same of all: no interval
        change, message = dict(best_of=4), "best_of 3 -> 4"
    else:
        assert (settings["guide_candidates"], settings["guide_beta"], settings["log_odds"]) == (4, 0.5, False)
        assert len({r["kl"] for r in records}) == 5
        change, message = dict(guide_beta=0.2), "guide_beta 0.5 -> 0.2"
    with pytest.raises(SystemExit, match=message):
        run(f"runs/ev-{kind}", **args | change)
    of_value = ("decode", "gvm", *answers.OF_DECODE)
    with pytest.raises(SystemExit, match=f"decode {kind} -> None"):
        run(f"runs/ev-{kind}", **{key: args[key] for key in args if key not in of_value})


def test_guiding_raises_the_value(run):
    """On the embedded world: above plain sampling, and the more the smaller beta; so does the KL."""
    args = evaluate.RESPONSES_REVIEWS | dict(dataset="reviews", prompts=48, decode="guided", gvm="reviews")
    args["guide_candidates"] = 53  # all words
    found = []
    for beta in (math.inf, 1.0, 0.2):
        out = run(f"runs/ev-beta-{beta}", **args, guide_beta=beta)
        found.append(json.loads((out / "responses.json").read_text())["models"]["reviews"])
    for column in ("value", "kl", "reward"):
        means = [each[column]["mean"] for each in found]
        assert means == sorted(means), column
    assert found[0]["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)


def test_best_of_one_is_plain_sampling(run):
    args = dict(temperature=1.0, prompts=7)
    plain = lines(run("runs/ev-plain", **args) / "reviews/responses.jsonl")
    one = lines(
        run("runs/ev-one", **args, decode="best-of", gvm="reviews", best_of=1) / "reviews/responses.jsonl"
    )
    assert [r["response"] for r in one] == [r["response"] for r in plain]
    assert {r["kl"] for r in one} == {0.0}


@pytest.mark.parametrize("kind", BY_VALUE)
def test_decoding_by_value_goes_on_after_a_kill(world, run, kind):
    """And two ranks write the file of one."""
    args = BY_VALUE[kind] | dict(precision="fp64")
    whole = run(f"runs/ev-{kind}-whole", **args)
    given = SMALL | dict(dataset="prompts.jsonl", batch_size=7) | args
    killed = given | dict(run_dir=f"runs/ev-{kind}-killed")
    job = helpers.Job(world.folder, functools.partial(_main, killed, functools.partial(die, 3)), 0)
    assert job.wait().codes == [9]
    file = world.path(f"runs/ev-{kind}-killed/reviews/responses.jsonl")
    assert len(lines(file)) == 14
    run(f"runs/ev-{kind}-killed", **args)
    expected = (whole / "reviews/responses.jsonl").read_bytes()
    assert file.read_bytes() == expected
    call = functools.partial(_main, given | dict(run_dir=f"runs/ev-{kind}-2"))
    helpers.Job(world.folder, call, 2).wait().ok()
    ranks = lines(world.path(f"runs/ev-{kind}-2/reviews/responses.jsonl"))
    for one, two in zip(lines(whole / "reviews/responses.jsonl"), ranks, strict=True):
        assert {k: v for k, v in two.items() if k not in ("value", "kl")} == {
            k: v for k, v in one.items() if k not in ("value", "kl")
        }
        assert (two["value"], two["kl"]) == pytest.approx((one["value"], one["kl"]), abs=1e-6)


def test_best_of_with_an_encoder_decoder_is_refused_by_the_tokenizer(run, t5):
    """A GVM reads the policy's tokens: it must have its tokenizer."""
    with pytest.raises(SystemExit, match="--gvm"):
        run("runs/ev-bad", models=(t5,), **BY_VALUE["best-of"])


@pytest.mark.parametrize("change", [dict(context_pairs=2), dict(return_mean=0.5)])
def test_a_gvm_that_cannot_be_used_is_refused(world, run, change):
    """One that reads the policy's other answers first; log-odds of one that was not trained on +1 and -1."""
    name = "-".join(change)
    helpers.edit_model(world, "value", name, config=lambda old: old | change)
    args = BY_VALUE["guided"] | dict(gvm=f"runs/{name}", log_odds="return_mean" in change)
    with pytest.raises(SystemExit, match="--context-pairs 2|--log-odds is for a GVM") as error:
        run("runs/ev-bad", **args)
    assert "\n" not in str(error.value)


# --- what is refused -----------------------------------------------------------------------------------

BAD = {
    "two models of one name": (dict(models=("runs/a/model", "other/a")), "names a, a", "--names"),
    "too few names": (dict(models=("reviews", "reviews"), names=("a",)), "2 models", "--names"),
    "no models": (dict(models=()), "--models"),
    "a name with a slash": (dict(names=("a/b",)), "--names"),
    "no such folder": (dict(models=("./nowhere",)), "./nowhere: no model folder"),
    "no such file": (dict(dataset="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    "no prompt": (dict(dataset="bad.jsonl"), "bad.jsonl, row 1", "--columns prompt"),
    "no prompts": (dict(dataset="none.jsonl"), "none.jsonl: no usable row"),
    "greedy samples": (dict(samples=2), "--samples 2", "--temperature"),
    "a GVM that nothing reads": (dict(gvm="reviews"), "--gvm reviews", "--decode"),
    "no GVM": (dict(decode="guided"), "--decode guided", "--gvm"),
    "no such GVM": (dict(decode="guided", gvm="./nowhere"), "./nowhere: no model folder"),
    "greedy best of n": (dict(decode="best-of", gvm="reviews"), "--best-of 16", "--temperature"),
    "log-odds without a guide": (
        dict(decode="best-of", gvm="reviews", temperature=1.0, log_odds=True),
        "--log-odds",
    ),
    "candidates without a guide": (dict(guide_candidates=4), "--guide-candidates is for --decode guided"),
    "a beta for best of n": (
        dict(decode="best-of", gvm="reviews", temperature=1.0, guide_beta=0.1),
        "--guide-beta is for --decode guided; --decode is best-of",
    ),
    "an n for guided": (dict(decode="guided", gvm="reviews", best_of=4), "--best-of is for --decode best-of"),
    "a reward called kl": (
        dict(decode="guided", gvm="reviews", reward=("a:kl",)),
        "two columns of the same name",
    ),
    "long prompts": (dict(max_prompt_length=1), "--max-prompt-length 1"),
    "no reference": (
        dict(metrics=("bleu",)),
        "prompts.jsonl, row 1",
        "'reference'",
        "--metrics bleu",
        "--reference",
    ),
    "a reference too few": (dict(metrics=("bleu",), dataset="short.jsonl"), "row 1", "'reference'"),
    "turns": (dict(dataset="turns.jsonl"), "turns.jsonl, row 1", "list of texts"),
    "no response": (dict(reference="response"), "row 1", "'response'"),
    "no such reward": (dict(reward=("nowhere:f",)), "--reward nowhere:f"),
    "greedy top-k": (dict(top_k=3), "--top-k", "--temperature"),
    "greedy top-p": (dict(top_p=0.5), "--top-p", "--temperature"),
    "best of n of filtered ones": (
        dict(decode="best-of", gvm="reviews", temperature=1.0, top_p=0.9),
        "--top-p is for --decode sample; --decode is best-of",
    ),
    "guided with a penalty": (
        dict(decode="guided", gvm="reviews", repetition_penalty=1.2),
        "--repetition-penalty is for --decode sample; --decode is guided",
    ),
    "pass@k without a reward": (dict(pass_at=(1,)), "--pass-at", "--reward"),
    "pass@k of a reward model": (dict(pass_at=(1,), reward=("./judge",)), "--pass-at", "module:function"),
    "too few samples": (
        dict(maj_at=(3,), samples=2, temperature=1.0, reward=("helpers:length_reward",)),
        "--maj-at 3",
        "--samples, which is 2",
    ),
    "pass@0": (dict(pass_at=(0,), reward=("helpers:length_reward",)), "--pass-at 0"),
    "pass@1 twice": (
        dict(pass_at=(1, 1), reward=("helpers:length_reward",)),
        "two columns of the same name",
        "pass@1, pass@1",
    ),
    "a final answer that nothing reads": (dict(final_answer="a:b"), "--final-answer a:b", "--maj-at"),
    "no such final answer": (
        dict(final_answer="nowhere:f", maj_at=(1,), reward=("helpers:length_reward",)),
        "--final-answer nowhere:f",
    ),
    "two rewards of one name": (dict(reward=("a:f", "b:f")), "two columns of the same name", "f, f"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(world, run, monkeypatch, case):
    """One line that names the place and the mend, before a model is loaded."""
    world.write("bad.jsonl", [{"text": "lunch ?"}])
    world.write("none.jsonl", [])
    world.write("short.jsonl", [{"turns": ["a", "b"], "reference": ["a"]}])
    world.write("turns.jsonl", [{"turns": ["a", 3]}])
    monkeypatch.setattr(answers, "load_model", None)
    if "bleu" in BAD[case][0].get("metrics", ()) and not importlib.util.find_spec("sacrebleu"):
        pytest.skip("sacrebleu is not installed")
    with pytest.raises(SystemExit) as error:
        run("runs/ev-bad", **BAD[case][0])
    line = str(error.value)
    assert line.startswith("error: ") and "\n" not in line and all(word in line for word in BAD[case][1:]), (
        line
    )


@pytest.mark.parametrize("name", text_metrics.PACKAGES)
def test_missing_packages(run, monkeypatch, name):
    """The one line gives the pip command."""
    find = importlib.util.find_spec
    missing = text_metrics.PACKAGES[name].replace("-", "_")

    def find_spec(wanted):
        return None if wanted == missing else find(wanted)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(
        SystemExit, match=f"--metrics {name} needs the package: pip install {text_metrics.PACKAGES[name]}$"
    ):
        run("runs/ev-bad", metrics=(name,))


@needs("nltk")
def test_missing_wordnet(run, monkeypatch):
    """The one line gives nltk's command."""
    import nltk
    from nltk.corpus.util import LazyCorpusLoader

    lost = LazyCorpusLoader("wordnet", nltk.corpus.reader.WordNetCorpusReader, None)
    monkeypatch.setattr(nltk.corpus, "wordnet", lost)
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(SystemExit, match="python -m nltk.downloader wordnet$"):
        run("runs/ev-bad", metrics=("meteor",))


def test_command_line(world):
    """The command is named; --help shows every flag with its docstring."""
    for argv in ((), ("answers",)):
        assert "responses" in world.command("evaluate", *argv).error()
    found = world.command("evaluate", "responses", "--help").ok().output
    assert all(f"--{name.replace('_', '-')}" in found for name in evaluate.Responses.__dataclass_fields__)
    assert "--batch-size is 0" in world.command("evaluate", "responses", "--batch-size", "0").error()
    assert "--metrics" in world.command("evaluate", "responses", "--metrics", "rouge").output
