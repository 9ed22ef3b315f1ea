"""Processors of both layouts, made once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpn_rt.format.config import ModelConfig
from dpn_rt.prompts.processor import Processor
from tests.prompts.models import make_model, write_image_processor
from tests.tiny_tokenizer import TinyTokenizer, make_tokenizer

# What llava-hf checkpoints carry, shortened: contents are lists of parts.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Contents are lists of parts, whose keys are attributes; nothing stands between the parts.
INTERLEAVING_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ ending }}{% endif %}"
)


@dataclass(frozen=True)
class Setup:
    """An engine's processor side."""

    directory: Path
    tokenizer: TinyTokenizer
    model: ModelConfig
    processor: Processor

    def with_model(self, **changes: object) -> Processor:
        return Processor(self.directory, dataclasses.replace(self.model, **changes))  # type: ignore[arg-type]


def make_setup(path: Path, huggingface: bool, template: str = LLAVA_TEMPLATE) -> Setup:
    tokenizer = make_tokenizer(path, image=huggingface)
    write_image_processor(path)
    layout = {"template": "tokenizer", "aspect_ratio": "processor"} if huggingface else {}
    if huggingface:
        (path / "chat_template.jinja").write_text(template)
    model = make_model(tokenizer, **layout)
    return Setup(path, tokenizer, model, Processor(path, model))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Original LLaVA layout: `<image>` is no token."""
    return make_setup(tmp_path_factory.mktemp("original"), huggingface=False)


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Hugging Face layout: `<image>` is a token, and there is a chat template."""
    return make_setup(tmp_path_factory.mktemp("huggingface"), huggingface=True)


@pytest.fixture(scope="session")
def interleaving(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """As `huggingface`, with a template that writes parts in their order."""
    return make_setup(tmp_path_factory.mktemp("interleaving"), True, INTERLEAVING_TEMPLATE).processor
