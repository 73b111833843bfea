"""Rows behind the vocabulary, which training adds until all ranks can share it: how many there may be."""

from collections.abc import Iterable
from dataclasses import dataclass

# The only tensors with such rows.
PADDED_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
EMBEDDING = PADDED_KEYS[0]  # which every model has

# Megatron's make_vocab_size_divisible_by (megatron/training/arguments.py) and tensor parallel sizes, whose
# product a padded vocabulary is a multiple of.
DEFAULT_MULTIPLE = 128
USUAL_SIZES = (1, 2, 4, 8, 16, 32, 64)


def padded(vocab_size: int, multiple: int) -> int:
    """Return the next multiple, as Megatron pads a vocabulary (megatron/training/tokenizer/tokenizer.py)."""
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class VocabPadding:
    """What a checkpoint says of its padding.

    `num_rows` are recorded by whoever saved it. Without that record a vocabulary may be padded to
    `divisible_by` times a tensor parallel size. `num_tokens` and `total` are from the arguments of plain
    Megatron-LM: the vocabulary, which may be without its end of document, and the padded one.
    """

    num_rows: int | None = None
    divisible_by: int = DEFAULT_MULTIPLE
    tensor_sizes: tuple[int, ...] = USUAL_SIZES
    num_tokens: int | None = None
    total: int | None = None

    def explains(self, rows: int, vocab_size: int) -> bool:
        """Say whether `rows` are this vocabulary and its padding; what is none would be cut off unseen."""
        if self.num_rows is not None:
            return rows == vocab_size + self.num_rows
        if self.total is not None and rows != self.total:
            return False
        if rows != vocab_size and not self._is_trained(vocab_size):
            return False
        return rows in self._possible(vocab_size)

    def _is_trained(self, vocab_size: int) -> bool:
        return self.num_tokens is None or vocab_size in (self.num_tokens, self.num_tokens + 1)

    def _possible(self, vocab_size: int) -> Iterable[int]:
        yield vocab_size
        for size in self.tensor_sizes:
            yield padded(vocab_size, self.divisible_by * size)

    def complaint(self, rows: int, vocab_size: int) -> str:
        """Return what is wrong, if anything is, as the end of a message."""
        if self.explains(rows, vocab_size):
            return ""
        found = f"{rows} rows for a vocabulary of {vocab_size}"
        if self.num_rows is not None:
            return f"{found} and {self.num_rows} recorded as padding"
        if self.total is not None and rows != self.total:
            return f"{found}, its arguments say {self.total}"
        if not self._is_trained(vocab_size):
            return f"{found}, its arguments say {self.num_tokens} tokens"
        return (
            f"{found}, which is no padding to a multiple of {self.divisible_by} times a tensor parallel size"
        )
