"""Forms of answers as clients ask for them, each with an answer that has it and one that does not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        name: unique.
        kind: what `text` is: a JSON schema, a regular expression or a grammar in GBNF.
        right: an answer that has the form, JSON as `json.dumps` writes it.
        wrong: an answer that does not.
    """

    name: str
    kind: Literal["json", "regex", "grammar"]
    text: str
    right: str
    wrong: str


def _schema(name: str, schema: dict[str, Any], right: Any, wrong: Any) -> Form:
    return Form(name, "json", json.dumps(schema), json.dumps(right), json.dumps(wrong))


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


_TEXT, _WHOLE, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_LABELS = [f"label {number}" for number in range(60)]
_FIELDS = [f"field_{number}" for number in range(30)]

FORMS = (
    _schema(
        "a person",
        _object({"name": _TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "height": _NUMBER}),
        {"name": "Ada Lovelace", "age": 36, "height": 1.65},
        {"name": "Ada Lovelace", "age": 360, "height": 1.65},
    ),
    _schema(
        "an invoice",
        _object(
            {
                "number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                "date": {"type": "string", "format": "date"},
                "lines": {
                    "type": "array",
                    "minItems": 1,
                    "items": _object({"what": _TEXT, "count": _WHOLE, "price": _NUMBER}),
                },
                "total": _NUMBER,
            }
        ),
        {
            "number": "AB-1234",
            "date": "2026-11-27",
            "lines": [{"what": "paper", "count": 3, "price": 4.5}, {"what": "ink", "count": 1, "price": 20}],
            "total": 33.5,
        },
        {"number": "AB-1234", "date": "the 27th", "lines": [{"what": "a", "count": 3, "price": 4}], "total": 4},
    ),
    _schema(
        "boxes in a picture",
        {
            "type": "array",
            "maxItems": 20,
            "items": _object(
                {
                    "label": {"enum": ["person", "car", "dog", "traffic light"]},
                    "box": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0, "maximum": 1000},
                        "minItems": 4,
                        "maxItems": 4,
                    },
                }
            ),
        },
        [{"label": "dog", "box": [10, 20, 300, 1000]}, {"label": "traffic light", "box": [0, 0, 7, 99]}],
        [{"label": "dog", "box": [10, 20, 300, 1001]}],
    ),
    _schema(
        "a reference",
        _object(
            {"home": {"$ref": "#/$defs/address"}, "work": {"$ref": "#/$defs/address"}},
        )
        | {"$defs": {"address": _object({"street": _TEXT, "city": _TEXT, "code": _TEXT}, ["city"])}},
        {"home": {"street": "High Street 1", "city": "Bath", "code": "BA1"}, "work": {"city": "Leeds"}},
        {"home": {"street": "High Street 1"}, "work": {"city": "Leeds"}},
    ),
    _schema(
        "a tree",
        _object({"name": _TEXT, "children": {"type": "array", "items": {"$ref": "#"}}}),
        {"name": "a", "children": [{"name": "b", "children": []}, {"name": "c", "children": []}]},
        {"name": "a", "children": [{"name": "b"}]},
    ),
    _schema(
        "one of two",
        {
            "anyOf": [
                _object({"kind": {"const": "circle"}, "radius": _NUMBER}),
                _object({"kind": {"const": "square"}, "side": _NUMBER}),
            ]
        },
        {"kind": "square", "side": 2.25},
        {"kind": "square", "radius": 2.25},
    ),
    _schema("a label", _object({"label": {"enum": _LABELS}}), {"label": "label 42"}, {"label": "label 99"}),
    _schema(
        "formats",
        _object(
            {
                "id": {"type": "string", "format": "uuid"},
                "at": {"type": "string", "format": "date-time"},
                "mail": {"type": "string", "format": "email"},
            }
        ),
        {"id": "123e4567-e89b-12d3-a456-426614174000", "at": "2026-11-27T04:35:00Z", "mail": "ada@example.org"},
        {"id": "123e4567", "at": "2026-11-27T04:35:00Z", "mail": "ada@example.org"},
    ),
    _schema(
        "a map",
        {"type": "object", "additionalProperties": {"type": "number"}},
        {"red": 0.25, "green": 1, "blue": 3e-05},
        {"red": "much"},
    ),
    _schema(
        "optional fields",
        _object(dict.fromkeys(_FIELDS, _WHOLE), []),
        {"field_0": 1, "field_7": 2, "field_29": 3},
        {"field_0": 1, "field_30": 2},
    ),
    _schema(
        "a caption",
        _object({"caption": {"type": "string", "minLength": 10, "maxLength": 200}}),
        {"caption": "A red circle stands to the left of two blue squares."},
        {"caption": "Short"},
    ),
    _schema("a multiple", _object({"angle": {"type": "integer", "multipleOf": 15}}), {"angle": 90}, {"angle": 91}),
    _schema(
        "different tags",
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
        ["a", "c"],
        ["a", "a"],
    ),
    _schema("a word that is not taken", {"type": "string", "not": {"const": "admin"}}, "ada", "admin"),
    _schema(
        "one of two that overlap",
        {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 10}]},
        50,
        5,
    ),
    _schema(
        "a condition",
        {
            **_object({"kind": {"enum": ["a", "b"]}, "size": _WHOLE}, ["kind"]),
            "if": {"properties": {"kind": {"const": "a"}}},
            "then": {"required": ["size"]},
        },
        {"kind": "a", "size": 3},
        {"kind": "a"},
    ),
    _schema(
        "names of properties",
        {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z]+$"},
            "additionalProperties": _WHOLE,
            "minProperties": 1,
        },
        {"red": 1, "blue": 2},
        {"RED": 1},
    ),
    Form("an ISO date", "regex", r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", "2026-11-27", "2026-13-27"),
    Form("a phone number", "regex", r"\+[1-9][0-9]{1,2}( [0-9]{2,4}){2,4}", "+44 1225 30 4050", "0044 1225"),
    Form("a choice", "regex", "red|green|light blue|dark blue", "dark blue", "dark red"),
    Form(
        "a sum",
        "grammar",
        'root ::= term ([-+] term)*\nterm ::= factor ([*/] factor)*\nfactor ::= [0-9]+ | "(" root ")"\n',
        "(12+3)*45-6",
        "12+*3",
    ),
)
