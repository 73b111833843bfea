"""Weight rules: which rows of which Hugging Face tensor are which rows of which global Megatron tensor.

A rule is written once and read in both directions. It speaks of whole tensors only; tensor, pipeline and
expert parallelism are Megatron's business, which knows each rank's slice of the global tensor.
"""

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from bridge.provider import GPTModelProvider

Shape = tuple[int, ...]
Dimension = str | int
"""A number, a field of the provider ("hidden_size"), or one of SIZES ("query_size")."""


class Block(NamedTuple):
    """`rows` rows of `key[lead]` from `megatron_row` on are rows hf_row, hf_row + hf_step, ... of `hf`.

    Both sides are seen as rows of equal length. Megatron's axes after `lead` are rows and columns; the
    Hugging Face tensor is flattened to rows of as many columns, with its last two axes swapped before if it
    is one of `WeightPlan.transposed`. `lead` is the index into the leading axes of the global Megatron
    tensor: (layer,) or (layer, expert); () for tensors that exist once.
    """

    hf: str
    hf_row: int
    rows: int
    key: str
    lead: tuple[int, ...]
    megatron_row: int
    hf_step: int = 1


class Piece(NamedTuple):
    """A block of one place, before layer and expert are known: `hf` has `*` for their numbers."""

    hf: str
    hf_row: int
    rows: int
    megatron_row: int
    hf_step: int = 1


class Place(NamedTuple):
    """Where a rule holds: its key and lead on Megatron's side, the numbers for the `*`s of the other."""

    key: str
    lead: tuple[int, ...]
    numbers: tuple[int, ...]
    expert: int = 0


LAYERS: dict[str, Callable[[GPTModelProvider], list[int]]] = {
    "all": lambda p: list(range(p.num_layers)),
    "dense": lambda p: [layer for layer, moe in enumerate(p.moe_layers) if not moe],
    "moe": lambda p: [layer for layer, moe in enumerate(p.moe_layers) if moe],
    "mtp": lambda p: list(range(p.mtp_num_layers or 0)),
    "mtp dense": lambda p: [] if p.moe_layers[-1] else list(range(p.mtp_num_layers or 0)),
    "mtp moe": lambda p: list(range(p.mtp_num_layers or 0)) if p.moe_layers[-1] else [],
}
"""Which layers a rule is for: of the decoder, or of multi-token prediction behind it.

A layer of the latter kind is like the decoder's last one. Megatron counts them from 0, Hugging Face goes on
counting.
"""


SIZES = {
    "query_size": lambda p: p.num_attention_heads * p.kv_channels,
    "key_value_size": lambda p: p.num_query_groups * p.kv_channels,
    "gate_and_up_size": lambda p: 2 * p.ffn_hidden_size,
    "expert_size": lambda p: p.moe_ffn_hidden_size or p.ffn_hidden_size,
    # of latent attention: all heads' queries; the latent and the rotated key; all heads' keys and values
    "latent_query_size": lambda p: p.num_attention_heads * (p.qk_head_dim + p.qk_pos_emb_head_dim),
    "latent_size": lambda p: p.kv_lora_rank + p.qk_pos_emb_head_dim,
    "latent_key_value_size": lambda p: p.num_attention_heads * (p.qk_head_dim + p.v_head_dim),
    "latent_value_size": lambda p: p.num_attention_heads * p.v_head_dim,
    # of multi-token prediction: an embedding and a hidden state side by side
    "prediction_input_size": lambda p: 2 * p.hidden_size,
}


def resolve(dimension: Dimension, provider: GPTModelProvider) -> int:
    """Return the number that a dimension stands for in this model."""
    if isinstance(dimension, int):
        return dimension
    if dimension in SIZES:
        return SIZES[dimension](provider)
    return int(getattr(provider, dimension))


