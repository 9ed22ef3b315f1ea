"""LLaVA's rows -> ids and labels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt.errors import TrainingError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.prompts.template import VICUNA_SYSTEM
from dpn_rt.training.collator import collate
from dpn_rt.training.options import LossOptions, RouterOptions
from dpn_rt.training.rows import Conversation, read_conversations
from dpn_rt.training.samples import Conversations, Sample, make_sample
from dpn_rt.training.start import Start, load_start

NUM_VISUAL = 64


@pytest.fixture(scope="module")
def start(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return load_start(dense, None, RouterOptions(), LossOptions(), tmp_path_factory.mktemp("files"))


def conversation(*turns: str, image: Path | None = None) -> Conversation:
    return Conversation("item 1", image, turns)


def image_of(data: Path) -> Path:
    return data / "images" / "0.png"


def learned(start: Start, sample: Sample) -> list[str]:
    """The text of each run of labels."""
    tokenizer, runs, before = start.processor.tokenizer, [], False
    assert tokenizer is not None
    for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        assert label in (token, -100)
        if label != -100:
            runs += [] if before else [[]]
            runs[-1].append(label)
        before = label != -100
    return [tokenizer.decode(run, False) for run in runs]


def shown(start: Start, sample: Sample) -> str:
    tokenizer = start.processor.tokenizer
    assert tokenizer is not None
    parts: list[list[int]] = [[]]
    for token in sample["input_ids"].tolist():
        if token == IMAGE_PLACEHOLDER_ID:
            parts.append([])
        else:
            parts[-1].append(token)
    return "<image>".join(tokenizer.decode(part, False) for part in parts)


def test_labels_are_the_answers_and_their_end(start: Start, data: Path) -> None:
    turns = ("<image>\nWhat color is it?", "dark green", "And how many squares?", "3")
    sample = make_sample(conversation(*turns, image=image_of(data)), start.processor, 500)
    assert learned(start, sample) == [" dark green</s>", " 3</s>"]
    asked = "USER: <image>\nWhat color is it?<ROUTER> ASSISTANT: dark green</s>"
    assert shown(start, sample) == f"<s>{VICUNA_SYSTEM} {asked}USER: And how many squares?<ROUTER> ASSISTANT: 3</s>"
    assert sample["pixel_values"].shape == (3, 112, 112) and sample["pixel_values"].dtype == torch.float32


def test_ids_before_an_answer_are_those_of_the_request(start: Start, data: Path) -> None:
    question = "What number is printed on the label?"
    sample = make_sample(conversation(f"{question}\n<image>", "7", image=image_of(data)), start.processor, 500)
    messages = [{"role": "user", "content": [{"type": "image", "image": image_of(data)}, question_part(question)]}]
    request = start.processor.process(start.processor.chat(messages))
    first = int((sample["labels"] != -100).nonzero()[0])
    assert sample["input_ids"][:first].tolist() == list(request.prompt_token_ids)
    assert torch.equal(sample["pixel_values"], request.images[0].views[0])


def question_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_a_sample_without_an_image_has_no_router_token(start: Start) -> None:
    sample = make_sample(conversation("Say <image> or <ROUTER>.", "no"), start.processor, 500)
    assert "pixel_values" not in sample
    router = start.model.config.prompt.router_token_id
    assert not {router, IMAGE_PLACEHOLDER_ID} & set(sample["input_ids"].tolist())
    assert learned(start, sample) == [" no</s>"] and "Say <image> or <ROUTER>." in shown(start, sample)


def test_answers_that_name_special_tokens_are_plain_text(start: Start) -> None:
    sample = make_sample(conversation("What ends a text?", "It is </s>, not <image>."), start.processor, 500)
    assert learned(start, sample) == [" It is </s>, not <image>.</s>"]
    assert sample["labels"].tolist().count(2) == 1


def test_long_samples_are_cut(start: Start, data: Path) -> None:
    turns = ("<image>\nWhich?", "one", "And then?", "two " * 50)
    whole = make_sample(conversation(*turns, image=image_of(data)), start.processor, 500)
    num_rows = len(whole["input_ids"]) + NUM_VISUAL - 1
    for cut in (1, 10):
        sample = make_sample(conversation(*turns, image=image_of(data)), start.processor, num_rows - cut)
        assert sample["input_ids"].tolist() == whole["input_ids"][:-cut].tolist()
        assert len(sample["labels"]) == len(sample["input_ids"])
    first = int((whole["labels"] != -100).nonzero()[0]) + NUM_VISUAL - 1
    for most in (first, NUM_VISUAL, 3):
        with pytest.raises(TrainingError, match=rf"item 1: its first answer begins after {first} rows, .* than {most}"):
            make_sample(conversation(*turns, image=image_of(data)), start.processor, most)


def test_bad_samples_stop_training_or_are_skipped(start: Start, data: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    broken = conversation("<image>\nWhat?", "a", image=tmp_path / "broken.png")
    good = conversation("<image>\nWhat?", "b", image=image_of(data))
    with pytest.raises(TrainingError, match="item 1: image .*broken.png"):
        Conversations([broken, good], start.processor, 500)[0]
    notes: list[str] = []
    skipping = Conversations([broken, good], start.processor, 500, notes.append)
    assert learned(start, skipping[0]) == [" b</s>"] and len(notes) == 1 and len(skipping) == 2
    with pytest.raises(TrainingError, match="none of 1 conversations has a sample"):
        Conversations([broken], start.processor, 500, notes.append)[0]


def test_batches_are_padded_on_the_right(start: Start, data: Path) -> None:
    long = make_sample(conversation("<image>\nWhat is it?", "a b c", image=image_of(data)), start.processor, 500)
    short = make_sample(conversation("Hm?", "no"), start.processor, 500)
    batch = collate([long, short])
    num_long, num_short = len(long["input_ids"]), len(short["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, num_long)
    assert batch["attention_mask"].sum(1).tolist() == [num_long, num_short]
    assert torch.equal(batch["input_ids"][1, :num_short], short["input_ids"])
    assert (batch["labels"][1, num_short:] == -100).all()
    assert batch["pixel_values"][0] is long["pixel_values"] and batch["pixel_values"][1] is None
    output = start.model(**batch)
    alone = [start.model(**collate([sample])) for sample in (long, short)]
    for logits, other in zip(output.logits, alone, strict=True):
        torch.testing.assert_close(logits, other.logits[0])


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "expected an object .*, got int"),
        ({"id": 1}, "conversations: expected a list of questions and answers, got None"),
        ({"conversations": TEXT[::-1]}, r"conversations\[0\]: from 'gpt', expected \"human\""),
        ({"conversations": [{"from": "system", "value": "x"}, *TEXT]}, "from 'system', expected \"human\""),
        ({"conversations": TEXT[:1]}, "the last of 1 is a question, expected an answer"),
        ({"conversations": [TEXT[0], {"from": "gpt"}]}, r"conversations\[1\]: expected an object with"),
        (
            {"conversations": [TEXT[0], {"from": "gpt", "value": " "}]},
            r"conversations\[1\] is empty, expected an answer",
        ),
        ({"conversations": [{"from": "human", "value": ""}, TEXT[1]]}, r"\[0\] is empty, expected a question"),
        ({"conversations": [{"from": "human", "value": "\ud800"}, TEXT[1]]}, "half of a surrogate pair"),
        ({"conversations": TURNS}, '1 <image> in the questions, expected none without "image"'),
        ({"image": "0.png", "conversations": TEXT}, "0 <image> in the questions, expected one"),
        ({"image": "0.png", "conversations": TURNS * 2}, "2 <image> in the questions, expected one"),
        (
            {"image": ["0.png"], "conversations": TURNS},
            r"image: expected the name of one file, got \['0.png'\]",
        ),
        ({"image": "99.png", "conversations": TURNS}, "image .*99.png': no such file"),
        ({"image": "\0", "conversations": TURNS}, "no such file"),
    ],
)
def test_bad_rows_are_told_by_their_place(row: Any, reason: str, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(
        json.dumps([{"id": "good", "image": "0.png", "conversations": TURNS}, row, {"conversations": TEXT}])
    )
    conversations, bad = read_conversations(file, data / "images")
    assert [each.place for each in conversations] == ["item 1 (id 'good')", "item 3"]
    (told,) = map(str, bad)
    assert told.startswith("item 2")
    assert re.search(reason, told), told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('[{"id": 1}', "not JSON .*line 1, column 11"),
        ('{"id": 1}', "got dict, expected a list"),
        ("[]", "none of its 0 items is a conversation"),
        ('[{"id": 7}]', r"none of its 1 items is a conversation: item 1 \(id 7\)"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_files_that_are_no_training_set(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(TrainingError, match=f"rows.json: {message}"):
        read_conversations(tmp_path / "rows.json", None)
    with pytest.raises(TrainingError, match="missing.json"):
        read_conversations(tmp_path / "missing.json", None)


def test_images_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(
        json.dumps([{"conversations": TEXT}, {"image": "0.png", "conversations": TURNS}])
    )
    _, (bad,) = read_conversations(tmp_path / "rows.json", None)
    assert str(bad) == "item 2: image '0.png': expected --image-folder, which it is in"
