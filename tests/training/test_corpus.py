import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bridge.errors import BridgeworksError, InputError
from training.corpus import Corpus


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "se\\u2028cond"}\n\n{"text": "third"}\n')
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "tests" / "d.py").write_text("excluded")
    return tmp_path


def test_documents_in_order(folder):
    corpus = Corpus([str(folder), str(folder / "a.py")], exclude=["tests"])
    assert list(corpus.documents()) == ["first", "se\u2028cond", "third", "first"]


def test_max_bytes_ends_before_the_document_that_exceeds_it(folder):
    assert list(Corpus([str(folder)], exclude=["tests"], max_bytes=14).documents()) == [
        "first",
        "se\u2028cond",
    ]
    assert list(Corpus([str(folder)], exclude=["tests"], max_bytes=4).documents()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such text file or folder"),
        ("latin.txt", "ü".encode("latin-1"), "is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl, line 2"),
        ("other.jsonl", b'{"content": "a"}\n', 'expected a JSON object with a "text" key'),
        ("list.jsonl", b"[1]\n", 'expected a JSON object with a "text" key'),
        ("number.jsonl", json.dumps({"text": 1}).encode(), '"text" is int, expected a string'),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(Corpus([str(tmp_path / name)]).documents())


def test_text_at_an_address_is_known_by_its_version(tmp_path):
    """Text that was written again is told from the old, also of the same size; no server is one line."""
    text = tmp_path / "a.txt"
    text.write_text("one")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        corpus = Corpus([f"http://127.0.0.1:{server.server_port}/a.txt"])
        (before,) = corpus.files()
        assert list(corpus.documents()) == ["one"]
        assert [before] == list(corpus.files())
        text.write_text("two")
        os.utime(text, (1, 1))
        (after,) = corpus.files()
        server.shutdown()
    assert (after.path, after.nbytes) == (before.path, before.nbytes)
    assert after.stamp != before.stamp
    with pytest.raises(BridgeworksError, match=r"cannot read text at http://127.*: ClientConnectorError"):
        list(corpus.files())
