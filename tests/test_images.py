"""Image files are found, read as the official evaluation reads them, and written whole."""

import io
import math
import os
import signal
import struct
import zlib
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from titok_fast.images import (
    ImageFile,
    find_images,
    grid,
    load_images,
    png_software,
    prepare_image,
    read_image,
    read_pixels,
    to_float,
    to_image,
    to_uint8,
    write_png,
)


@pytest.fixture
def picture():
    y, x = np.mgrid[0:60, 0:100]
    return Image.fromarray(np.stack([2 * x, 4 * y, 255 - x - y], -1).astype(np.uint8))


def test_resize_and_crop(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    resized = picture.resize((53, 32), Image.Resampling.BICUBIC)  # int(100 * 32 / 60)
    left = round((53 - 32) / 2)
    expected = np.asarray(resized.crop((left, 0, left + 32, 32))).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)
    tall = picture.transpose(Image.Transpose.ROTATE_90)
    tall.save(tmp_path / "tall.png")
    assert read_image(tmp_path / "tall.png", 32).shape == (3, 32, 32)


def test_the_longer_edge_is_truncated_as_officially():
    """torchvision's int(size * long / short), where (size / short) * long rounds to below 384."""
    edges = torch.arange(588 * 392 * 3).remainder(251).to(torch.uint8).view(392, 588, 3).numpy()
    resized = Image.fromarray(edges).resize((384, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((64, 0, 320, 256))).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(prepare_image(edges, 256).numpy(), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_image_in_memory_is_prepared_as_a_file(picture, tmp_path, interpolation):
    expected = read_image(_saved(picture, tmp_path / "a.png"), 32, interpolation=interpolation)
    for image in (picture, np.asarray(picture)):
        assert torch.equal(prepare_image(image, 32, interpolation=interpolation), expected)
    grey = read_image(_saved(picture.convert("L"), tmp_path / "b.png"), 32)
    assert torch.equal(prepare_image(picture.convert("L"), 32), grey)
    for image, message in (
        (np.zeros((4, 4, 3), np.float32), r"float32 of shape \[4, 4, 3\], allowed is uint8"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 of shape \[3, 4, 4\], allowed is uint8"),
        (torch.zeros(4, 4, 3), "got Tensor, allowed is a Pillow image or an array"),
    ):
        with pytest.raises(TypeError, match=f"image: .*{message}"):
            prepare_image(image, 32)
    for image, size, message in (
        (picture, 0, "size: got 0, allowed is a positive int"),
        (np.zeros((0, 5, 3), np.uint8), 32, "image: got 5 x 0 pixels"),
        (Image.new("F", (4, 4)), 32, "mode F, whose white is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_image(image, size, interpolation=interpolation)


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (100, 60, 32, 2050577339),
        (60, 100, 32, 1745667497),
        (45, 64, 32, 486097423),
        (64, 64, 32, 372641231),
        (31, 50, 32, 1383057807),
        (20, 13, 32, 1448888073),
        (33, 3, 16, 1774466206),
        (5, 300, 16, 46499282),
        (640, 427, 256, 2655390290),
    ],
)
def test_bilinear_is_that_of_opencv(tmp_path, width, height, size, expected):
    """CRC-32 of what SmallestMaxSize and CenterCrop of albumentations 1.4.4 give, OpenCV 4.14."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * x + 3 * y, 7 * x * y, 5 * x + y * y // 3], -1).astype(np.uint8)
    path = _saved(Image.fromarray(pixels), tmp_path / "a.png")
    cropped = read_pixels(path, size, interpolation="bilinear")
    assert zlib.crc32(cropped.permute(1, 2, 0).contiguous().numpy()) == expected
    image = read_image(path, size, interpolation="bilinear")
    assert torch.equal(image, to_float(cropped))


def test_bilinear_is_near_the_exact_mean(picture, tmp_path):
    path = _saved(picture, tmp_path / "a.png")
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double()
    exact = torch.nn.functional.interpolate(whole, size=(32, 53), mode="bilinear")[0, :, :, 10:42]
    error = read_pixels(path, 32, interpolation="bilinear").double() - exact
    assert float(error.abs().max()) < 1  # OpenCV truncates


def test_interpolations_are_named(picture, tmp_path):
    path = _saved(picture, tmp_path / "a.png")
    words = "interpolation: got 'nearest', allowed are 'bicubic', 'bilinear'"
    for call in (read_image, read_pixels):
        with pytest.raises(ValueError, match=words):
            call(path, 32, interpolation="nearest")
    with pytest.raises(ValueError, match=words):
        load_images([str(path)], 32, batch_size=1, interpolation="nearest")
    (batch,) = load_images([str(path)], 32, batch_size=1, interpolation="bilinear")
    assert torch.equal(batch.pixels[0], read_pixels(path, 32, interpolation="bilinear"))
    assert not torch.equal(batch.pixels[0], read_pixels(path, 32))


def test_modes(picture, tmp_path):
    exact = read_image(_saved(picture, tmp_path / "rgb.png"), 32)
    grey = read_image(_saved(picture.convert("L"), tmp_path / "grey.png"), 32)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    cmyk = read_image(_saved(picture.convert("CMYK"), tmp_path / "cmyk.tif"), 32)
    assert float((cmyk - exact).abs().max()) < 0.02
    palette = read_image(_saved(picture.quantize(256), tmp_path / "palette.png"), 32)
    assert float((palette - exact).abs().mean()) < 0.03
    one_bit = read_image(_saved(picture.convert("1"), tmp_path / "bit.png"), 32)
    assert one_bit.min() < 0.5 < one_bit.max()


def test_16_bit_grey_keeps_its_range(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    pixels = read_image(_saved(Image.fromarray(ramp), tmp_path / "deep.png"), 64)
    np.testing.assert_allclose(pixels[0].numpy(), ramp / 65535, atol=0.5 / 255 + 1e-6)


def test_transparency_lies_over_white(picture, tmp_path):
    picture.putalpha(0)
    assert bool((read_image(_saved(picture, tmp_path / "clear.png"), 32) == 1).all())
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([255, 0, 0, 0, 255, 0])
    indexed.info["transparency"] = 0
    assert bool((read_image(_saved(indexed, tmp_path / "indexed.png"), 8) == 1).all())


def test_exif_rotation(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=exif)
    straight = read_image(_saved(picture, tmp_path / "straight.png"), 32)
    assert torch.equal(read_image(tmp_path / "turned.png", 32), straight)


def test_a_header_that_is_no_exif_turns_nothing(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "a.jpg", dpi=(72, 72))
    exact = read_image(tmp_path / "a.jpg", 32)
    picture.save(tmp_path / "b.jpg", dpi=(72, 72), exif=b"Exif\0\0no TIFF header at all")
    assert torch.equal(read_image(tmp_path / "b.jpg", 32), exact)
    for error in (SyntaxError, AttributeError, struct.error):
        monkeypatch.setattr(Image.Image, "getexif", MagicMock(side_effect=error("damaged")))
        assert torch.equal(prepare_image(picture, 32), read_image(tmp_path / "a.png", 32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_that_of_pillow(picture, orientation):
    exif = picture.getexif()
    exif[0x0112] = orientation
    assert torch.equal(
        prepare_image(picture, 32), prepare_image(ImageOps.exif_transpose(picture), 32)
    )


def test_what_is_not_an_image_is_named(picture, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(OSError, match="BytesIO: not a readable image"):
        read_image(io.BytesIO(b"not an image"), 32)
    with pytest.raises(OSError, match=r"text\.png: not a readable image"):
        read_image(tmp_path / "text.png", 32)
    with pytest.raises(OSError, match=r"absent\.png: not a readable image"):
        read_image(tmp_path / "absent.png", 32)
    picture.save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=r"cut\.jpg: not a readable image"):
        read_image(tmp_path / "cut.jpg", 32)


def test_an_image_that_would_grow_beyond_bounds_is_refused(tmp_path):
    Image.new("L", (1, 100_000)).save(tmp_path / "thread.png")
    with pytest.raises(OSError, match="1 x 100000 would be resized to 256 x 25600000"):
        read_image(tmp_path / "thread.png", 256)
    assert read_image(tmp_path / "thread.png", 1).shape == (3, 1, 1)


def test_whatever_a_decoder_raises_is_an_unreadable_image(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "a.png")

    def crash(*_):
        raise IndexError("list\nindex")

    monkeypatch.setattr(Image.Image, "resize", crash)
    with pytest.raises(OSError, match=r"a\.png: not a readable image \(list index\)"):
        read_image(tmp_path / "a.png", 32)


def test_eight_bits_and_floats(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    pixels = read_pixels(tmp_path / "a.png", 32)
    assert pixels.dtype == torch.uint8
    assert torch.equal(read_image(tmp_path / "a.png", 32), to_float(pixels))
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(every), every.float() / 255)
    assert torch.equal(to_uint8(to_float(every)), every)


@pytest.fixture
def tree(picture, tmp_path, monkeypatch):
    """Images below the working folder: two classes, one loose, and what is to be left out."""
    for name in ("set/dog/2.png", "set/dog/10.JPG", "set/cat/deep/1.webp", "set/loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    (tmp_path / "set" / "notes.txt").write_text("no image")
    (tmp_path / "set" / ".hidden").mkdir()
    picture.save(tmp_path / "set" / ".hidden" / "3.png")
    picture.save(tmp_path / "set" / "dog" / "._2.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_gives_relative_ids_and_classes(tree):
    found = find_images(["set"])
    assert [(file.image_id, file.class_name) for file in found] == [
        ("cat/deep/1.webp", "cat"), ("dog/10.JPG", "dog"), ("dog/2.png", "dog"),
        ("loose.png", None),
    ]  # fmt: skip
    assert found[0].path == os.path.join("set", "cat/deep/1.webp")
    os.symlink(tree / "set", tree / "link")
    assert [file.image_id for file in find_images(["link"])] == [f.image_id for f in found]
    assert [file.image_id for file in find_images([str(tree / "set")])] == [
        file.image_id for file in found
    ]


def test_files_patterns_and_lists(tree):
    assert find_images(["set/loose.png"]) == [ImageFile("set/loose.png", "set/loose.png")]
    assert [f.image_id for f in find_images(["set/dog/*", "set/loose.png"])] == [
        "set/dog/10.JPG", "set/dog/2.png", "set/loose.png",
    ]  # fmt: skip
    assert [f.image_id for f in find_images(["s*/**/*.webp"])] == ["set/cat/deep/1.webp"]
    assert [f.image_id for f in find_images(["s*"])] == [f.image_id for f in find_images(["set"])]
    (tree / "list.txt").write_text("set/loose.png\n\nset/dog\r\nabsent [1].png\n")
    assert [f.image_id for f in find_images(["@list.txt"])] == [
        "set/loose.png", "10.JPG", "2.png", "absent [1].png",
    ]  # fmt: skip
    os.rename("set/loose.png", "set/[1].png")
    assert [f.image_id for f in find_images(["set/[1].png"])] == ["set/[1].png"]


def test_arguments_that_name_nothing(tree):
    (tree / "empty").mkdir()
    (tree / "list.txt").write_text("\n")
    for argument in ("absent.png", "*.gif", "empty", "@list.txt"):
        with pytest.raises(FileNotFoundError, match=r"PATHS: '.*(absent|gif|empty|list)"):
            find_images(["set", argument])
    with pytest.raises(FileNotFoundError, match="absent"):
        find_images(["@absent.txt"])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_loaded_in_order_and_errors_are_values(tmp_path, workers):
    paths = []
    for i in range(11):
        paths.append(str(tmp_path / f"{i}.png"))
        write_png(paths[-1], torch.full((3, 9, 9), i / 255))
    for i in (3, 6, 7, 8):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    batches = list(load_images(paths, 8, batch_size=3, workers=workers))
    assert [batch.indices for batch in batches] == [[0, 1, 2], [4, 5], [], [9, 10]]
    for batch in batches:
        assert batch.pixels.dtype == torch.uint8 or not batch.indices
        for index, pixels in zip(batch.indices, batch.pixels, strict=True):
            assert pixels.shape == (3, 8, 8) and bool((pixels == index).all())
    messages = [message for batch in batches for message in batch.errors]
    assert len(messages) == 4 and "3.png: not a readable image" in messages[0]


def test_shared_memory_may_be_full(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("unable to allocate shared memory")

    def late(*_):
        raise TimeoutError

    for i in range(5):
        write_png(tmp_path / f"{i}.png", torch.full((3, 9, 9), i / 255))
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        batches = list(load_images(paths, 8, batch_size=2, workers=1))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert [batch.pixels[:, 0, 0, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]


def test_workers_start_after_the_threads_of_this_process(tmp_path):
    write_png(tmp_path / "a.png", torch.rand(3, 300, 300))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        a = torch.rand(256, 256)
        (a @ a).exp().sum()
        (batch,) = load_images([str(tmp_path / "a.png")], 256, batch_size=4, workers=1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(batch.pixels[0], read_pixels(tmp_path / "a.png", 256))


def test_png_round_trip(tmp_path):
    pixels = torch.rand(3, 9, 7)
    write_png(tmp_path / "new" / "a.png", pixels)
    with Image.open(tmp_path / "new" / "a.png") as image:
        back = np.asarray(image).transpose(2, 0, 1)
    np.testing.assert_array_equal(back, (pixels * 255).round().numpy().astype(np.uint8))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    assert to_image(torch.full((3, 1, 1), 2.0)).getpixel((0, 0)) == (255, 255, 255)


def test_a_png_file_says_what_wrote_it(tmp_path):
    pixels = torch.rand(3, 9, 7)
    for name, image in (("a", pixels), ("b", pixels), ("c", to_image(pixels))):
        write_png(tmp_path / f"{name}.png", image, software="some command")
        assert png_software(tmp_path / f"{name}.png") == "some command"
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    write_png(tmp_path / "plain.png", pixels)
    (tmp_path / "noise.png").write_bytes(b"\x89PNG")
    to_image(pixels).save(tmp_path / "a.jpg")
    for name in ("plain.png", "noise.png", "absent.png", "a.jpg"):
        assert png_software(tmp_path / name) is None


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (8, 8), (1, 8, 8)])
def test_pixels_are_of_one_image_in_colour(shape, tmp_path):
    with pytest.raises(ValueError, match=r"pixels: got shape .*, allowed is \[3, H, W\]"):
        write_png(tmp_path / "a.png", torch.zeros(shape))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_png(tmp_path / "a.png", torch.zeros(3, 4, 4))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="empty"):
        write_png(tmp_path / "a.png", Image.new("RGB", (0, 4)))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_grid():
    a, b = torch.zeros(3, 2, 3), torch.full((3, 2, 3), 0.5)
    canvas = grid([[a, b], [b]], gap=1, scale=2)
    assert canvas.shape == (3, 2 * 4 + 1, 2 * 6 + 1)
    assert bool((canvas[:, :4, :6] == 0).all()) and bool((canvas[:, 5:, :6] == 0.5).all())
    assert bool((canvas[:, 4] == 1).all()) and bool((canvas[:, 5:, 6:] == 1).all())
    with pytest.raises(ValueError, match="rows: got no image"):
        grid([])


def _saved(image, path):
    image.save(path)
    return path


def test_transparency_of_16_bits_and_unknown_white(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "clear.png", transparency=0)
    assert bool((read_image(tmp_path / "clear.png", 8) == 1).all())
    for dtype in (np.float32, np.int32):
        Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "unknown.tif")
        with pytest.raises(OSError, match=r"not a readable image .*whose white is unknown"):
            read_image(tmp_path / "unknown.tif", 8)


def test_links_in_a_circle_end(tree):
    before = find_images(["set"])
    os.symlink("..", tree / "set" / "dog" / "up")
    os.symlink(".", tree / "set" / "self")
    assert find_images(["set"]) == before
    os.symlink(tree / "set" / "cat", tree / "set" / "cats")
    assert len(find_images(["set"])) == len(before) + 1


def test_a_list_may_begin_with_a_byte_order_mark(tree):
    (tree / "list.txt").write_text("set/loose.png\n", encoding="utf-8-sig")
    assert [file.path for file in find_images(["@list.txt"])] == ["set/loose.png"]


def test_sizes_are_checked_before_a_file_is_read(tree):
    for options in ({"size": 0, "batch_size": 1}, {"size": 8, "batch_size": 0}):
        with pytest.raises(ValueError, match="got 0, allowed is a positive int"):
            load_images(["set/loose.png"], **options)


def test_long_names_are_written(tmp_path):
    for name in ("x" * 246 + ".png", "é" * 120 + ".png"):
        write_png(tmp_path / name, torch.zeros(3, 2, 2))
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_the_longer_edge_of_a_tall_image_is_truncated_too():
    edges = torch.arange(588 * 392 * 3).remainder(251).to(torch.uint8).view(588, 392, 3).numpy()
    resized = Image.fromarray(edges[:500]).resize(
        (256, int(256 * 500 / 392)), Image.Resampling.BICUBIC
    )
    top = round((resized.height - 256) / 2)
    expected = np.asarray(resized.crop((0, top, 256, top + 256))).transpose(2, 0, 1) / np.float32(
        255
    )
    assert np.array_equal(prepare_image(edges[:500], 256).numpy(), expected)


def test_16_bit_grey_of_netpbm_keeps_its_range(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    (tmp_path / "deep.pgm").write_bytes(b"P5 64 64 65535\n" + ramp.astype(">u2").tobytes())
    pixels = read_image(tmp_path / "deep.pgm", 64)
    np.testing.assert_allclose(pixels[0].numpy(), ramp / 65535, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_reach_both_edges(picture, tmp_path, interpolation):
    path = _saved(picture.resize((34, 32)), tmp_path / "a.png")
    whole = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    first, last = (
        read_pixels(path, 32, interpolation=interpolation, crop=(at, 0.5)) for at in (0, 1 - 1e-9)
    )
    assert torch.equal(first, whole[:, :, :32]) and torch.equal(last, whole[:, :, 2:])


@pytest.mark.parametrize("crop", [(1.0, 0.5), (-0.1, 0), (0.5,), (0, math.nan)])
def test_a_bad_crop_is_no_bad_file(crop, picture, tmp_path):
    path = _saved(picture, tmp_path / "a.png")
    words = "crop: got .*, allowed are two numbers from 0, below 1, or None"
    with pytest.raises(ValueError, match=words):
        read_pixels(path, 32, crop=crop)
    with pytest.raises(ValueError, match=words):
        load_images([str(path)], 32, batch_size=1, crops=[crop])
    with pytest.raises(ValueError, match="crops: got 2, allowed is one for each of 1 paths"):
        load_images([str(path)], 32, batch_size=1, crops=[None, None])


def test_small_images_are_enlarged(tmp_path):
    path = _saved(Image.new("RGB", (5, 3), "red"), tmp_path / "a.png")
    assert read_image(path, 32).shape == (3, 32, 32)


def test_a_list_may_name_what_is_not_utf8(tree):
    (tree / "list.txt").write_bytes(b"set/\xff.png\n")
    assert [file.path for file in find_images(["@list.txt"])] == [os.fsdecode(b"set/\xff.png")]
