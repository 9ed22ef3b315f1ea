"""The Python interface: load an engine and generate."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self, cast

from torch import Tensor
from tqdm import tqdm

from dpn_rt.engine.call_arguments import checked_priority, params_of_each, priorities_of_each, with_arguments
from dpn_rt.engine.engine import Progress
from dpn_rt.engine.loader import LoadedEngine, load_engine, load_engine_of_weights
from dpn_rt.engine.shared_engine import Inbox, SharedEngine
from dpn_rt.errors import BatchError, ConfigError, DeviceError, DpnError, RequestError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.reduction.spec import Spec
from dpn_rt.outputs import RequestOutput, StreamDelta
from dpn_rt.prompts.messages import Message
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.prompts.prompt import Prompt
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.schema.keywords import lists_keywords
from dpn_rt.schema.text import shown
from dpn_rt.settings import EngineOptions

MakePrompt = Callable[[], ProcessedPrompt]
"""Makes a conversation's prompt when its turn comes; raises DpnError if it cannot be served."""


@dataclass(eq=False)
class _Run:
    """The prompts of one call, on their way to results."""

    waiting: Iterator[tuple[int, tuple[Prompt | MakePrompt, SamplingParams, int]]]
    """Position and prompt of those that have not been submitted, with parameters and priority."""
    is_fed: bool = False
    """Whether all prompts have been submitted."""
    running: dict[str, tuple[int, Inbox]] = field(default_factory=dict)
    """Position and inbox of each request."""
    ended: list[tuple[int, RequestOutput | DpnError]] = field(default_factory=list)
    """Position and result of those that the caller has not got yet."""

    def take_ended(self) -> list[tuple[int, RequestOutput | DpnError]]:
        """The results of the requests that have ended since the last call."""
        for request_id, (position, inbox) in list(self.running.items()):
            if inbox.output is not None:
                del self.running[request_id]
                self.ended.append((position, inbox.output.error or inbox.output))
        ended, self.ended = self.ended, []
        return ended


