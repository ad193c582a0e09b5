# SPDX-License-Identifier: Apache-2.0
"""Files over HTTP: the file as the body, or a form with one part per input.

::

    curl -T cat.jpg -H 'Content-Type: image/jpeg' http://HOST/models/resnet/predict
    curl --data-binary @x.npy -H 'Content-Type: application/octet-stream' 'http://HOST/predict?model=resnet'
    curl -F file=@cat.jpg -F model=resnet http://HOST/predict
    curl -F image=@cat.jpg -F question='What is it?' -F model=vqa http://HOST/predict

In a form, a part with the name of an option sets that option; a single part named ``file`` or ``inputs`` is
the only input. A part with a file name is a file; any other is JSON if it parses, else text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from email.message import Message
from mimetypes import guess_extension
from typing import Any, NamedTuple, cast

import orjson

from gpuinfer.api.admission import Admission, with_key
from gpuinfer.client import Options
from gpuinfer.errors import InputError, MalformedForm
from gpuinfer.queue.options import OPTIONS

#: Types read as JSON: its own, and that of ``curl -d``.
_JSON = frozenset({"", "application/json", "application/x-www-form-urlencoded", "text/json"})
_FORM = "multipart/form-data"
#: Types in use for .npy files; none is registered.
_NPY = frozenset({"application/x-npy", "application/npy", "application/vnd.numpy.npy"})
#: Names for the only input of a form.
ONLY = ("file", "inputs")
_MAX_PARTS = 64
#: Maximum bytes of a part's headers; parsing takes quadratic time.
_MOST_HEAD = 4096
_TRUE_FALSE = {"true": True, "false": False, "1": True, "0": False}


class Part(NamedTuple):
    """One part of a form."""

    name: str
    content: bytes
    #: None: not a file.
    filename: str | None
    content_type: str


def holds_json(body: bytes, content_type: str) -> bool:
    """Whether a body is JSON: by its type, or if it is text that starts like a list or an object."""
    if content_type == "application/json":
        return True
    if _is_text(content_type):
        return body.lstrip()[:1] in (b"[", b"{")
    return is_json(content_type)


def is_json(content_type: str) -> bool:
    """Whether a body of this type is JSON; an empty type counts as JSON."""
    kind = _kind(content_type)
    return kind in _JSON or kind.endswith("+json")


def _is_text(content_type: str) -> bool:
    return _kind(content_type) == "text/plain"


def admit_upload(
    body: bytes, content_type: str, query: Mapping[str, str], *, header_key: str | None = None
) -> Admission:
    """Parse a request with files. ``query``: options from the URL.

    Raises MalformedForm, InputError.
    """
    given: dict[str, Any] = {name: option(name, text) for name, text in query.items()}
    if _kind(content_type) == _FORM:
        inputs = _from_form(body, content_type, given)
    elif not body:
        raise InputError("the body is empty; it must be the file", "body")
    elif _is_text(content_type):
        inputs = _decoded(body, "body")
    else:
        inputs = {"b64": body, "name": "upload" + _suffix(_kind(content_type))}
    return Admission(inputs=inputs, options=with_key(cast(Options, given), header_key))


def _suffix(kind: str) -> str:
    return ".npy" if kind in _NPY else guess_extension(kind) or ""


def _from_form(body: bytes, content_type: str, given: dict[str, Any]) -> Any:
    """Return the inputs of a form; add its options to ``given``."""
    named: dict[str, Any] = {}
    for part in parts_of(body, content_type):
        if part.name in OPTIONS and part.filename is None:
            given[part.name] = option(part.name, _text(part))
        elif part.name in named:
            raise InputError("must be given only once in the form", part.name[:80])
        else:
            named[part.name] = _value(part)
    if not named:
        raise InputError("is missing; send the form with a part named file, or one for each input", "inputs")
    if len(named) == 1 and (only := next(iter(named))) in ONLY:
        return named[only]
    return named


def _value(part: Part) -> Any:
    if part.filename is not None:
        return {"b64": part.content, "name": part.filename}
    text = _text(part)
    if _is_text(part.content_type):
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        if part.content_type and is_json(part.content_type):
            raise InputError("must be JSON, because its Content-Type says so", part.name[:80]) from None
        return text


def _text(part: Part) -> str:
    return _decoded(part.content, part.name[:80])


def _decoded(content: bytes, field: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InputError("must be UTF-8 text; to send a file, give the part a file name", field) from None


def option(name: str, text: str) -> Any:
    """Parse an option's value; the client checks it. Raises InputError for an unknown name."""
    option = OPTIONS.get(name)
    if option is None:
        raise InputError(f"unknown option; known: {', '.join(OPTIONS)}", name[:80])
    try:
        if option.kind == "integer":
            return int(text)
        if option.kind == "number":
            return float(text)
        if option.kind == "map":
            return orjson.loads(text)
    except ValueError:
        return text  # refused by the client's check, which says what would be right
    return _TRUE_FALSE.get(text.lower(), text) if option.kind == "boolean" else text


# -- forms: RFC 7578 and 2046 ---------------------------------------------------------------


def parts_of(body: bytes, content_type: str) -> Iterator[Part]:
    """Yield the parts of a form in their order. Raises MalformedForm."""
    boundary = _parameter(content_type, "boundary")
    if not boundary or len(boundary) > 70:
        raise MalformedForm("the form's Content-Type names no boundary of 1 to 70 characters", "body")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(), _MAX_PARTS + 2)
    if len(pieces) > _MAX_PARTS + 2:
        raise MalformedForm(f"the form has more than {_MAX_PARTS} parts", "body")
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise MalformedForm("the form is incomplete: its last boundary is missing", "body")
    for piece in pieces[1:-1]:
        head, found, content = piece.partition(b"\r\n\r\n")
        if not found:
            raise MalformedForm("a part of the form has no empty line after its headers", "body")
        if len(head) > _MOST_HEAD:
            raise MalformedForm(f"a part of the form has more than {_MOST_HEAD} bytes of headers", "body")
        yield _part(head, content)


def _part(head: bytes, content: bytes) -> Part:
    lines = (line.partition(":") for line in head.decode("utf-8", "replace").split("\n"))
    headers = {name.lower(): value.strip(" \t\r") for name, _, value in lines}
    place = headers.get("content-disposition", "")
    name = _parameter(place, "name")
    if not place.lower().startswith("form-data") or not name:
        raise MalformedForm(
            "a part of the form has no name: Content-Disposition: form-data; name=...", "body"
        )
    if headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise MalformedForm("a part of the form has a Content-Transfer-Encoding; send it without", "body")
    return Part(name, content, _parameter(place, "filename"), headers.get("content-type", ""))


def _parameter(header: str, name: str) -> str | None:
    """Return a parameter of a header such as ``form-data; name="x"``."""
    message = Message()
    message["x"] = re.sub(r"[\r\n]", " ", header)
    found = message.get_param(name, header="x")
    return found[2] if isinstance(found, tuple) else found


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()
