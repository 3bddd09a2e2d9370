"""Texture formulas: scalar fields on a square, each a family with as many classes as one likes.

A family is a function `(cls, rng, x, y) -> [S, S]`. `cls` is a random generator seeded by the class alone: what is
drawn from it is what the class *is* (frequencies, shapes, exponents). `rng` is seeded by the image: what is drawn from
it varies within the class. `x` and `y` are the coordinates after the image's own rotation, zoom, shift and warp; the
square is [-1, 1] before them. Values are of any range; `texture` maps them to [0, 1].

Sources of the ideas: Gabor noise, Lagae et al. 2009; cellular noise, Worley 1996; noise and turbulence, Perlin 1985;
spectral noise as pre-training images, Baradad et al. 2021 (arXiv 2106.05963), and small shader programs, Baradad et al.
2022 (arXiv 2211.16412); band-passed noise as a stand-in for reaction-diffusion, Turing 1952; random networks over
coordinates, Stanley 2007.
"""
import numpy as np

PI = np.float32(np.pi)


def log_uniform(rng, low: float, high: float):
  return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def grid(size: int):
  """Coordinates x, y of pixel centres, both [S, S] in [-1, 1]."""
  axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
  return np.meshgrid(axis, axis)


def unit(field):
  """The field stretched to [0, 1]."""
  low, high = field.min(), field.max()
  return ((field - low) / max(high - low, 1e-6)).astype(np.float32)


def spectral(rng, size: int, amplitude):
  """Gaussian noise with a given spectrum.

  Args:
    amplitude: maps frequencies fy [S, 1] and fx [1, S/2+1], in cycles per side, to gains.

  Returns:
    [S, S], mean 0 and deviation 1.
  """
  fy = (np.fft.fftfreq(size) * size).astype(np.float32)[:, None]
  fx = (np.fft.rfftfreq(size) * size).astype(np.float32)[None, :]
  noise = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
  field = np.fft.irfft2(noise * amplitude(fy, fx), s=(size, size)).astype(np.float32)
  return (field - field.mean()) / max(float(field.std()), 1e-6)


def power_noise(rng, size: int, exponent: float):
  """Noise with amplitude 1 / f^exponent."""
  return spectral(rng, size, lambda fy, fx: (fx * fx + fy * fy + 0.5) ** (-exponent / 2))


def wave(phase, form: int, duty: float):
  """A wave of period 1: sine, square of some duty, sawtooth or triangle, edges one tenth of a period soft."""
  if form == 0:
    return np.sin(2 * PI * phase)
  t = phase - np.floor(phase)
  if form == 1:
    return np.clip((0.5 * duty - np.abs(t - 0.5)) * 10, -1, 1)
  return t if form == 2 else np.abs(t - 0.5)


def stripes(cls, rng, x, y):
  frequency, form, duty = log_uniform(cls, 1.2, 9), cls.integers(4), cls.uniform(0.25, 0.75)
  second, weight = cls.integers(2, 5), cls.choice([0, 0, 0.5])
  return wave(x * frequency, form, duty) + weight * wave(x * frequency * second, 0, 0.5)


def crosshatch(cls, rng, x, y):
  frequency, ratio, angle = log_uniform(cls, 1.5, 8), log_uniform(cls, 0.6, 1.6), cls.uniform(0.4, 1.57)
  form, duty, join = cls.integers(4), cls.uniform(0.3, 0.7), cls.integers(3)
  a = wave(x * frequency, form, duty)
  b = wave((np.cos(angle) * x + np.sin(angle) * y) * frequency * ratio, form, duty)
  return (np.maximum(a, b), a + b, np.minimum(a, b))[join]


def checks(cls, rng, x, y):
  frequency, aspect, shear = log_uniform(cls, 1, 6), log_uniform(cls, 0.5, 2), cls.choice([0, 0, 0.5, 1.0])
  levels = cls.integers(2, 5)
  u, v = np.floor(x * frequency + shear * y * frequency), np.floor(y * frequency * aspect)
  return np.mod(u + v * cls.integers(1, 3), levels)


def lattice(cls, rng, x, y):
  """Discs, rings or squares on a square or hexagonal lattice."""
  frequency, offset, radius = log_uniform(cls, 1.2, 6), cls.choice([0, 0.5]), cls.uniform(0.2, 0.48)
  kind, soft = cls.integers(3), log_uniform(cls, 3, 20)
  v = y * frequency
  u = x * frequency + offset * np.mod(np.floor(v), 2)
  u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
  d = np.maximum(np.abs(u), np.abs(v)) if kind == 2 else np.hypot(u, v)
  d = np.abs(d - radius * 0.7) + radius * 0.6 if kind == 1 else d
  return np.clip((radius - d) * soft, 0, 1)


