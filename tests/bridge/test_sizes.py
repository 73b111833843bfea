import pytest

from bridge.errors import ConfigError
from bridge.sizes import parse_size


def test_sizes_have_units() -> None:
    sizes = {"5GB": 5 * 10**9, "1.5 gib": 3 << 29, "100": 100, "200MB": 2 * 10**8}
    assert {text: parse_size(text, "limit") for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0"])
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=f"max_memory is '{text}'"):
        parse_size(text, "max_memory")
