"""Which documents a run reads: datasets with weights, divided into splits. Checked without torch."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import ConfigError
from training.dataset_record import Dataset, find_dataset

if TYPE_CHECKING:
    from training.config import DatasetConfig

SPLITS = ("train", "valid", "test")
FORMS = 'paths, {"path": ..., "weight": ...}, or weight, path, weight, path, ... as Megatron takes them'


@dataclass(frozen=True)
class Part:
    """The documents from `begin` to `end` of an indexed dataset, and its share of the samples."""

    prefix: Path
    index_digest: str
    begin: int
    end: int
    tokens: int
    weight: float


def check_settings(config: "DatasetConfig") -> None:
    """Refuse by ConfigError what can be seen without the files."""
    parse_blend(config.blend, "dataset.blend")
    for split, value in (config.blend_per_split or {}).items():
        if split not in SPLITS:
            raise ConfigError(f"dataset.blend_per_split names {split!r}: allowed are {', '.join(SPLITS)}")
        parse_blend(value, f"dataset.blend_per_split.{split}")
    if config.blend and config.blend_per_split:
        raise ConfigError("dataset.blend and dataset.blend_per_split are both given: leave one out")
    if config.split is not None:
        parse_split(config.split)
        if config.blend_per_split:
            raise ConfigError("dataset.split divides the datasets of dataset.blend, not blend_per_split's")


def parse_blend(value: Any, name: str) -> list[tuple[str, float | None]]:
    """Return paths and weights of a blend in any of its FORMS; None is a weight by number of tokens."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} is {value!r}: expected a list of {FORMS}")
    if len(value) == 2 and isinstance(
        value[0], list | tuple
    ):  # Megatron Core's own: paths, then weights or null
        weights = value[1] or [None] * len(value[0])
        if len(weights) != len(value[0]):
            raise ConfigError(f"{name} has {len(weights)} weights for {len(value[0])} paths")
        entries = list(zip(value[0], weights, strict=True))
    elif value and _is_number(value[0]):
        if len(value) % 2:
            raise ConfigError(f"{name} ends with a weight without a path: expected weight, path, ...")
        entries = list(zip(value[1::2], value[::2], strict=True))
    else:
        entries = [_entry(each, name) for each in value]
    blend = [(_path(path, name), _weight(weight, path, name)) for path, weight in entries]
    if len({weight is None for _, weight in blend}) > 1:
        raise ConfigError(f"{name} has weights for some paths only: give one to each or to none")
    if repeated := [path for path, _ in blend if [each for each, _ in blend].count(path) > 1]:
        raise ConfigError(f"{name} names {repeated[0]} twice: give it once, with the sum of the weights")
    return blend


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _entry(value: Any, name: str) -> tuple[Any, Any]:
    if isinstance(value, str):
        return value, None
    if isinstance(value, dict) and set(value) in ({"path"}, {"path", "weight"}):
        return value["path"], value.get("weight")
    raise ConfigError(f"{name} holds {value!r}: expected {FORMS}")


