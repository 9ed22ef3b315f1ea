"""The engine: requests in, one step at a time, tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

from torch import Tensor

from dpn_rt.device.faults import advice, is_fatal
from dpn_rt.engine.decode_ahead import DecodeAhead
from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.engine.interrupts import deferred_interrupt
from dpn_rt.engine.pyramids import reported_pyramid
from dpn_rt.engine.runner import Runner
from dpn_rt.engine.scheduler import Batch, Scheduler
from dpn_rt.engine.sequence import Sequence
from dpn_rt.errors import DeviceError, DpnError, PromptTooLongError, RequestError, StepError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.outputs import FinishReason, RequestMetrics, RequestOutput, TokenLogprobs
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.sampling.sampler import SampledTokens, Sampler, SamplingState
from dpn_rt.settings import EngineSettings


@dataclass(eq=False)
class Request:
    """A prompt and its completions."""

    request_id: str
    prompt: ProcessedPrompt
    sequences: list[Sequence]
    waiting_siblings: list[Sequence]
    """Those that wait for the first one's prefill, to go on from there."""
    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finish: float | None = None
    error: DpnError | None = None


@dataclass(frozen=True)
class Progress:
    """What a step added to one sequence."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    """Of the new token, where they were asked for."""


@dataclass(frozen=True)
class StepResult:
    """What a step did."""

    progress: list[Progress] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)


class Engine:
    """Scheduler, runner and sampler behind one loop. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(
        self,
        model: ModelConfig,
        settings: EngineSettings,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        make_detokenizer: Callable[[SamplingParams], Detokenizer | None] | None,
    ) -> None:
        """
        Args:
            make_detokenizer: None for an engine without a tokenizer, whose outputs have no text. It may give None for a
                request whose owner makes text of the ids itself.
        """
        self._model, self._settings = model, settings
        self._scheduler = scheduler
        self.runner = runner
        self._sampler = sampler
        chunk = settings.max_chunk_tokens
        self._max_work = None if chunk is None else chunk * model.decoder.num_layers
        """Rows times layers of one part of a prefill while others decode; None: prefills are not cut."""
        self._make_detokenizer = make_detokenizer
        self._requests: dict[str, Request] = {}
        device = runner.backend.async_device
        self._ahead = None if device is None else DecodeAhead(runner, scheduler, sampler, device)
        self.num_prompt_rows = 0
        """Rows of the prompts that have got a first token, since the start."""
        self.num_generated_tokens = 0
        """Of all completions, since the start."""
        self.failure: DeviceError | None = None
        """What stopped the engine for good; no request is taken any more."""

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether a request waits or runs."""
        return request_id in self._requests

    @property
    def max_num_seqs(self) -> int:
        return self._settings.max_num_seqs

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their first step, or for another after a preemption."""
        return self._scheduler.num_waiting

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks."""
        return self._scheduler.num_running

    def add_request(
        self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams, *, priority: int = 0
    ) -> None:
        """Queues a request; one of a lower priority number goes before all of higher ones.

        Raises:
            RequestError: the id is in use, or the parameters do not fit the model.
            CapacityError: the KV cache could never hold it.
            DeviceError: the engine has stopped.
        """
        if self.failure is not None:
            raise DeviceError(str(self.failure)) from self.failure
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        max_model_len = self._settings.max_model_len
        room = max_model_len - prompt.num_rows
        if room < 1:
            raise PromptTooLongError(
                f"the prompt takes {prompt.num_rows} rows, expected at most {max_model_len - 1}: the model's length "
                f"is {max_model_len}, and one row must be left for the answer"
            )
        self._check_ids(params)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        choices = self._model.reduction.choices(prompt, params.seed)
        sequences = [
            self._make_sequence(request_id, index, prompt, params, max_tokens, choices) for index in range(params.n)
        ]
        self._scheduler.check_fits(sequences[0])
        for sequence in sequences:
            sequence.priority = priority
        self._requests[request_id] = Request(request_id, prompt, sequences, sequences[1:], arrival=time.monotonic())
        self._scheduler.add(sequences[0], sequences[1:])

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now and frees its KV blocks; what it has so far comes back. None if it is not known."""
        request = self._requests.get(request_id)
        return None if request is None else self._end_early(request, "abort", None)

    def close(self) -> None:
        """Ends the processes of other ranks, if there are any. No step can be made after that."""
        self.runner.close()

    def step(self) -> StepResult:
        """Computes one batch; an empty result when nothing is left to do."""
        with deferred_interrupt():
            batch = self._pending_decode() or self._scheduler.schedule()
            if batch is None:
                return StepResult()
            self._note_scheduled(batch)
            try:
                if batch.kind == "decode":
                    if self._ahead is not None and self._ahead.takes(batch):
                        return self._postprocess(batch.sequences, self._ahead.step(batch))
                    decoded = self.runner.decode(batch)
                    sampled = self._sample(batch.sequences, decoded.logits, decoded.best)
                    return self._postprocess(batch.sequences, sampled)
                logits = self._prefill(batch)
                if logits is None:
                    return StepResult()
                sequences, logits = self._with_siblings(batch, logits)
                return self._postprocess(sequences, self._sample(sequences, logits))
            except Exception as error:
                if batch.kind == "prefill":
                    self.runner.abandon_prefill()
                return self._fail_batch(batch, error)

    def _pending_decode(self) -> Batch | None:
        return None if self._ahead is None else self._ahead.pending()

    def _sample(self, sequences: ListOf[Sequence], logits: Tensor, best: Tensor | None = None) -> SampledTokens:
        return self._sampler.sample(logits, [sequence.sampling for sequence in sequences], best)

    def _prefill(self, batch: Batch) -> Tensor | None:
        """Logits, or None while a part of the prefill is left: others decode before that."""
        logits = self.runner.prefill(batch, self._max_work if self._scheduler.num_decoding else None)
        if logits is not None:
            self._scheduler.end_prefill()
        return logits

    def _with_siblings(self, batch: Batch, logits: Tensor) -> tuple[list[Sequence], Tensor]:
        """Sequences and their logits, with those that go on from a prefill that has just ended."""
        sequences: list[Sequence] = []
        rows: list[int] = []
        for row, sequence in enumerate(batch.sequences):
            forked = [] if sequence.failure else self._fork(sequence)
            sequences += [sequence, *forked]
            rows += [row] * (1 + len(forked))
        return sequences, logits if len(rows) == len(logits) else logits[rows]

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        request = self._requests[sequence.request_id]
        siblings, request.waiting_siblings = request.waiting_siblings, []
        for sibling in siblings:
            sibling.pyramid, sibling.image_rows = sequence.pyramid, sequence.image_rows
            sibling.choices = list(sequence.choices)
            sibling.num_cached_rows = sequence.num_cached_rows
        return [sibling for sibling in siblings if self._scheduler.fork(sequence, sibling)]

    def _make_sequence(
        self,
        request_id: str,
        index: int,
        prompt: ProcessedPrompt,
        params: SamplingParams,
        max_tokens: int,
        choices: ListOf[Choice],
    ) -> Sequence:
        config = self._model
        state = SamplingState(params, prompt.token_ids, config.decoder.vocab_size, config.prompt.eos_token_ids, index)
        detokenizer = self._make_detokenizer(params) if self._make_detokenizer else None
        return Sequence(request_id, index, prompt, params, state, detokenizer, max_tokens, list(choices))

    def _check_ids(self, params: SamplingParams) -> None:
        vocab_size = self._model.decoder.vocab_size
        for token_id in params.stop_ids:
            if token_id >= vocab_size:
                raise RequestError(
                    f"stop_token_ids has {token_id}, expected at most {vocab_size - 1}", field="stop_token_ids"
                )
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise RequestError(
                f"logprobs={params.logprobs}: expected at most the vocabulary size {vocab_size}, or -1",
                field="logprobs",
            )
        if params.stop_strings and self._make_detokenizer is None:
            raise RequestError(
                f"stop={list(params.stop_strings)}: the engine has no tokenizer, use stop_token_ids", field="stop"
            )

    def _note_scheduled(self, batch: Batch) -> None:
        now = time.monotonic()
        for sequence in batch.sequences:
            request = self._requests.get(sequence.request_id)
            if request is not None:  # else it ended before a step ahead did
                request.first_scheduled = request.first_scheduled or now

    def _postprocess(self, sequences: ListOf[Sequence], sampled: SampledTokens) -> StepResult:
        logprobs = sampled.logprobs or [None] * len(sequences)
        result = StepResult()
        now = time.monotonic()
        for sequence, is_finite, token_id, entry in zip(
            sequences, sampled.finite, sampled.token_ids, logprobs, strict=True
        ):
            request = self._requests.get(sequence.request_id)
            if request is None or sequence.is_finished:
                continue  # a sibling's failure ended the request within this step, or it ended before a step ahead did
            failure = sequence.failure or (None if is_finite else self._not_finite(sequence))
            if failure is not None:
                result.finished.append(self._end_early(request, "error", failure))
                continue
            if request.first_token is None:
                request.first_token = now
                self.num_prompt_rows += request.prompt.num_rows
            self.num_generated_tokens += 1
            text = sequence.append(token_id, entry, self._model.prompt.eos_token_ids)
            result.progress.append(
                Progress(request.request_id, sequence.index, text, (token_id,), sequence.finish_reason, entry)
            )
            if sequence.is_finished:
                self._scheduler.remove(sequence)
                if all(sibling.is_finished for sibling in request.sequences):
                    result.finished.append(self._finish(request))
        return result

    def _not_finite(self, sequence: Sequence) -> StepError:
        return StepError(
            f"request {sequence.request_id}: the logits of output token {len(sequence.output_token_ids)} are not "
            f"finite; the weights or the image embeddings overflow {self._model.dtype}"
        )

    def _end_early(self, request: Request, reason: FinishReason, error: DpnError | None) -> RequestOutput:
        for sequence in request.sequences:
            if not sequence.is_finished:
                self._scheduler.remove(sequence)
                sequence.finish_reason = reason
                self.runner.leave_prefill(sequence)
        request.error = error
        return self._finish(request)

    def _fail_batch(self, batch: Batch, error: Exception) -> StepResult:
        """Ends the requests of a batch whose computation failed; all others go on, unless the device is lost."""
        if is_fatal(error):
            self.failure = DeviceError(f"the engine has stopped, since its {batch.kind} step failed: {error}")
            self.failure.__cause__ = error
            lost = list(self._requests.values())
            return StepResult(finished=[self._end_early(request, "error", self.failure) for request in lost])
        result = StepResult()
        for request_id in dict.fromkeys(sequence.request_id for sequence in batch.sequences):
            request = self._requests.get(request_id)
            if request is not None:
                failure = StepError(f"request {request_id}: the {batch.kind} step failed: {error!r}{advice(error)}")
                failure.__cause__ = error
                result.finished.append(self._end_early(request, "error", failure))
        return result

    def _finish(self, request: Request) -> RequestOutput:
        request.finish = time.monotonic()
        del self._requests[request.request_id]
        queue = None if request.first_scheduled is None else request.first_scheduled - request.arrival
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt.token_ids.tolist(),
            outputs=[sequence.output() for sequence in request.sequences],
            metrics=RequestMetrics(request.arrival, queue, request.first_token, request.finish),
            pyramid=reported_pyramid([each.pyramid for each in request.sequences], request.prompt, self._model),
            error=request.error,
            num_cached_tokens=max(sequence.num_cached_rows for sequence in request.sequences),
        )
