"""The C++ kernel for products of few rows: exact, the same bits in any company, for every vector width."""

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex import Engine
from llama_flex.kernels import cpu as kernel
from llama_flex.kernels import linear
from llama_flex.layers import Linear, RMSNorm, apply_linear

CHECK = """
import torch
from llama_flex.kernels import cpu as kernel
from test_cpu import check_product
assert kernel.load() and torch.backends.cpu.get_cpu_capability() == {capability!r}
for n, dtype in enumerate(kernel.DTYPES):
    for rows, out, k in ((1, 1, 1), (3, 50, 127), (8, 33, 576), (5, 6, 65)):
        for gated in (False, True):
            parts = (n + rows) % 2 == 0, rows != 3, out != 50, gated
            check_product(dtype, rows, 2 * out if gated else out, k, *parts, rows)
"""


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """Load the kernel, whichever test comes first."""
    assert kernel.load()


def check_product(
    dtype: torch.dtype, rows: int, out: int, k: int, bias: bool, norm: bool, residual: bool, gated: bool, seed: int
) -> None:
    """Compare a product with float64: no further than rounding of what it reads, sums in float32, and one rounding."""
    draws = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws).to(dtype)

    x, weight = random(rows, k), (random(out, k) / math.sqrt(k)).to(dtype)
    b, n = random(out) if bias else None, random(k).abs() if norm else None
    r = random(rows, out // 2 if gated else out) if residual else None
    found = kernel.few_rows(x, weight, b, n, 1e-5, r, gated)
    wide = x.double()
    if n is not None:
        wide = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * n.double()).to(dtype).double()
    exact = wide @ weight.double().T + (0 if b is None else b.double())
    size = wide.abs() @ weight.double().abs().T + 1  # of what is summed
    if gated:
        gate, up = exact.chunk(2, -1)
        size = (size.chunk(2, -1)[0] + 1) * (size.chunk(2, -1)[1] + 1)
        exact = torch.nn.functional.silu(gate) * up
    exact = exact + (0 if r is None else r.double())
    # A norm may round to the number next to the one that float64 rounds to.
    unit = torch.finfo(torch.float32).eps * math.sqrt(k) + (torch.finfo(dtype).eps / 8 if norm else 0)
    bound = unit * size + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= bound).all()


@given(
    dtype=st.sampled_from(kernel.DTYPES),
    rows=st.integers(1, kernel.ROWS),
    out=st.integers(1, 70),
    k=st.integers(1, 700),
    bias=st.booleans(),
    norm=st.booleans(),
    residual=st.booleans(),
    gated=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_a_product_of_any_shape_is_that_of_float64(dtype, rows, out, k, bias, norm, residual, gated, seed):
    assert kernel.load()
    check_product(dtype, rows, 2 * out if gated else out, k, bias, norm, residual, gated, seed)


def test_the_check_finds_a_column_that_is_left_out(monkeypatch):
    few_rows = kernel.few_rows

    def without_the_last(x, weight, *rest):
        return few_rows(torch.cat((x[:, :-1], torch.zeros_like(x[:, :1])), 1), weight, *rest)

    monkeypatch.setattr(kernel, "few_rows", without_the_last)
    with pytest.raises(AssertionError):
        check_product(torch.bfloat16, 2, 64, 128, False, False, False, False, 0)


@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_a_row_has_the_same_bits_in_any_company(dtype):
    x, weight, norm = torch.randn(8, 577).to(dtype), torch.randn(131, 577).to(dtype), torch.rand(577).to(dtype)
    for gated in (False, True):
        weights = weight[:130] if gated else weight
        together = kernel.few_rows(x, weights, None, norm, 1e-6, None, gated)
        for first in range(8):
            for last in range(first + 1, 9):
                some = kernel.few_rows(x[first:last], weights, None, norm, 1e-6, None, gated)
                assert torch.equal(some, together[first:last])


@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_nan_and_infinity_reach_the_rows_that_have_them_and_no_others(dtype):
    x, weight = torch.ones(4, 40, dtype=dtype), torch.ones(6, 40, dtype=dtype)
    x[1, 3], x[2, 39] = torch.nan, torch.inf
    y = kernel.few_rows(x, weight, None)
    assert y.isnan().tolist() == [[n == 1] * 6 for n in range(4)]
    assert y.isinf().tolist() == [[n == 2] * 6 for n in range(4)]


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_vectors_and_plain_code_give_the_same(capability):
    if sys.platform != "linux":
        pytest.skip("torch names other capabilities")
    folders = [os.path.dirname(__file__), os.getcwd()]
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(folders)}
    script = CHECK.format(capability=capability.upper())
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@torch.no_grad()
def test_what_the_kernel_has_no_code_for_is_left_to_torch():
    module, norm = Linear(8, [6]), RMSNorm(8, 1e-6)
    x = torch.randn(1, 2, 8)
    assert linear.can_fuse(x, module.weight)
    assert not linear.can_fuse(x.double(), module.weight.double())
    assert not linear.can_fuse(x.bfloat16(), module.weight)
    assert not linear.can_fuse(x[:, :0], module.weight)
    assert not linear.can_fuse(torch.randn(1, kernel.ROWS + 1, 8), module.weight)
    with torch.enable_grad():
        assert not linear.can_fuse(x, module.weight)
    assert apply_linear(module, x[:, :0], norm=norm).shape == (1, 0, 6)
    torch.testing.assert_close(module.double()(x.double()), torch.nn.functional.linear(x.double(), module.weight))


