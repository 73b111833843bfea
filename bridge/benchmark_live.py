"""`make bench-live`: loading and exporting of live models, with the ordinary ways beside them, in one run.

    python -m bridge.benchmark_live [--ranks 1,2] [--layouts tp,pp,ep] [--layers N] [--repeats N] [--folder F]

Makes a dense model (Llama 3.2 1B's width, 16 layers: 1.5 billion parameters) and one of experts (16 layers of
64: 1.4 billion), each 3 GB in bf16, imports them, and starts one torchrun job for each layout and number of
ranks; on gloo, or on NCCL where there are GPUs. The ways take turns. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bridge.families import plan_weights, provider_of
from bridge.hf_writer import TensorDescription, write_shards
from bridge.importer import import_checkpoint

COMMON: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "experts": {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 384,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}
POOL_SIZE = 1 << 25  # random numbers, of which every tensor has a run

LAYOUTS: dict[str, tuple[str, str]] = {
    "tp": ("dense", "tensor_model_parallel_size"),
    "pp": ("dense", "pipeline_model_parallel_size"),
    "ep": ("experts", "expert_model_parallel_size"),
}
"""The model of each layout, and the size that is the number of ranks."""


def main() -> None:
    arguments = parse(sys.argv[1:])
    rows: list[dict[str, Any]] = []
    for model in CONFIGS:
        layouts = [layout for layout in arguments.layouts if LAYOUTS[layout][0] == model]
        if layouts:
            with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-live-") as name:
                rows += measure_model(Path(name), model, layouts, arguments)
    print(json.dumps({"machine": machine(), "rows": rows, **ratios(rows)}))


def measure_model(
    folder: Path, model: str, layouts: list[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Make a model and measure it; one rank has no layout, and is measured once."""
    hf, megatron = make_checkpoint(folder / "hf", model, arguments.layers), folder / "megatron"
    import_checkpoint(hf, megatron)
    rows: list[dict[str, Any]] = []
    for ranks in arguments.ranks:
        for layout in layouts if ranks > 1 else layouts[:1]:
            config = {"hf": str(hf), "megatron": str(megatron), "repeats": arguments.repeats}
            found = run_job({**config, "layout": {LAYOUTS[layout][1]: ranks}}, ranks, folder)
            found = [{"ranks": ranks, "layout": layout if ranks > 1 else model, **row} for row in found]
            show(found)
            rows += found
    return rows


def parse(values: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmark_live", description=__doc__)
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=list(LAYOUTS))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    arguments = parser.parse_args(values)
    if unknown := sorted(set(arguments.layouts) - set(LAYOUTS)):
        parser.error(f"unknown layout {unknown[0]!r}: allowed are {', '.join(LAYOUTS)}")
    return arguments


def make_checkpoint(folder: Path, model: str, num_layers: int) -> Path:
    """Write a random checkpoint without a model; return `folder`."""
    folder.mkdir()
    config = {**CONFIGS[model], "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    pool = torch.empty(POOL_SIZE).normal_(0, 0.02, generator=torch.manual_seed(0)).bfloat16()
    shapes = plan_weights(provider_of(config)).hf_shapes

    def random(number: int, shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return pool.roll(7919 * number).repeat(-(-size // POOL_SIZE))[:size].view(shape)

    weights = ((name, random(number, shape)) for number, (name, shape) in enumerate(shapes.items()))
    described = {name: TensorDescription(shape, "bfloat16") for name, shape in shapes.items()}
    write_shards(folder, weights, described, "1GB")
    return folder


def run_job(config: dict[str, Any], ranks: int, folder: Path) -> list[dict[str, Any]]:
    report, job = folder / "report.json", folder / "job.json"
    job.write_text(json.dumps({**config, "report": str(report)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            *launcher,
            "-m",
            "bridge.job",
            "bridge.benchmark_live_job",
            str(job),
        ],
        check=True,
        env={"OMP_NUM_THREADS": threads, **os.environ, "PYTHONWARNINGS": "ignore"},
    )
    return json.loads(report.read_text())["measured"]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return how many times as long an ordinary way takes as ours beside it, by layout and ranks."""
    seconds = {(row["layout"], row["ranks"], row["what"]): row["seconds"] for row in rows}
    return {
        f"{row['what']} / {row['beside']}, {row['layout']} on {row['ranks']}": round(
            row["seconds"] / seconds[row["layout"], row["ranks"], row["beside"]], 2
        )
        for row in rows
        if row["beside"]
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print what one job measured."""
    table = Table("ranks", "layout", "what", "seconds", "GB/s", "peak MiB", "ratio")
    for row in rows:
        beside = next((other for other in rows if other["what"] == row["beside"]), None)
        ratio = f"{row['seconds'] / beside['seconds']:.2f}" if beside else ""
        numbers = (
            f"{row['seconds']:.2f}",
            f"{row['gigabytes'] / row['seconds']:.2f}",
            f"{row['peak_mib']:.0f}",
        )
        table.add_row(str(row["ranks"]), row["layout"], row["what"], *numbers, ratio)
    Console(width=110).print(table)


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, no GPU"


if __name__ == "__main__":
    main()