def bricks(cls, rng, x, y):
  frequency, aspect = log_uniform(cls, 1.5, 6), cls.uniform(0.3, 1)
  offset, mortar, varied = cls.uniform(0, 0.5), cls.uniform(0.04, 0.2), cls.choice([0, 0.5, 1])
  v = y * frequency
  u = x * frequency * aspect + offset * np.floor(v)
  shade = np.modf(np.abs(np.sin(np.floor(u) * 12.99 + np.floor(v) * 78.23)) * 4375.5)[0]
  edge = np.minimum(0.5 - np.abs(u - np.floor(u) - 0.5), (0.5 - np.abs(v - np.floor(v) - 0.5)))
  return np.where(edge < mortar, -0.6, varied * shade)


def cells(cls, rng, x, y):
  """Cellular noise: distance to the nearest point, to the border, or a shade per cell."""
  count, mode, power = cls.integers(8, 70), cls.integers(4), cls.choice([1.0, 2.0, 2.0])
  metric_scale, width = log_uniform(cls, 0.5, 2), cls.uniform(0.05, 0.25)
  px, py = rng.uniform(-1.4, 1.4, (2, count)).astype(np.float32)
  dx, dy = x.reshape(1, -1) - px[:, None], (y.reshape(1, -1) - py[:, None]) * np.float32(metric_scale)
  d = np.abs(dx) + np.abs(dy) if power == 1 else np.sqrt(dx * dx + dy * dy)  # [count, S*S]
  owner = d.argmin(0)
  first = d[owner, np.arange(d.shape[1])]
  if mode == 0:
    field = first
  elif mode == 3:
    field = rng.random(count, dtype=np.float32)[owner] + 0.5 * first
  else:
    d[owner, np.arange(d.shape[1])] = np.inf
    border = d.min(0) - first
    field = border if mode == 1 else np.minimum(border, width)
  return field.reshape(x.shape)


def clouds(cls, rng, x, y):
  return power_noise(rng, len(x), cls.uniform(0.6, 3))


def fibres(cls, rng, x, y):
  """Noise stretched along one direction: hair, grass, brushed metal."""
  stretch, exponent, centre = log_uniform(cls, 3, 20), cls.uniform(1, 2), cls.uniform(0, 6)
  angle = rng.uniform(0, np.pi)
  def amplitude(fy, fx):
    u, v = np.cos(angle) * fx + np.sin(angle) * fy, np.cos(angle) * fy - np.sin(angle) * fx
    return (np.abs(np.abs(u) - centre) ** 2 + (stretch * v) ** 2 + 1) ** (-exponent / 2)
  return spectral(rng, len(x), amplitude)


def spots(cls, rng, x, y):
  """Band-passed noise through a soft threshold: spots, labyrinths, blotches."""
  centre, width = log_uniform(cls, 2.5, 14), cls.uniform(0.1, 0.5)
  level, soft = cls.uniform(-1, 1), log_uniform(cls, 1, 12)
  centre *= rng.uniform(0.85, 1.15)
  field = spectral(rng, len(x), lambda fy, fx: np.exp(-(np.log(np.hypot(fx, fy) / centre + 1e-3) / width) ** 2))
  return np.tanh((field - level) * soft)


def turbulence(cls, rng, x, y):
  """Folded noise: ridges, veins and cracks."""
  exponent, fold, sharp = cls.uniform(1.1, 2.6), cls.integers(1, 4), cls.uniform(0.3, 1)
  field = np.abs(power_noise(rng, len(x), exponent))
  for _ in range(fold - 1):
    field = np.abs(field - 0.7)
  return field ** sharp


def marble(cls, rng, x, y):
  """Stripes or rings pushed about by noise."""
  frequency, amount, exponent = log_uniform(cls, 1, 6), cls.uniform(0.1, 1.2), cls.uniform(1.3, 2.5)
  ring, form = cls.integers(2), cls.integers(4)
  base = np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)) if ring else x
  return wave(base * frequency + amount * power_noise(rng, len(x), exponent), form, 0.5)


def gabors(cls, rng, x, y):
  """Sparse Gabor noise: one frequency, a spread of orientations."""
  frequency, spread, width, count = log_uniform(cls, 1.5, 8), cls.choice([0.1, 0.5, 3.2]), cls.uniform(0.5, 1.5), 16
  px, py = rng.uniform(-1.1, 1.1, (2, count, 1)).astype(np.float32)
  angle = rng.uniform(-spread, spread, (count, 1)).astype(np.float32)
  phase = rng.uniform(0, 6.3, (count, 1)).astype(np.float32)
  dx, dy = x.reshape(1, -1) - px, y.reshape(1, -1) - py
  envelope = np.exp(-(dx * dx + dy * dy) * np.float32(frequency / width) ** 2 / 3)
  carrier = np.cos(2 * PI * np.float32(frequency) * (dx * np.cos(angle) + dy * np.sin(angle)) + phase)
  return (envelope * carrier).sum(0).reshape(x.shape)


