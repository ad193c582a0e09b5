# SPDX-License-Identifier: Apache-2.0
"""Files over HTTP: bodies that are a file, and forms."""

from __future__ import annotations

import pytest

from gpuinfer.api.uploads import admit_upload, holds_json, parts_of
from gpuinfer.errors import InputError, MalformedForm

pytestmark = pytest.mark.unit

FORM = "multipart/form-data; boundary=XX"
JPEG = bytes(range(256)) * 9 + b"\r\n\r\n--XY\r\n--X\r\n"


def form(*parts: tuple[str, bytes]) -> bytes:
    """Write a form as curl does; each part is the rest of its first header, and its content."""
    text = b"".join(
        b"--XX\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    return text + b"--XX--\r\n"


def test_a_body_that_is_the_file() -> None:
    """Its bytes, a name with the type's suffix, and the options of the URL, of their own types."""
    query = {"model": "resnet", "priority": "7", "expires_s": "2.5", "ignore_result": "true"}
    asked = admit_upload(JPEG, "image/jpeg", query, header_key="k")
    assert asked.inputs == {"b64": JPEG, "name": "upload.jpg"}
    assert asked.options == {
        "model": "resnet",
        "priority": 7,
        "expires_s": 2.5,
        "ignore_result": True,
        "idempotency_key": "k",
    }
    assert admit_upload(b"hi", "text/plain; charset=utf-8", {}).inputs == "hi"
    for kind, name in (
        ("application/octet-stream", "upload.bin"),
        ("application/x-npy", "upload.npy"),
        ("application/x-unheard-of", "upload"),
    ):
        assert admit_upload(JPEG, kind, {}).inputs == {"b64": JPEG, "name": name}


def test_a_form_with_one_file() -> None:
    """A part called file is the only input; what is named as an option is one; the file is byte for byte."""
    body = form(
        ('name="file"; filename="cat.jpg"\r\nContent-Type: image/jpeg', JPEG), ('name="priority"', b"9")
    )
    asked = admit_upload(body, FORM, {"model": "resnet"})
    assert asked.inputs == {"b64": JPEG, "name": "cat.jpg"}
    assert asked.options == {"model": "resnet", "priority": 9}


def test_a_form_with_an_input_a_part() -> None:
    """Files, JSON and text by name."""
    body = form(
        ('name="image"; filename="cat.jpg"', JPEG),
        ('name="question"', "Was ist das\u2026?".encode()),
        ('name="box"', b"[1, 2, 3, 4]"),
        ('name="code"\r\nContent-Type: text/plain', b"7"),
    )
    assert admit_upload(body, FORM, {}).inputs == {
        "image": {"b64": JPEG, "name": "cat.jpg"},
        "question": "Was ist das\u2026?",
        "box": [1, 2, 3, 4],
        "code": "7",
    }


def test_as_many_parts_as_there_may_be() -> None:
    """One more is refused, as is told below."""
    assert [part.content for part in parts_of(form(*[('name="a"', b"1")] * 64), FORM)] == [b"1"] * 64


def test_headers_of_a_part() -> None:
    """In any case, with white space around them, and one after another."""
    head = 'name="a"; filename="b"   \r\ncontent-TYPE:\t image/png \t\r\nX-Other: 1'
    (part,) = parts_of(form((head, b"1")), FORM)
    assert (part.name, part.filename, part.content_type) == ("a", "b", "image/png")


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"", "multipart/form-data", "names no boundary"),
        (form(('name="a"', b"1"))[:-6], FORM, "is incomplete"),
        (b"--XX\r\nContent-Disposition: form-data; name=a\r\n--XX--", FORM, "no empty line"),
        (form(("filename=x", b"1")), FORM, "has no name"),
        (form(*[('name="a"', b"1")] * 70), FORM, "more than 64 parts"),
        (form(('name="a"\r\nContent-Transfer-Encoding: base64', b"1")), FORM, "Content-Transfer-Encoding"),
        (form((f'name="{";" * 4096}"', b"1")), FORM, "more than 4096 bytes of headers"),
    ],
)
def test_a_form_that_is_none(body: bytes, content_type: str, words: str) -> None:
    """400, with what is wrong."""
    with pytest.raises(MalformedForm, match=words):
        list(parts_of(body, content_type))


@pytest.mark.parametrize(
    ("body", "content_type", "query", "field"),
    [
        (b"", "image/png", {}, "body"),
        (b"x", "image/png", {"modell": "resnet"}, "modell"),
        (form(('name="a"', b"1"), ('name="a"', b"2")), FORM, {}, "a"),
        (form(('name="a"', b"\xff")), FORM, {}, "a"),
        (form(('name="model"', b"resnet")), FORM, {}, "inputs"),
        (form(('name="a"\r\nContent-Type: application/json', b"{")), FORM, {}, "a"),
    ],
)
def test_what_is_wrong_in_an_upload_is_named(
    body: bytes, content_type: str, query: dict[str, str], field: str
) -> None:
    """422, with the part or the option."""
    with pytest.raises(InputError) as caught:
        admit_upload(body, content_type, query)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "content_type", "json"),
    [
        (b"[1]", "", True),
        (b"[1]", "application/x-www-form-urlencoded", True),
        (b"[1]", "application/problem+json", True),
        (b' {"inputs": 1}', "text/plain;charset=UTF-8", True),
        (b"a letter", "text/plain", False),
        (b"[1]", "image/png", False),
        (b"[1]", FORM, False),
    ],
)
def test_what_is_json(body: bytes, content_type: str, json: bool) -> None:
    """As before where curl or a browser sends a list without saying so."""
    assert holds_json(body, content_type) is json
