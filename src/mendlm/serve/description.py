"""The service's OpenAPI description as a page to read: plain HTML without a script, so that no other host is asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = (
    ":root { color-scheme: light dark } body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; "
    "padding: 0 1rem; overflow-wrap: break-word } h2 { margin-top: 2.5rem } "
    "table { border-collapse: collapse; margin: 1rem 0 } "
    "td, th { border: 1px solid; padding: .25rem .5rem; text-align: left; vertical-align: top }"
)
_LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems")


def html(openapi: Mapping[str, Any]) -> bytes:
    """The page of an OpenAPI description: its routes, and the forms that they take and give."""
    about = openapi["info"]
    parts = [f"<h1>{escape(about['title'])} {escape(about['version'])}</h1>", f"<p>{escape(about['description'])}</p>"]
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            parts += [f"<h2><code>{method.upper()} {escape(path)}</code></h2>", f"<p>{escape(route['description'])}</p>"]
            parts += _table(("parameter", "value", ""), (_field(one["name"], one) for one in route.get("parameters", ())))
            if "requestBody" in route:
                parts.append(f"<p>Takes {_contents(route['requestBody'])}.</p>")
            answers = ((code, _contents(one), escape(one["description"])) for code, one in sorted(route["responses"].items()))
            parts += _table(("status", "answer", ""), answers)
    for name, form in openapi["components"]["schemas"].items():
        parts += [f'<h2 id="{escape(name)}">{escape(name)}</h2>', f"<p>{escape(form.get('description', ''))}</p>"]
        fields = ({**field, "required": key in form.get("required", ())} for key, field in form.get("properties", {}).items())
        parts += _table(("field", "value", ""), map(_field, form.get("properties", {}), fields))
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>mendlm</title><style>{_STYLE}</style>'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'.encode()


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table of HTML, or nothing without rows."""
    if found := list(rows):
        for kind, row in (("th", heads), *(("td", row) for row in found)):
            yield ("<table>" if kind == "th" else "") + f"<tr>{''.join(f'<{kind}>{cell}</{kind}>' for cell in row)}</tr>"
        yield "</table>"


def _field(name: str, field: Mapping[str, Any]) -> tuple[str, str, str]:
    """A field's, or a parameter's, name, values and description."""
    name = f"<code>{escape(name)}</code>" + (" (required)" if field.get("required") else "")
    return name, _values(field.get("schema", field)), escape(field.get("description", ""))


def _contents(answer: Mapping[str, Any]) -> str:
    """The media types of a body or an answer, with their forms."""
    contents = answer.get("content", {}).items()
    return " or ".join(f"{escape(kind)} {_values(one['schema']) if 'schema' in one else ''}".strip() for kind, one in contents)


def _values(schema: Mapping[str, Any]) -> str:
    """What a schema allows, in words, with links to its forms."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_values(one) for one in schema["anyOf"])
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    said = ", ".join(escape(json.dumps(value)) for value in values) or str(schema.get("type", "anything"))
    if isinstance(items := schema.get("items"), Mapping):
        said = f"list of ({_values(items)})"
    limits = [f"{name} {schema[name]}" for name in _LIMITS if name in schema]
    limits += [f"default {escape(json.dumps(schema['default']))}"] if "default" in schema else []
    return f"{said}; {', '.join(limits)}" if limits else said
