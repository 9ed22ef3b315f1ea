"""OpenVINO's export of the model, driven through its runtime: `python openvino_worker.py EXPORT THREADS`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import openvino
from openvino import opset13
from worker import serve

GROUP_SIZES = ("default", "0", "32", "128")
"""Of dynamic quantisation; 0: rows are not rounded."""


class Llama:
    """The stateful language model, fed with embeddings as a multimodal pipeline does."""

    def __init__(self, directory: Path, config: dict[str, object]) -> None:
        core = openvino.Core()
        model = core.read_model(directory / "openvino_language_model.xml")
        only_last_row(model)
        self._request = core.compile_model(model, "CPU", config).create_infer_request()
        table = core.compile_model(core.read_model(directory / "openvino_text_embeddings_model.xml"), "CPU", config)
        self._table = table.create_infer_request()
        self._layers = sum(state.name.endswith(".key") for state in self._request.query_state())
        self._batch = self._length = 0

    def prefill(self, batch: int, rows: int) -> int:
        self._request.reset_state()
        self._batch, self._length = batch, 0
        ids = np.arange(10, 10 + rows, dtype=np.int64)[None].repeat(batch, 0)
        self._forward(ids)
        return batch * rows * self._layers

    def step(self) -> None:
        self._forward(np.full((self._batch, 1), 11, np.int64))

    def _forward(self, ids: np.ndarray) -> None:
        embeds = self._table.infer({0: ids})[0]
        count = ids.shape[1]
        self._length += count
        positions = np.arange(self._length - count, self._length, dtype=np.int64)[None].repeat(self._batch, 0)
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((self._batch, self._length), np.int64),
            "position_ids": positions,
            "beam_idx": np.arange(self._batch, dtype=np.int32),
        }
        logits = self._request.infer(inputs)["logits"]
        assert logits.shape[1] == 1 and logits[:, -1].argmax(-1).shape == (self._batch,)


def only_last_row(model: openvino.Model) -> None:
    """Multiply the last row alone with the output layer, as OpenVINO GenAI does."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = node.input_value(0)
    last = opset13.slice(rows, np.array([-1]), np.array([np.iinfo(np.int64).max]), np.array([1]), np.array([1]))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def tower(directory: Path, config: dict[str, object]) -> openvino.InferRequest:
    core = openvino.Core()
    return core.compile_model(
        core.read_model(directory / "openvino_vision_embeddings_model.xml"), "CPU", config
    ).create_infer_request()


def main(directory: Path, threads: int) -> None:
    config: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    configs = {
        size: config if size == "default" else {**config, "DYNAMIC_QUANTIZATION_GROUP_SIZE": size}
        for size in GROUP_SIZES
    }
    encoder = tower(directory, config)
    side = encoder.model_inputs[0].get_partial_shape()[2]
    pixels = np.random.default_rng(0).standard_normal((1, 3, 336, 336), dtype=np.float32)
    assert side.is_dynamic or side.get_length() == pixels.shape[2]

    def vision(batch: int) -> None:
        encoder.infer({0: pixels.repeat(batch, 0)})

    serve({size: partial(Llama, directory, each) for size, each in configs.items()}, vision)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
