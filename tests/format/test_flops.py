from __future__ import annotations

import pytest

from dpn_rt.format import flops
from tests.engine.models import MODEL, with_decoder

WINDOWS = (None, 20, 9, 20, 1, None, 33)


@pytest.mark.parametrize("rows", [1, 2, 33, 34, 90])
@pytest.mark.parametrize("window", [None, 1, 2, 33, 34, 90, 91])
def test_attention_in_a_window_is_counted_row_by_row(rows: int, window: int | None) -> None:
    config = MODEL.decoder
    seen = sum(row + 1 if window is None else min(row + 1, window) for row in range(rows))
    assert flops.causal_attention(config, rows, window) == 4 * config.num_heads * config.head_dim * seen


def test_windows_take_work_from_their_own_layers() -> None:
    windowed, rows = with_decoder(windows=WINDOWS), [100, 60, 30, 10]
    layers = [layer for stage, of_stage in enumerate(MODEL.stage_layers) for layer in [stage] * len(of_stage)]
    missing = sum(
        flops.causal_attention(MODEL.decoder, rows[stage]) - flops.causal_attention(MODEL.decoder, rows[stage], window)
        for stage, window in zip(layers, WINDOWS, strict=True)
    )
    assert flops.prefill_flops(MODEL, rows) - flops.prefill_flops(windowed, rows) == missing > 0
    # The last layer attends for the last row alone.
    assert flops.needed_prefill_flops(windowed, rows) < flops.needed_prefill_flops(MODEL, rows)
    last = with_decoder(windows=(None,) * 6 + (4,))
    saved = flops.needed_prefill_flops(MODEL, rows) - flops.needed_prefill_flops(last, rows)
    assert saved == 4 * MODEL.decoder.num_heads * MODEL.decoder.head_dim * (10 - 4)
