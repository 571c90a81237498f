"""`evaluate.py responses`: answers of policies to the same prompts, one turn or several, and what they are
worth.

Answers are kept batch by batch, and written in the forms in which AlpacaEval, MT-bench and Arena-Hard
read them. docs/evaluate_responses.md has the formats."""

import gc
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from common import decoding, distributed, positions, templates, vllm
from common.cli import fail, make_folder, note
from common.data import columns_of_prompt, hold_out_prompts, prompt_key, read_rows
from common.lock import lock
from common.measures import distinct_2
from common.models import load_model
from common.positions import longest_of
from common.pretrained import resolve
from common.reference import fingerprint
from common.rewards import Reward
from common.rollout import Filters, check_sampler, rollout
from common.tables import markdown
from common.tokenization import (
    TOKENS,
    encode_prompt,
    load_tokenizer,
    require_same_tokenizer,
    stop_tokens,
    tokenize,
)
from evaluation import pass_at_k, text_metrics
from evaluation.benchmarks import export
from evaluation.text_metrics import WITH_REFERENCE, mean


@dataclass
class Responses:
    models: tuple[str, ...] = ("reviews",)
    """Policies to compare, one in memory at a time: hub ids or folders."""
    names: tuple[str, ...] = ()
    """A name for each model, for its files and the table. By default it is `x` of `runs/x/model`, else the
    last part."""
    dataset: str = "reviews"
    """Prompts: a hub id (`id:configuration` where it has several), a folder, or local .jsonl, .json or
    .parquet files (.gz too; several with commas between). MT-bench's `turns` are asked
    one after another."""
    split: str = "train"
    """Split of a hub data set; of a local file, the value that its column `split` must have."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names and yours, in pairs: `--columns prompt question response answer`."""
    template_arguments: dict[str, str] = field(default_factory=dict)
    """Arguments for the chat template and their values, in pairs: `--template-arguments enable_thinking
    false`."""
    reference: str = "reference"
    """Column of the reference answers that some metrics compare with; `response`: the answers of an sft
    data set."""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """Share of the prompts to use: sft is 30 %, value 50 %, rl 20 %, disjoint by prompt (2502.16944)."""
    split_seed: int = 0
    """Seed of the split into parts and held-out prompts. It must be the same in all scripts of an
    experiment."""
    prompts: int = 0
    """Number of prompts, those that ppo.py holds out with the same `--part` and `--eval-prompts`. 0: all,
    in their order."""
    skip_bad_rows: bool = False
    """Drop and count unusable rows instead of stopping at the first."""
    metrics: tuple[Literal["rouge_l", "bleu", "meteor", "bertscore", "toxicity"], ...] = ()
    """Text metrics besides length and distinct_2. Each needs a package of its own."""
    reward: tuple[str, ...] = ()
    """Reward models (hub ids or folders) or `module:function`s to score the responses with."""
    pass_at: tuple[int, ...] = ()
    """Each k: the probability that one of k samples is right, by the first `--reward`, which gives 0 or 1
    (2107.03374). It needs as many `--samples`, better more."""
    maj_at: tuple[int, ...] = ()
    """Each k: the probability that the most frequent final answer of k samples is right, by the first `--reward`
    (self-consistency, 2203.11171)."""
    final_answer: str = ""
    """`module:function` that gives a response's final answer for `--maj-at`, None where there is none. By default
    it is the last number."""
    bertscore_model: str = "roberta-large"
    """Encoder of BERTScore: a hub id or folder (1904.09675: roberta-large for English)."""
    bertscore_layer: int = 0
    """Layer of that encoder. 0: the one that bert-score's authors tuned for a model of that name."""
    toxicity_model: str = "unitary/toxic-bert"
    """Text classifier: a hub id or folder (Detoxify's `original`)."""
    toxicity_label: str = "toxic"
    """Label of the classifier whose probability is reported."""
    run_dir: str = "runs/evaluate"
    """Folder of responses.json and of a folder for each model. Finished responses are kept, unfinished
    ones continued."""
    overwrite: bool = False
    """Generate anew what is there already."""
    batch_size: int = 64
    """Responses that are sampled at once, over all ranks."""
    micro_batch_size: int = 8
    """Responses per forward pass of reward models, BERTScore and the toxicity classifier."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens. One that is longer for any of the models is dropped for all, and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    system_prompt: str = ""
    """A system message before each prompt, written by each model's chat template. The answers are to both."""
    temperature: float = 0.0
    """Temperature of sampling. 0: greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens alone, after the temperature. 0: among all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that have this probability together, after `--top-k`."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that the prompt or the response holds are divided by it, negative ones
    multiplied, before the temperature (1909.05858)."""
    samples: int = 1
    """Responses to each prompt. Means are over all of them, intervals are those of the prompts."""
    decode: Literal["sample", "best-of", "guided"] = "sample"
    """How a response is chosen. sample: the policy alone; best-of: the one of several that `--gvm` values
    highest; guided: each token re-weighted by `--gvm`."""
    gvm: str = ""
    """Global Value Model from gvm_td.py for `--decode` best-of and guided: a hub id or folder with the policies'
    tokenizer. `reviews` is the embedded one."""
    best_of: int = 16
    """Responses that best-of samples for each that it keeps."""
    guide_candidates: int = 8
    """Tokens that guided re-weights at each step: the policy's likeliest. It draws no other."""
    guide_beta: float = 0.5
    """Guided: p is proportional to pi * exp(Q / beta), with Q in the GVM's units. `inf` does not re-weight."""
    log_odds: bool = False
    """Guided, for a GVM trained on +1 and -1: atanh(Q), half the log-odds of being the chosen answer, in place
    of Q."""
    rollout_engine: Literal["torch", "vllm"] = "torch"
    """Who samples. torch: our own loop; vllm: vLLM in each process, with the policy's weights copied into
    it."""
    vllm_cache_gb: float = 4.0
    """GiB of keys and values that vLLM reserves on each GPU, in addition to its copy of the weights."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Type that computes; auto is bf16 on a GPU and float32 on a CPU."""
    shard_size: int = 0
    """Number of ranks that a model is sharded over (HSDP: replicas of it across nodes). 0: all."""
    timeout_minutes: float = 60.0
    """Minutes after which a rank that waits for another gives up: longer than the slowest rollout, load or
    reward of one rank."""


