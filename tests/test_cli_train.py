"""`titok-fast train`."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import training
from tests.training import IBQ, evaluations, generator, titok
from titok_fast.models import IBQTokenizer, MaskGIT, MaskGITVQGAN, TiTok
from titok_fast.tokens import TokenFile, fingerprint
from titok_fast.training.data import digits
from titok_fast.training.run import STATE_FILE

vqgan, pictures = training.vqgan, training.pictures


@pytest.fixture(scope="module")
def digit_tokens(tmp_path_factory):
    """Tokens of 64 digits and their labels."""
    images, labels = digits("test")
    tokenizer = TiTok.from_pretrained("titok-digits")
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    TokenFile(
        tokenizer.encode(images[:64]).numpy(),
        [f"{i}.png" for i in range(64)],
        "titok-digits",
        fingerprint(tokenizer),
        32,
        tokenizer.codebook_size,
        labels=labels[:64].numpy(),
        class_names=[str(i) for i in range(10)],
    ).save(path)
    return path


@pytest.fixture
def other_tokens(digit_tokens, tmp_path):
    """The same images in another order."""
    file, path = TokenFile.load(digit_tokens), tmp_path / "reversed.npz"
    dataclasses.replace(file, tokens=file.tokens[::-1].copy(), labels=file.labels[::-1]).save(path)
    return path


def test_the_command(titok_fast, digit_tokens, other_tokens, tmp_path):
    """A network is trained, taken up, gone on from, and generates."""
    out = tmp_path / "mine"
    train = ("train", digit_tokens, "--model", "maskgit-digits", "--batch-size", 16)
    first = titok_fast(*train, "--steps", 4, "--save-every", 2, "--log-every", 2, "-o", out)
    assert first.returncode == 0, first.err
    assert "MaskGIT, " in first.out and "64 images" in first.out and f"wrote {out}" in first.out
    assert "step     4/4  loss " in first.out
    names = ["config.json", "log.jsonl", "model.safetensors", STATE_FILE, "training.json"]
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    model = MaskGIT.from_pretrained(out)
    assert (model.num_tokens, model.num_classes) == (16, 10)

    held_out = ("--held-out", other_tokens, "--evaluate-every", 3)  # no setting of the run
    again = titok_fast(*train, "--steps", 4, *held_out, "--samples-with", "titok-digits", "-o", out)
    assert Image.open(out / "samples" / "step-00000004.png").size == (8 * 34 - 2, 2 * 34 - 2)
    assert again.returncode == 0 and "taken up after step 4 of 4" in again.out, again.err
    assert "64 images, 64 held out" in again.out
    (line,) = evaluations(out)
    assert (line["step"], line["images"]) == (
        4,
        64,
    ) and f"held out: loss {line['loss']:.5g}" in again.out
    other = titok_fast(*train, "--steps", 5, "-o", out)
    assert other.returncode == 2 and "(--steps 4 now 5)" in other.err
    assert other.err.count("\n") == 1

    kept = tmp_path / "kept"
    early = ("--steps", 4, "--keep-every", 1, "-o", kept)
    assert titok_fast(*train, *early).returncode == 0
    for name in ("config.json", "model.safetensors", STATE_FILE):
        (kept / name).unlink()  # as a run leaves it that was killed before its first state
    other = titok_fast(*train, *early, "--seed", 1)
    assert other.returncode == 2 and "--seed 0 now 1" in other.err

    more = tmp_path / "more"
    options = ("--steps", 2, "--batch-size", 8, "--dtype", "bfloat16", "--average-decay", 0)
    result = titok_fast("train", digit_tokens, "--init", out, *options, "-o", more)
    assert result.returncode == 0, result.err
    pictures = tmp_path / "pictures"
    result = titok_fast(
        "generate", "--model", "titok-digits", "--generator", more, "--count", 2, "-o", pictures
    )
    assert result.returncode == 0, result.err
    assert (pictures / "000001.png").exists()


def test_the_command_trains_tokenizers(titok_fast, vqgan, pictures, tmp_path):
    folder = str(Path(pictures[0]).parent)
    out, options = tmp_path / "pixels", ("--steps", 2, "--batch-size", 4, "--workers", 2)
    result = titok_fast("train", folder, "--model", "titok-digits", *options, "-o", out)
    assert result.returncode == 0, result.err
    assert "TiTok, " in result.out and "9 images" in result.out and "8.png: not a re" in result.out
    assert TiTok.from_pretrained(out).image_size == 32

    titok().save_pretrained(tmp_path / "init")
    vqgan.save_pretrained(tmp_path / "vqgan")
    source = ("--init", tmp_path / "init", "--proxy", tmp_path / "vqgan")
    others = tmp_path / "others"
    others.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(pictures[0], others / name)
    held_out = ("--held-out", others / "a.png", "--held-out", others, "--evaluate-every", 1)
    result = titok_fast("train", folder, *source, *options, *held_out, "-o", tmp_path / "out")
    assert result.returncode == 0, result.err
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [1, 2]
    assert result.out.count("held out: loss ") == 2 and ", accuracy " in result.out
    trained = TiTok.from_pretrained(tmp_path / "out")
    codes = trained.proxy_logits(trained.encode(torch.rand(1, 3, 16, 16))).argmax(1).flatten(1)
    assert vqgan.decode(codes).shape == (1, 3, 16, 16)


def test_the_command_trains_the_second_stage(titok_fast, pictures, tmp_path):
    folder, first, proxy = Path(pictures[0]).parent, tmp_path / "first", tmp_path / "proxy"
    titok(vit_dec_patch_size=16, vit_enc_patch_size=16, num_latent_tokens=4).save_pretrained(first)
    model = MaskGITVQGAN.from_config("maskgit-vqgan-imagenet-f16-256")
    model.save_pretrained(proxy)
    source = ("--init", first, "--proxy", proxy, "--second-stage", "--adversarial-weight", 0.1)
    options = ("--adversarial-start", 1, "--quantizer-weight", 0, "--batch-size", 2, "--steps", 2)
    result = titok_fast("train", folder, *source, *options, "-o", tmp_path / "second")
    assert result.returncode == 0, result.err
    trained, given = TiTok.from_pretrained(tmp_path / "second"), TiTok.from_pretrained(first)
    for name, tensor in given.state_dict().items():
        frozen = name.startswith(("encoder.", "quantize.", "latent_tokens"))
        assert torch.equal(trained.state_dict()[name], tensor) == frozen, name
    moved = trained.pixel_decoder.conv_out.weight - model.decoder.conv_out.weight
    assert moved.abs().max() > 0
    state = torch.load(tmp_path / "second" / STATE_FILE, weights_only=True)
    assert state["helper"]["_extra_state"]["optimizer"]["state"]  # the discriminator learned
    absent = (*source[:2], "--proxy", tmp_path / "absent")
    refused = titok_fast("train", folder, *absent, "-o", tmp_path / "other")
    assert refused.returncode == 2 and "error: --proxy: " in refused.err
    without = titok_fast("train", folder, *source[:-2], *options[2:], "-o", tmp_path / "second")
    assert without.returncode == 2 and "--adversarial-weight 0.1 now None" in without.err
    other = titok_fast("train", folder, *source, "--kl-weight", 3, "-o", tmp_path / "other")
    assert other.returncode == 2 and "--kl-weight: got 3.0, but this TiTok has no" in other.err


def test_the_command_takes_weights_of_ibq(titok_fast, pictures, tmp_path):
    IBQTokenizer.from_config(IBQ).save_pretrained(tmp_path / "ibq")
    options = ("--adversarial-weight", 0.1, "--adversarial-start", 0, "--steps", 1)
    weights = set()
    for given in ((), ("--adversarial-adaptive",), ("--entropy-weight", 1)):
        out = tmp_path / f"out{given}"
        source = ("--init", tmp_path / "ibq", "--batch-size", 2, *options, *given, "-o", out)
        result = titok_fast("train", pictures[0], *source)
        assert result.returncode == 0, result.err
        settings = json.loads((out / "training.json").read_text())
        assert settings["--adversarial-adaptive"] == ("--adversarial-adaptive" in given)
        assert settings["--entropy-weight"] == (1 if "--entropy-weight" in given else 0.025)
        weights.add((out / "model.safetensors").read_bytes())
    assert len(weights) == 3
    titok(is_legacy=False).save_pretrained(tmp_path / "titok")
    source = ("--init", tmp_path / "titok", "--entropy-weight", 1, "-o", tmp_path / "other")
    result = titok_fast("train", pictures[0], *source)
    assert (
        result.returncode == 2 and "--entropy-weight: got 1.0, but this TiTok has no" in result.err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--model: needed, or --init"),
        (("--model", "maskgit-digits", "--init", "x"), "--init: not allowed with --model"),
        (("--model", "titok-9"), "--model: 'titok-9' is not one of maskgit-vit-l-32"),
        (("--model", "maskgit-digits", "--steps", 0), "--steps: got 0, allowed is a positive int"),
        (("--model", "maskgit-digits", "--dtype", "float16"), "--dtype: 'float16' is not one of"),
        (
            ("--model", "ibq-ar-b", "--label-smoothing", 0.2),
            "--label-smoothing: got 0.2, but this ARTransformer has no use for it",
        ),
        (
            ("--model", "maskgit-digits", "--kl-weight", 0.2),
            "--kl-weight: got 0.2, but this MaskGIT has no use for it",
        ),
        (("digits.npz", "--model", "maskgit-digits"), "digits.npz: no such file"),
        (("--init", "maskgit-digits", "--batch-size", -1), "--batch-size: got -1"),
        (
            ("--init", "maskgit-digits", "--seed", 2**64),
            "--seed: got 18446744073709551616, allowed",
        ),
        (
            ("--init", "maskgit-digits", "--batch-size", 10, "--micro-batch-size", 3),
            "--micro-batch-size: got 3, allowed is a divisor of the 10 examples",
        ),
        (("--init", "maskgit-digits", "--beta2", 1.5), "--beta2: got 1.5, allowed is a number"),
        (
            ("--init", "titok-digits", "--second-stage"),
            "--second-stage: allowed with --init of a",
        ),
        (
            ("--init", "maskgit-digits", "--perceptual", "lpips"),
            "--perceptual: allowed for a tokenizer that predicts pixels",
        ),
        (
            ("--model", "titok-l-32", "--perceptual", "lpips"),
            "--perceptual: allowed for a tokenizer that predicts pixels",
        ),
        (
            ("--model", "titok-digits", "--perceptual", "vgg"),
            "--perceptual: 'vgg' is not one of lpips, convnext_s",
        ),
        (
            ("--model", "titok-digits", "--perceptual", "lpips", "--perceptual-weight", -1),
            "--perceptual-weight: got -1.0, allowed is a finite number from 0",
        ),
        (
            ("--model", "titok-digits", *2 * ("--perceptual", "lpips")),
            "--perceptual: got lpips and lpips, allowed is each once",
        ),
        (
            ("--model", "titok-digits", "--perceptual", "lpips", *2 * ("--perceptual-weight", 2)),
            "--perceptual-weight: got 2, allowed is one for each of 1 --perceptual",
        ),
        (
            ("--model", "titok-digits", "--perceptual-weight", 2),
            "--perceptual-weight: got 2.0, allowed with --perceptual",
        ),
        (
            ("--init", "maskgit-digits", "--adversarial-weight", 0.1),
            "--adversarial-weight: allowed for a tokenizer that predicts pixels",
        ),
        (
            ("--model", "titok-digits", "--adversarial-adaptive"),
            "--adversarial-adaptive: got True, allowed with --adversarial-weight",
        ),
        (
            ("--model", "titok-digits", "--lecam-weight", 0.1),
            "--lecam-weight: got 0.1, allowed with --adversarial-weight",
        ),
        (
            ("--model", "titok-digits", "--steps", 9, "--adversarial-weight", 0.1),
            "--adversarial-start: got 20000, allowed is less than the 9 --steps",
        ),
        (
            ("--model", "titok-l-32", "--pixel-loss", "l1"),
            "--pixel-loss: got l1, but this TiTok has no use for it",
        ),
        (("--model", "titok-ll-32-vae", "--quantizer-weight", 2), "--quantizer-weight: got 2.0"),
        (("--model", "ibq-1024", "--kl-weight", 2), "--kl-weight: got 2.0, but this IBQTokenizer"),
        (("--init", "maskgit-digits", "--proxy", "x"), "--proxy: got 'x', which only a TiTok"),
        (
            ("--init", "maskgit-digits", "--evaluate-every", 5),
            "--evaluate-every: got 5, allowed with --held-out",
        ),
        (
            ("--init", "maskgit-digits", "--samples-with", "titok-digits"),
            "--samples-with: got titok-digits, allowed with --held-out",
        ),
        (
            ("--init", "titok-digits", "--held-out", "pyproject.toml", "--samples-with", "x"),
            "--samples-with: got 'x', allowed for a generator",
        ),
        (
            ("--init", "titok-digits", "--held-out", "nowhere"),
            "--held-out: 'nowhere' is not a file, a folder",
        ),
        (
            ("--init", "maskgit-digits", "--held-out", "a.npz", "--held-out", "b.npz"),
            "--held-out: a.npz: no such file",
        ),
    ],
)
def test_the_command_refuses(titok_fast, digit_tokens, pictures, tmp_path, options, message):
    of_images = str(options[1:2]).startswith(("('titok-", "('ibq-1024"))
    data = pictures[0] if of_images else digit_tokens
    result = titok_fast("train", data, *options, "-o", tmp_path / "out")
    assert result.returncode == 2 and message in result.err, result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_tokenizers_learn_from_images_and_generators_from_tokens(
    titok_fast, digit_tokens, pictures, tmp_path
):
    for data, name, words in (
        (digit_tokens, "titok-digits", "but a TiTok learns from images"),
        (pictures[0], "maskgit-digits", "but a MaskGIT learns from token files (.npz, .safetens"),
    ):
        for source in ("--model", "--init"):
            result = titok_fast("train", data, source, name, "-o", tmp_path / "out")
            assert result.returncode == 2 and f"PATHS: got {data}, {words}" in result.err


def test_a_configuration_of_both_is_of_what_the_data_says(titok_fast, pictures, tmp_path):
    """1d-tokenizer's repositories of tokenizers may describe a generator, too."""
    titok(is_legacy=False).save_pretrained(tmp_path / "titok")
    file = tmp_path / "titok" / "config.json"
    config = json.loads(file.read_text())
    config["model"]["generator"] = {"class_label_dropout": 0.1}
    file.write_text(json.dumps(config))
    train = ("train", pictures[0], "--init", file.parent, "--steps", 1, "--batch-size", 2)
    result = titok_fast(*train, "-o", tmp_path / "out")
    assert result.returncode == 0, result.err


