"""Exclusion rules: small boolean expressions over the columns of a loss table.

A rule such as ``loss > 5 or representation in ['w1', 'w2']`` is parsed with Python's grammar and evaluated node by
node; only columns, numbers, strings, lists, comparisons, arithmetic and `and`, `or`, `not` are known, so a rule from a
configuration file can do nothing but select rows.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from qpipe.errors import QpipeError, nearest

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda left, right: left.isin(right),
    ast.NotIn: lambda left, right: ~left.isin(right),
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def matching_rows(table: pd.DataFrame, rule: str) -> np.ndarray:
    """Return which rows (R,) a rule selects (errors: not a rule, unknown column, not a yes/no value per row)."""
    try:
        tree = ast.parse(rule.strip(), mode="eval")
        selected = _evaluate(tree.body, table, rule)
    except QpipeError:
        raise
    except (SyntaxError, TypeError, ValueError, AttributeError, KeyError, RecursionError, ZeroDivisionError) as error:
        raise QpipeError(
            f"exclusion '{rule}' is not a rule such as \"loss > 5 or representation == 'w1'\": {error}"
        ) from error
    if not isinstance(selected, pd.Series) or selected.dtype != bool:
        raise QpipeError(f"exclusion '{rule}' gives values, not yes or no per row; write a comparison, as in loss > 5")
    return selected.to_numpy()


def _evaluate(node: ast.expr, table: pd.DataFrame, rule: str) -> Any:
    match node:
        case ast.BoolOp(op=op, values=values):
            combine = operator.and_ if isinstance(op, ast.And) else operator.or_
            result = _evaluate(values[0], table, rule)
            for value in values[1:]:
                result = combine(result, _evaluate(value, table, rule))
            return result
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_evaluate(operand, table, rule)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, table, rule)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            return _compare([left, *comparators], ops, table, rule)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_evaluate(left, table, rule), _evaluate(right, table, rule))
        case ast.Name(id=name):
            return _column(table, name, rule)
        case ast.Constant(value=value) if isinstance(value, (str, int, float, bool)):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_evaluate(item, table, rule) for item in items]
    raise QpipeError(
        f"exclusion '{rule}': '{ast.unparse(node)}' is not allowed; use columns, numbers, text, lists, "
        "comparisons, arithmetic, and, or, not"
    )


def _compare(operands: list[ast.expr], ops: list[ast.cmpop], table: pd.DataFrame, rule: str) -> Any:
    values = [_evaluate(operand, table, rule) for operand in operands]
    result: Any = True
    for left, op, right in zip(values, ops, values[1:], strict=False):
        if type(op) not in _COMPARE:
            raise QpipeError(f"exclusion '{rule}': use <, <=, >, >=, ==, !=, in or not in")
        step = _COMPARE[type(op)](left, right)
        result = step if result is True else result & step
    return result


def _column(table: pd.DataFrame, name: str, rule: str) -> pd.Series:
    if name not in table.columns:
        known = ", ".join(map(str, table.columns))
        raise QpipeError(f"exclusion '{rule}': no column '{name}'{nearest(name, table.columns)}; columns: {known}")
    return table[name]
