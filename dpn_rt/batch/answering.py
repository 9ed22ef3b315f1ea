"""Rows of a table -> the same rows with answers. Ray keeps an `Answerer` in each of its actors."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import pyarrow as pa
from PIL import Image

from dpn_rt.batch.answer_schema import ANSWER_SCHEMA
from dpn_rt.batch.columns import check_columns
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.errors import DpnError
from dpn_rt.llm import LLM
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.image import decode_image
from dpn_rt.prompts.processor import ProcessedPrompt


class Answerer:
    """An engine that answers the questions of tables."""

    def __init__(self, options: AnswerOptions) -> None:
        """Loads the engine.

        Raises:
            DpnError: as `LLM`.
        """
        self._options = options
        self._llm = LLM(options.engine, reduce=options.reduce, **options.llm_options)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answers all rows of a table.

        Args:
            table: with columns for questions and images. An image is a file's bytes, `{"bytes": ..., "path": ...}`, a
                path, a list of these, or null for a question without one.

        Returns:
            The table in the same order, without the images, and with the columns of `ANSWER_SCHEMA`.

        Raises:
            RequestError: a column is missing, or has the name of one of `ANSWER_SCHEMA`; DeviceError: the engine has
                stopped. What is wrong with one row stands in its column `error`.
        """
        options = self._options
        check_columns("the questions", table.column_names, options)
        rows = table.select([options.question_column, options.image_column]).to_pylist()
        answers = pa.Table.from_pylist(self._answers(rows), schema=ANSWER_SCHEMA)
        kept = table.drop_columns([options.image_column])
        for name in ANSWER_SCHEMA.names:
            kept = kept.append_column(ANSWER_SCHEMA.field(name), answers[name])
        return kept

    def _answers(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{} for _ in rows]
        prompts = (partial(self._prompt, row) for row in rows)
        for position, result in self._llm.as_completed(prompts, self._options.sampling):
            found[position] = _columns(result)
        return found

    def _prompt(self, row: dict[str, Any]) -> ProcessedPrompt:
        options = self._options
        content: list[dict[str, Any]] = [
            {"type": "image", "image": image} for image in _images(row[options.image_column])
        ]
        content.append({"type": "text", "text": row[options.question_column]})
        prompt = self._llm.processor.chat([{"role": "user", "content": content}])
        choice = {"route": options.route, "router_bias": options.router_bias, "reduce": options.reduce}
        return self._llm.processor.process({**prompt, **choice})


def _images(value: Any) -> Iterable[Image.Image | str | os.PathLike[str]]:
    """The images of a row, as `LLM.chat` takes them.

    Raises:
        ImageError: one is none.
    """
    for image in value if isinstance(value, list) else [value]:
        content = image
        if isinstance(image, dict):  # as datasets of Hugging Face have them
            content = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(content, bytes):
            yield decode_image(io.BytesIO(content), "image")
        elif content is not None:
            yield content


def _columns(result: RequestOutput | DpnError) -> dict[str, Any]:
    if isinstance(result, DpnError):
        return {"error": str(result)}
    completion, pyramid = result.outputs[0], result.pyramid
    logprobs = None
    if completion.logprobs is not None:
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        logprobs = [logprobs[token].logprob for token, logprobs in chosen]
    return {
        "answer": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "logprobs": logprobs,
        "cumulative_logprob": completion.cumulative_logprob,
        "route": pyramid.experts,
        "reduction": pyramid.reduction,
        "visual_tokens": pyramid.visual_tokens,
        "prefill_flops": None if pyramid.flops is None else pyramid.flops.prefill,
        "dense_prefill_flops": None if pyramid.flops is None else pyramid.flops.dense_prefill,
    }
