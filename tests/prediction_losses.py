"""What layers of multi-token prediction compute, by transformers' own modules: the judge of Megatron's."""

from pathlib import Path

import torch
from checkpoints import as_stored
from prediction_layers import read_weights
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LOSS_SCALE = 0.1  # Megatron's mtp_loss_scaling_factor
HEADS = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")


def with_prediction_layers(folder: Path) -> PreTrainedModel:
    """Load a model whose decoder has the prediction layers' blocks behind its own, in float32."""
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers += config.num_nextn_predict_layers
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


def losses(model: PreTrainedModel, heads: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the losses of the next token and of those after it, by a model `with_prediction_layers`.

    `heads` are the norms and projections of the prediction layers by their names in the checkpoint. The
    decoder's output behind its norm and the embedding of the token after go into a layer; the shared output
    projection reads it behind a norm of its own (DeepSeek-V3, arXiv 2412.19437, section 2.2).
    """
    blocks = list(model.model.layers)
    first = len(blocks) - model.config.num_nextn_predict_layers
    model.model.layers = torch.nn.ModuleList(blocks[:first])
    try:
        hidden = model.model(tokens).last_hidden_state
    finally:
        model.model.layers = torch.nn.ModuleList(blocks)
    found = [functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten())]
    for layer, block in enumerate(blocks[first:], start=first):
        tokens, labels, hidden = tokens[:, 1:], labels[:, 1:], hidden[:, :-1]
        prefix = f"model.layers.{layer}."
        norms = {name: heads[f"{prefix}{name}.weight"] for name in ("enorm", "hnorm", "shared_head.norm")}
        inputs = [norm(model, model.model.embed_tokens(tokens), norms["enorm"])]
        inputs.append(norm(model, hidden, norms["hnorm"]))
        hidden = functional.linear(torch.cat(inputs, dim=-1), heads[f"{prefix}eh_proj.weight"])
        positions = torch.arange(tokens.shape[1])[None]
        rotary = model.model.rotary_emb(hidden, position_ids=positions)
        hidden = block(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        hidden = norm(model, hidden, norms["shared_head.norm"])
        found.append(functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten()))
    return found


def norm(model: PreTrainedModel, inputs: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(inputs, weight.shape, weight, model.config.rms_norm_eps)


def gradients(folder: Path, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the gradients of one training step over micro-batches, with the names of the files.

    The losses of the prediction layers count LOSS_SCALE times their mean.
    """
    model = with_prediction_layers(folder)
    model.get_input_embeddings().padding_idx = None  # in training there is no padding
    heads = {
        name: weight.float().requires_grad_()
        for name, weight in read_weights(folder).items()
        if name.endswith(HEADS)
    }
    for inputs, targets in zip(tokens, labels, strict=True):
        first, *further = losses(model, heads, inputs, targets)
        loss = first + LOSS_SCALE * sum(further) / max(1, len(further))
        (loss / len(tokens)).backward()
    found = as_stored(model, {name: parameter.grad for name, parameter in model.named_parameters()})
    return found | {name: weight.grad for name, weight in heads.items()}
