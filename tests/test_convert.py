"""Checkpoints are read whoever wrote them, and whatever they name is never run."""

import collections
import contextlib
import copyreg
import importlib
import io
import json
import pickle
import pickletools
import struct
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from tests.conformance import manifest, weights
from titok_fast.models import IBQTokenizer, TiTok, pretrained
from titok_fast.models.convert import read_checkpoint, select

TINY = manifest("ibq_tokenizer_tiny")
FORMATS = [pytest.param(True, id="zip"), pytest.param(False, id="legacy")]


@pytest.fixture(scope="module")
def state():
    return weights(TINY["parameters"])


def lightning(state, prefix="", **others):
    """A Lightning checkpoint with parts that are not the model's."""
    loss = {"loss.discriminator.main.0.weight": torch.ones(3, 3), "loss.logvar": torch.zeros(())}
    return {
        "epoch": 3,
        "state_dict": {prefix + name: tensor for name, tensor in state.items()} | loss,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(5)}}}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.ones(())}},
        **others,
    }


def averages(state):
    """What SEED-Voken's LitEma registers, for parameters of the model and of its loss."""
    copies = {name: tensor + 1 for name, tensor in state.items()}
    copies["loss.discriminator.main.0.weight"] = torch.ones(3, 3)
    return {
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(-1, dtype=torch.int),
        **{f"model_ema.{name.replace('.', '')}": tensor for name, tensor in copies.items()},
    }


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("zipped", FORMATS)
def test_reads_what_torch_saves(tmp_path, zipped):
    shared = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": shared,
        "part": shared[1:3, ::2],
        "transposed": shared.t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        **{
            str(dtype): torch.tensor([[0, 1], [1, 0]]).to(dtype)
            for dtype in (
                *(torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
                *(torch.uint8, torch.int8, torch.int16, torch.int32),
            )
        },
    }
    for name, contents in (("flat.bin", state), ("lightning.ckpt", {"state_dict": state})):
        torch.save(contents, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert_equal(read_checkpoint(tmp_path / name), state)
    one = read_checkpoint(tmp_path / "flat.bin", lambda names: {"renamed": "part"})
    assert_equal(one, {"renamed": state["part"]})
    assert one["renamed"].untyped_storage().nbytes() == 6 * 4


def test_a_state_dict_keeps_its_metadata_out(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert isinstance(module.state_dict(), collections.OrderedDict)
    torch.save(module.state_dict(), tmp_path / "m.pt")
    assert_equal(read_checkpoint(tmp_path / "m.pt"), dict(module.state_dict()))


@pytest.mark.parametrize("zipped", FORMATS)
def test_hyper_parameters_of_absent_packages_do_no_harm(tmp_path, monkeypatch, zipped):
    """Classes that pickle by state, by call, as dict, list and set, as omegaconf and others do."""
    source = """
import collections, enum
class Config(dict): pass
class Node:
    def __init__(self, *given, **options): self.given, self.options = given, options
class Reduced(Node):
    def __reduce__(self): return (Reduced, (1, "two"), {"state": Node()}, iter([3]), iter([(4, 5)]))
    def append(self, item): pass
    def extend(self, items): pass
    def __setitem__(self, key, value): pass
class Keyed(Node):
    def __getnewargs_ex__(self): return (1,), {"key": 2}
    def __new__(cls, *given, **options): return object.__new__(cls)
class Slotted:
    __slots__ = ("a",)
class Many(list): pass
class Few(set): pass
class Kind(enum.Enum): ONE = 1
def make(*given): return Node()
"""
    module = types.ModuleType("absent_package")
    monkeypatch.setitem(sys.modules, "absent_package", module)
    exec(source, module.__dict__)
    slotted = module.Slotted()
    slotted.a = 1
    parameters = {
        "config": module.Config(lr=1e-4, nodes=[module.Node(1), module.Reduced()]),
        "others": [module.Keyed(), slotted, module.Many([1, 2]), module.Few({1}), module.Kind.ONE],
        "counts": collections.Counter("ab"),
        "default": collections.defaultdict(list, a=[1]),
        "numpy": torch.ones(2).numpy().mean(),
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
    }
    state = {"a.weight": torch.randn(2, 3)}
    path = tmp_path / "x.ckpt"
    contents = {"hyper_parameters": parameters, "state_dict": state, module.Node(): "key"}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "absent_package")
    imported = []
    monkeypatch.setattr(importlib, "import_module", lambda name, *_: imported.append(name))
    assert_equal(read_checkpoint(path), state)
    assert imported == []


class Call:
    """Unpickles by a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def assembled(*parts):
    """A pickle from opcodes and, as bytes objects, pickled constants."""
    return b"\x80\x02" + b"".join(parts) + b"."


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def write_zip(path, data, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        for member, contents in members.items():
            archive.writestr(f"archive/{member.replace('_', '/')}", contents)
    return path


STORAGE = (
    b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x02tQ"
)


REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def tensor_call(function=REBUILD, storage=STORAGE, shape=b"K\x02\x85"):
    """The opcodes of a float32 tensor [2]."""
    return function + b"(" + storage + b"K\x00" + shape + b"K\x01\x85\x89}tR"


def entry(value):
    """The opcodes of {"w": value}."""
    return b"}" + text("w") + value + b"s"


def test_the_assembled_pickle_is_a_checkpoint(tmp_path):
    path = write_zip(tmp_path / "t.ckpt", assembled(entry(tensor_call())), data_0=b"\0\0\x80?" * 2)
    assert torch.load(path, weights_only=False)["w"].tolist() == [1, 1]
    assert read_checkpoint(path)["w"].tolist() == [1, 1]


def trap(ran, monkeypatch):
    """A module whose functions say that they ran; also what pickles like to call."""
    module = types.ModuleType("trap_module")
    module.call = lambda *arguments, **_: ran.append(arguments)

    class Trap:
        def __new__(cls, *arguments):
            ran.append(("new", arguments))
            return object.__new__(cls)

        def __setstate__(self, state):
            ran.append(("state", state))

        def __setitem__(self, key, value):
            ran.append(("item", key))

    module.Trap = Trap
    monkeypatch.setitem(sys.modules, "trap_module", module)
    return module


CALL = name("trap_module", "call")
TRAP = name("trap_module", "Trap")
HOSTILE = {
    "call in place of the file": CALL + b")R",
    "call in place of a tensor": entry(CALL + b"K\x01\x85R"),
    "call in place of the rebuilding function": entry(tensor_call(function=CALL)),
    "call in the arguments of a tensor": entry(tensor_call(shape=CALL + b")R")),
    "call in place of a storage": entry(tensor_call(storage=CALL + b")R")),
    "call as an argument of a parameter": entry(
        name("torch._utils", "_rebuild_parameter") + b"(" + CALL + b")R\x89}tR"
    ),
    "call as persistent id": entry(tensor_call(storage=CALL + b")RQ")),
    "call in a persistent id": entry(
        tensor_call(
            storage=b"(" + text("storage") + CALL + b")R" + text("0") + text("cpu") + b"K\x02tQ"
        )
    ),
    "type of a storage": entry(
        tensor_call(storage=b"(" + text("storage") + TRAP + text("0") + text("cpu") + b"K\x02tQ")
    ),
    "type of a persistent id": entry(
        tensor_call(storage=b"(" + text("module") + TRAP + text("a.py") + text("code") + b"tQ")
    ),
    "new object, state and items": entry(TRAP + b")\x81}b" + text("k") + b"K\x01s"),
    "new object with keywords": b"\x80\x04" + entry(TRAP + b")}\x92"),
    "instance": entry(b"(itrap_module\nTrap\n"),
    "object": entry(b"(" + TRAP + b"o"),
    "called result of a getattr": entry(
        name("builtins", "getattr") + CALL + text("__call__") + b"\x86R" + b")R"
    ),
    "eval": name("builtins", "eval") + text("__import__('trap_module').call(1)") + b"\x85R",
    "exec": name("builtins", "exec") + text("import trap_module; trap_module.call(1)") + b"\x85R",
    "dotted name": b"\x80\x04" + text("trap_module") + text("call.__call__") + b"\x93)R",
    "attribute of an ordered dict": entry(
        name("collections", "OrderedDict") + b")R}" + text("items") + CALL + b"sb"
    ),
    "attribute of a class": entry(
        tensor_call() + b"0" + REBUILD
        + b"N}" + text("load") + CALL + b"s\x86b"
    ),
    "attribute of the ordered dict's class": entry(
        name("collections", "OrderedDict") + b"N}" + text("get") + CALL + b"s\x86b"
    ),
    "attribute of a dtype": entry(
        name("torch", "FloatStorage") + b"N}" + text("itemsize") + CALL + b"s\x86b"
    ),
    "attribute of a storage": entry(
        tensor_call(storage=STORAGE + b"N}" + text("dtype") + CALL + b"s\x86b")
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch, attack):
    ran = []
    trap(ran, monkeypatch)
    data = assembled(HOSTILE[attack])
    pickletools.dis(data, io.StringIO())  # well formed: nothing is refused for a typing error
    path = write_zip(tmp_path / "h.ckpt", data, data_0=bytes(8))
    with pytest.raises(ValueError, match="not a readable weight file") as caught:
        read_checkpoint(path)
    assert ran == []
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    # Nothing of the attack outlives it.
    whole = write_zip(tmp_path / "t.ckpt", assembled(entry(tensor_call())), data_0=bytes(8))
    assert read_checkpoint(whole)["w"].tolist() == [0, 0]
    assert ran == []
    if not attack.startswith(("attribute", "type")):
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert ran  # it is an attack


def test_registered_extensions_and_far_memo_indices_are_refused(tmp_path, monkeypatch):
    ran = []
    trap(ran, monkeypatch)
    copyreg.add_extension("trap_module", "call", 240)
    try:
        extension = b"\x80\x02\x82\xf0)R."
        pickle.loads(extension)  # from now on its meaning is cached
        assert ran == [()]
        for data, words in (
            (extension, "has EXT1 240"),
            (b"\x80\x02}r\xff\xff\xff\x7f.", "BINPUT 2"),
        ):
            with pytest.raises(ValueError, match=words):
                read_checkpoint(write_zip(tmp_path / "e.ckpt", data))
        assert ran == [()]
    finally:
        copyreg.remove_extension("trap_module", "call", 240)


@pytest.mark.parametrize("zipped", FORMATS)
def test_hostile_hyper_parameters_are_inert(tmp_path, monkeypatch, state, zipped):
    ran = []
    module = trap(ran, monkeypatch)
    module.call.__module__, module.call.__qualname__ = "trap_module", "call"
    parts = {"hyper_parameters": {"run": Call(module.call, 1), "open": Call(open, "x", "w")}}
    path = tmp_path / "imagenet256_1024.ckpt"
    monkeypatch.chdir(tmp_path)
    torch.save(lightning(state, **parts), path, _use_new_zipfile_serialization=zipped)
    model = IBQTokenizer.from_pretrained(path, config=TINY["config"])
    assert_equal(model.state_dict(), state)
    assert ran == [] and not (tmp_path / "x").exists()
    with open(path, "rb") as file:  # the attack is one
        torch.load(file, weights_only=False)
    assert ran == [(1,)] and (tmp_path / "x").exists()


@pytest.mark.parametrize("zipped", FORMATS)
def test_damaged_files_are_one_line(tmp_path, zipped):
    path = tmp_path / "d.ckpt"
    tensors = {f"layer{i}": torch.full((64,), float(i)) for i in range(4)}
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (0, 3, 40, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError) as caught:
            read_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: not a readable weight file (")
        assert "\n" not in str(caught.value)
    for contents in (pickle.dumps({"a": 1}), b"PK\x03\x04 no more", b"no checkpoint\n" * 50):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match="not a readable weight file"):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "d.ckpt"
    torch.save({"a": torch.ones(64)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(64).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ([torch.ones(2)], "does not hold a flat mapping of names to tensors"),
        ({"state_dict": {}}, "does not hold a flat mapping"),
        ({"a": torch.ones(2), "b": "text"}, "does not hold a flat mapping"),
        ({"a": {"b": torch.ones(2)}}, "does not hold a flat mapping"),
        ({1: torch.ones(2)}, "does not hold a flat mapping"),
        (torch.nn.Linear(2, 2), "does not hold a flat mapping"),
    ],
)
def test_other_contents(tmp_path, contents, words):
    torch.save(contents, tmp_path / "o.pt")
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / "o.pt")


def test_inconsistent_archives(tmp_path):
    sound = entry(tensor_call())

    def refused(words, data=sound, **members):
        path = write_zip(tmp_path / "z.ckpt", assembled(data), **members)
        with pytest.raises(ValueError, match=words):
            read_checkpoint(path)

    refused("its storage 0 has 7 bytes for 2 numbers", data_0=bytes(7))
    refused("no item named 'archive/data/0'")
    refused("not little-endian", data_0=bytes(8), byteorder=b"big")
    flat = REBUILD + b"(" + STORAGE + b"K\x00J\x00\x28\x6b\x7e\x85K\x00\x85\x89}tR"  # stride 0
    refused("has 2120951808 numbers for the 2 of its storage 0", entry(flat), data_0=bytes(8))
    refused("out of bounds", data=entry(tensor_call(shape=b"K\x03\x85")), data_0=bytes(8))
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", assembled(sound))
    with pytest.raises(ValueError, match=r"its data\.pkl is compressed"):
        read_checkpoint(tmp_path / "z.ckpt")
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(ValueError, match=r"it has 0 data\.pkl instead of one"):
        read_checkpoint(tmp_path / "z.ckpt")


def test_select():
    names = ["a.b", "a.c", "loss.x", "model_ema.ab", "model_ema.decay", "model_ema.lossx"]
    assert select(names, ["a.b", "a.c"], [""], ["loss.*"]) == {"a.b": "model_ema.ab", "a.c": "a.c"}
    # Without ignoring it, another name is kept for the strict comparison.
    assert select(names, ["a.b"], [""], [])["loss.x"] == "loss.x"
    nested = ["t.a.b", "t.cache.k", "t.h.0.cache.k", "f.a.b", "model_ema.tab", "model_ema.fab"]
    assert select(nested, ["a.b"], ["t."], ["cache.*", "*.cache.*"]) == {"a.b": "model_ema.tab"}
    assert select(nested, ["a.b"], ["", "f."], []) == {"a.b": "model_ema.fab"}
    assert select(["model_ema.tab"], ["a.b"], ["", "t."], []) == {"a.b": "model_ema.tab"}
    assert select(["x"], ["a.b"], ["", "t."], []) == {"x": "x"}
    with pytest.raises(ValueError, match=r"model_ema\.abc could be the average of 2 tensors"):
        select(["a.bc", "ab.c", "model_ema.abc"], ["a.bc"], [""], [])


@pytest.mark.parametrize("averaged", [True, False])
def test_averages_are_preferred(tmp_path, state, averaged):
    contents = lightning(state)
    expected = state
    if averaged:
        # A frozen parameter has no average.
        kept = "quantize.embedding.weight"
        contents["state_dict"] |= averages({n: t for n, t in state.items() if n != kept})
        expected = {n: t + (n != kept) for n, t in state.items()}
    (tmp_path / "config.json").write_text(json.dumps(TINY["config"]))
    torch.save(contents, tmp_path / "last.ckpt")
    for source in (tmp_path / "last.ckpt", tmp_path):
        model = IBQTokenizer.from_pretrained(source)
        assert not model.training and model.config == TINY["config"]
        assert_equal(model.state_dict(), expected)


def test_the_tokenizer_in_an_autoregressive_checkpoint(tmp_path, state):
    contents = lightning(state, prefix="first_stage_model.")
    contents["state_dict"]["transformer.tok_emb.weight"] = torch.ones(4, 4)
    torch.save(contents, tmp_path / "AR.ckpt")
    model = IBQTokenizer.from_pretrained(tmp_path / "AR.ckpt", config=TINY["config"])
    assert_equal(model.state_dict(), state)


def test_misfits_are_named(tmp_path, state):
    path = tmp_path / "m.ckpt"

    def refused(changes, words):
        contents = lightning({n: t for n, t in (state | changes).items() if t is not None})
        torch.save(contents, path)
        with pytest.raises(ValueError) as caught:
            IBQTokenizer.from_pretrained(path, config=TINY["config"])
        assert words in str(caught.value) and "\n" not in str(caught.value)

    refused({"quant_conv.bias": None}, "does not fit IBQTokenizer: missing quant_conv.bias")
    refused({"more.weight": torch.ones(1)}, "unexpected more.weight")
    refused({"quant_conv.bias": torch.ones(3)}, "quant_conv.bias is [3] instead of [32]")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        odd = {"quant_conv.bias": torch.ones(32).to(dtype)}
        refused(odd, f"wrong dtype: quant_conv.bias is {dtype} instead of torch.float32 or")
    with pytest.raises(FileNotFoundError, match=r"no config\.json beside .*m\.ckpt"):
        IBQTokenizer.from_pretrained(path)
    with pytest.raises(ValueError, match="config: 'ibq' is not one of ibq-1024, "):
        IBQTokenizer.from_pretrained(path, config="ibq")


def test_released_files(tmp_path, state, monkeypatch):
    """By release name, by repository, and as a local file of the official name."""
    asked = []

    def download(repo_id, filename, *, revision):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    names = {
        "ibq-1024": ("IBQ-Tokenizer-1024", "imagenet256_1024.ckpt"),
        "ibq-8192": ("IBQ-Tokenizer-8192", "imagenet256_8192.ckpt"),
        "ibq-16384": ("IBQ-Tokenizer-16384", "imagenet256_16384.ckpt"),
        "ibq-262144": ("IBQ-Tokenizer-262144", "imagenet256_262144.ckpt"),
        "ibq-16384-pretrain": ("IBQ-Tokenizer-16384-Pretrain", "IBQ_pretrain_16384.ckpt"),
        "ibq-262144-pretrain": ("IBQ-Tokenizer-262144-Pretrain", "IBQ_pretrain_262144.ckpt"),
    }
    assert IBQTokenizer.releases.keys() == names.keys()
    tiny = {}
    for name, (_, file) in names.items():
        release = IBQTokenizer.releases[name]
        assert release.config["n_embed"] == int(name.split("-")[1])
        tiny[name] = pretrained.Release(
            TINY["config"], release.hub_id, release.hub_file, release.checkpoint
        )
        torch.save(lightning(state), tmp_path / file)
    monkeypatch.setattr(IBQTokenizer, "releases", tiny)
    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    for name, (repository, file) in names.items():
        for source in (name, f"TencentARC/{repository}", tmp_path / file):
            assert_equal(IBQTokenizer.from_pretrained(source).state_dict(), state)
    assert asked == [
        (f"TencentARC/{repository}", file, None)
        for repository, file in names.values()
        for _ in "ab"
    ]


def test_convert(titok_fast, tmp_path, state):
    contents = lightning(state)
    contents["state_dict"] |= averages(state)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.ckpt"
    torch.save(contents, path)
    (tmp_path / "run" / "config.json").write_text(json.dumps(TINY["config"]))
    output = tmp_path / "new" / "model"
    result = titok_fast("convert", path, "-o", output)
    assert result.returncode == 0, result.err
    count = len(state)
    assert f"{path} to {output}: IBQTokenizer, {count} tensors, {count} of them EMA, " in result.out
    assert result.out.endswith(f"{(output / 'model.safetensors').stat().st_size / 1e6:,.1f} MB\n")
    assert sorted(p.name for p in output.iterdir()) == ["config.json", "model.safetensors"]
    assert_equal(load_file(output / "model.safetensors"), {n: t + 1 for n, t in state.items()})
    assert IBQTokenizer.from_pretrained(output).config == TINY["config"]
    # The same configuration may be replaced; here by the weights without averages.
    torch.save(lightning(state), path)
    result = titok_fast("convert", path, "-o", output)
    assert f"{count} tensors, none of them EMA" in result.out
    assert_equal(load_file(output / "model.safetensors"), state)
    # In place, the new file is the one that is read.
    assert titok_fast("convert", tmp_path / "run", "-o", tmp_path / "run").returncode == 0
    assert_equal(IBQTokenizer.from_pretrained(tmp_path / "run").state_dict(), state)


def test_convert_by_file_name_and_by_option(titok_fast, tmp_path):
    state = TiTok.from_config("titok-digits").state_dict()
    torch.save(state, tmp_path / "weights.pt")
    refused = titok_fast("convert", tmp_path / "weights.pt", "-o", tmp_path / "out")
    assert refused.returncode == 2 and "no config.json beside" in refused.err
    result = titok_fast(
        "convert", tmp_path / "weights.pt", "-o", tmp_path / "out", "--model", "titok-digits"
    )
    assert result.returncode == 0, result.err
    assert f"TiTok, {len(state)} tensors, none of them EMA" in result.out
    assert_equal(TiTok.from_pretrained(tmp_path / "out").state_dict(), state)
    vqgan = {
        name: torch.zeros(shape) for name, shape in manifest("maskgit_vqgan")["parameters"].items()
    }
    torch.save(vqgan, tmp_path / "maskgit-vqgan-imagenet-f16-256.bin")
    result = titok_fast(
        "convert", tmp_path / "maskgit-vqgan-imagenet-f16-256.bin", "-o", tmp_path / "vqgan"
    )
    assert result.returncode == 0, result.err
    assert f"MaskGITVQGAN, {len(vqgan)} tensors" in result.out


def test_convert_refuses(titok_fast, tmp_path, state):
    path = tmp_path / "last.ckpt"
    torch.save(lightning(state), path)
    (tmp_path / "config.json").write_text(json.dumps(TINY["config"]))
    other = tmp_path / "other"
    TiTok.from_config("titok-digits").save_pretrained(other)
    before = {p.name: p.read_bytes() for p in other.iterdir()}

    def refused(words, *arguments):
        result = titok_fast("convert", *arguments)
        assert result.returncode == 2 and words in result.err, result.err
        assert len(result.err.strip().splitlines()) == 1

    refused(f"--output: {other} holds another model", path, "-o", other)
    assert {p.name: p.read_bytes() for p in other.iterdir()} == before
    (other / "config.json").unlink()
    refused(f"--output: {other} holds another model", path, "-o", other)
    out = tmp_path / "out"
    refused("--model: 'ibq-7' is not one of ", path, "-o", out, "--model", "ibq-7")
    refused("does not fit TiTok: missing", path, "-o", out, "--model", "titok-digits")
    refused("absent.ckpt does not exist", tmp_path / "absent.ckpt", "-o", out)
    (tmp_path / "config.json").write_text('{"a": 1, "b": 2}')
    refused("config: got keys a, b, allowed is one that has model.generator", path, "-o", out)
    (tmp_path / "config.json").write_text(json.dumps(TINY["config"]))
    path.write_bytes(path.read_bytes()[:-1000])
    refused("last.ckpt: not a readable weight file", path, "-o", out)
    assert not out.exists()