def _path(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value or _is_number(value):
        raise ConfigError(f"{name} holds {value!r} where a path belongs: expected {FORMS}")
    return value


def _weight(value: Any, path: str, name: str) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or float(value) <= 0:
        raise ConfigError(f"{name}: the weight of {path} is {value!r}, expected a number above 0")
    return float(value)


def parse_split(split: str) -> list[tuple[float, float]]:
    """Return begin and end of train, valid and test as fractions, from numbers such as "969,30,1"."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if (
        not 1 <= len(shares) <= len(SPLITS)
        or not all(0 <= each < math.inf for each in shares)
        or not shares[0]
    ):
        raise ConfigError(
            f'dataset.split is {split!r}: give up to three shares for train, valid and test, as "969,30,1"'
        )
    bounds = [0.0]
    for share in [*shares, 0.0, 0.0][: len(SPLITS)]:
        # added in this order, as Megatron does: the same documents come out
        bounds.append(bounds[-1] + share / sum(shares))
    return list(pairwise(bounds))


def with_absolute_paths(config: "DatasetConfig") -> "DatasetConfig":
    """Return the config as a job in another folder reads it, its blends as paths with their weights."""

    def absolute(value: Any, name: str) -> list[object]:
        blend = parse_blend(value, name)
        return [{"path": str(Path(path).absolute()), "weight": weight} for path, weight in blend]

    per_split = config.blend_per_split or {}
    return replace(
        config,
        blend=absolute(config.blend, "dataset.blend"),
        blend_per_split={split: absolute(value, split) for split, value in per_split.items()} or None,
        path_to_cache=config.path_to_cache and str(Path(config.path_to_cache).absolute()),
    )


def find_parts(config: "DatasetConfig", splits: list[str]) -> dict[str, list[Part]]:
    """Find the datasets of each split that is wanted; all must be made with one tokenizer."""
    check_settings(config)
    if not config.blend and not config.blend_per_split:
        raise ConfigError("dataset.blend is empty: name a dataset that `bridgeworks data build` made")
    return {split: _parts_of(config, split) for split in splits}


def find_datasets(config: "DatasetConfig") -> dict[str, Dataset]:
    """Return the datasets of the config by path, of every split."""
    blends = [config.blend, *(config.blend_per_split or {}).values()]
    paths = [path for blend in blends for path, _ in parse_blend(blend, "dataset.blend")]
    return {path: find_dataset(path) for path in paths}


def check_files(config: "DatasetConfig", splits: list[str], seq_length: int, vocab_size: int) -> None:
    """Refuse datasets that are missing or damaged, have too little text or another vocabulary."""
    from training.indexed_files import open_indexed  # numpy, which a config alone needs not

    parts = find_parts(config, splits)
    check_tokenizers(find_datasets(config), vocab_size)
    for split, found in parts.items():
        if empty := [part for part in found if not part.tokens]:
            raise ConfigError(
                f"the {split!r} split of {empty[0].prefix} has no documents: give it a larger share"
            )
        if (tokens := sum(part.tokens for part in found)) <= seq_length:
            raise ConfigError(
                f"the {split!r} split has {tokens} tokens, too few for one sample of {seq_length}:"
                " give more text, a larger fraction or a smaller seq_length"
            )
        for part in found:
            open_indexed(part.prefix)


def check_tokenizers(datasets: dict[str, Dataset], vocab_size: int) -> None:
    """Refuse datasets whose tokens do not mean the same or are none of the model's."""
    (path, first), *others = datasets.items()
    for other, dataset in others:
        if dataset.record["tokenizer"] != first.record["tokenizer"]:
            raise ConfigError(f"the datasets {path} and {other} were made with different tokenizers")
    if first.record["vocab_size"] > vocab_size:
        raise ConfigError(
            f"the dataset {path} has a vocabulary of {first.record['vocab_size']} tokens, the model one of"
            f" {vocab_size}: build the dataset with the model's tokenizer"
        )


def _parts_of(config: "DatasetConfig", split: str) -> list[Part]:
    if config.blend_per_split:
        if split not in config.blend_per_split:
            raise ConfigError(
                f"dataset.blend_per_split has no {split!r}: the run reads that split, name some"
            )
        blend = parse_blend(config.blend_per_split[split], f"dataset.blend_per_split.{split}")
        return [_part(find_dataset(path), weight, split, (0.0, 1.0)) for path, weight in blend]
    parts = []
    for path, weight in parse_blend(config.blend, "dataset.blend"):
        dataset = find_dataset(path)
        if dataset.name is None and config.split is not None:
            raise ConfigError(f"dataset.split is given, but {path} has splits of its own: leave it out")
        if dataset.name is not None and config.split is None:
            raise ConfigError(
                f'{path} is not divided into splits: set dataset.split, for example to "98,1,1"'
            )
        bounds = parse_split(config.split)[SPLITS.index(split)] if config.split else (0.0, 1.0)
        parts.append(_part(dataset, weight, split, bounds))
    return parts


def _part(dataset: Dataset, weight: float | None, split: str, bounds: tuple[float, float]) -> Part:
    record, prefix = dataset.split_record(split), dataset.prefix(split)
    begin, end = (round(bound * float(record["documents"])) for bound in bounds)
    tokens = record["tokens"]
    if (begin, end) != (0, record["documents"]):
        from training.indexed_files import open_indexed  # numpy, which a config alone needs not

        tokens = int(open_indexed(prefix).lengths[begin:end].sum(dtype="i8"))
    return Part(prefix, record["sha256"][f"{prefix.name}.idx"], begin, end, tokens, weight or float(tokens))
