"""compressed-tensors: integers as they are or packed along the columns, and 8-bit floats."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dpn_rt.builders.json_values import Section, choice_of, name_of, object_of, value_of
from dpn_rt.builders.quantized.layer import FLOATS, INTEGERS, Layer
from dpn_rt.builders.quantized.matrix import FloatMatrix, IntegerMatrix, Matrix, Read
from dpn_rt.builders.quantized.words import BITS, centred, num_words, unpack
from dpn_rt.errors import CheckpointError, ConfigError

FORMATS = ("int-quantized", "pack-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
STRATEGIES = ("tensor", "channel", "group")
FLOAT8 = ("float8_e4m3fn",)
ACTIVATIONS = tuple(f"{name}_{kind}" for name in ("input", "output", "q", "k", "v") for kind in ("scale", "zero_point"))
"""Tensors that round activations and the KV cache."""


class CompressedTensors:
    """The format `compressed-tensors`. A layer's tensors tell its scheme; config.json names bits and group sizes."""

    name = "compressed-tensors"
    marks = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    unused = ACTIVATIONS

    def __init__(self, section: Section) -> None:
        """
        Raises:
            ConfigError: config.json names something that is not read: another format or strategy, other bits, sparse
                weights, transforms.
        """
        choice_of(section, "format", FORMATS, "dense")
        _refuse_other_compression(section)
        groups = object_of(section, "config_groups") or Section({}, "")
        schemes = [object_of(groups, key) or Section({}, name_of(groups, f"{key}.")) for key in groups]
        for scheme in schemes:
            choice_of(scheme, "format", FORMATS, "dense")
        weights = [found for scheme in schemes if (found := object_of(scheme, "weights"))]
        for each in weights:
            _check_weights(each)
        self._place = name_of(section, "config_groups")
        self._group_sizes = [value_of(each, "group_size", int, -1) for each in weights]
        integers = [each for each in weights if each.get("type", "int") == "int"]
        is_reordered = bool(integers) and all(map(_is_reordered, integers))
        self._act_order = name_of(integers[0], "actorder") if is_reordered else None
        self._bits = tuple(sorted({value_of(each, "num_bits", int) for each in integers}))
        self._needs_zeros = bool(integers) and not any(value_of(each, "symmetric", bool, True) for each in integers)
        activations = [object_of(scheme, "input_activations") for scheme in schemes]
        self.rounds_rows = bool(schemes) and all(
            each and each.get("num_bits") == 8 and each.get("type", "int") == "int" for each in activations
        )
        self.left_out = tuple(key for key in ("kv_cache_scheme",) if section.get(key))

    def matrix(self, layer: Layer) -> Matrix:
        if "weight_packed" in layer:
            if "weight" in layer:
                raise CheckpointError(f"{layer.name}: has both weight and weight_packed, expected one of them")
            return self._packed(layer)
        if "weight" not in layer:
            raise CheckpointError(f"{layer.name}.weight_packed is missing (or weight, int8 or {FLOAT8[0]})")
        info = layer.find("weight", ("int8", *FLOAT8))
        rows, columns = info.shape
        if info.dtype in FLOAT8:
            scale = layer.find("weight_scale", FLOATS, (rows, 1), (rows,), (1,), (1, 1), ())
            read_scale = layer.reader("weight_scale", partial(_per_row, rows))
            name = f"{layer.name}.weight_scale"
            return FloatMatrix((rows, columns), scale.dtype, name, layer.reader("weight"), read_scale)
        return self._integers(layer, (rows, columns), 8, layer.reader("weight"))

    def _packed(self, layer: Layer) -> Matrix:
        rows, columns = _weight_shape(layer)
        packed = layer.find("weight_packed", ("int32",))
        if not self._bits:
            raise CheckpointError(f"{layer.name}.weight_packed: {self._place} names no num_bits of integers for it")
        bits = next((each for each in self._bits if packed.shape == (rows, num_words(columns, each))), None)
        if bits is None:
            right = [[rows, num_words(columns, each)] for each in self._bits]
            raise CheckpointError(
                f"{layer.name}.weight_packed (expected int32 {' or '.join(map(str, right))}, as weight_shape "
                f"{[rows, columns]} and num_bits in config.json say, got {list(packed.shape)})"
            )
        read = layer.reader("weight_packed", lambda words: centred(unpack(words, bits, columns), bits))
        return self._integers(layer, (rows, columns), bits, read)

    def _integers(self, layer: Layer, shape: tuple[int, int], bits: int, read: Read) -> Matrix:
        rows, columns = shape
        info = layer.files.tensors.get(f"{layer.name}.weight_scale")
        groups = info.shape[1] if info is not None and len(info.shape) == 2 else 1
        info = layer.find("weight_scale", FLOATS, (rows, groups), *([(rows,), (1, 1), (1,), ()] if groups == 1 else []))
        group_size = layer.group_size("weight_scale", columns, groups, self._group_sizes)
        layer.check_in_order("weight_g_idx", columns, group_size)
        if self._act_order is not None and groups > 1 and "weight_g_idx" not in layer:
            raise CheckpointError(f"{layer.name}.weight_g_idx is missing, which {self._act_order} asks for")
        return IntegerMatrix(
            shape=shape,
            bits=bits,
            group_size=group_size,
            dtype=info.dtype,
            scale_name=f"{layer.name}.weight_scale",
            read_integers=read,
            read_scale=layer.reader("weight_scale", partial(_per_row, rows)),
            read_zero=self._zeros(layer, (rows, groups), bits),
        )

    def _zeros(self, layer: Layer, shape: tuple[int, int], bits: int) -> Read | None:
        """Packed along the rows, or (older versions, and integers that are not packed) as they are."""
        rows, groups = shape
        if "weight_zero_point" not in layer and not self._needs_zeros:
            return None
        packed = (num_words(rows, bits), groups)
        plain = [shape, *([(rows,), (1, 1), (1,), ()] if groups == 1 else [])]
        is_packed = "weight_packed" in layer
        info = layer.find("weight_zero_point", INTEGERS, *([packed] if is_packed else []), *plain)
        if is_packed and info.dtype == "int32" and info.shape == packed:
            return layer.reader("weight_zero_point", lambda words: centred(unpack(words.t(), bits, rows), bits).t())
        return layer.reader("weight_zero_point", partial(_per_row, rows))


