"""Reading and checking rows, splits by prompt, tokenization, batches, context pairs, and the `reviews`
world's own truth."""

import gzip
import json
import math
import random
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from assets import reviews
from common import data
from common.batches import batch_indices, collate, micro_batches
from common.context import add_context
from common.data import hold_out, read_rows
from common.tokenization import encode_prompt, load_tokenizer, stop_token, tokenize

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}", "reward": i / 4} for i in range(5)]


def write(path, rows):
    """`rows` in the format that the suffix names; returns the path as text."""
    text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def without(rows, *keys):
    return [{k: v for k, v in row.items() if k not in ("row", *keys)} for row in rows]


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet", "d.jsonl.gz", "d.json.gz"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    """.jsonl, .json, .parquet and .gz hold the same five rows, numbered from 1."""
    rows = read_rows(write(tmp_path / name, ROWS), "scored")
    assert without(rows) == ROWS and [row["row"] for row in rows] == [1, 2, 3, 4, 5]


def test_aliases_columns_and_split(tmp_path):
    """`completion` and `score` are known names; --columns maps others and wins; the file's `split` column
    chooses rows."""
    alias = [{"prompt": "p", "completion": "r", "score": 1}]
    assert without(read_rows(write(tmp_path / "a.jsonl", alias), "scored"), "completion", "score") == [
        {"prompt": "p", "response": "r", "reward": 1}
    ]
    theirs = [{"question": "p", "answer": "r", "response": "no", "grade": 2, "model": "m"}]
    columns = {"prompt": "question", "response": "answer", "reward": "grade", "policy": "model"}
    (row,) = read_rows(write(tmp_path / "b.jsonl", theirs), "scored", columns=columns)
    assert (row["prompt"], row["response"], row["reward"], row["policy"]) == ("p", "r", 2, "m")
    split = write(
        tmp_path / "c.jsonl", [{**row, "split": "test" if i == 3 else "train"} for i, row in enumerate(ROWS)]
    )
    assert [r["row"] for r in read_rows(split, "scored")] == [1, 2, 3, 5]
    assert [r["row"] for r in read_rows(split, "scored", split="test")] == [4]
    with pytest.raises(SystemExit, match="no row whose `split` is 'dev'"):
        read_rows(split, "scored", split="dev")


def test_ultrafeedback_nesting_for_every_kind(tmp_path):
    """A row of four completions: all of them for scored and responses, best against worst for preference, the
    best for sft, one prompt; a tie is no pair."""
    make = lambda *scores: [
        {"response": f"r{s}.{i}", "overall_score": s, "model": f"m{i}"} for i, s in enumerate(scores)
    ]
    nested = [
        {"instruction": "a", "completions": make(5, 9, 2, 7)},
        {"instruction": "b", "completions": make(4, 4)},
    ]
    name = write(tmp_path / "u.jsonl", nested)
    scored = read_rows(name, "scored")
    assert [(r["prompt"], r["reward"], r["policy"]) for r in scored] == [
        ("a", 5, "m0"),
        ("a", 9, "m1"),
        ("a", 2, "m2"),
        ("a", 7, "m3"),
        ("b", 4, "m0"),
        ("b", 4, "m1"),
    ]
    assert scored[1]["response"] == "r9.1"
    assert [r["response"] for r in read_rows(name, "responses")] == [r["response"] for r in scored]
    assert without(read_rows(name, "preference")) == [
        {"prompt": "a", "chosen": "r9.1", "rejected": "r2.2", "chosen_policy": "m1", "rejected_policy": "m2"}
    ]
    sft = read_rows(name, "sft")
    assert [(r["prompt"], r["response"]) for r in sft][0] == ("a", "r9.1") and [r["prompt"] for r in sft] == [
        "a",
        "b",
    ]
    assert [r["prompt"] for r in read_rows(name, "prompts")] == ["a", "b"]


def test_ultrafeedback_prompts_without_a_row_are_counted(tmp_path, capsys):
    """Prompts that give no pair, by a tie or without two scores, are reported, not silently lost."""
    scores = {"tie": [1, 1], "better": [1, 2], "one": [1, None], "none": []}
    nested = [
        {
            "instruction": name,
            "completions": [{"response": str(i), "overall_score": s} for i, s in enumerate(found)],
        }
        for name, found in scores.items()
    ]
    rows = read_rows(write(tmp_path / "u.jsonl", nested), "preference")
    assert [r["prompt"] for r in rows] == ["better"]
    assert "3 rows dropped: a tie, no rated answers" in capsys.readouterr().out


def test_a_prompt_is_read_once_however_many_answers_it_has(tmp_path):
    """A file of scored answers names a prompt many times: as prompts, each counts once, so none is held out
    and trained on."""
    answers = [{"prompt": p, "response": str(i), "reward": 1.0} for p in ("a", "b") for i in range(3)]
    name = write(tmp_path / "scored.jsonl", answers)
    assert sorted(r["prompt"] for r in read_rows(name, "prompts")) == ["a", "b"]
    assert len(read_rows(name, "scored")) == 6


def test_bad_rows_are_named_or_dropped_and_counted(tmp_path, capsys):
    """The first bad row stops with one line that names file and row; --skip-bad-rows drops and counts."""
    name = write(
        tmp_path / "d.jsonl",
        [ROWS[0], {**ROWS[1], "reward": float("nan")}, {**ROWS[2], "response": " "}, ROWS[3]],
    )
    with pytest.raises(SystemExit) as stop:
        read_rows(name, "scored")
    assert f"{name}, row 2" in str(stop.value) and "\n" not in str(stop.value)
    assert [r["row"] for r in read_rows(name, "scored", skip_bad_rows=True)] == [1, 4]
    assert "dropped 2 bad rows of 4" in capsys.readouterr().out


def test_a_hub_id_with_a_dot_is_a_hub_id(monkeypatch):
    """`--dataset nvidia/HelpSteer-1.5` is not a file with the suffix .5."""
    asked = []
    hub = SimpleNamespace(to_list=lambda: ROWS)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, part, split: asked.append((name, part, split)) or hub
    )
    assert without(read_rows("org/set-v1.5", "scored", split="dev")) == ROWS
    assert asked == [("org/set-v1.5", None, "dev")]
    assert without(read_rows("org/set:main", "scored")) == ROWS
    assert asked[1] == ("org/set", "main", "train")


# --- splits -------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_by_prompt_complete_stable_and_near_their_shares(tmp_path):
    """30 / 50 / 20 % of 3,000 prompts within four deviations; a prompt's rows in one part, whatever the order
    or the rest."""
    rows = [{"prompt": f"prompt {i // 2}", "response": str(i)} for i in range(6000)]
    name = write(tmp_path / "d.jsonl", rows)
    parts = {
        part: {r["prompt"] for r in read_rows(name, "sft", part=part)} for part in ("sft", "value", "rl")
    }
    for part, share in (("sft", 0.3), ("value", 0.5), ("rl", 0.2)):
        assert abs(len(parts[part]) - 3000 * share) < 4 * (3000 * share * (1 - share)) ** 0.5
    assert sum(map(len, parts.values())) == 3000 == len(set().union(*parts.values()))
    random.Random(0).shuffle(rows)
    fewer = write(tmp_path / "e.jsonl", rows[:1000])
    assert {r["prompt"] for r in read_rows(fewer, "sft", part="rl")} == parts["rl"] & {
        r["prompt"] for r in rows[:1000]
    }
    assert {r["prompt"] for r in read_rows(name, "sft", part="rl", split_seed=1)} != parts["rl"]


def test_hold_out_is_disjoint_by_prompt_and_independent_of_the_part():
    """Every row is on one side, no prompt on both, near the fraction; inside a part as well: another hash
    than `part`'s."""
    rows = [{"prompt": f"prompt {i // 3}"} for i in range(6000)]
    train, held = hold_out(rows, 0.2, 0)
    assert len(train) + len(held) == 6000 and not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    assert abs(len(held) / 3 - 400) < 4 * (2000 * 0.16) ** 0.5
    part = [r for r in rows if data.prompt_hash(r["prompt"], 0) < 0.3]
    assert 0.1 < len(hold_out(part, 0.2, 0)[1]) / len(part) < 0.3


