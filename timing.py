"""How long calls take and how much memory they hold: the measurements of `scripts/benchmark.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from statistics import median
from time import perf_counter
from timeit import timeit

import torch
from torch import Tensor, nn
from torch.profiler import profile

import output
import util

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TURN = 0.1  # seconds of calls that are timed together
# MiB of a copy far larger than any cache, rows of square matrices.
COPY_MIB, MATRIX = (2048, 8192) if CUDA else (256, 2048)


def timer() -> float:
    """Seconds on a clock that is read when the device has done its work."""
    if CUDA:
        torch.cuda.synchronize()
    return perf_counter()


def turns(calls: Iterable[Callable], repeats: int) -> list[list[float]]:
    """Seconds a call: for each of `calls`, which take turns, the mean of each turn."""
    counts = []
    for call in calls:
        call()  # compiles, allocates, fills caches
        counts.append(max(1, min(1000, int(TURN / timeit(call, timer=timer, number=1)))))
    work = list(zip(calls, counts, strict=True))
    times = [[timeit(call, timer=timer, number=n) / n for call, n in work] for _ in range(repeats)]
    return [list(column) for column in zip(*times, strict=True)]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, min and max."""
    values = list(values)
    return {"median": median(values), "min": min(values), "max": max(values)}


def peak_memory(call: Callable) -> float:
    """The most memory, MiB, that one call holds in tensors beyond what was held before it."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # The allocator of the CPU keeps no peak: add up the allocations that the profiler sees.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the tracer prints messages
    with profile(profile_memory=True) as trace:
        call()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0)) / 2**20


def limits(repeats: int, bf16: bool) -> dict[str, float]:
    """GB/s of a copy, read and written; GFLOP/s of matrix products and convolutions."""
    # Not at the top: the import warns on standard error where there is nvcc, but no GPU.
    from torch.utils.benchmark import Timer

    def seconds(call: Callable) -> float:
        clock = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return clock.blocked_autorange(min_run_time=repeats * TURN).median

    source, target = torch.ones(2, COPY_MIB * 2**18, device=DEVICE).unbind()
    rates = {"copy GB/s": 2e-9 * COPY_MIB * 2**20 / seconds(partial(target.copy_, source))}
    names = ["fp32", "tf32", "bf16"] if CUDA else ["fp32", "bf16"] if bf16 else ["fp32"]
    for name in names:
        util.set_float32_precision("tf32" if name == "tf32" else "ieee")
        options = {"device": DEVICE, "dtype": torch.bfloat16 if name == "bf16" else torch.float32}
        a, b = torch.randn(2, MATRIX, MATRIX, **options)
        product = partial(torch.matmul, a, b)
        rates[f"{name} product GFLOP/s"] = 2e-9 * MATRIX**3 / seconds(product)
        # Convolutions may be faster than the matrix library: 256 filters of 128x4x4, stride 2.
        shapes = (MATRIX // 256, 128, 64, 64), (256, 128, 4, 4)
        pair = [torch.randn(s, **options).to(memory_format=torch.channels_last) for s in shapes]
        convolve = partial(torch.conv2d, *pair, stride=2, padding=1)
        count = 2 * convolve().numel() * 128 * 4 * 4
        rates[f"{name} convolution GFLOP/s"] = 1e-9 * count / seconds(convolve)
    return rates


def table(title: str, rows: Sequence[dict]) -> dict:
    """Print rows by their names; of a spread the median, and all of it if it is a ratio."""

    def text(name: str, value) -> str:
        if isinstance(value, dict):
            whole = f"{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f})"
            return whole if name == "ratio" else text(name, value["median"])
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[text(name, row.get(name, "-")) for name in names] for row in rows]
    print(f"\n{title}\n{output.text_table(cells)}", flush=True)
    return {"title": title, "rows": rows}


def forward_backward(module: nn.Module, z: Tensor, mode: str, **options) -> Callable:
    """A call of `module` on `z`, then of the gradients of its input and its parameters."""
    z = z.detach().clone().requires_grad_()
    inputs, gradient = [z, *module.train().parameters()], torch.randn_like(z)
    if mode == "compiled":
        module.compile()

    def call() -> None:
        quantized, _, *loss = module(z, **options)
        gradients = [gradient, *map(torch.ones_like, loss)]
        torch.autograd.grad([quantized, *loss], inputs, gradients, allow_unused=True)

    return call


def part_times(
    step: Callable, modules: dict[str, nn.Module], others: Sequence[str], repeats: int
) -> list[dict]:
    """Mean time of each part of a step and its share; the GPU is waited for after each part.

    Args:
        step: takes a function `mark`, and calls it with each of `others` when this part is done.
        modules: parts that are modules. They keep the hooks.
        others: the other parts; the first one gets the time of the forward pass between modules.
        repeats: how many steps.
    """
    seconds = dict.fromkeys([*modules, *others], 0.0)
    last = timer()

    def mark(part: str) -> None:
        nonlocal last
        now = timer()
        seconds[part] += now - last
        last = now

    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_: mark(others[0]))
        module.register_forward_hook(lambda *_, name=name: mark(name))
    for _ in range(repeats):
        step(mark=mark)
    total = sum(seconds.values())
    return [{"part": k, "ms": 1e3 * s / repeats, "share": s / total} for k, s in seconds.items()]
