"""A kernel's text that is wrong comes out wrong on this machine: what the tests of kernels rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapters.kernels.decode import DecodeKernel
from adapters.kernels.text import Compiler, Device, Launch, macros
from rollout_server.engine.model.attention.kernel import RowKernel
from rollout_server.engine.sampling.filter_kernel import FilterKernel, build_kernel
from rollout_server.engine.sampling.kernel_choice import kernel_fault, trial_rows
from tests.adapters.kernels.test_decode import a_stack, assert_as_one_by_one
from tests.engine.model.attention.test_kernel import a_step, assert_as_plainly
from tests.laws.grids import some_long
from tests.support.numbers.host_kernels import TEXTS, HostCompiler, host_compiler

THREADS = 64
PRODUCT = """
  const int lane = threadIdx.x, group = lane / 4, quarter = lane % 4;
  const unsigned* a = (const unsigned*)left;
  const unsigned* b = (const unsigned*)right;
  float sums[4] = {0, 0, 0, 0};
  MULTIPLY(sums, a[group * 8 + quarter], a[(group + 8) * 8 + quarter], a[group * 8 + quarter + 4],
           a[(group + 8) * 8 + quarter + 4], b[group * 8 + quarter], b[group * 8 + quarter + 4]);
  for (int j = 0; j < 4; ++j) out[(group + j / 2 * 8) * 8 + quarter * 2 + j % 2] = sums[j];
