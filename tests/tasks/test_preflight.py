"""Specs that cannot work are refused with one line and exit code 2 before anything is written."""

import json
import shutil
from pathlib import Path

import pytest

from bridge.errors import InputError
from tasks.preflight import check_spec
from tasks.spec import ReleaseSpec, absolute, override, parse_spec
from tests.checkpoints import make_hf_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_hf_checkpoint(tmp_path_factory.mktemp("source") / "hf", "llama")


def spec_in(folder: Path, source: Path, *changes: str) -> ReleaseSpec:
    (folder / "text.txt").write_text("Some text.")
    value = {
        "name": "tiny",
        "source": {"uri": str(source)},
        "dataset": {"inputs": ["text.txt"]},
        "publish": {"destination": "release"},
    }
    return absolute(parse_spec(override(value, list(changes))), folder)


def test_good_spec_passes_and_writes_nothing(tmp_path, source) -> None:
    check_spec(spec_in(tmp_path, source))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "train.overrides.optimizer.lrr=1",
            "no setting is called 'optimizer.lrr': did you mean 'optimizer.lr'",
        ),
        ("train.overrides.optimizer.lr=fast", 'optimizer.lr is "fast": expected float'),
        ("train.recipe=continued", "no recipe is called 'continued': did you mean"),
        ("train.parallel.tensor_model_parallel_size=3", "not divisible by tensor_model_parallel_size 3"),
        ("train.parallel.data_parallel_size=7", "train.global_batch_size 32 is not divisible"),
        ("check.tensor_model_parallel_size=3", "not divisible by tensor_model_parallel_size 3"),
        ("check.pipeline_model_parallel_size=3", "not divisible by the 3 pipeline stages"),
        ("source.uri=/no/such/folder", "no such folder: /no/such/folder"),
        ("source.uri=ftp://host/model", "unknown kind of address ftp:"),
        ("dataset.inputs=[/no/such/text]", "no such text file or folder: /no/such/text"),
        ("publish.destination=hf://a/b", "cannot be on the hub"),
    ],
)
def test_bad_specs(tmp_path, source, change, message) -> None:
    with pytest.raises(InputError) as error:
        check_spec(spec_in(tmp_path, source, change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt9", "unknown model_type 'gpt9'"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, "spiral"),
        ("surprise", 1, "surprise"),
    ],
)
def test_source_whose_config_no_family_takes(tmp_path, source, key, value, message) -> None:
    changed = shutil.copytree(source, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=message):
        check_spec(spec_in(tmp_path, changed))


def test_truncated_shard(tmp_path, source) -> None:
    changed = shutil.copytree(source, tmp_path / "changed")
    shard = sorted(changed.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=shard.name):
        check_spec(spec_in(tmp_path, changed))
