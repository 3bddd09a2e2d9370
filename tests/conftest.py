"""What all tests share: four CPU devices made of one, the tiny backbone and task, and the golden numbers."""
import os
from pathlib import Path

# Before jax starts. Goldens and equalities to 1e-6 are float32 on CPU; an accelerator's matrix units round otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the time goes into compiling, and tiny programs run no slower for being made more simply: LLVM without
# optimisation, loops by XLA's older emitter (the newer one goes through MLIR), nothing split for parallel compilation.
# Compiling takes about half as long; `XLA_FLAGS= pytest` tests what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
                      "--xla_cpu_parallel_codegen_split_count=1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_traceback_in_locations_limit", 0)  # no program keeps the source lines of all its operations

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # larger goldens and real data; a plain clone has none


def pytest_addoption(parser):
  parser.addoption("--full", action="store_true", help="also run the tests marked full; -m full runs them alone")


def pytest_configure(config):
  config.addinivalue_line("markers", "full: all methods on all backbones; left out unless --full or -m full")
  # xdist deals tests out to all workers by default. A contiguous half each, and help at the end, lets one worker make
  # a module's fixtures and compile a method's programs.
  if getattr(config.option, "dist", "no") == "load":
    config.option.dist = "worksteal"


def pytest_collection_modifyitems(config, items):
  if config.getoption("--full") or "full" in config.getoption("-m", ""):
    return
  left_out = [item for item in items if "full" in item.keywords]
  if left_out:
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if "full" not in item.keywords]


@pytest.fixture(scope="session")
def shared() -> Path:
  if not SHARED.is_dir():
    pytest.skip("../shared, with goldens and data, is not here")
  return SHARED


@pytest.fixture(scope="session")
def golden():
  """name, such as "dtl_and_petl/dtl_vit.npz" -> its path: the copy in tests/golden, else the original in ../shared."""
  def find(name: str) -> Path:
    for folder in (ROOT / "tests" / "golden", SHARED / "golden"):
      if (folder / name).exists():
        return folder / name
    pytest.skip(f"golden {name} is neither under tests/golden nor in ../shared/golden")
  return find


@pytest.fixture(scope="session")
def tiny_spec():
  from transferlab import backbones
  return backbones.architecture("vit_tiny_test")


@pytest.fixture(scope="session")
def random_weights():
  """spec -> random `Weights`: norms around 1, kernels scaled by their fan-in, the rest small. Drawn on the host, which
  is quicker than compiling initialisers."""
  from transferlab import backbones, tree
  from transferlab.backbones.spec import Preprocessing
  from transferlab.backbones.weights import Weights, weights_hash
  def make(spec, seed: int = 0):
    rng = np.random.default_rng(seed)
    def draw(name, shape):
      noise = rng.standard_normal(shape).astype(np.float32)
      if name.endswith("scale"):
        return 1 + 0.1 * noise
      if name.endswith("var"):
        return 1 + abs(noise)
      return noise * np.float32(np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.1)
    shapes = tree.flatten(backbones.abstract_params(spec))
    params = tree.unflatten({name: draw(name, leaf.shape) for name, leaf in shapes.items()})
    return Weights(spec, params, None, Preprocessing(spec.image_size), spec.name, "random", weights_hash(params, spec))
  return make


@pytest.fixture(scope="session")
def tiny_weights(random_weights, tiny_spec):
  return random_weights(tiny_spec)


@pytest.fixture(scope="session")
def tiny_task():
  """40, 10 and 14 images [16, 16, 3] of 4 classes: a bright square on noise, its corner the class."""
  from transferlab import data
  rng = np.random.default_rng(0)
  labels = np.arange(64) % 4
  images = rng.integers(0, 100, (64, 16, 16, 3), np.uint8)
  for image, label in zip(images, labels):
    image[8 * (label // 2):8 * (label // 2) + 8, 8 * (label % 2):8 * (label % 2) + 8] += 120
  splits = {"train": range(40), "val": range(40, 50), "test": range(50, 64)}
  return data.arrays(images, labels, [f"corner {i}" for i in range(4)], splits, name="corners")
