"""The house rules the code must keep: which room may import which, what is installed, what must stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "runtime" / "models" / "shipped"
ROOMS = ("radix", "kernels", "runtime", "frontend")
MAY_IMPORT = {
    "radix": {"radix"},
    "kernels": {"kernels"},
    "runtime": {"runtime", "radix", "kernels"},
    "frontend": {"frontend", "runtime", "radix", "kernels"},
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Absolute dotted names of what ``path`` imports, relative imports resolved from the repository root."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ["branchwise", *package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def test_relative_imports_are_resolved() -> None:
    names = set(imported(ROOT / "frontend" / "cli" / "main.py"))
    assert "branchwise.frontend.cli.serve" in names
    assert "branchwise.__version__" in names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    assert modules(room)
    for path in modules(room):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "branchwise" and parts[1] in ROOMS:
                assert parts[1] in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in ROOMS, f"{path.relative_to(ROOT)} imports {name}, which is not installed"


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("branchwise", ["torch", "numpy", "fastapi", "typer", "transformers"]),
        ("branchwise.radix", ["torch", "zmq", "fastapi", "triton", "flashinfer", "branchwise.kernels"]),
        ("branchwise.radix.tree", ["torch", "zmq", "fastapi", "triton", "flashinfer", "branchwise.kernels"]),
        ("branchwise.frontend.cli.main", ["torch", "transformers", "numpy", "aiohttp", "fastapi", "zmq"]),
        ("branchwise.frontend.bench.runner", ["torch", "transformers", "fastapi", "zmq"]),
        ("branchwise.runtime.models.folder", ["torch", "transformers", "huggingface_hub"]),
        ("branchwise.kernels.ops", ["triton"]),
        ("branchwise.kernels.attention.torch_backend", ["triton"]),
        ("branchwise.runtime.executor.backends", ["triton", "flashinfer"]),
    ],
)
def test_imports_without(module: str, blocked: list[str]) -> None:
    """None in ``sys.modules`` makes an import fail, so passing means it is never reached."""
    code = "import sys; sys.modules.update(dict.fromkeys(sys.argv[2:])); __import__(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, module, *blocked], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-500:]


# Objects from untrusted bytes, or code from text.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("os", "system")}
FORBIDDEN_BUILTINS = {"eval", "exec", "__import__"}


def turns_bytes_into_code(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                yield module
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in FORBIDDEN_ATTRIBUTES:
                yield f"{owner}.{name}"
            case ast.Attribute(attr=name) if name.endswith("_pyobj"):
                yield name
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_BUILTINS:
                yield name
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                yield "shell=True"


def test_the_check_sees_what_it_looks_for() -> None:
    text = (
        "import pickle as p\nfrom dill import x\neval('1')\ntorch.load(f)\ns.recv_pyobj()\nrun(c, shell=True)\nm.eval()"
    )
    found = list(turns_bytes_into_code(ast.parse(text)))
    assert sorted(found) == ["dill", "eval", "pickle", "recv_pyobj", "shell=True", "torch.load"]


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_turns_bytes_into_code(room: str) -> None:
    for path in modules(room):
        found = list(turns_bytes_into_code(ast.parse(path.read_text())))
        assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_declared_packages_are_the_tree() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert declared == packages_of_the_tree()


def packages_of_the_tree() -> set[str]:
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in modules(room)}
    return {".".join(["branchwise", *folder.parts]) for folder in folders} | {"branchwise"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel made of a copy of the sources would install."""
    tmp_path = tmp_path_factory.mktemp("wheel")
    source = tmp_path / "source"
    _copy_sources(source)
    code = (
        "from setuptools import setup; import sys; "
        "sys.argv = ['setup.py', '-q', 'build_py', '--build-lib', sys.argv[1]]; setup()"
    )
    target = tmp_path / "built"
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stderr[-1000:]
    return target


def test_the_wheel_holds_the_tree(built: Path) -> None:
    """Every module is in it, no top-level name but ours, and the model that ships, whole."""
    assert [path.name for path in built.iterdir()] == ["branchwise"]
    found = {path.relative_to(built / "branchwise") for path in built.rglob("*.py")}
    expected = {path.relative_to(ROOT) for room in ROOMS for path in modules(room)}
    expected |= {Path("__init__.py"), Path("__main__.py")}
    assert found == expected
    assert (built / "branchwise" / "py.typed").is_file()
    shipped = built / "branchwise" / SHIPPED.relative_to(ROOT)
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == {
        path.name: path.read_bytes() for path in SHIPPED.iterdir()
    }


def test_an_installed_wheel_talks_without_a_model_named(built: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(built), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "branchwise", "chat", "--temperature", "0", "--device", "cpu"]
    where = "import branchwise; print(branchwise.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], text=True, env=environment, cwd=tmp_path)
    assert found.startswith(str(built)), "the wheel's copy, not the checkout"
    done = subprocess.run(
        command, input="who are you?\n", capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0 and "Branchwise" in done.stdout, done.stderr


def _copy_sources(target: Path) -> None:
    files = [path for room in ROOMS for path in modules(room)] + sorted(SHIPPED.iterdir())
    files += [
        ROOT / name for name in ("__init__.py", "__main__.py", "py.typed", "pyproject.toml", "README.md", "LICENSE")
    ]
    for path in files:
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def test_files_stay_small() -> None:
    for room in ROOMS:
        for path in modules(room):
            lines = len(path.read_text().splitlines())
            assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines; is it one idea?"
