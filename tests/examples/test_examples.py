"""Every example of the language runs on the shipped model, in process and on a server, and its account adds up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# What the shipped model gets right, and so would be wrong if a prompt were not what the program says.
KNOWN = {
    "branch_solve_merge": ["->  first (3 of 3", "->  second (0 of 3"],
    "evaluate_fewshot": ["Where does Mira live?        Mira lives in Penvale.", "of 12 right"],
    "extraction": ["'name': 'Hanno', 'age': 41, 'job': 'baker'"],
    "fewshot_classification": ["the film was wonderful       good", "what a nasty trip            bad"],
    "long_document": ["of 8 right"],
    "multi_turn_chat": ["Your favourite colour is green.", "You live in Zemol."],
    "react": ["action:      look up Juniper", "answer:      29"],
    "self_consistency": ["14: ", "15: "],
    "skeleton_of_thought": ["Mira is the baker of Fernhollow"],
    "tool_agent": ['get_weather({"city": "Zemol"}) = {"status": "sunny", "temperature": 17}', "The price is 12."],
    "tree_of_thought": ["5 * 4 = 20", "= 26", "42 + 13 = 55; 55 + 13 = 68"],
}
ACCOUNT = re.compile(
    r": ([\d,]+) prompt tokens computed, ([\d,]+) cached of ([\d,]+) read, ([\d,]+) sent, [\d,]+ requests"
)


def test_every_example_is_known() -> None:
    others = {"accounting", "quickstart"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - others == set(KNOWN)


def run(name: str, *arguments: str) -> tuple[str, list[list[int]]]:
    before = os.times()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 120  # of CPU time; 20 on an idle machine
    accounts = [[int(number.replace(",", "")) for number in row] for row in ACCOUNT.findall(done.stdout)]
    return done.stdout, accounts


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_in_process(name: str) -> None:
    output, accounts = run(name)
    for known in KNOWN[name]:
        assert known in output
    cached, uncached = accounts
    for computed, reused, read, sent in accounts:
        assert read == computed + reused and 0 < sent <= read
    assert uncached[1] == 0, "nothing is reused without the cache"
    assert cached[1] > 0 and cached[0] < uncached[0], "something is with it"


def test_help_says_what_it_is_and_what_it_takes() -> None:
    for name in [*sorted(KNOWN), "quickstart"]:
        done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py"), "--help"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), name
        first, _, rest = done.stdout.partition("\n\n")
        assert first == f"usage: {name}.py [-h] [URL]"
        title = (EXAMPLES / f"{name}.py").read_text().split('"""')[1].split(":")[0]
        assert rest.startswith(title) and "a Branchwise server" in rest
    wrong = subprocess.run([sys.executable, str(EXAMPLES / "react.py"), "--url", "x"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "unrecognized arguments: --url" in wrong.stderr


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "branchwise", "serve", "--port", "0", "--kv-cache-tokens", "32768"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    assert process.stdout is not None
    found = next((match[1] for line in process.stdout if (match := re.search(r"ready at (http://\S+)", line))), None)
    assert found is not None
    yield found
    process.terminate()
    process.communicate(timeout=240)


def test_on_a_server(url: str) -> None:
    """One that forks and selects; those that do not select run on a server below."""
    output, (cached, uncached) = run("tree_of_thought", url)
    for known in KNOWN["tree_of_thought"]:
        assert known in output
    assert cached[3] < uncached[3], "branches are sent only what is new"
    assert uncached[1] == 0 < cached[1]


@pytest.fixture
def openai_only(url: str) -> Iterator[str]:
    """The same server to a client that is shown nothing but ``/v1``."""

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._pass(None)

        def do_POST(self) -> None:
            self._pass(self.rfile.read(int(self.headers["Content-Length"])))

        def _pass(self, data: bytes | None) -> None:
            if not self.path.startswith("/v1/"):
                self.send_error(404)
                return
            request = urllib.request.Request(url + self.path, data, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=240) as answer:
                    status, body = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                status, body = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    door = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=door.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{door.server_port}/v1"
    door.shutdown()
    door.server_close()


USES_SELECT = {"branch_solve_merge", "evaluate_fewshot", "fewshot_classification", "react", "tree_of_thought"}


@pytest.mark.parametrize("name", sorted(KNOWN.keys() - USES_SELECT))
def test_on_a_server_that_is_only_openai_compatible(name: str, openai_only: str) -> None:
    output, (account,) = run(name, openai_only)
    for known in KNOWN[name]:
        assert known in output
    assert account[1] > 0 and "cannot be asked to do without its cache" in output


def test_what_such_a_server_cannot_do_is_one_line(openai_only: str) -> None:
    for name in USES_SELECT:
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), openai_only]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 1 and "Traceback" not in done.stderr, name
        last = done.stderr.strip().splitlines()[-1]
        assert "cannot score choices in a chat: write the prompt as text" in last and f"{name}.py:" in last
