"""Hedges in many languages: sentences written by hand, which hedge or do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tether.lexicon import Lexicon

HEDGED = {
    "English": ("Perhaps it depends on the weather, and it might differ.", 4),
    "German": ("Vielleicht kommt es so; das hängt davon ab und ist schwer zu sagen.", 3),
    "French": ("Peut-être, cela dépend, et c'est difficile à dire.", 3),
    "Spanish": ("Quizás; tal vez depende de cada uno.", 3),
    "Russian": ("Возможно, это зависит от погоды, трудно сказать.", 3),
    "Chinese": ("也许吧，这可能取决于天气。", 3),
    "Arabic": ("ربما، لكن الأمر يعتمد على الطقس.", 2),
    "Japanese": ("たぶんそうかもしれません。", 2),
}
PLAIN = {
    "English": "The fox is red. It lives in the forest and eats berries.",
    "German": "Der Fuchs ist rot. Er lebt im Wald und frisst Beeren.",
    "French": "Le renard est roux. Il vit dans la forêt et mange des baies.",
    "Spanish": "El zorro es rojo. Vive en el bosque y come bayas.",
    "Russian": "Лиса рыжая. Она живёт в лесу и ест ягоды.",
    "Chinese": "狐狸是红色的。它住在森林里，吃浆果。",
    "Arabic": "الثعلب أحمر. يعيش في الغابة ويأكل التوت.",
    "Japanese": "キツネは赤いです。森に住んでいます。",
}


@pytest.mark.parametrize("language", HEDGED)
def test_hedges_are_counted_in_many_languages(language: str) -> None:
    text, count = HEDGED[language]
    assert Lexicon.read().count(text) == count


@pytest.mark.parametrize("language", PLAIN)
def test_plain_speech_holds_no_hedge(language: str) -> None:
    assert Lexicon.read().find(PLAIN[language]) == []


def test_a_word_counts_whole_and_whatever_its_capitals() -> None:
    words = Lexicon.of(["may be", "seem"])
    assert words.find("SEEM seemly may be maybe seem.") == ["seem", "may be", "seem"]
    assert words.holds("Seem")
    assert not words.holds("seemly")


def test_a_folder_without_the_file_has_no_hedges(tmp_path: Path) -> None:
    assert Lexicon.read(tmp_path).count("perhaps") == 0
    (tmp_path / "hedges.txt").write_text("# remark\nlissai\n\n", "utf-8")
    assert Lexicon.read(tmp_path).count("Lissai perhaps") == 1