def rays(cls, rng, x, y):
  """Sunbursts, rings and spirals about a point."""
  arms, turn = cls.integers(0, 14), cls.choice([0, 0, 1, 1]) * log_uniform(cls, 1, 6)
  form, power = cls.integers(4), cls.uniform(0.5, 1.5)
  turn = turn if arms else log_uniform(cls, 1.5, 6)
  x, y = x - rng.uniform(-0.6, 0.6), y - rng.uniform(-0.6, 0.6)
  return wave(arms * np.arctan2(y, x) / (2 * PI) + turn * np.hypot(x, y) ** power, form, cls.uniform(0.3, 0.7))


def bubbles(cls, rng, x, y):
  """Scattered domes, discs or rings of a spread of sizes."""
  count, size, spread, kind = cls.integers(8, 50), log_uniform(cls, 0.08, 0.4), cls.uniform(0, 0.8), cls.integers(3)
  px, py = rng.uniform(-1.2, 1.2, (2, count, 1)).astype(np.float32)
  radius = (size * np.exp(rng.uniform(-spread, spread, (count, 1)))).astype(np.float32)
  d = ((x.reshape(1, -1) - px) ** 2 + (y.reshape(1, -1) - py) ** 2) / radius ** 2
  bump = (np.sqrt(np.clip(1 - d, 0, 1)), np.clip(8 - 8 * d, 0, 1), np.exp(-12 * (d - 0.8) ** 2))[kind]
  return bump.max(0).reshape(x.shape)


def weave(cls, rng, x, y):
  """Strips over and under each other, as in braids and baskets."""
  frequency, gap, twill = log_uniform(cls, 1.5, 5), cls.uniform(0.5, 1), cls.integers(1, 4)
  u, v = x * frequency, y * frequency
  over = np.mod(np.floor(u) + np.floor(v), 1 + twill) < 1
  a, b = np.cos(PI * (u - np.floor(u) - 0.5) / gap), np.cos(PI * (v - np.floor(v) - 0.5) / gap)
  across_a, across_b = np.cos(PI * (v - np.floor(v) - 0.5)), np.cos(PI * (u - np.floor(u) - 0.5))
  return np.where(over, np.clip(a, 0, 1) * (0.5 + 0.5 * across_a), np.clip(b, 0, 1) * (0.5 + 0.5 * across_b))


def formula(cls, rng, x, y):
  """A random two-layer network of sines over the coordinates."""
  width = 8
  first = cls.normal(0, 1.8, (2, width)).astype(np.float32)
  second, last = cls.normal(0, 0.8, (width, width)).astype(np.float32), cls.normal(0, 1, width).astype(np.float32)
  shift = cls.uniform(-3, 3, (2, width)).astype(np.float32) + rng.normal(0, 0.3, (2, width)).astype(np.float32)
  h = np.sin(np.stack([x.ravel(), y.ravel()], -1) @ first * 2 + shift[0])      # [S*S, width]
  return np.sin(h @ second * 2 + shift[1]).dot(last).reshape(x.shape)


FAMILIES = (stripes, crosshatch, checks, lattice, bricks, cells, clouds, fibres, spots, turbulence, marble, gabors,
            rays, bubbles, weave, formula)


def texture(seed: int, label: int, rng, size: int):
  """One field of texture class `label`. Returns [S, S] float32 in [0, 1]."""
  cls = np.random.default_rng([seed, 1, label])
  warp = cls.choice([0, 0, 0, 0.05, 0.12])
  x, y = grid(size)
  angle, zoom = rng.uniform(0, 2 * np.pi), log_uniform(rng, 0.8, 1.25)
  c, s = np.float32(np.cos(angle) * zoom), np.float32(np.sin(angle) * zoom)
  shift = rng.uniform(-1, 1, 2).astype(np.float32)
  x, y = c * x - s * y, s * x + c * y
  if warp:
    x, y = (z + np.float32(warp) * power_noise(rng, size, 2.2) for z in (x, y))
  family = FAMILIES[label % len(FAMILIES)]
  if family not in (cells, rays, bubbles, gabors):  # those place their own points
    x, y = x + shift[0], y + shift[1]
  return unit(family(cls, rng, x, y))
