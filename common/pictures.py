"""Token values in colour, as 2502.16944 Figure 3: for a terminal, as a page and as a picture (matplotlib)."""

import html
import os
import sys
from pathlib import Path

RED = (230, 90, 80)
WHITE = (250, 250, 245)
GREEN = (80, 175, 95)
WIDTH = 90  # characters in a line of the picture
STYLE = "body{font:16px/2 monospace;max-width:60em;margin:2em auto} span{white-space:pre-wrap}"

BROKEN = "\ufffd"  # what bytes that are no whole character are decoded to
LONGEST_CHARACTER = 4  # bytes, in UTF-8
SCALE = 9  # cells of the scale under a picture

Rgb = tuple[int, int, int]
Cell = tuple[str, float, Rgb]  # a token, its value, its colour


def valued_texts(tokenizer, ids: list[int], values: list[float]) -> list[tuple[str, float]]:
    """(text, value) of each token of a response. Tokens that are bytes of one character are one text, with
    the value of the last of them, which completes it."""
    found = []
    waiting = []  # tokens whose text is no whole character yet
    written = ""  # the text of those before
    for i, (token, value) in enumerate(zip(ids, values, strict=True), 1):
        waiting.append(token)
        text = tokenizer.decode(ids[:i])
        incomplete = text.endswith(BROKEN) and len(waiting) < LONGEST_CHARACTER and i < len(ids)
        if incomplete:
            continue
        # a tokenizer may clean up spaces before a later token: then its own text stands for it
        piece = text[len(written) :] if text.startswith(written) else tokenizer.decode(waiting)
        found.append((piece, value))
        waiting = []
        written = text
    return found


def colour(value: float, low: float, high: float) -> Rgb:
    """Red at `low`, white in the middle, green at `high`."""
    if high <= low:
        x = 0.5
    else:
        x = min(1.0, max(0.0, (value - low) / (high - low)))
    if x < 0.5:
        return mix(RED, WHITE, 2 * x)
    return mix(WHITE, GREEN, 2 * x - 1)


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """`a` at a share of 0, `b` at 1."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


def draw_values(texts: list[tuple[str, list[tuple[str, float]]]], path: str) -> str:
    """Colours each token by its value, as 2502.16944 Figure 3: a page, a picture, text for the terminal.

    Writes path.html and path.png, returns the third, without colours the titles alone.

    `texts` holds (title, `valued_texts`); the scale runs from the lowest value (red) to the highest (green) of
    them all.
    """
    everything = [value for _, valued in texts for _, value in valued]
    low = min(everything)
    high = max(everything)
    coloured = []  # (title, cells)
    for title, valued in texts:
        cells = [(text, value, colour(value, low, high)) for text, value in valued]
        ends = f"   first {valued[0][1]:.3g}, last {valued[-1][1]:.3g}" if valued else ""
        coloured.append((title + ends, cells))
    Path(f"{path}.html").write_text(as_page(coloured, low, high), encoding="utf-8")
    draw_picture([*coloured, scale(low, high)], f"{path}.png")
    if shows_colours():
        return as_terminal(coloured)
    titles = [title for title, _ in coloured]
    return "\n".join([*titles, f"each token with its value: {path}.html and {path}.png"])


def scale(low: float, high: float) -> tuple[str, list[Cell]]:
    """Numbers in their colours, from the lowest to the highest."""
    numbers = [low + (high - low) * i / (SCALE - 1) for i in range(SCALE)]
    return "scale", [(f" {number:.3g} ", number, colour(number, low, high)) for number in numbers]


def shows_colours() -> bool:
    """Whether the output is a terminal, and its user does not ask for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def visible(text: str) -> str:
    """The text with its control characters as escapes: a token must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def as_terminal(coloured: list[tuple[str, list[Cell]]]) -> str:
    """Black text on coloured ground, by a terminal's escape sequences."""
    blocks = []
    for title, cells in coloured:
        text = "".join(
            f"\033[48;2;{r};{g};{b};38;2;0;0;0m{visible(token)}\033[0m" for token, _, (r, g, b) in cells
        )
        blocks.append(f"{visible(title)}\n{text}")
    return "\n".join(blocks)


def as_page(coloured: list[tuple[str, list[Cell]]], low: float, high: float) -> str:
    """An HTML page; hovering over a token shows its value."""
    page = [
        f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style>',
        f"<p>red {low:.2f} to green {high:.2f}; hover for the value</p>",
    ]
    for title, cells in coloured:
        spans = "".join(
            f'<span style="background:rgb{rgb}" title="{value:.3f}">{html.escape(token)}</span>'
            for token, value, rgb in cells
        )
        page.append(f"<h4>{html.escape(title)}</h4><p>{spans}</p>")
    return "".join(page)


def lines_of_cells(coloured: list[tuple[str, list[Cell]]]) -> list[list]:
    """Lines of (column, text, colour from 0 to 1 or None) of at most WIDTH characters: title, tokens."""
    lines = []
    for title, cells in coloured:
        lines.append([(0, title, None)])
        lines.append([])
        x = 0
        for token, _, rgb in cells:
            if x and x + len(token) > WIDTH:
                lines.append([])
                x = 0
            lines[-1].append((x, token.replace("\n", " "), tuple(v / 255 for v in rgb)))
            x += len(token)
    return lines


def draw_picture(coloured: list[tuple[str, list[Cell]]], path: str) -> None:
    """The same as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = lines_of_cells(coloured)
    figure = plt.figure(figsize=(WIDTH * 0.105, 0.32 * len(lines) + 0.2))
    for i, line in enumerate(lines):
        y = 1 - (i + 0.7) / (len(lines) + 0.5)
        for x, text, rgb in line:
            box = None
            weight = "bold"  # a title
            if rgb:
                box = dict(facecolor=rgb, edgecolor="none", pad=1.5)
                weight = None
            figure.text(
                0.01 + 0.98 * x / WIDTH,
                y,
                text,
                weight=weight,
                family="monospace",
                fontsize=11,
                va="center",
                parse_math=False,
                bbox=box,
            )
    figure.savefig(path, dpi=110)
    plt.close(figure)