def test_the_command_after_a_run_that_never_saved(titok_fast, digit_tokens, tmp_path):
    """One line says what was not finite, and other settings are free until there is a state."""
    train = ("train", digit_tokens, "--model", "maskgit-digits", "--steps", 3, "-o", tmp_path)
    result = titok_fast(*train, "--learning-rate", 1e30, "--batch-size", 8, "--average-decay", 0)
    assert result.returncode == 2 and "loss: got nan at step" in result.err, result.err
    assert result.err.count("\n") == 1 and not (tmp_path / STATE_FILE).exists()
    (tmp_path / f".{STATE_FILE}.123.tmp").write_bytes(b"left by a killed save")
    result = titok_fast(*train, "--batch-size", 8)
    assert result.returncode == 0, result.err
    assert not list(tmp_path.glob(".*.tmp"))


def test_other_labels_are_another_run(titok_fast, digit_tokens, tmp_path):
    train = ("--model", "maskgit-digits", "--steps", 1, "--batch-size", 8, "-o", tmp_path / "out")
    assert titok_fast("train", digit_tokens, *train).returncode == 0
    file = TokenFile.load(digit_tokens)
    dataclasses.replace(file, labels=file.labels[::-1]).save(tmp_path / "other.npz")
    result = titok_fast("train", tmp_path / "other.npz", *train)
    assert result.returncode == 2 and "left by a run with other settings (data " in result.err


