"""How VQA's evaluation makes answers comparable: punctuation, numerals, articles and contractions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The published code gives a flag of this value where `re.sub` takes the number of replacements."""
_ARTICLES = ("a", "an", "the")
_NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMERALS)}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_WRITTEN_OUT = {spelling: word for word in _CONTRACTIONS.split() for spelling in _without_one_apostrophe(word)}
_WRITTEN_OUT["somebody'd"] = "somebodyd"  # as published


def clean_punctuation(text: str) -> str:
    """VQA's rule: a mark goes where it stands beside a space anywhere, or the text has a number such as 1,000; else it
    becomes a space. Periods go unless a digit follows."""
    result = text
    for mark in _MARKS:
        goes = f"{mark} " in text or f" {mark}" in text or _NUMBER_WITH_COMMA.search(text)
        result = result.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def clean_words(text: str) -> str:
    """VQA's rule: lower case, numerals up to ten as digits, no articles, apostrophes in contractions."""
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_WRITTEN_OUT.get(word, word) for word in words if word not in _ARTICLES)


def one_line(text: str) -> str:
    """Without line breaks and tabs, and without spaces around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_answer(text: str) -> str:
    """An answer as VQA's own evaluation compares it."""
    return clean_words(clean_punctuation(one_line(text)))


def submitted_answer(text: str) -> str:
    """An answer as EvalAI's servers and TextVQA's evaluation take it: also without commas and question marks, and with
    a space before 's."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_answer(text.strip())


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Share of `answer` that is right: mean over the people of min(1, others who said so / 3)."""
    said = [given == answer for given in people]
    return fmean(min(1.0, (sum(said) - own) / 3) for own in said)
