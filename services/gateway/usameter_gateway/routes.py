"""Path templates of the contract, and the tree that finds the one a path belongs to.

A template is literals and variables between slashes, with a custom verb at its end at most:
`/api/v1/quotas/{tenant_id}/{event_type}`, `/api/v1/events/{event_id}:void`. A variable is one
segment, percent-decoded after splitting: a tenant id may hold "%2F". It may hold ":" too, so
`:word` at the end of a path is a custom verb only where a route for it takes the method; written
"%3A" it never is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import unquote

from usameter_gateway.errors import invalid_argument, method_not_allowed, unknown_route
from usameter_gateway.violations import Violation

Target = TypeVar("Target")

_SEGMENT = re.compile(r"\{(?P<variable>[a-z0-9_.]+)(?:=\*)?\}|(?P<literal>[A-Za-z0-9_.~-]+)")
_CUSTOM_VERB = re.compile(r":([A-Za-z][A-Za-z0-9_-]*)$")


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed path template; None stands for a variable among the segments."""

    segments: tuple[str | None, ...]
    # Paths of the fields that the variables are, in order, e.g. "tenant_id" or "price.id".
    variables: tuple[str, ...]
    custom_verb: str


def parse_template(text: str) -> Template:
    """A template from its text.

    Raises:
        ValueError: It uses what the contract does not: wildcards of several segments, or text
            beside a variable within a segment.
    """
    custom = _CUSTOM_VERB.search(text)
    path = text[: custom.start()] if custom else text
    root, *parts = path.split("/")
    if root or not parts:
        raise ValueError(f"not a path template: {text}")
    segments: list[str | None] = []
    variables = []
    for part in parts:
        match = _SEGMENT.fullmatch(part)
        if match is None:
            raise ValueError(f"not a path template: {text}")
        segments.append(match["literal"])
        if match["variable"]:
            variables.append(match["variable"])
    return Template(tuple(segments), tuple(variables), custom[1] if custom else "")


@dataclass(slots=True)
class _Node(Generic[Target]):
    literals: dict[str, _Node[Target]] = field(default_factory=dict)
    variable: _Node[Target] | None = None
    # By custom verb ("" for none), then by HTTP method.
    targets: dict[str, dict[str, Target]] = field(default_factory=dict)


class Router(Generic[Target]):
    """A tree by path segment: looking up takes the path's length, however many routes there are."""

    def __init__(self) -> None:
        self._root: _Node[Target] = _Node()
        # The routes without variables, by method and path: found at once.
        self._fixed: dict[tuple[str, str], Target] = {}

    def add(self, verb: str, template: str, target: Target) -> None:
        """Route a method and template to a target. What answers GET answers HEAD too.

        Raises:
            ValueError: The template is none, or the route is taken.
        """
        parsed = parse_template(template)
        node = self._root
        for segment in parsed.segments:
            if segment is not None:
                node = node.literals.setdefault(segment, _Node())
            else:
                node.variable = node = node.variable or _Node()
        targets = node.targets.setdefault(parsed.custom_verb, {})
        for method in ("GET", "HEAD") if verb == "GET" else (verb,):
            if method in targets:
                raise ValueError(f"two routes for {method} {template}")
            targets[method] = target
            if None not in parsed.segments and not parsed.custom_verb:
                self._fixed[method, template] = target

    def find(self, verb: str, path: str) -> tuple[Target, list[str]]:
        """The target of a path, and the decoded values of the template's variables, in order.

        Literals win over variables, a custom verb over a variable that would swallow it.

        Args:
            path: As it came, still percent-encoded, without the query.

        Raises:
            ApiError: No route has this path (NOT_FOUND), or none with this method
                (METHOD_NOT_ALLOWED), or the path is no percent-encoded UTF-8.
        """
        fixed = self._fixed.get((verb, path))
        if fixed is not None:
            return fixed, []
        raw_segments = path.split("/")[1:]
        allowed: set[str] = set()
        for segments, custom_verb in _readings(raw_segments):
            for node, values in _matches(self._root, segments, 0):
                targets = node.targets.get(custom_verb)
                if targets is not None:
                    if verb in targets:
                        return targets[verb], values
                    allowed.update(targets)
        raise method_not_allowed(allowed) if allowed else unknown_route()


def _readings(raw_segments: list[str]) -> Iterator[tuple[list[str], str]]:
    last = raw_segments[-1] if raw_segments else ""
    if ":" in last:
        head, _, custom_verb = last.rpartition(":")
        yield _decoded([*raw_segments[:-1], head]), custom_verb
    yield _decoded(raw_segments), ""


def _decoded(segments: list[str]) -> list[str]:
    try:
        return [unquote(each, errors="strict") if "%" in each else each for each in segments]
    except UnicodeDecodeError:
        raise invalid_argument([Violation("", "the path is not percent-encoded UTF-8")]) from None


def _matches(node: _Node[Target], segments: list[str], depth: int) -> Iterator[tuple[_Node[Target], list[str]]]:
    if depth == len(segments):
        yield node, []
        return
    segment = segments[depth]
    literal = node.literals.get(segment)
    if literal is not None:
        yield from _matches(literal, segments, depth + 1)
    if node.variable is not None and segment:
        for found, values in _matches(node.variable, segments, depth + 1):
            yield found, [segment, *values]
