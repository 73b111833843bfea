import importlib.util

import pytest

from bridge.errors import ConfigError
from training.tensorboard_log import TensorBoardLog

INSTALLED = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.skipif(INSTALLED, reason="tensorboard is installed")
def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match="needs the package tensorboard, which is not installed"):
        TensorBoardLog().before_training(None)
