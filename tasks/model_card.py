"""The model card of a release: README.md, and the loss curve as a picture.

Both depend on the inputs alone (no dates, no run ids), so that building a release again gives the same bytes.
"""

from pathlib import Path
from typing import Any

from tasks.release import LOSS_CURVE, RELEASE


def write_loss_curve(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Draw training and validation loss over iterations as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation, held out", "o-")):
        points = [(each["iteration"], each[key]) for each in metrics if key in each]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=5)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})


def model_card(
    *,
    name: str,
    source: dict[str, Any],
    dataset: dict[str, Any],
    config: dict[str, Any],
    gates: dict[str, Any],
    model_config: dict[str, Any],
) -> str:
    """Return the text of README.md, from the same records that release.json holds."""
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", **_base_model(source)}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "---", f"# {name}", ""]
    lines += [_summary(source, model_config), "", "## Use", "", *_usage(), "", "## Training", ""]
    lines += [*_table(("setting", "value"), _settings(config)), "", f"![loss curve]({LOSS_CURVE})", ""]
    lines += ["## Data", "", *_table(("split", "documents", "tokens"), _splits(dataset)), ""]
    lines += ["## Checks", "", "Each was passed before this folder was published.", ""]
    lines += [*_table(("check", "measured", "allowed"), _measures(gates)), ""]
    lines += ["## Origin", "", *_origin(source), ""]
    return "\n".join(lines)


def _base_model(source: dict[str, Any]) -> dict[str, str]:
    uri = source["uri"]
    return {"base_model": uri.removeprefix("hf://").partition("@")[0]} if uri.startswith("hf://") else {}


def _summary(source: dict[str, Any], model_config: dict[str, Any]) -> str:
    size = f"{model_config['num_hidden_layers']} layers, hidden size {model_config['hidden_size']}"
    return (
        f"A `{model_config['model_type']}` model ({size}), trained on from `{source['uri']}`"
        " with Megatron Core and exported to the Hugging Face format."
    )


def _usage() -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        "```",
    ]


def _settings(config: dict[str, Any]) -> list[tuple[Any, ...]]:
    sizes = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
    shown = {
        "train": ("train_iters", "global_batch_size", "micro_batch_size"),
        "model": ("seq_length", *(f"{size}_parallel_size" for size in sizes), "params_dtype"),
        "optimizer": ("lr", "min_lr", "weight_decay"),
        "scheduler": ("lr_decay_style", "lr_warmup_iters"),
    }
    rows = [(f"{part}.{name}", config[part][name]) for part, names in shown.items() for name in names]
    rows.append(("data_parallel_size", config["data_parallel_size"]))
    return [row for row in rows if row[1] is not None]


def _splits(dataset: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (name, f"{split['documents']:,}", f"{split['tokens']:,}") for name, split in dataset["splits"].items()
    ]


def _measures(gates: dict[str, Any]) -> list[tuple[Any, ...]]:
    """List every number that a gate compared with a threshold."""
    return [
        (f"{gate}: {name}", _number(gates[gate]["metrics"].get(name)), _number(threshold))
        for gate in gates
        for name, threshold in gates[gate].get("thresholds", {}).items()
    ]


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _origin(source: dict[str, Any]) -> list[str]:
    revision = f", revision `{source['revision']}`" if source.get("revision") else ""
    return [
        f"- source model: `{source['uri']}`{revision}",
        f"- full record with the digests of every file, the resolved configuration and the code: `{RELEASE}`",
        "- check this folder: `bridgeworks audit verify path/of/this/folder`",
    ]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return [_row(head), _row(("---",) * len(head)), *map(_row, rows)]


def _row(cells: tuple[Any, ...]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
