"""The device side of a step: owns weights, KV pool, page table and sampler state, and runs one `StepPlan` at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from ...kernels.attention.base import AttentionBatch, StepShape
from ...kernels.kv_pool import KVPool
from ..config import EngineConfig, check, step_budget
from ..errors import LoadError
from ..models.config import ModelConfig
from ..models.decoder import StepTokens
from ..models.folder import model_folder
from ..models.implementation import AnyConfig, AnyDecoder, load, load_model_config
from ..models.kv_scales import KVScales, load_kv_scales
from ..models.loader import Progress
from ..parallel.group import TensorGroup
from ..parallel.place import ALONE, Place
from ..step import PENDING, Int32, Int64, StepPlan, StepResult, TokenBitmask
from ..tiers.host import HostTier
from .backends import make_attention, pick_ops, pick_sampling, preload, set_overlap
from .device import apply_quantization, on_device, pick_device, pick_dtype
from .graphs import StepGraphs, largest_shape
from .inputs import InputStaging, PageTable, StepInputs
from .measure import measure_activations, taken_beside
from .memory import MemoryPlan, agree, host_slots, plan_memory
from .prompt_logprobs import PromptLogprobRows, PromptRows
from .sampler import Sampled, SampleMasks, Sampler
from .startup_times import StartupTimes
from .threads import ThreadChoice
from .token_history import to_device

logger = logging.getLogger(__name__)

FIXED_ROWS = (16, 128)  # of a product with ``deterministic``, on a CPU and on a GPU: a small step pays for as many
LOGIT_ROWS = 16  # logits of captured steps are computed for a multiple of so many samples


@dataclass(slots=True)
class LaunchedStep:
    """A `PendingStep`: reading the result is the only wait for the device."""

    _kv_bytes: tuple[int, int]  # `StepResult.kv_bytes` and ``kv_bytes_saved``
    _sampled: Sampled | None
    _prompt: list[PromptRows]
    _sample: Callable[[SampleMasks], Sampled] | None = None  # enqueues the sampling of a constrained step
    _constrained: Int32 | None = None

    def sample(self, masks: TokenBitmask) -> None:
        if self._sample is None or self._constrained is None:
            raise RuntimeError("sample() was called for a step without constrained samples, or twice")
        self._sampled = self._sample(SampleMasks(self._constrained, masks))
        self._sample = None

    def result(self) -> StepResult:
        step = StepResult(np.empty(0, np.int32))
        step.kv_bytes, step.kv_bytes_saved = self._kv_bytes
        if self._sampled is not None:
            step.tokens, step.logprobs = self._sampled.to_result()
        step.prompt_logprobs = {rows.index: (rows.start, rows.to_host()) for rows in self._prompt}
        return step


class ModelExecutor:
    """The executor of one device. Not thread-safe: only the scheduler's thread calls it.

    The planner owns rows and pages: nothing here checks that a page belongs to a row. Where a model is split over
    several ranks, every rank launches the same plans; only rank 0 samples, and its results alone are read.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: AnyConfig,
        decoder: AnyDecoder,
        memory: MemoryPlan,
        group: TensorGroup,
        times: StartupTimes,
        kv_scales: Mapping[int, KVScales],
    ) -> None:
        """Allocates the pool and the page table, and captures graphs. Usually called by `load`. ``model``: the rank's
        own config; ``kv_scales``: of layers whose keys and values are stored by a checkpoint's own scales."""
        self._group = group
        self.model_config, self.memory_plan = model, memory
        self.device = torch.device(memory.device)
        self.num_pages, self.page_size, self.vocab_size = memory.num_pages, memory.layout.page_size, model.vocab_size
        self.max_model_len = max_model_len(config, model)
        self.eos_ids = model.eos_ids
        self._decoder = decoder
        rows, scratch_page = memory.max_num_seqs, memory.num_pages
        # The last page is the scratch page, which is not in the tree: padding tokens write there.
        self._pool = KVPool.allocate(memory.layout, self.num_pages + 1, self.device)
        for i, scales in kv_scales.items():
            self._pool.set_static_scales(i, torch.stack(scales))
        self._copy_pages = pick_ops(self.device, deterministic=config.deterministic).copy_pages
        if self.device.type == "cuda":  # compiled before a request needs it
            self._copy_pages(self._pool.fragments(), to_device(np.full((1, 2), scratch_page), self.device))
        slots = host_slots(config, memory, group)
        self._table = PageTable(rows, memory.max_pages_per_row, scratch_page, self.device)
        max_tokens = step_budget(config, gpu=self.device.type == "cuda") + largest_shape(rows)
        self._inputs = InputStaging(self.device, scratch_page * self.page_size, max_tokens, rows)
        self._last_token = torch.zeros(rows + 1, dtype=torch.int64, device=self.device)
        specs = decoder.layer_specs()
        times.lap("memory")
        self._attention = make_attention(config, self._pool, specs, model.num_heads, self._table, max_tokens)
        times.lap("attention")
        self._sampler = Sampler(rows, model.vocab_size, self.device, model.eos_ids, pick_sampling(self.device))
        self._prompt_logprobs = PromptLogprobRows(decoder, self.device)
        self._threads = ThreadChoice(memory, group.size, fixed=config.deterministic)
        self._graphs: StepGraphs | None = None
        self._staged: dict[StepShape, StepInputs] = {}  # of captured steps
        self._hidden_outputs = torch.empty(0, device=self.device)  # of captured steps, which all write here
        if config.cuda_graphs and self._attention.captures:
            self._graphs = self._capture(step_budget(config, gpu=True))
            times.lap("CUDA graphs")
        # Last: if anything before fails, no thread is left that pins memory.
        self.host = HostTier(self._pool, slots, fp8=config.host_cache_dtype == "fp8") if slots else None

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        progress: Progress | None = None,
        times: StartupTimes | None = None,
        place: Place = ALONE,
    ) -> ModelExecutor:
        """Loads the rank's part of the model of ``config.model`` and allocates everything. ``progress`` gets (bytes
        loaded, total bytes). ``times`` counts what that takes.

        Raises `LoadError`: one line with the problem and its fix.
        """
        check(config)
        device = pick_device(config, place.rank)
        with on_device(device):
            return cls._load(config, device, progress, times or StartupTimes(), place)

    @classmethod
    def _load(
        cls, config: EngineConfig, device: torch.device, progress: Progress | None, times: StartupTimes, place: Place
    ) -> ModelExecutor:
        preload(config, device)
        folder = model_folder(config.model, code=config.trust_remote_code)
        model = apply_quantization(config, load_model_config(config, folder), device)
        dtype = pick_dtype(config, model, device)
        batched = step_budget(config, gpu=device.type == "cuda")
        length = max_model_len(config, model)
        rank, ranks = place.rank, place.size
        memory = plan_memory(config, model, dtype, device, length, batched, rank=rank)
        times.lap("device")
        fixed_rows = FIXED_ROWS[device.type == "cuda"] if config.deterministic else None
        set_overlap(config, device)
        ops = pick_ops(device, deterministic=config.deterministic)
        where = model, folder, dtype, device, ops, progress
        loaded = load(config, *where, rank=rank, ranks=ranks, fixed_rows=fixed_rows)
        # Weights in FP8 grow on a GPU that cannot multiply them.
        weight_bytes = max(memory.weight_bytes, loaded.nbytes)
        times.lap("weights")
        group = place.meet(device)
        times.lap("other ranks")
        decoder = loaded.decoder(group)
        if device.type == "cuda":
            step = measure_activations(decoder, decoder.config, dtype, device, batched, config.max_num_seqs, length)
            others = taken_beside(device, memory.free_bytes, weight_bytes, step)
            measured = (memory.free_bytes, weight_bytes, step, others)
            memory = plan_memory(config, model, dtype, device, length, batched, measured, rank)
            times.lap("measuring the largest step")
        memory = agree(memory, group)
        if memory.kv_tokens < length:
            logger.warning(
                "the KV pool holds %d tokens, less than one context of %d: longer requests are refused (%s)",
                *(memory.kv_tokens, length, memory.limit),
            )
        kv_scales: Mapping[int, KVScales] = {}
        if memory.layout.v_format.name == "fp8" and config.load_format != "dummy" and isinstance(model, ModelConfig):
            kv_scales = load_kv_scales(folder, model, rank=rank, world=ranks)
            if kv_scales:
                logger.info("the checkpoint's own scales store keys and values of %d layers", len(kv_scales))
        return cls(config, decoder.config, decoder, memory, group, times, kv_scales)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Enqueues the step: see `runtime.step.Executor`."""
        self._threads.set_for(plan)
        with on_device(self.device), torch.inference_mode():
            self._table.write(plan.table_rows, plan.table_cols, plan.table_pages)
            if len(plan.copies):
                self._copy_pages(self._pool.fragments(), to_device(plan.copies.astype(np.int64), self.device))
            for start in plan.starts:
                if self._group.rank == 0:
                    self._sampler.start(start)
                self._prompt_logprobs.start(start)
            launched = self._forward(plan)
            if self.host is not None:
                self.host.launched(plan.step)
            return launched

    def next_capture(self) -> StepShape | None:
        """A step shape that is yet to be captured."""
        return self._graphs.next_missing() if self._graphs is not None else None

    def capture(self, shape: StepShape) -> None:
        """Runs a step of nothing but padding, and captures it."""
        if self._graphs is None:
            raise RuntimeError("steps of this executor are not captured")
        with on_device(self.device), torch.inference_mode():
            self._graphs.capture_missing(shape)

    def prepare_next(self) -> bool:
        """Captures one more step shape: see `runtime.step.Executor`."""
        shape = self.next_capture()
        if shape is None:
            return self._decoder.lay_out_next()
        self.capture(shape)
        return True

    def beat(self) -> None:
        """See `runtime.step.Executor`."""
        with on_device(self.device), torch.inference_mode():
            self._group.all_reduce(torch.zeros(1, device=self.device)).item()

    def close(self) -> None:
        """Frees the memory of weights, pool and graphs. The executor cannot be used afterwards."""
        with on_device(self.device):
            if self.host is not None:
                self.host.close()
            del self._graphs, self._staged, self._decoder, self._pool, self._attention, self._sampler
            del self._prompt_logprobs, self._hidden_outputs, self._group
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _forward(self, plan: StepPlan) -> LaunchedStep:
        shape = self._graphs.shape_for(plan) if self._graphs else None
        spans = self._prompt_logprobs.spans(plan)
        extra = [plan.query_starts[span.index] + span.offsets for span in spans]
        inputs, form = self._stage(plan, shape, extra)
        count = len(plan.samples)
        with record_function(_step_name(plan, form)):
            if self._graphs is not None and form is not None:
                self._staged[form] = inputs
                self._graphs.replay(form)
                # Not captured: a shape has room for far more outputs than most of its steps sample.
                rows = min(-(-count // LOGIT_ROWS) * LOGIT_ROWS, form.num_outputs)
                logits = self._decoder.logits(self._hidden_outputs[:rows])[:count] if count else None
                return self._launched(plan, inputs, logits, [])
            self._decoder.reserve(int(plan.kv_lens.max()))
            hidden = self._hidden(inputs, pending=bool((plan.token_ids == PENDING).any()))
            logits = self._decoder.logits(hidden[:count]) if count else None
            return self._launched(plan, inputs, logits, self._prompt_logprobs.compute(spans, hidden[count:]))

    def _launched(
        self, plan: StepPlan, inputs: StepInputs, logits: Tensor | None, prompt: list[PromptRows]
    ) -> LaunchedStep:
        """Enqueues the sampling, or leaves it to `LaunchedStep.sample`. Nothing else is launched before that call, so
        the outputs of the forward pass stay valid."""
        token_bytes = self._pool.layout.token_bytes
        kv_bytes = int(plan.kv_lens.sum()) * token_bytes, self._attention.saved_keys * token_bytes
        if logits is None or not len(plan.samples) or self._group.rank:
            return LaunchedStep(kv_bytes, None, prompt)
        if not len(plan.constrained):
            return LaunchedStep(kv_bytes, self._sample(inputs, logits), prompt)
        return LaunchedStep(kv_bytes, None, prompt, partial(self._sample, inputs, logits), plan.constrained)

    def _stage(
        self, plan: StepPlan, shape: StepShape | None, extra_outputs: list[Int64]
    ) -> tuple[StepInputs, StepShape | None]:
        """The step's inputs, and the form to replay where it is captured."""
        table = self._table
        batch = AttentionBatch(
            *(plan.rows, plan.q_lens, plan.kv_lens, plan.num_decodes, self.page_size, table.device, table.host),
            written=(plan.table_rows, plan.table_cols),
        )
        form = self._attention.plan(batch, shape)
        return self._inputs.stage(plan, batch, form, extra_outputs), form

    def _hidden(self, inputs: StepInputs, pending: bool, layers: int | None = None) -> Tensor:
        """Hidden states of the outputs. ``pending``: some of the token ids are only on the device so far, where rank 0
        has sampled them. ``layers``: run these first ones alone."""
        ids = inputs.ids
        if pending:
            ids = self._group.broadcast(torch.where(ids == PENDING, self._last_token[inputs.rows], ids))
        tokens = StepTokens(ids, inputs.positions, inputs.slots)
        return self._decoder.forward(tokens, self._pool, self._attention, inputs.outputs, layers)

    def _sample(self, inputs: StepInputs, logits: Tensor, masks: SampleMasks | None = None) -> Sampled:
        with on_device(self.device), torch.inference_mode():
            sampled = self._sampler.sample(logits, inputs.sample_rows, inputs.sample_positions, masks)
            self._last_token.index_copy_(0, inputs.last_token_rows, sampled.tokens)
        return sampled

    def _capture(self, max_tokens: int) -> StepGraphs:
        def prepare(shape: StepShape) -> None:
            self._staged[shape], _ = self._stage(_empty_plan(), shape, [])

        def run(shape: StepShape, layers: int | None = None) -> None:
            hidden = self._hidden(self._staged[shape], pending=True, layers=layers)
            self._hidden_outputs[: shape.num_outputs].copy_(hidden)

        def warm_up(shape: StepShape) -> None:
            run(shape, layers=self._decoder.few_layers)
            self._decoder.logits(self._hidden_outputs[: shape.num_outputs])

        rows, attention = self._table.host.shape[0] - 1, self._attention
        graphs = StepGraphs(
            run,
            warm_up,
            prepare,
            rows,
            max_tokens,
            self.device,
            attention.forms,
            joint=attention.joint,
            alone=self._group.size == 1,
        )
        largest = max(shape.num_outputs for shape in graphs.shapes())
        self._hidden_outputs = torch.zeros(
            (largest, self.model_config.hidden_size), dtype=self.memory_plan.dtype, device=self.device
        )
        self._decoder.reserve(self.max_model_len)  # the tables that a graph reads must not move
        with torch.inference_mode():
            graphs.capture()
        return graphs


def _step_name(plan: StepPlan, form: StepShape | None) -> str:
    """The step as profiles name it: how it ran, and what it computes."""
    kind = "eager" if form is None else "joint" if form.joint else "mixed" if form.tokens else "decode"
    size = plan.num_tokens if form is None else form.num_tokens
    paths = "" if form is None or not form.tree else ", tree"
    chunks, tokens = len(plan.rows) - plan.num_decodes, plan.num_tokens - plan.num_decodes
    return f"step: {kind} {size}{paths}, {plan.num_decodes} decodes, {chunks} chunks of {tokens} tokens"


def _empty_plan() -> StepPlan:
    """A step of nothing but padding."""
    none = np.empty(0, np.int32)
    return StepPlan(0, none, none, none, none, 0, none, none, none, none, none.reshape(0, 2))


def max_model_len(config: EngineConfig, model: AnyConfig) -> int:
    """The most tokens of a request. Raises `LoadError` if the config asks for more than the model supports."""
    if config.max_model_len is None:
        return model.max_model_len
    if config.max_model_len > model.max_model_len:
        raise LoadError(f"--max-model-len {config.max_model_len}: the model's own limit is {model.max_model_len}")
    return config.max_model_len
