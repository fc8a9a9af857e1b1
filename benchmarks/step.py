"""One training step (forward, gradient, Adam), side by side with the plain recipe.

python benchmarks/step.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3] [--quick]

Every contender has the same weights, batch and λ. Repetitions are interleaved, so that a machine that slows down slows all
of them. The table gives medians, the ratio to the plain recipe, the share of the limit (the seconds that the convolutions of
the step would take at the rate that a 3×3 convolution reaches in the same run, over the seconds it took) and the memory of
the step at its peak; it is written to outputs/benchmarks/step.csv and step.png as well.
"""

import argparse
import csv
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from plain import PlainFlow
from rnode import Flow, Method, Probes, Solver, TimeConv2d, multiscale, objective

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
LAMBDA = 0.01
CONTENDERS = {  # name: (training method, gradient, bfloat16 in f)
    "rk4, adjoint": (Method("rk4"), "adjoint", False),
    "rk4, backprop": (Method("rk4"), "backprop", False),
    "simpson, backprop": (Method("rk4", "simpson"), "backprop", False),
    "simpson, checkpoint": (Method("rk4", "simpson"), "checkpoint", False),
    "simpson, backprop, bf16": (Method("rk4", "simpson"), "backprop", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=SHAPES, default="fashion_mnist", help="whose shape the images have")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=64, help="of the inner layers")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repetition of a quarter of the batch")
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.batch = 1, max(1, options.batch // 4)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[options.dataset]

    torch.manual_seed(0)
    x = torch.randn(options.batch, *shape, device=device)
    flow = make_flow(shape, options.channels, Method("rk4"), "backprop", device)
    # Weights as after some training, so that f is not 0.
    for layer in (layer for layer in flow.modules() if isinstance(layer, TimeConv2d)):
        torch.nn.init.normal_(layer.weight, std=0.3 / layer.weight[0].numel() ** 0.5)
    weights = flow.state_dict()
    steps = {"plain recipe": plain_step(flow, x)}
    for name, (method, gradient, bf16) in CONTENDERS.items():
        contender = make_flow(shape, options.channels, method, gradient, device)
        contender.load_state_dict(weights)
        steps[name] = our_step(contender, x, bf16)

    memory = {name: peak_memory(step, device) for name, step in steps.items()}  # the first call: a warm-up too
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(options.repetitions):
        for dtype, measured in rates.items():
            measured.append(convolution_rate(x, options.channels, dtype))
        for name, step in steps.items():
            seconds[name].append(timed(step, device))

    plain, needed = statistics.median(seconds["plain recipe"]), needed_flops(flow, x)
    rows = []
    for name, measured in seconds.items():
        median = statistics.median(measured)
        row = {"contender": name, "seconds": f"{median:.3f}", "ratio": f"{plain / median:.2f}", "share of limit": ""}
        if name in CONTENDERS:
            method, _, bf16 = CONTENDERS[name]
            rate = statistics.median(rates[torch.bfloat16 if bf16 else torch.float32])
            limit = needed / rate
            row["share of limit"] = f"{limit / median:.0%}" if method.integrals == "simpson" else ""
        rows.append(row | {"peak GiB": f"{memory[name]:.2f}"})
    report(rows, f"training step, {options.dataset}, batch {options.batch}, {options.channels} channels, {device.type}")


def make_flow(shape, channels: int, method: Method, gradient: str, device: torch.device) -> Flow:
    return multiscale(shape, Solver(method, Method("dopri5"), gradient), Probes(), hidden=channels).to(device)


def our_step(flow: Flow, x: torch.Tensor, bf16: bool) -> Callable[[], None]:
    optimizer = torch.optim.Adam(flow.parameters(), 1e-5)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = objective(flow(x), LAMBDA, LAMBDA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_step(flow: Flow, x: torch.Tensor) -> Callable[[], None]:
    plain = PlainFlow(flow, method="rk4", options={"step_size": 0.25})
    optimizer = torch.optim.Adam(plain.parameters(), 1e-5)

    def step() -> None:
        loss = plain.loss(x, LAMBDA, LAMBDA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def convolution_rate(x: torch.Tensor, channels: int, dtype: torch.dtype) -> float:
    """FLOP/s of a 3×3 convolution, `channels` to `channels`, on images of x's size."""
    h = torch.randn(len(x), channels, *x.shape[2:], device=x.device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=x.device, dtype=dtype)
    seconds = min(timed(lambda: F.conv2d(h, weight, padding=1), x.device) for _ in range(10))
    return 2 * 9 * channels**2 * h[:, 0].numel() / seconds


def needed_flops(flow: Flow, x: torch.Tensor) -> float:
    """Of the convolutions of a step by Simpson's rule: 17 evaluations and 5 products a piece, and twice that backwards."""
    flops = {}

    def note(layer, _, out):
        flops[layer] = 2 * 9 * (layer.in_channels - 1) * out.numel()

    hooks = [layer.register_forward_hook(note) for layer in flow.modules() if isinstance(layer, TimeConv2d)]
    with torch.no_grad():
        flow(x)
    for hook in hooks:
        hook.remove()
    return 3 * (17 + 5) * sum(flops.values())


def peak_memory(step: Callable[[], None], device: torch.device) -> float:
    """GiB that a step takes at its peak, above what was held before it (on the CPU: Linux alone)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 2**20


def resident(key: str) -> int:
    """KiB, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def report(rows: list[dict[str, str]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder = Path("outputs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "step.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure, ax = plt.subplots(figsize=(8, 3.5), layout="constrained")
    bars = ax.barh([row["contender"] for row in rows], [float(row["ratio"]) for row in rows])
    ax.bar_label(bars, [f"{row['ratio']} ×" for row in rows])
    ax.invert_yaxis()
    ax.set(title=title, xlabel="speed against the plain recipe")
    figure.savefig(folder / "step.png", dpi=120)
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        table.add_row(*row.values())
    Console(width=100).print(table)
    print(f"written to {folder}/step.csv and step.png")


if __name__ == "__main__":
    main()
