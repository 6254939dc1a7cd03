"""Construction, loading and saving that all models share."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titok_fast._files import replacing, write_json
from titok_fast.models.checks import found_at
from titok_fast.models.convert import naming, read_checkpoint, select
from titok_fast.ops.arguments import DTYPES, python_number

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
OLD_WEIGHTS_FILE = "pytorch_model.bin"
MAX_INTERPOLATIONS = 10  # one that stands for another, and so on
FLOATING = (*DTYPES, torch.float64)

Model = TypeVar("Model", bound="PretrainedModel")


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

    `config_key` is the key, with dots between levels, that tells its configurations from those of
    other models; where it is missing, the configuration may stand at `config_within` of a training
    file. In a checkpoint that Lightning wrote, the model's names may have one of
    `checkpoint_prefixes`; names after it that match a pattern of `checkpoint_ignored` are not the
    model's.

    Attributes:
        config: the configuration as plain dicts and lists, with OmegaConf's interpolations
            replaced; of a training file the section of the model. Keys that the model does not use
            are kept and saved.
    """

    releases: ClassVar[Mapping[str, Release]]
    full_precision: ClassVar[tuple[str, ...]] = ()
    config_key: ClassVar[str]
    config_within: ClassVar[str | None] = None
    checkpoint_prefixes: ClassVar[tuple[str, ...]] = ("",)
    checkpoint_ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(config, Mapping):
            raise TypeError(
                f"config: expected a mapping, got {type(config).__name__}; a name is for "
                "from_pretrained or from_config"
            )
        self.config = self.narrowed(config)

    @classmethod
    def narrowed(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration as plain dicts and lists, without interpolations.

        Args:
            config: it itself, or the training file that has it at `config_within`.

        Raises:
            ValueError: for an interpolation that leads to itself, or through more than ten others.
        """
        whole: dict[str, Any] = _plain(config, config)
        if cls.config_within is None or found_at(whole, cls.config_key) is not None:
            return whole
        within = found_at(whole, cls.config_within)
        return whole if found_at(within, cls.config_key) is None else within

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
        config: str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Loads a model with its weights.

        Args:
            path_or_hub_id: one of

                - a name in `releases`;
                - a folder with `config.json` and `model.safetensors`, or the older
                  `pytorch_model.bin` or a single other `.bin` or `.ckpt` file;
                - a `.safetensors` file, or one that `torch.save` or Lightning wrote, of which
                  averages of the weights are preferred; a file with the name of an official
                  checkpoint gets that model's configuration, any other needs `config.json` beside
                  it or `config`;
                - `owner/name`, a repository on the Hugging Face Hub.
            config: a name in `releases` or a mapping, instead of the weights' own configuration.
            revision: branch, tag or commit of the Hub repository.
            dtype: floating dtype of the network, see `cast`; None keeps that of the file.
            device: device of the parameters; None is the CPU.

        Returns:
            The model in evaluation mode.

        Raises:
            FileNotFoundError: when the path, the repository, the weights or the configuration are
                missing.
            ValueError: for weights whose names or shapes are not exactly the model's, or that are
                not floating, an unreadable file, a model that was never released, an unknown
                configuration, or a revision without a Hub repository.
            TypeError: for another `dtype`.
        """
        weights, config = locate(path_or_hub_id, cls.releases, revision=revision, config=config)
        model, _ = load_weights(cls, weights, config)
        model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return (model if dtype is None else model.cast(dtype)).eval()

    def cast(self, dtype: torch.dtype) -> Self:
        """Casts the network in place; what `full_precision` names stays float32, or becomes it.

        Args:
            dtype: float32, bfloat16, float16 or float64, which casts everything; codes are searched
                and tokens drawn in float32 even then.

        Returns:
            The model.

        Raises:
            TypeError: for another dtype.
        """
        if dtype not in FLOATING:
            raise TypeError(f"dtype: got {dtype}, allowed is {' or '.join(map(str, FLOATING))}")
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

        Raises:
            OSError: when a file cannot be written.
        """
        folder = Path(folder)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(folder / WEIGHTS_FILE) as temporary:
            try:
                save_file(tensors, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder / WEIGHTS_FILE}: {error}") from None
        write_json(folder / CONFIG_FILE, self.config)


@dataclass
class _Modes:
    before: dict[nn.Module, bool]
    users: int = 0


_evaluated: dict[nn.Module, _Modes] = {}
_evaluated_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, all modules are in evaluation mode, of several threads until the last leaves."""
    if torch.compiler.is_compiling() and not any(module.training for module in model.modules()):
        yield  # a lock would break the graph
        return
    with _evaluated_lock:
        modes = _evaluated.get(model)
        if modes is None:
            modes = _Modes({module: module.training for module in model.modules()})
            _evaluated[model] = modes
            model.eval()
        modes.users += 1
    try:
        yield
    finally:
        with _evaluated_lock:
            modes.users -= 1
            if modes.users == 0:
                del _evaluated[model]
                for module, mode in modes.before.items():
                    module.training = mode


def locate(
    path_or_hub_id: str | os.PathLike[str],
    releases: Mapping[str, Release],
    *,
    revision: str | None = None,
    config: str | Mapping[str, Any] | None = None,
) -> tuple[Path, Mapping[str, Any]]:
    """The weight file of a source, downloaded if need be, and the configuration.

    Args:
        path_or_hub_id: as for `PretrainedModel.from_pretrained`.
        releases: the names that are known.
        revision: branch, tag or commit of the Hub repository.
        config: a name in `releases` or a mapping, instead of the weights' own configuration.

    Raises:
        FileNotFoundError, ValueError: as `PretrainedModel.from_pretrained`.
    """
    name = os.fspath(path_or_hub_id)
    if isinstance(config, str):
        if config not in releases:
            raise ValueError(f"config: {config!r} is not one of {', '.join(releases)}")
        config = releases[config].config
    release = releases.get(name)
    if release is not None and release.folder is None:
        if release.hub_id is None:
            raise ValueError(
                f"path_or_hub_id: the weights of {name} were never released, "
                f"from_config({name!r}) builds it untrained"
            )
        weights = _download(release.hub_id, [release.hub_file], revision)
        return weights, release.config if config is None else config

    path = Path(name).expanduser() if release is None or release.folder is None else release.folder
    if release is None and not path.exists() and _is_hub_id(name):
        for known in releases.values():  # repositories that hold a checkpoint alone
            if known.hub_id == name and known.hub_file != WEIGHTS_FILE:
                weights = _download(name, [known.hub_file], revision)
                return weights, known.config if config is None else config
        if config is None:
            config = _read_config(_download(name, [CONFIG_FILE], revision))
        return _download(name, [WEIGHTS_FILE, OLD_WEIGHTS_FILE], revision), config
    if revision is not None:
        raise ValueError(f"revision: {revision!r} applies to a Hub repository, not to {path}")
    if not path.exists():
        others = [k.__name__ for k in PretrainedModel.__subclasses__() if str(path) in k.releases]
        hint = (
            "this installation lacks its weights"
            if release is not None
            else f"it is the name of another model, of class {others[0]}"
            if others
            else f"and it is not a Hub id or one of {', '.join(releases)}"
        )
        raise FileNotFoundError(f"path_or_hub_id: {path} does not exist, {hint}")
    weights = _weights_in(path) if path.is_dir() else path
    if config is not None:
        return weights, config
    for known in releases.values():
        if known.checkpoint == weights.name:
            return weights, known.config
    config_file = weights.with_name(CONFIG_FILE)
    if not config_file.exists():
        raise FileNotFoundError(
            f"path_or_hub_id: no {CONFIG_FILE} beside {weights}, whose name is not a release's; "
            "titok-fast convert --model takes another model's configuration"
        )
    return weights, _read_config(config_file)


def load_weights(
    model_class: type[Model], weights: Path, config: Mapping[str, Any]
) -> tuple[Model, dict[str, str]]:
    """A model with the weights of a file.

    Args:
        model_class: of the model.
        weights: a `.safetensors` file, or what `read_checkpoint` reads.
        config: of the model.

    Returns:
        The model on the CPU in training mode, and {its names: those in the file}.

    Raises:
        ValueError: for an unreadable file, names or shapes that are not exactly the model's,
            weights that are not floating, or an unusable configuration.
    """
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    sources: dict[str, str] = {}

    def choose(names: Sequence[str]) -> Mapping[str, str]:
        prefixes, ignored = model_class.checkpoint_prefixes, model_class.checkpoint_ignored
        sources.update(select(names, expected, prefixes, ignored))
        return sources

    if weights.suffix == ".safetensors":
        with naming(weights):
            state = load_file(weights)
        sources.update({name: name for name in state})
    else:
        state = read_checkpoint(weights, choose)
    _load_strict(model, state, weights)
    return model, sources


def _plain(value: Any, root: Any, depth: int = 0) -> Any:
    """Nested mappings and sequences of any class as new dicts and lists, without interpolations.

    Official files hold OmegaConf's "${model.vq_model.num_latent_tokens}", which is what stands
    there in `root`.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item, root, depth) for key, item in value.items()}
    if isinstance(value, str):
        match = re.fullmatch(r"\$\{([\w.]+)\}", value)
        found = found_at(root, match[1]) if match else None
        if found is None:
            return value
        if depth == MAX_INTERPOLATIONS:
            raise ValueError(f"config: {value} leads to itself, or on and on")
        return _plain(found, root, depth + 1)
    if isinstance(value, Sequence):
        return [_plain(item, root, depth) for item in value]
    return python_number(value)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def _download(hub_id: str, filenames: Sequence[str], revision: str | None) -> Path:
    """The first of the files that the repository has."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if level == logging.WARNING:  # its default, of a line for each attempt
        logger.setLevel(logging.ERROR)
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
    finally:
        logger.setLevel(level)


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE):
        if (folder / name).exists():
            return folder / name
    others = sorted([*folder.glob("*.bin"), *folder.glob("*.ckpt")])
    if len(others) != 1:
        raise FileNotFoundError(
            f"path_or_hub_id: {folder} holds neither {WEIGHTS_FILE} nor {OLD_WEIGHTS_FILE} nor a "
            f"single .bin or .ckpt file ({len(others)} found)"
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


def _load_strict(model: nn.Module, state: Mapping[str, Tensor], origin: Path) -> None:
    expected = model.state_dict()
    common = sorted(expected.keys() & state.keys())
    shapes = [
        f"{name} is {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in common
        if state[name].shape != expected[name].shape
    ]
    dtypes = [
        f"{name} is {state[name].dtype} instead of {' or '.join(map(str, FLOATING))}"
        for name in common
        if state[name].dtype not in FLOATING
    ]
    faults = [
        f"{label} {_shortened(names)}"
        for label, names in (
            ("missing", sorted(expected.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - expected.keys())),
            ("wrong shape:", shapes),
            ("wrong dtype:", dtypes),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"path_or_hub_id: {origin} does not fit {type(model).__name__}: {'; '.join(faults)}"
        )
    model.load_state_dict(state, strict=True, assign=True)


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
