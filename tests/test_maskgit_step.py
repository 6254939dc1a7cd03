"""maskgit_step against its reference, to the bit, and against the official arithmetic."""

import math

import pytest
import torch

from tests import drawing
from tests.drawing import DTYPES, chi_square, many_draws
from titok_fast import maskgit_step
from titok_fast.ops import inspect
from titok_fast.reference._draw import natural_log, philox, scaled_uniform

MASK = -1
STEP = {"mask_id": MASK, "num_masked": 3, "seed": 5, "step": 2}
EVERYTHING = STEP | {
    "guidance_scale": 2.5,
    "softmax_temperature": 0.8,
    "token_temperature": 1.7,
    "confidence_temperature": 1.1,
}


backend, device = drawing.backend, drawing.device


def inputs(batch, length, vocabulary, *, dtype=torch.float32, unmasked=3, spread=3.0, device="cpu"):
    """Conditional and unconditional logits [B, L, V], and ids [B, L] that are mostly masked."""
    cond, uncond = (spread * torch.randn(2, batch, length, vocabulary)).to(device, dtype)
    ids = torch.full((batch, length), MASK)
    ids[:, ::unmasked] = torch.randint(vocabulary, ids[:, ::unmasked].shape)
    return cond, uncond, ids.to(device)


def assert_exact(cond, ids, *, backend, **options):
    """The same tokens, masks and confidence bits as the reference."""
    actual = maskgit_step(cond, ids, backend=backend, **options)
    expected = maskgit_step(cond, ids, backend="reference", **options)
    for name, a, e in zip(("ids_next", "tokens", "confidence"), actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape == ids.shape
        assert torch.equal(a, e), f"{name}: {int((a != e).sum())} of {a.numel()} differ"
    return actual


# The known-answer vectors of Random123 1.14, kat_vectors.
PHILOX = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
)  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX)
def test_philox_known_answers(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in x.split()] for x in (counter, key, answer))
    low, high = torch.tensor(key)
    words = philox(torch.tensor(counter).unbind(), low | high << 32)
    assert torch.stack(words).tolist() == answer
    assert inspect.extension().philox4x32(counter, *key) == answer


def test_logarithm_is_within_four_ulp():
    near_one = 1 - 2.0 ** -torch.arange(1, 50).double()
    powers = torch.logspace(-300, 300, 999, dtype=torch.float64)
    x = torch.cat([torch.rand(100_000).double() ** 20 + 1e-300, powers, near_one])
    error = (natural_log(x) - x.log()).abs()
    assert bool((error <= 2.0**-50 * x.log().abs()).all())
    assert float(natural_log(torch.ones(1, dtype=torch.float64))) == 0


def test_scaled_uniform_is_exact():
    words = torch.randint(2**32, (2, 300))
    totals = torch.randint(1, 2**48, (300,))
    actual = scaled_uniform(*words, totals).tolist()
    for u, v, total, result in zip(*words.tolist(), totals.tolist(), actual, strict=True):
        assert result == ((u << 32) + v) * total >> 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("confidence", ["logit", "log_probability"])
@pytest.mark.parametrize("guidance", [None, "cond", "uncond"])
def test_equals_reference(backend, device, guidance, confidence, dtype):
    for vocabulary in (1, 2, 15, 16, 17, 255, 257, 1000, 4096):
        cond, uncond, ids = inputs(3, 10, vocabulary, dtype=dtype, device=device)
        options = EVERYTHING | {"confidence": confidence, "seed": vocabulary}
        if guidance is None:
            options["guidance_scale"] = 0.0
        else:
            options |= {"uncond_logits": uncond, "guidance_form": guidance}
        assert_exact(cond, ids, backend=backend, **options)


@pytest.mark.parametrize("name", ["token_temperature", "confidence_temperature", "guidance_scale"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-6, 0.3, 30.0, 1e6])
def test_equals_reference_at_any_setting(backend, device, name, value):
    cond, uncond, ids = inputs(2, 9, 300, device=device)
    for confidence in ("logit", "log_probability"):
        options = EVERYTHING | {name: value, "confidence": confidence}
        assert_exact(cond, ids, backend=backend, uncond_logits=uncond, **options)


@many_draws
def test_a_hundred_thousand_draws_equal_the_reference(backend, device):
    cond, uncond, ids = inputs(20, 5000, 40, unmasked=5001, device=device)
    assert_exact(cond, ids, backend=backend, uncond_logits=uncond, **EVERYTHING)


