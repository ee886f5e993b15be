"""Imports go downward only, and describing a study never pays for torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qpipe"
LAYERS = {
    0: "errors identity yaml_files files recipe accounting formats runs record progress corpus_config study"
    " study_errors study_parts finetune_config ptq_config ptq_methods"
    " workflow resources slurm status leases warm offline_log file_digests memory",
    1: "attention corpus compress cpu_functions cross_entropy model laws front huggingface quantized_llama splits"
    " triton_adamw triton_attention triton_kernels triton_launch triton_norm triton_rotary",
    2: "train ptq report quality harness",
    3: "cli __main__",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()} | {"__init__": 0}
FORBIDDEN = {"compress": {"laws"}, "laws": {"compress"}}
HEAVY = {0: {"torch", "lightning", "wandb", "transformers"}, 1: {"lightning", "wandb"}}


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in LAYER_OF, f"{part} has no layer; name it in this test"
    for name in imports_of(path):
        root, _, rest = name.partition(".")
        assert root not in HEAVY.get(LAYER_OF[part], set()), f"{path} imports {name}"
        if root == "qpipe" and rest:
            used = rest.split(".")[0]
            assert LAYER_OF[used] <= LAYER_OF[part], f"{path} (layer {LAYER_OF[part]}) imports {name}"
            assert used not in FORBIDDEN.get(part, set())


def test_lightning_is_imported_by_training_alone():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] in {"lightning", "pytorch_lightning"} for name in imports_of(path))
    }
    assert users == {"train"}


def test_only_the_command_line_prints_or_exits():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in {"cli", "__main__.py"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "exit"}:
                to_stderr = any(keyword.arg == "file" for keyword in node.keywords)
                assert to_stderr, f"{path}:{node.lineno} prints to standard output"


def test_the_workflow_parses_without_torch():
    code = (
        "import sys, qpipe.workflow; print([m for m in ('torch', 'lightning', 'wandb', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