# --- tokens -------------------------------------------------------------------------------------------------

GEMMA = (
    "{{ bos_token }} {% for m in messages %}<start> {{ 'model' if m['role'] == 'assistant' else m['role'] }} "
    "{{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start> model {% endif %}"
)


def word_tokenizer(template=None, special=("<start>", "<end>"), adds_eos=False):
    """Words, with a BOS that encoding adds, and an end of turn that is not the eos."""
    words = ["<bos>", "<eos>", "<unk>", "<start>", "<end>", "user", "model", "assistant", "a", "b", "c", "zq"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tail = " <eos>" if adds_eos else ""
    core.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A{tail}", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
    )
    tokenizer.add_tokens(
        [AddedToken(word, special=True) for word in ("<start>", "<end>") if word not in special]
    )
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer, text, limit):
    """The answer's tokens, as the scripts get them."""
    return tokenize([{"prompt": "a", "response": text}], tokenizer, ("response",), 99, limit, "d")[0][
        "response_ids"
    ]


def test_prompts_go_through_the_chat_template_with_one_bos():
    """A string is a user's message; messages are taken as they are; the answer ends with the template's end
    of turn."""
    tokenizer = word_tokenizer(GEMMA)
    ids = tokenizer.convert_tokens_to_ids
    assert encode_prompt(tokenizer, "a b") == ids(
        ["<bos>", "<start>", "user", "a", "b", "<end>", "<start>", "model"]
    )
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    turns = "<bos> <start> user a <end> <start> model b <end> <start> user c <end> <start> model"
    assert encode_prompt(tokenizer, chat) == ids(turns.split())
    assert stop_token(tokenizer) == ids("<end>") != tokenizer.eos_token_id
    assert encode(tokenizer, "b c", 9) == ids(["b", "c", "<end>"])  # no BOS
    assert encode(tokenizer, "b c", 2) == ids(["b", "c"])  # cut off: no end


