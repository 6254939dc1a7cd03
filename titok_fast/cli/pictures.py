"""Images beside what the tokens keep of them."""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from titok_fast.analysis import code_colors, codebook, token_changes
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
    default_workers,
    flags,
    png_names,
    say,
)
from titok_fast.cli.drawing import TokenLabels, draw
from titok_fast.images import find_images, grid, read_pixels, write_png
from titok_fast.metrics import psnr, ssim
from titok_fast.models import TiTok


def reconstruct(
    paths: Paths,
    output: Folder,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    batch_size: BatchSize = 16,
    workers: Workers = None,
) -> None:
    """Encode and decode images: a picture of each beside its reconstruction, PSNR and SSIM."""
    files = find_images(paths)
    pictures = [output / name for name in png_names(file.image_id for file in files)]
    software = "titok-fast reconstruct"
    check_pictures(pictures, software)
    network = Network.load(model, revision, device, dtype, image_size)
    workers = default_workers(workers, network.device)
    values: list[tuple[float, float]] = []
    density = 0.0
    with Counter("reconstruct", len(files)) as counter, PngWriter(workers, software) as writer:
        for batch in network.images([file.path for file in files], batch_size, workers):
            counter.skip(batch.errors)
            if not batch.indices:
                continue
            originals = network.to_device(batch.pixels)
            tokens = network.encode(originals, batch_size)
            density = _bits_per_pixel(network, tokens[0])
            decoded = network.model.decode(tokens).float()
            quality = list(
                zip(psnr(decoded, originals).tolist(), ssim(decoded, originals).tolist(),
                    strict=True)
            )  # fmt: skip
            writer.write(
                [pictures[i] for i in batch.indices],
                [grid([pair]) for pair in zip(originals, decoded, strict=True)],
            )
            for i, (peak, structure) in zip(batch.indices, quality, strict=True):
                say(f"{files[i].image_id}  {peak:.2f} dB  SSIM {structure:.4f}")
            values += quality
            counter.advance(len(batch.indices))
    if values:
        means = [sum(column) / len(values) for column in zip(*values, strict=True)]
        say(
            f"{len(values)} images to {output}: mean PSNR {means[0]:.2f} dB, mean SSIM "
            f"{means[1]:.4f}, {density:.4g} bits per pixel, {counter.speed}"
        )
    counter.finish()


def inspect(
    image: Annotated[Path, typer.Argument(help="Image file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture, .png.")],
    replacement: Annotated[
        str, typer.Option(help="The code put in each token's place: nearest or farthest.")
    ] = "farthest",
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
) -> None:
    """Draw an image, its reconstruction, its tokens, and what each token changes."""
    if output.suffix != ".png":
        raise ValueError(f"--output: got suffix {output.suffix!r}, allowed is .png")
    software = "titok-fast inspect"
    check_pictures([output], software)
    network = Network.load(model, revision, device, dtype)
    tokenizer = network.model
    if not isinstance(tokenizer, TiTok):
        raise ValueError(f"--model: {network.name} is not a TiTok, which inspect draws")
    images = network.to_device(read_pixels(image, network.image_size)[None])
    tokens = network.encode(images, 1)[0]
    with flags("replacement"):
        changes = token_changes(tokenizer, tokens, replacement=replacement, batch_size=batch_size)
    quality = float(psnr(changes.reconstruction[None], images.cpu()))
    title = (
        f"{image.name} as {len(tokens)} tokens of {Path(network.name).name}: "
        f"{_bits_per_pixel(network, tokens):.4g} bits per pixel, PSNR {quality:.1f} dB"
    )
    labels = _labels(tokenizer, tokens, changes.replacements, replacement)
    write_png(output, draw(images[0].cpu(), changes, labels, title), software=software)
    say(f"{image} to {output}")


def _bits_per_pixel(network: Network, tokens: Tensor) -> float:
    """Size of an image's tokens, or of its float32 latents, for each of its pixels."""
    codebook_size = network.model.codebook_size
    bits = 32.0 if codebook_size is None else math.log2(codebook_size)
    return tokens.numel() * bits / network.image_size**2


def _labels(
    model: TiTok, tokens: Tensor, replacements: Tensor | None, replacement: str
) -> TokenLabels:
    if model.codebook_size is None or replacements is None:
        norms = tokens.float().norm(dim=-1).cpu()  # [L]
        grey = 0.3 + 0.6 * norms / norms.max().clamp_min(1e-12)
        return TokenLabels(
            colors=grey[:, None].expand(-1, 3),
            names=[f"{norm:.1f}" for norm in norms.tolist()],
            legend=["the norm of each latent;", "the larger, the brighter"],
            headers=[f"token {i}: norm {norm:.1f}" for i, norm in enumerate(norms.tolist())],
            replacement="zero, the mean of the prior,",
        )
    old, new = tokens.tolist(), replacements.tolist()
    preposition = "to" if replacement == "nearest" else "from"
    return TokenLabels(
        colors=code_colors(codebook(model))[torch.tensor(old)],
        names=[str(code) for code in old],
        legend=[f"codes 0 to {model.codebook_size - 1};", "similar codes, similar colours"],
        headers=[
            f"token {i}: code {a} to {b}" for i, (a, b) in enumerate(zip(old, new, strict=True))
        ],
        replacement=f"the code {replacement} {preposition} its own",
    )
