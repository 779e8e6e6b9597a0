"""Compiles every kernel the library would launch, for chips this machine need not have, and checks the code.

    python tests/aot.py                  # all chips, all launches
    python tests/aot.py --chips 9.0      # one chip

What is compiled is recorded from the host code itself, run on CPU tensors with the chip's limits: the same
specialisation, tiles, warps and stages that a launch there would have. Exits with 1 if a gate fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from sass_hazards import hazards, spills_in_loops
from taps_fast.kernels import _arguments, _configs, coded, conv2d, fold, linear, merge, pointwise
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from taps_fast import kernels
from taps_fast.tasks import TaskBatch

CHIPS = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
PARTLY = ((8, 9), (12, 0))
"""Chips without entries of their own: only what has tiles of the table is compiled, since the rest is as elsewhere."""
PROCESSORS = 132
SPILLS, SPILLS_PARTLY = 96, 32
"""Bytes that may spill outside of loops: where a program multiplies on ordinary units, and on the chips of PARTLY,
where more registers would leave room for one block in place of two."""
VENDORS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
HOSTS = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that its default will change.
INDICES = (linear.joined_ids_kernel, linear.grouped_rows_kernel, _arguments.write_kernel)
"""Kernels that make indices, of those among their first two arguments that are tensors."""
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# The instruction that multiplies tiles. wgmma needs 64 rows on the left, four warps and 16-bit types or tf32; with
# decoded weights on the right there are 16.
FMA = r"FFMA"
NARROW = {"sum_parts_kernel", "task_sums_kernel", *(k.fn.__name__ for k in INDICES)}
"""Kernels that read little, or pixel by pixel where the order of the samples puts them."""
ATOMIC = re.compile(r"\*/ +(?:@!?U?P\d+ +)?(?:ATOMG?|REDG?)\b")  # not ATOMS, which allocates tensor memory
WARP = r"\bHMMA"
TENSOR_CORE = {9: r"[HQ]GMMA", 10: r"UTC\w*MMA"}
"""By generation; WARP elsewhere."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What identifies one compiled kernel."""

    kernel: str
    chip: tuple[int, int]
    signature: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[tuple[int, ...], str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    registers: int | None = None

    @property
    def blocks(self) -> str:
        constants = dict(self.constants)
        sizes = "x".join(str(constants[n]) for n in ("BLOCK_M", "BLOCK_O", "BLOCK_I") if n in constants)
        dtype = str(dict(self.signature).get("x_ptr", "")).strip("*")
        if constants.get("PRECISION") == "tf32":
            dtype = "tf32"
        flags = [n.lower() for n in ("WRITES", "WRITE_BASE", "TABLE") if constants.get(n)]
        if constants.get("MIXED", "order_ptr" in dict(self.signature)):
            flags.insert(0, "mixed")
        if constants.get("SPLITS", 1) > 1:
            flags.append("splits")
        return " ".join([sizes, f"{self.warps}w{self.stages}s", dtype, *flags])


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the compiled code is made of."""

    registers: int
    spills: int
    spills_in_loops: int
    shared: int
    products: int
    atomics: int
    async_copies: int
    wide_loads: int
    warnings: tuple[str, ...]
    hazards: int


def recorded(chip: tuple[int, int], exercise: Callable[[], object] | None = None) -> list[Launch]:
    """Every launch of the host code on one chip, over rows, dtypes, single and mixed, each gradient."""
    found: dict[Launch, None] = {}

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            assert len(grid) == 1, f"{self.kernel.fn.__name__}: axes of a grid but the first end at 65535 programs"
            return self.record

        def record(self, *args: Any, **kwargs: Any) -> None:
            found.setdefault(_launch(self.kernel, chip, args, kwargs))
            if self.kernel in INDICES:  # the host reads through them
                for result in filter(torch.is_tensor, args[:2]):
                    result.zero_()

    kernels = [
        (module, name, kernel) for module in HOSTS for name, kernel in vars(module).items() if name.endswith("_kernel")
    ]
    chip_of, processors, precisions = _configs.capability, _configs.processors, [v.fp32_precision for v in VENDORS]
    try:
        _configs.capability = lambda device: chip
        _configs.processors = lambda device: PROCESSORS
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(kernel))
        (exercise or _exercise)()
    finally:
        _configs.capability, _configs.processors = chip_of, processors
        for vendor, precision in zip(VENDORS, precisions, strict=True):
            vendor.fp32_precision = precision
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return list(found)


def _exercise() -> None:
    """Shapes are small or thin: what is compiled depends on rows, divisibility, and whether tiles are too few."""
    index = TaskBatch.from_ids(torch.zeros(16, dtype=torch.int64), 3).tensors
    for dtype, precision, rows, wide in (
        *((torch.bfloat16, "ieee", rows, True) for rows in (16, 32, 64, 256)),
        (torch.bfloat16, "ieee", 256, False),
        *((torch.float32, precision, rows, True) for precision in ("ieee", "tf32") for rows in (16, 64, 256)),
    ):
        for vendor in VENDORS:
            vendor.fp32_precision = precision
        O, I = (64 * 2 * PROCESSORS * 2, 64) if wide else (512, 512)
        base = torch.empty(O, I, dtype=dtype)
        x, dy = torch.empty(rows, I, dtype=dtype), torch.empty(rows, O, dtype=dtype)
        bias = torch.empty(4, O, dtype=dtype)
        deltas = [base, base, base]
        one, each = torch.ones(3), torch.ones(3, 3)
        none = (None, None, None)
        linear.linear_fwd(x, base, deltas, one, None, bias[0], *none, 1, "split")
        linear.linear_fwd(x, base, deltas, each, None, bias, *index, rows // 16, "split")
        # Transposed, the many features are the ones produced.
        turned = [d.t().contiguous() for d in deltas]
        linear.linear_dx(x, turned[0], turned, one, None, *none, 1, "split")
        linear.linear_dx(x, turned[0], turned, each, None, *index, rows // 16, "split")
        if not wide:
            long = torch.empty(4096, 512, dtype=dtype)
            linear.linear_dw(long, long, base, deltas, one, None, *none, 1, [], [0, 1, 2], True, True, False)
        if rows == 64:
            diagonal = [0, 4, 8]
            linear.linear_dw(dy, x, base, deltas, one, None, *none, 1, [], [0, 1, 2], True, False, False)
            linear.linear_dw(dy, x, base, deltas, one, None, *none, 1, [], [], True, True, False)
            linear.linear_dw(dy, x, base, deltas, each, None, *index, 4, diagonal, [0, 1, 2], True, False, False)
            linear.linear_dw(dy, x, base, deltas, each, None, *index, 4, [], [0], True, True, False)
            many = [base] * (_arguments.ARGUMENTS + 1)
            linear.linear_fwd(x, base, many, torch.ones(len(many)), None, None, *none, 1, "split")
            merge.merged(merge.Weight.of(base, deltas, one, None), merge.Rows(*none, rows, 1), 0, O)
            merge.merged(merge.Weight.of(base, deltas, each, one), merge.Rows(*index, rows, 1), 0, O)
            merge.merged(merge.Weight.of(base, deltas, each, None), merge.Rows(*index, rows, 1), 16, I // 2, features=1)
            linear.linear_fwd(x, base, many[:3], each, None, None, *index, rows // 16, "merge")
            for image in (dy[:, :, None, None].expand(-1, -1, 16, 1).contiguous(), dy):
                table, groups = torch.ones(4, dy.shape[1]), (*index, rows // 16, "relu")
                pointwise.scale_shift(image, table, table, *groups)
                pointwise.scale_shift_dx(image, image, table, table, table, table, *groups[:-1], "gelu")
                pointwise.scale_shift_sums(image, image, table, table, table, *groups[:-1], "silu")
                pointwise.moments(image, *groups[:-1])
            pointwise.scale_shift(dy[:1], table[0], None, *none, 1, "relu")
            pointwise.moments(dy[:1], *none, 1)
            for side, images in itertools.product((4, 7), (16, 64)):  # pixels of a block or more; in parts or whole
                image = torch.empty(images, 512, side, side, dtype=dtype).to(memory_format=torch.channels_last)
                taps = torch.empty(512, 512, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
                biases, how = torch.empty(4, 512, dtype=dtype), ([1, 1], [1, 1], [1, 1])
                conv2d.conv2d_implicit(image, taps, [taps], one[:1], None, biases[0], *how, None, 1)
                conv2d.conv2d_implicit(image, taps, [taps] * 3, each, one, biases, *how, index[0], images // 16)
            merge.fold([base], [base], torch.ones(1, 1, 1))
            merge.fold([base] * 53, [base] * 53, torch.ones(53, 1, 1))
            merge.fold([base, base[0, :7]], [base, base[0, :7]], torch.ones(2, 1, 1))

    for dtype, format in itertools.product((torch.bfloat16, torch.float32), coded.FORMATS):
        x, factors = torch.empty(16, 512, dtype=dtype), torch.empty(3, 512)
        codes = [torch.empty(512, 512 if format == "int8" else 64, dtype=torch.uint8)] * 3
        codes = [code.view(torch.int8) if format == "int8" else code for code in codes]
        rest = (codes, x.new_empty(512, 512) if format == "mask" else None, factors, [0, 1, 2], *index, 1, format)
        coded.coded_fwd(x, x, *rest)
        coded.coded_dx(x, *rest, 512)

    for dtype, masked, parted in itertools.product(
        (torch.bfloat16, torch.float32, torch.float64), *[(False, True)] * 2
    ):
        base = torch.empty(512, 512, dtype=dtype)
        parts = [torch.empty(512, 512, dtype=torch.uint8)] * parted
        coeffs = torch.ones(1, 2 if parted else 1, 3, dtype=torch.promote_types(dtype, torch.float32))
        fold.fold([base], [base] * 3, coeffs, parts, [base > 0] * masked)
        fold.fold_grad([base], [base] * 3, coeffs, parts, [base] * masked, True, masked)


def _launch(kernel: Any, chip: tuple[int, int], args: Sequence[Any], kwargs: dict[str, Any]) -> Launch:
    signature, attributes, constants = {}, {}, {}
    given = dict(zip(kernel.arg_names, args, strict=False)) | {n: kwargs[n] for n in kernel.arg_names if n in kwargs}
    for n, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        kind, attribute = native_specialize_impl(CUDABackend, value, False, not parameter.do_not_specialize, True)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = attribute
        elif isinstance(kind, tuple):
            attributes |= {(n, m): a for m, a in enumerate(attribute) if a}
        elif attribute:
            attributes[n,] = attribute
    return Launch(
        kernel.fn.__name__, chip, tuple(signature.items()), tuple(attributes.items()), tuple(constants.items()),
        kwargs.get("num_warps", 4), kwargs.get("num_stages", 3), kwargs.get("maxnreg"),
    )  # fmt: skip


def _kernel(name: str) -> Any:
    found = next(getattr(module, name) for module in HOSTS if hasattr(module, name))
    return getattr(found, "jit", found)


def compiled(launch: Launch) -> Facts:
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    attributes = {path: CUDABackend.parse_attr(attribute) for path, attribute in launch.attributes}
    source = ASTSource(_kernel(launch.kernel), dict(launch.signature), dict(launch.constants), attributes)
    target = GPUTarget("cuda", launch.chip[0] * 10 + launch.chip[1], 32)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
        binary = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert spills, f"ptxas printed no summary:\n{log.getvalue()}"
    return Facts(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=int(spills[1]) + int(spills[2]),
        spills_in_loops=spills_in_loops(sass, FMA if is_ieee(launch) else instruction(launch)),
        shared=binary.metadata.shared,
        products=len(re.findall(instruction(launch), sass)),
        atomics=len(ATOMIC.findall(sass)),
        async_copies=len(re.findall(r"LDGSTS|UTMALDG", sass)),
        wide_loads=len(re.findall(r"LDG(?:STS)?\.\S*128|UTMALDG", sass)),
        warnings=tuple(sorted(set(re.findall(r"C75\d\d", log.getvalue())))),
        hazards=len(hazards(sass)),
    )


def _cuobjdump(what: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", what, path], capture_output=True, text=True, check=True).stdout


def instruction(launch: Launch) -> str:
    """The one of tensor cores that a launch should use."""
    narrow = launch.kernel == "split_kernel" and dict(launch.constants)["BLOCK_O"] < 64
    return WARP if narrow or launch.kernel == "coded_kernel" else TENSOR_CORE.get(launch.chip[0], WARP)


def is_ieee(launch: Launch) -> bool:
    """Whether products run on the ordinary units."""
    return dict(launch.signature).get("x_ptr") == "*fp32" and dict(launch.constants).get("PRECISION") == "ieee"


def failures(launch: Launch, facts: Facts) -> list[str]:
    """The gates."""
    limit = _configs.shared_limit(launch.chip)
    found = []
    # A few registers once a program are nothing beside products on ordinary units, or a second block.
    bearable = SPILLS if is_ieee(launch) else SPILLS_PARTLY if launch.chip in PARTLY else 0
    if facts.spills > bearable or facts.spills_in_loops:
        found.append(f"{facts.spills} bytes of registers spill, {facts.spills_in_loops} instructions of it in loops")
    if facts.registers * launch.warps * 32 > 65536:
        found.append(f"{facts.registers} registers x {launch.warps} warps exceed the file")
    if facts.shared > limit:
        found.append(f"{facts.shared} bytes of shared memory, the chip has {limit}")
    if facts.warnings:
        found.append(f"ptxas warns {', '.join(facts.warnings)}: wgmma is serialised")
    if facts.hazards:
        found.append(f"{facts.hazards} writes to registers that a wgmma may still read")
    if facts.atomics:
        found.append(f"{facts.atomics} atomic operations on memory: sums would depend on the order of programs")
    multiplies = "PRECISION" in dict(launch.constants)
    if multiplies and facts.async_copies < 2 * copies_of_a_step(launch):
        found.append("loads are not started ahead")
    # tf32 products want their operands transposed here, 4 bytes at a time.
    turned = launch.kernel == "dw_shared_kernel" and dict(launch.constants)["PRECISION"] == "tf32"
    if not facts.wide_loads and launch.kernel not in NARROW and not turned:
        found.append("no load of 16 bytes")
    if multiplies and not is_ieee(launch) and not facts.products:
        found.append("no tensor-core products")
    return found


def copies_of_a_step(launch: Launch) -> int:
    """The least there are of 16 bytes for a thread: before the loop there is one for each stage but the last."""
    constants, pointers = dict(launch.constants), dict(launch.signature)
    if "BLOCK_I" not in constants:
        return 1
    config = _configs.Config(*(constants[n] for n in ("BLOCK_M", "BLOCK_O", "BLOCK_I")), launch.warps, 1)
    kernel = "dw" if launch.kernel.startswith("dw_") else "split"
    return config.shared_bytes(kernel, 4 if pointers["x_ptr"] == "*fp32" else 2) // (512 * launch.warps)


def unlaunched(launches: Sequence[Launch]) -> set[str]:
    """Kernels of the library that no recorded launch starts."""
    named = {name for module in HOSTS for name in vars(module) if name.endswith("_kernel")}
    return named - {launch.kernel for launch in launches}


def shipped(capability: tuple[int, int]) -> Iterator[tuple[str, int, _configs.Config]]:
    """(kernel, bytes an element, config) of everything `choose` can return on a chip."""
    for kernel in _configs.KERNELS:
        for itemsize in (4,) if kernel.endswith(_configs.IEEE) else (2, 4):
            for _, config in _configs.entries(kernel, itemsize, capability):
                yield kernel, itemsize, _configs.fitted(config, kernel, itemsize, capability)


def unseen(chip: tuple[int, int], launches: Sequence[Launch]) -> list[_configs.Config]:
    """Configs that the table can choose on this chip and that no recorded launch uses."""
    seen = set()
    for launch in launches:
        constants = dict(launch.constants)
        seen.add((*(constants.get(n) for n in ("BLOCK_M", "BLOCK_O", "BLOCK_I")), launch.warps))
    configs = (config for _, _, config in shipped(chip))
    return [c for c in configs if (c.block_m, c.block_o, c.block_i, c.warps) not in seen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="*", default=[f"{a}.{b}" for a, b in CHIPS])
    parser.add_argument("--kernels", nargs="*", help="names, default all")
    parser.add_argument("--only", default="", help="text that a line must contain")
    arguments = parser.parse_args()
    launches = []
    for chip in (tuple(int(v) for v in text.split(".")) for text in arguments.chips):
        found = recorded(chip)
        if missing := unseen(chip, found) or unlaunched(found):
            raise SystemExit(f"nothing here launches {missing} on {chip}")
        launches += [n for n in found if chip not in PARTLY or "BLOCK_I" in dict(n.constants)]
    launches = [n for n in launches if not arguments.kernels or n.kernel in arguments.kernels]
    launches = [n for n in launches if arguments.only in n.blocks]
    print(f"Triton {triton.__version__}, {len(launches)} compiled kernels")
    print(f"{'chip':<5}{'kernel':<19}{'launch':<42}{'regs':>5}{'spill':>6}{'shared':>8}{'mma':>5}{'async':>6}  verdict")
    bad = 0
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for launch, facts in zip(launches, pool.map(compiled, launches), strict=True):
            reasons = failures(launch, facts)
            bad += bool(reasons)
            print(
                f"{'.'.join(map(str, launch.chip)):<5}{launch.kernel:<19}{launch.blocks:<42}{facts.registers:>5}"
                f"{facts.spills:>6}{facts.shared:>8}{facts.products:>5}{facts.async_copies:>6}  "
                f"{'; '.join(reasons) or 'ok'}",
                flush=True,
            )
    print(f"{bad} of {len(launches)} fail" if bad else "all pass")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
