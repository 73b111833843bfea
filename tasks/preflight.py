"""Refuses a spec that cannot work before anything is fetched, written or started."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from bridge import check_layout
from bridge.errors import CheckpointError, InputError
from bridge.families import provider_of
from bridge.hf_checkpoint import CONFIG, read_config
from tasks import fetch_source
from tasks.address import call, open_filesystem, parse_address
from tasks.build_dataset import text_identity
from tasks.chain import CHAIN
from tasks.delivery import check_destination, resolve
from tasks.fetch import pin
from tasks.gpus import check_gpus
from tasks.plan import decide, make_plan, store_of
from tasks.spec import ReleaseSpec
from tasks.train import resolved_config


def check_spec(spec: ReleaseSpec, *, here: bool = True) -> None:
    """Check recipe, overrides, parallel sizes, text and destination against the source's model.

    Anything wrong is an InputError. Of the source only its listing and config are read. A destination that is
    taken is refused when a new model is to be trained; what is trained already may be there rightly. `here`
    says that this machine will run the jobs, and its GPUs must be able to.
    """
    model = provider_of(source_config(spec))
    config = resolved_config(spec.train, model)
    check_layout.laid_out(dataclasses.replace(model), spec.check.model_sizes).finalize()
    text_identity(spec.dataset)
    steps = {each.step for each in make_plan(spec, CHAIN, store_of(spec)) if each.runs}
    if "train" in steps:
        check_destination(spec)
    if here and steps:
        check_writable("workspace", spec.workspace)
    if here and "publish" in steps:
        address = resolve(spec.publish.destination, spec.name, "0" * 64)
        if address.scheme == "file":
            check_writable("publish.destination", Path(address.path).parent)
    if here and "train" in steps:
        ranks = spec.train.parallel.num_processes
        check_gpus(ranks, "the sizes of train.parallel", config.mixed_precision, config.profiling)
    if here and steps & {"check_import", "verify"}:
        check_gpus(spec.check.num_processes, "the parallel sizes of check")


def check_writable(what: str, folder: Path) -> None:
    """Refuse a folder that is none, or that may not be made or written to."""
    found = next(each for each in (folder, *folder.parents) if each.exists())
    if not (found.is_dir() and os.access(found, os.W_OK)):
        raise InputError(f"{what} needs {folder}, but {found} is no folder that can be written to")


def source_config(spec: ReleaseSpec) -> dict[str, Any]:
    """Read the source's config.json, from the store if the source has been fetched already."""
    fetched = decide(fetch_source.STEP, spec, {}, store_of(spec)).artifact
    if fetched:
        return read_config(fetched.payload)
    address = pin(parse_address(spec.source.uri))
    if address.scheme == "file":
        return read_config(Path(address.path))
    text = call(open_filesystem(address), "cat_file", address.join(CONFIG))
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{address}/{CONFIG} is not JSON: {error}") from error
