"""The JSON Schemas that the package publishes: one file for each result that other tools read.

``python -m unpoison.schemas`` writes them anew after a result changed; a test compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from unpoison.errors import UnknownMethodError
from unpoison.model_results import ModelScan
from unpoison.storage import SCHEMA_VERSION, JsonResult

FOLDER = Path(__file__).parent
PUBLISHED: dict[str, type[JsonResult]] = {ModelScan.schema: ModelScan}


def read_schema(name: str) -> dict[str, Any]:
    """The published schema of a result. Raises UnknownMethodError."""
    if name not in PUBLISHED:
        raise UnknownMethodError(name, PUBLISHED, kind="published schema")
    return msgspec.json.decode((FOLDER / f"{name}.json").read_bytes())


def make_schema(kind: type[JsonResult]) -> dict[str, Any]:
    """JSON Schema (2020-12) of what :func:`unpoison.storage.to_json` writes of a result: its fields and its version."""
    (reference,), definitions = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    name = str(reference["$ref"]).rsplit("/", 1)[-1]
    body = definitions.pop(name)
    head = {"schema": {"const": f"unpoison/{kind.schema}"}, "schema_version": {"const": SCHEMA_VERSION}}
    body["properties"] = head | body["properties"]
    body["required"] = sorted({*head, *body["properties"]})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind.__name__} | body | {
        "additionalProperties": False, "$defs": definitions
    }  # fmt: skip
