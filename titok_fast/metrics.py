"""How well images survive the tokens, and how evenly tokens use their codebook."""

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, -10 log10 of its mean squared error.

    Args:
        a: images [B, ...] in [0, 1], floating.
        b: images of the same shape, in [0, 1], floating.

    Returns:
        [B] float64, in dB; inf where both images are equal.

    Raises:
        TypeError: when one of them is not a floating tensor.
        ValueError: when the shapes differ, or there is no pixel to compare.
    """
    _check_pair(a, b)
    squared = (a.double() - b.double()).square()  # [B, ...]
    return -10 * squared.flatten(1).mean(1).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image, the mean over its channels and 11 x 11 windows.

    Windows lie inside the image and weigh their pixels by a Gaussian with sigma 1.5; K1 = 0.01,
    K2 = 0.03, and the range of the pixels is 1.

    Args:
        a: images [B, C, H, W] in [0, 1], floating, H and W at least 11.
        b: images of the same shape, in [0, 1], floating.

    Returns:
        [B] float64, at most 1; exactly 1 where both images are equal.

    Raises:
        TypeError: when one of them is not a floating tensor.
        ValueError: when the shapes differ, or the images are too small.

    Source: Z. Wang, A. C. Bovik, H. R. Sheikh and E. P. Simoncelli, Image quality assessment: from
    error visibility to structural similarity, IEEE Transactions on Image Processing 13(4), 2004,
    equation 13.
    """
    _check_pair(a, b)
    if a.ndim != 4 or min(a.shape[1], a.shape[2] - 10, a.shape[3] - 10) < 1:
        raise ValueError(
            f"a: got shape {list(a.shape)}, allowed is [B, C, H, W], H and W at least 11"
        )
    a, b = a.double(), b.double()
    rows = _windows(a.shape[2]).to(a.device)  # [H - 10, H]
    columns = _windows(a.shape[3]).to(a.device)  # [W - 10, W]

    def mean(x: Tensor) -> Tensor:
        return rows @ x @ columns.mT  # [B, C, H - 10, W - 10]

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a * mean_a, mean(b * b) - mean_b * mean_b
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def _windows(size: int) -> Tensor:
    """The Gaussian of each window of 11 as rows of a matrix, [size - 10, size] float64."""
    offset = torch.arange(size) - torch.arange(size - 10)[:, None] - 5  # [size - 10, size]
    weights = torch.exp(-offset.double().square() / (2 * 1.5**2)) * (offset.abs() <= 5)
    return weights / weights.sum(1, keepdim=True)


def _check_pair(a: Tensor, b: Tensor) -> None:
    """Raises unless a and b are batches of images that can be compared."""
    for name, images in (("a", a), ("b", b)):
        if not images.is_floating_point():
            raise TypeError(f"{name}: got dtype {images.dtype}, allowed is a floating dtype")
    if a.shape != b.shape:
        raise ValueError(f"b: got shape {list(b.shape)}, allowed is that of a, {list(a.shape)}")
    if a.ndim < 2 or a[:1].numel() == 0 < len(a):
        raise ValueError(f"a: got shape {list(a.shape)}, allowed is [B, ...] with pixels")


def codebook_usage(tokens: Tensor, codebook_size: int) -> float:
    """The fraction of codes that occur at least once.

    Args:
        tokens: [...] integers in [0, codebook_size), at least one.
        codebook_size: number of codes.

    Returns:
        A number in (0, 1].

    Raises:
        TypeError: when tokens is not an integer tensor.
        ValueError: when there are no tokens, or one is out of range.
    """
    return float((_counts(tokens, codebook_size) > 0).double().mean())


def perplexity(tokens: Tensor, codebook_size: int) -> float:
    """The exponential of the entropy of code frequencies: how many codes are in effective use.

    Args:
        tokens: [...] integers in [0, codebook_size), at least one.
        codebook_size: number of codes.

    Returns:
        A number in [1, codebook_size]; the largest when all codes are equally frequent.

    Raises:
        TypeError: when tokens is not an integer tensor.
        ValueError: when there are no tokens, or one is out of range.
    """
    counts = _counts(tokens, codebook_size)
    entropy = torch.special.entr(counts.double() / counts.sum()).sum()
    return float(entropy.exp())


def _counts(tokens: Tensor, codebook_size: int) -> Tensor:
    """Occurrences of each code, [K] int64."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise TypeError(f"tokens: got dtype {tokens.dtype}, allowed is an integer dtype")
    if tokens.numel() == 0:
        raise ValueError(f"tokens: got shape {list(tokens.shape)}, allowed is at least one token")
    tokens = tokens.to(torch.int64)  # PyTorch has little for unsigned ones
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"tokens: got {low} to {high}, allowed is 0 to {codebook_size - 1}")
    return torch.bincount(tokens.flatten(), minlength=codebook_size)