# The prompts that the online scripts hold out of the embedded world.
RESPONSES_REVIEWS = dict(
    part="rl",
    prompts=96,
    reference="response",
    batch_size=96,
    max_prompt_length=16,
    max_response_length=32,
    temperature=1.0,
    reward=("assets.reviews:reward", "assets.reviews:grammatical"),
)


# What this command adds to a row: no columns of the data.
OURS = ("turns", "references", "sample")

# Columns of the table, and keys of a record, that decoding with a GVM adds.
OF_GVM = ("value", "kl")


# Flags that one --decode alone reads.
OF_DECODE = {
    "top_k": "sample",
    "top_p": "sample",
    "repetition_penalty": "sample",
    "best_of": "best-of",
    "guide_candidates": "guided",
    "guide_beta": "guided",
    "log_odds": "guided",
}


def short_names(models: tuple[str, ...]) -> list[str]:
    """`runs/x/model` is x, anything else its last part."""
    names = []
    for path in map(Path, models):
        run = path.parent.name if path.name == "model" else ""
        names.append(run or path.name)
    return names


def short_reward_names(rewards: tuple[str, ...]) -> list[str]:
    """The function's name of `module:function`; a reward model's as above."""
    names = []
    for reward in rewards:
        _, _, function = reward.partition(":")
        if function:
            names.append(function)
        else:
            names += short_names((reward,))
    return names


# --- prompts -------------------------------------------------------------------------------------------


def questions_of(row: dict) -> list[str | list[dict]]:
    """What the user says in a row, turn by turn: MT-bench's `turns` where the prompt is the first of them."""
    turns = row.get("turns")
    if isinstance(turns, list) and turns[0:1] == [row["prompt"]]:
        return turns
    return [row["prompt"]]


