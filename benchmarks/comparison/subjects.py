"""The subjects of the latency benchmark: transformers, the eager model and the runtime, with the same requests.

Only this file knows how each of them is called. A subject encodes images, runs prefill until the first token of every
request is chosen, and then decodes one token per request and step. All choose tokens greedily.

All start from the same place. Pixels are on the host, and their transfer is part of the vision time. An image's rows
are on the subject's device in the model's dtype, where its tower leaves them. What else the host does to make a request
ready (lists of ids, the runtime's checks and hashes of a prompt) is not timed.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration

from benchmarks.measuring.clock import Mark, Stopwatch, synchronize
from benchmarks.models.dense_llava import IMAGE_TOKEN
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID, ModelConfig
from dpn_rt.format.flops import Route, kv_rows
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.reduced import EagerReduced

Clock = time.perf_counter

IS_NEW_NAME = "cache" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
CACHE = "cache" if IS_NEW_NAME else "past_key_values"
"""The argument of transformers' models that takes their KV cache: newer versions warn of its old name."""


@dataclass(frozen=True)
class Request:
    """One prompt with its image, as pixels and as rows after tower and projector."""

    token_ids: list[int]
    pixels: torch.Tensor
    """[3, side, side]"""
    image_embeds: torch.Tensor
    """[num_visual, hidden_size]"""
    route: Route | None
    reduce: str | None = None
    """SPEC of a training-free reduction; None: that of the route."""


@dataclass(frozen=True)
class Timing:
    """Times of one round of one subject, in seconds."""

    vision: float | None
    """None: the subject has no tower."""
    prefill: float
    decode_step: float
    """One step, which decodes one token per request."""
    boundary: float | None
    """Routing and pooling within prefill; None where it cannot be timed."""
    kv_rows: int
    """Cached rows after prefill, summed over requests and layers."""
    between_stages: float | None = None
    """From the end of each stage of a prefill to the start of the next one, the wait for the router included."""
    stages: tuple[float, ...] | None = None
    """Of each stage of the prefill."""


class Subject(Protocol):
    def run(self, requests: Sequence[Request], steps: int) -> Timing:
        """Serve all requests once: the first token, then `steps` decode steps."""


