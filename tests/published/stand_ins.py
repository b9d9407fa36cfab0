"""What stands in for packages that the examples read data with, or write logs with.

Data sets cannot be downloaded where tests run, and TensorFlow is large. Each has what the examples
ask of it and nothing else: small random images, and writers that keep what they are given.
"""

import types

import numpy as np

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (64, 28, 28), np.uint8)
LABELS = rng.integers(0, 10, 64)


def module(name, **names):
    found = types.ModuleType(name)
    vars(found).update(names)
    return found


class Table:
    """`datasets` of Hugging Face: a slice is a dict of columns."""

    def shuffle(self, seed):
        return self

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, rows):
        return {"image": list(IMAGES[rows]), "label": list(LABELS[rows])}


class Dataset:
    """`tf.data.Dataset`: elements, or batches of them."""

    def __init__(self, elements):
        self.elements = list(elements)

    def map(self, function):
        return Dataset(map(function, self.elements))

    def batch(self, size, drop_remainder):
        starts = range(0, len(self.elements) - size + 1, size)
        batches = (self.elements[start : start + size] for start in starts)
        stack = lambda batch: {key: np.stack([each[key] for each in batch]) for key in batch[0]}
        return Dataset(map(stack, batches))

    def take(self, count):
        return Dataset(self.elements[:count])

    def repeat(self):  # once, as it is taken from
        return self

    def shuffle(self, buffer_size):
        return self

    def prefetch(self, buffer_size):
        return self

    def as_numpy_iterator(self):
        return _Iterator(self.elements)


class _Iterator:
    def __init__(self, elements):
        self.iterator = iter(elements)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.iterator)

    next = __next__


class Writer:
    """Of TensorBoard, or of clu."""

    def __init__(self, *_):
        self.kept = []

    def add_scalar(self, *what):
        self.kept.append(what)

    add_figure = write_scalars = add_scalar


def hugging_face():
    return {
        "datasets": module(
            "datasets", load_dataset=lambda name: {"train": Table(), "test": Table()}
        ),
        "tensorboardX": module("tensorboardX", SummaryWriter=Writer),
        "tensorboard": module("tensorboard"),
    }


def tensorflow():
    elements = ({"image": i[..., None], "label": n} for i, n in zip(IMAGES, LABELS, strict=True))
    data = Dataset(elements)
    return {
        "tensorflow": module(
            "tensorflow",
            data=types.SimpleNamespace(Dataset=Dataset),
            random=types.SimpleNamespace(set_seed=lambda seed: None),
            cast=lambda array, dtype: array.astype(dtype),
            float32=np.float32,
        ),
        "tensorflow_datasets": module("tensorflow_datasets", load=lambda name, split: data),
        "IPython": module("IPython", get_ipython=lambda: None, version_info=(9, 0)),
        "IPython.display": module("IPython.display", clear_output=lambda wait: None),
    }


def clu():
    writers = module("clu.metric_writers", create_default_writer=Writer)
    return {"clu": module("clu", metric_writers=writers), "clu.metric_writers": writers}


class Digits:
    """What optax's examples load with TensorFlow: batches of images and labels, one-hot."""

    element_spec = {"label": np.zeros((1, 10))}  # noqa: RUF012 - read only

    def __init__(self, name, batch_size, split=None):
        self.batch_size = batch_size

    def as_numpy_iterator(self):
        for start in range(0, len(IMAGES), self.batch_size):
            rows = slice(start, start + self.batch_size)
            images = IMAGES[rows, ..., None].astype(np.float32) / 255
            yield {"image": images, "label": np.eye(10, dtype=np.float32)[LABELS[rows]]}


def datasets_of_optax():
    split = types.SimpleNamespace(TEST="test")
    return {"datasets": module("datasets", load_image_dataset=Digits, Split=split)}
