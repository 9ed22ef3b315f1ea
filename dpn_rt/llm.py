"""The Python interface: load an engine, ask it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from dpn_rt.chat import Message
from dpn_rt.detokenizer import Detokenizer
from dpn_rt.engine import Engine
from dpn_rt.engine_dir import EngineDir
from dpn_rt.errors import BatchError, DpnError
from dpn_rt.loader import RuntimeConfig, check_device, load_runner, max_length, scheduler_config
from dpn_rt.outputs import RequestOutput, StreamDelta
from dpn_rt.processor import Processor
from dpn_rt.prompt import Prompt
from dpn_rt.sampling import Sampler
from dpn_rt.sampling_params import SamplingParams
from dpn_rt.scheduler import Scheduler


class LLM:
    """An engine that is loaded and ready.

    Example:
        >>> llm = LLM("engine")
        >>> llm.chat([{"role": "user", "content": [
        ...     {"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]}])
    """

    def __init__(
        self,
        engine_dir: str | Path,
        device: str = "auto",
        *,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        kv_cache_bytes: int | None = None,
        block_size: int = 16,
        prepack_weights: bool | None = None,
        verify: bool = True,
    ) -> None:
        """
        Args:
            engine_dir: as `python -m dpn_rt.build` made it.
            device: "auto" or "cpu".
            max_num_seqs: sequences that run at one time.
            max_num_batched_tokens: rows of one prefill step; default: the model's length, at least 8192.
            max_model_len: rows of prompt, image and answer of one request; default: the model's length.
            kv_cache_bytes: size of the KV pool; default: a quarter of the free memory, or less if less is enough.
            block_size: rows per cell of the pool.
            prepack_weights: spend the weights' size in memory for a faster prefill; default: if memory is plentiful.
            verify: compare the files' sha256 with the engine's record before use.

        Raises:
            EngineError: the engine is incomplete, damaged, or of an unknown format.
            ConfigError: device or a limit cannot be served.
        """
        config = RuntimeConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_length=max_model_len,
            kv_cache_bytes=kv_cache_bytes,
            block_size=block_size,
            prepack=prepack_weights,
        )
        directory = EngineDir.open(engine_dir, verify=verify)
        self.model = directory.model
        check_device(device, self.model)
        self.processor = Processor(directory.processor_path, self.model, max_length=max_length(config, self.model))
        runner = load_runner(directory, config)
        self.engine = Engine(
            self.model,
            Scheduler(scheduler_config(config, self.model), self.model.pyramid, runner.cache),
            runner,
            Sampler(None if self.processor.tokenizer is None else self.processor.tokenizer.token_text),
            max_length(config, self.model),
            self._detokenizer_factory(),
        )
        self._request_ids = (str(number) for number in itertools.count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completions of one prompt or many, batched, in the order of the prompts.

        Args:
            prompts: text with `<image>` where the image goes, or a dictionary with `prompt` or `prompt_token_ids` (the
                image is the one id -200), `multi_modal_data` (`{"image": PIL.Image or path}` or
                `{"image_embeds": [N, hidden_size], "image_grid": (h, w)}`) and `route` (expert per boundary).
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar.

        Raises:
            DpnError: the only prompt failed.
            BatchError: some prompts of several failed; its `outputs` holds what the others gave.
        """
        items = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(items)
        else:
            params = list(sampling_params)
            if len(params) != len(items):
                raise DpnError(f"{len(items)} prompts with {len(params)} sampling parameters: expected as many")
        results = self._run(items, params, use_tqdm)
        errors = {i: result for i, result in enumerate(results) if isinstance(result, DpnError)}
        if errors and len(results) == 1:
            raise errors[0]
        if errors:
            raise BatchError(errors, [None if isinstance(r, DpnError) else r for r in results])
        return results  # type: ignore[return-value]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answers to one conversation or many, as OpenAI-style messages; adds template, `<image>` and `<ROUTER>`."""
        if messages and isinstance(messages[0], Mapping):
            prompt = self.processor.chat(cast(Sequence[Message], messages))
            return self.generate(prompt, sampling_params, use_tqdm=use_tqdm)
        conversations = cast(Sequence[Sequence[Message]], messages)
        prompts = [self.processor.chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamDelta]:
        """The completion of one prompt as it comes; each delta is a string. Closing the iterator aborts the request."""
        params = sampling_params or SamplingParams()
        request_id = next(self._request_ids)
        self.engine.add_request(request_id, self.processor.process(prompt), params)
        try:
            while self.engine.num_unfinished:
                result = self.engine.step()
                final = next((output for output in result.finished if output.request_id == request_id), None)
                own = [progress for progress in result.progress if progress.request_id == request_id]
                for position, progress in enumerate(own):
                    output = final if position == len(own) - 1 else None
                    yield StreamDelta(progress.text, progress.index, progress.token_ids, progress.finish_reason, output)
                if final is not None:
                    if final.error is not None:
                        raise final.error
                    return
        finally:
            self.engine.abort(request_id)

    def _run(
        self, prompts: list[Prompt], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput | DpnError]:
        """Feeds prompts while the engine has room, so that the images of a long list are not all held at once."""
        results: list[RequestOutput | DpnError] = [DpnError("not run")] * len(prompts)
        waiting = deque(enumerate(zip(prompts, params, strict=True)))
        positions: dict[str, int] = {}
        with tqdm(total=len(prompts), desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                while waiting or positions:
                    while waiting and self.engine.num_waiting < self.engine.max_num_seqs:
                        position, (prompt, sampling) = waiting.popleft()
                        request_id = next(self._request_ids)
                        try:
                            self.engine.add_request(request_id, self.processor.process(prompt), sampling)
                            positions[request_id] = position
                        except DpnError as error:
                            results[position] = error
                            bar.update()
                    for output in self.engine.step().finished:
                        results[positions.pop(output.request_id)] = output.error or output
                        bar.update()
            finally:
                for request_id in positions:  # only when interrupted: what is left must free its cells
                    self.engine.abort(request_id)
        return results

    def _detokenizer_factory(self) -> Any:
        tokenizer = self.processor.tokenizer
        if tokenizer is None:
            return None
        return lambda params: Detokenizer(tokenizer, params)
