"""The command line without a server: help, and how expected failures end. No traceback, one line, the right code."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from branchwise.frontend.cli import serve as serve_command
from branchwise.frontend.cli.main import app
from branchwise.frontend.cli.options import is_address
from branchwise.frontend.cli.peers import PEERS
from branchwise.frontend.client import Client
from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.models.folder import SHIPPED

COMMANDS = ["serve", "generate", "chat", "tree", "bench", "doctor", "models", "pull", "docs", "top"]
FLAGS = [
    "--host",
    "--port",
    "--api-key",
    "--served-model-name",
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--gpu-memory-utilization",
    "--kv-cache-dtype",
    "--kv-cache-tokens",
    "--page-size",
    "--tensor-parallel-size",
    "--load-format",
    "--schedule-policy",
    "--eviction-policy",
    "--attention-backend",
    "--disable-radix-cache",
    "--dtype",
    "--device",
    "--seed",
    "--drain-seconds",
    "--max-queued-requests",
    "--log-level",
    "--check-when-idle",
    "--sampling-defaults",
]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def branchwise(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "branchwise", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | (env or {}),
    )


def assert_one_line_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "Usage:" in result.output and command in result.output
    overview = CliRunner().invoke(app, ["--help"])
    assert command in overview.output


def test_serve_takes_the_flags_people_know() -> None:
    help_text = plain(CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "160"}).output)
    for flag in FLAGS:
        assert re.search(rf"{flag}\b", help_text), flag


def test_every_setting_of_a_server_has_a_flag() -> None:
    """But those for measuring, and those that may be given more than once."""
    help_text = plain(CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "160"}).output)
    settings = {*ServerConfig.__struct_fields__, *EngineConfig.__struct_fields__}
    settings -= {"engine", "null_executor", "null_step_seconds", "model", "extra_api_keys", "allowed_hosts", "overlap"}
    settings -= {"instance", "namespace_secret"}  # which a cluster sets
    for flag in (*sorted(name.replace("_", "-") for name in settings), "extra-api-key", "allowed-host"):
        assert re.search(rf"--{flag}\b", help_text), flag


def test_serve_hands_every_flag_to_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServerConfig] = []
    monkeypatch.setattr(serve_command, "_run", seen.append)
    arguments = [
        "MODEL",
        "--host",
        "0.0.0.0",
        "--port",
        "81",
        "--api-key",
        "K",
        "--served-model-name",
        "N",
        "--max-model-len",
        "99",
        "--max-num-seqs",
        "7",
        "--max-num-batched-tokens",
        "512",
        "--gpu-memory-utilization",
        "0.5",
        "--kv-cache-dtype",
        "auto",
        "--kv-cache-tokens",
        "4096",
        "--page-size",
        "8",
        "--tensor-parallel-size",
        "1",
        "--load-format",
        "dummy",
        "--schedule-policy",
        "lpm",
        "--eviction-policy",
        "lfu",
        "--attention-backend",
        "torch",
        "--disable-radix-cache",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--seed",
        "5",
        "--drain-seconds",
        "3",
        "--max-queued-requests",
        "9",
        "--request-timeout",
        "60",
        "--max-queued-per-key",
        "4",
        "--log-level",
        "debug",
        "--check-when-idle",
        "--sampling-defaults",
        "openai",
    ]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    engine = EngineConfig(
        model="MODEL",
        max_model_len=99,
        max_num_seqs=7,
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.5,
        kv_cache_tokens=4096,
        page_size=8,
        load_format="dummy",
        schedule_policy="lpm",
        eviction_policy="lfu",
        attention_backend="torch",
        disable_radix_cache=True,
        dtype="bfloat16",
        device="cpu",
        seed=5,
        check_when_idle=True,
        sampling_defaults="openai",
    )
    assert seen == [
        ServerConfig(
            engine=engine,
            host="0.0.0.0",
            port=81,
            api_key="K",
            served_model_name="N",
            drain_seconds=3,
            max_queued_requests=9,
            request_timeout=60,
            max_queued_per_key=4,
            log_level="debug",
        )
    ]
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    assert seen[1] == ServerConfig(engine=EngineConfig())


@pytest.mark.parametrize("variable", ["BRANCHWISE_API_KEY", "BRANCHWISE_ADMIN_API_KEY"])
def test_an_empty_key_in_the_environment_does_not_mean_none(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    seen: list[ServerConfig] = []
    monkeypatch.setattr(serve_command, "_run", seen.append)
    for value in ("", " "):
        assert CliRunner().invoke(app, ["serve"], env={variable: value}).exit_code == 2
    assert not seen
    assert CliRunner().invoke(app, ["serve"], env={variable: "K"}).exit_code == 0


def test_choices_are_the_configs() -> None:
    ours = typing.get_type_hints(serve_command.serve)
    for struct in (EngineConfig, ServerConfig):
        for name, hint in typing.get_type_hints(struct).items():
            if name in ours and typing.get_origin(hint) is typing.Literal:
                assert typing.get_args(ours[name]) == typing.get_args(hint), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder"], ["/no/such/folder"]),
        (["--page-size", "0"], ["--page-size", "between 1 and 256"]),
        (["--tensor-parallel-size", "5"], ["--tensor-parallel-size", "4 attention heads"]),
        (["--gpu-memory-utilization", "3"], ["--gpu-memory-utilization", "0.98"]),
    ],
)
def test_what_cannot_be_loaded_exits_2_in_one_line(arguments: list[str], words: list[str]) -> None:
    done = branchwise("serve", "--port", "0", *arguments)
    assert_one_line_error(done, 2, *words)


@pytest.mark.parametrize(
    "command", [["serve", "--port", "0"], ["generate", "hi", "--model"]], ids=["serve", "generate"]
)
def test_a_folder_without_a_model_is_said_alike_and_before_loading(command: list[str], tmp_path: Path) -> None:
    done = branchwise(*command, str(tmp_path))
    assert_one_line_error(done, 2, f"error: {tmp_path} has no config.json")
    assert done.stdout == ""


def test_a_taken_port_is_said_before_loading() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = branchwise("serve", "--port", str(taken.getsockname()[1]))
    assert_one_line_error(done, 2, "already in use")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "/no/a", "--model", "/no/b"], ["/no/a and --model /no/b: give one of the two"]),
        (["serve", "--model", "/no/b"], ["/no/b: not a folder"]),
        (["doctor", "/no/a", "-m", "/no/b"], ["/no/a and --model /no/b"]),
        (["chat", "/no/a"], ["/no/a: not a folder"]),
        (["chat", "/no/a", "--url", "http://127.0.0.1:1"], ["--model", "--url"]),
        (["tree", "127.0.0.1:1", "--url", "127.0.0.1:2"], ["127.0.0.1:1 and --url 127.0.0.1:2"]),
        (["bench", "127.0.0.1:1", "--url", "127.0.0.1:2"], ["127.0.0.1:1 and --url 127.0.0.1:2"]),
    ],
)
def test_a_model_or_an_address_is_given_once_as_an_argument_or_a_flag(arguments: list[str], words: list[str]) -> None:
    assert_one_line_error(branchwise(*arguments, stdin="hello\n"), 2, *words)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://127.0.0.1:8000", True),
        ("https://h/v1", True),
        ("localhost:8000", True),
        ("gpu-1.lan:80/v1", True),
        ("Qwen/Qwen3-0.6B", False),
        ("models/qwen", False),
        ("C:", False),
        ("", False),
    ],
)
def test_addresses_are_told_from_models(text: str, address: bool) -> None:
    assert is_address(text) == address


@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"]], ids=["generate", "chat"])
def test_a_model_beside_a_url_is_refused(command: list[str]) -> None:
    done = branchwise(*command, "--url", "http://127.0.0.1:1", "--model", "a/b", stdin="hello\n")
    assert_one_line_error(done, 2, "--model", "--url")


def test_every_problem_that_doctor_finds_has_a_fix(tmp_path: Path) -> None:
    done = branchwise("doctor", str(tmp_path))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    broken = [i for i, line in enumerate(lines) if line.lstrip().startswith("broken ")]
    assert len(broken) == 1 and "config.json" in lines[broken[0]]
    assert all(lines[i + 1].startswith("        fix it: ") for i in broken)
    assert all(re.match(r" {4}ok  \w| {2}note  \w|broken  \w|        fix it: |$", line) for line in lines[:-1])
    assert lines[-1] == "1 broken: serving will not work until it is fixed."


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command: str) -> None:
    shown = plain(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output)
    assert not re.search(r"--[\w-]+…", shown)
    if command == "serve":
        for flag in FLAGS:
            assert re.search(rf"{flag}\s", shown), flag


@pytest.mark.parametrize("arguments", [["--max-tools", "0"], ["--port", "65536"], ["--request-timeout", "0"]])
def test_a_bound_beyond_what_there_is_is_refused(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "160"})
    assert done.exit_code == 2 and f"Invalid value for '{arguments[0]}'" in plain(done.output)


def test_a_choice_that_does_not_exist_is_refused() -> None:
    done = branchwise("serve", "--schedule-policy", "random")
    assert done.returncode == 2 and "hrrn" in done.stderr and "Traceback" not in done.stderr


def test_generate_names_the_field_it_refuses() -> None:
    done = branchwise("generate", "hello", "--temperature", "-1")
    assert done.returncode == 1
    assert "error: --temperature must be at least 0" in done.stderr and "Traceback" not in done.stderr


def test_generate_answers_in_process() -> None:
    done = branchwise("generate", "Once upon a time", "-", "--max-tokens", "3", "--json", stdin="Once upon a time")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first["text"] == second["text"]
    assert first["prompt_tokens"] == second["prompt_tokens"] > 3
    assert first["finish_reason"] in ("length", "stop") and 1 <= first["completion_tokens"] <= 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["tree"],
        ["tree", "--url"],
        ["top", "--once"],
        ["bench", "--url"],
        ["generate", "hi", "--url"],
        ["chat", "--url"],
        ["chat"],
    ],
    ids=" ".join,
)
def test_no_server_is_one_line(arguments: list[str], unused_port: int) -> None:
    done = branchwise(*arguments, f"http://127.0.0.1:{unused_port}", stdin="hello\n")
    assert_one_line_error(done, 1, "no server answers at", str(unused_port), "refused")


def test_an_address_may_end_as_openais_do() -> None:
    for url in ("http://h:8000/v1", "http://h:8000/v1/", "h:8000/", "http://h:8000"):
        assert Client(url).url == "http://h:8000"
    assert Client("http://h/some/v12").url == "http://h/some/v12"


def test_not_an_address() -> None:
    assert_one_line_error(branchwise("tree", "ftp://somewhere"), 1, "ftp://somewhere")


def test_bench_names_the_workloads(unused_port: int) -> None:
    done = branchwise("bench", f"127.0.0.1:{unused_port}", "--workloads", "fewshot,nosuch")
    assert_one_line_error(done, 1, "nosuch", "tree_of_thought")


def test_version() -> None:
    import branchwise as package

    assert branchwise("--version").stdout.strip() == f"branchwise {package.__version__}"


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--model-path", "--model-path: called --model here"),
        ("--tp", "--tp: called --tensor-parallel-size here"),
        ("--enforce-eager", "--enforce-eager: called --no-cuda-graphs here"),
        ("--speculative-config", "--speculative-config: not there yet"),
        ("--enable-prefix-caching", "--enable-prefix-caching: always on"),
        ("--hicache-size", "--hicache-size: called --host-cache here"),
        ("--data-parallel-size", "--data-parallel-size: branchwise cluster runs several replicas"),
    ],
)
def test_flags_of_vllm_and_sglang_say_what_to_write_instead(flag: str, said: str) -> None:
    done = branchwise("serve", flag, "x")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = plain(done.stderr).splitlines()
    assert line.startswith(f"error: {said}")


def test_what_is_said_of_their_flags_is_true() -> None:
    shown = plain(CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output)
    ours = set(re.findall(r"--[a-z][a-z-]+", shown))
    assert not ours & PEERS.keys(), "a flag of ours is never taken for theirs"
    named = {word for said in PEERS.values() for word in re.findall(r"--[a-z][a-z-]+", said)}
    assert named and named <= ours


def test_a_value_that_looks_like_one_of_their_flags_is_a_value() -> None:
    done = branchwise("serve", "--served-model-name", "x", "--", "--model")
    assert done.returncode == 2 and "--model: not a folder" in plain(done.stderr)


def test_doctor_names_gpus_that_do_not_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from branchwise.frontend.cli import checkup

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 2})
    [finding] = checkup._peer_access([0, 1, 2])
    assert finding.state == "note" and "none from cuda:0 to cuda:2, cuda:2 to cuda:0:" in finding.found
    assert "nvidia-smi topo" in finding.fix
    [finding] = checkup._peer_access([0, 1])
    assert finding.state == "ok"
    assert not list(checkup._peer_access([0]))


def test_doctor_says_that_each_start_compiles_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from branchwise.frontend.cli import checkup

    monkeypatch.setattr(checkup, "cache_from_source", lambda source: str(tmp_path / "torch.pyc"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert not list(checkup.bytecode())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    [finding] = checkup.bytecode()
    assert finding.state == "note" and "-m compileall -q" in finding.fix
    (tmp_path / "torch.pyc").touch()
    assert not list(checkup.bytecode())


def test_docs_list_the_manual_and_show_a_page() -> None:
    listed = branchwise("docs").stdout
    assert re.search(r"^  language +The program language$", listed, re.M) and "  http/chat " in listed
    examples = Path(re.search(r"^examples: (.+)$", listed, re.M)[1])  # type: ignore[index]
    assert (examples / "tree_of_thought.py").is_file()
    assert "**branchwise docs**" in str(app.info.epilog)
    for name in ("http/chat", "chat", "docs/http/chat.md", "CHAT"):
        assert branchwise("docs", name).stdout.startswith("# POST /v1/chat/completions"), name
    assert_one_line_error(branchwise("docs", "nothing"), 1, "no page is called nothing", "branchwise docs")


def test_what_is_advised_to_install_is_on_an_index() -> None:
    """The package itself is on none, so no message may send people there; versions are those of the gpu extra."""
    root = Path(__file__).resolve().parents[2]
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    code = "\n".join(
        path.read_text() for room in ("kernels", "runtime", "frontend") for path in (root / room).rglob("*.py")
    )
    advised = set(re.findall(r"pip install '?([\w.-]+(?:\[\w+\])?)", code))
    assert advised >= {"flashinfer-python", "triton"} and not {one for one in advised if one.startswith("branchwise")}
    assert "flashinfer-python>=0.6.12,<0.8" in extra and "triton>=3.6" in extra and "pip install 'triton>=3.6'" in code


@pytest.fixture
def folder_without_weights(tmp_path: Path) -> Path:
    """The shipped model's config and tokenizer, and an index that names weights which are not there."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "model-00001-of-00001.safetensors is missing: download the checkpoint again"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"num_hidden_layers": 200_000}, "the model does not fit: weights take"),
        (None, "it needs a tokenizer.json"),
    ],
    ids=["no weights", "unsupported", "too large", "no tokenizer"],
)
def test_a_folder_that_cannot_be_served_is_refused_alike_by_every_command(
    folder_without_weights: Path, change: dict[str, Any] | None, words: str
) -> None:
    """Before anything is loaded, and without a word of a download."""
    config = folder_without_weights / "config.json"
    if change is None:
        (folder_without_weights / "tokenizer.json").unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    for command in (["serve", "--port", "0"], ["pull"]):
        done = branchwise(*command, str(folder_without_weights))
        assert_one_line_error(done, 2, words)
        assert done.stdout == ""
    checked = branchwise("doctor", str(folder_without_weights))
    assert checked.returncode == 1 and checked.stderr == ""
    (broken,) = (line for line in checked.stdout.splitlines() if line.lstrip().startswith("broken "))
    assert words in broken
