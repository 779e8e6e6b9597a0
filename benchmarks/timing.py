"""How time and memory are taken: interleaved rounds, medians with 20th and 80th percentiles, weights kept cold.

Every contender runs once in each round, in random order, so that a change of the machine's speed meets all of
them. Call i of a contender uses weight set ``i % n``: n is chosen so that a set has left the last cache before
it comes again. Memory is the peak of a process that has this contender alone.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import math
import multiprocessing
import os
import platform
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 5, 300


class Stats(NamedTuple):
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Stats:
        ordered = sorted(seconds)

        def at(share: float) -> float:
            where = share * (len(ordered) - 1)
            low, high = ordered[math.floor(where)], ordered[math.ceil(where)]
            return 1e3 * (low + (high - low) * (where % 1))

        return cls(at(0.5), at(0.2), at(0.8), len(ordered))


def rounds_of(contenders: Mapping[str, Sequence[Call]], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of each call. ``seconds`` is what one contender may take in all; every one gets equally many rounds."""
    call_time = clock(device)

    def estimate(calls: Sequence[Call]) -> float:
        first = call_time(calls[0])
        return call_time(calls[-1]) if first * MIN_ROUNDS < 1 else first  # a first call may be slow, if it is short

    slowest = max(map(estimate, contenders.values()), default=0.0)
    count = min(max(int(seconds / max(slowest, 1e-6)), MIN_ROUNDS), MAX_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    draw = random.Random(0)
    # Contenders start at different sets, so that none finds what the one before it has just read.
    start = {name: j * len(contenders[name]) // len(order) for j, name in enumerate(order)}
    gc.collect()
    gc.disable()
    try:
        for i in range(count):
            draw.shuffle(order)
            for name in order:
                calls = contenders[name]
                times[name].append(call_time(calls[(start[name] + i) % len(calls)]))
    finally:
        gc.enable()
    return times


def measure(contenders: Mapping[str, Sequence[Call]], seconds: float, device: str) -> dict[str, Stats]:
    """Statistics of `rounds_of`."""
    return {name: Stats.of(times) for name, times in rounds_of(contenders, seconds, device).items()}


def clock(device: str) -> Callable[[Call], float]:
    """What times one call: the clock on a CPU, events on a GPU (the call has ended when the time is read)."""
    if device == "cpu":

        def wall(call: Call) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return wall
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def events(call: Call) -> float:
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return events


def graph(call: Call) -> Call:
    """A replay of ``call`` as a CUDA graph: what remains is the device's time, without launches from the host.

    Raises:
        RuntimeError: a call that waits for the device, which no graph can hold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    return captured.replay


@functools.lru_cache
def last_cache_bytes(device: str) -> int:
    """Of the last cache before memory."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(torch.device(device)).L2_cache_size)
    folder = "/sys/devices/system/cpu/cpu0/cache"
    sizes = [32 << 20]  # where the system does not say
    for index in os.listdir(folder) if os.path.isdir(folder) else ():
        if index.startswith("index"):
            with open(f"{folder}/{index}/size") as file:
                size = re.fullmatch(r"(\d+)([KM])", file.read().strip())
            if size:
                sizes.append(int(size[1]) << (20 if size[2] == "M" else 10))
    return max(sizes)


def weight_sets(one: int, cold: bool, device: str) -> int:
    """How many sets of ``one`` bytes to go round in, so that none is in the cache when it comes again."""
    return 1 + last_cache_bytes(device) // max(one, 1 << 20) if cold else 1


def pin(threads: int | None) -> int:
    """Fixes the number of threads for the process, and what becomes of freed memory; returns the former.

    By itself glibc gives large blocks back when they are freed, or keeps them: that depends on what else happens to lie
    in the heap. Where it gives them back every layer's output is made anew, page by page, and times are those of the
    system; `benchmarks.slices` shows how much. So it is told to keep them, for every contender.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    keep_memory()
    return torch.get_num_threads()


def keep_memory() -> None:
    """Has the C library keep freed memory, where it is glibc. As MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)


def device_name(device: str) -> str:
    """The processor, and for a CPU which of our kernels it runs."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            found = re.search(r"^model name\s*: (.+)$", file.read(), re.MULTILINE)
        name = found[1] if found else name
    isa = torch.ops.taps_fast.cpu_isa() if hasattr(torch.ops.taps_fast, "cpu_isa") else "no kernels"
    return f"{name} ({isa})"


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _resident(line: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"^{line}:\s*(\d+) kB", file.read(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def cpu_peak(build: Callable[[], Call], warm: Callable[[], Call] | None = None) -> int:
    """Bytes that this process holds at most while it runs ``build()``'s call, more than before it was built.

    What building needed for a moment is not counted: the system's high-water mark is reset in between. Neither is
    what the first call of any code brings in (libraries, thread stacks): ``warm`` (or the same) is run once before.
    """
    (warm or build)()()
    _trim()
    before = _resident("VmRSS")
    call = build()
    _trim()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for _ in range(2):  # the first allocates what the second finds, such as an optimizer's state
        call()
    return _resident("VmHWM") - before


def allocated_peak(call: Call) -> int:
    """Bytes of the tensors that live at most while ``call`` runs, without those that lived before; CPU.

    By the allocator's own record, which another run repeats to the byte. The resident set holds freed blocks too.
    """
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes: list[tuple[int, int]] = []

    def walk(nodes) -> None:
        for node in nodes:
            if hasattr(node.typed[1], "alloc_size"):
                changes.append((node.start_time_ns, node.typed[1].alloc_size))
            walk(node.children)

    walk(profile.profiler.kineto_results.experimental_event_tree())
    return max(itertools.accumulate(size for _, size in sorted(changes, key=lambda change: change[0])), default=0)


def _trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def cuda_peak(build: Callable[[], Call]) -> int:
    """The allocator's peak while ``build()``'s call runs, more than before it was built."""
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    call = build()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(
    build: Callable[..., Call], *args: object, device: str, warm: Callable[[], Call] | None = None
) -> int | None:
    """Peak memory of ``build(*args)()``: on a CPU in a process of its own (None where the system cannot say).

    ``warm``: something smaller that runs the same code, where building twice takes long.
    """
    if device != "cpu":
        return cuda_peak(functools.partial(build, *args))
    if not os.path.isfile("/proc/self/clear_refs"):
        return None
    # A server that has imported torch and run nothing: its children start fast, and have no threads to lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.cells"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, build, args, torch.get_num_threads(), warm))
    child.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = None  # killed, most likely for want of memory
    child.join()
    if isinstance(answer, str):
        raise RuntimeError(f"peak_bytes: the child failed: {answer}")
    return answer


def _child(pipe, build, args, threads, warm) -> None:
    torch.set_num_threads(threads)  # freed memory is given back, so that what is resident is in use
    try:
        pipe.send(cpu_peak(functools.partial(build, *args), warm))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
