"""titok-fast generate, run as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from titok_fast.cli.runs import Parts
from titok_fast.models import ARTransformer, IBQTokenizer, MaskGIT, TiTok
from titok_fast.tokens import TokenFile, fingerprint

COMMAND = Path(sys.executable).with_name("titok-fast")
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
DIGITS = ("generate", "--model", "titok-digits")


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)  # the work is too small to share


def contents(folder):
    """The files of a folder but options.json, which names the other files."""
    files = (p for p in folder.iterdir() if p.name[0] != "." and p.name != "options.json")
    return {p.name: p.read_bytes() for p in files}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_files_of_a_run(titok_fast, tmp_path):
    """Each image is that of its number, label and seed, truncated to 8 bits."""
    out, npz = tmp_path / "out", tmp_path / "samples.npz"
    result = titok_fast(
        *DIGITS, "--labels", "7,1-2", "--count", 8, "--seed", 5, "-o", out, "--npz", npz
    )
    assert result.returncode == 0, result.err
    assert f"8 images to {out} and {npz}: " in result.out
    names = [f"{i:06d}.png" for i in range(8)]
    assert sorted(p.name for p in out.iterdir()) == [
        *names, "options.json", "sheet.png", "tokens.npz"
    ]  # fmt: skip
    labels = [7, 1, 2, 7, 1, 2, 7, 1]
    tokens = MaskGIT.from_pretrained("maskgit-digits").generate(labels, seed=5)
    images = TiTok.from_pretrained("titok-digits").decode(tokens)
    expected = (images * 255).byte().permute(0, 2, 3, 1).numpy()
    assert len(np.unique(expected, axis=0)) == 8
    np.testing.assert_array_equal(np.stack([pixels(out / name) for name in names]), expected)

    with np.load(npz) as archive:
        assert archive.files == ["arr_0", "options"] and archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], expected)

    file = TokenFile.load(out / "tokens.npz")
    np.testing.assert_array_equal(file.tokens, tokens.numpy())
    assert file.image_ids == names
    assert [int(file.class_names[i]) for i in file.labels] == labels
    assert file.labels.tolist() == labels and len(file.class_names) == 10  # a generator's own

    sheet = pixels(out / "sheet.png")
    assert sheet.shape == (3 * 34 - 2, 3 * 34 - 2, 3)  # a row for each label
    np.testing.assert_array_equal(sheet[34:66, 68:], expected[7])
    assert (sheet[68:, 68:] == 255).all()

    assert titok_fast("decode", out / "tokens.npz", "-o", tmp_path / "decoded").returncode == 0
    rounded = np.stack([pixels(tmp_path / "decoded" / name) for name in names])
    np.testing.assert_allclose(rounded.astype(int), expected, atol=1)


def test_the_batch_size_does_not_change_the_images(titok_fast, tmp_path):
    found = []
    for batch_size in (3, 64):
        out = tmp_path / str(batch_size)
        result = titok_fast(*DIGITS, "-o", out, "--batch-size", batch_size)
        assert result.returncode == 0, result.err
        found.append(contents(out))
    assert len(found[0]) == 10 + 2 and found[0] == found[1]


def test_a_killed_run_resumes_with_the_same_images(titok_fast, tmp_path):
    def command(name):
        return (
            *DIGITS, "--labels", "3", "--count", 120, "--batch-size", 4,
            "-o", tmp_path / name, "--npz", tmp_path / f"{name}.npz",
        )  # fmt: skip

    out, npz = tmp_path / "killed", tmp_path / "killed.npz"
    process = subprocess.Popen(
        [COMMAND, *map(str, command("killed"))],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (out / "000007.png").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        second = titok_fast(*command("killed"))
        assert second.returncode == 2 and len(second.err.strip().splitlines()) == 1
        assert ".parts: another run is writing to it" in second.err
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not npz.exists() and not (out / "tokens.npz").exists()
    pictures = contents(out)
    (out / ".000100.png.1.tmp").touch()
    (tmp_path / ".killed.npz.1.tmp").touch()

    for option, value, words in (
        ("--seed", 1, "--seed 0 now 1"),
        ("--steps", 4, "--steps 8 now 4"),
        ("--count", 121, "--count 120 now 121"),
    ):
        changed = titok_fast(*command("killed"), option, value)
        assert changed.returncode == 2 and words in changed.err
        assert len(changed.err.strip().splitlines()) == 1
    resumed = titok_fast(*command("killed"))
    assert resumed.returncode == 0 and " of 120 images were done before" in resumed.out
    assert titok_fast(*command("once")).returncode == 0
    assert contents(out) == contents(tmp_path / "once")
    assert npz.read_bytes() == (tmp_path / "once.npz").read_bytes()
    assert contents(out).items() > pictures.items()
    assert not list(out.glob(".*")) and not list(tmp_path.glob(".*"))


def test_lost_tokens_are_generated_again(titok_fast, tmp_path, monkeypatch):
    def command(name):
        output = tmp_path / name
        return *DIGITS, "--count", 6, "--batch-size", 3, "-o", output, "--npz", f"{output}.npz"

    flush = Parts.flush

    def damaging(self):
        flush(self)
        os.truncate(self.folder / "000000000.npz", 10)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "flush", damaging)
        result = titok_fast(*command("a"))
    assert result.returncode == 2 and not (tmp_path / "a" / "tokens.npz").exists()
    assert ".parts: tokens of 3 images are gone or damaged, repeat the command" in result.err
    assert titok_fast(*command("a")).returncode == titok_fast(*command("b")).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_finished_run_has_nothing_to_repeat(titok_fast, tmp_path):
    command = (*DIGITS, "--count", 6, "-o", tmp_path, "--batch-size", 3)
    assert titok_fast(*command).returncode == 0
    before = contents(tmp_path)
    again = titok_fast(*command)
    assert again.returncode == 0 and "6 of 6 images were done before" in again.out
    assert contents(tmp_path) == before
    (tmp_path / "000004.png").unlink()
    assert titok_fast(*command).returncode == 0
    assert contents(tmp_path) == before
    assert json.loads((tmp_path / "options.json").read_text())["--guidance-scale"] == 1.5


def fail_at(monkeypatch, number):
    """Lets call `number` of the generator fail, from 1; returns the image_ids of all calls."""
    generate, calls = MaskGIT.generate, []

    def interrupted(*arguments, **options):
        calls.append(options["image_ids"].tolist())
        if len(calls) == number:
            raise OSError("disk full")
        return generate(*arguments, **options)

    monkeypatch.setattr("titok_fast.models.MaskGIT.generate", interrupted)
    return calls


def test_an_array_alone_resumes(titok_fast, tmp_path, monkeypatch):
    npz = tmp_path / "samples.npz"
    command = (*DIGITS, "--count", 12, "--batch-size", 4, "--npz", npz)
    assert titok_fast(*command).returncode == 0
    whole = npz.read_bytes()
    npz.unlink()
    calls = fail_at(monkeypatch, 3)
    assert titok_fast(*command).returncode == 2
    assert titok_fast(*command, "--rule", "maskgit").returncode == 2
    assert titok_fast(*command).returncode == 0
    assert calls[0] == [0, 1, 2, 3] and calls[-1] == [8, 9, 10, 11]
    assert npz.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [npz.name]


def test_a_finished_array_has_nothing_to_repeat(titok_fast, tmp_path):
    npz = tmp_path / "samples.npz"
    command = (*DIGITS, "--count", 2, "--npz", npz)
    assert titok_fast(*command).returncode == 0
    before = npz.read_bytes()
    again = titok_fast(*command)
    assert again.returncode == 0 and "2 of 2 images were done before" in again.out
    changed = titok_fast(*command, "--seed", 1)
    assert changed.returncode == 2 and len(changed.err.strip().splitlines()) == 1
    assert f"--npz: {npz} is from a run with other settings (--seed 0 now 1)" in changed.err
    both = titok_fast(*command, "--seed", 1, "-o", tmp_path / "out")
    assert both.returncode == 2
    assert npz.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [npz.name]


def test_options_reach_the_sampler(titok_fast, tmp_path, monkeypatch):
    seen = {}

    def generate(self, labels, **options):
        seen.update(options)
        return torch.zeros(len(labels), self.num_tokens, dtype=torch.int64)

    monkeypatch.setattr("titok_fast.models.MaskGIT.generate", generate)
    options = {
        "steps": 3, "guidance_scale": 2.5, "guidance_decay": "power-cosine",
        "guidance_scale_pow": 2.0, "randomize_temperature": 1.25, "schedule": "cosine",
        "rule": "maskgit", "seed": 9,
    }  # fmt: skip
    flags = [x for name, v in options.items() for x in (f"--{name.replace('_', '-')}", v)]
    result = titok_fast(*DIGITS, "-o", tmp_path, "--no-softmax-temperature-annealing", *flags)
    assert result.returncode == 0, result.err
    assert seen.items() >= (options | {"softmax_temperature_annealing": False}).items()


def test_given_tokens_are_kept(titok_fast, tmp_path):
    assert titok_fast(*DIGITS, "--labels", "4,9", "-o", tmp_path / "a").returncode == 0
    edit = ("--ids", tmp_path / "a" / "tokens.npz", "--regenerate", "0-3,9")
    command = (*DIGITS, "--labels", "4,9", "--count", 5, "-o", tmp_path / "b", "--seed", 1)
    result = titok_fast(*command, *edit)
    assert result.returncode == 0, result.err
    given = TokenFile.load(tmp_path / "a" / "tokens.npz").tokens[[0, 1, 0, 1, 0]]
    edited = TokenFile.load(tmp_path / "b" / "tokens.npz").tokens
    changed = (given != edited).any(0)
    assert set(np.flatnonzero(changed)) <= {0, 1, 2, 3, 9} and changed.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "3,10"], "--labels: got '10', allowed is 0 to 9"),
        (["--labels", "8-12"], "--labels: got '8-12', allowed is 0 to 9"),
        (["--labels", "5-2"], "--labels: got '5-2', allowed is 0 to 9, ascending"),
        (["--labels", "cat"], "--labels: got 'cat', allowed is a list such as 1,7,20-29"),
        (["--labels", ""], "--labels: got '', allowed is a list"),
        (["--count", "0"], "--count: got 0, allowed is a positive number"),
        (["--seed", "-1"], "--seed: got -1, allowed is 0 to 2**63 - 1"),
        (["--model", "titok-ll-32"], "--model: 'titok-ll-32' is not one of titok-l-32, "),
        (["--npz", "samples.npy"], "--npz: got suffix '.npy', allowed is .npz"),
        (["--steps", "0"], "--steps: got 0, allowed is a positive int"),
        (["--guidance-decay", "cubic"], "--guidance-decay: got 'cubic', allowed is 'constant'"),
        (["--top-k", "3"], "--top-k: got 3, but options of titok-digits are steps, guidance"),
        (["--regenerate", "0-3"], "--regenerate: needs --ids"),
    ],
)
def test_errors_are_one_line(titok_fast, tmp_path, options, words):
    result = titok_fast(*DIGITS, "-o", tmp_path / "out", *options)
    assert result.returncode == 2
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_needs_a_place_of_its_own(titok_fast, tmp_path, monkeypatch):
    result = titok_fast(*DIGITS)
    assert result.returncode == 2 and "--output: got neither it nor --npz" in result.err
    result = titok_fast(*DIGITS, "-o", tmp_path, "--npz", tmp_path / "tokens.npz")
    assert result.returncode == 2 and "which is the token file" in result.err
    monkeypatch.chdir(tmp_path)
    result = titok_fast(*DIGITS, "-o", "out", "--npz", tmp_path / "out" / "tokens.npz")
    assert result.returncode == 2 and "which is the token file" in result.err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(titok_fast, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    result = titok_fast(*DIGITS, "--count", 9, "--npz", tmp_path / "g.npz")
    assert result.returncode == 2 and "--npz: No space left on device: 27,648 bytes" in result.err
    assert len(result.err.strip().splitlines()) == 1 and not (tmp_path / "g.npz").exists()


def test_capture_needs_a_gpu(titok_fast, tmp_path):
    result = titok_fast(*DIGITS, "--count", 1, "-o", tmp_path / "out", "--capture")
    assert result.returncode == 2 and "--capture: allowed on a GPU and without --ids" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("000000.png", ""),
        ("sheet.png", ""),
        ("tokens.npz", ""),
        ("options.json", ""),
        ("options.json", '{"lr": 0.1}'),
        ("options.json", "[]"),
    ],
)
def test_files_of_others_in_the_folder_are_kept(titok_fast, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    result = titok_fast(*DIGITS, "--count", 1, "-o", tmp_path)
    assert result.returncode == 2 and len(result.err.strip().splitlines()) == 1
    assert f"--output: {tmp_path / name} is there and not from a run of generate" in result.err
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


def test_a_run_without_an_image_is_replaced(titok_fast, tmp_path):
    (tmp_path / "options.json").write_text('{"--model": "titok-digits", "--batch-size": 999}')
    assert titok_fast(*DIGITS, "--count", 1, "-o", tmp_path).returncode == 0
    assert json.loads((tmp_path / "options.json").read_text())["--batch-size"] == 64


def test_files_of_others_are_not_replaced_by_an_array(titok_fast, tmp_path):
    npz = tmp_path / "x.npz"

    def refused(*options):
        before = npz.read_bytes()
        result = titok_fast(*DIGITS, "--count", 1, "--npz", npz, *options)
        assert result.returncode == 2 and len(result.err.strip().splitlines()) == 1
        assert f"--npz: {npz} is there and not from a run of generate" in result.err
        assert npz.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [npz.name]

    npz.write_text("notes")
    refused()
    with npz.open("wb") as file:
        np.save(file, np.zeros(3))
    refused("-o", tmp_path / "out")
    np.savez(npz, options=np.array("{}"))
    refused()
    TokenFile(
        np.zeros((1, 16), np.int64), ["a"], "titok-digits",
        fingerprint(TiTok.from_pretrained("titok-digits")), 32, 256,
    ).save(npz)  # fmt: skip
    refused("--ids", npz, "--regenerate", "0-3")


@pytest.fixture(scope="module")
def ibq_pair(tmp_path_factory):
    """Flags that put a tiny pair in place of a release: 16 tokens, images of 8 x 8."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    layers = {
        "double_z": False, "z_channels": 8, "resolution": 8, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    config = {"n_embed": 64, "embed_dim": 8, "ddconfig": layers}
    IBQTokenizer.from_config(config).save_pretrained(folder / "tokenizer")
    sizes = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    transformer = ARTransformer.from_config(sizes | {"class_num": 10})
    torch.nn.init.normal_(transformer.head.weight)
    transformer.save_pretrained(folder / "generator")
    return (
        "generate", "--model", "ibq-ar-b", "--tokenizer", folder / "tokenizer",
        "--generator", folder / "generator",
    )  # fmt: skip


