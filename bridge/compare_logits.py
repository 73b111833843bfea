"""The parity job: do two checkpoints say the same, at every position of several prompts and at every layer?

Each end is a Hugging Face folder, computed by transformers on the first rank, or a Megatron folder, computed
by all ranks together. Both compute in one dtype, whatever their weights are stored in. What the first end
says goes to files, layer by layer; the second one is compared with them as it computes, so that no more than
one model and one layer's states are in memory.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bridge import check_layout, distributed, live_checkpoint
from bridge.differences import Differences, by_layer, summarize, write_table
from bridge.ends import NOTHING, GivenModel, describe
from bridge.gates import HIDDEN_THRESHOLDS, case_of, check_dtype, judge_hidden_states, judge_logits
from bridge.logits import load_hf
from bridge.megatron_checkpoint import is_megatron_checkpoint, resolve_checkpoint
from bridge.prompts import Prompts, prompts_of
from bridge.provider import GPTModelProvider
from bridge.trace import TraceFolder, trace_hf, trace_megatron

Keep = Callable[[int, str, torch.Tensor], None]


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Compare the ends `a` and `b`; a failed gate is a result with "passed": false, not an error.

    The report has the verdicts "gate" (logits), "hidden_states" and "reload" (complaints of transformers).
    `table` and `layers_table` name files for the rows; `scratch` a folder that all ranks see.
    """
    started = time.monotonic()
    check_dtype(config["dtype"])
    if config["dtype"] == "float32":
        # Transformer Engine multiplies float32 matrices in TF32, whose 11 bits no float32 gate lets pass.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    layout = layout_of(config)
    distributed.initialize(layout, config.get("seed", distributed.DEFAULT_SEED))
    report = compared(config, layout)
    report |= {"dtype": config["dtype"], "seconds": time.monotonic() - started}
    torch.distributed.barrier()
    distributed.finalize()
    return report


def compared(config: dict[str, Any], layout: GPTModelProvider) -> dict[str, Any]:
    """Run both ends and judge; only the first rank's report is whole."""
    a, b = Path(config["a"]), Path(config["b"])
    given = GivenModel(
        Path(config["config_from"]) if config.get("config_from") else None, config.get("family")
    )
    models = describe(a, given), describe(b, given)
    if reason := incomparable(*models):
        return {"gate": not_measured(reason), "num_positions": 0}
    prompts = prompts_of(config, vocab_size=models[0].vocab_size)
    with shared_folder(config.get("scratch")) as folder:
        trace = TraceFolder(folder)
        complaints = run_end(a, prompts, layout, trace.keep, given)
        torch.distributed.barrier()  # what one rank writes another one reads
        differences = Differences(prompts, trace)
        complaints += run_end(b, prompts, layout, differences.compare, given)
        torch.distributed.barrier()  # before the folder is removed
    positions, layers = (of_all_ranks(rows) for rows in (differences.positions, differences.layers))
    case = case_of(config["dtype"], models[0].num_moe_experts is not None)
    return judged(config, case, complaints, positions, layers) if torch.distributed.get_rank() == 0 else {}


def judged(
    config: dict[str, Any],
    case: str,
    complaints: list[str],
    positions: list[dict[str, Any]],
    layers: list[dict[str, Any]],
) -> dict[str, Any]:
    """Write the tables and judge the rows."""
    write_table(positions, config.get("table"))
    write_table(layers, config.get("layers_table"))
    return {
        "gate": judge_logits(summarize(positions), case),
        "hidden_states": judge_hidden_states(by_layer(layers, HIDDEN_THRESHOLDS[case].metric), case),
        "reload": {
            "passed": not complaints,
            "metrics": {"complaints": len(complaints)},
            "thresholds": {"complaints": 0},
            "failures": complaints,
        },
        "num_positions": len(positions),
    }


def layout_of(config: dict[str, Any]) -> GPTModelProvider:
    """Return a provider that says only how the Megatron ends are laid out and computed."""
    sizes = {name: config.get(name, 1) for name in check_layout.SIZES}
    return check_layout.laid_out(GPTModelProvider(params_dtype=config["dtype"]), sizes)


def laid_out(provider: GPTModelProvider, layout: GPTModelProvider) -> GPTModelProvider:
    """Give a checkpoint's model this job's layout and dtype."""
    provider.params_dtype = layout.params_dtype
    return check_layout.laid_out(provider, {name: getattr(layout, name) for name in check_layout.SIZES})


def incomparable(a: GPTModelProvider, b: GPTModelProvider) -> str | None:
    """Say why the outputs of two models cannot be compared number by number."""
    for name in ("num_layers", "hidden_size", "vocab_size"):
        if getattr(a, name) != getattr(b, name):
            return (
                f"not measured: {name} is {getattr(a, name)} at one end and {getattr(b, name)} at the other"
            )
    return None


def not_measured(reason: str) -> dict[str, Any]:
    return {"passed": False, "metrics": {}, "thresholds": {}, "failures": [reason]}


def run_end(
    end: Path, prompts: Prompts, layout: GPTModelProvider, keep: Keep, given: GivenModel = NOTHING
) -> list[str]:
    """Let one end say what it says to every prompt; return what transformers found wrong with its folder."""
    if is_megatron_checkpoint(end):
        run_megatron(end, prompts, laid_out(describe(end, given), layout), keep)
        return []
    # transformers knows no other ranks
    return run_hf(end, prompts, layout.params_dtype, keep) if torch.distributed.get_rank() == 0 else []


def run_hf(end: Path, prompts: Prompts, dtype: str, keep: Keep) -> list[str]:
    model, complaints = load_hf(end, dtype)
    for number, prompt in enumerate(prompts):
        trace_hf(model, prompt, partial(keep, number))
    return [f"{end}: transformers finds {kind}: {', '.join(n[:3])}" for kind, n in complaints.items() if n]


def run_megatron(end: Path, prompts: Prompts, provider: GPTModelProvider, keep: Keep) -> None:
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)
    live_checkpoint.load_checkpoint(chunks, resolve_checkpoint(end))
    chunks[0].eval()
    for number, prompt in enumerate(prompts):
        trace_megatron(chunks, provider, prompt, partial(keep, number))


@contextmanager
def shared_folder(place: str | None) -> Iterator[Path]:
    """Yield a new folder in `place` that every rank is told of; it is removed at the end."""
    first = torch.distributed.get_rank() == 0
    folder = tempfile.TemporaryDirectory(prefix="bridgeworks-trace-", dir=place) if first else None
    name = [folder.name if folder else None]
    torch.distributed.broadcast_object_list(name)
    assert name[0], "the first rank made the folder"
    try:
        yield Path(name[0])
    finally:
        if folder:
            folder.cleanup()


def of_all_ranks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all ranks in the order of prompts."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, rows)
    place = ("prompt", "layer", "position")
    return sorted(
        (row for each in found for row in each), key=lambda row: [row[key] for key in place if key in row]
    )
