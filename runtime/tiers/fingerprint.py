"""The model and settings of pages on a disk: only an engine that would compute the same bytes reads them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Of segments, index and pages. Since 3 fp8's scales are bfloat16, and lie beside each other; since 4 nvfp4's keys are
# rotated and its scales chosen from two.
FORMAT = 4
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything that the bytes of a page depend on, but its tokens."""

    model: str  # hash of the config, and of the names, sizes and times of the weights
    computed_by: str  # device, kernels and dtype: those of others differ in the last bits
    layout: str  # heads, layers, tokens and format of a page
    page_bytes: int
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """16 characters: the folder's name."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def model_fingerprint(folder: Path, seed: int | None = None) -> str:
    """The hash of a model's folder. ``seed``: of dummy weights. A file of weights counts by name, size and content of
    its first and last MiB: reading all of it would take as long as loading it."""
    digest = hashlib.sha256(f"{seed}".encode())
    for name in ("config.json", "model.safetensors.index.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted(each for pattern in _WEIGHTS for each in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:32]
