"""The document of an invoice as a page of HTML: without scripts, and without anything to be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from xml.etree.ElementTree import Element, tostring

from usameter_billing.documents.model import Document, Fact, Line, Part

# Texts are escaped when the tree is written, so a stranger's cannot become markup. And if
# one did, it could neither run nor load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class HtmlRenderer:
    """Makes pages; the same document has the same bytes."""

    def __init__(self) -> None:
        self._style = resources.files("usameter_billing.documents").joinpath("invoice.css").read_text()

    def render(self, document: Document) -> bytes:
        """The page, UTF-8."""
        head = _element(
            "head",
            _element("meta", charset="utf-8"),
            _element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            _element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            _element("title", document.title),
            _element("style", self._style),
        )
        page = _element("html", head, _element("body", *_body(document)), lang="en")
        tree: bytes = tostring(page, encoding="utf-8", method="html")
        return b"<!DOCTYPE html>\n" + tree + b"\n"


def _body(document: Document) -> Iterable[Element]:
    if document.stamp is not None:
        yield _element("p", document.stamp, class_="stamp")
    yield _element("h1", document.title)
    yield _element(
        "header",
        _address("From", document.seller),
        _address("Bill to", *document.bill_to),
        _facts(document.facts),
    )
    heads = ("Description", "Quantity", "Unit price", "Flat price", "Tax", f"Amount, {document.currency}")
    yield _element(
        "table",
        _element("caption", "Lines"),
        _element("thead", _element("tr", *(_element("th", each, scope="col") for each in heads))),
        *(_line(line) for line in document.lines),
    )
    yield _element(
        "table",
        _element("caption", "Sums"),
        _element(
            "tbody",
            *(
                _element(
                    "tr", _element("th", sum_.name, scope="row"), _element("td", f"{sum_.value} {document.currency}")
                )
                for sum_ in document.sums
            ),
        ),
        class_="sums",
    )
    yield from (_element("p", remark) for remark in document.remarks)
    if document.proof:
        yield _element("h2", "Proof")
        yield _element("p", document.proof_sentence)
        yield _facts(document.proof)


def _address(title: str, *lines: str) -> Element:
    return _element("address", _element("h2", title), *(_element("div", each, dir="auto") for each in lines))


def _line(line: Line) -> Element:
    title = _element("th", _element("bdi", line.title), _element("small", line.period), scope="row")
    return _element(
        "tbody",
        _element("tr", title, *_cells(line.quantity, "", "", line.tax_rate, line.amount)),
        *map(_part, line.parts),
    )


def _part(part: Part) -> Element:
    cells = _cells(part.quantity, part.unit_amount, part.flat_amount, "", part.amount)
    return _element("tr", _element("td", part.description), *cells, class_="part")


def _cells(*texts: str) -> Sequence[Element]:
    return [_element("td", text) for text in texts]


def _facts(facts: Iterable[Fact]) -> Element:
    return _element("dl", *(each for fact in facts for each in (_element("dt", fact.name), _element("dd", fact.value))))


def _element(tag: str, *contents: Element | str, **attributes: str) -> Element:
    """An element with a text or with children; `class_` and `http_equiv` are attributes that are no Python names."""
    made = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()})
    for content in contents:
        if isinstance(content, str):
            made.text = content
        else:
            made.append(content)
    return made
