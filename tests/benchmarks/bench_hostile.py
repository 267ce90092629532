"""How long a hostile body holds the HTTP process's event loop, which streams everybody's tokens.

    python tests/benchmarks/bench_hostile.py [--only chat,ids] [--rounds 3] [--branchwise DIR]

A server with the null executor, steps of 5 ms, one stream that never ends; beside it bodies of up to 16 MiB that are
written to be slow: millions of values, names, escapes, digits, tools, stop strings, ids; and each that has too many
values once more with almost too many. For each body the stream's longest gap from its first byte sent until the server
answers others again, best and worst of the rounds, and what the answer was.
``--only``: bodies whose names or paths contain one of these. ``--branchwise DIR`` measures another checkout: DIR holds
a folder (or link) named ``branchwise``.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

from bench_http import server

from branchwise.runtime.models.folder import SHIPPED

STEP_SECONDS = 0.005
BYTES = 16 * 1024 * 1024
VALUES = 262_144  # --max-json-values
MEGABYTE = 1_000_000
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, GENERATE, BRANCHES = "/v1/messages", "/generate", "/branches"
USER = b'"messages":[{"role":"user","content":"a"}]'
A = USER + b',"max_tokens":1'


class Repeated(NamedTuple):
    """A unit again and again, a comma after each but the last."""

    start: bytes
    unit: bytes
    end: bytes
    size: int = BYTES

    def times(self, count: int) -> bytes:
        return b"".join((self.start, (self.unit + b",") * (count - 1), self.unit, self.end))

    def whole(self) -> bytes:
        return self.times((self.size - len(self.start) - len(self.end)) // (len(self.unit) + 1))

    def almost(self) -> bytes | None:
        """With as many values as a server takes, where the whole has more."""
        around, each = marks(self.start + self.end), marks(self.unit) + 1
        return self.times((VALUES - around) // each) if marks(self.whole()) > VALUES else None


class Body(NamedTuple):
    path: str
    name: str
    content: bytes | Repeated


def marks(text: bytes) -> int:
    """What the server counts of a text whose strings have none of it."""
    return sum(map(text.count, (b",", b":", b"[", b"[", b"{", b"{")))


def full(start: bytes, unit: bytes, end: bytes, size: int = BYTES) -> Repeated:
    return Repeated(start, unit, end, size)


def text(start: bytes, unit: bytes, end: bytes, size: int = BYTES) -> bytes:
    return b"".join((start, unit * ((size - len(start) - len(end)) // len(unit)), end))


def names(count: int) -> bytes:
    return b",".join(b'"k%d":0' % i for i in range(count))


def quoted(inner: bytes) -> bytes:
    return json.dumps(inner.decode()).encode()


def bodies() -> Iterator[Body]:
    nest = b"[" * 60 + b"]" * 60
    for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES, GENERATE, BRANCHES, "/branches/batch", "/tokenize"):
        for unit in (b"{}", b"[]"):
            yield Body(path, f"a field nobody knows, of {unit.decode()}", full(b'{"metadata":[', unit, b"]}"))
    for unit in (b'""', b'"ab"', b"0", b"12345", b"1.5", b"null", b'{"a":0}', nest):
        shown = unit.decode() if len(unit) < 10 else "nested lists"
        yield Body(CHAT, f"a field nobody knows, of {shown}", full(b"{" + A + b',"x":[', unit, b"]}"))
    yield Body(CHAT, "names, all different", b"{" + A + b',"x":{' + names(1_300_000) + b"}}")
    yield Body(CHAT, "fields of the body, all different", b"{" + A + b"," + names(1_300_000) + b"}")
    yield Body(CHAT, "names, almost too many", b"{" + A + b',"x":{' + names(VALUES // 2 - 20) + b"}}")
    many = b'{"prompt":[1],' + names(VALUES // 2 - 20) + b"}"
    yield Body(COMPLETIONS, "ids and fields of the body, almost too many", many)
    escapes = text(b'{"max_tokens":1,"prompt":"', b"\\u00e4", b'"}', 6 * VALUES * 4)
    yield Body(COMPLETIONS, "prompt of \\u00e4, almost too many", escapes)
    ids = full(b'{"prompt":[', b"1", b"]}", 32 * VALUES - 9)
    yield Body(COMPLETIONS, "prompt, almost too many ids", ids.whole())
    yield Body(CHAT, "one name again and again", full(b"{" + A + b",", b'"x":0', b"}"))
    yield Body(CHAT, "one deep nest", text(b'{"x":', b"[", b"", BYTES))
    yield Body(CHAT, "truncated, of {}", full(b"{" + A + b',"x":[', b"{}", b""))
    yield Body(CHAT, "invalid UTF-8 after {}", full(b"{" + A + b',"x":[', b"{}", b',"\xff"]}'))
    yield Body(CHAT, "a giant integer", text(b"{" + A + b',"seed":', b"9", b"}"))
    yield Body(CHAT, "a giant fraction", text(b"{" + A + b',"temperature":0.', b"9", b"}"))
    for unit, shown in ((b"a", "a"), (b"\\n", "\\n"), (b"\\u0000", "\\u0000"), (b"\\ud83d\\ude00", "\\ud83d\\ude00")):
        content = text(b'{"max_tokens":1,"messages":[{"role":"user","content":"', unit, b'"}]}')
        yield Body(CHAT, f"one message of {shown}", content)
        yield Body(COMPLETIONS, f"prompt of {shown}", text(b'{"max_tokens":1,"prompt":"', unit, b'"}'))
    wide = "語".encode()
    yield Body(
        CHAT, "one message of 語", text(b'{"max_tokens":1,"messages":[{"role":"user","content":"', wide, b'"}]}')
    )
    yield Body(
        MESSAGES, "one message of 語", text(b'{"max_tokens":1,"messages":[{"role":"user","content":"', wide, b'"}]}')
    )
    yield Body(COMPLETIONS, "prompt of 語", text(b'{"max_tokens":1,"prompt":"', wide, b'"}'))
    yield Body(
        COMPLETIONS, "prose with commas and braces", text(b'{"max_tokens":1,"prompt":"', b"f({a, b}) [c], ", b'"}')
    )
    yield Body(CHAT, "messages {}", full(b'{"messages":[', b"{}", b"]}"))
    yield Body(CHAT, "messages of a", full(b'{"messages":[', b'{"role":"user","content":"a"}', b"]}"))
    part = b'{"type":"text","text":"a"}'
    yield Body(CHAT, "parts of a message", full(b'{"messages":[{"role":"user","content":[', part, b"]}]}"))
    yield Body(CHAT, "parts that are strings", full(b'{"messages":[{"role":"user","content":[', b'"a"', b"]}]}"))
    tool = b'{"type":"function","function":{"name":"f"}}'
    yield Body(CHAT, "tools", full(b"{" + A + b',"tools":[', tool, b"]}"))
    enum = b'{"type":"function","function":{"name":"f","parameters":{"type":"object","enum":['
    yield Body(CHAT, "a tool's schema of numbers", full(b"{" + A + b',"tools":[' + enum, b"7", b"]}}}]}"))
    yield Body(CHAT, "a tool's schema of 語", text(b"{" + A + b',"tools":[' + enum + b'"', wide, b'"]}}}]}'))
    schema = b',"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"enum":['
    yield Body(CHAT, "a schema of numbers", full(b"{" + A + schema, b"7", b"]}}}}"))
    yield Body(CHAT, "a schema of 語", text(b"{" + A + schema + b'"', wide, b'"]}}}}'))
    lists = quoted(full(b'{"enum":[', b"[]", b"]}", 15 * MEGABYTE).whole())
    yield Body(CHAT, "a schema in a string", b"{" + A + b',"json_schema":' + lists + b"}")
    call = b'{"messages":[{"role":"assistant","tool_calls":[{"type":"function","function":{"name":"f","arguments":'
    yield Body(CHAT, "a call's arguments in a string", call + lists + b"}}]}]}")
    yield Body(
        CHAT,
        "a call's arguments, a megabyte of lists",
        call + full(b'{"a":[', nest, b"]}", MEGABYTE).whole() + b"}}]}]}",
    )
    yield Body(CHAT, "calls", full(b'{"messages":[{"role":"assistant","tool_calls":[', b"{}", b"]}]}"))
    for size, what in ((MEGABYTE, "a megabyte of lists"), (BYTES, "nested lists")):
        kwargs = full(b"{" + A + b',"chat_template_kwargs":{"enable_thinking":[', nest, b"]}}", size)
        yield Body(CHAT, f"chat_template_kwargs, {what}", kwargs)
    yield Body(CHAT, "documents", full(b"{" + A + b',"documents":[', b"{}", b"]}"))
    yield Body(CHAT, "documents of 語", text(b"{" + A + b',"documents":[{"a":"', wide, b'"}]}'))
    for field, unit in (("stop", b'"a"'), ("stop", b"7"), ("stop_token_ids", b'"a"'), ("tools", b"7")):
        content = full(b"{" + A + b',"%s":[' % field.encode(), unit, b"]}")
        yield Body(CHAT, f"{field} of {unit.decode()}", content)
        few = full(b"{" + A + b',"%s":[' % field.encode(), unit, b"]}", 16_384 * (len(unit) + 1))
        yield Body(CHAT, f"{field} of {unit.decode()}, 16,384", few)
    yield Body(CHAT, "logit_bias", b"{" + A + b',"logit_bias":{' + names(1_300_000) + b"}}")
    yield Body(
        CHAT,
        "logit_bias of strings, 16,384",
        b"{" + A + b',"logit_bias":{' + names(16_000).replace(b"0,", b'"a",') + b"}}",
    )
    yield Body(COMPLETIONS, "stop, one of 語", text(b'{"prompt":"a","stop":"', wide, b'"}'))
    yield Body(COMPLETIONS, "user, one of 語", text(b'{"prompt":"a","max_tokens":1,"user":"', wide, b'"}'))
    for unit in (b"1", b"12345", b'"a"', b"[1]", b"[]", b"-1", b"1.5", b"[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]"):
        yield Body(
            COMPLETIONS, f"prompt, a list of {unit.decode()[:12]}", full(b'{"max_tokens":1,"prompt":[', unit, b"]}")
        )
        yield Body(GENERATE, f"input_ids, a list of {unit.decode()[:12]}", full(b'{"input_ids":[', unit, b"]}"))
    long = b"[" + b",".join([b"12345"] * 2_700) + b"]"
    yield Body(COMPLETIONS, "1,024 prompts of 2,700 ids, honest", full(b'{"max_tokens":1,"prompt":[', long, b"]}"))
    yield Body(GENERATE, "text, a list of a", full(b'{"text":[', b'"a"', b"]}"))
    yield Body(GENERATE, "sampling_params, a list of {}", full(b'{"text":"a","sampling_params":[', b"{}", b"]}"))
    sampled = [b"{}"] * 1024
    sampled = [b'{"stop":["a","b"],"stop_token_ids":[1,2],"logit_bias":{"1":1}}'] * 1024
    prompts = b",".join([b'"a"'] * 1024)
    few = b'{"text":[' + prompts + b'],"sampling_params":[' + b",".join(sampled) + b"]}"
    yield Body(GENERATE, "1,024 prompts with parameters, honest", few)
    yield Body(RESPONSES, "input of {}", full(b'{"input":[', b"{}", b"]}"))
    yield Body(
        RESPONSES, "reasoning's content", full(b'{"input":[{"type":"reasoning","content":[', b'{"text":"a"}', b"]}]}")
    )
    yield Body(RESPONSES, "metadata", b'{"input":"a","metadata":{' + names(1_300_000) + b"}}")
    yield Body(RESPONSES, "include of 7", full(b'{"input":"a","include":[', b"7", b"]}"))
    yield Body(MESSAGES, "messages {}", full(b'{"max_tokens":1,"messages":[', b"{}", b"]}"))
    block = b'{"type":"text","text":"a"}'
    yield Body(MESSAGES, "system of blocks", full(b"{" + A + b',"system":[', block, b"]}"))
    use = b'{"max_tokens":1,"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"f",'
    use += b'"input":{"a":['
    yield Body(MESSAGES, "a tool_use's input, a megabyte of lists", full(use, nest, b"]}}]}]}", MEGABYTE))
    yield Body(MESSAGES, "a tool_use's input, nested lists", full(use, nest, b"]}}]}]}"))
    yield Body(MESSAGES, "a tool_use's input of 語", text(use + b'"', wide, b'"]}}]}]}'))
    yield Body(MESSAGES, "tools", full(b"{" + A + b',"tools":[', b'{"name":"f","input_schema":{}}', b"]}"))
    yield Body(f"{MESSAGES}/count_tokens", "messages {}", full(b'{"messages":[', b"{}", b"]}"))
    yield Body(BRANCHES, "input_ids", full(b'{"input_ids":[', b"1", b"]}"))
    yield Body("/branches/batch", "ops {}", full(b'{"ops":[', b"{}", b"]}"))
    yield Body(
        "/branches/batch", "1,024 wrong ops", full(b'{"ops":[', b'{"op":"create","text":7,"ttl":[]}', b"]}", 34 * 1024)
    )
    yield Body("/branches/none/extend", "input_ids", full(b'{"input_ids":[', b"1", b"]}"))
    yield Body("/branches/none/generate", "extend", full(b'{"extend":[', b"1", b"]}"))
    yield Body("/branches/none/score", "continuations", full(b'{"continuations":[', b"[1]", b"]}"))
    yield Body("/tokenize", "messages {}", full(b'{"messages":[', b"{}", b"]}"))
    yield Body("/tokenize", "prompt of 語", text(b'{"prompt":"', wide, b'"}'))
    yield Body(
        "/tokenize",
        "a million bytes, with strings",
        text(b'{"return_token_strs":true,"prompt":"', b"a b ", b'"}', MEGABYTE),
    )
    yield Body("/detokenize", "tokens of 1", full(b'{"tokens":[', b"1", b"]}"))
    yield Body("/detokenize", "a million tokens", full(b'{"tokens":[', b"1", b"]}", 2 * MEGABYTE))
    yield Body(
        "/detokenize", "a million tokens, the last wrong", full(b'{"tokens":[', b"1", b",9999999]}", 2 * MEGABYTE - 99)
    )
    yield Body("/cache/warm", "prompts", full(b'{"prompts":[', b"[1]", b"]}"))
    yield Body("/cache/explain", "prompt", full(b'{"prompt":[', b"1", b"]}"))
    yield Body("/cache/pin", "prompt of {}", full(b'{"prompt":[', b"{}", b"]}"))
    yield Body("/abort_request", "rid of {}", full(b'{"rid":[', b"{}", b"]}"))


def written_out(found: Iterator[Body]) -> Iterator[Body]:
    """And with each body that has too many values one that has almost too many."""
    for body in found:
        if not isinstance(body.content, Repeated):
            yield body
            continue
        yield body._replace(content=body.content.whole())
        if (few := body.content.almost()) is not None:
            yield body._replace(name=f"{body.name}, almost too many", content=few)


def read(port: int, marks: Connection) -> None:
    """A stream without end; whenever ``marks`` says so, the longest gap in seconds since it last did."""
    longest, last = 0.0, time.perf_counter()
    content = json.dumps({"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    while True:
        with socket.create_connection(("127.0.0.1", port)) as stream:
            stream.sendall(head.encode() + content)
            while True:
                ready = wait([stream, marks])
                now = time.perf_counter()
                longest = max(longest, now - last)
                if marks in ready:
                    if not marks.recv():
                        return
                    marks.send(longest)
                    longest = 0.0
                if stream in ready:
                    last = now
                    if not stream.recv(65_536):
                        break


def send(port: int, body: Body) -> str:
    """Status and message."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.suppress(OSError):  # refused before all of it was sent: the answer may still be there
        connection.request("POST", body.path, body.content)
    try:
        answer = connection.getresponse()
        said = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {type(error).__name__}"
    finally:
        connection.close()
    if answer.status == 200:
        return f"200, {len(said)} bytes"
    return f"{answer.status} {json.loads(said)['error']['message'][:90]}"


