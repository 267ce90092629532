"""The house rules the code must keep: which room may import which, what is installed, what must stay light."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "runtime" / "models" / "shipped"
TOP_LEVEL = ("radix", "kernels", "runtime", "frontend")
# The rooms, lowest first, and the rooms each may import. A file belongs to the longest room that its path begins with;
# ``runtime`` itself is the contracts at its root, which every room above speaks.
ROOMS = {
    "radix": set(),
    "kernels": set(),
    "runtime": {"radix"},
    "runtime/chat": {"runtime"},
    "runtime/tokenizer": {"runtime", "runtime/chat"},
    "runtime/grammar": {"runtime", "runtime/tokenizer"},
    "runtime/parallel": {"runtime", "kernels"},
    "runtime/models": {"runtime", "runtime/tokenizer", "runtime/parallel", "kernels"},
    "runtime/tiers": {"runtime", "radix", "kernels"},
    "runtime/fleet": {"runtime", "radix"},
    "runtime/executor": {"runtime", "runtime/tiers", "runtime/models", "runtime/parallel", "kernels"},
    "runtime/scheduler": {"runtime", "runtime/fleet", "runtime/tiers", "runtime/grammar", "runtime/tokenizer", "radix"},
    "runtime/simulation": {"runtime", "runtime/executor", "runtime/fleet", "runtime/scheduler", "radix"},
    "runtime/engine": {
        "runtime",
        "runtime/chat",
        "runtime/executor",
        "runtime/grammar",
        "runtime/models",
        "runtime/parallel",
        "runtime/scheduler",
        "runtime/tiers",
        "runtime/tokenizer",
    },
    "runtime/server": {
        "runtime",
        "runtime/chat",
        "runtime/engine",
        "runtime/executor",
        "runtime/fleet",
        "runtime/grammar",
        "runtime/models",
        "runtime/parallel",
        "runtime/scheduler",
        "runtime/tiers",
        "runtime/tokenizer",
    },
    "frontend": {
        "runtime",
        "runtime/chat",
        "runtime/engine",
        "runtime/executor",
        "runtime/fleet",
        "runtime/models",
        "runtime/parallel",
        "runtime/server",
        "runtime/simulation",
        "runtime/tiers",
        "runtime/tokenizer",
    },
}
CONTRACTS = 16  # files at the root of runtime/, at most: what all rooms speak, nothing that works


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


def room_of(module: str) -> str | None:
    """The room of ``branchwise.…``, a file's or a name's dotted path; None for the package's root."""
    parts = module.split(".")[1:]
    rooms = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((room for room in rooms if room in ROOMS), None)


def dotted(path: Path) -> str:
    parts = ["branchwise", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """The files each file imports, at its head or inside a function, for types or to run."""
    files = {dotted(path): path for folder in TOP_LEVEL for path in modules(folder)}
    graph = {}
    for module, path in files.items():
        names = set(imported(path))
        found = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = (found & files.keys()) - {module}
    return graph


def test_each_room_imports_what_it_may() -> None:
    wrong = []
    for folder in TOP_LEVEL:
        for path in modules(folder):
            room = room_of(dotted(path))
            assert room is not None
            for name in imported(path):
                other = room_of(name) if name.startswith("branchwise.") else None
                if other is not None and other != room and other not in ROOMS[room]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}: {room} may not import {other}")
                assert name.split(".")[0] not in TOP_LEVEL, f"{path.relative_to(ROOT)}: {name} is not installed"
    assert not wrong, "\n".join(wrong)


def test_the_rooms_are_in_layers() -> None:
    """Each room imports rooms above it in the table only, so the table itself has no circle."""
    above: set[str] = set()
    for room, others in ROOMS.items():
        assert others <= above, f"{room}: {others - above} come later in the table"
        above.add(room)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_file_imports_itself_through_others() -> None:
    assert circles(import_graph()) == []


def test_the_root_of_the_runtime_is_contracts() -> None:
    root = [path.name for path in (ROOT / "runtime").glob("*.py") if path.name != "__init__.py"]
    assert len(root) <= CONTRACTS, root


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


@pytest.mark.parametrize("room", TOP_LEVEL)
def test_nothing_turns_bytes_into_code(room: str) -> None:
    for path in modules(room):
        found = list(turns_bytes_into_code(ast.parse(path.read_text())))
        assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_declared_packages_are_the_tree() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert declared == packages_of_the_tree()


def packages_of_the_tree() -> set[str]:
    folders = {path.parent.relative_to(ROOT) for room in TOP_LEVEL for path in modules(room)}
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
    package = built / "branchwise"
    found = {path.relative_to(package) for path in built.rglob("*.py")} - {
        path.relative_to(package) for path in (package / "examples").rglob("*")
    }
    expected = {path.relative_to(ROOT) for room in TOP_LEVEL for path in modules(room)}
    expected |= {Path("__init__.py"), Path("__main__.py")}
    assert found == expected
    assert (built / "branchwise" / "py.typed").is_file()
    shipped = built / "branchwise" / SHIPPED.relative_to(ROOT)
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == {
        path.name: path.read_bytes() for path in SHIPPED.iterdir()
    }


def test_the_wheel_holds_the_manual_the_examples_and_the_page(built: Path) -> None:
    for folder, kinds in (
        ("docs", {".md", ".png", ".svg", ".yaml", ".yml", ".json", ".service", ".gpu", ""}),
        ("runtime/server/http/ui/assets", {".js", ".css", ".html", ".svg"}),
    ):
        there = {path.relative_to(built / "branchwise") for path in (built / "branchwise" / folder).rglob("*")}
        ours = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {path for path in ours if path.suffix in kinds} <= there, folder
    assert {path.name for path in (ROOT / "examples").glob("*.py")} <= {
        path.name for path in (built / "branchwise" / "examples").iterdir()
    }


def test_an_installed_wheel_talks_without_a_model_named(built: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(built), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "branchwise", "chat", "--temperature", "0", "--device", "cpu"]
    where = "import branchwise; print(branchwise.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], text=True, env=environment, cwd=tmp_path)
    assert found.startswith(str(built)), "the wheel's copy, not the checkout"
    done = subprocess.run(
        command, input="who are you?\n", capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0 and "Branchwise" in done.stdout, done.stderr


def _copy_sources(target: Path) -> None:
    files = [path for room in TOP_LEVEL for path in modules(room)] + sorted(SHIPPED.iterdir())
    files += [path for folder in ("docs", "examples") for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in (ROOT / "runtime/server/http/ui/assets").rglob("*") if path.is_file()]
    files += [
        ROOT / name for name in ("__init__.py", "__main__.py", "py.typed", "pyproject.toml", "README.md", "LICENSE")
    ]
    for path in files:
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def test_files_stay_small() -> None:
    for room in TOP_LEVEL:
        for path in modules(room):
            lines = len(path.read_text().splitlines())
            assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines; is it one idea?"


@pytest.mark.parametrize("page", [path for path in sorted(ROOT.rglob("*.md")) if ".venv" not in path.parts], ids=str)
def test_pages_name_files_that_exist(page: Path) -> None:
    if page.name in ("NOTES.md", "CHANGELOG.md"):  # of the past, too
        return
    names = {path.name for folder in (*TOP_LEVEL, "tests", "examples") for path in modules(folder)}
    names |= {path.name for path in ROOT.glob("*.py")}
    named = re.findall(r"`([\w/.]+\.py)`", page.read_text())
    assert [name for name in named if Path(name).name not in names] == []
