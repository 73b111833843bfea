"""Import and export together: the round trip, and what neither of them may do."""

import ctypes
import errno
import filecmp
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bridge.errors import ConfigError, InputError
from bridge.exporter import export_checkpoint
from bridge.families import families
from bridge.hf_checkpoint import HfCheckpoint
from bridge.importer import import_checkpoint

Checkpoints = Callable[..., Path]


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_checkpoint(a: Path, b: Path) -> None:
    first, second = hf_tensors(a), hf_tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    assert json.loads((a / "config.json").read_text()) == json.loads((b / "config.json").read_text())
    assert filecmp.cmp(a / "generation_config.json", b / "generation_config.json", shallow=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", families())
def test_round_trip_is_bitwise(
    family: str, tied: bool, dtype: str, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = hf_checkpoint(family, tie_word_embeddings=tied, dtype=dtype)
    imported = import_checkpoint(source, tmp_path / "megatron")
    exported = export_checkpoint(imported.path, tmp_path / "hf", max_shard_size="100KB", workers=3)
    assert_same_checkpoint(source, exported.path)
    assert imported.tensors == exported.tensors == len(HfCheckpoint.open(source).tensors)
    assert imported.bytes == exported.bytes


@pytest.mark.parametrize("family", families())
def test_an_export_can_cast_every_weight(
    family: str, megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """What torch reads is held against the stored CRC-32 as well: each byte must be read once."""
    source = megatron_checkpoint(family)
    plain = hf_tensors(export_checkpoint(source, tmp_path / "plain").path)
    dtype = "float16" if any(tensor.dtype == torch.float32 for tensor in plain.values()) else "float32"
    cast = hf_tensors(export_checkpoint(source, tmp_path / "cast", dtype=dtype).path)
    assert plain.keys() == cast.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor.to(cast[name].dtype), cast[name]), name
    assert {tensor.dtype for tensor in cast.values()} >= {getattr(torch, dtype)}


@pytest.mark.parametrize("family", families())
def test_transformers_loads_the_export(
    family: str, megatron_checkpoint: Checkpoints, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    export_checkpoint(megatron_checkpoint(family), tmp_path / "hf", max_shard_size="100KB")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    expected = AutoModelForCausalLM.from_pretrained(hf_checkpoint(family))
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_large_tensors_are_cut_and_shared_out(
    hf_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that only large models reach, made small: chunks of few rows, many files, many ranges."""
    monkeypatch.setattr("bridge.chunk_plan.MAX_CHUNK_SIZE", 1000)
    monkeypatch.setattr("bridge.chunk_plan.SMALL_CHECKPOINT", 0)
    monkeypatch.setattr("bridge.exporter.MAX_RANGE_SIZE", 1000)
    source = hf_checkpoint("qwen3")
    import_checkpoint(source, tmp_path / "megatron", workers=3)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == 8 + 1
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf", workers=3)
    assert_same_checkpoint(source, tmp_path / "hf")


def test_the_result_does_not_depend_on_the_workers(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    for workers in (1, 4):
        import_checkpoint(hf_checkpoint("llama"), tmp_path / str(workers), workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir() if path.is_file())
    assert filecmp.cmpfiles(tmp_path / "1", tmp_path / "4", names, shallow=False)[0] == names


def test_neither_torch_nor_numpy_is_loaded(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    code = f"""
import sys
from bridge.exporter import export_checkpoint
from bridge.importer import import_checkpoint
from bridge.ledger import compare_ledgers, ledger
import_checkpoint({str(hf_checkpoint("llama"))!r}, "megatron")
export_checkpoint("megatron", "hf")
assert compare_ledgers(ledger("megatron"), ledger("hf")).passed
sys.exit(" ".join({{"torch", "numpy", "megatron", "transformers"}} & set(sys.modules)) or None)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_progress_counts_every_byte_once(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    imported = import_checkpoint(
        hf_checkpoint("llama"), tmp_path / "megatron", progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == (imported.bytes, imported.bytes)
    assert calls == sorted(calls)
    calls.clear()
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf", progress=lambda *call: calls.append(call))
    assert calls[-1] == (imported.bytes, imported.bytes)


class FileSystem:
    """A C library whose file system takes no space ahead, for the reason `number`."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fallocate(self, *arguments: object) -> int:
        ctypes.set_errno(self._number)
        return -1


def test_where_no_space_can_be_taken_ahead_files_are_the_same(
    hf_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_checkpoint("qwen3_moe")
    whole = import_checkpoint(source, tmp_path / "whole").path
    monkeypatch.setattr("bridge.byte_copy._libc", FileSystem(errno.EOPNOTSUPP))
    megatron = import_checkpoint(source, tmp_path / "megatron").path
    names = [path.name for path in whole.glob("*.distcp")]
    assert filecmp.cmpfiles(whole, megatron, names, shallow=False)[0] == names
    assert_same_checkpoint(source, export_checkpoint(megatron, tmp_path / "hf").path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_space_that_is_not_there_is_said_before_a_weight_is_written(
    convert: Callable[..., object],
    number: int,
    hf_checkpoint: Checkpoints,
    megatron_checkpoint: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As under a quota, of which the free space says nothing."""
    source = hf_checkpoint("llama") if convert is import_checkpoint else megatron_checkpoint("llama")
    monkeypatch.setattr("bridge.byte_copy._libc", FileSystem(number))
    calls: list[int] = []
    with pytest.raises(InputError, match=rf"^no space was left while writing {tmp_path}/out: free some$"):
        convert(source, tmp_path / "out", progress=lambda done, total: calls.append(done))
    assert not calls
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_refuses_an_existing_destination(
    convert: Callable[..., object],
    hf_checkpoint: Checkpoints,
    megatron_checkpoint: Checkpoints,
    tmp_path: Path,
) -> None:
    source = hf_checkpoint("llama") if convert is import_checkpoint else megatron_checkpoint("llama")
    with pytest.raises(InputError, match="exists already"):
        convert(source, tmp_path)


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_refuses_no_workers(convert: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers is 0"):
        convert(tmp_path, tmp_path / "out", workers=0)


def test_a_tied_copy_is_written_once(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = copy_checkpoint(hf_checkpoint("llama", tie_word_embeddings=True), tmp_path / "source")
    merged = hf_tensors(source)
    for file in source.glob("model*"):
        file.unlink()
    copy = merged["model.embed_tokens.weight"].clone()
    save_file({**merged, "lm_head.weight": copy}, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    assert hf_tensors(tmp_path / "hf").keys() == merged.keys()

    copy[5, 5] += 1
    save_file({**merged, "lm_head.weight": copy}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        import_checkpoint(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_norms_may_have_a_dtype_of_their_own(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = copy_checkpoint(hf_checkpoint("llama"), tmp_path / "source")
    tensors = {name: t.float() if "norm" in name else t for name, t in hf_tensors(source).items()}
    for file in source.glob("model*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    assert_same_checkpoint(source, tmp_path / "hf")


def test_the_exported_dtype_follows_the_weights(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = copy_checkpoint(hf_checkpoint("llama"), tmp_path / "source")
    edit_json(source / "config.json", dtype=None, torch_dtype="float32")
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config


FEW_FILES = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
import bridge.chunk_plan
bridge.chunk_plan.SMALL_CHECKPOINT, bridge.chunk_plan.GROUP_SIZE = 0, 60_000
from bridge.exporter import export_checkpoint
from bridge.importer import import_checkpoint
from bridge.ledger import compare_ledgers, ledger
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
import_checkpoint(source, folder / "megatron")
export_checkpoint(folder / "megatron", folder / "hf", max_shard_size="1KB")
assert min(len(list((folder / name).glob("*.*s*"))) for name in ("megatron", "hf")) > 16
import_checkpoint(folder / "hf", folder / "again")
ends = [ledger(folder / name) for name in ("megatron", "hf", "again")]
assert all(compare_ledgers(ledger(source), end).passed for end in ends)
"""


def test_more_files_than_a_process_may_open(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FEW_FILES, hf_checkpoint("llama"), tmp_path], check=True)
