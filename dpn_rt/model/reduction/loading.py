"""A reduction's configuration and weights -> the reducers of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dpn_rt.device.device import Device
from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.keeping import KeepReducer
from dpn_rt.model.reduction.pooling import PoolingReducer
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.reduction.reducer import Reducer
from dpn_rt.model.reduction.reduction import NoReduction


def load_reducers(
    config: PoolingConfig | NoReduction | Chain, weights: Mapping[str, Tensor], device: Device
) -> Sequence[Reducer]:
    """One reducer per boundary, in order.

    Args:
        config: of the model.
        weights: of the engine, on `device`.
        device: of all tensors.
    """
    match config:
        case NoReduction():
            return []
        case Chain():
            return [KeepReducer(device) for _ in config.layers]
        case PoolingConfig():
            return [PoolingReducer(config, index, weights, device) for index in range(len(config.boundaries))]
