"""The model that ``--model`` and ``--weights`` name, adapted to the data's classes and channels."""

import inspect
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.formats import weights as weights_files
from autocompress.models import build, classifier, first_conv, known_name, with_classes, with_first_conv
from autocompress.plugins import import_from_here, load_from_file

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which checkpoints keep a state dict


@dataclass(frozen=True)
class Made:
    """A model that was made from a name or a factory.

    Attributes:
        model: The model; it puts out a logit for each of the data's classes.
        channels: Channels of its input: 1 for grey, 3 for RGB.
        architecture: The arguments of `autocompress.models.build` that make it again; None for a factory's.
        is_trained: Whether its weights, including the classifier's, came from a file.
        notes: The changes that were made to it, in sentences.
    """

    model: nn.Module
    channels: int
    architecture: dict[str, Any] | None
    is_trained: bool
    notes: tuple[str, ...]


def find_model(spec: str, *, arguments: Mapping[str, Any], weights: str, seed: int = 0) -> Any:
    """Looks for the model of a name, so that a wrong name is found out before any data are read.

    Args:
        spec: See `make_model`, as for the other arguments.
        arguments: The arguments of the factory.
        weights: The source of the weights.
        seed: Seeds the weights of a model that the file itself makes.

    Returns:
        The factory, or the model, that ``file.py:name`` or ``package.module:name`` names; None for other names.

    Raises:
        ValueError: If there is no such model or file of weights, or the factory does not take the arguments.
    """
    if weights not in ("auto", "none"):
        _check_file(Path(weights))
    if not _names_factory(spec):
        if arguments:
            raise ValueError(f"model arguments go to a factory, and {spec!r} is a name; leave them out")
        known_name(spec)
        return None
    torch.manual_seed(seed)
    factory = load_factory(spec)
    if not isinstance(factory, nn.Module):
        _check_call(spec, factory, arguments)
    return factory


def _names_factory(spec: str) -> bool:
    return ":" in spec or spec.endswith(".py")


def make_model(
    spec: str,
    *,
    arguments: Mapping[str, Any],
    weights: str,
    classes: int,
    data_channels: int,
    channels: int | None = None,
    seed: int = 0,
    factory: Any = None,
) -> Made:
    """Makes the model of a name, with its classifier and first convolution adapted to the data.

    Args:
        spec: ``small_resnet``, a classifier of torchvision, ``timm/NAME``, ``file.py:factory`` or
            ``package.module:factory`` of a package that is installed or in the current folder.
        arguments: The arguments of the factory.
        weights: A ``.pt`` or ``.safetensors`` file; ``none``; or ``auto`` for torchvision's own if they are on
            this machine already.
        classes: The number of classes of the data.
        data_channels: The number of channels of the images.
        channels: The number of channels that the model is to take; None for as many as its weights expect, or
            without weights as many as the images have.
        seed: Seeds weights that are initialized anew.
        factory: What `find_model` has found; by default it is looked for.

    Raises:
        ValueError: If there is no such model, or the weights do not fit it.
    """
    if factory is None:
        factory = find_model(spec, arguments=arguments, weights=weights, seed=seed)
    torch.manual_seed(seed)
    notes: list[str] = []
    if _names_factory(spec):
        model, wanted, architecture = _from_factory(spec, factory, arguments, classes, notes), channels, None
        state, source = (None, "") if weights in ("auto", "none") else (read_weights(Path(weights)), weights)
    else:
        state, source = _state_for(spec, weights, notes)
        wanted = channels or (_channels_of(state) if state else None) or data_channels
        architecture = {"model": spec, "classes": classes, "in_channels": wanted}
        model = build(architecture)
    is_trained = state is not None and _load(model, state, source, notes)
    conv = first_conv(model)
    if wanted is None:  # a factory's model: as many as it was made for, if images can be converted to that
        wanted = conv[1].in_channels if conv and conv[1].in_channels in (1, 3) else data_channels
    if conv is not None and conv[1].in_channels != wanted:
        notes.append(f"the first convolution of {spec} takes {wanted} channels now, not {conv[1].in_channels}")
        model = with_first_conv(model, wanted)
        is_trained = False
    if wanted != data_channels:
        kinds = {1: "grey", 3: "RGB"}
        have, need = kinds.get(data_channels, f"{data_channels}-channel"), kinds.get(wanted, f"{wanted}-channel")
        notes.append(f"the images are {have} and {spec} takes {need}: they are converted")
    return Made(model, wanted, architecture, is_trained, tuple(notes))


def _from_factory(
    spec: str, factory: Any, arguments: Mapping[str, Any], classes: int, notes: list[str]
) -> nn.Module:
    """The model of a factory, with a new classifier if it has another number of classes."""
    model = factory if isinstance(factory, nn.Module) else call_factory(spec, factory, arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec!r} gives a {type(model).__name__}; it must give a torch.nn.Module")
    last = classifier(model)
    gives = (
        None if last is None else last[1].out_features if isinstance(last[1], nn.Linear) else last[1].out_channels
    )
    if last is not None and gives != classes:
        model = with_classes(model, classes)
        notes.append(
            f"the classifier {last[0]} of {spec} gave {gives} logits and is made anew for {classes} classes"
        )
    return model


