"""A folder that live models take their weights from: a Megatron checkpoint, a run's, a Hugging Face one."""

from pathlib import Path

from bridge import megatron_checkpoint
from bridge.families import provider_of
from bridge.hf_checkpoint import CONFIG, read_config, side_files
from bridge.megatron_checkpoint import is_megatron_checkpoint, resolve_checkpoint, write_model
from bridge.provider import GPTModelProvider


def is_hf_folder(folder: Path) -> bool:
    """Say whether a folder is a Hugging Face checkpoint rather than a Megatron one."""
    return (folder / CONFIG).is_file() and not is_megatron_checkpoint(folder)


def resolve_pretrained(path: Path) -> Path:
    """Return the folder itself, or the latest checkpoint of the training run in it."""
    return path if is_hf_folder(path) else resolve_checkpoint(path)


def read_model(folder: Path) -> GPTModelProvider:
    """Describe the model of a resolved folder."""
    return (
        provider_of(read_config(folder)) if is_hf_folder(folder) else megatron_checkpoint.read_model(folder)
    )


def copy_model(source: Path, folder: Path, *, num_padding_rows: int) -> None:
    """Describe a checkpoint in `folder` of the model of `source`, side files included."""
    if is_hf_folder(source):
        files = [source / CONFIG, *side_files(source)]
        write_model(folder, read_model(source), files, num_padding_rows=num_padding_rows)
    else:
        megatron_checkpoint.copy_model(source, folder, num_padding_rows=num_padding_rows)
