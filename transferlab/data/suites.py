"""All published tasks by name, and the suites that are run and averaged as a whole."""
from transferlab.data import coop, domains, fewshot, finegrained, imagenet, mini, vtab
from transferlab.data.entries import Entry

_MODULES = (vtab, domains, imagenet, fewshot, coop, finegrained, mini)

# "vtab/dtd" -> its entry.
ENTRIES: dict[str, Entry] = {entry.name: entry for module in _MODULES for entry in module.ENTRIES}

# What comes before the slash.
PREFIXES: frozenset[str] = frozenset(name.split("/")[0] for name in ENTRIES)

# Suite -> names of its tasks, in the order of the published tables.
SUITES: dict[str, tuple[str, ...]] = {name: tasks for module in _MODULES for name, tasks in module.SUITES.items()}
