"""A local S3 server, and a TCP proxy before it that fails on demand."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import boto3
import fsspec
import httpx
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "models"


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 on a port of its own, with the environment that clients read; yield its endpoint."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "test-user")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "never-to-be-printed")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        # all servers of a process have the same contents
        httpx.post(f"{endpoint}/moto-api/reset").raise_for_status()
        # file systems are kept by their arguments, and an earlier server's were the same
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield endpoint
    server.stop()


def s3() -> fsspec.AbstractFileSystem:
    """Return a file system of the running server for a test's own look at it."""
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


@contextmanager
def failing_proxy(endpoint: str, up_after: int) -> Iterator[str]:
    """Forward to `endpoint` until `up_after` bytes have gone there, then refuse; yield the address."""
    target = ("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
    left = [up_after]
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    left[0] -= len(data)
                if left[0] < 0:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                if left[0] < 0:
                    client.close()
                    continue
                upstream = socket.create_connection(target)
                for args in ((client, upstream, True), (upstream, client, False)):
                    threading.Thread(target=pump, args=args, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
