"""A folder of plain Megatron-LM as an end: described by the other one, by a third, or by its family."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_weight, copy_checkpoint, edit_json
from plain_checkpoints import ROPE, make_plain_run, save_arguments

from bridge import compare_logits, distributed
from bridge.compare_configs import compare_configs
from bridge.ends import GivenModel, given_for, is_described
from bridge.errors import CheckpointError, ConfigError
from bridge.importer import import_checkpoint
from bridge.ledger import compare_ledgers, ledger

Checkpoints = Callable[..., Path]
OTHER_ENDS = ("source", "megatron")


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


@pytest.fixture
def ends(hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints, tmp_path: Path) -> dict[str, Path]:
    """A plain run, and the same model as a Hugging Face and as a Megatron folder."""
    megatron = megatron_checkpoint("llama", **ROPE)
    return {
        "source": copy_checkpoint(hf_checkpoint("llama", **ROPE), tmp_path / "source"),
        "megatron": megatron,
        "plain": make_plain_run(megatron, tmp_path / "run"),
    }


def same_tensors(a: Path, b: Path, given: GivenModel) -> bool:
    return compare_ledgers(ledger(a, given=given), ledger(b, given=given)).passed


def compare(a: Path, b: Path, given: GivenModel) -> dict[str, Any]:
    source = {"config_from": given.config_from and str(given.config_from), "family": given.family}
    return compare_logits.main({"a": str(a), "b": str(b), "dtype": "float32", "num_prompts": 1, **source})


@pytest.mark.parametrize("other", OTHER_ENDS)
def test_the_other_end_describes_it(other: str, ends: dict[str, Path]) -> None:
    plain, described = ends["plain"], ends[other]
    for a, b in ((plain, described), (described, plain)):
        given = given_for(a, b, None, None)
        assert given == GivenModel(config_from=described)
        assert compare_configs(a, b, given) == []
        assert same_tensors(a, b, given)
    report = compare(plain, described, given)
    assert report["gate"]["passed"], report["gate"]
    assert report["hidden_states"]["passed"], report["hidden_states"]
    assert report["num_positions"] == 64


def test_its_family_describes_it(ends: dict[str, Path]) -> None:
    given = given_for(ends["plain"], ends["source"], None, "llama")
    assert compare_configs(ends["plain"], ends["source"], given) == []
    assert same_tensors(ends["plain"], ends["source"], given)
    assert compare(ends["plain"], ends["source"], given)["gate"]["passed"]
    edit_json(ends["source"] / "config.json", rms_norm_eps=1e-5)
    (found,) = compare_configs(ends["plain"], ends["source"], given)
    assert found == ("layernorm_epsilon", 1e-6, 1e-5)


@pytest.mark.parametrize("other", OTHER_ENDS)
def test_a_tensor_that_differs_is_found(other: str, ends: dict[str, Path], tmp_path: Path) -> None:
    change_weight(ends["source"], "model.layers.1.mlp.up_proj.weight")
    if other == "megatron":
        ends[other] = import_checkpoint(ends["source"], tmp_path / "changed").path
    given = given_for(ends["plain"], ends[other], None, None)
    assert not same_tensors(ends["plain"], ends[other], given)


@pytest.mark.parametrize("other", OTHER_ENDS)
def test_contradictions_are_differences_of_the_configs(other: str, ends: dict[str, Path]) -> None:
    save_arguments(ends["plain"] / "iter_0000010", rotary_base=500000, padded_vocab_size=128)
    expected = {"rotary_base": (500000, 10000.0), "vocab_size": (128, 160)}
    given = given_for(ends["plain"], ends[other], None, None)
    assert {each.name: each[1:] for each in compare_configs(ends["plain"], ends[other], given)} == expected
    backwards = compare_configs(ends[other], ends["plain"], given)
    assert {each.name: each[:0:-1] for each in backwards} == expected
    for work in (ledger, lambda end, given: compare(end, ends[other], given)):
        with pytest.raises(ConfigError, match=r"rotary_base is 10000\.0, trained was 500000; vocab_size"):
            work(ends["plain"], given=given)


def test_too_little_and_too_much_are_refused(ends: dict[str, Path], tmp_path: Path) -> None:
    plain, source = ends["plain"], ends["source"]
    assert not is_described(plain)
    with pytest.raises(CheckpointError, match=r"neither .* describes its model: .*--config-from.*--family"):
        given_for(plain, plain, None, None)
    with pytest.raises(ConfigError, match="both ends describe their models"):
        given_for(source, ends["megatron"], None, "llama")
    torch.save({}, plain / "iter_0000010" / "common.pt")
    with pytest.raises(CheckpointError, match=r"neither model\.json nor arguments of Megatron-LM"):
        given_for(plain, source, None, None)
    given = given_for(plain, source, source, None)
    assert same_tensors(plain, source, given)


def test_two_plain_ends_are_described_by_a_third_folder(ends: dict[str, Path]) -> None:
    given = given_for(ends["plain"], ends["plain"] / "iter_0000010", ends["source"], None)
    assert same_tensors(ends["plain"], ends["plain"] / "iter_0000010", given)
    save_arguments(ends["plain"] / "iter_0000010", num_query_groups=8)
    with pytest.raises(ConfigError, match="num_query_groups is 4, trained was 8"):
        compare_configs(ends["plain"], ends["plain"] / "iter_0000010", given)
