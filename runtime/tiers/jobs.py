"""An operator's jobs on the disk tier of a running server: list, verify, prune, save to a file, load from one.

A job runs on the disk's threads and is polled until it is done, so that serving continues. Files are in the folder
``saved`` of the disk cache; a client can name no others.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...radix import files
from ...radix.node import DEVICE, DISK, HOST, Int32, Namespace, Node, join
from ...radix.tree import RadixTree
from ..errors import InvalidRequest, LoadError
from .copies import Ended
from .disk import DiskTier
from .saved import SavedFile

logger = logging.getLogger(__name__)

_MOST_JOBS = 16
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


# A job yields work for the disk's threads, a function of an id, and is resumed with the work's result; or it yields
# None, and is resumed when its state is next polled. It returns its result, JSON-able, or raises `InvalidRequest`.
Work = Callable[[int], None]
Steps = Generator[Work | None, Ended | None, dict[str, Any]]


@dataclass(slots=True)
class Job:
    """One operation."""

    steps: Steps
    paused: bool = False  # until it is polled
    result: dict[str, Any] | None = None
    error: InvalidRequest | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None


class DiskJobs:
    """The jobs of one disk tier. ``persist``: begins to write a node to the disk."""

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
        """Starts to read every page on the disk. Damaged pages are dropped, with those that continue them."""
        return self._begin(self._verify())

    def compare_ranks(self) -> None:
        """Starts to drop the pages in rank 0's index that another rank, whose disk was damaged, does not have."""
        if self._disk.parts > 1:
            self._advance(Job(self._verify(read=False)))

    def save(self, namespace: Namespace, tokens: Int32, file: str) -> int:
        """Begins to save the whole pages of a prompt that is cached. Raises `InvalidRequest`."""
        self._require_one_device()
        whole = len(tokens) // self._tree.page_size * self._tree.page_size
        if not whole:
            raise InvalidRequest("prompt", f"must have at least one page of {self._tree.page_size} tokens")
        return self._begin(self._save(namespace, tokens[:whole].copy(), self._path(file)))

    def load(self, namespace: Namespace, file: str) -> int:
        """Begins to add the pages of a saved file, as those of ``namespace``. Raises `InvalidRequest`."""
        self._require_one_device()
        path = self._path(file)
        if not path.is_file():
            raise InvalidRequest("file", f"there is no file {file} in {self._saved}")
        return self._begin(self._load(namespace, path))

    def answer(self, number: int) -> dict[str, Any]:
        """``done``, and the result of a job that is, which is then deleted. Raises `InvalidRequest` if it failed."""
        job = self._jobs.get(number)
        if job is None:
            raise InvalidRequest("job", f"there is no job {number}")
        if job.paused:
            self._advance(job)
        if not job.done:
            return {"done": False}
        del self._jobs[number]
        if job.error is not None:
            raise job.error
        return {"done": True, **(job.result or {})}

    def apply(self, end: Ended) -> bool:
        """Resumes the job that started this operation of the disk's threads. False: no job did."""
        job = self._running.pop(end.id, None)
        if job is not None:
            self._advance(job, end)
        return job is not None

    # ---- the jobs' steps ----

    def _verify(self, read: bool = True) -> Steps:
        records, structure = [record for node in self._on_disk() for record in node.disk.tolist()], self._tree.structure
        found: list[int] = []
        yield lambda id: self._disk.verify(id, records, found, read=read)
        bad = set(found)
        if bad and structure.disk is not None:
            logger.warning("disk cache: %d pages are damaged or not on every rank, and are dropped", len(bad))
            for node in self._on_disk():
                good = next((i for i, record in enumerate(node.disk.tolist()) if record in bad), None)
                if good:
                    structure.split(node, good)
                if good is not None:
                    structure.forget(node, structure.disk)
            structure.events.deliver()
        return {"pages": len(records), "damaged_pages": len(bad)}

    def _save(self, namespace: Namespace, tokens: Int32, path: Path) -> Steps:
        moves, size = self._tree.moves, self._tree.page_size
        while (transfer := files.begin_save(moves, tokens, namespace)) is None:
            self._write(namespace, tokens)
            yield None
        records = transfer.source_slots
        pages = [tokens[i * size : (i + 1) * size] for i in range(len(records))]
        end = yield lambda id: self._disk.save(id, path, records, pages)
        moves.cancel(transfer)
        if end is None or end.good < len(pages):
            raise InvalidRequest("file", "could not be written: the server's log says why", status=503)
        return {"file": path.name, "tokens": len(tokens), "pages": len(pages)}

    def _write(self, namespace: Namespace, tokens: Int32) -> None:
        """Begins to write a prompt to the disk, unless something is being written. Raises `InvalidRequest`."""
        moves, reach = self._tree.moves, self._tree.reach(tokens, namespace)
        if reach.device + reach.host + reach.disk < len(tokens):
            raise InvalidRequest("prompt", "is not cached to its end: compute it first with /cache/warm")
        if not self._disk.keeps(namespace):
            raise InvalidRequest("cache_salt", "keeps a prompt off the disk, unless --disk-cache-salted is set")
        if self._disk.failing:
            raise InvalidRequest(None, "the disk cannot be written: the server's log says why", status=503)
        end = moves.end_of(namespace, tokens)
        if end is not None and not any(transfer.target == DISK for transfer in moves.active):
            self._persist(end)

    def _load(self, namespace: Namespace, path: Path) -> Steps:
        scanned: list[SavedFile | LoadError] = []

        def scan() -> None:
            try:
                scanned.append(SavedFile(path, self._disk.folder.fingerprint))
            except LoadError as error:
                scanned.append(error)

        yield lambda id: self._disk.read_file(id, scan)
        file = scanned[0] if scanned else LoadError("the server's log says why")
        if isinstance(file, LoadError):
            raise InvalidRequest("file", f"was refused: {file}") from file
        added = 0
        try:
            for prefix in file.paths():
                added += yield from self._load_prefix(file, prefix, namespace)
        finally:
            file.close()
        return {"pages": len(file.pages), "added_pages": added}

    def _load_prefix(
        self, file: SavedFile, path: Sequence[int], namespace: Namespace
    ) -> Generator[Work | None, Ended | None, int]:
        """Adds the whole pages of one prefix of a file, at the places ``path``. Returns how many the disk lacked."""
        size, moves, disk = self._tree.page_size, self._tree.moves, self._tree.structure.disk
        pages = [file.pages[place].ids for place in path]
        while pages and len(pages[-1]) < size:  # the tree has partial pages only of requests of its own
            pages.pop()
        if not pages or any(len(page) != size for page in pages):
            return 0
        tokens = join(pages)
        begun = files.begin_load(moves, tokens, namespace)
        if begun is None:
            raise InvalidRequest("file", "does not fit into the disk tier (--disk-cache-size)")
        transfer, known = begun
        if disk is not None:  # before they are written again
            self._disk.delete(disk.take_freed())
        before, records = transfer.before, transfer.target_slots
        rows = [(namespace, page) for page in pages[known:]]
        end = yield lambda id: self._disk.load(id, file, path[known : len(pages)], before, rows, records)
        good = 0 if end is None else end.good
        added = files.end_load(moves, transfer, tokens, good)
        if good < len(records):
            raise InvalidRequest("file", "has changed, or the disk cannot be written: the server's log says which")
        return added

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

    def _begin(self, steps: Steps) -> int:
        """The number of a new job, which has begun."""
        if len(self._jobs) >= _MOST_JOBS:
            for number in [number for number, each in self._jobs.items() if each.done]:
                del self._jobs[number]  # their results were not fetched
        if len(self._jobs) >= _MOST_JOBS:
            raise InvalidRequest(None, f"{_MOST_JOBS} jobs are running: try again when one is done", status=429)
        number = next(self._numbers)
        self._jobs[number] = Job(steps)
        self._advance(self._jobs[number])
        return number

    def _advance(self, job: Job, end: Ended | None = None) -> None:
        """Takes a job to its next step. ``end``: of what the disk's threads did for it."""
        try:
            work = job.steps.send(end)
        except StopIteration as stop:
            job.result = stop.value
        except InvalidRequest as error:
            job.error = error
        else:
            job.paused = work is None
            if work is not None:
                id = self._new_id()
                self._running[id] = job
                work(id)

    def _on_disk(self) -> list[Node]:
        return [node for node in self._tree.structure.nodes() if len(node.disk)]
