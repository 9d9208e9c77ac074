from __future__ import annotations

import graphlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
LAYERS = ("kernels", "nim", "defense", "benchmarks", "cli")
# What `denim kernels` is made of: it is there to call Triton's compiler.
BUILDING = "benchmarks.machine_code"

# In the order of the layers, so that nothing above has loaded what a module below must not load.
PROBE = """
import importlib, json, os, sys, tempfile, traceback

out = os.dup(1)
with tempfile.TemporaryFile("w+") as printed:
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    found = {}
    for name in sys.argv[1:]:
        try:
            importlib.import_module(name)
        except Exception:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        printed.seek(0)
        text = printed.read()
        printed.truncate(0)
        printed.seek(0)
        loaded = [other for other in ("xformers", "nvidia.dali", "triton") if other in sys.modules]
        found[name] = {"printed": text, "loaded": loaded, "cuda": sys.modules["torch"].cuda.is_initialized()}
os.write(out, json.dumps(found).encode())
"""


def of_triton(name: str) -> bool:
    return name.endswith("_triton") or BUILDING in name


def modules() -> list[str]:
    found = []
    for layer in LAYERS:
        names = []
        for path in (REPOSITORY / layer).rglob("*.py"):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if parts[-1] != "__main__" and "suites" not in parts:
                names.append(".".join(["denim", *(part for part in parts if part != "__init__")]))
        # What may load Triton comes last.
        found += sorted(names, key=lambda name: (of_triton(name), name))
    return found


def test_no_module_imports_itself_through_others():
    """Imports inside functions count: what needs one to break a circle has its parts in the wrong files."""
    packages = [f"denim.{layer}" for layer in LAYERS]
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=True, cache_dir=None)
    assert len(graph.modules) > 50
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


# Statements in the order in which they may load more, each with the modules of Denim that it must not load; None is not
# checked. Of other packages, only torch, timm and what the models' mixin for the Hugging Face hub needs may be loaded,
# and with the settings not even these.
MIXIN = {"huggingface_hub", "packaging"}
LAYERS_ABOVE = ("denim.benchmarks", "denim.cli")
TRAINING = ("data", "engine", "exchange", "finetuning", "objectives", "pretraining", "run", "settings")
LATE = (*LAYERS_ABOVE, *(f"denim.nim.{name}" for name in TRAINING))
EVALUATION = tuple(f"denim.defense.{name}" for name in ("attacks", "evaluation", "report", "scores"))
LIGHT = {
    "from denim.nim import FinetuneConfig, PretrainConfig": ("denim.kernels", "denim.defense", *LAYERS_ABOVE),
    "import torch": None,
    "import denim.kernels": ("denim.nim", "denim.defense", *LAYERS_ABOVE),
    "import timm": None,
    "from denim.nim import Autoencoder, Classifier, preset, reconstruct": ("denim.defense", *LATE),
    "from denim.defense import De3": (*EVALUATION, *LATE),
}
LOADED = """
import json, sys

loaded = {}
for statement in sys.argv[1:]:
    before = set(sys.modules)
    exec(statement)
    loaded[statement] = sorted(set(sys.modules) - before)
print(json.dumps(loaded))
"""


def test_models_and_defense_load_nothing_that_they_do_not_need(tmp_path):
    run = subprocess.run([sys.executable, "-c", LOADED, *LIGHT], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout)
    for statement, forbidden in LIGHT.items():
        if forbidden is None:
            continue
        own = [name for name in loaded[statement] if name.startswith("denim.")]
        assert own, statement
        early = [
            name for name in own if name.endswith("_triton") or any(f"{name}.".startswith(f"{f}.") for f in forbidden)
        ]
        assert not early, statement
        others = {name.partition(".")[0] for name in loaded[statement]} - sys.stdlib_module_names - {"denim"}
        allowed = {"torch", "timm"} | (set() if statement == "import denim.kernels" else MIXIN)
        assert others <= (set() if "Config" in statement else allowed), statement


@pytest.mark.parametrize("package", ["denim.nim", "denim.defense"])
def test_lazy_names_are_those_of_their_modules(package):
    loaded = importlib.import_module(package)
    assert set(loaded._MODULES) == set(loaded.__all__) <= set(dir(loaded))
    # A submodule takes the place of a name of the package that is its own: import all of them first.
    modules = {name: importlib.import_module(f"{package}.{home}") for name, home in loaded._MODULES.items()}
    for name, module in modules.items():
        assert getattr(loaded, name) is getattr(module, name)
        assert name in module.__all__
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Autoencodr'"):
        loaded.Autoencodr  # noqa: B018


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *modules()],
        env=environment,
        cwd=tmp_path_factory.mktemp("elsewhere"),  # the repository's own folders must not be importable by luck
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", modules())
def test_import_is_silent_and_touches_no_gpu(imported, name):
    found = imported[name]
    assert found["printed"] == ""
    assert not found["cuda"]
    # Optional and heavy: loaded by the call that needs them.
    assert "xformers" not in found["loaded"]
    if "dali" not in name:
        assert "nvidia.dali" not in found["loaded"]
    if name.startswith("denim.kernels") and not of_triton(name):
        assert "triton" not in found["loaded"]