def test_files_of_an_autoregressive_run(titok_fast, tmp_path, ibq_pair):
    out = tmp_path / "out"
    options = ("--temperature", 0.9, "--top-k", 30, "--top-p", 0.95, "--guidance-scale", 1.5)
    command = (*ibq_pair, "--labels", "7,1", "--count", 5, "--seed", 3, *options)
    result = titok_fast(*command, "-o", out)
    assert result.returncode == 0, result.err
    transformer = ARTransformer.from_pretrained(ibq_pair[-1])
    tokens = transformer.generate(
        [7, 1, 7, 1, 7], seed=3, temperature=0.9, top_k=30, top_p=0.95, guidance_scale=1.5
    ).unflatten(1, (4, 4))
    images = IBQTokenizer.from_pretrained(ibq_pair[4]).decode(tokens)
    expected = (images * 255).byte().permute(0, 2, 3, 1).numpy()
    found = np.stack([pixels(out / f"{i:06d}.png") for i in range(5)])
    np.testing.assert_array_equal(found, expected)
    file = TokenFile.load(out / "tokens.npz")
    np.testing.assert_array_equal(file.tokens, tokens.numpy())
    assert file.image_size == 8
    assert titok_fast("decode", out / "tokens.npz", "-o", tmp_path / "decoded").returncode == 0
    assert pixels(tmp_path / "decoded" / "000004.png").shape == (8, 8, 3)
    batches = titok_fast(*command, "-o", tmp_path / "batches", "--batch-size", 2)
    assert batches.returncode == 0, batches.err
    assert contents(tmp_path / "batches") == contents(out)