def read_questions(args: Responses) -> list[dict]:
    """One row per prompt, with `turns` (what the user says, one after another) and `references` (one per
    turn, None for none). Ends the run where turns are no texts, or where `--metrics` needs a reference that
    a row lacks."""
    compared = [name for name in args.metrics if name in WITH_REFERENCE]
    rows = read_rows(
        args.dataset,
        "sft" if args.reference == "response" else "prompts",
        split=args.split,
        columns=args.columns,
        part=args.part,
        split_seed=args.split_seed,
        skip_bad_rows=args.skip_bad_rows,
    )
    questions = {}  # prompt -> its first row: an sft data set may hold many answers to it
    for row in rows:
        turns = questions_of(row)
        if len(turns) > 1 and not all(isinstance(turn, str) for turn in turns):
            fail(f"{args.dataset}, row {row['row']}: turns must be a list of texts")
        references = row.get(args.reference)
        if not isinstance(references, list):
            references = [references]
        one_each = len(references) == len(turns)
        all_texts = all(isinstance(text, str) and text.strip() for text in references)
        if compared and not (one_each and all_texts):
            where = f"{args.dataset}, row {row['row']}: no text in the column {args.reference!r}"
            fail(f"{where}, with which --metrics {compared[0]} compares; name yours with --reference")
        if not one_each:
            references = [None] * len(turns)
        key = prompt_key(row["prompt"])
        if key not in questions:
            questions[key] = {**row, "turns": turns, "references": references}
    questions = list(questions.values())
    if args.prompts:
        _, questions = hold_out_prompts(questions, args.prompts, args.split_seed)
    return questions


def with_system_prompt(args: Responses, row: dict) -> dict:
    """The row with `--system-prompt` as the first message of its prompt. Ends the run where one is there."""
    messages = templates.as_messages(row["prompt"])
    for message in messages:
        if message["role"] in ("system", "developer"):
            fail(
                f"{args.dataset}, row {row['row']}: it has a {message['role']} message; leave out --system-prompt"
            )
    return row | {"prompt": [{"role": "system", "content": args.system_prompt}, *messages]}


def check_system_prompt(tokenizer, name: str, text: str) -> None:
    """Ends with one line where the model `name` has no chat template, or one that refuses a system message,
    leaves it out, alters it, or writes it as if another had said it."""
    if not tokenizer.chat_template:
        fail(f"--system-prompt: {name} has no chat template, which would write it")
    question = {"role": "user", "content": "?"}
    for content in (templates.PROBE, text):  # the text may by chance stand in a default of the template
        conversation = [{"role": "system", "content": content}, question]
        try:
            written = templates.opening(tokenizer, conversation)
        except ValueError as error:
            fail(f"--system-prompt: {name}: {error}")
        for role in ("user", "assistant"):
            conversation[0] = {"role": role, "content": content}
            try:
                same = templates.opening(tokenizer, conversation) == written
            except ValueError:  # many want user and assistant by turns
                same = False
            if same:
                fail(f"--system-prompt: {name}: its chat template writes a system message as the {role}'s")


# --- what is there already -----------------------------------------------------------------------------


def keep_whole_batches(
    folder: Path, settings: dict, batches: list[list[dict]], overwrite: bool
) -> tuple[list[dict], int]:
    """(records, number of batches) of the whole batches that `folder` holds; what a kill left of the next
    one is cut off the file. Ends the run where the file was made with other settings, unless `overwrite`."""
    make_folder(folder)
    file = folder / "responses.jsonl"
    settings_file = folder / "settings.json"

    lines = []
    if file.exists() and not overwrite:
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = text.split("\n")[:-1]  # a line without its end was torn by a kill
    before = {}
    if settings_file.exists():
        before = json.loads(settings_file.read_text())
    changed = []
    for key in {**before, **settings}:
        if before.get(key) != settings.get(key):
            changed.append(f"{key} {before.get(key)} -> {settings.get(key)}")
    if lines and changed:
        hint = "--overwrite replaces them, --run-dir chooses another folder"
        fail(f"{file} holds responses made with other settings ({', '.join(changed)}): {hint}")

    asked = []  # (row, turn) of each record in the whole batches
    whole = 0
    for batch in batches:
        asked_in_batch = [(row, turn) for row in batch for turn in range(len(row["turns"]))]
        if len(asked) + len(asked_in_batch) > len(lines):
            break
        asked += asked_in_batch
        whole += 1
    records = []
    for line, (row, turn) in zip(lines[: len(asked)], asked, strict=True):
        record = json.loads(line)
        record["reference"] = row["references"][turn]  # another --reference needs no new responses
        records.append(record)

    # Written under another name and then renamed: a kill in between loses nothing.
    new_file = folder / "responses.part"
    new_file.write_text(json_lines(records), encoding="utf-8")
    new_file.rename(file)
    # The settings come last: a kill before this line leaves no old response under new settings.
    settings_file.write_text(json.dumps(settings, indent=1))
    return records, whole


