"""Logging to a pipe that nobody reads, or to one whose reader has gone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time

from branchwise.runtime.server.log_stream import DroppingStream

LINE = "x" * 99 + "\n"


def read_all(fd: int, stream: DroppingStream) -> str:
    """What is in the pipe, until the stream has written everything."""
    os.set_blocking(fd, False)
    data, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        written = stream.drain(0.05)
        with contextlib.suppress(BlockingIOError):
            data += os.read(fd, 1 << 20)
        if written:
            break
    return data.decode()


def test_a_pipe_that_nobody_reads_costs_lines_and_no_time() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    stream = DroppingStream(writer, max_bytes=10_000)
    for _ in range(1000):
        assert stream.write(LINE) == len(LINE)  # a write that waited for the reader would wait forever
    assert not stream.drain(0.1)
    written = read_all(reader, stream).count(LINE)
    assert 100 <= written < 250
    stream.write("after\n")
    assert stream.drain(60)
    rest = os.read(reader, 1000).decode()
    assert rest == f"branchwise: {1000 - written} lines of the log were dropped: they were not read in time\nafter\n"


def test_lost_lines_are_counted_in_the_format_of_the_log() -> None:
    program = (
        "import sys, warnings\n"
        "from branchwise.runtime.config import EngineConfig, ServerConfig\n"
        "from branchwise.runtime.server.log_format import configure_logging\n"
        "stream = configure_logging(ServerConfig(engine=EngineConfig(), log_format='json'), 'http')\n"
        "stream.write('x' * (1 << 20) + '\\n' * 3)\n"
        "warnings.warn('of a library')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    lost, warning = map(json.loads, done.stderr.splitlines())
    assert lost["message"].startswith("3 lines of the log were dropped") and lost["process"] == "http"
    assert warning["level"] == "warning" and "of a library" in warning["message"]


def test_what_is_read_arrives_whole_and_in_order() -> None:
    reader, writer = os.pipe()
    stream = DroppingStream(writer)
    lines = [f"line {index}: 😀 \udc80\n" for index in range(1000)]
    for line in lines:
        stream.write(line)
    assert read_all(reader, stream) == "".join(lines).replace("\udc80", "\\udc80")


def test_a_descriptor_made_non_blocking_by_another_process() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stream = DroppingStream(writer)
    stream.write(LINE * 2000)  # more than a pipe holds
    assert read_all(reader, stream) == LINE * 2000


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = DroppingStream(writer)
    stream.write(LINE)
    assert stream.drain(60)


def test_the_last_lines_are_written_before_the_process_exits() -> None:
    code = (
        "import sys\nfrom branchwise.runtime.server.log_stream import DroppingStream\n"
        "sys.stderr = DroppingStream(2)\nprint('last', file=sys.stderr)\nraise ValueError('why')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("last\n") and "ValueError: why" in done.stderr
