"""The batches of a run: the same for any layout, number of workers, resumption and length of the run."""

import json

import pytest
from process_groups import run_ranks

from bridge.errors import ConfigError
from training.build_dataset import build_dataset
from training.config import DatasetConfig
from training.corpus import Corpus
from training.data import MicroBatchSampler, build_datasets, or_error

SIZE = 8
READINGS = {
    "dp1": {},
    "dp1 micro 4": {"micro": 4},
    "dp2": {"dp": 2},
    "dp2 micro 1": {"dp": 2, "micro": 1},
    "dp2 from the middle": {"dp": 2, "steps": [4, 10]},
    "dp1 from the middle": {"steps": [7, 10]},
    "dp2 workers": {"dp": 2, "num_workers": 2},
    "dp1 extended": {"total": 40 * SIZE},
    "dp2 extended from the middle": {"dp": 2, "total": 40 * SIZE, "steps": [4, 10]},
    "dp2 other cache": {"dp": 2, "cache": "other"},
}


@pytest.fixture(scope="module")
def readings(source, tmp_path_factory):
    """What two gloo ranks read of a blend whose parts are read more than once."""
    folder = tmp_path_factory.mktemp("batches")
    for name, count in (("large", 40), ("small", 12)):
        texts = [" ".join(f"{name}{number * step}" for step in range(number)) for number in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        build_dataset(Corpus([str(folder / f"{name}.jsonl")]), str(source), folder / name)

    def reading(*, dp=1, micro=2, steps=(0, 10), total=10 * SIZE, num_workers=0, cache="cache"):
        dataset = {
            "blend": [0.6, str(folder / "large"), 0.4, str(folder / "small")],
            "split": "1",
            "path_to_cache": str(folder / cache),
            "num_workers": num_workers,
        }
        layout = {"tensor_model_parallel_size": 2 // dp, "micro": micro}
        return {"dataset": dataset, **layout, "size": SIZE, "steps": list(steps), "total": total}

    jobs = {name: reading(**options) for name, options in READINGS.items()}
    report = run_ranks(2, "training_jobs.global_batches", {"readings": jobs}, folder / "job")
    assert "error" not in report, report
    return report


@pytest.mark.parametrize("name", list(READINGS)[1:])
def test_global_batches_are_the_same_token_by_token(readings, name):
    first, last = READINGS[name].get("steps", (0, 10))
    assert readings[name] == readings["dp1"][first:last]
    assert len(readings[name]) == last - first
    assert {len(batch) for batch in readings[name]} == {SIZE}


def test_batches_differ_from_one_another(readings):
    """The judge of the tests above: nothing is compared with itself."""
    flat = [tuple(sample) for batch in readings["dp1"] for sample in batch]
    assert len(set(flat)) > 0.8 * len(flat)
    assert flat != sorted(flat)


@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (2, 1), (1, 2), (2, 4), (1, 8)])
def test_every_layout_takes_the_samples_in_turn(micro, ranks):
    samplers = [MicroBatchSampler(64, 24, micro, rank, ranks) for rank in range(ranks)]
    taken = [index for turn in zip(*samplers, strict=True) for batch in turn for index in batch]
    assert taken == list(range(24, 64))


def test_used_up_data_are_named():
    batches = or_error(iter([{}, {}]), 4)
    assert [next(batches), next(batches)] == [{}, {}]
    with pytest.raises(ConfigError, match="the data are used up: there are 4 samples"):
        next(batches)


def test_mistakes_are_named_before_anything_is_built(dataset, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(Exception, match="too few for one sample"):
        build_datasets(
            DatasetConfig(blend=[str(dataset)], path_to_cache=str(cache)), {"train": 1}, 1_000_000, 300
        )
    with pytest.raises(Exception, match="says where sample indices go"):
        build_datasets(DatasetConfig(blend=[str(dataset)]), {"train": 1}, 32, 300)
    assert not cache.exists()
