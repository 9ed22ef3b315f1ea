"""What each CUDA kernel takes of a multiprocessor, from ptxas: registers, shared memory, spills, occupancy.

Compiles the sources for every architecture, prints a Markdown table, and fails where a kernel spills registers or keeps
a stack frame. Needs nvcc, no GPU.

    python cmake/cuda_resources.py [--sources FILE ...] [--head-dims N ...] [--architectures 80 90a]
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARP = 32
MOST_THREADS, MOST_BLOCKS, REGISTERS = 2048, 32, 65536
SHARED_BYTES = {"80": 164 * 1024, "90a": 228 * 1024}
SHARED_RESERVED = 1024  # of each block, by the system
NORM_ROW = 4096  # elements: the row that the norms' threads are counted for
# Threads of a block, by the kernel's name.
THREADS = {
    "attention_kernel": 128, "attention_decode_kernel": 128, "merge_splits_kernel": 128, "advance_sequences_kernel": 32,
    "router_features_kernel": 1024, "sample_greedy_kernel": 1024, "sample_kernel": 1024, "last_row_parts_kernel": 128,
    "last_row_totals_kernel": 128, "last_row_scores_kernel": 128,
}  # fmt: skip
DEFAULT_THREADS = 256
HEAD_DIM_SOURCE = "head_dim.cu"


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    static_shared: int
    stack: int
    spilled: int

    @property
    def threads(self) -> int:
        base = re.match(r"\w+", self.name)
        name = base.group() if base else ""
        if name == "norm_kernel":
            width, vectors = map(int, re.findall(r"\d+", self.name)[-2:])
            return min(1024, NORM_ROW // width // vectors)
        return THREADS.get(name, DEFAULT_THREADS)

    @property
    def shared(self) -> int:
        """Static and dynamic shared memory of a block; the dynamic part as prefill_cuda.cuh computes it."""
        prefill = re.match(r"attention_kernel<.*, (\d+), (\d+), \w+, \w+>", self.name)
        if prefill is None:
            return self.static_shared
        head_dim, tiles = map(int, prefill.groups())
        rows = 4 * 32 + (64 * tiles if tiles > 1 else 0)
        return self.static_shared + rows * (head_dim + 8) * 2

    @property
    def blocks(self) -> int:
        """Blocks that fit a multiprocessor; registers are given out to warps in steps of 256."""
        warps = self.threads // WARP
        per_warp = -(-self.registers * WARP // 256) * 256
        by_registers = REGISTERS // per_warp // warps
        by_shared = SHARED_BYTES[self.architecture] // (self.shared + SHARED_RESERVED)
        return min(by_registers, by_shared, MOST_THREADS // self.threads, MOST_BLOCKS)

    @property
    def occupancy(self) -> float:
        return self.blocks * self.threads / MOST_THREADS


def demangled(names: list[str]) -> list[str]:
    """Without return type, namespaces and parameters."""
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short(line) for line in lines.splitlines()]


def short(name: str) -> str:
    """A demangled name without namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"dpn::|cuda::|prefill::|decode::", "", name)
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # enumerators are printed as casts
    return name.split("(")[0].replace("__nv_bfloat16", "bf16").replace("__half", "f16")


def compile_source(source: Path, head_dims: tuple[int, ...], architecture: str) -> list[Kernel]:
    """The kernels of one file. The object file, which is not needed, goes into a directory of its own.

    nvcc removes its output before it writes it: as root and with /dev/null for an output it would remove the device.
    """
    with tempfile.TemporaryDirectory(prefix="dpn_rt-cuda-") as directory:
        command = [
            "nvcc", "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-DDPN_HAS_CUDA", "-Xptxas=-v", "-c",
            "-DDPN_CUDA_HEAD_DIMS=" + "\\,".join(map(str, head_dims)), f"-DDPN_HEAD_DIM={head_dims[0]}",
            "-o", str(Path(directory) / "kernels.o"),
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}", str(source),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{source} does not compile:\n{result.stderr}")
    return parse(result.stdout + result.stderr, architecture)


def head_dims_of_build() -> list[int]:
    """The default of DPN_RT_HEAD_DIMS."""
    text = (ROOT / "cmake/cuda_kernels.cmake").read_text(encoding="utf-8")
    found = re.search(r'set\(DPN_RT_HEAD_DIMS "([\d;]+)"', text)
    assert found is not None
    return [int(number) for number in found.group(1).split(";")]


def parse(log: str, architecture: str) -> list[Kernel]:
    """The kernels in the output of `-Xptxas -v`."""
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.S,
    )
    found = entry.findall(log)
    names = demangled([match[0] for match in found]) if found else []
    kernels = []
    for name, (_, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(name, architecture, int(registers), int(shared.group(1)) if shared else 0, int(stack),
                   int(stores) + int(loads))
        )  # fmt: skip
    return kernels


def table(kernels: list[Kernel]) -> str:
    """Markdown."""
    rows = [
        "| kernel | sm | registers | threads | shared memory | stack | spills | blocks | occupancy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.architecture)):
        rows.append(
            f"| `{k.name}` | {k.architecture} | {k.registers} | {k.threads} | {k.shared:,} | {k.stack} | {k.spilled} "
            f"| {k.blocks} | {k.occupancy:.0%} |"
        )
    return "\n".join(rows)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", type=Path, default=sorted((ROOT / "csrc/ops").glob("*/*.cu")))
    parser.add_argument("--head-dims", nargs="+", type=int, default=head_dims_of_build(), help="of attention")
    parser.add_argument("--architectures", nargs="+", default=["80", "90a"], choices=list(SHARED_BYTES))
    arguments = parser.parse_args()
    # The file of one head size is compiled for each of them.
    of_source = {source: [tuple(arguments.head_dims)] for source in arguments.sources}
    of_source |= {source: [(n,) for n in arguments.head_dims] for source in of_source if source.name == HEAD_DIM_SOURCE}
    jobs = [
        (source, head_dims, architecture)
        for source, lists in of_source.items()
        for head_dims, architecture in itertools.product(lists, arguments.architectures)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [k for found in pool.map(lambda job: compile_source(*job), jobs) for k in found]
    print(table(kernels))
    bad = [k for k in kernels if k.spilled or k.stack]
    if bad:
        sys.exit("registers are spilled or a stack frame is kept:\n" + table(bad))


if __name__ == "__main__":
    main()
