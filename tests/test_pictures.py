"""Token values in colour: whole characters, a scale, and escape sequences for terminals alone."""

import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common import pictures
from common.pictures import draw_values, valued_texts


def byte_tokenizer():
    """One token a byte, as byte-level tokenizers write what they have no longer token for."""
    words = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(words, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("text", ["plain", "ein Öl", "日本", "ok 🙂!", "é🙂é", "👩‍🚀"])
def test_bytes_of_a_character_are_drawn_as_the_character(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    values = [float(i) for i in range(len(ids))]
    found = valued_texts(tokenizer, ids, values)
    assert [piece for piece, _ in found] == list(text)
    ends = []  # the number of each character's last byte
    for character in text:
        ends.append((ends[-1] if ends else -1) + len(character.encode()))
    assert [value for _, value in found] == ends


def test_bytes_that_are_no_character_lose_nothing_after_them():
    tokenizer = byte_tokenizer()
    ids = tokenizer("🙂")["input_ids"]
    letters = tokenizer("abc")["input_ids"]
    cut = valued_texts(tokenizer, ids[:2], [1.0, 2.0])  # a response that was cut inside a character
    assert len(cut) == 1 and cut[0][1] == 2.0
    broken = valued_texts(tokenizer, ids[:2] + letters, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert "".join(piece for piece, _ in broken).endswith("abc")
    assert [value for _, value in broken][-2:] == [4.0, 5.0]


@pytest.mark.parametrize(
    "terminal, no_color, coloured", [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_terminals_alone(tmp_path, monkeypatch, terminal, no_color, coloured):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    shown = draw_values([("chosen", [("good", 1.25), (" food", -0.5)])], str(tmp_path / "values"))
    assert ("\033[" in shown) == coloured
    assert "chosen   first 1.25, last -0.5" in shown
    assert ("good" in shown) == coloured
    if not coloured:
        assert f"{tmp_path}/values.html" in shown


def test_the_picture_has_a_scale():
    title, cells = pictures.scale(-1.0, 3.0)
    assert title == "scale"
    assert [text.strip() for text, _, _ in cells][:: pictures.SCALE - 1] == ["-1", "3"]
    assert cells[0][2] == pictures.RED and cells[-1][2] == pictures.GREEN


def test_a_token_does_not_steer_the_terminal():
    """Control characters are shown as escapes, a line's end stays one."""
    shown = pictures.as_terminal(
        [("a \033]0;title\a", [("\033[2Jgone\r\n", 0.0, (1, 2, 3)), ("né 好", 0.0, (1, 2, 3))])]
    )
    assert "\033]" not in shown and "\033[2J" not in shown and "\r" not in shown and "\a" not in shown
    assert "\\x1b[2Jgone\\r\n" in shown and "né 好" in shown
