"""A job of the tests: what live models on two ranks yield, load and refuse."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file

from bridge import AutoBridge, restricted_load
from bridge.distributed import leave_model_parallel
from bridge.errors import BridgeworksError
from bridge.live_checkpoint import load_checkpoint, load_model_state, model_state
from bridge.live_weights import HfWeights, export_hf_weights
from bridge.provider import GPTModelProvider

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "dp2": {},
}
ONE_ROW, SMALL = 1, 10_000  # bucket sizes, in bytes
Chunks = list[torch.nn.Module]


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return the names of the checks that every rank passed, and the messages of errors."""
    hf, megatron, damaged = (Path(config[name]) for name in ("hf", "megatron", "damaged"))
    expected = tensors_of(hf)
    report: dict[str, Any] = {}
    for layout, sizes in LAYOUTS.items():
        bridge = AutoBridge.from_hf_pretrained(hf)
        provider = bridge.to_megatron_provider(load_weights=False)
        for name, size in sizes.items():
            setattr(provider, name, size)
        chunks = provider.provide_distributed_model(wrap_with_ddp=False)
        load_checkpoint(chunks, hf)
        single = save_single_shards(chunks, Path(config["output"]) / f"{layout} single")
        folders = {"hf": hf, "megatron": megatron, "single": single}
        checks = {**exports(chunks, provider, expected), **loads(chunks, provider, folders, expected)}
        checks["saves"] = saves(bridge, chunks, Path(config["output"]) / layout, expected)
        report[layout] = [name for name, passed in checks.items() if everywhere(passed)]
        report[f"{layout} error"] = message_of(partial(load_checkpoint, chunks, damaged))
        leave_model_parallel()
    return report


def exports(chunks: Chunks, provider: GPTModelProvider, expected: dict[str, torch.Tensor]) -> dict[str, bool]:
    first, *others = sorted(expected)
    rank = torch.distributed.get_rank()

    def export(**options: Any) -> list[tuple[str, torch.Tensor]]:
        return list(export_hf_weights(chunks, provider, **options))

    in_float = {name: weight.float() for name, weight in expected.items()}
    in_half = {name: weight.to(torch.float16) for name, weight in expected.items()}
    on_first = export(first_rank_only=True, bucket_size=SMALL)
    return {
        "whole": same(export(), expected),
        "small buckets": same(export(bucket_size=SMALL), expected),
        "buckets of one row": same(export(bucket_size=ONE_ROW, names=others[:5]), only(expected, others[:5])),
        "one order": same_everywhere([name for name, _ in export(bucket_size=SMALL)]),
        "some": same(export(names=[first]), only(expected, [first])),
        "none": export(names=[]) == [],
        "unknown": "no tensor 'never'" in message_of(lambda: export(names=["never"])),
        "wider": same(export(dtype=torch.float32), in_float),
        "narrower": same(export(dtype=torch.float16), in_half),
        "first rank only": same(on_first, expected) if rank == 0 else on_first == [],
        "described": described(HfWeights(chunks, provider), expected),
    }


def save_single_shards(chunks: Chunks, folder: Path) -> Path:
    """Save the model with a tensor for each layer and expert, gate and up apart."""
    settings = {"singleton_local_shards": True}
    states = [chunk.sharded_state_dict(metadata={**settings}) for chunk in unwrap_model(chunks)]
    state = restricted_load.without_extra_state({f"model{n}": found for n, found in enumerate(states)})
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder), content_metadata=settings)
    return folder


def loads(
    chunks: Chunks, provider: GPTModelProvider, folders: dict[str, Path], expected: dict[str, torch.Tensor]
) -> dict[str, bool]:
    parallel = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy())

    def through_megatron(strategy: Any) -> None:
        load_model_state(chunks, restricted_load.load(model_state(chunks), folders["megatron"], strategy))

    ways: dict[str, Callable[[], None]] = {
        "from Hugging Face": lambda: load_checkpoint(chunks, folders["hf"]),
        "from Megatron": lambda: load_checkpoint(chunks, folders["megatron"]),
        "from single shards": lambda: load_checkpoint(chunks, folders["single"]),
        "restricted_load": lambda: through_megatron(None),
        "restricted_load in parallel": lambda: through_megatron(parallel),
    }
    found = {}
    for name, load in ways.items():
        for tensor in (tensor for chunk in chunks for tensor in chunk.parameters()):
            tensor.data.fill_(7.0)
        load()
        found[name] = same(export_hf_weights(chunks, provider), expected)
    return found


def saves(bridge: AutoBridge, chunks: Chunks, folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    bridge.save_hf_pretrained(chunks, folder, max_shard_size="60KB")
    return same(tensors_of(folder).items(), expected) and len(list(folder.glob("*.safetensors"))) > 1


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def only(tensors: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in names}


def same(found: Iterable[tuple[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> bool:
    pairs = list(found)
    return sorted(name for name, _ in pairs) == sorted(expected) and all(
        weight.dtype == expected[name].dtype and torch.equal(weight, expected[name]) for name, weight in pairs
    )


def described(weights: HfWeights, expected: dict[str, torch.Tensor]) -> bool:
    return {name: (tensor.shape, f"torch.{tensor.dtype}") for name, tensor in weights.described.items()} == {
        name: (tuple(weight.shape), str(weight.dtype)) for name, weight in expected.items()
    }


def everywhere(passed: bool) -> bool:
    votes = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(votes, passed)
    return all(votes)


def same_everywhere(value: Any) -> bool:
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return all(other == value for other in values)


def message_of(work: Callable[[], Any]) -> str:
    """Return the message of an error that every rank must raise."""
    try:
        work()
    except BridgeworksError as error:
        return str(error) if same_everywhere(str(error)) else "another on each rank"
    return "none"
