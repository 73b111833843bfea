"""Paths on the command line that must be of this machine: of an address, `Path` would make a folder `s3:`."""

from pathlib import Path

from bridge.errors import InputError


def read_here(text: str) -> Path:
    """Take a path to read from; an address is an InputError."""
    return _local(text, "fetch it first, as `bridgeworks import` does with a checkpoint")


def written_here(text: str) -> Path:
    """Take a path to write to; an address is an InputError."""
    return _local(text, "write to a folder, then copy that or let a release publish it (publish.destination)")


def _local(text: str, advice: str) -> Path:
    if "://" in str(text):
        raise InputError(f"{text} is an address, and a path of this machine is needed here: {advice}")
    return Path(text)
