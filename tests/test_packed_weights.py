"""Layers that keep a copy of their weight in the order of the fastest product."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

import titok_fast
import titok_fast.models.packed as packed_module
import titok_fast.models.widened as widened_module
from titok_fast import ARTransformer, IBQTokenizer, MaskGIT, MaskGITVQGAN, TiTok, pack_weights
from titok_fast.models.convolutions import PackableConv, convolve
from titok_fast.models.generate import pack_pair
from titok_fast.models.ibq import ResidualBlock
from titok_fast.models.packed import (
    PackableLinear,
    _can_pack,
    gelu_of,
    packable,
    packed,
    untouched,
)
from titok_fast.models.widened import Conv
from titok_fast.testing import relative_error
from titok_fast.training.data import digits

# oneDNN and MKL add in different orders.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
pytestmark = pytest.mark.skipif(not _can_pack(torch.float32), reason="this torch has no oneDNN")


def count(model):
    return sum(layer._packed is not None for layer in packable(model))


@pytest.fixture
def tokenizer():
    return TiTok.from_pretrained("titok-digits")


@pytest.fixture(params=["ViT", "UViT"])
def generator(request):
    sizes = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    vq_model = {"codebook_size": 50, "num_latent_tokens": 7}
    generator = {"model_type": request.param, "intermediate_size": 96, **sizes}
    condition = {"condition_num_classes": 10, "image_seq_len": 7}
    return MaskGIT.from_config(
        {"model": {"vq_model": vq_model, "generator": {**generator, **condition}}}
    ).eval()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_tokenizer_computes_the_same(tokenizer, dtype):
    images = digits("test")[0][:64]
    tokenizer.cast(dtype)
    with torch.no_grad():
        latents, tokens = tokenizer.latents(images), tokenizer.encode(images)
        decoded = tokenizer.decode(tokens)
        assert pack_weights(tokenizer) is tokenizer
        assert count(tokenizer) == (len(packable(tokenizer)) if _can_pack(dtype) else 0)
        assert relative_error(tokenizer.latents(images), latents) < TOLERANCE[dtype]
        assert (tokenizer.encode(images) == tokens).double().mean() >= 0.99
        assert relative_error(tokenizer.decode(tokens), decoded) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_generator_computes_the_same(generator, dtype):
    generator.cast(dtype)
    ids, labels = torch.randint(0, 51, (3, 7)), torch.tensor([3, 0, 10])
    with torch.no_grad():
        logits = generator.logits(ids, labels)
        pack_weights(generator)
        assert relative_error(generator.logits(ids, labels), logits) < TOLERANCE[dtype]
    assert len(packable(generator)) >= 4 * 5 + 1


def test_an_image_does_not_depend_on_the_batch(tokenizer):
    generator = pack_weights(MaskGIT.from_pretrained("maskgit-digits"))
    labels, ids = torch.arange(10), torch.arange(10)
    tokens = generator.generate(labels, seed=5, image_ids=ids)
    for some in (slice(0, 1), slice(3, 7)):
        assert torch.equal(
            generator.generate(labels[some], seed=5, image_ids=ids[some]), tokens[some]
        )
    pack_weights(tokenizer)
    images = digits("test")[0][:32]
    tokens = tokenizer.encode(images)
    assert torch.equal(torch.cat([tokenizer.encode(x) for x in images.split(5)]), tokens)


def test_a_changed_weight_is_used():
    layer, x = PackableLinear(32, 48), torch.randn(5, 32)
    with torch.no_grad():
        for change in (
            lambda: layer.weight.mul_(2),
            lambda: layer.load_state_dict(PackableLinear(32, 48).state_dict()),
            lambda: layer.bias.mul_(3),
            lambda: layer.double().float(),
        ):
            layer.pack()
            layer(x)
            change()
            expected = F.linear(x, layer.weight, layer.bias)
            assert relative_error(layer(x), expected) < 1e-6
            assert relative_error(gelu_of(layer, x), F.gelu(expected)) < 1e-6


def test_gradients_autocast_and_nothing():
    layer, x = PackableLinear(32, 48), torch.randn(2, 5, 32)
    layer.pack()
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer._packed is not None
    layer.zero_grad()
    layer.pack()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer(x[:0]).shape == (0, 5, 48)
        expected = F.linear(x, layer.weight, layer.bias)
        assert relative_error(layer(x.transpose(0, 1)).transpose(0, 1), expected) < 1e-6
        assert layer.is_packed()
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.double())


def test_a_copy_and_a_file_are_not_packed(tokenizer):
    names = list(tokenizer.state_dict())
    pack_weights(tokenizer)
    assert list(tokenizer.state_dict()) == names
    assert count(copy.deepcopy(tokenizer)) == 0
    assert count(pickle.loads(pickle.dumps(tokenizer))) == 0
    assert count(tokenizer) == len(packable(tokenizer))


def test_packed_layers_are_packed_only_within(tokenizer):
    first = packable(tokenizer)[0]
    first.pack()
    with pytest.raises(KeyError), packed(tokenizer):
        assert count(tokenizer) == len(packable(tokenizer))
        raise KeyError
    assert count(tokenizer) == 1 and first._packed is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widened", [True, False])
def test_sixteen_bits_that_the_cpu_multiplies_slower_are_widened(dtype, widened, monkeypatch):
    if not widened and widened_module.WIDENED.get(dtype) == 0:
        pytest.skip(f"this CPU does not multiply {dtype}")
    monkeypatch.setattr(widened_module, "WIDENED", {dtype: 0} if widened else {})
    layer = PackableLinear(96, 64).to(dtype)
    conv = Conv(8, 16, 3, stride=2).to(dtype)
    x, image = torch.randn(5, 96).to(dtype), torch.randn(2, 8, 9, 9).to(dtype)
    with torch.no_grad():
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        pixels = F.conv2d(image.double(), conv.weight.double(), conv.bias.double(), stride=2)
        for out, right in ((layer(x), exact), (conv(image), pixels)):
            assert out.dtype == dtype
            if widened:  # rounded once
                wide = right.float().to(dtype)
                assert (out == wide).double().mean() > 0.99
                torch.testing.assert_close(out, wide, rtol=torch.finfo(dtype).eps, atol=1e-5)
        layer.pack()
        assert (layer._packed.copy.dtype == torch.float32) == widened
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(layer(x).double(), exact, rtol=eps, atol=eps)
        torch.testing.assert_close(gelu_of(layer, x).double(), F.gelu(exact), rtol=eps, atol=eps)
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == dtype
    torch.testing.assert_close(layer.weight.grad[0], x.double().sum(0).to(dtype))


def test_few_rows_are_not_widened(monkeypatch):
    monkeypatch.setattr(widened_module, "WIDENED", {torch.bfloat16: 128})
    layer, conv = PackableLinear(96, 64).bfloat16(), Conv(8, 16, 3).bfloat16()
    x, image = torch.randn(1, 128, 96).bfloat16(), torch.randn(1, 8, 8, 16).bfloat16()
    assert widened_module.widens(x, layer.weight) and widened_module.widens(image, conv.weight)
    assert not widened_module.widens(x[:, 1:], layer.weight)
    assert not widened_module.widens(image[:, :, 1:], conv.weight)
    assert not widened_module.widens(x.float(), layer.weight.float())
    assert not widened_module.widens(x.float(), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not widened_module.widens(x, layer.weight)


@pytest.mark.parametrize(
    ("shape", "parts"), [((384,), 1), ((385,), 2), ((2, 576), 3), ((1153,), 1)]
)
def test_many_rows_are_multiplied_in_parts(shape, parts, monkeypatch):
    monkeypatch.setattr(widened_module, "HAS_AMX", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer = PackableLinear(96, 40).bfloat16()
    layer.pack()
    x = torch.randn(*shape, 96).bfloat16()
    assert packed_module._parts(x, layer._packed.copy) == parts
    with torch.no_grad():
        actual, expected = layer(x), F.linear(x.double(), layer.weight.double())
    expected = expected + layer.bias.double()
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 0.01
    assert packed_module._parts(x.float(), layer._packed.copy) == 1


def test_says_what_it_takes():
    with pytest.raises(ValueError, match="model: Linear has no layer of titok_fast"):
        pack_weights(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="the model is on meta, allowed is cpu"):
        pack_weights(PackableLinear(2, 2).to("meta"))
    assert titok_fast.pack_weights is pack_weights


def small_ibq():
    """Widths on both sides of the smallest that is packed, and a level with attention."""
    config = {"double_z": False, "z_channels": 64, "resolution": 32, "in_channels": 3, "out_ch": 3}
    config |= {"ch": 64, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16]}
    config |= {"dropout": 0.0}
    model = IBQTokenizer.from_config({"n_embed": 64, "embed_dim": 32, "ddconfig": config}).eval()
    return model, torch.rand(3, 3, 32, 32), lambda images: model.latents(images)


def small_vqgan():
    config = {"channel_mult": [1, 2], "hidden_channels": 64, "num_channels": 3}
    config |= {"num_res_blocks": 1, "z_channels": 64}
    model = MaskGITVQGAN.from_config(config).eval()
    return model, torch.rand(3, 3, 16, 16), lambda images: model.encoder(images)


@pytest.mark.parametrize("make", [small_ibq, small_vqgan])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_pixel_network_is_as_near_to_float64(make, dtype):
    model, images, latents_of = make()
    exact = copy.deepcopy(model).double()
    model.to(dtype)
    allowed = 1.25  # bfloat16 loses in transformed inputs what it gains between the operations
    with torch.no_grad():
        tokens = model.encode(images.to(dtype))

        def errors():
            latents = relative_error(latents_of(images.to(dtype)), exact_latents)
            return latents, relative_error(model.decode(tokens), exact.decode(tokens))

        exact_latents = (exact.latents if make is small_ibq else exact.encoder)(images.double())
        plain = errors()
        pack_weights(model)
        convolutions = [layer for layer in packable(model) if min(layer.weight.shape[:2]) >= 64]
        assert 10 < count(model) == len(convolutions) < len(packable(model))
        assert all(a <= allowed * b for a, b in zip(errors(), plain, strict=True))


@pytest.mark.parametrize("make", [small_ibq, small_vqgan])
def test_a_packed_pixel_network_moves_to_meta(make):
    model, images, _ = make()
    network = pack_weights(model).encoder.to("meta")
    with torch.no_grad():
        assert network(images.to("meta")).is_meta
    assert count(network) == 0


def test_a_packed_pixel_network_still_trains():
    model, images, _ = small_ibq()
    pack_weights(model)
    plain = copy.deepcopy(model)
    assert count(plain) == 0 < count(model)
    gradients = []
    for network in (model, plain):
        network.latents(images).square().sum().backward()
        gradients.append(network.encoder.conv_in.weight.grad)
    assert torch.equal(*gradients)


def test_dropout_is_still_dropped():
    config = {"in_channels": 64, "out_channels": 64, "dropout": 0.5}
    block, x = ResidualBlock(**config), torch.randn(1, 64, 4, 4)
    pack_weights(block)
    with torch.no_grad():
        assert not torch.equal(block(x), block(x))
        assert torch.equal(block.eval()(x), block(x))


def test_a_changed_convolution_is_used():
    layer, norm, x = PackableConv(64, 72), torch.nn.GroupNorm(8, 64), torch.randn(2, 64, 5, 5)
    residual = torch.randn(2, 72, 5, 5)
    with torch.no_grad():
        layer.pack()
        for change in (
            lambda: layer.weight.mul_(2),
            lambda: layer.bias.mul_(3),
            lambda: norm.weight.mul_(3),
        ):
            change()
            expected = F.conv2d(F.silu(norm(x)), layer.weight, layer.bias, padding=1) + residual
            assert relative_error(convolve(layer, x, norm=norm, residual=residual), expected) < 1e-5


class Adapter(torch.nn.Module):
    """What LoRA puts in a layer's place: its output, and another layer's of the same input."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.more = layer, copy.deepcopy(layer)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def in_channels(self):
        return self.layer.in_channels

    def forward(self, x):
        return self.layer(x) + self.more(x) / 2


