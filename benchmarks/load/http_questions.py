"""Questions for a server, with the answers that `LLM` gives."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from dpn_rt import LLM, SamplingParams
from examples.tiny_dpn import data


@dataclass(frozen=True, eq=False)
class Question:
    """A question about a picture."""

    image: Image.Image
    text: str
    max_tokens: int = 8

    @cached_property
    def url(self) -> str:
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return data_url(file.getvalue())

    def body(self, model: str, **fields: Any) -> dict[str, Any]:
        """A request of `/v1/chat/completions`."""
        image = {"type": "image_url", "image_url": {"url": self.url}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": self.text}]}]
        return {"model": model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens, **fields}

    def messages(self) -> list[dict[str, Any]]:
        """The same question as `LLM.chat` takes it."""
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": self.text}]
        return [{"role": "user", "content": content}]


def data_url(content: bytes) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def questions(engine: Path, scenes: int, max_tokens: int = 8) -> list[tuple[Question, str]]:
    """Ten questions about each of `scenes` scenes, and the text that `LLM` answers to each alone."""
    llm = LLM(engine)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    asked = [
        Question(sample.image, question.text, max_tokens)
        for sample in (data.sample("test", index) for index in range(scenes))
        for question in sample.questions
    ]
    return [(question, llm.chat(question.messages(), params)[0].outputs[0].text) for question in asked]
