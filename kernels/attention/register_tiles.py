"""Converts tiles of quantized keys and values in registers, in Gluon: from global memory to tensor cores without shared
memory.

`mma` multiplies A ``[16, 16]`` by B ``[16, 8]``. Thread (g, t) of a warp, g = 0 … 7 and t = 0 … 3, holds rows g and
g + 8 of A and columns 2t, 2t + 1, 2t + 8 and 2t + 9. Keys are A of the scores and transposed values A of the output, so
queries, of which there are few, take the side that is padded to 8 only.

A thread loads consecutive words of one token and takes them for the channels that `mma` gives it. That permutes the
channels: of keys those that are summed over (queries are permuted alike, `permute_queries`), of values the rows of the
output (`restore_channels`).

Conversions and their powers of two are those of `kv_tiles`, except that fp8 values are exact.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..kv_format import NVFP4_BLOCK

_NVFP4_BLOCK = gl.constexpr(NVFP4_BLOCK)
_SIGNS = gl.constexpr(-2147450880)  # 0x80008000


@gluon.constexpr_function
def _powers(first: int, stop: int) -> list[int]:
    """first, 2 · first, … below ``stop``."""
    found = []
    while first < stop:
        found.append(first)
        first *= 2
    return found


@gluon.constexpr_function
def key_words_layout(N: int, WORDS: int) -> gl.DistributedLinearLayout:
    """Of int32 ``[N, WORDS]`` keys: a thread has tokens g, g + 8, …, and of each every fourth run of up to 4 words."""
    run = min(4, WORDS // 4)
    registers = [[0, x] for x in _powers(1, run) + _powers(4 * run, WORDS)] + [[x, 0] for x in _powers(8, N)]
    lanes = [[0, run], [0, 2 * run], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [N, WORDS])


@gluon.constexpr_function
def value_words_layout(N: int, WORDS: int) -> gl.DistributedLinearLayout:
    """Of int32 ``[N, WORDS]`` values: a thread has tokens 2t, 2t + 1, 2t + 8, …, and of each the g-th eighth."""
    run = WORDS // 8
    registers = [[0, x] for x in _powers(1, run)] + [[x, 0] for x in [1, *_powers(8, N)]]
    lanes = [[2, 0], [4, 0], [0, run], [0, 2 * run], [0, 4 * run]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [N, WORDS])


@gluon.constexpr_function
def key_scales_layout(N: int, D: int) -> gl.DistributedLinearLayout:
    """Of the scales of nvfp4 keys, uint8 ``[N, D / 16]``, as `key_words_layout`."""
    blocks, run = D // 16, min(4, D // 32) // 2
    registers = [[0, x] for x in _powers(1, run) + _powers(4 * run, blocks)] + [[x, 0] for x in _powers(8, N)]
    lanes = [[0, run], [0, 2 * run], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [N, blocks])


@gluon.constexpr_function
def value_scales_layout(N: int, D: int) -> gl.DistributedLinearLayout:
    """Of the scales of nvfp4 values, uint8 ``[N, 8 · max(D / 128, 1)]``, as `value_words_layout`. Heads of 64
    channels have 4: two eighths share each."""
    per = max(D // 128, 1)
    registers = [[0, x] for x in _powers(1, per)] + [[x, 0] for x in [1, *_powers(8, N)]]
    lanes = [[2, 0], [4, 0], [0, per], [0, 2 * per], [0, 4 * per]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [N, 8 * per])


@gluon.jit
def _halves(words: gl.tensor, dtype: gl.constexpr) -> gl.tensor:
    """int32 ``[...]`` words of two 16-bit values each, to ``[..., 2]``."""
    return gl.join(words.to(gl.int16), (words >> 16).to(gl.int16)).to(dtype, bitcast=True)


@gluon.jit
def _e4m3_pair(words: gl.tensor, UPPER: gl.constexpr) -> gl.tensor:
    """Two e4m3 values, in the lower or the upper half of each word, to a word of two float16 values."""
    source: gl.constexpr = "b" if UPPER else "a"
    return gl.inline_asm_elementwise(
        f"{{ .reg .b16 a, b; mov.b32 {{a, b}}, $1; cvt.rn.f16x2.e4m3x2 $0, {source}; }}",
        "=r,r",
        [words],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _times(words: gl.tensor, factors: gl.tensor) -> gl.tensor:
    """Products of two float16 values a word."""
    return gl.inline_asm_elementwise(
        "mul.f16x2 $0, $1, $2;", "=r,r,r", [words, factors], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _e2m1_pair(words: gl.tensor, MAGNITUDE: gl.constexpr, SIGN: gl.constexpr) -> gl.tensor:
    """See `kv_tiles`."""
    magnitude = (words << MAGNITUDE) if MAGNITUDE >= 0 else (words >> -MAGNITUDE)
    return (magnitude & 0x0E000E00) | ((words << SIGN) & _SIGNS)


@gluon.jit
def _four_bit_pairs(words: gl.tensor, FORMAT: gl.constexpr) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Nibbles p and p + 4 of each word, p = 0 … 3, as words of two float16 values."""
    if FORMAT == "int4":
        upper = words >> 8
        pairs = words & 0x000F000F, words & 0x00F000F0, upper & 0x000F000F, upper & 0x00F000F0
    else:
        pairs = _e2m1_pair(words, 9, 12), _e2m1_pair(words, 5, 8), _e2m1_pair(words, 1, 4), _e2m1_pair(words, -3, 0)
    return pairs


