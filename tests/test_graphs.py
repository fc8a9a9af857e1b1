"""CUDA graphs of solves. Without a CUDA device, plain calls on fixed tensors stand in for them."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from helpers import DOPRI5, close, make_flow
from rnode import Method, objective
from rnode.solver import integrate
from rnode.training.graphs import RecordedSolves
from rnode.training.module import RNODE
from rnode.training.refine import with_steps

RADAU = Method("rk4", "radau", steps=2)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]


def fixed_calls(function, samples, allow_unused_input):
    """What torch.cuda.make_graphed_callables does, without a graph: weights stay in their place."""
    function(*samples)

    def replay(*inputs):
        for i, (sample, value) in enumerate(zip(samples, inputs, strict=True)):
            assert (sample.shape, sample.dtype) == (value.shape, value.dtype)
            assert sample.requires_grad == value.requires_grad
            assert (sample.data_ptr() == value.data_ptr()) == (i >= 3 or value.numel() == 0)
        return function(*inputs)

    return replay


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "bf16"), [(0, False), (2, False), (0, True)])
def test_recorded_solves_train_as_solves_do(device, k, bf16, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", fixed_calls)
    start = make_flow((1, 4, 4), train=RADAU, k=k).float().to(device)
    recorded = RecordedSolves(8)

    def train_steps(flow, solve):
        optimizer, results = torch.optim.SGD(flow.parameters(), 1e-2), []
        grids = [2, 2, 2, 4, 4, 4]  # refined after a short batch
        for steps, size in zip(grids, [8, 8, 5, 8, 8, 8], strict=True):
            flow.solver = with_steps(flow.solver, steps)
            torch.manual_seed(len(results))
            x, c = torch.randn(size, 1, 4, 4).to(device), torch.randn(size, k).to(device)
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                solution = flow.solve(x, c, integrate=solve)
            objective(solution.state, 0.01, 0.01).backward()
            gradient = torch.cat([p.grad.flatten() for p in flow.parameters()])
            results.append((solution.nfe_forward, solution.nfe_backward, gradient))
            optimizer.step()
            if solve is recorded and size == 8:
                assert len(recorded.graphs) == 2
        return results

    both = train_steps(deepcopy(start), integrate), train_steps(start, recorded)
    for (*expected_nfe, expected), (*nfe, gradient) in zip(*both, strict=True):
        assert nfe == expected_nfe
        assert close(gradient, expected, 0.05 if bf16 else 1e-4)


@pytest.mark.parametrize(
    ("world_size", "window", "train", "records"),
    [(1, 1, RADAU, True), (2, 1, RADAU, False), (1, 2, RADAU, False), (1, 1, DOPRI5, False)],
)
def test_a_run_records_solves_where_it_can(world_size, window, train, records, monkeypatch):
    module = RNODE(make_flow((1, 4, 4), train=train), torch.optim.Adam, 0.01, 0.01)
    data = SimpleNamespace(batch_size=8, splits=SimpleNamespace(train=torch.zeros(5)))
    trainer = SimpleNamespace(datamodule=data, print=print, world_size=world_size)
    trainer.accumulate_grad_batches = window
    monkeypatch.setattr(RNODE, "trainer", trainer)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(RNODE, "device", torch.device(device))
        module.on_fit_start()
        assert isinstance(module.integrate, RecordedSolves) == (records and device == "cuda")
    assert not records or module.integrate.size == 5
    module.on_fit_end()
    assert module.integrate is integrate
