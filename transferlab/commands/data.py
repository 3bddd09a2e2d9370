"""`transferlab data`."""
from transferlab.commands.flags import define, parse, required


def data_verb(argv: list[str]) -> None:
  """Checks a source of images (--data), or lists, checks or prepares published tasks (list, check, prepare NAME …)."""
  values = define(data=("", "what to check, e.g. folder:/images; all others are for list, check, prepare"),
                  data_dir=("", "folder of the data sets; $TFDS_DATA_DIR if empty, or else ~/tensorflow_datasets"),
                  accept=(False, "check: what is there now is right, whatever was found before, or is expected"),
                  json=(False, "list, check: print one JSON list"),
                  download=(False, "prepare: fetch what is not there"),
                  file_format=("array_record", "prepare: array_record or tfrecord"))
  words = parse(values, argv, data_verb, files=True)
  if not words:
    required(values, "data")
  from transferlab.commands import datasets
  given = {name: values[name].value for name in values if values[name].present}
  if not datasets.run(words, **given):
    raise SystemExit(1)