def test_held_out_images_are_not_those_of_the_training(titok_fast, pictures, tmp_path):
    train = ("train", *pictures[:3], "--model", "titok-digits", "-o", tmp_path / "out")
    result = titok_fast(*train, "--held-out", pictures[2], "--held-out", pictures[3])
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "--held-out: got 1 images that are trained on, such as " in result.err
    (tmp_path / "broken.png").write_text("no image")
    result = titok_fast(*train, "--held-out", tmp_path / "broken.png")
    assert result.returncode == 2 and "broken.png" in result.err and "step" not in result.out


def test_held_out_tokens_of_another_kind_are_refused(
    titok_fast, digit_tokens, other_tokens, tmp_path
):
    titok(is_legacy=False).save_pretrained(tmp_path / "titok")
    train = ("train", digit_tokens, "--model", "maskgit-digits", "-o", tmp_path / "out")
    file, path = TokenFile.load(digit_tokens), tmp_path / "other.npz"
    for name, value in (
        ("fingerprint", "1" * 16),
        ("class_names", [str(i) for i in range(11)]),
        ("tokens", file.tokens[:, :4]),
    ):
        dataclasses.replace(file, **{name: value}).save(path)
        result = titok_fast(*train, "--held-out", path)
        words = "has images of [4] tokens, " if name == "tokens" else f"has another {name} than"
        assert result.returncode == 2 and f"--held-out: {path} {words}" in result.err, result.err
    for name, tokens in (("empty", file.tokens[:0]), ("same", file.tokens)):
        rows = slice(len(tokens))
        labels, image_ids = file.labels[rows], file.image_ids[rows]
        dataclasses.replace(file, tokens=tokens, labels=labels, image_ids=image_ids).save(path)
        result = titok_fast(*train, "--held-out", path)
        reason = f"{path} has no image" if name == "empty" else "got 64 images that are trained on"
        assert result.returncode == 2 and f"--held-out: {reason}" in result.err
    result = titok_fast("train", path, other_tokens, *train[2:], "--held-out", path)
    assert result.returncode == 2 and "such as '0.png'" in result.err
    result = titok_fast(*train, "--held-out", other_tokens, "--samples-with", tmp_path / "titok")
    assert result.returncode == 2 and "allowed is titok-digits (weights " in result.err
    titok().save_pretrained(tmp_path / "first")
    result = titok_fast(*train, "--held-out", other_tokens, "--samples-with", tmp_path / "first")
    assert result.returncode == 2 and "a first-stage model, which makes no pixels" in result.err
    assert not (tmp_path / "out").exists()