def test_an_autoregressive_run_goes_on_from_given_tokens(titok_fast, tmp_path, ibq_pair):
    assert titok_fast(*ibq_pair, "--labels", "4,9", "-o", tmp_path / "a").returncode == 0
    edit = (*ibq_pair, "--labels", "4,9", "--seed", 1, "--ids", tmp_path / "a" / "tokens.npz")
    result = titok_fast(*edit, "-o", tmp_path / "b", "--regenerate", "6-15")
    assert result.returncode == 0, result.err
    given, edited = (TokenFile.load(tmp_path / x / "tokens.npz").tokens for x in "ab")
    assert given.shape == (2, 4, 4)
    same = (given == edited).reshape(2, 16).all(0)
    assert same[:6].all() and not same.all()
    result = titok_fast(*edit, "-o", tmp_path / "c", "--regenerate", "3,6-15")
    assert result.returncode == 2
    assert "--regenerate: got '3,6-15', allowed is 3-15, to the end" in result.err
    result = titok_fast(*edit, "-o", tmp_path / "d", "--regenerate", "0-15")
    assert result.returncode == 0, result.err


@pytest.mark.parametrize("side", [2, 8])
def test_given_tokens_of_another_grid_are_refused(titok_fast, tmp_path, ibq_pair, side):
    mark = fingerprint(IBQTokenizer.from_pretrained(ibq_pair[4]))
    tokens, given = np.zeros((1, side, side), np.int64), tmp_path / "given.npz"
    TokenFile(tokens, ["a"], str(ibq_pair[4]), mark, 2 * side, 64).save(given)
    result = titok_fast(
        *ibq_pair, "--labels", 4, "-o", tmp_path / "out", "--ids", given, "--regenerate", "2-15"
    )
    assert result.returncode == 2 and len(result.err.strip().splitlines()) == 1
    assert f"{given} has images of {side} x {side} tokens, allowed is 4 x 4" in result.err
    assert [p.name for p in tmp_path.iterdir()] == [given.name]


