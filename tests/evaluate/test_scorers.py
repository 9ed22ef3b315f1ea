"""Each benchmark's rule on edge cases, against values computed by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.scorers import mmbench, mme, pope, scienceqa, textvqa
from tests.evaluate.conftest import write_lines
from tests.evaluate.scoring import Scorer, answers
from tests.evaluate.scoring import scored as scored

PEOPLE = ["cat"] * 3 + ["a cat."] * 2 + ["dog", "Dogs", "two", "2", "none"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, there is not.", "no"),
        ("There is no dog.", "no"),
        ("It is not there", "no"),
        ("There isn't a dog", "yes"),  # no such word
        ("Yes. There is no dog.", "yes"),  # the first sentence alone
        ("NO", "yes"),  # as published
        ("nothing", "yes"),
        ("", "yes"),
        ("no,yes", "yes"),  # one word without its comma
    ],
)
def test_popes_words(text: str, expected: str) -> None:
    assert pope.said(text) == expected


def test_pope(scored: Scorer) -> None:
    """2 right yes, 1 wrong yes, 1 right no, 1 wrong no; of no category."""
    labels = [{"question_id": i, "label": label} for i, label in enumerate(["yes", "yes", "no", "no", "yes"])]
    metrics = scored("pope", labels, answers("Yes", "yes.", "Yes", "No", "no")).metrics
    assert next(iter(metrics)) == "accuracy" and metrics["accuracy"] == pytest.approx(60)
    assert metrics["precision"] == pytest.approx(200 / 3) and metrics["recall"] == pytest.approx(200 / 3)
    assert metrics["f1"] == pytest.approx(200 / 3) and metrics["yes ratio"] == pytest.approx(60)


def test_popes_totals_are_means_over_categories(scored: Scorer) -> None:
    labels = [{"question_id": 0, "label": "yes", "category": "random"}]
    labels += [{"question_id": i, "label": "no", "category": "popular"} for i in (1, 2, 3)]
    metrics = scored("pope", labels, answers("yes", "no", "yes", "yes")).metrics
    assert metrics["accuracy"] == pytest.approx((100 + 100 / 3) / 2)
    assert metrics["accuracy, popular"] == pytest.approx(100 / 3)
    assert metrics["f1, random"] == 100 and metrics["f1, popular"] == 0 and metrics["f1"] == 50


def test_an_unanswered_question_of_pope_is_wrong(scored: Scorer) -> None:
    labels = [{"question_id": i, "label": label} for i, label in enumerate(["yes", "no", "no"])]
    result = scored("pope", labels, answers("yes"))
    assert result.metrics["accuracy"] == pytest.approx(100 / 3) and result.num_missing == 2
    assert result.metrics["precision"] == pytest.approx(100 / 3)


def test_popes_directory(scored: Scorer, tmp_path: Path) -> None:
    """Its ids begin at 1 in each file; LLaVA's question file has others."""
    folder = tmp_path / "coco"
    folder.mkdir()
    for name, label in (("random", "yes"), ("popular", "no")):
        rows = [{"question_id": i + 1, "image": f"{i}.jpg", "text": "Is there?", "label": label} for i in range(2)]
        write_lines(folder / f"coco_pope_{name}.json", rows)
    rows = [
        {
            "question_id": 100 + i,
            "image": f"{i % 2}.jpg",
            "text": "Is there?",
            "category": "popular" if i < 2 else "random",
        }
        for i in range(4)
    ]
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    result = scored("pope", folder, answers("No", "Yes", "Yes", "Yes", first=100), question_file=questions)
    assert result.metrics["accuracy, popular"] == 50 and result.metrics["accuracy, random"] == 100
    with pytest.raises(EvaluationError, match="expected --question-file too"):
        scored("pope", folder, answers("No", first=100))
    rows[0]["image"] = "9.jpg"
    with pytest.raises(EvaluationError, match=r"line 1 is about '0.jpg', line 1 of the question file about '9.jpg'"):
        scored("pope", folder, answers("No", first=100), question_file=write_lines(questions, rows))


