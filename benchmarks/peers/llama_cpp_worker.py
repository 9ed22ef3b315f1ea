"""llama.cpp on the decoder, text rows only: `python llama_cpp_worker.py GGUF THREADS`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from llama_cpp import Llama
from worker import serve

MOST_ROWS = 1024
BATCH_ROWS = (512, 1024)
"""Rows that are computed together (n_ubatch)."""


class Decoder:
    """One sequence, through the package's own `eval`."""

    def __init__(self, file: Path, threads: int, batch_rows: int, flash: bool) -> None:
        self._model = Llama(
            str(file),
            n_ctx=MOST_ROWS,
            n_batch=batch_rows,
            n_ubatch=batch_rows,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash,
            logits_all=False,
            verbose=False,
        )
        self._layers = int(self._model.metadata["llama.block_count"])

    def prefill(self, batch: int, rows: int) -> int:
        assert batch == 1
        self._model.reset()
        self._model.eval(list(range(10, 10 + rows)))
        return rows * self._layers

    def step(self) -> None:
        self._model.eval([11])


def main(file: Path, threads: int) -> None:
    settings = {
        f"n_ubatch {rows}, flash_attn {flash}": partial(Decoder, file, threads, rows, flash)
        for rows in BATCH_ROWS
        for flash in (False, True)
    }
    serve(settings, vision=None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
