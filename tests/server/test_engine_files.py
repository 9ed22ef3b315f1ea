"""The files of an engine that is being served: removed, or built again with other weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.engine.loader import load_processor
from dpn_rt.reference import EagerDpn
from dpn_rt.server.engine_client.client import EngineProcess
from dpn_rt.server.engine_client.messages import EngineSource
from examples.tiny_dpn import train
from examples.tiny_dpn.model import model_config
from examples.tiny_dpn.tokenizer import train_tokenizer
from tests.server.conftest import OPTIONS, Ask, RunningServer, serve


def remove(engine: Path) -> None:
    shutil.rmtree(engine)


def build_again(engine: Path) -> None:
    model = EagerDpn(model_config("dpn", train_tokenizer().get_vocab_size())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0)
    train.save_checkpoint(model, engine.parent / "other")
    build_engine(engine.parent / "other", engine, dtype="float32", force=True)


@pytest.mark.parametrize("change", [remove, build_again])
def test_a_server_goes_on_with_what_it_loaded(engine_dir: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    engine = tmp_path / engine_dir.name
    shutil.copytree(engine_dir, engine)
    with EngineProcess(EngineSource(engine, "cpu", OPTIONS)) as process:
        process.wait_until_loaded()
        server = serve(load_processor(engine, "cpu", OPTIONS), process)
        try:
            expected = [answer(server, scene) for scene in range(3)]
            change(engine)
            # Pictures that were not asked about before, too: the vision tower's weights are needed.
            assert [answer(server, scene) for scene in range(3)] == expected
            assert answer(server, 3) == answer_of(engine_dir, 3)
        finally:
            server.stop()


def answer(server: RunningServer, scene: int) -> str:
    reply = server.post(Ask(scene).body(max_tokens=8, temperature=0))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def answer_of(engine: Path, scene: int) -> str:
    params = SamplingParams(max_tokens=8, temperature=0)
    return LLM(engine).chat([Ask(scene).local_messages], params, use_tqdm=False)[0].outputs[0].text
