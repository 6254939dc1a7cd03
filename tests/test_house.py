"""The rules of the house: floors, each op's file set, what may import what, and the face."""

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "titok_fast"
FLOORS = {
    "_contention": 1,
    "_distributed": 1,
    "_files": 1,
    "_library": 1,
    "reference": 1,
    "kernels": 1,
    "_C": 1,
    "ops": 2,
    "layers": 3,
    "models": 4,
    "training": 5,
    "images": 5,
    "metrics": 5,
    "tokens": 5,
    "analysis": 5,
    "profiling": 5,
    "cli": 5,
    "testing": 6,
    "__init__": 6,
}
NOT_OPS = ("arguments", "inspect")
OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("[!_]*.py") if p.stem not in NOT_OPS)
OP_FILES = (
    "titok_fast/reference/{op}.py",
    "tests/test_{op}.py",
    "bench/bench_{op}.py",
    "docs/ops/{op}.md",
)

CPU_FILES = ("csrc/{op}.h", "csrc/{op}_cpu.cpp", "csrc/{op}_bind.cpp")

# A fresh clone is what these are about: an installed copy of the package has none of it.
pytestmark = pytest.mark.skipif(not PACKAGE.is_dir(), reason="not a source checkout")


def imports(path):
    """Every `titok_fast...` module that a file imports, however it is spelled."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "titok_fast")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "titok_fast":
                yield from (f"titok_fast.{a.name}" for a in node.names)
            elif module.startswith("titok_fast."):
                yield module
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            for argument in node.args[:1]:
                text = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
                if node.func.attr in ("import_module", "find_spec") and isinstance(
                    text, ast.Constant
                ):
                    yield str(text.value)


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_imports_only_go_down():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(path):
            if not module.startswith("titok_fast"):
                continue
            seen += 1
            assert FLOORS[room(module)] <= FLOORS[here], (
                f"{path} imports {module}, a floor above it"
            )
    assert seen > 10


def test_only_ops_import_the_extension_and_the_kernels():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for module in imports(path)
        if room(module) in ("_C", "kernels")
    }
    assert importers == {"ops/inspect.py"}


def test_floor_one_stands_alone():
    allowed = {
        "reference": {"torch", "collections", "math", "typing", "titok_fast"},
        "kernels": {
            *("torch", "triton", "titok_fast"),
            *("collections", "contextlib", "contextvars", "dataclasses", "functools", "math"),
            "typing",
        },
    }
    for folder, names in ((PACKAGE / "reference", "reference"), (ROOT / "kernels", "kernels")):
        for path in folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [a.name for a in node.names]
                elif isinstance(node, ast.ImportFrom):
                    modules = [node.module]
                for module in modules:
                    assert module.split(".")[0] in allowed[names], f"{path} imports {module}"
                    assert not module.startswith("titok_fast") or f".{names}." in module


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_glob(op):
    for pattern in OP_FILES:
        assert (ROOT / pattern.format(op=op)).is_file(), pattern.format(op=op)
    gpu = (ROOT / f"kernels/{op}.py", ROOT / f"csrc/{op}_cuda.cu")
    assert any(path.is_file() for path in gpu), f"{op} has neither Triton nor CUDA C++"
    # C++ for the CPU is there whole, or, where PyTorch is the CPU's backend, not at all.
    backends = importlib.import_module(f"titok_fast.ops.{op}").BACKENDS["cpu"]
    compiled = backends[0] != "torch"
    for pattern in CPU_FILES:
        assert (ROOT / pattern.format(op=op)).is_file() == compiled, pattern.format(op=op)
    listed = re.search(r"set\(TITOK_FAST_OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert (op in listed[1].split()) == compiled
    assert (f"bind_{op}(" in (ROOT / "csrc/module.cpp").read_text()) == compiled


def test_every_op_has_files_nowhere_else():
    assert OPS
    known = set(OPS) | {"__init__"}
    assert {p.stem for p in (PACKAGE / "reference").glob("*.py")} <= known | {"_draw"}
    assert {p.stem for p in (ROOT / "kernels").glob("*.py")} <= known | {
        "_arithmetic",
        "_device",
        "_exact",
    }
    assert {p.stem for p in (ROOT / "docs/ops").glob("*.md")} <= known


def test_no_framework_header_below_the_binding():
    for path in (ROOT / "csrc").iterdir():
        framework = re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python)", path.read_text())
        bound = path.name.endswith("_bind.cpp") or path.name == "module.cpp"
        assert bound or framework is None, path
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path


def run(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )


def test_works_without_triton():
    code = """
