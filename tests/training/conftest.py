"""A small dense checkpoint with random weights, and a training set in LLaVA's form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dpn_rt.format.config import ReductionConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.reference import EagerDpn
from examples.tiny_dpn.export_conversations import export
from examples.tiny_dpn.model import model_config
from examples.tiny_dpn.tokenizer import VOCAB_SIZE, write_tokenizer

SIDE, PATCH, HIDDEN = 112, 14, 64
SCENES = 20


def write_model(folder: Path, reduction: ReductionConfig) -> Path:
    """A checkpoint of four narrow layers; an image has 8 x 8 visual tokens."""
    config = model_config("dense", VOCAB_SIZE)
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(
            config.decoder, hidden_size=HIDDEN, intermediate_size=96, num_layers=4, num_heads=2, num_kv_heads=2
        ),
        reduction=reduction,
        prompt=dataclasses.replace(config.prompt, router_token_id=None),
        vision=ClipConfig(HIDDEN, 2 * HIDDEN, 2, 2, SIDE, PATCH, 1e-5, "quick_gelu", "patch"),
        projector=ProjectorConfig("mlp2x_gelu", HIDDEN),
    )
    torch.manual_seed(7)
    files = folder.parent / f"{folder.name}-files"
    files.mkdir(parents=True)
    preprocessor = files / "preprocessor_config.json"
    size = {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}}
    preprocessor.write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", "resample": 3, **size}))
    EagerDpn(config).save_checkpoint(folder, [*write_tokenizer(files), preprocessor])
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("training") / "dense", NoReduction())


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with conversations.json, 200 samples, and images/."""
    return export(tmp_path_factory.mktemp("llava"), SCENES).parent
