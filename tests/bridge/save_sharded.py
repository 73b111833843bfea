"""Save a Megatron checkpoint anew as a training run at TP=2 would: by Megatron Core, on two gloo ranks.

    torchrun --nproc-per-node 2 save_sharded.py SOURCE DESTINATION

Vocabularies get 96 rows of padding; optimizer state, an object and run settings lie beside the model.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import distributed

from bridge import cpu
from bridge.megatron_checkpoint import read_model
from bridge.restricted_load import load
from bridge.torch_dist.metadata import read_metadata

RANKS = 2
PADDING = 96


def whole_tensors(source: Path, rank: int) -> dict[str, torch.Tensor]:
    """Read every tensor whole, through Megatron Core itself."""
    wanted = {
        key: sharded(key, torch.empty(stored.shape, dtype=getattr(torch, stored.dtype)), (), replica=rank)
        for key, stored in read_metadata(source).tensors.items()
    }
    return {key: tensor for key, tensor in load(wanted, source).items() if key in wanted}


def shards(key: str, tensor: torch.Tensor, rank: int) -> list[ShardedTensor]:
    """Cut as tensor parallelism does; one shard for each layer, and for gate and up of each layer."""
    if not key.startswith("decoder.layers."):
        return cut(key, tensor, rank, ())
    layers = tensor.shape[0]
    return [part for layer in range(layers) for part in cut(key, tensor[layer], rank, ((0, layer, layers),))]


def cut(key: str, tensor: torch.Tensor, rank: int, layer: tuple[Any, ...]) -> list[ShardedTensor]:
    axis = len(layer)
    if key.endswith("linear_fc1.weight"):
        pieces = tensor.chunk(2 * RANKS)
        offsets = [(axis, part * RANKS + rank, 2 * RANKS) for part in range(2)]
        return [sharded(key, pieces[offset[1]], layer, offset) for offset in offsets]
    if "embedding" in key or "output_layer" in key:
        tensor = torch.cat([tensor, tensor.new_full((PADDING, tensor.shape[1]), 7.0)])
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return [sharded(key, tensor.chunk(RANKS, dim=1)[rank], layer, (axis + 1, rank, RANKS))]
    if "layer_norm" in key or "layernorm" in key:
        return [sharded(key, tensor, layer, replica=rank)]
    return [sharded(key, tensor.chunk(RANKS)[rank], layer, (axis, rank, RANKS))]


def sharded(
    key: str, tensor: torch.Tensor, layer: tuple[Any, ...], *offsets: tuple[int, int, int], replica: int = 0
) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(
        key, tensor.contiguous(), *layer, *offsets, prepend_axis_num=len(layer), replica_id=replica
    )


def main() -> None:
    source, destination = Path(sys.argv[1]), Path(sys.argv[2])
    cpu.install()
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    tensors = whole_tensors(source, rank)
    state: dict[str, Any] = {
        "model": {
            f"{key}/{number}": shard
            for key, tensor in tensors.items()
            for number, shard in enumerate(shards(key, tensor, rank))
        },
        "optimizer": {
            key: sharded(f"optimizer.state.exp_avg.{key}", tensor.float(), (), replica=rank)
            for key, tensor in tensors.items()
        },
        "rng_state": ShardedObject("rng_state", [torch.get_rng_state()], (RANKS,), (rank,)),
        "iteration": 5,
        "provider": read_model(source).to_dict(),
    }
    if rank == 0:
        destination.mkdir(parents=True)
    distributed.barrier()
    dist_checkpointing.save(state, str(destination))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
