"""The recipe that trains an imported checkpoint on."""

from training.config import ConfigContainer, OptimizerConfig, SchedulerConfig, TrainingConfig


def continued_pretrain_config() -> ConfigContainer:
    """Return a config whose model is still empty: the job fills it from the checkpoint that it starts from.

    What an override says about `model` (parallel sizes, `seq_length`) is kept. Learning rate and batch are
    small, for a checkpoint of a few billion parameters at most.
    """
    return ConfigContainer(
        train=TrainingConfig(
            train_iters=1000, micro_batch_size=1, global_batch_size=32, eval_interval=100, eval_iters=8
        ),
        optimizer=OptimizerConfig(lr=3e-5, min_lr=3e-6),
        scheduler=SchedulerConfig(lr_warmup_iters=50),
    )
