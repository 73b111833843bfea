"""How the job of a step is spread over ranks, for plans and other output."""

from typing import Any

from tasks.spec import CheckSpec, ParallelSpec, ReleaseSpec

NUM_PROCESSES = "num_processes"


def layout_of(spec: ReleaseSpec, step: str) -> dict[str, Any] | None:
    """Return the layout of a step's job; None if it has no say in that."""
    if step == "train":
        return with_ranks(spec.train.parallel)
    return with_ranks(spec.check) if step in ("check_import", "verify") else None


def with_ranks(parallel: ParallelSpec | CheckSpec) -> dict[str, Any]:
    """Return the parallel sizes under Megatron's names, and the ranks that they make."""
    sizes = {name: size for name, size in parallel if name.endswith("_parallel_size")}
    return {**sizes, NUM_PROCESSES: parallel.num_processes}


def ranks_in_words(layout: dict[str, Any] | None) -> str:
    """Say how a job is spread, such as "4: tensor 2, expert 4, data 2"."""
    if layout is None:
        return "1"
    spread = [
        f"{name.removesuffix('_parallel_size').removesuffix('_model').replace('_', ' ')} {size}"
        for name, size in layout.items()
        if name != NUM_PROCESSES and (size or 1) > 1
    ]
    return f"{layout[NUM_PROCESSES]}: {', '.join(spread)}" if spread else "1"
