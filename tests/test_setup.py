"""pyproject.toml is the one list of dependencies; constraints.txt and environment.yml must agree with it."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LISTED = [Requirement(text) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts]
TESTED = {"python_version": "3.11"}  # what constraints.txt was written on
PINS = {
    Requirement(line).name.lower().replace("_", "-"): Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


@pytest.mark.parametrize(
    "requirement",
    [r for r in LISTED if not r.marker or r.marker.evaluate(TESTED)],
    ids=lambda requirement: requirement.name,
)
def test_every_dependency_is_pinned_at_a_version_its_range_allows(requirement):
    pin = PINS[requirement.name.lower()]
    (exact,) = pin.specifier
    assert exact.operator == "=="
    assert requirement.specifier.contains(exact.version)


def test_every_dependency_is_listed_with_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in LISTED:
        assert re.search(rf'^ +"{re.escape(requirement.name)}[=><].*", +# \S+', text, re.MULTILINE), requirement.name


def test_conda_brings_python_and_pip_and_nothing_else():
    *conda, pip = ENVIRONMENT["dependencies"]
    assert [re.split("=", name)[0] for name in conda] == ["python", "pip"]
    python = conda[0].split("=")[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    assert pip == {"pip": ["--constraint constraints.txt", "--editable .[deploy,gpu,test]"]}


def test_the_gpu_extra_is_the_same_tensorflow_with_cuda_on_linux_x86_only():
    plain = next(requirement for requirement in LISTED if requirement.name == "tensorflow")
    (gpu,) = [Requirement(text) for text in EXTRAS["gpu"]]
    assert (gpu.name, gpu.extras, gpu.specifier) == (plain.name, {"and-cuda"}, plain.specifier)
    here = {"sys_platform": "linux", "platform_machine": "x86_64"}
    assert gpu.marker.evaluate(here)
    assert not gpu.marker.evaluate(here | {"platform_machine": "aarch64"})
    assert not gpu.marker.evaluate(here | {"sys_platform": "darwin"})


def test_ci_and_pre_commit_use_what_is_pinned():
    assert "make test" in (ROOT / ".ci/run").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert any(step.get("run") == ".ci/run" for step in workflow["jobs"]["test"]["steps"])
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert PINS["ruff"].specifier.contains(hooks["rev"].removeprefix("v"))


def rows(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in markdown.splitlines() if "|" in line]


def test_the_readme_quotes_the_benchmark():
    readme, bench = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "data/bench.md"))
    head, _, *quoted = rows(readme.split("<!-- bench -->")[1].split("<!-- /bench -->")[0])
    measured = {(what, peer): ratio.split(" ")[0] for what, peer, _, _, ratio, _ in rows(bench)}
    assert head == ["what", "compared with", "ours / theirs"]
    assert len(quoted) >= 8
    assert [row for row in quoted if measured[row[0], row[1]] != row[2]] == []
