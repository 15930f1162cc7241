"""The package has no hidden dependency, patches nothing, falls back to nothing and swallows no exception."""

import ast
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CUDA_ONLY, few
from torch.nn.attention import flex_attention as flex_module

import llama_flex
from llama_flex import Mask

PACKAGE = Path(llama_flex.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in FILES}
MODULES = [".".join(("llama_flex", *Path(name).with_suffix("").parts)).removesuffix(".__init__") for name in TREES]
FORBIDDEN = ("transformers", "accelerate", "triton", "cuda", "flash_attn", "xformers")
IMPORTING_THEM = "kernels/cuda_cpp.py", "kernels/few_rows.py", "kernels/gemv.py"  # Triton or CUDA's bindings
PARITY = "eval/parity.py"  # compares with transformers: imported by nothing else of the package
# Import what only extras bring.
LAZY = (
    *(f"llama_flex.kernels.{name}" for name in CUDA_ONLY),
    *("llama_flex.eval.lm_eval", "llama_flex.eval.parity"),
)


def run(code: str) -> str:
    """Return what `code` prints in a fresh interpreter, without the modules that the tests import."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def parse(source: str) -> ast.Module:
    return ast.parse(source)


# --- no hidden dependency ---


def imported(tree: ast.Module) -> set[str]:
    """Return the top-level names of modules that are imported anywhere in a file, by import_module too, except relative
    ones."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and not argument.value.startswith("."):
                names.add(argument.value.split(".")[0])
    return names


def last_name(node: ast.AST) -> str | None:
    """Return `c` of `a.b.c`, or of `c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("name", TREES)
def test_no_file_imports_what_the_package_does_without(name):
    allowed = {**{file: {"triton", "cuda"} for file in IMPORTING_THEM}, PARITY: {"transformers"}}
    assert imported(TREES[name]) & set(FORBIDDEN) <= allowed.get(name, set())


@pytest.mark.parametrize(
    "source",
    [
        "import transformers",
        "def f():\n    from transformers.models.llama import modeling_llama",
        "try:\n    import torch, accelerate.utils as u\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('triton.language')",
        "__import__('xformers')",
    ],
)
def test_the_scan_of_imports_finds(source):
    assert imported(parse(source)) & set(FORBIDDEN)


def imported_at_once(node: ast.AST) -> set[str]:
    """Return the last names of all that is imported outside of functions, and so when the module is imported."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            names |= {alias.name.split(".")[-1] for alias in child.names}
            names |= {(getattr(child, "module", None) or "").split(".")[-1]}
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            names |= imported_at_once(child)
    return names


@pytest.mark.parametrize("name", TREES)
def test_imports_that_need_triton_or_an_extra_are_lazy(name):
    at_once = imported_at_once(TREES[name])
    assert not at_once & set(CUDA_ONLY) or Path(name).stem in CUDA_ONLY
    assert "lm_eval" not in at_once or name == "eval/lm_eval.py"
    assert "parity" not in at_once


@pytest.mark.parametrize(
    "source",
    [
        "from .gemv import gemv",
        "from . import gemv",
        "from llama_flex.kernels import gemv as kernel",
        "import llama_flex.kernels.gemv",
        "try:\n    from .kernels.gemv import gemv\nexcept ImportError:\n    pass",
        "if torch.cuda.is_available():\n    from .kernels.gemv import gemv",
        "class A:\n    from .kernels.gemv import gemv",
    ],
)
def test_the_scan_of_imports_at_once_finds(source):
    assert "gemv" in imported_at_once(parse(source))
    in_a_function = "def f():\n" + "".join(f"    {line}\n" for line in source.splitlines())
    assert not imported_at_once(parse(in_a_function))


