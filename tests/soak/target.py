"""The server under test: its processes, what they use, and faults to inject into them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from branchwise.runtime.config import ServerConfig

LAUNCH = """
import json, sys
import msgspec
from branchwise.runtime.config import ServerConfig
from branchwise.runtime.server.server import run_server
sys.exit(run_server(msgspec.json.decode(sys.stdin.buffer.read(), type=ServerConfig),
                    lambda info: print(json.dumps(info), flush=True)))
"""
ADMIN = "soak-admin"
KEYS = ("soak-flood", "soak-small", "soak-hostile")


class Target:
    """One server. ``work`` is its folder for temporary files and its log."""

    def __init__(self, config: ServerConfig, work: Path) -> None:
        self.log = work / f"server-{time.time_ns()}.log"
        self._work = work
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "TMPDIR": str(work), "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(config))
        self.process.stdin.close()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")
        self.info: dict[str, Any] = json.loads(line)
        self.url: str = self.info["url"]
        self.pids: dict[str, int] = {"http": self.process.pid, **self.info["pids"]}
        self.admin = httpx.Client(base_url=self.url, headers={"x-api-key": ADMIN}, timeout=60)

    def usage(self) -> dict[str, tuple[float, int]]:
        """(resident MB, open descriptors) of each process."""
        found = {}
        for role, pid in self.pids.items():
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
                found[role] = (pages * os.sysconf("SC_PAGE_SIZE") / 1e6, descriptors)
        return found

    def stop_process(self, role: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        os.kill(self.pids[role], signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(self.pids[role], signal.SIGCONT)

    def kill_process(self, role: str) -> None:
        os.kill(self.pids[role], signal.SIGKILL)

    def lost_pages(self, seconds: float = 60.0) -> int:
        """Waits until no request is left, drops pins, branches and the cache, and counts the pages that are not free.

        Raises RuntimeError if requests are left after ``seconds``, or if an invariant is broken.
        """
        deadline = time.monotonic() + seconds
        while True:
            info = self.admin.get("/get_server_info").json()
            stats = info["stats"]
            if not (info["requests_in_flight"] or stats["running"] or stats["waiting"]):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"requests are left: {info['requests_in_flight']} in flight, {stats}")
            time.sleep(0.2)
        check = self.admin.get("/cache/check").json()
        if check != {"check": "clean"}:
            raise RuntimeError(f"an invariant is broken: {check}")
        self.admin.post("/flush_cache")
        time.sleep(1.0)
        stats = self.admin.get("/get_server_info").json()["stats"]
        return int(stats["pages_total"] - stats["pages_free"] - stats["pages_cached"])

    def end(self, number: int = signal.SIGTERM) -> list[str]:
        """Ends the server; returns what it left behind: processes and run directories."""
        self.admin.close()
        self.process.send_signal(number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return ["the server did not end within 60 s"]
        assert self.process.stdout is not None
        self.process.stdout.close()
        deadline = time.monotonic() + 5
        while True:
            left = [f"process {role}" for role, pid in self.pids.items() if _alive(pid)]
            left += [path.name for path in self._work.glob("branchwise-*")]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
