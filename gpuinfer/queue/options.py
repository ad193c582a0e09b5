# SPDX-License-Identifier: Apache-2.0
"""The options of a task, declared once for clients, HTTP schema, command line and worker.

Type checkers see ``Options``. The ``Option`` in each annotation has the help text and the rules for checks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_type_hints

from gpuinfer.errors import InputError
from gpuinfer.names import MODEL_NAME, QUEUES, QueueName

#: Limits of a time (ten years), and of the characters in a key or an id.
MAX_SECONDS, MAX_NAME = 10 * 365 * 86400, 200
#: Limits of ``metadata``: number of entries, and characters of a name and of a text.
MAX_METADATA, MAX_METADATA_NAME, MAX_METADATA_TEXT = 16, 64, 512
_MAP_SCHEMA: dict[str, Any] = {
    "type": "object",
    "maxProperties": MAX_METADATA,
    "propertyNames": {"minLength": 1, "maxLength": MAX_METADATA_NAME},
    "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_TEXT},
}

#: https://www.w3.org/TR/trace-context/#traceparent-header: version 00, and no id of zeros alone.
TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Encoding = Literal["list", "b64", "raw"]
ENCODINGS: tuple[Encoding, ...] = ("list", "b64", "raw")
#: The encoding that our front requests when it passes arrays on as bytes: like ``raw``, but the result has
#: the form of the module ``binary``. Not for callers: Celery's own readers cannot read that.
BINARY = "binary"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option: its help text and its valid values."""

    help: str
    kind: Literal["integer", "number", "string", "boolean", "map"] = "string"
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    #: The pattern that a text must match; ``words``: the same in words.
    pattern: re.Pattern[str] | None = None
    words: str = ""
    #: The value if it is left out; None: decided elsewhere, for example by the model.
    default: int | bool | None = None
    #: True: an argument of the task, so plain Celery producers may give it, too.
    argument: bool = False
    #: Suffix of its name that its command line flag leaves out.
    flag_without: str = ""

    def schema(self) -> dict[str, Any]:
        """Return its JSON schema."""
        body: dict[str, Any] = {"enum": list(self.choices)} if self.choices else {"type": self.kind}
        if self.kind == "map":
            return _MAP_SCHEMA | {"description": self.help}
        if self.kind == "string" and not self.choices:
            pattern = None if self.pattern is None else f"^{self.pattern.pattern}$"
            body |= {"minLength": self.least, "maxLength": self.most, "pattern": pattern}
        elif self.kind == "number":
            body |= {"exclusiveMinimum": 0, "maximum": self.most}
        else:
            body |= {"minimum": self.least, "maximum": self.most}
        body |= {"default": self.default, "description": self.help}
        return {name: value for name, value in body.items() if value is not None}

    def wrong(self, value: Any) -> str:
        """Return what a wrong value should be, such as "true or false"; '' for a valid value."""
        if self.choices:
            return (
                ""
                if isinstance(value, str) and value in self.choices
                else f"one of {', '.join(self.choices)}"
            )
        check: Callable[[Any], str] = getattr(self, f"_wrong_{self.kind}")
        return check(value)

    def _wrong_integer(self, value: Any) -> str:
        right = isinstance(value, int) and not isinstance(value, bool) and value >= (self.least or 0)
        if right and (self.most is None or value <= self.most):
            return ""
        return f"an integer from {self.least}" + ("" if self.most is None else f" to {self.most}")

    def _wrong_number(self, value: Any) -> str:
        right = (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= (self.most or 0)
        )
        return "" if right else f"a number of seconds above 0, at most {self.most}"

    def _wrong_string(self, value: Any) -> str:
        if self.pattern is not None:
            return "" if isinstance(value, str) and self.pattern.fullmatch(value) else self.words
        if not isinstance(value, str) or not (self.least or 0) <= len(value) <= (self.most or 0):
            return f"a text of {self.least} to {self.most} characters"
        try:
            value.encode()
        except UnicodeEncodeError:
            return "valid Unicode (it contains half a surrogate pair)"
        return ""

    def _wrong_map(self, value: Any) -> str:
        right = isinstance(value, dict) and len(value) <= MAX_METADATA
        for name, text in value.items() if right else ():
            right = right and isinstance(name, str) and 0 < len(name) <= MAX_METADATA_NAME
            right = right and isinstance(text, str) and len(text) <= MAX_METADATA_TEXT
        if right and _encodable(value):
            return ""
        return (
            f"an object of at most {MAX_METADATA} texts of up to {MAX_METADATA_TEXT} characters, with names "
            f"of 1 to {MAX_METADATA_NAME}"
        )

    def _wrong_boolean(self, value: Any) -> str:
        return "" if isinstance(value, bool) else "true or false"