def layers_of(model, kind):
    """The modules of a kind: parent, name and module."""
    return [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if type(child) is kind
    ]


def small_titok():
    return TiTok.from_pretrained("titok-digits"), digits("test")[0][:4], None


@pytest.mark.parametrize("small", [small_titok, small_vqgan, small_ibq])
@pytest.mark.parametrize("kind", [PackableLinear, PackableConv, torch.nn.GroupNorm])
def test_a_layer_that_is_replaced_or_watched_is_called(small, kind):
    """With its own inputs, and nobody writes to its outputs; the others are packed."""
    model, images, _ = small()
    if not layers_of(model, kind):
        pytest.skip("the model has none")

    def reconstruct():
        with torch.no_grad():
            return model.decode(model.encode(images))

    for parent, name, layer in layers_of(model, kind)[::2]:
        parent.add_module(name, Adapter(layer))
    expected = reconstruct()
    pack_weights(model)
    assert relative_error(reconstruct(), expected) < 1e-5

    calls = []
    watched = [layer for _, _, layer in layers_of(model, kind)[::2]]
    hooks = [
        layer.register_forward_hook(
            lambda *call: calls.append((call[0], call[1][0].clone(), call[2]))
        )
        for layer in watched
    ]
    assert relative_error(reconstruct(), expected) < 1e-5
    assert {layer for layer, _, _ in calls} == set(watched)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for layer, x, out in calls:
            assert relative_error(out, layer(x)) < 1e-5


