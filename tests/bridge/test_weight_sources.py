"""Shards filled from files, without a model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bridge.byte_copy import OpenFiles
from bridge.errors import CheckpointError
from bridge.gather_plan import plan_pieces
from bridge.gathering import Gathering, Replica
from bridge.hf_checkpoint import HfCheckpoint
from bridge.mapping import Block, WeightPlan
from bridge.shards import Box, Shard
from bridge.weight_sources import HfSource

EXPERTS, FFN, HIDDEN = 4, 6, 8
NAME, KEY = "experts.gate_up_proj", "experts.linear_fc1.weight"


def fused_plan() -> WeightPlan:
    """Describe gpt-oss' experts: one tensor [experts, hidden, 2 * ffn], gate and up in turn."""
    plan = WeightPlan(hf_shapes={NAME: (EXPERTS, HIDDEN, 2 * FFN)}, transposed=frozenset({NAME}))
    plan.megatron_shapes[KEY] = (EXPERTS, 2 * FFN, HIDDEN)
    for expert in range(EXPERTS):
        for half in range(2):
            row = expert * 2 * FFN + half
            plan.blocks.append(Block(NAME, row, FFN, KEY, (expert,), half * FFN, hf_step=2))
    return plan


def as_megatron(stored: torch.Tensor) -> torch.Tensor:
    rows = stored.transpose(1, 2)
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)


def shard(expert: int, offsets: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype) -> Shard:
    box = Box(KEY, (expert,), offsets, sizes, dtype)
    return Shard(box, torch.full(sizes, 9.0, dtype=dtype), (EXPERTS, 2 * FFN, HIDDEN), False)


def checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], misaligned: bool = False, **config
) -> HfCheckpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", **config}))
    file = folder / "model.safetensors"
    save_file(tensors, file)
    if misaligned:
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        file.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    return HfCheckpoint.open(folder)


# columns in the middle, rows over both gate and up
PARTS = [((0, 0), (2 * FFN, HIDDEN)), ((3, 2), (6, 5)), ((7, 0), (1, HIDDEN))]


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transposed_and_interleaved_rows(misaligned: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = torch.randn(EXPERTS, HIDDEN, 2 * FFN).bfloat16()
    expected = as_megatron(stored).to(dtype)
    with OpenFiles() as files:
        source = HfSource(fused_plan(), checkpoint(tmp_path, {NAME: stored}, misaligned), files)
        for expert in range(EXPERTS):
            for (row, column), (rows, columns) in PARTS:
                part = shard(expert, (row, column), (rows, columns), dtype)
                source.fill(part)
                wanted = expected[expert, row : row + rows, column : column + columns]
                assert torch.equal(part.data, wanted)


def test_export_is_the_inverse() -> None:
    stored = torch.randn(EXPERTS, HIDDEN, 2 * FFN).bfloat16()
    plan, own = fused_plan(), {}
    for expert, rows in enumerate(as_megatron(stored)):
        for first, count in ((0, 5), (5, 7)):
            own[Box(KEY, (expert,), (first, 0), (count, HIDDEN), rows.dtype)] = rows[first : first + count]
    gathering = Gathering(plan, plan_pieces(plan, [own], [NAME]), own, None)
    ((name, found),) = gathering.run(Replica(None, [0]), 1 << 20, False)
    assert name == NAME
    assert torch.equal(found, stored)


def test_quantised_tensors_are_read_as_what_they_mean(tmp_path: Path) -> None:
    plan = WeightPlan(hf_shapes={"w.weight": (48, 40)}, megatron_shapes={"w": (48, 40)})
    plan.blocks.append(Block("w.weight", 0, 48, "w", (), 0))
    values, scales = torch.randn(48, 40).to(torch.float8_e4m3fn), torch.rand(3, 3) + 0.5
    folder = checkpoint(
        tmp_path,
        {"w.weight": values, "w.weight_scale_inv": scales},
        dtype="float32",
        quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]},
    )
    blocks = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)[:, :40]
    part = Shard(Box("w", (), (10, 7), (30, 20), torch.float32), torch.zeros(30, 20), (48, 40), False)
    with OpenFiles() as files:
        HfSource(plan, folder, files).fill(part)
    assert torch.equal(part.data, (values.float() * blocks)[10:40, 7:27])


def resident(file: Path) -> int:
    """Return the bytes of a mapped file that this process has touched."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.endswith(str(file))]
    found = [next(line for line in lines[n:] if line.startswith("Rss:")) for n in starts]
    return sum(int(line.split()[1]) for line in found) << 10


def test_other_slices_are_not_read(tmp_path: Path) -> None:
    rows, columns = 4096, 4096  # 32 MiB
    plan = WeightPlan(hf_shapes={"w": (rows, columns)}, megatron_shapes={"w": (rows, columns)})
    plan.blocks.append(Block("w", 0, rows, "w", (), 0))
    folder = checkpoint(tmp_path, {"w": torch.ones(rows, columns, dtype=torch.bfloat16)})
    half = Box("w", (), (rows // 2, 0), (rows // 2, columns), torch.bfloat16)
    with OpenFiles() as files:
        source = HfSource(plan, folder, files)
        source.fill(Shard(half, torch.zeros(half.sizes, dtype=torch.bfloat16), (rows, columns), False))
        touched = resident(tmp_path / "model.safetensors") / (rows * columns * 2)
    assert 0.45 < touched < 0.55


def test_another_models_shape_is_refused(tmp_path: Path) -> None:
    with OpenFiles() as files:
        source = HfSource(
            fused_plan(), checkpoint(tmp_path, {NAME: torch.zeros(EXPERTS, HIDDEN, 2 * FFN)}), files
        )
        part = shard(0, (0, 0), (4, 4), torch.float32)._replace(global_shape=(EXPERTS, 4, 4))
        with pytest.raises(CheckpointError, match=r"of shape \[4, 12, 8\], the model wants \[4, 4, 4\]"):
            source.fill(part)
