"""AWQ, as AutoAWQ writes it for its `gemm` kernel: eight rows share a word, in an order of their own."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dpn_rt.builders.json_values import Section, choice_of, name_of, value_of
from dpn_rt.builders.quantized.layer import FLOATS, Layer
from dpn_rt.builders.quantized.matrix import IntegerMatrix, Matrix
from dpn_rt.builders.quantized.words import WORD, centred, unpack
from dpn_rt.errors import ConfigError

BITS = 4
PER_WORD = WORD // BITS
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word has the integer of each of its eight rows."""


class Awq:
    """The format `awq`, version `gemm`."""

    name = "AWQ"
    marks = ("qweight", "qzeros", "scales")
    unused = ()
    rounds_rows = False
    left_out = ()

    def __init__(self, section: Section) -> None:
        """
        Raises:
            ConfigError: config.json names another version, or other bits.
        """
        version = value_of(section, "version", str, "gemm")
        if version.lower() != "gemm":
            raise ConfigError(f"{name_of(section, 'version')}: expected gemm, got {version!r}")
        choice_of(section, "backend", ("autoawq",), "autoawq")
        key = "w_bit" if "w_bit" in section else "bits"
        if value_of(section, key, int) != BITS:
            raise ConfigError(f"{name_of(section, key)}: expected {BITS}, got {section[key]}")
        self._group_size = value_of(section, "q_group_size" if "q_group_size" in section else "group_size", int, 128)

    def matrix(self, layer: Layer) -> Matrix:
        columns, words = layer.find("qweight", ("int32",)).shape
        rows = words * PER_WORD
        groups = layer.find("scales", FLOATS).shape[0]
        group_size = layer.group_size("scales", columns, groups, (self._group_size,))
        scale = layer.find("scales", FLOATS, (groups, rows))
        layer.find("qzeros", ("int32",), (groups, words))
        return IntegerMatrix(
            shape=(rows, columns),
            bits=BITS,
            group_size=group_size,
            dtype=scale.dtype,
            scale_name=f"{layer.name}.scales",
            read_integers=layer.reader("qweight", partial(_by_rows, rows)),
            read_scale=layer.reader("scales", lambda tensor: tensor.t()),
            read_zero=layer.reader("qzeros", partial(_by_rows, rows)),
        )


def _by_rows(rows: int, words: Tensor) -> Tensor:
    """`[n, out_features / 8]` int32 -> `[out_features, n]` int8."""
    fields = unpack(words, BITS, rows).view(len(words), -1, PER_WORD)[..., PLACES]
    return centred(fields.flatten(1), BITS).t()
