"""IBQ's autoregressive transformer against the official implementation, and how it samples."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import titok_fast
from tests.conformance import expected, manifest, uniform, weights
from tests.processes import in_two_processes
from titok_fast.models import ARTransformer, autoregressive
from titok_fast.models.autoregressive import ARSampling, Decoding
from titok_fast.models.cuda_graphs import is_recording, recording
from titok_fast.testing import relative_error

LABELS = torch.tensor([3, 7])
CONFIG = {"vocab_size": 50, "block_size": 9, "n_layer": 2, "n_head": 2, "n_embd": 32}


class Negated(nn.Module):
    """The negative of a layer, whose parameters it still shows, as adapters do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        if name in ("weight", "eps"):
            return getattr(self.layer, name)
        return super().__getattr__(name)

    def forward(self, x):
        return -self.layer(x)


@pytest.fixture(scope="module")
def tiny():
    described = manifest("ibq_ar_tiny")
    model = ARTransformer.from_config(described["config"]).eval()
    model.load_state_dict(weights(described["parameters"]), strict=True)
    return model


@pytest.fixture(scope="module")
def ids(tiny):
    shape = [2, tiny.num_tokens]
    return torch.from_numpy(np.floor(uniform("ids", shape) * tiny.codebook_size)).long()


def test_what_surrounds_a_capture_does_not_matter(tiny, monkeypatch):
    """Autocast and inference mode end before the function is called; no GPU here, so no graph."""
    monkeypatch.setattr(autoregressive, "capture", lambda function, *examples: function)
    labels, seed, numbers = torch.zeros(20, dtype=torch.int64), torch.tensor(3), torch.arange(20)
    options = {"guidance_scale": 2.0, "temperature": 1.0}
    expected = tiny.generate(labels, seed=3, **options)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        run = tiny.capture(20, **options)
    assert torch.equal(run(labels, seed, numbers), expected)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), recording(labels.device):
        assert is_recording(labels) and not torch.is_autocast_enabled("cpu")
        assert not labels.clone().is_inference()
    assert not is_recording(labels)


