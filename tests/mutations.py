"""Faults that a conversion can have, and which gates must catch each: data of tests and of the documentation.

A fault is in a Hugging Face folder that claims to be the model of a Megatron checkpoint, as an export does,
or in a rule or in Megatron's model, by which the checkpoint is then imported and compared as well.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA3_ROPE, edit_json
from safetensors.torch import load_file, save_file

import bridge.rotary
from bridge.config_rules import Rope
from bridge.mapping import GatedMLPMapping, Piece, QKVMapping
from bridge.megatron_checkpoint import MODEL
from bridge.provider import GPTModelProvider

Weights = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.2"
Q, K = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight"
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
NORMS = f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"

GATES = {
    "files": "every file is whole, and headers and index agree",
    "config keys": "every key and value of config.json has a rule",
    "coverage": "exactly the declared tensors, in the declared shapes",
    "tied copies": "a stored copy of a tied tensor is the same",
    "settings": "both ends describe the same model",
    "digests": "every tensor is the same, bit for bit",
    "hidden fp32": "hidden states at every layer, in float32",
    "logits fp32": "logits at every position, in float32",
    "hidden bf16": "hidden states at every layer, in bfloat16",
    "logits bf16": "logits at every position, in bfloat16",
    "reload": "transformers loads the folder without complaint",
}
FP32, BF16 = {"hidden fp32", "logits fp32"}, {"hidden bf16", "logits bf16"}
SEEN = FP32 | BF16


@dataclass(frozen=True)
class Mutation:
    """One fault. `apply` changes a copied folder; `rule` is a context in which a rule is wrong.

    `megatron` changes the other end.
    """

    fault: str
    caught_by: frozenset[str]
    apply: Callable[[Path], object] = lambda folder: None
    megatron: Callable[[Path], object] = lambda folder: None
    rule: Callable[[], Any] | None = None
    family: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_length: int = 64
    not_reached: frozenset[str] = frozenset()
    """Gates that are not asked, because an earlier one has refused the folder."""


def on_weights(change: Callable[[Weights], object]) -> Callable[[Path], None]:
    """Make a change of a folder from one of its weights, whose names it keeps."""

    def apply(folder: Path) -> None:
        shards = {file: load_file(file) for file in folder.glob("*.safetensors")}
        weights = {name: weight for shard in shards.values() for name, weight in shard.items()}
        change(weights)
        for file, shard in shards.items():
            save_file({name: weights[name] for name in shard}, file, metadata={"format": "pt"})

    return apply


def on_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def put_tensor(name: str, make: Callable[[Weights], torch.Tensor | None]) -> Callable[[Path], None]:
    """Make a change that adds or replaces a tensor, or removes it if `make` returns None."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        everything = {n: w for file in set(index.values()) for n, w in load_file(folder / file).items()}
        file = index.pop(name, sorted(set(index.values()))[0])
        shard = {n: w for n, w in load_file(folder / file).items() if n != name}
        if (tensor := make(everything)) is not None:
            shard[name], index[name] = tensor.contiguous(), file
        save_file(shard, folder / file, metadata={"format": "pt"})
        edit_json(folder / INDEX, weight_map=index)

    return apply


def swap(a: str, b: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[a], weights[b] = weights[b].clone(), weights[a].clone()

    return change


def permute_heads(weights: Weights) -> None:
    weights[Q] = weights[Q].unflatten(0, (8, 16)).roll(1, dims=0).flatten(0, 1).contiguous()


def permute_experts(weights: Weights) -> None:
    """Give each expert the next one's weights, in whichever form the family stores them."""
    for kind in ("gate_proj", "up_proj", "down_proj"):
        names = sorted(name for name in weights if f"{LAYER}." in name and f".{kind}." in name)
        names = [name for name in names if ".experts." in name]
        assert len(names) > 1, "no experts to permute"
        rolled = [weights[name] for name in (*names[1:], names[0])]
        weights.update(zip(names, rolled, strict=True))


def double_residual(weights: Weights) -> None:
    """Double all that is added to the residual: the final norm takes it out again."""
    for name, weight in weights.items():
        if "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
            weight.mul_(2)


def put_into_two_shards(folder: Path) -> None:
    """Leave another version of a tensor in a second shard, which the index does not name."""
    file = json.loads((folder / INDEX).read_text())["weight_map"][K]
    other = next(path for path in sorted(folder.glob("*.safetensors")) if path.name != file)
    stale = load_file(folder / file)[K] * 2
    save_file({**load_file(other), K: stale}, other, metadata={"format": "pt"})


def cut_vocabulary(folder: Path) -> None:
    """Take the last tokens for padding, in weights and config alike."""
    for name in (EMBEDDING, LM_HEAD):
        put_tensor(name, lambda weights, name=name: weights[name][:128])(folder)
    edit_json(folder / "config.json", vocab_size=128)


def claim_vocabulary(vocab_size: int) -> Callable[[Path], None]:
    """Make a change of a Megatron checkpoint: its description is of another vocabulary."""

    def apply(folder: Path) -> None:
        hf_config = json.loads((folder / MODEL).read_text())["hf_config"]
        edit_json(folder / MODEL, vocab_size=vocab_size, hf_config={**hf_config, "vocab_size": vocab_size})

    return apply


def cut_short(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-64])


