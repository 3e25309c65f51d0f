"""What a user installs: one list of dependencies, a module that needs three of them, and examples that run."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from pruning_utils import cost, outputs

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIST = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(LIST)["project"]
EXTRAS = {name: [*map(Requirement, texts)] for name, texts in PROJECT["optional-dependencies"].items()}
NEEDED = [*map(Requirement, PROJECT["dependencies"])]
LISTED = [requirement for group in (NEEDED, *EXTRAS.values()) for requirement in group]
LINES = re.findall(r"(?m)^[^#\n].*", (ROOT / "constraints.txt").read_text())
PINS = {canonicalize_name(pin.name): pin for pin in map(Requirement, LINES)}
FOREIGN = ("matplotlib", "pandas", "seaborn", "tqdm", "IPython", "joblib", "cloudpickle", "study")


@pytest.mark.parametrize("requirement", LISTED, ids=str)
def test_every_dependency_is_listed_with_a_reason_and_pinned_within_its_range(requirement):
    assert re.search(rf'(?m)^ +"{re.escape(requirement.name)}[\[=><].*", +# \S+', LIST)
    if not requirement.marker or requirement.marker.evaluate({"python_version": "3.11"}):  # of constraints.txt
        (exact,) = PINS[canonicalize_name(requirement.name)].specifier
        assert exact.operator == "==" and requirement.specifier.contains(exact.version)


def test_conda_brings_python_and_pip_which_brings_extras_that_exist():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [name.split("=")[0] for name in conda] == ["python", "pip"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{conda[0].split('=')[1]}.0")
    assert pip["pip"][0] == "--constraint constraints.txt"
    extras = re.findall(r"\.\[([\w,]+)\]", pip["pip"][1] + (ROOT / "Makefile").read_text() + README)
    assert {"study", "test", "gpu"} <= set(extras[0].split(","))
    assert set(",".join(extras).split(",")) <= set(EXTRAS)  # pip would only warn


def test_the_gpu_extra_is_the_same_tensorflow_with_cuda_on_linux_x86_only():
    (gpu,) = EXTRAS["gpu"]
    plain = next(requirement for requirement in EXTRAS["study"] if requirement.name == "tensorflow")
    assert (gpu.name, gpu.extras, gpu.specifier) == (plain.name, {"and-cuda"}, plain.specifier)
    for system, cpu in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "x86_64")):
        here = {"sys_platform": system, "platform_machine": cpu}
        assert gpu.marker.evaluate(here) == (system == "linux" and cpu == "x86_64")


def test_ci_and_pre_commit_use_what_is_pinned():
    assert "make test" in (ROOT / ".ci/run").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert any(step.get("run") == ".ci/run" for step in workflow["jobs"]["test"]["steps"])
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert PINS["ruff"].specifier.contains(hooks["rev"].removeprefix("v"))


IMPORTED = f"""
import os, sys
sys.modules.update(dict.fromkeys({FOREIGN}))  # as if they were not installed
import keras
modules, variables = set(sys.modules), dict(os.environ)
print("before", flush=True), print("before", file=sys.stderr, flush=True)
import pruning_utils
assert dict(os.environ) == variables
loaded = {{name.split(".")[0] for name in set(sys.modules) - modules}} - sys.stdlib_module_names
assert loaded <= {{"pruning_utils", "keras", "numpy", "scipy"}}, loaded
"""
PRUNED = f"""
import importlib.util, keras, numpy as np
from pruning_utils import outputs, prune_neurons, repair, shrink
assert not [name for name in {(*FOREIGN, "tensorflow")} if importlib.util.find_spec(name)]
@keras.saving.register_keras_serializable()
def clipped(signal): return keras.ops.clip(signal, 0, 6)
keras.utils.set_random_seed(0)
hidden = [keras.layers.Dense(units, clipped, bias_initializer="random_normal") for units in (32, 16)]
network = keras.Sequential([keras.Input((8,)), *hidden, keras.layers.Dense(3)])
x = np.random.default_rng(0).normal(size=(512, 8)).astype("float32")
wanted = network.predict(x, verbose=0)
pruned = prune_neurons(network, 0.5)
small = shrink(repaired := repair(pruned, network, x))
errors = [np.mean((outputs(each, x) - wanted) ** 2) for each in (small, pruned)]
assert errors[0] < 0.5 * errors[1], errors
assert [(layer.units, layer.activation) for layer in small.layers[:2]] == [(16, clipped), (8, clipped)]
np.testing.assert_allclose(small.predict(x, verbose=0), repaired.predict(x, verbose=0), atol=1e-5)
fresh = keras.models.clone_model(small)
assert all(layer.get_weights()[0].any() for layer in fresh.layers)  # initialised, and not by zeros
"""


def test_importing_the_module_loads_writes_and_sets_nothing():
    variables = {"PATH": os.environ["PATH"], "KERAS_BACKEND": keras.backend.backend()}  # ours may be set already
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [text.split("before\n")[1] for text in (done.stdout, done.stderr)] == ["", ""]


def test_the_module_can_be_imported_without_stderr():
    subprocess.run(["sh", "-c", '"$0" -c "import pruning_utils" 2>&-', sys.executable], cwd=ROOT, check=True)


def with_requirements(*names: str) -> dict[str, Distribution]:
    found, left = {}, [*names]
    while left:
        if (name := canonicalize_name(left.pop())) not in found:
            found[name] = distribution(name)
            required = map(Requirement, found[name].requires or [])
            left += [each.name for each in required if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


def test_the_wheel_needs_its_dependencies_and_a_backend_and_nothing_else(tmp_path):
    user, on_jax = tmp_path / "user", os.environ | {"KERAS_BACKEND": "jax"}
    for name in ("pyproject.toml", "README.md", "LICENSE", "pruning_utils.py"):  # a build leaves things beside them
        shutil.copy(ROOT / name, tmp_path)
    venv.create(user, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": user}))
    for installed in with_requirements("jax", *(requirement.name for requirement in NEEDED)).values():
        for part in {file.parts[0] for file in installed.files} - {"..", "__pycache__"}:
            (packages / part).symlink_to(installed.locate_file(part))
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, *install, packages, tmp_path], check=True)
    subprocess.run([user / "bin/python", "-I", "-c", PRUNED], env=on_jax, check=True)


def rows(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in markdown.splitlines() if "|" in line]


def test_the_readme_quotes_the_benchmark():
    bench = (ROOT / "data/bench.md").read_text(encoding="utf-8")
    head, _, *quoted = rows(README.split("<!-- bench -->")[1].split("<!-- /bench -->")[0])
    measured = {(what, peer): ratio.split(" ")[0] for what, peer, _, _, ratio, _ in rows(bench)}
    assert quoted and head == ["what", "compared with", "ours / theirs"]
    assert [row for row in quoted if measured[row[0], row[1]] != row[2]] == []


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).random((50, 28, 28, 1), np.float32), np.arange(50) % 10
    names = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    loaded = keras.models.load_model("small.keras")
    assert cost(loaded)["bytes"] < cost(names["network"])["bytes"]
    np.testing.assert_array_equal(outputs(loaded, x), outputs(names["small"], x))