def test_a_prompt_that_the_template_refuses_is_named():
    """Gemma's template raises on a system message: the error names the data set and the row."""
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + GEMMA
    )
    rows = [{"prompt": "a", "row": 4}, {"prompt": [{"role": "system", "content": "b"}], "row": 5}]
    with pytest.raises(SystemExit, match="d.jsonl, row 5: the model's chat template refuses it: System role"):
        tokenize(rows, word_tokenizer(refusing), (), 99, 99, "d.jsonl")


@pytest.mark.parametrize("adds_eos", [False, True])
def test_plain_text_without_a_template(adds_eos):
    """One BOS, no eos after a prompt even where the tokenizer adds one; the answer ends with eos."""
    tokenizer = word_tokenizer(adds_eos=adds_eos)
    ids = tokenizer.convert_tokens_to_ids
    assert encode_prompt(tokenizer, "a b") == ids(["<bos>", "a", "b"])
    assert encode_prompt(tokenizer, [{"role": "user", "content": "a"}]) == ids(["<bos>", "a"])
    assert (
        encode(tokenizer, "c", 9) == ids(["c", "<eos>"]) and stop_token(tokenizer) == tokenizer.eos_token_id
    )


def test_stop_token_that_is_special_without_a_role():
    """An end of turn added as AddedToken(special=True), not listed in additional_special_tokens, is the stop
    token."""
    tokenizer = word_tokenizer(GEMMA, special=("<start>",))
    assert stop_token(tokenizer) == tokenizer.convert_tokens_to_ids("<end>")


def test_tokenize_drops_long_prompts_cuts_long_answers_and_counts_both(capsys):
    """Prompts over the limit go, answers are cut without their end; exactly at the limit is not over it."""
    tokenizer = word_tokenizer()
    rows = [{"prompt": p, "response": r} for p, r in (("a", "b c"), ("a b c", "a"), ("a b", "a b c"))]
    got = tokenize(rows, tokenizer, ("response",), 3, 3, "d")
    assert [len(r["prompt_ids"]) for r in got] == [2, 3]
    assert [r["response_ids"][-1] == tokenizer.eos_token_id for r in got] == [True, False]
    assert [len(r["response_ids"]) for r in got] == [3, 3]
    out = capsys.readouterr().out
    assert "dropped 1 of 3" in out and "cut 1 answers (50 %)" in out
    with pytest.raises(SystemExit, match="every prompt is longer"):
        tokenize(rows, tokenizer, (), 1, 3, "d")


