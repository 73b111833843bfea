"""A small source checkpoint, its import and a dataset, made once by the product's own jobs."""

import email
from pathlib import Path
from typing import Any

import pytest

from bridge.importer import import_checkpoint
from recipes.continued_pretraining import continued_pretrain_config
from training.config import ConfigContainer
from training.overrides import apply_overrides

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT = str(Path(email.__file__).parent)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint with a tokenizer."""
    from training import make_checkpoint

    folder = tmp_path_factory.mktemp("source") / "hf"
    job = {
        "output": str(folder),
        "corpus": [TEXT],
        "vocab_size": 300,
        "config": TINY,
        "max_shard_size": "20KB",
    }
    report = make_checkpoint.main(job)
    assert report["vocab_size"] == 300
    assert report["shards"] > 2
    return folder


@pytest.fixture(scope="session")
def imported(source: Path) -> Path:
    """The same as a Megatron checkpoint."""
    folder = source.parent / "megatron"
    import_checkpoint(source, folder)
    return folder


@pytest.fixture(scope="session")
def dataset(source: Path) -> Path:
    """Indexed datasets of the text, with documents held out."""
    from training import build_dataset

    folder = source.parent / "dataset"
    job: dict[str, Any] = {"inputs": [TEXT], "tokenizer": str(source), "split": [0.8, 0.1, 0.1]}
    build_dataset.main({**job, "output": str(folder)})
    return folder


@pytest.fixture(scope="session")
def tiny_config(imported: Path, dataset: Path) -> Any:
    """A function that returns a config which trains the imported checkpoint for a few iterations."""
    from bridge.megatron_checkpoint import read_model

    def make(**overrides: Any) -> ConfigContainer:
        config = continued_pretrain_config()
        config.model = read_model(imported)
        settings = {
            "model.seq_length": 32,
            "train.train_iters": 6,
            "train.micro_batch_size": 2,
            "train.global_batch_size": 8,
            "train.eval_interval": 3,
            "train.eval_iters": 2,
            "optimizer.lr": 0.01,
            "scheduler.lr_warmup_iters": 1,
            "checkpoint.save_interval": 3,
            "checkpoint.pretrained_checkpoint": str(imported),
            "dataset.blend": [str(dataset)],
            "mixed_precision.bf16": False,
            "logger.log_interval": 1,
        }
        return apply_overrides(config, {**settings, **overrides})

    return make
