"""Fetching from a folder, a real S3 server and a server that speaks the hub's interface."""

import json
import shutil
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoints import copy_checkpoint, edit_json, make_hf_checkpoint
from s3_server import BUCKET, failing_proxy, s3, s3_server

from bridge.errors import CheckpointError, InputError, UnsupportedModelError
from tasks import fetch as fetch_module
from tasks.address import parse_address
from tasks.errors import StoreError
from tasks.fetch import fetch_checkpoint, identify, may_fetch

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_hf_checkpoint(tmp_path_factory.mktemp("source") / "hf", "llama")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("pytorch_model.bin", "tokenizer.pkl", "tokenizer_evil.so"):
        (folder / name).write_bytes(b"a pickle or a library")
    (folder / "modeling_llama.py").write_text("raise SystemExit('remote code')")
    return folder


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, checkpoint: Path) -> Iterator[str]:
    s3().put(str(checkpoint), f"{BUCKET}/llama", recursive=True)
    yield f"s3://{BUCKET}/llama"
    s3().rm(f"{BUCKET}/llama", recursive=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wanted(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if may_fetch(name)}


def test_copies_config_tokenizer_and_weights_but_no_pickle_and_no_code(
    checkpoint: Path, tmp_path: Path
) -> None:
    record = fetch_checkpoint(str(checkpoint), tmp_path / "checkpoint")
    assert contents(tmp_path / "checkpoint") == wanted(checkpoint)
    for pattern in ("*.bin", "*.pkl", "*.so", "*.py"):
        assert list(checkpoint.glob(pattern))
        assert not list((tmp_path / "checkpoint").glob(pattern))
    assert "tokenizer.pkl" not in record["versions"]
    assert record["uri"] == str(checkpoint)
    assert record["trust_remote_code"] is False


def test_s3(bucket: str, checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    record = fetch_checkpoint(bucket, tmp_path / "checkpoint", on_progress=lambda *step: seen.append(step))
    assert contents(tmp_path / "checkpoint") == wanted(checkpoint)
    assert seen[-1][0] == seen[-1][1]
    assert all(version.startswith("etag ") for version in record["versions"].values())


def test_identity_follows_the_content(bucket: str, checkpoint: Path, tmp_path: Path) -> None:
    before = identify(bucket)
    assert identify(bucket) == before
    s3().pipe(f"{BUCKET}/llama/tokenizer.json", b"[]")
    assert identify(bucket) != before
    copy = copy_checkpoint(checkpoint, tmp_path / "copy")
    assert identify(str(copy)) == identify(str(copy))


def test_goes_on_within_a_file(bucket: str, checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fetch_module, "CHUNK_BYTES", 1 << 14)
    reads: list[tuple[str, int]] = []
    plain = fetch_module.call

    def counted(filesystem: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "cat_file":
            reads.append((Path(arguments[0]).name, options["start"]))
            if len(reads) == 12:
                raise StoreError("the connection is gone")
        return plain(filesystem, method, *arguments, **options)

    monkeypatch.setattr(fetch_module, "call", counted)
    with pytest.raises(StoreError, match="gone"):
        fetch_checkpoint(bucket, tmp_path / "checkpoint", workers=1)
    assert list((tmp_path / "checkpoint").glob("*.part"))
    first = [read for read in reads[:11] if read[0] != "config.json"]
    fetch_checkpoint(bucket, tmp_path / "checkpoint", workers=1)
    assert contents(tmp_path / "checkpoint") == wanted(checkpoint)
    assert not set(first) & set(reads[12:]), "a range was read twice"


def test_does_not_go_on_with_another_source(bucket: str, checkpoint: Path, tmp_path: Path) -> None:
    fetch_checkpoint(bucket, tmp_path / "checkpoint")
    s3().pipe(f"{BUCKET}/llama/tokenizer.json", b"[]")  # of the same size
    fetch_checkpoint(bucket, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint/tokenizer.json").read_bytes() == b"[]"


def test_a_lost_server_is_one_line(bucket: str, endpoint: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(fetch_module.call.__globals__["S3_CLIENT"], "retries", {"max_attempts": 1})
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with failing_proxy(endpoint, up_after=1500) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        monkeypatch.setattr("s3fs.S3FileSystem.cachable", False)
        with pytest.raises(StoreError, match="cannot reach or use") as caught:
            fetch_checkpoint(bucket, tmp_path / "checkpoint")
    assert "\n" not in str(caught.value)
    assert "never-to-be-printed" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://user:hunter2@models/llama", "user, password"),
        ("s3://models/llama?secret=hunter2", "user, password"),
        ("s3://models", "names no folder"),
        ("ftp://host/hunter2", "unknown kind"),
        ("hf://hunter2", "organisation/name"),
    ],
)
def test_refuses_an_address_without_repeating_it(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_address(address)
    assert "hunter2" not in str(caught.value)


def test_refuses_what_is_not_there(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such"):
        identify(f"s3://{BUCKET}/nothing")
    with pytest.raises(InputError, match="no such folder"):
        identify(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"has no config\.json"):
        identify(str(tmp_path))


def test_refuses_a_wrong_folder_before_it_writes(checkpoint: Path, tmp_path: Path) -> None:
    unknown = copy_checkpoint(checkpoint, tmp_path / "unknown")
    edit_json(unknown / "config.json", model_type="no_such_model")
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        identify(str(unknown))
    truncated = copy_checkpoint(checkpoint, tmp_path / "truncated")
    shard = max(truncated.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        identify(str(truncated))


def test_refuses_an_unknown_family_before_it_fetches_weights(bucket: str, tmp_path: Path) -> None:
    config = json.loads(s3().cat(f"{BUCKET}/llama/config.json"))
    s3().pipe(f"{BUCKET}/llama/config.json", json.dumps({**config, "model_type": "no_such_model"}).encode())
    with pytest.raises(UnsupportedModelError):
        fetch_checkpoint(bucket, tmp_path / "checkpoint")
    assert not list((tmp_path / "checkpoint").glob("*.safetensors"))


def test_refuses_an_index_that_leaves_its_folder(bucket: str, tmp_path: Path) -> None:
    index = f"{BUCKET}/llama/model.safetensors.index.json"
    s3().pipe(index, json.dumps({"weight_map": {"lm_head.weight": "../../etc/passwd"}}).encode())
    with pytest.raises(CheckpointError, match="not there"):
        fetch_checkpoint(bucket, tmp_path / "checkpoint")


class Hub(BaseHTTPRequestHandler):
    """The four requests of the hub that a fetch makes, for one repository below `folder`."""

    folder: Path
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/model/tree/"):
            return self.answer(
                json.dumps([self.describe(file) for file in sorted(self.folder.iterdir())]).encode()
            )
        if path.startswith("/api/models/org/model"):
            return self.model_info(path.removeprefix("/api/models/org/model").removeprefix("/revision/"))
        prefix = f"/org/model/resolve/{COMMIT}/"
        if path.startswith(prefix):
            return self.range((self.folder / path.removeprefix(prefix)).read_bytes())
        return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = [file for file in sorted(self.folder.iterdir()) if file.name in body]
        self.answer(json.dumps([self.describe(file) for file in names]).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def model_info(self, revision: str) -> None:
        if revision not in ("", "main", COMMIT):
            return self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{**self.describe(file), "rfilename": file.name} for file in sorted(self.folder.iterdir())]
        info = {
            "id": "org/model",
            "sha": COMMIT,
            "siblings": [{**each, "blobId": each["oid"]} for each in siblings],
        }
        return self.answer(json.dumps(info).encode())

    def describe(self, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        entry = {
            "type": "file",
            "path": file.name,
            "size": len(content),
            "oid": sha256(content).hexdigest()[:40],
        }
        if file.suffix == ".safetensors":
            digest = ((self.folder.parent / "wrong_digest").exists() and "0" * 64) or sha256(
                content
            ).hexdigest()
            entry["lfs"] = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def range(self, content: bytes) -> None:
        begin, end = self.headers["Range"].removeprefix("bytes=").split("-")
        self.answer(content[int(begin) : int(end) + 1], 206, {"ETag": '"x"'})

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> Iterator[type[Hub]]:
    folder = shutil.copytree(checkpoint, tmp_path / "hub/model")
    handler = type("ThisHub", (Hub,), {"folder": folder, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield handler
    server.shutdown()
    server.server_close()


def test_hub_pins_the_commit(hub: type[Hub], checkpoint: Path, tmp_path: Path) -> None:
    record = fetch_checkpoint("hf://org/model@main", tmp_path / "checkpoint")
    assert record["revision"] == COMMIT
    assert record["uri"] == f"hf://org/model@{COMMIT}"
    assert contents(tmp_path / "checkpoint") == wanted(checkpoint)
    assert all(COMMIT in request for request in hub.requests if "resolve" in request)


def test_hub_identity_needs_no_network_once_pinned(hub: type[Hub]) -> None:
    assert identify("hf://org/model") == {"uri": f"hf://org/model@{COMMIT}"}
    hub.requests.clear()
    assert identify(f"hf://org/model@{COMMIT}") == {"uri": f"hf://org/model@{COMMIT}"}
    assert hub.requests == []


def test_hub_names_what_it_does_not_know(hub: type[Hub]) -> None:
    with pytest.raises(InputError, match="no revision 'v9'"):
        identify("hf://org/model@v9")
    with pytest.raises(InputError, match="no model hf://org/other"):
        identify("hf://org/other")


def test_hub_digests_are_checked(hub: type[Hub], tmp_path: Path) -> None:
    (hub.folder.parent / "wrong_digest").touch()
    with pytest.raises(StoreError, match="sha256"):
        fetch_checkpoint("hf://org/model", tmp_path / "checkpoint")
    assert not list((tmp_path / "checkpoint").glob("*.safetensors"))


def test_interrupting_the_caller_ends_its_threads(bucket: str, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        fetch_checkpoint(bucket, tmp_path / "checkpoint", on_progress=interrupt)
    # fsspec keeps one for its event loop, and the server's may still be at their answers
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not [name for name in left if name.startswith("ThreadPoolExecutor")]
