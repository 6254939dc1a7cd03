"""decode_attention against float64: no worse than the eager arithmetic of the same dtype."""

import itertools

import pytest
import torch

from tests.gradients import assert_refused
from tests.kernels import assert_kernels_compile
from titok_fast import decode_attention
from titok_fast.testing import relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("qkv", "keys", "values", "rotation")
HEADS = [
    *itertools.product((2, 6, 48, 64, 80, 128, 256), (1, 3)),
    (6, 2),
    (64, 7),
    (80, 2),
    (128, 7),
]
FEW_HEADS = [(2, 1, 150), (6, 7, 18), (64, 1, 70), (80, 2, 1), (256, 3, 5)]
ROUNDING = 2 * torch.finfo(torch.float32).eps  # of sums in another order
FLOAT32 = 1e-6  # of scores up to some 10, which round by half an eps of their size


def inputs(batch, kv_heads, group, length, width, dtype=torch.float32, device="cpu", scale=1.0):
    """A new token and a full cache; rotations are of random angles."""
    qkv = scale * torch.randn(batch, (group + 2) * kv_heads * width)
    keys, values = torch.randn(2, batch, kv_heads, length, width)
    angles = 6.3 * torch.rand(length, width // 2)
    rotation = torch.stack([angles.cos(), angles.sin()], -1)
    tensors = [qkv.to(dtype), (scale * keys).to(dtype), values.to(dtype), rotation]
    return [tensor.to(device) for tensor in tensors]


def run(tensors, position, **options):
    """The output, and what the cache holds then; the arguments stay as they are."""
    qkv, keys, values, rotation = tensors
    keys, values = keys.clone(), values.clone()
    return decode_attention(qkv, keys, values, rotation, position, **options), keys, values


def double(tensors):
    return [*(tensor.double() for tensor in tensors[:3]), tensors[3]]


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def forget(tensors, first):
    """The same with NaN in the cache from position `first` on."""
    qkv, *caches, rotation = tensors
    caches = [cache.clone() for cache in caches]
    for cache in caches:
        cache[:, :, first:] = torch.nan
    return [qkv, *caches, rotation]


def assert_accurate(tensors, position, *, backend):
    """As near to float64 as the reference is in the same dtype, and the cache changed in one row.

    In it is NaN at the position and after.
    """
    qkv, keys, values, _ = tensors = forget(tensors, position)
    out, new_keys, new_values = run(tensors, position, backend=backend)
    plain, *_ = run(tensors, position, backend="reference")
    truth, true_keys, true_values = run(double(tensors), position, backend="reference")
    assert out.dtype == qkv.dtype and out.shape == truth.shape and out.is_contiguous()
    allowed = 1.05 * relative_error(plain, truth) + ROUNDING
    if qkv.dtype == torch.float32:
        allowed = FLOAT32
    error = relative_error(out, truth)
    assert error <= allowed, f"{list(keys.shape)} {position}: {error:.3e}, allowed {allowed:.3e}"

    other = torch.arange(keys.shape[2], device=keys.device) != position
    for new, old in ((new_keys, keys), (new_values, values)):
        assert torch.equal(bits(new[:, :, other]), bits(old[:, :, other]))
    assert torch.equal(new_values[:, :, position], true_values[:, :, position].to(values.dtype))
    key, true_key = new_keys[:, :, position].double(), true_keys[:, :, position]
    size = true_key.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    half = torch.finfo(keys.dtype).eps / 2
    assert bool(((key - true_key).abs() <= half * true_key.abs() + 2e-7 * size).all())
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_groups_and_positions(backend, device, dtype):
    heads = FEW_HEADS if backend == "triton" else [(*case, 37) for case in HEADS]
    for width, group, length in heads:
        tensors = inputs(2, 2, group, length, width, dtype, device)
        for position in (length - 1, length // 2, 0):
            assert_accurate(tensors, position, backend=backend)


def test_long_sequences(backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(1, 1, 2, 1025, 64, dtype, device)
        assert_accurate(tensors, 1024, backend=backend)


def test_one_token_after_another(backend, device):
    """The cache that it fills is that of attention."""
    qkv, keys, values, rotation = inputs(2, 1, 3, 6, 8, device=device)
    tokens = torch.randn(6, *qkv.shape, device=device)
    _, keys, values, _ = forget([qkv, keys, values, rotation], 0)
    outs = [
        decode_attention(token, keys, values, rotation, i, backend=backend)
        for i, token in enumerate(tokens)
    ]
    q, k, v = tokens.double().unflatten(-1, (5, 8)).permute(1, 2, 0, 3).split([3, 1, 1], dim=1)
    turn = torch.view_as_complex(rotation.double())
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * turn)
        for x in (q, k)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.flatten(-2), k.flatten(-2).expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1), is_causal=True
    )
    actual = torch.stack(outs).unflatten(-1, (3, 8)).permute(1, 2, 0, 3)
    assert relative_error(actual, expected) < FLOAT32


