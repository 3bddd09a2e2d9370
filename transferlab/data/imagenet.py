"""ImageNet and its shifted test sets."""
from transferlab.data.entries import Entry

ENTRIES: tuple[Entry, ...] = ()
SUITES: dict[str, tuple[str, ...]] = {}
