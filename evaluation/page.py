"""A page to look at: to each prompt the answers of all models side by side, with what a judge said of them and
each token in the colour of its value.

One HTML file that works offline. All text of prompts, answers and judges is escaped, and the page's own policy
(CSP) lets no script run but the one below."""

import base64
import hashlib
import html
from dataclasses import dataclass, field
from pathlib import Path

from common.pictures import colour
from evaluation.win_rates import outcome

SHADES = 21  # of the colours from the lowest to the highest value; an odd number has a middle


@dataclass
class Answer:
    """What one model answered."""

    model: str
    text: str
    numbers: dict[str, float] = field(default_factory=dict)  # name -> a number of this answer
    # (text of a token, its value) of the whole answer, or None without a value model
    tokens: list[tuple[str, float]] | None = None


@dataclass
class Verdict:
    """What one judge said of two answers to one prompt."""

    judge: str
    first: str  # models
    second: str
    points: float | None  # of the first: 1 won, 0 lost; None where a verdict is missing
    contradictory: bool = False  # both orders gave the same letter, A or B
    # the judge's own words: (heading, text) of each order
    said: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Question:
    """A prompt with its answers, in the order of the models, and verdicts about them."""

    prompt: str
    answers: list[Answer]
    verdicts: list[Verdict] = field(default_factory=list)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: #222; background: #f4f4f2; }
