"""`bridgeworks families`: the families, and what the test suite holds each to."""

from typing import Any

from bridge.families import families
from bridge.family_checks import CPU, GPU, checks_of
from flows.console import print_json, print_table


def family_rows() -> list[dict[str, Any]]:
    """Return a row for each family; `checks` says for each check where it runs."""
    return [
        {
            "model_type": each.model_type,
            "architecture": each.architecture,
            "covers": list(each.covers),
            "checks": checks_of(each),
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
            *(
                ", ".join(name for name, place in row["checks"].items() if place == where)
                for where in (CPU, GPU)
            ),
        )
        for row in rows
    ]
    print_table(columns, cells)
