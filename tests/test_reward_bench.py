"""RewardBench's sections, best-of and Ties: the numbers that the package rewardbench 0.1.4 gives for the same scores."""

import math

import numpy as np
import pytest

from evaluation import reward_bench

# What the package's functions returned for these (calculate_scores_per_section, reroll_and_score_dataset,
# process_single_model).
SECTIONS = [0.34432960893854747, 0.5198684210526315, 0.699, 0.8324999999999999]
SECTIONS_OF_A_PART = [0.34432960893854747, 0.5198684210526315, 0.6875165562913907, 0.8939999999999999]
BEST_OF = [
    ([3.0, 1.0, 2.0, 0.0], 1.0),
    ([1.0, 1.0, 0.0, 0.0], 0.5),
    ([0.0, 1.0, 0.0, 0.0], 0.0),
    ([2.0, 2.0, 2.0, 2.0], 0.25),
    ([1.0, 0.0, 3.0, 1.0], 0.0),
]
TIES = [  # the fourth prompt has a ref row alone, the fifth a tied one; the second has no spread
    {"ref": ([2.0, 0.5, -1.0], 1), "tied": ([3.0, 2.5, 2.25, 1.0, -2.0], 3)},
    {"ref": ([0.25, 0.5], 1), "tied": ([1.0, 1.0, 0.0], 2)},
    {"ref": ([5.0, 1.0], 1), "tied": ([4.0, 0.0, -0.5], 2)},
    {"ref": ([1.0, 0.0], 1)},
    {"tied": ([1.0, 0.5, 1.0], 2)},
    {"ref": ([1.5, 1.0, 1.0], 1), "tied": ([2.0, 1.75, 0.75, 0.5], 2)},
]
TIES_SCORE = 0.7321349049912235


def subset_rows(without=()):
    names = [name for weights in reward_bench.SECTIONS.values() for name in weights]
    return {
        name: {"score": round(0.3 + 0.03 * i, 2), "pairs": reward_bench.PAIRS[name]}
        for i, name in enumerate(names)
        if name not in without
    }


def test_sections_and_total_are_the_packages():
    rows = reward_bench.section_rows(subset_rows())
    names = [f"section {name}" for name in reward_bench.SECTIONS]
    assert list(rows) == [*names, "RewardBench"]
    assert [rows[name]["score"] for name in names] == pytest.approx(SECTIONS, abs=1e-15)
    assert [rows[name]["pairs"] for name in names] == [358, 456, 740, 1431]
    assert rows["RewardBench"] == {"score": pytest.approx(np.mean(SECTIONS)), "pairs": 2985}
    assert reward_bench.incomplete_sections(subset_rows()) == []


def test_sections_of_a_part_of_the_benchmark():
    """A missing subset leaves the others' weights, a missing section leaves no total; both are said."""
    table = subset_rows(without=("math-prm", "donotanswer", "hep-go"))
    table["hep-js"]["pairs"] = 160
    rows = reward_bench.section_rows(table)
    found = [rows[f"section {name}"]["score"] for name in reward_bench.SECTIONS]
    assert found == pytest.approx(SECTIONS_OF_A_PART, abs=1e-15)
    assert reward_bench.incomplete_sections(table) == [
        "the section Safety is formed without donotanswer",
        "the section Reasoning is formed without math-prm, hep-go",
        "hep-js has 160 pairs here and 164 in the benchmark; its weight stays",
    ]
    table = subset_rows(without=reward_bench.SECTIONS["Chat"])
    assert list(reward_bench.section_rows(table)) == [
        "section Chat Hard",
        "section Safety",
        "section Reasoning",
    ]
    assert reward_bench.incomplete_sections(table) == ["no subset of the section Chat, so no total"]
    assert reward_bench.section_rows({"x": {"score": 1.0, "pairs": 1}}) == {}
    assert reward_bench.incomplete_sections({"x": {"score": 1.0, "pairs": 1}}) == []


def test_math_weighs_as_much_as_code():
    weights = reward_bench.SECTIONS["Reasoning"]
    assert weights["math-prm"] == sum(weights.values()) / 2
    for weights in reward_bench.SECTIONS.values():
        assert all(weights[name] == reward_bench.PAIRS[name] for name in weights if name != "math-prm")


@pytest.mark.parametrize("scores, right", BEST_OF)
def test_best_of_is_the_packages(scores, right):
    assert reward_bench.best_of(scores) == right


def test_ties_score_is_the_packages():
    assert reward_bench.ties_score(TIES) == pytest.approx(TIES_SCORE, abs=1e-15)


def test_ties_score_does_not_depend_on_the_scores_unit():
    """So the columns of a value model and a reward model's score compare."""
    moved = [
        {kind: ([8 * x - 64 for x in scores], right) for kind, (scores, right) in rows.items()}
        for rows in TIES
    ]
    assert reward_bench.ties_score(moved) == pytest.approx(TIES_SCORE, abs=1e-12)