@dataclass(frozen=True)
class Mapping(ABC):
    """One Megatron parameter; `*` in a name stands for the layer number on both sides.

    `layers` is one of LAYERS. With `experts` the parameter exists once for each expert: an axis of the
    global Megatron tensor, a second `*` in Hugging Face names. With `fused` the Hugging Face tensor has that
    axis too, and the rule's shapes are those of one expert. With `transposed` it stores the last two axes in
    the other order. `when` names a provider field that must be set for the parameter to exist ("not FIELD":
    unset).
    """

    megatron_param: str
    layers: str = field(default="all", kw_only=True)
    experts: bool = field(default=False, kw_only=True)
    fused: bool = field(default=False, kw_only=True)
    transposed: bool = field(default=False, kw_only=True)
    when: str = field(default="", kw_only=True)

    @abstractmethod
    def pieces(self, provider: GPTModelProvider) -> Iterator[Piece]:
        """Yield the pieces of one place, in the order of Megatron's rows."""

    @abstractmethod
    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        """Return the shape, one expert's if fused, of every Hugging Face tensor that this rule maps, by name.

        Axes are in Megatron's order, whether or not the tensor is stored transposed.
        """

    def applies(self, provider: GPTModelProvider) -> bool:
        """Say whether a model has this parameter at all."""
        name = self.when.removeprefix("not ")
        return not name or bool(getattr(provider, name)) != self.when.startswith("not ")

    def places(self, provider: GPTModelProvider) -> Iterator[Place]:
        """Yield every layer and expert that the rule holds for."""
        layers = LAYERS[self.layers](provider) if "*" in self.megatron_param else [None]
        experts = range(provider.num_moe_experts or 0) if self.experts else [None]
        for layer, expert in itertools.product(layers, experts):
            key, lead = self._key_and_lead(provider, layer)
            hf_layer = None if layer is None else layer + self._first_hf_layer(provider)
            numbers = tuple(number for number in (hf_layer, expert) if number is not None)
            yield Place(key, lead if expert is None else (*lead, expert), numbers, expert or 0)

    def _key_and_lead(self, provider: GPTModelProvider, layer: int | None) -> tuple[str, tuple[int, ...]]:
        """Megatron gives layers that are all alike one tensor with a leading axis, others a key each."""
        if layer is None:
            return self.megatron_param, ()
        if self._stacked(provider):
            return self.megatron_param.replace(".*", "", 1), (layer,)
        return self.megatron_param.replace("*", str(layer), 1), ()

    @property
    def _predicts(self) -> bool:
        return self.layers.startswith("mtp")

    def _first_hf_layer(self, provider: GPTModelProvider) -> int:
        return provider.num_layers if self._predicts else 0

    def _stacked(self, provider: GPTModelProvider) -> bool:
        return "*" in self.megatron_param and provider.homogeneous_layers and not self._predicts

    def lead_shape(self, provider: GPTModelProvider) -> Shape:
        layers = (provider.num_layers,) if self._stacked(provider) else ()
        return (*layers, provider.num_moe_experts or 0) if self.experts else layers

    def megatron_shape(self, provider: GPTModelProvider) -> Shape:
        """Return the shape of the global Megatron tensor, leading axes included."""
        shapes = list(self.hf_shapes(provider).values())
        rows = sum(shape[0] for shape in shapes)
        return (*self.lead_shape(provider), rows, *shapes[0][1:])

    def stored_shape(self, shape: Shape, provider: GPTModelProvider) -> Shape:
        """Return the shape that a Hugging Face file has for a tensor of this rule."""
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return (provider.num_moe_experts or 0, *shape) if self.fused else shape


def at_lead(name: str, numbers: tuple[int, ...]) -> str:
    """Fill the `*`s of a name with `numbers`, as many as it has."""
    for number in numbers:
        name = name.replace("*", str(number), 1)
    return name


@dataclass(frozen=True)
class DirectMapping(Mapping):
    """The same tensor on both sides."""

    hf_param: str
    shape: tuple[Dimension, ...]

    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        return {self.hf_param: tuple(resolve(dimension, provider) for dimension in self.shape)}

    def pieces(self, provider: GPTModelProvider) -> Iterator[Piece]:
        yield Piece(self.hf_param, 0, self.hf_shapes(provider)[self.hf_param][0], 0)


@dataclass(frozen=True)
class OutputMapping(DirectMapping):
    """The output projection, which a model with tied embeddings does not have of its own."""

    tied_to: str


@dataclass(frozen=True)
class QKVMapping(Mapping):
    """Query, key and value projections, interleaved by query group.

    Megatron's rows of group g are [queries of g | key g | value g], each head `kv_channels` rows
    (megatron/core/transformer/attention.py, SelfAttention.get_query_key_value_tensors). `columns` is
    ("hidden_size",) for weights and () for biases.
    """

    q: str
    k: str
    v: str
    columns: tuple[Dimension, ...] = ("hidden_size",)

    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        columns = tuple(resolve(dimension, provider) for dimension in self.columns)
        query, key_value = resolve("query_size", provider), resolve("key_value_size", provider)
        return {self.q: (query, *columns), self.k: (key_value, *columns), self.v: (key_value, *columns)}

    def pieces(self, provider: GPTModelProvider) -> Iterator[Piece]:
        head = provider.kv_channels
        queries = provider.num_attention_heads // provider.num_query_groups * head
        for group in range(provider.num_query_groups):
            row = group * (queries + 2 * head)
            yield Piece(self.q, group * queries, queries, row)
            yield Piece(self.k, group * head, head, row + queries)
            yield Piece(self.v, group * head, head, row + queries + head)


@dataclass(frozen=True)
class FusedQKVMapping(Mapping):
    """The same of one Hugging Face tensor that has all queries above all keys above all values (Phi-3)."""

    hf_param: str

    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        rows = resolve("query_size", provider) + 2 * resolve("key_value_size", provider)
        return {self.hf_param: (rows, provider.hidden_size)}

    def pieces(self, provider: GPTModelProvider) -> Iterator[Piece]:
        above = {"q": 0, "k": resolve("query_size", provider)}
        above["v"] = above["k"] + resolve("key_value_size", provider)
        for piece in QKVMapping(self.megatron_param, "q", "k", "v").pieces(provider):
            yield piece._replace(hf=self.hf_param, hf_row=above[piece.hf] + piece.hf_row)


