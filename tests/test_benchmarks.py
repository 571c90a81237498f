"""The benchmarks' own packages on our files, and evaluate.py length_controlled; docs/evaluate_benchmarks.md has the commands."""

import contextlib
import http.server
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import threading

import helpers
import huggingface_hub
import pytest

import evaluate
from evaluation import length_controlled

N = 805  # AlpacaEval's instructions
ANSWERS = "runs/bench-answers/reviews"


def needs(*packages):
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


# alpaca_eval imports pkg_resources, which the newest setuptools do not have.
needs_alpaca = needs("alpaca_eval", "pkg_resources")


# --- a judge that answers by rule --------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": self.server.rule(body["messages"][-1]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        text = json.dumps(reply | {"usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextlib.contextmanager
def judge(rule):
    """The address of a server whose answer to a question is `rule(question)`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.rule = rule
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def package(folder, *command, **environment):
    """What a package's program prints, run in `folder` without a network. Its error is the test's."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- our answers, as the packages read them ------------------------------------------------------------------

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["lunch : the soup ?", "dinner : the wine ?"]},
    {"question_id": 111, "category": "math", "turns": ["dinner : the fish ?", "lunch : the bread ?"]},
]


@pytest.fixture(scope="module")
def answers(world):
    """The folder of the answers of the embedded policy to two questions of two turns."""
    command = ["responses", "--models", str(helpers.ROOT / "assets/policy"), "--names", "reviews"]
    command += ["--dataset", world.write("bench.jsonl", QUESTIONS), "--max-response-length", "12"]
    world.command("evaluate", *command, "--run-dir", "runs/bench-answers").ok()
    return world.path(ANSWERS)


def said(answers):
    """question_id -> what the policy said, turn by turn."""
    found = {}
    for line in (answers / "responses.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(QUESTIONS[record["row"] - 1]["question_id"], []).append(record["response"])
    return found


def yaml_of_the_page():
    """The annotators config that the page gives for a judge without log-probabilities."""
    page = (helpers.ROOT / "docs/evaluate_benchmarks.md").read_text(encoding="utf-8")
    return re.search(r"^```yaml\n(judge:\n.*?)^```", page, re.M | re.S)[1]


@needs_alpaca
def test_alpaca_eval_reads_our_answers(answers, tmp_path):
    """Its program, with the page's config, and a judge that likes the longer answer: the reference's first, then
    ours."""
    import alpaca_eval

    ours = json.loads((answers / "alpaca_eval.json").read_text())
    outputs = ["x" * 200, ""]
    reference = [
        {"instruction": row["instruction"], "output": output, "generator": "reference"}
        for row, output in zip(ours, outputs, strict=True)
    ]
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    config = tmp_path / "judges/mine"
    config.mkdir(parents=True)
    prompt = alpaca_eval.constants.EVALUATORS_CONFIG_DIR / "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
    (config / prompt.name).write_text(prompt.read_text())
    (config / "configs.yaml").write_text(yaml_of_the_page())

    def longer(question):
        first, second = re.findall(r'"output": """(.*?)"""', question, re.S)
        return "m" if len(first) > len(second) else "M"

    with judge(longer) as endpoint:
        (tmp_path / "client.yaml").write_text(f"default:\n- {{api_key: none, base_url: '{endpoint}'}}\n")
        command = ["--model_outputs", str(answers / "alpaca_eval.json"), "--reference_outputs"]
        command += ["reference.json", "--annotators_config", str(config), "--output_path", "out"]
        command += ["--fn_metric", "get_winrate", "--sort_by", "win_rate"]
        package(
            tmp_path,
            "-m",
            "alpaca_eval.main",
            "evaluate",
            *command,
            OPENAI_CLIENT_CONFIG_PATH=str(tmp_path / "client.yaml"),
        )
    found = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [row["preference"] for row in found] == [1, 2]
    assert [row["output_2"] for row in found] == [turns[0] for turns in said(answers).values()]
    assert {row["generator_2"] for row in found} == {"reviews"}


@needs("fastchat", "anthropic", "openai", "pandas")
def test_fastchat_reads_our_answers(answers, tmp_path):
    """Its reader on mt_bench.jsonl, and what it makes of each question for its judge."""
    from fastchat.llm_judge import common, gen_judgment

    folder = tmp_path / "model_answer"
    folder.mkdir()
    (folder / "reviews.jsonl").write_text((answers / "mt_bench.jsonl").read_text())
    found = common.load_model_answers(str(folder))
    turns = {number: row["choices"][0]["turns"] for number, row in found["reviews"].items()}
    assert turns == said(answers)
    reference = {"gpt-4": {111: {"choices": [{"turns": ["36", "18"]}]}}}
    prompt = {"type": "single"}
    judges = {
        "default": common.Judge("gpt-4", prompt),
        "math": common.Judge("gpt-4", prompt, ref_based=True),
        "default-mt": common.Judge("gpt-4", prompt, multi_turn=True),
        "math-mt": common.Judge("gpt-4", prompt, ref_based=True, multi_turn=True),
    }
    common.check_data(QUESTIONS, found, reference, ["reviews"], judges)
    matches = gen_judgment.make_match_single(
        QUESTIONS, ["reviews"], found, judges["default-mt"], multi_turn=True
    )
    assert [match.answer["choices"][0]["turns"] for match in matches] == list(said(answers).values())


GSM8K = [
    {"question": "Tom has 5 apples and buys 2. How many has he?", "answer": "5 + 2 = <<5+2=7>>7\n#### 7"},
    {"question": "A box has 3 rows of 4. How many?", "answer": "3 * 4 = <<3*4=12>>12\n#### 12"},
]
IFEVAL = [
    {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2,
        "prompt": "At least 500 words.",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"relation": "at least", "num_words": 500}],
    },
]