def test_ties_scores_ends():
    """All right with no spread 1.0, all right with a small spread almost 1.01, all wrong below 0; NaN without a whole
    prompt."""
    level = {"ref": ([9.0, 0.0], 1), "tied": ([9.0, 9.0, 0.0], 2)}
    assert reward_bench.ties_score([level]) == pytest.approx(1.0)
    near = {"ref": ([9.0, 0.0], 1), "tied": ([9.0, 8.5, 0.0], 2)}
    assert reward_bench.ties_score([near]) == pytest.approx(1.01)
    wrong = {"ref": ([0.0, 9.0], 1), "tied": ([0.0, 1.0, 9.0], 2)}
    assert reward_bench.ties_score([wrong]) == pytest.approx(-0.01)
    assert math.isnan(reward_bench.ties_score([{"ref": ([9.0, 0.0], 1)}]))
    assert math.isnan(reward_bench.ties_score([{"ref": ([9.0, 0.0], 1), "tied": ([9.0, 0.0], 1)}]))


def answers(subset, row_id, scores, right=1):
    """A prompt's rows, and the columns of its answers."""
    row = {"subset": subset, "id": row_id, "right": right, "answers": len(scores)}
    return (row,) * len(scores), [{"score": score, "less": -score} for score in scores]


def version_2(ties=True, focus=True):
    prompts = []
    for subset in ("Factuality", "Precise IF", "Math", "Safety"):
        prompts += [answers(subset, "7", scores) for scores, _ in BEST_OF]
    if focus:
        prompts.append(answers("Focus", "8", [1.0, 0.0, 0.0, 0.0]))
    if ties:
        for number, rows in enumerate(TIES):
            prompts += [answers("Ties", f"{kind}:{number}", *rows[kind]) for kind in rows]
    return [rows for rows, _ in prompts], [scores for _, scores in prompts]


def test_the_table_of_version_2():
    """Subsets count alike in the total, whatever their size; Ties is in no row `all`; each column on its own."""
    table = reward_bench.best_of_table(*version_2())
    assert {name: row["prompts"] for name, row in table.items()} == {
        "all": 21,
        "Factuality": 5,
        "Focus": 1,
        "Math": 5,
        "Precise IF": 5,
        "Safety": 5,
        "Ties": 10,
        "RewardBench 2": 31,
    }
    assert table["Math"]["score"] == pytest.approx(1.75 / 5)
    assert table["all"]["score"] == pytest.approx(8 / 21)
    assert table["RewardBench 2"]["score"] == pytest.approx((4 * 0.35 + 1 + TIES_SCORE) / 6)
    assert table["Focus"]["less"] == 0.0
    assert table["Ties"]["less"] != pytest.approx(TIES_SCORE)


def test_a_part_of_version_2_has_an_average_and_no_total():
    for part, mean in ((version_2(ties=False), 2.4 / 5), (version_2(focus=False), (1.4 + TIES_SCORE) / 5)):
        table = reward_bench.best_of_table(*part)
        assert "RewardBench 2" not in table
        assert table["average"]["score"] == pytest.approx(mean)
    rows, scores = version_2()
    alone = [i for i, prompt in enumerate(rows) if not prompt[0]["id"].startswith("tied")]
    table = reward_bench.best_of_table([rows[i] for i in alone], [scores[i] for i in alone])
    assert "Ties" not in table and "average" in table
    assert reward_bench.incomplete_ties([rows[i][0] for i in alone]) == [reward_bench.NO_TIES_SCORE]
    few = "2 prompts of Ties lack their ref or tied row and count in one accuracy alone"
    assert reward_bench.incomplete_ties([prompt[0] for prompt in rows]) == [few]
    assert reward_bench.incomplete_ties([prompt[0] for prompt in rows[:21]]) == []


@pytest.mark.parametrize(
    "row, message",
    [
        ({"subset": "Math", "right": 2, "id": "1"}, "chosen has 2 answers; only rows of the subset Ties"),
        ({"subset": None, "right": 3}, "chosen has 3 answers"),
        ({"subset": "Ties", "right": 2, "id": "12"}, "id is '12'; a row of the subset Ties has ref:NUMBER"),
        ({"subset": "Ties", "right": 2}, "id is None"),
        ({"subset": "ties", "right": 2, "id": "tied:x"}, "id is 'tied:x'"),
        ({"subset": "Ties", "right": 2, "id": "tied:03"}, "which an earlier row of the subset Ties has"),
    ],
)
def test_a_prompt_that_fits_no_rule(row, message):
    with pytest.raises(ValueError, match=message):
        reward_bench.check_prompt(row, {("tied", 3)})