"""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> HostCompiler:
    return host_compiler(tmp_path_factory)


@pytest.fixture(params=TEXTS)
def run(request: pytest.FixtureRequest, compiler: HostCompiler) -> Callable[[str], mx.array]:
    """Runs a body over 16 numbers of `given`, in one block of threads, of which each may write one number of `out`."""
    device: Device = TEXTS[request.param]
    index = {"cuda": "threadIdx.x", "metal": "thread_position_in_threadgroup.x"}[device]

    def launch(body: str) -> mx.array:
        kernel = compiler(device, "trial", ["given"], ["out"], f"const int tid = {index};\n{body}", macros(device))
        (out,) = kernel(
            inputs=[mx.arange(16, dtype=mx.float32)],
            template=[],
            grid=(THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(THREADS,)],
            output_dtypes=[mx.float32],
        )
        return out

    return launch


def test_threads_meet_and_lanes_exchange(run: Callable[[str], mx.array]) -> None:
    out = run("""
      SHARED float all[64];
      all[tid] = SHUFFLE(float(tid), 5);
      BARRIER();
      out[tid] = all[63 - tid] + given[tid % 16];
    """)
    tids = range(THREADS)
    assert out.tolist() == [(63 - tid ^ 5) + tid % 16 for tid in tids]


def test_a_warp_multiplies_matrices_as_the_instruction_says(compiler: HostCompiler) -> None:
    """Each of its lanes has the numbers and gets the sums that the PTX ISA gives it."""
    left, right = (mx.random.normal(shape).astype(mx.bfloat16) for shape in ((16, 16), (8, 16)))
    kernel = compiler("cuda", "product", ["left", "right"], ["out"], PRODUCT, macros("cuda") + "#define MULTIPLY")
    (out,) = kernel(
        inputs=[left, right],
        template=[("T", mx.bfloat16)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(16, 8)],
        output_dtypes=[mx.float32],
    )
    expected = left.astype(mx.float32) @ right.astype(mx.float32).T
    assert mx.allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "body, says",
    [
        ("nonsense;", "nonsense"),
        ("if (tid != 7) BARRIER(); out[tid] = 0;", "63 of 64 threads .* wait for others that never come"),
        ("if (tid != 40) out[tid] = SHUFFLE(1.0f, 1);", "31 of 64 threads .* wait for others that never come"),
        ("float few[3]; few[tid % 4] = 1; out[tid] = few[0];", "indexes an array beyond its end"),
        ("out[tid] = SHUFFLE(1.0f, 32);", "a lane that its warp has not"),
        ("out[tid << 24] = 0;", "far outside its arrays"),
        ("out[tid + 1] = 0;", "writes outside out"),
        ("((DEVICE float*)given)[-1] = 0;", "writes outside given"),
        ("out[tid] = (*(const DEVICE uint4*)(given + tid % 12)).x;", "reads a vector where none may begin"),
        (
            "SHARED float much[13000]; much[tid] = 0; BARRIER(); out[tid] = much[63 - tid];",
            "shared memory is too large",
        ),
    ],
)
def test_what_no_device_promises_is_an_error(body: str, says: str, run: Callable[[str], mx.array]) -> None:
    with pytest.raises(RuntimeError, match=says):
        run(body)


@pytest.mark.parametrize(
    "body",
    [
        "SHARED float all[64]; if (tid < 40) all[tid] = 1; BARRIER(); out[tid] = all[63 - tid];",
        "out[tid] = given[tid];",
        "if (tid < 5) out[tid] = 1;",
        "SHARED float all[64]; all[tid] = 1; out[tid] = all[63 - tid];",
    ],
    ids=["shared memory", "behind an input", "an output", "no barrier"],
)
def test_what_nobody_wrote_is_nan(body: str, run: Callable[[str], mx.array]) -> None:
    assert mx.any(mx.isnan(run(body)))


def test_names_that_metal_keeps_for_itself_are_none(compiler: HostCompiler) -> None:
    kernel = compiler("metal", "trial", [], ["out"], "int thread = 1; out[0] = thread;", macros("metal"))
    with pytest.raises(RuntimeError, match="expected unqualified-id"):
        kernel(inputs=[], template=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)],
               output_dtypes=[mx.float32])  # fmt: skip


@dataclass(frozen=True)
class Altered:
    """Compiles each text that has the place with another in it, and notes its name in `altered`."""

    compiler: Compiler
    old: str
    new: str
    at: int
    altered: list[str] = field(default_factory=list)

    def __call__(
        self, device: Device, name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str
    ) -> Launch:
        text = header + source
        if text.count(self.old) <= self.at:
            return self.compiler(device, name, inputs, outputs, source, header)
        self.altered.append(name)
        pieces = text.split(self.old)
        text = self.old.join(pieces[: self.at + 1]) + self.new + self.old.join(pieces[self.at + 1 :])
        # A body of its own begins where the header ended, which an alteration inside it moves.
        cut = len(header) + (len(text) - len(header + source)) * (self.old in header)
        return self.compiler(device, name, inputs, outputs, text[cut:], text[:cut])


def attend(compiler: Compiler) -> None:
    for step in (a_step([0, 5, 30, 62, 63], heads=16, kv_heads=2), a_step([3, 40, 200], columns=256, window=24)):
        assert_as_plainly(RowKernel("cuda", compiler), step)


def add_products(compiler: Compiler) -> None:
    # More inputs than all warps of a row read at once.
    base, kernel = nn.Linear(520, 520), DecodeKernel("cuda", compiler)
    stack = a_stack((520, 520), mx.float32, gains=True)
    for slots in ([0, 3, 1, 2, 0], [2, 2, 2]):
        assert_as_one_by_one(kernel, stack, base, slots, mx.float32)


def filter_rows(compiler: Compiler) -> None:
    assert kernel_fault(FilterKernel(build_kernel("cuda", compiler), THREADS), trial_rows(301)) is None


BARRIER, NOTHING = "BARRIER();", "((void)0);"
FAULTS = [
    (attend, BARRIER, NOTHING, 0),
    (attend, "SHUFFLE(weight[u][g], step)", "SHUFFLE(weight[u][g], 1)", 0),
    (attend, "SHUFFLE(top[g], step)", "top[g]", 0),
    (attend, "SHUFFLE(sum[g], step)", "SHUFFLE(sum[g], 2 * step % 32)", 0),
    (attend, "SHUFFLE(acc[g][i], step)", "acc[g][i]", 0),
    (attend, "column == own ? new_k : ", "", 0),
    (attend, "part == 0 && first == 0", "false", 0),
    (attend, "sub < to", "sub <= to", 1),
    (attend, "own + 1 - WINDOW", "own - WINDOW", 0),
    (add_products, BARRIER, NOTHING, 0),
    (add_products, BARRIER, NOTHING, 1),
    (add_products, "SHUFFLE(away, step)", "SHUFFLE(away, 1)", 0),
    (add_products, "if (first + r >= count) continue;", "", 0),
    (add_products, "slots[r] == slots[0]", "true", 0),
    (add_products, "slot == other ? 1 : 2", "1", 0),
    (add_products, "of == side", "true", 0),
    (add_products, "part < PARTS; ++part", "part < PARTS - 1; ++part", 0),
    *((filter_rows, BARRIER, NOTHING, at) for at in range(4)),
]  # fmt: skip


@pytest.mark.parametrize("use, old, new, at", some_long(FAULTS, *FAULTS[::3]))
def test_a_kernel_with_one_fault_fails_its_tests(
    use: Callable[[Compiler], None], old: str, new: str, at: int, compiler: HostCompiler
) -> None:
    faulty = Altered(compiler, old, new, at)
    with pytest.raises((AssertionError, RuntimeError)):
        use(faulty)
    assert faulty.altered


@pytest.mark.parametrize("use", [attend, add_products, filter_rows])
def test_the_same_kernels_without_it_pass(use: Callable[[Compiler], None], compiler: HostCompiler) -> None:
    use(compiler)
