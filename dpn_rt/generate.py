"""Answer one prompt on the command line: `python -m dpn_rt.generate --engine DIR --image FILE --prompt TEXT`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_rt.errors import RequestError
from dpn_rt.memory import not_enough_memory
from dpn_rt.terminal import check_text, escape_output, exit_status

if TYPE_CHECKING:
    from dpn_rt import LLM, SamplingParams
    from dpn_rt.outputs import Pyramid, RequestOutput

DRAWING_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DEFAULT_DRAWING = Path()
"""Stands for a name made from the image's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    escape_output()
    options = _parser().parse_args(arguments)
    return exit_status(
        lambda: _generate(options),
        no_memory=lambda: not_enough_memory(Path(options.engine)),
        interrupted=lambda: "interrupted",
    )


def _generate(options: argparse.Namespace) -> int:
    check_text(options, file_names=("engine", "image"))
    # Imported here: --help and a wrong option should not wait for torch.
    from dpn_rt import LLM, SamplingParams

    prompt_options = _prompt(options)
    drawing = _drawing(options)
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    reduce = {} if options.reduce is None else {"reduce": options.reduce}
    llm = LLM(
        options.engine,
        device=options.device,
        tensor_parallel_size=options.tensor_parallel_size,
        verify=not options.skip_verify,
        **reduce,
    )
    prompt = prompt_options if _is_raw(options) else _chat(llm, options)
    if options.route is not None:
        prompt = {**prompt, "route": options.route}
    specs = options.reduce or [None]
    prompts = [prompt] if len(specs) == 1 else [{**prompt, "reduce": spec} for spec in specs]
    outputs = _answers(llm, prompts, params, silent=options.json)
    if drawing is not None:
        _draw_pyramids(llm, prompt, outputs, options.prompt, drawing)
    if options.json:
        answers = [_as_json(output) for output in outputs]
        print(json.dumps(answers[0] if len(answers) == 1 else {"answers": answers}), flush=True)
    elif drawing is not None:
        print(f"picture         {drawing}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dpn_rt.generate", description="Answer one prompt with an engine.")
    parser.add_argument("--engine", required=True, metavar="DIR", help="engine directory made by dpn_rt.build")
    parser.add_argument("--image", nargs="+", action="extend", metavar="FILE", help="images that the prompt is about")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="question; or a whole prompt holding <image>")
    parser.add_argument("--raw", action="store_true", help="take the prompt as it is, without chat template")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="tokens at most (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this probability mass")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="sample from the N most probable tokens")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")
    parser.add_argument(
        "--reduce",
        nargs="+",
        metavar="SPEC",
        help="training-free reduction, e.g. fastv:k=2,ratio=0.5, or none; several are compared, one answer each",
    )
    parser.add_argument("--route", type=_route, metavar="E,E,E", help="forced expert per boundary, e.g. 2,none,1")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="processes that share the decoder (default 1)"
    )
    parser.add_argument("--skip-verify", action="store_true", help="load without comparing the files' sha256")
    parser.add_argument(
        "--show-pyramid",
        type=Path,
        nargs="?",
        const=DEFAULT_DRAWING,
        metavar="FILE",
        help="draw what each stage saw over the image (default FILE: the first image's name with -pyramid.png, here)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def _route(text: str) -> list[int | None]:
    try:
        return [None if item.strip() == "none" else int(item) for item in text.split(",")] if text else []
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected experts separated by commas, such as 2,2,2 or 2,none,1"
        ) from None


def _drawing(options: argparse.Namespace) -> Path | None:
    """Where a drawing goes; one that could not be written is refused before anything is computed."""
    path: Path | None = options.show_pyramid
    if path is None:
        return None
    if not options.image:
        raise RequestError("--show-pyramid: there is no image to draw over, expected --image")
    if path == DEFAULT_DRAWING:
        path = Path(f"{Path(options.image[0]).stem}-pyramid.png")
    if path.suffix.lower() not in DRAWING_SUFFIXES:
        raise RequestError(f"--show-pyramid {path}: expected a name that ends in {' or '.join(DRAWING_SUFFIXES)}")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        raise RequestError(f"--show-pyramid {path}: cannot write there, expected a file in a directory that exists")
    return path


def _draw_pyramids(
    llm: LLM, prompt: dict[str, Any], outputs: Sequence[RequestOutput], question: str, path: Path
) -> None:
    from dpn_rt.drawing import draw_pyramids

    try:
        seen, answers = llm.processor.seen_image(prompt), [(each.pyramid, each.outputs[0].text) for each in outputs]
        draw_pyramids(seen, answers, question=question).save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its format cannot hold a picture of this size"
        raise RequestError(f"--show-pyramid {path}: cannot be written: {reason}") from error


