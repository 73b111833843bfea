"""torch's reader of checkpoint files, with mapped tensors of which it reads just the slices asked for."""

import io
import os
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from bridge.byte_copy import OpenFiles
from bridge.errors import CheckpointError
from bridge.mapped_files import MappedFiles, StoredItems, copy_elements


class MappedReader(CachedMetadataFileSystemReader):
    """Reads tensors in place: from a file's pages to where the planner wants them.

    torch's own reader unpickles the whole item for every slice of it.
    """

    _cached_metadata: Any

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with OpenFiles() as files:
            items = StoredItems(files, MappedFiles())
            for item in sorted(plan.items, key=self._place):
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, self._object(item, files))
                else:
                    self._read_tensor(item, planner, items)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> tuple[str, int]:
        stored = self.storage_data[item.storage_index]
        return stored.relative_path, stored.offset

    def _object(self, item: ReadItem, files: OpenFiles) -> io.BytesIO:
        stored = self.storage_data[item.storage_index]
        file = Path(self.path, stored.relative_path)
        with files.opened(file) as descriptor:
            return io.BytesIO(os.pread(descriptor, stored.length, stored.offset))

    def _read_tensor(self, item: ReadItem, planner: LoadPlanner, items: StoredItems) -> None:
        key, stored = item.storage_index.fqn, self.storage_data[item.storage_index]
        file = Path(self.path, stored.relative_path)
        if stored.transform_descriptors:
            raise CheckpointError(f"{file}: {key!r} is compressed or encrypted: save it as it is")
        chunk = self._cached_metadata.state_dict_metadata[key].chunks[item.storage_index.index]
        elements, dtype = items.elements(file, stored.offset, stored.length, tuple(chunk.sizes), key)
        for axis, (offset, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            elements = elements.narrow(axis, offset, size)
        target = planner.resolve_tensor(item).detach()
        copy_elements(target, elements, dtype)
        planner.commit_tensor(item, target)
