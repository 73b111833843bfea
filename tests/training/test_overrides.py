import pytest

from bridge.errors import ConfigError
from training.config import ConfigContainer
from training.overrides import apply_overrides


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "train.train_iters": 20,
            "optimizer.lr": 1,
            "train.eval_interval": None,
            "profiling.profile_ranks": [1],
            "checkpoint.save": "7",
        },
        [
            "train.train_iters=20",
            "optimizer.lr=1",
            "train.eval_interval=null",
            "profiling.profile_ranks=[1]",
            "checkpoint.save=7",
        ],
    ],
)
def test_values_get_the_type_of_their_field(overrides):
    config = apply_overrides(ConfigContainer(), overrides)
    assert config.train.train_iters == 20
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)
    assert config.train.eval_interval is None
    assert config.profiling.profile_ranks == [1]
    assert config.checkpoint.save == "7"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.train_itres=1", "did you mean 'train.train_iters'"),
        ("trian.train_iters=1", "did you mean 'train.train_iters'"),
        ("train_iters=1", "did you mean 'train.train_iters'"),
        ("seqlen=1", "did you mean 'model.seq_length'"),
        ("optimizer.rl=1", "did you mean 'optimizer.lr'"),
        ("model.tp=1", "no setting is called 'model.tp': give section.field"),
        (
            "data_paths=1",
            "no setting is called 'data_paths': give section.field, of the sections model, train",
        ),
        ("checkpoint.interval=1", "did you mean 'checkpoint.save_interval'"),
        ("train.max_steps=1", ": train has train_iters, micro_batch_size"),
        ("optimizer.learning_rate=1", r": optimizer has lr, min_lr, .*adam_beta1"),
        ("train.train_iters", "has no '='"),
        ("train.train_iters=many", 'train.train_iters is "many": expected int'),
        ("train.train_iters=1.5", "expected int"),
        ("train.train_iters=true", "expected int"),
        ("train.train_iters=null", "expected int"),
        ("train.eval_interval=x", "expected int or null"),
        ("mixed_precision.bf16=1", "expected bool"),
        ("model.params_dtype=float16", "follows from another setting: give mixed_precision, such as"),
        ("dataset.blend=a", r"expected list\[object\]"),
        ("profiling.profile_ranks=[true]", r"expected list\[int\]"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(ConfigContainer(), [override])
