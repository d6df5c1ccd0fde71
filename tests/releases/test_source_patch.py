"""Functions of every layout, edited: what they do then, and that nothing else moves."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch import Plan
from fp16_patch.patching.declarations import ByEdit
from fp16_patch.plan.errors import PatchError
from fp16_patch.releases.source_patch import filled_in, rewritten
from fp16_patch.releases.tree_diff import unified

DOCSTRINGS = ("", '"""Short."""', '"""Long — of three lines.\n\n# not a comment\n"""')
STARTS = ("x = value", "# of the first line: é\nx = value", "# one\n\n# two\nx = value", "é = 'ü'; x = value")
TAILS = {
    "x += 1": None,
    "return x": "x",
    "# about the end\nreturn (\n    x\n)": "x",
    "if x:\n    return x\nelse:\n    y = 2\n    return y": "x or 2",
    "if x == 0:\n    return 0\nelif x == 1:\n    return 7\nelse:\n    raise ValueError": "7 if x else 0",
    "if not x:\n    return 5\nx = 2": "None if x else 5",
    "for _ in range(1):\n    x += 1": None,
    "def inner():\n    return 3\nreturn inner()": "3",
}
EDIT = ByEdit(before='seen.append("before")', after='seen.append("after")\nif True:\n    seen.append("indented")')


def module(docstring: str, start: str, tail: str, indent: str, newline: str, ended: bool) -> str:
    body = "\n".join(filter(None, (docstring, start, 'seen.append("body")', tail)))
    method = "\n".join(f"{indent}{indent}{line}" if line else "" for line in body.replace("    ", indent).split("\n"))
    head = f"seen = []\n\n\nclass Ärger:\n{indent}@staticmethod\n{indent}def f(value: int = 1):  # — here\n{method}"
    text = head + ("\n\n\n# — the end\nlast = 1\n" if ended else "")
    return text.replace("\n", newline)


