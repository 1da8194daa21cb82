"""What `import uncollapse` promises to people with a training loop of their own."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import torch

import uncollapse


def test_every_promised_name_imports():
    for name in uncollapse.__all__:
        assert callable(getattr(uncollapse, name))


def test_no_name_is_hidden_by_a_module_of_the_same_name():
    assert not set(uncollapse.__all__) & set(uncollapse._HOMES.values())


def test_import_and_help_do_not_load_torch():
    script = (
        "import sys, uncollapse.cli.main\n"
        "try: uncollapse.cli.main.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dino-small32" in done.stdout


def test_the_pieces_for_other_loops_load_neither_our_trainer_nor_its_configuration():
    names = [
        *("OnlineMixture", "MixtureLayer", "koleo_proto", "PrototypeMonitor", "unique_prototypes", "prototypes_of"),
        *("effective_prototypes", "view_information", "sinkhorn"),
        *(name for name in uncollapse.__all__ if name.startswith("fused_")),
    ]
    code = f"import sys, uncollapse\nfor name in {names}: getattr(uncollapse, name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {module.split(".")[1] for module in loaded if module.startswith("uncollapse.")}
    assert not ours & {"training", "config", "cli", "methods", "models", "data", "run_folder", "report", "evaluate"}
    theirs = {"lightning", "torchmetrics", "timm", "torchvision", "sklearn", "matplotlib", "yaml", "pydantic"}
    assert not theirs & set(loaded)


def test_dir_lists_every_promised_name():
    assert set(uncollapse.__all__) | {"__version__"} <= set(dir(uncollapse))
    assert "OnlineMixture" in dir(uncollapse)


def test_what_a_public_function_takes_can_be_imported_beside_it():
    """CARP's blocks, Sinkhorn's and DINO's targets: nobody should have to look for the module."""
    z = [torch.nn.functional.normalize(torch.randn(4, 6), dim=-1) for _ in range(3)]
    w = torch.nn.functional.normalize(torch.randn(8, 6), dim=-1)
    targets = uncollapse.SoftmaxTargets(torch.stack(z[:2]), w, 1.0)
    assert uncollapse.fused_carp_loss(z, w, targets, uncollapse.random_blocks(8, 4, seed=0, step=0)).isfinite()
    centred = [uncollapse.centred_softmax(x @ w.T, torch.zeros(8), 0.04) for x in z[:2]]
    balanced = [uncollapse.sinkhorn(x @ w.T / 0.04) for x in z[:2]]
    for made in (centred, balanced):
        loss = uncollapse.fused_dino_loss_on_logits([x @ w.T for x in z], made, temperature=0.1)
        torch.testing.assert_close(loss, uncollapse.fused_dino_loss(z, w, made, temperature=0.1))


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared, extra = (
        {re.split(r"[<>=]", line)[0].lower() for line in lines}
        for lines in (project["dependencies"], project["optional-dependencies"]["wandb"])
    )
    imported = set()
    for path in (root / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {"tensorboard" if node.module == "torch.utils.tensorboard" else node.module.split(".")[0]}
    homes = packages_distributions()
    ours = {name for name in imported if name not in sys.stdlib_module_names and name != "uncollapse"}
    missing = {name for name in ours if not (declared | extra) & {home.lower() for home in homes.get(name, [name])}}
    assert not missing
    unused = declared - {home.lower() for name in ours for home in homes.get(name, [name])}
    assert not unused
