"""Formulas that a reader writes, and the frames of their backward pass."""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from warpmap.trace import Cell, Frame, Grid, Mark, Trace
from warpmap.training.foundations._tape import Edge, Node, tape
from warpmap.training.foundations.autograd import Tensor, tensor

MOST = 16  # operations: each is a frame or two
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
FUNCTIONS = ("exp", "log", "relu")


def _statements(name: str, text: str) -> list[tuple[str, ast.expr]]:
    if len(text) > 300:
        raise ValueError(f"{name} must have at most 300 characters")
    found = []
    for part in filter(None, map(str.strip, text.split(";"))):
        try:
            (statement,) = ast.parse(part).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{name} cannot be read at {part!r}") from None
        if (
            not isinstance(statement, ast.Assign)
            or len(statement.targets) != 1
            or not isinstance(statement.targets[0], ast.Name)
        ):
            raise ValueError(f"{name} must be 'name = ...', got {part!r}")
        found.append((statement.targets[0].id, statement.value))
    if not found:
        raise ValueError(f"{name} must not be empty")
    return found


def numbers(text: str) -> dict[str, float]:
    """Values by name, from ``"x = 2; y = -1"``.

    Examples:
        >>> numbers("x = 2; y = -1")
        {'x': 2.0, 'y': -1.0}
    """
    found = {}
    for name, value in _statements("values", text):
        try:
            number = float(ast.literal_eval(value))
        except (ValueError, TypeError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"values must be numbers, got {ast.unparse(value)!r} for {name}"
            )
        found[name] = number
    return found


def evaluate(
    formula: str, leaves: Mapping[str, Tensor]
) -> tuple[Tensor, dict[Node, str]]:
    """The last statement's result, and what each tensor is called."""
    known: dict[str, Any] = dict(leaves)
    names: dict[Node, str] = {leaf: name for name, leaf in leaves.items()}
    operations = 0

    def visit(node: ast.expr) -> Any:
        nonlocal operations
        match node:
            case ast.Name(id=name) if name in known:
                return known[name]
            case ast.Name(id=name):
                raise ValueError(
                    f"formula must not use {name}: it has no value"
                )
            case ast.Constant(value=int() | float() as value):
                return float(value)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                result = -visit(inner)
            case ast.BinOp(op=ast.Pow(), left=left, right=right):
                power = visit(right)
                if not isinstance(power, float):
                    raise ValueError("formula must have numbers as powers")
                base = visit(left)
                raised = math.pow if isinstance(base, float) else operator.pow
                result = raised(base, power)
            case ast.BinOp(op=op, left=left, right=right) if (
                type(op) in OPERATORS
            ):
                result = OPERATORS[type(op)](visit(left), visit(right))
            case ast.Call(
                func=ast.Name(id=name), args=[inner], keywords=[]
            ) if name in FUNCTIONS:
                of = visit(inner)
                if isinstance(of, float):
                    raise ValueError(
                        f"formula must not take {name} of a number"
                    )
                result = getattr(of, name)()
            case _:
                raise ValueError(f"formula cannot have {ast.unparse(node)!r}")
        operations += 1
        if operations > MOST:
            raise ValueError(f"formula must have at most {MOST} operations")
        if not isinstance(result, float):
            names.setdefault(result, ast.unparse(node))
        return result

    result: Any = 0.0
    for name, value in _statements("formula", formula):
        try:
            result = known[name] = visit(value)
        except (ArithmeticError, ValueError) as error:
            if "formula" in str(error):
                raise
            raise ValueError(f"formula fails at {name}: {error}") from None
        if not isinstance(result, float) and not isinstance(value, ast.Name):
            names[result] = name
    if isinstance(result, float) or not result.edges:
        raise ValueError("formula must compute something from values")
    return result, names


def played(
    tape: Sequence[Node],
    names: Mapping[Node, str],
    backward: Callable[..., None],
) -> Trace:
    """Frames of a tape of numbers: recorded, then walked back."""
    trace: Trace = []
    grads: dict[Node, list[float]] = {}
    users = {
        node: sum(e.source is node for user in tape for e in user.edges)
        for node in tape
    }
    left = dict(users)
    leaves = [node for node in tape if not node.edges]
    steps = [node for node in tape if node.edges]
    result = steps[-1]
    order = leaves + steps  # a constant that is named may be younger

    def show(
        said: str,
        shown: int = len(tape),
        value: Collection[Node] = (),
        on: Collection[Node] = (),
        new: Node | None = None,
    ) -> None:
        rows = []
        for i, node in enumerate(order):
            number = f"{node.data[0]:.4g}" if i < shown else ""
            slope = f"{grads[node][0]:.4g}" if node in grads else ""
            mark: Mark = "on" if node in on else ""
            if slope and left[node]:
                mark = "wait"
            elif node is new:
                mark = "new"
            cells = [Cell(number, "new" if node in value else "")]
            rows.append((names[node], [*cells, Cell(slope, mark)]))
        trace.append(Frame(said, Grid(rows, ["value", "gradient"])))

    show("The tape starts with the inputs.", len(leaves), leaves)
    for i, node in enumerate(steps, start=len(leaves) + 1):
        sources = " and ".join(names[e.source] for e in node.edges)
        show(f"{names[node]} is computed from {sources}.", i, [node])

    def record(node: Node, edge: Edge, found: dict[Node, list[float]]) -> None:
        grads.update(found)
        source = edge.source
        left[source] -= 1
        (share,), (slope,) = edge.pull(found[node]), edge.push([1.0])
        said = (
            f"{names[node]} has the gradient {found[node][0]:.4g}. Its slope "
            f"in {names[source]} is {slope:.4g}, so {names[source]} gets "
            f"{share:.4g}"
        )
        if users[source] == 1:
            said += "."
        elif left[source]:
            said += ", and waits: it was used elsewhere too."
        else:
            said += f" more, {found[source][0]:.4g} in all."
        show(said, on=[node], new=source)

    grads[result] = [1.0]
    show(f"And back. {names[result]} grows by 1 with itself.", new=result)
    backward(record=record)
    slopes = ", ".join(f"{names[n]} {grads[n][0]:.4g}" for n in leaves)
    show(
        f"Done. One pass has found the slope of {names[result]} in every "
        f"input: {slopes}.",
        on=leaves,
    )
    return trace


def backward_trace(
    formula: str = "z = w * x + b; e = exp(z); p = e / (1 + e); loss = -log(p)",
    values: str = "w = 0.5; x = 2; b = -2",
) -> Trace:
    """Compute a formula, then play its tape backwards.

    Args:
        formula: Statements with + - * / **, ``exp``, ``log`` and ``relu``, a
            semicolon between them; the last one is the result.
        values: Numbers for the names that it starts from.

    Returns:
        The tape after each step, with the gradients found so far.

    Raises:
        ValueError: If an argument cannot be read, or has no such value.

    Examples:
        >>> print(backward_trace("y = x * x", "x = 3")[-1].caption)
        Done. One pass has found the slope of y in every input: x 6.
    """
    leaves = {name: tensor(x) for name, x in numbers(values).items()}
    result, names = evaluate(formula, leaves)
    return played(tape(result), names, result.backward)
