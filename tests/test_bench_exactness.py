"""bench.exactness finds what is wrong, and only that."""

import pytest
import torch

from bench import exactness
from titok_fast import nearest_code
from titok_fast.testing import rows_and_codes


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_check(metric):
    z, codebook = rows_and_codes(100, 300, 7)
    codebook[200] = codebook[10]
    z[5] = codebook[10]
    indices = nearest_code(z, codebook, metric=metric, backend="reference")
    tied = indices == 10
    wrong, undecided, gaps = exactness.check(z, codebook, metric, indices)
    assert not wrong.any() and torch.equal(undecided, tied) and torch.equal(gaps < 1e-13, tied)
    indices[tied] = 200
    indices[7] += 1
    wrong, _, _ = exactness.check(z, codebook, metric, indices)
    assert wrong.sum() == tied.sum() + 1 and wrong[7] and wrong[5]


def test_counts_add_up_and_are_drawn():
    found = exactness.run(300, 7, "l2", 1000, seed=0, backend="cpu", device="cpu")
    assert found["wrong"] == 0
    assert sum(found["rescored_rows"].values()) == sum(found["gap_rows"]) == 1000
    picture = exactness.draw([found, found])
    assert picture.width > picture.height and len(picture.getcolors(1 << 16)) > 4
