"""The titok-fast command, run as a user runs it."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conformance import manifest
from titok_fast.cli.common import png_names
from titok_fast.cli.runs import Parts
from titok_fast.images import read_image, write_png
from titok_fast.metrics import psnr, ssim
from titok_fast.models import IBQTokenizer, TiTok
from titok_fast.models.widened import WIDENED
from titok_fast.tokens import TokenFile, fingerprint

COMMAND = Path(sys.executable).with_name("titok-fast")
ENVIRONMENT = os.environ | {
    "COLUMNS": "500",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the smallest model, weights at random but far from a constant output."""
    return saved_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    size = {"width": 32, "num_layers": 1, "num_heads": 2}
    vq_model = {
        "quantize_mode": "vae", "token_size": 4, "num_latent_tokens": 3, "is_legacy": False,
        "finetune_decoder": False, "vit_enc_model_size": size, "vit_dec_model_size": size,
        "vit_enc_patch_size": 8, "vit_dec_patch_size": 8,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    preprocessing = {"preprocessing": {"crop_size": 16}}
    TiTok({"model": {"vq_model": vq_model}, "dataset": preprocessing}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ibq(tmp_path_factory):
    """A folder with a small network of 70,000 codes, too many for 16 bits."""
    folder = tmp_path_factory.mktemp("ibq")
    torch.manual_seed(0)
    IBQTokenizer(manifest("ibq_tokenizer_tiny")["config"] | {"n_embed": 70000}).save_pretrained(
        folder
    )
    return folder


def saved_model(folder, seed):
    torch.manual_seed(seed)
    model = TiTok.from_config("titok-digits")
    with torch.no_grad():
        model.encoder.conv_out.weight.mul_(20)
        model.decoder.conv_out.bias.fill_(0.5)
        model.decoder.conv_out.weight.mul_(40)
    model.save_pretrained(folder)
    return folder


def save_waves(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:36, 0:40]
    for i in range(count):
        wave = 127 + 120 * np.sin((x + (i % 7) * y + i) / (3 + i % 11))
        Image.fromarray(wave.astype(np.uint8)).save(folder / f"wave{i:03d}.png")


@pytest.fixture
def pictures(tmp_path):
    """Two classes and a loose file, eight images."""
    save_waves(tmp_path / "pictures" / "b", 4)
    save_waves(tmp_path / "pictures" / "a", 3)
    save_waves(tmp_path / "pictures", 1)
    return tmp_path / "pictures"


def test_info_names_versions_and_what_is_missing():
    result = subprocess.run(
        [COMMAND, "info"], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    lines = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    assert set(lines) >= {"torch", "CPU instruction set", "Triton kernels", "CUDA device"}
    from titok_fast.ops import inspect

    assert torch.__version__ in lines["torch"]
    assert inspect.extension().active_isa() in lines["CPU instruction set"]
    if not torch.cuda.is_available():
        assert "unavailable: torch" in lines["CUDA device"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2", "AMD EPYC, family 26 model 2"),
        ("model name\t: AMD EPYC 9655\ncpu family\t: 26\nmodel\t\t: 2", "AMD EPYC 9655"),
        ("model name\t: Intel(R) Xeon(R) Gold 6430\ncpu family\t: 6", "Intel Xeon Gold 6430"),
        ("model name\t: A Virtual CPU", "A Virtual CPU"),
        ("processor\t: 0", platform.processor() or platform.machine()),
    ],
)  # fmt: skip
def test_the_processor_has_a_number_in_its_name(monkeypatch, text, name):
    from titok_fast.ops import inspect

    second = "\n\nmodel name\t: Another\ncpu family\t: 1"
    monkeypatch.setattr(Path, "read_text", lambda path: text + second)
    assert inspect.cpu_name() == name


def test_info_names_a_better_set_that_is_not_in_use():
    from titok_fast.ops import inspect

    def line(in_use, fastest, best):
        sets = {"active_isa": in_use, "fastest_isa": fastest, "detected_isa": best}
        return inspect._isa_line(SimpleNamespace(**{k: lambda v=v: v for k, v in sets.items()}))

    assert line("amx", "amx", "amx") == "amx"
    assert line("avx2", "amx", "amx") == "avx2 (forced, not amx)"
    slower = "avx512vnni (there is avx512bf16, which is slower here)"
    assert line("avx512vnni", "avx512vnni", "avx512bf16") == slower
    module = inspect.extension()
    slow = WIDENED.get(torch.bfloat16, 0) > 0
    assert (module.fastest_isa() != module.detected_isa()) == slow
    assert not slow or (module.fastest_isa(), module.detected_isa()) == ("avx512vnni", "avx512bf16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("encode", "--foo"), "No such option: --foo ('titok-fast encode --help' lists what is"),
        (("encode", "x", "--batch-size", "y"), "Invalid value for '--batch-size': "),
        (("encode", "x", "--batch-size", 0, "-o", "z.npz"), "Invalid value for '--batch-size': "),
        (("encode",), "Missing "),
        (("foo",), "No such command 'foo'. ('titok-fast --help' lists what is allowed)"),
    ],
)
def test_options_that_do_not_exist_are_one_line(titok_fast, arguments, words):
    result = titok_fast(*arguments)
    assert result.returncode == 2 and words in result.err and result.err.count("\n") == 1
    assert not result.out


def test_without_a_command_comes_the_help(titok_fast):
    result = titok_fast()
    assert result.returncode == 0 and "encode" in result.out and not result.err


def test_mirrored_images_and_shares_of_them(titok_fast, pictures, model, tmp_path):
    files = [TokenFile.load(_encoded(titok_fast, pictures, model, tmp_path / "whole.npz"))]
    for options in (("--mirror",), ("--shard", "1/2"), ("--shard", "2/2")):
        path = tmp_path / f"{'-'.join(options).replace('/', '')}.npz"
        files.append(TokenFile.load(_encoded(titok_fast, pictures, model, path, *options)))
    whole, mirrored, *shares = files
    images = torch.stack([read_image(pictures / name, 32) for name in whole.image_ids])
    network = TiTok.from_pretrained(model)
    assert np.array_equal(mirrored.tokens, network.encode(images.flip(3)).numpy())
    assert mirrored.image_ids == whole.image_ids
    for i, share in enumerate(shares):
        assert share.image_ids == whole.image_ids[i::2] and share.class_names == ["a", "b"]
        assert np.array_equal(share.tokens, whole.tokens[i::2])
        assert share.labels.tolist() == whole.labels[i::2].tolist()
    for shard in ("3/2", "0/1", "1", "1/0", "x"):
        result = titok_fast("encode", pictures, "-o", tmp_path / "x.npz", "--shard", shard)
        words = f"--shard: got {shard!r}, allowed is i/n with i from 1 to n"
        assert result.returncode == 2 and words in result.err and result.err.count("\n") == 1
    result = titok_fast("encode", pictures, "-o", tmp_path / "x.npz", "--shard", "9/9")
    assert result.returncode == 2 and "--shard: got '9/9', which has none of 8 images" in result.err


def test_encode_replaces_token_files_alone(titok_fast, pictures, model, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, measured=np.arange(3))
    before = path.read_bytes()
    result = titok_fast("encode", pictures, "-o", path, "--model", model)
    assert result.returncode == 2 and path.read_bytes() == before
    assert f"--output: {path}: not a token file" in result.err and "nothing else is" in result.err
    path.unlink()
    for _ in range(2):
        _encoded(titok_fast, pictures, model, path)


def _encoded(titok_fast, pictures, model, path, *options):
    result = titok_fast("encode", pictures, "-o", path, "--model", model, "--workers", 0, *options)
    assert result.returncode == 0, result.err
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_encode_and_decode(titok_fast, pictures, model, tmp_path, suffix):
    tokens = tmp_path / f"tokens{suffix}"
    result = titok_fast("encode", pictures, "-o", tokens, "--model", model, "--workers", 0)
    assert result.returncode == 0, result.err
    assert re.search(r"8 images to .*tokens.*: [\d.]+ images/s", result.out)
    file = TokenFile.load(tokens)
    assert file.image_ids == [
        *(f"a/wave00{i}.png" for i in range(3)), *(f"b/wave00{i}.png" for i in range(4)),
        "wave000.png",
    ]  # fmt: skip
    assert file.class_names == ["a", "b"] and file.labels.tolist() == [0] * 3 + [1] * 4 + [-1]
    assert file.model == str(model) and file.revision is None and file.image_size == 32
    network = TiTok.from_pretrained(model)
    images = torch.stack([read_image(pictures / name, 32) for name in file.image_ids])
    expected = network.encode(images)
    assert len(expected.unique()) > 10
    np.testing.assert_array_equal(file.tokens, expected.numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", tokens.name]

    result = titok_fast("decode", tokens, "-o", tmp_path / "out", "--batch-size", 3)
    assert result.returncode == 0, result.err
    assert "8 images to" in result.out
    decoded = network.decode(expected)
    for name, image in zip(file.image_ids, decoded, strict=True):
        back = read_image(tmp_path / "out" / name, 32)
        torch.testing.assert_close(back, image, rtol=0, atol=0.51 / 255)


def test_latents(titok_fast, pictures, vae, tmp_path):
    tokens = tmp_path / "latents.safetensors"
    result = titok_fast("encode", pictures / "a", "-o", tokens, "--model", vae, "--workers", 0)
    assert result.returncode == 0, result.err
    file = TokenFile.load(tokens)
    assert file.tokens.shape == (3, 3, 4) and file.tokens.dtype == np.float32
    network = TiTok.from_pretrained(vae)
    image = read_image(pictures / "a" / "wave001.png", 16)
    torch.testing.assert_close(torch.from_numpy(file.tokens[1]), network.encode(image[None])[0])
    assert titok_fast("decode", tokens, "-o", tmp_path / "out").returncode == 0
    back = read_image(tmp_path / "out" / "wave001.png", 16)
    decoded = network.decode(torch.from_numpy(file.tokens[1:2]))[0]
    torch.testing.assert_close(back, decoded, rtol=0, atol=0.51 / 255)


def crop(path, size):
    return read_image(path, size, interpolation="bilinear")


@pytest.mark.parametrize(("suffix", "size"), [(".npz", None), (".safetensors", 32)])
def test_ibq_encode_and_decode(titok_fast, pictures, ibq, tmp_path, suffix, size):
    tokens = tmp_path / f"tokens{suffix}"
    options = () if size is None else ("--image-size", size)
    result = titok_fast("encode", pictures, "-o", tokens, "--model", ibq, *options)
    assert result.returncode == 0, result.err
    file = TokenFile.load(tokens)
    size = size or 64
    assert file.tokens.dtype == np.int32 and file.tokens.shape == (8, size // 4, size // 4)
    assert (file.codebook_size, file.image_size) == (70000, size)
    network = IBQTokenizer.from_pretrained(ibq)
    assert file.fingerprint == fingerprint(network)
    expected = network.encode(torch.stack([crop(pictures / n, size) for n in file.image_ids]))
    assert int(expected.max()) > 65535
    np.testing.assert_array_equal(file.tokens, expected.numpy())

    result = titok_fast("decode", tokens, "-o", tmp_path / "out", "--batch-size", 3)
    assert result.returncode == 0, result.err
    for name, image in zip(file.image_ids, network.decode(expected), strict=True):
        back = read_image(tmp_path / "out" / name, size)
        torch.testing.assert_close(back, image, rtol=0, atol=0.51 / 255)


def test_ibq_resumes_with_the_same_size_only(titok_fast, pictures, ibq, tmp_path, monkeypatch):
    command = ("encode", pictures, "-o", tmp_path / "t.npz", "--model", ibq, "--workers", 0)
    with monkeypatch.context() as patch:
        patch.setattr(TokenFile, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert titok_fast(*command).returncode == 2
    refused = titok_fast(*command, "--image-size", 32)
    assert refused.returncode == 2 and "image size None now 32" in refused.err
    again = titok_fast(*command, "--image-size", 64)
    assert again.returncode == 0 and "8 of 8 images were done before" in again.out


def test_ibq_reconstruct_from_a_checkpoint(titok_fast, pictures, ibq, tmp_path):
    network = IBQTokenizer.from_pretrained(ibq)
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "run" / "last.ckpt")
    (tmp_path / "run" / "config.json").write_bytes((ibq / "config.json").read_bytes())
    file = pictures / "wave000.png"
    result = titok_fast(
        "reconstruct", file, "--model", tmp_path / "run" / "last.ckpt", "-o", tmp_path / "out",
        "--image-size", 48,
    )  # fmt: skip
    assert result.returncode == 0, result.err
    original = crop(file, 48)[None]
    decoded = network.decode(network.encode(original))
    assert f"{file}  {psnr(decoded, original)[0]:.2f} dB" in result.out
    assert f"{np.log2(70000) / 16:.4g} bits per pixel" in result.out
    with Image.open(tmp_path / "out" / "wave000.png") as picture:
        assert picture.size == (2 * 48 + 2, 48)


def test_what_a_tokenizer_does_not_take_is_one_line(titok_fast, pictures, model, ibq, tmp_path):
    def refused(words, *arguments):
        result = titok_fast(*arguments)
        assert result.returncode == 2 and words in result.err, result.err
        assert len(result.err.strip().splitlines()) == 1

    image, output = pictures / "wave000.png", tmp_path / "o.npz"
    for command in ("encode", "reconstruct"):
        start = (command, image, "-o", output, "--image-size")
        for size in (0, -4, 30):
            words = f"--image-size: got {size}, allowed is a positive multiple of 4"
            refused(words, *start, size, "--model", ibq)
        refused("--image-size: got 64, allowed is 32", *start, 64, "--model", model)
    refused(f"--model: {ibq} is not a TiTok", "inspect", image, "-o", "p.png", "--model", ibq)
    titok_fast("encode", image, "-o", output, "--model", model)
    refused("cannot be decoded with", "decode", output, "-o", tmp_path / "out", "--model", ibq)
    assert titok_fast("encode", image, "-o", output, "--model", model, "--image-size", 32).out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.npz", "pictures"]


def test_tokens_depend_on_neither_batches_nor_workers(titok_fast, pictures, model, tmp_path):
    contents = set()
    for batch_size, workers in ((1, 0), (3, 2), (16, 1), (5, 0)):
        tokens = tmp_path / "tokens.npz"
        result = titok_fast(
            "encode", pictures, "-o", tokens, "--model", model,
            "--batch-size", batch_size, "--workers", workers,
        )  # fmt: skip
        assert result.returncode == 0, result.err
        contents.add(tokens.read_bytes())
    assert len(contents) == 1


def test_a_broken_image_is_named_and_skipped(titok_fast, pictures, model, tmp_path):
    whole = tmp_path / "whole.npz"
    titok_fast("encode", pictures, "-o", whole, "--model", model, "--workers", 0)
    (pictures / "a" / "wave001.png").write_bytes(b"\x89PNG")
    (pictures / "c").mkdir()
    (pictures / "c" / "empty.jpg").touch()
    tokens = tmp_path / "tokens.npz"
    result = titok_fast("encode", pictures, "-o", tokens, "--model", model, "--batch-size", 2)
    assert result.returncode == 3
    assert "skipped " in result.err and "wave001.png: not a readable image" in result.err
    assert "empty.jpg: not a readable image" in result.err
    assert "2 of 9 images skipped" in result.err
    before, after = TokenFile.load(whole), TokenFile.load(tokens)
    kept = [i for i, name in enumerate(before.image_ids) if name != "a/wave001.png"]
    assert after.image_ids == [before.image_ids[i] for i in kept]
    np.testing.assert_array_equal(after.tokens, before.tokens[kept])
    assert after.class_names == ["a", "b", "c"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("limit", [1000, 600])
def test_large_images_are_read_without_a_warning(
    titok_fast, pictures, model, tmp_path, monkeypatch, limit
):
    """Of 1,440 pixels; Pillow warns above its limit and refuses twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    command = ("encode", pictures / "a", "-o", tmp_path / "t.npz", "--model", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        result = titok_fast(*command, "--workers", 0)
    assert result.returncode == (0 if limit == 1000 else 3), result.err
    assert limit == 1000 or "exceeds limit of 1200 pixels" in result.err


def test_only_broken_images_make_no_file(titok_fast, model, tmp_path):
    (tmp_path / "list.txt").write_text("absent.png\n")
    result = titok_fast(
        "encode", f"@{tmp_path / 'list.txt'}", "-o", tmp_path / "t.npz", "--model", model
    )
    assert result.returncode == 3
    assert "absent.png: not a readable image" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["list.txt"]


def test_a_killed_encode_resumes(titok_fast, model, tmp_path):
    """1,000 images, 3 of them broken; the result is that of an uninterrupted run, to the bit."""
    folder = tmp_path / "set"
    save_waves(folder / "many", 125)
    for i in range(1, 8):
        for file in sorted((folder / "many").glob("wave???.png")):
            os.link(file, file.with_name(f"copy{i}-{file.name}"))
    broken = ["copy1-wave003.png", "copy6-wave100.png", "wave124.png"]
    for name in broken:
        (folder / "many" / name).unlink()
        (folder / "many" / name).write_bytes(b"\xff\xd8 no more")
    tokens, parts = tmp_path / "t.npz", tmp_path / ".t.npz.parts"
    command = ("encode", folder, "-o", tokens, "--model", model, "--workers", 1)
    process = subprocess.Popen(
        [COMMAND, *map(str, command), "--batch-size", "1"],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(parts.glob("[0-9]*.npz")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        second = titok_fast(*command)
        assert second.returncode == 2 and len(second.err.strip().splitlines()) == 1
        assert ".parts: another run is writing to it" in second.err
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not tokens.exists() and parts.exists()

    changed = titok_fast(*command, "--dtype", "bfloat16")
    assert changed.returncode == 2 and "dtype float32 now bfloat16" in changed.err

    resumed = titok_fast(*command)
    assert resumed.returncode == 3 and "3 of 1000 images skipped" in resumed.err
    assert all(f"{name}: not a readable image" in resumed.err for name in broken)
    before = int(re.search(r"(\d+) of 1000 images were done before", resumed.out)[1])
    assert 1 <= before < 997
    assert "997 images to" in resumed.out and not parts.exists()
    once = tmp_path / "once.npz"
    assert titok_fast("encode", folder, "-o", once, *command[4:]).returncode == 3
    assert tokens.read_bytes() == once.read_bytes()


def test_a_run_that_failed_at_the_end_has_nothing_to_repeat(
    titok_fast, pictures, model, tmp_path, monkeypatch
):
    command = ("encode", pictures, "-o", tmp_path / "t.npz", "--model", model, "--workers", 0)
    with monkeypatch.context() as patch:
        patch.setattr(TokenFile, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        failed = titok_fast(*command)
    assert failed.returncode == 2 and "disk full" in failed.err
    assert (tmp_path / ".t.npz.parts").exists()
    again = titok_fast(*command)
    assert again.returncode == 0 and "8 of 8 images were done before" in again.out
    assert len(TokenFile.load(tmp_path / "t.npz").tokens) == 8


@pytest.mark.parametrize("damage", ["cut", "deleted", "folder"])
def test_lost_tokens_are_encoded_again(titok_fast, pictures, model, tmp_path, monkeypatch, damage):
    whole, tokens = tmp_path / "whole.npz", tmp_path / "t.npz"
    command = ("encode", pictures, "--model", model, "--workers", 0, "--batch-size", 3, "-o")
    (pictures / "b" / "wave003.png").write_bytes(b"broken")
    assert titok_fast(*command, whole).returncode == 3
    flush = Parts.flush

    def damaging(self):
        flush(self)
        first = self.folder / "000000000.npz"
        if damage == "cut":
            os.truncate(first, 10)
        elif damage == "deleted":
            first.unlink(missing_ok=True)
        elif self.folder.exists():
            shutil.rmtree(self.folder)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "flush", damaging)
        result = titok_fast(*command, tokens)
    lost = 7 if damage == "folder" else 3
    assert result.returncode == 2 and not tokens.exists()
    words = f".t.npz.parts: tokens of {lost} images are gone or damaged, repeat the command"
    assert words in result.err
    again = titok_fast(*command, tokens)
    assert again.returncode == 3
    assert tokens.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_decode_refuses_the_tokens_of_another_model(
    titok_fast, pictures, model, other_model, tmp_path
):
    tokens = tmp_path / "t.npz"
    titok_fast("encode", pictures, "-o", tokens, "--model", model, "--workers", 0)
    refused = titok_fast("decode", tokens, "-o", tmp_path / "out", "--model", other_model)
    assert refused.returncode == 2
    assert f"made with {model} (weights" in refused.err
    assert f"cannot be decoded with {other_model} (weights" in refused.err
    assert not (tmp_path / "out").exists()
    copy = tmp_path / "moved"
    copy.symlink_to(model)
    assert titok_fast("decode", tokens, "-o", tmp_path / "out", "--model", copy).returncode == 0


def test_every_kind_of_file_goes_through_every_command(titok_fast, tmp_path):
    y, x = np.mgrid[0:60, 0:44]
    picture = Image.fromarray(np.stack([4 * y, 5 * x, 255 - 2 * x - y], -1).astype(np.uint8))
    folder, exif = tmp_path / "kinds", Image.Exif()
    folder.mkdir()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    kinds = {
        "rgb.png": picture,
        "photo.jpg": picture,
        "grey.png": picture.convert("L"),
        "one_bit.png": picture.convert("1"),
        "palette.png": picture.quantize(64),
        "rgba.png": picture.convert("RGBA"),
        "cmyk.tif": picture.convert("CMYK"),
        "deep.png": Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257),
        "turned.png": picture.transpose(Image.Transpose.ROTATE_90),
    }
    for name, image in kinds.items():
        image.save(folder / name, exif=exif if name == "turned.png" else Image.Exif())

    tokens = tmp_path / "kinds.npz"
    assert titok_fast("encode", folder, "-o", tokens, "--model", "titok-digits").returncode == 0
    file = TokenFile.load(tokens)
    found = dict(zip(file.image_ids, file.tokens.tolist(), strict=True))
    assert set(found) == set(kinds)
    assert found["turned.png"] == found["rgba.png"] == found["rgb.png"]
    assert found["deep.png"] == found["grey.png"] != found["rgb.png"]
    network = TiTok.from_pretrained("titok-digits")
    for name, row in found.items():
        image = read_image(folder / name, network.image_size)
        assert row == network.encode(image[None])[0].tolist(), name

    for command, output in (("decode", tmp_path / "decoded"), ("reconstruct", tmp_path / "both")):
        source = tokens if command == "decode" else folder
        assert titok_fast(command, source, "-o", output, "--model", "titok-digits").returncode == 0
        assert {p.stem for p in output.iterdir()} == {Path(name).stem for name in kinds}
    for name in kinds:
        result = titok_fast(
            "inspect", folder / name, "-o", tmp_path / "i.png", "--model", "titok-digits"
        )
        assert result.returncode == 0, result.err


@pytest.mark.parametrize("command", ["decode", "reconstruct", "inspect"])
def test_files_of_others_are_not_replaced(titok_fast, pictures, model, tmp_path, command):
    output, source = tmp_path / "out", pictures
    if command == "decode":
        source = tmp_path / "t.npz"
        titok_fast("encode", pictures, "-o", source, "--model", model, "--workers", 0)
    elif command == "inspect":
        source, output = pictures / "a" / "wave001.png", output / "a" / "wave001.png"
    run = (command, source, "--model", model, "-o")
    assert titok_fast(*run, output).returncode == 0
    whole = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    assert titok_fast(*run, output).returncode == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == whole

    kept = tmp_path / "out" / "a" / "wave001.png"

    for make in (
        lambda path: shutil.copy(pictures / "a" / "wave001.png", path),
        lambda path: path.write_text("notes"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: write_png(path, torch.zeros(3, 2, 2), software="titok-fast generate"),
        Path.mkdir,
    ):
        kept.unlink()
        make(kept)
        before = kept.lstat()[:7]  # the times of reading aside
        for path in whole.keys() - {kept}:
            path.unlink(missing_ok=True)
        result = titok_fast(*run, output)
        assert result.returncode == 2 and len(result.err.strip().splitlines()) == 1
        words = f"--output: {kept} is there and not from titok-fast {command}, allowed is another"
        assert words in result.err
        assert kept.lstat()[:7] == before and [*(tmp_path / "out").rglob("*.png")] == [kept]


def test_decode_stays_in_its_folder(titok_fast, model, tmp_path):
    names = ["../../up.png", "/etc/absolute.png", "a/same.png", "a/same.jpg", "..", "c\\d.png"]
    mark = fingerprint(TiTok.from_pretrained(model))
    tokens = np.zeros((len(names), 16), int)
    TokenFile(tokens, names, str(model), mark, 32, 256).save(tmp_path / "t.npz")
    assert titok_fast("decode", tmp_path / "t.npz", "-o", tmp_path / "x" / "out").returncode == 0
    written = {p.relative_to(tmp_path / "x" / "out").as_posix()
               for p in (tmp_path / "x").rglob("*") if p.is_file()}  # fmt: skip
    assert written == {
        "up.png", "absolute.png", "a/same.png", "a/same-2.png", "image.png", "c_d.png",
    }  # fmt: skip


def test_long_names_are_cut(titok_fast, pictures, model, tmp_path):
    names = ["x" * 255, "x" * 252 + ".gz", "x" * 251 + ".png", "\u00fc" * 127, "y" * 251, "y" * 253]
    names += ["a/" + "x" * 255, "z" * 300 + "/b.png"]
    expected = ["x" * 251, "x" * 249 + "-2", "x" * 249 + "-3", "\u00fc" * 125, "y" * 251]
    expected += ["y" * 249 + "-2", "a/" + "x" * 251, "z" * 255 + "/b"]
    assert png_names(names) == [f"{name}.png" for name in expected]

    folder = tmp_path / "long"
    folder.mkdir()
    for i, name in enumerate(("x" * 251 + ".png", "x" * 251 + ".bmp", "\u00e9" * 125 + "a.jpg")):
        shutil.copy(pictures / "b" / f"wave00{i}.png", folder / name)
    result = titok_fast("reconstruct", folder, "--model", model, "-o", tmp_path / "out")
    assert result.returncode == 0, result.err
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_folder_may_have_the_name_of_a_picture(titok_fast, model, tmp_path):
    names = ["a.jpg", "a.png/b.png", "c.png/d.png", "c.jpg"]
    mark = fingerprint(TiTok.from_pretrained(model))
    tokens = np.zeros((len(names), 16), int)
    TokenFile(tokens, names, str(model), mark, 32, 256).save(tmp_path / "t.npz")
    result = titok_fast("decode", tmp_path / "t.npz", "-o", tmp_path / "out")
    assert result.returncode == 0, result.err
    written = {p.relative_to(tmp_path / "out").as_posix()
               for p in (tmp_path / "out").rglob("*") if p.is_file()}  # fmt: skip
    assert written == {"a.png", "b.png", "c.png/d.png", "c-2.png"}


def test_names_that_are_not_utf8_are_printed(pictures, model, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    shutil.copy(pictures / "a" / "wave000.png", os.fsencode(folder) + b"/caf\xe9.png")
    done = subprocess.run(
        [COMMAND, "reconstruct", folder, "--model", model, "-o", tmp_path / "out"],
        capture_output=True, text=True, check=False,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "caf?.png  " in done.stdout and len(list((tmp_path / "out").iterdir())) == 1


def test_reconstruct(titok_fast, pictures, model, tmp_path):
    files = sorted((pictures / "b").iterdir())
    result = titok_fast("reconstruct", *files, "--model", model, "-o", tmp_path / "out")
    assert result.returncode == 0, result.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f.name for f in files]
    network = TiTok.from_pretrained(model)
    originals = torch.stack([read_image(file, 32) for file in files])
    decoded = network.decode(network.encode(originals))
    peak, structure = psnr(decoded, originals), ssim(decoded, originals)
    for i, file in enumerate(files):
        with Image.open(tmp_path / "out" / file.name) as picture:
            assert picture.size == (2 * 32 + 2, 32)
            right = np.asarray(picture)[:, 34:].transpose(2, 0, 1) / 255
        np.testing.assert_allclose(right, decoded[i].numpy(), atol=0.51 / 255)
        assert f"{file}  {peak[i]:.2f} dB  SSIM {structure[i]:.4f}\n" in result.out
    assert (
        f"4 images to {tmp_path / 'out'}: mean PSNR {peak.mean():.2f} dB, mean SSIM "
        f"{structure.mean():.4f}, 0.125 bits per pixel, " in result.out
    )


def test_reconstruct_skips_and_counts_a_broken_image(titok_fast, pictures, model, tmp_path):
    (pictures / "broken.png").write_bytes(b"\x89PNG")
    result = titok_fast("reconstruct", pictures, "--model", model, "-o", tmp_path / "out")
    assert result.returncode == 3
    assert "broken.png: not a readable image" in result.err
    assert "1 of 9 images skipped" in result.err
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8


def test_equal_names_do_not_overwrite_each_other(titok_fast, pictures, model, tmp_path):
    result = titok_fast(
        "reconstruct", pictures / "a" / "wave000.png", pictures / "b" / "wave000.png",
        "--model", model, "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["wave000-2.png", "wave000.png"]


@pytest.mark.parametrize("replacement", ["nearest", "farthest"])
def test_inspect(titok_fast, pictures, model, tmp_path, replacement):
    image, output = pictures / "a" / "wave001.png", tmp_path / "new" / "picture.png"
    result = titok_fast(
        "inspect", image, "-o", output, "--model", model, "--replacement", replacement
    )
    assert result.returncode == 0, result.err
    with Image.open(output) as picture:
        pixels = np.asarray(picture)
    assert picture.size == (1124, 1172)
    original = (read_image(image, 32) * 255).round().byte().permute(1, 2, 0).numpy()
    large = original.repeat(8, 0).repeat(8, 1)
    found = [
        (y, x)
        for y in range(60, 140)
        for x in range(10, 40)
        if (pixels[y : y + 256, x : x + 256] == large).all()
    ]
    assert len(found) == 1


def test_inspect_latents_and_a_wrong_suffix(titok_fast, pictures, vae, tmp_path):
    image = pictures / "wave000.png"
    result = titok_fast("inspect", image, "-o", tmp_path / "p.png", "--model", vae)
    assert result.returncode == 0, result.err
    assert (tmp_path / "p.png").stat().st_size > 1000
    result = titok_fast("inspect", image, "-o", tmp_path / "p.jpg", "--model", vae)
    assert result.returncode == 2 and "--output: got suffix '.jpg', allowed is .png" in result.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "titok-xxl"], "--model: titok-xxl does not exist"),
        (["--model", "{model}", "--dtype", "int8"], "--dtype: 'int8' is not one of float32"),
        (["--model", "{model}", "--device", "tpu9"], "--device: 'tpu9' is not auto, cpu, cuda"),
        (["--model", "{model}", "--device", "meta"], "--device: 'meta' is not auto, cpu, cuda"),
        (["--model", "{model}", "--device", "xpu"], "--device: 'xpu' is not auto, cpu, cuda"),
        (["--model", "{model}", "--revision", "v2"], "--revision: 'v2' applies"),
        (["absent*.png"], "PATHS: 'absent*.png' is not a file"),
    ],
)
@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_errors_are_one_line(titok_fast, pictures, model, tmp_path, command, options, words):
    options = [option.format(model=model) for option in options]
    result = titok_fast(command, pictures, "-o", tmp_path / "out.npz", *options)
    assert result.returncode == 2
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1 and "Traceback" not in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize(
    ("command", "place", "words"),
    [
        (
            "encode {set} --model absent",
            "-o {folder}",
            "--output: {folder} is a folder, allowed is a file",
        ),
        (
            "encode {set} --model absent",
            "-o {file}/new/t.npz",
            "--output: {file} is not a folder, nothing can be",
        ),
        ("decode {tokens}", "-o {file}/new", "--output: {file} is not a folder"),
        ("reconstruct {set} --model absent", "-o {file}", "--output: {file} is not a folder"),
        ("inspect {set}/a --model absent", "-o {file}/p.png", "--output: {file} is not a folder"),
        ("generate --tokenizer absent", "-o {file}", "--output: {file} is not a folder"),
        (
            "generate --tokenizer absent",
            "--npz {folder}",
            "--npz: {folder} is a folder, allowed is a file",
        ),
        ("train {set} --init absent", "-o {file}", "--output: {file} is not a folder"),
        ("convert absent", "-o {file}", "--output: {file} is not a folder"),
        ("profile", "-o {file}", "--output: {file} is not a folder"),
        ("kernels", "--json {folder}", "--json: {folder} is a folder, allowed is a file"),
    ],
)
def test_places_where_no_file_can_be(titok_fast, pictures, tmp_path, command, place, words):
    """They are found before any work: even whether there is a model."""
    names = {name: tmp_path / f"{name}.npz" for name in ("folder", "file", "tokens")}
    names["folder"].mkdir()
    names["file"].touch()
    TokenFile(np.zeros((1, 2), int), ["a"], "absent", "", 32, 256).save(names["tokens"])
    line = f"{command} {place}".format(set=pictures, **names)
    result = titok_fast(*line.split())
    assert result.returncode == 2 and words.format(**names) in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_what_names_no_model_is_named_by_its_option(titok_fast, pictures, model, tmp_path):
    def refused(option, *arguments):
        result = titok_fast(*arguments)
        assert result.returncode == 2 and f"error: {option}: " in result.err, result.err
        assert len(result.err.strip().splitlines()) == 1

    tokens, absent = tmp_path / "t.npz", tmp_path / "absent"
    TokenFile(np.zeros((1, 2), int), ["a"], str(absent), "", 32, 256).save(tokens)
    refused("--model", "decode", tokens, "-o", tmp_path / "out")
    refused("--model", "inspect", pictures, "-o", tmp_path / "p.png", "--model", absent)
    refused("CHECKPOINT", "convert", absent, "-o", tmp_path / "out")
    train = ("train", pictures, "-o", tmp_path / "out")
    refused("--init", *train, "--init", absent)
    refused("--model", "train", tokens, "-o", tmp_path / "out", "--model", absent)
    generator = ("train", tokens, "-o", tmp_path / "out", "--model", "maskgit-digits")
    held_out = ("--held-out", tmp_path / "u.npz", "--samples-with", absent)
    TokenFile(np.ones((1, 2), int), ["a"], str(absent), "", 32, 256).save(held_out[1])
    refused("--samples-with", *generator, *held_out)
    generate = ("generate", "--model", "titok-digits", "-o", tmp_path / "out")
    refused("--tokenizer", *generate, "--tokenizer", absent)
    refused("--generator", *generate, "--generator", absent)
    refused("--replacement", "inspect", pictures / "wave000.png", "-o", tmp_path / "p.png",
            "--model", model, "--replacement", "best")  # fmt: skip


def test_wrong_token_files_are_one_line(titok_fast, pictures, model, tmp_path):
    result = titok_fast("encode", pictures, "-o", tmp_path / "t.pt", "--model", model)
    assert result.returncode == 2 and "allowed are .npz and .safetensors" in result.err
    (tmp_path / "t.npz").write_text("nothing")
    result = titok_fast("decode", tmp_path / "t.npz", "-o", tmp_path / "out")
    assert result.returncode == 2 and "t.npz: not a token file" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_crops_at_random_places(titok_fast, model, tmp_path):
    """Of a seed and the image's id, whatever other images and options there are."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(256, size=(32, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    views = [((), "centre"), (("--random-crop", 1), "one"), (("--random-crop", 2), "two")]
    views += [(("--random-crop", 1, "--shard", "2/2"), "shard")]
    views += [(("--random-crop", 1, "--batch-size", 2, "--workers", 2), "again")]
    files = {
        name: TokenFile.load(_encoded(titok_fast, folder, model, tmp_path / name, *options))
        for options, name in ((options, f"{name}.npz") for options, name in views)
    }
    tokens = {name.removesuffix(".npz"): file.tokens for name, file in files.items()}
    assert np.array_equal(tokens["again"], tokens["one"])
    assert np.array_equal(tokens["shard"], tokens["one"][1::2])
    network = TiTok.from_pretrained(model)
    for name in ("one", "two"):
        places = []
        for i, row in enumerate(tokens[name]):
            strip = torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))).permute(2, 0, 1)
            crops = torch.stack([strip[:, :, left : left + 32] for left in range(65)]).float() / 255
            found = (network.encode(crops).numpy() == row).all(1).nonzero()[0]
            assert len(found)
            places.append(found[0])
        assert len(set(places)) > 3
    assert (tokens["one"] != tokens["two"]).any() and (tokens["one"] != tokens["centre"]).any()


def test_a_run_that_mirrors_is_another(titok_fast, pictures, model, tmp_path, monkeypatch):
    command = ("encode", pictures, "-o", tmp_path / "t.npz", "--model", model, "--workers", 0)
    with monkeypatch.context() as patch:
        patch.setattr(TokenFile, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert titok_fast(*command).returncode == 2
    changed = titok_fast(*command, "--mirror")
    assert changed.returncode == 2 and "mirror None now True" in changed.err
    changed = titok_fast(*command, "--random-crop", 0)
    assert changed.returncode == 2 and "random crop None now 0" in changed.err


def test_means_are_of_all_batches(titok_fast, pictures, model, tmp_path):
    for size in (3, 16):
        result = titok_fast(
            "reconstruct", pictures, "-o", tmp_path / str(size), "--model", model,
            "--workers", 0, "--batch-size", size,
        )  # fmt: skip
        values = [float(value) for value in re.findall(r"  ([\d.]+) dB  SSIM", result.out)]
        mean = float(re.search(r"8 images to .*: mean PSNR ([\d.]+) dB", result.out)[1])
        assert len(values) == 8 and mean == pytest.approx(sum(values) / 8, abs=0.011)