def test_a_norm_that_is_left_out():
    block, x = ResidualBlock(64, 64, 0.0), torch.randn(1, 64, 4, 4)
    block.norm1 = torch.nn.Identity()
    before = x.clone()
    expected = block(x)
    pack_weights(block)
    with torch.no_grad():
        assert relative_error(block(x), expected) < 1e-5
    assert torch.equal(x, before)


def test_a_generating_pair_is_packed_but_for_its_encoder():
    tokenizer = TiTok.from_pretrained("titok-digits")
    generator = MaskGIT.from_pretrained("maskgit-digits")
    pack_pair(tokenizer, generator)
    assert count(tokenizer.encoder) == 0 < count(tokenizer.decoder)
    assert count(generator) == len(packable(generator))
    model, images, _ = small_ibq()
    pack_pair(model, generator)
    assert count(model.encoder) == 0 < count(model.decoder)
    assert model.encode(images).shape == (3, 16, 16)


def step_and_pack_again(tokenizer, optimizer, images):
    """After the step the latents are those of the new weights, as of new copies of them."""
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        latents = tokenizer.latents(images)
        pack_weights(tokenizer)
        assert relative_error(tokenizer.latents(images), latents) < 1e-4


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_optimizer_ends_the_copies(tokenizer, compiled):
    """It leaves the version of a weight as it is."""
    images = digits("test")[0][:4]
    pack_weights(tokenizer.train())
    network = torch.compile(tokenizer, backend="eager") if compiled else tokenizer
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=0.1, fused=True)
    network(images)[0].square().mean().backward()
    step_and_pack_again(tokenizer, optimizer, images)
    loss = tokenizer(images)[0].square().mean()
    loss.backward()
    assert count(copy.deepcopy(tokenizer)) == 0 and pickle.dumps(tokenizer)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_step_with_gradients_of_ones_own_ends_the_copies(tokenizer, kind):
    """No backward pass has put them there."""
    images = digits("test")[0][:4]
    pack_weights(tokenizer.train())
    weights = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = kind(weights, lr=0.01, fused=True)
    gradients = torch.autograd.grad(
        tokenizer(images)[0].square().mean(), weights, allow_unused=True
    )
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    step_and_pack_again(tokenizer, optimizer, images)


