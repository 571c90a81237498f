"""`evaluate.py length_controlled`: AlpacaEval 2's length-controlled win rate (2404.04475), from verdicts that are there.

The regression is alpaca_eval's own. It takes the difficulty of an instruction by its number among AlpacaEval's
805, so the work here is to give each pair the right number, and to refuse a prompt that has none.
docs/evaluate_benchmarks.md has the commands."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, note
from common.data import Unreadable, read_file

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


def read_pairs(file: str) -> list[dict]:
    """One dict per judged pair: `instruction`, `output_1` (the reference's), `output_2` (the model's) and
    `preference`, from 1 (the reference's is better) to 2 (the model's is better); None where the judge gave no
    verdict. Ends the run at a row that is neither a pair of ours nor alpaca_eval's."""
    if not Path(file).is_file():
        fail(f"--judged {file}: no such file")
    pairs = []
    for number, row in enumerate(read_file(file, ""), 1):
        where = f"--judged {file}, row {number}"
        if not isinstance(row, dict):
            fail(f"{where}: {row if isinstance(row, Unreadable) else 'no object with named columns'}")
        if "preference" in row:  # alpaca_eval's
            pair = {key: row.get(key) for key in ("instruction", "output_1", "output_2", "preference")}
            if pair["preference"] == 0:  # its older form of a draw
                pair["preference"] = 1.5
        elif "points" in row and len(row.get("responses") or ()) == 2:
            model, reference = row["responses"]
            preference = None if row["points"] is None else 1 + row["points"]
            pair = {
                "instruction": row.get("prompt"),
                "output_1": reference,
                "output_2": model,
                "preference": preference,
            }
        else:
            fail(f"{where}: no pair with points (evaluate.py judge) and none with a preference (alpaca_eval)")
        texts = (pair["instruction"], pair["output_1"], pair["output_2"])
        if not all(isinstance(text, str) for text in texts):
            fail(f"{where}: instruction and both answers must be texts")
        preference = pair["preference"]
        if isinstance(preference, float) and math.isnan(preference):
            pair["preference"] = preference = None
        if preference is not None and not 1 <= preference <= 2:
            fail(f"{where}: the preference is {preference}, not from 1 to 2")
        pairs.append(pair)
    return pairs


def numbered_pairs(pairs: list[dict], reference: list[dict]) -> tuple[list[int], list[dict]]:
    """(number of each pair's instruction among AlpacaEval's, the pairs), in the order of the numbers.
    `reference`: AlpacaEval's rows in their order, with `instruction` and `output`. Ends the run where a prompt is
    not AlpacaEval's, where no pair has a verdict, or where the answers say nothing of length."""
    number_of = {}
    for number, row in enumerate(reference):
        number_of.setdefault(row["instruction"], number)
    unknown = [pair["instruction"] for pair in pairs if pair["instruction"] not in number_of]
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
    # The folds of the regression's cross-validation depend on the order.
    pairs = sorted(pairs, key=lambda pair: number_of[pair["instruction"]])
    numbers = [number_of[pair["instruction"]] for pair in pairs]
    others = 0
    for number, pair in zip(numbers, pairs, strict=True):
        others += pair["output_1"] != reference[number]["output"]
    if others:
        what = f"{others} of {len(pairs)} answers of the reference are not AlpacaEval 2's ({REFERENCE})"
        note(f"{what}: the rate is against another opponent, not comparable with the leaderboard's")
    if len(pairs) < len(reference):
        note(f"{len(pairs)} of AlpacaEval's {len(reference)} instructions")
    return numbers, pairs


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
    pairs = read_pairs(args.judged)
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
    numbers, pairs = numbered_pairs(pairs, reference)

    # --- regression
    # Its index is where the package looks for the number of an instruction.
    table = pandas.DataFrame(pairs, index=numbers)
    table["generator_1"] = "reference"
    table["generator_2"] = "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scikit-learn's, of the package's arguments
        found = get_length_controlled_winrate(table, save_weights_dir=None)
    found = {key: float(value) for key, value in found.items()}
    lc_rate = f"{found['length_controlled_winrate']:.2f} (standard error {found['lc_standard_error']:.2f})"
    win_rate = f"{found['win_rate']:.2f} (standard error {found['standard_error']:.2f})"
    note(f"length-controlled win rate {lc_rate}, win rate {win_rate}, {len(pairs)} pairs")

    # --- save
    folder = Path(args.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"judged": args.judged, **found}, indent=1)
    (folder / "length_controlled.json").write_text(text + "\n", encoding="utf-8")
    annotations = table.assign(number=numbers).to_dict(orient="records")
    for row in annotations:
        if math.isnan(row["preference"]):
            row["preference"] = None  # NaN is not JSON
    text = json.dumps(annotations, indent=1, ensure_ascii=False)
    (folder / "annotations.json").write_text(text + "\n", encoding="utf-8")
