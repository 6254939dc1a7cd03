"""Checkpoints of other programs: their tensors, read without running anything."""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from io import BytesIO
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

# Before the names of exponential moving averages, which lack their dots.
EMA_PREFIX = "model_ema."

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_checkpoint(
    path: str | os.PathLike[str],
    choose: Callable[[Sequence[str]], Mapping[str, str]] | None = None,
) -> dict[str, Tensor]:
    """Reads the tensors of a file that `torch.save` wrote, and nothing else of it.

    The file's pickle can name anything: of its names only those that rebuild tensors mean
    something here, all others become objects that do nothing. So hyper-parameters of packages that
    are not installed do no harm, nor does a pickle that was made to run something.

    Args:
        path: of a mapping of names to tensors, or of a mapping with such a one as `state_dict`,
            as Lightning writes it.
        choose: from the names in the file to {name in the result: name in the file}; only those
            tensors are read. None takes all under their own names.

    Returns:
        CPU tensors; those that share memory in the file share it here.

    Raises:
        OSError: when the file cannot be opened.
        ValueError: when it is damaged or holds anything else, or what `choose` raises; one line
            that begins with the path.
    """
    with open(path, "rb") as file, naming(path):
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        root, read = _read_zip(file) if zipped else _read_legacy(file)
        tensors = _state_dict(root)
        names = list(tensors)
        chosen = {name: name for name in names} if choose is None else choose(names)
        storages: dict[str, Tensor] = {}
        return {name: tensors[source].load(read, storages) for name, source in chosen.items()}


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever a weight file's contents raise into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # a damaged or hostile pickle raises whatever it runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{os.fspath(path)}: not a readable weight file ({reason})") from error


def select(
    names: Iterable[str], wanted: Iterable[str], prefixes: Sequence[str], ignored: Sequence[str]
) -> dict[str, str]:
    """Where a checkpoint has the tensors of a model; averages are preferred.

    Args:
        names: in the checkpoint.
        wanted: the model's.
        prefixes: that the model's names may have in a checkpoint; the first is taken under which
            it has one of them.
        ignored: patterns of names, after the prefix, that are not the model's.

    Returns:
        {name in the model: name in the checkpoint}: for each wanted name its average or, where the
        checkpoint has none, itself if it is there; also every other name with the prefix that is
        not ignored.

    Raises:
        ValueError: when an average could be that of two names.
    """
    given, wanted = set(names), list(wanted)
    plain = {name for name in given if not name.startswith(EMA_PREFIX)}
    prefix = next(
        (p for p in prefixes if any(given & {p + name, _average(p + name)} for name in wanted)),
        prefixes[0],
    )
    sources = {
        name.removeprefix(prefix): name
        for name in sorted(plain)
        if name.startswith(prefix)
        and not any(fnmatchcase(name.removeprefix(prefix), pattern) for pattern in ignored)
    }
    owners = Counter(map(_average, plain | {prefix + name for name in wanted}))
    for name in wanted:
        average = _average(prefix + name)
        if average in given:
            if owners[average] > 1:
                raise ValueError(f"{average} could be the average of {owners[average]} tensors")
            sources[name] = average
    return sources


def _average(name: str) -> str:
    return EMA_PREFIX + name.replace(".", "")


class _Inert:
    """What a name in a pickle means here: it can be called, built and filled, and does nothing.

    `__setstate__` also keeps a pickle from setting attributes, of objects or of the class.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __call__(self, *arguments: Any, **options: Any) -> _Inert:
        return self

    def __setstate__(self, *state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


class _OrderedDict(dict[Any, Any]):
    def __setstate__(self, *state: Any) -> None:
        """Takes no attributes, such as the `_metadata` of a state_dict."""


class _Parameter(_Inert):
    def __new__(cls, data: Any, *rest: Any) -> Any:
        return data


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


_Read = Callable[[_Storage], bytes]


class _Tensor(_Inert):
    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> None:
        self._storage = storage
        self._view = shape, stride, offset

    def load(self, read: _Read, storages: dict[str, Tensor]) -> Tensor:
        """The tensor; `storages` keeps what is shared."""
        dtype, key, numel = self._storage
        if key not in storages:
            data = bytearray(read(self._storage))
            if len(data) != numel * dtype.itemsize:
                raise ValueError(f"its storage {key} has {len(data)} bytes for {numel} numbers")
            storages[key] = (
                torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
            )
        tensor = storages[key].view(dtype).as_strided(*self._view)
        count = math.prod(tensor.shape)
        if count > numel:  # a copy could take any amount of memory
            raise ValueError(f"a tensor has {count} numbers for the {numel} of its storage {key}")
        return tensor if tensor.numel() == numel else tensor.clone()


_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "BoolStorage"): torch.bool,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ComplexDoubleStorage"): torch.complex128,
    ("torch", "ComplexFloatStorage"): torch.complex64,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "ShortStorage"): torch.int16,
}


class _Unpickler(pickle.Unpickler):
    """Unpickles without an import: a name is one of `_GLOBALS` or does nothing."""

    def __init__(self, file: IO[bytes]) -> None:
        start = file.tell()
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            # A registered extension is not looked up by name, a far index takes memory up to it.
            far = opcode.name.endswith("PUT") and isinstance(argument, int) and argument > count
            if opcode.name.startswith("EXT") or far:
                raise pickle.UnpicklingError(f"its pickle has {opcode.name} {argument}")
        file.seek(start)
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _GLOBALS.get((module, name), _Inert)

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = identity
        if (
            kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(key, str)
            or not isinstance(numel, int)
            or view not in ([], [None])
        ):
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        return self.storages.setdefault(key, _Storage(dtype, key, numel))


def _read_zip(file: IO[bytes]) -> tuple[Any, _Read]:
    """The object in a file of torch 1.6 or newer, and a reader of its storages."""
    archive = zipfile.ZipFile(file)
    members = set(archive.namelist())
    folders = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise ValueError(f"it has {len(folders)} data.pkl instead of one")

    def read(name: str) -> bytes:
        info = archive.getinfo(folders[0] + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its {name} is compressed")
        return archive.read(info)

    if f"{folders[0]}byteorder" in members and read("byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    root = _Unpickler(BytesIO(read("data.pkl"))).load()
    return root, lambda storage: read(f"data/{storage.key}")


def _read_legacy(file: IO[bytes]) -> tuple[Any, _Read]:
    """The object in a file of torch before 1.6, and a reader of its storages."""
    if _Unpickler(file).load() != _LEGACY_MAGIC or _Unpickler(file).load() != _LEGACY_PROTOCOL:
        raise ValueError("torch.save did not write it")
    if _Unpickler(file).load().get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    unpickler = _Unpickler(file)
    root = unpickler.load()
    starts = {}
    for key in _Unpickler(file).load():
        size = int.from_bytes(file.read(8), "little") * unpickler.storages[key].dtype.itemsize
        starts[key] = file.tell(), size
        file.seek(size, os.SEEK_CUR)

    def read(storage: _Storage) -> bytes:
        start, size = starts[storage.key]
        file.seek(start)
        return file.read(size)

    return root, read


def _state_dict(root: Any) -> dict[str, _Tensor]:
    state = root.get("state_dict", root) if isinstance(root, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) for name in state)
        or not all(isinstance(value, _Tensor) for value in state.values())
    ):
        raise ValueError("it does not hold a flat mapping of names to tensors")
    return state
