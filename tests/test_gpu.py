"""What only a CUDA device can show."""

import json

import pytest
import torch

from helpers import RK4, SMALL, TWO_STEPS, call, make_flow
from rnode import Method, load, objective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRIDS = [
    (Method("rk4", "radau", steps=2), "backprop"),
    (Method("rk4", "radau", steps=2), "checkpoint"),
    (RK4, "adjoint"),
]


@pytest.mark.parametrize(("train", "gradient"), GRIDS)
def test_a_training_step_is_that_of_the_processor_and_never_waits(train, gradient, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    flow = make_flow((1, 8, 8), train=train, gradient=gradient, divergence="exact", hidden=16)
    x, found = torch.randn(8, 1, 8, 8), {}
    for device, mode in (("cpu", "default"), ("cuda", "default"), ("cuda", "error")):
        flow, x = flow.float().to(device), x.to(device)
        flow.zero_grad()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            objective(flow(x), 0.01, 0.01).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found[device] = torch.cat([p.grad.flatten() for p in flow.parameters()]).cpu()
    assert (found["cuda"] - found["cpu"]).norm() < 1e-4 * found["cpu"].norm()


def test_a_run_resumes_and_is_evaluated_and_sampled(tmp_path):
    options = [argument for argument in SMALL if "accelerator" not in argument]
    options += ["trainer.accelerator=gpu", f"hydra.run.dir={tmp_path / 'run'}"]
    call("train", *options, "trainer.max_steps=40")
    call("train", *options, "ckpt_path=auto")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test/bits_per_dim"] < 8
    best = str(tmp_path / "run" / "best.ckpt")
    call("evaluate", f"ckpt_path={best}", "samples=2", f"hydra.run.dir={tmp_path / 'evaluate'}")
    call("sample", f"ckpt_path={best}", "n=4", f"hydra.run.dir={tmp_path / 'sample'}")
    assert next(load(best).flow.parameters()).device.type == "cpu"
    assert load(best).sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])  # as CUDA graphs, and without
def test_a_run_trains_in_each_precision(precision, gradient, tmp_path):
    how = [f"trainer.precision={precision}", f"solver.gradient={gradient}"]
    call("train", f"hydra.run.dir={tmp_path}", *TWO_STEPS, "trainer.accelerator=gpu", *how)
    assert (tmp_path / "result.json").exists()
