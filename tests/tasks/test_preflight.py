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
        ("check.expert_model_parallel_size=2", "expert_model_parallel_size is 2 in a model without experts"),
        ("train.parallel.expert_model_parallel_size=2", "expert_model_parallel_size is 2 in a model without"),
        ("train.parallel.expert_tensor_parallel_size=2", "expert_tensor_parallel_size is 2 in a model"),
        ("train.parallel.context_parallel_size=3", "model.seq_length 512 cannot be shared out with context"),
        ("train.overrides.mixed_precision=fp16_mixed", "asks for fp16, which needs a GPU, and there is none"),
        ("train.overrides.profiling.use_nsys_profiler=true", "looks at a GPU, and there is none: set it to"),
        ("source.uri=/no/such/folder", "no such folder: /no/such/folder"),
        ("source.uri=ftp://host/model", "unknown kind of address ftp:"),
        ("dataset.inputs=[/no/such/text]", "no such text file or folder: /no/such/text"),
        ("dataset.inputs=[ftq://host/text]", "cannot read text at ftq://host/text: ValueError: Protocol not"),
        ("dataset.inputs=['https://me:pass@host/text']", "an address of text may hold no user or password"),
        ("dataset.inputs=['https://host/a?x=1&X-Amz-Signature=5']", "has the parameter X-Amz-Signature"),
        ("publish.destination=hf://a/b", "cannot be on the hub"),
        ("publish.destination=.", "exists and is no release: choose another"),
        ("publish.destination=text.txt/{digest}", "text.txt is no folder that can be written to"),
        ("workspace=text.txt", "text.txt is no folder that can be written to"),
        ("workspace=s3://bucket/work", "give a folder of this machine"),
        ("source.uri=~nobody-at-all/model", "no such folder: "),
        ("workspace=text.txt/~nobody-at-all", "text.txt is no folder that can be written to"),
    ],
)
def test_bad_specs(tmp_path, monkeypatch, source, change, message) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError) as error:
        check_spec(spec_in(tmp_path, source, change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.parallel.data_parallel_size=4", "sizes of train.parallel make 4 ranks, .* has 2"),
        ("check.tensor_model_parallel_size=4", "parallel sizes of check make 4 ranks, .* has 2"),
        ("train.overrides.mixed_precision=bf16_with_fp8_blockwise_mixed", "this one has 8.9: choose delayed"),
    ],
)
def test_what_the_gpus_of_this_machine_cannot_do(tmp_path, monkeypatch, source, change, message) -> None:
    """A plan may be made where the release is not."""
    fake = tmp_path / "bin/nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho '8.9, GPU-a'\necho '8.9, GPU-b'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent))
    spec = spec_in(tmp_path, source, change)
    check_spec(spec, here=False)
    with pytest.raises(InputError, match=message):
        check_spec(spec)


def test_experts_of_a_source_that_has_them(tmp_path) -> None:
    experts = make_hf_checkpoint(tmp_path / "experts", "qwen3_moe")
    spread = ("train.parallel.expert_model_parallel_size=4", "check.expert_model_parallel_size=8")
    with pytest.raises(InputError, match=r"1 ranks cannot hold experts .* by data_parallel_size or another"):
        check_spec(spec_in(tmp_path, experts, *spread))
    check_spec(spec_in(tmp_path, experts, *spread, "train.parallel.data_parallel_size=4"))
    with pytest.raises(
        InputError, match="num_moe_experts 8 is not divisible by expert_model_parallel_size 3"
    ):
        check_spec(spec_in(tmp_path, experts, "check.expert_model_parallel_size=3"))


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