def test_textvqa(scored: Scorer) -> None:
    """Five of ten say cat or "a cat."; two and 2 are one answer; none is 0."""
    data = [{"question_id": 7, "image_id": "img", "question": "What is it?", "answers": PEOPLE}]
    for text, points in (("The Cat", 100), ("2", 60), ("two", 60), ("0", 30), ("zero", 30), ("dogs", 30), ("fish", 0)):
        line = {"question_id": "img", "prompt": "What is it?\nAnswer briefly.", "text": text}
        assert scored("textvqa", {"data": data}, [line], "t.json").metrics["accuracy"] == pytest.approx(points), text


def test_textvqas_questions_of_one_image_are_told_apart(scored: Scorer) -> None:
    asked = ["What is the brand?", "what is the YEAR?"]
    data = [
        {"question_id": i, "image_id": "img", "question": question, "answers": [str(i)] * 10}
        for i, question in enumerate(asked)
    ]
    prompts = [
        f"{question}\nReference OCR token: A, B\nAnswer in a word." for question in ("what is the year?", asked[0])
    ]
    lines = [{"question_id": "img", "prompt": prompts[i], "text": text} for i, text in enumerate("10")]
    assert scored("textvqa", {"data": data}, lines, "t.json").metrics["accuracy"] == 100
    lines[1]["prompt"] = prompts[0]
    with pytest.raises(EvaluationError, match="question 'img' has 2 answers: expected one"):
        scored("textvqa", {"data": data}, lines, "t.json")


@pytest.mark.parametrize(
    "prompt",
    ["Q?\nAnswer.", "Q?\nReference OCR token: a, b\nAnswer.", "Reference OCR token: a, b\nQ?\nAnswer.",
     "OCR tokens: a, b. Question: Q? Short answer:"],
)  # fmt: skip
def test_textvqas_prompts(prompt: str) -> None:
    assert textvqa.asked(prompt) == "Q?"


def vqa(people: list[str], kind: str = "other") -> dict[str, Any]:
    given = [{"answer": answer, "answer_id": i} for i, answer in enumerate(people)]
    return {"question_id": 0, "answers": given, "answer_type": kind, "question_type": "what"}


@pytest.mark.parametrize(
    ("people", "text", "points"),
    [
        (["yes"] * 10, "Yes.", 100),
        (["yes"] * 9 + ["no"], "no", 30),
        (["2"] * 6 + ["two"] * 4, "Two", 100),
        (["the dog"] * 10, "dog", 0),  # all people agree: theirs are not processed
        (["the dog"] * 9 + ["cat"], "the dog", 100),
        (["red,blue"] * 2 + ["red blue"] * 8, "red blue", 100),
        (["isnt"] * 3 + ["is"] * 7, "isn't", 90),
    ],
)
def test_vqav2(scored: Scorer, people: list[str], text: str, points: float) -> None:
    result = scored("vqav2", {"annotations": [vqa(people, "yes/no")]}, answers(text), "v.json")
    assert result.metrics == pytest.approx({"accuracy": points, "accuracy, yes/no": points})


def test_vizwiz(scored: Scorer, tmp_path: Path) -> None:
    def item(name: str, people: list[str], kind: str) -> dict[str, Any]:
        given = [{"answer": answer, "answer_confidence": "yes"} for answer in people]
        return {"image": name, "question": "What?", "answers": given, "answer_type": kind, "answerable": 1}

    data = [
        item("a.jpg", ["unanswerable"] * 2 + ["basil"] * 8, "unanswerable"),
        item("b.jpg", ["basil leaves"] * 3 + ["the basil"] * 7, "other"),
    ]
    lines = [
        {"question_id": name, "prompt": "", "text": text}
        for name, text in (("a.jpg", "Unanswerable"), ("b.jpg", "The basil"))
    ]
    result = scored("vizwiz", data, lines, "val.json")
    assert result.metrics["accuracy, unanswerable"] == pytest.approx(60)
    assert result.metrics["accuracy, other"] == 0, "the answer loses its article, what people said keeps it"
    rows = [{"question_id": i, "image": name, "text": "What?"} for i, name in enumerate(("a.jpg", "b.jpg"))]
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    result = scored("vizwiz", data, answers("basil", "basil leaves"), "val.json", question_file=questions)
    assert result.metrics["accuracy, unanswerable"] == 100 and result.metrics["accuracy, other"] == pytest.approx(90)


