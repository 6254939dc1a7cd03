"""The titok-fast command, run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COMMAND = Path(sys.executable).with_name("titok-fast")


def titok_fast(*arguments, cwd=None):
    environment = os.environ | {"COLUMNS": "500", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    y, x = np.mgrid[0:40, 0:50]
    for i in range(3):
        wave = (127 + 120 * np.sin((x + i * y) / 7)).astype(np.uint8)
        Image.fromarray(wave).save(folder / f"wave{i}.png")
    return folder


def test_info_names_versions_and_what_is_missing():
    result = titok_fast("info")
    assert result.returncode == 0, result.stderr
    lines = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    assert set(lines) >= {"torch", "CPU instruction set", "Triton kernels", "CUDA device"}
    import torch

    from titok_fast.ops import inspect

    assert torch.__version__ in lines["torch"]
    assert inspect.extension().active_isa() in lines["CPU instruction set"]
    if not torch.cuda.is_available():
        assert "unavailable: torch" in lines["CUDA device"]


def test_reconstruct(pictures, tmp_path):
    files = sorted(pictures.iterdir())
    result = titok_fast("reconstruct", *files, "--model", "titok-digits", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f.name for f in files]
    for file in files:
        with Image.open(tmp_path / "out" / file.name) as picture:
            assert picture.size == (2 * 32 + 2, 32)
        assert f"{file}" in result.stdout
    assert "3 images to" in result.stdout and "mean PSNR" in result.stdout


def test_reconstruct_skips_and_counts_a_broken_image(pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"\x89PNG")
    result = titok_fast(
        "reconstruct",
        *sorted(pictures.iterdir()),
        "--model",
        "titok-digits",
        "-o",
        tmp_path / "out",
    )
    assert result.returncode == 3
    assert "broken.png: not a readable image" in result.stderr
    assert "1 of 4 images skipped" in result.stderr
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_equal_stems_do_not_overwrite_each_other(pictures, tmp_path):
    other = pictures / "other"
    other.mkdir()
    (other / "wave0.png").write_bytes((pictures / "wave0.png").read_bytes())
    result = titok_fast(
        "reconstruct", pictures / "wave0.png", other / "wave0.png",
        "--model", "titok-digits", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["wave0-2.png", "wave0.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "titok-xxl"], "titok-xxl"),
        (["--model", "titok-digits", "--dtype", "int8"], "--dtype: 'int8' is not one of float32"),
        (
            ["--model", "titok-digits", "--device", "tpu9"],
            "--device: 'tpu9' is not auto, cpu, cuda",
        ),
        (["--model", "titok-digits", "--revision", "v2"], "revision: 'v2'"),
    ],
)
def test_errors_are_one_line(pictures, tmp_path, options, words):
    result = titok_fast("reconstruct", pictures / "wave0.png", "-o", tmp_path / "out", *options)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
