"""The model `dpn_rt` of lmms-eval: `python -m lmms_eval --model dpn_rt --model_args engine=DIR --tasks ...`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NoReturn

from lmms_eval import utils
from lmms_eval.api.model import lmms
from tqdm import tqdm

from dpn_rt.errors import ConfigError, DpnError, EvaluationError, RequestError
from dpn_rt.integrations.lmms_eval_options import batch_size as parse_batch_size
from dpn_rt.integrations.lmms_eval_options import sampling_params, unquoted
from dpn_rt.llm import LLM
from dpn_rt.prompts.messages import Message
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.schema.keywords import lists_keywords
from dpn_rt.schema.text import shown


@lists_keywords(ConfigError)
class DpnRt(lmms):  # type: ignore[misc]
    """An engine that answers the requests of a run in one continuous batch.

    Requests come as messages, the form of lmms-eval's chat models: texts and images in the order of the task.
    """

    is_simple = False

    def __init__(
        self,
        engine: str,
        *,
        device: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        reduce: str | None = None,
        router_bias: float | None = None,
        max_model_len: int | None = None,
        reuse_bytes: int = 0,
        max_new_tokens: int = 1024,
    ) -> None:
        """
        Args:
            engine: the engine's directory.
            device: as in `LLM`.
            batch_size: sequences that run at one time, `auto` for 64.
            max_batch_size: at most so many sequences, whatever `batch_size` says.
            reduce: SPEC of a training-free reduction for all prompts.
            router_bias: as in `LLM.generate`, for all prompts.
            max_model_len: as in `LLM`.
            reuse_bytes: as in `LLM`.
            max_new_tokens: of tasks that do not say.

        Raises:
            DpnError: an argument is wrong, or the engine cannot be loaded.
        """
        super().__init__()
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(f"WORLD_SIZE={os.environ['WORLD_SIZE']!r:.20}: one process runs all requests, expected 1")
        size = parse_batch_size(batch_size)
        self._max_new_tokens, self._router_bias = max_new_tokens, router_bias
        self._llm = LLM(
            str(engine),
            device,
            max_num_seqs=size if max_batch_size is None else min(size, max_batch_size),
            max_model_len=max_model_len,
            reuse_bytes=reuse_bytes,
            reduce=reduce,
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> DpnRt:
        """The model of `--model_args`, whose values go before those of `--batch_size` and the like.

        Raises:
            DpnError: as the constructor does.
        """
        given = {name: unquoted(value) for name, value in utils.simple_parse_args_string(arg_string).items()}
        if "engine" not in given:
            raise ConfigError("--model_args names no engine: expected engine=DIR")
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(others | given))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests, in their order.

        Args:
            requests: of `Instance`, whose arguments are context, function that makes the document's messages, options
                of the generation, and the document's number, task and split. A document is opened when its turn comes.

        Raises:
            EvaluationError: an answer could not be had; names task and document.
        """
        texts = [""] * len(requests)
        params = (self._params(request) for request in requests)
        prompts = (partial(self._prompt, request) for request in requests)
        with (
            tqdm(total=len(requests), desc="Requests", dynamic_ncols=True) as bar,
            closing(self._llm.as_completed(prompts, params)) as results,
        ):
            for position, result in results:
                if isinstance(result, DpnError):
                    raise _named(requests[position], result) from result
                texts[position] = result.outputs[0].text
                bar.update()
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Not supported: prompts give no log-probabilities here."""
        raise EvaluationError("loglikelihood (multiple_choice tasks) is not supported: expected generate_until tasks")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Not supported."""
        raise EvaluationError("generate_until_multi_round is not supported: expected generate_until tasks")

    def generate_visual_cot(self, requests: Sequence[Any]) -> NoReturn:
        """Not supported: no model here draws."""
        raise EvaluationError("generate_visual_cot is not supported: expected generate_until tasks")

    def _params(self, request: Any) -> SamplingParams:
        try:
            return sampling_params(request.args[2] or {}, self._max_new_tokens)
        except RequestError as error:
            raise _named(request, error) from error

    def _prompt(self, request: Any) -> ProcessedPrompt:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = list(_messages(doc_to_messages(self.task_dict[task][split][doc_id])))
        processor = self._llm.processor
        return processor.process({**processor.chat(messages), "router_bias": self._router_bias})


def _messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[Message]:
    """lmms-eval's messages as `LLM.chat` takes them; images are PIL images or paths.

    Raises:
        RequestError: a part is neither text nor image.
    """
    for message in messages:
        content = message["content"]
        yield {
            "role": message["role"],
            "content": content if isinstance(content, str) else [_part(part) for part in content],
        }


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return {"type": "image", "image": part["url"]}
    raise RequestError(f"a part of type {shown(part['type'])}: expected text or image")


def _named(request: Any, error: DpnError) -> EvaluationError:
    _, _, _, doc_id, task, _ = request.args
    return EvaluationError(f"task {shown(task)}, document {shown(doc_id)}: {error}")
