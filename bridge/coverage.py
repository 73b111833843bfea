"""Coverage: the tensors of a checkpoint are exactly those that its config and its family declare."""

from collections.abc import Iterable

from bridge.byte_copy import BUFFER_SIZE, OpenFiles, read_into
from bridge.dtypes import WEIGHT_DTYPES
from bridge.errors import CheckpointError, CoverageError
from bridge.hf_checkpoint import HfCheckpoint
from bridge.mapping import WeightPlan
from bridge.quantization import HfTensor, stored_slices
from bridge.shard_header import TensorSlice
from bridge.torch_dist.metadata import StoredTensor
from bridge.vocab_padding import PADDED_KEYS, VocabPadding


def check_hf_coverage(plan: WeightPlan, checkpoint: HfCheckpoint) -> None:
    """Compare a Hugging Face folder with its plan: names, shapes, dtypes, and copies of tied tensors."""
    found = {name: tensor for name, tensor in checkpoint.tensors.items() if not plan.is_buffer(name)}
    where = str(checkpoint.path)
    _check_names(plan.hf_shapes, set(found) - set(plan.tied), where)
    for name, shape in plan.hf_shapes.items():
        if found[name].shape != shape:
            raise CoverageError(
                f"{where}: {name!r} has shape {list(found[name].shape)}, its config says {list(shape)}"
            )
        _check_dtype(name, found[name].dtype, where)
    for copy, original in plan.tied.items():
        if copy in found:
            reason = IN_PREDICTION if copy in plan.copies else BY_CONFIG
            _check_copy(copy, found[copy], original, found[original], reason)


def check_megatron_coverage(
    plan: WeightPlan, stored: dict[str, StoredTensor], padding: VocabPadding, where: str
) -> None:
    """Compare the model tensors of a Megatron checkpoint with its plan: names, shapes and dtypes.

    The vocabulary may have the rows beyond it that `padding` explains.
    """
    _check_names(plan.megatron_shapes, stored, where)
    for key, shape in plan.megatron_shapes.items():
        found = stored[key].shape
        if key in PADDED_KEYS and found[1:] == shape[1:]:
            check_vocabulary(key, found[0], shape[0], padding, where)
        elif found != shape:
            raise CoverageError(f"{where}: {key!r} has shape {list(found)}, its model says {list(shape)}")
        _check_dtype(key, stored[key].dtype, where)


def check_vocabulary(key: str, rows: int, vocab_size: int, padding: VocabPadding, where: str) -> None:
    """Raise CoverageError unless a tensor's rows are those of the vocabulary and its padding."""
    if complaint := padding.complaint(rows, vocab_size):
        raise CoverageError(
            f"{where}: {key!r} has {complaint}: the config must be that of the model that was saved"
        )


# Released configs keep the number of prediction layers whether or not the weights have them: transformers
# saves none.
FEWER_PREDICTION_LAYERS = (
    "; its config promises more layers of multi-token prediction than it has: set num_nextn_predict_layers to"
    " 0 if it comes without them"
)
MORE_PREDICTION_LAYERS = (
    "; it has more layers of multi-token prediction than its config says: set num_nextn_predict_layers to"
    " their number, or to 0 and take their tensors out"
)

# As those of an embedding model (Qwen3-Embedding), which in its larger sizes has no output layer either.
WITHOUT_PREFIX = (
    "; its names lack 'model.', which those of a language model have: load it by AutoModelForCausalLM and"
    " save it anew"
)
WITHOUT_OUTPUT = (
    "; it has no output layer, so it is no language model, unless its embedding is that as well: then set"
    " tie_word_embeddings to true"
)


def _check_names(declared: Iterable[str], found: Iterable[str], where: str) -> None:
    if missing := sorted(set(declared) - set(found)):
        hint = _reason(missing, sorted(set(declared) - {f"model.{name}" for name in found}))
        raise CoverageError(
            f"{where} lacks {_first_of(missing)}: the checkpoint is not of the model it names{hint}"
        )
    if left_over := sorted(set(found) - set(declared)):
        hint = MORE_PREDICTION_LAYERS if _predict(left_over) else ""
        raise CoverageError(f"{where} holds {_first_of(left_over)}, for which the family has no rule{hint}")


def _reason(missing: list[str], missing_with_prefix: list[str]) -> str:
    """Say why a released checkpoint may lack tensors, or would with 'model.' in front of its names."""
    if _predict(missing):
        return FEWER_PREDICTION_LAYERS
    if ["lm_head.weight"] in (missing, missing_with_prefix):
        return WITHOUT_OUTPUT
    return "" if missing_with_prefix else WITHOUT_PREFIX


def _predict(names: Iterable[str]) -> bool:
    """Say whether a projection is among the tensors that, at both ends, only a prediction layer has."""
    return any(name.endswith(".eh_proj.weight") for name in names)


def _first_of(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _check_dtype(name: str, dtype: str, where: str) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise CoverageError(f"{where}: {name!r} has dtype {dtype}: allowed are {', '.join(WEIGHT_DTYPES)}")


BY_CONFIG = "with which config.json ties it: set tie_word_embeddings to false if the weights are right"
IN_PREDICTION = "of which Megatron's multi-token prediction can only use a copy"


def _check_copy(name: str, tensor: HfTensor, original_name: str, original: HfTensor, reason: str) -> None:
    """A tied tensor that is stored as well must be the same, or one of the two would be lost."""
    stored, others = stored_slices(tensor), stored_slices(original)
    same = (tensor.shape, tensor.dtype, len(stored)) == (original.shape, original.dtype, len(others))
    if not same or not all(map(_equal_bytes, stored, others)):
        raise CheckpointError(f"{stored[0].file}: {name!r} differs from {original_name!r}, {reason}")


def _equal_bytes(a: TensorSlice, b: TensorSlice) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    views = memoryview(bytearray(BUFFER_SIZE)), memoryview(bytearray(BUFFER_SIZE))
    with OpenFiles() as files:
        for start in range(0, a.nbytes, BUFFER_SIZE):
            size = min(BUFFER_SIZE, a.nbytes - start)
            for tensor, view in zip((a, b), views, strict=True):
                with files.opened(tensor.file) as descriptor:
                    read_into(descriptor, [view[:size]], tensor.offset + start)
            if views[0][:size] != views[1][:size]:
                return False
    return True