def test_the_command_takes_several_token_files(titok_fast, digit_tokens, tmp_path):
    file, paths = TokenFile.load(digit_tokens), [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path, rows in zip(paths, (slice(40), slice(40, None)), strict=True):
        part = {name: getattr(file, name)[rows] for name in ("tokens", "labels", "image_ids")}
        dataclasses.replace(file, **part).save(path)
    options = ("--model", "maskgit-digits", "--steps", 1, "--batch-size", 8, "-o", tmp_path / "out")
    assert titok_fast("train", *paths, *options).returncode == 0
    again = titok_fast("train", digit_tokens, *options)  # the same images in the same order
    assert again.returncode == 0 and "taken up after step 1 of 1" in again.out, again.err
    for change, message in (
        ({"fingerprint": "1" * 16}, "has another fingerprint than "),
        ({"class_names": [f"class {i}" for i in range(10)]}, "has another class_names than "),
        ({"tokens": file.tokens[:, :4]}, "has images of [4] tokens, "),
    ):
        dataclasses.replace(file, **change).save(paths[1])
        result = titok_fast("train", *paths, *options)
        assert result.returncode == 2 and result.err.count("\n") == 1
        assert f"PATHS: {paths[1]} {message}{paths[0]}" in result.err


def test_a_second_run_into_a_folder_is_refused(titok_fast, digit_tokens, tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from titok_fast.cli.runs import locked
        lock = locked(Path(sys.argv[1]))
        print("locked", flush=True)
        sys.stdin.read()"""
    command = [sys.executable, "-c", code, str(tmp_path / "out" / ".lock")]
    train = ("--model", "maskgit-digits", "--steps", 1, "--batch-size", 8, "-o", tmp_path / "out")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        result = titok_fast("train", digit_tokens, *train)
        other.stdin.close()
    assert result.returncode == 2 and "out: another run is writing to it" in result.err
    assert titok_fast("train", digit_tokens, *train).returncode == 0
    assert not (tmp_path / "out" / ".lock").exists()


def test_the_command_never_replaces_a_model(titok_fast, digit_tokens, tmp_path):
    generator(MaskGIT).save_pretrained(tmp_path)
    result = titok_fast("train", digit_tokens, "--model", "maskgit-digits", "-o", tmp_path)
    assert result.returncode == 2 and "holds a model, allowed is a folder without one" in result.err


def test_the_command_keeps_a_model_whose_state_was_deleted(titok_fast, digit_tokens, tmp_path):
    train = ("train", digit_tokens, "--model", "maskgit-digits", "--batch-size", 8, "-o", tmp_path)
    assert titok_fast(*train, "--steps", 2).returncode == 0
    (tmp_path / STATE_FILE).unlink()
    before = (tmp_path / "model.safetensors").read_bytes()
    result = titok_fast(*train, "--steps", 2, "--seed", 5)
    assert (
        result.returncode == 2 and "left by a run with other settings (--seed 0 now 5" in result.err
    )
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert titok_fast(*train, "--steps", 2).returncode == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_command_under_torchrun(digit_tokens, other_tokens, tmp_path):
    """Two processes, one log, one model."""
    code = "from titok_fast.cli import main; main()"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--no-python", sys.executable, "-c", code, "train", str(digit_tokens)),
        *("--model", "maskgit-digits", "--steps", "2", "--batch-size", "8"),
        *("--held-out", str(other_tokens), "-o"),
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path.cwd()
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("wrote ") == 1 and result.stdout.count("step     2/2  loss ") == 1
    assert result.stdout.count("held out: loss ") == len(evaluations(tmp_path / "out")) == 1
    assert MaskGIT.from_pretrained(tmp_path / "out").num_tokens == 16


def test_the_seed_decides_the_first_weights(titok_fast, digit_tokens, tmp_path):
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)  # that of the process has no part in it
        out = tmp_path / str(number)
        train = (
            "train",
            digit_tokens,
            "--model",
            "maskgit-digits",
            "--batch-size",
            4,
            "--steps",
            1,
        )
        result = titok_fast(*train, "--learning-rate", 1e-9, "--seed", seed, "-o", out)
        assert result.returncode == 0, result.err
        weights.append(MaskGIT.from_pretrained(out).lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-3)
