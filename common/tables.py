"""Markdown tables, as the commands print them and the pages show them."""

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table without a line break after it: the head, the line under it, a line for each row.

    A cell may be anything with a `str`. Its line breaks become spaces and its pipes are escaped, so that neither
    ends the cell: names of models, prompts and answers are other people's text.
    """
    lines = [line_of(head), "|" + " --- |" * len(head)]
    lines += [line_of(row) for row in rows]
    return "\n".join(lines)


def line_of(cells: Sequence[object]) -> str:
    """One row."""
    texts = []
    for cell in cells:
        text = " ".join(str(cell).splitlines())
        texts.append(text.replace("|", "\\|"))
    return "| " + " | ".join(texts) + " |"