def _encodable(texts: Mapping[str, str]) -> bool:
    """Tell whether these texts can be encoded: half a surrogate pair cannot."""
    try:
        "".join((*texts, *texts.values())).encode()
    except UnicodeEncodeError:
        return False
    return True


def _seconds(help: str) -> Option:
    return Option(help=help, kind="number", most=MAX_SECONDS, flag_without="_s")


class Options(TypedDict, total=False):
    """The options of ``submit``, besides the inputs; all are optional."""

    model: Annotated[
        str | None,
        Option(
            help="Name of the model. Default: the fleet's default model.",
            pattern=MODEL_NAME,
            words="a model's name, of at most 64 characters a to z, 0 to 9, '_', '.' and '-'",
            argument=True,
        ),
    ]
    queue: Annotated[
        QueueName | None,
        Option(help="Default: realtime; batch for a list of inputs as one job.", choices=QUEUES),
    ]
    priority: Annotated[int, Option(help="9 runs first.", kind="integer", least=0, most=9, default=0)]
    top_k: Annotated[
        int | None,
        Option(
            help="Number of best classes in a classification.",
            kind="integer",
            least=1,
            most=2**31 - 1,
            argument=True,
        ),
    ]
    encoding: Annotated[
        Encoding | None,
        Option(
            help="Format of raw outputs; raw: raw outputs and scores as b64. Default: list.",
            choices=ENCODINGS,
            argument=True,
        ),
    ]
    expires_s: Annotated[
        float | None, _seconds("Seconds after which the task expires if it has not started.")
    ]
    countdown_s: Annotated[float | None, _seconds("Seconds before a worker may start the task.")]
    soft_time_limit_s: Annotated[
        float | None, _seconds("Soft time limit in seconds: the task is interrupted. Default: the model's.")
    ]
    time_limit_s: Annotated[
        float | None, _seconds("Hard time limit in seconds: the worker process ends. Default: the model's.")
    ]
    ignore_result: Annotated[
        bool, Option(help="true: run it and store no result.", kind="boolean", default=False)
    ]
    metadata: Annotated[
        Mapping[str, str] | None,
        Option(help="Your own texts by name, at most 16, returned with the task.", kind="map"),
    ]
    traceparent: Annotated[
        str | None,
        Option(
            help="Trace context of the caller (W3C), included in the journal and the result.",
            pattern=TRACEPARENT,
            words="a traceparent of W3C Trace Context: 00-<32 hex digits>-<16 hex digits>-<2 hex digits>",
        ),
    ]
    idempotency_key: Annotated[
        str | None,
        Option(
            help="A request with the same key returns the same task; a different one is refused.",
            least=1,
            most=MAX_NAME,
        ),
    ]


_HINTS = get_type_hints(Options, include_extras=True)
#: Name -> option.
OPTIONS: Mapping[str, Option] = {name: hint.__metadata__[0] for name, hint in _HINTS.items()}
#: The arguments of our tasks by position, the inputs first.
ARGUMENTS: tuple[str, ...] = ("inputs", *(name for name, option in OPTIONS.items() if option.argument))


def check(options: Mapping[str, Any], said: Callable[[object], str] = lambda value: f"{value!r:.80}") -> None:
    """Raise InputError, naming the field, for unknown options and invalid values. None counts as left out.

    ``said`` formats an invalid value for the error's text.
    """
    for name, value in options.items():
        option = OPTIONS.get(name)
        if option is None:
            raise InputError(f"unknown option; known: {', '.join(OPTIONS)}", name)
        may_be_none = option.default is None
        if (value is None and may_be_none) or (name == "encoding" and value == BINARY):
            continue
        if not (wrong := option.wrong(value)):
            continue
        raise InputError(f"must be {wrong}, got {said(value)}", name)


F = TypeVar("F", bound=Callable[..., Any])


def documented(function: F) -> F:
    """Show the options of a function with ``**options: Unpack[Options]`` in ``help()`` and in editors."""
    signature = inspect.signature(function)
    parameters = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    plain = get_type_hints(Options)
    parameters += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=plain[name]
        )
        for name, option in OPTIONS.items()
    ]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    lines = "\n".join(f"    {name}: {option.help}" for name, option in OPTIONS.items())
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{lines}\n"
    return function
