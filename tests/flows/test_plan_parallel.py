"""`bridgeworks plan-parallel`: what it prints is a command that trains in the layout it chose."""

import json
import shlex
from pathlib import Path

import pytest
from checkpoints import make_hf_checkpoint
from small_release import run

from flows.plan_parallel import config_of, show_plan, train_command
from flows.train import make_config, parallel_of
from training.config import ConfigContainer
from training.parallel_plan import plan_parallel, setting
from training.time_estimate import gpu_named

ASKED = {
    "--tp": "tensor_model_parallel_size",
    "--pp": "pipeline_model_parallel_size",
    "--cp": "context_parallel_size",
    "--ep": "expert_model_parallel_size",
    "--etp": "expert_tensor_parallel_size",
    "--dp": "data_parallel_size",
}


def config_by_command(command: str) -> tuple[ConfigContainer, int]:
    """Return the config that `bridgeworks train` makes of a command, and its ranks."""
    program, train, recipe, *options = shlex.split(command)
    assert (program, train) == ("bridgeworks", "train")
    pairs = list(zip(options[::2], options[1::2], strict=True))
    sizes = {**dict.fromkeys(ASKED.values()), **{ASKED[key]: int(v) for key, v in pairs if key in ASKED}}
    load = [Path(value) for key, value in pairs if key == "--load"]
    parallel = parallel_of(recipe, sizes)
    changes = [value for key, value in pairs if key == "--set"]
    config = make_config(recipe, load[0] if load else None, parallel, changes)
    return config.validate(parallel.num_processes), parallel.num_processes


@pytest.mark.parametrize(
    ("model", "num_gpus", "changes"),
    [
        ("llama32_1b_pretrain_config", 8, []),
        ("llama31_70b_pretrain_config", 64, ["model.seq_length=4096", "mixed_precision=fp32"]),
        ("qwen3_30b_a3b_pretrain_config", 16, ["train.global_batch_size=64"]),
        ("qwen3_235b_a22b_pretrain_config", 128, []),
        ("llama32_1b_pretrain_config", 8, ["model.num_layers_in_first_pipeline_stage=4"]),
        ("llama31_8b_pretrain_config", 8, ["model.tensor_model_parallel_size=4", "train.micro_batch_size=2"]),
    ],
)
def test_the_command_trains_in_the_chosen_layout(
    model: str, num_gpus: int, changes: list[str], capsys
) -> None:
    show_plan(model, num_gpus, "h200", changes, as_json=True)
    document = json.loads(capsys.readouterr().out)
    config, ranks = config_by_command(document["command"])
    assert ranks == num_gpus
    wanted = document["settings"]
    found = {name: setting(config, name) for name in wanted}
    for settings in (wanted, found):  # without a size of their own experts take the other layers'
        settings["model.expert_tensor_parallel_size"] = (
            settings["model.expert_tensor_parallel_size"] or settings["model.tensor_model_parallel_size"]
        )
    assert found == wanted
    for change in changes:
        name, _, value = change.partition("=")
        assert name == "mixed_precision" or setting(config, name) == json.loads(value)
    assert config.mixed_precision.bf16 is ("mixed_precision=fp32" not in changes)


def test_a_folder_is_trained_on_from(tmp_path: Path) -> None:
    """Its sizes are so small that times vanish in rounding."""
    folder = make_hf_checkpoint(tmp_path / "hf", "qwen3_moe")
    printed = run("plan-parallel", folder, "--gpus", 2)
    assert printed.returncode == 0, printed.stderr
    command = printed.stdout.splitlines()[-1].removesuffix(" --output RUN")
    config, ranks = config_by_command(command)
    planned = config_of(str(folder))
    best = plan_parallel(planned, 2, gpu_named("h100")).choice
    assert command == train_command(str(folder), best, 2, [])
    assert ranks == 2
    assert config.train.global_batch_size == planned.train.global_batch_size
    assert config.model.seq_length == planned.model.seq_length
