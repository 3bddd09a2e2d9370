"""Shape formulas: figures with a mask and a scalar drawn over them, in families of classes as in `fields`.

A family is a function `(cls, rng, pose, size) -> (mask [S, S], inner [S, S])`, both in [0, 1]. `inner` says where on
the figure a pixel lies (distance from the centre, part, density, stroke) and may be turned into colour or height.

Sources of the ideas: iterated function systems, Barnsley 1988, as pre-training images, Kataoka et al. 2020
(arXiv 2101.08515), with contractions drawn by their singular values as in Anderson and Farrell 2022 (arXiv 2110.03091);
radial contours, Kataoka et al. 2022 (arXiv 2206.09132); the superformula, Gielis 2003; branching, Lindenmayer 1968.
"""
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from transferlab.pretraining.fields import grid, log_uniform


class Pose(NamedTuple):
  """Where a figure lies: image point = matrix @ figure point + centre; figures fill about [-1, 1]."""
  matrix: np.ndarray  # [2, 2]
  centre: np.ndarray  # [2]


def pose(rng, main: bool) -> Pose:
  """Main figures lie near the middle and nearly upright; others anywhere and any way up."""
  scale = rng.uniform(0.5, 0.95) if main else rng.uniform(0.15, 0.6)
  angle = rng.normal(0, 0.2) if main else rng.uniform(0, 2 * np.pi)
  stretch, shear = log_uniform(rng, 0.75, 1.33), rng.normal(0, 0.15)
  c, s = np.cos(angle), np.sin(angle)
  matrix = scale * np.array([[c, -s], [s, c]]) @ np.array([[stretch ** 0.5, shear], [0, stretch ** -0.5]])
  return Pose(matrix, rng.uniform(-1, 1, 2) * (0.9 - 0.8 * scale if main else 0.9))


def local(pose: Pose, size: int):
  """Pixel coordinates as the figure sees them, x, y [S, S]."""
  x, y = grid(size)
  m = np.linalg.inv(pose.matrix).astype(np.float32)
  x, y = x - np.float32(pose.centre[0]), y - np.float32(pose.centre[1])
  return m[0, 0] * x + m[0, 1] * y, m[1, 0] * x + m[1, 1] * y


def fill(radius, rho, pose: Pose, size: int):
  """Mask and relative distance of the figure rho < radius, both [S, S]; the edge is about a pixel soft."""
  scale = math.sqrt(abs(np.linalg.det(pose.matrix))) * size / 2
  return np.clip((radius - rho) * scale + 0.5, 0, 1), np.clip(rho / np.maximum(radius, 1e-3), 0, 1)


def polar(pose: Pose, size: int):
  x, y = local(pose, size)
  return np.arctan2(y, x), np.hypot(x, y)


def polygon(cls, rng, pose, size):
  """Regular polygons and stars."""
  sides, inner, turn = cls.integers(3, 10), cls.choice([0, 0, 1]) * cls.uniform(0.3, 0.8), cls.uniform(0, 6.3)
  theta, rho = polar(pose, size)
  sector = np.abs(np.mod((theta + turn) * sides / (2 * np.pi), 1) - 0.5) * 2  # 0 mid-side, 1 at a corner
  if inner:
    radius = inner / (1 - (1 - inner) * sector)
  else:
    radius = math.cos(math.pi / sides) / np.cos(np.pi / sides * sector)
  return fill(radius, rho, pose, size)


def contour(cls, rng, pose, size, lines: int = 0):
  """A closed curve of random harmonics; with `lines`, that many nested outlines."""
  order = np.arange(2, 2 + cls.integers(2, 8))
  amplitude = cls.uniform(0, 0.5, len(order)) / np.sqrt(order) + rng.normal(0, 0.015, len(order))
  phase = cls.uniform(0, 6.3, len(order)) + rng.normal(0, 0.1, len(order))
  theta, rho = polar(pose, size)
  table = np.linspace(-np.pi, np.pi, 257)
  radius = 1 + (amplitude[:, None] * np.cos(order[:, None] * table + phase[:, None])).sum(0)
  radius = np.interp(theta, table, np.maximum(radius, 0.15) / radius.max()).astype(np.float32)
  mask, inner = fill(radius, rho, pose, size)
  if lines:
    phase = inner * lines - rng.uniform(0, 1)
    mask = mask * np.clip(3 * np.cos(2 * np.pi * phase) - 1, 0, 1)
  return mask, inner


