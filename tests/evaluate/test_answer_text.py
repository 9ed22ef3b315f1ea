"""Answer processing of VQA and EvalAI, by hand."""

from __future__ import annotations

import pytest

from dpn_rt.evaluate.scorers.answer_text import submitted_answer, vqa_accuracy, vqa_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat", "cat"),
        ("a an the", ""),
        ("an apple and a pear", "apple and pear"),
        ("Two", "2"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("twenty one", "twenty 1"),
        ("yes.", "yes"),
        ("1.5", "1.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("p.m.", "pm"),
        ("yes, it is", "yes it is"),  # a comma before a space goes
        ("red,blue", "red blue"),  # one between letters becomes a space
        ("1,000", "1000"),  # a number with a comma: every mark goes
        ("1,000-2,000", "10002000"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("(red)", "red"),
        ("t-shirt", "t shirt"),
        ("what?!", "what"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the published table has I'm, which no text in lower case finds
        ("lets", "lets"),
        ("two\nlines\tand", "2 lines and"),
        ("  spaces  within ", "spaces within"),
        ("it's 5:30", "it's 5:30"),
        ("." * 40, "." * 8),  # the published code removes 32 periods
    ],
)
def test_vqa(text: str, expected: str) -> None:
    assert vqa_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog's bowl", "dog 's bowl"),
        ("let's go", "let 's go"),
        ("1,000", "1000"),
        ("red,blue", "redblue"),  # commas go before marks become spaces
        ("really?yes", "reallyyes"),
        ("Unanswerable.", "unanswerable"),
        ("Coca-Cola", "coca cola"),
        ("isnt", "isn't"),
        ("a", ""),
    ],
)
def test_submitted(text: str, expected: str) -> None:
    assert submitted_answer(text) == expected
    assert submitted_answer(expected.replace(" 's", "'s")) == expected, "twice is once"


@pytest.mark.parametrize(
    ("times", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_accuracy(times: int, expected: float) -> None:
    """Of ten people: three who said so give (3 * 2/3 + 7 * 1) / 10."""
    people = ["cat"] * times + [f"other {number}" for number in range(10 - times)]
    assert vqa_accuracy("cat", people) == pytest.approx(expected)