@contextmanager
def wrong_pieces(mapping: type, wrong: Callable[[list[Piece]], list[Piece]]) -> Iterator[None]:
    """Let a kind of weight rule name the wrong rows, in both directions."""
    right = mapping.pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "pieces", lambda self, provider: iter(wrong(list(right(self, provider)))))
        yield


def keys_and_values_exchanged() -> Any:
    def exchange(pieces: list[Piece]) -> list[Piece]:
        names = {piece.hf for piece in pieces}
        [k], [v] = ([n for n in names if f".{kind}_proj." in n] for kind in "kv")
        return [piece._replace(hf={k: v, v: k}.get(piece.hf, piece.hf)) for piece in pieces]

    return wrong_pieces(QKVMapping, exchange)


def up_above_gate() -> Any:
    def exchange(pieces: list[Piece]) -> list[Piece]:
        rows = [piece.megatron_row for piece in reversed(pieces)]
        moved = [piece._replace(megatron_row=row) for piece, row in zip(pieces, rows, strict=True)]
        return sorted(moved, key=lambda piece: piece.megatron_row)

    return wrong_pieces(GatedMLPMapping, exchange)


@contextmanager
def rope_scaling_ignored() -> Iterator[None]:
    right = Rope.read
    with pytest.MonkeyPatch.context() as patch:

        def read(self: Rope, config: Any) -> dict[str, Any]:
            theta = right(self, config)["rotary_base"]
            rope = {"rope_type": "default", "rope_theta": theta}
            return {**right(self, config), "rope_parameters": rope}

        patch.setattr(Rope, "read", read)
        yield


@contextmanager
def rotary_in_16_bits() -> Iterator[None]:
    """Let a 16-bit model count positions in 16 bits, as one does whose buffers are cast with its weights."""
    right = bridge.rotary.inverse_frequencies
    with pytest.MonkeyPatch.context() as patch:

        def rounded(provider: GPTModelProvider, length: int = 0) -> torch.Tensor:
            return right(provider, length).to(getattr(torch, provider.params_dtype))

        patch.setattr(bridge.rotary, "inverse_frequencies", rounded)
        yield


def caught(*gates: str | set[str]) -> frozenset[str]:
    return frozenset().union(*({gate} if isinstance(gate, str) else gate for gate in gates))


REFUSED = frozenset(GATES) - {"files", "config keys", "coverage", "tied copies", "reload"}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": LLAMA3_ROPE["rope_theta"]}
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

