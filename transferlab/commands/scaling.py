"""`transferlab scale`: what training costs on several devices, on paper."""
import json

from transferlab.commands.flags import define, parse, words


def scale(argv: list[str]) -> None:
  """Compiles training steps for several devices from shapes alone, and shows what each device computes, holds and
  receives, and the milliseconds that this implies on machines with published rates."""
  values = define(backbone=("", "architectures; by default ViT-B/16, L/16 and G/14, and CLIPs of their size for LFA"),
                  methods=("", "methods; by default linear, inca, lfa, dtl, lora and full"),
                  devices=("1,8,64", "numbers of devices"), batch_size=(8, "images per device"),
                  shard=(0, "devices that share a backbone; 0 for no more than a machine needs"),
                  machines=("h100,a100,v5e,v5p", "accelerators whose rates are known"),
                  efficiency=(0.5, "share of these rates that is reached"), num_classes=(100, "C"),
                  remat=(False, "recompute adapted blocks"),
                  target=("", "compile for a TPU slice that need not be here, e.g. tpu:v5e:8x8, in bfloat16; needs "
                          "transferlab[tpu]; minutes for each step"),
                  out=("", "folder for scale.csv and scale.json"), json=(False, "print one JSON object"))
  parse(values, argv, scale)
  counts = _counts(values.devices)
  for name, least in {"batch_size": 1, "num_classes": 1, "shard": 0}.items():
    if values[name].value < least:
      raise ValueError(f"--{name} is {values[name].value}; expected {least} or more")
  if not 0 < values.efficiency <= 1:
    raise ValueError(f"--efficiency is {values.efficiency}; expected a share above 0 and at most 1")
  kind, _, slice_ = values.target.partition(":")
  if values.target and (kind != "tpu" or not slice_):
    raise ValueError(f"--target is {values.target!r}; expected a TPU slice, such as tpu:v5e:2x4")
  from transferlab import devices, scale as scale_lib
  devices.pretend(max(counts))  # before anything asks JAX what it has
  on = [scale_lib.machine(name) for name in words(values.machines)]
  pairs = scale_lib.chosen(words(values.backbone) or scale_lib.BACKBONES, words(values.methods))
  setting = scale_lib.Setting(values.batch_size, values.num_classes, values.remat, slice_)
  rows = scale_lib.rows(pairs, counts, on, setting, shard=values.shard)
  found = scale_lib.plain(rows, on, setting, values.efficiency)
  files = scale_lib.write(values.out, found) if values.out else []
  if values.json:
    print(json.dumps(found))
    return
  for table in scale_lib.tables(rows, on, setting, values.efficiency):
    table.show()
  print(*found["limits"], *files, sep="\n")


def _counts(text: str) -> list[int]:
  """The numbers of "1,8,64"."""
  found = words(text)
  if not found or not all(count.isdecimal() and int(count) for count in found) or len(set(found)) != len(found):
    raise ValueError(f"--devices is {text!r}; expected different numbers of devices, such as 1,8,64")
  return [int(count) for count in found]
