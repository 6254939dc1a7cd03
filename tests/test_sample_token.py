"""sample_token against its reference, to the bit, and against the official arithmetic."""

import math

import numpy as np
import pytest
import torch

from tests import drawing
from tests.drawing import DTYPES, chi_square, many_draws
from titok_fast import sample_token
from titok_fast.ops import inspect
from titok_fast.ops.sample_token import BACKENDS
from titok_fast.reference._draw import sharpness, wide_weights
from titok_fast.reference.sample_token import top_p_weights

STEP = {"seed": 5, "step": 2}
EVERYTHING = STEP | {"guidance_scale": 2.5, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
FILTERS = [
    (0, 1.0),
    (0, 0.9),
    (0, 0.3),
    (7, 1.0),
    (7, 0.9),
    (7, 0.4),
    (1, 1.0),
    (0, 0.0),
    (30, 1e-3),
]

backend, device = drawing.backend, drawing.device


def inputs(batch, vocabulary, *, dtype=torch.float32, spread=3.0, device="cpu"):
    """Conditional and unconditional logits [B, V]."""
    return (spread * torch.randn(2, batch, vocabulary)).to(device, dtype)


def assert_exact(logits, *, backend, **options):
    """The same tokens as the reference's."""
    actual = sample_token(logits, backend=backend, **options)
    expected = sample_token(logits, backend="reference", **options)
    assert actual.dtype == expected.dtype == torch.int64
    assert actual.shape == expected.shape == logits.shape[:1]
    assert torch.equal(actual, expected), f"{options}: {actual} is not {expected}"
    return actual


def official_filter(logits, top_k, top_p):
    """The Boolean mask [B, V] that SEED-Voken's top-k and top-p leave, in the logits' dtype."""
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        values, order = logits.sort(descending=True)
        remove = values.softmax(-1).cumsum(-1) > top_p
        remove[:, 1:] = remove[:, :-1].clone()
        remove[:, 0] = False
        logits = logits.masked_fill(remove.scatter(1, order, remove), -math.inf)
    return logits > -math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_equals_reference(backend, device, top_k, top_p, guided, dtype):
    for vocabulary in (1, 2, 15, 16, 17, 255, 256, 257, 1000, 4096):
        cond, uncond = inputs(5, vocabulary, dtype=dtype, device=device)
        options = STEP | {"top_k": top_k, "top_p": top_p, "temperature": 0.8, "seed": vocabulary}
        if guided:
            options |= {"uncond_logits": uncond, "guidance_scale": 2.5}
        assert_exact(cond, backend=backend, **options)


@pytest.mark.parametrize("name", ["temperature", "guidance_scale"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-6, 0.3, 30.0, 1e6])
def test_equals_reference_at_any_setting(backend, device, name, value):
    cond, uncond = inputs(20, 300, device=device)
    for top_k, top_p in ((0, 1.0), (20, 0.9)):
        options = EVERYTHING | {name: value, "top_k": top_k, "top_p": top_p}
        assert_exact(cond, backend=backend, uncond_logits=uncond, **options)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 1.0, 20.0, 1e30])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.9), (2000, 1.0), (2000, 0.9)])
def test_equals_reference_at_262144(backend, device, top_k, top_p, spread):
    cond, uncond = inputs(3, 2**18, spread=spread, device=device)
    options = STEP | {"top_k": top_k, "top_p": top_p}
    assert_exact(cond, backend=backend, **options)
    assert_exact(
        cond.bfloat16(), backend=backend, uncond_logits=uncond.bfloat16(), guidance_scale=1.5,
        **options,
    )  # fmt: skip


@many_draws
def test_twenty_thousand_draws_equal_the_reference(backend, device):
    cond, uncond = inputs(20_000, 60, device=device)
    assert_exact(cond, backend=backend, uncond_logits=uncond, **EVERYTHING)


