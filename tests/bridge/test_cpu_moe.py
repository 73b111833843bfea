"""What the layouts of two ranks do not reach; whole models are compared in test_layouts.py."""

from pathlib import Path

from process_groups import run_ranks


def test_parts_of_different_sizes_are_gathered_and_scattered(tmp_path: Path) -> None:
    """Experts and tensor parallelism together need it, from four ranks on."""
    found = run_ranks(2, "bridge_jobs.uneven_job", {}, tmp_path)
    assert found["gathered"] == [[1.0, 1.0]] * 3 + [[2.0, 2.0]]
    # each rank adds what both have gathered
    assert found["scattered"] == [[2.0, 2.0]] * 3
    # two ranks gathered it, the first of them weighs it by 1
    assert found["gradient"] == [[2.0, 2.0]] * 3
