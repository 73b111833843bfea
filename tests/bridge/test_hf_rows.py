"""Dequantisation, against transformers' own and against the formats' formulas."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bridge.byte_copy import OpenFiles
from bridge.errors import CoverageError
from bridge.hf_rows import cast, read_rows
from bridge.quantization import HfTensor, dequantized
from bridge.shard_header import read_safetensors

MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}


def fp8(block: list[int] | None) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}


def opened(folder: Path, config: dict[str, object], **tensors: torch.Tensor) -> HfTensor:
    """Save tensors and return the one that they stand for."""
    save_file(tensors, folder / "model.safetensors")
    (tensor,) = dequantized(config, read_safetensors(folder / "model.safetensors")).values()
    return tensor


def read_whole(tensor: HfTensor, step: int = 1) -> torch.Tensor:
    """Read a tensor as stored, `step` rows at a time."""
    columns = tensor.shape[-1]
    num_rows = math.prod(tensor.shape) // columns
    with OpenFiles() as files:
        parts = [
            read_rows(tensor, files, first, min(step, num_rows - first), columns=columns, transposed=False)
            for first in range(0, num_rows, step)
        ]
    return torch.cat(parts).view(tensor.shape)


def fp8_values(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.manual_seed(0)) * 60).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize(
    ("shape", "block"), [((256, 384), [128, 128]), ((12, 8), [3, 2]), ((3, 12, 8), [3, 2]), ((8, 4), None)]
)
def test_fp8_is_what_transformers_makes_of_it(
    shape: tuple[int, ...], block: list[int] | None, step: int, tmp_path: Path
) -> None:
    values = fp8_values(*shape)
    rows, columns = (shape[-2] // block[0], shape[-1] // block[1]) if block else (1, 1)
    scales = torch.rand((*shape[:-2], rows, columns) if block else (), generator=torch.manual_seed(1)) / 100
    tensor = opened(tmp_path, fp8(block), **{"x.weight": values, "x.weight_scale_inv": scales})
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=torch.bfloat16)
    assert torch.equal(read_whole(tensor, step), expected)


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_fp8_blocks_may_be_cut_off_at_the_edges(step: int, tmp_path: Path) -> None:
    values = fp8_values(13, 10)
    scales = torch.rand(4, 3, generator=torch.manual_seed(1)) / 100
    tensor = opened(tmp_path, fp8([4, 4]), **{"x.weight": values, "x.weight_scale_inv": scales})
    expected = torch.empty(13, 10)
    for row, column in itertools.product(range(13), range(10)):
        expected[row, column] = values[row, column].float() * scales[row // 4, column // 4]
    assert torch.equal(read_whole(tensor, step), expected.bfloat16())


@pytest.mark.parametrize("axes", [(), (1,), (1, 1)])
def test_one_scale_is_enough_for_one_block(axes: tuple[int, ...], tmp_path: Path) -> None:
    values, scales = fp8_values(6, 8), torch.full(axes, 0.5)
    tensor = opened(tmp_path, fp8([128, 128]), **{"x.weight": values, "x.weight_scale_inv": scales})
    assert torch.equal(read_whole(tensor), (values.float() / 2).bfloat16())


@pytest.mark.parametrize("step", [1, 33, 10_000])
def test_mxfp4_is_what_transformers_makes_of_it(step: int, tmp_path: Path) -> None:
    """Every byte of values, and every exponent but the one that means no number."""
    blocks = torch.randint(0, 256, (2, 90, 4, 16), generator=torch.manual_seed(0), dtype=torch.uint8)
    blocks.view(-1)[:256] = torch.arange(256)
    scales = torch.randint(0, 255, (2, 90, 4), generator=torch.manual_seed(1), dtype=torch.uint8)
    scales.view(-1)[:255] = torch.arange(255)
    tensor = opened(tmp_path, MXFP4, x_blocks=blocks, x_scales=scales)
    assert tensor.shape == (2, 128, 90)
    assert torch.equal(read_whole(tensor, step), convert_moe_packed_tensors(blocks, scales))


def test_mxfp4_by_its_formula(tmp_path: Path) -> None:
    """Low half of the byte first; 0b0101 is 3, 0b1110 is -4; exponents are biased by 127."""
    blocks = torch.full((1, 1, 1, 16), 0b1110_0101, dtype=torch.uint8)
    tensor = opened(tmp_path, MXFP4, x_blocks=blocks, x_scales=torch.full((1, 1, 1), 125, dtype=torch.uint8))
    assert read_whole(tensor).flatten().tolist() == [0.75, -1.0] * 16


def test_quantised_values_that_overflow_are_an_error(tmp_path: Path) -> None:
    """float16 ends at 65504: what the config calls the weights' dtype cannot hold 448 times 1000."""
    scales = torch.full((1, 1), 1000.0)
    values = torch.full((6, 8), 448.0).to(torch.float8_e4m3fn)
    message = r"model\.safetensors: a weight quantised by fp8 overflows in float16, the dtype of config\.json"
    tensor = opened(
        tmp_path, {**fp8(None), "dtype": "float16"}, **{"x.weight": values, "x.weight_scale_inv": scales}
    )
    with pytest.raises(CoverageError, match=message):
        read_whole(tensor)
    blocks = torch.full((1, 1, 1, 16), 0b1110_0101, dtype=torch.uint8)
    exponents = torch.full((1, 1, 1), 127 + 16, dtype=torch.uint8)
    tensor = opened(tmp_path, {**MXFP4, "dtype": "float16"}, x_blocks=blocks, x_scales=exponents)
    with pytest.raises(CoverageError, match="mxfp4 overflows in float16"):
        read_whole(tensor)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("first", [0, 5, 14])
def test_rows_of_plain_tensors(first: int, transposed: bool, step: int, tmp_path: Path) -> None:
    values = torch.randn(3, 6, 10)
    tensor = opened(tmp_path, {}, x=values)
    rows = (values.transpose(1, 2) if transposed else values).flatten(0, 1)
    with OpenFiles() as files:
        found = read_rows(tensor, files, first, 2, columns=rows.shape[1], step=step, transposed=transposed)
    assert torch.equal(found, rows[first : first + 2 * step : step])


def test_a_cast_that_overflows_is_an_error() -> None:
    assert torch.equal(
        cast(torch.tensor([1e5, math.inf]), "bfloat16", "x"), torch.tensor([1e5, math.inf]).bfloat16()
    )
    with pytest.raises(CoverageError, match="'x' holds values that overflow in float16"):
        cast(torch.tensor([1.0, 1e5]), "float16", "x")
