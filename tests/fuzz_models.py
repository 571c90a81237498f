"""Damaged model folders: each opens to what the whole folder says, or ends in one line.

A part of them is in the suite (tests/test_models.py); all of them: FUZZ=all pytest tests/fuzz_models.py
"""

import json
import os
import pickle
import random
import shutil
import struct
import traceback
from pathlib import Path

import pytest
import torch
from random_models import ARGS, KINDS, PAD, sample_sequences
from safetensors.torch import load_file, save_file

from common.batches import collate
from common.checkpoints import export
from common.models import load_model
from common.pretrained import resolve
from common.rewards import Reward
from common.rollout import rollout
from common.tokenization import encode_prompt, load_tokenizer, require_same_tokenizer, tokenize
from common.value_heads import response_values

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ROWS = [
    {"row": i, "prompt": f"dinner : the {topic} ?", "response": f"the {topic} was good ."}
    for i, topic in enumerate(("soup", "bread", "fish"))
]
SUITE = 36  # of them in the suite


# --- damages: each changes a folder in place; `rng` chooses where ------------------------------------------


def edit_json(name: str, **changes):
    """Of a JSON file some entries are others; ... takes one out."""

    def damage(folder, rng):
        path = folder / name
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))

    return damage


def write(name: str, data: bytes):
    return lambda folder, rng: (folder / name).write_bytes(data)


def remove(name: str):
    return lambda folder, rng: (folder / name).unlink()


def cut(name: str):
    """A file that was copied in part."""
    return lambda folder, rng: os.truncate(
        folder / name, rng.randrange(1, (folder / name).stat().st_size - 9)
    )


def garble(name: str):
    """Some bytes of a text are others."""

    def damage(folder, rng):
        data = bytearray((folder / name).read_bytes())
        for _ in range(20):
            data[rng.randrange(len(data))] = rng.randrange(128, 256)
        (folder / name).write_bytes(data)

    return damage


def header_of(path: Path) -> tuple[dict, bytes]:
    """(header, the rest) of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def edit_header(change):
    """Weights whose header says something else."""

    def damage(folder, rng):
        header, rest = header_of(folder / WEIGHTS)
        change(header, rng.choice([key for key in header if key != "__metadata__"]))
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return damage


def flip_in_header(folder, rng):
    data = bytearray((folder / WEIGHTS).read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    for _ in range(3):
        data[8 + rng.randrange(size)] ^= 1 << rng.randrange(8)
    (folder / WEIGHTS).write_bytes(data)


def cut_header(folder, rng):
    size = struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])[0]
    os.truncate(folder / WEIGHTS, rng.randrange(1, size))


def huge_header(folder, rng):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + data[8:])


def edit_weights(change):
    """`change(weights, name of one)`: in place, or a new dictionary."""

    def damage(folder, rng):
        weights = load_file(folder / WEIGHTS)
        weights = change(weights, rng.choice(sorted(weights))) or weights
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def set_one(number: float):
    def change(weights, name):
        weights[name].view(-1)[-1] = number

    return edit_weights(change)


def shards(folder, weights: dict, named: dict | None = None) -> None:
    """The weights in two files with an index; `named` replaces entries of that."""
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places | (named or {})}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def whole_shards(folder, rng):
    shards(folder, load_file(folder / WEIGHTS))


def missing_shard(folder, rng):
    shards(folder, load_file(folder / WEIGHTS))
    (folder / f"model-0000{rng.choice('12')}-of-00002.safetensors").unlink()


def cut_shard(folder, rng):
    shards(folder, load_file(folder / WEIGHTS))
    path = folder / f"model-0000{rng.choice('12')}-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - rng.randrange(1, 4000))


def shard_without_its_weight(folder, rng):
    """The index says of a weight that it is in the other file."""
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[0]
    shards(folder, weights, {name: "model-00002-of-00002.safetensors"})


def index_to_nowhere(folder, rng):
    weights = load_file(folder / WEIGHTS)
    shards(folder, weights, {sorted(weights)[0]: "model-00003-of-00002.safetensors"})


def index_garbage(text: str):
    def damage(folder, rng):
        shards(folder, load_file(folder / WEIGHTS))
        (folder / INDEX).write_text(text)

    return damage


def shard_with_nan(folder, rng):
    weights = load_file(folder / WEIGHTS)
    weights[sorted(weights)[-1]].view(-1)[0] = torch.nan
    shards(folder, weights)


def pickled(folder, rng):
    """Another file format, which could hold a program, in place of safetensors."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pickle_under_its_name(folder, rng):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"lm_head.weight": [1.0]}))


