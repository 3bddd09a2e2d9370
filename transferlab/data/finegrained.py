"""Fine-grained sets and ImageNet-to-Sketch."""
from transferlab.data.entries import Entry

ENTRIES: tuple[Entry, ...] = ()
SUITES: dict[str, tuple[str, ...]] = {}
