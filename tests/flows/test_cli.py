"""The command line as a shell sees it: quick help, exit codes, one-line errors, JSON."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from checkpoints import copy_checkpoint, edit_json, make_hf_checkpoint
from plain_checkpoints import ROPE, make_plain_run, save_arguments

PROGRAM = str(Path(sys.executable).with_name("bridgeworks"))
COMMANDS = (
    *("demo", "release", "plan", "import", "export", "compare", "train", "families", "recipes", "doctor"),
    *("audit", "audit verify", "audit show", "audit diff"),
    *("data", "data build", "data inspect", "data adopt"),
)
HEAVY = ("torch", "prefect", "mlflow", "pandas", "transformers", "megatron", "numpy", "matplotlib", "fsspec")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


def check_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line on stderr that says what is wrong."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_checkpoint(tmp_path_factory.mktemp("cli") / "hf", "llama")


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    run("import", hf, hf.with_name("megatron"))
    return hf.with_name("megatron")


@pytest.fixture
def spec_file(hf: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some text")
    spec = {
        "name": "small",
        "workspace": "work",
        "source": {"uri": str(hf)},
        "dataset": {"inputs": ["text.txt"]},
        "publish": {"destination": "release"},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path / "spec.yaml"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_loads_nothing_heavy(command: str) -> None:
    probe = (
        "import sys, flows.cli; sys.argv = ['bridgeworks', *sys.argv[1:]]\n"
        "try: flows.cli.main()\n"
        f"finally: print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", probe, *command.split(), "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "HEAVY []" in result.stdout
    assert "Usage: bridgeworks" in result.stdout
    assert time.monotonic() - started < 1 or len(os.sched_getaffinity(0)) < 4  # a busy machine is slower


def test_version() -> None:
    assert run("--version").stdout.startswith("bridgeworks ")


def test_every_command_has_a_help_text() -> None:
    listed = run("--help").stdout
    assert all(command.split()[0] in listed for command in COMMANDS)


@pytest.mark.parametrize("arguments", [("no-such-command",), ("import", "a"), ("plan", "--no-such-option")])
def test_wrong_usage_is_bad_input(arguments: tuple[str, ...]) -> None:
    check_refused(run(*arguments))


def test_families_and_recipes_for_scripts() -> None:
    families = json.loads(run("families", "--json").stdout)
    checks = {family["model_type"]: family["checks"] for family in families}
    assert {"llama", "mistral", "qwen2", "qwen3"} <= set(checks)
    assert {"config", "weights", "tp2", "pp2"} <= set(checks["llama"])
    recipes = json.loads(run("recipes", "--json").stdout)
    assert "llama32_1b_pretrain_config" in recipes


def test_a_recipe_with_changes() -> None:
    result = run("recipes", "llama32_1b_pretrain_config", "--set", "train.train_iters=7")
    assert yaml.safe_load(result.stdout)["train"]["train_iters"] == 7
    check_refused(
        run("recipes", "llama32_1b_pretrain_config", "--set", "train.train_itrs=7"), "train.train_iters"
    )
    check_refused(run("recipes", "llama32_1b_config"), "llama32_1b_pretrain_config")


def test_import_and_export(hf: Path, tmp_path: Path) -> None:
    imported = json.loads(run("import", hf, tmp_path / "megatron", "--json").stdout)
    assert imported["tensors"] > 10
    exported = run("export", tmp_path / "megatron", tmp_path / "hf", "--max-shard-size", "150KB")
    assert "tensors" in exported.stdout
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    check_refused(run("export", tmp_path / "megatron", tmp_path / "hf"), "exists")


def test_compare(hf: Path, tmp_path: Path) -> None:
    run("import", hf, tmp_path / "megatron")
    options = ("--num-prompts", 1, "--prompt-length", 4, "--dtype", "float32", "--dtype", "float32")
    same = run("compare", hf, tmp_path / "megatron", *options, "--report", tmp_path / "report")
    assert same.returncode == 0, same.stderr
    assert "float32: the two agree at every layer and position" in same.stdout
    assert "the two are the same model" in same.stdout
    tables = ("ledger.csv", "float32/logits.jsonl", "float32/layers.jsonl", "float32/differences.png")
    assert all((tmp_path / "report" / name).is_file() for name in ("report.json", *tables))
    other = make_hf_checkpoint(tmp_path / "other", "llama", seed=1)
    report = tmp_path / "report.json"
    different = run(
        "compare", other, tmp_path / "megatron", "--only", "tensors", "--report", report, "--json"
    )
    assert different.returncode == 1
    assert different.stderr == ""
    assert json.loads(different.stdout) == json.loads(report.read_text())
    gates = {gate["gate"]: gate["passed"] for gate in json.loads(report.read_text())["gates"]}
    assert gates == {"coverage_a": True, "coverage_b": True, "tensors": False}


def test_compare_refuses_a_layout_before_any_process_starts(hf: Path, tmp_path: Path) -> None:
    run("import", hf, tmp_path / "megatron")
    for option, message in (
        (("--tp", 3), "not divisible by tensor_model_parallel_size 3"),
        (("--pp", 3), "not divisible by the 3 pipeline stages"),
        (("--ep", 2), "model.expert_model_parallel_size is 2 in a model without experts"),
    ):
        check_refused(run("compare", hf, tmp_path / "megatron", *option), message)


def test_compare_refuses_places_before_anything_is_measured(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for option, message in (
        (("--picture", tmp_path), "is a folder: name a file in it"),
        (("--report", tmp_path / "folder.json"), "is a folder: name a file in it"),
        (("--picture", tmp_path / "file" / "p.png"), "cannot be a folder: File exists"),
        (("--report", tmp_path / "file"), "cannot be a folder: File exists"),
        (("--only", "tensors", "--picture", tmp_path / "p.png"), "leave out --only"),
    ):
        check_refused(run("compare", hf, hf, *option), message)
    made = tmp_path / "new" / "report.json"
    same = run("compare", hf, hf, "--only", "config", "--report", made)
    assert same.stdout.endswith("the two agree in config; tensors and logits were not compared\n")
    assert json.loads(made.read_text())["passed"]


def test_compare_says_where_two_ends_part(hf: Path, tmp_path: Path) -> None:
    """Another rope base: every tensor is the same, the first layer is not."""
    other = copy_checkpoint(hf, tmp_path / "other")
    rope = json.loads((hf / "config.json").read_text())["rope_parameters"]
    edit_json(other / "config.json", rope_parameters={**rope, "rope_theta": 10000.0})
    picture = tmp_path / "differences.png"
    result = run("compare", hf, other, "--num-prompts", 1, "--prompt-length", 8, "--picture", picture)
    assert result.returncode == 1
    assert "config: rope_parameters.rope_theta is 500000.0 in hf and 10000.0 in other" in result.stdout
    assert "float32: the two part at layer 1 of 4" in result.stdout
    assert "tensors                different" in result.stdout
    assert picture.is_file()


def test_compare_of_an_end_that_lacks_a_tensor_fails(hf: Path, tmp_path: Path) -> None:
    shard = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    result = run("compare", hf, without_shard(hf, tmp_path / "other", shard))
    assert result.returncode == 1, result.stderr
    assert "coverage_b: " in result.stdout
    assert "lm_head.weight" in result.stdout


def test_compare_takes_a_plain_folder_of_megatron_lm(tmp_path: Path) -> None:
    hf = make_hf_checkpoint(tmp_path / "hf", "llama", **ROPE)
    run("import", hf, tmp_path / "megatron")
    plain = make_plain_run(tmp_path / "megatron", tmp_path / "run")
    small = ("--num-prompts", 1, "--prompt-length", 4)
    same = run("compare", plain, hf, *small, "--json")
    assert same.returncode == 0, same.stderr + same.stdout
    gates = [gate["gate"] for gate in json.loads(same.stdout)["gates"]]
    assert gates[:4] == ["config", "coverage_a", "coverage_b", "tensors"]
    assert "logits_float32" in gates
    assert run("compare", plain, plain, "--family", "llama", "--only", "tensors").returncode == 0
    check_refused(run("compare", plain, plain), "describes its model", "--family", "--config-from")
    check_refused(run("compare", hf, hf, "--family", "llama"), "leave out")
    save_arguments(plain / "iter_0000010", rotary_base=500000)
    different = run("compare", plain, hf)
    assert different.returncode == 1, different.stderr
    assert "config: rotary_base is 500000 in run and 10000.0 in hf" in different.stdout
    assert "coverage_a: " in different.stdout
    assert "rotary_base is 10000.0, trained was 500000" in different.stdout


def without_shard(source: Path, folder: Path, shard: str) -> Path:
    copy_checkpoint(source, folder)
    (folder / shard).unlink()
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={name: file for name, file in weight_map.items() if file != shard})
    return folder


def test_bad_checkpoints_are_refused_and_nothing_is_written(hf: Path, tmp_path: Path) -> None:
    check_refused(run("import", tmp_path / "none", tmp_path / "out"), "none")
    unknown = copy_checkpoint(hf, tmp_path / "unknown")
    edit_json(unknown / "config.json", model_type="no_such_model")
    check_refused(run("import", unknown, tmp_path / "out"), "no_such_model", "llama")
    check_refused(run("compare", unknown, tmp_path / "none"), "none")
    check_refused(run("export", hf, tmp_path / "out"), str(hf))
    check_refused(run("import", "ftp://host/model", tmp_path / "out"), "ftp://")
    assert not list(tmp_path.glob("out*"))


def test_compare_keeps_the_log_of_a_job_that_fails(hf: Path, megatron: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'BRIDGEWORKS_JOB' in os.environ:\n    os.write(1, b'no room\\n')\n    os._exit(3)\n"
    )
    (tmp_path / "temporary").mkdir()
    places = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path / "temporary")}
    result = run("compare", hf, megatron, "--only", "logits", **places)
    assert result.returncode == 1
    [log] = re.findall(r"\(log: (.*?)\)", result.stderr)
    assert Path(log).read_text() == "no room\n"
    assert [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()] == [Path(log)]


def test_a_name_of_the_hub_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(run("import", "org/name-1B", "out"), "no folder org/name-1B", "hf://org/name-1B")
    check_refused(run("import", "org/name@main", "out"), "no folder org/name@main", "hf://org/name@main")
    check_refused(run("import", "a/b/c", "out"), "a/b/c is not a folder")


def test_code_of_a_model_is_refused_with_advice(hf: Path, tmp_path: Path) -> None:
    own = copy_checkpoint(hf, tmp_path / "own")
    edit_json(own / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    check_refused(run("import", own, tmp_path / "out"), "auto_map", "never run", "out of config.json")


def test_a_family_that_is_not_the_checkpoints_is_refused(megatron: Path, tmp_path: Path) -> None:
    for family, words in (("nope", "unknown model_type 'nope'"), ("qwen2", "'llama', not 'qwen2'")):
        check_refused(run("export", megatron, tmp_path / "out", "--family", family), words)
    assert not (tmp_path / "out").exists()
    assert run("export", megatron, tmp_path / "out", "--family", "llama").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "{hf}", "s3://bucket/model"),
        ("export", "{megatron}", "s3://bucket/model"),
        ("export", "s3://bucket/model", "out"),
        ("export", "{megatron}", "out", "--config-from", "hf://org/name"),
        ("compare", "hf://org/name", "{hf}"),
        ("compare", "{hf}", "{hf}", "--report", "s3://bucket/report", "--only", "config"),
        ("train", "continued_pretrain_config", "--load", "hf://org/name", "--output", "out"),
        ("train", "continued_pretrain_config", "--output", "s3://bucket/run"),
        ("data", "build", "x.txt", "--output", "s3://bucket/data", "--tokenizer", "{hf}"),
        ("data", "inspect", "s3://bucket/data"),
        ("demo", "--workspace", "s3://bucket/work"),
    ],
    ids=" ".join,
)
def test_addresses_are_no_folders(
    arguments: tuple[str, ...], hf: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    address = next(each for each in arguments if "://" in each)
    check_refused(
        run(*(each.format(hf=hf, megatron=megatron) for each in arguments)), f"{address} is an address"
    )
    assert not list(tmp_path.iterdir())


def test_bad_specs_are_refused_and_nothing_is_written(spec_file: Path, hf: Path) -> None:
    check_refused(run("plan", spec_file.with_name("none.yaml")), "none.yaml")
    for command in ("plan", "release"):
        for change, word in (
            ("train.overrides.train.train_itrs=5", "train.train_iters"),
            ("train.parallel.tensor_model_parallel_size=3", "divisible"),
            ("check.tensor_model_parallel_size=16", "divisible"),
            ("train.recipe=continued_pretrain", "continued_pretrain_config"),
            ("source.uri=/no/such/model", "/no/such/model"),
            ("source.uri=s3://me:hunter2@bucket/model", "user, password"),
            ("dataset.inputs=[/no/such/text]", "/no/such/text"),
            ("publish.destinatoin=x", "did you mean 'destination'"),
        ):
            result = run(command, spec_file, "--set", change)
            check_refused(result, word)
            assert "hunter2" not in result.stderr
            if command == "release":
                break  # the rest is the same check
    assert not spec_file.with_name("work").exists()


def test_plan_says_what_would_run_and_why(spec_file: Path) -> None:
    steps = json.loads(run("plan", spec_file, "--json").stdout)
    assert steps[0]["step"] == "fetch"
    assert {step["action"] for step in steps} == {"run"}
    spread = ("train.parallel.context_parallel_size=2", "train.parallel.data_parallel_size=4")
    changes = [
        text for change in (*spread, "check.tensor_model_parallel_size=2") for text in ("--set", change)
    ]
    layouts = {
        row["step"]: row["parallel"] for row in json.loads(run("plan", spec_file, *changes, "--json").stdout)
    }
    assert layouts["train"]["num_processes"] == 8
    assert layouts["train"]["context_parallel_size"] == 2
    assert layouts["verify"]["num_processes"] == 2
    assert layouts["export"] is None
    assert "8: context 2, data 4" in run("plan", spec_file, *changes).stdout
    assert "not built yet" in run("plan", spec_file).stdout
    assert not spec_file.with_name("work").exists()


def test_train_refuses_what_is_no_dataset(tmp_path: Path) -> None:
    arguments = ("--dataset", tmp_path, "--output", tmp_path / "run")
    check_refused(run("train", "llama32_1b_pretrain_config", *arguments), "dataset.json")


@pytest.mark.parametrize("port", [":9", ""])
def test_doctor_prints_no_secret(port: str, tmp_path: Path) -> None:
    secrets = {
        "AWS_ACCESS_KEY_ID": "AKIAVERYSECRET",
        "AWS_SECRET_ACCESS_KEY": "swordfish",
        "HF_TOKEN": "hf_swordfish",
    }
    addresses = {
        "PREFECT_API_URL": f"http://me:swordfish@127.0.0.1{port}/api",
        "MLFLOW_TRACKING_URI": f"http://me:swordfish@127.0.0.1{port}",
    }
    result = run("doctor", "--workspace", tmp_path, "--json", **secrets, **addresses)
    assert result.returncode == 1
    assert "swordfish" not in result.stdout + result.stderr
    assert "VERYSECRET" not in result.stdout + result.stderr
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert findings["Python"]["state"] == "ok"
    assert findings["S3 credentials"]["found"] == "from AWS_ACCESS_KEY_ID"
    for server in ("Prefect", "MLflow"):
        assert findings[server]["state"] == "missing"
        assert "unset" in findings[server]["advice"]


def test_doctor_is_content_with_this_machine(tmp_path: Path) -> None:
    result = run("doctor", "--workspace", tmp_path)
    assert result.returncode == 0, result.stdout


def test_audit_refuses_what_is_no_release(tmp_path: Path) -> None:
    result = run("audit", "verify", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")


def test_a_full_disk_is_said_in_one_line() -> None:
    """With the job's own failure, if it was the record of that which found no space."""
    program = """
import errno, sys, flows.convert
from bridge.errors import BridgeworksError
from flows.cli import main

def import_from(*places, **options):
    try:
        raise BridgeworksError("the job failed (log: job.log)")
    finally:
        raise OSError(errno.ENOSPC, "No space left on device", "attempts.json")

flows.convert.import_from = import_from
sys.argv = ["bridgeworks", "import", "a", "b"]
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "error: the job failed (log: job.log); then no space was left for attempts.json:"
        " free some and give the command again"
    ]