def git_lfs_pointer(folder, rng):
    """What a clone without git-lfs leaves."""
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def fewer_embeddings(folder, rng):
    """Fewer rows, in weights and configuration, than the tokenizer has tokens."""
    rows = 20
    weights = load_file(folder / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:rows].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    edit_json("config.json", vocab_size=rows)(folder, rng)


def a_folder_in_its_place(name: str):
    def damage(folder, rng):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def transposed(weights, name):
    wide = next(name for name in sorted(weights) if "gate_proj" in name)
    weights[wide] = weights[wide].T.contiguous()


def without_one(weights, name):
    del weights[name]


def renamed(weights, name):
    weights["model." + name] = weights.pop(name)


def in_type(dtype):
    return edit_weights(lambda weights, _: {name: weight.to(dtype) for name, weight in weights.items()})


def grow_shape(header, name):
    header[name]["shape"][0] += 1


def swap_type(header, name):
    header[name]["dtype"] = "F16"


def unknown_type(header, name):
    header[name]["dtype"] = "Q4_K"


def shift(header, name):
    header[name]["data_offsets"][0] += 4


def template(text: str):
    return write("chat_template.jinja", text.encode())


ANY = ("policy", "value", "reward")
# (name, damage, the kinds of folders)
DAMAGES = [
    ("config.json is a list", write("config.json", b"[1]"), ANY),
    ("config.json is null", write("config.json", b"null"), ("policy",)),
    ("config.json with a NUL", write("config.json", b"\0" * 300), ("policy",)),
    ("tokenizer.json is {}", write("tokenizer.json", b"{}"), ("policy",)),
    ("tokenizer_config.json is a list", write("tokenizer_config.json", b"[]"), ("policy",)),
    ("a folder named config.json", a_folder_in_its_place("config.json"), ("policy",)),
    ("a folder named tokenizer.json", a_folder_in_its_place("tokenizer.json"), ("policy",)),
    ("a folder for the weights", a_folder_in_its_place(WEIGHTS), ("value",)),
    ("model_type unknown", edit_json("config.json", model_type="llamas"), ANY),
    ("model_type missing", edit_json("config.json", model_type=...), ("policy", "reward")),
    ("model_type of another family", edit_json("config.json", model_type="bert"), ANY),
    ("model_type a near family", edit_json("config.json", model_type="gpt_neox"), ("policy",)),
    ("architectures of another class", edit_json("config.json", architectures=["BertForMaskedLM"]), ANY),
    ("architectures no list", edit_json("config.json", architectures=7), ("policy", "value")),
    ("hidden_size a text", edit_json("config.json", hidden_size="32"), ("policy", "value")),
    ("hidden_size 0", edit_json("config.json", hidden_size=0), ("policy",)),
    ("hidden_size 48", edit_json("config.json", hidden_size=48), ANY),
    ("hidden_size huge", edit_json("config.json", hidden_size=2**40), ("policy",)),
    ("layers missing", edit_json("config.json", num_hidden_layers=3), ANY),
    ("layers -1", edit_json("config.json", num_hidden_layers=-1), ("policy",)),
    ("layers too many", edit_json("config.json", num_hidden_layers=1), ANY),
    ("heads 0", edit_json("config.json", num_attention_heads=0), ("policy",)),
    ("heads that do not divide", edit_json("config.json", num_attention_heads=5), ("policy",)),
    ("vocabulary smaller than the weights", edit_json("config.json", vocab_size=30), ANY),
    ("pad beyond the vocabulary", edit_json("config.json", pad_token_id=10**6), ANY),
    (
        "rope of no kind",
        edit_json("config.json", rope_parameters={"rope_type": "curly"}),
        ("policy", "value"),
    ),
    ("activation of no kind", edit_json("config.json", hidden_act="silly"), ("policy",)),
    ("epsilon NaN", edit_json("config.json", rms_norm_eps=float("nan")), ANY),
    ("positions 2", edit_json("config.json", max_position_embeddings=2), ("policy",)),
    ("code of its own", edit_json("config.json", auto_map={"AutoModelForCausalLM": "x.Y"}), ("policy",)),
    ("several labels", edit_json("config.json", num_labels=3, id2label=None), ("reward",)),
    ("labels of a classifier", edit_json("config.json", id2label={"0": "a", "1": "b"}), ("reward", "value")),
    ("header cut", cut_header, ANY),
    ("header flipped", flip_in_header, ANY),
    ("header flipped", flip_in_header, ANY),
    ("header huge", huge_header, ("policy",)),
    ("header: a shape", edit_header(grow_shape), ("policy", "value")),
    ("header: another type", edit_header(swap_type), ("policy", "value")),
    ("header: no type", edit_header(unknown_type), ("policy",)),
    ("header: shifted", edit_header(shift), ("policy",)),
    ("a weight transposed", edit_weights(transposed), ANY),
    ("a weight missing", edit_weights(without_one), ANY),
    ("a weight renamed", edit_weights(renamed), ANY),
    ("all weights float64", in_type(torch.float64), ANY),
    ("all weights int8", in_type(torch.int8), ("policy", "value")),
    ("all weights bool", in_type(torch.bool), ("policy",)),
    ("a weight NaN", set_one(float("nan")), ANY),
    ("a weight NaN", set_one(float("nan")), ANY),
    ("a weight inf", set_one(float("inf")), ANY),
    ("shards", whole_shards, ANY),
    ("a shard missing", missing_shard, ANY),
    ("a shard cut", cut_shard, ("policy", "reward")),
    ("a shard without its weight", shard_without_its_weight, ("policy", "value")),
    ("a shard with NaN", shard_with_nan, ("value",)),
    ("an index to nowhere", index_to_nowhere, ANY),
    ("an index that is no JSON", index_garbage("{"), ("policy",)),
    ("an index without its map", index_garbage("{}"), ("policy",)),
    ("an index with a list", index_garbage('{"metadata": {}, "weight_map": []}'), ("policy",)),
    ("a pickle", pickled, ANY),
    ("a pickle under the name of safetensors", pickle_under_its_name, ("policy",)),
    ("a pointer of git-lfs", git_lfs_pointer, ("policy", "value")),
    ("fewer embeddings than tokens", fewer_embeddings, ANY),
    ("template: a syntax error", template("{% for message in messages %}{{ message.content }"), ANY),
    ("template: it raises", template("{{ raise_exception('no') }}"), ANY),
    ("template: divides by 0", template("{{ 1 / 0 }}"), ("policy",)),
    ("template: recursion", template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), ("policy",)),
    ("template: it says nothing", template("{% if false %}x{% endif %}"), ("policy",)),
    ("template: the same for all", template("hello"), ("policy",)),
    ("template: no text", template("\xff\xfe\x00"), ("policy",)),
    ("template: bytes", write("chat_template.jinja", b"\xff\xfe\x80"), ("policy", "reward")),
    ("template: attacks", template("{{ messages.__class__.__mro__ }}"), ("policy",)),
    ("generation config: no JSON", write("generation_config.json", b"{"), ("policy",)),
    ("generation config: a list", write("generation_config.json", b"[]"), ("policy",)),
    ("generation config: empty", write("generation_config.json", b""), ("policy",)),
    (
        "generation config: a text for eos",
        write("generation_config.json", b'{"eos_token_id": "two"}'),
        ("policy",),
    ),
    (
        "generation config: a nested eos",
        write("generation_config.json", b'{"eos_token_id": [[2]]}'),
        ("policy",),
    ),
    (
        "generation config: a number beyond",
        write("generation_config.json", b'{"eos_token_id": 99999999}'),
        ("policy",),
    ),
    (
        "generation config: nonsense",
        write("generation_config.json", b'{"temperature": "hot", "do_sample": 3}'),
        ("policy",),
    ),
    ("generation config: bytes", write("generation_config.json", b"\xff\xfe\x00"), ("policy",)),
]
for name in ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS):
    DAMAGES.append((f"removed {name}", remove(name), ANY))
    DAMAGES.append((f"cut {name}", cut(name), ANY))
    DAMAGES.append((f"empty {name}", write(name, b""), ANY))
    if name != WEIGHTS:  # there other bytes are other numbers
        DAMAGES.append((f"garbled {name}", garble(name), ANY))
