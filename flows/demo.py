"""`bridgeworks demo`: a small source checkpoint, a spec for it, and the release that the spec asks for."""

import shutil
import sysconfig
from pathlib import Path
from string import Template

from flows.show_release import run_release, shortened, timed
from tasks.gpus import gpus_of_jobs
from tasks.launch import launch
from tasks.spec import load_spec

SPEC = "demo.yaml"
VOCAB_SIZE = 2048
CORPUS_BYTES = 4_000_000
EXCLUDED = ("site-packages", "test", "tests", "idlelib", "__pycache__")

TEXT = Template("""\
# A release of a small model that `bridgeworks demo` made. Change something and run
#     bridgeworks release $file
# or look first at what would run, and why:
#     bridgeworks plan $file
name: demo
workspace: .                      # artifacts, logs and the MLflow store; relative to this file
source:
  uri: source                     # also s3://bucket/prefix or hf://organisation/name@revision
dataset:
  inputs: [$corpus]
  exclude: [$excluded]
  max_bytes: $corpus_bytes
train:
  recipe: continued_pretrain_config
  parallel:
    tensor_model_parallel_size: $ranks
  overrides:
    train.train_iters: 100
    train.global_batch_size: 16
    train.micro_batch_size: 16
    train.eval_interval: 25
    train.eval_iters: 2
    checkpoint.save_interval: 25
    checkpoint.most_recent_k: 2
    model.seq_length: 128
    optimizer.lr: 0.003
    optimizer.min_lr: 0.0003
    scheduler.lr_warmup_iters: 5
check:
  tensor_model_parallel_size: $ranks
  loss_batches: 8
publish:
  destination: releases/{name}-{digest}
  max_shard_size: 2MB
""")


def run_demo(workspace: Path, changes: list[str]) -> None:
    """Make what is missing and run the release; a spec that is there, edited or not, is kept."""
    workspace.mkdir(parents=True, exist_ok=True)
    make_source(workspace)
    spec = workspace / SPEC
    if not spec.exists():
        write_spec(spec)
    print(f"spec: {shortened(spec.absolute())}")
    run_release(load_spec(spec, changes))


def make_source(workspace: Path) -> None:
    """Make the source checkpoint with its tokenizer; it gets its name when it is complete."""
    source = (workspace / "source").absolute()
    if source.exists():
        print(f"source checkpoint: {shortened(source)}, made earlier")
        return
    partial = source.with_name("source.partial")
    shutil.rmtree(partial, ignore_errors=True)
    job = {
        "output": str(partial),
        "corpus": [corpus()],
        "exclude": list(EXCLUDED),
        "max_bytes": CORPUS_BYTES,
        "vocab_size": VOCAB_SIZE,
        "max_shard_size": "1MB",
        "seed": 1234,
    }
    with timed(f"making a small Llama checkpoint and its tokenizer in {shortened(source)}"):
        launch("training.make_checkpoint", job, folder=workspace / "source-job")
    partial.rename(source)


def write_spec(path: Path) -> None:
    """Write the demo's spec: each rank takes a GPU of its own, and a machine with one runs a single rank."""
    gpus = gpus_of_jobs()
    text = TEXT.substitute(
        ranks=1 if gpus and gpus.count == 1 else 2,
        file=shortened(path.absolute()),
        corpus=corpus(),
        excluded=", ".join(EXCLUDED),
        corpus_bytes=CORPUS_BYTES,
    )
    path.write_text(text)


def corpus() -> str:
    """Return the folder of text that every machine has: the sources of Python's standard library."""
    return sysconfig.get_paths()["stdlib"]
