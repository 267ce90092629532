"""Trains the embedded model: one GPU, PyTorch, about 8 minutes.

python train.py --out OUT            # writes a Hugging Face folder, a loss curve and a checkpoint to resume from
python train.py --out OUT --resume   # goes on where a run stopped; the steps are the same as without the stop
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from corpus import draw as corpus_draw
from corpus import mixture, tokenizer
from corpus.batches import Batches, encode


@dataclass(frozen=True)
class Shape:
    """A Llama; the names of its weights are those of Hugging Face."""

    vocab: int = 4096
    hidden: int = 256
    inner: int = 768
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 4352
    theta: float = 500_000.0
    eps: float = 1e-5


# -- the model -------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            p(x).view(rows, length, -1, self.s.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(torch.bfloat16)


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(s.hidden, eps=s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden, eps=s.eps)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=s.eps)
        angles = torch.outer(torch.arange(s.context), s.theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))  # a layer begins as the identity
                nn.init.normal_(p, std=0.0 if last else 0.04 if "embed" in name else p.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, mask: BlockMask) -> Tensor:
        """Logits [rows, length, vocab] of token ids [rows, length]."""
        x = self.embed_tokens(tokens).to(torch.bfloat16)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, mask)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def losses(self, tokens: Tensor, targets: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each position, and whether the likeliest token is the target."""
        with torch.autocast("cuda", torch.bfloat16):
            logits = self(tokens, mask).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
        return loss.view_as(targets), (logits.argmax(-1) == targets.flatten()).view_as(targets)


class DocumentMask:
    """Causal attention inside each packed text. One buffer, written anew for each batch, so nothing recompiles."""

    def __init__(self, rows: int, length: int) -> None:
        self.starts = torch.zeros(rows, length, dtype=torch.int32, device="cuda")
        self.rows, self.length = rows, length
        self._create = torch.compile(create_block_mask)
        own = self.starts

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (k >= own[b, q])

        self._sees = sees

    def __call__(self, starts: Tensor) -> BlockMask:
        self.starts.copy_(starts)
        return self._create(self._sees, self.rows, None, self.length, self.length, device="cuda")


# -- the optimizer ---------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps (Jordan et al., 2024), for the layers' matrices.

    Matrices of one shape are stacked, so a step is a few batched products.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                update = orthogonal(update) * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["decay"])
                torch._foreach_add_(params, list(update.to(params[0].dtype).unbind()), alpha=-group["lr"])


@torch.compile(dynamic=False)
def orthogonal(g: Tensor) -> Tensor:
    """The nearest matrices with singular values near 1, of float [n, rows, columns]."""
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def rate(step: int, total: int, warmup: int = 100, decay_from: float = 0.3) -> float:
    """Warm up, hold, then fall linearly to nearly nothing."""
    done = step / total
    return min(1.0, (step + 1) / warmup, max(0.01, (1 - done) / (1 - decay_from)))


# -- files -----------------------------------------------------------------------------------------------------------------