def test_logits_conform(tiny, ids):
    wanted = expected("ibq_ar_tiny")["logits"]
    logits = tiny.logits(ids[:, :-1], LABELS).detach()
    assert logits.shape == (2, 16, 256)
    assert relative_error(logits[:, ::3, :: 256 // 64], wanted) < 2e-4


@pytest.mark.parametrize(("case", "scale"), [("greedy_cfg1p5", 1.5), ("greedy_cfg2", 2.0)])
def test_greedy_tokens_conform(tiny, case, scale):
    tokens = tiny.generate(LABELS, guidance_scale=scale, temperature=0.0)
    assert torch.equal(tokens, expected("ibq_ar_tiny")[case].long())


def test_releases_have_the_official_parameters():
    described = manifest("ibq_ar_b")
    with torch.device("meta"):
        model = ARTransformer.from_config("ibq-ar-b")
    assert {name: list(x.shape) for name, x in model.state_dict().items()} == (
        described["parameters"]
    )
    assert {key: model.config[key] for key in described["config"]} == described["config"]
    assert model.sampling == ARSampling(2.25, 1.10)


@pytest.mark.parametrize(
    ("name", "millions"), [("b", 343), ("l", 650), ("xl", 1100), ("xxl", 2100)]
)
def test_sizes_of_the_paper(name, millions):
    with torch.device("meta"):
        model = ARTransformer.from_config(f"ibq-ar-{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("kind", ["hook", "replacement"])
@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attention.wqkv",
        "blocks.1.attention.wo",
        "blocks.0.attention_norm",
        "blocks.1.feed_forward.w1",
        "blocks.0.feed_forward.w3",
        "blocks.0.feed_forward.w2",
        "head_nm.rmsnorm",
        "head",
    ],
)
def test_decoding_calls_a_layer_that_is_watched_or_replaced(name, kind):
    """One whose output is negated draws the tokens of one whose weight is."""
    model = ARTransformer.from_config(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter == 1))
    negated = copy.deepcopy(model)
    with torch.no_grad():
        negated.get_submodule(name).weight.neg_()
    plain, expected = (m.generate(LABELS, temperature=0.0) for m in (model, negated))
    assert not torch.equal(plain, expected)
    layer = model.get_submodule(name)
    if kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: -output)
    else:
        model.set_submodule(name, Negated(layer))
    assert torch.equal(model.generate(LABELS, temperature=0.0), expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_decoding_with_a_cache_agrees_with_the_teacher_forced_pass(tiny, scale):
    labels = torch.tensor([3, 7, 0, tiny.num_classes])
    tokens = tiny.generate(labels, guidance_scale=scale, temperature=1.0, seed=5)
    given = tokens[:, :-1]
    cond = tiny.logits(given, labels)
    uncond = tiny.logits(given, torch.full_like(labels, tiny.num_classes))
    best = (uncond + scale * (cond - uncond)).argmax(-1)
    for position in (0, 1, 2, 7, 15):
        chosen = tiny.generate(
            labels,
            guidance_scale=scale,
            temperature=0.0,
            prefix=tokens[:, :position],
            num_tokens=position + 1,
        )
        assert torch.equal(chosen[:, :position], tokens[:, :position])
        assert torch.equal(chosen[:, position], best[:, position])


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("batch", [2, 17])
def test_a_prefix_goes_on_to_the_same_image(tiny, scale, batch):
    labels, options = torch.arange(batch) % 11, {"guidance_scale": scale, "seed": 3}
    whole = tiny.generate(labels, **options)
    for count in (1, 5, 15, 16):
        assert torch.equal(tiny.generate(labels, prefix=whole[:, :count], **options), whole)
    assert torch.equal(tiny.generate(labels, num_tokens=1, **options), whole[:, :1])
    other = (whole[:, :5] + 1) % 256  # which the rest depends on
    assert not torch.equal(tiny.generate(labels, prefix=other, **options)[:, 5:], whole[:, 5:])


def test_no_work_without_a_token_to_draw(tiny, monkeypatch):
    prefix = torch.randint(256, (len(LABELS), 5))
    monkeypatch.setattr(ARTransformer, "network", lambda *args, **options: pytest.fail("ran"))
    tokens = tiny.generate(LABELS, prefix=prefix, num_tokens=5)
    assert torch.equal(tokens, prefix) and tokens.data_ptr() != prefix.data_ptr()
    assert tiny.generate(LABELS, num_tokens=0).shape == (len(LABELS), 0)


def test_tokens_do_not_depend_on_the_batch(tiny):
    labels = torch.tensor([3, 7, 3, 1, 0])
    whole = tiny.generate(labels, guidance_scale=1.5, seed=11)
    assert not torch.equal(whole[0], whole[2])
    for i, label in enumerate(labels.tolist()):
        alone = tiny.generate([label], guidance_scale=1.5, seed=11, image_ids=torch.tensor([i]))
        assert torch.equal(alone[0], whole[i])
    assert not torch.equal(tiny.generate(labels, guidance_scale=1.5, seed=12), whole)


@pytest.mark.parametrize(("scale", "batch"), [(2.0, 9), (1.0, 17), (2.0, 20)])
def test_more_rows_than_a_fused_layer_takes_give_the_same_tokens(tiny, scale, batch):
    labels = torch.arange(batch) % 11
    options = {"guidance_scale": scale, "temperature": 0.0}
    whole = tiny.generate(labels, **options)
    assert len(whole.unique(dim=0)) == min(batch, 11)
    parts = [tiny.generate(part, **options) for part in labels.split(8)]
    assert torch.equal(whole, torch.cat(parts))


def test_top_k_of_one_is_greedy(tiny):
    greedy = tiny.generate(LABELS, guidance_scale=2.0, temperature=0.0)
    assert torch.equal(tiny.generate(LABELS, guidance_scale=2.0, temperature=1.3, top_k=1), greedy)
    assert torch.equal(
        tiny.generate(LABELS, guidance_scale=2.0, temperature=1.3, top_p=0.0), greedy
    )


def test_a_decoding_can_start_again(tiny):
    """As the replays of a CUDA graph do, in the same tensors and with the seed in one."""
    whole = tiny.generate(LABELS, guidance_scale=2.0, temperature=1.0, seed=4)
    decoding = Decoding(tiny, 2, ARSampling(2.0), "auto")
    nothing = LABELS.new_zeros(2, 0)
    with torch.no_grad():
        for seed in (9, 4):  # the second start must overwrite the first
            decoding.start(
                LABELS.flip(0) if seed == 9 else LABELS, nothing, torch.tensor(seed), None
            )
            for position in torch.arange(tiny.num_tokens).split(1):
                tokens = decoding.step(position)
    assert torch.equal(tokens[:, 1:], whole)


@pytest.mark.gpu
def test_capture(tiny):
    model = ARTransformer.from_config(tiny.config).eval()
    model.load_state_dict(tiny.state_dict())
    model.cuda()
    run = model.capture(2, guidance_scale=2.0, temperature=1.0)
    labels, numbers = LABELS.cuda(), torch.arange(2).cuda()
    for seed in (4, 9):
        tokens = run(labels, torch.tensor(seed).cuda(), numbers)
        wanted = model.generate(labels, guidance_scale=2.0, temperature=1.0, seed=seed)
        assert torch.equal(tokens, wanted)


def test_sixteen_bits(tiny, ids, tmp_path):
    tiny.save_pretrained(tmp_path)
    half = ARTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = half.logits(ids[:, :-1], LABELS)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits.float(), tiny.logits(ids[:, :-1], LABELS)) < 0.05
    for batch in (8, 17):
        labels = torch.arange(batch) % 11
        tokens = half.generate(labels, guidance_scale=1.0, temperature=0.0)
        logits = half.logits(tokens[:, :-1], labels).detach().float()
        assert float((tokens == logits.argmax(-1)).float().mean()) > 0.95  # measured: 1
        chosen = logits.gather(2, tokens[..., None])[..., 0]
        assert float((logits.amax(-1) - chosen).max()) < 0.1  # of logits up to 4, that is 6 ulp
    guided = half.generate(LABELS, guidance_scale=2.0, seed=1)
    assert guided.shape == (2, 16)
    assert 0 <= int(guided.min()) <= int(guided.max()) < 256
    again = ARTransformer.from_pretrained(tmp_path)
    assert torch.equal(again.generate(LABELS, seed=1), tiny.generate(LABELS, seed=1))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_float64(tiny, ids, scale):
    double = copy.deepcopy(tiny).cast(torch.float64)
    logits = double.logits(ids[:, :-1], LABELS)
    assert logits.dtype == torch.float64
    assert relative_error(logits, tiny.logits(ids[:, :-1], LABELS)) < 1e-5
    for options in ({}, {"prefix": ids[:, :5]}):
        options |= {"guidance_scale": scale, "seed": 1}
        assert torch.equal(double.generate(LABELS, **options), tiny.generate(LABELS, **options))


