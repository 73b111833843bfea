"""Weight rules: which rows of which Hugging Face tensor are which rows of which global Megatron tensor.

A rule is written once and read in both directions. It speaks of whole tensors only; tensor, pipeline and
expert parallelism are Megatron's business, which knows each rank's slice of the global tensor.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from bridge.provider import GPTModelProvider

Shape = tuple[int, ...]
Dimension = str | int
"""A number, a field of the provider ("hidden_size"), or one of SIZES ("query_size")."""


class Block(NamedTuple):
    """`rows` rows of Hugging Face tensor `hf` from `hf_row` on are rows `megatron_row` on of `key[lead]`.

    `lead` is the index into the leading axes of the global Megatron tensor: (layer,) for decoder layers,
    () for tensors that exist once.
    """

    hf: str
    hf_row: int
    rows: int
    key: str
    lead: tuple[int, ...]
    megatron_row: int


SIZES = {
    "query_size": lambda p: p.num_attention_heads * p.kv_channels,
    "key_value_size": lambda p: p.num_query_groups * p.kv_channels,
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
    """One Megatron parameter; `*` in a name stands for the layer number on both sides."""

    megatron_param: str

    @property
    def key(self) -> str:
        """Name of the global tensor in a checkpoint: layers are a leading axis, not part of the name."""
        return self.megatron_param.replace(".*", "", 1)

    @abstractmethod
    def pieces(self, provider: GPTModelProvider) -> Iterator[tuple[str, int, int, int]]:
        """Yield (hf name, hf row, rows, megatron row) for one layer, in the order of Megatron's rows."""

    @abstractmethod
    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        """Return the shape of every Hugging Face tensor that this rule maps, by name."""

    def leads(self, provider: GPTModelProvider) -> list[tuple[int, ...]]:
        """Return every index into the leading axes."""
        return [(layer,) for layer in range(provider.num_layers)] if "*" in self.megatron_param else [()]

    def lead_shape(self, provider: GPTModelProvider) -> Shape:
        return (provider.num_layers,) if "*" in self.megatron_param else ()

    def megatron_shape(self, provider: GPTModelProvider) -> Shape:
        """Return the shape of the global Megatron tensor, leading axes included."""
        shapes = list(self.hf_shapes(provider).values())
        rows = sum(shape[0] for shape in shapes)
        return (*self.lead_shape(provider), rows, *shapes[0][1:])


def at_lead(name: str, lead: tuple[int, ...]) -> str:
    """Fill the `*`s of a name with the numbers of `lead`."""
    for number in lead:
        name = name.replace("*", str(number), 1)
    return name


@dataclass(frozen=True)
class DirectMapping(Mapping):
    """The same tensor on both sides."""

    hf_param: str
    shape: tuple[Dimension, ...]

    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        return {self.hf_param: tuple(resolve(dimension, provider) for dimension in self.shape)}

    def pieces(self, provider: GPTModelProvider) -> Iterator[tuple[str, int, int, int]]:
        yield self.hf_param, 0, self.hf_shapes(provider)[self.hf_param][0], 0


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

    def pieces(self, provider: GPTModelProvider) -> Iterator[tuple[str, int, int, int]]:
        head = provider.kv_channels
        queries = provider.num_attention_heads // provider.num_query_groups * head
        for group in range(provider.num_query_groups):
            row = group * (queries + 2 * head)
            yield self.q, group * queries, queries, row
            yield self.k, group * head, head, row + queries
            yield self.v, group * head, head, row + queries + head


@dataclass(frozen=True)
class GatedMLPMapping(Mapping):
    """Gate and up projections, the gate above the up projection in the global tensor."""

    gate: str
    up: str
    shape: tuple[Dimension, ...] = ("ffn_hidden_size", "hidden_size")

    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        shape = tuple(resolve(dimension, provider) for dimension in self.shape)
        return {self.gate: shape, self.up: shape}

    def pieces(self, provider: GPTModelProvider) -> Iterator[tuple[str, int, int, int]]:
        rows = resolve(self.shape[0], provider)
        yield self.gate, 0, rows, 0
        yield self.up, 0, rows, rows


@dataclass
class WeightPlan:
    """Every block between the two ends of one model, with the shapes that both ends must have."""

    blocks: list[Block] = field(default_factory=list)
    hf_shapes: dict[str, Shape] = field(default_factory=dict)
    megatron_shapes: dict[str, Shape] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    """Hugging Face names that a checkpoint may hold as a copy of another: {"lm_head.weight": embedding}."""
    buffers: tuple[str, ...] = ()
    """Patterns of names that older checkpoints carry and that hold no weight."""

    def is_buffer(self, name: str) -> bool:
        """Say whether a Hugging Face tensor is one of the listed buffers without weight."""
        return any(re.fullmatch(re.escape(p).replace(r"\*", r"\d+"), name) for p in self.buffers)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.megatron_shapes.values())


class MegatronMappingRegistry:
    """The weight rules of one family."""

    def __init__(self, *mappings: Mapping, buffers: tuple[str, ...] = ()) -> None:
        self.mappings = mappings
        self.buffers = buffers

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
            else:
                self._add(plan, mapping, provider)
        return plan

    def _add(self, plan: WeightPlan, mapping: Mapping, provider: GPTModelProvider) -> None:
        shapes, pieces = mapping.hf_shapes(provider), list(mapping.pieces(provider))
        plan.megatron_shapes[mapping.key] = mapping.megatron_shape(provider)
        for lead in mapping.leads(provider):
            plan.hf_shapes.update({at_lead(name, lead): shape for name, shape in shapes.items()})
            plan.blocks.extend(
                Block(at_lead(name, lead), hf_row, rows, mapping.key, lead, megatron_row)
                for name, hf_row, rows, megatron_row in pieces
            )