@lists_keywords(ConfigError)
class LLM:
    """A loaded engine. Threads may share it: their requests run in one batch.

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
        max_chunk_tokens: int | None = None,
        max_model_len: int | None = None,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_graph_rows: int = 2048,
        reuse_bytes: int = 0,
        block_size: int = 16,
        limit_mm_per_prompt: Mapping[str, int] | None = None,
        prepack_weights: bool | None = None,
        copy_weights: bool | None = None,
        reduce: Spec | Sequence[Spec] | None = None,
        tensor_parallel_size: int = 1,
        verify: bool = True,
    ) -> None:
        """
        Args:
            engine_dir: as `python -m dpn_rt.build` made it.
            device: "cpu" or "cuda"; "auto" is the CPU, and the GPU for an engine with TensorRT plans.
            max_num_seqs: sequences that run at one time.
            max_num_batched_tokens: rows of one prefill step; default: the model's length, at least 8192.
            max_chunk_tokens: while other requests decode, cut prefills into parts of the work of so many tokens, so
                that these requests never wait for a whole prompt; default: not cut, which finishes a batch soonest.
            max_model_len: rows of prompt, image and answer of one request; default: the model's length, at most 2^20.
            kv_cache_bytes: size of the KV pool of each process; default: a quarter of the free memory, on a GPU what is
                left of `gpu_memory_utilization`; less where `max_num_seqs` requests of full length need less.
            gpu_memory_utilization: part of a GPU's memory that may be taken in all.
            max_graph_rows: rows of a prefill stage, at most, that are launched as a graph on a GPU; 0: none are, which
                loads faster.
            reuse_bytes: memory for the rows of images that may come again; 0: neither images nor keys and values of
                prompts' prefixes are reused. Answers with reuse are the same up to rounding.
            block_size: rows per KV block.
            limit_mm_per_prompt: `{"image": N}`, images of one prompt, at most; default: 16.
            prepack_weights: keep a second copy of the weights for a faster prefill; default: if it takes less than a
                third of the free memory.
            copy_weights: copy the weights from the engine's file into huge pages, from which virtual machines read them
                faster; default: on the CPU, if the system has them and the copy takes less than half of the free
                memory. Processes share a file that is not copied.
            reduce: SPECs of training-free reductions that prompts may ask for, such as "fastv:k=2,ratio=0.5"; the first
                is the default; None: what the engine was built with.
            tensor_parallel_size: processes that share the decoder, each with its part of the weights and of the KV
                pool; on the CPU they share torch's threads, on GPUs each takes one. They end with `close`.
            verify: compare the files' sha256 with the engine's record before use.

        Raises:
            EngineError: the engine is incomplete, damaged, or of an unknown format.
            ConfigError: an argument is unknown, or device or a limit cannot be served.
            CapacityError: the memory is too small.
        """
        options = EngineOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_chunk_tokens=max_chunk_tokens,
            max_model_len=max_model_len,
            kv_cache_bytes=kv_cache_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            max_graph_rows=max_graph_rows,
            reuse_bytes=reuse_bytes,
            block_size=block_size,
            limit_mm_per_prompt=limit_mm_per_prompt,
            prepack_weights=prepack_weights,
            copy_weights=copy_weights,
            reduce=reduce,
            tensor_parallel_size=tensor_parallel_size,
        )
        self._take(load_engine(engine_dir, device, options, verify=verify))

    @classmethod
    def from_weights(
        cls,
        model: ModelConfig,
        weights: Iterable[tuple[str, Tensor]],
        device: str = "auto",
        options: EngineOptions | None = None,
    ) -> LLM:
        """A model with given weights, for tests and benchmarks: no engine directory is written, read or hashed.

        Prompts are token ids with image embeddings. On a GPU, weights that are made there stay where they are.

        Args:
            model: the configuration, without a tokenizer and an image processor.
            weights: (canonical name, tensor) of `weight_spec(model)`, in any order.
            device: "cpu" or "cuda"; "auto" is the CPU.
            options: limits, as of `LLM`.

        Raises:
            EngineError: weights are missing, unknown, or of the wrong shape or dtype; or the model needs files.
            ConfigError, CapacityError: as `LLM`.
        """
        llm = cls.__new__(cls)
        llm._take(load_engine_of_weights(model, weights, device, options or EngineOptions()))
        return llm

    def _take(self, loaded: LoadedEngine) -> None:
        self.model, self.processor, self.engine = loaded.model, loaded.processor, loaded.engine
        self._shared = SharedEngine(loaded.engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM cannot be copied or sent to another process: load its engine there")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completions of one prompt or many, batched, in the order of the prompts.

        Args:
            prompts: text with `<image>` where the image goes, or a dictionary with `prompt` or `prompt_token_ids` (the
                image is the one id -200), `multi_modal_data` (`{"image": PIL.Image or path}` or
                `{"image_embeds": [N, hidden_size], "image_grid": (h, w)}`), `route` (expert per boundary),
                `router_bias` (added to the routers' logits per level of compression: above 0 faster, below 0 more
                accurate), `reduce` (SPEC of a training-free reduction) and `kept` (visual rows that it is to keep, see
                `Pyramid.kept`).
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar.
            priority: of all prompts, or one for each: lower numbers go first; default: 0.

        Raises:
            DpnError: the only prompt failed.
            BatchError: some prompts of several failed; its `outputs` has the results of the others.
        """
        items = list(_each_prompt(prompts))
        params, priorities = params_of_each(sampling_params, len(items)), priorities_of_each(priority, len(items))
        order = sorted(range(len(items)), key=priorities.__getitem__)  # the engine sees a part of a long list
        by_position: dict[int, RequestOutput | DpnError] = {}
        with (
            tqdm(total=len(items), desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as bar,
            closing(
                self._results([items[i] for i in order], [params[i] for i in order], [priorities[i] for i in order])
            ) as ended,
        ):
            for position, result in ended:
                by_position[order[position]] = result
                bar.update()
        results = [by_position[position] for position in range(len(items))]
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
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        route: Sequence[int | None] | None = None,
        router_bias: float | None = None,
        reduce: Any = None,
        kept: Sequence[Any] | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation or many.

        Args:
            messages: of one conversation or a list of conversations, as in OpenAI's API. Chat template, `<image>` and
                `<ROUTER>` are added; the same characters in a text are text.
            sampling_params: for all conversations, or one for each.
            use_tqdm: show a progress bar.
            add_generation_prompt: end the prompt where the assistant's answer begins; default: yes, unless an answer is
                continued.
            continue_final_message: the answer continues the last message, which is the assistant's.
            chat_template_kwargs: variables of the model's chat template.
            route: as in `generate`, for all conversations.
            router_bias: as in `generate`, for all conversations.
            reduce: as in `generate`, for all conversations.
            kept: as in `generate`, for all conversations.
            priority: as in `generate`.

        Raises:
            DpnError, BatchError: as `generate`.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise RequestError(f"messages: expected a list of messages or of conversations, got {shown(messages)}")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        steering = {"route": route, "router_bias": router_bias, "reduce": reduce, "kept": kept}

        def make_prompt(conversation: Sequence[Message]) -> ProcessedPrompt:
            prompt = self.processor.chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
            return self.processor.process({**prompt, **steering})

        items = [partial(make_prompt, each) for each in cast(Sequence[Sequence[Message]], conversations)]
        return self.generate(cast(Sequence[Prompt], items), sampling_params, use_tqdm=use_tqdm, priority=priority)

    def as_completed(
        self,
        prompts: Prompt | Iterable[Prompt | MakePrompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        priority: int | Iterable[int] | None = None,
    ) -> Generator[tuple[int, RequestOutput | DpnError]]:
        """Completions of any number of prompts, batched, each as soon as it is there.

        Prompts are taken one after the other while the engine has room, so that their images are never all in memory.
        Closing the generator aborts what still runs.

        Args:
            prompts: as in `generate`; or functions that make one when its turn comes, such as
                `lambda: llm.processor.process(prompt)`.
            sampling_params: for all prompts, or one for each.
            priority: as in `generate`, among the prompts that have been taken.

        Yields:
            Position of a prompt, and its output; or the error, where it was refused or failed and others go on.

        Raises:
            RequestError: `prompts` are none, or there are fewer sampling parameters or priorities than prompts.
            DeviceError: the engine has stopped, and answers no prompt any more.
        """
        with closing(self._results(prompts, sampling_params, priority)) as results:
            for position, result in results:
                if isinstance(result, DeviceError):
                    raise result
                yield position, result

    def _results(
        self,
        prompts: Prompt | Iterable[Prompt | MakePrompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        priority: int | Iterable[int] | None,
    ) -> Generator[tuple[int, RequestOutput | DpnError]]:
        """As `as_completed`; each prompt that a stopped engine has not answered gets the `DeviceError`."""
        run = _Run(enumerate(with_arguments(_each_prompt(prompts), sampling_params, priority)))
        try:
            while not run.is_fed or run.running:
                self._feed(run)
                self._shared.step()
                yield from run.take_ended()
        finally:
            self._shared.withdraw(run.running)  # only when it ends early: what is left must free its KV blocks

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int | None = None
    ) -> Iterator[StreamDelta]:
        """The completion of one prompt, piece by piece; each delta is a string.

        Closing the iterator aborts the request. `priority` is as in `generate`, among the requests of other callers.

        Raises:
            DpnError: the request failed.
        """
        params, rank = params_of_each(sampling_params, 1)[0], checked_priority(priority)
        request_id = self._shared.new_id()
        processed = self.processor.process(prompt)
        try:
            progress: deque[tuple[Progress, RequestOutput | None]] = deque()
            inbox = Inbox(progress)
            self._shared.submit(request_id, processed, params, rank, inbox)
            has_ended = False
            while not has_ended:
                self._shared.step()
                has_ended = inbox.output is not None  # before its last progress is looked for
                while progress:
                    item, output = progress.popleft()
                    yield StreamDelta(item.text, item.index, item.token_ids, item.finish_reason, output, item.logprobs)
            if inbox.output is not None and inbox.output.error is not None:
                raise inbox.output.error
        finally:
            self._shared.withdraw([request_id])

    def close(self) -> None:
        """Ends the processes that share the decoder, where there are several; the LLM answers no more. A `with` block
        does it at its end.

        Otherwise they end with the LLM or with this process, however that ends.
        """
        self._shared.close()

    def _feed(self, run: _Run) -> None:
        """Submits prompts while the engine has room, so that the images of a long list are not all held at once."""
        while not run.is_fed and self.engine.num_waiting < self.engine.max_num_seqs:
            taken = next(run.waiting, None)
            if taken is None:
                run.is_fed = True
                return
            position, (prompt, sampling, priority) = taken
            request_id, inbox = self._shared.new_id(), Inbox()
            run.running[request_id] = position, inbox  # first: Ctrl-C may come as soon as the engine has it
            try:
                self._shared.submit(request_id, self._processed(prompt), sampling, priority, inbox)
            except DpnError as error:
                del run.running[request_id]
                run.ended.append((position, error))

    def _processed(self, prompt: Prompt | MakePrompt) -> ProcessedPrompt:
        return prompt() if callable(prompt) else self.processor.process(prompt)


def _each_prompt(prompts: Any) -> Iterable[Any]:
    """The prompts of a call: one, or any number.

    Raises:
        RequestError: they are neither.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts: expected a prompt or a list of them, got {type(prompts).__name__}")
    return prompts