@pytest.mark.parametrize("place", ["-o", "--npz"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_weights_are_refused(titok_fast, tmp_path, ibq_pair, monkeypatch, place, finished):
    tokenizer, generator = tmp_path / "tokenizer", tmp_path / "generator"
    shutil.copytree(ibq_pair[4], tokenizer)
    shutil.copytree(ibq_pair[6], generator)
    output = tmp_path / "samples.npz"
    command = (
        *ibq_pair[:3], "--tokenizer", tokenizer, "--generator", generator, "--labels", "4,9",
        "--batch-size", 1, place, output,
    )  # fmt: skip
    if finished:
        assert titok_fast(*command).returncode == 0
    else:
        run = ARTransformer.generate

        def interrupted(self, labels, **options):
            if options["image_ids"] == 1:
                raise OSError("disk full")
            return run(self, labels, **options)

        with monkeypatch.context() as patch:
            patch.setattr(ARTransformer, "generate", interrupted)
            assert titok_fast(*command).returncode == 2
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for folder, kind, name in (
        (tokenizer, IBQTokenizer, "decoder.conv_out.bias"),
        (generator, ARTransformer, "head.weight"),
    ):
        weights = folder / "model.safetensors"
        model, before = kind.from_pretrained(folder), weights.read_bytes()
        with torch.no_grad():
            model.get_parameter(name).add_(1)
        model.save_pretrained(folder)
        result = titok_fast(*command)
        assert result.returncode == 2 and len(result.err.strip().splitlines()) == 1
        assert f"with other settings ({folder.name} weights " in result.err
        weights.write_bytes(before)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    again = titok_fast(*command)
    assert again.returncode == 0
    assert f"{2 if finished else 1} of 2 images were done before" in again.out


def test_a_path_may_be_spelled_otherwise(titok_fast, tmp_path, ibq_pair, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in ((4, "tokenizer"), (6, "generator")):
        shutil.copytree(ibq_pair[i], name)
    start = (*ibq_pair[:3], "--labels", "4,9", "--tokenizer")
    assert titok_fast(
        *start, "tokenizer", "--generator", "generator", "-o", "out", "--npz", "a.npz"
    ).returncode == 0  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    for tokenizer, generator, npz in (
        ("./tokenizer", "./generator", tmp_path / "a.npz"),
        ("~/tokenizer", "~/generator", "out/../a.npz"),
        ("tokenizer", tmp_path / "generator", "./a.npz"),
    ):
        result = titok_fast(*start, tokenizer, "--generator", generator, "-o", "out", "--npz", npz)
        assert result.returncode == 0, result.err
        assert "2 of 2 images were done before" in result.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "3"], "--steps: got 3, but options of ibq-ar-b are guidance_scale, temper"),
        (["--top-p", "1.5"], "--top-p: got 1.5, allowed is a number from 0 to 1"),
        (["--top-k", "-2"], "--top-k: got -2, allowed is an int from 0"),
        (["--temperature", "-1"], "--temperature: got -1.0, allowed is a finite number from 0"),
    ],
)
def test_errors_of_an_autoregressive_run(titok_fast, tmp_path, ibq_pair, options, words):
    result = titok_fast(*ibq_pair, "-o", tmp_path / "out", *options)
    assert result.returncode == 2
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_generator_of_other_tokens_is_refused(titok_fast, tmp_path, ibq_pair):
    result = titok_fast(
        "generate", "--model", "titok-digits", "--generator", "maskgit-digits", "-o",
        tmp_path / "out", "--tokenizer", ibq_pair[4],
    )  # fmt: skip
    assert result.returncode == 2
    assert (
        "--generator: got one of 16 tokens of 256 codes, allowed is 16 tokens of 64" in result.err
    )


def test_a_batch_that_lost_a_picture_is_generated_again(titok_fast, tmp_path, monkeypatch):
    def command(name):
        return *DIGITS, "--count", 6, "--batch-size", 3, "-o", tmp_path / name

    fail_at(monkeypatch, 2)
    assert titok_fast(*command("a")).returncode == 2
    (tmp_path / "a" / "000001.png").unlink(missing_ok=True)  # what was being written may be lost
    assert titok_fast(*command("a")).returncode == 0
    assert titok_fast(*command("b")).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
