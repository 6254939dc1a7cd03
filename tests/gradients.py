"""What the tests of ops without a gradient share."""

import pytest
import torch
from torch.autograd import forward_ad


def assert_refused(run, arguments, name):
    """`run(arguments, backend=...)` raises where the tensor of this name asks for a gradient."""
    refused = rf"^{name}: has no gradient here; call it under torch\.no_grad.*reference[^\n]*$"
    expected, plain = run(arguments), arguments[name]
    asking = arguments | {name: plain.clone().requires_grad_()}
    for backend in ("auto", "cpu", "triton"):
        with pytest.raises(RuntimeError, match=refused):
            run(asking, backend=backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(run(asking), expected)
    with forward_ad.dual_level():
        dual = arguments | {name: forward_ad.make_dual(plain, plain)}
        with pytest.raises(RuntimeError, match=refused):
            run(dual, backend="cpu")
