"""AutoBridge: the bridge of one Hugging Face model, with the interface that users of Megatron Bridge know."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from megatron.core.transformer import TransformerConfig

from bridge import live_checkpoint, live_weights
from bridge.agreement import on_first_rank
from bridge.byte_copy import Progress
from bridge.conversion import Conversion
from bridge.dtypes import check_weight_dtype
from bridge.ends import is_described
from bridge.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from bridge.exporter import export_checkpoint
from bridge.families import families, family_of, provider_of
from bridge.hf_checkpoint import CONFIG, INDEX, HfCheckpoint, read_config
from bridge.importer import import_checkpoint
from bridge.pretrained import read_model, resolve_pretrained
from bridge.progress_bar import progress_bar
from bridge.provider import GPTModelProvider
from bridge.same_model import check_same_model
from bridge.shared_folder import shared_folder
from bridge.sizes import Size

# What a hub repository has that a bridge reads: no code, and no weights in other formats.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]

WEIGHTS = (".safetensors", INDEX)

Model = Sequence[torch.nn.Module]
Dtype: TypeAlias = str | torch.dtype


class AutoBridge:
    """Converts one model between Hugging Face and Megatron Core, on disk and in memory.

    A model in memory is the list of chunks that `provide_distributed_model` returns. Methods that take one
    are for all ranks together.
    """

    def __init__(self, config: dict[str, Any], checkpoint: HfCheckpoint | None = None) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.family = family_of(config)

    @classmethod
    def from_hf_pretrained(
        cls, path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> "AutoBridge":
        """Open a folder, or a hub repository ("org/name", downloaded at `revision`)."""
        checkpoint = HfCheckpoint.open(local_folder(path, revision))
        return cls(without_own_code(checkpoint.config, trust_remote_code), checkpoint)

    @classmethod
    def from_hf_config(cls, config: Any) -> "AutoBridge":
        """Make a bridge without weights from a transformers config or its dict."""
        return cls(dict(config) if isinstance(config, dict) else config.to_dict())

    @classmethod
    def can_handle(cls, path: str | Path) -> bool:
        """Say whether the model in a folder can be converted, its config values included."""
        try:
            provider_of(read_config(Path(path)))
        except InputError:
            return False
        return True

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """List the architectures of all families, such as "LlamaForCausalLM"."""
        return sorted(family.architecture for family in families().values())

    @classmethod
    def import_ckpt(cls, hf_path: str | Path, megatron_path: str | Path, **options: Any) -> Conversion:
        """Convert a Hugging Face folder or hub repository on disk; options are `import_checkpoint`'s."""
        options["dtype"] = dtype_name(options.get("dtype"))
        with progress_bar("importing", options.pop("progress", None)) as progress:
            return import_checkpoint(local_folder(hf_path), megatron_path, progress=progress, **options)

    def export_ckpt(self, megatron_path: str | Path, hf_path: str | Path, **options: Any) -> Conversion:
        """Convert a Megatron checkpoint on disk; options are `export_checkpoint`'s.

        One of plain Megatron-LM, which has no config, gets this bridge's unless an option says another.
        """
        options["dtype"] = dtype_name(options.get("dtype"))
        if (
            self.checkpoint
            and not is_described(Path(megatron_path))
            and not options.keys() & {"config_from", "family"}
        ):
            options["config_from"] = self.checkpoint.path
        with progress_bar("exporting", options.pop("progress", None)) as progress:
            return export_checkpoint(megatron_path, hf_path, progress=progress, **options)

    @property
    def transformer_config(self) -> TransformerConfig:
        """Megatron Core's config of the model, for one rank."""
        return provider_of(self.config).transformer_config()

    def to_megatron_provider(self, load_weights: bool = True) -> GPTModelProvider:
        """Describe the model to Megatron; by default its models start with this checkpoint's weights."""
        if not load_weights or self.checkpoint is None:
            return provider_of(self.config)
        provider = ProviderWithWeights(**vars(provider_of(self.config)))
        provider.source = self.checkpoint
        return provider

    def to_megatron_model(self, load_weights: bool = True, **options: Any) -> list[torch.nn.Module]:
        """Build the model with default sizes; options are `provide_distributed_model`'s."""
        return self.to_megatron_provider(load_weights).provide_distributed_model(**options)

    def load_hf_weights(self, model: Model, hf_path: str | Path | None = None) -> None:
        """Fill a model in place with this checkpoint's weights, or with those of another folder.

        Each rank reads only the slices that it holds. A folder whose config makes it another model, were it
        only by the base of its rope, is a ConfigError.
        """
        source = self._other(local_folder(hf_path)) if hf_path else self.checkpoint
        if source is None:
            raise ConfigError("this bridge was made from a config alone: name the folder of the weights")
        live_weights.load_hf_weights(model, provider_of(self.config), source)

    def _other(self, folder: Path) -> HfCheckpoint:
        """Open another folder with weights of this bridge's model."""
        checkpoint = HfCheckpoint.open(folder)
        # code that it brings is not run: its config must say the same as the bridge's, that is all
        config = without_own_code(checkpoint.config, trust_remote_code=True)
        check_same_model(provider_of(self.config), provider_of(config), str(folder))
        return checkpoint

    def export_hf_weights(
        self, model: Model, *, dtype: Dtype | None = None, **options: Any
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for every Hugging Face tensor, whole and on every rank.

        Options are those of `bridge.live_weights.export_hf_weights`: `names` (only these), `cpu`,
        `first_rank_only`, `bucket_size` (bytes).
        """
        return live_weights.export_hf_weights(
            model, provider_of(self.config), dtype=torch_dtype(dtype), **options
        )

    def save_hf_weights(
        self,
        model: Model,
        path: str | Path,
        max_shard_size: Size = "5GB",
        *,
        dtype: Dtype | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write a model's weights as safetensors shards into an existing folder.

        The first rank writes them, and holds a bucket and two tensors at a time. `progress(done, total)` is
        called with bytes; by default a person who watches sees a bar. A folder that holds weights is an
        InputError.
        """
        on_first_rank(lambda: check_without_weights(Path(path)))
        live_weights.write_weights(self._hf_weights(model, dtype), Path(path), max_shard_size, progress)

    def _hf_weights(self, model: Model, dtype: Dtype | None) -> live_weights.HfWeights:
        return live_weights.HfWeights(
            model, provider_of(self.config), dtype=torch_dtype(dtype), first_rank_only=True
        )

    def save_hf_pretrained(
        self,
        model: Model,
        path: str | Path,
        max_shard_size: Size = "5GB",
        *,
        dtype: Dtype | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write weights, config, generation config and tokenizer as a new folder that transformers loads.

        It appears when it is complete. Weights are cast to `dtype`, by default they keep the model's.
        """
        weights = self._hf_weights(model, dtype)
        config_dtype = torch_dtype(dtype) or next(model[0].parameters()).dtype
        with shared_folder(Path(path), weights.nbytes) as partial:
            live_weights.write_weights(weights, partial, max_shard_size, progress)
            on_first_rank(lambda: self._write_side_files(partial, config_dtype))

    def _write_side_files(self, folder: Path, dtype: torch.dtype) -> None:
        provider = provider_of(self.config)
        provider.params_dtype = str(dtype).removeprefix("torch.")
        (folder / CONFIG).write_text(json.dumps(self.family.hf_config(provider), indent=2) + "\n")
        for file in self._side_files():
            shutil.copyfile(file, folder / file.name)

    def _side_files(self) -> list[Path]:
        return self.checkpoint.side_files() if self.checkpoint else []

    def save_megatron_model(self, model: Model, path: str | Path) -> None:
        """Save a model as a new Megatron checkpoint that any parallel layout loads."""
        files = self._side_files()
        if self.checkpoint:
            files.append(self.checkpoint.path / CONFIG)
        live_checkpoint.save_checkpoint(model, provider_of(self.config), Path(path), files)

    def load_megatron_model(self, path: str | Path, **options: Any) -> list[torch.nn.Module]:
        """Build a model with the weights of a Megatron checkpoint, or of a Hugging Face folder as it is.

        Options are fields of the provider, such as parallel sizes, and `provide_distributed_model`'s.
        """
        folder = resolve_pretrained(Path(path))
        fields = {field.name for field in dataclasses.fields(GPTModelProvider)}
        layout = {name: options.pop(name) for name in list(options) if name in fields}
        provider = dataclasses.replace(read_model(folder), **layout)
        model = provider.provide_distributed_model(**options, perform_initialization=False)
        live_checkpoint.load_checkpoint(model, folder)
        return model


def check_without_weights(folder: Path) -> None:
    """Refuse a folder with weights: readers take a single file rather than shards, whichever is newer."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: make it, or let save_hf_pretrained make one")
    if found := sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS)):
        raise InputError(f"{folder} holds weights already, {found[0]}: remove them or give another folder")


