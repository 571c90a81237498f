"""`evaluate.py length_controlled`: AlpacaEval 2's length-controlled win rate (2404.04475), from verdicts that are there.

The regression is alpaca_eval's own. It takes the difficulty of an instruction by its number among AlpacaEval's
805, so the work here is to give each pair the right number, and to refuse a prompt that has none.
docs/evaluate_benchmarks.md has the commands."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, make_folder, note
from common.data import Unreadable, read_file
from common.formats import is_finite_number

DATA = "tatsu-lab/alpaca_eval"  # a data set of the hub
# The 805 instructions in their order, with the reference's answers.
REFERENCE = "alpaca_eval_gpt4_baseline.json"
# What the regression reads besides the verdicts: the difficulties, and annotations that regularise it.
DIFFICULTIES = "df_gamed.csv"


@dataclass
class LengthControlled:
    """AlpacaEval 2's length-controlled win rate from verdicts that are there. It asks no judge."""

    judged: str
    """`results.jsonl` of `evaluate.py judge`, pairwise, with the model's file first and the reference's second;
    or `annotations.json` of alpaca_eval."""
    run_dir: str = "runs/length_controlled"
    """Folder of length_controlled.json and annotations.json."""


def pair_of(row: dict) -> dict | None:
    """A row of our results.jsonl or of alpaca_eval's annotations.json in the columns of the latter; None where it
    is neither. Scores (`--mode score`) and comparisons of more than two answers are neither."""
    if "preference" in row:
        columns = ("instruction", "output_1", "output_2", "preference")
        pair = {column: row.get(column) for column in columns}
        if pair["preference"] == 0:  # its older form of a draw
            pair["preference"] = 1.5
        pair["generator_1"] = row.get("generator_1") or "reference"
        pair["generator_2"] = row.get("generator_2") or "model"
        pair["annotator"] = row.get("annotator") or "judge"
        return pair
    responses = row.get("responses")
    if "points" not in row or not isinstance(responses, list) or len(responses) != 2:
        return None
    files = row.get("files", ("model", "reference"))
    if not isinstance(files, list | tuple) or len(files) != 2:
        return None
    model, reference = files
    points = row["points"]
    return {
        "instruction": row.get("prompt"),
        "output_1": responses[1],
        "output_2": responses[0],
        "preference": 1 + points if is_finite_number(points) else points,
        "generator_1": reference,
        "generator_2": model,
        "annotator": row.get("judge", "judge"),
    }


def read_pairs(file: str) -> dict[tuple[str, str, str], list[dict]]:
    """(judge, model, reference) -> its judged pairs, as alpaca_eval has them: `instruction`, `output_1` (the
    reference's), `output_2` (the model's) and `preference`, from 1 (the reference's is better) to 2 (the model's
    is better), None where the judge gave no verdict. Ends the run at a row that is no such pair."""
    if not Path(file).is_file():
        fail(f"--judged {file}: no such file")
    groups = {}
    for number, row in enumerate(read_file(file, ""), 1):
        where = f"--judged {file}, row {number}"
        if not isinstance(row, dict):
            fail(f"{where}: {row if isinstance(row, Unreadable) else 'no object with named columns'}")
        pair = pair_of(row)
        if pair is None:
            fail(f"{where}: no pair with points (evaluate.py judge) and none with a preference (alpaca_eval)")
        texts = (pair["instruction"], pair["output_1"], pair["output_2"])
        if not all(isinstance(text, str) for text in texts):
            fail(f"{where}: instruction and both answers must be texts")
        preference = pair["preference"]
        in_range = is_finite_number(preference) and 1 <= preference <= 2
        if preference is not None and not in_range:
            fail(f"{where}: the preference is {repr(preference)[:40]}, not from 1 to 2")
        name = (pair["annotator"], pair["generator_2"], pair["generator_1"])
        if not all(isinstance(each, str) for each in name):
            fail(f"{where}: the names of the judge and of both models must be texts")
        groups.setdefault(name, []).append(pair)
    return groups


