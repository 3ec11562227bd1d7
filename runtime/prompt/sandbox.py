"""Chat templates (Jinja), which come out of model files and are not trusted.

Jinja's own sandbox keeps a template away from Python. It bounds neither time nor memory, so here
loops and macros count their rounds, and operations that make a long string out of a short one (joining,
repeating, replacing, padding, formatting) are bounded or left out. The options and the filter
`tojson` are those of transformers (utils/chat_template_utils.py), so that templates render the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from qvl.runtime.errors import PromptError

MAX_TEMPLATE: Final = 1 << 18  # characters; published templates have some 5,000
MAX_TEXT: Final = 1 << 23  # characters of any string on the way
MAX_ROUNDS: Final = 1 << 18  # of all loops and macros together
MAX_SECONDS: Final = 5.0
_FILTERS: Final = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "join",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper",
)  # fmt: skip
_GROWING: Final = frozenset(
    ("center", "encode", "expandtabs", "format", "format_map", "join", "ljust", "rjust", "translate", "zfill")
)


class ChatTemplateError(Exception):
    """A template that cannot be used; the message says why."""


class CompiledTemplate:
    """A template, ready to render conversations.

    Raises:
        ChatTemplateError: it is too long, or no Jinja template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise ChatTemplateError(f"{len(source)} characters, expected at most {MAX_TEMPLATE}")
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise ChatTemplateError(f"{type(error).__name__}: {error}") from error

    def render(self, **variables: Any) -> str:
        """The text of a conversation.

        Raises:
            PromptError: the template itself refuses the conversation (`raise_exception`).
            ChatTemplateError: it fails, or does not end within bounds.
        """
        self._environment.restart()
        try:
            return self._template.render(**variables)
        except (PromptError, ChatTemplateError):
            raise
        except Exception as error:  # any error of a template's code
            raise ChatTemplateError(f"{type(error).__name__}: {error}") from error


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        own = {name: self.filters[name] for name in _FILTERS}
        self.filters = {**own, "tojson": _to_json, "join": self._join, "replace": _replace}
        self.filters["_tick"], self.filters["_concat"] = self._tick, self._concat
        self.globals = {
            "range": self._range, "namespace": self.globals["namespace"], "dict": dict,
            "raise_exception": _refuse, "strftime_now": _now,
        }  # fmt: skip
        # joins {% set %} blocks, macros and the whole template
        self.concat = self._concat  # type: ignore[method-assign]
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self._rounds = self._characters = 0
        self._end = time.monotonic() + MAX_SECONDS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Counting().visit(tree)  # type: ignore[no-any-return]

    @pass_context  # which keeps the compiler from evaluating it once and for all
    def _tick(self, context: Any, value: Any) -> Any:
        self._spend_rounds(1)
        return value

    def _spend_rounds(self, rounds: int) -> None:
        self._rounds += rounds
        if self._rounds > MAX_ROUNDS:
            raise ChatTemplateError(f"more than {MAX_ROUNDS} rounds of its loops")
        if time.monotonic() > self._end:
            raise ChatTemplateError(f"takes longer than {MAX_SECONDS:g} seconds")

    def _concat(self, parts: Iterable[Any]) -> str:
        texts = [part if isinstance(part, str) else str(part) for part in parts]
        self._spend(sum(map(len, texts)))
        return "".join(texts)

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            values = [self.getattr(value, attribute) for value in values]
        texts = [str(value) for value in values]
        self._spend(sum(map(len, texts)) + len(d) * len(texts))
        return d.join(texts)

    def _spend(self, characters: int) -> None:
        self._characters += characters
        if self._characters > 8 * MAX_TEXT:
            raise ChatTemplateError(f"more than {8 * MAX_TEXT} characters put together")

    def _range(self, *bounds: int) -> range:
        found = range(*bounds)
        self._spend_rounds(len(found))
        return found

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str | bytes)):
            raise SecurityError(f"{operator} is not for templates")
        if operator == "+" and isinstance(left, str | list | tuple):
            self._spend(len(left) + (len(right) if isinstance(right, str | list | tuple) else 0))
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int):
                    size = len(other) if isinstance(other, str | list | tuple) else abs(other)
                    if abs(one) * size > MAX_TEXT:
                        raise SecurityError("a product that is too large")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr in _GROWING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `is_safe_attribute`, which refuses it."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__name__", "") == "replace" and isinstance(getattr(obj, "__self__", None), str):
            return _replace(obj.__self__, *args)
        return super().call(context, obj, *args, **kwargs)


class _Counting(NodeTransformer):
    """Lets every round of a loop or a macro count, and `a ~ b` be bounded."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick(node.lineno))
        if node.test is not None:
            node.test = nodes.Filter(node.test, "_tick", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_concat", [], [], None, None, lineno=node.lineno)


def _tick(line: int) -> nodes.Node:
    value = nodes.Filter(nodes.Const(0, lineno=line), "_tick", [], [], None, None, lineno=line)
    # an assignment is evaluated and prints nothing
    return nodes.Assign(nodes.Name("_", "store", lineno=line), value, lineno=line)


class _Generation(Extension):
    """`{% generation %}`, with which templates mark replies for training; its body is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    known = {name: options.get(name) for name in ("separators",)}
    return json.dumps(
        value,
        ensure_ascii=bool(options.get("ensure_ascii", False)),
        indent=None if indent is None else max(0, min(int(indent), 16)),
        sort_keys=bool(options.get("sort_keys", False)),
        separators=tuple(known["separators"]) if known["separators"] else None,
    )


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    whole, old, new = str(text), str(old), str(new)
    times = whole.count(old) if old else len(whole) + 1
    if times * len(new) > MAX_TEXT:
        raise SecurityError("a replacement that is too large")
    return whole.replace(old, new, -1 if count is None else count)


def _refuse(message: Any = "") -> NoReturn:
    raise PromptError(f"the model's chat template refuses the conversation: {message!s:.500}")


def _now(form: str) -> str:
    if len(form) > 100:
        raise SecurityError("a long date format")
    return datetime.now().strftime(form)
