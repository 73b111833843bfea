"""The CPU backend; whole models on it are compared with transformers in test_layouts.py."""

import subprocess
import sys

import pytest
import torch

from bridge import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def python(code: str) -> str:
    finished = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_importing_changes_nothing() -> None:
    code = """
import torch
before = torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device
import bridge.cpu, bridge.distributed, bridge.model, bridge.auto_bridge
print(before == (torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device))
"""
    assert python(code) == "True"


def test_a_present_gpu_is_left_alone() -> None:
    code = """
import torch
before = torch.empty, torch.cuda.current_device
torch.cuda.is_available = lambda: True
import bridge.cpu
bridge.cpu.install()
print(before == (torch.empty, torch.cuda.current_device))
"""
    assert python(code) == "True"


def test_cuda_devices_mean_the_cpu_and_meta_stays_meta() -> None:
    cpu.install()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).to("cuda:0").cuda().device.type == "cpu"
    assert torch.empty(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(2).device.type == torch.nn.Linear(2, 2).weight.device.type == "meta"


def test_dtypes_still_move() -> None:
    cpu.install()
    assert torch.ones(2).to(torch.bfloat16).dtype is torch.bfloat16
    assert torch.ones(2).type(torch.float64).dtype is torch.float64
