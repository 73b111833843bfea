import json

import pytest

from bridge.errors import CheckpointError, ConfigError
from training.config import DatasetConfig
from training.data import MicroBatchSampler, build_datasets


def global_batches(*, size: int, micro: int, ranks: int, consumed: int, total: int = 64) -> list[set[int]]:
    """The samples of each global batch, put together from all ranks' micro-batches."""
    samplers = [MicroBatchSampler(total, consumed, micro, rank, ranks) for rank in range(ranks)]
    microbatches = [index for turn in zip(*samplers, strict=True) for batch in turn for index in batch]
    return [set(microbatches[start : start + size]) for start in range(0, len(microbatches), size)]


@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (2, 1), (1, 2), (2, 4), (1, 8)])
def test_global_batches_do_not_depend_on_the_layout(micro, ranks):
    expected = [set(range(start, start + 8)) for start in range(24, 64, 8)]
    assert global_batches(size=8, micro=micro, ranks=ranks, consumed=24) == expected


def test_mistakes_are_named_before_anything_is_built(dataset, tmp_path):
    def build(paths, splits=("train",), seq_length=32, vocab_size=300):
        config = DatasetConfig(paths=list(map(str, paths)), path_to_cache=str(tmp_path / "cache"))
        build_datasets(config, dict.fromkeys(splits, 8), seq_length, vocab_size)

    other = tmp_path / "other"
    other.mkdir()
    record = json.loads((dataset / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**record, "tokenizer": {}}))
    short = tmp_path / "short"
    short.mkdir()
    (short / "dataset.json").write_text(
        json.dumps({**record, "splits": {"train": record["splits"]["train"]}})
    )
    with pytest.raises(ConfigError, match="paths is empty"):
        build([])
    with pytest.raises(CheckpointError, match="is not a complete dataset folder"):
        build([tmp_path])
    with pytest.raises(ConfigError, match="made with different tokenizers"):
        build([dataset, other])
    with pytest.raises(ConfigError, match="has no 'valid' split"):
        build([short], splits=("train", "valid"))
    with pytest.raises(ConfigError, match="vocabulary of 300 tokens, the model one of 299"):
        build([dataset], vocab_size=299)
    with pytest.raises(ConfigError, match="too few for one sample"):
        build([dataset], seq_length=1_000_000)
    assert not (tmp_path / "cache").exists()
