"""What the benchmarks share: timing in turn, the rate of convolutions, memory and records."""

import argparse
import ctypes
import datetime
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table

from rnode import Flow, Method, Probes, Solver, TimeConv2d, multiscale
from rnode.app.summary import print_table
from rnode.training.refine import doublings, refine

SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAMBDA = 0.01
CLIP = 1.0  # largest norm of the gradient, trainer.gradient_clip_val
RK4, SIMPSON = Method("rk4"), Method("rk4", "simpson")
RADAU = Method("rk4", "radau", steps=3)
COARSE = Method("rk4", "radau", steps=2)  # solver=auto at first …
FINE = Method("rk4", "radau", steps=4)  # … and after its first refinement
DOPRI5 = Method("dopri5")
FFJORD = Method("dopri5", first_step=1e-2, norm="batch")  # as in the plain recipe
EXACT = Method("dopri5", rtol=1e-8, atol=1e-8)  # the reference for errors
OUTPUTS = Path("outputs/benchmarks")  # plots, and records of --quick
Rows = list[dict[str, str]]


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that most benchmarks have. The first line of `doc` describes the benchmark."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    help = "data set whose image size is used"
    parser.add_argument("--dataset", choices=SHAPES, default="fashion_mnist", help=help)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=64, help="channels of the inner layers")
    parser.add_argument("--repetitions", type=int, default=3)
    help = "one repetition with a quarter of the batch"
    parser.add_argument("--quick", action="store_true", help=help)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.batch = 1, max(1, options.batch // 4)
    return options


def make_flow(
    options: argparse.Namespace, method: Method = RK4, gradient: str = "backprop"
) -> Flow:
    """A flow with the same weights each time."""
    torch.manual_seed(0)
    solver = Solver(method, DOPRI5, gradient)
    flow = multiscale(SHAPES[options.dataset], solver, Probes(), hidden=options.channels)
    return as_if_trained(flow).to(DEVICE)


def as_if_trained(flow: Flow) -> Flow:
    """Set random weights in every layer, also in the last ones, so that f is not 0."""
    for layer in (layer for layer in flow.modules() if isinstance(layer, TimeConv2d)):
        torch.nn.init.normal_(layer.weight, std=0.3 / layer.weight[0].numel() ** 0.5)
    return flow


def images(options: argparse.Namespace) -> torch.Tensor:
    """A batch of Gaussian noise, the same each time."""
    torch.manual_seed(1)
    return torch.randn(options.batch, *SHAPES[options.dataset], device=DEVICE)


@torch.no_grad()
def refine_grid(flow: Flow, rows: torch.Tensor, tolerance: float, step: int) -> None:
    """Refine the training grid as solver=auto does at a step, by the bits/dim of `rows`."""

    def bits() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return -flow.log_prob(rows).mean().item() / flow.d / math.log(2)

    for _ in range(doublings(step)):
        if refine(flow, bits, tolerance) is None:
            return


def timed(function: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds that a call of `function` takes; the call of `before` is not counted."""
    before()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(
    contenders: dict[str, Callable[[], object]],
    repetitions: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each contender, after one call that is not counted.

    The contenders run in turn, so a machine that slows down slows all of them.

    Args:
        contenders: functions by name.
        repetitions: timed calls of each function.
        before: called before each call; its time is not counted.
    """
    for contender in contenders.values():
        contender()
    seconds = [
        {name: timed(contender, before) for name, contender in contenders.items()}
        for _ in range(repetitions)
    ]
    return {name: statistics.median(row[name] for row in seconds) for name in contenders}


def convolution(
    options: argparse.Namespace, dtype: torch.dtype
) -> tuple[Callable[[], object], float]:
    """Ten 3×3 convolutions between inner layers at the size of the image, and their FLOPs."""
    channels, size = options.channels, SHAPES[options.dataset][1:]
    h = torch.randn(options.batch, channels, *size, device=DEVICE, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=dtype)
    flops = 10 * 2 * 9 * channels * h.numel()
    return lambda: [F.conv2d(h, weight, padding=1) for _ in range(10)], flops


def evaluation_flops(shape: tuple[int, ...], channels: int) -> float:
    """FLOPs of the convolutions of one evaluation of f in every piece, for one image."""
    solver = Solver(Method("euler", steps=1), DOPRI5)
    flow = multiscale(shape, solver, Probes(), hidden=channels)
    flops = []

    def note(layer, _, out):
        flops.append(2 * 9 * (layer.in_channels - 1) * out.numel())

    for layer in (layer for layer in flow.modules() if isinstance(layer, TimeConv2d)):
        layer.register_forward_hook(note)
    flow(torch.zeros(1, *shape))
    return sum(flops)


def step_flops(options: argparse.Namespace, method: Method) -> float:
    """FLOPs of the convolutions in a training step with a quadrature.

    A product εᵀ∇f costs as much as an evaluation of f, and their backward passes twice as much.
    """
    extra = 1 if method.integrals == "simpson" else 0  # Simpson's node at T
    evaluations, products = 4 * method.steps + extra, method.steps + extra
    one = evaluation_flops(SHAPES[options.dataset], options.channels)
    return 3 * (evaluations + products) * options.batch * one


def peak_memory(function: Callable[[], object]) -> float:
    """GiB that a call reserves at its peak, above what was reserved before (CPU: Linux only)."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        function()
        return (torch.cuda.max_memory_reserved() - before) / 2**30
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    function()
    return (resident("VmHWM") - before) / 2**20


def resident(key: str) -> int:
    """A value of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def describe(options: argparse.Namespace) -> str:
    size = f"batch {options.batch}, {options.channels} channels"
    return f"{options.dataset}, {size}, {DEVICE.type}"


def as_time(seconds: float) -> str:
    """Seconds, one at least, as trainer.max_time takes them."""
    return time.strftime("%H:%M:%S", time.gmtime(max(1, round(seconds))))


def mean_and_spread(values: list[float], digits: int) -> str:
    """The mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def kept(path: Path | None, key: list, measure: Callable[[], list]) -> list:
    """Return what `measure` does, which a line of a file keeps by its key for later runs."""
    lines = path.read_text().splitlines() if path and path.exists() else []
    for known, value in map(json.loads, lines):
        if known == key:
            return value
    value = measure()
    if path:
        with path.open("a") as file:
            file.write(json.dumps([key, value]) + "\n")
    return value


def write_record(name: str, title: str, rows: Rows) -> None:
    """Print a table, and write it to benchmarks/results/NAME.json with what its figures depend on.

    The record of a CUDA device has `_cuda` in its name. Figures of `--quick` are no evidence: their
    record goes to outputs/benchmarks. scripts/render_docs.py makes the tables of the pages.

    Args:
        name: name of the record.
        title: title of the printed table.
        rows: rows of the table; the first column names the contender.
    """
    gpu = DEVICE.type == "cuda"
    folder = OUTPUTS if "--quick" in sys.argv else Path("benchmarks/results")
    git = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    record = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit.strip(),
        "date": datetime.date.today().isoformat(),
        "versions": {package: version(package) for package in ("torch", "torchdiffeq", "numpy")},
        "machine": f"{processor()}, {torch.get_num_threads()} thread(s)",
        "rows": rows,
    }
    if gpu:
        record["machine"] = f"{torch.cuda.get_device_name()}, {record['machine']}"
    path = folder / f"{name}{'_cuda' if gpu else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row.values())
    print_table(table)
    print(f"written to {path}")


def processor() -> str:
    """The name of the processor, as Linux has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
