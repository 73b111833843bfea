"""Files that carry code: each is blocked, and none has run."""

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from checkpoints import copy_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.enums import ModelType
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata

from bridge import distributed, restricted_load
from bridge.errors import CheckpointError
from bridge.importer import import_checkpoint
from bridge.live_checkpoint import load_checkpoint, model_state, save_checkpoint
from bridge.live_weights import export_hf_weights
from bridge.megatron_checkpoint import read_model
from bridge.provider import GPTModelProvider


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


@pytest.fixture(scope="module")
def imported(hf_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "megatron"
    import_checkpoint(hf_checkpoint("qwen3"), folder)
    return folder


def built(folder: Path) -> tuple[GPTModelProvider, list[torch.nn.Module]]:
    provider = read_model(folder)
    return provider, provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)


def edit_metadata(folder: Path, edit: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def redirect(folder: Path, key: str, payload: Any) -> None:
    """Let the items of `key` be a saved `payload`."""
    stream = io.BytesIO()
    torch.save(payload, stream)
    (folder / "other.distcp").write_bytes(stream.getvalue())

    def edit(metadata: Metadata) -> None:
        for index, item in metadata.storage_data.items():
            if key in index.fqn:
                item.relative_path, item.offset, item.length = "other.distcp", 0, len(stream.getvalue())

    edit_metadata(folder, edit)


def in_metadata(folder: Path, code: Touch) -> None:
    edit_metadata(folder, lambda metadata: setattr(metadata, "planner_data", code))


def in_common(folder: Path, code: Touch) -> None:
    torch.save({"iteration": 0, "extra": code}, folder / "common.pt")


def in_tensor(folder: Path, code: Touch) -> None:
    redirect(folder, "final_layernorm", code)


@pytest.mark.parametrize("plant", [in_metadata, in_tensor])
def test_code_in_a_checkpoint_does_not_run(
    plant: Callable[[Path, Touch], None], imported: Path, tmp_path: Path
) -> None:
    folder, trace = copy_checkpoint(imported, tmp_path / "checkpoint"), tmp_path / "it_ran"
    plant(folder, Touch(trace))
    _, model = built(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, folder)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_code_in_the_common_state_does_not_run(imported: Path, tmp_path: Path) -> None:
    folder, trace = copy_checkpoint(imported, tmp_path / "checkpoint"), tmp_path / "it_ran"
    in_common(folder, Touch(trace))
    _, model = built(folder)
    load_checkpoint(model, folder)  # which needs none of it
    with pytest.raises(CheckpointError, match=r"common\.pt refers to posix\.mkdir") as caught:
        restricted_load.load(model_state(model), folder)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


STATE = b"N}X\x0e\0\0\0is_relative_toX\x01\0\0\0xs\x86b"  # (None, {"is_relative_to": "x"}), BUILD
MEMBER = b"K\x01\x85R}X\x07\0\0\0_value_K\x63sb"  # (1), REDUCE, {"_value_": 99}, BUILD


def test_metadata_cannot_change_a_class(imported: Path, tmp_path: Path) -> None:
    folder = copy_checkpoint(imported, tmp_path / "checkpoint")
    metadata = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(metadata[:2] + b"cpathlib\nPosixPath\n" + STATE + b"0" + metadata[2:])
    try:
        with pytest.raises(CheckpointError, match="gives a function a state"):
            restricted_load.read_metadata(folder)
        assert not Path("/etc/passwd").is_relative_to("/tmp")
    finally:
        if "is_relative_to" in vars(PosixPath):
            del PosixPath.is_relative_to


def test_an_object_cannot_change_an_enumeration(tmp_path: Path) -> None:
    """Megatron Core registers its own with torch as safe."""
    before = ModelType.encoder_or_decoder.value
    attack = f"c{ModelType.__module__}\n{ModelType.__name__}\n".encode() + MEMBER
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + attack + b"0}.")
        archive.writestr("archive/version", b"3\n")
    try:
        with pytest.raises(CheckpointError, match=r"refers to megatron\.core\.enums\.ModelType"):
            restricted_load.load_common(tmp_path)
        assert ModelType.encoder_or_decoder.value == before
    finally:
        ModelType.encoder_or_decoder._value_ = before


def test_code_in_an_object_does_not_run(tmp_path: Path) -> None:
    distributed.initialize(GPTModelProvider())
    folder, trace = tmp_path / "checkpoint", tmp_path / "it_ran"
    folder.mkdir()
    state = {"rng": ShardedObject("rng_state", [1, 2], (1,), (0,))}
    dist_checkpointing.save(state, str(folder))
    assert restricted_load.load(state, folder)["rng"] == [1, 2]
    redirect(folder, "rng_state", [Touch(trace)])
    with pytest.raises(CheckpointError):
        restricted_load.load({"rng": ShardedObject("rng_state", None, (1,), (0,))}, folder)
    assert not trace.exists()


def test_extra_state_is_not_read(imported: Path, tmp_path: Path) -> None:
    folder = copy_checkpoint(imported, tmp_path / "checkpoint")
    _, model = built(folder)
    state = model[0].sharded_state_dict()
    assert any("_extra_state" in name for name in state)
    loaded = restricted_load.load(state, folder)
    assert not any("_extra_state" in name for name in loaded)


def test_files_outside_the_folder_are_not_read(imported: Path, tmp_path: Path) -> None:
    folder = copy_checkpoint(imported, tmp_path / "checkpoint")
    shutil.copyfile(next(folder.glob("*.distcp")), tmp_path / "outside.distcp")

    def edit(metadata: Metadata) -> None:
        for item in metadata.storage_data.values():
            item.relative_path = "../outside.distcp"

    edit_metadata(folder, edit)
    _, model = built(folder)
    with pytest.raises(CheckpointError, match="only files of its own folder"):
        load_checkpoint(model, folder)


def test_missing_tensor_is_named(imported: Path, tmp_path: Path) -> None:
    folder = copy_checkpoint(imported, tmp_path / "checkpoint")
    key = "decoder.final_layernorm.weight"
    edit_metadata(folder, lambda metadata: metadata.state_dict_metadata.pop(key))
    _, model = built(folder)
    with pytest.raises(CheckpointError, match=key):
        load_checkpoint(model, folder)


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no metadata\.json: not a Megatron checkpoint"):
        restricted_load.load({}, tmp_path)


def test_saved_model_loads_bitwise(
    imported: Path, hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    provider, model = built(imported)
    load_checkpoint(model, imported)
    save_checkpoint(model, provider, tmp_path / "saved")
    _, again = built(tmp_path / "saved")
    load_checkpoint(again, tmp_path / "saved")
    found = dict(export_hf_weights(again, provider))
    for file in hf_checkpoint("qwen3").glob("*.safetensors"):
        for name, weight in load_file(file).items():
            assert torch.equal(found[name], weight), name
