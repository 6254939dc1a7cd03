"""Runs that are taken up where they stopped: their settings, and what they have made so far."""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from titok_fast._files import replacing, write_json
from titok_fast.tokens import Array, read_arrays

Setting = str | int | float | bool | None


def changed(old: Mapping[str, Setting], settings: Mapping[str, Setting]) -> str:
    """What is not as it was, name by name; "" where nothing is."""
    names = [name for name in settings if old.get(name) != settings[name]]
    return ", ".join(f"{name} {old.get(name)} now {settings[name]}" for name in names)


def check_settings(path: Path, settings: Mapping[str, Setting]) -> None:
    """Raises ValueError unless the file holds the same, as JSON."""
    try:
        changes = changed(json.loads(path.read_text(encoding="utf-8")), settings)
    except (AttributeError, OSError, ValueError):
        raise ValueError(f"{path}: not readable, delete its folder to start anew") from None
    if changes:
        raise ValueError(
            f"{path.parent}: left by a run with other settings ({changes}); "
            "repeat those to finish it, or delete the folder to start anew"
        )


class Parts:
    """What an unfinished run has made so far, in the hidden folder `.NAME.parts` beside its output.

    `manifest.json` holds the run's settings; each `<index>.npz` the tokens of some images by
    their position in the run. A file that was damaged is made anew. `lock` is locked by the process
    that writes them, until it ends.

    Args:
        output: the token file to be.
        settings: everything that the tokens depend on, as JSON values.
        interval: seconds between two files.

    Raises:
        ValueError: when the folder was left by a run with other settings, or another process
            writes to it.
        OSError: when it cannot be written.
    """

    def __init__(
        self, output: Path, settings: Mapping[str, Setting], *, interval: float = 2.0
    ) -> None:
        self.folder = output.with_name(f".{output.name}.parts")
        self._interval = interval
        self._written = -interval
        self._indices: list[int] = []
        self._tokens: list[Array] = []
        self._lock = locked(self.folder / "lock")
        manifest = self.folder / "manifest.json"
        if manifest.exists() and any(self.folder.glob("[0-9]*.npz")):
            check_settings(manifest, settings)
            return
        self._clear()  # nothing was done yet, or its removal was interrupted
        write_json(manifest, settings)

    def add(self, indices: Iterable[int], tokens: Array) -> None:
        """Keeps the tokens [n, ...] of n images; writes them once the interval has passed."""
        self._indices += indices
        self._tokens.append(tokens)
        if time.monotonic() - self._written >= self._interval:
            self.flush()

    def flush(self) -> None:
        """Writes what has not been written."""
        if self._indices:
            with (
                replacing(self.folder / f"{self._indices[0]:09d}.npz") as temporary,
                open(temporary, "wb") as file,
            ):
                np.savez(file, indices=self._indices, tokens=np.concatenate(self._tokens))
        self._indices, self._tokens, self._written = [], [], time.monotonic()

    def load(self) -> tuple[Array, Array | None]:
        """All that is written: positions [n] int64, ascending, and tokens [n, ...] or None."""
        indices, tokens = [], []
        for path in sorted(self.folder.glob("[0-9]*.npz")):
            try:
                with open(path, "rb") as file:
                    part = read_arrays(file)
                some, values = part["indices"], part["tokens"]
            except Exception:  # as in `TokenFile.load`
                path.unlink()
                continue
            indices.append(some)
            tokens.append(values)
        if not indices:
            return np.zeros(0, np.int64), None
        positions, first = np.unique(np.concatenate(indices), return_index=True)
        return positions, np.concatenate(tokens)[first]

    def whole(self, count: int) -> tuple[Array, Array | None]:
        """As `load`, of `count` images.

        Raises:
            RuntimeError: when the tokens of some are missing.
        """
        positions, tokens = self.load()
        lost = count - len(positions)
        if lost:
            raise RuntimeError(
                f"{self.folder}: tokens of {lost} images are gone or damaged, repeat the command"
            )
        return positions, tokens

    def remove(self) -> None:
        """Deletes the folder."""
        self._clear()
        (self.folder / "lock").unlink(missing_ok=True)
        self._lock.close()
        with suppress(OSError):  # another run may have begun
            self.folder.rmdir()

    def _clear(self) -> None:
        """Deletes all but the lock."""
        manifest = self.folder / "manifest.json"
        manifest.unlink(missing_ok=True)  # first, so that a rest is recognised as such
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()


def locked(path: Path) -> IO[bytes]:
    """A file of this process alone, while it is open; made with its folder if missing.

    Raises:
        ValueError: when another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")  # noqa: SIM115
    try:
        # One of flock would outlive a run that is killed, in its workers.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # else just deleted
    except (BlockingIOError, PermissionError, FileNotFoundError):
        free = False
    except OSError:  # a file system without locks
        free = True
    if not free:
        file.close()
        raise ValueError(f"{path.parent}: another run is writing to it, wait until it ends")
    return file