def punkt():
    """Whether nltk has the sentences that lm_eval's IFEval loads."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        return False
    return True


@needs("lm_eval")
@pytest.mark.parametrize(
    "task",
    [
        "gsm8k_cot_zeroshot",
        pytest.param("ifeval", marks=pytest.mark.skipif(not punkt(), reason="nltk has no punkt_tab")),
    ],
)
def test_lm_eval_asks_an_export(tmp_path, task):
    """The page's offline form: local copies under the data sets' names, and the harness's own task."""
    files = {"google/IFEval/train": IFEVAL, "openai/gsm8k/main/train": GSM8K, "openai/gsm8k/main/test": GSM8K}
    for name, rows in files.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # as the hub's README has it: the configuration `main`
    splits = "".join(f"  - {{split: {split}, path: main/{split}.jsonl}}\n" for split in ("train", "test"))
    readme = f"---\nconfigs:\n- config_name: main\n  data_files:\n{splits}---\n"
    (tmp_path / "openai/gsm8k/README.md").write_text(readme)
    model = f"pretrained={helpers.ROOT / 'assets/policy'},dtype=float32"
    command = ["run", "--model", "hf", "--model_args", model, "--tasks", task, "--apply_chat_template"]
    command += ["--device", "cpu", "--gen_kwargs", "max_gen_toks=8", "--output_path", "out", "--log_samples"]
    package(tmp_path, "-m", "lm_eval", *command, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"][task]
    if task == "ifeval":  # 8 tokens of the embedded grammar have no comma, and no 500 words
        assert found["prompt_level_strict_acc,none"] == 0.5
        assert found["inst_level_loose_acc,none"] == 0.5
    else:  # no number is in the embedded vocabulary
        assert found["exact_match,strict-match"] == found["exact_match,flexible-extract"] == 0
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    samples = {sample["doc_id"]: sample for sample in samples}  # gsm8k: one per filter
    assert [samples[i]["doc"] for i in (0, 1)] == (IFEVAL if task == "ifeval" else GSM8K)
    assert all(sample["resps"][0][0].strip() for sample in samples.values())


# --- evaluate.py length_controlled: what it reads --------------------------------------------------------------

NAMES = ("judge", "model", "reference")
NAMED = {"annotator": "judge", "generator_2": "model", "generator_1": "reference"}
PAIR = {"prompt": "q", "responses": ["model's", "reference's"], "judged": ["A", "neutral"], "points": 0.75}
ANNOTATION = {"instruction": "q", "output_1": "reference's", "output_2": "model's", "preference": 1.75}


def test_our_pairs_are_alpaca_evals(tmp_path):
    """The first file is the model's; points of 0 to 1 are a preference of 1 to 2."""
    ours = tmp_path / "results.jsonl"
    rows = [PAIR, PAIR | {"points": 0.0}, PAIR | {"points": 1.0}, PAIR | {"points": None}]
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = length_controlled.read_pairs(str(ours))
    assert found == {NAMES: [ANNOTATION | NAMED | {"preference": value} for value in (1.75, 1.0, 2.0, None)]}
    theirs = tmp_path / "annotations.json"
    rows = [
        ANNOTATION | {"generator_2": "b"},
        ANNOTATION | {"preference": 0},
        ANNOTATION | {"preference": None},
    ]
    theirs.write_text(json.dumps(rows))
    found = length_controlled.read_pairs(str(theirs))
    assert [pair["preference"] for pair in found.pop(("judge", "b", "reference"))] == [1.75]
    assert found == {NAMES: [ANNOTATION | NAMED | {"preference": value} for value in (1.5, None)]}


def test_judges_and_opponents_are_kept_apart(tmp_path):
    """Several judges, or one model against several, are in one results.jsonl."""
    rows = [
        PAIR | {"judge": "x", "files": ["a.jsonl", "b.jsonl"]},
        PAIR | {"judge": "y", "files": ["a.jsonl", "b.jsonl"], "points": 1.0},
        PAIR | {"judge": "x", "files": ["a.jsonl", "c.jsonl"], "points": 0.5},
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = length_controlled.read_pairs(str(file))
    names = [("x", "a.jsonl", "b.jsonl"), ("y", "a.jsonl", "b.jsonl"), ("x", "a.jsonl", "c.jsonl")]
    assert list(found) == names
    assert [pair["preference"] for pairs in found.values() for pair in pairs] == [1.75, 2.0, 1.5]


@pytest.mark.parametrize(
    "row, why",
    [
        ({"prompt": "q", "responses": ["a"], "judged": [4]}, "no pair with points"),
        ({"prompt": "q", "responses": ["a", "b", "c"], "points": 1.0}, "no pair with points"),
        (ANNOTATION | {"preference": 2.5}, "the preference is 2.5"),
        (ANNOTATION | {"preference": -1}, "the preference is -1"),
        (ANNOTATION | {"output_1": None}, "must be texts"),
        (PAIR | {"prompt": None}, "must be texts"),
        ("a text", "no object with named columns"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(tmp_path, row, why):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PAIR) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match=f"^error: --judged .*row 2: .*{why}"):
        length_controlled.read_pairs(str(file))


def test_numbers_are_those_of_the_instructions(capsys):
    """Not the position among the pairs; a pair without a verdict stays and is said, as is another opponent."""
    reference = [{"instruction": f"q{i}", "output": f"r{i}"} for i in (0, 1, 2, 1)]
    pairs = [
        {"instruction": "q2", "output_1": "r2", "output_2": "long", "preference": 2.0},
        {"instruction": "q1", "output_1": "another's", "output_2": "x", "preference": None},
    ]
    found = length_controlled.number_pairs(pairs, reference)
    assert found == [(1, pairs[1]), (2, pairs[0])]
    said = capsys.readouterr().out
    assert "1 of 2 pairs have no verdict" in said
    assert "1 of 2 answers of the reference are not AlpacaEval 2's" in said
    assert "2 of AlpacaEval's 4 instructions" in said


@pytest.mark.parametrize(
    "change, why",
    [
        ({"instruction": "my own"}, r"1 of 2 prompts are not AlpacaEval's \('my own'\): .* difficulty"),
        ({"output_1": "r", "output_2": "x"}, "2 pairs, all with the same difference of length"),
        ({"preference": None}, "none of 2 pairs has a verdict"),
        ({}, "'q' is judged more than once"),
    ],
)
def test_pairs_without_a_rate_are_refused(change, why):
    reference = [{"instruction": "q", "output": "r"}]
    pair = {"instruction": "q", "output_1": "r", "output_2": "x", "preference": None}
    other = {"instruction": "q", "output_1": "r", "output_2": "longer", "preference": 1.0}
    with pytest.raises(SystemExit, match=f"^error: {why}"):
        length_controlled.number_pairs([pair, other | change], reference)


@pytest.fixture
def results(tmp_path):
    """Ours, of one pair."""
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(PAIR) + "\n")
    return str(file)


def test_without_the_package(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics", None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install alpaca_eval==0\.6\.6"):
        evaluate.length_controlled(evaluate.LengthControlled(judged=results))


def test_without_a_file():
    with pytest.raises(SystemExit, match="^error: --judged gone.jsonl: no such file"):
        evaluate.main(["length_controlled", "--judged", "gone.jsonl"])


def test_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="^error: df_gamed.csv is not in the hub's cache .*hf download"):
        length_controlled.read_hub_file("df_gamed.csv")


# --- evaluate.py length_controlled: its number -----------------------------------------------------------------


def sentence(rng):
    return " ".join(rng.choice(("good", "plain", "soup", "wine")) for _ in range(rng.randint(2, 60)))


@pytest.fixture(scope="module")
def scripted():
    """(AlpacaEval's 805 rows, as many verdicts of ours on another model), with made-up texts. The judge likes
    long answers."""
    rng = random.Random(0)
    reference = []
    verdicts = []
    for i in range(N):
        instruction = f"Write about dish {i}."
        reference.append({"instruction": instruction, "output": sentence(rng), "generator": "gpt4"})
        answer = sentence(rng)
        longer = (len(answer) - len(reference[-1]["output"])) / 400
        points = round(4 * min(1, max(0, 0.5 + longer + rng.gauss(0, 0.3)))) / 4
        verdicts.append(
            {"prompt": instruction, "responses": [answer, reference[-1]["output"]], "points": points}
        )
    return reference, verdicts


@pytest.fixture
def hub(tmp_path, scripted, monkeypatch):
    """The hub's cache with AlpacaEval's two files: our 805 rows, and difficulties and annotations made up in the
    form of df_gamed.csv, which only the hub has."""
    reference, _ = scripted
    folder = tmp_path / "hub/datasets--tatsu-lab--alpaca_eval"
    files = folder / "snapshots" / ("0" * 40)
    files.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    (files / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(reference))
    rng = random.Random(1)
    difficulty = [rng.gauss(0, 1) for _ in range(N)]
    rows = ["model,index,std_delta_len,instruction_difficulty,not_gamed_baseline,preference"]
    for model, length in (("concise", 1.0), ("verbose", -1.0)):
        for i in range(N):
            rows.append(f"{model},{i},{rng.gauss(length, 1)},{difficulty[i]},False,{rng.random()}")
    (files / "df_gamed.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def package_rate(verdicts):
    """alpaca_eval's numbers of verdicts that are all 805 in their order, for which it finds the difficulties."""
    from alpaca_eval.metrics import get_length_controlled_winrate

    rows = []
    for row in verdicts:
        model, reference = row["responses"]
        one = {"generator_1": "gpt4", "generator_2": "mine", "output_1": reference, "output_2": model}
        rows.append(one | {"preference": 1 + row["points"]})
    return get_length_controlled_winrate(rows, save_weights_dir=None)


def rate_in(folder):
    """The only rate that evaluate.py length_controlled wrote there."""
    (rate,) = json.loads((folder / "length_controlled.json").read_text())["rates"]
    return rate


def our_rate(verdicts, folder):
    file = folder / "verdicts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    args = evaluate.LengthControlled(judged=str(file), run_dir=str(folder / "lc"))
    evaluate.length_controlled(args)
    return rate_in(folder / "lc")


@needs_alpaca
def test_the_rate_is_the_packages(scripted, hub, tmp_path):
    """On all 805 the package's own numbers, whatever the order of our file; what it writes gives them again."""
    _, verdicts = scripted
    expected = package_rate(verdicts)
    shuffled = random.Random(2).sample(verdicts, N)
    found = our_rate(shuffled, tmp_path)
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-9), name
    # The model's answers are no longer on average, and the judge likes length: the two rates differ little, and
    # yet they differ.
    assert 0.001 < abs(found["length_controlled_winrate"] - found["win_rate"]) < 5
    rows = json.loads((tmp_path / "lc/annotations.json").read_text())
    assert [row["instruction"] for row in rows] == [row["prompt"] for row in verdicts]
    again = evaluate.LengthControlled(
        judged=str(tmp_path / "lc/annotations.json"), run_dir=str(tmp_path / "b")
    )
    evaluate.length_controlled(again)
    again = rate_in(tmp_path / "b")
    assert again["length_controlled_winrate"] == pytest.approx(found["length_controlled_winrate"], abs=1e-9)


@needs_alpaca
def test_a_part_keeps_its_difficulties(scripted, hub, tmp_path, capsys):
    """A part of the instructions, with a verdict missing: the package's regression on a table whose index has
    AlpacaEval's numbers."""
    import pandas
    from alpaca_eval.metrics import get_length_controlled_winrate

    _, verdicts = scripted
    chosen = sorted(random.Random(3).sample(range(N), 60))
    part = [dict(verdicts[i]) for i in chosen]
    part[7]["points"] = None
    rows = []
    for row in part:
        preference = float("nan") if row["points"] is None else 1 + row["points"]
        model, reference = row["responses"]
        rows.append({"output_1": reference, "output_2": model, "preference": preference})
    table = pandas.DataFrame(rows, index=chosen).assign(generator_1="gpt4", generator_2="mine")
    expected = get_length_controlled_winrate(table, save_weights_dir=None)
    found = our_rate(part[::-1], tmp_path)
    assert found["length_controlled_winrate"] == pytest.approx(
        expected["length_controlled_winrate"], abs=1e-9
    )
    assert found["n_total"] == 59
    said = capsys.readouterr().out
    assert "1 of 60 pairs have no verdict" in said and "60 of AlpacaEval's 805" in said


@needs_alpaca
@needs("openai")
def test_from_our_judge_to_the_rate(scripted, hub, tmp_path):
    """evaluate.py judge on two files, then evaluate.py length_controlled on what it wrote."""
    reference, verdicts = scripted
    files = []
    for name, which in (("model", 0), ("reference", 1)):
        rows = [{"prompt": row["prompt"], "response": row["responses"][which]} for row in verdicts[:40]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(tmp_path / f"{name}.jsonl"))

    def longer(question):
        a, b = (re.search(rf"<answer_{x}>\n(.*?)\n</answer_{x}>", question, re.S)[1] for x in "ab")
        return "Verdict: A" if len(a) > len(b) else "Verdict: B"

    with judge(longer) as endpoint:
        command = ["judge", "--responses", *files, "--judge-model", "m", "--endpoint", endpoint]
        evaluate.main([*command, "--run-dir", str(tmp_path / "judge")])
    argv = ["length_controlled", "--judged", str(tmp_path / "judge/results.jsonl")]
    evaluate.main([*argv, "--run-dir", str(tmp_path / "lc")])
    found = rate_in(tmp_path / "lc")
    longer_wins = 0
    for row in verdicts[:40]:
        answer, opponent = map(len, row["responses"])
        longer_wins += answer > opponent
    assert found["n_wins"] == longer_wins
    assert found["win_rate"] == pytest.approx(100 * longer_wins / 40)