def nested(cls, rng, pose, size):
  return contour(cls, rng, pose, size, lines=int(cls.integers(2, 7)))


def superformula(cls, rng, pose, size):
  m, n1 = cls.integers(2, 12), log_uniform(cls, 0.4, 6)
  n2, n3 = n1 * log_uniform(cls, 0.5, 4), n1 * log_uniform(cls, 0.5, 4)
  theta, rho = polar(pose, size)
  table = np.linspace(-np.pi, np.pi, 257)
  radius = (np.abs(np.cos(m * table / 4)) ** n2 + np.abs(np.sin(m * table / 4)) ** n3 + 1e-6) ** (-1 / n1)
  return fill(np.interp(theta, table, radius / radius.max()).astype(np.float32), rho, pose, size)


def petals(cls, rng, pose, size):
  """Rings of petals about a disc, as flowers have."""
  rings, count, sharp = cls.integers(1, 4), cls.integers(3, 18), log_uniform(cls, 0.3, 2)
  depth, core, turn = cls.uniform(0.3, 0.95), cls.uniform(0.1, 0.45), rng.uniform(0, 6.3)
  theta, rho = polar(pose, size)
  mask, inner = np.zeros_like(rho), np.zeros_like(rho)
  for ring in range(rings + 1):
    if ring == rings:
      radius = np.full_like(rho, core)
    else:
      lobe = np.abs(np.cos((theta + turn + ring * np.pi / count) * count / 2)) ** sharp
      radius = (1 - (1 - core) * 0.8 * ring / rings) * (1 - depth + depth * lobe)
    m, r = fill(radius, rho, pose, size)
    inner = np.where(m > 0.5, (ring + r) / (rings + 1), inner)
    mask = np.maximum(mask, m)
  return mask, inner


def drawing(size: int):
  picture = Image.new("L", (2 * size, 2 * size))
  return picture, ImageDraw.Draw(picture)


def pixels(picture, size: int):
  """A drawing at twice the size, averaged to [S, S] in [0, 1]."""
  return np.asarray(picture, np.float32).reshape(size, 2, size, 2).mean((1, 3)) / 255


def to_canvas(points, pose: Pose, size: int):
  return ((points @ pose.matrix.T + pose.centre + 1) * size)  # [N, 2] on the doubled canvas


def draw_line(draw, points, width: float):
  draw.line([tuple(p) for p in points], fill=255, width=max(1, round(width)), joint="curve")
  for x, y in (points[0], points[-1]):
    draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)


def smooth(points, closed: bool, samples: int = 8):
  """Uniform cubic B-spline through the neighbourhood of control points [N, 2]; open curves keep their ends."""
  points = np.concatenate([points[-1:], points, points[:2]]) if closed else np.concatenate(
      [points[:1], points[:1], points, points[-1:], points[-1:]])
  t = (np.arange(samples) / samples)[:, None, None]
  a, b, c, d = points[:-3], points[1:-2], points[2:-1], points[3:]
  curve = (1 - t) ** 3 * a + (3 * t ** 3 - 6 * t ** 2 + 4) * b + (1 + 3 * t + 3 * t * t - 3 * t ** 3) * c + t ** 3 * d
  return np.concatenate([curve.transpose(1, 0, 2).reshape(-1, 2) / 6, curve[0, :1] / 6 if closed else points[-1:]])


def boxed(points):
  """Points [N, 2] moved and scaled so that the longer side of their box is [-0.9, 0.9]."""
  low, high = points.min(0), points.max(0)
  return (points - (low + high) / 2) * (1.8 / max((high - low).max(), 1e-6))


