"""What a model says to a prompt, layer by layer: shown as it is computed, or kept in files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file, save_file

from bridge.distributed import device
from bridge.errors import ConfigError
from bridge.logits import is_first_of_stage, run_prompt
from bridge.provider import GPTModelProvider

LOGITS = "logits"
Show = Callable[[str, torch.Tensor], None]
"""Takes LOGITS or a `hidden_name`, and [positions, columns] as computed; they may change after the call."""


def hidden_name(layer: int) -> str:
    """Name what decoder layer `layer` hands on, counted from 1; 0 is what the first one is given."""
    return f"hidden_{layer:04}"


@torch.no_grad()
def trace_hf(model: Any, prompt: list[int], show: Show) -> None:
    """Show every hidden state and the logits of a prompt, computed by transformers."""

    def seen(layer: int, states: torch.Tensor) -> None:
        show(hidden_name(layer), states[0])

    with watched(list(model.get_decoder().layers), 1, seen, with_input=True):
        logits = model(torch.tensor([prompt], device=device())).logits
    show(LOGITS, logits[0])


@torch.no_grad()
def trace_megatron(
    chunks: Sequence[torch.nn.Module], provider: GPTModelProvider, prompt: list[int], show: Show
) -> None:
    """Do the same by all ranks together; the first rank of each pipeline stage shows what its layers say."""
    if len(chunks) > 1:
        raise ConfigError(
            "an interleaved pipeline is for training: leave out virtual_pipeline_model_parallel_size"
        )
    speaks = is_first_of_stage()

    def seen(layer: int, states: torch.Tensor) -> None:
        if provider.sequence_parallel:
            states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        if speaks:
            show(hidden_name(layer), states[: len(prompt), 0])

    layers = unwrap_model(list(chunks))[0].decoder.layers
    with_input = parallel_state.is_pipeline_first_stage()
    with watched(layers, layers[0].layer_number, seen, with_input=with_input):
        logits = run_prompt(chunks[0], provider, prompt)
    if logits is not None and speaks:
        show(LOGITS, logits)


@contextmanager
def watched(
    layers: Sequence[torch.nn.Module],
    first: int,
    seen: Callable[[int, torch.Tensor], None],
    *,
    with_input: bool,
) -> Iterator[None]:
    """Call `seen(layer, hidden states)` with what each layer hands on; `first` is the first one's number."""

    def given(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen(first - 1, named["hidden_states"] if "hidden_states" in named else inputs[0])

    def handed_on(number: int, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        seen(number, output[0] if isinstance(output, tuple) else output)

    hooks = [
        layer.register_forward_hook(partial(handed_on, first + place)) for place, layer in enumerate(layers)
    ]
    if with_input:
        hooks.append(layers[0].register_forward_pre_hook(given, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class TraceFolder:
    """One end's traces in a folder that all ranks see, a file for each prompt and name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, prompt: int, name: str, values: torch.Tensor) -> None:
        """Write a prompt's values in the dtype in which they were computed."""
        save_file({name: values.contiguous().cpu()}, self._file(prompt, name))

    def read(self, prompt: int, name: str) -> torch.Tensor:
        """Return kept values, on the CPU."""
        return load_file(self._file(prompt, name))[name]

    def _file(self, prompt: int, name: str) -> Path:
        return self.folder / f"{prompt:05}.{name}.safetensors"
