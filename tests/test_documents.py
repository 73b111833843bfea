"""Documents say what is so: tables that are made from data, links and files that exist."""

import re
from pathlib import Path

import pytest
from mutations import as_markdown

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")
# with a colon behind it, it is the name of an example's file
SOURCE = re.compile(r"`((?:bridge|training|recipes|tasks|flows|deployments|tests)/[\w/.]+\.\w+)`(?!:\n)")


def test_table_of_mutations_is_that_of_the_tests() -> None:
    assert as_markdown() in (ROOT / "docs" / "how_conversion_works.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_points_to_is_there(document: Path) -> None:
    text = document.read_text()
    missing = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    missing += [source for source in SOURCE.findall(text) if not (ROOT / source).exists()]
    assert not missing
