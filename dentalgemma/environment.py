"""What a bug report needs to know of a machine, and nothing else: no paths, no names of users or hosts, no values of
environment variables. A package that is missing or broken is told as such and stops nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from dentalgemma import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface-hub", "numpy", "pillow")
EXTRAS = ("bitsandbytes", "gradio", "ultralytics", "pydicom", "deepspeed", "flash-attn", "vllm", "torchvision")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
GIB = 2**30


def describe_environment() -> dict[str, str]:
    """Versions, hardware and settings that change how the toolkit behaves, each as one short text."""
    return {
        "dentalgemma": __version__,
        "python": f"{platform.python_version()} {platform.python_implementation()}",
        "system": " ".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        "cpus": f"{_usable_cpus()} usable of {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / GIB:.1f} GiB",
        **{name: _version(name) for name in (*PACKAGES, *EXTRAS)},
        **_describe_torch(),
        "nvidia_driver": _nvidia_driver(),
        "accelerate_config": _yes(_has_accelerate_config()),
        "hub_token": _has_token(),
        "offline": ", ".join(name for name in OFFLINE if _is_on(os.environ.get(name))) or "no",
    }


def _version(name: str) -> str:
    try:
        return str(version(name))
    except PackageNotFoundError:
        return "not installed"


def _describe_torch() -> dict[str, str]:
    """What torch was built for and what it sees; its own failures are worth knowing, so none goes through."""
    try:
        import torch

        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        if torch.version.hip:
            build = f"ROCm {torch.version.hip}"
        if torch.cuda.is_available():
            devices = [_describe_gpu(torch, number) for number in range(torch.cuda.device_count())]
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            name = accelerator.type.upper() if accelerator else "CPU"
            devices = [f"{name} {platform.machine()}, {torch.get_num_threads()} threads"]
            bf16 = name != "CPU"
    except Exception as error:  # of any kind: not installed, a broken installation, a driver that does not fit
        return {"torch_build": f"does not load: {type(error).__name__}", "device": "unknown", "bf16": "unknown"}
    return {"torch_build": build, "device": "; ".join(devices), "bf16": _yes(bf16)}


def _describe_gpu(torch: object, number: int) -> str:
    found = torch.cuda.get_device_properties(number)
    memory = f"{found.total_memory / GIB:.1f} GiB"
    return f"{found.name}, {memory}, compute capability {found.major}.{found.minor}"


def _nvidia_driver() -> str:
    """Asked of the driver's own tool, which also tells of a GPU that this torch cannot use."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "not found"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return "does not answer"
    words = done.stdout.split()
    return words[0] if done.returncode == 0 and words else "does not answer"


def _usable_cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _has_accelerate_config() -> bool:
    """Whether `accelerate config` was run: it changes what `accelerate launch` does without options."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface") / "accelerate"
    return any((folder / f"default_config.{ending}").is_file() for ending in ("yaml", "yml", "json"))


def _has_token() -> str:
    """Whether the Hub would be asked with a token; never which."""
    try:
        from huggingface_hub import get_token

        return _yes(bool(get_token()))
    except Exception as error:
        return f"unknown: {type(error).__name__}"


def _is_on(value: str | None) -> bool:
    return (value or "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
