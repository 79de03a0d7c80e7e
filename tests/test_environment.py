import hashlib
import re

import torch
from torch.utils.data import DataLoader, TensorDataset

from autocompress.disk.environment import data_digest, provenance, tensors_digest, versions
from autocompress.splits import LoaderSplit, TensorSplit
from autocompress.task import Task


def test_versions_are_those_that_are_installed():
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert list(found)[:2] == ["python", "autocompress"]


def test_the_digest_is_of_names_shapes_types_and_bytes():
    x = torch.tensor([[1.0, 2.0]])
    said = b"x (1, 2) torch.float32\n" + x.numpy().tobytes()
    assert tensors_digest({"x": x}) == hashlib.sha256(said).hexdigest()
    assert tensors_digest({"x": x.t()}) != tensors_digest({"x": x})
    assert tensors_digest({"x": torch.tensor(1, dtype=torch.bfloat16)})  # numpy has no such type


def test_data_that_would_have_to_be_read_are_not_hashed():
    x, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
    assert data_digest(TensorSplit(x, y)) == data_digest(TensorSplit(x.clone(), y.clone()))
    assert data_digest(TensorSplit(x, y)) != data_digest(TensorSplit(x, y + 1))
    assert data_digest(LoaderSplit(DataLoader(TensorDataset(x, y)))) is None


def test_the_provenance_is_json():
    import json

    data = (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    made = provenance(Task(torch.nn.Linear(2, 2), data, data, data), "autocompress tune")
    assert json.loads(json.dumps(made)) == made
    assert made["command"] == "autocompress tune"
    assert made["data"]["test"]["n"] == 4
    assert re.search(r", \d+ cores?$", made["machine"]["processor"])
    assert made["machine"]["threads"] == "at most 1 thread"
