"""Where a word ends."""

import pytest

from kne_easyedit.facts.words import continues_word


@pytest.mark.parametrize("following", ["a", "Z", "é", "7", "ж", "ا"])
def test_letters_and_digits_go_on(following):
    assert continues_word(following)


@pytest.mark.parametrize("following", ["", " ", "\n", ".", ",", "’", "-", "都", "の", "ท", "။"])
def test_blanks_marks_and_scripts_without_blanks_do_not(following):
    assert not continues_word(following)
