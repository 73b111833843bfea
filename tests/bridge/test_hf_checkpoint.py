import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json
from safetensors import safe_open
from safetensors.torch import save_file

from bridge.errors import CheckpointError
from bridge.hf_checkpoint import INDEX, HfCheckpoint, read_safetensors

Edit = Callable[[Path], Any]


@pytest.fixture
def checkpoint(hf_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return copy_checkpoint(hf_checkpoint("llama"), tmp_path / "hf")


def shard(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def edit_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a shard's header; tensor offsets count from its end, so that the data may follow as it is."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def edit_first_entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        next(entry for name, entry in header.items() if name != "__metadata__").update(values)

    return edit


def move_in_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(weight_map)
    edit_json(folder / INDEX, weight_map=weight_map)


def link_outside(file: Path) -> None:
    outside = file.parent.parent / f"outside-{file.name}"
    file.rename(outside)
    file.symlink_to(outside)


def test_locates_every_tensor(checkpoint: Path) -> None:
    opened = HfCheckpoint.open(checkpoint)
    assert len({tensor.file for tensor in opened.tensors.values()}) > 1
    for name, tensor in opened.tensors.items():
        with safe_open(tensor.file, "pt") as reader:
            expected = reader.get_tensor(name)
        data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        found = torch.frombuffer(bytearray(data), dtype=getattr(torch, tensor.dtype)).reshape(tensor.shape)
        assert torch.equal(found, expected)


def test_reads_a_single_file_without_index(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6).reshape(2, 3).float()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    tensor = HfCheckpoint.open(tmp_path).tensors["w"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((2, 3), "float32", 24)


def test_side_files_are_tokenizer_and_licence_but_no_code(checkpoint: Path) -> None:
    wanted = {
        *("LICENSE", "LICENSE-MODEL", "LICENSE.txt", "NOTICE.md", "chat_template.jinja", "qwen.tiktoken"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
        *("tokenizer.model.v7m1", "vocab.txt", "merges.txt"),
    }
    others = ("README.md", "tokenizer_evil.py", "tokenizer.pkl", "tokenizer_evil.so", "tokenizer.json.pkl")
    others = (*others, "chat_template.bin", "LICENSE.pt", "tokenizer.model.pth", "evil.sh", "tokenizer.v")
    for name in (*wanted, *others):
        (checkpoint / name).write_text("{}")
    names = [path.name for path in HfCheckpoint.open(checkpoint).side_files()]
    assert names == sorted({*wanted, "generation_config.json"})


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(checkpoint: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/rev", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(checkpoint.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert HfCheckpoint.open(snapshot).tensors.keys() == HfCheckpoint.open(checkpoint).tensors.keys()


BAD_FOLDERS: dict[str, tuple[Edit, str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is no object": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "config with NaN": (
        lambda f: edit_json(f / "config.json", rms_norm_eps=float("nan")),
        "NaN is no number",
    ),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*safetensors*")], "neither model.safetensors nor"),
    "index without map": (lambda f: edit_json(f / INDEX, weight_map=None), "no 'weight_map'"),
    "index of numbers": (lambda f: edit_json(f / INDEX, weight_map={"a": 1}), "no 'weight_map'"),
    "shard missing": (lambda f: shard(f).unlink(), "does not exist"),
    "index leaves its folder": (
        lambda f: move_in_index(f, lambda m: m.update({"model.norm.weight": "../x.safetensors"})),
        "only files of its own folder",
    ),
    "index names a missing tensor": (
        lambda f: move_in_index(f, lambda m: m.update({"ghost": shard(f).name})),
        "'ghost' in .*, which does not hold it",
    ),
    "tensor not in the index": (
        lambda f: move_in_index(f, lambda m: m.pop("model.norm.weight")),
        "holds 'model.norm.weight', which",
    ),
    "tensor in another shard": (
        lambda f: move_in_index(f, lambda m: m.update({"model.norm.weight": shard(f).name})),
        "holds 'model.norm.weight', which",
    ),
    "shard is a link outside": (lambda f: link_outside(shard(f)), "is a link to"),
    "config is a link outside": (lambda f: link_outside(f / "config.json"), "is a link to"),
    "shard truncated": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-10]), "is truncated"),
    "shard cut in the header": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:30]), "is truncated"),
    "shard empty": (lambda f: shard(f).write_bytes(b""), "is truncated"),
    "shard has a tail": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"),
        "after its last tensor",
    ),
    "header is huge": (
        lambda f: shard(f).write_bytes(struct.pack("<Q", 2**60) + shard(f).read_bytes()[8:]),
        "header of",
    ),
    "header is no JSON": (
        lambda f: shard(f).write_bytes(struct.pack("<Q", 4) + b"{{{{" + bytes(8)),
        "not valid JSON",
    ),
    "dtype unknown": (lambda f: edit_header(shard(f), edit_first_entry(dtype="F4")), "has dtype F4"),
    "shape of text": (lambda f: edit_header(shard(f), edit_first_entry(shape=["2"])), "malformed"),
    "shape negative": (lambda f: edit_header(shard(f), edit_first_entry(shape=[-1])), "malformed"),
    "shape too large": (lambda f: edit_header(shard(f), edit_first_entry(shape=[10**9])), "needs"),
    "offsets reversed": (
        lambda f: edit_header(shard(f), edit_first_entry(data_offsets=[64, 0])),
        "bytes 64 to 0",
    ),
    "tensors overlap": (
        lambda f: edit_header(shard(f), lambda h: h.update({"extra": list(h.values())[-1]})),
        "overlap",
    ),
    "a hole between tensors": (
        lambda f: edit_header(shard(f), lambda h: h.pop(next(n for n in h if n != "__metadata__"))),
        "gap",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_refuses_in_one_line(case: str, checkpoint: Path) -> None:
    edit, message = BAD_FOLDERS[case]
    edit(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        HfCheckpoint.open(checkpoint)
    assert "\n" not in str(caught.value)


def test_refuses_a_name_given_twice(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f'{{"a":{entry},"a":{entry}}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    with pytest.raises(CheckpointError, match="given twice"):
        read_safetensors(file)
