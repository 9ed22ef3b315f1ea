"""A model's configuration with room for what training frameworks write into it and ask of it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dpn_rt.format.config import ModelConfig
from dpn_rt.schema.json_values import to_json


class OpenConfig(ModelConfig):
    """A `ModelConfig` that takes further attributes, such as the `use_cache` that Hugging Face's Trainer sets.

    The model's own fields stay frozen, and they alone decide whether two configurations are equal.
    """

    bos_token_id: int | None
    eos_token_id: list[int]
    pad_token_id: int | None

    @classmethod
    def of(cls, config: ModelConfig) -> OpenConfig:
        """A copy of a configuration, with the special tokens where transformers has them."""
        result = cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
        result.bos_token_id = config.prompt.bos_token_id
        result.eos_token_id = list(config.prompt.eos_token_ids)
        result.pad_token_id = None
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(_values(self))

    def get_text_config(self, **_: Any) -> OpenConfig:
        """Itself: where Trainer looks for the special tokens."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as loggers want them; the further attributes are among them."""
        values: dict[str, Any] = to_json(self)
        return {**vars(self), **values}

    def to_json_string(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, default=str) + "\n"


def _values(config: ModelConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, field.name) for field in dataclasses.fields(config))