def _per_row(rows: int, values: Tensor) -> Tensor:
    """Values of a whole matrix, or of rows, or of their groups -> `[rows, groups]`."""
    return values.reshape(-1, 1).expand(rows, 1) if values.numel() in (1, rows) else values


def _weight_shape(layer: Layer) -> tuple[int, int]:
    layer.find("weight_shape", ("int64", "int32"), (2,))
    rows, columns = layer.files.read(f"{layer.name}.weight_shape").tolist()
    if rows < 1 or columns < 1:
        raise CheckpointError(f"{layer.name}.weight_shape: expected rows and columns, got {[rows, columns]}")
    return rows, columns


def _refuse_other_compression(section: Section) -> None:
    sparsity = object_of(section, "sparsity_config")
    if sparsity is not None:
        choice_of(sparsity, "format", ("dense",), "dense")
    if section.get("transform_config"):
        raise ConfigError(f"{name_of(section, 'transform_config')}: transforms of activations are not read")


def _is_reordered(weights: Section) -> bool:
    """Whether columns may be in another order than their groups. With `weight` (once `static`) they are in order."""
    order = weights.get("actorder")
    return order is not None and order is not False and order not in ("weight", "static")


def _check_weights(weights: Section) -> None:
    kind = choice_of(weights, "type", ("int", "float"), "int")
    bits, known = value_of(weights, "num_bits", int), BITS if kind == "int" else (8,)
    if bits not in known:
        raise ConfigError(f"{name_of(weights, 'num_bits')}: expected {' or '.join(map(str, known))}, got {bits}")
    choice_of(weights, "strategy", STRATEGIES if kind == "int" else STRATEGIES[:2], "tensor")
