"""Images to token files and back."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from titok_fast.cli.common import (
    DEFAULT_MODEL,
    BatchSize,
    Counter,
    Device,
    Dtype,
    Folder,
    ImageSize,
    Model,
    Network,
    Paths,
    PngWriter,
    Revision,
    Workers,
    check_pictures,
    check_place,
    check_seed,
    default_workers,
    option,
    png_names,
    say,
)
from titok_fast.cli.runs import Parts
from titok_fast.images import ImageFile, find_images, to_uint8
from titok_fast.tokens import Array, TokenFile, check_suffix
from titok_fast.training.data import key


def encode(
    paths: Paths,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Token file, .npz or .safetensors.")
    ],
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="Mirror each image.")] = False,
    random_crop: Annotated[
        int | None, option("Seed of crops at random places of the images.", "the centre")
    ] = None,
    shard: Annotated[
        str | None,
        option("Of the images each n-th alone from the i-th on, such as 1/8 to 8/8.", "all"),
    ] = None,
    batch_size: BatchSize = 16,
    workers: Workers = None,
) -> None:
    """Turn images into a token file; the same command finishes what an interrupted one began."""
    check_suffix(output)
    check_place("--output", output)
    if random_crop is not None:
        check_seed(random_crop, "--random-crop")
    _check_replaced(output)
    files = find_images(paths)
    class_names = sorted({file.class_name for file in files if file.class_name is not None})
    files = _share(files, shard)
    network = Network.load(model, revision, device, dtype, image_size)
    parts = Parts(
        output,
        {
            "model": network.name,
            "revision": revision,
            "weights": network.fingerprint,
            "device": network.device.type,
            "dtype": dtype,
            "image size": None if network.image_size == network.model.image_size else image_size,
            # On a GPU the last bits of a latent can depend on it.
            "batch size": batch_size if network.device.type == "cuda" else None,
            "mirror": mirror or None,
            "random crop": random_crop,
            "images": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
        },
    )
    todo = np.setdiff1d(np.arange(len(files)), parts.load()[0])
    done = len(files) - len(todo)
    if done:
        say(f"{done} of {len(files)} images were done before")
    workers = default_workers(workers, network.device)
    with Counter("encode", len(files), done) as counter:
        crops = None
        if random_crop is not None:
            crops = [_crop(random_crop, files[i].image_id) for i in todo]
        paths = [files[i].path for i in todo]
        for batch in network.images(paths, batch_size, workers, crops):
            counter.skip(batch.errors)
            if batch.indices:
                pixels = batch.pixels.flip(3) if mirror else batch.pixels
                tokens = network.encode(network.to_device(pixels), batch_size)
                parts.add(todo[batch.indices].tolist(), tokens.cpu().numpy())
                counter.advance(len(batch.indices))
    parts.flush()
    kept, values = parts.whole(len(files) - counter.skipped)
    if values is None:
        say(f"no image could be read, {output} is not written")
    else:
        _token_file(files, class_names, kept, values, network).save(output)
        say(f"{len(kept)} images to {output}: {counter.speed}")
    parts.remove()
    counter.finish()


def _crop(seed: int, image_id: str) -> tuple[float, float]:
    """Where the crop of an image lies, whatever other images there are."""
    across, down = (key(seed, "crop", axis, image_id) for axis in ("across", "down"))
    return (across >> 10) / 2**53, (down >> 10) / 2**53


def _check_replaced(output: Path) -> None:
    """Raises ValueError for a file that is not one of tokens."""
    if output.exists():
        try:
            TokenFile.load(output)
        except ValueError as error:
            raise ValueError(f"--output: {error}, and nothing else is replaced") from error


def _share(files: list[ImageFile], shard: str | None) -> list[ImageFile]:
    """The images of --shard."""
    if shard is None:
        return files
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"--shard: got {shard!r}, allowed is i/n with i from 1 to n")
    share = files[number - 1 :: count]
    if not share:
        raise ValueError(f"--shard: got {shard!r}, which has none of {len(files)} images")
    return share


def _token_file(
    files: Sequence[ImageFile],
    class_names: Sequence[str],
    kept: Array,
    tokens: Array,
    network: Network,
) -> TokenFile:
    positions = {name: i for i, name in enumerate(class_names)}
    labels = [-1 if name is None else positions[name] for _, _, name in files]
    return TokenFile(
        tokens=tokens,
        image_ids=[files[i].image_id for i in kept],
        model=network.name,
        fingerprint=network.fingerprint,
        image_size=network.image_size,
        codebook_size=network.model.codebook_size,
        revision=network.revision,
        labels=np.array(labels)[kept] if class_names else None,
        class_names=class_names or None,
    )


def decode(
    tokens: Annotated[Path, typer.Argument(help="Token file.", show_default=False)],
    output: Folder,
    model: Annotated[
        str | None,
        typer.Option(help="Where the model is, if not where the token file says."),
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    workers: Workers = None,
) -> None:
    """Turn a token file into PNG files, with the model that made it."""
    file = TokenFile.load(tokens)
    paths = [output / name for name in png_names(file.image_ids)]
    software = "titok-fast decode"
    check_pictures(paths, software)
    source = file.model if model is None else model
    if revision is None and source == file.model:
        revision = file.revision
    network = Network.load(source, revision, device, dtype)
    if network.fingerprint != file.fingerprint:
        made = _identity(file.model, file.revision, file.fingerprint)
        given = _identity(network.name, network.revision, network.fingerprint)
        raise ValueError(f"{tokens}: made with {made}, cannot be decoded with {given}")
    kind = np.float32 if file.codebook_size is None else np.int64
    with (
        Counter("decode", len(paths)) as counter,
        PngWriter(default_workers(workers, network.device), software) as writer,
    ):
        for start in range(0, len(paths), batch_size):
            values = file.tokens[start : start + batch_size].astype(kind)
            images = network.model.decode(torch.from_numpy(values).to(network.device))
            writer.write(paths[start : start + batch_size], to_uint8(images).cpu())
            counter.advance(len(values))
    say(f"{len(paths)} images to {output}: {counter.speed}")


def _identity(model: str, revision: str | None, fingerprint: str) -> str:
    return f"{model} ({f'revision {revision}, ' if revision else ''}weights {fingerprint})"