class ProviderWithWeights(GPTModelProvider):
    """A provider whose models start with the weights of a Hugging Face checkpoint."""

    # Not a field of the dataclass: `to_dict` describes the model, not where its weights lie.
    source: HfCheckpoint

    def provide_distributed_model(self, **options: Any) -> list[torch.nn.Module]:
        """Build this rank's model chunks and load its slices of the weights."""
        model = super().provide_distributed_model(**options, perform_initialization=False)
        live_weights.load_hf_weights(model, self, self.source)
        return model


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    """Return a dtype given by name or as torch's own, which must be one that weights may have."""
    name = dtype_name(dtype)
    check_weight_dtype(name)
    return getattr(torch, name) if name else None


def dtype_name(dtype: Dtype | None) -> str | None:
    return str(dtype).removeprefix("torch.") if dtype is not None else None


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """Return the folder itself, or that of a downloaded hub repository."""
    if isinstance(path, Path) or Path(path).exists() or path.count("/") != 1 or path.startswith((".", "/")):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} is no folder and cannot be fetched from the hub: {reason}") from error


def without_own_code(config: dict[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """Refuse a checkpoint that brings modelling code which its family does not know, unless told otherwise.

    The code is not run in any case: a bridge has its own rules, and transformers its own implementation.
    """
    if any("auto_map" in rule.keys for rule in family_of(config).config) and not trust_remote_code:
        return config  # the family knows the code of its releases, and judges it
    if "auto_map" in config and not trust_remote_code:
        raise UnsupportedModelError(
            "config.json names code of its own (auto_map): pass trust_remote_code=True to convert the model"
            f" by the rules of its model_type {config.get('model_type')!r} instead"
        )
    return {key: value for key, value in config.items() if key != "auto_map"}
