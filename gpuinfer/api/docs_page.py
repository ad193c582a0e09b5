# SPDX-License-Identifier: Apache-2.0
"""``/docs`` as one page without external files, as GPU hosts often have no internet access."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from gpuinfer.api.model_schemas import inputs_schema
from gpuinfer.models.signature import Input, Signature

#: Maximum characters of an example.
_MOST_SHOWN = 6000
#: Maximum characters of a command line.
_MOST_COMMAND = 2000

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --code: #8882; --key: #2a7; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { margin: 0 } h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem }
section { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; padding: .5rem 1rem }
h3 { font: 600 1rem ui-monospace, monospace; margin: .3rem 0; overflow-wrap: anywhere }
h3 b { color: var(--key); display: inline-block; min-width: 4.5rem }
pre { background: var(--code); border-radius: 4px; max-height: 24rem; overflow: auto; padding: .6rem }
pre, code { font: .85rem ui-monospace, monospace } summary { cursor: pointer }
table { border-collapse: collapse; width: 100% } td, th { padding: .2rem .6rem .2rem 0; text-align: left;
vertical-align: top } tr { border-bottom: 1px solid var(--line) }
"""
_SCRIPT = """
for (const button of document.querySelectorAll("button[data-path]")) button.onclick = async () => {
  const out = button.nextElementSibling;
  out.hidden = false;
  out.textContent = "sending...";
  try {
    const body = button.parentElement.querySelector("pre").textContent;
    const answer = await fetch(button.dataset.path, {method: "POST", body,
      headers: {"Content-Type": "application/json"}});
    out.textContent = answer.status + " " + answer.statusText + "\\n" + await answer.text();
  } catch (error) { out.textContent = String(error); }
};
"""


def render(spec: Mapping[str, Any], models: Mapping[str, Signature], base: str, openapi: str) -> str:
    """Return the page. ``base``: URL of this API as the client sees it; ``openapi``: path of the
    description."""
    prefix = openapi.rpartition("/")[0]
    parts = [
        "<!doctype html>\n<html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{escape(spec['info']['title'])}</title><link rel=icon href=data:,>",
        f"<style>{_STYLE}</style>",
        f"<h1>{escape(spec['info']['title'])} <small>{escape(spec['info']['version'])}</small></h1>",
        f"<p>{_text(spec['info'].get('description', ''))}</p>",
        f'<p>For programs: <a href="{escape(openapi)}">{escape(openapi)}</a> (OpenAPI).</p>',
        "<h2>Models</h2>",
        *(_model(name, one, base, prefix) for name, one in models.items()),
    ]
    if not models:
        parts.append("<p>No models are known: no worker has reported any yet, or Redis is unavailable.</p>")
    tag = None
    for path, method, about in _operations(spec):
        if (found := about.get("tags", ["other"])[0]) != tag:
            tag = found
            parts.append(f"<h2>{escape(str(tag))}</h2>")
        parts.append(_operation(path, method, about))
    return "\n".join([*parts, f"<script>{_SCRIPT}</script></html>\n"])


def _operations(spec: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield path, method and description, grouped by tag."""
    every = [
        (path, method, about)
        for path, methods in spec["paths"].items()
        for method, about in methods.items()
        if isinstance(about, Mapping)
    ]
    tags = list(dict.fromkeys(about.get("tags", ["other"])[0] for _, _, about in every))
    yield from sorted(every, key=lambda one: tags.index(one[2].get("tags", ["other"])[0]))


def _model(name: str, signature: Signature, base: str, prefix: str) -> str:
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}' for cell in _cells(one))}" for one in signature.inputs
    )
    parts = [
        f"<section><h3>{escape(name)}</h3>",
        f"<table><tr><th>input<th>kind<th>dtype<th>shape{rows}</table>" if rows else "",
        f"<details><summary>schema</summary>{_pre(inputs_schema(signature))}</details>",
    ]
    if signature.example is not None:
        body = {"inputs": signature.example, "model": name}
        command = f"curl -d {shlex.quote(json.dumps(body))} {base}/predict"
        parts += [
            "<details open><summary>example</summary>",
            _pre(body, whole=True),
            f'<button data-path="{escape(prefix)}/predict">Send</button><pre hidden></pre>',
            f"<pre>{escape(command)}</pre>" if len(command) <= _MOST_COMMAND else "",
            "</details>",
        ]
    return "".join([*parts, "</section>"])


def _cells(one: Input) -> tuple[str, str, str, str]:
    shape = "any" if one.shape is None else str(list(one.shape))
    tensor = one.kind == "tensor"
    return one.name, one.kind, (one.dtype or "any") if tensor else "", shape if tensor else ""


def _operation(path: str, method: str, about: Mapping[str, Any]) -> str:
    parts = [
        f"<section><h3><b>{escape(method.upper())}</b>{escape(path)}</h3>",
        f"<p><strong>{_text(about.get('summary', ''))}.</strong> {_text(about.get('description', ''))}</p>",
    ]
    if parameters := about.get("parameters"):
        rows = "".join(
            f"<tr><td><code>{escape(one['name'])}</code><td>{escape(one['in'])}<td>"
            f"{_text(one.get('description') or one.get('schema', {}).get('description', ''))}"
            for one in parameters
        )
        parts.append(f"<table><tr><th>parameter<th>in<th>{rows}</table>")
    for kind, content in about.get("requestBody", {}).get("content", {}).items():
        shown = {name: one.get("value") for name, one in content.get("examples", {}).items()}
        parts.append(f"<details><summary>body: <code>{escape(kind)}</code></summary>")
        parts += [f"{escape(name)}{_pre(value)}" for name, value in shown.items()]
        parts.append(
            f"<details><summary>schema</summary>{_pre(content.get('schema', {}))}</details></details>"
        )
    for status, one in about.get("responses", {}).items():
        examples = [
            value.get("value")
            for content in one.get("content", {}).values()
            for value in content.get("examples", {}).values()
        ]
        line = f"<code>{escape(str(status))}</code> {_text(one.get('description', ''))}"
        shown_too = "".join(map(_pre, examples))
        parts.append(
            f"<details><summary>{line}</summary>{shown_too}</details>" if examples else f"<div>{line}</div>"
        )
    return "".join([*parts, "</section>"])


def _pre(value: Any, *, whole: bool = False) -> str:
    text = json.dumps(value) if whole or _is_long(value) else json.dumps(value, indent=2)
    if not whole and len(text) > _MOST_SHOWN:
        text = f"{text[:_MOST_SHOWN]} ..."
    return f"<pre>{escape(text, quote=False)}</pre>"


def _is_long(value: Any) -> bool:
    """Whether a value is mostly numbers, to be printed without a line for each."""
    return "inputs" in value if isinstance(value, dict) else isinstance(value, list)


def _text(text: str) -> str:
    """Return text as HTML; text in backquotes becomes code."""
    return "".join(
        f"<code>{escape(part)}</code>" if odd % 2 else escape(part)
        for odd, part in enumerate(text.split("`"))
    )
