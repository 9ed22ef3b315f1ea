"""Replace the files of a directory that stays where it is.

Files move within the directory, between it and three of its own: `.MARK.partial` with the new files, `.MARK.retiring`
with those of the old ones that have moved so far, and `.MARK.retired`, its name once all have. A killed process has
therefore left old files in one place or new files in one place, and the names say which.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpn_rt.schema.files import is_directory

_OURS = re.compile(r"\.[0-9a-f]{8}\.(partial|retiring|retired)")


def own_files(directory: Path) -> Iterator[str]:
    """Relative names of all files below a directory, without those of a swap that is under way or was killed.

    Those are not even looked into: another process may remove them now.
    """
    for entry in directory.iterdir() if is_directory(directory) else ():
        if not _OURS.fullmatch(entry.name):
            for file in (entry, *(() if entry.is_symlink() else entry.rglob("*"))):
                if file.is_symlink() or not file.is_dir():
                    yield file.relative_to(directory).as_posix()


def partial_directories(directory: Path) -> list[Path]:
    """The new files of swaps that are under way or were killed."""
    found = directory.glob(".*.partial") if is_directory(directory) else ()
    return [path for path in found if _OURS.fullmatch(path.name) and path.is_dir()]


def unfinished_swap(directory: Path) -> Path | None:
    """Where the old files of a swap are that was killed; None where there was none."""
    if not is_directory(directory):
        return None
    return next((path for kind in ("retiring", "retired") for path in directory.glob(f".????????.{kind}")), None)


@dataclass(frozen=True)
class Swap:
    """The old files of `target` for those in its `.MARK.partial`."""

    target: Path
    mark: str
    seal: str
    """The file that comes last and goes first."""

    def _directory(self, kind: str) -> Path:
        return self.target / f".{self.mark}.{kind}"

    def run(self) -> None:
        """Move the old files out and the new files in; after any exception the old files are back.

        Raises:
            OSError: a file cannot be moved.
        """
        new = list(own_files(self._directory("partial")))
        retiring, retired = self._directory("retiring"), self._directory("retired")
        retiring.mkdir()
        try:
            for name in sorted(own_files(self.target), key=lambda name: name != self.seal):
                _move(name, self.target, retiring)
            retiring.rename(retired)
            self._move_in()
        except BaseException:
            self._undo(new)
            raise
        shutil.rmtree(retired)

    def _undo(self, new: list[str]) -> None:
        for name in new:
            if not (self._directory("partial") / name).exists():
                _move(name, self.target, self._directory("partial"))
        self._move_back(self._directory("retired" if self._directory("retired").is_dir() else "retiring"))

    def settle(self) -> None:
        """End a swap whose process was killed: if the new files are all there they move in, else the old ones back."""
        retiring, retired = self._directory("retiring"), self._directory("retired")
        if retired.is_dir() and (self._directory("partial") / self.seal).exists():
            self._move_in()
        if retired.is_dir() and (self.target / self.seal).exists():
            shutil.rmtree(retired)
        elif retiring.is_dir():
            self._move_back(retiring)

    def _move_in(self) -> None:
        partial, retired = self._directory("partial"), self._directory("retired")
        for name in sorted(own_files(partial), key=lambda name: name == self.seal):
            _move(name, partial, self.target)
        for folder in {(self.target / name).parent for name in own_files(retired)} - {self.target}:
            if not _is_in_use(folder):
                with contextlib.suppress(OSError):  # it holds new files
                    folder.rmdir()

    def _move_back(self, old: Path) -> None:
        for name in sorted(own_files(old), key=lambda name: name == self.seal):
            _move(name, old, self.target)
        shutil.rmtree(old)


def _move(name: str, source: Path, destination: Path) -> None:
    (destination / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).rename(destination / name)


def _is_in_use(folder: Path) -> bool:
    """Whether it is this process's working directory."""
    with contextlib.suppress(OSError):
        return folder.samefile(Path.cwd())
    return False
