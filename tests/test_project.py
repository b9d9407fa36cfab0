"""What the project says of itself: its version, its dependencies, its workflows and hooks."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import frozen_optax as fo

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# What a package is called where it is imported, if that is not its name.
IMPORTED_AS = {"dm-haiku": "haiku", "frozen-optax": "frozen_optax", "orbax-checkpoint": "orbax"}
IMPORTED_AS |= {"absl-py": "absl", "ott-jax": "ott"}
# Measured or made where it happens to be installed, and needed by nobody else.
OPTIONAL = {"examples/make_reference.py": "sentence_transformers"}
OPTIONAL |= {"benchmarks/torch_reference.py": "torch"}


def text(path):
    return (ROOT / path).read_text()


def test_the_version_is_written_once():
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("frozen-optax") == fo.__version__
    assert re.search(rf"^## \[{re.escape(fo.__version__)}\]", text("CHANGELOG.md"), re.M)


def declared(requirements):
    """What the requirements, and the extras that they name, let one import."""
    names = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        names.add(IMPORTED_AS.get(name, name.replace("-", "_")))
        if name == "frozen-optax":  # the extras of others are theirs
            for extra in filter(None, (extras or "").split(",")):
                names |= declared(EXTRAS[extra])
    return names


def imported(path):
    """The packages that a file imports, at its head or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


NEEDS = {
    "frozen_optax": PROJECT["dependencies"],
    "examples": [*PROJECT["dependencies"], "frozen-optax", *EXTRAS["examples"]],
    "benchmarks": [*PROJECT["dependencies"], "frozen-optax", *EXTRAS["benchmarks"]],
    "tests": [*PROJECT["dependencies"], "frozen-optax", *EXTRAS["test"]],
}
# Kept apart, as they need more: what each needs, beside what the folder around it needs.
APART = {"tests/trainers": EXTRAS["trainers"]}


@pytest.mark.parametrize("folder", NEEDS)
def test_every_package_that_is_imported_is_declared(folder):
    known = declared(NEEDS[folder]) | set(sys.stdlib_module_names) | {folder, "benchmarks"}
    for path in (ROOT / folder).rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        more = declared(APART.get(path.parent.relative_to(ROOT).as_posix(), []))
        siblings = {each.stem for at in (path.parent, ROOT / folder) for each in at.glob("*.py")}
        unknown = set(imported(path)) - known - more - siblings - {OPTIONAL.get(name)}
        assert not unknown, name


def test_each_trainer_that_is_declared_trains_in_a_test():
    """And nothing else does: what is not declared would be missing where the stage installs it."""
    files = {path.stem for path in (ROOT / "tests/trainers").glob("test_*.py")}
    names = declared(EXTRAS["trainers"]) - {"paramax"}  # of flowjax
    assert files == {f"test_{name}" for name in names}
    on_the_page = text("docs/frameworks.md").partition("| package | its loop |")[2]
    told = on_the_page.partition("\n\n")[0].splitlines()[2:]
    assert [line.split()[1] for line in told] == sorted(names)


def test_trainers_are_tested_by_a_stage_and_not_by_the_ordinary_command():
    stage = text(".ci/run").partition("other_peoples_trainers() (")[2].partition("\n)\n")[0]
    assert "-m pytest -n 2 tests/trainers tests/published\n" in stage
    oldest = stage.partition("tests/oldest.txt")[2]
    assert "-m pytest -n 2 tests/published" in oldest
    there = set(re.search(r"'\.\[test\]' (.*)", oldest)[1].replace("'", "").split())
    left_out = set(re.search(r"test_\{(.*)\}", oldest)[1].split(","))
    assert declared(there) | left_out == declared(EXTRAS["trainers"]) - {"paramax"}
    assert not declared(there) & left_out
    options = tomllib.loads(text("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    assert {"trainers", "published"} < set(options["norecursedirs"])


def test_the_oldest_versions_that_are_allowed_are_tested():
    pinned = dict(line.split("==") for line in text("tests/oldest.txt").splitlines())
    frameworks = [each for each in EXTRAS["test"] if re.match("dm-haiku|equinox", each)]
    allowed = dict(each.split(">=") for each in [*PROJECT["dependencies"], *frameworks])
    assert len(allowed) == len(PROJECT["dependencies"]) + 2
    for name, oldest in allowed.items():
        numbers = oldest.split(".")
        assert pinned[name].split(".")[: len(numbers)] == numbers, name


def test_the_workflows_run_stages_that_there_are():
    stages = set(re.findall(r"^    (\w+)\) ", text(".ci/run"), re.M))
    assert stages == {"oldest", "readme", "newest", "exhaustive", "trainers", "lint", "wheel"}
    workflow = text(".github/workflows/test.yml")
    assert "run: .ci/run ${{ matrix.stage }}" in workflow
    run = set(re.findall(r"stage: \[?(\w+)", workflow))
    assert run == stages - {"newest"}  # each Python has a job of its own there
    told = set(re.findall(r"^\| `\.ci/run (\w+)` ", text("CONTRIBUTING.md"), re.M))
    assert told == stages


def test_the_hooks_format_with_the_version_of_the_checks():
    (pinned,) = re.findall(r"ruff==([\d.]+)", " ".join(EXTRAS["test"]))
    hooks = text(".pre-commit-config.yaml")
    assert f"ruff-pre-commit\n    rev: v{pinned}\n" in hooks


def test_every_python_that_is_named_is_tested():
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    workflow = text(".github/workflows/test.yml")
    (tested,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r"3\.\d+", tested) == named
    assert PROJECT["requires-python"] == f">={named[0]}"