DAMAGES.append(("empty chat_template.jinja", write("chat_template.jinja", b""), ANY))
# (folder's kind, opened as)
CONFUSED = [(a, b) for a in ANY for b in ANY if a != b]


def cases() -> list[tuple]:
    """(name, kind of the folder, kind it is opened as, damage), in an order that is always the same."""
    found = [(f"a {a} as {b}", a, b, None) for a, b in CONFUSED]
    found += [(f"{kind}: {name}", kind, kind, damage) for name, damage, kinds in DAMAGES for kind in kinds]
    random.Random(1).shuffle(found)
    return found


CASES = cases()
if os.environ.get("FUZZ") != "all":
    CASES = CASES[:SUITE]


# --- what a folder says --------------------------------------------------------------------------------------


def outputs(folder: str, kind: str, policy_folder: str) -> dict[str, torch.Tensor]:
    """What the scripts would ask of a folder: numbers, all of which have to be right."""
    name = resolve(folder)
    sequences = sample_sequences()
    batch = collate(sequences, PAD, "cpu")
    if kind == "policy":
        tokenizer = load_tokenizer(name)
        rows = tokenize(ROWS, tokenizer, ("response",), 64, 64, "rows.jsonl")
        model = load_model("policy", name, tokenizer, ARGS, trained=True, longest=24)
        with torch.no_grad():
            logprobs, entropy = model.response_logprobs(**batch)
        prompts = [row["opening_ids"] for row in rows]
        responses, _ = rollout(model, tokenizer, prompts, 6, 1.0, (0, 0))
        export(model, tokenizer, f"{folder}-exported", "fp32")
        return {
            "tokens": torch.tensor([token for row in rows for token in row["response_ids"]]),
            "prompts": torch.tensor([token for prompt in prompts for token in prompt]),
            "logprobs": logprobs,
            "entropy": entropy,
            "responses": torch.tensor([token for response in responses for token in response]),
        }
    policy_tokenizer = load_tokenizer(policy_folder)
    if kind == "value":
        require_same_tokenizer(policy_tokenizer, name, "--gvm")
        model = load_model("value", name, policy_tokenizer, ARGS, trained=False, longest=24)
        with torch.no_grad():
            return {"values": response_values(model, **batch)}
    reward = Reward(name, policy_tokenizer, ARGS, ROWS)
    texts = [row["response"] for row in ROWS]
    ends = [policy_tokenizer.eos_token_id]
    sequences = [(encode_prompt(policy_tokenizer, row["prompt"]), ends) for row in ROWS]
    return {"scores": reward(ROWS, sequences, texts)}


