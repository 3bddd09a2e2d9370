"""What the README says runs: its Python blocks, and the method that it shows passes the conformance table."""
import re
from pathlib import Path

import transferlab
from transferlab import methods, testing

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_method_of_your_own_passes_the_conformance_table(monkeypatch):
  monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
  block = next(block for block in BLOCKS if 'METHODS["scale"]' in block)
  names: dict = {}
  exec(compile(block, "README.md", "exec"), names)
  D, L = 16, 3  # vit_tiny_test
  expected = testing.Expected(identity=True, size=lambda spec: D * L, mergeable=False)
  testing.check_method(names["scale"], "vit_tiny_test", expected)


def test_the_names_and_flags_that_the_readme_uses_exist():
  used = set(re.findall(r"\btl\.(\w+)", "".join(BLOCKS)))
  assert used and used <= set(transferlab.__all__) | {"data"}
  paths = re.findall(r"`((?:transferlab|colab|configs|benchmarks)/[\w/.]+)`", README)
  assert paths and all((ROOT / path).exists() for path in paths), paths


def test_placeholders_are_gone():
  assert not re.search(r"@[A-Z]+@", README)