@pytest.mark.parametrize("k", [1, 3])
def test_add_context_takes_other_prompts_of_the_same_policy(k):
    """k pairs by the row's policy on other prompts, each cut, before the prompt; one BOS in all; the response
    stays."""
    tokenizer = word_tokenizer()
    pool = []
    # tokens tell prompt (100 + i), policy (200 or 201); four rows a prompt, two by each policy
    for i in range(40):
        prompt = [0, 100 + i // 4]
        policy = "xy"[i % 2]
        pool.append({"prompt_ids": prompt, "response_ids": [200 + i % 2, 300 + i, 9, 9], "policy": policy})
    out = add_context(pool, k, pool, tokenizer, 4, seed=0)
    for row, new in zip(pool, out, strict=True):
        ids = new["prompt_ids"]
        own = row["prompt_ids"][1]
        assert new["response_ids"] == row["response_ids"]
        assert ids[0] == 0 and ids.count(0) == 1 and ids[-1] == own and ids.count(own) == 1
        pairs = [ids[1 + 3 * j : 4 + 3 * j] for j in range(k)]  # four tokens a pair, less the BOS
        assert len(ids) == 1 + 3 * k + 1
        assert all(
            100 <= p < 110 and author == row["response_ids"][0] and 300 <= r < 340 for p, author, r in pairs
        )
        assert len({r for _, _, r in pairs}) == k  # drawn without replacement
    assert (
        add_context(pool, k, pool, tokenizer, 4, seed=0)
        == out
        != add_context(pool, k, pool, tokenizer, 4, seed=1)
    )
    assert add_context(pool, 0, pool, tokenizer, 4, seed=0) == pool
    alone = [{"prompt_ids": [0, 5], "response_ids": [6], "policy": "z"}]
    # fewer other prompts than k: a shorter prefix
    assert add_context(alone, k, alone + pool, tokenizer, 4, seed=0) == alone


# --- batches ------------------------------------------------------------------------------------------------


def test_collate_places_by_position():
    """Right padding, lengths and mask from positions, where pad tokens also occur inside prompt and
    response."""
    batch = collate([([7, 0], [8, 0, 9]), ([5], [6]), ([1, 2, 3, 4], [0])], 0, "cpu")
    assert batch["input_ids"].tolist() == [[7, 0, 8, 0, 9], [5, 6, 0, 0, 0], [1, 2, 3, 4, 0]]
    assert batch["prompt_lengths"].tolist() == [2, 1, 4]
    assert batch["response_mask"].tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert batch["response_mask"].dtype == torch.bool and batch["input_ids"].dtype == torch.long
    empty = collate([], 3, "cpu")
    assert (
        not empty["response_mask"].any()
        and empty["input_ids"].shape[0] == 1
        and empty["response_mask"].shape == (1, 1)
    )


@pytest.mark.parametrize(
    "n, size, world", [(8, 2, 1), (8, 2, 2), (7, 2, 2), (5, 3, 4), (1, 4, 4), (13, 4, 3)]
)
def test_micro_batches_deal_every_index_once(n, size, world):
    """Over ranks each index once, no micro-batch over `size`, as many on each rank, lengths descending;
    balanced to one row."""
    lengths = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(n)).tolist()
    indices = random.Random(n).sample(range(40), n)
    ranks = [micro_batches(indices, lengths, size, r, world) for r in range(world)]
    assert sorted(i for rank in ranks for mb in rank for i in mb) == sorted(indices)
    assert len({len(rank) for rank in ranks}) == 1 and all(len(mb) <= size for rank in ranks for mb in rank)
    for rank in ranks:
        mine = [lengths[i] for mb in rank for i in mb]
        assert mine == sorted(mine, reverse=True)
    counts = [sum(map(len, rank)) for rank in ranks]
    assert max(counts) - min(counts) <= 1
    assert len(ranks[0]) == math.ceil(max(counts) / size)  # and no more of them than needed


