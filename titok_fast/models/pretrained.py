"""Construction, loading and saving that all models share."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titok_fast._files import replacing

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
OLD_WEIGHTS_FILE = "pytorch_model.bin"


@dataclass(frozen=True)
class Release:
    """A named configuration, and where its weights are.

    Attributes:
        config: the configuration, in the form of the official `config.json`.
        hub_id: repository on the Hugging Face Hub; None when the weights were never released.
        hub_file: the weight file in that repository.
        checkpoint: the file under which the weights circulate on their own.
        folder: a folder of the installed package that holds the model instead.
    """

    config: Mapping[str, Any]
    hub_id: str | None = None
    hub_file: str = WEIGHTS_FILE
    checkpoint: str | None = None
    folder: Path | None = None


class PretrainedModel(nn.Module):
    """A module built from a configuration, stored as `config.json` and `model.safetensors`.

    A subclass takes the configuration as its only constructor argument, passes it to
    `super().__init__`, and lists its named configurations in `releases`.

    `full_precision` names the submodules that stay float32 when the rest is 16-bit: those that make
    latents and search codes, where rounding would change tokens.

    Attributes:
        config: the configuration as plain dicts and lists; keys that the model does not use are
            kept and saved.
    """

    releases: ClassVar[Mapping[str, Release]]
    full_precision: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config: dict[str, Any] = _plain(config)

    @classmethod
    def from_config(cls, name_or_config: str | Mapping[str, Any]) -> Self:
        """Builds the model with fresh weights.

        Args:
            name_or_config: a name in `releases`, or a configuration as a mapping.

        Returns:
            The model in training mode.

        Raises:
            ValueError: for an unknown name or an unusable configuration.
            TypeError: when it is neither a string nor a mapping.
        """
        if isinstance(name_or_config, str):
            if name_or_config not in cls.releases:
                raise ValueError(
                    f"name_or_config: {name_or_config!r} is not a {cls.__name__} configuration, "
                    f"known are {', '.join(cls.releases)}"
                )
            return cls(cls.releases[name_or_config].config)
        if not isinstance(name_or_config, Mapping):
            raise TypeError(
                f"name_or_config: got {type(name_or_config).__name__}, "
                "allowed is a name or a mapping"
            )
        return cls(name_or_config)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Loads a model with its weights.

        Args:
            path_or_hub_id: one of

                - a name in `releases`;
                - a folder with `config.json` and `model.safetensors`, or the older
                  `pytorch_model.bin` or a single other `.bin` file;
                - a `.safetensors` or `.bin` file; a file with the name of an official checkpoint
                  gets that model's configuration, any other needs `config.json` beside it;
                - `owner/name`, a repository on the Hugging Face Hub.
            revision: branch, tag or commit of the Hub repository.
            dtype: floating dtype of the network, see `cast`; None keeps that of the file.
            device: device of the parameters; None is the CPU.

        Returns:
            The model in evaluation mode.

        Raises:
            FileNotFoundError: when the path, the repository, the weights or the configuration are
                missing.
            ValueError: for weights whose names or shapes are not exactly the model's, an unreadable
                file, a model that was never released, or a revision without a Hub repository.
        """
        weights, config = cls._locate(path_or_hub_id, revision)
        state = _read_weights(weights)
        with torch.device("meta"):
            model = cls(config)
        _load_strict(model, state, weights)
        model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return (model if dtype is None else model.cast(dtype)).eval()

    def cast(self, dtype: torch.dtype) -> Self:
        """Casts the network in place; what `full_precision` names stays float32, or becomes it.

        Args:
            dtype: float32, bfloat16, float16 or float64, which casts everything.

        Returns:
            The model.

        Raises:
            TypeError: for another dtype.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, allowed is a floating dtype")
        modules = dict(self.named_modules())
        kept = [modules[name] for name in self.full_precision if name in modules]
        states = [module.state_dict() for module in kept]  # not yet rounded
        self.to(dtype)
        if dtype.itemsize < 4:
            for module, state in zip(kept, states, strict=True):
                module.float().load_state_dict(state)
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `model.safetensors` and `config.json`; each file appears whole or not at all.

        Args:
            folder: made if missing; files of these names in it are replaced.
        """
        folder = Path(folder)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(folder / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        with replacing(folder / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _locate(
        cls, source: str | os.PathLike[str], revision: str | None
    ) -> tuple[Path, Mapping[str, Any]]:
        """The weight file of a source, downloaded if need be, and the configuration."""
        name = os.fspath(source)
        release = cls.releases.get(name)
        if release is not None and release.folder is None:
            if release.hub_id is None:
                raise ValueError(
                    f"path_or_hub_id: the weights of {name} were never released, "
                    f"{cls.__name__}.from_config({name!r}) builds it untrained"
                )
            return _download(release.hub_id, [release.hub_file], revision), release.config

        path = (
            Path(name).expanduser() if release is None or release.folder is None else release.folder
        )
        if release is None and not path.exists() and _is_hub_id(name):
            config_file = _download(name, [CONFIG_FILE], revision)
            weights = _download(name, [WEIGHTS_FILE, OLD_WEIGHTS_FILE], revision)
            return weights, _read_config(config_file)
        if revision is not None:
            raise ValueError(f"revision: {revision!r} applies to a Hub repository, not to {path}")
        if not path.exists():
            hint = (
                "this installation lacks its weights"
                if release is not None
                else f"and it is not a Hub id or one of {', '.join(cls.releases)}"
            )
            raise FileNotFoundError(f"path_or_hub_id: {path} does not exist, {hint}")
        weights = _weights_in(path) if path.is_dir() else path
        for known in cls.releases.values():
            if known.checkpoint == weights.name:
                return weights, known.config
        config_file = weights.with_name(CONFIG_FILE)
        if not config_file.exists():
            raise FileNotFoundError(f"path_or_hub_id: no {CONFIG_FILE} beside {weights}")
        return weights, _read_config(config_file)


def _plain(value: Any) -> Any:
    """Nested mappings and sequences of any class as new dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def _download(hub_id: str, filenames: Sequence[str], revision: str | None) -> Path:
    """The first of the files that the repository has."""
    try:
        for filename in filenames[:-1]:
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(hub_id, filename, revision=revision))
        return Path(hf_hub_download(hub_id, filenames[-1], revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        where = hub_id if revision is None else f"{hub_id} at revision {revision!r}"
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"path_or_hub_id: cannot get {' or '.join(filenames)} of {where} from the Hub: {reason}"
        ) from error


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE):
        if (folder / name).exists():
            return folder / name
    others = sorted(folder.glob("*.bin"))
    if len(others) != 1:
        raise FileNotFoundError(
            f"path_or_hub_id: {folder} holds neither {WEIGHTS_FILE} nor {OLD_WEIGHTS_FILE} nor a "
            f"single .bin file ({len(others)} found)"
        )
    return others[0]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path_or_hub_id: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"path_or_hub_id: {path} holds {type(config).__name__}, not a mapping")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"path_or_hub_id: {path} is not a readable weight file: {reason}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(item, Tensor) for item in state.values()):
        raise ValueError(f"path_or_hub_id: {path} does not hold a flat mapping of names to tensors")
    return state


def _load_strict(model: nn.Module, state: dict[str, Tensor], origin: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = [
        f"{name} is {list(given[name])} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & given.keys())
        if given[name] != expected[name]
    ]
    faults = [
        f"{label} {_shortened(names)}"
        for label, names in (
            ("missing", sorted(expected.keys() - given.keys())),
            ("unexpected", sorted(given.keys() - expected.keys())),
            ("wrong shape:", shapes),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"path_or_hub_id: {origin} does not fit {type(model).__name__}: {'; '.join(faults)}"
        )
    model.load_state_dict(state, strict=True, assign=True)


def _shortened(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
