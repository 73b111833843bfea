"""`bridgeworks audit`: check a release, show it, or compare two."""

from typing import Annotated

import typer

from flows.options import Json

app = typer.Typer(help="Check a release, show it, or compare two.", rich_markup_mode="markdown")

ReleaseAddress = Annotated[
    str, typer.Argument(metavar="RELEASE", help="A release's folder or s3:// address.")
]


@app.callback(invoke_without_command=True)
def show_help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def verify(release: ReleaseAddress, json: Json = False) -> None:
    """Read every file of a release again and compare it with release.json; exit code 1 if one differs."""
    from flows.console import print_json
    from tasks.audit import verify_release

    problems = verify_release(release)
    if json:
        print_json({"verified": not problems, "problems": problems})
    else:
        print("\n".join(problems) or f"{release}: every file is as release.json says")
    if problems:
        raise typer.Exit(1)


@app.command()
def show(release: ReleaseAddress, json: Json = False) -> None:
    """Show where a release came from: inputs, code, gates and ids."""
    from flows.console import print_json, print_table
    from tasks.audit import open_release
    from tasks.plan import flatten

    address, record = open_release(release)
    value = record.model_dump(mode="json")
    if json:
        print_json(value)
        return
    shown = {name: value[name] for name in ("name", "digest", "created", "identifiers", "code")}
    inputs = {name: {**entry, "files": len(entry["files"])} for name, entry in record.inputs.items()}
    gates = {name: "passed" if gate["passed"] else "FAILED" for name, gate in record.gates.items()}
    rows = list(flatten({**shown, "inputs": inputs, "gates": gates, "files": len(record.files)}).items())
    print_table(("what", "value"), rows, title=str(address))


@app.command()
def diff(first: ReleaseAddress, second: ReleaseAddress, json: Json = False) -> None:
    """List what two releases differ in: inputs, settings, code, gates and files."""
    from flows.console import print_json, print_table
    from tasks.audit import diff_releases, open_release

    rows = diff_releases(open_release(first)[1], open_release(second)[1])
    if json:
        print_json([{"name": name, "first": before, "second": after} for name, before, after in rows])
    elif rows:
        print_table(("what", "first", "second"), rows)
    else:
        print("no difference but in time and ids")
