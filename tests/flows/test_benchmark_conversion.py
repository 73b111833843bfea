"""Memory of whole processes, on models larger than they may take, and the benchmark itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge.ledger import compare_ledgers, ledger
from flows.benchmark_conversion import CONFIG_VALUES, MIB, Measured, make_model, run_process

SMALL: dict[str, Any] = {**CONFIG_VALUES, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3, "vocab_size": 1000}


def convert(*arguments: str | Path) -> Measured:
    return run_process([sys.executable, "-m", "flows.cli", *map(str, arguments)])


def both_ways(source: Path, limit: str, *options: str) -> tuple[Measured, Measured]:
    """Import and export in processes of their own."""
    folder = source.parent
    imported = convert("import", source, folder / "megatron", "--max-memory", limit, *options)
    exported = convert("export", folder / "megatron", folder / "exported", "--max-memory", limit)
    return imported, exported


def test_the_byte_path_keeps_to_its_memory(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", {**CONFIG_VALUES, "num_hidden_layers": 1, "vocab_size": 64000})
    assert (source / "model.safetensors").stat().st_size > 6 * 100 * MIB
    for measured in both_ways(source, "100MiB"):
        assert measured.peak_mib < 100
    assert compare_ledgers(ledger(source), ledger(tmp_path / "exported")).passed


@pytest.mark.parametrize("options", [(), ("--dtype", "float32")], ids=["bytes", "torch"])
def test_says_how_much_memory_is_enough(options: tuple[str, ...], tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", SMALL)
    command = [sys.executable, "-m", "flows.cli", "import", source, tmp_path / "megatron", *options]
    tried = subprocess.run([*command, "--max-memory", "1MB"], capture_output=True, text=True)
    assert tried.returncode == 2
    assert "max_memory is 1 MiB: the smallest that works for this model is about" in tried.stderr
    enough = int(tried.stderr.rpartition("about ")[2].split()[0]) + 2
    measured = convert("import", source, tmp_path / "megatron", "--max-memory", f"{enough}MiB", *options)
    assert measured.peak_mib <= enough
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


@pytest.mark.slow
def test_the_torch_path_keeps_to_its_memory(tmp_path: Path) -> None:
    """4.5 GB of float32 cast to bfloat16 in less than a GiB, most of which is torch itself."""
    source = make_model(tmp_path / "hf", {**CONFIG_VALUES, "num_hidden_layers": 10, "dtype": "float32"})
    assert (source / "model.safetensors").stat().st_size > 4 * 1024 * MIB
    imported, _ = both_ways(source, "1GiB", "--dtype", "bfloat16")
    assert imported.peak_mib < 1024


EXPERTS: dict[str, Any] = {
    **SMALL,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 64,
    "head_dim": 16,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "experts"), [(48, 128), (60, 384)])
def test_tens_of_thousands_of_tensors(layers: int, experts: int, tmp_path: Path) -> None:
    """As the largest Qwen3 and Kimi have them, with small matrices."""
    source = make_model(tmp_path / "hf", EXPERTS | {"num_hidden_layers": layers, "num_experts": experts})
    for measured in both_ways(source, "1GiB"):
        assert measured.peak_mib < 256
        assert measured.seconds < layers * experts / 100
    comparison = compare_ledgers(ledger(source), ledger(tmp_path / "exported"))
    assert comparison.passed
    assert len(comparison.rows) > 3 * layers * experts


BENCHMARK = """
import sys
import flows.benchmark_conversion as benchmark
benchmark.CONFIG_VALUES = {config!r}
benchmark.main()
"""


def test_the_benchmark_prints_one_line_of_json_last(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BENCHMARK.format(config=SMALL), "--rounds", "1", "--without-model"]
    said = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True, check=True).stdout
    figures = json.loads(said.splitlines()[-1])
    assert {"import_ratio", "export_ratio", "import_peak_mib", "export_peak_mib"} <= figures.keys()
    assert figures["import_ratio"] == pytest.approx(
        figures["cp_of_hf_seconds"] / figures["import_seconds"], rel=0.1, abs=0.01
    )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
