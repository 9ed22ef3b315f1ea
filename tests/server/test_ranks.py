"""A server whose engine has two ranks: it answers, and ends when one of them does."""

from __future__ import annotations

from pathlib import Path

import httpx
import psutil

from dpn_rt import LLM, SamplingParams
from tests.server.command import post, serving
from tests.server.conftest import Ask


def test_a_server_of_which_a_rank_is_killed_ends_for_its_supervisor(engine_dir: Path, llm: LLM) -> None:
    """All requests are told, and no process is left."""
    params = SamplingParams(max_tokens=8, temperature=0.0)
    expected = llm.chat(Ask().local_messages, params)[0].outputs[0].text
    body = Ask().body(max_tokens=700, stream=True, ignore_eos=True)
    with serving(engine_dir, "--tensor-parallel-size", "2", imports_anew=True) as (process, url, lines):
        assert post(url, Ask().body()).json()["choices"][0]["message"]["content"] == expected
        (engine,) = psutil.Process(process.pid).children()
        rank = next(child for child in engine.children() if "dpn_rt.backends.parallel.worker" in child.cmdline())
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            events = reply.iter_lines()
            next(events)
            rank.kill()
            text = "\n".join(events)
        assert '"error"' in text and text.rstrip().endswith("[DONE]")
        assert process.wait(30) == 1
        assert not engine.is_running() and not rank.is_running()
    assert any("rank 1 of 2 failed: its process was killed by SIGKILL" in line for line in lines)
