"""Rows of Hugging Face tensors that cannot be copied as bytes: strided, transposed, cast or dequantised."""

import math
from collections.abc import Iterator

import torch

from bridge.byte_copy import OpenFiles, read_into
from bridge.chunk_plan import HfRows
from bridge.errors import CoverageError
from bridge.quantization import FP8, VALUES_PER_SCALE, HfTensor, QuantizedTensor
from bridge.shard_header import TensorSlice

# The 16 codes of OCP Microscaling Formats 1.0, E2M1: sign, two bits of exponent, one of mantissa.
E2M1 = [sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
E8M0_BIAS = 127


def computed_bytes(
    tensor: HfTensor, part: HfRows, dtype: str, files: OpenFiles, num_rows: int
) -> Iterator[memoryview]:
    """Yield the bytes of rows in `dtype`, `num_rows` rows at a time."""
    for skip in range(0, part.rows, num_rows):
        rows = read_rows(
            tensor,
            files,
            part.first + skip * part.step,
            min(num_rows, part.rows - skip),
            columns=part.columns,
            step=part.step,
            transposed=part.transposed,
        )
        yield bytes_of(cast(rows, dtype, part.name).contiguous())


def read_rows(
    tensor: HfTensor,
    files: OpenFiles,
    first: int,
    count: int,
    *,
    columns: int,
    step: int = 1,
    transposed: bool,
) -> torch.Tensor:
    """Return rows first, first + step, ... of a tensor as the blocks of a plan count them: [count, columns].

    `transposed` says that the last two axes are swapped before rows are counted. The dtype is the tensor's.
    """
    last = first + (count - 1) * step + 1
    if is_swapped(tensor) == transposed:
        return _stored_box(tensor, files, range(first, last), range(columns), columns)[::step]
    rows = list(_swapped_rows(tensor, files, first, last))
    return (torch.cat(rows) if len(rows) > 1 else rows[0])[::step]


def is_swapped(tensor: HfTensor) -> bool:
    """Say whether the last two axes lie in the file in the other order than in the tensor's shape."""
    return isinstance(tensor, QuantizedTensor) and tensor.method != FP8


def _swapped_rows(tensor: HfTensor, files: OpenFiles, first: int, last: int) -> Iterator[torch.Tensor]:
    """Yield rows [first, last), matrix by matrix, of a tensor whose file has them as columns."""
    height, width = tensor.shape[-2:] if not is_swapped(tensor) else tensor.shape[:-3:-1]
    for matrix in range(first // width, -(-last // width)):
        columns = range(max(first - matrix * width, 0), min(last - matrix * width, width))
        yield _stored_box(tensor, files, range(matrix * height, (matrix + 1) * height), columns, width).T


def _stored_box(tensor: HfTensor, files: OpenFiles, rows: range, columns: range, width: int) -> torch.Tensor:
    """Return rows and columns in the order of the file, where a row has `width` columns."""
    if isinstance(tensor, TensorSlice):
        return _read_box(tensor, files, rows, columns, width)
    if tensor.method == FP8:
        return _fp8_box(tensor, files, rows, columns)
    return _mxfp4_box(tensor, files, rows, columns)


def _read_box(tensor: TensorSlice, files: OpenFiles, rows: range, columns: range, width: int) -> torch.Tensor:
    found = torch.empty((len(rows), len(columns)), dtype=getattr(torch, tensor.dtype))
    data, size = bytes_of(found), found.element_size()
    start, nbytes = tensor.offset + (rows.start * width + columns.start) * size, len(columns) * size
    with files.opened(tensor.file) as descriptor:
        if len(columns) == width:
            read_into(descriptor, [data], start)
            return found
        for row in range(len(rows)):
            read_into(descriptor, [data[row * nbytes : (row + 1) * nbytes]], start + row * width * size)
    return found


def _fp8_box(tensor: QuantizedTensor, files: OpenFiles, rows: range, columns: range) -> torch.Tensor:
    """Multiply values by the scales of their blocks in float32, as transformers does (Fp8Dequantize)."""
    height, width = tensor.shape[-2:]
    block_rows, block_columns = tensor.block
    values = _read_box(tensor.values, files, rows, columns, width).float()
    if math.prod(tensor.scales.shape) == 1:
        scale_rows, scales = torch.zeros(len(rows), dtype=torch.long), _whole(tensor.scales, files, 1)
    else:
        row = torch.arange(rows.start, rows.stop)
        scale_rows = row // height * -(-height // block_rows) + row % height // block_rows
        first, last, num_scales = int(scale_rows[0]), int(scale_rows[-1]) + 1, -(-width // block_columns)
        scales = _read_box(tensor.scales, files, range(first, last), range(num_scales), num_scales).float()
        scale_rows -= first
    for block in range(columns.start // block_columns, -(-columns.stop // block_columns)):
        begin, end = (max(0, edge * block_columns - columns.start) for edge in (block, block + 1))
        values[:, begin:end] *= scales[scale_rows, block, None]
    return _meant(values, tensor)


def _whole(tensor: TensorSlice, files: OpenFiles, width: int) -> torch.Tensor:
    rows = math.prod(tensor.shape) // width
    return _read_box(tensor, files, range(rows), range(width), width).float()


def _mxfp4_box(tensor: QuantizedTensor, files: OpenFiles, rows: range, columns: range) -> torch.Tensor:
    """Look the two values of each byte up and multiply 32 by a power of two (OCP Microscaling, E8M0)."""
    num_groups = tensor.values.shape[-2]
    groups = range(columns.start // VALUES_PER_SCALE, -(-columns.stop // VALUES_PER_SCALE))
    half = VALUES_PER_SCALE // 2
    packed_columns = range(groups.start * half, groups.stop * half)
    packed = _read_box(tensor.values, files, rows, packed_columns, num_groups * half)
    exponents = _read_box(tensor.scales, files, rows, groups, num_groups)
    pairs = torch.tensor([(E2M1[code & 15], E2M1[code >> 4]) for code in range(256)])
    powers = torch.pow(2.0, torch.arange(256) - E8M0_BIAS)
    values = pairs.index_select(0, packed.view(-1).int()).view(-1, VALUES_PER_SCALE)
    values *= powers.index_select(0, exponents.view(-1).int())[:, None]
    begin = columns.start - groups.start * VALUES_PER_SCALE
    return _meant(values.view(len(rows), -1)[:, begin : begin + len(columns)], tensor)


def _meant(values: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Return dequantised values in the dtype of the tensor that they stand for."""
    found = values.to(getattr(torch, tensor.dtype))
    if _overflows(values, found):
        raise CoverageError(
            f"{tensor.values.file}: a weight quantised by {tensor.method} overflows in {tensor.dtype}, the"
            " dtype of config.json: set it to bfloat16 or float32 there"
        )
    return found


def cast(tensor: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """Cast to `dtype`; a finite value that overflows is a CoverageError."""
    found = tensor.to(getattr(torch, dtype))
    if _overflows(tensor, found):
        raise CoverageError(f"{name!r} holds values that overflow in {dtype}: choose another dtype")
    return found


def _overflows(tensor: torch.Tensor, found: torch.Tensor) -> bool:
    """Say whether a finite value became infinite in `found`, of another dtype."""
    if tensor.dtype == found.dtype:
        return False
    # One pass without a copy; only if it finds a value that is too large, or none that is a number, a mask.
    least, most = torch.aminmax(tensor)
    if torch.maximum(-least, most) <= torch.finfo(found.dtype).max:
        return False
    return bool((found.isinf() & tensor.isfinite()).any())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, to read or to write."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
