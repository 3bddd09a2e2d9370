"""`transferlab info`, `convert` and `merge`: backbones and what methods cost on them."""
import json

from absl import flags
from rich.table import Table

from transferlab.commands.flags import BACKBONE, define, parse, required
from transferlab.progress import show_table


def _info_flags() -> flags.FlagValues:
  return define(backbone=("vit_b16", "architecture, zoo name or weights file"),
                method=("", "method; all of them if empty"),
                options=("", "the method's options, e.g. rank=4,form=fused"), num_classes=(100, "C"),
                batch_size=(32, "images per step"), image_size=(0, "pixels, 0 for the backbone's own"),
                dtype=("float32", "float32 or bfloat16, in which the backbone computes"),
                remat=(False, "recompute adapted blocks"),
                cached=(False, "costs of training from cached activations, see `transferlab features`"),
                against=("", "a method to compare --method with, e.g. full"),
                devices=(0, "costs on each of so many devices, which need not be there"),
                shard=(1, "with --devices: how many of them share one copy of the backbone, 0 for all"),
                heads=(0, "with --against: parallel heads, the points of a grid that trains in one program"),
                logits=(False, "a ResNet with its own classifier as a site, which Head2Toe reads"),
                sites=(False, "list the backbone's sites with shapes"),
                json=(False, "print one JSON object"))


def info(argv: list[str]) -> None:
  """Shows what methods cost on a backbone, or its sites, from shapes alone."""
  values = _info_flags()
  parse(values, argv, info)
  for name, least in {"num_classes": 1, "batch_size": 1, "image_size": 0, "heads": 0, "devices": 0, "shard": 0}.items():
    if values[name].value < least:
      raise ValueError(f"--{name} is {values[name].value}; expected {least} or more")
  if values["shard"].present and not values.devices:
    raise ValueError("--shard is for --devices; give their number, e.g. --devices=8")
  from transferlab import devices, inform
  if values.devices:
    devices.pretend(values.devices)  # before anything asks JAX what it has
  spec, preprocessing = inform.find(values.backbone, values.image_size or None, values.logits)
  if values.sites:
    _sites(inform.site_shapes(spec), values.json)
    return
  how = {"batch_size": values.batch_size, "remat": values.remat, "dtype": _dtype(values.dtype)}
  chosen = values.method or None, inform.options(values.options), values.num_classes
  if values.devices:
    if values.against or values.cached:
      raise ValueError("--devices is for training from images; leave --against and --cached out")
    rows, show = inform.on_devices(spec, *chosen, values.devices, values.shard, **how), _show_devices
  elif values.against:
    required(values, "method")
    if values.cached:
      raise ValueError("--against compares training from images; leave --cached out")
    rows = inform.compared(spec, *chosen, values.against, count=values.heads, **how)
    show = _show_compared
  else:
    if values.heads:
      raise ValueError("--heads is for --against; give a method to compare with, e.g. --against=full")
    rows, show = inform.costs(spec, *chosen, cached=values.cached, **how), _show_costs
  if values.json:
    print(json.dumps(rows[0] if values.method and not values.against else rows))
    return
  print(f"{spec}\n{preprocessing.describe() if preprocessing else 'preprocessing comes with the weights'}")
  show(rows, values)
  if staged := [row["method"] for row in rows if row.get("first_stage")]:
    print(f"{', '.join(staged)}: of the first stage alone; what is saved is of the last")
  images = rows[0].get("batch_size", values.batch_size)
  print(f"{rows[0]['frozen']:,} frozen parameters; a step of {images} images, {values.num_classes} classes, "
        f"{values.dtype}")


def _dtype(name: str):
  from transferlab.devices import compute_dtype
  if name not in ("float32", "bfloat16"):
    raise ValueError(f"--dtype is {name!r}; expected float32 or bfloat16")
  return compute_dtype(name)


