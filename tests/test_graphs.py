"""CUDA graphs of solves. Without a CUDA device, plain calls on fixed tensors stand in for them."""

import copy
from types import SimpleNamespace

import pytest
import torch

from helpers import make_flow, refused
from rnode import Method, objective
from rnode.training.graphs import CUDAGraphs, record_solves
from rnode.training.solving import with_steps

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def fixed_calls(function, samples, allow_unused_input):
    """What torch.cuda.make_graphed_callables does, without a graph."""

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            for sample, given in zip(samples, inputs, strict=True):
                if sample.data_ptr() != given.data_ptr():
                    sample.data.copy_(given)
            with torch.enable_grad():
                ctx.outputs = function(*samples)
            return tuple(part.detach() for part in ctx.outputs)

        @staticmethod
        def backward(ctx, *gradients):
            wanted = [sample for sample in samples if sample.requires_grad]
            found = iter(torch.autograd.grad(ctx.outputs, wanted, gradients, allow_unused=True))
            return tuple(next(found) if sample.requires_grad else None for sample in samples)

    function(*samples)
    return Replay.apply


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("context", "bf16"), [(0, False), (2, False), (0, True)])
def test_recorded_solves_train_as_solves_do(device, context, bf16, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", fixed_calls)
    radau = Method("rk4", "radau", steps=2)
    flow = make_flow((1, 4, 4), train=radau, context=context).float().to(device)
    recorded = copy.deepcopy(flow)
    record_solves(recorded, 8)

    def train_steps(flow):
        optimizer, results = torch.optim.SGD(flow.parameters(), 1e-2), []
        grids = [2, 2, 2, 4, 4, 8]  # refined after a short batch
        for steps, size in zip(grids, [8, 8, 5, 8, 8, 8], strict=True):
            gradient = "checkpoint" if steps == 8 else "backprop"  # for want of memory
            flow.solver = with_steps(flow.solver, steps, gradient)
            torch.manual_seed(len(results))
            x = torch.randn(size, 1, 4, 4).to(device)
            c = torch.randn(size, context).to(device) if context else None
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                solution = flow.solve(x, context=c)
            objective(solution.state, 0.01, 0.01).backward()
            gradient = torch.cat([p.grad.flatten() for p in flow.parameters()])
            results.append((solution.nfe_forward, solution.nfe_backward, gradient))
            optimizer.step()
        return zip(*results, strict=True)

    (*nfe, gradients), (*expected_nfe, expected) = train_steps(recorded), train_steps(flow)
    assert nfe == expected_nfe
    assert all(piece.solve.replay is None for piece in recorded.pieces)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() < (0.05 if bf16 else 1e-4) * theirs.norm()


@pytest.mark.parametrize(
    ("gradient", "device", "devices", "window", "foreign", "records"),
    [
        ("backprop", "cuda", 1, 1, False, True),
        ("adjoint", "cuda", 1, 1, False, False),
        ("backprop", "cpu", 1, 1, False, False),
        ("backprop", "cuda", 2, 1, False, False),
        ("backprop", "cuda", 1, 2, False, False),
        ("backprop", "cuda", 1, 1, True, False),
    ],
)
def test_auto_records_solves_where_it_can(gradient, device, devices, window, foreign, records):
    flow = make_flow((1, 4, 4), train=Method("rk4", "radau", steps=2), gradient=gradient)
    if foreign:
        flow.pieces[-1].field = torch.nn.Identity()
    data = SimpleNamespace(batch_size=8, splits=SimpleNamespace(train=torch.zeros(100)))
    options = {"world_size": devices, "accumulate_grad_batches": window, "print": print}
    module = SimpleNamespace(flow=flow, device=torch.device(device))
    CUDAGraphs(required=False).on_fit_start(SimpleNamespace(datamodule=data, **options), module)
    assert ["solve" in vars(piece) for piece in flow.pieces] == [records] * len(flow.pieces)


def test_graphs_need_a_device_and_uncompiled_solves(capsys, tmp_path):
    run = [f"hydra.run.dir={tmp_path}", "wandb.mode=disabled", "trainer.accelerator=cpu"]
    line, _ = refused(capsys, "train", *run, "cuda_graphs=true")
    assert "cuda_graphs=true: needs a CUDA device" in line
    line, _ = refused(capsys, "train", *run, "cuda_graphs=true", "compile=true")
    assert "compile and cuda_graphs: only one can be true" in line