def test_reads_its_part_of_a_checkpoint(tiny, tmp_path):
    state = {f"transformer.{name}": tensor for name, tensor in tiny.state_dict().items()}
    state["transformer.blocks.0.attention.kv_cache.k_cache"] = torch.zeros(1, 2)
    state["first_stage_model.encoder.conv_in.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "any.ckpt")
    again = ARTransformer.from_pretrained(tmp_path / "any.ckpt", config=tiny.config)
    assert again.state_dict().keys() == tiny.state_dict().keys()
    assert all(torch.equal(x, tiny.state_dict()[name]) for name, x in again.state_dict().items())
    del state["transformer.head.weight"]
    torch.save({"state_dict": state}, tmp_path / "any.ckpt")
    with pytest.raises(ValueError, match=r"missing head\.weight"):
        ARTransformer.from_pretrained(tmp_path / "any.ckpt", config=tiny.config)


def test_trains():
    torch.manual_seed(0)
    model = ARTransformer.from_config(CONFIG | {"class_num": 3, "drop_path_rate": 0.1})
    tokens, labels = torch.randint(50, (4, 9)), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1], labels).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 2:  # the head starts at zero, so that nothing below it has a gradient at first
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(np.log(50), rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_fewer_heads_of_keys_and_values(kv_heads, scale):
    """With open gates and large weights, so that every block matters."""
    torch.manual_seed(0)
    open_gates = {"alng": 1.0, "initalizer_range": 0.3, "multiple_of": 16}
    model = ARTransformer.from_config(CONFIG | open_gates | {"n_head": 4, "n_kv_head": kv_heads})
    nn.init.normal_(model.eval().head.weight)
    labels = torch.arange(6)
    tokens = model.generate(labels, temperature=0.0, guidance_scale=scale)
    assert len(tokens.unique()) > 20
    cond, uncond = (
        model.logits(tokens[:, :-1], of) for of in (labels, torch.full_like(labels, 1000))
    )
    assert torch.equal((uncond + scale * (cond - uncond)).argmax(-1), tokens)
    options = {"temperature": 0.0, "guidance_scale": scale, "prefix": tokens[:, :4]}
    assert torch.equal(model.generate(labels, **options), tokens)


def test_compiled():
    torch.manual_seed(0)
    model = ARTransformer.from_config(CONFIG | {"n_layer": 1}).eval()
    nn.init.normal_(model.head.weight)
    tokens = model.generate([1, 2], guidance_scale=2.0)
    logits = model.logits(tokens, LABELS[:2] % 2).detach()
    titok_fast.compile(model)
    assert torch.equal(model.generate([1, 2], guidance_scale=2.0, prefix=tokens[:, :4]), tokens)
    assert relative_error(model.logits(tokens, LABELS[:2] % 2), logits) < 1e-6


def test_one_graph_for_every_length(tiny, ids):
    network = torch.compile(tiny, backend="eager", dynamic=True, fullgraph=True)
    for count in (4, 7):
        assert relative_error(network(ids[:, :count], LABELS), tiny(ids[:, :count], LABELS)) < 1e-6


def test_gradients_of_each_image(tiny, ids):
    def loss(parameters, ids, label):
        given = ids[None, :-1], label[None]
        logits = torch.func.functional_call(tiny, parameters, given)
        return F.cross_entropy(logits.flatten(0, 1), ids)

    parameters = {name: parameter.detach() for name, parameter in tiny.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, ids, LABELS)
    for i in range(2):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        expected = torch.autograd.grad(loss(leaves, ids[i], LABELS[i]), list(leaves.values()))
        for name, own in zip(leaves, expected, strict=True):
            torch.testing.assert_close(grads[name][i], own, rtol=1e-4, atol=1e-6)


class Elsewhere(torch.Tensor):
    """A tensor whose numbers are in another, as those of a quantised weight are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace == "titok_fast":
            raise NotImplementedError(str(function))
        plain = torch.utils._pytree.tree_map_only(cls, lambda x: x.inner, args)
        result = function(*plain, **(kwargs or {}))
        return cls(result) if function is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("count", [2, 20])
def test_weights_of_another_kind(tiny, count):
    labels = torch.arange(count) % 2
    expected = tiny.generate(labels, temperature=0.0, guidance_scale=1.0)
    model = copy.deepcopy(tiny)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = Elsewhere(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
            assert type(module.weight) is Elsewhere
    assert torch.equal(model.generate(labels, temperature=0.0, guidance_scale=1.0), expected)


def _sharded(rank, folder):
    state, config, ids = torch.load(folder / "in.pt")
    model = ARTransformer.from_config(config).eval()
    model.load_state_dict(state)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model(ids, LABELS).square().sum().backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.save(grads, folder / f"{rank}.pt")


def test_blocks_are_sharded_apart(tiny, ids, tmp_path):
    torch.save((tiny.state_dict(), tiny.config, ids), tmp_path / "in.pt")
    in_two_processes(_sharded, tmp_path)
    tiny.zero_grad()
    tiny(ids, LABELS).square().sum().backward()
    grads = torch.load(tmp_path / "1.pt")
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-5)
    tiny.zero_grad()


@pytest.mark.parametrize("count", [2, 20])
def test_neither_autocast_nor_training_mode_changes_tokens(count):
    torch.manual_seed(0)
    model = ARTransformer.from_config(CONFIG | {"ffn_dropout_p": 0.5, "drop_path_rate": 0.5}).eval()
    nn.init.normal_(model.head.weight)
    for block in model.blocks:
        nn.init.normal_(block.ada_lin[1].bias)  # open gates
    labels = torch.arange(count)
    tokens = model.generate(labels, seed=3)
    model.train()
    model.blocks[0].eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(labels, seed=3), tokens)
        assert torch.equal(model.generate(labels, seed=3, prefix=tokens[:, :5]), tokens)
    assert model.training and model.blocks[1].ffn_norm.training
    assert not model.blocks[0].training


def test_the_official_training_file(tiny):
    """SEED-Voken's, whose network's arguments are in a section."""
    network = {"target": "src.IBQ.modules.transformer.llama.GPT", "params": tiny.config}
    config = {"model": {"init_args": {"transformer_config": network, "learning_rate": 3e-4}}}
    assert ARTransformer.from_config(config).config == tiny.config


def test_no_images(tiny):
    assert tiny.generate(LABELS[:0]).shape == (0, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.logits(torch.zeros(1, 17).long(), LABELS[:1]), ValueError, "T up to 16"),
        (lambda m: m.logits(torch.full((1, 1), 256), LABELS[:1]), ValueError, r"\[0, 255\]"),
        (lambda m: m.logits(torch.zeros(2, 1).long(), LABELS[:1]), ValueError, r"labels: got sha"),
        (lambda m: m.logits(torch.zeros(1, 1), LABELS[:1]), TypeError, "tokens: got dtype"),
        (lambda m: m.generate([11]), ValueError, r"labels: got labels in \[11, 11\], allowed is"),
        (lambda m: m.generate([1.0]), TypeError, "labels: got dtype torch.float32"),
        (lambda m: m.generate(["1"]), TypeError, r"labels: got \['1'\], allowed is integers"),
        (lambda m: m.generate([1, None]), TypeError, r"labels: got \[1, None\], allowed is integ"),
        (
            lambda m: m.generate([2**70]),
            TypeError,
            r"labels: got \[1180591620717411303424\], ",
        ),
        (
            lambda m: m.generate([1], prefix=torch.zeros(1, m.num_tokens + 1).long()),
            ValueError,
            r"prefix: got shape \[1, \d+\], allowed is \[1, P\] with P up to",
        ),
        (lambda m: m.generate([1], num_tokens=17), ValueError, "num_tokens: got 17, allowed is an"),
        (lambda m: m.generate([1], prefix=LABELS[None], num_tokens=1), ValueError, "from 2 to 16"),
        (lambda m: m.generate([1], num_tokens=2.5), ValueError, "num_tokens: got 2.5, allowed is"),
        (lambda m: m.generate([1, 2], prefix=LABELS[None]), ValueError, r"prefix: got shape \[1"),
        (lambda m: m.generate([1], temperature=-1.0), ValueError, "temperature: got -1.0, allowed"),
        (lambda m: m.generate([1], top_k=-1), ValueError, "top_k: got -1, allowed"),
        (lambda m: m.generate([1], top_p=1.5), ValueError, "top_p: got 1.5, allowed"),
        (lambda m: m.capture(1, steps=2), ValueError, "steps: got 2, but options of ARTransform"),
        (lambda m: m.capture(1), RuntimeError, "allowed is a CUDA device"),
        (lambda m: ARTransformer.from_config({"n_layer": 1}), ValueError, "lacks vocab_size, bl"),
        (lambda m: ARTransformer.from_config(CONFIG | {"block_size": 8}), ValueError, "a square"),
        (lambda m: ARTransformer.from_config(CONFIG | {"n_head": 3}), ValueError, "multiple of 4"),
        (
            lambda m: ARTransformer.from_config(CONFIG | {"n_head": 0}),
            ValueError,
            "n_head is 0, a",
        ),
        (lambda m: ARTransformer.from_config(CONFIG | {"n_embd": "8"}), ValueError, "embd is '8'"),
        (lambda m: ARTransformer.from_config(CONFIG | {"multiple_of": 0}), ValueError, "of is 0"),
        (lambda m: ARTransformer.from_config(CONFIG | {"n_kv_head": 3}), ValueError, "divisor"),
        (lambda m: ARTransformer.from_config(CONFIG | {"shared_aln": True}), ValueError, "shared"),
    ],
)
def test_bad_input(tiny, call, error, message):
    with pytest.raises(error, match=message) as raised:
        call(tiny)
    assert "\n" not in str(raised.value)


HOOKS = {
    "attention": (lambda m: m.blocks[0].attention, lambda module, given, out: 0 * out),
    "block": (lambda m: m.blocks[1], lambda module, given, out: given[0]),
    "feed_forward": (lambda m: m.blocks[0].feed_forward, lambda module, given, out: 0 * out),
    "head_nm": (lambda m: m.head_nm, lambda module, given, out: -out),
    "ffn_dropout": (
        lambda m: m.blocks[0].feed_forward.ffn_dropout, lambda module, given, out: -out
    ),
    "token_drop": (lambda m: m.token_drop, lambda module, given, out: -out),
    "wo": (lambda m: m.blocks[0].attention.wo, lambda module, given, out: 0 * out),
    "head": (lambda m: m.head, lambda module, given, out: -out),
}  # fmt: skip


class NegatedPart(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *arguments):
        return -self.layer(*arguments)


@pytest.mark.parametrize("hook", [*HOOKS, "replaced"])
def test_hooks_and_other_modules_count_in_generation(tiny, hook):
    model = copy.deepcopy(tiny)
    if hook == "replaced":
        model.blocks[0].attention = NegatedPart(model.blocks[0].attention)
    else:
        module, function = HOOKS[hook]
        module(model).register_forward_hook(function)
    tokens = torch.zeros(2, 0, dtype=torch.int64)
    with torch.no_grad():
        while tokens.shape[1] < model.num_tokens:
            last = model.logits(tokens, LABELS)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, last], dim=1)
    options = {"temperature": 0.0, "guidance_scale": 1.0}
    assert torch.equal(model.generate(LABELS, **options), tokens)
    assert torch.equal(model.generate(LABELS, prefix=tokens[:, :5], **options), tokens)
    assert not torch.equal(tiny.generate(LABELS, **options), tokens)
    assert torch.equal(
        model.generate(LABELS, temperature=0.0, guidance_scale=2.0, num_tokens=3),
        model.generate(LABELS, temperature=0.0, guidance_scale=2.0)[:, :3],
    )


def test_another_default_dtype_changes_nothing(tiny):
    expected = tiny.generate(LABELS, seed=3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(tiny.generate(LABELS, seed=3), expected)
    finally:
        torch.set_default_dtype(torch.float32)
