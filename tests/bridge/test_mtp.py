from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json
from prediction_layers import FILE, read_weights, write_index
from safetensors.torch import load_file, save_file

from bridge import distributed
from bridge.auto_bridge import AutoBridge
from bridge.errors import CoverageError, InputError
from bridge.exporter import export_checkpoint
from bridge.importer import import_checkpoint
from bridge.ledger import compare_ledgers, ledger

Checkpoints = Callable[..., Path]
PREDICTING = {"num_nextn_predict_layers": 2}
NUM_COPIES = 4  # embedding and output projection, of each of the two layers
COPY = "model.layers.5.embed_tokens.weight"
TOKENS, POSITIONS = torch.arange(24)[None] % 150, torch.arange(24)[None]


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_prediction_layers_and_their_copies_come_back(
    family: str, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = hf_checkpoint(family, **PREDICTING)
    imported = import_checkpoint(source, tmp_path / "megatron")
    exported = export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    expected, found = read_weights(source), read_weights(tmp_path / "hf")
    assert COPY in expected
    assert imported.tensors == exported.tensors == len(ledger(source).records) == len(expected) - NUM_COPIES
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert compare_ledgers(ledger(source), ledger(tmp_path / "megatron")).passed


def change_copy(source: Path, weight: torch.Tensor | None) -> None:
    weights = {name: w for name, w in load_file(source / FILE).items() if name != COPY}
    save_file(weights if weight is None else {**weights, COPY: weight}, source / FILE)
    write_index(source)


def test_a_copy_that_differs_is_refused(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = copy_checkpoint(hf_checkpoint("deepseek_v3", **PREDICTING), tmp_path / "source")
    weight = read_weights(source)[COPY]
    weight[3, 3] += 1
    change_copy(source, weight)
    with pytest.raises(InputError, match=r"'model\.layers\.5\.embed_tokens\.weight' differs") as caught:
        import_checkpoint(source, tmp_path / "megatron")
    assert "tie_word_embeddings" not in str(caught.value)


def test_a_missing_copy_is_made(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = copy_checkpoint(hf_checkpoint("deepseek_v3", **PREDICTING), tmp_path / "source")
    change_copy(source, None)
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    found = read_weights(tmp_path / "hf")
    assert torch.equal(found[COPY], found["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, r"holds 'model\.layers\.5\..* set num_nextn_predict_layers to their number, or to 0"),
        (0, r"holds 'model\.layers\.4\..* set num_nextn_predict_layers to their number, or to 0"),
        (3, r"lacks 'model\.layers\.6\..* set num_nextn_predict_layers to 0 if it comes without them"),
    ],
)
def test_another_number_of_layers_than_the_config_says_is_refused(
    count: int, words: str, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = copy_checkpoint(hf_checkpoint("deepseek_v3", **PREDICTING), tmp_path / "source")
    edit_json(source / "config.json", num_nextn_predict_layers=count)
    with pytest.raises(CoverageError, match=words):
        import_checkpoint(source, tmp_path / "megatron")


def test_a_config_whose_layers_a_megatron_checkpoint_lacks_is_refused(
    hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = hf_checkpoint("deepseek_v3", **PREDICTING)
    with pytest.raises(CoverageError, match=r"lacks 'mtp\..* num_nextn_predict_layers to 0"):
        export_checkpoint(megatron_checkpoint("deepseek_v3"), tmp_path / "hf", config_from=source)


def test_a_layer_that_lacks_a_norm_is_no_matter_of_the_config(
    hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = copy_checkpoint(hf_checkpoint("deepseek_v3", **PREDICTING), tmp_path / "source")
    weights = {name: w for name, w in load_file(source / FILE).items() if "enorm" not in name}
    save_file(weights, source / FILE)
    write_index(source)
    with pytest.raises(CoverageError, match=r"lacks 'model\.layers\.4\.enorm\.weight'") as caught:
        import_checkpoint(source, tmp_path / "megatron")
    assert "num_nextn_predict_layers" not in str(caught.value)


def test_logits_are_those_of_the_decoder_alone(hf_checkpoint: Checkpoints) -> None:
    source = hf_checkpoint("deepseek_v3", **PREDICTING, dtype="float32")
    model = AutoBridge.from_hf_pretrained(source).to_megatron_model(wrap_with_ddp=False)[0].eval()
    with torch.no_grad():
        logits = model(TOKENS, POSITIONS, None)
        losses = model(TOKENS, POSITIONS, None, labels=TOKENS)
    expected = torch.nn.functional.cross_entropy(logits[0], TOKENS[0], reduction="none")
    assert logits.shape[:2] == TOKENS.shape
    torch.testing.assert_close(losses[0], expected)


def test_live_weights_have_the_copies_under_their_names(hf_checkpoint: Checkpoints) -> None:
    source = hf_checkpoint("deepseek_v3", **PREDICTING)
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    found = dict(bridge.export_hf_weights(model, names=[COPY]))
    assert list(found) == [COPY]
    assert torch.equal(found[COPY], read_weights(source)["model.embed_tokens.weight"])
