"""memcheck and racecheck of compute-sanitizer on a test or two of every kernel."""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.gpu_quick.pytest_files import Job, Result, line_of, run_jobs, sanitized
from benchmarks.gpu_quick.record import NotHereError, Recorder
from benchmarks.gpu_quick.settings import Settings

SECONDS_TO_TELL = 7
"""What was stopped is still told in the step's time."""
GROUPS = 4
"""Processes of each tool: a process takes long to start under a tool, so it runs several tests."""
OPS = "tests/ops/test_"
TESTS = (
    f"{OPS}activation.py::test_silu_mul[cuda-bfloat16-(2, 17)]",
    f"{OPS}activation.py::test_infinities_and_nan[cuda-bfloat16-gelu]",
    f"{OPS}activation.py::test_strided_rows_and_the_gate_half_in_place[cuda-bfloat16]",
    f"{OPS}advance_layout.py::test_advance_layout[cuda-router-2-33]",
    f"{OPS}advance_layout.py::test_two_boundaries_after_each_other[cuda]",
    f"{OPS}attention.py::test_packed_sequences[cuda-bfloat16-(8, 1, 64)-[1]-True]",
    f"{OPS}attention.py::test_rows_are_the_same_alone[cuda-bfloat16-128]",
    f"{OPS}attention.py::test_views_of_one_fused_buffer[cuda-bfloat16]",
    f"{OPS}attention_decode.py::test_decode_equals_the_last_row_of_prefill[cuda]",
    f"{OPS}attention_decode.py::test_a_batch_gives_each_sequence_what_it_gets_alone[cuda-bfloat16]",
    f"{OPS}attention_extend.py::test_last_rows_of_sequences[cuda-bfloat16-case0]",
    f"{OPS}attention_extend.py::test_nan_stays_in_its_sequence[cuda-bfloat16]",
    f"{OPS}attention_windows.py::test_windows_of_a_prefill[cuda-bfloat16-(8, 1, 64)-1-0]",
    f"{OPS}attention_windows.py::test_windows_of_one_row[cuda-bfloat16-(8, 1, 64)-16-1-0]",
    f"{OPS}kept_rows.py::test_ragged_images[cuda]",
    f"{OPS}last_row_scores.py::test_any_number_of_images[cuda-bfloat16-16-Heads(queries=8, keys=2, dim=128)]",
    f"{OPS}last_row_scores.py::test_many_sequences_in_several_waves[cuda-bfloat16]",
    f"{OPS}last_row_scores.py::test_strided_rows[cuda-bfloat16]",
    f"{OPS}norm.py::test_rms_norm[cuda-bfloat16-(5, 64)]",
    f"{OPS}norm.py::test_layer_norm[cuda-bfloat16-(5, 64)]",
    f"{OPS}norm.py::test_strided_rows_and_output_in_place[cuda-bfloat16]",
    f"{OPS}pool.py::test_pool[cuda-bfloat16-several-scaled-33-conv]",
    f"{OPS}pool.py::test_text_rows_and_skipped_images_are_copied_bit_by_bit[cuda-bfloat16-mixed-max]",
    f"{OPS}pool.py::test_strided_rows[cuda-bfloat16]",
    f"{OPS}quantize.py::test_bit_by_bit[cuda-bfloat16-(29, 15)-(33, 64)-int8]",
    f"{OPS}quantize.py::test_bit_by_bit[cuda-bfloat16-(0, 0)-(2, 4099)-e4m3]",
    f"{OPS}quantize.py::test_dequantize_bit_by_bit[cuda-bfloat16-bias-torch.int32-(33, 1028)-(0, 12)]",
    f"{OPS}rope.py::test_rotates_and_stores[cuda-bfloat16-(3, 1, 64)-[30, 2]]",
    f"{OPS}rope.py::test_norms_heads_before_it_rotates_them[cuda-bfloat16-(2, 2, 80)-[5, 1, 7]]",
    f"{OPS}route.py::test_route[cuda-bfloat16-(130, 3)-[1]-v1]",
    f"{OPS}route.py::test_strided_hidden_rows[cuda-bfloat16]",
    f"{OPS}sample.py::test_sample[cuda-bfloat16-40-1000]",
    f"{OPS}sample.py::test_strided_and_empty_rows[cuda-bfloat16]",
    f"{OPS}segmented_top_k.py::test_ties_and_special_numbers[cuda]",
)


WITHOUT_SHARED_MEMORY = ("activation.py", "advance_layout.py", "kept_rows.py", "pool.py", "dequantize", "test_rotates")
"""In the names of tests whose kernels share nothing between threads: racecheck has nothing to see in them."""
PROBE = """
import ctypes
cuda, context, memory = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
assert cuda.cuInit(0) == cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(256)) == cuda.cuMemFree_v2(memory) == 0
"""
PROBE_SECONDS = 15
COMPLAINT = "========= Error"
"""What the tool says where it cannot attach to a program."""


def run(settings: Settings, record: Recorder) -> None:
    probe()
    jobs = [job for tool in ("memcheck", "racecheck") for job in jobs_of(tool)]
    for result in run_jobs(jobs, settings.processes, record.seconds_left - SECONDS_TO_TELL):
        is_good = result.status == 0
        record.put(**{result.name: {"status": result.status, "seconds": result.seconds, **result.counts}})
        record.say(line_of(result))
        if not is_good:
            record.put(**{f"{result.name}_error": complaints(result)})
            for line in complaints(result)[:4]:
                record.say(f"  {line}")
            print(result.output[-8000:], flush=True)


def probe() -> None:
    """Run the tool on a small program.

    Raises:
        NotHereError: there is no such tool, or it cannot attach to a program here.
    """
    if shutil.which("compute-sanitizer") is None:
        raise NotHereError("compute-sanitizer of the CUDA toolkit is not on the PATH")
    command = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NotHereError(f"compute-sanitizer has not run a small program in {PROBE_SECONDS} s") from error
    if done.returncode != 0 or COMPLAINT in done.stdout:
        print(done.stdout, flush=True)
        said = [line.lstrip("= ") for line in done.stdout.splitlines() if line.strip("= ")]
        reason = next((line for line in said if line.startswith("Error")), said[-1] if said else "it said nothing")
        raise NotHereError(f"compute-sanitizer cannot run a small program here: {reason[:160]}")


def jobs_of(tool: str) -> list[Job]:
    prefix, environment = sanitized(tool)
    tests = listed_for(tool)
    return [Job(f"{tool} {i}", tests[i::GROUPS], prefix, environment) for i in range(GROUPS)]


def listed_for(tool: str) -> tuple[str, ...]:
    """All of them; for racecheck those whose kernels use shared memory."""
    if tool != "racecheck":
        return TESTS
    return tuple(test for test in TESTS if not any(part in test for part in WITHOUT_SHARED_MEMORY))


def complaints(result: Result) -> list[str]:
    """Lines of the tool itself, and the tests that failed."""
    of_tool = [line[:200] for line in result.output.splitlines() if line.startswith("=========") and len(line) > 12]
    return [*result.failures, *of_tool][:30] or ["no complaint"]