@pytest.fixture(scope="module")
def fresh() -> dict:
    """Return what a fresh interpreter finds after importing every module and generating a few tokens."""
    return ast.literal_eval(
        run(f"""
import importlib, sys, warnings
warnings.simplefilter("ignore")
import torch, safetensors.torch, tokenizers, sentencepiece, jinja2, huggingface_hub, numpy, tqdm
from torch.nn.attention import flex_attention as flex
by_dependencies = set(sys.modules)

# torch itself replaces torch.manual_seed and nn.Module.__init__ when dynamo is first used, as flex_attention does
flex.flex_attention(*torch.zeros(3, 1, 1, 1, 16))

def functions():
    places = (torch, torch.nn, torch.nn.functional, torch.Tensor, torch.nn.Module, flex, flex.BlockMask)
    return {{(place.__name__, n): v for place in places for n, v in vars(place).items() if callable(v)}}

def state():
    return (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), warnings.filters[:],
    )

before, state_before = functions(), state()
for name in {[name for name in MODULES if name not in LAZY]!r}:
    importlib.import_module(name)
from llama_flex import Engine, Llama, LlamaConfig, Sampling
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
Engine(Llama(config).eval()).generate([[1, 2, 3]], max_new_tokens=3, sampling=Sampling())
after, state_after = functions(), state()
print({{
    "by_package": sorted({{n.split(".")[0] for n in set(sys.modules) - by_dependencies}}),
    "by_dependencies": sorted({{n.split(".")[0] for n in by_dependencies}}),
    "of_package": sorted(n for n in sys.modules if n.split(".")[0] == "llama_flex"),
    "changed": sorted(name for name in before if after.get(name) is not before[name]),
    "compared": sorted(name for _, name in before),
    "state": [str(a) + " -> " + str(b) for a, b in zip(state_before, state_after) if a != b],
}})
""")
    )


def test_no_module_of_the_package_loads_what_it_does_without(fresh):
    assert not set(fresh["by_package"]) & set(FORBIDDEN)
    assert "transformers" not in fresh["by_dependencies"]
    assert "accelerate" not in fresh["by_dependencies"]
    assert set(fresh["of_package"]) == set(MODULES) - set(LAZY)


def test_every_public_name_is_there():
    for name in llama_flex.__all__:
        assert getattr(llama_flex, name).__module__.startswith("llama_flex.")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llama_flex.no_such_name


# --- no patching ---

ALLOWED = {
    ("generate.py", "warnings.showwarning"),  # documented as a hook
    ("generate.py", "sys.stderr"),  # becomes the null device where it is closed
    ("kernels/code_cache.py", "os.environ[_NAME]"),  # where torch keeps compiled code
    ("eval/check_mask.py", "sys.modules[_MODULE]"),  # the user's file, imported by the command
}


def patches(tree: ast.Module) -> set[str]:
    """Return attributes of imported names that a file assigns or deletes, by `=`, setattr, delattr or `vars()`."""
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            foreign |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}

    def base(node: ast.AST) -> str | None:
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id if isinstance(node, ast.Name) else None

    found = set()
    for node in ast.walk(tree):
        stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        if isinstance(node, ast.Attribute) and stored and base(node) in foreign:
            found.add(ast.unparse(node))
        # An item of a plain name is an item of a local object; of `vars(module)` or `module.__dict__` it is a patch.
        held = isinstance(node, ast.Subscript) and stored and not isinstance(node.value, ast.Name)
        if held and base(node) in {*foreign, "globals", "vars"}:
            found.add(ast.unparse(node))
        if isinstance(node, ast.Call) and last_name(node.func) in ("setattr", "delattr", "__setattr__") and node.args:
            target = node.args[0]
            if ast.unparse(node.func).startswith("super()."):  # a class extends its own attribute access
                continue
            if base(target) in foreign or (isinstance(target, ast.Name) and target.id != "self"):
                found.add(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", TREES)
def test_no_file_assigns_to_what_it_imports(name):
    assert {found for found in patches(TREES[name]) if (name, found) not in ALLOWED} == set()


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.nn.functional.scaled_dot_product_attention = None",
        "import torch.nn.functional as F\nF.silu = lambda x: x",
        "from torch.nn import functional\nfunctional.silu, a = 1, 2",
        "from transformers import LlamaAttention\nLlamaAttention.forward = f",
        "import torch\nsetattr(torch.nn.Linear, 'forward', f)",
        "import torch\ndel torch.nn.Linear.forward",
        "from . import attention\nattention.attend = f",
        "import torch\nvars(torch)['cat'] = f",
        "import torch\ntorch.__dict__['cat'] = f",
        "import torch\nwith f() as torch.cat:\n    pass",
        "import torch\nfor torch.cat in x:\n    pass",
        "def bind(layer):\n    setattr(layer, 'forward', f)",
    ],
)
def test_the_scan_of_patches_finds(source):
    assert patches(parse(source))


def test_torchs_functions_are_the_same_objects_after_import_and_generation(fresh):
    assert len(fresh["compared"]) > 1000
    assert {"flex_attention", "scaled_dot_product_attention", "silu", "compile", "vmap"} <= set(fresh["compared"])
    assert fresh["changed"] == []