import sys
class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Ban())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch, titok_fast
z = torch.randn(3, 4)
assert titok_fast.nearest_code(z, z).tolist() == [0, 1, 2]
try:
    titok_fast.nearest_code(z, z, backend="triton")
except RuntimeError as error:
    print(error)
assert "triton" not in sys.modules
"""
    result = run(code, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    assert "backend 'triton' is not available: triton is not installed" in result.stdout


def test_importing_the_package_loads_neither_triton_nor_the_extension():
    code = "import sys, titok_fast; print(sorted({'triton', 'titok_fast._C'} & set(sys.modules)))"
    result = run(code)
    assert result.stdout.strip() == "[]", result.stderr[-2000:]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_source_tree_without_its_extension_says_how_to_build_it(damaged, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "titok_fast", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "csrc").mkdir()
    if damaged:  # built by another compiler or for another machine, say
        (tmp_path / f"titok_fast/_C{EXTENSION_SUFFIXES[0]}").touch()
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, {str(tmp_path)!r})
import torch, titok_fast
assert titok_fast.__file__.startswith({str(tmp_path)!r}), titok_fast.__file__
z = torch.randn(3, 4)
assert titok_fast.nearest_code(z, z, backend="reference").tolist() == [0, 1, 2]
titok_fast.nearest_code(z, z)
"""
    result = run(code, cwd=tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert "backend 'cpu' is not available: titok_fast._C " in last
    if damaged:
        assert "_C cannot be loaded (" in last and "file too short" in last
    else:
        assert f"_C is not built; run 'pip install -e .' in {tmp_path}" in last


def test_nothing_is_installed_outside_the_package():
    files = importlib.metadata.files("titok_fast")
    assert files
    for file in files:
        top = file.parts[0]
        script = top == ".." and file.name == "titok-fast"
        editable = top.startswith(("_editable", "_titok_fast_editable")) or top == "__pycache__"
        assert top == "titok_fast" or top.startswith("titok_fast-") or script or editable, file


def test_the_face_only_re_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    import titok_fast

    assert sorted(titok_fast.__all__) == titok_fast.__all__
    for name in titok_fast.__all__:
        assert getattr(titok_fast, name) is not None
        assert name == "__version__" or getattr(titok_fast, name).__doc__


def test_paths_that_the_documents_name_exist():
    documents = [*ROOT.glob("*.md"), ROOT / "bench/README.md", *(ROOT / "docs").rglob("*.md")]
    counts = dict.fromkeys(("names", "links"), 0)
    for document in documents:
        text = document.read_text()
        named = re.findall(
            r"`((?:csrc|kernels|titok_fast|bench|tests|examples|docs)/[\w./-]+)`", text
        )
        linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        for verb, folder, paths in (("names", ROOT, named), ("links", document.parent, linked)):
            for path in paths:
                if "my_op" not in path:  # the example op of CONTRIBUTING.md
                    assert (folder / path).exists(), f"{document.name} {verb} {path}"
                    counts[verb] += 1
    assert all(counts.values())


def test_every_model_is_listed():
    from titok_fast.models.auto import MODELS, releases

    text = (ROOT / "docs" / "cli.md").read_text()
    table = text[text.index("\n## Models\n") : text.index("\n## Files and exit codes\n")]
    assert set(releases(MODELS)) <= set(re.findall(r"`([a-z][a-z0-9-]+)`", table))


def test_every_option_is_documented():
    from typer.main import get_command

    from titok_fast.cli import app

    text = "".join((ROOT / "docs" / name).read_text() for name in ("cli.md", "training.md"))
    written = set(re.findall(r"--[a-z0-9-]+", text.replace("--no-", "--")))
    for name, command in get_command(app).commands.items():
        flags = {flag for each in command.params for flag in each.opts if flag[:2] == "--"}
        assert flags - {"--output"} <= written, name  # -o