def test_a_weight_that_is_thawed_is_not_trusted(tokenizer):
    images = digits("test")[0][:4]
    pack_weights(tokenizer.train().requires_grad_(False))
    optimizer = torch.optim.AdamW(tokenizer.requires_grad_(True).parameters(), lr=0.1, fused=True)
    tokenizer(images)[0].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        latents = tokenizer.latents(images)
        pack_weights(tokenizer)
        assert count(tokenizer) == 0  # while there are gradients
        optimizer.zero_grad()
        assert relative_error(tokenizer.latents(images), latents) < 1e-4
        pack_weights(tokenizer)
        assert count(tokenizer) and relative_error(tokenizer.latents(images), latents) < 1e-4


def test_a_change_in_inference_mode_is_seen(tokenizer):
    images = digits("test")[0][:4]
    with torch.inference_mode():
        model = pack_weights(TiTok.from_config(tokenizer.config).eval())
        model.load_state_dict(tokenizer.state_dict())
        latents = model.latents(images)
        assert relative_error(latents, tokenizer.latents(images)) < 1e-4


def test_threads_generate_at_once():
    config = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 64}
    model, errors = ARTransformer.from_config(config | {"class_num": 10}).eval(), []

    def work(label):
        try:
            for _ in range(5):  # of so many rows that the weights are packed
                model.generate([label] * 20, seed=label)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(label,)) for label in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for layer in packable(model):  # nothing keeps a copy alive
        hooks = layer.weight._post_accumulate_grad_hooks or {}
        assert len(hooks) == (layer._packed is not None)


def test_a_layer_with_a_hook_before_it_is_called():
    layer = PackableLinear(32, 32)
    layer.pack()
    x = torch.randn(4, 32)
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    assert not untouched(layer, PackableLinear)
    torch.testing.assert_close(gelu_of(layer, x), F.gelu(layer(x)))
