"""What the machine under a trainer is good for."""

import os
from pathlib import Path

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU of this process's LOCAL_RANK where there is one.

    Raises ValueError for a device that is not here.
    """
    if name == "auto":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype to compute in; None leaves the model's own fp32."""
    if name == "bf16" or (name == "auto" and has_fast_bf16(device)):
        return torch.bfloat16
    return None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster here than in fp32.

    A CPU without bf16 instructions converts back and forth and is slower, so this asks for them.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident, in bytes; 0 where Linux's /proc is missing."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)
