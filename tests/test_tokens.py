"""Token files keep what they are given and refuse what is not theirs."""

import io
import pickle
import resource
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.conformance import manifest
from titok_fast.images import write_png
from titok_fast.models import IBQTokenizer, TiTok
from titok_fast.tokens import SUFFIXES, TokenFile, concatenated, fingerprint

IDS = ["a/ü 1.png", "a/b\n2.jpg", "odd\udc80.png"]


def token_file(**changes):
    values = {
        "tokens": np.array([[0, 9], [3, 4], [255, 1]]),
        "image_ids": IDS,
        "model": "owner/name",
        "fingerprint": "0123456789abcdef",
        "image_size": 32,
        "codebook_size": 256,
        "revision": "v2",
        "labels": np.array([1, -1, 0]),
        "class_names": ["cat", "dog"],
    }
    return TokenFile(**(values | changes))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix):
    path = tmp_path / "new" / f"tokens{suffix}"
    token_file().save(path)
    back = TokenFile.load(path)
    np.testing.assert_array_equal(back.tokens, [[0, 9], [3, 4], [255, 1]])
    assert back.tokens.dtype == np.uint16 and back.labels.dtype == np.int64
    assert back.image_ids == IDS and back.class_names == ["cat", "dog"]
    assert back.labels.tolist() == [1, -1, 0]
    assert (back.model, back.revision, back.fingerprint) == (
        "owner/name", "v2", "0123456789abcdef",
    )  # fmt: skip
    assert (back.image_size, back.codebook_size) == (32, 256)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_optional_fields_stay_absent(tmp_path, suffix):
    path = tmp_path / f"tokens{suffix}"
    token_file(revision=None, labels=None, class_names=None).save(path)
    back = TokenFile.load(path)
    assert back.revision is None and back.labels is None and back.class_names is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_latents(tmp_path, suffix):
    latents = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    path = tmp_path / f"tokens{suffix}"
    token_file(tokens=latents, codebook_size=None).save(path)
    back = TokenFile.load(path)
    np.testing.assert_array_equal(back.tokens, latents)
    assert back.tokens.dtype == np.float32 and back.codebook_size is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_images(tmp_path, suffix):
    path = tmp_path / f"tokens{suffix}"
    token_file(tokens=np.zeros((0, 2), int), image_ids=[], labels=np.zeros(0, int)).save(path)
    back = TokenFile.load(path)
    assert back.tokens.shape == (0, 2) and back.image_ids == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tokens_on_a_grid(tmp_path, suffix):
    tokens = np.array([[[0, 70000], [262143, 3]]] * 3)
    path = tmp_path / f"tokens{suffix}"
    token_file(tokens=tokens, codebook_size=262144).save(path)
    back = TokenFile.load(path)
    np.testing.assert_array_equal(back.tokens, tokens)
    assert back.tokens.dtype == np.int32


@pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.int32)])
def test_the_dtype_is_the_smallest_that_fits(size, dtype):
    file = token_file(tokens=np.array([[size - 1]] * 3), codebook_size=size)
    assert file.tokens.dtype == dtype and int(file.tokens[0, 0]) == size - 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_contents_are_the_same_bytes(tmp_path, suffix):
    for name in "ab":
        token_file().save(tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_npz_opens_with_numpy_alone(tmp_path):
    token_file().save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz", allow_pickle=False) as file:
        assert file["image_ids"].tolist() == IDS
        assert file["model"].item() == "owner/name" and int(file["image_size"]) == 32


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokens": np.array([[0, 256]] * 3)}, ValueError, "got 0 to 256, allowed is 0 to 255"),
        ({"tokens": np.array([[-1, 0]] * 3)}, ValueError, "got -1 to 0"),
        ({"tokens": np.zeros((3, 2))}, TypeError, "float64, allowed are integers"),
        ({"tokens": np.zeros(3, int)}, ValueError, r"shape \[3\], allowed are \[N, L\] and"),
        ({"codebook_size": None}, TypeError, "int64, allowed are floating latents"),
        ({"tokens": np.full((3, 1, 1), np.nan), "codebook_size": None}, ValueError, "not finite"),
        ({"image_ids": IDS[:2]}, ValueError, "image_ids: got 2, allowed is one for each of 3"),
        ({"image_ids": [1, 2, 3]}, TypeError, "image_ids: got int, allowed is a sequence of str"),
        ({"image_ids": "abc"}, TypeError, "image_ids: got str, allowed is a sequence of str"),
        ({"class_names": [b"a", b"b"]}, TypeError, "class_names: got bytes, allowed is a seq"),
        ({"labels": np.array([0, 1, 2])}, ValueError, "labels: got 0 to 2, allowed is -1 to 1"),
        ({"labels": np.array([0, 1])}, ValueError, r"labels: got int64 \[2\]"),
        ({"labels": None}, ValueError, "class_names: allowed with labels"),
    ],
)
def test_inconsistent_contents(changes, error, words):
    with pytest.raises(error, match=words):
        token_file(**changes)


def rewritten(path, **changes):
    """The npz with some members replaced, or left out where the value is None."""
    with np.load(path) as file:
        members = dict(file) | {name: np.array(value) for name, value in changes.items()}
    np.savez(path, **{name: v for name, v in members.items() if v.dtype != object})
    return path


