"""GPTQ, as AutoGPTQ and GPTQModel write it: eight columns share a word, or four."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dpn_rt.builders.json_values import Section, choice_of, name_of, value_of
from dpn_rt.builders.quantized.layer import FLOATS, Layer
from dpn_rt.builders.quantized.matrix import IntegerMatrix, Matrix
from dpn_rt.builders.quantized.words import BITS, WORD, centred, unpack
from dpn_rt.errors import ConfigError


class Gptq:
    """The format `gptq`, whose zero points are stored less 1, and `gptq_v2`; without act-order."""

    name = "GPTQ"
    marks = ("qweight", "qzeros", "scales", "g_idx")
    unused = ()
    rounds_rows = False
    left_out = ()

    def __init__(self, section: Section) -> None:
        """
        Raises:
            ConfigError: config.json names another version, or other bits.
        """
        self._bits = value_of(section, "bits", int)
        if self._bits not in BITS:
            raise ConfigError(f"{name_of(section, 'bits')}: expected 4 or 8, got {self._bits}")
        self._group_size = value_of(section, "group_size", int, -1)
        key = "checkpoint_format" if section.get("checkpoint_format") is not None else "format"
        version = choice_of(section, key, ("gptq", "gptq_v2"), "gptq")
        if value_of(section, "is_marlin_format", bool, False):
            raise ConfigError(f"{name_of(section, 'is_marlin_format')}: marlin is not read, expected false")
        self._zero_offset = 1 if version == "gptq" else 0
        self._act_order = value_of(section, "desc_act", bool, False)
        self._place = name_of(section, "desc_act")

    def matrix(self, layer: Layer) -> Matrix:
        per_word = WORD // self._bits
        words, rows = layer.find("qweight", ("int32",)).shape
        columns = words * per_word
        groups = layer.find("scales", FLOATS).shape[0]
        group_size = layer.group_size("scales", columns, groups, (self._group_size,))
        scale = layer.find("scales", FLOATS, (groups, rows))
        layer.find("qzeros", ("int32",), (groups, -(-rows // per_word)))
        layer.check_in_order("g_idx", columns, group_size)
        if self._act_order and groups > 1 and "g_idx" not in layer:
            raise ConfigError(f"{self._place}: act-order is not read, expected false")
        return IntegerMatrix(
            shape=(rows, columns),
            bits=self._bits,
            group_size=group_size,
            dtype=scale.dtype,
            scale_name=f"{layer.name}.scales",
            read_integers=layer.reader("qweight", partial(self._integers, columns)),
            read_scale=layer.reader("scales", lambda tensor: tensor.t()),
            read_zero=layer.reader("qzeros", partial(self._zeros, rows)),
        )

    def _integers(self, columns: int, words: Tensor) -> Tensor:
        return centred(unpack(words.t(), self._bits, columns), self._bits)

    def _zeros(self, rows: int, words: Tensor) -> Tensor:
        stored = unpack(words, self._bits, rows)
        return centred(stored + self._zero_offset & (1 << self._bits) - 1, self._bits).t()
