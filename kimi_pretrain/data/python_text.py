"""The prose in Python packages: docstrings, help topics, long descriptions.

A Python file gives one document of all its docstrings in order, each under the name it
describes. A text that it attaches to something elsewhere, as ``add_docstr(torch.abs, "...")``
and ``add_newdoc("numpy", "array", "...")`` do, is a document by itself, and so is each topic
of the reference manual inside ``pydoc_data``.
Nothing is imported or run: files are parsed.
"""

import ast
import email
import email.policy
import inspect
from collections.abc import Iterator
from pathlib import Path

from kimi_pretrain.data.documents import Defect, Document, Item, decoded, valid_text

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
WALKED = ast.stmt | ast.Call | ast.ExceptHandler  # what can hold any of these, or a call
ATTACHING_CALLS = frozenset({"add_docstr", "add_newdoc"})
SHORTEST_ATTACHED = 80  # characters; shorter string arguments are names


def prose(path: Path, data: bytes) -> Iterator[Item]:
    """Documents of a ``.py`` file or of a package's METADATA."""
    source = decoded(data)
    if path.suffix != ".py":
        message = email.message_from_string(source.text, policy=email.policy.compat32)
        yield Document(str(message.get_payload()), source.repaired)
        return
    try:
        tree = ast.parse(source.text)
    except (SyntaxError, ValueError) as error:
        yield Defect("Python file", str(path), f"it must parse ({error})", "--bad-input skip")
        return
    if path.name == "topics.py":
        yield from _topics(tree)
        return
    own: list[str] = []
    for node, scope in _documented(tree, module_name(path)):
        if isinstance(node, ast.Call):
            attached = _attached(node)
            if attached:
                yield valid_text(attached)
        elif text := ast.get_docstring(node):
            own.append(f"{scope}\n\n{text}")
    joined = valid_text("\n\n\n".join(own))
    yield Document(joined.text, repaired=joined.repaired or source.repaired)


def module_name(path: Path) -> str:
    """Dotted name of the module a file holds, as far up as packages go."""
    names = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists():
        names.insert(0, folder.name)
        folder = folder.parent
    return ".".join(names)


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[Documented | ast.Call, str]]:
    """(node, qualified name of its scope) of all that can be documented, in order of the file."""
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, scope = stack.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            scope = f"{scope}.{node.name}"
        if isinstance(node, Documented | ast.Call):
            yield node, scope
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, WALKED)]
        stack.extend((child, scope) for child in reversed(children))


def _attached(call: ast.Call) -> str | None:
    """The text that a call attaches to an object, under its name; None for other calls."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    if called not in ATTACHING_CALLS or not call.args:
        return None
    strings = [
        (node.lineno, node.col_offset, node.value)
        for argument in call.args
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    texts = [text for _, _, text in sorted(strings)]
    names = [text for text in texts if len(text) < SHORTEST_ATTACHED]
    body = inspect.cleandoc("".join(text for text in texts if len(text) >= SHORTEST_ATTACHED))
    name = ".".join(names) if isinstance(call.args[0], ast.Constant) else ast.unparse(call.args[0])
    return f"{name}\n\n{body}" if body else None


def _topics(tree: ast.Module) -> Iterator[Item]:
    """One document for each entry of a dictionary of strings at the top of the file."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for value in statement.value.values:
                text = ast.literal_eval(value)
                yield valid_text(str(text).strip())
