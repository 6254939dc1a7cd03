"""Token files: the tokens of many images, and what is needed to trust and to decode them."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from titok_fast._files import replacing
from titok_fast.models import TiTok, Tokenizer

SUFFIXES = (".npz", ".safetensors")
FORMAT = "titok_fast.tokens"
VERSION = 1

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of N images, and where they come from.

    Attributes:
        tokens: [N, L] codes, or [N, h, w] where they lie on a grid, uint16 up to
            a codebook of 65,536 and int32 above (any integer dtype is taken and converted); for a
            VAE variant latents [N, L, C] float32.
        image_ids: N names; see `titok_fast.images.ImageFile`.
        model: name, folder or Hub id of the model.
        fingerprint: of its weights, from `fingerprint`.
        image_size: side of the images in pixels.
        codebook_size: number of codes; None for latents.
        revision: of the Hub repository.
        labels: [N] int64, positions in `class_names`, -1 for an image without a class; None when
            no image has one.
        class_names: the classes, of folders in alphabetical order, of generated images all of the
            generator by number; None exactly when labels are.

    Raises:
        TypeError: for tokens of a dtype that does not go with `codebook_size`, or names that are
            not strings.
        ValueError: for tokens or labels out of range, latents that are not finite, or lengths that
            do not fit together.
    """

    tokens: Array
    image_ids: Sequence[str]
    model: str
    fingerprint: str
    image_size: int
    codebook_size: int | None = None
    revision: str | None = None
    labels: Array | None = None
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, np.ndarray):
            raise TypeError(f"tokens: got {type(self.tokens).__name__}, allowed is a numpy array")
        _check_tokens(self.tokens, self.codebook_size)
        if self.codebook_size is None:
            dtype: type[np.generic] = np.float32
        else:
            dtype = np.uint16 if self.codebook_size <= 2**16 else np.int32
        object.__setattr__(self, "tokens", np.ascontiguousarray(self.tokens, dtype=dtype))
        count = len(self.tokens)
        _check_names("image_ids", self.image_ids)
        if len(self.image_ids) != count:
            raise ValueError(f"image_ids: got {len(self.image_ids)}, allowed is one for each of "
                             f"{count} images")  # fmt: skip
        if (self.labels is None) != (self.class_names is None):
            raise ValueError("class_names: allowed with labels and only with them")
        if self.labels is not None and self.class_names is not None:
            _check_names("class_names", self.class_names)
            labels = np.asarray(self.labels)
            if labels.shape != (count,) or labels.dtype.kind not in "iu":
                raise ValueError(
                    f"labels: got {labels.dtype} {list(labels.shape)}, allowed are integers "
                    f"[{count}]"
                )
            if count and not -1 <= labels.min() <= labels.max() < len(self.class_names):
                raise ValueError(
                    f"labels: got {labels.min()} to {labels.max()}, allowed is -1 to "
                    f"{len(self.class_names) - 1}"
                )
            object.__setattr__(self, "labels", labels.astype(np.int64))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears whole or not at all, and has the same bytes every time.

        Args:
            path: with suffix `.npz` or `.safetensors`, which decides the form.

        Raises:
            ValueError: for another suffix.
            OSError: when it cannot be written.
        """
        path = Path(path)
        check_suffix(path)
        arrays = {"tokens": self.tokens}
        if self.labels is not None:
            arrays["labels"] = self.labels
        texts = {"image_ids": list(self.image_ids)}
        if self.class_names is not None:
            texts["class_names"] = list(self.class_names)
        fields = {"format": FORMAT, "version": str(VERSION), "model": self.model}
        fields |= {"fingerprint": self.fingerprint, "image_size": str(self.image_size)}
        if self.codebook_size is not None:
            fields["codebook_size"] = str(self.codebook_size)
        if self.revision is not None:
            fields["revision"] = self.revision
        with replacing(path) as temporary:
            if path.suffix == ".npz":
                for name, lines in texts.items():
                    arrays[name] = np.array(lines, dtype=np.str_)
                arrays |= {name: np.array(field) for name, field in fields.items()}
                with open(temporary, "wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
            else:
                for name, lines in texts.items():
                    arrays[name] = np.frombuffer(json.dumps(lines).encode(), np.uint8)
                # The header's fields come out of a hash map: in one, their order is fixed.
                try:
                    save_file(arrays, temporary, metadata={FORMAT: json.dumps(fields)})
                except SafetensorError as error:
                    raise OSError(f"{path}: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenFile":
        """Read and check a token file.

        Args:
            path: with suffix `.npz` or `.safetensors`.

        Returns:
            What `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            OSError: when it cannot be opened.
            ValueError: when it is not a token file, of another version, or not consistent; one line
                that begins with the path.
        """
        path = Path(path)
        check_suffix(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        with open(path, "rb") as file:
            try:
                arrays, texts, fields = _read_npz(file) if path.suffix == ".npz" else _read_st(path)
            except Exception as error:  # a damaged or hostile file raises whatever it runs into
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"{path}: not a token file ({reason})") from error
        version = fields.pop("version", None)
        if fields.pop("format", None) != FORMAT or version is None:
            raise ValueError(f"{path}: not a token file (its format is not {FORMAT})")
        if version != str(VERSION):
            version = " ".join(version.split())
            raise ValueError(f"{path}: got format version {version}, allowed is {VERSION}")
        try:
            return cls(
                tokens=arrays["tokens"],
                image_ids=texts["image_ids"],
                model=fields["model"],
                fingerprint=fields["fingerprint"],
                image_size=int(fields["image_size"]),
                codebook_size=int(fields["codebook_size"]) if "codebook_size" in fields else None,
                revision=fields.get("revision"),
                labels=arrays.get("labels"),
                class_names=texts.get("class_names"),
            )
        except KeyError as error:
            raise ValueError(f"{path}: not a token file (it lacks {error})") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def concatenated(files: Sequence[TokenFile]) -> TokenFile:
    """One token file with the images of several, one after another.

    Args:
        files: at least one.

    Returns:
        A file whose `model` and `revision` are the first one's.

    Raises:
        ValueError: for no file, or files of other weights, another image size, grid, codebook or
            classes.
    """
    if not files:
        raise ValueError("files: got none, at least one is needed")
    first = files[0]
    for i, file in enumerate(files):
        if reason := difference(file, first, "files[0]"):
            raise ValueError(f"files[{i}] {reason}")
    labels = [file.labels for file in files if file.labels is not None]
    return replace(
        first,
        tokens=np.concatenate([file.tokens for file in files]),
        image_ids=[name for file in files for name in file.image_ids],
        labels=np.concatenate(labels) if labels else None,
    )


def difference(file: TokenFile, other: TokenFile, name: str) -> str | None:
    """Why the tokens of a file are of another kind than those of the `other`, which has a name."""
    for field in ("fingerprint", "image_size", "codebook_size"):
        if getattr(file, field) != getattr(other, field):
            return f"has another {field} than {name}"
    names = [each.class_names for each in (file, other)]
    classes = [None if each is None else list(each) for each in names]
    if classes[0] != classes[1]:
        return f"has another class_names than {name}"
    shapes = [list(each.tokens.shape[1:]) for each in (file, other)]
    if shapes[0] != shapes[1]:
        return f"has images of {shapes[0]} tokens, {name} {shapes[1]}"
    return None


def _check_tokens(tokens: Array, codebook_size: int | None) -> None:
    if codebook_size is None:
        if tokens.dtype.kind != "f":
            raise TypeError(f"tokens: got dtype {tokens.dtype}, allowed are floating latents")
        if tokens.ndim != 3:
            raise ValueError(f"tokens: got shape {list(tokens.shape)}, allowed is [N, L, C]")
        if not np.isfinite(tokens).all():
            raise ValueError("tokens: got latents that are not finite")
        return
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"tokens: got dtype {tokens.dtype}, allowed are integers")
    if tokens.ndim not in (2, 3):
        raise ValueError(
            f"tokens: got shape {list(tokens.shape)}, allowed are [N, L] and [N, h, w]"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < codebook_size:
        raise ValueError(
            f"tokens: got {tokens.min()} to {tokens.max()}, allowed is 0 to {codebook_size - 1}"
        )


def _check_names(name: str, names: Sequence[str]) -> None:
    single = isinstance(names, str) or not isinstance(names, Sequence | np.ndarray)
    for each in [None] if single else names:
        if not isinstance(each, str):
            kind = type(names if single else each).__name__
            raise TypeError(f"{name}: got {kind}, allowed is a sequence of str")


_Contents = tuple[dict[str, Array], dict[str, list[str]], dict[str, str]]


def read_arrays(file: IO[bytes]) -> dict[str, Array]:
    """The arrays of an .npz file; raises for anything else, and for one that is damaged."""
    if file.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):  # NumPy would speak of pickles
        raise ValueError("it is not an archive of arrays")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        members = {name: archive[name] for name in archive.files}
    for name, member in members.items():
        if not isinstance(member, np.ndarray):
            raise ValueError(f"its {name} is not an array")
    return members


def _read_npz(file: IO[bytes]) -> _Contents:
    members = read_arrays(file)
    texts: dict[str, list[str]] = {}
    fields = {}
    for name in list(members):
        if name in ("image_ids", "class_names"):
            texts[name] = members.pop(name).tolist()
        elif name not in ("tokens", "labels"):
            fields[name] = str(members.pop(name))
    return members, texts, fields


def _read_st(path: Path) -> _Contents:
    with safe_open(path, framework="np") as file:
        fields = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
        if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
            raise ValueError(f"its {FORMAT} is not a mapping of strings")
        if not fields:
            raise ValueError(f"its metadata lack {FORMAT}")
        members = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    texts = {
        name: json.loads(members.pop(name).tobytes())
        for name in ("image_ids", "class_names")
        if name in members
    }
    return members, texts, fields


def check_suffix(path: Path) -> None:
    """Raises ValueError unless a token file can have this name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: got suffix {path.suffix!r}, allowed are {' and '.join(SUFFIXES)}"
        )


def fingerprint(model: Tokenizer) -> str:
    """A name for the weights that decide what a token means: all before the codebook, and it.

    Models that differ in the decoder alone share it, since they can decode each other's tokens.

    Args:
        model: as stored; a conversion to another dtype changes the result.

    Returns:
        16 hexadecimal digits.
    """
    if isinstance(model, TiTok):
        kind, first = f"{model.image_size} {model.is_legacy}", "latent_tokens"
        if model.quantize_mode == "vq":
            kind += f"{model.quantize.use_l2_norm}"
    else:
        kind, first = f"IBQTokenizer {model.stride}", "quant_conv."
    digest = hashlib.sha256(kind.encode())
    for name, tensor in model.state_dict().items():
        if name.startswith((first, "encoder.", "quantize.embedding.")):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()[:16]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's numbers as they lie in memory, row by row, to be hashed."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data
