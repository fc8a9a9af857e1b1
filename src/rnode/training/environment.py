"""What the result of a run depends on beside its configuration."""

import contextlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ENVIRONMENT = "environment.yaml"


def environment() -> dict[str, str]:
    """Return the machine, the versions and, of a checkout, the commit."""
    packages = ("rnode-flows", "torch", "torchvision", "pytorch-lightning", "torchdiffeq", "numpy")
    found = {"python": platform.python_version()} | {name: version(name) for name in packages}
    found |= {"system": platform.platform(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    checkout = Path(__file__).parents[3]
    if (checkout / ".git").exists():
        command = ["git", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # git is not installed
            options = {"check": True, "capture_output": True, "text": True}
            found["commit"] = subprocess.run(command, **options).stdout.strip()
    return found
