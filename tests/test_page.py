"""The page of answers side by side: in a real browser it is clicked, and nothing in a text becomes markup."""

import re

import pytest
from browser import CHROMIUM, Browser

from evaluation import page

EVIL = '</script><script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'
OUTCOMES = [1.0, 0.0, 0.5, None, 0.75]  # points of dvpo, prompt by prompt


def questions() -> list[page.Question]:
    """Five prompts to two models; the second has token values."""
    found = []
    for i, points in enumerate(OUTCOMES):
        tokens = [("so ", -1.0), ("good <b>", 0.0), (f"food {i}", 1.0)]
        answers = [
            page.Answer("sft", f"plain {EVIL}", {"length": 3.0}),
            page.Answer("dvpo", "so good food", {"length": 4.0}, tokens),
        ]
        verdict = page.Verdict(
            "judge", "dvpo", "sft", points, points == 0.5, [("dvpo as A", f"It says {EVIL}")]
        )
        found.append(page.Question(f"question {i} {EVIL}", answers, [verdict]))
    return found


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "page.html"
    head_and_row = [["model", "n"], ["<i>dvpo</i>", "5"]]
    page.write_page(file, f"dvpo {EVIL}", questions(), [("answers", head_and_row)], left_out=2)
    return file


@pytest.fixture
def browser(file, tmp_path):
    if not CHROMIUM:
        pytest.skip("needs a browser: apt-get install chromium")
    opened = Browser(file, tmp_path / "browser")
    yield opened
    opened.close()


def shown(browser) -> list[int]:
    """The numbers of the prompts that are to be seen."""
    script = "[...document.querySelectorAll('main > section')].map(s => s.hidden ? '' : s.id).join(' ')"
    return [int(name.removeprefix("q")) - 1 for name in browser.run(script).split()]


def test_every_text_is_escaped(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("<script>") == 1
    assert "<img" not in text
    assert "<b>food" not in text
    assert "2 more prompts" in text


def test_the_page_loads_nothing_from_elsewhere(file):
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"\b(src|href)=", text.replace("&lt;img src=", ""))
    assert "default-src 'none'" in text


def test_a_click_filters_the_verdicts(browser):
    assert shown(browser) == [0, 1, 2, 3, 4]
    for outcome, expected in {
        "win": [0, 4],
        "loss": [1],
        "tie": [2],
        "contradictory": [2],
        "missing": [3],
        "all": [0, 1, 2, 3, 4],
    }.items():
        browser.choose("#outcome", outcome)
        assert shown(browser) == expected
        assert browser.run("document.getElementById('shown').textContent") == f"{len(expected)} of 5 shown"


def test_search_keys_and_colours(browser):
    browser.click("#search")
    for letter in "food 3":
        browser.press(letter)
    assert shown(browser) == [3]
    browser.run("search.value = ''; search.dispatchEvent(new Event('input')); search.blur()")

    browser.press("j")
    browser.press("j")
    browser.press("k")
    assert browser.run("document.querySelector('section.here').id") == "q1"

    token = "getComputedStyle(document.querySelector('.text i.c0')).backgroundColor"
    assert browser.run(token) == f"rgb{page.colour(0.0, 0.0, 1.0)}"
    browser.click("#colours")
    assert browser.run(token) == "rgba(0, 0, 0, 0)"

    browser.click("summary")
    assert "It says </script>" in browser.run("document.querySelector('details[open] .said').innerText")


def test_nothing_in_a_text_runs(browser):
    assert browser.run("document.title").startswith("dvpo </script>")
    assert browser.console == []
    # and if something were not escaped, the page's policy would stop it
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'document.title=1'; document.body.append(s)"
    )
    assert browser.run("document.title") != "1"
    browser.run("1")
    assert any("Content Security Policy" in message for message in browser.console)