def test_batch_indices_covers_each_epoch_once():
    """An epoch's batches are disjoint and cover all but a last short one; epochs and seeds differ; a step
    needs no history."""
    epochs = [
        [i for step in range(e * 5, e * 5 + 5) for i in batch_indices(23, 4, step, 0)] for e in range(8)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == 20 and set(epoch) <= set(range(23))
    # no row is left out for good
    assert len(set(map(tuple, epochs))) == 8 and len(set().union(*epochs)) == 23
    assert batch_indices(23, 4, 7, 0) == epochs[1][8:12] and batch_indices(23, 4, 7, 1) != batch_indices(
        23, 4, 7, 0
    )
    few = batch_indices(3, 8, 0, 0)  # fewer rows than a batch: they repeat
    assert set(few) == {0, 1, 2} and len(few) == 8


# --- the reviews world --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, expected",
    [
        ("the soup was lovely .", 1.0),
        ("the soup was not lovely .", -0.5),
        ("the soup was not very bad but the waiter was quite good .", 0.75 + 0.375),
        ("the waiter was really slow and the soup was awful .", -0.625 - 1.0),
        ("the soup was warm and the soup was awful .", 1.0),  # the first clause about a topic counts
        ("the view was perfect .", 0.0),  # nobody asked
        ("the soup was very lovely and the waiter was very great .", 3.0),
        ("soup lovely waiter great", 0.0),
        ("", 0.0),
    ],
)
def test_reviews_reward_by_hand(response, expected):
    """Negation turns and halves, degree scales, each asked topic counts once."""
    assert reviews.reward(["lunch : the soup and the waiter ?"], [response]) == [expected]


@pytest.mark.parametrize(
    "response, expected",
    [
        ("the soup was lovely .", 1.0),
        ("the soup was not very bad but the waiter was quite good and the view was fine .", 1.0),
        ("the soup was lovely", 0.0),
        ("the soup was lovely . .", 0.0),
        ("the soup was lovely and .", 0.0),
        ("the soup lovely .", 0.0),
        ("the lovely was soup .", 0.0),
        ("the soup was very not lovely .", 0.0),
        ("the soup was lovely the waiter was good .", 0.0),
        ("the soup was warm and the soup was awful .", 0.0),
        (" and ".join(f"the {t} was good" for t in reviews.TOPICS[:5]) + " .", 0.0),  # five clauses
        ("", 0.0),
    ],
)
def test_reviews_grammar_by_hand(response, expected):
    """Whole sentences of one to four clauses about different topics, ended by a full stop."""
    assert reviews.grammatical([""], [response]) == [expected]


def test_reviews_data_is_grammatical_consistent_and_in_vocabulary():
    """Every row is grammatical with the reward it states, chosen truly beats rejected by the gap, and no text
    has an <unk>."""
    rows = reviews.rows("scored")
    prompts = [r["prompt"] for r in rows]
    responses = [r["response"] for r in rows]
    assert set(reviews.grammatical(prompts, responses)) == {1.0}
    assert reviews.reward(prompts, responses) == [r["reward"] for r in rows]
    assert {r["policy"] for r in rows} == set(reviews.AUTHORS) and len(set(prompts)) == 960
    pairs = reviews.rows("preference")
    sides = [
        reviews.reward([r["prompt"] for r in pairs], [r[s] for r in pairs]) for s in ("chosen", "rejected")
    ]
    assert min(c - r for c, r in zip(*sides, strict=True)) >= reviews.MIN_GAP
    tokenizer = load_tokenizer(reviews.folder("untrained"))
    texts = sorted(set(prompts)) + sorted(set(responses))[::10]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text
    ids = encode_prompt(tokenizer, prompts[0])
    assert tokenizer.decode(ids) == f"<bos> <user> {prompts[0]} <writer>"
    assert encode(tokenizer, responses[0], 99)[-1] == tokenizer.eos_token_id == stop_token(tokenizer)
    # the scripts' limits for this world
    assert max(len(encode_prompt(tokenizer, p)) for p in set(prompts)) <= 16
    assert max(len(r.split()) + 1 for r in responses) <= 32


def test_reviews_rows_of_every_kind_pass_the_checks():
    """read_rows accepts the embedded data for each kind that a script reads, the same on every call."""
    for kind in ("prompts", "sft", "preference", "scored"):
        rows = read_rows("reviews", kind, part="rl")
        assert kind != "scored" or rows == read_rows("reviews", kind, part="rl")
        assert all(set(data.KINDS[kind]) <= set(row) for row in rows)
