"""Import: a Hugging Face checkpoint becomes a Megatron one by copying byte ranges, without a model."""

import os
import time
from pathlib import Path
from typing import NamedTuple

from bridge.byte_copy import (
    OpenFiles,
    Progress,
    ProgressCounter,
    ThreadBuffer,
    copy_range,
    for_each,
    write_from,
)
from bridge.chunk_plan import Piece, plan_pieces, split_over_files
from bridge.conversion import Conversion, check_workers
from bridge.coverage import check_hf_coverage
from bridge.errors import CoverageError
from bridge.families import plan_weights, provider_of
from bridge.hf_checkpoint import CONFIG, HfCheckpoint, TensorSlice
from bridge.mapping import WeightPlan
from bridge.megatron_checkpoint import write_model
from bridge.staging import staged_folder
from bridge.torch_dist.items import ALIGNMENT, TensorItem, object_item
from bridge.torch_dist.metadata import Chunk, Place, StoredTensor, TorchDistMetadata, write_metadata

# Modules that are Megatron's own under every layer spec; all others are Transformer Engine's.
WITHOUT_EXTRA_STATE = ("embedding.word_embeddings", "output_layer", "mlp.router")


def import_checkpoint(
    hf_path: str | Path, megatron_path: str | Path, *, workers: int = 2, progress: Progress | None = None
) -> Conversion:
    """Write the Hugging Face checkpoint `hf_path` as a new Megatron checkpoint folder.

    `progress(done, total)` is called with bytes. Anything wrong with the source or the destination is an
    InputError, and nothing is left behind.
    """
    began = time.monotonic()
    check_workers(workers)
    source = HfCheckpoint.open(hf_path)
    provider = provider_of(source.config)
    plan = plan_weights(provider)
    check_hf_coverage(plan, source)
    pieces = plan_pieces(plan, source.tensors)
    total = sum(piece.nbytes for piece in pieces)
    with staged_folder(Path(megatron_path), total) as folder:
        metadata = _described(plan, source.tensors)
        files = [
            _lay_out(folder, number, file, metadata) for number, file in enumerate(split_over_files(pieces))
        ]
        _write_files(files, workers, ProgressCounter(total, progress))
        _write_extra_states(folder, len(files), plan, metadata)
        write_model(folder, provider, [source.path / CONFIG, *source.side_files()])
        write_metadata(folder, metadata)
    return Conversion(Path(megatron_path), len(plan.hf_shapes), total, time.monotonic() - began)


def _described(plan: WeightPlan, tensors: dict[str, TensorSlice]) -> TorchDistMetadata:
    """Return the metadata of the checkpoint to be, without chunks; a key must have one dtype."""
    metadata = TorchDistMetadata()
    for block in plan.blocks:
        dtype = tensors[block.hf].dtype
        stored = metadata.tensors.setdefault(block.key, StoredTensor(dtype, plan.megatron_shapes[block.key]))
        if stored.dtype != dtype:
            raise CoverageError(
                f"{block.hf!r} has dtype {dtype}, others that share a Megatron tensor with it"
                f" have {stored.dtype}: save the checkpoint in one dtype"
            )
    return metadata


class _ItemFile(NamedTuple):
    """A .distcp file to be: its pieces and where each one's item lies."""

    path: Path
    items: list[tuple[Piece, TensorItem]]


def _lay_out(folder: Path, number: int, pieces: list[Piece], metadata: TorchDistMetadata) -> _ItemFile:
    """Give each piece its place in file `number`, and enter it in `metadata`."""
    file = _ItemFile(folder / _file_name(number), [])
    start = 0
    for piece in pieces:
        stored = metadata.tensors[piece.key]
        offsets, sizes = piece.box(stored.shape)
        item = TensorItem(sizes, stored.dtype, start)
        stored.chunks.append(Chunk(offsets, sizes, Place(file.path.name, start, item.length)))
        file.items.append((piece, item))
        start = item.end + -item.end % ALIGNMENT
    return file


def _file_name(number: int) -> str:
    return f"__{number}_0.distcp"  # as Megatron names the files of rank `number`


def _write_files(files: list[_ItemFile], workers: int, counter: ProgressCounter) -> None:
    buffer = ThreadBuffer()
    with OpenFiles() as sources:
        for_each(lambda file: _write_file(file, sources, buffer, counter), files, workers)


def _write_file(file: _ItemFile, sources: OpenFiles, buffer: ThreadBuffer, counter: ProgressCounter) -> None:
    target = os.open(file.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        for piece, item in file.items:
            crc, position = 0, item.payload_start
            for source, offset, nbytes in piece.ranges:
                descriptor = sources.descriptor(source)
                crc = copy_range(descriptor, offset, nbytes, target, position, buffer.view, crc)
                position += nbytes
            write_from(target, item.head(crc), item.start)
            write_from(target, item.tail(crc), position)
            counter.add(piece.nbytes)
    finally:
        os.close(target)


def _write_extra_states(folder: Path, number: int, plan: WeightPlan, metadata: TorchDistMetadata) -> None:
    """Write the empty `_extra_state` objects that Transformer Engine's modules ask for, all as one item."""
    item = object_item([None])
    place = Place(_file_name(number), 0, len(item))
    (folder / place.file).write_bytes(item)
    for block in plan.blocks:
        module = block.key.rpartition(".")[0]
        if not module.endswith(WITHOUT_EXTRA_STATE):
            lead = block.lead or (0,)
            shape = plan.megatron_shapes[block.key][: len(block.lead)] or (1,)
            shard = f"shard_{'.'.join(map(str, lead))}_{'.'.join(map(str, shape))}"
            metadata.objects[f"{module}._extra_state/{shard}"] = place
