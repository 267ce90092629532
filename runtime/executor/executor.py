"""The device side of a step: owns weights, KV pool, page table and sampler state, and runs one `StepPlan` at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.attention.base import AttentionBatch
from ...kernels.attention.torch_backend import TorchAttention
from ..config import EngineConfig, check, step_budget
from ..errors import LoadError
from ..model_folder import model_folder
from ..models.config import ModelConfig, load_config
from ..models.decoder import Decoder
from ..models.loader import Progress, dummy_weights, load_weights
from ..step import PENDING, RowStart, StepPlan, StepResult
from .memory import MemoryPlan, plan_memory
from .prompt_logprobs import PromptLogprobs, PromptRows
from .sampler import Sampled, Sampler
from .threads import ThreadChoice

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class LaunchedStep:
    """A step on its way. `PendingStep`: reading the result is the only wait for the device."""

    _sampled: Sampled | None
    _prompt: list[PromptRows]

    def result(self) -> StepResult:
        step = StepResult(np.empty(0, np.int32))
        if self._sampled is not None:
            step.tokens, step.logprobs = self._sampled.to_result()
        step.prompt_logprobs = {rows.index: (rows.start, rows.to_host()) for rows in self._prompt}
        return step


class ModelExecutor:
    """One rank on one device. Not thread-safe: the scheduler's thread alone calls it.

    Rows and pages are the planner's business: nothing here checks that a page belongs to a row.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, decoder: Decoder, memory: MemoryPlan) -> None:
        """Allocates the pool and the page table. Most callers want `load`."""
        self.model_config, self.memory_plan = model, memory
        self.device = torch.device(memory.device)
        self.num_pages, self.page_size, self.vocab_size = memory.num_pages, memory.page_size, model.vocab_size
        self.max_model_len = max_model_len(config, model)
        self.eos_ids = model.eos_ids
        self._decoder = decoder
        pool_shape = (model.num_layers, 2, self.num_pages, self.page_size, model.num_kv_heads, model.head_dim)
        self._pool = _zeros(pool_shape, memory.dtype, self.device)
        self._host_table = np.zeros((memory.max_num_seqs, memory.max_pages_per_row), np.int32)
        self._table = torch.from_numpy(self._host_table).to(self.device)  # on a CPU: the same memory
        self._last_token = torch.zeros(memory.max_num_seqs, dtype=torch.int64, device=self.device)
        self._attention = TorchAttention(self._pool, decoder.layer_specs(), model.num_heads)
        self._sampler = Sampler(memory.max_num_seqs, model.vocab_size, self.device, eos_ids=model.eos_ids)
        self._prompt_logprobs = PromptLogprobs(decoder, self.device)
        self._threads = ThreadChoice(memory)

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None) -> ModelExecutor:
        """Reads the model of ``config.model`` and sets everything up. ``progress`` hears (bytes loaded, bytes in all).

        Raises `LoadError`: one line that says what is wrong and what to do.
        """
        check(config)
        device = pick_device(config)
        folder = model_folder(config.model)
        model = load_config(folder)
        dtype = pick_dtype(config, model, device)
        batched = step_budget(config, gpu=device.type == "cuda")
        memory = plan_memory(config, model, dtype, device, max_model_len(config, model), batched)
        if config.load_format == "dummy":
            weights = dummy_weights(model, dtype, device, config.seed)
        else:
            weights = load_weights(folder, model, dtype, device, progress)
        return cls(config, model, Decoder(model, weights), memory)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        self._threads.set_for(plan)
        with torch.inference_mode():
            self._apply_table(plan)
            if len(plan.copies):
                ops.copy_pages(self._pool, self._to_device(plan.copies))
            for start in plan.starts:
                self._start(start)
            return self._forward(plan)

    def close(self) -> None:
        """Drops the weights and the pool. The executor is of no use afterwards."""
        del self._decoder, self._pool, self._attention, self._sampler, self._prompt_logprobs

    def _start(self, start: RowStart) -> None:
        self._sampler.start(start)
        self._prompt_logprobs.start(start)

    def _apply_table(self, plan: StepPlan) -> None:
        if not len(plan.table_rows):
            return
        self._host_table[plan.table_rows, plan.table_cols] = plan.table_pages
        if self.device.type != "cpu":
            rows, cols = self._to_device(plan.table_rows), self._to_device(plan.table_cols)
            self._table[rows, cols] = torch.from_numpy(plan.table_pages).to(self.device, non_blocking=True)

    def _forward(self, plan: StepPlan) -> LaunchedStep:
        starts = np.cumsum(plan.q_lens, dtype=np.int64) - plan.q_lens  # first query token of each request
        positions = np.arange(plan.num_tokens) + np.repeat(plan.kv_lens - plan.q_lens - starts, plan.q_lens)
        self._decoder.reserve(int(plan.kv_lens.max()))
        self._attention.plan(
            AttentionBatch(plan.rows, plan.q_lens, plan.kv_lens, plan.num_decodes, self._table, self._host_table)
        )
        sampled_at = (starts + plan.q_lens - 1)[plan.samples]
        wanted = self._prompt_logprobs.spans(plan)
        outputs = np.concatenate([sampled_at, *(starts[span.index] + span.offsets for span in wanted)])
        hidden = self._decoder.forward(
            self._token_ids(plan), self._to_device(positions), self._attention, self._to_device(outputs)
        )
        sampled = self._sample(plan, hidden[: len(sampled_at)])
        return LaunchedStep(sampled, self._prompt_logprobs.compute(wanted, hidden[len(sampled_at) :]))

    def _token_ids(self, plan: StepPlan) -> Tensor:
        """int64 [T]; where the host does not know the id yet, the last token its row sampled."""
        token_ids = self._to_device(plan.token_ids)
        pending = np.flatnonzero(plan.token_ids == PENDING)
        if len(pending):
            rows = np.repeat(plan.rows, plan.q_lens)[pending]
            token_ids = token_ids.index_copy(0, self._to_device(pending), self._last_token[self._to_device(rows)])
        return token_ids

    def _sample(self, plan: StepPlan, hidden: Tensor) -> Sampled | None:
        if not len(plan.samples):
            return None
        rows = plan.rows[plan.samples]
        positions = plan.kv_lens[plan.samples].astype(np.int64)
        sampled = self._sampler.sample(self._decoder.logits(hidden), rows, positions)
        self._last_token.index_copy_(0, self._to_device(rows), sampled.tokens)
        return sampled

    def _to_device(self, array: npt.NDArray[np.integer]) -> Tensor:
        """An int64 copy on the device."""
        return torch.from_numpy(array.astype(np.int64)).to(self.device, non_blocking=True)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The KV pool. Zeros, not garbage: what is masked is multiplied by 0, and 0 * NaN would be NaN.

    On a CPU the memory comes from calloc, which the kernel zeroes page by page as it is first written: 4 GiB cost
    5 ms instead of seconds, and memory that is never used is never taken.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens a request may hold. Raises `LoadError` if more is asked than the model was made for."""
    if config.max_model_len is None:
        return model.max_model_len
    if config.max_model_len > model.max_model_len:
        raise LoadError(f"--max-model-len {config.max_model_len}: the model's own limit is {model.max_model_len}")
    return config.max_model_len


def pick_device(config: EngineConfig) -> torch.device:
    """The device ``config.device`` names; ``auto`` is a GPU if there is one."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LoadError(f"--device {name}: give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise LoadError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise LoadError(f"--device {name}: torch {torch.__version__} sees {count} CUDA devices")
    return device


def pick_dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and KV; ``auto`` is the checkpoint's on a GPU and float32 on a CPU."""
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model.dtype  # type: ignore[assignment]
    dtype: torch.dtype = getattr(torch, name)
    return dtype
