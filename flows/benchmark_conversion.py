"""`make bench-convert`: conversions of a model of 3 GB, measured against `cp -r` of the same bytes.

    python -m flows.benchmark_conversion [--rounds N] [--workers N] [--folder F] [--without-model]

Whole processes run in alternation, so that a machine that is busy for a while is so for all of them. The last
line is one JSON object.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.dtypes import ITEM_SIZES, TO_SAFETENSORS
from bridge.errors import BridgeworksError
from bridge.families import plan_weights, provider_of
from bridge.hf_checkpoint import CONFIG, SINGLE_SHARD
from flows.console import print_table

# Llama 3.2 1B's config with more layers and untied embeddings: 1.6 billion parameters.
CONFIG_VALUES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 18,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
NOISE_SIZE = 8 << 20  # bytes that repeat; enough to leave the fast caches
MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """One process: wall time, and the most memory that it had resident.

    `best` is the shortest time of several rounds, of which `seconds` is the median: on a machine that does
    other work as well it says more.
    """

    seconds: float
    peak_mib: float
    best: float = math.inf


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bridgeworks-benchmark")
    parser.add_argument("--without-model", action="store_true", help="leave out the way through a live model")
    arguments = parser.parse_args()
    try:
        source = make_model(arguments.folder / "hf", CONFIG_VALUES)
        medians = measure(source, arguments.rounds, arguments.workers, not arguments.without_model)
    except BridgeworksError as error:
        sys.exit(f"error: {error}")
    nbytes = (source / SINGLE_SHARD).stat().st_size
    headings = ("what", "seconds", "GB/s", "peak MiB", "ratio to cp", "best", "ratio of best")
    print_table(headings, table_rows(medians, nbytes))
    print(json.dumps(summary(medians, nbytes, arguments), sort_keys=True))


def make_model(folder: Path, config: dict[str, Any]) -> Path:
    """Write a checkpoint of random weights, unless it is there from an earlier run."""
    dtype = config["dtype"]
    size, entries = 0, {}
    for name, shape in plan_weights(provider_of(config)).hf_shapes.items():
        end = size + ITEM_SIZES[dtype] * math.prod(shape)
        entries[name] = {"dtype": TO_SAFETENSORS[dtype], "shape": shape, "data_offsets": [size, end]}
        size = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    file = folder / SINGLE_SHARD
    if file.is_file() and file.stat().st_size == 8 + len(header) + size:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    # Bytes below 0x40 at every place: small numbers, none of them infinite or not a number.
    noise = bytes(byte & 0x3F for byte in os.urandom(1 << 20)) * (NOISE_SIZE >> 20)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, size, NOISE_SIZE):
            stream.write(noise[: size - start])
    return folder


def measure(source: Path, rounds: int, workers: int, with_model: bool) -> dict[str, Measured]:
    """Run everything in turn, several times, and return the medians by name.

    What a process has written is removed before the next one, so that each finds as much memory just given
    back: other free memory a virtual machine may have returned to its host, which doubles a copy's time.
    """
    folder = source.parent
    megatron, result = folder / "megatron", folder / "result"
    command = [sys.executable, "-m", "flows.cli"]
    threads = ["--workers", str(workers)]
    steps = {
        "cp of hf": ["cp", "-r", str(source), str(result)],
        "import": [*command, "import", str(source), str(result), *threads],
        "cp of megatron": ["cp", "-r", str(megatron), str(result)],
        "export": [*command, "export", str(megatron), str(result), *threads],
    }
    for path in (megatron, result):
        shutil.rmtree(path, ignore_errors=True)
    run_process([*command, "import", str(source), str(megatron), *threads])
    found: dict[str, list[Measured]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, step in steps.items():
            os.sync()  # or a process would be slowed down by what the one before it has written
            measured = run_process(step)
            if number:  # the first round warms the page cache
                found[name].append(measured)
            shutil.rmtree(result)
    if with_model:
        found |= {name: [each] for name, each in through_a_model(source, megatron, folder).items()}
    shutil.rmtree(megatron)
    return {name: _median(each) for name, each in found.items()}


def through_a_model(source: Path, megatron: Path, folder: Path) -> dict[str, Measured]:
    """Measure the ordinary way once: from_pretrained, a live model, a save by its own library; and back."""
    found, settings, target = {}, folder / "job.json", folder / "through-a-model"
    for name, start in (("import through a model", source), ("export through a model", megatron)):
        shutil.rmtree(target, ignore_errors=True)
        settings.write_text(
            json.dumps({"source": str(start), "target": str(target), "report": str(folder / "report.json")})
        )
        found[name] = run_process(
            [sys.executable, "-m", "bridge.job", "bridge.convert_by_model", str(settings)]
        )
        shutil.rmtree(target, ignore_errors=True)
    return found


# Started from a small process: a child counts as its own what its parent had in memory when it was forked.
START = """
import json, os, sys, time
began = time.perf_counter()
process = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(process, 0)
values = time.perf_counter() - began, usage.ru_maxrss, os.waitstatus_to_exitcode(status)
with open(sys.argv[1], "w") as file:
    json.dump(values, file)
"""


def run_process(command: list[str]) -> Measured:
    """Run a command to its end; a failure is an error with what it said."""
    with tempfile.NamedTemporaryFile("r") as report:
        start = [sys.executable, "-S", "-c", START, report.name, *command]
        # Images of containers forbid Python to keep what it compiles: a user's second start has it.
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        said = subprocess.run(
            start, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout
        seconds, peak, code = json.load(report)
    if code:
        raise BridgeworksError(f"{' '.join(command)} failed: {said[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(seconds, peak * unit / MIB)


def _median(measured: list[Measured]) -> Measured:
    seconds = [each.seconds for each in measured]
    return Measured(statistics.median(seconds), max(each.peak_mib for each in measured), min(seconds))


def table_rows(medians: dict[str, Measured], nbytes: int) -> list[tuple[str, ...]]:
    """Return a row for each process; a ratio of 1 is the speed of the copy."""
    return [
        (
            name,
            f"{each.seconds:.2f}",
            f"{nbytes / each.seconds / 1e9:.2f}",
            f"{each.peak_mib:.0f}",
            f"{_copy_of(name, medians).seconds / each.seconds:.2f}",
            f"{each.best:.2f}",
            f"{_copy_of(name, medians).best / each.best:.2f}",
        )
        for name, each in medians.items()
    ]


def _copy_of(name: str, medians: dict[str, Measured]) -> Measured:
    return medians["cp of megatron" if "export" in name or "megatron" in name else "cp of hf"]


def summary(medians: dict[str, Measured], nbytes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures by name: ratios to the copy, seconds, peaks in MiB."""
    values: dict[str, Any] = {
        "bytes": nbytes,
        "rounds": arguments.rounds,
        "workers": arguments.workers,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    for name, each in medians.items():
        key = name.replace(" ", "_")
        values[f"{key}_seconds"] = round(each.seconds, 3)
        values[f"{key}_peak_mib"] = round(each.peak_mib, 1)
        values[f"{key}_ratio"] = round(_copy_of(name, medians).seconds / each.seconds, 3)
        values[f"{key}_best_ratio"] = round(_copy_of(name, medians).best / each.best, 3)
    return values


if __name__ == "__main__":
    main()
