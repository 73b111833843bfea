"""The orchestrator needs no GPU stack: what its packages load, measured in a fresh interpreter."""

import json
import pkgutil
import subprocess
import sys

import pytest

import flows
import recipes
import tasks

GPU_STACK = {"torch", "megatron", "transformers", "transformer_engine"}
TORCH_FREE = (
    *("bridge.errors", "bridge.exporter", "bridge.families", "bridge.gates", "bridge.importer", "bridge.job"),
    *("bridge.ledger", "bridge.megatron_checkpoint", "bridge.provider"),
    *("training.config", "training.metrics", "training.overrides"),
)


def loaded_by(modules: tuple[str, ...]) -> set[str]:
    """Import modules in a new process and return the top-level packages that it then holds."""
    code = f"import sys, json, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("package", [flows, tasks, recipes], ids=lambda package: package.__name__)
def test_package_loads_without_the_gpu_stack(package: object) -> None:
    names = tuple(f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__))
    assert names
    assert not loaded_by(names) & GPU_STACK


def test_conversion_loads_without_the_gpu_stack() -> None:
    assert not loaded_by(TORCH_FREE) & GPU_STACK


def test_command_line_starts_without_the_orchestrator() -> None:
    assert not loaded_by(("flows.cli",)) & (GPU_STACK | {"prefect", "mlflow", "pandas", "matplotlib", "s3fs"})
