"""Releases arrive completely or not at all, are never overwritten, and can be checked where they lie."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import BUCKET, failing_proxy, s3, s3_server

from bridge.errors import InputError
from tasks.address import parse_address
from tasks.artifact import list_files
from tasks.audit import diff_releases, open_release, verify_release
from tasks.delivery import check_destination, deliver, read_release, resolve
from tasks.errors import ArtifactError, StoreError
from tasks.release import RELEASE, Release, parse_release, refuse_secrets, release_digest
from tasks.spec import ReleaseSpec, parse_spec

NAMES = ("config.json", "model-00001.safetensors", "model-00002.safetensors")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["folder", "s3"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "releases/one")
    request.getfixturevalue("endpoint")
    return f"s3://{BUCKET}/{request.node.name.partition('[')[0]}"


def spec(destination: str) -> ReleaseSpec:
    values = {"source": {"uri": "/x"}, "dataset": {"inputs": ["/y"]}, "publish": {"destination": destination}}
    return parse_spec({"name": "demo", **values})


def make(folder: Path, content: bytes = b"weights") -> tuple[Release, dict[str, Path]]:
    """Make a small release of three files below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(content * 20_000 + str(number).encode())
    files = tuple(list_files(folder))
    empty: dict[str, dict] = {
        name: {} for name in ("inputs", "spec", "training_config", "code", "gates", "steps", "identifiers")
    }
    release = Release(name="demo", digest=release_digest(files), files=files, **empty)
    return release, {entry.path: folder / entry.path for entry in files}


def test_delivers_and_verifies(destination: str, tmp_path: Path) -> None:
    release, files = make(tmp_path / "made")
    seen: list[tuple[int, int]] = []
    deliver(release, files, parse_address(destination), on_progress=lambda *step: seen.append(step))
    assert seen[-1] == (release.bytes, release.bytes)
    assert open_release(destination)[1] == release
    assert verify_release(destination) == []
    assert not list(tmp_path.glob("releases/*.partial"))


def test_delivering_again_changes_nothing(destination: str, tmp_path: Path) -> None:
    release, files = make(tmp_path / "made")
    deliver(release, files, parse_address(destination))
    later = release.model_copy(update={"created": "2030-01-01T00:00:00+00:00"})
    deliver(later, files, parse_address(destination))
    assert open_release(destination)[1].created == release.created


def test_never_overwrites_another_release(destination: str, tmp_path: Path) -> None:
    first, files = make(tmp_path / "made")
    deliver(first, files, parse_address(destination))
    second, other_files = make(tmp_path / "other", b"changed")
    with pytest.raises(InputError, match=r"never\s+overwritten"):
        deliver(second, other_files, parse_address(destination))
    with pytest.raises(InputError, match=r"never\s+overwritten"):
        check_destination(spec(destination))
    assert open_release(destination)[1] == first


def test_a_release_of_the_same_spec_may_lie_there(tmp_path: Path) -> None:
    same = spec(str(tmp_path / "one"))
    release, files = make(tmp_path / "made")
    release = release.model_copy(update={"spec": same.model_dump(mode="json")})
    deliver(release, files, parse_address(str(tmp_path / "one")))
    check_destination(same)


def test_refuses_a_place_with_other_files(destination: str, tmp_path: Path) -> None:
    address = parse_address(destination)
    if address.scheme == "file":
        Path(address.path).mkdir(parents=True)
        with pytest.raises(InputError, match="choose another"):
            check_destination(spec(destination))
    else:
        s3().pipe(address.join("thesis.txt"), b"years of work")
    release, files = make(tmp_path / "made")
    with pytest.raises(InputError, match="choose another"):
        deliver(release, files, address)
    assert read_release(address) is None


def test_a_file_that_has_changed_since_it_was_sealed_is_not_published(
    destination: str, tmp_path: Path
) -> None:
    release, files = make(tmp_path / "made")
    content = files[NAMES[1]].read_bytes()
    files[NAMES[1]].write_bytes(b"W" + content[1:])
    with pytest.raises(ArtifactError, match=r"00001.safetensors has changed since it was made"):
        deliver(release, files, parse_address(destination))
    assert read_release(parse_address(destination)) is None
    files[NAMES[1]].write_bytes(content)
    deliver(release, files, parse_address(destination))
    assert verify_release(destination) == []


def test_an_interrupted_folder_is_no_release(tmp_path: Path) -> None:
    release, files = make(tmp_path / "made")
    address = parse_address(str(tmp_path / "releases/one"))
    with pytest.raises(FileNotFoundError):
        deliver(release, {**files, NAMES[2]: tmp_path / "gone"}, address)
    assert not (tmp_path / "releases/one").exists()
    deliver(release, files, address)
    assert verify_release(str(address)) == []


