"""What the machine has: device, processes, precision, a compiler, free memory."""
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from formats.files import InputError, warn
from support.console import one_of
from support.processes import LOCAL, RANK, WORLD


def pick_device(name: str) -> torch.device:
    """Opens a device; "auto" takes CUDA, else Apple's MPS, else the CPU. Raises InputError if it isn't
    there."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds shapes, no values")
        if device.type == "cuda":  # for whatever asks for no device by name
            torch.cuda.set_device(device)
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def start_processes(name: str) -> torch.device:
    """Joins torchrun's other processes, if there are any; only the first goes on printing. Returns this one's
    device, for --device `name`."""
    if WORLD > 1 and torch.cuda.is_available() and name != "cpu":
        torch.cuda.set_device(LOCAL)  # which "cuda" means from here on
    device = pick_device(name)
    if WORLD > 1:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def end_with(launcher: int) -> None:
    """Ends this process when its launcher has died, which can't do it any more: as SIGTERM does, which saves
    first; after ten seconds at once."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(128 + signal.SIGTERM)


def can_compile(device: torch.device) -> bool:
    """Tries torch.compile on something small; warns if it fails. It needs a C++ compiler and, on a GPU,
    Triton and a GPU that Triton knows."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever a compiler may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warn(f"nothing is compiled, which is slower: {reason}")
        return False


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Returns a type by name. "auto" takes bfloat16 if the hardware multiplies it fast, float16 on older
    GPUs, else float32. Raises InputError."""
    if one_of(("auto", "bfloat16", "float16", "float32"), "precision", name) != "auto":
        if name == "float16" and device.type == "cpu":
            raise InputError("--precision float16 needs a GPU: on a CPU take bfloat16 or float32")
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    # older versions of torch lack these functions; bool() is False
    units = ("amx_tile", "avx512_bf16")
    fast = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in units)
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def free_memory(device: torch.device) -> int:
    """Returns the bytes of free memory on the device; 4 GiB if the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 << 30


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a tensor to the device, through pinned memory to a GPU: then the CPU needn't wait."""
    if x.is_cpu and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