@gluon.jit
def _join4(a: gl.tensor, b: gl.tensor, c: gl.tensor, d: gl.tensor) -> gl.tensor:
    """``[..., 2, 2]``, whose last two dimensions count a, b, c, d."""
    return gl.join(gl.join(a, c), gl.join(b, d))


@gluon.jit
def _repeat8(x: gl.tensor) -> gl.tensor:
    """``[...]`` to ``[..., 2, 2, 2]``."""
    x = gl.join(x, x)
    x = gl.join(x, x)
    return gl.join(x, x)


@gluon.jit
def _laid_out_as(x: gl.tensor, other: gl.tensor) -> gl.tensor:
    return gl.convert_layout(x, other.type.layout, assert_trivial=True)


@gluon.jit
def _scale_pairs(first: gl.tensor, second: gl.tensor) -> gl.tensor:
    """Bytes of two e4m3 scales as words of two float16 values."""
    return _e4m3_pair(first.to(gl.int32) | (second.to(gl.int32) << 8), False)


@gluon.jit
def key_operand(
    words: gl.tensor,
    scales: gl.tensor,
    FORMAT: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    LAYOUT: gl.constexpr,
    dtype: gl.constexpr,
) -> gl.tensor:
    """Words `key_words_layout` and, of nvfp4, scales `key_scales_layout`, to ``[N, D]`` for the left side of `mma`."""
    WORDS: gl.constexpr = words.shape[1]
    RUN: gl.constexpr = min(4, WORDS // 4)
    RUNS: gl.constexpr = WORDS // 4 // RUN
    PAIRS: gl.constexpr = D // WORDS // 2
    if FORMAT == "plain":
        pairs = words
    elif FORMAT == "fp8":
        pairs = gl.join(_e4m3_pair(words, False), _e4m3_pair(words, True))
    else:
        a, b, c, d = _four_bit_pairs(words, FORMAT)
        pairs = gl.reshape(_join4(a, b, c, d), [N, D // 16, 2, 2, 2])
        if FORMAT == "nvfp4":
            pairs = _times(pairs, _laid_out_as(_repeat8(_scale_pairs(scales, scales)), pairs))
    x = _halves(pairs, dtype if FORMAT == "plain" else gl.float16)
    x = gl.permute(gl.reshape(x, [N, RUNS, 4, RUN, PAIRS, 2]), (0, 1, 3, 4, 2, 5))
    return gl.convert_layout(gl.reshape(x, [N, D]), LAYOUT, assert_trivial=True)


@gluon.jit
def permute_queries(q: gl.tensor, WORDS: gl.constexpr, LAYOUT: gl.constexpr) -> gl.tensor:
    """Queries ``[M, D]`` to ``[D, M]``, their channels in the order of `key_operand`."""
    M: gl.constexpr = q.shape[0]
    D: gl.constexpr = q.shape[1]
    RUN: gl.constexpr = min(4, WORDS // 4)
    RUNS: gl.constexpr = WORDS // 4 // RUN
    PAIRS: gl.constexpr = D // WORDS // 2
    q = gl.permute(gl.reshape(q, [M, RUNS, 4, RUN, PAIRS, 2]), (1, 3, 4, 2, 5, 0))
    return gl.convert_layout(gl.reshape(q, [D, M]), LAYOUT)


@gluon.jit
def _pick_bytes(a: gl.tensor, b: gl.tensor, LOW: gl.constexpr, HIGH: gl.constexpr) -> tuple[gl.tensor, gl.tensor]:
    """Two choices of four of the eight bytes of a and b."""
    return gl.inline_asm_elementwise(
        f"prmt.b32 $0, $2, $3, {LOW}; prmt.b32 $1, $2, $3, {HIGH};",
        "=&r,=r,r,r",
        [a, b],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def value_operand(
    words: gl.tensor,
    scales: gl.tensor,
    FORMAT: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> gl.tensor:
    """Words `value_words_layout` and, of nvfp4, scales `value_scales_layout`, to ``[D, N]`` for the left side of `mma`.

    Row ``8 · i + g`` is channel ``D / 8 · g + i``. `mma` takes pairs of tokens: bytes of two tokens are interleaved
    before they are converted.
    """
    WORDS: gl.constexpr = words.shape[1]
    a, b = gl.split(gl.permute(gl.reshape(words, [N // 2, 2, WORDS]), (0, 2, 1)))
    if FORMAT == "fp8":
        low, high = _pick_bytes(a, b, 0x5140, 0x7362)
        c0, c1 = _e4m3_pair(low, False), _e4m3_pair(low, True)
        c2, c3 = _e4m3_pair(high, False), _e4m3_pair(high, True)
        pairs = _join4(c0, c1, c2, c3)
    else:
        low, high = _pick_bytes(a, b, 0x5410, 0x7632)
        c0, c2, c4, c6 = _four_bit_pairs(low, FORMAT)
        c1, c3, c5, c7 = _four_bit_pairs(high, FORMAT)
        pairs = gl.join(_join4(c0, c2, c4, c6), _join4(c1, c3, c5, c7))
        if FORMAT == "nvfp4":
            PER: gl.constexpr = scales.shape[1] // 8
            first, second = gl.split(gl.permute(gl.reshape(scales, [N // 2, 2, 8 * PER]), (0, 2, 1)))
            factors = _repeat8(_scale_pairs(first, second))
            if D // PER == 128:
                factors = gl.join(factors, factors)
            factors = gl.reshape(factors, [N // 2, 8 * PER, D // 8 // PER])
            pairs = gl.reshape(pairs, [N // 2, 8 * PER, D // 8 // PER])
            pairs = _times(pairs, _laid_out_as(factors, pairs))
    x = gl.reshape(_halves(pairs, gl.float16), [N // 2, 8, D // 8, 2])
    return gl.convert_layout(gl.reshape(gl.permute(x, (2, 1, 0, 3)), [D, N]), LAYOUT, assert_trivial=True)


@gluon.jit
def restore_channels(x: gl.tensor) -> gl.tensor:
    """``[D, M]``, rows in the order of `value_operand`, to ``[M, D]``."""
    D: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1]
    return gl.reshape(gl.permute(gl.reshape(x, [D // 8, 8, M]), (2, 1, 0)), [M, D])
