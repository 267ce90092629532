"""A Llama in large dense batches: what a storage format changes, without pages, kernels or a scheduler.

`DenseEngine` answers what ``examples/embedded_model/evaluate.py`` asks of an engine, some hundred thousand tokens a
second on one GPU. Formats are those of `kv_format` and `quantize`, by their torch specifications. Samples have the
random numbers of Branchwise's own engine, so that in float32 both give the same text but where a rounding decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from branchwise import SamplingParams
from branchwise.kernels.kv_format import CHOICES, KVFormat, hadamard
from branchwise.kernels.quantize import ZERO_POINT, Quantizer, quantize, quantize_weight
from branchwise.kernels.sampling import sample_logits, uniforms
from branchwise.runtime.models.folder import SHIPPED
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

Store = Callable[[Tensor], Tensor]  # keys or values ``[..., D]`` as attention reads them


def as_computed(x: Tensor) -> Tensor:
    return x


def store(each: KVFormat, rotated: bool = False) -> Store:
    """Through a format and back."""
    if each.plain:
        return as_computed
    if rotated:
        return lambda x: hadamard(store(each)(hadamard(x)))
    return lambda x: each.decode(*each.encode(x, None)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Variant:
    """How keys, values and the weights of linear layers are stored."""

    keys: Store = as_computed
    values: Store = as_computed
    dtype: torch.dtype = torch.float32
    weights: torch.dtype | None = None  # float8_e4m3fn, or uint8: int8 with inputs in uint8


VARIANTS = {
    "float32": Variant(),
    "bfloat16": Variant(dtype=torch.bfloat16),
    "int8-weights": Variant(weights=torch.uint8),
    "fp8-weights": Variant(weights=torch.float8_e4m3fn),
} | {
    choice: Variant(store(keys, keys.rotates_keys), store(values))
    for choice, (keys, values) in CHOICES.items()
    if choice != "auto"
}


class Linear:
    """``x @ weight.T``, with weight and inputs in 8 bits if ``dtype`` is given: float32 holds sums of int8 exactly."""

    def __init__(self, weight: Tensor, dtype: torch.dtype | None) -> None:
        self._weight, self._scale, self._quantizer = weight, torch.empty(0), None
        if dtype is not None:
            values, scale = quantize_weight(weight, torch.int8 if dtype == torch.uint8 else dtype)
            self._weight, self._scale, self._quantizer = values.float(), scale[:, 0], Quantizer(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self._quantizer is None:
            return F.linear(x, self._weight)
        rows = quantize(x.flatten(0, -2), self._quantizer)
        values = rows.values.float() - (ZERO_POINT if rows.values.dtype == torch.uint8 else 0)
        return (F.linear(values, self._weight) * self._scale * rows.scales).view(*x.shape[:-1], -1).to(x.dtype)


class DenseEngine:
    """The shipped model: ``tokenizer`` and ``generate`` as of `Engine`.

    Args:
        variant: what is quantized.
        device: torch's name of it.
        batch_tokens: tokens in the cache at once, 8 KiB each in float32, and as much again while it grows.
    """

    def __init__(self, variant: Variant, device: str, batch_tokens: int) -> None:
        self.tokenizer = Tokenizer.load(SHIPPED)
        config = json.loads((SHIPPED / "config.json").read_text())
        self._variant, self._device, self._batch_tokens = variant, torch.device(device), batch_tokens
        self._heads, self._kv_heads, self._size = (
            config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        self._eps, self._stops = config["rms_norm_eps"], torch.tensor(config["eos_token_id"], device=device)
        weights = {name: w.to(device, variant.dtype) for name, w in load_file(SHIPPED / "model.safetensors").items()}
        self._embedding = weights["model.embed_tokens.weight"]
        self._norm = weights["model.norm.weight"]
        self._head = Linear(self._embedding, variant.weights if variant.weights == torch.uint8 else None)
        self._layers = []
        for layer in range(config["num_hidden_layers"]):
            here = {n.split(".", 3)[3]: w for n, w in weights.items() if n.startswith(f"model.layers.{layer}.")}
            linears = [
                Linear(torch.cat([here[f"{name}.weight"] for name in names]), variant.weights)
                for names in (
                    [f"self_attn.{part}_proj" for part in "qkv"],
                    ["self_attn.o_proj"],
                    ["mlp.gate_proj", "mlp.up_proj"],
                    ["mlp.down_proj"],
                )
            ]
            self._layers.append((here["input_layernorm.weight"], here["post_attention_layernorm.weight"], linears))
        # Rows that have ended go on until their batch is cut, perhaps beyond the model's context.
        places = torch.arange(2 * config["max_position_embeddings"], device=device)
        angles = torch.outer(places, config["rope_theta"] ** (-torch.arange(0, 1, 2 / self._size, device=device)))
        self._cos, self._sin = angles.cos(), angles.sin()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], params: Any) -> list[Any]:
        listed = params if isinstance(params, list) else [params] * len(prompts)
        outputs: list[Any] = [None] * len(prompts)
        for batch in self._batches(prompts, listed[0].n):
            samples_of = self._batch([prompts[i] for i in batch], [listed[i] for i in batch])
            for i, samples in zip(batch, samples_of, strict=True):
                outputs[i] = SimpleNamespace(outputs=samples, text=samples[0].text)
        return outputs

    @torch.inference_mode()
    def logprobs(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Tensor]:
        """The next token's log-probabilities ``[len(answer) + 1, vocab]`` after each prompt and each token of its
        answer, of all items in one batch."""
        wholes = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids = torch.zeros(len(wholes), max(map(len, wholes)), dtype=torch.long)
        for i, whole in enumerate(wholes):
            ids[i, : len(whole)] = torch.tensor(whole)
        stops = torch.tensor([len(whole) for whole in wholes])
        firsts = stops - torch.tensor([len(answer) for answer in answers])
        ends = (firsts + torch.arange(1 + int((stops - firsts).max()))[:, None]).clamp(max=stops)
        logits, _ = self._prefill(ids.to(self._device), ends.to(self._device))
        rows = logits.log_softmax(-1).unbind(1)
        return [row[: len(answer) + 1] for row, answer in zip(rows, answers, strict=True)]

    def _batches(self, prompts: Sequence[list[int]], n: int) -> Iterator[list[int]]:
        """Prompts of like lengths, the longest first. A batch depends on its prompts alone, not on the format."""
        batch: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            if batch and (len(batch) + 1) * n * (len(prompts[batch[0]]) + 64) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def _batch(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[Any]]:
        """The samples of each prompt. ``params`` differ in seeds and in max_tokens, which counts for all of a batch."""
        n, most, longest = params[0].n, max(each.max_tokens or 0 for each in params), len(prompts[0])
        lengths = np.array([len(prompt) for prompt in prompts])
        ids, ends = torch.zeros(len(prompts), longest, dtype=torch.long), torch.from_numpy(lengths).to(self._device)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        rows = max(1, self._batch_tokens // 6 // longest)
        parts = [self._prefill(*part) for part in zip(ids.to(self._device).split(rows), ends.split(rows), strict=True)]
        logits = torch.cat([logits for logits, _ in parts]).repeat_interleave(n, 0)
        if params[0].logprobs:
            top = logits.log_softmax(-1).topk(params[0].logprobs)
            return [[_judged(*row)] for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        caches = [
            torch.cat(layer, 1).repeat_interleave(n, 1) for layer in zip(*(part for _, part in parts), strict=True)
        ]
        del parts
        seeds = np.array([each.seed or 0 for each in params], np.uint64).repeat(n) + np.tile(
            np.arange(n, dtype=np.uint64), len(params)
        )
        lengths, places, alive = lengths.repeat(n), ends.repeat_interleave(n), np.arange(len(seeds))
        drawn = torch.zeros(len(seeds), most, dtype=torch.long, device=self._device)
        going = torch.ones(len(seeds), dtype=torch.bool, device=self._device)
        rows_of = torch.arange(len(seeds), device=self._device)
        for step in range(most):
            tokens = self._sample(logits, params[0].temperature, seeds[alive], lengths[alive] + step)
            drawn[rows_of, step] = tokens
            going = going & ~torch.isin(tokens, self._stops)
            if step % 4 == 3:
                left = going.cpu().numpy()
                if not left.any():
                    break
                if left.mean() < 0.8:
                    caches = [cache[:, going] for cache in caches]
                    tokens, places, rows_of, alive = tokens[going], places[going], rows_of[going], alive[left]
                    going = going[going]
            length = longest + step + 1
            if length > caches[0].shape[3]:
                caches = [F.pad(cache, (0, 0, 0, 32)) for cache in caches]
            logits = self._decode(tokens, places, caches, length)
            places = places + 1
        stops = set(self._stops.tolist())
        samples = []
        for row in drawn.tolist():
            ids_of = list(takewhile(lambda token: token not in stops, row))
            samples.append(SimpleNamespace(text=self.tokenizer.decode(ids_of), completion_tokens=len(ids_of) + 1))
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    def _sample(
        self, logits: Tensor, temperature: float, seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]
    ) -> Tensor:
        if not temperature:
            return logits.argmax(-1)
        uniform = torch.from_numpy(uniforms(seeds, positions)).to(self._device)
        return sample_logits(logits, torch.full((len(logits),), temperature, device=self._device), uniform)[0]

    def _qkv(self, x: Tensor, linear: Linear, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = linear(x).unflatten(-1, (-1, self._size))
        turned, values = qkv[..., : self._heads + self._kv_heads, :].float(), qkv[..., -self._kv_heads :, :]
        first, second = turned.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
        q, keys = turned.split([self._heads, self._kv_heads], -2)
        return q, self._variant.keys(keys), self._variant.values(values)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), self._eps).to(x.dtype)

    def _mlp(self, x: Tensor, norm: Tensor, up: Linear, down: Linear) -> Tensor:
        gate, value = up(self._rms(x, norm)).chunk(2, -1)
        return x + down(F.silu(gate) * value)

    def _prefill(self, ids: Tensor, ends: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits after the first ``ends`` tokens, ``[B]`` or ``[n, B]``; of each layer ``[2, B, KV heads, T, D]``."""
        x, caches = self._embedding[ids], []
        cos, sin = self._cos[: ids.shape[1], None], self._sin[: ids.shape[1], None]
        for norm, mlp_norm, (qkv, out, up, down) in self._layers:
            q, k, v = (part.transpose(1, 2) for part in self._qkv(self._rms(x, norm), qkv, cos, sin))
            caches.append(torch.stack([k, v]))
            k, v = (part.repeat_interleave(self._heads // self._kv_heads, 1) for part in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(attended.transpose(1, 2).flatten(2))
            x = self._mlp(x, mlp_norm, up, down)
        last = x[torch.arange(len(ids), device=self._device), ends - 1]
        return self._head(self._rms(last, self._norm)).float(), caches

    def _decode(self, ids: Tensor, places: Tensor, caches: list[Tensor], length: int) -> Tensor:
        x, rows = self._embedding[ids], torch.arange(len(ids), device=self._device)
        cos, sin = self._cos[places][:, None], self._sin[places][:, None]
        hidden = (torch.arange(length, device=self._device) > places[:, None])[:, None, None]
        for cache, (norm, mlp_norm, (qkv, out, up, down)) in zip(caches, self._layers, strict=True):
            q, k, v = self._qkv(self._rms(x, norm), qkv, cos, sin)
            cache[0, rows, :, places], cache[1, rows, :, places] = k, v
            keys, values = cache[:, :, :, :length]
            scores = q.unflatten(1, (self._kv_heads, -1)) @ keys.transpose(-1, -2) * self._size**-0.5
            probs = scores.float().masked_fill_(hidden, -torch.inf).softmax(-1).to(x.dtype)
            x = x + out((probs @ values).flatten(1))
            x = self._mlp(x, mlp_norm, up, down)
        return self._head(self._rms(x, self._norm)).float()


def _judged(ids: list[int], logprobs: list[float]) -> Any:
    return SimpleNamespace(text="", logprobs=[SimpleNamespace(top=list(zip(ids, logprobs, strict=True)))])
