"""The vocabulary of a live model, of which Megatron Core itself only knows the padded size."""

from collections.abc import Iterable, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model

from bridge.errors import CoverageError
from bridge.provider import GPTModelProvider
from bridge.shards import Box
from bridge.vocab_padding import EMBEDDING, VocabPadding

ATTRIBUTE = "unpadded_vocab_size"


def note_vocab_size(model: GPTModel, vocab_size: int) -> None:
    """Let a model chunk remember how many of its embedding's rows are tokens."""
    setattr(model, ATTRIBUTE, vocab_size)


def noted_vocab_size(chunks: Sequence[torch.nn.Module]) -> int | None:
    """Return the vocabulary of a model; None for one that was not built by a provider of ours."""
    size = vars(unwrap_model(list(chunks))[0]).get(ATTRIBUTE)
    return None if size is None else int(size)


def num_rows(boxes: Iterable[Box]) -> int:
    """Return the rows of a model's embedding, padding included, from all ranks' boxes."""
    return max(box.offsets[0] + box.sizes[0] for box in boxes if box.key == EMBEDDING)


def padded_vocab_size(chunks: Sequence[torch.nn.Module]) -> int:
    """Return the rows of a model's embedding, which each of its chunks knows."""
    return int(unwrap_model(list(chunks))[0].vocab_size)


def check_own_vocabulary(chunks: Sequence[torch.nn.Module], provider: GPTModelProvider) -> int:
    """Return how many rows a model's embedding has beyond its vocabulary, which must be the provider's."""
    rows = padded_vocab_size(chunks)
    check_same_vocabulary(noted_vocab_size(chunks), rows, provider.vocab_size, "the config to save it with")
    return rows - provider.vocab_size


def check_same_vocabulary(noted: int | None, rows: int, vocab_size: int, what: str) -> None:
    """Raise CoverageError unless a model has the vocabulary of `what`.

    Where it is not noted, the model's rows have to be a usual padding of it.
    """
    if noted is not None and noted != vocab_size:
        raise CoverageError(f"the model has a vocabulary of {noted} tokens, {what} one of {vocab_size}")
    if noted is None and (complaint := VocabPadding().complaint(rows, vocab_size)):
        raise CoverageError(f"the model's embedding has {complaint}, that of {what}")
