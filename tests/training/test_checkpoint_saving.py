import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from bridge.provider import GPTModelProvider
from training.checkpoint_folders import REMOVED, remove_old
from training.checkpoint_saving import BYTES_PER_PARAMETER, Saver, size_of


def test_space_that_retention_gives_up_is_waited_for(tmp_path, monkeypatch):
    for name in ("iter_0000005", "iter_0000010"):
        (tmp_path / name).mkdir()
    rmtree, disk_usage = shutil.rmtree, shutil.disk_usage

    def remove_slowly(*arguments, **options):
        time.sleep(0.3)
        rmtree(*arguments, **options)

    def usage(path):
        full = any(tmp_path.glob(f"*{REMOVED}"))
        return SimpleNamespace(free=0) if full else disk_usage(path)

    monkeypatch.setattr(shutil, "rmtree", remove_slowly)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    saver = Saver()
    saver._removal = remove_old(tmp_path, 1)
    with saver.staged(tmp_path / "iter_0000015", 1000) as folder:
        (folder / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000010", "iter_0000015"]


@pytest.mark.parametrize(
    ("sizes", "dense", "experts"),
    [
        ({"context_parallel_size": 8}, 1, 1),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}, 8, 8),
        ({"expert_model_parallel_size": 8, "pipeline_model_parallel_size": 2}, 2, 16),
        ({"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 1}, 4, 1),
    ],
)
def test_the_size_is_that_of_the_whole_model(sizes, dense, experts):
    layer = torch.nn.ParameterList([torch.zeros(100), torch.zeros(1000)])
    layer[1].allreduce = False  # as Megatron marks experts
    config = SimpleNamespace(model=GPTModelProvider(**sizes))
    expected = (100 * dense + 1000 * experts) * BYTES_PER_PARAMETER
    assert size_of(SimpleNamespace(model=[layer], config=config)) == expected
