"""What the README shows is true: its code runs, and every command, flag, route, target and file it names exists."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Protocol

import pytest
from typer.testing import CliRunner

from branchwise.frontend.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("models", "serving", "performance", "architecture")
}
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Running(Protocol):
    url: str


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)


def run_python_file(code: str) -> subprocess.CompletedProcess[str]:
    """As a file: a program's errors name its lines."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(code)
        return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=240)


def test_the_python_blocks_are_the_three_known_here() -> None:
    assert ["Engine(" in block for block in PYTHON_BLOCKS] == [True, True, False]


def test_the_engine_example_runs_and_reuses_its_prefix() -> None:
    done = run_python(PYTHON_BLOCKS[0].replace("Engine()", "Engine(kv_cache_tokens=4096)"))
    assert done.returncode == 0, done.stderr
    cached = [(int(hit), int(whole)) for hit, whole in re.findall(r"(\d+) of (\d+) prompt tokens cached", done.stdout)]
    assert len(cached) == 3
    assert all(0 < whole - hit < 20 for hit, whole in cached), done.stdout


def test_the_program_runs() -> None:
    done = run_python_file(PYTHON_BLOCKS[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[") and done.stdout.count("Fernhollow") >= 1, done.stdout


def test_the_client_example_runs(server: Running) -> None:
    code = PYTHON_BLOCKS[2].replace("http://127.0.0.1:8000", server.url).replace('"none"', '"the-key"')
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_quickstart_runs(open_server: Running) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), open_server.url],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r" (\d+) = +(\d+) reused \+ +(\d+) computed   ", done.stdout)
    assert len(rows) == 9
    counts = [tuple(map(int, row)) for row in rows]
    assert all(prompt == reused + computed for prompt, reused, computed in counts)
    assert all(reused >= 96 for _, reused, _ in counts[1:]), "the first computes the system prompt, all others reuse it"
    sent, computed = (int(re.search(rf"(\d+) {what}\n", done.stdout)[1]) for what in ("prompt tokens sent", "computed"))  # type: ignore[index]
    assert sent == sum(row[0] for row in counts) and computed == sum(row[2] for row in counts)
    assert counts[0][0] < int(re.search(r"(\d+) distinct tokens", done.stdout)[1]) < sent  # type: ignore[index]
    assert done.stdout.replace("\n", "").isprintable()
    assert "The server's radix tree" in done.stdout and "└─" in done.stdout


def test_quickstart_has_the_key_from_where_the_other_clients_have_it(server: Running) -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), server.url]
    for key, code in (("the-key", 0), ("another", 1), ("", 1)):
        env = os.environ | {"BRANCHWISE_API_KEY": key}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
        assert done.returncode == code, done.stderr
        assert (code == 0) == ("The server's radix tree" in done.stdout)
        assert code == 0 or done.stderr.startswith(
            f"the server at {server.url} answered 401: a valid API key is needed"
        )


def test_quickstart_without_a_server_is_one_line(unused_port: int) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), f"http://127.0.0.1:{unused_port}"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"no server at http://127.0.0.1:{unused_port}") and "branchwise serve" in line


def test_the_list_of_models_is_what_the_command_prints() -> None:
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0 and "Mixtures of experts: " in result.output
    assert result.output in PAGES["models"]


def test_commands_and_flags_exist() -> None:
    everything = README + "".join(PAGES.values())
    shown = set(re.findall(r"(?:^|`)branchwise (\w+)", everything, re.MULTILINE))
    assert shown >= {"serve", "generate", "chat", "tree", "bench", "doctor"}
    helps = {}
    for command in shown:
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, command
        helps[command] = result.output
    everywhere = "\n".join(helps.values())
    texts = [(README + PAGES["models"] + PAGES["performance"], everywhere), (PAGES["serving"], helps["serve"])]
    for text, known in texts:
        for flag in set(re.findall(r"--[a-z][a-z-]+", text)):
            assert re.search(rf"{flag}\b", known), flag


def test_every_command_line_of_the_documents_exists() -> None:
    """`branchwise COMMAND --flag`, in every document of the repository, against that command's own help."""
    lines = re.compile(r"(?:^|`|\$ )branchwise (\w+)(?: (\w+))?([^\n`#]*)", re.MULTILINE)
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "frontend").rglob("README.md")]
    helps: dict[tuple[str, ...], str] = {}
    for document in documents:
        for command, first, rest in lines.findall(document.read_text()):
            words = (command, first) if command in ("cache", "cluster") and first else (command,)
            if words not in helps:
                result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
                assert result.exit_code == 0, (document.name, words)
                helps[words] = result.output
            for flag in re.findall(r"--[a-z][a-z-]+", rest):
                assert re.search(rf"{flag}\b", helps[words]), (document.name, words, flag)
    assert len(helps) > 12


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README + PAGES["performance"], re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_exist() -> None:
    for folder, text in ((ROOT, README), *((ROOT / "docs", page) for page in PAGES.values())):
        linked = re.findall(r"\]\(([^)#:]+)\)", text)
        named = re.findall(r"`(examples/[\w./]+|tests/[\w./]+\.py)`", text)
        assert linked
        for path in linked:
            assert (folder / path).exists(), path
        for path in named:
            assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_its_pictures_small() -> None:
    assert len(README.encode()) < 12_000
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2 and README.index(pictures[0]) < 1500, "a picture on the first screen"
    assert all((ROOT / path).stat().st_size < 150_000 for path in pictures)


def test_the_chart_and_the_sentence_beside_it_are_those_of_the_table() -> None:
    spec = importlib.util.spec_from_file_location("chart", ROOT / "tests" / "benchmarks" / "chart.py")
    assert spec is not None and spec.loader is not None
    chart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chart)
    seconds = chart.measured(PAGES["performance"])
    assert len(seconds) == 7
    assert chart.CHART.read_text() == chart.draw(seconds), "run python tests/benchmarks/chart.py"
    assert chart.SWEEP.read_text() == chart.draw_sweep(chart.swept(PAGES["performance"]))
    ratios = sorted(min(theirs) / ours for ours, *theirs in seconds.values())
    mean = math.prod(ratios) ** (1 / len(ratios))
    said = re.search(
        r"(\d\.\d\d) to (\d\.\d\d) times as fast.*?(\d\.\d\d) times in the geometric mean", README, re.DOTALL
    )
    assert said is not None and [*map(float, said.groups())] == [round(x, 2) for x in (ratios[0], ratios[-1], mean)]


ROUTES = re.findall(r"^\| `(GET|POST) (/\S+)` \|", README, re.MULTILINE)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_routes_exist(server: Running, method: str, path: str) -> None:
    headers = {"Authorization": "Bearer the-key"}
    body = b"[]" if method == "POST" else None  # no object: nothing is made
    request = urllib.request.Request(server.url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            status = response.status
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
    assert status in ((200,) if method == "GET" else (200, 400)), status


def test_every_route_of_the_issue_is_in_the_table() -> None:
    assert {path for _, path in ROUTES} >= {"/generate", "/v1/completions", "/v1/models", "/health", "/metrics"}