header, main { padding: 0 1.5em; }
nav { position: sticky; top: 0; padding: .6em 1.5em; background: #fff; border-bottom: 1px solid #ccc; z-index: 1; }
nav > * { margin-right: 1em; }
table { border-collapse: collapse; margin: 1em 0; background: #fff; }
th, td { border: 1px solid #ccc; padding: .2em .7em; text-align: left; }
section { margin: 1.2em 0; padding: 1em; background: #fff; border: 1px solid #ccc; border-radius: 6px; }
section:target, section.here { border-color: #36c; }
.prompt { white-space: pre-wrap; font-weight: 600; overflow-wrap: anywhere; }
.answers { display: flex; gap: 1em; margin-top: .8em; overflow-x: auto; }
.answer { flex: 1 1 16em; min-width: 14em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; padding: .5em; border: 1px solid #ddd; border-radius: 4px; }
.text i { font-style: normal; }
.numbers { color: #666; font-size: 13px; }
.verdict { display: inline-block; margin: .8em .6em 0 0; padding: 0 .6em; border-radius: 4px; background: #eee; }
.verdict.win { background: #cfe8d2; }
.verdict.loss { background: #f3cfc9; }
.verdict.contradictory { border: 1px dashed #999; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; color: #444; }
body.plain .text i { background: none !important; }
[hidden] { display: none; }
"""

SCRIPT = """
const sections = [...document.querySelectorAll("main > section")];
const search = document.getElementById("search");
const comparison = document.getElementById("comparison");
const outcome = document.getElementById("outcome");
const colours = document.getElementById("colours");
let here = -1;

function shows(section) {
  if (!section.textContent.toLowerCase().includes(search.value.toLowerCase())) return false;
  if (!outcome || outcome.value === "all") return true;
  const verdict = section.querySelector(`.verdict[data-comparison="${comparison.value}"]`);
  return verdict !== null && verdict.classList.contains(outcome.value);
}

function filter() {
  let shown = 0;
  for (const section of sections) {
    section.hidden = !shows(section);
    shown += !section.hidden;
  }
  document.getElementById("shown").textContent = `${shown} of ${sections.length} shown`;
}

function step(by) {
  let next = here + by;
  while (next >= 0 && next < sections.length && sections[next].hidden) next += by;
  if (next < 0 || next >= sections.length) return;
  if (here >= 0) sections[here].classList.remove("here");
  here = next;
  sections[here].classList.add("here");
  sections[here].scrollIntoView({ block: "center" });
}

search.addEventListener("input", filter);
if (outcome) {
  outcome.addEventListener("change", filter);
  comparison.addEventListener("change", filter);
}
if (colours) {
  colours.addEventListener("change", () => document.body.classList.toggle("plain", !colours.checked));
}
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" && event.target.type === "search") return;
  if (event.key === "j") step(1);
  if (event.key === "k") step(-1);
});
filter();
"""


def write_page(
    file: Path,
    title: str,
    questions: list[Question],
    tables: list[tuple[str, list[list[str]]]],
    left_out: int = 0,
) -> None:
    """Writes the page. `tables`: (heading, rows of cells, the first of them the head). `left_out`: how many
    questions are not shown, which the page says."""
    low, high = value_range(questions)
    comparisons = sorted({comparison_of(verdict) for question in questions for verdict in question.verdicts})
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}{shades(low, high)}</style></head><body>",
        f"<header><h1>{html.escape(title)}</h1>",
    ]
    for heading, rows in tables:
        parts.append(f"<h2>{html.escape(heading)}</h2>{table(rows)}")
    if left_out:
        parts.append(f"<p>{left_out} more prompts are in the files, not on this page.</p>")
    parts.append("</header>")
    parts.append(controls(comparisons, low, high))
    parts.append("<main>")
    for number, question in enumerate(questions, 1):
        parts.append(section(number, question, comparisons, low, high))
    parts.append(f"</main><script>{SCRIPT}</script></body></html>")
    file.write_text("\n".join(parts), encoding="utf-8", errors="replace")


def policy() -> str:
    """What the page may load and run: its own styles, its own script by the hash, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def value_range(questions: list[Question]) -> tuple[float, float]:
    """The lowest and the highest value of all tokens; (0, 0) without any."""
    values = []
    for question in questions:
        for answer in question.answers:
            values += [value for _, value in answer.tokens or ()]
    if not values:
        return 0.0, 0.0
    return min(values), max(values)


def shades(low: float, high: float) -> str:
    """The style of each shade, from `low` to `high`."""
    if high <= low:
        return ""
    styles = []
    for shade in range(SHADES):
        rgb = colour(shade / (SHADES - 1), 0.0, 1.0)
        styles.append(f".c{shade} {{ background: rgb{rgb}; }}\n")
    return "".join(styles)


def controls(comparisons: list[str], low: float, high: float) -> str:
    """The line at the top: what is shown."""
    parts = ['<nav><input id="search" type="search" placeholder="search">']
    if comparisons:
        options = "".join(
            f"<option value={i}>{html.escape(name)}</option>" for i, name in enumerate(comparisons)
        )
        parts.append(f'<select id="comparison">{options}</select>')
        parts.append('<select id="outcome"><option value="all">all verdicts</option>')
        for choice in ("win", "loss", "tie", "contradictory", "missing"):
            parts.append(f'<option value="{choice}">{choice}</option>')
        parts.append("</select>")
    if high > low:
        parts.append('<label><input id="colours" type="checkbox" checked> values</label>')
        parts.append(f"<span>red {low:.2f} to green {high:.2f}; a token's title is its value</span>")
    parts.append('<span id="shown"></span><span>keys j, k: next, previous</span></nav>')
    return "".join(parts)


def section(number: int, question: Question, comparisons: list[str], low: float, high: float) -> str:
    """One prompt with its answers and verdicts."""
    parts = [f'<section id="q{number}"><div class="prompt">{html.escape(question.prompt)}</div>']
    parts.append('<div class="answers">')
    for answer in question.answers:
        parts.append(f'<div class="answer"><b>{html.escape(answer.model)}</b>')
        parts.append(f'<div class="text">{coloured(answer, low, high)}</div>')
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in answer.numbers.items())
        parts.append(f'<div class="numbers">{html.escape(numbers)}</div></div>')
    parts.append("</div>")
    for verdict in question.verdicts:
        parts.append(badge(verdict, comparisons.index(comparison_of(verdict))))
    parts.append("</section>")
    return "".join(parts)


def coloured(answer: Answer, low: float, high: float) -> str:
    """The text of an answer, token by token where it has values."""
    if not answer.tokens:
        return html.escape(answer.text)
    spans = []
    for text, value in answer.tokens:
        share = (value - low) / (high - low) if high > low else 0.5
        shade = round(share * (SHADES - 1))
        spans.append(f'<i class="c{shade}" title="{value:.3f}">{html.escape(text)}</i>')
    return "".join(spans)


def comparison_of(verdict: Verdict) -> str:
    """Who is compared with whom, and by whom."""
    return f"{verdict.judge}: {verdict.first} against {verdict.second}"


def badge(verdict: Verdict, comparison: int) -> str:
    """A verdict in one line, with the judge's words to be opened."""
    result = outcome(verdict.points) or "missing"
    points = "" if verdict.points is None else f" ({verdict.points:g})"
    classes = f"{result} contradictory" if verdict.contradictory else result
    orders = ", the two orders contradict" if verdict.contradictory else ""
    label = html.escape(f"{comparison_of(verdict)}: {result}{points}{orders}")
    parts = [f'<div class="verdict {classes}" data-comparison="{comparison}">{label}']
    for heading, said in verdict.said:
        words = f'<div class="said">{html.escape(said)}</div>'
        parts.append(f"<details><summary>{html.escape(heading)}</summary>{words}</details>")
    parts.append("</div>")
    return "".join(parts)


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them the head."""
    lines = ["<table>"]
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    lines.append("</table>")
    return "".join(lines)