def test_torchs_global_state_is_the_same_after_import_and_generation(fresh):
    assert fresh["state"] == []


# --- no fallback ---


def calls(name: str) -> list[str]:
    """Return the places in the package that call a function of this name, each `file:line`."""
    return [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and last_name(node.func) == name
    ]


def test_there_is_one_attention_call_in_the_package():
    assert len(calls("flex_attention")) == 1
    assert calls("flex_attention")[0].startswith("attention.py:")


def test_flex_attention_gets_no_other_name():
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "flex_attention" for alias in node.names):
                if (node.level, node.module) == (2, "kernels"):
                    continue  # the module that picks the kernel, not the function
                assert file == "attention.py"
                assert all(alias.asname is None for alias in node.names if alias.name == "flex_attention")
            if isinstance(node, ast.Assign) and last_name(node.value) == "flex_attention":
                pytest.fail(f"{file}:{node.lineno} renames flex_attention")


def test_no_other_attention_is_ever_named():
    for path in FILES:
        if path == PACKAGE / PARITY:
            continue  # the reference's own attention
        text = path.read_text()
        for name in ("scaled_dot_product_attention", "sdpa", "SDPA", "MultiheadAttention", "flash_attn", "xformers"):
            assert name not in text, f"{path.name} names {name}"


AROUND_ATTENTION = ("attention.py", "cache.py", "tokens.py", "kernels/", "masks/")
BUILDING = (
    "kernels/code_cache.py",  # a folder that cannot be written is replaced, with a warning
    "kernels/build.py",  # a missing compiler is reported once its work is missed
    "kernels/cpu.py",  # without a compiler torch's products run, with a warning; a damaged file is built again
)


