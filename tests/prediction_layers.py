"""Layers of multi-token prediction for test checkpoints; transformers neither makes nor loads them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX, FILE = "model.safetensors.index.json", "model-prediction.safetensors"


def read_weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def add_prediction_layers(folder: Path, seed: int = 1) -> None:
    """Write as many random prediction layers behind the decoder's as config.json names."""
    config = json.loads((folder / "config.json").read_text())
    first, count = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    weights = read_weights(folder)
    generator = torch.Generator().manual_seed(seed)
    added: dict[str, Tensor] = {}
    for layer in range(first, first + count):
        added |= prediction_layer(weights, first - 1, layer, generator)
    save_file(added, folder / FILE, metadata={"format": "pt"})
    write_index(folder)


def prediction_layer(
    weights: dict[str, Tensor], last: int, layer: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the weights of one layer, alike to those of the decoder's layer `last`."""
    prefix = f"model.layers.{layer}."
    like = {n.replace(f".{last}.", f".{layer}.", 1): w for n, w in weights.items() if f"layers.{last}." in n}
    embedding = weights["model.embed_tokens.weight"]
    norm = weights["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        like[f"{prefix}{name}.weight"] = norm
    like[f"{prefix}eh_proj.weight"] = torch.cat([embedding[: len(norm)]] * 2, dim=1)
    layer_weights = {name: random_like(weight, generator) for name, weight in like.items()}
    layer_weights[f"{prefix}embed_tokens.weight"] = embedding.clone()
    layer_weights[f"{prefix}shared_head.head.weight"] = weights.get("lm_head.weight", embedding).clone()
    return layer_weights


def random_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
    return (weight.float().mean() + noise).to(weight.dtype)


def write_index(folder: Path) -> None:
    names = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