def json_lines(rows: list[dict]) -> str:
    """The rows as JSON, one per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- what is generated ---------------------------------------------------------------------------------


def decode(
    policy, gvm, tokenizer, prompt_ids: list[list[int]], args: Responses, seed: tuple[int, int]
) -> tuple[list[list[int]], list[dict]]:
    """A response to each prompt by `--decode`, and what its record says besides: with a GVM its `value`, Q at
    the last token, and its `kl` from the policy."""
    limit = args.max_response_length
    if args.decode == "sample":
        filters = filters_of(args)
        responses, _ = rollout(policy, tokenizer, prompt_ids, limit, args.temperature, seed, filters=filters)
        return responses, [{} for _ in responses]
    if args.decode == "best-of":
        found = decoding.best_of(
            policy,
            gvm,
            tokenizer,
            prompt_ids,
            args.best_of,
            limit,
            args.temperature,
            seed,
            args.micro_batch_size,
        )
    else:
        guide = decoding.Guide(gvm, args.guide_candidates, args.guide_beta, args.log_odds)
        found = decoding.guided(policy, guide, tokenizer, prompt_ids, limit, args.temperature, seed)
    more = [{"value": decoded.value, "kl": decoded.kl} for decoded in found]
    return [decoded.tokens for decoded in found], more


def filters_of(args: Responses) -> Filters | None:
    """What `--top-k`, `--top-p` and `--repetition-penalty` ask for; None where they change nothing."""
    filters = Filters(args.top_k, args.top_p, args.repetition_penalty)
    return None if filters == Filters() else filters


def answer(policy, gvm, tokenizer, batch: list[dict], name: str, args: Responses, number: int) -> list[dict]:
    """Records of batch `number`, row by row and turn by turn. Each turn goes on top of the model's own
    answers to the turns before. `gvm` decodes with the policy, None without. `name` is the policy's, in the
    records."""
    prompts = [row["prompt"] for row in batch]  # of the present turn: a text, or the messages so far
    records = [[] for _ in batch]  # of each row, one per turn
    # A response ended by itself where its last token is the template's end of an answer, or the tokenizer's.
    stops = stop_tokens(tokenizer)
    most_turns = max(len(row["turns"]) for row in batch)
    for turn in range(most_turns):
        asked = [i for i, row in enumerate(batch) if turn < len(row["turns"])]
        if turn > 0:
            for i in asked:
                said = templates.as_messages(prompts[i])  # the first question may be a text
                reply = {"role": "assistant", "content": records[i][-1]["response"]}
                question = {"role": "user", "content": batch[i]["turns"][turn]}
                prompts[i] = [*said, reply, question]
        try:
            prompt_ids = [encode_prompt(tokenizer, prompts[i], batch[i].get("tools")) for i in asked]
        except ValueError as error:  # the first turns have been tried
            fail(f"{name}: turn {turn + 1} of a question: {error}")
        longest = longest_of((), prompt_ids, args.max_response_length)
        positions.check(policy, name, longest)
        if gvm is not None:
            positions.check(gvm, args.gvm, longest)
        seed = (args.seed, 1000 * number + turn)  # no question has 1000 turns: other numbers for each call
        responses, more = decode(policy, gvm, tokenizer, prompt_ids, args, seed)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        for i, response, text, of_gvm in zip(asked, responses, texts, more, strict=True):
            record = {
                "row": batch[i]["row"],
                "turn": turn,
                "sample": batch[i]["sample"],
                "prompt": prompts[i],
                "response": text,
                "model": name,
                "length": len(response),
                "truncated": response[-1] not in stops,
                "reference": batch[i]["references"][turn],
                **of_gvm,
            }
            records[i].append(record)
    return [record for of_row in records for record in of_row]


def generate(
    policy_folder: str,
    tokenizer,
    batches: list[list[dict]],
    whole: int,
    name: str,
    args: Responses,
) -> list[dict]:
    """Records of all batches but the first `whole`, each batch appended to responses.jsonl when it is done.
    Loads no model where nothing is left to do."""
    if whole == len(batches):
        return []
    first_rank = distributed.rank() == 0
    rows = [row for batch in batches for row in batch]
    asked = [encode_prompt(tokenizer, row["prompt"], row.get("tools")) for row in rows]
    longest = longest_of(
        (), asked, args.max_response_length
    )  # of the first turn; `answer` looks at the others
    policy = load_model("policy", policy_folder, tokenizer, args, trained=False, longest=longest)
    if args.rollout_engine == "vllm":
        policy.engine = vllm.Engine(policy, policy_folder, args)  # where rollout looks for it
        check_sampler(policy, tokenizer, asked, args.max_response_length, 1.0)
    gvm = None
    if args.gvm:
        gvm_folder = resolve(args.gvm, "value")
        gvm = load_model("value", gvm_folder, tokenizer, args, trained=False, longest=longest)
        if args.decode == "guided":
            decoding.check_guide(gvm, args.gvm, tokenizer)
    records = []
    for number in tqdm(range(whole, len(batches)), desc=name, disable=None if first_rank else True):
        of_batch = answer(policy, gvm, tokenizer, batches[number], name, args, number)
        records += of_batch
        if first_rank:
            # Opened for each batch: closing it leaves nothing in a buffer that a kill could lose.
            with open(Path(args.run_dir, name, "responses.jsonl"), "a", encoding="utf-8") as file:
                file.write(json_lines(of_batch))
    return records


# --- what is written -----------------------------------------------------------------------------------


def export_scored(
    folder: Path, name: str, asked: list[dict], records: list[dict], scores: dict[str, list[float]]
) -> None:
    """Writes scored.jsonl, data that rpo.py, dro.py and gvm_td.py train on. `reward` is the score of the first
    --reward, `rewards` has all by name; what the rows `asked` have besides about their prompts (tools, a
    solution) stays."""
    rows = []
    for i, (row, record) in enumerate(zip(asked, records, strict=True)):
        columns = columns_of_prompt(row)
        columns = {key: value for key, value in columns.items() if key not in (*TOKENS, *OURS)}
        of_record = {reward: values[i] for reward, values in scores.items()}
        first = next(iter(of_record.values()))
        scored = {
            **columns,
            "prompt": record["prompt"],
            "response": record["response"],
            "reward": first,
            "policy": name,
            "rewards": of_record,
            "truncated": record["truncated"],
        }
        rows.append(scored)
    (folder / "scored.jsonl").write_text(json_lines(rows), encoding="utf-8")


def with_interval(number: dict) -> str:
    """A cell of the table: mean ± half of the 95 % interval, where there is one."""
    ci95 = number["ci95"] or 0.0
    if ci95 <= 1e-9 * abs(number["mean"]):  # none, or rounding: all values are equal
        return f"{number['mean']:.4g}"
    return f"{number['mean']:.4g} ± {number['ci95']:.2g}"


def table(numbers: dict[str, dict[str, dict]]) -> str:
    """A markdown table with a row per model. `numbers`: model -> column -> mean, ci95 and n."""
    first = next(iter(numbers.values()))
    columns = list(first)
    rows = []
    for name, of_model in numbers.items():
        cells = [with_interval(of_model[column]) for column in columns]
        rows.append([name, str(of_model["length"]["n"]), *cells])
    return markdown(["model", "n", *columns], rows)


# --- the command ---------------------------------------------------------------------------------------


def check_arguments(args: Responses, names: list[str], reward_names: list[str]) -> None:
    """Ends the run where models or columns of the table cannot be told apart, or --samples or the flags of
    --decode say nothing. That each number is in its range, `common.cli.parse` has checked."""
    distinct = len(set(names)) == len(names)
    slash = any("/" in name for name in names)  # a name is also a folder's
    if not args.models or len(names) != len(args.models) or not distinct or slash:
        count = f"--models: {len(args.models)} models with the names {', '.join(names)}"
        fail(f"{count}; give each its own with --names")
    if args.samples > 1 and not args.temperature:
        fail(f"--samples {args.samples} would be the same response each time: give a --temperature above 0")
    vllm.check(args)
    check_decoding(args)
    check_filters(args)
    of_gvm = OF_GVM if args.gvm else ()
    at_k = pass_at_k.check(args)
    columns = [
        "length",
        "characters",
        "truncated",
        "distinct_2",
        *of_gvm,
        *reward_names,
        *at_k,
        *args.metrics,
    ]
    if len(set(columns)) < len(columns):
        fail(
            f"--reward, --metrics, --pass-at, --maj-at: two columns of the same name among {', '.join(columns)}"
        )


def check_decoding(args: Responses) -> None:
    """Ends the run where --decode lacks what it needs, or a flag belongs to another --decode."""
    if args.decode == "sample" and args.gvm:
        fail(f"--gvm {args.gvm} is read by --decode best-of and guided alone; name one of them")
    if args.decode != "sample" and not args.gvm:
        fail(f"--decode {args.decode} needs the value model: --gvm")
    for name, decode in OF_DECODE.items():
        if args.decode != decode and getattr(args, name) != getattr(Responses, name):
            fail(f"--{name.replace('_', '-')} is for --decode {decode}; --decode is {args.decode}")
    if args.decode == "guided" and args.rollout_engine == "vllm":
        fail("--decode guided samples with our own loop: leave out --rollout-engine vllm")
    if args.decode == "best-of" and args.best_of > 1 and not args.temperature:
        fail(f"--best-of {args.best_of} would choose among equal responses: give a --temperature above 0")


def check_filters(args: Responses) -> None:
    """Ends the run where a filter of what is sampled would not be read by greedy answers."""
    for name in ("top_k", "top_p"):
        if getattr(args, name) != getattr(Responses, name) and not args.temperature:
            flag = name.replace("_", "-")
            fail(f"--{flag} changes nothing of greedy answers: give a --temperature above 0, or leave it out")


def generation_settings(args: Responses) -> dict:
    """What responses depend on besides weights and prompts."""
    settings = {
        "max_response_length": args.max_response_length,
        "precision": str(distributed.dtypes(args.precision)[0]),
        "temperature": args.temperature,
    }
    if args.temperature:  # a greedy response depends on neither
        settings["seed"] = args.seed
        settings["batch_size"] = args.batch_size
    if args.samples > 1:
        settings["samples"] = args.samples
    if args.rollout_engine != "torch":
        settings["rollout_engine"] = args.rollout_engine
    for name in ("system_prompt", "top_k", "top_p", "repetition_penalty"):
        if getattr(args, name) != getattr(Responses, name):
            settings[name] = getattr(args, name)
    if args.decode != "sample":
        settings["decode"] = args.decode
    if args.decode == "best-of":
        settings["best_of"] = args.best_of
    if args.decode == "guided":
        settings["guide_candidates"] = args.guide_candidates
        settings["guide_beta"] = args.guide_beta
        settings["log_odds"] = args.log_odds
    return settings


def responses(args: Responses) -> None:
    """The policies answer one after another, then what they wrote is measured and shown."""
    # --- setup: all that can be wrong without a model
    first_rank = distributed.rank() == 0
    names = args.names or short_names(args.models)
    reward_names = short_reward_names(args.reward)
    check_arguments(args, names, reward_names)
    text_metrics.check(args.metrics, args)
    folders = [resolve(model) for model in args.models]
    tokenizers = [load_tokenizer(folder, args.template_arguments) for folder in folders]
    if args.system_prompt:
        for name, tokenizer in zip(names, tokenizers, strict=True):
            check_system_prompt(tokenizer, name, args.system_prompt)
    if args.gvm:
        gvm_folder = resolve(args.gvm, "value")
        decoding.check_gvm_config(gvm_folder, args.log_odds)
        for tokenizer in tokenizers:
            require_same_tokenizer(tokenizer, gvm_folder, "--gvm")

    # --- data
    rows = read_questions(args)
    if args.system_prompt:
        rows = [with_system_prompt(args, row) for row in rows]
    for name, tokenizer in zip(names, tokenizers, strict=True):
        # A prompt that is too long for one of the models is asked of none: they answer the same prompts.
        what = f"{args.dataset}, tokens of {name}"
        rows = tokenize(rows, tokenizer, (), args.max_prompt_length, 1, what, args.skip_bad_rows)
    rows = [row | {"sample": sample} for row in rows for sample in range(args.samples)]
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]

    # --- what is there already: rank 0 reads and cuts the files, the others hear of it
    settings = generation_settings(args)
    kept = []  # of each model: (records, number of whole batches)
    if first_rank:
        lock(Path(args.run_dir))
        of_gvm = {"gvm": fingerprint(gvm_folder)} if args.gvm else {}
        for name, folder, tokenizer in zip(names, folders, tokenizers, strict=True):
            prompts = []
            for row in rows:
                prompts.append([encode_prompt(tokenizer, row["prompt"], row.get("tools")), row["turns"]])
            made_with = {
                "weights": fingerprint(folder),
                "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
                **of_gvm,
                **settings,
            }
            kept.append(keep_whole_batches(Path(args.run_dir, name), made_with, batches, args.overwrite))
    kept = distributed.all_gather_object(kept)[0]
    unfinished = [name for name, (_, whole) in zip(names, kept, strict=True) if whole < len(batches)]
    if args.rollout_engine == "vllm" and len(unfinished) > 1:
        # measured: a second engine in one process finds the first one's weights and cache still in memory
        fail(
            f"--rollout-engine vllm keeps its memory until the process ends, and {', '.join(unfinished)} have "
            "answers to give: one of them per command; the last, with all --models, shows the table of all"
        )

    # --- models that score
    # A reward model reads the text by its own template, never a policy's tokens: then its scores are the same
    # numbers for policies of any tokenizer.
    rewards = [Reward(name, tokenizers[0], args, rows) for name in args.reward]

    # --- rollout and reward
    exported = rows  # alpaca_eval looks a question up by its text, to which no system message belongs
    if args.system_prompt:
        exported = [row | {"prompt": row["prompt"][1:]} for row in rows]
    row_of_record = [row for row in rows for _ in row["turns"]]
    # turns and samples of one question are not independent of each other
    questions = [i // args.samples for i, row in enumerate(rows) for _ in row["turns"]]
    numbers = {}  # model -> column -> mean, ci95 and n over its responses
    texts = {}  # model -> what it wrote
    references = {}
    for name, folder, tokenizer, kept_of_model in zip(names, folders, tokenizers, kept, strict=True):
        records, whole = kept_of_model
        records += generate(folder, tokenizer, batches, whole, name, args)
        gc.collect()  # sharded modules are in reference cycles: the policy goes before the next one comes
        if first_rank:
            export(Path(args.run_dir, name), name, exported, records, args.dataset)
        texts[name] = [record["response"] for record in records]
        references[name] = [record["reference"] for record in records]
        numbers[name] = {
            "length": mean([record["length"] for record in records], questions=questions),
            "characters": mean([len(text) for text in texts[name]], questions=questions),
            "truncated": mean([record["truncated"] for record in records], questions=questions),
            "distinct_2": mean([distinct_2([text]) for text in texts[name]], questions=questions),
        }
        if args.gvm:
            for column in OF_GVM:
                numbers[name][column] = mean([record[column] for record in records], questions=questions)
        asked = []  # the row of each record, with the conversation that was answered as its prompt
        for row, record in zip(row_of_record, records, strict=True):
            asked.append(row | {"prompt": record["prompt"]})
        # of tokens a reward asks for the last alone, which says whether a response ended
        end = [tokenizers[0].eos_token_id]
        ended = [([], [] if record["truncated"] else end) for record in records]
        scores = {}  # reward -> one number per record
        for reward_name, reward in zip(reward_names, rewards, strict=True):
            scores[reward_name] = reward(asked, ended, texts[name]).tolist()
            numbers[name][reward_name] = mean(scores[reward_name], reward.name, questions)
        if scores:
            first = scores[reward_names[0]]
            numbers[name] |= pass_at_k.columns(records, first, questions, name, args)
        if scores and first_rank:
            export_scored(Path(args.run_dir, name), name, asked, records, scores)

    # --- text metrics and save: the other ranks need not wait for what rank 0 computes alone
    if not first_rank:
        return
    for name in names:
        for metric in args.metrics:
            measure = text_metrics.METRICS[metric]
            numbers[name][metric] = measure(texts[name], references[name], args, questions)
    result = {
        "dataset": args.dataset,
        "paths": dict(zip(names, args.models, strict=True)),
        "gvm": args.gvm,
        **settings,
        "models": numbers,
    }
    Path(args.run_dir, "responses.json").write_text(json.dumps(result, indent=1))
    note(table(numbers))
