import pytest

from bridge.errors import ConfigError
from bridge.sizes import parse_size, readable_size


def test_sizes_have_units() -> None:
    sizes = {"5GB": 5 * 10**9, "1.5 gib": 3 << 29, "100": 100, "200MB": 2 * 10**8}
    assert {text: parse_size(text, "limit") for text in sizes} == sizes
    assert parse_size(10**9, "limit") == 10**9  # as transformers takes a shard's


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0"])
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=f"max_memory is '{text}'"):
        parse_size(text, "max_memory")


def test_sizes_are_written_in_the_unit_that_fits() -> None:
    sizes = {0: "0.0 KB", 1500: "1.5 KB", 7_600_000: "7.6 MB", 5 * 10**9: "5.0 GB", 2 * 10**12: "2.0 TB"}
    assert {size: readable_size(size) for size in sizes} == sizes
