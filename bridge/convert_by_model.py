"""Job: the ordinary way to convert, through a live model, beside which the benchmark puts conversions."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from bridge import cpu
from bridge.auto_bridge import AutoBridge
from bridge.distributed import finalize, initialize
from bridge.families import provider_of
from bridge.hf_checkpoint import read_config
from bridge.megatron_checkpoint import is_megatron_checkpoint, read_model


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Turn `config["source"]` into the other format at `config["target"]`."""
    source, target = Path(config["source"]), Path(config["target"])
    cpu.install()
    exports = is_megatron_checkpoint(source)
    initialize(read_model(source) if exports else provider_of(read_config(source)))
    if exports:
        _export(source, target)
    else:
        _import(source, target)
    finalize()
    return {}


def _import(source: Path, target: Path) -> None:
    AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_megatron_model(bridge.to_megatron_model(wrap_with_ddp=False), target)


def _export(source: Path, target: Path) -> None:
    bridge = AutoBridge.from_hf_config(read_model(source).hf_config)
    bridge.save_hf_pretrained(bridge.load_megatron_model(source, wrap_with_ddp=False), target)
