"""The benchmark's model in the form of each peer: a Hugging Face checkpoint, OpenVINO exports, GGUF files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.models.dense_llava import IMAGE_TOKEN, dense_llava
from benchmarks.peers.remote import WORKERS, Remote
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir

OPENVINO = {"openvino int8": "int8", "openvino int4": "int4"}
LLAMA_CPP = {"llama.cpp q8_0": "Q8_0", "llama.cpp q4_0": "Q4_0"}
"""Subject -> the peer's name of its weights."""


def load_peer(subject: str, python: Path, engine: Path, model: ModelConfig) -> Remote:
    """A peer on the weights of `engine`; its files are written beside it, once."""
    checkpoint, threads = engine.with_name(f"{engine.name}-huggingface"), torch.get_num_threads()
    if not checkpoint.exists():
        save_checkpoint(engine, model, checkpoint)
    target = engine.with_name(f"{engine.name}-{subject.replace(' ', '-')}")
    if subject in OPENVINO:
        if not target.exists():
            export_openvino(python, checkpoint, OPENVINO[subject], target)
        return Remote(python, "openvino_worker.py", target, threads)
    if not target.exists():
        part = target.with_name(f"{target.name}.part")
        subprocess.run([python, WORKERS / "write_gguf.py", checkpoint, part, LLAMA_CPP[subject]], check=True)
        part.rename(target)
    return Remote(python, "llama_cpp_worker.py", target, threads)


def save_checkpoint(engine: Path, model: ModelConfig, target: Path) -> None:
    """The engine's dense model as transformers saves it, with a tokenizer that has the right number of words."""
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast  # warns at import

    assert model.vision is not None
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    dense = dense_llava(model, EngineDir.open(engine, verify=False).load_weights())
    # The tower's last layer shares the weights of the one before it, and shared tensors cannot be saved.
    last = f".encoder.layers.{model.vision.num_layers}."
    state = {name: value.clone() if last in name else value for name, value in dense.state_dict().items()}
    dense.save_pretrained(part, state_dict=state)
    words = {f"<{i}>": i for i in range(model.decoder.vocab_size)}
    words["<image>"] = words.pop(f"<{IMAGE_TOKEN}>")
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", eos_token="<2>", bos_token="<1>")
    side = model.vision.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        processor,
        fast,
        patch_size=model.vision.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
    ).save_pretrained(part)
    part.rename(target)


def export_openvino(python: Path, checkpoint: Path, weights: str, target: Path) -> None:
    """What `optimum-cli export openvino` writes."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    command = [
        python.parent / "optimum-cli",
        "export",
        "openvino",
        "--model",
        checkpoint,
        "--task",
        "image-text-to-text",
    ]
    subprocess.run([*command, "--weight-format", weights, part], check=True)
    part.rename(target)
