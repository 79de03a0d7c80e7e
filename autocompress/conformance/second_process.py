"""A second process of the conformance suite, in which sets and hashes have another order."""

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.conformance.fingerprints import theta_digest
from autocompress.conformance.testing_tools import find_facts, leaving_layers_whole, middle_density, weights_of
from autocompress.scheme import Scheme, parts_of


def digest_elsewhere(scheme: Scheme, model: nn.Module, x: Tensor) -> dict[str, str]:
    """The digest of θ at the middle density, computed in another process, with another hash seed."""
    used = {type(part).__module__ for part in parts_of(scheme)} | {type(m).__module__ for m in model.modules()}
    files = {name: file for name in used if (file := getattr(sys.modules[name], "__file__", None))}
    payload = pickle.dumps((scheme, model, x))
    future = _second_process().submit(_digest, files, payload, torch.get_num_threads())
    return future.result(timeout=300)


@cache
def _second_process() -> ProcessPoolExecutor:
    """A process of another hash seed, which iterates over sets of strings in another order; used by all checks."""
    ours = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "2" if ours == "1" else "1"
    try:
        executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        executor.submit(os.getpid).result(timeout=300)  # starts the process while the variable is set
    finally:
        if ours is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = ours
    return executor


def _digest(files: Mapping[str, str], payload: bytes, threads: int) -> dict[str, str]:
    """Runs in the second process; modules that it cannot import by name, such as tests, are run from ``files``."""
    for name, file in files.items():
        try:
            importlib.import_module(name)
        except ImportError:
            spec = importlib.util.spec_from_file_location(name, Path(file))
            assert spec is not None and spec.loader is not None, file
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    torch.set_num_threads(threads)
    scheme, model, x = pickle.loads(payload)
    with leaving_layers_whole():
        facts = find_facts(scheme, model, x)
    return theta_digest(scheme.pi(weights_of(model), middle_density(scheme, facts), facts))
