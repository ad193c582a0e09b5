# SPDX-License-Identifier: Apache-2.0
"""A model's inputs and outputs as plain data, for the API and clients, which never see the model's code.

It comes from the manifest's ``[[inputs]]``, or, for a Python model without them, from the annotation of one
item: the parameter of ``prepare``, or the element type of ``predict``'s list::

    def prepare(self, item: PIL.Image.Image) -> np.ndarray: ...
    def predict(self, batch: list[Annotated[int, Ge(1)]]) -> list[float]: ...

A ``TypedDict`` names several inputs. Reading an annotation needs the model's code to be imported, which is
done in the worker or its sandbox. Reading a signature needs neither the code nor torch.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import orjson

from gpuinfer.errors import ManifestError, ModelLoadError

if TYPE_CHECKING:
    from gpuinfer.models.manifest import Manifest

Kind = Literal["tensor", "json", "text", "bytes", "image", "audio", "file"]
KINDS: tuple[str, ...] = get_args(Kind)
#: Where a signature comes from; ``none``: neither has it, and any JSON value is accepted.
Source = Literal["manifest", "annotations", "none"]

#: Maximum bytes of an example as JSON.
MAX_EXAMPLE_BYTES = 8192
#: The name of the only input of a model whose annotations give it no name.
ITEM = "input"
#: (module, name) of a type -> kind. By name, so that none of these libraries must be imported.
_KIND_OF: dict[tuple[str, str], Kind] = {
    ("builtins", "str"): "text",
    ("builtins", "bytes"): "bytes",
    ("builtins", "bytearray"): "bytes",
    ("PIL.Image", "Image"): "image",
    ("pathlib", "Path"): "file",
    ("numpy", "ndarray"): "tensor",
    ("torch", "Tensor"): "tensor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a model."""

    name: str
    kind: Kind = "json"
    #: The dtype of a tensor; None: any.
    dtype: str | None = None
    #: The shape of a tensor per item, -1 for a free dimension; None: any.
    shape: tuple[int, ...] | None = None
    #: JSON schema of a text or a JSON value; None: any.
    schema: Mapping[str, Any] | None = None
    #: The kind of file that may be sent in place of a tensor, to be converted; None: only numbers.
    file: Literal["image", "audio"] | None = None
    #: Whether a tensor may contain NaN and infinity; null in a list is then NaN.
    allow_nan: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON, without unknown values."""
        entry: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.dtype is not None:
            entry["dtype"] = self.dtype
        if self.shape is not None:
            entry["shape"] = list(self.shape)
        if self.schema is not None:
            entry["schema"] = dict(self.schema)
        if self.file is not None:
            entry["file"] = self.file
        if self.allow_nan:
            entry["allow_nan"] = True
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Input:
        """Read what ``to_json`` wrote. Raises KeyError, TypeError, ValueError for anything else."""
        kind = entry["kind"]
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        shape, schema = entry.get("shape"), entry.get("schema")
        dtype, file = entry.get("dtype"), entry.get("file")
        if not isinstance(dtype, str | None):
            raise TypeError(f"dtype must be a string, got {type(dtype).__name__}")
        if file not in (None, "image", "audio"):
            raise ValueError("file must be image or audio")
        return cls(
            name=str(entry["name"]),
            kind=kind,
            dtype=dtype,
            shape=None if shape is None else tuple(int(length) for length in shape),
            schema=None if schema is None else dict(schema),
            file=file,
            allow_nan=bool(entry.get("allow_nan", False)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One output of a model, as the model returns it."""

    name: str
    #: classification: a vector of scores; a result has the best classes, unless ``raw`` is requested.
    kind: Literal["raw", "classification"] = "raw"
    #: None: any.
    dtype: str | None = None
    #: Per item, -1 for a free dimension; None: any.
    shape: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON, without unknown values."""
        entry: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.dtype is not None:
            entry["dtype"] = self.dtype
        if self.shape is not None:
            entry["shape"] = list(self.shape)
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Output:
        """Read what ``to_json`` wrote. Raises KeyError, TypeError, ValueError for anything else."""
        shape, kind, dtype = entry.get("shape"), entry["kind"], entry.get("dtype")
        if kind not in ("raw", "classification") or not isinstance(dtype, str | None):
            raise ValueError("an output's kind is raw or classification, its dtype a string")
        return cls(
            name=str(entry["name"]),
            kind=kind,
            dtype=dtype,
            shape=None if shape is None else tuple(int(length) for length in shape),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The inputs and outputs of a model, each in order."""

    inputs: tuple[Input, ...]
    #: Empty: a Python model, whose code does not describe what it returns.
    outputs: tuple[Output, ...] = ()
    batchable: bool = True
    source: Source = "manifest"
    #: True: a request's value is a mapping of input names to values; False: it is the only input's value.
    named: bool = False
    #: An ``inputs`` value that the model accepts, as JSON; None: none is known, or it is too large.
    example: Any = None

    @property
    def only(self) -> Input | None:
        """The only input; None if there are several."""
        return self.inputs[0] if len(self.inputs) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "inputs": [one.to_json() for one in self.inputs],
            "outputs": [one.to_json() for one in self.outputs],
            "batchable": self.batchable,
            "source": self.source,
            "named": self.named,
            **({} if self.example is None else {"example": self.example}),
        }

    def with_example(self, value: Any) -> Signature:
        """Return it with an example, if that is small and valid as JSON; arrays become lists."""
        try:
            text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
        except (TypeError, ValueError):  # a file's bytes, or an object of a Python model
            return self
        return replace(self, example=orjson.loads(text)) if len(text) <= MAX_EXAMPLE_BYTES else self

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Signature:
        """Read what ``to_json`` wrote. Raises ManifestError for anything else."""
        try:
            return cls(
                inputs=tuple(Input.from_json(entry) for entry in body["inputs"]),
                outputs=tuple(Output.from_json(entry) for entry in body.get("outputs", ())),
                batchable=bool(body["batchable"]),
                source=body.get("source", "manifest"),
                named=bool(body.get("named", False)),
                example=body.get("example"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ManifestError(f"is no signature: {type(exc).__name__}: {exc}", "signature") from exc


def from_manifest(manifest: Manifest) -> Signature | None:
    """Return the signature from a manifest; None if it has no ``[[inputs]]``."""
    if not manifest.inputs:
        return None
    inputs = tuple(
        Input(
            name=spec.name,
            kind=spec.kind,
            dtype=spec.dtype if spec.kind == "tensor" else None,
            shape=spec.shape if spec.kind == "tensor" else None,
            schema=spec.json_schema,
            file="image" if spec.image else "audio" if spec.audio and spec.kind == "tensor" else None,
            allow_nan=spec.allow_nan,
        )
        for spec in manifest.inputs
    )
    return Signature(
        inputs=inputs, outputs=outputs_of(manifest), batchable=manifest.batchable, named=len(inputs) > 1
    )


def outputs_of(manifest: Manifest) -> tuple[Output, ...]:
    """Return the manifest's ``[[outputs]]``. bfloat16 is returned as float32."""
    return tuple(
        Output(
            name=spec.name,
            kind=spec.kind,
            dtype="float32" if spec.dtype == "bfloat16" else spec.dtype,
            shape=spec.shape,
        )
        for spec in manifest.outputs
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Typed:
    """One input with its annotation, by which the worker checks and converts values."""

    input: Input
    #: The annotation itself; None: there is none.
    type: Any = None


def from_class(cls: type, *, batchable: bool = True) -> tuple[Signature, tuple[Typed, ...]]:
    """Return the signature from the annotations of a model's class, as data and as types.

    For the worker or its sandbox only, as the class is a model's code.
    Raises ModelLoadError, naming the method, if an annotation cannot be read or has no JSON schema.
    """
    found = _item_type(cls, batchable=batchable)
    if found is None:
        plain = Input(name=ITEM)
        return Signature(inputs=(plain,), batchable=batchable, source="none"), (Typed(input=plain),)
    where, item = found
    if typing.is_typeddict(item):
        hints = typing.get_type_hints(item, include_extras=True)
        named = tuple(Typed(input=_input(name, hint, where), type=hint) for name, hint in hints.items())
        if named:
            inputs = tuple(one.input for one in named)
            return Signature(inputs=inputs, batchable=batchable, source="annotations", named=True), named
    one = Typed(input=_input(ITEM, item, where), type=item)
    return Signature(inputs=(one.input,), batchable=batchable, source="annotations"), (one,)


def _item_type(cls: type, *, batchable: bool) -> tuple[str, Any] | None:
    """Return the name of the method whose annotation describes one item, and that annotation."""
    for method in ("prepare", "predict"):
        call = getattr(cls, method, None)
        if call is None:
            continue
        where = f"{cls.__name__}.{method}"
        hint = _first_hint(call, where)
        if hint is None:
            if method == "prepare":  # predict's annotation describes what prepare returns, not the input
                return None
            continue
        if method == "predict" and batchable:
            hint = _element_of(hint, where)
        return None if hint is Any or hint is None else (where, hint)
    return None


def _first_hint(call: Callable[..., Any], where: str) -> Any:
    """Return the annotation of the first parameter after ``self``."""
    try:
        names = [name for name in inspect.signature(call).parameters if name != "self"]
        hints = typing.get_type_hints(call, include_extras=True)
    except Exception as exc:
        raise ModelLoadError(f"its annotation cannot be read: {type(exc).__name__}: {exc}", where) from exc
    return hints.get(names[0]) if names else None


def _element_of(hint: Any, where: str) -> Any:
    """Return the type of a batch's elements; None if the annotation does not say it."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (list, tuple, Sequence, typing.Sequence):
        return None
    if origin in (list, tuple, Sequence) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return args[0] if args else None
    raise ModelLoadError(
        f"its batch is annotated as {_said(hint)}: a batch is a list, such as list[{_said(hint)}]; or set "
        "batchable = false in model.toml, to have it called with one item at a time",
        where,
    )


def _input(name: str, hint: Any, where: str) -> Input:
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(bare) in (typing.Required, typing.NotRequired):
        bare = hint = get_args(bare)[0]
    base = get_origin(bare) or bare
    kind: Kind = "json"
    if isinstance(base, type):
        kind = next((_KIND_OF[key] for key in _names_of(base) if key in _KIND_OF), "json")
    if kind == "tensor":
        return Input(name=name, kind=kind, dtype=_dtype_of(bare))
    if kind in ("json", "text"):
        return Input(name=name, kind=kind, schema=_schema(hint, where))
    return Input(name=name, kind=kind)


def _names_of(base: type) -> list[tuple[str, str]]:
    """Return a class and its bases by name, without object."""
    return [
        ("pathlib" if one.__module__.startswith("pathlib") else one.__module__, one.__name__)
        for one in base.__mro__[:-1]
        if one not in (bool, int)
    ]


def _dtype_of(hint: Any) -> str | None:
    """Return the dtype of ``NDArray[np.float32]``; None for a plain array or a tensor."""
    numpy = sys.modules.get("numpy")
    for part in get_args(hint):
        for scalar in (*get_args(part), part):
            if numpy is not None and isinstance(scalar, type) and issubclass(scalar, numpy.generic):
                try:
                    return str(numpy.dtype(scalar).name)
                except TypeError:  # np.floating and the like
                    return None
    return None


def _schema(hint: Any, where: str) -> dict[str, Any]:
    import pydantic

    try:
        return pydantic.TypeAdapter(hint).json_schema()
    except Exception as exc:
        first = str(exc).strip().partition("\n")[0]
        raise ModelLoadError(f"its annotation {_said(hint)} has no JSON schema: {first}", where) from exc


def _said(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)
