# SPDX-License-Identifier: Apache-2.0
"""Finds an artefact's inputs and outputs from its signature, graph, annotations, and a few trial runs.

Runs the model's code, so use it only in the sandbox. Unknown details are left out; ``scaffold`` asks for
them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpuinfer.errors import ModelLoadError
from gpuinfer.models.as_json import as_json
from gpuinfer.models.manifest import FORMATS
from gpuinfer.models.specs import DTYPES, FREE

#: Sides of a picture to try, the usual one first: a network with a linear layer accepts only one size.
_SIDES = (224, 32, 28, 64, 96, 128, 160, 256, 299, 384, 512, 8)
#: Lengths of a signal or a text to try.
_LENGTHS = (64, 128, 512, 1024, 16000)
#: Second sizes to try: a dimension that accepts two sizes is free.
_OTHER_SIDE, _OTHER_LENGTH = 192, 96
_SCALARS = {"FloatType": "float32", "IntType": "int64", "BoolType": "bool", "NumberType": "float32"}


@dataclass(kw_only=True)
class Tensor:
    """An input or output, as far as known."""

    name: str
    dtype: str | None = None
    #: Per item if the model is batchable; None: unknown.
    shape: list[int] | None = None
    #: Where the shape comes from, for a comment.
    source: str = ""


@dataclass(kw_only=True)
class Description:
    """The description of an artefact."""

    format: str
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    batchable: bool = True
    max_batch_size: int | None = None
    #: For a Python file: its classes with a method predict, and the signature and example of one.
    classes: list[str] = field(default_factory=list)
    signature: dict[str, Any] | None = None
    example: bool = False
    #: That example, as in a request.
    example_value: Any = None


def describe(path: Path, class_name: str | None = None) -> dict[str, Any]:
    """Describe an artefact by its format. Raises ModelLoadError."""
    kind = FORMATS[path.suffix]
    if not path.is_file():  # it may have been removed meanwhile
        raise ModelLoadError("no such file", str(path))
    if kind == "python":
        return asdict(_python(path, class_name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return asdict(_torchscript(path) if kind == "torchscript" else _export(path))
    except ModelLoadError:
        raise
    except Exception as exc:
        from gpuinfer.models.device import translate

        error = translate(exc, ModelLoadError, f"{path.name} cannot be loaded")
        raise ModelLoadError(error.message, path.name) from exc


# -- Python ---------------------------------------------------------------------------------


def _python(path: Path, class_name: str | None) -> Description:
    from gpuinfer.models.code import class_of, importing, run_file
    from gpuinfer.models.manifest import Manifest
    from gpuinfer.models.repository import ModelFolder
    from gpuinfer.models.signature import from_class

    keys = {"name": "model", "artefact": path.name, **({"class": class_name} if class_name else {})}
    manifest = Manifest.model_validate(keys)
    folder = ModelFolder(path=path.parent, manifest=manifest)
    with importing(folder.path), path.open("rb") as file:
        module = run_file(folder, file)
        own = [one for one in vars(module).values() if isinstance(one, type)]
        able = [one.__name__ for one in own if one.__module__ == module.__name__ and hasattr(one, "predict")]
        if len(able) > 1 and class_name is None:
            return Description(format="python", classes=able)
        cls = class_of(module, manifest)
        signature, _ = from_class(cls)
        example = getattr(cls, "example", None)
    return Description(
        format="python",
        classes=able,
        signature=signature.to_json(),
        example=example is not None,
        example_value=as_json(example),
    )


# -- torch.export ---------------------------------------------------------------------------


def _export(path: Path) -> Description:
    from gpuinfer.models.formats.export import open_program

    with path.open("rb") as file:
        program = open_program(file, path)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    inputs = [_meta(name, values.get(name)) for name in names]
    made = [name for name in program.graph_signature.user_outputs if isinstance(name, str)]
    called = [f"output_{place}" for place in range(len(made))] if len(made) > 1 else ["output"]
    outputs = [_meta(name, values.get(node)) for name, node in zip(called, made, strict=True)]
    tensors = [one for one in inputs if one.shape]
    batchable = bool(tensors) and all(one.shape and one.shape[0] == FREE for one in inputs)
    largest = None
    if batchable:
        first = values[names[0]].shape[0]
        bounds = program.range_constraints.get(first.node.expr) if hasattr(first, "node") else None
        upper = getattr(bounds, "upper", None)
        with_bound = upper is not None and str(upper).isdecimal() and int(upper) < 32
        largest = int(upper) if with_bound and upper is not None else None
        for one in (*inputs, *outputs):
            one.shape = one.shape[1:] if one.shape else one.shape
    return Description(
        format="export", inputs=inputs, outputs=outputs, batchable=batchable, max_batch_size=largest
    )


def _meta(name: str, value: Any) -> Tensor:
    import torch

    if isinstance(value, torch.Tensor):
        shape = [length if isinstance(length, int) else FREE for length in value.shape]
        return Tensor(name=name, dtype=_dtype(value), shape=shape, source="of its graph")
    kinds = {bool: "bool", int: "int64", float: "float32"}
    return Tensor(name=name, dtype=kinds.get(type(value)), shape=[], source="of its graph")


def _dtype(value: Any) -> str | None:
    name = str(value.dtype).removeprefix("torch.")
    return name if name in DTYPES else None


# -- TorchScript ----------------------------------------------------------------------------


def _torchscript(path: Path) -> Description:
    from gpuinfer.models.formats.torchscript import open_module

    with path.open("rb") as file:
        module = open_module(file, path, "cpu")
    schema = module.forward.schema
    inputs, scalars = [], False
    for argument in schema.arguments[1:]:
        kind = argument.type.kind()
        if kind in _SCALARS:
            scalars = True
            inputs.append(
                Tensor(name=argument.name, dtype=_SCALARS[kind], shape=[], source="of its signature")
            )
        elif kind == "TensorType":
            inputs.append(Tensor(name=argument.name))
        elif argument.has_default_value():
            break
        else:
            raise ModelLoadError(
                f"its input {argument.name} is a {argument.type}: a model is called with tensors and "
                "numbers; wrap it in a module that takes those",
                path.name,
            )
    found = Description(format="torchscript", inputs=inputs, batchable=not scalars)
    unknown = [one for one in inputs if one.shape is None]
    outputs = None
    if len(inputs) == 1 and unknown:
        outputs = _guess(module, inputs[0])
    found.outputs = outputs if outputs is not None else _returned(schema)
    return found


def _returned(schema: Any) -> list[Tensor]:
    """Return the outputs, judged by the return type in a TorchScript schema."""
    kind = schema.returns[0].type
    if kind.kind() == "TupleType":
        return [Tensor(name=f"output_{place}") for place in range(len(kind.elements()))]
    return [Tensor(name="output")]


def _guess(module: Any, one: Tensor) -> list[Tensor] | None:
    """Try shapes that the first layer suggests; set the one that the model accepts and return its outputs."""
    import torch

    for dtype, shape, other in _suggested(module):
        taken = _outputs(module, torch.zeros((2, *shape), dtype=dtype))
        if taken is None:
            continue
        second = _outputs(module, torch.zeros((2, *other), dtype=dtype)) if other is not None else None
        one.dtype = _dtype(torch.zeros(1, dtype=dtype))
        one.shape = _common(shape, shape if second is None or other is None else other)
        one.source = "of its first layer, and tried"
        for output, beside in zip(taken, second or taken, strict=True):
            if output.shape is not None and beside.shape is not None:
                output.shape = _common(output.shape, beside.shape)
        return taken
    return None


def _common(left: Sequence[int], right: Sequence[int]) -> list[int] | None:
    """Return a shape that is free where two shapes differ; None if their numbers of dimensions differ."""
    if len(left) != len(right):
        return None
    return [a if a == b else FREE for a, b in zip(left, right, strict=True)]


def _outputs(module: Any, batch: Any) -> list[Tensor] | None:
    import torch

    try:
        with torch.inference_mode():
            made = module(batch)
    except Exception:
        return None
    named = made.items() if isinstance(made, dict) else _numbered(made)
    outputs = []
    for name, value in named:
        if not isinstance(value, torch.Tensor) or not value.ndim or len(value) != len(batch):
            return None  # it does not return a batch: the shape is wrong
        outputs.append(Tensor(name=str(name), dtype=_dtype(value), shape=list(value.shape[1:])))
    return outputs


def _numbered(made: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(made, list | tuple):
        fields = getattr(made, "_fields", None) or [f"output_{place}" for place in range(len(made))]
        yield from zip(fields, made, strict=True)
    else:
        yield "output", made


def _suggested(module: Any) -> Iterator[tuple[Any, Sequence[int], Sequence[int] | None]]:
    """Yield (dtype, shape, second shape to find free dimensions) that suit the first layer with weights."""
    import torch

    kind, weight = _first_layer(module)
    if weight is None:
        return
    if kind == "embedding":
        for length in _LENGTHS:
            yield torch.int64, (length,), (_OTHER_LENGTH,)
    elif weight.ndim == 2:
        yield weight.dtype, (weight.shape[1],), None
    elif weight.ndim == 3:
        for length in reversed(_LENGTHS):
            yield weight.dtype, (weight.shape[1], length), (weight.shape[1], length + _OTHER_LENGTH)
    elif weight.ndim == 4:
        channels = weight.shape[1]
        for side in _SIDES:
            yield weight.dtype, (channels, side, side), (channels, _OTHER_SIDE, _OTHER_SIDE)


def _first_layer(module: Any) -> tuple[str, Any]:
    """Return the kind of the first layer with weights in the graph, and its weights."""
    for node in module.inlined_graph.nodes():
        kind = node.kind().removeprefix("aten::")
        if kind in ("linear", "conv1d", "conv2d", "_convolution", "addmm", "embedding"):
            place = 0 if kind == "embedding" else 2 if kind == "addmm" else 1
            return kind, _constant(module, list(node.inputs())[place])
    first = next((one for one in module.parameters() if one.ndim > 1), None)
    return "", first


def _constant(module: Any, value: Any) -> Any:
    """Return the parameter for a value of the graph; None if the value is computed."""
    node = value.node()
    if node.kind() == "prim::Param":
        return module
    if node.kind() != "prim::GetAttr":
        return None
    owner = _constant(module, next(iter(node.inputs())))
    return None if owner is None else getattr(owner, node.s("name"), None)
