"""Structural similarity against values that can be worked out by hand."""

import math

import pytest
import torch

from titok_fast.metrics import ssim


def test_equal_images():
    a = torch.rand(3, 3, 17, 29)
    assert ssim(a, a).tolist() == [1.0] * 3
    assert ssim(a[:0], a[:0]).shape == (0,)


def test_constant_images_compare_by_luminance_alone():
    a = torch.full((1, 2, 16, 12), 0.2, dtype=torch.float64)
    b = torch.full((1, 2, 16, 12), 0.7, dtype=torch.float64)
    expected = (2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-12)


def test_one_window_is_the_formula():
    """On 11 x 11 pixels there is one window: weighted moments, written out."""
    a, b = torch.rand(2, 1, 1, 11, 11, dtype=torch.float64)
    weight = [math.exp(-(i**2 + j**2) / 4.5) for i in range(-5, 6) for j in range(-5, 6)]
    w = torch.tensor(weight, dtype=torch.float64) / sum(weight)
    x, y = a.flatten(), b.flatten()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
    cov = (w * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    expected /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    assert ssim(a, b).item() == pytest.approx(expected.item(), abs=1e-12)


def test_channels_and_images_do_not_mix():
    a, b = torch.rand(2, 2, 3, 20, 15)
    each = torch.stack([ssim(a[:, i : i + 1], b[:, i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ssim(a, b), each.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(ssim(a, b), ssim(b, a), rtol=0, atol=1e-12)


def test_against_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = torch.rand(2, 1, 3, 24, 31)
    ours = ssim(a, b).item()
    padded = metrics.structural_similarity(
        a[0].numpy(), b[0].numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=1.0,
    )  # fmt: skip
    assert ours == pytest.approx(padded, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        (torch.rand(1, 3, 10, 20), torch.rand(1, 3, 10, 20), ValueError, "at least 11"),
        (torch.rand(1, 20, 20), torch.rand(1, 20, 20), ValueError, r"\[B, C, H, W\]"),
        (torch.rand(1, 1, 20, 20), torch.rand(1, 1, 20, 21), ValueError, "b: got shape"),
        (torch.zeros(1, 1, 20, 20).int(), torch.rand(1, 1, 20, 20), TypeError, "a: got dtype"),
    ],
)
def test_bad_input(a, b, error, words):
    with pytest.raises(error, match=words):
        ssim(a, b)
