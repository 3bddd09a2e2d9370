"""Pictures of results, each beside a CSV file with its numbers: a heat map, points and curves, portraits.

Without matplotlib (the [plot] extra) the numbers are written all the same. Nothing opens a window.
"""
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transferlab.files import atomic
from transferlab.progress import say

PLAIN = {"fontsize": 8, "parse_math": False}  # "$" is part of a name
MARKERS = "osD^vP*X<>"
MOST_NUMBERS, MOST_LABELS = 30, 120  # of columns whose cells show their numbers; of rows or columns that show names


class Point(NamedTuple):
  """A point of a picture; `spread` is half an error bar's length, None for none; `label` is written beside it."""
  x: float
  y: float
  spread: float | None = None
  label: str = ""


def make_folder(folder: Path) -> None:
  """Makes a folder, and those above it, unless it is there."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"cannot write to {folder} ({error.strerror}); give a folder that you may write to") from None


def table(path, header: Sequence[str], rows: Iterable[Sequence]) -> Path:
  """Writes a CSV file, whole or not at all. None and NaN become empty cells; its folder is made if need be."""
  path = Path(path)
  make_folder(path.parent)
  blank = lambda cell: "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else cell
  with atomic(path) as temporary, open(temporary, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows([blank(cell) for cell in row] for row in rows)
  return path


def heat_map(path, values, rows: Sequence[str], columns: Sequence[str], *, title: str = "", xlabel: str = "",
             ylabel: str = "", label: str = "", limits: tuple[float | None, float | None] = (None, None),
             digits: int | None = None, colours=None) -> list[Path]:
  """Writes `path`.csv with the values, and `path`.png with a colour for each.

  Args:
    path: of both files, without their suffix.
    values: [R, C] numbers; NaN marks what is missing, an empty cell and a grey one.
    rows, columns: R and C labels.
    title, xlabel, ylabel: of the picture; the two axes' names stand in the table's corner, too.
    label: what a colour stands for.
    limits: values at the ends of the colours, None for the smallest and the largest there are.
    digits: decimals of the numbers written into the cells of at most 30 columns; None writes none.
    colours: [R, C], what the colours show if not the values.

  Returns:
    The files written; the picture is left out, with a message, where matplotlib is missing.
  """
  values = np.asarray(values)
  if values.shape != (len(rows), len(columns)) or not values.size:
    raise ValueError(f"values are {list(values.shape)}; expected [{len(rows)}, {len(columns)}], a row per label and a "
                     "column per label, and at least one of each")
  corner = " \\ ".join(filter(None, (ylabel, xlabel)))
  written = [table(f"{path}.csv", [corner, *columns], ([name, *row.tolist()] for name, row in zip(rows, values)))]
  numbers = digits is not None and len(columns) <= MOST_NUMBERS
  figure = _figure(max(_side(columns, rows, 0.5 if numbers else 0.24, 0.115), 0.09 * len(title)) + 1,
                   _side(rows, columns, 0.3, 0.085))
  if figure is None:
    return written
  shown = np.asarray(values if colours is None else colours, np.float64)
  axes = figure.subplots()
  axes.set_facecolor("lightgrey")  # seen where there is no value
  image = axes.imshow(shown, vmin=limits[0], vmax=limits[1], cmap="viridis", aspect="auto")
  if len(columns) <= MOST_LABELS:
    axes.set_xticks(range(len(columns)), columns, rotation=90, **PLAIN)
  if len(rows) <= MOST_LABELS:
    axes.set_yticks(range(len(rows)), rows, **PLAIN)
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.set_title(title, **{**PLAIN, "fontsize": 10})
  if numbers:
    _write_numbers(axes, image, values, shown, digits)
  figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02, aspect=40)
  return [*written, _save(figure, path)]


def points(path, series: Mapping[str, Sequence[Point]], *, title: str = "", xlabel: str = "", ylabel: str = "",
           lines: bool = False, log: bool = False) -> list[Path]:
  """Writes `path`.csv with the points, and `path`.png with them in a plane.

  Series share the plane and have a colour and a marker each; where points have labels, each series has a plane of its
  own, side by side and alike.

  Args:
    path: of both files, without their suffix.
    series: {name: its points}.
    title, xlabel, ylabel: of the picture; the table's columns of x and y have the axes' names.
    lines: join the points of a series, in the order of x.
    log: the x axis is logarithmic, with a tick at every x there is.

  Returns:
    The files written; the picture is left out, with a message, where matplotlib is missing.
  """
  if not any(series.values()):
    raise ValueError("there is no point to draw; expected a series with one at least")
  written = [table(f"{path}.csv", ["series", "label", xlabel or "x", ylabel or "y", "spread"], (
      [name, p.label, p.x, p.y, p.spread] for name, found in series.items() for p in found))]
  labelled = any(p.label for found in series.values() for p in found)
  planes = len(series) if labelled else 1
  figure = _figure(6 * planes if labelled else 8.5, 5.5 if labelled else max(5.0, 0.22 * len(series) + 1))
  if figure is None:
    return written
  axes = figure.subplots(1, planes, sharex=True, sharey=True, squeeze=False)[0]
  for i, (name, found) in enumerate(series.items()):
    _draw(axes[i % planes], i, name, found, lines)
  for each in axes:
    if log:
      _log(each, {p.x for found in series.values() for p in found})
    each.set_xlabel(xlabel)
    each.grid(alpha=0.3)
    each.margins(x=0.1 if labelled else 0.05)
  axes[0].set_ylabel(ylabel)
  if labelled:
    for each, name in zip(axes, series):
      each.set_title(name, **{**PLAIN, "fontsize": 10})
  else:
    for text in figure.legend(loc="outside right upper", fontsize=8).get_texts():
      text.set_parse_math(False)
  figure.suptitle(title, fontsize=11, parse_math=False)
  return [*written, _save(figure, path)]


class Plane(NamedTuple):
  """One of several planes of a picture."""
  title: str
  xlabel: str
  ylabel: str
  series: Mapping[str, Sequence[Point]]


def planes(path, found: Sequence[Plane], *, title: str = "", lines: bool = True, columns: int = 3) -> list[Path]:
  """Writes `path`.csv with the points of all planes, and `path`.png with the planes side by side, `columns` in a row.

  A series has the same colour and marker in every plane. Where `lines` join points, there is a tick at every x; labels
  stay in the table.

  Returns:
    The files written; the picture is left out, with a message, where matplotlib is missing.
  """
  found = [plane for plane in found if any(plane.series.values())]
  if not found:
    raise ValueError("there is no point to draw; expected a plane with one at least")
  written = [table(f"{path}.csv", ["plane", "series", "label", "x", "y", "spread"], (
      [plane.title, name, p.label, p.x, p.y, p.spread] for plane in found for name, line in plane.series.items()
      for p in line))]
  columns = min(columns, len(found))
  figure = _figure(4.6 * columns + 1.5, 3.8 * -(-len(found) // columns) + 0.6)
  if figure is None:
    return written
  axes = figure.subplots(-(-len(found) // columns), columns, squeeze=False).flat
  names = list(dict.fromkeys(name for plane in found for name in plane.series))
  handles = {}
  for each, plane in zip(axes, found):
    for name, line in plane.series.items():
      _draw(each, names.index(name), name, [p._replace(label="") for p in line], lines)
    handles |= dict(zip(*reversed(each.get_legend_handles_labels())))
    each.set(xlabel=plane.xlabel, ylabel=plane.ylabel)
    each.set_title(plane.title, **{**PLAIN, "fontsize": 10})
    each.grid(alpha=0.3)
    if lines:
      each.set_xticks(sorted({p.x for line in plane.series.values() for p in line}))
  for each in list(axes)[len(found):]:
    each.set_axis_off()
  if len(names) > 1:
    for text in figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8).get_texts():
      text.set_parse_math(False)
  figure.suptitle(title, fontsize=11, parse_math=False)
  return [*written, _save(figure, path)]


def portrait(path, image: np.ndarray, bars: Mapping[str, Sequence[float]], shares: Mapping[str, Sequence[float]],
             labels: Sequence[str], *, title: str = "") -> list[Path]:
  """Writes `path`.png: an image, planes of bars one above the other, and beside them shares by name.

  Args:
    image: [H, W, 3] uint8.
    bars: {plane: a height from 0 to 1 for each place 1, 2, …}.
    shares: {name: one share from 0 to 1 for each of `labels`}, from the top to the bottom.
    labels: what each name's shares are, in the legend.

  Returns:
    The picture; nothing, with a message, where matplotlib is missing.
  """
  figure = _figure(11, 4.2)
  if figure is None:
    return []
  left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.2, 1.1))
  axes = left.subplots()
  axes.imshow(image[::max(image.shape[0] // 512, 1), ::max(image.shape[1] // 512, 1)], extent=(
      0, image.shape[1], image.shape[0], 0))
  axes.set_axis_off()
  for each, (name, heights) in zip(middle.subplots(len(bars), 1, squeeze=False)[:, 0], bars.items()):
    each.bar(range(1, len(heights) + 1), heights, color="C0")
    each.set_xticks(range(1, len(heights) + 1, 1 + len(heights) // 16))
    each.set_ylim(0, 1)
    each.set_title(name, **PLAIN)
    each.tick_params(labelsize=7)
  axes = right.subplots()
  thick = 0.8 / len(labels)
  for i, label in enumerate(labels):
    axes.barh([k + i * thick for k in range(len(shares))], [each[i] for each in shares.values()], thick, label=label)
  axes.set_yticks([k + (len(labels) - 1) * thick / 2 for k in range(len(shares))], list(shares), **PLAIN)
  axes.invert_yaxis()
  axes.set_xlim(0, 1)
  axes.set_xlabel("probability", fontsize=8)
  axes.tick_params(axis="x", labelsize=7)
  right.legend(loc="outside lower center", ncols=len(labels), fontsize=8)
  figure.suptitle(title, fontsize=10, parse_math=False)
  return [_save(figure, path)]


def _log(axes, places: set[float]) -> None:
  """A logarithmic x axis with ticks at the places alone."""
  axes.set_xscale("log")
  axes.set_xticks(sorted(places), [f"{x:g}" for x in sorted(places)])
  axes.set_xticks([], minor=True)


def _side(along: Sequence[str], across: Sequence[str], cell: float, letter: float) -> float:
  """Inches of one side of a heat map: its cells, beside them the names of the other axis."""
  cells = len(along) * (cell if len(along) <= MOST_LABELS else 0.06)
  return 1.2 + cells + (letter * max(map(len, across)) if len(across) <= MOST_LABELS else 0.5)


def _write_numbers(axes, image, values, shown, digits: int) -> None:
  """Every value in its cell, in a colour that stands out from `shown`, the cell's own."""
  for i, j in zip(*np.nonzero(np.isfinite(values))):
    colour = "white" if image.norm(shown[i, j]) < 0.6 else "black"
    axes.text(j, i, f"{values[i, j]:.{digits}f}", ha="center", va="center", fontsize=7, color=colour)


def _draw(axes, index: int, name: str, found: Sequence[Point], lines: bool) -> None:
  """One series, in its colour and with its marker."""
  found = sorted(found, key=lambda point: point.x) if lines else found
  colour, marker = f"C{index % 10}", MARKERS[index // 10 % len(MARKERS)]
  axes.errorbar([p.x for p in found], [p.y for p in found], [math.nan if p.spread is None else p.spread for p in found],
                marker=marker, markersize=5, capsize=2, linestyle="-" if lines else "none", linewidth=1, color=colour,
                label=name)
  for p in found:
    if p.label:
      axes.annotate(p.label, (p.x, p.y), (4, 3), textcoords="offset points", **{**PLAIN, "fontsize": 7})


def _figure(width: float, height: float):
  """An empty figure of so many inches, or None where matplotlib is missing."""
  try:
    from matplotlib.figure import Figure
  except ImportError:
    say("no picture: it needs matplotlib, pip install 'transferlab[plot]'")
    return None
  return Figure(figsize=(min(max(width, 4), 40), min(max(height, 3), 40)), layout="constrained")


def _save(figure, path) -> Path:
  picture = Path(f"{path}.png")
  with atomic(picture) as temporary:
    figure.savefig(temporary, format="png", dpi=120)
  return picture