def export(model: Llama, folder: Path) -> None:
    """The folder that every loader of Hugging Face checkpoints reads: bf16 weights, config.json, generation_config.json."""
    s = model.s
    weights = {f"model.{k}": v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": s.vocab, "hidden_size": s.hidden,
        "intermediate_size": s.inner, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "max_position_embeddings": s.context,
        "rms_norm_eps": s.eps, "rope_theta": s.theta, "hidden_act": "silu", "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", "eos_token_id": [2, 0], "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def save_checkpoint(path: Path, model: Llama, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Weights and the optimizers' state (momenta rounded to bf16) as safetensors; renamed into place when whole."""
    tensors = {f"model.{k}": v.detach() for k, v in model.named_parameters()}
    names = {p: k for k, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"state.{names[p]}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors = {k: v.to("cpu", torch.bfloat16 if "momentum" in k else v.dtype).contiguous() for k, v in tensors.items()}
    save_file(tensors, path.with_suffix(".part"), metadata={"step": str(step)})
    path.with_suffix(".part").rename(path)
    path.with_suffix(".json").write_text(json.dumps({"step": step}))


def load_checkpoint(path: Path, model: Llama, optimizers: list[torch.optim.Optimizer]) -> int:
    tensors = load_file(path, device="cuda")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
    names = {p: k for k, p in model.named_parameters()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            prefix = f"state.{names[p]}."
            optimizer.state[p] = {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}
    return int(json.loads(path.with_suffix(".json").read_text())["step"])


def plot(history: list[tuple[int, float]], path: Path, shape_note: str) -> None:
    """The loss curve as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot([t / 1e6 for t, _ in history], [loss for _, loss in history], linewidth=0.9)
    axes.set(xlabel="million tokens", ylabel="loss on answers", yscale="log", title=shape_note)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# -- the loop --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quick_test(
    model: Llama, losses: object, masks: DocumentMask, encoder: object, rows: int, length: int, batches: int = 6
) -> dict[str, str]:
    """How often the last answer of a held-out conversation would be exactly the reference, greedily, for each family."""
    right: dict[str, list[bool]] = {}
    draw = corpus_draw.Draw(99, held_out=True)
    waiting = mixture.stream(draw)
    for _ in range(batches):
        arrays = np.zeros((3, rows, length), np.int64)
        spans: list[tuple[int, int, int, str]] = []
        for row in range(rows):
            at = 0
            while True:
                conversation, count = next(waiting)
                tokens, weights = encode(encoder, conversation)  # type: ignore[arg-type]
                count(len(tokens))
                if at + len(tokens) > length:
                    break
                arrays[0, row, at : at + len(tokens)], arrays[2, row, at : at + len(tokens)] = tokens, at
                if conversation.messages:
                    learned = np.flatnonzero(weights == 255)
                    first = learned[np.flatnonzero(np.diff(learned, prepend=-9) > 1)[-1]]
                    family = conversation.family + ("_long" if len(tokens) > 2000 else "")
                    spans.append((row, at + int(first) - 1, at + int(learned[-1]), family))
                at += len(tokens)
            arrays[2, row, at:] = at
        data = torch.from_numpy(arrays).cuda()
        targets = torch.roll(data[0], -1, 1)
        hit = losses(data[0], targets, masks(data[2]))[1].cpu().numpy()  # type: ignore[operator]
        for row, first, end, family in spans:
            right.setdefault(family, []).append(bool(hit[row, first:end].all()))
    return {k: f"{np.mean(v):.2f} ({len(v)})" for k, v in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=11_000)
    parser.add_argument("--rows", type=int, default=16, help="rows of 4,352 tokens in a step")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument(
        "--lr", type=float, default=0.018, help="of the matrices; embeddings and norms use a fifth, with AdamW"
    )
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds, then save and stop")
    parser.add_argument("--test-every", type=int, default=20_000)
    args = parser.parse_args()
    begun = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    if not (args.out / "tokenizer.json").is_file():
        tokenizer.save(tokenizer.train(), args.out, shape.context)
        print(f"tokenizer: {time.time() - begun:.0f} s", flush=True)
    text = (args.out / "tokenizer.json").read_text(encoding="utf-8")
    encoder = tokenizer.Tokenizer.from_str(text)
    checkpoint, history_path = args.out / "checkpoint.safetensors", args.out / "history.json"
    resumes = args.resume and checkpoint.is_file()
    first = int(json.loads(checkpoint.with_suffix(".json").read_text())["step"]) if resumes else 0
    history = json.loads(history_path.read_text()) if resumes else []
    batches = Batches(text, args.seed, first, args.steps, args.rows, shape.context, args.workers)

    model = Llama(shape).cuda()
    matrices = [p for k, p in model.named_parameters() if p.ndim == 2 and "embed" not in k]
    others = [p for k, p in model.named_parameters() if p.ndim != 2 or "embed" in k]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, args.lr),
        torch.optim.AdamW(others, args.lr / 5, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    base = [group["lr"] for o in optimizers for group in o.param_groups]
    if resumes:
        load_checkpoint(checkpoint, model, optimizers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {asdict(shape)}", flush=True)
    losses = torch.compile(model.losses)
    masks = DocumentMask(args.rows, shape.context)

    shown, window, waited, since = time.time(), [], 0.0, time.time()
    step = first
    it = iter(batches)
    for step in range(first, args.steps):
        mark = time.time()
        batch = next(it)
        waited += time.time() - mark
        data = (
            torch.from_numpy(np.stack([batch.tokens, batch.weights, batch.starts]).astype(np.int32))
            .pin_memory()
            .cuda(non_blocking=True)
        )
        tokens, weights = data[0].long(), torch.roll(data[1], -1, 1).float()
        loss, _ = losses(tokens, torch.roll(tokens, -1, 1), masks(data[2]))
        answers = weights > 128
        window.append((loss.detach() * answers).sum() / answers.sum())
        ((loss * weights).sum() / weights.sum()).backward()
        for group, lr in zip((g for o in optimizers for g in o.param_groups), base, strict=True):
            group["lr"] = lr * rate(step, args.steps)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step == first:
            print(f"first step after {time.time() - begun:.0f} s", flush=True)
        if step % 50 == 49:
            mean = torch.stack(window).mean().item()
            window.clear()
            seen = (step + 1) * args.rows * shape.context
            history.append((seen, mean))
            now = time.time()
            speed = 50 * args.rows * shape.context / (now - since)
            since = now
            if now - shown > (1 if sys.stdout.isatty() else 10):
                bar = "#" * (30 * (step + 1) // args.steps)
                left = (args.steps - step) * args.rows * shape.context / speed
                print(
                    f"[{bar:30}] {step + 1}/{args.steps}  loss {mean:.4f}  {speed / 1e6:.2f} M tokens/s  waited {waited:.0f} s  left {left:.0f} s",
                    flush=True,
                )
                shown = now
        if (step + 1) % args.test_every == 0:
            print(quick_test(model, losses, masks, encoder, args.rows, shape.context), flush=True)
            since = time.time()
        if time.time() - begun > args.stop_after:
            break
    batches.close()
    save_checkpoint(checkpoint, model, optimizers, step + 1)
    history_path.write_text(json.dumps(history))
    export(model, args.out)
    plot(history, args.out / "loss.png", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    print(quick_test(model, losses, masks, encoder, args.rows, shape.context), flush=True)
    print(
        f"step {step + 1}, {(step + 1) * args.rows * shape.context / 1e6:.0f} M tokens, {time.time() - begun:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
