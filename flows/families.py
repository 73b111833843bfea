"""`bridgeworks families`: the families, and what the test suite holds each to."""

from typing import Any

from bridge.families import families
from bridge.family_checks import CPU, GPU, checks_of, is_ours
from flows.console import print_json, print_table


def family_rows() -> list[dict[str, Any]]:
    """Return a row for each family; `checks` says where each check runs, of families of this tree."""
    return [
        {
            "model_type": each.model_type,
            "architecture": each.architecture,
            "covers": list(each.covers),
            "checks": checks_of(each) if is_ours(each) else {},
        }
        for each in families().values()
    ]


def show_families(as_json: bool) -> None:
    """Print the families as a table or as JSON."""
    rows = family_rows()
    if as_json:
        print_json(rows)
        return
    columns = ("model_type", "architecture", "covers", "tested on a CPU", "on a GPU only")
    cells = [
        (
            *(row["model_type"], row["architecture"], ", ".join(row["covers"])),
            *((checked(row, CPU), checked(row, GPU)) if row["checks"] else ("by its own package", "")),
        )
        for row in rows
    ]
    print_table(columns, cells)


def checked(row: dict[str, Any], where: str) -> str:
    return ", ".join(name for name, place in row["checks"].items() if place == where)
