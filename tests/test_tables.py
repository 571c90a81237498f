"""Tables hold other people's text: names of models, prompts, answers."""

from common.tables import markdown
from evaluation import judge, responses, values

HOSTILE = "a|b\nc"


def cells_of(line: str) -> list[str]:
    """The cells of a line as Markdown reads them: an escaped pipe ends none."""
    return [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]


def assert_whole(text: str, columns: int, rows: int) -> None:
    lines = text.splitlines()
    assert len(lines) == rows + 2
    assert lines[1].replace(" ", "") == "|" + "---|" * columns
    assert all(len(cells_of(line)) == columns for line in lines)


def test_markdown():
    text = markdown(["", HOSTILE], [[1, None], [HOSTILE, 0.5]])
    assert text == "|  | a\\|b c |\n| --- | --- |\n| 1 | None |\n| a\\|b c | 0.5 |"
    assert markdown(["x"], []) == "| x |\n| --- |"
    assert_whole(text, columns=2, rows=2)


def test_no_name_breaks_a_table_of_a_command():
    number = {"mean": 0.5, "ci95": 0.1, "n": 4}
    of_models = {HOSTILE: {"length": number, "reward": number}, "b": {"length": number, "reward": number}}
    assert_whole(responses.table(of_models), columns=4, rows=2)

    comparison = {"first": HOSTILE, "second": HOSTILE, "ci95": [0.1, 0.2], "win_rate": 0.15, "judged": 3}
    judges = [{"judge": HOSTILE, "comparisons": [comparison, comparison]}]
    assert_whole(judge.win_rate_table(judges), columns=2, rows=2)

    shares = {"pairs": 3, "mean": 0.5, "last": 1.0}
    head, rows = values.accuracy_table({HOSTILE: {"all": shares, HOSTILE: shares}})
    assert_whole(markdown(head, rows), columns=2 + len(values.COLUMNS), rows=2)
