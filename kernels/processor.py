"""Which narrow formats the processor multiplies natively."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def multiplies_bfloat16() -> bool:
    """AVX512-BF16, AMX or Arm's BF16. Elsewhere oneDNN emulates bfloat16, and float32 is faster: a core of a Xeon with
    AVX512-VNNI alone takes 70 ms in bfloat16 and 18 ms in float32 for 256 rows by a weight of 4096 × 1024."""
    return any(_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def multiplies_int8() -> bool:
    """VNNI or AMX. Not measured on Arm."""
    return any(_capabilities().get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def _capabilities() -> Mapping[str, object]:
    if hasattr(torch.cpu, "get_capabilities"):
        found: Mapping[str, object] = torch.cpu.get_capabilities()
        return found
    return {  # torch 2.11
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "avx512_vnni": torch.cpu._is_vnni_supported(),
    }