def test_vocabulary_beyond_shared_memory(backend, device):
    cond, uncond, ids = inputs(1, 4, 40_001, device=device)
    for temperature in (0.0, 1.0):
        options = EVERYTHING | {"token_temperature": temperature}
        assert_exact(cond, ids, backend=backend, uncond_logits=uncond, **options)


@many_draws
@pytest.mark.parametrize(("softmax", "token"), [(1.0, 1.0), (0.6, 1.0), (1.3, 2.0), (1.0, 0.5)])
def test_tokens_follow_the_softmax(backend, device, softmax, token):
    draws = 200_000
    logits = torch.randn(40)
    ids = torch.full((2, draws // 2), MASK, device=device)
    options = STEP | {"softmax_temperature": softmax, "token_temperature": token}
    _, tokens, _ = maskgit_step(
        logits.to(device).expand(2, draws // 2, 40), ids, backend=backend, **options
    )
    probability = (logits.double() / softmax / token).softmax(0)
    assert abs(chi_square(tokens, probability)) < 4
    for shift in (1, 2, 64):  # neighbours are independent: pairs follow the product
        pairs = (tokens[:, shift:] % 8) * 8 + tokens[:, :-shift] % 8
        marginal = torch.zeros(8).double().index_add(0, torch.arange(40) % 8, probability)
        assert abs(chi_square(pairs, torch.outer(marginal, marginal).flatten())) < 4


@many_draws
def test_confidence_noise_is_gumbel(backend, device):
    ids = torch.full((1, 100_000), MASK, device=device)
    _, _, confidence = maskgit_step(
        torch.zeros(1, 1, 1, device=device).expand(1, 100_000, 1),
        ids,
        backend=backend,
        **STEP | {"confidence_temperature": 1.0},
    )
    probability = (-(-confidence.double().cpu().flatten()).exp()).exp().sort().values
    distance = (probability - (torch.arange(100_000) + 0.5) / 100_000).abs().max()
    assert float(distance) < 1.63 / math.sqrt(100_000)  # Kolmogorov and Smirnov, 1%


def official_step(cond, uncond, ids, *, scale, form, softmax, temperature, keep, noise):
    """1d-tokenizer's sampling step, the uniforms given; `keep` positions stay masked."""

    def log(t):
        return torch.log(t.clamp(min=1e-20))

    def add_gumbel_noise(t, uniform):
        return t + temperature * -log(-log(uniform))

    logits = (cond if form == "cond" else uncond) + (cond - uncond) * scale
    logits = logits / softmax
    sampled = add_gumbel_noise(logits, noise[0]).argmax(-1)
    score = logits.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    masked = ids == MASK
    sampled = torch.where(masked, sampled, ids)
    score = torch.where(masked, score, math.inf)
    confidence = add_gumbel_noise(score, noise[1])
    cut_off = confidence.sort(-1).values[:, keep - 1 : keep]
    return torch.where(confidence <= cut_off, MASK, sampled), sampled, confidence


@pytest.mark.parametrize("form", ["cond", "uncond"])
@pytest.mark.parametrize(("softmax", "temperature"), [(1.0, 9.5), (0.9, 2.0), (1.3, 0.0)])
def test_noise_reproduces_the_official_arithmetic(backend, device, form, softmax, temperature):
    cond, uncond, ids = inputs(8, 32, 1024, device=device)
    noise = torch.rand(8, 32, 1024).to(device), torch.rand(8, 32).to(device)
    expected = official_step(
        cond, uncond, ids, scale=3.7, form=form, softmax=softmax, temperature=temperature, keep=11,
        noise=noise,
    )  # fmt: skip
    for choice in (backend, "reference"):
        actual = maskgit_step(
            cond, ids, mask_id=MASK, num_masked=11, uncond_logits=uncond, guidance_scale=3.7,
            guidance_form=form, softmax_temperature=softmax, token_temperature=temperature,
            confidence_temperature=temperature, seed=0, step=0, noise=noise, backend=choice,
        )  # fmt: skip
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        torch.testing.assert_close(actual[2], expected[2], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("confidence", ["logit", "log_probability"])
def test_noise_equals_reference(backend, device, confidence):
    cond, uncond, ids = inputs(2, 7, 333, device=device)
    noise = torch.rand(2, 7, 333).to(device), torch.rand(2, 7).to(device)
    noise[0][:, :, ::7], noise[1][0, 1:3] = 0.0, torch.tensor([0.0, 1 - 2**-24], device=device)
    for temperature in (0.0, 2.0):
        options = EVERYTHING | {"token_temperature": temperature, "confidence": confidence}
        assert_exact(cond, ids, backend=backend, uncond_logits=uncond, noise=noise, **options)


@pytest.mark.parametrize("form", ["cond", "uncond"])
def test_confidence_against_float64(backend, device, form):
    cond, uncond, ids = inputs(2, 20, 500, device=device)
    a, b = cond.double(), uncond.double()
    logits = ((a if form == "cond" else b) + 2.5 * (a - b)) / 0.7
    for confidence, truth in (("logit", logits), ("log_probability", logits.log_softmax(-1))):
        _, tokens, score = maskgit_step(
            cond, ids, uncond_logits=uncond, guidance_form=form, guidance_scale=2.5,
            softmax_temperature=0.7, token_temperature=1.4, confidence=confidence, backend=backend,
            **STEP,
        )  # fmt: skip
        masked = ids == MASK
        expected = truth.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(score[masked].double(), expected[masked], rtol=1e-5, atol=1e-5)
        assert bool((score[~masked] == math.inf).all())


def test_masks_exactly_the_least_confident(backend, device):
    cond, _, ids = inputs(6, 50, 80, device=device)
    masked = ids == MASK
    counts = masked.sum(1)
    for count in (0, 1, 17, 50, torch.tensor([0, 1, 2, 17, 32, 33], device=device)):
        ids_next, tokens, confidence = assert_exact(
            cond, ids, backend=backend, **STEP | {"num_masked": count}
        )
        again = ids_next == MASK
        assert torch.equal(again.sum(1), torch.minimum(torch.zeros_like(counts) + count, counts))
        assert not bool((again & ~masked).any())
        assert torch.equal(ids_next[~again], tokens[~again])
        assert torch.equal(tokens[~masked], ids[~masked])
        for b in range(6):
            if bool(again[b].any()) and bool((masked[b] & ~again[b]).any()):
                kept = confidence[b][masked[b] & ~again[b]].min()
                assert float(confidence[b][again[b]].max()) <= float(kept)


def test_ties_mask_the_lower_position(backend, device):
    cond = torch.ones(2, 12, 9, device=device)
    ids = torch.full((2, 12), MASK, device=device)
    ids[0, 0] = ids[1, 5] = 4
    ids_next, _, _ = assert_exact(cond, ids, backend=backend, **STEP)
    assert torch.nonzero(ids_next == MASK).tolist() == [
        [0, 1],
        [0, 2],
        [0, 3],
        [1, 0],
        [1, 1],
        [1, 2],
    ]
    cond[:, ::2] = -0.0  # one zero like the other
    cond[:, 1::2] = 0.0
    ids_next, _, _ = assert_exact(cond, ids, backend=backend, **STEP)
    assert torch.nonzero(ids_next[1] == MASK).flatten().tolist() == [0, 1, 2]


def test_argmax_takes_the_lowest_of_equal_logits(backend, device):
    cond, _, ids = inputs(2, 8, 300, unmasked=100, device=device)
    cond[:, :, 37] = cond[:, :, 200] = 99.0
    cond[:, :, 20] = math.nan
    _, tokens, _ = assert_exact(cond, ids, backend=backend, **STEP | {"token_temperature": 0.0})
    assert bool((tokens[ids == MASK] == 37).all())
    cond[:, :, :], cond[:, :, 3] = 0.0, -0.0
    _, tokens, _ = assert_exact(cond, ids, backend=backend, **STEP | {"token_temperature": 0.0})
    assert not bool(tokens[ids == MASK].any())


def test_unmasked_positions_are_not_read(backend, device):
    cond, uncond, ids = inputs(3, 9, 70, device=device)
    options = EVERYTHING | {"backend": backend}
    expected = maskgit_step(cond, ids, uncond_logits=uncond, **options)
    cond[ids != MASK] = math.nan
    uncond[ids != MASK] = math.inf
    actual = maskgit_step(cond, ids, uncond_logits=uncond, **options)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert torch.equal(actual[1][ids != MASK], ids[ids != MASK])
    given = torch.randint(70, (3, 9), device=device)
    ids_next, tokens, confidence = maskgit_step(cond, given, **STEP, backend=backend)
    assert torch.equal(ids_next, given) and torch.equal(tokens, given)
    assert bool((confidence == math.inf).all())


def test_an_image_does_not_depend_on_its_batch(backend, device):
    cond, uncond, ids = inputs(7, 12, 100, device=device)
    image_ids = torch.tensor([11, 2**32 + 11, 0, 5, 2**40, -1, 6], device=device)

    def step(rows):
        return maskgit_step(
            cond[rows], ids[rows], uncond_logits=uncond[rows], image_ids=image_ids[rows],
            backend=backend, **EVERYTHING,
        )  # fmt: skip

    whole = step(slice(None))
    for rows in ([3], [6, 0], [5, 4, 3, 2, 1]):
        assert all(torch.equal(a, w[rows]) for a, w in zip(step(rows), whole, strict=True))
    same = cond[:1].expand(7, 12, 100), ids[:1].expand(7, 12)
    _, tokens, _ = maskgit_step(*same, image_ids=image_ids, backend=backend, **STEP)
    assert torch.equal(tokens[0], tokens[1])  # ids count modulo 2^32
    assert not torch.equal(tokens[0], tokens[2])
    _, counted, _ = maskgit_step(*same, backend=backend, **STEP)
    assert torch.equal(counted[[0, 5, 6]], tokens[[2, 3, 6]])


def test_seed_and_step_change_the_tokens(backend, device):
    cond, _, ids = inputs(2, 30, 500, unmasked=31, device=device)
    draws = [
        maskgit_step(cond, ids, backend=backend, **STEP | change)[1]
        for change in ({}, {"seed": 6}, {"seed": 5 + 2**32}, {"step": 3})
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert float((a[:, 1:] == b[:, 1:]).double().mean()) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_numbers_may_be_tensors(backend, device, dtype):
    cond, uncond, ids = inputs(2, 9, 50, device=device)
    whole = not dtype.is_floating_point
    settings = {"guidance_scale": 2.0, "softmax_temperature": 0.5} if not whole else {}
    settings |= {"token_temperature": 1.5} if not whole else {"seed": 9, "step": 1, "num_masked": 2}
    options = EVERYTHING | settings
    expected = maskgit_step(cond, ids, uncond_logits=uncond, backend=backend, **options)
    as_tensors = {k: torch.tensor(v, dtype=dtype, device=device) for k, v in settings.items()}
    for choice in (backend, "reference"):
        options |= as_tensors
        actual = maskgit_step(cond, ids, uncond_logits=uncond, backend=choice, **options)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_infinite_logits(backend, device):
    cond, _, ids = inputs(4, 500, 60, unmasked=501, device=device)
    cond[0, :, 1:] = -math.inf
    cond[1, :, ::2] = -math.inf
    cond[2, :, [7, 9]] = math.inf
    for confidence in ("logit", "log_probability"):
        _, tokens, score = assert_exact(
            cond, ids, backend=backend, **STEP | {"confidence": confidence}
        )
        masked = ids == MASK
        assert bool((tokens[0][masked[0]] == 0).all())
        assert bool((tokens[1][masked[1]] % 2 == 1).all())
        assert set(tokens[2][masked[2]].tolist()) == {7, 9}
        assert not bool(score.isnan().any())
    assert score[0, 1] == 0 and abs(float(score[2, 1]) - math.log(0.5)) < 1e-6


def test_nan_logits_are_never_drawn(backend, device):
    for temperature in (0.0, 1.0):
        for noise in (False, True):
            cond, uncond, ids = inputs(3, 40, 30, device=device)
            cond[0], cond[1, :, ::3] = math.nan, math.nan
            uncond[2, :, ::2], uncond[2, 5:9] = math.nan, -math.inf
            cond[2, 5:9] = -math.inf
            options = EVERYTHING | {"token_temperature": temperature, "uncond_logits": uncond}
            if noise:
                options["noise"] = torch.rand_like(cond), torch.rand(3, 40, device=device)
            _, tokens, score = assert_exact(cond, ids, backend=backend, **options)
            masked = ids == MASK
            assert bool((tokens[0][masked[0]] == 0).all())
            assert bool((score[0][masked[0]] == -math.inf).all())
            assert bool((tokens[1][masked[1]] % 3 != 0).all())
            rest = masked[2].clone()
            rest[5:9] = False
            assert bool((tokens[2][rest] % 2 == 1).all())
            assert not bool(tokens[2, 5:9][masked[2, 5:9]].any())
            assert not bool(score.isnan().any())


def test_settings_in_tensors_never_lead_out_of_range(backend, device):
    cond, uncond, ids = inputs(2, 30, 40, device=device)
    for bad in (math.nan, math.inf, -math.inf, -1.0, 0.0):
        for name in ("guidance_scale", "softmax_temperature", "token_temperature"):
            options = EVERYTHING | {name: torch.tensor(bad, device=device)}
            for choice in (backend, "reference"):
                ids_next, tokens, _ = maskgit_step(
                    cond, ids, uncond_logits=uncond, backend=choice, **options
                )
                assert bool(((tokens >= 0) & (tokens < 40)).all())
                assert bool(((ids_next == MASK).sum(1) == 3).all())


@pytest.mark.parametrize("scale", [1e4, 1e-4, 1e30])
def test_extreme_logits(backend, device, scale):
    cond, uncond, ids = inputs(2, 9, 200, spread=scale, device=device)
    for confidence in ("logit", "log_probability"):
        options = EVERYTHING | {"confidence": confidence}
        assert_exact(cond, ids, backend=backend, uncond_logits=uncond, **options)


def test_strided_logits(backend, device):
    cond, uncond, ids = inputs(3, 8, 100, device=device)
    both = torch.full((8, 6, 133), math.nan, device=device)
    both[:, :3, 5:105], both[:, 3:, 5:105] = cond.transpose(0, 1), uncond.transpose(0, 1)
    a, b = both[:, :, 5:105].transpose(0, 1).split(3)
    last = torch.empty(100, 3, 8, device=device).copy_(cond.permute(2, 0, 1)).permute(1, 2, 0)
    options = EVERYTHING | {"backend": backend}
    expected = maskgit_step(cond, ids, uncond_logits=uncond, **options)
    transposed_ids = ids.T.contiguous().T
    for x, u in ((a, b), (last, uncond)):
        actual = maskgit_step(x, transposed_ids, uncond_logits=u, **options)
        assert all(torch.equal(r, e) for r, e in zip(actual, expected, strict=True))


def test_logits_beyond_2_to_the_31_elements(backend, device):
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 10 GB")
    cond, _, ids = inputs(3, 5, 8, dtype=torch.bfloat16, device=device)
    storage = torch.Tensor.new_empty(cond, 2 * (2**31 + 8) + 40)  # touched only where written
    far = storage.as_strided((3, 5, 8), (2**31 + 8, 8, 1))
    far.copy_(cond)
    expected = maskgit_step(cond, ids, backend="reference", **STEP)
    actual = maskgit_step(far, ids, backend=backend, **STEP)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape, backend, device):
    cond, ids = torch.empty(*shape, 7, device=device), torch.zeros(shape, device=device).long()
    for choice in (backend, "reference"):
        outputs = maskgit_step(cond, ids, backend=choice, **STEP | {"num_masked": 0})
        assert [x.shape for x in outputs] == [shape] * 3
        assert outputs[0].dtype == outputs[1].dtype == torch.int64
        assert outputs[2].dtype == torch.float32


def test_meta_tensors_give_shapes():
    cond, ids = torch.empty(2, 3, 8, device="meta"), torch.empty(2, 3, device="meta").long()
    ids_next, tokens, confidence = maskgit_step(cond, ids, **STEP)
    assert ids_next.is_meta and tokens.shape == confidence.shape == ids_next.shape == (2, 3)
    assert confidence.dtype == torch.float32 and tokens.dtype == ids_next.dtype == torch.int64


def test_same_bits_with_any_number_of_threads(set_threads):
    cond, uncond, ids = inputs(5, 40, 1000)
    expected = maskgit_step(cond, ids, uncond_logits=uncond, **EVERYTHING)
    for count in (1, 2, 3, 16):
        set_threads(count)
        actual = maskgit_step(cond, ids, uncond_logits=uncond, **EVERYTHING)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("as_tensors", [False, True])
def test_opcheck(as_tensors):
    cond, uncond, ids = inputs(2, 5, 33)
    tensors = [torch.tensor(3), None, None, torch.tensor(2.0), None, None, None]
    torch.library.opcheck(
        torch.ops.titok_fast.maskgit_step.default,
        (
            cond, uncond, ids, MASK, torch.arange(2), None, None, None, "cond", "logit", [1, 2, 3],
            [0.0, 1.0, 1.0, 0.0], tensors if as_tensors else [None] * 7, "cpu",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def f(cond, uncond, ids, scale):
        return maskgit_step(
            cond * 2, ids, uncond_logits=uncond, **EVERYTHING | {"guidance_scale": scale}
        )

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 9):
        cond, uncond, ids = inputs(2, length, 30)
        for scale in (torch.tensor(1.5), torch.tensor(2.5)):
            actual, expected = compiled(cond, uncond, ids, scale), f(cond, uncond, ids, scale)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_compiled_loop():
    """More steps than torch compiles a function for."""
    cond, _, ids = inputs(2, 20, 30)

    def f(step):
        return maskgit_step(cond, ids, mask_id=MASK, num_masked=17 - step, seed=5, step=step)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for step in range(12):
        assert all(map(torch.equal, compiled(step), f(step)))


def test_positions_of_a_part_give_the_tokens_of_the_whole(backend, device):
    cond, uncond, ids = inputs(3, 12, 50, device=device)
    ids = torch.full_like(ids, MASK)
    options = EVERYTHING | {"backend": backend, "num_masked": 0}
    _, whole, scores = maskgit_step(cond, ids, uncond_logits=uncond, **options)
    positions = torch.stack([torch.randperm(12)[:5].sort().values for _ in range(3)]).to(device)
    rows = positions[..., None].expand(-1, -1, 50)
    _, part, of_part = maskgit_step(
        cond.gather(1, rows),
        ids[:, :5],
        uncond_logits=uncond.gather(1, rows),
        positions=positions,
        **options,
    )
    assert torch.equal(part, whole.gather(1, positions))
    assert torch.equal(of_part, scores.gather(1, positions))


def test_gives_no_gradient():
    cond, uncond, ids = inputs(2, 4, 9)
    _, _, confidence = maskgit_step(
        cond.requires_grad_(), ids, uncond_logits=uncond.requires_grad_(), **EVERYTHING
    )
    assert not confidence.requires_grad


BAD = [
    ({"cond_logits": [[1.0]]}, TypeError, "cond_logits: expected a Tensor, got list"),
    ({"cond_logits": torch.zeros(2, 3, 4).double()}, TypeError, "cond_logits: dtype torch.float64"),
    ({"cond_logits": torch.zeros(2, 3, 4).to_sparse()}, TypeError, "cond_logits: layout torch.sp"),
    ({"mask_id": 2**63}, ValueError, "mask_id: 9223372036854775808 is not an int64"),
    ({"softmax_temperature": 1e-46}, ValueError, "softmax_temperature: 1e-46 is not positive"),
    ({"softmax_temperature": 1e300}, ValueError, "softmax_temperature: 1e+300 is not finite in"),
    ({"token_temperature": 10**400}, ValueError, "token_temperature: 1000000"),
    ({"cond_logits": torch.zeros(2, 3)}, ValueError, "cond_logits: expected [B, L, V] with 1 "),
    ({"cond_logits": torch.zeros(2, 3, 0)}, ValueError, "cond_logits: expected [B, L, V] with 1 "),
    ({"ids": torch.zeros(2, 4).long()}, ValueError, "ids: expected shape [2, 3], got [2, 4]"),
    ({"ids": torch.zeros(2, 3).int()}, TypeError, "ids: dtype torch.int32 is not int64"),
    ({"ids": None}, TypeError, "ids: expected a Tensor, got NoneType"),
    ({"ids": torch.zeros(2, 3, device="meta").long()}, ValueError, "ids: on meta, but cond_logits"),
    (
        {"uncond_logits": torch.zeros(2, 3, 4).half()},
        TypeError,
        "uncond_logits: dtype torch.float1",
    ),
    (
        {"uncond_logits": torch.zeros(2, 3, 5)},
        ValueError,
        "uncond_logits: expected shape [2, 3, 4]",
    ),
    ({"image_ids": torch.zeros(3).long()}, ValueError, "image_ids: expected shape [2], got [3]"),
    ({"image_ids": torch.zeros(2)}, TypeError, "image_ids: dtype torch.float32 is not int64"),
    ({"noise": torch.zeros(2, 3)}, TypeError, "noise: expected (token uniforms [B, L, V], "),
    (
        {"noise": (torch.zeros(2, 3), torch.zeros(2, 3))},
        ValueError,
        "noise[0]: expected shape [2, ",
    ),
    ({"noise": (torch.zeros(2, 3, 4),) * 2}, ValueError, "noise[1]: expected shape [2, 3], got"),
    ({"mask_id": 1.0}, TypeError, "mask_id: expected an int, got float"),
    ({"guidance_form": "both"}, ValueError, "guidance_form: 'both' is not one of 'cond', 'uncond'"),
    ({"confidence": "loud"}, ValueError, "confidence: 'loud' is not one of 'logit', 'log_prob"),
    ({"guidance_scale": 2.0}, ValueError, "uncond_logits: needed for guidance_form 'cond' unless "),
    ({"guidance_form": "uncond"}, ValueError, "uncond_logits: needed for guidance_form 'uncond' "),
    ({"guidance_scale": torch.tensor(0.0)}, ValueError, "uncond_logits: needed for guidance_form "),
    ({"guidance_scale": math.inf}, ValueError, "guidance_scale: inf is not finite"),
    (
        {"guidance_scale": torch.tensor(2)},
        TypeError,
        "guidance_scale: dtype torch.int64 is not a f",
    ),
    ({"num_masked": 4}, ValueError, "num_masked: 4 is not in [0, L = 3]"),
    ({"num_masked": -1}, ValueError, "num_masked: -1 is not in [0, L = 3]"),
    ({"num_masked": 1.5}, TypeError, "num_masked: expected an int or a Tensor, got float"),
    ({"num_masked": torch.tensor([1, 2, 3])}, ValueError, "num_masked: expected shape [] or [2], "),
    ({"num_masked": torch.tensor(1.0)}, TypeError, "num_masked: dtype torch.float32 is not an int"),
    ({"seed": -1}, ValueError, "seed: -1 is not in [0, 2**63)"),
    ({"seed": torch.zeros(2).long()}, ValueError, "seed: expected shape [], got [2]"),
    (
        {"seed": torch.tensor(1, device="meta")},
        ValueError,
        "seed: on meta, but cond_logits is on c",
    ),
    ({"step": 2**63}, ValueError, "step: 9223372036854775808 is not in [0, 2**63)"),
    ({"step": True}, TypeError, "step: expected an int or a Tensor, got bool"),
    ({"softmax_temperature": 0.0}, ValueError, "softmax_temperature: 0.0 is not positive"),
    ({"softmax_temperature": "1"}, TypeError, "softmax_temperature: expected a float or a Tensor"),
    ({"token_temperature": -1.0}, ValueError, "token_temperature: -1.0 is negative"),
    ({"confidence_temperature": math.nan}, ValueError, "confidence_temperature: nan is not finite"),
    ({"backend": "numpy"}, ValueError, "backend: 'numpy' is not one of 'auto', 'cpu', 'cuda', "),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    arguments = {"cond_logits": torch.zeros(2, 3, 4), "ids": torch.full((2, 3), MASK)} | STEP
    arguments |= change
    with pytest.raises(error) as raised:
        maskgit_step(arguments.pop("cond_logits"), arguments.pop("ids"), **arguments)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


def test_backend_asked_for_by_name_says_what_is_missing():
    cond, _, ids = inputs(1, 3, 3)
    with pytest.raises(
        RuntimeError, match="backend 'cuda' is not available: it has no cpu version"
    ):
        maskgit_step(cond, ids, backend="cuda", **STEP)


@pytest.mark.gpu
def test_gpu_graph_capture():
    cond, uncond, ids = inputs(4, 32, 4096, device="cuda")
    names = ("guidance_scale", "token_temperature", "confidence_temperature", "seed", "step")
    values = {name: torch.tensor(EVERYTHING[name], device="cuda") for name in names}
    options = EVERYTHING | values | {"uncond_logits": uncond}
    maskgit_step(cond, ids, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = maskgit_step(cond, ids, **options)
    for value in values.values():
        value += 1
    graph.replay()
    expected = maskgit_step(cond, ids, **options)
    assert all(torch.equal(a, e) for a, e in zip(outputs, expected, strict=True))


def test_cuda_kernels_spill_nothing():
    drawing.assert_nothing_spilled("maskgit_step", kernels=7, shared=9 << 10)
