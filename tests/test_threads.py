"""The threads of the C++ ops: torch's own, others in a forked child; several callers at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from titok_fast import (
    attention,
    conv3x3,
    decode_attention,
    decode_linear,
    index_propagation,
    maskgit_step,
    nearest_code,
    pack_conv3x3,
    sample_token,
)
from titok_fast.ops import inspect

TASKS = Path("/proc/self/task")


@pytest.fixture(autouse=True)
def _two_threads(set_threads: Callable[[int], None]) -> None:
    set_threads(2)


@pytest.fixture(params=inspect.OPS)
def call(request: pytest.FixtureRequest) -> Callable[[], list[Tensor]]:
    """An op on inputs that two threads share; its outputs.

    attention's and index_propagation's rows are few, and there is no entropy, because torch's own
    operations wait forever in a forked child once torch or MKL shares them among threads.
    """
    z, codebook = torch.randn(40, 64), torch.randn(4096, 64)
    logits, ids = torch.randn(4, 2**18), torch.full((4, 64), 4096)
    masked = logits.view(4, 64, 4096)
    qkv = torch.randn(1, 100, 3, 4, 64)
    token, rotation = torch.randn(3, 192), torch.randn(300, 32, 2)
    keys, values = torch.randn(2, 3, 1, 300, 64)
    x, weight = torch.randn(4, 256), torch.randn(1000, 256)
    pixels = torch.randn(1, 16, 20, 20).contiguous(memory_format=torch.channels_last)
    kernels = torch.randn(32, 16, 3, 3)
    packed = pack_conv3x3(kernels)
    calls = {
        "nearest_code": lambda: [nearest_code(z, codebook)],
        "index_propagation": lambda: list(index_propagation(z, codebook, entropy=False)),
        "attention": lambda: [attention(qkv, backend="cpu")],
        "maskgit_step": lambda: list(
            maskgit_step(masked, ids, mask_id=4096, num_masked=20, seed=0, step=0)
        ),
        "sample_token": lambda: [sample_token(logits, seed=0, step=0, top_p=0.9)],
        "decode_attention": lambda: [decode_attention(token, keys, values, rotation, 290)],
        "decode_linear": lambda: [decode_linear(x, weight)],
        "conv3x3": lambda: [conv3x3(pixels, kernels, packed=packed)],
    }
    return calls[request.param]


def same(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, outputs, expected))


@pytest.mark.skipif(not TASKS.is_dir(), reason="this system does not list threads")
def test_are_those_of_torch(call):
    done, counts = threading.Event(), []

    def watch():
        while not done.is_set():
            counts.append(len(list(TASKS.iterdir())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        torch.ones(2**20).add_(1)
        call()
        time.sleep(0.2)  # until threads of a larger pool, of other tests, have ended
        before = len(list(TASKS.iterdir()))
        counts.clear()
        while len(counts) < 100:
            call()
    finally:
        done.set()
        watcher.join()
    assert max(counts) == before


def test_work_in_a_child_forked_before_the_first_call():
    program = """
import os, signal, torch
from titok_fast import nearest_code
torch.set_num_threads(2)
z, codebook = torch.ones(40, 64), torch.ones(4096, 64)
child = os.fork()
if child == 0:
    signal.alarm(60)
    nearest_code(z, codebook)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_work_in_a_forked_child(call):
    expected = call()
    torch.ones(2**20).add_(1)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends the child if it waits for threads that it does not have
        os._exit(0 if same(call(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_serve_several_callers_at_once(call):
    expected, wrong = call(), []

    def repeat():
        torch.set_num_threads(2)
        wrong.extend(i for i in range(10) if not same(call(), expected))

    callers = [threading.Thread(target=repeat) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
