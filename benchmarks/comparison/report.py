"""The latency report as tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Cell = Callable[[dict[str, Any]], str]


def milliseconds(name: str) -> Cell:
    def cell(row: dict[str, Any]) -> str:
        value = row.get(name)
        if value is None:
            return "-"
        spread = (value["max"] - value["min"]) / 2 / value["median"] * 100 if value["median"] else 0.0
        return f"{value['median'] * 1e3:.4g} ±{spread:.0f}%"

    return cell


def scaled(name: str, factor: float, digits: str = ".3g") -> Cell:
    def cell(row: dict[str, Any]) -> str:
        value = row.get(name)
        number = value["median"] if isinstance(value, dict) else value
        return "-" if number is None else f"{number * factor:{digits}}"

    return cell


def ratio(baseline: str, quantity: str) -> Cell:
    def cell(row: dict[str, Any]) -> str:
        for name, values in row["ratios"].items():
            if (name == baseline or (baseline == "eager" and name.startswith("eager "))) and quantity in values:
                return f"{values[quantity]['median']:.2f}"
        return "-"

    return cell


def same_route(baseline: str, quantity: str) -> Cell:
    """Speed against `baseline` on the same route, for the rows of other subjects."""

    def cell(row: dict[str, Any]) -> str:
        values = row["ratios"].get(f"{baseline} {row['routes']}", {})
        return f"{values[quantity]['median']:.2f}" if quantity in values and row["subject"] != baseline else "-"

    return cell


def share(name: str) -> Cell:
    """Share of the prefill's time."""

    def cell(row: dict[str, Any]) -> str:
        found = row["ratios"].get(f"{name} share of prefill")
        return f"{found['median'] * 100:.2f}%" if found else "-"

    return cell


TIMES: dict[str, Cell] = {
    "vision ms": milliseconds("vision"),
    "prefill ms": milliseconds("prefill"),
    "first token ms": milliseconds("time_to_first_token"),
    "step ms": milliseconds("decode_step"),
    "tokens/s": scaled("tokens_per_second", 1, ".1f"),
    "GFLOP": scaled("prefill_flops", 1e-9, ".4g"),
    "of dense": scaled("flops_to_dense", 1, ".2f"),
    "TFLOP/s": scaled("prefill_flops_per_second", 1e-12),
    "KV MB": scaled("kv_bytes", 1e-6),
    "peak +MB": scaled("peak_extra_bytes", 1e-6),
}
RATIOS: dict[str, Cell] = {
    "vision / tf": ratio("transformers dense", "vision"),
    "prefill / tf": ratio("transformers dense", "prefill"),
    "step / tf": ratio("transformers dense", "decode_step"),
    **{
        f"{title} / {short}": ratio(f"{peer} dense", quantity)
        for peer, short in {
            "openvino int8": "ov8",
            "openvino int4": "ov4",
            "llama.cpp q8_0": "q8_0",
            "llama.cpp q4_0": "q4_0",
        }.items()
        for title, quantity in {"vision": "vision", "prefill": "prefill", "step": "decode_step"}.items()
    },
    "prefill / compiled": ratio("compiled dense", "prefill"),
    "step / compiled": ratio("compiled dense", "decode_step"),
    "prefill / eager": ratio("eager", "prefill"),
    "step / eager": ratio("eager", "decode_step"),
    "vision / dense": ratio("dpn_rt dense", "vision"),
    "prefill / dense": ratio("dpn_rt dense", "prefill"),
    "step / dense": ratio("dpn_rt dense", "decode_step"),
    "prefill / dpn_rt": same_route("dpn_rt", "prefill"),
    "step / dpn_rt": same_route("dpn_rt", "decode_step"),
    "of FLOP saving": ratio("flop saving realised", "prefill"),
    "of GEMM rate": ratio("gemm limit", "prefill"),
    "step over reads": ratio("read limit", "decode_step"),
    "route+pool": share("boundary"),
    "between stages": share("between stages"),
}


def print_table(result: dict[str, Any]) -> None:
    """Print times, ratios and limits."""
    machine, limits = result["machine"], result["limits"]
    print(
        f"{result['shape']} {result['dtype']} on {machine['device']} ({machine['cpu']}, {machine['threads']} threads), "
        f"torch {machine['torch']}, transformers {machine['transformers']}; "
        f"{result['prompt']['visual_rows']} visual + {result['prompt']['text_rows']} text rows, "
        f"median of {result['rounds']} rounds"
    )
    print(
        f"limits: GEMM {limits['gemm_flops_per_second']['median'] / 1e12:.3f} TFLOP/s, "
        f"memory {limits['read_bytes_per_second']['median'] / 1e9:.1f} GB/s"
    )
    print_columns(result["rows"], TIMES)
    print(
        "speed against: tf = transformers dense, compiled = it under torch.compile, eager, dpn_rt = same "
        "route, dense = dpn_rt dense (times faster)"
    )
    print_columns(result["rows"], RATIOS)


def print_columns(rows: Sequence[dict[str, Any]], columns: dict[str, Cell]) -> None:
    names = [f"{row['subject']} {row['routes']} x{row['batch']}" for row in rows]
    columns = {title: cell for title, cell in columns.items() if any(cell(row) != "-" for row in rows)}
    table = [
        ["", *columns],
        *([name, *(cell(row) for cell in columns.values())] for name, row in zip(names, rows, strict=True)),
    ]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns) + 1)]
    for line in table:
        first = line[0].ljust(widths[0])
        print("  ".join([first, *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]))
    print()
