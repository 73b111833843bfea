"""A job of the tests: every family in every layout of two ranks, against transformers and the files."""

import functools
from pathlib import Path
from typing import Any

import prediction_losses
import torch
from checkpoints import as_stored
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from bridge.distributed import leave_model_parallel
from bridge.families import provider_of
from bridge.hf_checkpoint import HfCheckpoint
from bridge.live_checkpoint import load_checkpoint
from bridge.live_weights import export_hf_weights, load_hf_weights
from bridge.logits import hf_logits, megatron_logits
from bridge.provider import GPTModelProvider

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2 sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2 vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "dp2": {},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2 ep2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
}
# Each row of tokens and labels is a microbatch; four keep every stage of an interleaved pipeline busy.
TOKENS, LABELS = torch.arange(2 * 4 * 16).reshape(2, 4, 1, 16) % 151
PROMPTS = [list(range(2, 34)), list(range(90, 50, -1)) + [7] * 8]


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return for each family and layout what was measured on the first rank."""
    return {
        name: {
            layout: measure(Path(ends["hf"]), Path(ends["megatron"]), LAYOUTS[layout])
            for layout in ends["layouts"]
        }
        for name, ends in config["checkpoints"].items()
    }


def measure(hf: Path, megatron: Path, layout: dict[str, Any]) -> dict[str, Any]:
    checkpoint = HfCheckpoint.open(hf)
    provider = laid_out(checkpoint, layout, checkpoint.config["dtype"])
    model = provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)
    load_hf_weights(model, provider, checkpoint)
    expected = {name: weight for file in hf.glob("*.safetensors") for name, weight in load_file(file).items()}
    result = {"from_hf": same(expected, model, provider)}
    fill_with_zeros(model)
    load_checkpoint(model, megatron)
    result["from_megatron"] = same(expected, model, provider)
    result["gradients"] = gradient_difference(checkpoint, laid_out(checkpoint, layout, "float32"))
    if provider.virtual_pipeline_model_parallel_size is None:
        result["max_abs"] = largest_difference(checkpoint, laid_out(checkpoint, layout, "float32"))
    leave_model_parallel()
    return result


def laid_out(checkpoint: HfCheckpoint, layout: dict[str, Any], dtype: str) -> GPTModelProvider:
    provider = provider_of(checkpoint.config)
    # transformers adds a loss for the balance of experts only where it is asked to
    for name, value in {**layout, "params_dtype": dtype, "moe_aux_loss_coeff": 0.0}.items():
        setattr(provider, name, value)
    return provider


def fill_with_zeros(model: list[torch.nn.Module]) -> None:
    with torch.no_grad():
        for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
            parameter.zero_()


def same(expected: dict[str, torch.Tensor], model: list[torch.nn.Module], provider: GPTModelProvider) -> bool:
    """Say whether every rank exports exactly the tensors of the files."""
    found = dict(export_hf_weights(model, provider, cpu=True))
    equal = set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    everywhere = torch.tensor(int(equal))
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return bool(everywhere)


def largest_difference(checkpoint: HfCheckpoint, provider: GPTModelProvider) -> float:
    model = provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)
    load_hf_weights(model, provider, checkpoint)
    found = megatron_logits(model, provider, PROMPTS)
    if torch.distributed.get_rank() != 0:
        return 0.0
    expected = expected_logits(checkpoint.path)
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@functools.cache
def expected_logits(folder: Path) -> list[torch.Tensor]:
    return hf_logits(folder, PROMPTS, "float32")


def gradient_difference(checkpoint: HfCheckpoint, provider: GPTModelProvider) -> float:
    """Return the largest difference to transformers' gradients, as a share of the tensor's largest one."""
    model = provider.provide_distributed_model(perform_initialization=False)
    load_hf_weights(model, provider, checkpoint)
    model[0].config.finalize_model_grads_func = finalize_model_grads
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(zip(TOKENS, LABELS, strict=True)) for _ in model],
        model=model,
        num_microbatches=len(TOKENS),
        seq_length=TOKENS.shape[-1],
        micro_batch_size=1,
        forward_only=False,
    )
    for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
        parameter.data.copy_(parameter.main_grad)
    found = dict(export_hf_weights(model, provider))
    if torch.distributed.get_rank() != 0:
        return 0.0
    expected = hf_gradients(checkpoint.path)
    return max(((found[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


def forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens, labels = next(batches)
    positions = torch.arange(tokens.shape[-1])[None]
    return model(tokens, positions, None, labels=labels), lambda losses: (losses.mean(), {})


@functools.cache
def hf_gradients(folder: Path) -> dict[str, torch.Tensor]:
    if AutoConfig.from_pretrained(folder).to_dict().get("num_nextn_predict_layers"):
        return prediction_losses.gradients(folder, TOKENS, LABELS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None  # in training there is no padding
    for tokens, labels in zip(TOKENS, LABELS, strict=True):
        loss = functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        (loss / len(TOKENS)).backward()
    return as_stored(model, {name: parameter.grad for name, parameter in model.named_parameters()})
