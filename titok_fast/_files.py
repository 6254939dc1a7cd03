"""Files that appear whole or not at all."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONG = 200  # bytes of a file's name


def remove_temporaries(folder: Path, names: str) -> None:
    """Removes what killed processes left of files whose names match a glob pattern."""
    for path in folder.glob(f".{names}.*.tmp"):
        path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Returns when the file's content would survive a loss of power."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block succeeds.

    The folder is made if missing; when the block raises, `path` stays as it was. The file gets the
    permissions of any new file, whatever its writer sets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if len(os.fsencode(name)) > _LONG:  # where a longer one could not be
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + path.suffix
    temporary = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a write: it names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