def test_files_that_are_not_token_files(tmp_path):
    def load(path, words, error=ValueError):
        with pytest.raises(error) as caught:
            TokenFile.load(path)
        assert words in str(caught.value) and str(path) in str(caught.value)
        assert "\n" not in str(caught.value) and "pickle" not in str(caught.value)

    load(tmp_path / "absent.npz", "no such file", FileNotFoundError)
    load(tmp_path / "tokens.pt", "got suffix '.pt', allowed are .npz and .safetensors")
    for suffix in SUFFIXES:
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(b"no tokens\nat all" * 9)
        load(path, "not a token file")
        whole = tmp_path / f"whole{suffix}"
        token_file().save(whole)
        path.write_bytes(whole.read_bytes()[:-40])
        load(path, "not a token file")
    path = tmp_path / "other.npz"
    np.savez(path, a=np.zeros(3))
    load(path, "its format is not titok_fast.tokens")
    path = tmp_path / "other.safetensors"
    save_file({"a": np.zeros(3)}, path)
    load(path, "not a token file")
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    path = tmp_path / "single.npz"
    path.write_bytes(array.getvalue())
    load(path, "it is not an archive of arrays")


def test_files_of_another_version_or_with_wrong_contents(tmp_path):
    path = tmp_path / "t.npz"
    for changes, words in [
        ({"version": "2"}, "got format version 2, allowed is 1"),
        ({"model": None}, "it lacks 'model'"),
        ({"tokens": None}, "it lacks 'tokens'"),
        ({"codebook_size": "200"}, "tokens: got 0 to 255, allowed is 0 to 199"),
        ({"image_ids": ["one"]}, "image_ids: got 1"),
    ]:
        token_file().save(path)
        with pytest.raises(ValueError, match=words):
            TokenFile.load(rewritten(path, **changes))


def member(contents, compression=zipfile.ZIP_STORED, **changes):
    """A zip of tokens.npy alone, whose directory has these changes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("tokens.npy", contents)
        for name, value in changes.items():
            setattr(archive.infolist()[0], name, value)
    return file.getvalue()


def test_damaged_members(tmp_path):
    huge = io.BytesIO()
    header = {"descr": "<u2", "fortran_order": False, "shape": (10**12, 16)}
    np.lib.format.write_array_header_1_0(huge, header)
    noise = np.random.default_rng(0).bytes(2000)
    files = {
        "huge": member(huge.getvalue()),
        "no array": member(b"no magic"),
        "method": member(b"x" * 50, compress_type=97),
    }
    for name, kind in (("lzma", zipfile.ZIP_LZMA), ("bz2", zipfile.ZIP_BZIP2)):
        whole = bytearray(member(noise, kind))
        whole[200:1000] = bytes(800)
        files[name] = bytes(whole)
    whole = bytearray(member(noise * 3, zipfile.ZIP_DEFLATED))
    whole[60:1000] = b"\xff" * 940
    files["deflate"] = bytes(whole)
    for name, contents in files.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(contents)
        with pytest.raises(ValueError, match="not a token file") as caught:
            TokenFile.load(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value), name


@pytest.mark.parametrize(
    "ids", [np.arange(3), np.array([b"a", b"b", b"c"]), np.array([["a"], ["b"], ["c"]])]
)
def test_names_are_strings(tmp_path, ids):
    path = tmp_path / "t.npz"
    token_file().save(path)
    with pytest.raises(
        ValueError, match=r"t\.npz: image_ids: got \w+, allowed is a sequence of str"
    ):
        TokenFile.load(rewritten(path, image_ids=ids))


def test_pickles_are_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    path = tmp_path / "t.npz"
    np.savez(path, tokens=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="not a token file"):
        TokenFile.load(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="not a token file"):
        TokenFile.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    token_file().save(tmp_path / "t.npz")
    before = (tmp_path / "t.npz").read_bytes()

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        token_file(model="other").save(tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize("name", ["t.npz", "t.safetensors", "t.png"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, name):
    path, before = tmp_path / name, resource.getrlimit(resource.RLIMIT_FSIZE)
    pixels = torch.rand(3, 64, 64)
    write = partial(write_png, pixels=pixels) if name == "t.png" else token_file().save
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large") as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_is_that_of_the_encoder():
    model = TiTok.from_config("titok-digits")
    name = fingerprint(model)
    assert len(name) == 16 and fingerprint(model) == name
    with torch.no_grad():
        model.decoder.mask_token.add_(1)
    assert fingerprint(model) == name
    for parameter in (model.latent_tokens, model.quantize.embedding.weight):
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-6
        assert fingerprint(model) != name
        name = fingerprint(model)


def test_the_fingerprint_of_a_release_stays():
    """Token files name it: with other digits, those of old versions could not be decoded."""
    assert fingerprint(TiTok.from_pretrained("titok-digits")) == "99c7770553b25b57"


def test_the_fingerprint_of_ibq_is_that_of_its_encoder():
    model = IBQTokenizer.from_config(manifest("ibq_tokenizer_tiny")["config"])
    name = fingerprint(model)
    with torch.no_grad():
        model.decoder.conv_in.bias.add_(1)
        model.post_quant_conv.bias.add_(1)
    assert fingerprint(model) == name
    for part in (model.encoder.conv_in, model.quant_conv, model.quantize.embedding):
        with torch.no_grad():
            part.weight.view(-1)[-1] += 1
        assert fingerprint(model) != name
        name = fingerprint(model)


def test_files_of_one_kind_are_one():
    first = token_file()
    second = replace(first, class_names=first.class_names and tuple(first.class_names))
    both = concatenated([first, second])
    assert np.array_equal(both.tokens, np.concatenate([first.tokens, second.tokens]))
    assert both.image_ids == [*first.image_ids, *second.image_ids]
    with pytest.raises(ValueError, match="files: got none, at least one is needed"):
        concatenated([])
    with pytest.raises(ValueError, match=r"files\[1\] has another image_size than files\[0\]"):
        concatenated([first, replace(first, image_size=first.image_size + 1)])
