"""ARTransformer's generate, whole, against the official sequence of operations in float32."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness, models
from bench.harness import Bench, Call
from titok_fast.models import ARSampling, ARTransformer
from titok_fast.models.autoregressive import Decoding
from titok_fast.models.cuda_graphs import capture

GUIDANCE, TEMPERATURE = 2.0, 1.1
QUICK = {"vocab_size": 256, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 64}


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    model: str
    task: str


def cases(device: str, quick: bool) -> list[Case]:
    """Whole images; and the step from a token to the next, of which a GPU has a graph."""
    rows = [(4, "ibq-ar-b", "generate")]
    if quick:
        rows = [(2, "quick", "generate"), (2, "quick", "step")]
    elif device == "cuda":
        rows = [(64, "ibq-ar-b", "generate"), (1, "ibq-ar-b", "step"), (1, "ibq-ar-xxl", "step")]
    return [
        Case(b=b, model=model, task=task, device=device, dtype=torch.float32)
        for b, model, task in rows
    ]


@lru_cache(maxsize=1)
def model_of(name: str, device: str) -> ARTransformer:
    """Generated weights: time does not depend on them."""
    model = models.generated(ARTransformer, QUICK if name == "quick" else name, device)
    nn.init.normal_(model.head.weight, std=0.02)  # zero at first, when all tokens would be alike
    return model


def inputs(case: Case) -> tuple[Tensor]:
    return (models.labels_of(model_of(case.model, case.device), case.b, case.device),)


def work(case: Case) -> tuple[int, int]:
    """Of the linear layers, with guidance; each step reads their bfloat16 weights once."""
    model = model_of(case.model, case.device)
    layers = [layer for name, layer in model.named_modules() if "ada_lin" not in name]
    size = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    steps = model.num_tokens if case.task == "generate" else 1
    return 4 * case.b * steps * size, 2 * steps * size


class Official:
    """SEED-Voken's loop: AdaLN in every step, attention to every position of a cache by a mask,
    copies of keys and values, softmax and multinomial."""

    def __init__(self, model: ARTransformer, labels: Tensor) -> None:
        self.model, self.batch, weight = model, len(labels), model.head.weight
        self.labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        heads, length, width = model.kv_shape
        length = -(-length // 8) * 8
        shape = (2 * len(labels), heads, length, width)
        self.caches = [[weight.new_zeros(shape) for _ in "kv"] for _ in model.blocks]
        triangle = torch.ones(length, length, dtype=torch.bool, device=labels.device).tril()
        self.mask = triangle.repeat(2 * len(labels), 1, 1)
        self.rotation = model.rotation()[None, :, None]  # [1, S, 1, Dh / 2, 2]

    def norm(self, layer: nn.RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * layer.weight

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        pairs, turn = x.reshape(*x.shape[:-1], -1, 2), self.rotation[:, position]
        real = pairs[..., 0] * turn[..., 0] - pairs[..., 1] * turn[..., 1]
        imaginary = pairs[..., 1] * turn[..., 0] + pairs[..., 0] * turn[..., 1]
        return torch.stack([real, imaginary], dim=-1).flatten(3).to(x.dtype)

    def attend(self, i: int, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        layer = self.model.blocks[i].attention
        q, k, v = layer.wqkv(x).unflatten(2, (3, layer.heads[0], -1)).unbind(2)
        q, k = self.rotate(q, position), self.rotate(k, position)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        keys, values = self.caches[i]
        keys[:, :, position], values[:, :, position] = k, v
        keys, values = keys.repeat_interleave(1, dim=1), values.repeat_interleave(1, dim=1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return layer.wo(out.transpose(1, 2).contiguous().flatten(2))

    @torch.no_grad()
    def step(self, tokens: Tensor | None, position: Tensor) -> Tensor:
        model = self.model
        condition = model.class_emb["embedding_table"](self.labels)[:, None]
        x = condition if tokens is None else model.tok_emb(tokens)
        mask = self.mask[:, None, position]
        for i, block in enumerate(model.blocks):
            gate1, gate2, scale1, scale2, shift1, shift2 = block.ada_lin(condition).chunk(6, -1)
            h = self.norm(block.attention_norm, x) * (scale1 + 1) + shift1
            x = x + self.attend(i, h, position, mask) * gate1
            h = self.norm(block.ffn_norm, x) * (scale2 + 1) + shift2
            x = x + block.feed_forward(h) * gate2
        scale, shift = model.head_nm.ada_lin(condition).chunk(2, -1)
        return model.head(self.norm(model.head_nm.rmsnorm, x) * (scale + 1) + shift)

    def draw(self, logits: Tensor) -> Tensor:
        cond, uncond = logits.split(self.batch)
        logits = (uncond + (cond - uncond) * GUIDANCE)[:, -1] / TEMPERATURE
        return torch.multinomial(logits.softmax(-1), num_samples=1)

    def generate(self) -> Tensor:
        drawn, tokens = [], None
        for n in range(self.model.num_tokens):
            logits = self.step(tokens, torch.tensor([n], device=self.labels.device))
            drawn.append(self.draw(logits))
            tokens = torch.cat([drawn[-1], drawn[-1]])
        return torch.cat(drawn, dim=1)


def middle_of(model: ARTransformer, device: str | torch.device) -> Tensor:
    """A position [1] whose step takes about the mean time."""
    return torch.tensor([model.num_tokens // 2], device=device)


def prepare_official(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        model = copy.deepcopy(model_of(case.model, case.device)).to(dtype)
        if case.task == "generate":
            return lambda: Official(model, labels).generate()
        loop, position = Official(model, labels), middle_of(model, case.device)
        tokens = labels.repeat(2)[:, None]
        return lambda: loop.draw(loop.step(tokens, position))

    return prepare


def step_of(model: ARTransformer, labels: Tensor, sampling: ARSampling) -> Call:
    decoding = Decoding(model, len(labels), sampling, "auto")
    with torch.no_grad():
        decoding.start(labels, labels.new_zeros(len(labels), 0), torch.zeros_like(labels[0]), None)
    position, step = middle_of(model, labels.device), torch.no_grad(decoding.step)
    if labels.is_cuda:
        step = capture(decoding.step, position)
    return lambda: step(position)


def prepare_ours(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        model = copy.deepcopy(model_of(case.model, case.device)).cast(dtype)
        options = {"guidance_scale": GUIDANCE, "temperature": TEMPERATURE}
        if case.task == "step":
            return step_of(model, labels, ARSampling(**options))
        return models.generating(model, labels, **options)

    return prepare


def check(case: Case, output: Tensor) -> tuple[int, int]:
    return models.outside(model_of(case.model, case.device), output)


BENCH = Bench(
    op="autoregressive",
    cases=cases,
    providers=models.providers(prepare_ours, prepare_official),
    inputs=inputs,
    work=work,
    check=check,
)


def test_autoregressive(measure, case, provider):
    measure(BENCH, case, provider)