def get_health(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
        answer.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--branchwise", type=Path, help="a folder that holds another checkout named branchwise")
    args = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}\n")
    print("| route | body | MB | longest gap, ms | seconds | answer |\n| --- | --- | ---: | ---: | ---: | --- |")
    with server(SHIPPED, STEP_SECONDS, args.branchwise, max_model_len=4352) as running:
        marks, theirs = multiprocessing.Pipe()
        reader = multiprocessing.get_context("fork").Process(target=read, args=(running.port, theirs), daemon=True)
        reader.start()

        def longest() -> float:
            marks.send(True)
            return float(marks.recv())

        time.sleep(1)
        for body in (Body("-", "nothing", b""), *written_out(bodies())):
            if body.content and not any(word in f"{body.path} {body.name}" for word in args.only.split(",")):
                continue
            gaps, seconds, said = [], [], ""
            for _ in range(args.rounds):
                longest()
                start = time.perf_counter()
                if body.content:
                    said = send(running.port, body)
                else:
                    time.sleep(1)
                seconds.append(time.perf_counter() - start)
                get_health(running.port)  # an answer may come before what it was about is let go of
                time.sleep(0.1)
                gaps.append(longest())
            shown = said.replace("|", "/").replace("\n", " ")
            print(
                f"| {body.path} | {body.name} | {len(body.content) / 1e6:.1f} | {min(gaps) * 1e3:.0f} to "
                f"{max(gaps) * 1e3:.0f} | {min(seconds):.2f} | {shown} |",
                flush=True,
            )
        marks.send(False)
        reader.join()


if __name__ == "__main__":
    main()