def test_gqa(scored: Scorer) -> None:
    def item(answer: str, kind: str, is_balanced: bool = True) -> dict[str, Any]:
        return {"answer": answer, "question": "?", "isBalanced": is_balanced, "types": {"structural": kind}}

    data = {
        "0": item("yes", "verify"),
        "1": item("dog", "query"),
        "2": item("man", "query"),
        "3": item("x", "query", False),
    }
    metrics = scored("gqa", data, answers("Yes.", "the dog", "Man...", "x"), "gqa.json").metrics
    assert metrics == pytest.approx({"accuracy": 200 / 3, "accuracy, binary": 100, "accuracy, open": 50})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", None),
        ("B. a cat", "B"),
        ("B.", None),  # two characters, as published
        ("b", None),
        ("The answer is C.", "C"),
        ("The answer is C because", "C"),
        ("The answer is C", None),  # no character after it
        ("The answer is C. The answer is D.", None),
        ("", None),
        ("AB", None),
    ],
)
def test_scienceqas_letters(text: str, letter: str | None) -> None:
    assert scienceqa.letter_of(text) == letter


def test_scienceqa(scored: Scorer, tmp_path: Path) -> None:
    folder = tmp_path / "scienceqa"
    folder.mkdir()
    problems = {
        "1": {"choices": ["x", "y"], "answer": 1, "image": "image.png"},
        "2": {"choices": ["x", "y", "z"], "answer": 0, "image": None},
        "3": {"choices": ["x", "y"], "answer": 0, "image": "image.png"},
        "4": {"choices": ["x", "y"], "answer": 0, "image": None},
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["1", "2", "3"], "val": ["4"]}))
    lines = answers("B", "The answer is A.", "C", "A", first=1)
    result = scored("scienceqa", folder, lines)
    assert result.metrics == pytest.approx({"accuracy": 200 / 3, "image accuracy": 50}) and result.num_unused == 1
    assert scored("scienceqa", folder, lines, split="val").metrics["accuracy"] == 100
    with pytest.raises(EvaluationError, match="--split train: expected one of test, val"):
        scored("scienceqa", folder, lines, split="train")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", "yes"), ("NO", "no"), ("Yes, it is", "yes"), ("No.", "no"), ("It is yes", "other"), ("Not sure", "no"),
     ("Snow", "no"), ("Eyes", "yes"), ("I know", "other"), ("maybe", "other"), ("", "other")],
)  # fmt: skip
def test_mmes_words(text: str, expected: str) -> None:
    assert mme.said(text) == expected


def test_mme(scored: Scorer, tmp_path: Path) -> None:
    """Two pictures of a task: three of four right is 75, one of two pictures is 50."""
    folder = tmp_path / "MME"
    for task, images in (("count", ("1", "2")), ("code_reasoning", ("1",))):
        (folder / task / "questions_answers_YN").mkdir(parents=True)
        for image in images:
            lines = "Is it one? Please answer yes or no.\tYes\nIs it two? Please answer yes or no.\tNo\n"
            (folder / task / "questions_answers_YN" / f"{image}.txt").write_text(lines)
    lines = []
    for name, texts in (("count/1.png", "yes no"), ("count/2.png", "yes yes"), ("code_reasoning/1.jpg", "no maybe")):
        for question, text in zip(("Is it one?", "Is it two?"), texts.split(), strict=True):
            prompt = f"{question}\nAnswer the question using a single word or phrase."
            lines.append({"question_id": name, "prompt": prompt, "text": text})
    metrics = scored("mme", folder, lines).metrics
    assert metrics == {"total": 125, "perception": 125, "cognition": 0, "code_reasoning": 0, "count": 125}
    rows = [
        {"question_id": line["question_id"], "text": line["prompt"], "category": "count", "answer": answer}
        for line, answer in zip(lines, ("Yes", "No") * 3, strict=True)
    ]
    assert scored("mme", rows, lines).metrics["count"] == pytest.approx(50 + 100 / 3)