@dataclass(frozen=True)
class GatedMLPMapping(Mapping):
    """Gate and up projections, the gate above the up projection in the global tensor."""

    gate: str
    up: str
    shape: tuple[Dimension, ...] = ("ffn_hidden_size", "hidden_size")

    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        shape = tuple(resolve(dimension, provider) for dimension in self.shape)
        return {self.gate: shape, self.up: shape}

    def pieces(self, provider: GPTModelProvider) -> Iterator[Piece]:
        rows = resolve(self.shape[0], provider)
        yield Piece(self.gate, 0, rows, 0)
        yield Piece(self.up, 0, rows, rows)


@dataclass
class WeightPlan:
    """Every block between the two ends of one model, with the shapes that both ends must have."""

    blocks: list[Block] = field(default_factory=list)
    hf_shapes: dict[str, Shape] = field(default_factory=dict)
    megatron_shapes: dict[str, Shape] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    """Hugging Face names that a checkpoint may hold as a copy of another: {"lm_head.weight": embedding}."""
    copies: frozenset[str] = frozenset()
    """Those of the tied names that an export writes as well, for who serves the model."""
    buffers: tuple[str, ...] = ()
    """Patterns of names that older checkpoints carry and that hold no weight."""
    transposed: frozenset[str] = frozenset()
    """Hugging Face names whose last two axes are stored in the other order than the blocks count rows in."""

    rules: dict[str, str] = field(default_factory=dict)
    """The kind of rule and the Megatron tensor that carry each Hugging Face tensor, for people."""

    def columns(self, key: str, lead: tuple[int, ...]) -> Shape:
        """Return the shape of one row of `key[lead]`, and of the Hugging Face rows that it is made of."""
        return self.megatron_shapes[key][len(lead) + 1 :]

    def rows_shape(self, name: str) -> Shape:
        """Return the shape of a Hugging Face tensor as the blocks see it, before it is flattened to rows."""
        shape = self.hf_shapes[name]
        return (*shape[:-2], shape[-1], shape[-2]) if name in self.transposed else shape

    def is_buffer(self, name: str) -> bool:
        """Say whether a Hugging Face tensor is one of the listed buffers without weight."""
        return any(re.fullmatch(re.escape(p).replace(r"\*", r"\d+"), name) for p in self.buffers)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.megatron_shapes.values())


class MegatronMappingRegistry:
    """The weight rules of one family."""

    def __init__(
        self, *mappings: Mapping, buffers: tuple[str, ...] = (), copies: dict[str, str] | None = None
    ) -> None:
        """`copies` are tensors of multi-token prediction layers that equal one of the main model."""
        self.mappings = mappings
        self.buffers = buffers
        self.copies = copies or {}

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self.mappings)

    def megatron_to_hf_lookup(self, megatron_param: str) -> Mapping | None:
        """Return the rule of a Megatron parameter such as "decoder.layers.3.mlp.linear_fc2.weight"."""
        pattern = re.sub(r"\.\d+\.", ".*.", megatron_param)
        return next((m for m in self.mappings if m.megatron_param == pattern), None)

    def plan(self, provider: GPTModelProvider) -> WeightPlan:
        """Spell the rules out for one model."""
        plan = WeightPlan(buffers=self.buffers)
        for mapping in self.mappings:
            if isinstance(mapping, OutputMapping) and provider.share_embeddings_and_output_weights:
                plan.tied[mapping.hf_param] = mapping.tied_to
            elif mapping.applies(provider):
                self._add(plan, mapping, provider)
        for layer in LAYERS["mtp"](provider):
            for name, original in self.copies.items():
                name = at_lead(name, (provider.num_layers + layer,))
                plan.tied[name] = plan.tied.get(original, original)
                plan.copies |= {name}
        return plan

    def _add(self, plan: WeightPlan, mapping: Mapping, provider: GPTModelProvider) -> None:
        if not (places := list(mapping.places(provider))):
            return  # sizes of what a model does not have are unset
        shapes, pieces = mapping.hf_shapes(provider), list(mapping.pieces(provider))
        stored = {name: mapping.stored_shape(shape, provider) for name, shape in shapes.items()}
        megatron_shape = mapping.megatron_shape(provider)
        num_columns = math.prod(megatron_shape[len(mapping.lead_shape(provider)) + 1 :])
        # A fused tensor has the rows of all experts one below the other.
        skip = {n: math.prod(s) // num_columns if mapping.fused else 0 for n, s in shapes.items()}
        for place in places:
            plan.megatron_shapes[place.key] = megatron_shape
            names = {name: at_lead(name, place.numbers) for name in shapes}
            plan.hf_shapes.update({names[name]: shape for name, shape in stored.items()})
            plan.rules.update(dict.fromkeys(names.values(), f"{type(mapping).__name__} {place.key}"))
            if mapping.transposed:
                plan.transposed |= set(names.values())
            plan.blocks.extend(
                Block(
                    names[piece.hf],
                    piece.hf_row + place.expert * skip[piece.hf],
                    piece.rows,
                    place.key,
                    place.lead,
                    piece.megatron_row,
                    piece.hf_step,
                )
                for piece in pieces
            )