modules = st.builds(
    module,
    st.sampled_from(DOCSTRINGS),
    st.sampled_from(STARTS),
    st.sampled_from(list(TAILS)),
    st.sampled_from(["    ", "\t", "  "]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)


def run(source: str, value: int) -> tuple[object, list[str]]:
    names: dict[str, object] = {}
    exec(compile(source, "module", "exec"), names)
    return names["Ärger"].f(value), names["seen"]  # type: ignore[attr-defined,return-value]


@given(modules, st.sampled_from([0, 1]))
def test_statements_run_first_and_last_and_nothing_else_changes(source: str, value: int) -> None:
    after = rewritten(source, "Ärger.f", EDIT, Plan())
    result, seen = run(after, value)
    assert result == run(source, value)[0]
    early = "if not x:" in source and value == 0
    assert seen == ["before", "body", *([] if early else ["after", "indented"])]
    added = {"seen.append('before')", 'seen.append("before")', 'seen.append("after")', "if True:"}
    kept = [line for line in after.splitlines() if line.strip() not in {*added, 'seen.append("indented")'}]
    assert kept == source.splitlines()
    assert after.count("\r\n") == (after.count("\n") if "\r\n" in source else 0)


@given(modules)
def test_patch_and_git_make_of_the_diff_the_very_text(source: str) -> None:
    after = rewritten(source, "Ärger.f", EDIT, Plan())
    for program in (["patch", "-p1", "--binary"], ["git", "apply"]):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "a_module.py"
            path.write_bytes(source.encode())
            diff = unified(source, after, path.name).encode()
            subprocess.run(program, cwd=folder, input=diff, check=True, capture_output=True)
            assert path.read_bytes() == after.encode()


SPELLED = '''
def before(dtype=torch.bfloat16): return torch.bfloat16
class Model:
    @decorated(torch.bfloat16)
    def f(self, dtype=torch.bfloat16):
        """bf16"""
        é = "é", torch.bfloat16  # torch.bfloat16
        def inner(): return (weight
            .bfloat16(), 'bf16', f"{x}", weight.bfloat16)
        return {"dtype": "bf16", "bf16 ": "bfloat16"}
'''


def test_spellings_are_exchanged_in_the_body_and_only_there() -> None:
    edit = ByEdit(edit=("torch.bfloat16", ".bfloat16()", '"bf16"', '"bfloat16"'))
    expected = SPELLED.splitlines()
    for row, old, new in (
        (6, "torch.bfloat16  #", "torch.float16  #"),
        (8, ".bfloat16(), 'bf16'", ".half(), 'fp16'"),
        (8, "weight.bfloat16)", "weight.float16)"),
        (9, '"dtype": "bf16"', '"dtype": "fp16"'),
        (9, '"bfloat16"', '"float16"'),
    ):
        assert old in expected[row]
        expected[row] = expected[row].replace(old, new)
    assert rewritten(SPELLED, "Model.f", edit, Plan()).splitlines() == expected


def test_an_exchange_may_name_its_own_dtype() -> None:
    source = "def f(x):\n    return x.bfloat16()\n"
    edit = ByEdit(edit=(".bfloat16()",), edit_to="float32")
    assert rewritten(source, "f", edit, Plan()) == "def f(x):\n    return x.float()\n"


def test_an_expression_is_replaced_wherever_it_stands_however_it_is_laid_out() -> None:
    source = "def f(x):\n    é = 'é', x.to( x.dtype ), f'{x.to(x.dtype)}'\n    return [x . to(\n        x.dtype)]\n"
    edit = ByEdit(replace={"x.to(x.dtype)": "x.to(torch.{dtype})"})
    after = rewritten(source, "f", edit, Plan())
    assert after == (
        "def f(x):\n    é = 'é', x.to(torch.float16), f'{x.to(x.dtype)}'\n    return [x.to(torch.float16)]\n"
    )


@given(st.integers(0, 4), st.sampled_from(["x", "(x)", "x+1", "g(x)"]))
def test_a_replacement_is_that_of_the_syntax_tree(depth: int, new: str) -> None:
    source = "def f(a, b):\n    return " + "[" * depth + "a.b, " * 2 + "]" * depth + "\n"
    wanted = ast.dump(ast.parse("a.b", mode="eval").body)

    class Replacing(ast.NodeTransformer):
        def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
            return ast.parse(new, mode="eval").body if ast.dump(node) == wanted else node

    after = rewritten(source, "f", ByEdit(replace={"a.b": new}), Plan())
    assert ast.dump(ast.parse(after)) == ast.dump(Replacing().visit(ast.parse(source)))


@pytest.mark.parametrize(
    ("source", "edit", "problem"),
    [
        ("x = 1\n", ByEdit(before="pass"), "no such function"),
        ("class f:\n    pass\n", ByEdit(before="pass"), "no such function"),
        ("def f(): return 1\n", ByEdit(before="pass"), "line 1 holds more than one statement"),
        ("def f():\n    x = 1; return x\n", ByEdit(after="pass"), "line 2 holds more than one statement"),
        ("def f():\n    return 1\n", ByEdit(replace={"x": "y"}), "x does not occur"),
        ("def f():\n    return 1\n", ByEdit(edit=('"bf16"',)), '"bf16" does not occur'),
        ("def f():\n    return 'b' 'f16'\n", ByEdit(edit=('"bf16"',)), '"bf16" is not spelled in one piece'),
        ("def f():\n    return a.b.c\n", ByEdit(replace={"a.b": "x", "a.b.c": "y"}), "two edits of the same text"),
        ("def f():\n    return 1\n", ByEdit(before="if"), "no Python"),
    ],
)
def test_what_cannot_be_written_says_why(source: str, edit: ByEdit, problem: str) -> None:
    with pytest.raises(PatchError, match=problem):
        rewritten(source, "f", edit, Plan())


def test_a_body_of_a_docstring_is_written_below_it() -> None:
    source = 'def f():\n    """Nothing."""'
    assert rewritten(source, "f", ByEdit(before="pass"), Plan()) == source + "\n    pass"


def test_the_plans_values_are_filled_in_and_other_braces_stay() -> None:
    plan = Plan(mode="bf16", init_scale=1024.0)
    assert filled_in('{dtype} {mode} {init_scale} {x} {"a": 1}', plan) == 'bfloat16 bf16 1024.0 {x} {"a": 1}'


@pytest.mark.parametrize("form", [{}, {"before": "pass", "no": "too long"}])
def test_a_diff_writes_something_or_says_why_not(form: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="needs something to write, or `no`"):
        ByEdit(**form)  # type: ignore[arg-type]
