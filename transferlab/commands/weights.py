"""`transferlab info`, `convert` and `merge`: backbones and what methods cost on them."""
import json

from rich.console import Console
from rich.table import Table

from transferlab.commands.flags import BACKBONE, define, parse, required


def info(argv: list[str]) -> None:
  """Shows what methods cost on a backbone, or its sites, from shapes alone."""
  values = define(backbone=("vit_b16", "architecture, zoo name or weights file"),
                  method=("", "method; all of them if empty"),
                  options=("", "the method's options, e.g. rank=4,form=fused"), num_classes=(100, "C"),
                  batch_size=(32, "images per step"), image_size=(0, "pixels, 0 for the backbone's own"),
                  remat=(False, "recompute adapted blocks"), sites=(False, "list the backbone's sites with shapes"),
                  json=(False, "print one JSON object"))
  parse(values, argv, info)
  from transferlab import inform
  spec, preprocessing = inform.find(values.backbone, values.image_size or None)
  if values.sites:
    sites = {name: list(shape) for name, shape in inform.site_shapes(spec).items()}
    if values.json:
      print(json.dumps(sites))
      return
    table = Table("site", "shape [B, …]")
    for name, shape in sites.items():
      table.add_row(name, str(shape))
    Console().print(table)
    return
  rows = inform.costs(spec, values.method or None, inform.options(values.options), values.num_classes,
                      batch_size=values.batch_size, remat=values.remat)
  if values.json:
    print(json.dumps(rows[0] if values.method else rows))
    return
  print(f"{spec}\n{preprocessing.describe() if preprocessing else 'preprocessing comes with the weights'}")
  table = Table("method", "trainable", "without classifier", "forward GFLOP", "train GFLOP", "peak MiB", "adapter kB")
  for row in rows:
    table.add_row(row["method"], f"{row['trainable']:,}", f"{row['trainable_without_classifier']:,}",
                  f"{row['forward_flops'] / 1e9:.1f}", f"{row['train_flops'] / 1e9:.1f}",
                  f"{row['train_peak_bytes'] / 2**20:.0f}", f"{row['adapter_bytes'] / 1e3:.0f}")
  Console().print(table)
  print(f"{rows[0]['frozen']:,} frozen parameters; a step of {values.batch_size} images, {values.num_classes} classes")


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