def test_an_interrupted_upload_goes_on(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, files = make(tmp_path / "made")
    address = parse_address(f"s3://{BUCKET}/interrupted")
    with failing_proxy(endpoint, up_after=250_000) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy)
        patch.setattr("s3fs.S3FileSystem.cachable", False)
        patch.setattr("s3fs.S3FileSystem.retries", 1)
        patch.setattr("tasks.address.S3_CLIENT", {"retries": {"max_attempts": 1}})
        with pytest.raises(StoreError, match="cannot reach or use") as caught:
            deliver(release, files, address)
    assert "never-to-be-printed" not in str(caught.value)
    assert read_release(address) is None
    arrived = {name: s3().info(name)["LastModified"] for name in s3().find(address.path)}
    assert 0 < len(arrived) < len(files)
    with pytest.raises(ArtifactError, match="never completed"):
        verify_release(str(address))
    deliver(release, files, address)
    assert verify_release(str(address)) == []
    assert all(s3().info(name)["LastModified"] == time for name, time in arrived.items()), "sent twice"


def test_what_a_killed_upload_left_half_done_is_ended(endpoint: str, tmp_path: Path) -> None:
    release, files = make(tmp_path / "made")
    client = s3()
    client.call_s3("create_multipart_upload", Bucket=BUCKET, Key=f"half/{NAMES[1]}")
    client.call_s3("create_multipart_upload", Bucket=BUCKET, Key="somebody/else")
    deliver(release, files, parse_address(f"s3://{BUCKET}/half"))
    left = client.call_s3("list_multipart_uploads", Bucket=BUCKET)["Uploads"]
    assert [upload["Key"] for upload in left] == ["somebody/else"]


def test_an_upload_has_a_deadline(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.delivery.START_SECONDS", -1.0)
    release, files = make(tmp_path / "made")
    with pytest.raises(StoreError, match="took too long"):
        deliver(release, files, parse_address(f"s3://{BUCKET}/slow"))


def test_of_two_uploads_that_race_one_is_told(endpoint: str, tmp_path: Path) -> None:
    address = parse_address(f"s3://{BUCKET}/race")
    release, files = make(tmp_path / "made")
    other, _ = make(tmp_path / "other", b"changed")

    def the_other_comes_first(done: int, total: int) -> None:
        if done == total:
            s3().pipe(address.join(RELEASE), other.to_json().encode())

    with pytest.raises(StoreError):
        deliver(release, files, address, on_progress=the_other_comes_first)
    assert read_release(address) == other


def test_no_bucket_and_no_credentials_are_bad_input(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such"):
        check_destination(spec("s3://no-such-bucket/release"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("s3fs.S3FileSystem.cachable", False)
    with pytest.raises(InputError, match="no credentials"):
        check_destination(spec(f"s3://{BUCKET}/release"))


def test_placeholders() -> None:
    assert resolve("s3://b/{name}/{digest}", "demo", "a" * 64).path == f"b/demo/{'a' * 12}"
    for wrong, message in (
        ("/x/{date}", "only {name}"),
        ("/x/{name.first}", "only {name}"),
        ("/x/{digest[first]}", "only {name}"),
        ("/x/{", "only {name}"),
        ("hf://org/model", "cannot be on the hub"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(wrong, "demo", "a" * 64)


def test_verify_names_each_problem(tmp_path: Path) -> None:
    release, files = make(tmp_path / "made")
    deliver(release, files, parse_address(str(tmp_path / "r")))
    shard = tmp_path / "r" / NAMES[1]
    shard.write_bytes(b"W" + shard.read_bytes()[1:])
    (tmp_path / "r" / NAMES[0]).unlink()
    (tmp_path / "r/extra.py").touch()
    problems = verify_release(str(tmp_path / "r"))
    assert [problem.partition(" ")[0] for problem in problems] == [
        "extra.py:",
        f"{NAMES[0]}:",
        f"{NAMES[1]}:",
    ]
    edited = json.loads((tmp_path / "r" / RELEASE).read_text())
    edited["files"][1]["sha256"] = "0" * 64
    (tmp_path / "r" / RELEASE).write_text(json.dumps(edited))
    with pytest.raises(ArtifactError, match="not that of the files"):
        verify_release(str(tmp_path / "r"))


def test_diff(tmp_path: Path) -> None:
    first, _ = make(tmp_path / "one")
    second = make(tmp_path / "two", b"changed")[0].model_copy(update={"spec": {"train": {"lr": 1}}})
    names = [name for name, _, _ in diff_releases(first, second)]
    assert names == ["digest", *(f"files.{name}" for name in NAMES), "spec", "spec.train.lr"]
    assert diff_releases(first, first.model_copy(update={"created": "later"})) == []


def test_release_json_both_ways(tmp_path: Path) -> None:
    release, _ = make(tmp_path / "one")
    assert parse_release(release.to_json(), "here") == release
    with pytest.raises(ArtifactError, match="here is not a release"):
        parse_release("{}", "here")


def test_secrets_are_refused() -> None:
    environment = {
        "AWS_SECRET_ACCESS_KEY": "swordfish-9",
        "HF_TOKEN": "hf_swordfish",
        "CI_TOKEN": "1",
        "ID_TOKEN": "no file can be called that " * 20,
        "HOME": "/root",
    }
    refuse_secrets({"a": "one 1 /root"}, environment)
    for text in ("x swordfish-9 y", "hf_swordfish", '"https://me:pass@host/x"'):
        with pytest.raises(StoreError) as caught:
            refuse_secrets({RELEASE: text}, environment)
        assert "swordfish" not in str(caught.value)
        assert "pass@" not in str(caught.value)