class TransformersDense:
    """LlavaForConditionalGeneration; all requests have the same length, so a batch needs no padding."""

    def __init__(self, model: LlavaForConditionalGeneration, compiled: bool = False) -> None:
        """`compiled`: run the model under torch.compile."""
        self.model = model
        self.forward: Any = torch.compile(model) if compiled else model

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], steps: int) -> Timing:
        model, forward, cache = self.model, self.forward, DynamicCache()
        pixels = torch.stack([request.pixels for request in requests])
        embeds = torch.stack([request.image_embeds for request in requests]).to(model.device, model.dtype)
        ids = [_repeat_placeholder(request) for request in requests]
        start = now(model)
        model.get_image_features(
            pixel_values=pixels.to(model.device, model.dtype),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        vision = now(model)
        rows = self._rows(ids, embeds)
        logits = forward(inputs_embeds=rows, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        prefill = now(model)
        kv_rows = len(requests) * self.num_layers * cache.get_seq_length()
        for _ in range(steps):
            logits = forward(input_ids=tokens, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
        end = now(model)
        return Timing(vision - start, prefill - vision, (end - prefill) / steps, None, kv_rows)

    @torch.inference_mode()
    def first_logits(self, request: Request) -> torch.Tensor:
        """`[vocab_size]` after the prompt."""
        embeds = request.image_embeds[None].to(self.model.device, self.model.dtype)
        rows = self._rows([_repeat_placeholder(request)], embeds)
        return self.model(inputs_embeds=rows, use_cache=False, logits_to_keep=1).logits[0, -1]

    def _rows(self, ids: list[list[int]], embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings of ids `[num_seqs, num_rows]`, the image's rows in their place, which is the same in all."""
        rows = self.model.get_input_embeddings()(torch.tensor(ids, device=self.model.device))
        at = ids[0].index(IMAGE_TOKEN)
        rows[:, at : at + embeds.shape[1]] = embeds
        return rows

    @property
    def num_layers(self) -> int:
        return len(self.model.model.language_model.layers)


class Eager:
    """The eager DPN. It serves one request after another, as the published code does."""

    def __init__(self, model: EagerDpn) -> None:
        self.model = model

    @torch.inference_mode()
    def first_logits(self, request: Request) -> torch.Tensor:
        """`[vocab_size]` after the prompt, on the request's route."""
        embeds, layout = self.model.embed(request.token_ids, request.image_embeds.to(self.model.device))
        return self.model.lm_head(self.model.prefill(embeds, layout, request.route)[0][-1])

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], steps: int) -> Timing:
        model, spent, rows = self.model, [0.0, 0.0, 0.0], 0
        hooks = BoundaryClock(model)
        for request in requests:
            cache = DynamicCache()
            image_rows = request.image_embeds.to(model.device)
            start = now(model)
            model.encode_image(request.pixels)
            vision = now(model)
            embeds, layout = model.embed(request.token_ids, image_rows)
            hidden, _, trace = model.prefill(embeds, layout, request.route, cache)
            token = int(model.lm_head(hidden[-1]).argmax())
            prefill = now(model)
            for _ in range(steps):
                token = int(model.decode(token, cache).argmax())
            end = now(model)
            rows += kv_rows(model.config, trace.kv_lengths)
            spent = [
                total + part
                for total, part in zip(spent, (vision - start, prefill - vision, end - prefill), strict=True)
            ]
        hooks.remove()
        return Timing(spent[0], spent[1], spent[2] / steps, hooks.clock.seconds, rows)


class BoundaryClock:
    """Time inside an eager model's boundaries."""

    def __init__(self, model: EagerDpn) -> None:
        self.clock, self._boundaries = Stopwatch(next(model.parameters()).device), list(model.boundaries)
        for boundary in self._boundaries:
            boundary.forward = functools.partial(self._timed, boundary.forward)

    def _timed(self, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.clock(lambda: forward(*args, **kwargs))

    def remove(self) -> None:
        for boundary in self._boundaries:
            del boundary.forward  # the instance's own: the class's is back


class EagerReducing:
    """Training-free reduction in plain PyTorch."""

    def __init__(self, model: EagerDpn) -> None:
        self.model = model

    def run(self, requests: Sequence[Request], steps: int) -> Timing:
        """One request; prefill is a generation of one token, and a step what each further token takes."""
        request = requests[0]
        chain = parse_spec(request.reduce, self.model.config.decoder.num_layers)
        reduced, image_rows = EagerReduced(self.model, chain), request.image_embeds.to(self.model.device)
        start = now(self.model)
        with torch.inference_mode():
            self.model.encode_image(request.pixels)
        vision = now(self.model)
        one = reduced.generate(request.token_ids, image_rows, max_new_tokens=1)
        prefill = now(self.model)
        reduced.generate(request.token_ids, image_rows, max_new_tokens=1 + steps)
        steps_too = now(self.model) - prefill
        decode = steps_too - (prefill - vision)
        return Timing(vision - start, prefill - vision, decode / steps, None, sum(one.kv_lengths))


class Runtime:
    """dpn_rt. Prefill and decode run through the public `LLM.generate`, scheduling and sampling included."""

    def __init__(self, llm: Any, config: ModelConfig, device: str) -> None:
        from dpn_rt import SamplingParams

        self.llm, self.config, self.device, self.sampling_params = llm, config, device, SamplingParams

    def run(self, requests: Sequence[Request], steps: int) -> Timing:
        prompts = [_given(self.prompt(request)) for request in requests]
        params = self.sampling_params(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
        vision = self.config.vision
        assert vision is not None
        images = [VisualInput.of_views((r.pixels,), vision.grid, vision.num_visual_tokens) for r in requests]
        synchronize(self.device)
        start = Clock()
        with torch.inference_mode():
            self.llm.engine.runner.images.encoder.encode(images)
        synchronize(self.device)
        vision_time = Clock() - start
        is_reduced = any(request.reduce is not None for request in requests)
        boundary = ReduceClock(self.device, self._reducers) if is_reduced else OpClock(self.device)
        stages = StageClock(self.device, self._stages)
        start = Clock()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        total = Clock() - start
        boundary.remove()
        stages.remove()
        # Prefill ends when the last request has its first token. generate()'s work around its steps counts as prefill.
        metrics = [output.metrics for output in outputs]
        decode = max(m.finish for m in metrics) - max(m.first_token for m in metrics)
        rows = sum(kv_rows(self.config, output.pyramid.kv_lengths) for output in outputs)
        between, each = (None, None) if self._stages is None else (stages.clock.seconds, stages.seconds)
        return Timing(vision_time, total - decode, decode / steps, boundary.clock.seconds, rows, between, each)

    def first_logprobs(self, request: Request) -> torch.Tensor:
        """`[vocab_size]` log-probabilities after the prompt, on the host."""
        params = self.sampling_params(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=-1)
        (output,) = self.llm.generate([_given(self.prompt(request))], params, use_tqdm=False)
        return torch.from_numpy(output.outputs[0].logprobs[0].values_array)

    def prompt(self, request: Request) -> ProcessedPrompt:
        """A request, checked and hashed, with its image's rows on the device."""
        prompt = self.llm.processor.process(
            {
                "prompt_token_ids": request.token_ids,
                "multi_modal_data": {"image_embeds": request.image_embeds},
                **_reduction(request),
            }
        )
        rows = request.image_embeds.to(self.device)
        return replace(prompt, images=tuple(_with_rows(image, rows) for image in prompt.images))

    @property
    def _reducers(self) -> list[Any]:
        return list(self.llm.engine.runner.backend.reducers)

    @property
    def _stages(self) -> Any:
        """Runs the decoder's stages; None where plans do."""
        return getattr(self.llm.engine.runner.backend, "stages", None)


def _reduction(request: Request) -> dict[str, Any]:
    """What a prompt says of its reduction."""
    if request.reduce is not None:
        return {"reduce": request.reduce}
    return {"route": list(request.route or [0, 0, 0])}


def _with_rows(image: VisualInput, rows: torch.Tensor) -> VisualInput:
    """The image with these rows in place of its own, also where some are left out before the decoder."""
    before = image.before_llm
    if before is not None:
        return replace(image, embeds=rows, before_llm=replace(before, source=_with_rows(before.source, rows)))
    return replace(image, embeds=rows)


def _given(prompt: ProcessedPrompt) -> Callable[[], ProcessedPrompt]:
    """What `LLM.generate` takes for a prompt that was processed before."""
    return lambda: prompt


class ReduceClock:
    """Time inside reducers: scores, selection and gathering, with all that the host does for them."""

    def __init__(self, device: str, reducers: Sequence[Any]) -> None:
        self.clock, self._reducers = Stopwatch(device), reducers
        for reducer in reducers:
            reducer.reduce = functools.partial(self._timed, reducer.reduce)

    def _timed(self, function: Any, output: Any) -> Any:
        return self.clock(lambda: function(output))

    def remove(self) -> None:
        for reducer in self._reducers:
            del reducer.reduce  # the instance's own: the class's is back


class StageClock:
    """Time between the stages of a prefill, and in each of them."""

    def __init__(self, device: str, stages: Any | None) -> None:
        self.clock, self._stages, self._device = Stopwatch(device), stages, device
        self._inside: dict[int, Stopwatch] = {}
        self._last: tuple[int, Mark] | None = None
        if stages is not None:
            stages.run = functools.partial(self._timed, stages.run)

    def _timed(self, run: Any, stage: int, x: torch.Tensor, batch: Any) -> Any:
        if self._last is not None and self._last[0] == stage - 1:
            self.clock.add(self._last[1], self.clock.mark())
        begin = self.clock.mark()
        result = run(stage, x, batch)
        self._last = stage, self.clock.mark()
        self._inside.setdefault(stage, Stopwatch(self._device)).add(begin, self._last[1])
        return result

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each stage; waits for the device."""
        return tuple(self._inside[stage].seconds for stage in sorted(self._inside))

    def remove(self) -> None:
        if self._stages is not None:
            del self._stages.run  # the instance's own: the class's is back


class OpClock:
    """Time inside the kernels of boundaries."""

    def __init__(self, device: str) -> None:
        from dpn_rt import ops

        self.clock, self._ops = Stopwatch(device), ops
        self._originals = {name: getattr(ops, name) for name in ("route", "advance_layout", "pool")}
        for name, function in self._originals.items():
            setattr(ops, name, functools.partial(self._timed, function))

    def _timed(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.clock(lambda: function(*args, **kwargs))

    def remove(self) -> None:
        for name, function in self._originals.items():
            setattr(self._ops, name, function)


def now(model: nn.Module) -> float:
    """The time after the model's device has finished its work."""
    synchronize(next(model.parameters()).device)
    return Clock()


def _repeat_placeholder(request: Request) -> list[int]:
    at = request.token_ids.index(IMAGE_PLACEHOLDER_ID)
    image = [IMAGE_TOKEN] * len(request.image_embeds)
    return [*request.token_ids[:at], *image, *request.token_ids[at + 1 :]]
