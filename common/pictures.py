"""Token values in colour, as 2502.16944 Figure 3: for a terminal, as a page and as a picture (matplotlib)."""

import html
from pathlib import Path


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text each token adds to the response."""
    texts = [tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
    return [b[len(a) :] for a, b in zip(texts, texts[1:], strict=False)]


def colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    """Red at `low`, white in the middle, green at `high`."""
    x = 0.5 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    red, white, green = (230, 90, 80), (250, 250, 245), (80, 175, 95)
    a, b, y = (red, white, 2 * x) if x < 0.5 else (white, green, 2 * x - 1)
    return tuple(round(p + (q - p) * y) for p, q in zip(a, b, strict=True))


def draw_values(texts: list[tuple[str, list[str], list[float]]], path: str) -> str:
    """Colours each token by its value, as 2502.16944 Figure 3: writes path.html and path.png, returns it for a terminal.

    `texts` holds (title, tokens, one value a token); the scale runs from the lowest (red) to the highest (green) of them all.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    everything = [value for _, _, values in texts for value in values]
    low, high, width = min(everything), max(everything), 90
    terminal, page, lines = [], [f"<p>red {low:.2f} to green {high:.2f}; hover for the value</p>"], []
    for title, tokens, values in texts:
        cells = [
            (token, value, colour(value, low, high)) for token, value in zip(tokens, values, strict=True)
        ]
        terminal.append(
            f"{title}\n"
            + "".join(f"\033[48;2;{r};{g};{b};38;2;0;0;0m{t}\033[0m" for t, _, (r, g, b) in cells)
        )
        spans = "".join(
            f'<span style="background:rgb{c}" title="{v:.3f}">{html.escape(t)}</span>' for t, v, c in cells
        )
        page.append(f"<h4>{html.escape(title)}</h4><p>{spans}</p>")
        lines += [[(0, title, None)], []]
        x = 0
        for token, _, c in cells:
            if x and x + len(token) > width:
                lines.append([])
                x = 0
            lines[-1].append((x, token.replace("\n", " "), tuple(v / 255 for v in c)))
            x += len(token)
    style = "body{font:16px/2 monospace;max-width:60em;margin:2em auto} span{white-space:pre-wrap}"
    page.insert(0, f'<!doctype html><meta charset="utf-8"><style>{style}</style>')
    Path(f"{path}.html").write_text("".join(page), encoding="utf-8")
    figure = plt.figure(figsize=(width * 0.105, 0.32 * len(lines) + 0.2))
    for i, line in enumerate(lines):
        for x, token, c in line:
            box = dict(facecolor=c, edgecolor="none", pad=1.5) if c else None
            style = dict(family="monospace", fontsize=11, va="center", parse_math=False, bbox=box)
            figure.text(
                0.01 + 0.98 * x / width,
                1 - (i + 0.7) / (len(lines) + 0.5),
                token,
                weight=None if c else "bold",
                **style,
            )
    figure.savefig(f"{path}.png", dpi=110)
    plt.close(figure)
    return "\n".join(terminal)