def strokes(cls, rng, pose, size):
  """One to three pen strokes between places of a coarse grid: curves, corners, loops, as in scripts nobody writes."""
  width = log_uniform(rng, 0.1, 0.45) * math.sqrt(abs(np.linalg.det(pose.matrix))) * size
  picture, draw = drawing(size)
  inner = np.zeros((size, size), np.float32)
  lines, looks = [], []
  for _ in range(count := cls.choice([1, 2, 3], p=[0.6, 0.25, 0.15])):
    nodes = np.stack([cls.integers(-1, 2, 6), cls.integers(-2, 3, 6) * 0.75], -1)              # [6, 2]
    nodes = nodes[:cls.integers(3, 7) if count == 1 else cls.integers(2, 5)]
    nodes = nodes[np.concatenate([[True], np.abs(np.diff(nodes, axis=0)).sum(-1) > 0])] + cls.normal(0, 0.15, 2)
    lines.append(nodes if len(nodes) > 1 else nodes + np.array([[0, -0.8], [0, 0.8]]))
    looks.append((cls.random() < 0.75, cls.random() < 0.3))                                    # curved, closed
  starts = np.cumsum([len(nodes) for nodes in lines])[:-1]
  for i, nodes in enumerate(np.split(boxed(np.concatenate(lines)), starts)):
    nodes = nodes + rng.normal(0, 0.07, nodes.shape)
    if looks[i][0] and len(nodes) > 2:
      nodes = smooth(nodes, looks[i][1])
    draw_line(draw, to_canvas(nodes, pose, size), width)
    inner = np.where((pixels(picture, size) > 0.5) & (inner == 0), (i + 1) / count, inner)
  return pixels(picture, size), inner


def blob_polygon(cls, rng, pose, size):
  """An irregular polygon, corners rounded or not."""
  count = cls.integers(3, 9)
  angle = np.sort(cls.uniform(0, 2 * np.pi, count)) + rng.normal(0, 0.05, count)
  points = boxed(np.stack([np.cos(angle), np.sin(angle)], -1) * cls.uniform(0.3, 1, (count, 1)))
  points = smooth(points, True) * 1.2 if cls.random() < 0.4 else points
  picture, draw = drawing(size)
  draw.polygon([tuple(p) for p in to_canvas(points, pose, size)], fill=255)
  x, y = local(pose, size)
  return pixels(picture, size), np.clip(np.hypot(x, y), 0, 1)


def assembly(cls, rng, pose, size):
  """Ellipses, boxes, triangles and bars joined to one another: bodies with parts."""
  parts = cls.integers(3, 8)
  mask, inner = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
  centres = [np.zeros(2)]
  mirrored = cls.random() < 0.5
  for i in range(parts):
    kind, turn = cls.integers(4), cls.uniform(0, np.pi) + rng.normal(0, 0.15)
    radius = cls.uniform(*((0.35, 0.65) if i == 0 else (0.15, 0.45))) * np.array([1, cls.uniform(0.25, 1)])
    centre = centres[cls.integers(len(centres))] + (0 if i == 0 else 0.42) * np.array(
        [np.cos(a := cls.uniform(0, 2 * np.pi)), np.sin(a)]) + rng.normal(0, 0.03, 2)
    centre = np.clip(centre, -0.9, 0.9)
    centres.append(centre)
    shade = cls.random()
    corners = {0: 24, 1: 4, 2: 3, 3: 4}[kind]
    angle = np.arange(corners) * 2 * np.pi / corners + np.pi / corners
    points = np.stack([np.cos(angle), np.sin(angle)], -1) * radius * (np.array([1, 0.4]) if kind == 3 else 1)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = points @ rotation.T + centre
    for flip in ((1, 1), (-1, 1)) if mirrored and i else ((1, 1),):
      picture, draw = drawing(size)
      draw.polygon([tuple(p) for p in to_canvas(points * flip, pose, size)], fill=255)
      m = pixels(picture, size)
      mask, inner = np.maximum(mask, m), np.where(m > 0.5, shade, inner)
  return mask, inner


