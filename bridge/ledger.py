"""The ledger of a checkpoint: one record with a digest for each Hugging Face tensor, at either end."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bridge.byte_copy import OpenFiles, Progress, ProgressCounter, ThreadBuffer, for_each, read_into
from bridge.chunk_plan import HfRows
from bridge.conversion import check_workers
from bridge.coverage import check_hf_coverage
from bridge.ends import NOTHING, GivenModel, open_megatron
from bridge.errors import CheckpointError
from bridge.families import plan_weights, provider_of
from bridge.hf_checkpoint import CONFIG, HfCheckpoint
from bridge.hf_view import HfView
from bridge.megatron_checkpoint import MegatronCheckpoint, is_megatron_checkpoint
from bridge.memory import MAX_PART_SIZE
from bridge.quantization import HfTensor, stored_slices
from bridge.refused_files import refused_files
from bridge.shard_header import TensorSlice

EQUAL, DIFFERENT, ONLY_A, ONLY_B = "equal", "different", "only in a", "only in b"
STATES = (EQUAL, DIFFERENT, ONLY_A, ONLY_B)


@dataclass(frozen=True)
class LedgerRecord:
    """One tensor by its Hugging Face name; `file` and `offset` say where its first byte lies at this end.

    `rule` is the kind of weight rule and the Megatron tensor that carry it.
    """

    name: str
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    rule: str

    @property
    def content(self) -> tuple[tuple[int, ...], str, str]:
        """What two ends have in common: shape, dtype and digest."""
        return self.shape, self.dtype, self.sha256


@dataclass(frozen=True)
class Ledger:
    """The records of a checkpoint in the order of their names; a tied tensor counts once."""

    path: Path
    records: tuple[LedgerRecord, ...]


@dataclass(frozen=True)
class LedgerRow:
    """One tensor at both ends; None where an end has no such tensor."""

    name: str
    a: LedgerRecord | None
    b: LedgerRecord | None

    @property
    def rule(self) -> str:
        """The rule that carries it, by an end that has it."""
        record = self.a or self.b
        assert record, "a row is of some end's tensor"
        return record.rule

    @property
    def state(self) -> str:
        """Return one of STATES."""
        if self.a is None or self.b is None:
            return ONLY_B if self.a is None else ONLY_A
        return EQUAL if self.a.content == self.b.content else DIFFERENT


@dataclass(frozen=True)
class LedgerComparison:
    """Two ledgers side by side, in the order of names."""

    rows: tuple[LedgerRow, ...]

    @property
    def passed(self) -> bool:
        return all(row.state == EQUAL for row in self.rows)

    def names(self, state: str) -> tuple[str, ...]:
        """List the tensors in one of STATES."""
        return tuple(row.name for row in self.rows if row.state == state)


@refused_files()
def ledger(
    path: str | Path,
    *,
    workers: int = 2,
    progress: Progress | None = None,
    given: GivenModel = NOTHING,
) -> Ledger:
    """Digest a Hugging Face folder, or a Megatron folder as the Hugging Face tensors that it would become.

    `given` describes the model of a checkpoint of plain Megatron-LM.
    """
    check_workers(workers)
    folder = Path(path)
    if is_megatron_checkpoint(folder):
        records = _megatron_records(open_megatron(folder, given), workers, progress)
    elif (folder / CONFIG).is_file():
        records = _hf_records(HfCheckpoint.open(folder), workers, progress)
    else:
        raise CheckpointError(f"{folder} is neither a Hugging Face nor a Megatron checkpoint folder")
    return Ledger(folder, tuple(sorted(records, key=lambda record: record.name)))


def compare_ledgers(a: Ledger, b: Ledger) -> LedgerComparison:
    """Put two ends side by side, tensor by tensor."""
    first, second = ({record.name: record for record in end.records} for end in (a, b))
    names = sorted(first.keys() | second.keys())
    return LedgerComparison(tuple(LedgerRow(name, first.get(name), second.get(name)) for name in names))


def _hf_records(checkpoint: HfCheckpoint, workers: int, progress: Progress | None) -> Iterable[LedgerRecord]:
    plan = plan_weights(provider_of(checkpoint.config))
    check_hf_coverage(plan, checkpoint)
    tensors = {name: checkpoint.tensors[name] for name in plan.hf_shapes}
    counter = ProgressCounter(sum(tensor.nbytes for tensor in tensors.values()), progress)
    records: list[LedgerRecord] = []
    buffer = ThreadBuffer()

    def record(name: str) -> None:
        tensor = tensors[name]
        digest = _digest_slice if isinstance(tensor, TensorSlice) else _digest_dequantized
        sha256 = digest(tensor, files, buffer.view)
        file, offset = stored_slices(tensor)[0].file.name, stored_slices(tensor)[0].offset
        records.append(LedgerRecord(name, file, offset, tensor.shape, tensor.dtype, sha256, plan.rules[name]))
        counter.add(tensor.nbytes)

    with OpenFiles() as files:
        for_each(record, tensors, workers)
    return records


def _digest_slice(tensor: HfTensor, files: OpenFiles, buffer: memoryview) -> str:
    assert isinstance(tensor, TensorSlice)
    digest = hashlib.sha256()
    with files.opened(tensor.file) as descriptor:
        for start in range(0, tensor.nbytes, len(buffer)):
            view = buffer[: min(len(buffer), tensor.nbytes - start)]
            read_into(descriptor, [view], tensor.offset + start)
            digest.update(view)
    return digest.hexdigest()


def _digest_dequantized(tensor: HfTensor, files: OpenFiles, buffer: memoryview) -> str:
    from bridge.hf_rows import computed_bytes  # torch, only where bytes are not enough

    columns = tensor.shape[-1]
    rows = HfRows("", 0, math.prod(tensor.shape) // columns, columns, 1, transposed=False)
    num_rows = max(1, MAX_PART_SIZE // rows.working_size(tensor, tensor.dtype))
    digest = hashlib.sha256()
    for data in computed_bytes(tensor, rows, tensor.dtype, files, num_rows):
        digest.update(data)
    return digest.hexdigest()


def _megatron_records(
    checkpoint: MegatronCheckpoint, workers: int, progress: Progress | None
) -> Iterable[LedgerRecord]:
    records: list[LedgerRecord] = []
    with OpenFiles() as files:
        view = HfView(checkpoint, files)
        counter = ProgressCounter(sum(tensor.nbytes for tensor in view.tensors.values()), progress)

        def record(name: str) -> None:
            tensor = view.tensors[name]
            sha256 = hashlib.sha256()
            for data in view.read(name, 0, tensor.num_rows):
                sha256.update(data)
            file, offset = view.place(name)
            digest = sha256.hexdigest()
            records.append(
                LedgerRecord(name, file, offset, tensor.shape, tensor.dtype, digest, view.plan.rules[name])
            )
            counter.add(tensor.nbytes)

        for_each(record, [name for name in view.tensors if name in view.plan.hf_shapes], workers)
    return records