MUTATIONS = (
    Mutation("two norms swapped", caught("digests", SEEN), on_weights(swap(*NORMS))),
    Mutation("query heads permuted", caught("digests", SEEN), on_weights(permute_heads)),
    Mutation("gate and up swapped", caught("digests", SEEN), on_weights(swap(GATE, UP))),
    Mutation("one k_proj zeroed", caught("digests", SEEN), on_weights(lambda w: w[K].zero_())),
    Mutation(
        "one value of a weight doubled",
        caught("digests", FP32),
        on_weights(lambda w: w[DOWN][3, 5].mul_(2)),
    ),
    Mutation(
        "one bit of a weight flipped",
        caught("digests"),
        on_weights(lambda w: w[K].view(torch.int16)[3, 5].bitwise_xor_(1)),
    ),
    Mutation(
        "one tensor in another dtype",
        caught("digests"),
        put_tensor(K, lambda weights: weights[K].float()),
    ),
    Mutation(
        "final norm larger by 7 %",
        caught("digests", "logits fp32", "logits bf16"),
        on_weights(lambda w: w["model.norm.weight"].mul_(1.07)),
    ),
    Mutation(
        "a NaN in the final norm",
        caught("digests", "logits fp32", "logits bf16"),
        on_weights(lambda w: w["model.norm.weight"][0].fill_(float("nan"))),
    ),
    Mutation(
        "all that is added to the residual doubled",
        caught("digests", "hidden fp32", "hidden bf16"),
        on_weights(double_residual),
        settings={"rms_norm_eps": 1e-9},
    ),
    Mutation(
        "rope base shifted",
        caught("settings", SEEN),
        on_config(rope_parameters={**LLAMA3_ROPE, "rope_theta": 10000.0}),
    ),
    Mutation(
        "rope scaling dropped",
        caught("settings", SEEN),
        on_config(rope_parameters=DEFAULT_ROPE),
    ),
    Mutation("norm epsilon changed", caught("settings", FP32), on_config(rms_norm_eps=1e-5)),
    Mutation(
        "sliding window changed beyond the prompts",
        caught("settings"),
        on_config(sliding_window=200),
        family="mistral",
        settings={"sliding_window": 100},
    ),
    Mutation(
        "a config key that nobody knows",
        caught("config keys"),
        on_config(attention_multiplier=2.0),
        not_reached=REFUSED,
    ),
    Mutation(
        "a config value that the family refuses",
        caught("config keys", "reload"),
        on_config(attention_bias=True),
        not_reached=REFUSED,
    ),
    Mutation(
        "a number in quotes",
        caught("config keys", "reload"),
        on_config(rms_norm_eps="1e-06"),
        not_reached=REFUSED,
    ),
    Mutation(
        "another rope scaling in the former spelling",
        caught("config keys"),
        on_config(rope_scaling={"rope_type": "linear", "factor": 4.0}),
        not_reached=REFUSED,
    ),
    Mutation(
        "padding token outside the vocabulary",
        caught("reload"),
        on_config(pad_token_id=5000),
        not_reached=frozenset(SEEN),
    ),
    Mutation(
        "a smaller vocabulary in the config",
        caught("coverage", "reload"),
        on_config(vocab_size=128),
        not_reached=REFUSED,
    ),
    Mutation(
        "the last tokens cut off as padding",
        caught("settings", "digests", "logits fp32", "logits bf16"),
        cut_vocabulary,
        not_reached=frozenset({"hidden fp32", "hidden bf16"}),
    ),
    Mutation(
        "Megatron end: fewer tokens in model.json",
        caught("coverage"),
        megatron=claim_vocabulary(128),
        not_reached=REFUSED,
    ),
    Mutation(
        "Megatron end: more tokens in model.json",
        caught("coverage"),
        megatron=claim_vocabulary(200),
        not_reached=REFUSED,
    ),
    Mutation("a tensor in two shards", caught("files"), put_into_two_shards, not_reached=REFUSED),
    Mutation("a shard cut short", caught("files", "reload"), cut_short, not_reached=REFUSED),
    Mutation(
        "a tensor dropped",
        caught("coverage", "reload"),
        put_tensor(K, lambda weights: None),
        not_reached=REFUSED,
    ),
    Mutation(
        "a tensor added",
        caught("coverage", "reload"),
        put_tensor(f"{LAYER}.self_attn.k_norm.weight", lambda weights: torch.ones(16)),
        not_reached=REFUSED,
    ),
    Mutation(
        "a tensor of another shape",
        caught("coverage", "reload"),
        put_tensor(K, lambda weights: weights[K][:32]),
        not_reached=REFUSED,
    ),
    Mutation(
        "a tensor in a dtype that weights do not have",
        caught("coverage"),
        put_tensor(K, lambda weights: weights[K].double()),
        not_reached=REFUSED,
    ),
    Mutation(
        "untied in the config only",
        caught("coverage", "reload"),
        on_config(tie_word_embeddings=False),
        settings={"tie_word_embeddings": True},
        not_reached=REFUSED,
    ),
    Mutation(
        "a stored copy of the tied embedding differs",
        caught("tied copies"),
        put_tensor(LM_HEAD, lambda weights: weights[EMBEDDING] * 2),
        settings={"tie_word_embeddings": True},
        not_reached=REFUSED,
    ),
    Mutation(
        "experts permuted",
        caught("digests", SEEN),
        on_weights(permute_experts),
        family="qwen3_moe",
    ),
    Mutation("rule: keys and values exchanged", caught(SEEN), rule=keys_and_values_exchanged),
    Mutation("rule: up above gate", caught(SEEN), rule=up_above_gate),
    Mutation("rule: rope scaling ignored", caught(SEEN), rule=rope_scaling_ignored),
    Mutation(
        "model: rotary embedding in 16 bits",
        caught(BF16),
        rule=rotary_in_16_bits,
        prompt_length=400,
    ),
)


def as_markdown(mutations: tuple[Mutation, ...] = MUTATIONS) -> str:
    """Return the table of the documentation: ● caught, empty not caught, – not reached."""
    head = ["fault", *GATES]
    rows = [
        [
            each.fault,
            *("●" if g in each.caught_by else "–" if g in each.not_reached else "" for g in GATES),
        ]
        for each in mutations
    ]
    lines = [head, ["---", *(":-:" for _ in GATES)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
