"""Small tasks of real images."""
from transferlab.data.entries import Entry

ENTRIES: tuple[Entry, ...] = ()
SUITES: dict[str, tuple[str, ...]] = {}
