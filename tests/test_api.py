"""What `import uncollapse` promises to people with a training loop of their own."""

import subprocess
import sys

import torch

import uncollapse


def test_every_promised_name_imports():
    for name in uncollapse.__all__:
        assert callable(getattr(uncollapse, name))


def test_no_name_is_hidden_by_a_module_of_the_same_name():
    assert not set(uncollapse.__all__) & set(uncollapse._HOMES.values())


def test_import_and_help_do_not_load_torch():
    script = (
        "import sys, uncollapse.cli\n"
        "try: uncollapse.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dino-small32" in done.stdout


def test_a_plain_pytorch_loop_with_our_pieces():
    """The loop of the README: mixture, loss and monitor around someone else's encoder."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(12, 16)
    teacher = torch.nn.Linear(12, 16)
    mixture = uncollapse.OnlineMixture(32, 16, rows=128, balance="sinkhorn", temperature=0.05)
    monitor = uncollapse.PrototypeMonitor(32, rows=128)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    start = mixture.mean.clone()
    losses = []
    for _ in range(30):
        teacher.load_state_dict(encoder.state_dict())
        x = torch.randn(64, 12)
        views = [x + 0.1 * torch.randn(64, 12) for _ in range(2)]
        with torch.no_grad():
            z_teacher = [torch.nn.functional.normalize(teacher(v), dim=-1) for v in views]
            mixture.observe(torch.cat(z_teacher))
            targets = [mixture.responsibilities(z) for z in z_teacher]
        prototypes = torch.nn.functional.normalize(mixture.mean, dim=-1)
        z_student = [torch.nn.functional.normalize(encoder(v), dim=-1) for v in views]
        loss = uncollapse.fused_dino_loss(z_student, prototypes, targets, temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        monitor.observe(torch.cat(z_teacher) @ prototypes.T)
    assert losses[-1] < losses[0]
    assert not torch.equal(mixture.mean, start)
    assert 0 < monitor.alive() <= 32
    assert uncollapse.unique_prototypes(prototypes) <= 32
