"""What every command does about the encoding of its arguments and of its output."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Collection

from dpn_rt.errors import ConfigError
from dpn_rt.schema.text import is_text


def escape_output() -> None:
    """From now on standard output escapes the characters that it cannot encode, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def check_text(options: argparse.Namespace, file_names: Collection[str] = ()) -> None:
    """Refuse arguments whose bytes are no text.

    Args:
        options: parsed; names of files, which may have any bytes, are paths or among `file_names`.
        file_names: of options.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name not in file_names and not is_text(text):
                raise ConfigError(f"--{name.replace('_', '-')} {text!r:.200}: not UTF-8, expected text in UTF-8")