def fractal(cls, rng, pose, size):
  """The attractor of two to five affine contractions, by the chaos game on 192 points at once."""
  maps = cls.integers(2, 6)
  a, b = cls.uniform(0, 2 * np.pi, (2, maps))
  large = cls.uniform(0.5, 0.88, maps)
  small = large * cls.uniform(0.3, 1, maps) * cls.choice([-1, 1], maps)
  a, b = a + rng.normal(0, 0.05, maps), b + rng.normal(0, 0.05, maps)
  rotation = lambda t: np.stack([np.cos(t), -np.sin(t), np.sin(t), np.cos(t)], -1).reshape(-1, 2, 2)
  matrix = (rotation(a) * np.stack([large, small], -1)[:, None, :]) @ rotation(b)              # [maps, 2, 2]
  offset = cls.uniform(-1, 1, (maps, 2))
  weight = np.abs(large * small) + 0.02
  choice = rng.choice(maps, (70, 192), p=weight / weight.sum())
  points, trail = np.zeros((192, 2)), []
  for step, k in enumerate(choice):
    points = (matrix[k] * points[:, None, :]).sum(-1) + offset[k]
    if step >= 12:
      trail.append(points)
  points = np.concatenate(trail)                                                               # [58*192, 2]
  low, high = np.percentile(points, [2, 98], axis=0)
  points = (points - (low + high) / 2) / max((high - low).max() / 2, 1e-6)
  xy = to_canvas(points, pose, size)[..., ::-1] / 2
  xy = xy[((xy >= 0) & (xy < size)).all(-1)].astype(np.int64)
  density = np.bincount(xy[:, 0] * size + xy[:, 1], minlength=size * size).reshape(size, size)
  density = np.log1p(density) / np.log1p(max(density.max(), 1))
  return np.clip(density * 2.5, 0, 1).astype(np.float32), density.astype(np.float32)


def tree(cls, rng, pose, size):
  """A branching plant."""
  depth, arms, spread, ratio = cls.integers(3, 6), cls.integers(2, 4), cls.uniform(0.3, 1.1), cls.uniform(0.55, 0.8)
  bend, thick = cls.normal(0, 0.3), cls.uniform(0.06, 0.25) * size * math.sqrt(abs(np.linalg.det(pose.matrix)))
  leaf = cls.choice([0, 0, 0.08, 0.15]) * size
  depth = min(depth, 4 if arms == 3 else 5)
  picture, draw = drawing(size)
  starts, angles, length = np.array([[0, 0.95]]), np.array([-np.pi / 2]), 0.75
  inner = np.zeros((size, size), np.float32)
  for level in range(depth):
    ends = starts + length * np.stack([np.cos(angles), np.sin(angles)], -1)
    for p, q in zip(to_canvas(starts, pose, size), to_canvas(ends, pose, size)):
      draw.line((*p, *q), fill=255, width=max(1, round(thick)))
      if leaf and level == depth - 1:
        draw.ellipse((q[0] - leaf / 2, q[1] - leaf / 2, q[0] + leaf / 2, q[1] + leaf / 2), fill=255)
    inner = np.where((pixels(picture, size) > 0.5) & (inner == 0), (level + 1) / depth, inner)
    fan = np.linspace(-spread, spread, arms) + bend
    angles = (angles[:, None] + fan + rng.normal(0, 0.12, (len(angles), arms))).ravel()
    starts, length, thick = ends.repeat(arms, 0), length * ratio, thick * 0.7
  return pixels(picture, size), inner


# Strokes stand four times and assemblies twice: their classes have the most different forms.
FAMILIES = (strokes, polygon, contour, strokes, nested, superformula, petals, strokes, assembly, blob_polygon, fractal,
            strokes, tree, assembly)


def shape(seed: int, label: int, rng, at: Pose, size: int):
  """One figure of shape class `label`. Returns (mask [S, S], inner [S, S]), float32 in [0, 1]."""
  cls = np.random.default_rng([seed, 2, label])
  mask, inner = FAMILIES[label % len(FAMILIES)](cls, rng, at, size)
  return mask.astype(np.float32), np.clip(inner, 0, 1).astype(np.float32)
