"""Data: tasks from folders, lists, tables and arrays; checks; preprocessing; augmentation; batches.

    task = image_folder("flowers")                  # or from_string("folder:flowers")
    remarks = task.check()
    loader = train_loader(task.splits["train"], preprocessing, batch_size=32, seed=0, augmentation="flip")
    for batch in loader: ...                        # without end; loader.steps_per_epoch batches are an epoch

No file of this package names jax or TensorFlow. (jax still comes along, with grain and with the package above.)
"""
from transferlab.data.augment import PRESETS, Augmentation
from transferlab.data.cache import check_images, read_once
from transferlab.data.files import decode
from transferlab.data.folders import domain_folder, find_images, image_folder
from transferlab.data.image import normalise, preprocess
from transferlab.data.lists import class_lists, list_files
from transferlab.data.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from transferlab.data.memory import arrays, digits
from transferlab.data.source import from_string, image_files
from transferlab.data.split import folds
from transferlab.data.suites import ENTRIES, SUITES
from transferlab.data.tables import Table, csv_file, read_table
from transferlab.data.tasks import BadImage, DataError, Split, Task, class_weights

__all__ = [
    "ENTRIES", "PRESETS", "SUITES", "Augmentation", "BadImage", "DataError", "EvalLoader", "Split", "Table",
    "Task", "TrainLoader", "arrays", "check_images", "class_lists", "class_weights", "csv_file", "decode", "digits",
    "domain_folder", "eval_loader", "find_images", "folds", "from_string", "image_files", "image_folder", "list_files",
    "normalise", "preprocess", "read_once", "read_table", "train_loader"]
