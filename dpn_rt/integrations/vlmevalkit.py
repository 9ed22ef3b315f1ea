"""A model of VLMEvalKit, for its table `supported_VLM` (docs/evaluate.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

from dpn_rt.errors import ConfigError, RequestError
from dpn_rt.llm import LLM
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.schema.keywords import lists_keywords
from dpn_rt.schema.text import shown


@lists_keywords(ConfigError)
class DpnRt(BaseModel):  # type: ignore[misc]
    """An engine that answers one message after the other, as VLMEvalKit asks them.

    The toolkit's prompts are used for all data sets: there are none of the model's own.
    """

    INTERLEAVE = True
    """Texts and images of a message keep their order."""
    allowed_types = ("text", "image")

    def __init__(
        self,
        engine: str,
        device: str = "auto",
        *,
        reduce: str | None = None,
        router_bias: float | None = None,
        max_model_len: int | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
    ) -> None:
        """
        Args:
            engine: the engine's directory.
            device: as in `LLM`.
            reduce: SPEC of a training-free reduction for all messages.
            router_bias: as in `LLM.generate`, for all messages.
            max_model_len: as in `LLM`.
            max_new_tokens: most tokens of an answer.
            temperature: 0 always takes the most probable token.

        Raises:
            DpnError: an argument is wrong, or the engine cannot be loaded.
        """
        super().__init__()
        self._params = SamplingParams(temperature=temperature, max_tokens=max_new_tokens)
        self._router_bias = router_bias
        self._llm = LLM(engine, device, max_num_seqs=1, max_model_len=max_model_len, reduce=reduce)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to one message.

        Args:
            message: parts `{"type": "text" | "image", "value": ...}`; an image is a path or a PIL image.
            dataset: its name, without effect.

        Raises:
            DpnError: the message cannot be answered.
        """
        content = [_part(part) for part in message]
        [output] = self._llm.chat([{"role": "user", "content": content}], self._params, router_bias=self._router_bias)
        return output.outputs[0].text


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind not in ("text", "image"):
        raise RequestError(f"a part of type {shown(kind)}: expected text or image")
    return {"type": kind, kind: part["value"]}