@pytest.mark.parametrize("name", [n for n in TREES if n.startswith(AROUND_ATTENTION) and n not in BUILDING])
def test_nothing_is_caught_around_attention(name):
    """Check that an exception is caught only to be raised again, in words."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert isinstance(node.body[-1], ast.Raise), f"line {node.lineno}"
            others = ast.Return | ast.Continue | ast.Break | ast.Yield
            assert not any(isinstance(within, others) for within in ast.walk(node)), f"line {node.lineno}"
    assert "suppress" not in (PACKAGE / name).read_text()


@pytest.mark.parametrize("name", ["model.py", "layers.py"])
def test_the_model_tries_nothing(name):
    tried = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Try | ast.TryStar)]
    assert not tried, f"line {tried[0].lineno}"
    assert "suppress" not in (PACKAGE / name).read_text()


CATCHING = (
    "engine/scheduler.py",  # an error in a request's callback ends that request
    "engine/processing.py",  # and so does one in its logits processors
)


def only_raises(handler: ast.ExceptHandler) -> bool:
    """Tell whether all that a handler does is to raise, whatever it may decide by."""
    statements = [node for node in ast.walk(handler) if isinstance(node, ast.stmt)]
    return isinstance(handler.body[-1], ast.Raise) and all(isinstance(node, ast.Raise | ast.If) for node in statements)


@pytest.mark.parametrize("name", [n for n in TREES if n.startswith("engine/") and n not in CATCHING])
def test_the_engine_catches_nothing_but_to_say_what_is_wrong(name):
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.ExceptHandler) or only_raises(node), f"line {node.lineno}"


def test_an_error_in_attention_reaches_the_caller(tiny_pair):
    """Check that attention that fails is not replaced by another one."""

    def broken(q, kv):
        if kv._tokens.index.numel() > 1:  # not in the trial with one token that comes before any work
            raise RuntimeError("a mask that cannot be computed")
        return kv.index <= q.index

    _, model = tiny_pair("gqa")
    for backend in ("flex", "dense"):
        with torch.no_grad(), pytest.raises(ValueError, match=r"mask broken raises .*cannot be computed"):
            model(torch.tensor([[1, 2, 3]]), mask=Mask(broken), backend=backend)


def test_an_unknown_backend_is_refused(tiny_pair):
    _, model = tiny_pair("gqa")
    with torch.no_grad(), pytest.raises(ValueError, match=r"'eager'.*'flex' or 'dense'"):
        model(torch.tensor([[1, 2, 3]]), backend="eager")


def test_flex_is_what_runs_unless_dense_is_asked_for(tiny_pair, monkeypatch):
    from llama_flex import attention

    ran = []
    real = attention.flex_attention
    monkeypatch.setattr(attention, "flex_attention", lambda *a, **k: ran.append(1) or real(*a, **k))
    _, model = tiny_pair("gqa")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
        assert len(ran) == model.config.num_hidden_layers
        model(torch.tensor([[1, 2, 3]]), backend="dense")
    assert len(ran) == model.config.num_hidden_layers
    assert real is flex_module.flex_attention


# --- masks that return a Python bool ---

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
PREDICATES = {
    "True": (lambda q, kv: True, lambda q, kv: kv.index > -2),
    "False": (lambda q, kv: False, lambda q, kv: kv.index < -2),
    "causal & True": (lambda q, kv: (kv.index <= q.index) & True, lambda q, kv: kv.index <= q.index),
    "True & causal": (lambda q, kv: True & (kv.index <= q.index), lambda q, kv: kv.index <= q.index),
    "causal | False": (lambda q, kv: (kv.index <= q.index) | False, lambda q, kv: kv.index <= q.index),
    "causal & False": (lambda q, kv: (kv.index <= q.index) & False, lambda q, kv: kv.index < -2),
    "not False": (lambda q, kv: not False, lambda q, kv: kv.index > -2),
}


def with_mask(model, mask, backend: str, cached: bool = False) -> torch.Tensor:
    """Return the logits of IDS with a mask; `cached`: of its sixth token, after a step that filled a cache."""
    with torch.no_grad():
        if not cached:
            return model(IDS, mask=mask, backend=backend)
        cache = model.new_cache(2, 16)
        model(IDS[:, :5], cache=cache, mask=mask, backend=backend)
        return model(IDS[:, 5:6], cache=cache, mask=mask, backend=backend)


@pytest.mark.parametrize(
    ("name", "cached"), [*((name, False) for name in PREDICATES), ("True", True), ("causal & True", True)]
)
def test_a_mask_may_return_a_python_bool(name, cached, tiny_pair):
    _, model = tiny_pair("gqa")
    returns_bool, returns_tensor = PREDICATES[name]
    expected = with_mask(model, Mask(returns_tensor), "dense", cached)
    assert expected.isfinite().all()
    for backend in ("flex", "dense"):
        ours = with_mask(model, Mask(returns_bool), backend, cached)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_masks_compared_above_differ(tiny_pair):
    _, model = tiny_pair("gqa")
    all_, none, causal = (with_mask(model, Mask(PREDICATES[n][0]), "flex") for n in ("True", "False", "causal & True"))
    for a, b in ((all_, none), (all_, causal), (none, causal)):
        assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("value", few([True], [False]))
def test_a_mask_that_returns_a_python_bool_combines_with_others(value, tiny_pair):
    from llama_flex import masks

    _, model = tiny_pair("gqa")
    constant, causal = Mask(lambda q, kv: value), masks.causal()
    tensor = Mask(lambda q, kv: (kv.index > -2) if value else (kv.index < -2))
    for backend in ("flex", "dense"):
        for combine in (
            lambda m, c: m & c,
            lambda m, c: c & m,
            lambda m, c: m | c,
            lambda m, c: c | m,
            lambda m, c: ~m | c,
            lambda m, c: ~m & c,
        ):
            ours = with_mask(model, combine(constant, causal), backend)
            expected = with_mask(model, combine(tensor, causal), "dense")
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


# --- no exception swallowed, nothing printed ---


def broad_handlers(tree: ast.Module) -> list[int]:
    """Return the lines of `except:`, `except Exception`, `except BaseException`, in tuples too, and of suppressing
    them."""
    broad = {"Exception", "BaseException"}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or last_name(kind) in broad for kind in kinds):
                lines.append(node.lineno)
        if isinstance(node, ast.Call) and last_name(node.func) == "suppress":
            lines += [node.lineno for argument in node.args if last_name(argument) in broad]
    return lines


@pytest.mark.parametrize("name", TREES)
def test_no_exception_is_caught_that_is_not_named(name):
    source = (PACKAGE / name).read_text().splitlines()
    lines = broad_handlers(TREES[name])
    if name == "text/backends.py":  # a library that raises nothing more precise: the line says so, and it is raised on
        assert len(lines) == 1
        lines = [n for n in lines if "# tokenizers raises nothing more precise" not in source[n - 1]]
        assert all("raise" in source[n] + source[n + 1] for n in broad_handlers(TREES[name]))
    if name in (
        "eval/check_mask.py",
        "engine/scheduler.py",
        "engine/processing.py",
    ):  # the user's function may raise anything; it is reported
        assert len(lines) == 1
        lines = [n for n in lines if "# noqa: BLE001  - runs the user's code" not in source[n - 1]]
    assert not lines


@pytest.mark.parametrize(
    "handler",
    ["except:", "except Exception:", "except (ValueError, BaseException) as e:", "except builtins.Exception:"],
)
def test_the_scan_of_handlers_finds(handler):
    assert broad_handlers(parse(f"try:\n    pass\n{handler}\n    pass"))


PRINTING = (
    "generate.py",
    "cli/",
    "text/chat_worker.py",
    "eval/check_mask.py",
    "eval/show_mask.py",
    "eval/parity.py",
)  # commands


def prints(tree: ast.Module) -> list[int]:
    """Return the lines that print, or use the standard streams for output."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        or (
            isinstance(node, ast.Attribute)
            and node.attr in ("stdout", "stderr", "__stdout__", "__stderr__")
            and last_name(node.value) == "sys"
        )
    ]


