import pytest

from bridge.errors import ConfigError
from bridge.pipeline_split import check_pipeline_split, expand
from bridge.provider import GPTModelProvider

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
LAYOUT = "pipeline_model_parallel_layout"


def provider(layers: int, stages: int, chunks: int | None = None, **values) -> GPTModelProvider:
    return GPTModelProvider(
        num_layers=layers,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        **values,
    )


@pytest.mark.parametrize(
    "model",
    [
        provider(8, 4),
        provider(8, 2, 2),
        provider(7, 4, **{FIRST: 1}),
        provider(6, 4, **{FIRST: 1, LAST: 1}),
        provider(3, 2, **{FIRST: 1, LAST: 2}),
        provider(6, 4, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True),
        provider(8, 4, **{LAYOUT: "Ettt|(tt|)*2tL"}),
        provider(5, 2, 2, **{LAYOUT: "Et|t*2|t|tL"}),
        provider(4, 2, 2, **{LAYOUT: "Et|tt|t|m*2L"}, mtp_num_layers=2),
    ],
)
def test_possible_splits_pass(model):
    check_pipeline_split(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (provider(7, 4), "not divisible by the 4 pipeline stages"),
        (provider(8, 1, 2), "needs pipeline_model_parallel_size > 1"),
        (provider(8, 4, **{FIRST: 1}), "7 of model.num_layers 8 remain for the 3 pipeline stages"),
        (provider(4, 2, **{FIRST: 1, LAST: 2}), "1 of model.num_layers 4 remain for the 0 pipeline stages"),
        (provider(8, 2, 2, **{FIRST: 3}), "a multiple of virtual_pipeline_model_parallel_size 2"),
        (provider(8, 1, **{FIRST: 8}), "more than one pipeline stage"),
        (provider(7, 4, **{FIRST: 1}, account_for_loss_in_pipeline_split=True), "leave no use for"),
        (provider(8, 4, **{LAYOUT: "Ett|tt|tt|tL"}), "has 7 layers in 4 stages, but the model 8 in 4"),
        (provider(8, 4, **{LAYOUT: "Ett|tt|tt|ttX"}), "holds something else"),
        (provider(4, 2, **{LAYOUT: "Ett|ttL"}, mtp_num_layers=1), "ends with the model's 1 layers of multi-"),
        (provider(4, 2, **{LAYOUT: "Ett|ttmL"}), "ends with the model's 0 layers of multi-token"),
        (provider(4, 2, **{LAYOUT: "Ettttm|L"}, mtp_num_layers=1), "ends with the model's 1 layers"),
        (provider(4, 2, **{LAYOUT: "Ettm|ttL"}, mtp_num_layers=1), "ends with the model's 1 layers"),
        (provider(4, 2, **{LAYOUT: "tEt|ttL"}), "an embedding .* comes first"),
    ],
)
def test_impossible_splits_are_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        check_pipeline_split(model)


def test_layouts_are_spelt_out_as_megatron_does():
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.mtp: "m", LayerType.loss: "L"}
    for layout in ("Et*3|(tt|)*2,m|L", "E|(t|)*4L", "Ett,tt|ttL"):
        stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
        assert expand(layout).split("|") == ["".join(letters[part] for part in stage) for stage in stages]
