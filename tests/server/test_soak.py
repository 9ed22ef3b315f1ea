"""Many clients, some of them hostile. `python -m benchmarks.soak` is the long version."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.load.http_questions import questions
from benchmarks.load.server_process import serving
from benchmarks.soak import ATTACKS, soak


def test_good_requests_are_answered_among_hostile_ones(engine_dir: Path) -> None:
    good = questions(engine_dir, scenes=2)
    with serving(engine_dir) as (url, pid):
        result = asyncio.run(soak(url, pid, engine_dir.name, good, clients=16, requests=150, hostile_share=0.2))
    assert not result.wrong
    assert result.server_errors == 0
    assert result.cells_left_in_use == 0
    seen = {name.split(":")[0] for name in result.hostile}
    assert len(seen) >= len(ATTACKS) - 1
    refused = {name for name in result.hostile if not name.endswith("left")}
    assert all(name.rsplit(" ", 1)[1] in ("400", "413") for name in refused), result.hostile