def verdict(folder: str, kind: str, policy_folder: str, expected: dict) -> tuple[str, str]:
    """("right" | "refused" | what is wrong, what was said)."""
    try:
        found = outputs(folder, kind, policy_folder)
    except SystemExit as error:
        text = str(error)
        one_line = text.startswith("error: ") and "\n" not in text
        return ("refused" if one_line else "more than a line"), text
    except Exception:
        return "traceback", traceback.format_exc()
    for name, numbers in expected.items():
        same = found[name].shape == numbers.shape and torch.allclose(found[name], numbers, atol=1e-5, rtol=0)
        if not same:
            return "silently wrong", name
    return "right", ""


# A configuration with fewer layers than the weights: some families store layers that are not for their forward
SAID = {"layers too many": "of its weights have no place in a"}


@pytest.fixture(scope="module")
def expected(folders, group):
    """Kind -> what the whole folder says."""
    return {kind: outputs(folders[kind], kind, folders["policy"]) for kind in KINDS}


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case[0] for case in CASES])
def test_a_damaged_model_is_right_or_one_line(folders, expected, tmp_path, capsys, case):
    name, of, kind, damage = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(folders[of], folder)
    if damage:
        damage(folder, random.Random(case))
    found, text = verdict(str(folder), kind, folders["policy"], expected[kind])
    said = capsys.readouterr().out
    for about, words in SAID.items():
        if found == "silently wrong" and name.endswith(about) and words in said:
            found = "said"
    print(f"{name}: {found}: {text}\n{said}")
    assert found in ("right", "refused", "said"), text
    assert damage or found == "refused"
