"""VTAB-1k."""
from transferlab.data.entries import Entry

ENTRIES: tuple[Entry, ...] = ()
SUITES: dict[str, tuple[str, ...]] = {}