def _is_raw(options: argparse.Namespace) -> bool:
    return bool(options.raw) or "<image>" in options.prompt


def _prompt(options: argparse.Namespace) -> dict[str, Any]:
    if not options.prompt.strip():
        raise RequestError("--prompt is empty: expected a question")
    media = {"multi_modal_data": {"image": options.image}} if options.image else {}
    return {"prompt": options.prompt, **media}


def _chat(llm: LLM, options: argparse.Namespace) -> dict[str, Any]:
    images = [{"type": "image", "image": file} for file in options.image or ()]
    content = [*images, {"type": "text", "text": options.prompt}]
    return llm.processor.chat([{"role": "user", "content": content}])


def _answers(llm: LLM, prompts: Sequence[dict[str, Any]], params: SamplingParams, silent: bool) -> list[RequestOutput]:
    """Generates one after the other and, unless `silent`, prints each answer and what it took."""
    outputs: list[RequestOutput] = []
    for prompt in prompts:
        if outputs and not silent:
            print()
        outputs.append(_run(llm, prompt, params, silent))
        if not silent:
            print(_report(outputs[-1]), flush=True)
    return outputs


def _run(llm: LLM, prompt: dict[str, Any], params: SamplingParams, silent: bool) -> RequestOutput:
    """Generates; prints the text as it comes, without spaces at its beginning, unless `silent`."""
    output, has_begun = None, False
    try:
        for delta in llm.stream(prompt, params):
            text = str(delta) if has_begun else delta.lstrip()
            has_begun = has_begun or bool(text)
            if not silent:
                print(text, end="", flush=True)
            output = delta.output or output
    finally:
        if not silent:
            print()
    assert output is not None, "a stream ends with the whole output"
    if output.error is not None:
        raise output.error
    return output


def _rows(output: RequestOutput) -> list[int]:
    """Rows of the prompt per stage."""
    from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID

    visual = output.pyramid.visual_tokens
    text = len(output.prompt_token_ids) - output.prompt_token_ids.count(IMAGE_PLACEHOLDER_ID)
    return [text + count for count in visual]


def _as_json(output: RequestOutput) -> dict[str, Any]:
    completion, metrics, pyramid = output.outputs[0], output.metrics, output.pyramid
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_token_ids": output.prompt_token_ids,
        "experts": pyramid.experts,
        "kernels": pyramid.kernels,
        "probs": pyramid.probs,
        "visual_tokens": pyramid.visual_tokens,
        "reduction": pyramid.reduction,
        "kept": pyramid.kept,
        "flops_saved": None if pyramid.flops is None else pyramid.flops.saved,
        "rows": _rows(output),
        "kv_lengths": pyramid.kv_lengths,
        "seconds": {
            "queue": metrics.queue,
            "first_token": metrics.time_to_first_token,
            "total": metrics.latency,
        },
    }


def _report(output: RequestOutput) -> str:
    metrics, rows_at_end = output.metrics, output.pyramid.kv_lengths
    count = len(output.outputs[0].token_ids)
    first, total = metrics.time_to_first_token or 0.0, metrics.latency or 0.0
    per_token = f", {1000 * (total - first) / (count - 1):.1f} ms per token" if count > 1 else ""
    return "\n".join(
        [
            *_reduction_lines(output.pyramid),
            f"rows per stage  {', '.join(map(str, _rows(output)))}",
            f"KV rows at end  {', '.join(str(length + max(count - 1, 0)) for length in rows_at_end)}",
            f"time            first token {first:.3f} s, {count} tokens in {total:.3f} s{per_token}",
        ]
    )


def _reduction_lines(pyramid: Pyramid) -> list[str]:
    """The route of a trained reduction, or what a training-free one left."""
    if pyramid.reduction is None:
        route = ["skipped" if kernel is None else f"{kernel[0]}x{kernel[1]}" for kernel in pyramid.kernels]
        return [f"route           {', '.join(route) or 'none (dense model)'}"]
    lines = [
        f"reduction       {pyramid.reduction}",
        f"visual tokens   {', '.join(map(str, pyramid.visual_tokens))}",
    ]
    saved = [] if pyramid.flops is None else [f"FLOPs saved     {100 * pyramid.flops.saved:.1f} % of the prefill"]
    return lines + saved


if __name__ == "__main__":
    sys.exit(main())