def test_a_strided_row_or_weight_is_read_as_it_is():
    weight, x = torch.randn(9, 7).T, torch.randn(9, 3).T
    with torch.no_grad():
        torch.testing.assert_close(linear.matmul(x[None], weight, None)[0], x @ weight.T)


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """Let the kernel be built anew, in a folder of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel, "loaded", False)
    kernel.load.cache_clear()
    yield tmp_path / "cache"
    kernel.load.cache_clear()
    monkeypatch.undo()
    assert kernel.load()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_computes_and_one_line_says_so(unloaded, monkeypatch, compiler, tiny_pair):
    monkeypatch.setenv("CXX", compiler)
    model = tiny_pair("gqa")[1]
    engine = Engine(model, backend="dense")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            (done,) = engine.generate([[5, 6, 7]], max_new_tokens=4, stop_token_ids=())
    (warning,) = [str(w.message) for w in caught if "few rows" in str(w.message)]
    assert warning.count("\n") == 0
    assert ("install g++, or set CXX" in warning) == (compiler != "false")
    assert not list(unloaded.rglob("*.so"))
    assert "torch's" in kernel.describe()
    logits = model(torch.tensor([[5, 6, 7, *done.tokens[:-1]]]), backend="dense")
    assert logits[0, 2:].argmax(-1).tolist() == done.tokens


def test_a_damaged_file_is_built_again_and_a_whole_one_is_kept(unloaded):
    path = kernel._build()
    made = path.stat().st_mtime_ns
    assert kernel._build() == path
    assert path.stat().st_mtime_ns == made
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.unlink()
    path.write_bytes(b"damaged")
    assert kernel.load()
    assert path.stat().st_size > 1000


@pytest.mark.exhaustive
def test_a_compiled_step_reads_its_weights_by_the_kernel(tiny_pair, monkeypatch):
    model, calls = tiny_pair("gqa")[1], []
    few_rows = kernel.few_rows

    def counted(*given):
        calls.append(len(given[0]))
        return few_rows(*given)

    monkeypatch.setattr(kernel, "few_rows", counted)
    with torch.compiler.set_stance("force_eager"):
        Engine(model, compile=True, backend="dense").generate([[5, 6]], max_new_tokens=2, stop_token_ids=())
    assert calls.count(1) >= 4 * len(model.layers)
