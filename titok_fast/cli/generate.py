"""From class labels to images."""

import glob
import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.lib.format import open_memmap
from torch import Tensor

from titok_fast._files import remove_temporaries, replacing, write_json
from titok_fast.cli.common import (
    DEFAULT_MODEL,
    BatchSize,
    Counter,
    Device,
    Dtype,
    Network,
    PngWriter,
    Workers,
    check_place,
    check_seed,
    default_workers,
    flag,
    flags,
    named_device,
    option,
    resolved,
    say,
    with_options,
)
from titok_fast.cli.runs import Parts, Setting, changed
from titok_fast.images import grid, read_pixels, to_float, write_png
from titok_fast.models import MaskGIT
from titok_fast.models.generate import (
    PAIRS,
    Generator,
    Sampler,
    arranged,
    image_size,
    pack_pair,
)
from titok_fast.models.maskgit import GUIDANCE_DECAYS, RULES, SCHEDULES
from titok_fast.tokens import TokenFile, raw_bytes

SHEET = 16  # images along a side of the contact sheet, at most


def generate(
    labels: Annotated[str | None, option("Classes such as 1,7,20-29, in turn.", "all")] = None,
    count: Annotated[int | None, option("Number of images.", "one for each label")] = None,
    seed: Annotated[int, option("Image i depends on it and on i alone.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of PNG files, a contact sheet and tokens."),
    ] = None,
    npz: Annotated[
        Path | None, option("Array arr_0 [N, H, W, 3] uint8, as the ADM evaluator reads it.")
    ] = None,
    model: Annotated[str, option(", ".join(PAIRS))] = DEFAULT_MODEL,
    tokenizer: Annotated[
        str | None, option("Its folder, file or hub id, if not the model's own.", "the model's")
    ] = None,
    generator: Annotated[
        str | None, option("The generator's, if not the model's own.", "the model's")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    capture: Annotated[
        bool | None,
        option("Record whole batches as CUDA graphs.", "on a GPU, 8 or more without --ids"),
    ] = None,
    guidance_scale: Annotated[
        float | None, option("Of classifier-free guidance.", "the model's")
    ] = None,
    steps: Annotated[int | None, option("Sampling steps (TiTok).", "the model's")] = None,
    guidance_decay: Annotated[
        str | None, option(f"TiTok: {', '.join(GUIDANCE_DECAYS)}.", "the model's")
    ] = None,
    guidance_scale_pow: Annotated[
        float | None, option("Exponent of the power-cosine decay (TiTok).", "3")
    ] = None,
    randomize_temperature: Annotated[
        float | None, option("Of the noise; falls to 0 in the last step (TiTok).", "the model's")
    ] = None,
    softmax_temperature_annealing: Annotated[
        bool | None,
        option("Divide the logits by less than 1.3, at last by 0.5 (TiTok).", "yes"),
    ] = None,
    schedule: Annotated[str | None, option(f"TiTok: {', '.join(SCHEDULES)}.", "arccos")] = None,
    rule: Annotated[str | None, option(f"TiTok: {', '.join(RULES)}.", "titok")] = None,
    temperature: Annotated[float | None, option("Of the draws (IBQ).", "the model's")] = None,
    top_k: Annotated[int | None, option("Tokens to draw from, 0 for all (IBQ).", "0")] = None,
    top_p: Annotated[float | None, option("Probability to draw from (IBQ).", "1")] = None,
    ids: Annotated[
        Path | None, option("Token file to edit: its rows are taken in turn, as labels are.")
    ] = None,
    regenerate: Annotated[
        str | None,
        option("Positions such as 0-15,20 to generate anew; others keep --ids. IBQ: to the end."),
    ] = None,
) -> None:
    """Generate images of classes; the same command finishes what an interrupted one began.

    Pixels are clamped and truncated to 8 bits, as in the official sampling script.
    """
    home = npz if output is None else output / "tokens.npz"
    if home is None:
        raise ValueError("--output: got neither it nor --npz, at least one is needed")
    if npz is not None and npz.suffix != ".npz":
        raise ValueError(f"--npz: got suffix {npz.suffix!r}, allowed is .npz")
    if output is not None and npz is not None and npz.resolve() == home.resolve():
        raise ValueError(f"--npz: got {npz}, which is the token file")
    if output is not None:
        check_place("--output", output / "tokens.npz")
    if npz is not None:
        check_place("--npz", npz)
    check_seed(seed)
    if count is not None and count < 1:
        raise ValueError(f"--count: got {count}, allowed is a positive number")
    if (ids is None) != (regenerate is None):
        raise ValueError(f"--regenerate: {'needs' if ids is None else 'needed with'} --ids")
    if model not in PAIRS:
        raise ValueError(f"--model: {model!r} is not one of {', '.join(PAIRS)}")
    if capture and (ids is not None or named_device(device).type != "cuda"):
        raise ValueError("--capture: allowed on a GPU and without --ids")
    names = PAIRS[model]
    network = Network.load(
        tokenizer or names.tokenizer,
        None,
        device,
        dtype,
        option="--tokenizer" if tokenizer else "--model",
    )
    with flags(path_or_hub_id="--generator" if generator else "--model"):
        transformer = names.generator_class.from_pretrained(
            generator or names.generator, dtype=network.dtype, device=network.device
        )
    with flags("generator"):
        size = image_size(network.model, transformer)
    pack_pair(network.model, transformer)
    sampling = with_options(
        transformer.sampling,
        model,
        guidance_scale=guidance_scale,
        steps=steps,
        guidance_decay=guidance_decay,
        guidance_scale_pow=guidance_scale_pow,
        randomize_temperature=randomize_temperature,
        softmax_temperature_annealing=softmax_temperature_annealing,
        schedule=schedule,
        rule=rule,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    if labels is None:
        labels = f"0-{transformer.num_classes - 1}"
    classes = torch.tensor(_numbers("--labels", labels, transformer.num_classes))
    kept = None
    if ids is not None and regenerate is not None:
        kept = _kept(_tokens(ids, network, transformer), regenerate, transformer)
    if count is None:
        count = len(classes if kept is None else kept)
    given = "ids" if isinstance(transformer, MaskGIT) else "prefix"
    sampler = Sampler(
        network.model,
        transformer,
        count=count,
        batch_size=batch_size,
        seed=seed,
        capture=capture,
        given=() if kept is None else (given,),
        **asdict(sampling),
    )
    run = _Run(
        home,
        output,
        npz,
        shape=(count, size),
        settings={
            "--model": model,
            "--tokenizer": None if tokenizer is None else network.name,
            "--generator": generator and resolved(generator, names.generator_class.releases),
            "tokenizer weights": _digest(network.model.state_dict().values()),
            "generator weights": _digest(transformer.state_dict().values()),
            "--labels": labels,
            "--count": count,
            "--seed": seed,
            **{flag(name): value for name, value in asdict(sampling).items()},
            "--ids": None if kept is None else _digest([kept]),
            "--device": network.device.type,
            "--dtype": dtype,
            "--batch-size": batch_size,  # rounding in the matrix products can depend on it
            **({"--capture": True} if sampler.captures else {}),  # and on what is done at once
        },
    )
    if run.done:
        say(f"{run.done} of {count} images were done before")
    workers = default_workers(workers, network.device)
    with Counter("generate", count, run.done) as counter, PngWriter(workers) as writer:
        for numbers in run.todo(batch_size):
            start = {} if kept is None else {given: kept[numbers % len(kept)]}
            batch = classes[numbers % len(classes)], numbers
            tokens, images = sampler(*(x.to(network.device) for x in batch), **start)
            images = images.float().clamp(0, 1)
            run.add(numbers, tokens.cpu(), images.mul(255).to(torch.uint8).cpu(), writer)
            counter.advance(len(numbers))
    run.finish(network, classes, transformer.num_classes)
    places = " and ".join(str(place) for place in (output, npz) if place is not None)
    say(f"{count} images to {places}: {counter.speed}")


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()[:16]


def _kept(tokens: Tensor, regenerate: str, generator: Generator) -> Tensor:
    """What the generator is given of tokens [N, L]: masked ones, or those before the first."""
    numbers = _numbers("--regenerate", regenerate, generator.num_tokens)
    if isinstance(generator, MaskGIT):
        tokens[:, numbers] = generator.mask_id
        return tokens
    first = min(numbers)
    if set(numbers) != set(range(first, generator.num_tokens)):
        raise ValueError(
            f"--regenerate: got {regenerate!r}, allowed is {first}-{generator.num_tokens - 1}, to "
            "the end, for tokens that are generated in turn"
        )
    return tokens[:, :first]


def _numbers(flag: str, text: str, limit: int) -> list[int]:
    """The numbers below `limit` that a list such as 1,7,20-29 names, in its order."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None:
            raise ValueError(f"{flag}: got {part!r}, allowed is a list such as 1,7,20-29")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < limit:
            order = ", ascending" if last < first else ""
            raise ValueError(f"{flag}: got {part!r}, allowed is 0 to {limit - 1}{order}")
        numbers += range(first, last + 1)
    return numbers


def _tokens(path: Path, network: Network, generator: Generator) -> Tensor:
    """The tokens [N, L] int64 of a token file of the same tokenizer and of the generator's grid."""
    file = TokenFile.load(path)
    if file.fingerprint != network.fingerprint:
        raise ValueError(
            f"--ids: {path} was made with {file.model} (weights {file.fingerprint}), allowed is "
            f"{network.name} (weights {network.fingerprint})"
        )
    if not len(file.tokens):
        raise ValueError(f"--ids: {path} holds no image")
    got = file.tokens.shape[1:]
    allowed = arranged(network.model, torch.zeros(1, generator.num_tokens)).shape[1:]
    if got != allowed:
        sizes = [" x ".join(map(str, shape)) for shape in (got, allowed)]
        raise ValueError(f"--ids: {path} has images of {sizes[0]} tokens, allowed is {sizes[1]}")
    return torch.from_numpy(file.tokens.astype(np.int64)).flatten(1)


def _recorded(path: Path) -> dict[str, Setting] | None:
    """The settings of the run that made an `options.json` or an array; None if none did."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                settings = json.loads(str(archive["options"]))
        else:
            settings = json.loads(path.read_text(encoding="utf-8"))
    except (
        AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile,
        zlib.error,
    ):  # fmt: skip
        return None
    return settings if isinstance(settings, dict) and "--model" in settings else None


def _check(flag: str, path: Path, record: Path, settings: Mapping[str, Setting]) -> None:
    """Raises ValueError unless the run that `record` tells of had the same settings.

    Args:
        flag: that names the place.
        path: the file that would be replaced.
        record: what `_recorded` takes.
        settings: of the run that would replace it.
    """
    old = _recorded(record)
    if old is None:
        raise ValueError(
            f"{flag}: {path} is there and not from a run of generate, allowed is another place"
        )
    if changes := changed(old, settings):
        raise ValueError(
            f"{flag}: {record} is from a run with other settings ({changes}); "
            "repeat those, or name another place"
        )


class _Run:
    """The files of a run, and which images an earlier run has finished.

    An image is finished when its tokens are among the parts and its PNG file exists; its pixels
    are in the array before its tokens are among the parts. `options.json` and the array tell the
    settings of the run that made them.

    Args:
        home: the file whose parts hold the tokens until the end.
        folder: of the PNG files, the contact sheet and the tokens.
        npz: file of the array of pixels.
        shape: number of images and their side in pixels.
        settings: everything that the images depend on.

    Raises:
        ValueError: when there are files of a run with other settings, or of none.
    """

    def __init__(
        self,
        home: Path,
        folder: Path | None,
        npz: Path | None,
        *,
        shape: tuple[int, int],
        settings: Mapping[str, Setting],
    ) -> None:
        count, size = shape
        self._folder, self._npz, self._size = folder, npz, size
        self._settings = settings
        self._paths: list[Path] = []
        last = []
        options = {**settings, "--npz": None if npz is None else str(npz.resolve())}
        if folder is not None:
            self._paths = [folder / f"{i:06d}.png" for i in range(count)]
            last = [folder / "sheet.png", folder / "tokens.npz"]
            record = folder / "options.json"
            pictures = sorted(folder.glob("[0-9]" * 6 + ".png"))
            there = [path for path in (record, *last, *pictures) if path.exists()]
            # A run that made no image, for want of memory say, leaves nothing to keep.
            if there and not (there == [record] and _recorded(record)):
                _check("--output", there[0], record, options)
        if npz is not None:
            last.append(npz)
            if npz.exists():
                _check("--npz", npz, npz, settings)
        self._whole = all(path.exists() for path in (*self._paths, *last))
        self._parts = Parts(home, options)
        if folder is not None:
            write_json(folder / "options.json", options)
            remove_temporaries(folder, "*.png")
        if npz is not None:
            remove_temporaries(npz.parent, glob.escape(npz.name))
        finished = np.full(count, self._whole)
        finished[self._parts.load()[0]] = True
        if folder is not None:
            finished &= [path.exists() for path in self._paths]
        self._array = self._parts.folder / "pixels.npy"
        if npz is not None and not self._whole and not self._array.exists():
            finished[:] = False
            with replacing(self._array) as temporary:
                pixels = open_memmap(temporary, "w+", np.uint8, (count, size, size, 3))
                _reserve(temporary, pixels.offset, pixels.nbytes)
        self._finished = torch.from_numpy(finished)

    @property
    def done(self) -> int:
        """How many images are finished."""
        return int(self._finished.sum())

    def todo(self, batch_size: int) -> Iterator[Tensor]:
        """Numbers of images to generate; every batch is one of an uninterrupted run."""
        for numbers in torch.arange(len(self._finished)).split(batch_size):
            if not self._finished[numbers].all():
                yield numbers

    def add(self, numbers: Tensor, tokens: Tensor, pixels: Tensor, writer: PngWriter) -> None:
        """Keep a batch: tokens [B, L], and pixels [B, 3, S, S] uint8."""
        if self._paths:
            writer.write([self._paths[i] for i in numbers], pixels)
        if self._npz is not None:
            array = open_memmap(self._array, "r+")
            array[numbers.numpy()] = pixels.permute(0, 2, 3, 1).numpy()
        self._parts.add(numbers.tolist(), tokens.numpy())

    def finish(self, network: Network, classes: Tensor, num_classes: int) -> None:
        """Write the files of all images, unless an earlier run did."""
        self._parts.flush()
        if not self._whole and self._npz is not None:
            with replacing(self._npz) as temporary, open(temporary, "wb") as file:
                options = np.array(json.dumps(self._settings))
                np.savez(file, arr_0=open_memmap(self._array, "r"), options=options)
        if not self._whole and self._folder is not None:
            rows = [
                [to_float(read_pixels(self._paths[i], self._size)) for i in row]
                for row in _sheet(len(self._paths), len(classes))
            ]
            write_png(self._folder / "sheet.png", grid(rows))
            self._token_file(network, classes, num_classes).save(self._folder / "tokens.npz")
        self._parts.remove()

    def _token_file(self, network: Network, classes: Tensor, num_classes: int) -> TokenFile:
        numbers, tokens = self._parts.whole(len(self._paths))
        assert tokens is not None  # of one image at least
        return TokenFile(
            tokens=arranged(network.model, torch.from_numpy(tokens)).numpy(),
            image_ids=[path.name for path in self._paths],
            model=network.name,
            fingerprint=network.fingerprint,
            image_size=self._size,
            codebook_size=network.model.codebook_size,
            labels=classes.numpy()[numbers % len(classes)],
            class_names=[str(number) for number in range(num_classes)],
        )


def _reserve(path: Path, offset: int, size: int) -> None:
    """Takes a file's place on the disk: a page of a memory map that finds none ends the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), offset, size)
            except OSError as error:
                reason = f"{error.strerror}: {size:,} bytes in {path.parent}"
                raise OSError(f"--npz: {reason}") from None


def _sheet(count: int, classes: int) -> list[range]:
    """Numbers of the images in each row: a row for each label, or where that fails a square."""
    if 1 < classes <= SHEET and classes < count:
        return [range(count)[row::classes][:SHEET] for row in range(classes)]
    shown = min(count, SHEET**2)
    side = math.ceil(math.sqrt(shown))
    return [range(shown)[start : start + side] for start in range(0, shown, side)]