def load_factory(spec: str) -> Any:
    """The object that ``file.py:name`` or ``package.module:name`` names.

    Raises:
        ValueError: If there is no such file, module or name.
    """
    where, _, name = spec.rpartition(":")
    if where.endswith(".py") or "/" in where or spec.endswith(".py"):
        return load_from_file(spec)
    try:
        return getattr(import_from_here(where), name)
    except ImportError as error:
        top = where.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            raise ValueError(
                f"{spec!r}: {top!r} is neither installed nor in {Path.cwd()}; go to its folder, or name a file, "
                f"as path/to/file.py:{name}"
            ) from None
        raise ValueError(f"{spec!r}: cannot import {where!r}: {str(error).partition(chr(10))[0]}") from None
    except AttributeError:
        raise ValueError(f"{spec!r}: the module {where!r} has no {name!r}") from None
    except Exception as error:  # a module may raise anything when it is imported
        raise ValueError(f"{spec!r}: importing {where!r} raised {type(error).__name__}: {error}") from error


def call_factory(spec: str, factory: Any, arguments: Mapping[str, Any]) -> Any:
    """The object that a factory returns.

    Raises:
        ValueError: If it cannot be called with these arguments, or raises.
    """
    _check_call(spec, factory, arguments)
    try:
        return factory(**arguments)
    except (Exception, SystemExit) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{spec!r} raised {type(error).__name__}: {reason}") from error


def _check_call(spec: str, factory: Any, arguments: Mapping[str, Any]) -> None:
    """Checks that a factory is a function that takes the arguments."""
    if not callable(factory):
        raise ValueError(f"{spec!r} is a {type(factory).__name__}, not a function")
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{spec!r} cannot be called with the arguments {dict(arguments)}: {error}") from None
    except ValueError:  # a callable without a known signature
        pass


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """The arguments in ``key=value`` pairs; a value is parsed as JSON if it is valid JSON, and text otherwise.

    Raises:
        ValueError: If a pair has no key, or a key comes twice.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{pair!r} is no argument; write key=value")
        if key in arguments:
            raise ValueError(f"the argument {key!r} is given twice")
        try:
            arguments[key] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except ValueError:
            arguments[key] = value
    return arguments


# Weights


def _state_for(spec: str, weights: str, notes: list[str]) -> tuple[dict[str, Tensor] | None, str]:
    """The state dict for a model of a name, None for random weights, and its source in words."""
    if weights not in ("auto", "none"):
        return read_weights(Path(weights)), weights
    if weights == "none" or spec == "small_resnet":
        return None, ""
    file = cached_weights(spec)
    if file is None:
        notes.append(f"no trained weights of {spec} are on this machine, so it starts from random ones")
        return None, ""
    return read_weights(file), f"torchvision's weights {file.name}"


def cached_weights(name: str) -> Path | None:
    """The file in torch's cache with torchvision's weights for a model; None if they have not been downloaded."""
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        return None
    offered = torchvision.models.get_model_weights(name)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    best_first = sorted(offered, key=lambda entry: entry is not offered.DEFAULT)
    files = (folder / str(entry.url).rpartition("/")[2] for entry in best_first)
    return next((file for file in files if file.is_file()), None)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file or a file of `torch.save`; no code in it is run.

    Raises:
        ValueError: If the file does not exist, or holds no state dict.
    """
    _check_file(file)
    if file.suffix == ".safetensors":
        return weights_files.load(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} is refused, because it is not only tensors: loading it could run code. If you trust it, "
            "convert it once where its classes are known: torch.save(torch.load(FILE, "
            "weights_only=False).state_dict(), 'weights.pt')"
        ) from None
    except Exception as error:  # torch may raise anything on damaged bytes
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{file} is not a readable weights file, whatever its name says ({reason})") from None
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{file} holds no state dict; save it with torch.save(model.state_dict(), FILE)")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _check_file(weights: Path) -> None:
    if not weights.is_file():
        raise ValueError(f"there is no weights file {str(weights)!r}")


def _channels_of(state: Mapping[str, Tensor]) -> int | None:
    """Input channels of the first convolution in a state dict; None without one."""
    return next((tensor.shape[1] for tensor in state.values() if tensor.ndim == 4), None)


def _load(model: nn.Module, state: Mapping[str, Tensor], source: str, notes: list[str]) -> bool:
    """Loads a state dict, leaving out a classifier of other classes; returns whether the classifier was loaded.

    Raises:
        ValueError: If any other tensor does not fit.
    """
    last = classifier(model)
    of_classifier = {f"{last[0]}.weight", f"{last[0]}.bias"} if last else set()
    own = model.state_dict()
    auxiliary = {name for name in state if name.startswith(("AuxLogits.", "aux1.", "aux2."))}
    wrong = [name for name in own if name not in state or own[name].shape != state[name].shape]
    extra = [name for name in state if name not in own and name not in auxiliary]
    counters = {name for name in wrong if name.endswith("num_batches_tracked")}  # old files lack them
    bad = [name for name in wrong if name not in of_classifier | counters] + extra
    if bad:
        raise ValueError(
            f"the weights {source} do not fit the model: {len(bad)} tensors are absent, left over or of another "
            f"shape, such as {', '.join(repr(name) for name in bad[:3])}"
        )
    model.load_state_dict({name: state[name] for name in own if name not in wrong}, strict=False)
    replaced = of_classifier & set(wrong)
    if replaced and last is not None:
        theirs = state.get(f"{last[0]}.weight")
        gave = f"gives {len(theirs)} logits" if theirs is not None else "is missing"
        notes.append(f"the classifier in {source} {gave}; it is made anew for the data's classes")
    else:
        notes.append(f"weights: {source}")
    return not replaced
