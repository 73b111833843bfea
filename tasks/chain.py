"""The chain of steps of a release, in the order in which they run; the plan and the flow both follow it."""

from tasks import (
    build_dataset,
    check_import,
    export_checkpoint,
    fetch_source,
    import_checkpoint,
    publish,
    train,
    verify,
)
from tasks.step import Step

CHAIN: tuple[Step, ...] = (
    fetch_source.STEP,
    import_checkpoint.STEP,
    check_import.STEP,
    build_dataset.STEP,
    train.STEP,
    export_checkpoint.STEP,
    verify.STEP,
    publish.STEP,
)
