"""What an operator does with the disk tier of a running server: list, verify, prune, save to a file, load from one.

A job runs on the threads of the disk and is asked after until it is done, so that serving goes on meanwhile. Files are
in the folder ``saved`` of the disk cache, so that a client names files of this folder and no others.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...radix import files
from ...radix.moves import Transfer
from ...radix.node import DEVICE, DISK, HOST, Int32, Namespace, Node, join
from ...radix.tree import RadixTree
from ..errors import InvalidRequest, LoadError
from .copies import Ended
from .disk import DiskTier
from .saved import SavedFile

logger = logging.getLogger(__name__)

_MOST_JOBS = 16
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(slots=True)
class Job:
    """One operation. ``facts``: what is known of its result, JSON-able."""

    what: str
    namespace: Namespace = ("", "")
    tokens: Int32 | None = None
    path: Path | None = None
    transfer: Transfer | None = None
    file: SavedFile | None = None
    paths: Iterator[list[int]] = field(default_factory=lambda: iter(()))  # of the file, yet to be loaded
    bad: list[int] = field(default_factory=list)  # records
    facts: dict[str, Any] = field(default_factory=dict)
    error: InvalidRequest | None = None
    done: bool = False


class DiskJobs:
    """The jobs of one disk tier. ``persist``: begins to write a node to the disk; ``end_of``: see `Moves.end_of`."""

    def __init__(self, tree: RadixTree, disk: DiskTier, new_id: Callable[[], int], persist: Callable[[Node], object]):
        self._tree = tree
        self._disk = disk
        self._new_id = new_id
        self._persist = persist
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._running: dict[int, Job] = {}  # by the id of what the disk's threads do for it

    @property
    def busy(self) -> bool:
        """Whether the disk's threads work for a job."""
        return bool(self._running)

    # ---- begun by an operator ----

    def tiers(self) -> dict[str, Any]:
        """Every tier's pages, and the files that can be loaded."""
        structure = self._tree.structure
        names = {DEVICE: "device", HOST: "host"}
        folder = self._disk.folder
        saved = sorted(self._saved.glob("*")) if self._saved.is_dir() else []
        return {
            "page_size": self._tree.page_size,
            "page_bytes": folder.page_bytes * self._disk.parts,
            "tiers": {
                names.get(tier.number, "disk"): {"pages": tier.slots.total, "cached": tier.cached}
                for tier in structure.tiers
            },
            "folder": str(folder.path),
            "fingerprint": folder.fingerprint.facts(),
            "files": [
                {"file": each.name, "bytes": each.stat().st_size}
                for each in saved
                if _FILE_NAME.fullmatch(each.name) and not each.name.endswith(".tmp")
            ],
        }

    def prune(self, keep_bytes: int) -> dict[str, Any]:
        """Deletes the prefixes from the disk that would be evicted next, until the rest takes at most so many bytes."""
        disk = self._tree.structure.disk
        if disk is None:
            raise RuntimeError("there is no disk tier")
        size = self._disk.folder.page_bytes * self._disk.parts
        gone = min(disk.evictable, max(0, disk.cached - keep_bytes // size))
        disk.free(self._tree.structure.evict(disk, gone, "pruned"))
        self._tree.structure.events.deliver()
        return {"pruned_pages": gone, "pages": disk.cached, "bytes": disk.cached * size}

    def verify(self) -> int:
        """Begins to read every page on the disk. Those that are damaged are forgotten, with what continues them."""
        job, number = self._add(Job("verify"))
        self._verify(job)
        return number

    def compare_ranks(self) -> None:
        """Begins to forget what rank 0's index has and that of another rank has not, whose disk was damaged."""
        if self._disk.parts > 1:
            self._verify(Job("verify"), read=False)

    def _verify(self, job: Job, read: bool = True) -> None:
        records = [record for node in self._on_disk() for record in node.disk.tolist()]
        job.facts = {"pages": len(records)}
        self._run(job, lambda id: self._disk.verify(id, records, job.bad, read=read))

    def save(self, namespace: Namespace, tokens: Int32, file: str) -> int:
        """Begins to save the whole pages of a prompt that is cached. Raises `InvalidRequest`."""
        self._require_one_device()
        whole = len(tokens) // self._tree.page_size * self._tree.page_size
        if not whole:
            raise InvalidRequest("prompt", f"must have at least one page of {self._tree.page_size} tokens")
        job, number = self._add(Job("save", namespace, tokens[:whole].copy(), self._path(file)))
        self._try_to_save(job)
        return number

    def load(self, namespace: Namespace, file: str) -> int:
        """Begins to add the pages of a saved file, as those of ``namespace``. Raises `InvalidRequest`."""
        self._require_one_device()
        path = self._path(file)
        if not path.is_file():
            raise InvalidRequest("file", f"there is no file {file} in {self._saved}")
        job, number = self._add(Job("load", namespace, path=path, facts={"pages": 0, "added_pages": 0}))

        def scan() -> None:
            try:
                job.file = SavedFile(path, self._disk.folder.fingerprint)
            except LoadError as error:
                job.error = InvalidRequest("file", f"was refused: {error}")

        self._run(job, lambda id: self._disk.read_file(id, scan))
        return number

    def answer(self, number: int) -> dict[str, Any]:
        """``done``, and the result of a job that is; it is forgotten then. Raises `InvalidRequest` if it failed."""
        job = self._jobs.get(number)
        if job is None:
            raise InvalidRequest("job", f"there is no job {number}")
        if job.what == "save" and not job.done and job.transfer is None:
            self._try_to_save(job)
        if not job.done:
            return {"done": False}
        del self._jobs[number]
        if job.error is not None:
            raise job.error
        return {"done": True, **job.facts}

    # ---- ended by the disk's threads ----

    def apply(self, end: Ended) -> bool:
        """Whether what has ended was for a job, which goes on or is done."""
        job = self._running.pop(end.id, None)
        if job is None:
            return False
        if job.what == "verify":
            self._forget(job)
        elif job.what == "save":
            self._saved_ended(job, end)
        elif job.error is not None:
            job.done = True
        elif job.transfer is None and job.file is not None:
            job.paths, job.facts["pages"] = iter(job.file.paths()), len(job.file.pages)
            self._load_next(job)
        else:
            self._load_ended(job, end)
        return True

    def _forget(self, job: Job) -> None:
        structure, bad = self._tree.structure, set(job.bad)
        if bad and structure.disk is not None:
            logger.warning("disk cache: %d pages are damaged or not on every rank, and are dropped", len(bad))
            for node in self._on_disk():
                good = next((i for i, record in enumerate(node.disk.tolist()) if record in bad), None)
                if good:
                    structure.split(node, good)
                if good is not None:
                    structure.forget(node, structure.disk)
            structure.events.deliver()
        job.facts["damaged_pages"], job.done = len(bad), True

    def _try_to_save(self, job: Job) -> None:
        """Begins to save what is on the disk, or first to write there what is not."""
        if job.tokens is None or job.path is None:
            raise RuntimeError("a save without a prompt or a file")
        moves = self._tree.moves
        job.transfer = files.begin_save(moves, job.tokens, job.namespace)
        if job.transfer is not None:
            size, path, records = self._tree.page_size, job.path, job.transfer.source_slots
            pages = [job.tokens[i * size : (i + 1) * size] for i in range(len(records))]
            self._run(job, lambda id: self._disk.save(id, path, records, pages))
            return
        reach = self._tree.reach(job.tokens, job.namespace)
        if reach.device + reach.host + reach.disk < len(job.tokens):
            job.error = InvalidRequest("prompt", "is not cached to its end: compute it first with /cache/warm")
        elif not self._disk.keeps(job.namespace):
            job.error = InvalidRequest("cache_salt", "keeps a prompt off the disk, unless --disk-cache-salted is set")
        elif self._disk.failing:
            job.error = InvalidRequest(None, "the disk cannot be written: the server's log says why", status=503)
        job.done = job.error is not None
        end = moves.end_of(job.namespace, job.tokens)
        writing = any(transfer.target == DISK for transfer in moves.active)
        if end is not None and not job.done and not writing:
            self._persist(end)

    def _saved_ended(self, job: Job, end: Ended) -> None:
        if job.transfer is None or job.tokens is None or job.path is None:
            raise RuntimeError("a save ended that had not begun")
        pages = len(job.transfer.source_slots)
        self._tree.moves.cancel(job.transfer)
        if end.good < pages:
            job.error = InvalidRequest("file", "could not be written: the server's log says why", status=503)
        else:
            job.facts = {"file": job.path.name, "tokens": len(job.tokens), "pages": pages}
        job.done = True

    def _load_next(self, job: Job) -> None:
        """Begins to write the next prefix of the file to the disk, or ends the job."""
        if job.file is None:
            raise RuntimeError("a load without a file")
        for path in job.paths:
            pages = [job.file.pages[place].ids for place in path]
            size = self._tree.page_size
            while pages and len(pages[-1]) < size:  # the tree has partial pages only of requests of its own
                pages.pop()
            if not pages or any(len(page) != size for page in pages):
                continue
            job.tokens = join(pages)
            begun = files.begin_load(self._tree.moves, job.tokens, job.namespace)
            if begun is None:
                job.error = InvalidRequest("file", "does not fit into the disk tier (--disk-cache-size)")
                break
            job.transfer, known = begun
            before, records, file = job.transfer.before, job.transfer.target_slots, job.file
            places = path[known : len(pages)]
            rows = [(job.namespace, page) for page in pages[known:]]
            if self._tree.structure.disk is not None:  # before they are written again
                self._disk.delete(self._tree.structure.disk.take_freed())
            self._run(job, lambda id: self._disk.load(id, file, places, before, rows, records))  # noqa: B023
            return
        job.file.close()
        job.done = True

    def _load_ended(self, job: Job, end: Ended) -> None:
        if job.transfer is None or job.tokens is None:
            raise RuntimeError("a load ended that had not begun")
        whole = end.good == len(job.transfer.target_slots)
        job.facts["added_pages"] += files.end_load(self._tree.moves, job.transfer, job.tokens, end.good)
        job.transfer = None
        if not whole:
            job.error = InvalidRequest(
                "file", "has changed, or the disk cannot be written: the server's log says which"
            )
            job.paths = iter(())
        self._load_next(job)

    # ---- helpers ----

    def _require_one_device(self) -> None:
        if self._disk.parts > 1:
            why = f"files hold the pages of a model on one device, and this one is split over {self._disk.parts}"
            raise InvalidRequest("file", why)

    @property
    def _saved(self) -> Path:
        return self._disk.folder.path.parent / "saved"

    def _path(self, file: str) -> Path:
        if not _FILE_NAME.fullmatch(file) or file.endswith(".tmp"):
            raise InvalidRequest("file", "must be a name of letters, digits, dots, dashes and underscores")
        return self._saved / file

    def _add(self, job: Job) -> tuple[Job, int]:
        if len(self._jobs) >= _MOST_JOBS:
            for number in [number for number, each in self._jobs.items() if each.done]:
                del self._jobs[number]  # nobody asked after them
        if len(self._jobs) >= _MOST_JOBS:
            raise InvalidRequest(None, f"{_MOST_JOBS} jobs are running: try again when one is done", status=429)
        number = next(self._numbers)
        self._jobs[number] = job
        return job, number

    def _run(self, job: Job, begin: Callable[[int], None]) -> None:
        id = self._new_id()
        self._running[id] = job
        begin(id)

    def _on_disk(self) -> list[Node]:
        return [node for node in self._tree.structure.nodes() if len(node.disk)]