def test_reference_is_softmax_attention():
    tensors = forget(double(inputs(2, 2, 3, 7, 8)), 5)
    qkv, keys, values, rotation = tensors
    out, _, _ = run(tensors, 4, backend="reference")
    heads = qkv.unflatten(1, (10, 8))
    cosine, sine = rotation[4].double().unbind(-1)
    turned = torch.stack(
        [
            heads[..., ::2] * cosine - heads[..., 1::2] * sine,
            heads[..., 1::2] * cosine + heads[..., ::2] * sine,
        ],
        -1,
    ).flatten(-2)
    for b, h in itertools.product(range(2), range(6)):
        k = torch.cat([keys[b, h // 3, :4], turned[b, 6 + h // 3][None]])
        v = torch.cat([values[b, h // 3, :4], heads[b, 8 + h // 3][None]])
        weight = (k @ turned[b, h] / 8**0.5).exp()
        expected = weight @ v / weight.sum()
        assert relative_error(out[b, 8 * h : 8 * h + 8], expected) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_takes_the_rotated_key_rounded(backend, device, dtype):
    """In whole numbers and halves no sum rounds, and 257 / 256 and 2049 / 2048 lie halfway."""
    qkv, keys, values, rotation = inputs(3, 2, 2, 5, 16, dtype, device)
    qkv = torch.randint(-60, 61, qkv.shape).to(qkv)
    rotation = (torch.randint(-4, 5, rotation.shape) / 2).to(device)
    rotation[3, 0] = torch.tensor([1.0, torch.finfo(dtype).eps / 2])
    qkv[:, 64:66] = torch.tensor([1.0, 1.0]).to(qkv)  # the first key's first pair
    out, new_keys, new_values = run([qkv, keys, values, rotation], 3, backend=backend)
    heads = qkv.double().unflatten(1, (8, 8, 2))
    turn = torch.view_as_complex(rotation[3].double())
    turned = torch.view_as_real(torch.view_as_complex(heads) * turn).flatten(-2)[:, 4:6]
    assert torch.equal(new_keys[:, :, 3], turned.to(dtype))
    assert new_keys[0, 0, 3, 1] == 1.0
    assert torch.equal(new_values[:, :, 3], heads.flatten(-2)[:, 6:].to(dtype))
    assert bool(out.isfinite().all())


def test_what_comes_after_the_position_has_no_influence(backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(1, 2, 2, 21, 48, dtype, device)
        for position in (0, 7, 19) if backend != "triton" else (7,):
            expected, *_ = run(tensors, position, backend=backend)
            for value in (torch.nan, torch.inf, 1e4):
                for first in (position, position + 1):
                    other = [tensor.clone() for tensor in tensors]
                    for cache in other[1:3]:
                        cache[:, :, first:] = value
                    out, *_ = run(other, position, backend=backend)
                    assert torch.equal(out, expected), (position, value, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(backend, device, dtype):
    tensors = inputs(2, 1, 3, 40, 16, dtype, device, scale=1e4)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    out, *_ = run(tensors, 39, backend=backend)
    truth, *_ = run(double(tensors), 39, backend="reference")
    assert relative_error(out, truth) < 0.01  # that of the largest score
    tensors[0].zero_()
    mean = torch.cat([tensors[2][:, :, :39], tensors[2].new_zeros(2, 1, 1, 16)], 2).double().mean(2)
    out, *_ = run(tensors, 39, backend=backend)
    error = relative_error(out.unflatten(1, (3, 16)), mean.expand(2, 3, 16))
    assert error < torch.finfo(dtype).eps


def test_infinite_and_nan_scores_are_those_of_the_reference(backend, device):
    clean = inputs(3, 2, 2, 9, 8, device=device)
    expected, *_ = run(clean, 6, backend=backend)
    expected = expected.unflatten(1, (2, 2, 8))
    changes = [
        (0, 1, 0, slice(None)),  # a channel of a query
        (0, 1, 4 * 8, slice(None)),  # of the new key
        (0, 1, 6 * 8, 0),  # of the new value
        (1, 1, 0, slice(None)),
        (2, 1, 0, 0),
    ]
    low_bits = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)  # a NaN too
    for which, batch, where, channels in changes:
        for value in (torch.nan, low_bits, torch.inf, -torch.inf):
            tensors = [tensor.clone() for tensor in clean]
            if which == 0:
                tensors[0][batch, where] = value
            else:
                tensors[which][batch, 0, 2, 0] = value
            out, *_ = run(tensors, 6, backend=backend)
            plain, *_ = run(tensors, 6, backend="reference")
            assert torch.equal(out.isnan(), plain.isnan()), (which, where, value)
            assert torch.equal(out.isinf(), plain.isinf()), (which, where, value)
            queries = slice(0, 1) if (which, where) == (0, 0) else slice(None)
            reached = torch.zeros_like(expected, dtype=torch.bool)
            reached[batch, 0, queries, channels] = True
            rest = out.unflatten(1, (2, 2, 8))
            assert torch.equal(rest[~reached], expected[~reached]), (which, where, value)
            assert value == value or bool(rest[reached].isnan().all())


def test_a_position_may_be_a_tensor(backend, device):
    tensors = inputs(2, 1, 2, 5, 8, device=device)
    for position in (0, 4):
        expected = run(tensors, position, backend=backend)
        for shape in ((), (1,), (1, 1)):
            tensor = torch.full(shape, position, device=device)
            for choice in (backend, "reference"):
                actual = run(tensors, tensor, backend=choice)
                assert actual[0].shape == (2, 16)
                if choice == backend:
                    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("position", [-1, 5, 2**40, -(2**40)])
def test_a_position_out_of_range_changes_nothing(backend, device, position):
    qkv, keys, values, rotation = inputs(2, 1, 2, 5, 8, device=device)
    before = keys.clone(), values.clone()
    positions = [position] + ([torch.tensor(position)] if device == "cpu" else [])
    for given in positions:
        for name in (backend, "reference"):
            with pytest.raises(ValueError) as raised:
                decode_attention(qkv, keys, values, rotation, given, backend=name)
            assert str(raised.value) == f"position: {position} is not in [0, 5)"
            assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_batch_and_from_run_to_run(backend, device, dtype):
    tensors = inputs(3, 2, 3, 20, 48, dtype, device)
    expected = run(tensors, 18, backend=backend)
    for rows in (slice(None), slice(0, 1), slice(1, 3), slice(2, 3)):
        part = [*(tensor[rows] for tensor in tensors[:3]), tensors[3]]
        for a, e in zip(run(part, 18, backend=backend), expected, strict=True):
            assert torch.equal(a, e[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(backend, dtype, set_threads):
    if backend == "triton":
        pytest.skip("is one of C++")
    tensors = inputs(3, 5, 2, 201, 64, dtype)  # enough for eleven threads
    set_threads(1)
    expected = run(tensors, 200, backend=backend)
    for count in (2, 3, 4, 16):
        set_threads(count)
        for a, e in zip(run(tensors, 200, backend=backend), expected, strict=True):
            assert torch.equal(a, e)


def test_strided_input(backend, device):
    tensors = inputs(3, 1, 2, 9, 6, device=device)
    expected = run(tensors, 7, backend=backend)

    def assert_same(i, view):
        assert torch.equal(view, tensors[i]) and not view.is_contiguous()
        changed = [*tensors[:i], view, *tensors[i + 1 :]]
        for a, e in zip(run(changed, 7, backend=backend), expected, strict=True):
            assert torch.equal(a, e)

    qkv, _, _, rotation = tensors
    wide = torch.full((7, 31), torch.nan, device=device)
    wide[1::2, 5:29] = qkv
    assert_same(0, wide[1::2, 5:29])
    assert_same(0, qkv.T.contiguous().T)
    wide = torch.full((9, 4, 3), torch.nan, device=device)
    wide[:, 1:, 1:] = rotation
    assert_same(3, wide[:, 1:, 1:])
    one = qkv[:1].expand(3, -1)  # with a stride of zero
    expected = run([one.contiguous(), *tensors[1:]], 7, backend=backend)
    tensors[0] = one.contiguous()
    assert_same(0, one)


def test_rows_beyond_2_to_the_31_elements(backend, device):
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 30 GB")
    width, length = 256, 2**22 + 1
    small = inputs(3, 1, 1, 5, width, torch.bfloat16, device)
    expected, small_keys, small_values = run(small, 4, backend=backend)
    empty = torch.Tensor.new_empty  # touched only where written
    stride = 2**30 + 8
    qkv = empty(small[0], 2 * stride + 3 * width).as_strided(small[0].shape, (stride, 1))
    qkv.copy_(small[0])
    keys, values = (empty(small[1], 3, 1, length, width) for _ in range(2))
    rotation = empty(small[3], length, width // 2, 2)
    for far, near in ((keys, small[1]), (values, small[2])):
        far[:, :, :5] = near
    rotation[:5] = small[3]
    assert keys[2].data_ptr() - keys.data_ptr() > 2**32
    out = decode_attention(qkv, keys, values, rotation, 4, backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(keys[:, :, :5], small_keys) and torch.equal(values[:, :, :5], small_values)


def test_empty_batch(backend, device):
    tensors = inputs(0, 2, 3, 5, 8, device=device)
    for choice in (backend, "reference"):
        out, keys, _ = run(tensors, 2, backend=choice)
        assert out.shape == (0, 48) and keys.shape == (0, 2, 5, 8)


def test_meta_tensors_give_shapes():
    tensors = [tensor.to("meta") for tensor in inputs(2, 2, 3, 5, 8, torch.half)]
    for position in (3, torch.empty(1, device="meta").long()):
        out, *_ = run(tensors, position)
        assert out.is_meta and out.shape == (2, 48) and out.dtype == torch.half


def test_opcheck():
    arguments = (*inputs(2, 2, 2, 5, 8), torch.tensor([3]), "cpu")
    torch.library.opcheck(torch.ops.titok_fast.decode_attention.default, arguments)


@pytest.mark.parametrize(("dynamic", "as_tensor"), [(False, True), (True, False)])
def test_compiles_whole(dynamic, as_tensor):
    def f(qkv, keys, values, rotation, position):
        out = decode_attention(qkv * 2, keys, values, rotation, position)
        return out + 1, keys.sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        tensors = inputs(batch, 2, 2, 5, 8)
        results = []
        for function in (compiled, f):
            qkv, keys, values, rotation = (tensor.clone() for tensor in tensors)
            for i in (3, 4):
                position = torch.tensor([i]) if as_tensor else i
                results.append([*function(qkv, keys, values, rotation, position), keys, values])
        for a, b in zip(results[1], results[3], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(results[0][:2], results[2][:2], strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(results[1][2], tensors[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_refused(name):
    def output(tensors, **options):
        return run(tensors.values(), 3, **options)[0]

    assert_refused(output, dict(zip(NAMES, inputs(2, 1, 2, 5, 8), strict=True)), name)


def test_reference_has_gradients():
    tensors = double(inputs(1, 2, 2, 3, 2))

    def f(qkv, keys, values):
        out, *caches = run([qkv, keys, values, tensors[3]], 1, backend="reference")
        return out, *caches

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors[:3]))


def cache(*shape, **options):
    return torch.zeros(*shape, **options)


BAD = [
    ({"qkv": [1.0]}, TypeError, "qkv: expected a Tensor, got list"),
    ({"qkv": torch.zeros(2, 48).to_sparse()}, TypeError, "qkv: layout torch.sparse_coo is not tor"),
    ({"keys": None}, TypeError, "keys: expected a Tensor, got NoneType"),
    ({"values": 1.0}, TypeError, "values: expected a Tensor, got float"),
    ({"rotation": None}, TypeError, "rotation: expected a Tensor, got NoneType"),
    (
        {"qkv": cache(2, 48).double()},
        TypeError,
        "qkv: dtype torch.float64 is not float32, float16 or bfloat16",
    ),
    ({"keys": cache(2, 5, 8)}, ValueError, "keys: expected [B, Hkv, S, Dh], got shape [2, 5, 8]"),
    ({"keys": cache(2, 0, 5, 8)}, ValueError, "keys: expected [B, Hkv, S, Dh], got shape [2, 0,"),
    ({"keys": cache(2, 1, 0, 8)}, ValueError, "keys: expected [B, Hkv, S, Dh], got shape [2, 1, 0"),
    ({"keys": cache(2, 1, 5, 7)}, ValueError, "keys: Dh must be even and up to 256, got 7"),
    ({"keys": cache(2, 1, 5, 258)}, ValueError, "keys: Dh must be even and up to 256, got 258"),
    ({"keys": cache(2, 1, 5, 8).half()}, TypeError, "keys: dtype torch.float16 is not float32"),
    ({"keys": cache(2, 1, 5, 8, device="meta")}, ValueError, "keys: on meta, but qkv is on cpu"),
    (
        {"keys": cache(2, 1, 8, 5).mT},
        ValueError,
        "keys: not contiguous, its strides are [40, 40, 1, 5]",
    ),
    (
        {"values": cache(2, 1, 6, 8)[:, :, :5]},
        ValueError,
        "values: not contiguous, its strides are [48, 48, 8, 1]",
    ),
    ({"values": cache(2, 1, 4, 8)}, ValueError, "values: expected shape [2, 1, 5, 8], got [2, 1, "),
    ({"values": cache(2, 1, 5, 8).half()}, TypeError, "values: dtype torch.float16 is not float32"),
    (
        {"values": cache(2, 1, 5, 8, device="meta")},
        ValueError,
        "values: on meta, but qkv is on cpu",
    ),
    *[
        (
            {"qkv": cache(*shape)},
            ValueError,
            "qkv: expected [2, (H + 2) * 8] with H a multiple of 1, got shape " + str(list(shape)),
        )
        for shape in ((48,), (2, 16), (2, 41), (3, 48), (2, 3, 16))
    ],
    (
        {"qkv": cache(2, 56), "keys": cache(2, 2, 5, 8), "values": cache(2, 2, 5, 8)},
        ValueError,
        "qkv: expected [2, (H + 4) * 8] with H a multiple of 2, got shape [2, 56]",
    ),
    ({"rotation": cache(5, 8)}, ValueError, "rotation: expected shape [5, 4, 2], got [5, 8]"),
    ({"rotation": cache(6, 4, 2)}, ValueError, "rotation: expected shape [5, 4, 2], got [6, 4, 2]"),
    (
        {"rotation": cache(5, 4, 2).half()},
        TypeError,
        "rotation: dtype torch.float16 is not float32",
    ),
    (
        {"rotation": cache(5, 4, 2, device="meta")},
        ValueError,
        "rotation: on meta, but qkv is on cpu",
    ),
    ({"position": 1.0}, TypeError, "position: expected an int or a Tensor, got float"),
    ({"position": None}, TypeError, "position: expected an int or a Tensor, got NoneType"),
    ({"position": 5}, ValueError, "position: 5 is not in [0, 5)"),
    (
        {"position": torch.tensor(1.0)},
        TypeError,
        "position: dtype torch.float32 is not int64",
    ),
    (
        {"position": torch.tensor([1, 2])},
        ValueError,
        "position: expected one int64, got shape [2]",
    ),
    (
        {"position": torch.tensor(1, device="meta")},
        ValueError,
        "position: on meta, but qkv is on cpu",
    ),
    ({"backend": "cuda"}, ValueError, "backend: 'cuda' is not one of 'auto', 'cpu', 'triton', 're"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    arguments = {
        "qkv": torch.zeros(2, 48),
        "keys": cache(2, 1, 5, 8),
        "values": cache(2, 1, 5, 8),
        "rotation": torch.zeros(5, 4, 2),
        "position": 3,
    } | change
    with pytest.raises(error) as raised:
        decode_attention(**arguments)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
def test_gpu_clamps_a_position():
    tensors = inputs(2, 2, 2, 9, 64, torch.bfloat16, "cuda")
    for given, taken in ((-3, 0), (9, 8), (2**40, 8)):
        actual = run(tensors, torch.tensor(given, device="cuda"))
        for a, e in zip(actual, run(tensors, taken), strict=True):
            assert torch.equal(a, e)


@pytest.mark.gpu
def test_gpu_graph_capture_takes_another_position():
    qkv, keys, values, rotation = inputs(2, 2, 2, 9, 64, torch.bfloat16, "cuda")
    position = torch.tensor([0], device="cuda")
    decode_attention(qkv, keys, values, rotation, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(qkv, keys, values, rotation, position)
    for i in (3, 8):
        position.fill_(i)
        expected = run([qkv, keys, values, rotation], i)
        graph.replay()
        for a, e in zip((out, keys, values), expected, strict=True):
            assert torch.equal(a, e)


def test_kernels_compile_for_every_architecture():
    assert_kernels_compile("decode_attention", set())
