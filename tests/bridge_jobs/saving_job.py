"""A job of the tests: what two ranks save of live models, and errors of one of them while they do."""

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bridge_jobs.live_job import everywhere, message_of
from megatron.core import parallel_state

from bridge import AutoBridge
from bridge.live_checkpoint import load_checkpoint
from bridge.live_weights import export_hf_weights

TOO_LARGE = 1e30
HANGS = 120.0  # seconds, after which a rank that waits for ever ends


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return the message of each error, and what else was seen."""
    guard = threading.Timer(HANGS, os._exit, (3,))
    guard.daemon = True
    guard.start()
    output = Path(config["output"])
    report = dense(Path(config["llama"]), Path(config["other"]), output)
    parallel_state.destroy_model_parallel()
    report["kept in float32"] = everywhere(keeps_float32(Path(config["deepseek_v3"]), output / "deepseek"))
    return report


def dense(hf: Path, other: Path, output: Path) -> dict[str, Any]:
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    new = output / "never"

    def save_hf(folder: Path = new, **options: Any) -> None:
        bridge.save_hf_pretrained(model, folder, **options)

    bridge.save_megatron_model(model, output / "megatron")
    messages = {
        "hf exists": message_of(lambda: save_hf(hf)),
        "megatron exists": message_of(lambda: bridge.save_megatron_model(model, hf)),
        "hf size": message_of(lambda: save_hf(max_shard_size="much")),
        "other vocabulary": message_of(lambda: load_checkpoint(model, other)),
    }
    with no_space_on(0):
        messages["hf no space"] = answer_of(save_hf)
        messages["megatron no space"] = answer_of(lambda: bridge.save_megatron_model(model, new))
    save_hf(output / "hf")
    spoil(model, rank=1)
    messages["overflow"] = message_of(lambda: save_hf(dtype="float16"))
    messages["overflow yielded"] = message_of(lambda: export_hf_weights(model, provider, dtype=torch.float16))
    return {**messages, "left": sorted(path.name for path in output.glob("never*"))}


@contextmanager
def no_space_on(rank: int) -> Iterator[None]:
    """Let a rank fail to write files of more than 20 KB."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def answer_of(work: Callable[[], Any]) -> list[str]:
    """Return every rank's error, whatever it is."""
    found = ["none"] * torch.distributed.get_world_size()
    try:
        work()
        answer = "none"
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    torch.distributed.all_gather_object(found, answer)
    return found


@torch.no_grad()
def spoil(model: list[torch.nn.Module], rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        model[0].get_parameter("module.decoder.layers.1.mlp.linear_fc2.weight")[3, 5] = TOO_LARGE


def keeps_float32(hf: Path, saved: Path) -> bool:
    """Say whether a save in 16 bits leaves alone what Megatron keeps in float32."""
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider()
    provider.pipeline_model_parallel_size = 2
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    biases = {n: w for n, w in bridge.export_hf_weights(model) if n.endswith("e_score_correction_bias")}
    bridge.save_hf_pretrained(model, saved, dtype="float16")
    found = dict(bridge.export_hf_weights(model, dtype="float16"))
    dtypes = {weight.dtype for name, weight in found.items() if name not in biases}
    return (
        bool(biases)
        and dtypes == {torch.float16}
        and all(w.dtype is torch.float32 and torch.equal(found[n], w) for n, w in biases.items())
    )
