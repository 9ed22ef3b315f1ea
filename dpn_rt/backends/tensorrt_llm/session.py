"""A loaded TensorRT-LLM engine of one stage. This has not been run with the package itself yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpn_rt.backends.tensorrt_llm.contract import Session, Surface, load_surface
from dpn_rt.backends.tensorrt_llm.inputs import (
    SessionStage,
    Tensors,
    context_inputs,
    generation_inputs,
    new_caches,
    output_names,
)
from dpn_rt.errors import PlanError
from dpn_rt.schema.files import is_there, open_file


class StageSession:
    """Runs one batch of sequences through one stage: first the prompts, then one row per sequence at a time."""

    def __init__(
        self, engine: Path, stage: SessionStage, batch: int, dtype: torch.dtype, surface: Surface | None = None
    ) -> None:
        """
        Args:
            engine: directory of the built stage.
            stage: its sizes.
            batch: number of sequences.
            dtype: of the engine's tensors.
            surface: the package's API; None: it is imported.

        Raises:
            PlanError: the package or the engine cannot be loaded.
        """
        self._surface = surface or load_surface()
        if not is_there(engine / "rank0.engine"):
            raise PlanError(f"{engine / 'rank0.engine'}: No such file or directory: build the stage first")
        with open_file(engine / "rank0.engine", PlanError) as file:
            data = file.read()
        self._name = str(engine)
        self._session: Session = self._surface.Session.from_serialized_engine(data)
        self._stage = stage
        self._device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self._caches = new_caches(stage, batch, dtype, self._device)
        self._context_lengths: list[int] = []
        self._lengths: list[int] = []

    def context(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Compute the prompts.

        Args:
            hidden: `[sum(lengths), hidden_size]`.
            lengths: rows of each sequence in this stage.

        Returns:
            `[sum(lengths), hidden_size]`; from the last stage logits `[batch, vocab_size]` float32.

        Raises:
            PlanError: the engine refuses the inputs.
        """
        self._context_lengths = self._lengths = list(lengths)
        return self._run(context_inputs(self._stage, hidden, lengths, self._caches))

    def generate(self, hidden: Tensor) -> Tensor:
        """Compute one new row `[batch, hidden_size]` per sequence.

        Returns:
            `[batch, hidden_size]`; from the last stage logits `[batch, vocab_size]` float32.

        Raises:
            PlanError: the engine refuses the inputs.
        """
        inputs = generation_inputs(self._stage, hidden, self._context_lengths, self._lengths, self._caches)
        self._lengths = [length + 1 for length in self._lengths]
        return self._run(inputs)

    def _run(self, inputs: Tensors) -> Tensor:
        info = self._surface.TensorInfo
        data_type = self._surface.torch_dtype_to_trt
        shapes = self._session.infer_shapes(
            [
                info(name=name, dtype=data_type(tensor.dtype), shape=tuple(tensor.shape))
                for name, tensor in inputs.items()
            ]
        )
        result, *caches = output_names(self._stage)
        outputs = dict(zip(caches, self._caches, strict=True))
        shape = next(tuple(output.shape) for output in shapes if output.name == result)
        dtype = torch.float32 if self._stage.is_last else inputs["hidden_states_input"].dtype
        outputs[result] = torch.empty(shape, dtype=dtype, device=self._device)
        stream = torch.cuda.current_stream().cuda_stream if self._device.type == "cuda" else 0
        if not self._session.run(inputs, outputs, stream):
            raise PlanError(
                f"{self._name}: the engine refused the inputs { ({n: list(t.shape) for n, t in inputs.items()}) }"
            )
        return outputs[result]
