"""Import: a Hugging Face checkpoint becomes a Megatron one by copying byte ranges, without a model."""

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

from bridge.byte_copy import Progress, ProgressCounter
from bridge.chunk_plan import ChunkPlanner, split_over_files
from bridge.conversion import Conversion, check_unchanged, check_workers, origin_of
from bridge.coverage import check_hf_coverage
from bridge.dtypes import check_weight_dtype
from bridge.families import plan_weights, provider_of
from bridge.hf_checkpoint import CONFIG, HfCheckpoint
from bridge.item_files import ItemWriter, file_name, lay_out
from bridge.mapping import WeightPlan
from bridge.megatron_checkpoint import write_model
from bridge.memory import DEFAULT_LIMIT, MemoryLimit
from bridge.quantization import stored_slices
from bridge.refused_files import refused_files
from bridge.sizes import Size
from bridge.staging import resumable_folder
from bridge.stored_dtypes import stored_dtypes
from bridge.torch_dist.items import object_item
from bridge.torch_dist.metadata import Place, StoredTensor, TorchDistMetadata, write_metadata

# Modules that are Megatron's own under every layer spec; all others are Transformer Engine's.
WITHOUT_EXTRA_STATE = ("embedding.word_embeddings", "output_layer", "mlp.router")


@refused_files()
def import_checkpoint(
    hf_path: str | Path,
    megatron_path: str | Path,
    *,
    workers: int = 2,
    max_memory: Size = DEFAULT_LIMIT,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the Hugging Face checkpoint `hf_path` as a new Megatron checkpoint folder.

    Quantised weights become what they stand for. `dtype` casts every weight, but for those that Megatron
    keeps in float32. `progress(done, total)` is called with bytes. Anything wrong with the source or the
    destination is an InputError, and nothing new is left behind; a conversion that was killed or stopped goes
    on from its finished files.
    """
    began = time.monotonic()
    check_workers(workers)
    check_weight_dtype(dtype)
    memory = MemoryLimit(max_memory)
    source = HfCheckpoint.open(hf_path)
    provider = provider_of(source.config)
    plan = plan_weights(provider)
    check_hf_coverage(plan, source)
    metadata = _described(plan, stored_dtypes(plan, source.tensors, dtype))
    dtypes = {key: stored.dtype for key, stored in metadata.tensors.items()}
    pieces = ChunkPlanner(plan, source.tensors, dtypes).pieces()
    files = [lay_out(number, file, metadata) for number, file in enumerate(split_over_files(pieces))]
    total = sum(piece.nbytes for piece in pieces)
    origin = origin_of(plan, _read_files(source), kind="import", dtypes=sorted(dtypes.items()))
    counter = ProgressCounter(total, progress)
    with resumable_folder(Path(megatron_path), total, origin) as journal:
        _write_extra_states(journal.folder, len(files), plan, metadata)
        params_dtype = dtype or provider.params_dtype
        described = dataclasses.replace(provider, params_dtype=params_dtype)
        side_files = [source.path / CONFIG, *source.side_files()]
        write_model(journal.folder, described, side_files, num_padding_rows=0)
        write_metadata(journal.folder, metadata)
        ItemWriter(source.tensors, metadata).write(files, journal, workers, memory, counter)
        check_unchanged(origin)
    seconds = time.monotonic() - began
    resumed, quantization, started_over = counter.resumed, source.quantization, journal.started_over
    return Conversion(
        Path(megatron_path), len(plan.hf_shapes), total, seconds, resumed, quantization, started_over
    )


def _read_files(source: HfCheckpoint) -> set[Path]:
    shards = {stored.file for tensor in source.tensors.values() for stored in stored_slices(tensor)}
    return {source.path / CONFIG, *shards}


def _described(plan: WeightPlan, dtypes: dict[str, str]) -> TorchDistMetadata:
    """Return the metadata of the checkpoint to be, without chunks."""
    metadata = TorchDistMetadata()
    for key, dtype in dtypes.items():
        metadata.tensors[key] = StoredTensor(dtype, plan.megatron_shapes[key])
    return metadata


def _write_extra_states(folder: Path, number: int, plan: WeightPlan, metadata: TorchDistMetadata) -> None:
    """Write the empty `_extra_state` objects that Transformer Engine's modules ask for, all as one item."""
    item = object_item([None])
    place = Place(file_name(number), 0, len(item))
    (folder / place.file).write_bytes(item)
    for key, lead in dict.fromkeys((block.key, block.lead) for block in plan.blocks):
        module = key.rpartition(".")[0]
        if not module.endswith(WITHOUT_EXTRA_STATE):
            shape = plan.megatron_shapes[key][: len(lead)] or (1,)
            shard = f"shard_{_dotted(lead or (0,))}_{_dotted(shape)}"
            metadata.objects[f"{module}._extra_state/{shard}"] = place


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))
