"""What describes the API: /openapi.json for programs, /docs for people."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from usameter_gateway.comments import comments_of
from usameter_gateway.descriptors import Method, load_descriptor_set
from usameter_gateway.exchange import Request, Response
from usameter_gateway.openapi import openapi
from usameter_gateway.response import json_bytes


class Document:
    """A page that is the same for everybody, made once."""

    def __init__(self, template: str, media_type: bytes, content: bytes) -> None:
        self.template = template
        self._response = Response(200, content, ((b"content-type", media_type),))

    async def __call__(self, request: Request, values: Sequence[str]) -> Response:
        """Always 200."""
        return self._response


def openapi_document(methods: Sequence[Method]) -> Document:
    """/openapi.json."""
    document = openapi(methods, comments_of(load_descriptor_set()))
    return Document("/openapi.json", b"application/json", json_bytes(document))


def docs_page() -> Document:
    """/docs: one page that renders /openapi.json and loads nothing from elsewhere."""
    page = resources.files("usameter_gateway").joinpath("docs.html").read_bytes()
    return Document("/docs", b"text/html; charset=utf-8", page)
