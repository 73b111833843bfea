"""Addresses of checkpoints and releases: a folder, `s3://bucket/prefix`, or `hf://organisation/name@revision`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from bridge.errors import BridgeworksError, InputError
from tasks.errors import StoreError
from training.config_paths import expanded

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# s3fs nests two kinds of retries, so that a server that never answers would cost minutes without a limit
CALL_SECONDS = 120.0
S3_CLIENT = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 5, "mode": "standard"}}


@dataclass(frozen=True)
class Address:
    """Where files lie: `scheme` is "file", "s3" or "hf", `path` what comes after it."""

    scheme: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.root if self.scheme == "file" else f"{self.scheme}://{self.root}"

    @property
    def root(self) -> str:
        """The address as its file system takes it."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def join(self, name: str) -> str:
        """Return the path of a file below this address, as its file system takes it."""
        return f"{self.root}/{name}"


def parse_address(text: str) -> Address:
    """Read an address; the InputError of a wrong one does not repeat a secret that it may hold."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Address("file", str(Path(expanded(text)).absolute()))
    if scheme == "s3":
        return _bucket_address(rest)
    if scheme == "hf":
        return _hub_address(rest)
    raise InputError(
        f"unknown kind of address {scheme}://: give a folder, s3://bucket/prefix or hf://org/name"
    )


def _bucket_address(rest: str) -> Address:
    bucket, _, prefix = rest.strip("/").partition("/")
    if "@" in bucket or ":" in bucket or "?" in rest:
        raise InputError(
            "an s3:// address may hold no user, password or option: write s3://bucket/prefix and give"
            " credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or by an AWS profile"
        )
    if not bucket or not prefix:
        raise InputError(f"s3://{rest} names no folder in a bucket: write s3://bucket/prefix")
    return Address("s3", f"{bucket}/{prefix}")


def _hub_address(rest: str) -> Address:
    name, _, revision = rest.partition("@")
    if not HUB_NAME.fullmatch(name):
        raise InputError("a hub address is hf://organisation/name or hf://organisation/name@revision")
    return Address("hf", name, revision or None)


def open_filesystem(address: Address) -> Any:
    """Return the fsspec file system of an address; credentials come from the environment alone."""
    if address.scheme == "s3":
        # no cache of listings: other processes write there too
        return fsspec.filesystem("s3", config_kwargs=S3_CLIENT, use_listings_cache=False)
    return fsspec.filesystem(address.scheme)


def call(filesystem: Any, method: str, *arguments: Any, timeout: float = CALL_SECONDS, **options: Any) -> Any:
    """Call `filesystem.method(...)` and turn what goes wrong into one-line errors of ours.

    An S3 call that has not ended after `timeout` seconds is a StoreError; the hub's client has limits too.
    """
    try:
        if isinstance(filesystem, AsyncFileSystem):
            return sync(
                filesystem.loop, getattr(filesystem, f"_{method}"), *arguments, timeout=timeout, **options
            )
        return getattr(filesystem, method)(*arguments, **options)
    except FileNotFoundError as error:
        raise InputError(f"no such file, folder or repository: {arguments[0]}") from error
    except remote_errors() as error:
        raise explain(error, str(arguments[0])) from error


def remote_errors() -> tuple[type[Exception], ...]:
    """List what S3, the hub and the disk raise."""
    from botocore.exceptions import BotoCoreError, ClientError
    from fsspec.exceptions import FSTimeoutError
    from huggingface_hub.errors import HfHubHTTPError

    # the HTTP library that the hub's client raises from differs between its releases (httpx, httpx2)
    return (OSError, BotoCoreError, ClientError, FSTimeoutError, HfHubHTTPError.__bases__[0])


def explain(error: Exception, where: str) -> BridgeworksError:
    """Return our error for one of a remote store, without the user names and passwords of its addresses."""
    text = re.sub(r"//[^/\s@]+@", "//", " ".join(str(error).split()))[:300]
    kind = type(error).__name__
    if kind == "NoCredentialsError":
        return InputError(
            f"no credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
        )
    if isinstance(error, PermissionError) or kind == "GatedRepoError":
        return InputError(f"no permission for {where}: {text}")
    return StoreError(f"cannot reach or use {where}: {kind}: {text}")
