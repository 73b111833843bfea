"""Writes tensors that arrive one by one as the safetensors shards of a Hugging Face checkpoint."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from bridge.hf_checkpoint import INDEX
from bridge.mapping import Shape


def write_shards(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    shapes: dict[str, Shape],
    dtype: torch.dtype,
    max_shard_size: str = "5GB",
) -> None:
    """Write `weights`, whose names and shapes are known before they arrive, each shard once it is full.

    Weights in the order of `shapes` need the memory of one shard.
    """
    described = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(described, max_shard_size=max_shard_size)
    waiting: dict[str, dict[str, torch.Tensor]] = {file: {} for file in split.filename_to_tensors}
    file_of = {name: file for file, names in split.filename_to_tensors.items() for name in names}
    for name, weight in weights:
        file = file_of[name]
        waiting[file][name] = weight.contiguous()
        if len(waiting[file]) == len(split.filename_to_tensors[file]):
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
    assert not waiting, f"weights for {sorted(waiting)} did not arrive"
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
