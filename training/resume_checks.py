"""What a resumed run must have in common with the run that wrote its checkpoint: the data and the model."""

import json
from pathlib import Path
from typing import Any

from bridge.errors import CheckpointError, ConfigError
from bridge.provider import GPTModelProvider
from training.blend import find_datasets, find_parts
from training.checkpoint_record import read_record
from training.config import ConfigContainer

RUN_CONFIG = "run_config.json"
NEW_RUN = "begin a new run from its weights (checkpoint.pretrained_checkpoint)"
# what a run may change about its model as it goes on: how it is spread and computed, and how it is trained
MAY_CHANGE = frozenset(
    {
        *("init_method_std", "attention_dropout", "hidden_dropout", "max_position_embeddings", "seq_length"),
        *("moe_router_bias_update_rate", "moe_router_load_balancing_type", "moe_aux_loss_coeff"),
        *("moe_z_loss_coeff", "moe_token_dispatcher_type", "mtp_loss_scaling_factor", "moe_router_dtype"),
        *("make_vocab_size_divisible_by", "params_dtype", "transformer_impl"),
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        *("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", "sequence_parallel"),
        *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
        *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        *("expert_model_parallel_size", "expert_tensor_parallel_size"),
        *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
        *("cpu_offloading", "cpu_offloading_num_layers", "cpu_offloading_activations"),
        *("cpu_offloading_weights", "use_te_activation_func", "bias_activation_fusion"),
        *("bias_dropout_fusion", "masked_softmax_fusion", "apply_rope_fusion", "cross_entropy_loss_fusion"),
        *("gradient_accumulation_fusion", "cross_entropy_fusion_impl", "hf_config"),
    }
)


def describe_data(config: ConfigContainer) -> dict[str, Any]:
    """Return what decides which samples a run sees, with the content of its datasets as digests."""
    return {
        "dataset.random_seed": config.dataset.random_seed,
        "model.seq_length": config.model.seq_length,
        "dataset.mock": config.dataset.mock,
        "train": describe_train_split(config),
    }


def describe_train_split(config: ConfigContainer) -> list[dict[str, Any]]:
    if not (config.dataset.blend or config.dataset.blend_per_split):
        return []
    digests = {
        str(dataset.folder / split): record["sha256"]
        for dataset in find_datasets(config.dataset).values()
        for split, record in dataset.record["splits"].items()
    }
    parts = find_parts(config.dataset, ["train"])["train"]
    total = sum(part.weight for part in parts)
    return [
        {
            "path": str(part.prefix),
            "share": round(part.weight / total, 12),
            "documents": [part.begin, part.end],
            "sha256": digests[str(part.prefix)][f"{part.prefix.name}.bin"],
        }
        for part in parts
    ]


def check_resume(config: ConfigContainer, folder: Path) -> None:
    """Refuse by ConfigError to go on from `folder` with another model, or with other data unless told so."""
    saved = read_run_config(folder)
    check_model(config.model, saved["model"], folder)
    check_schedule(config, saved["train"]["global_batch_size"], folder)
    if not config.checkpoint.allow_changed_data:
        check_data(describe_data(config), read_record(folder)["data"], folder)
        check_loss(config.dataset.eod_mask_loss, saved["dataset"]["eod_mask_loss"], folder)


def read_run_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RUN_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / RUN_CONFIG} cannot be read: {error}") from error


def check_model(model: GPTModelProvider, saved: dict[str, Any], folder: Path) -> None:
    """Compare the architectures; a field that the checkpoint does not know yet has its default there."""
    before = json.loads(json.dumps(GPTModelProvider.from_dict(saved).to_dict()))
    now = json.loads(json.dumps(model.to_dict()))
    for name in sorted(now.keys() - MAY_CHANGE):
        if now[name] != before[name]:
            raise ConfigError(
                f"model.{name} is {now[name]!r}, but {before[name]!r} in the checkpoint {folder}: this is"
                " another model; give the same, or another checkpoint.save"
            )


def check_schedule(config: ConfigContainer, before: int, folder: Path) -> None:
    """Refuse another batch size where the learning rate depends on samples, not on iterations."""
    scheduler, now = config.scheduler, config.train.global_batch_size
    # Megatron's formula has one sample in the place of a warm-up of none
    by_samples = scheduler.lr_decay_style == "inverse-square-root" and not scheduler.lr_warmup_iters
    if by_samples and now != before:
        raise ConfigError(
            f"train.global_batch_size is {now}, but was {before} in the checkpoint {folder}: without warm-up"
            " the learning rate of inverse-square-root counts samples, and would jump; give the same"
        )


def check_loss(now: bool, before: bool, folder: Path) -> None:
    """Refuse to measure the loss on other tokens than before."""
    if now != before:
        raise ConfigError(
            f"dataset.eod_mask_loss is {now}, but was {before} in the checkpoint {folder}: losses would be of"
            f" other tokens; give the same, {NEW_RUN}, or set checkpoint.allow_changed_data"
        )


def check_data(now: dict[str, Any], before: dict[str, Any], folder: Path) -> None:
    """Compare what decides the samples; where a dataset lies may change, what is in it may not."""
    for name in ("dataset.random_seed", "model.seq_length", "dataset.mock"):
        if now[name] != before[name]:
            refuse(name, now[name], before[name], folder)
    if len(now["train"]) != len(before["train"]):
        refuse("the blend", paths_of(now), paths_of(before), folder)
    for new, old in zip(now["train"], before["train"], strict=True):
        if new["sha256"] != old["sha256"]:
            found, expected = (f"{each['path']} (SHA-256 {each['sha256'][:12]})" for each in (new, old))
            refuse("a dataset of the blend", found, expected, folder)
        for name in ("share", "documents"):
            if new[name] != old[name]:
                refuse(f"the {name} of {new['path']}", new[name], old[name], folder)


def paths_of(data: dict[str, Any]) -> str:
    return ", ".join(each["path"] for each in data["train"]) or "nothing"


def refuse(name: str, now: Any, before: Any, folder: Path) -> None:
    raise ConfigError(
        f"{name} is {now}, but was {before} in the checkpoint {folder}: the run would see other samples than"
        f" those it has counted; give the same, {NEW_RUN}, or set checkpoint.allow_changed_data"
    )
