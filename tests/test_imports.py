"""Who may import whom, read from the source; and that nothing drags TensorFlow in.

A module imports only from layers below its own, or from its own package. Outside the layers: `pretraining`, which made
the bundled backbone and may use anything while nothing uses it.
"""
import ast
import configparser
import functools
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "transferlab"

LAYERS = [  # from the top to the bottom; modules of one layer do not import each other
    "cli quickstart",
    "commands",
    "analysis scale",
    "papers sweep",
    "suite shared grid choice dealing incremental explain",
    "report",
    "experiment serve inform testing",
    "heads",
    "train",
    "search",
    "stage",
    "evaluate checkpoint resume cost workdir",
    "features",
    "step recipe plots sharding",
    "data optim devices metrics",
    "methods",
    "method storage preemption",
    "losses backbones ensembles prompts distributed",
    "config tokenizer signals",
    "tree files progress collectives rendezvous failure",
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer.split()}
# `backbones.spec` is plain data without jax, open to everything above `tree`.
ONLY = {  # library: the only modules that may import it
    "flax": r"backbones\..*|backbones",
    "orbax": r"resume",
    "grain": r"data\.loader",
    "tensorflow_datasets": r"data\..*",
    "tensorflow": r"nothing",
    "torch": r"nothing",
    "huggingface_hub": r"backbones\.weights\..*",
    "ml_collections": r"experiment",
    "matplotlib": r"plots",
    "sklearn": r"data\.memory|pretraining\..*",
    "tokenizers": r"tokenizer",
    "ftfy": r"tokenizer",
}


def modules() -> dict[str, Path]:
  """{"data.loader": path} of all modules of the package; a package goes by its own name."""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


MODULES = modules()


@functools.cache
def imports(path: Path) -> frozenset[str]:
  """Absolute names of what a file imports, inside functions too; `from a import b` gives a.b if that is our module."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.name}: relative import; write transferlab.…"
      whole = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= {name if name.removeprefix("transferlab.") in MODULES else node.module for name in whole}
  return frozenset(found)


def inside(path: Path) -> set[str]:
  """What a file imports from this package, without the package's name."""
  ours = {name for name in imports(path) if name.split(".")[0] == "transferlab"}
  return {name.removeprefix("transferlab").removeprefix(".") for name in ours}


def outside(path: Path) -> set[str]:
  return {name.split(".")[0] for name in imports(path)} - {"transferlab"} - set(sys.stdlib_module_names)


def test_every_module_has_a_layer():
  tops = {name.split(".")[0] for name in MODULES} - {"", "pretraining"}
  assert tops == set(RANK), "a new module needs a place in LAYERS, and a place a module"


@pytest.mark.parametrize("name", [name for name in MODULES if name and not name.startswith("pretraining")])
def test_imports_go_down(name):
  own = name.split(".")[0]
  for used in inside(MODULES[name]):
    top = used.split(".")[0]
    assert top != "pretraining", f"{name} imports {used}, which is outside the core"
    assert top == own or RANK[top] > RANK[own], f"{name} imports {used}, which is not below it"


def test_the_package_itself_imports_nothing_of_its_own_at_first():
  """`transferlab/__init__.py` loads its names on first use, so that data workers and help texts do not wait for jax."""
  assert not inside(MODULES[""]) and not outside(MODULES[""])


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("methods.")])
def test_methods_know_no_particular_backbone(name):
  known = {used for used in inside(MODULES[name]) if used.startswith("backbones")}
  assert known <= {"backbones", "backbones.spec"}, f"{name} imports {known}; a method knows the spec and the sites only"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "data" or name in (
    "tree", "config", "metrics", "files", "progress", "backbones.spec", "backbones.zoo", "backbones.preprocessing",
    "backbones.vit_spec", "backbones.resnet_spec", "backbones.swin_spec")])
def test_data_and_plain_modules_do_without_jax(name):
  heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
  assert not outside(MODULES[name]) & heavy
  own = {module for module in MODULES if module.split(".")[0] == name.split(".")[0]}
  assert inside(MODULES[name]) <= {"backbones.spec", "tree", "files"} | own


@pytest.mark.parametrize("library", ONLY)
def test_libraries_stay_where_they_belong(library):
  users = {name for name, path in MODULES.items() if library in outside(path)}
  strangers = {name for name in users if not re.fullmatch(ONLY[library], name)}
  assert not strangers, f"{library} is imported by {', '.join(sorted(strangers))}"


def test_only_backbones_know_linen():
  for name, path in MODULES.items():
    if "linen" in path.read_text() and any(used.startswith("flax") for used in imports(path)):
      assert name.startswith("backbones."), name


def declared() -> dict[str, set[str]]:
  """{"": required distributions, extra: its distributions} of setup.cfg, normalised."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  groups = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
  name = lambda line: re.split(r"[\s\[<>=!;~]", line.strip())[0].lower().replace("_", "-")
  return {group: {name(line) for line in text.splitlines() if line.strip()} for group, text in groups.items()}


def test_everything_imported_is_declared():
  groups, distributions = declared(), metadata.packages_distributions()
  required, optional = groups.pop(""), set().union(*groups.values())
  for name, path in MODULES.items():
    for library in outside(path):
      belongs = {d.lower().replace("_", "-") for d in distributions.get(library, [library])}
      known = required | optional
      assert belongs & known, f"{name} imports {library} ({', '.join(belongs)}), which setup.cfg does not declare"
      at_the_top = any(library in outside_of(node) for node in ast.parse(path.read_text()).body)
      assert not at_the_top or belongs & required, f"{name} imports {library} at its top, which is only in an extra"


def outside_of(node) -> set[str]:
  if isinstance(node, ast.Import):
    return {alias.name.split(".")[0] for alias in node.names}
  return {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def test_training_leaves_tensorflow_alone():
  """It would add 1.3 GB, 5.7 s and take the accelerator's memory; what prepares data runs it in a subprocess."""
  code = ("import sys, transferlab.train, transferlab.serve, transferlab.experiment, transferlab.data.loader, grain; "
          "heavy = ('tensorflow', 'torch', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'tokenizers', 'ftfy'); "
          "sys.exit(', '.join(m for m in heavy if m in sys.modules) or 0)")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr[-500:]


def test_the_package_and_its_command_start_without_jax():
  code = ("import sys, transferlab, transferlab.cli; "
          "sys.exit(', '.join(m for m in ('jax', 'numpy') if m in sys.modules) or 0)")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr[-500:]