def number_pairs(pairs: list[dict], reference: list[dict]) -> list[tuple[int, dict]]:
    """(number of the instruction among AlpacaEval's, pair), in the order of the numbers. `reference`: AlpacaEval's
    rows in their order, with `instruction` and `output`. Ends the run where a prompt is not AlpacaEval's, where no
    pair has a verdict, or where the answers say nothing of length."""
    numbers_of = {}  # instruction -> its numbers, one per time that AlpacaEval has it
    for number, row in enumerate(reference):
        numbers_of.setdefault(row["instruction"], []).append(number)
    unknown = [pair["instruction"] for pair in pairs if pair["instruction"] not in numbers_of]
    if unknown:
        first = " ".join(unknown[0].split())[:60]
        why = "the regression needs the difficulty of each, known for AlpacaEval's own instructions alone"
        fail(f"{len(unknown)} of {len(pairs)} prompts are not AlpacaEval's ({first!r}): {why}")
    missing = sum(pair["preference"] is None for pair in pairs)
    if missing == len(pairs):
        fail(f"none of {len(pairs)} pairs has a verdict")
    if missing:
        what = f"{missing} of {len(pairs)} pairs have no verdict"
        note(
            f"{what}: not in the win rate; the length-controlled rate has what the regression predicts for them"
        )
    differences = {len(pair["output_1"]) - len(pair["output_2"]) for pair in pairs}
    if len(differences) < 2:
        # The package divides by the standard deviation of the differences.
        fail(f"{len(pairs)} pairs, all with the same difference of length: nothing to control for")

    numbered = []
    others = 0
    for pair in pairs:
        numbers = numbers_of[pair["instruction"]]
        if not numbers:
            first = " ".join(pair["instruction"].split())[:60]
            fail(f"{first!r} is judged more than once by one judge against one opponent")
        number = numbers.pop(0)
        others += pair["output_1"] != reference[number]["output"]
        numbered.append((number, pair))
    if others:
        what = f"{others} of {len(pairs)} answers of the reference are not AlpacaEval 2's ({REFERENCE})"
        note(f"{what}: the rate is against another opponent, not comparable with the leaderboard's")
    if len(pairs) < len(reference):
        note(f"{len(pairs)} of AlpacaEval's {len(reference)} instructions")
    # The folds of the regression's cross-validation depend on the order.
    return sorted(numbered, key=lambda item: item[0])


def read_hub_file(name: str) -> str:
    """Path of a file of AlpacaEval's data set; without a network (HF_HUB_OFFLINE=1) from the hub's cache."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(DATA, name, repo_type="dataset")
    except OSError:
        command = f"hf download {DATA} {name} --repo-type dataset"
        fail(f"{name} is not in the hub's cache and the hub cannot be reached; where it can: {command}")


def length_controlled(args: LengthControlled) -> None:
    """Reads the verdicts, lets alpaca_eval compute, says and saves its numbers."""
    # --- data
    groups = read_pairs(args.judged)
    if not groups:
        fail(f"--judged {args.judged}: no rows")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pkg_resources, which alpaca_eval imports
            import pandas
            from alpaca_eval.metrics import get_length_controlled_winrate
    except ImportError as error:
        # alpaca_eval 0.6.6 needs pkg_resources, which later setuptools do not have.
        command = 'pip install alpaca_eval==0.6.6 "setuptools<81"'
        fail(f"evaluate.py length_controlled needs the package: {command} ({error})")
    reference = json.loads(Path(read_hub_file(REFERENCE)).read_text(encoding="utf-8"))
    read_hub_file(DIFFICULTIES)  # the package fetches it again, from the cache

    # --- regression
    rates = []
    annotations = []
    for (judge, model, opponent), pairs in groups.items():
        if len(groups) > 1:
            note(f"{model} against {opponent}, by {judge}:")
        numbered = number_pairs(pairs, reference)
        numbers = [number for number, _ in numbered]
        # Its index is where the package looks for the number of an instruction.
        table = pandas.DataFrame([pair for _, pair in numbered], index=numbers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # scikit-learn's, of the package's arguments
            found = get_length_controlled_winrate(table, save_weights_dir=None)
        found = {key: float(value) for key, value in found.items()}
        rates.append({"judge": judge, "model": model, "reference": opponent, **found})
        lc_rate = (
            f"{found['length_controlled_winrate']:.2f} (standard error {found['lc_standard_error']:.2f})"
        )
        win_rate = f"{found['win_rate']:.2f} (standard error {found['standard_error']:.2f})"
        note(f"length-controlled win rate {lc_rate}, win rate {win_rate}, {len(pairs)} pairs")
        predicted = table["glm_preference"].tolist()  # the package adds it
        for (number, pair), glm_preference in zip(numbered, predicted, strict=True):
            annotations.append({**pair, "glm_preference": glm_preference, "number": number})

    # --- save
    folder = Path(args.run_dir)
    make_folder(folder)
    text = json.dumps({"judged": args.judged, "rates": rates}, indent=1)
    (folder / "length_controlled.json").write_text(text + "\n", encoding="utf-8")
    text = json.dumps(annotations, indent=1, ensure_ascii=False)
    (folder / "annotations.json").write_text(text + "\n", encoding="utf-8")