@pytest.mark.parametrize("name", [n for n in TREES if not n.startswith(PRINTING)])
def test_only_the_command_line_and_the_process_that_renders_print(name):
    assert not prints(TREES[name])


@pytest.mark.parametrize("source", ["print(1)", "import sys\nsys.stderr.write('x')", "from sys import stdout as s"])
def test_the_scan_of_prints_finds(source):
    if "from sys" in source:
        assert not prints(parse(source))  # is not found, so no file may import from sys
        assert not [
            n for t in TREES.values() for n in ast.walk(t) if isinstance(n, ast.ImportFrom) and n.module == "sys"
        ]
    else:
        assert prints(parse(source))


def test_every_exemption_above_is_needed():
    assert all(imported(TREES[file]) & set(FORBIDDEN) for file in IMPORTING_THEM)
    assert {(name, found) for name, tree in TREES.items() for found in patches(tree)} == ALLOWED
    for name in CATCHING:
        handlers = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ExceptHandler)]
        assert not all(map(only_raises, handlers)), name
    for place in PRINTING:
        assert any(prints(tree) for name, tree in TREES.items() if name.startswith(place)), place


# --- token ids of other kinds ---


def test_int32_ids_are_int64_ids(tiny_pair):
    _, model = tiny_pair("gqa")
    for backend in ("flex", "dense"):
        with torch.no_grad():
            expected = model(IDS, backend=backend)
            assert torch.equal(model(IDS.to(torch.int32), backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_positions_and_segments_may_be_of_either_integer_dtype(dtype, tiny_pair):
    _, model = tiny_pair("gqa")
    with torch.no_grad():
        options = {
            "lengths": torch.tensor([8, 8], dtype=dtype),
            "positions": torch.arange(8, dtype=dtype).expand(2, 8),
            "segments": torch.zeros(2, 8, dtype=dtype),
        }
        assert torch.equal(model(IDS, **options), model(IDS))


# torch's messages are clear enough; what matters is that none of these ids gives logits.
@pytest.mark.parametrize("backend", ["flex", "dense"])
@pytest.mark.parametrize(
    "ids",
    [IDS.float(), IDS.bool(), IDS.to("meta"), IDS + 512, IDS - 10],
    ids=["float", "bool", "meta", "too large", "negative"],
)
def test_ids_that_are_no_token_ids_never_give_logits(ids, backend, tiny_pair):
    _, model = tiny_pair("gqa")
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError, IndexError)):
        model(ids, backend=backend)


def test_a_refused_call_leaves_the_cache_as_it_was(tiny_pair):
    _, model = tiny_pair("gqa")
    with torch.no_grad():
        cache = model.new_cache(2, 16)
        model(IDS[:, :5], cache=cache)
        before = copy.deepcopy(cache)
        for bad in ({"lengths": torch.tensor([1])}, {"positions": IDS}, {"logits_to_keep": 9}, {"backend": "eager"}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                model(IDS[:, 5:7], cache=cache, **bad)
        assert cache.reserved == before.reserved
        assert torch.equal(cache.length, before.length)
        assert torch.equal(cache.tokens.index, before.tokens.index)
        assert model(IDS[:, 5:], cache=cache).shape == (2, 3, 512)