def test_seed(scored: Scorer) -> None:
    data = {
        "question_type": {"Scene": 1, "Action": 10},
        "questions": [
            {"question_id": "7", "answer": "A", "data_type": "image", "question_type_id": 1},
            {"question_id": "8", "answer": "B", "data_type": "image", "question_type_id": 1},
            {"question_id": "v9", "answer": "C", "data_type": "video", "question_type_id": 10},
        ],
    }
    lines = [{"question_id": name, "prompt": "", "text": text} for name, text in ((7, "A"), (8, "B."), ("v9", "C"))]
    metrics = scored("seed", data, lines, "SEED-Bench.json").metrics
    assert metrics == pytest.approx(
        {
            "accuracy": 200 / 3,
            "accuracy, image": 50,
            "accuracy, video": 100,
            "accuracy, Action": 100,
            "accuracy, Scene": 50,
        }
    )


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A", "A"), ("B.", "B"), ("C. a dog", "C"), ("(B)", "B"), ("(B) cat", "B"), ("D)", "D"), ("A: cat", "A"),
     ("A, since", "A"), ("A cat", "B"), ("a cat.", "B"), ("cat", None), ("Apple", None), ("", None), ("a", None)],
)  # fmt: skip
def test_mmbenchs_choices(text: str, letter: str | None) -> None:
    assert mmbench.choice_of(text, ("dog", "a cat", "bird", "fish")) == letter


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    path = tmp_path / "mmbench.tsv"
    rows = [
        ("1", "What?", "dog", "cat", "bird", "B", "animals"),
        ("2", "Which?", "red", "blue", "", "A", "colors"),
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([("index", "question", "A", "B", "C", "answer", "category"), *rows])
    return path


def rounds(question_id: int, options: str, *texts: str) -> list[dict[str, Any]]:
    names, letters, lines = options.split(), list("ABC"[: len(options.split())]), []
    for number, text in enumerate(texts):
        shown = {"options": names[number:] + names[:number], "option_char": letters[number:] + letters[:number]}
        lines.append({"question_id": question_id, "round_id": number, "prompt": "", "text": text, **shown})
    return lines


def test_mmbench_takes_all_rounds(scored: Scorer, bench: Path) -> None:
    """cat is B, then A, then C."""
    lines = [*rounds(1, "dog cat bird", "B", "A", "C"), *rounds(2, "red blue", "A", "A")]
    metrics = scored("mmbench", bench, lines).metrics
    assert metrics == {"accuracy": 50, "accuracy, first round": 100, "accuracy, animals": 100, "accuracy, colors": 0}
    lines = [*rounds(1, "dog cat bird", "B", "cat", "C."), *rounds(2, "red blue", "B", "B")]
    assert scored("mmbench", bench, lines).metrics["accuracy"] == 50
    assert scored("mmbench", bench, rounds(1, "dog cat bird", "B", "A")).metrics["accuracy"] == 0, "a round is missing"


def test_mmbench_in_one_round(scored: Scorer, bench: Path) -> None:
    lines = [*rounds(1, "dog cat bird", "B"), *rounds(2, "red blue", "Blue")]
    assert scored("mmbench", bench, lines).metrics["accuracy"] == 50


def test_mmbenchs_rotated_rows_count_together(scored: Scorer) -> None:
    rows = [
        {"index": 1, "question": "?", "A": "dog", "B": "cat", "answer": "B"},
        {"index": 1000001, "question": "?", "A": "cat", "B": "dog", "answer": "A"},
        {"index": 2, "question": "?", "A": "dog", "B": "cat", "answer": "A"},
    ]
    lines = [{"question_id": i, "prompt": "", "text": text} for i, text in ((1, "B"), (1000001, "B"), (2, "A"))]
    assert scored("mmbench", rows, lines).metrics == {"accuracy": 50, "accuracy, first round": 100}


def test_exact(scored: Scorer) -> None:
    rows = [{"question_id": i, "answer": answer} for i, answer in enumerate(["red", "Red", 3, "none"])]
    rows.append({"question_id": 4, "answers": ["two", "2"]})
    assert scored("exact", rows, answers(" red\n", "red", "3", "none", "2")).metrics["accuracy"] == 80