@many_draws
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_tokens_follow_the_official_distribution(backend, device, temperature, top_k, top_p):
    draws, scale = 100_000, 1.8
    cond, uncond = inputs(1, 30, spread=0.4)
    options = STEP | {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    tokens = sample_token(
        cond.to(device).expand(draws, -1),
        uncond_logits=uncond.to(device).expand(draws, -1),
        guidance_scale=scale,
        backend=backend,
        **options,
    )
    guided = (uncond.double() + scale * (cond.double() - uncond.double())) / temperature
    kept = official_filter(guided, top_k, top_p)[0]
    assert set(tokens.tolist()) == set(kept.nonzero().flatten().tolist())
    if int(kept.sum()) == 1:
        return
    names = kept.cumsum(0).to(device) - 1
    probability = guided[0, kept].softmax(0)
    assert abs(chi_square(names[tokens], probability)) < 4


@pytest.mark.parametrize("top_p", [0.0, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_top_p_keeps_the_mass_of_float64(spread, top_p):
    logits, _ = inputs(1, 2**18, spread=spread)
    weights = wide_weights(logits, logits.amax(-1, keepdim=True), sharpness(torch.tensor(1.0)))
    kept = top_p_weights(logits, weights, torch.tensor(top_p)) > 0
    expected = official_filter(logits.double(), 0, top_p)
    probability = logits.double().softmax(-1)
    assert float(probability[kept != expected].sum()) < 1e-6 + float(probability.max())
    before = float(probability[kept].sum() - probability[kept].min())
    assert before <= top_p + 1e-6
    assert float(probability[kept].sum()) >= min(top_p, 1 - 1e-6) - 1e-6


@pytest.mark.parametrize("vocabulary", [2**18, 2**20])
@pytest.mark.parametrize("tail", [None, 0.0, 10.0, 21.8, 25.0])
def test_weights_err_less_than_float32_probabilities_may(tail, vocabulary):
    """Total variation from float64; `tail`: one token, and all others so much below it."""
    logits, _ = inputs(1, vocabulary, spread=1.0)
    if tail is not None:
        logits = -tail + 0.1 * logits
        logits[:, 77] = 0.0
    weights = wide_weights(logits, logits.amax(-1, keepdim=True), sharpness(torch.tensor(1.0)))
    probability = weights.double() / weights.sum().double()
    distance = (probability - logits.double().softmax(-1)).abs().sum() / 2
    assert float(distance) < vocabulary * 2.0**-40 + 5e-7


def test_top_k_of_one_is_the_argmax(backend, device):
    cond, uncond = inputs(50, 700, device=device)
    guided = uncond + 3.0 * (cond - uncond)
    for options in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"temperature": 0.0}):
        tokens = sample_token(
            cond, uncond_logits=uncond, guidance_scale=3.0, backend=backend, **STEP | options
        )
        assert torch.equal(tokens, guided.argmax(-1))


def test_flushed_subnormals(flushed_subnormals):
    test_top_k_of_one_is_the_argmax("cpu", "cpu")


def test_numbers_of_numpy_are_numbers():
    cond = torch.randn(3, 50)
    plain = {"temperature": 0.5, "top_k": 5, "top_p": 0.75, "seed": 3, "step": 2}
    numbers = {
        "temperature": np.float32(0.5), "top_k": np.int32(5), "top_p": np.float64(0.75),
        "seed": np.uint64(3), "step": np.int64(2),
    }  # fmt: skip
    assert torch.equal(sample_token(cond, **numbers), sample_token(cond, **plain))
    with pytest.raises(TypeError, match="top_k: expected an int or a Tensor, got float"):
        sample_token(cond, **plain | {"top_k": np.float32(5)})


def test_auto_is_the_reference_on_a_gpu_without_cuda_ops(monkeypatch):
    choose = inspect.choose_or_reference
    monkeypatch.setattr(inspect, "why_not", lambda *_: None)
    assert choose("auto", "cuda", BACKENDS) == "cuda"
    missing = {"cuda": "this build has no CUDA C++ ops"}  # and Triton's are no help
    monkeypatch.setattr(inspect, "why_not", lambda backend, _: missing.get(backend))
    assert choose("auto", "cuda", BACKENDS) == "reference"
    assert choose("cuda", "cuda", BACKENDS) == "cuda"  # which then says what is missing
    monkeypatch.setattr(inspect, "_extension", lambda: missing["cuda"])  # a tree that was not built
    assert choose("auto", "cuda", BACKENDS) == "cuda"


def test_no_filter_is_a_wide_filter(backend, device):
    cond, _ = inputs(200, 90, device=device)
    expected = sample_token(cond, backend=backend, **STEP)
    assert len(expected.unique()) > 20
    for options in ({"top_k": 90}, {"top_k": 2**62}, {"top_p": 1.0}, {"top_p": 1 - 2**-24}):
        assert torch.equal(sample_token(cond, backend=backend, **STEP | options), expected)


def test_ties_stay_or_go_together(backend, device):
    logits = torch.full((200, 300), -5.0, device=device)
    logits[:, [3, 120, 299]] = 2.0
    logits[:, [7, 200]] = 1.0
    logits[::2, 200] = 1.0 - 2**-23
    for options, even, odd in (
        ({"top_k": 1}, {3, 120, 299}, {3, 120, 299}),
        ({"top_k": 3}, {3, 120, 299}, {3, 120, 299}),
        ({"top_k": 4}, {3, 120, 299, 7}, {3, 120, 299, 7, 200}),
        ({"top_p": 0.1}, {3, 120, 299}, {3, 120, 299}),
        ({"top_k": 5, "top_p": 0.85}, {3, 120, 299, 7}, {3, 120, 299, 7, 200}),
    ):
        tokens = assert_exact(logits, backend=backend, **STEP | options)
        assert set(tokens[::2].tolist()) == even
        assert set(tokens[1::2].tolist()) == odd
    equal = torch.tensor([-0.0, 0.0, -0.0, -1.0], device=device).expand(
        500, 4
    )  # one like the other
    assert set(assert_exact(equal, backend=backend, **STEP | {"top_k": 1}).tolist()) == {0, 1, 2}


def test_argmax_takes_the_lowest_of_equal_logits(backend, device):
    cond, _ = inputs(8, 1300, device=device)
    cond[:, 37] = cond[:, 900] = 99.0
    cond[:, 20] = math.nan
    tokens = assert_exact(cond, backend=backend, **STEP | {"temperature": 0.0})
    assert bool((tokens == 37).all())


def test_a_row_does_not_depend_on_its_batch(backend, device):
    cond, uncond = inputs(7, 100, device=device)
    image_ids = torch.tensor([11, 2**32 + 11, 0, 5, 2**40, -1, 6], device=device)

    def draw(rows, **options):
        return sample_token(
            cond[rows], uncond_logits=uncond[rows], image_ids=image_ids[rows], backend=backend,
            **EVERYTHING | options,
        )  # fmt: skip

    for filters in ({}, {"top_k": 0, "top_p": 1.0}):
        whole = draw(slice(None), **filters)
        for rows in ([3], [6, 0], [5, 4, 3, 2, 1]):
            assert torch.equal(draw(rows, **filters), whole[rows])
    same = cond[:1].expand(7, 100)
    tokens = torch.stack(
        [
            sample_token(same, image_ids=image_ids, backend=backend, seed=seed, step=0)
            for seed in range(50)
        ]
    )
    assert torch.equal(tokens[:, 0], tokens[:, 1])  # ids count modulo 2^32
    assert not torch.equal(tokens[:, 0], tokens[:, 2])
    counted = torch.stack([sample_token(same, backend=backend, seed=s, step=0) for s in range(50)])
    assert torch.equal(counted[:, [0, 5, 6]], tokens[:, [2, 3, 6]])


def test_seed_and_step_change_the_tokens(backend, device):
    cond, _ = inputs(60, 500, spread=1.0, device=device)
    draws = [
        sample_token(cond, backend=backend, **STEP | change)
        for change in ({}, {"seed": 6}, {"seed": 5 + 2**32}, {"step": 3})
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert float((a == b).double().mean()) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_numbers_may_be_tensors(backend, device, dtype):
    cond, uncond = inputs(9, 50, device=device)
    if dtype.is_floating_point:
        settings = {"guidance_scale": 2.0, "temperature": 0.5, "top_p": 0.75}
    else:
        settings = {"seed": 9, "step": 1, "top_k": 11}
    options = EVERYTHING | settings | {"uncond_logits": uncond}
    expected = sample_token(cond, backend=backend, **options)
    options |= {k: torch.tensor(v, dtype=dtype, device=device) for k, v in settings.items()}
    for choice in (backend, "reference"):
        assert torch.equal(sample_token(cond, backend=choice, **options), expected)


def test_guidance_scale_one_is_no_guidance(backend, device):
    cond, uncond = inputs(300, 50, device=device)
    expected = sample_token(cond, backend=backend, **STEP)
    for scale in (1.0, torch.tensor(1.0, device=device)):
        for choice in (backend, "reference"):
            tokens = sample_token(
                cond, uncond_logits=uncond * math.nan, guidance_scale=scale, backend=choice, **STEP
            )
            assert torch.equal(tokens, expected)


def test_infinite_logits(backend, device):
    cond, _ = inputs(400, 60, device=device)
    cond[:100, 1:] = -math.inf
    cond[100:200, ::2] = -math.inf
    cond[200:300, [7, 9]] = math.inf
    cond[300:] = -math.inf
    for top_k, top_p in FILTERS:
        tokens = assert_exact(cond, backend=backend, **STEP | {"top_k": top_k, "top_p": top_p})
        assert not bool(tokens[:100].any()) and not bool(tokens[300:].any())
        assert bool((tokens[100:200] % 2 == 1).all())
        assert set(tokens[200:300].tolist()) == {7, 9}


def test_nan_logits_are_never_drawn(backend, device):
    for temperature in (0.0, 1.0):
        for top_k, top_p in FILTERS:
            cond, uncond = inputs(90, 40, device=device)
            cond[:30], cond[30:60, ::3] = math.nan, math.nan
            uncond[60:, ::2] = math.nan
            tokens = assert_exact(
                cond, uncond_logits=uncond, guidance_scale=2.0, temperature=temperature,
                top_k=top_k, top_p=top_p, backend=backend, **STEP,
            )  # fmt: skip
            assert not bool(tokens[:30].any())
            assert bool((tokens[30:60] % 3 != 0).all())
            assert bool((tokens[60:] % 2 == 1).all())


def test_settings_in_tensors_never_lead_out_of_range(backend, device):
    cond, uncond = inputs(30, 40, device=device)
    for name in ("guidance_scale", "temperature", "top_p"):
        for bad in (math.nan, math.inf, -math.inf, -1.0, 0.0, 7.0):
            options = EVERYTHING | {name: torch.tensor(bad, device=device)}
            tokens = assert_exact(cond, uncond_logits=uncond, backend=backend, **options)
            assert bool(((tokens >= 0) & (tokens < 40)).all())
    for bad in (-(2**63), -1, 41, 2**63 - 1):
        options = EVERYTHING | {"top_k": torch.tensor(bad, device=device)}
        tokens = assert_exact(cond, uncond_logits=uncond, backend=backend, **options)
        assert bool(((tokens >= 0) & (tokens < 40)).all())


def test_strided_logits(backend, device):
    cond, uncond = inputs(6, 1000, device=device)
    both = torch.full((12, 1033), math.nan, device=device)
    both[::2, 5:1005], both[1::2, 5:1005] = cond, uncond
    columns = torch.empty(1000, 6, device=device).copy_(cond.T).T
    options = EVERYTHING | {"backend": backend}
    expected = sample_token(cond, uncond_logits=uncond, **options)
    for x, u in (
        (both[::2, 5:1005], both[1::2, 5:1005]),
        (columns, uncond),
        (cond, both[1::2, 5:1005]),
    ):
        assert torch.equal(sample_token(x, uncond_logits=u, **options), expected)


def test_logits_beyond_2_to_the_31_elements(backend, device):
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 10 GB")
    cond, _ = inputs(3, 300, dtype=torch.bfloat16, device=device)
    stride = 2**31 + 8
    storage = torch.Tensor.new_empty(cond, 2 * stride + 300)  # touched only where written
    far = storage.as_strided((3, 300), (stride, 1))
    far.copy_(cond)
    for options in (STEP, STEP | {"top_k": 40, "top_p": 0.9}):
        expected = sample_token(cond, backend="reference", **options)
        assert torch.equal(sample_token(far, backend=backend, **options), expected)


def test_empty(backend, device):
    for choice in (backend, "reference"):
        tokens = sample_token(
            torch.empty(0, 7, device=device), backend=choice, **EVERYTHING | {"guidance_scale": 1}
        )
        assert tokens.shape == (0,) and tokens.dtype == torch.int64


def test_meta_tensors_give_shapes():
    tokens = sample_token(torch.empty(4, 8, device="meta"), **STEP)
    assert tokens.is_meta and tokens.shape == (4,) and tokens.dtype == torch.int64


@pytest.mark.parametrize("shape", [(1, 2**18 + 3), (5, 2**17), (40, 5000)])
@pytest.mark.parametrize("spread", [0.001, 1.0])
def test_same_tokens_with_any_number_of_threads(shape, spread, set_threads):
    cond, uncond = inputs(*shape, spread=spread)
    for filters in ({}, {"top_k": 0}, {"top_p": 1.0}, {"top_k": 0, "top_p": 1.0}):
        options = EVERYTHING | filters | {"uncond_logits": uncond}
        set_threads(1)
        expected = sample_token(cond, **options)
        for count in (2, 3, 16):
            set_threads(count)
            assert torch.equal(sample_token(cond, **options), expected)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_opcheck(as_tensors):
    cond, uncond = inputs(5, 33)
    tensors = [torch.tensor(3), None, None, torch.tensor(2.0), None, torch.tensor(0.5)]
    torch.library.opcheck(
        torch.ops.titok_fast.sample_token.default,
        (
            cond, uncond, torch.arange(5), [10, 2, 3], [2.0, 1.0, 0.9],
            tensors if as_tensors else [None] * 6, "cpu",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def f(cond, uncond, scale):
        return sample_token(
            cond * 2, uncond_logits=uncond, **EVERYTHING | {"guidance_scale": scale}
        )

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 9):
        cond, uncond = inputs(batch, 30)
        for scale in (torch.tensor(1.5), torch.tensor(2.5)):
            assert torch.equal(compiled(cond, uncond, scale), f(cond, uncond, scale))


def test_compiled_loop():
    """More steps than torch compiles a function for."""
    cond, _ = inputs(5, 30)

    def f(step):
        return sample_token(cond, seed=step + 7, step=step, top_k=step + 3)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for step in range(12):
        assert torch.equal(compiled(step), f(step))


def test_gives_no_gradient():
    cond, uncond = inputs(4, 9)
    tokens = sample_token(
        cond.requires_grad_(), uncond_logits=uncond.requires_grad_(), **EVERYTHING
    )
    assert not tokens.requires_grad


BAD = [
    ({"logits": [[1.0]]}, TypeError, "logits: expected a Tensor, got list"),
    ({"logits": torch.zeros(2, 4).double()}, TypeError, "logits: dtype torch.float64 is not float"),
    ({"logits": torch.zeros(2, 4).to_sparse()}, TypeError, "logits: layout torch.sparse_coo is no"),
    ({"logits": torch.zeros(4)}, ValueError, "logits: expected [B, V] with 1 <= V <= 1048576, got"),
    ({"logits": torch.zeros(2, 0)}, ValueError, "logits: expected [B, V] with 1 <= V <= 1048576, "),
    (
        {"logits": torch.zeros(1, 1).expand(1, 2**20 + 1)},
        ValueError,
        "logits: expected [B, V] with 1 <= V <= 1048576, got shape [1, 1048577]",
    ),
    (
        {"uncond_logits": torch.zeros(2, 4).half()},
        TypeError,
        "uncond_logits: dtype torch.float16 is not float32",
    ),
    ({"uncond_logits": torch.zeros(2, 5)}, ValueError, "uncond_logits: expected shape [2, 4], got"),
    (
        {"uncond_logits": torch.zeros(2, 4, device="meta")},
        ValueError,
        "uncond_logits: on meta, but logits is on cpu",
    ),
    ({"guidance_scale": 2.0}, ValueError, "uncond_logits: needed unless guidance_scale is 1"),
    ({"guidance_scale": torch.tensor(1.0)}, ValueError, "uncond_logits: needed unless guidance_sc"),
    ({"guidance_scale": math.inf}, ValueError, "guidance_scale: inf is not finite"),
    ({"guidance_scale": torch.tensor(2)}, TypeError, "guidance_scale: dtype torch.int64 is not a "),
    ({"image_ids": torch.zeros(3).long()}, ValueError, "image_ids: expected shape [2], got [3]"),
    ({"image_ids": torch.zeros(2)}, TypeError, "image_ids: dtype torch.float32 is not int64"),
    ({"temperature": -1.0}, ValueError, "temperature: -1.0 is negative"),
    ({"temperature": "1"}, TypeError, "temperature: expected a float or a Tensor, got str"),
    ({"temperature": torch.ones(2)}, ValueError, "temperature: expected shape [], got [2]"),
    ({"top_k": -1}, ValueError, "top_k: -1 is not in [0, 2**63)"),
    ({"top_k": 2**63}, ValueError, "top_k: 9223372036854775808 is not in [0, 2**63)"),
    ({"top_k": 2.0}, TypeError, "top_k: expected an int or a Tensor, got float"),
    ({"top_k": torch.tensor(2.0)}, TypeError, "top_k: dtype torch.float32 is not an integer dtype"),
    ({"top_p": 1.5}, ValueError, "top_p: 1.5 is not in [0, 1]"),
    ({"top_p": -0.1}, ValueError, "top_p: -0.1 is not in [0, 1]"),
    ({"top_p": math.nan}, ValueError, "top_p: nan is not finite"),
    ({"seed": -1}, ValueError, "seed: -1 is not in [0, 2**63)"),
    ({"step": True}, TypeError, "step: expected an int or a Tensor, got bool"),
    ({"backend": "numpy"}, ValueError, "backend: 'numpy' is not one of 'auto', 'cpu', 'cuda', "),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    arguments = {"logits": torch.zeros(2, 4)} | STEP | change
    with pytest.raises(error) as raised:
        sample_token(arguments.pop("logits"), **arguments)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


def test_backend_asked_for_by_name_says_what_is_missing():
    with pytest.raises(
        RuntimeError, match="backend 'cuda' is not available: it has no cpu version"
    ):
        sample_token(torch.zeros(1, 3), backend="cuda", **STEP)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2**18), (4, 2**18), (64, 2**14)])
def test_gpu_graph_capture(shape):
    cond, uncond = inputs(*shape, device="cuda")
    values = {name: torch.tensor(value, device="cuda") for name, value in EVERYTHING.items()}
    options = values | {"uncond_logits": uncond}
    sample_token(cond, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_token(cond, **options)
    for name, value in values.items():
        value += -0.5 if name == "top_p" else 1
    graph.replay()
    assert torch.equal(tokens, sample_token(cond, backend="reference", **options))


@pytest.mark.gpu
def test_gpu_tokens_are_those_of_the_cpu():
    cond, uncond = inputs(4, 2**18)
    for filters in ({}, {"top_k": 2000, "top_p": 0.9}, {"top_p": 0.9}):
        options = STEP | {"guidance_scale": 2.5} | filters
        expected = sample_token(cond, uncond_logits=uncond, **options)
        actual = sample_token(cond.cuda(), uncond_logits=uncond.cuda(), **options)
        assert torch.equal(actual.cpu(), expected)


def test_cuda_kernels_spill_nothing():
    drawing.assert_nothing_spilled("sample_token", kernels=15, shared=20 << 10)