def _sites(shapes: dict, as_json: bool) -> None:
  if as_json:
    print(json.dumps({name: list(shape) for name, shape in shapes.items()}))
    return
  table = Table("site", "shape [B, …]")
  for name, shape in shapes.items():
    table.add_row(name, str(list(shape)))
  show_table(table)


def _show_costs(rows: list[dict], values: flags.FlagValues) -> None:
  table = Table("method", "trainable", "without classifier", "forward GFLOP", "train GFLOP", "peak MiB", "adapter kB",
                *["read kB an image"] * values.cached)
  for row in rows:
    table.add_row(row["method"], f"{row['trainable']:,}", f"{row['trainable_without_classifier']:,}",
                  f"{row['forward_flops'] / 1e9:.1f}", f"{row['train_flops'] / 1e9:.1f}",
                  f"{row['train_peak_bytes'] / 2**20:.0f}", f"{row['adapter_bytes'] / 1e3:.0f}",
                  *[f"{row.get('bytes_per_image', 0) / 1e3:,.0f}"] * values.cached)
  show_table(table)


def _show_devices(rows: list[dict], values: flags.FlagValues) -> None:
  MiB = lambda count: f"{count / 2**20:,.0f}"
  kinds = sorted({kind for row in rows for kind in row["received"]})
  table = Table("method", "frozen MiB", "trained MiB", "temporary MiB", "peak MiB", "GFLOP",
                *(f"{kind} MiB" for kind in kinds))
  for row in rows:
    held = [row[name] for name in ("frozen_bytes", "run_bytes", "temporary_bytes", "peak_bytes")]
    table.add_row(row["method"], *map(MiB, held), f"{row['flops'] / 1e9:,.1f}",
                  *(f"{row['received'].get(kind, 0) / 2**20:,.2f}" for kind in kinds))
  show_table(table)
  size, shard = rows[0]["devices"], rows[0]["shard"]
  copies = "each with a copy of the backbone" if shard == 1 else f"{shard} sharing a copy of the backbone"
  print(f"of each of {size} devices, {copies}; with what trains is what its optimiser keeps; of collectives, what the "
        "device receives, by ring algorithms")


def _show_compared(rows: list[dict], values: flags.FlagValues) -> None:
  table = Table("method", "trainable", "without classifier", "of backbone", "train GFLOP", f"of {values.against}",
                "peak MiB", f"of {values.against}")
  for row in rows:
    table.add_row(row["method"], f"{row['trainable']:,}", f"{row['trainable_without_classifier']:,}",
                  f"{row['of_backbone']:.2%}", f"{row['train_flops'] / 1e9:.1f}", f"{row['of_flops']:.1%}",
                  f"{row['train_peak_bytes'] / 2**20:.0f}", f"{row['of_peak']:.1%}")
  show_table(table)


def convert(argv: list[str]) -> None:
  """Writes weights in timm's names."""
  values = define(backbone=BACKBONE, out=("", "file or folder to write"),
                  architecture=("", "what it is expected to be"),
                  image_size=(0, "resample the position table to this size"), download=(False, "fetch a zoo entry"))
  parse(values, argv, convert)
  required(values, "backbone", "out")
  from transferlab.backbones.weights import export_timm, load_weights
  weights = load_weights(values.backbone, architecture=values.architecture or None,
                         image_size=values.image_size or None, download=values.download)
  export_timm(weights, values.out)
  print(values.out)


def merge(argv: list[str]) -> None:
  """Writes the adapted backbone as plain weights with a head."""
  values = define(adapter=("", "adapter.safetensors of a run"), backbone=BACKBONE, out=("", "file or folder to write"),
                  tolerance=(1e-3, "largest difference of logits allowed on a probe batch"))
  parse(values, argv, merge)
  required(values, "adapter", "out")
  from transferlab import serve
  difference = serve.merge(serve.load(values.adapter, values.backbone), values.out, tolerance=values.tolerance)
  print(f"{values.out}: largest difference of logits {difference:.2e}; class names in {serve.classes_file(values.out)}")
