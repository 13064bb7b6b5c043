"""How PyTorch computes: device, threads and precision; functions compiled, or traced into NumPy."""

import ctypes
import inspect
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import FunctionType

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from common import fail

# for --torch-deterministic; cuBLAS reads it once in a process
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
MOST_THREADS = min(4, torch.get_num_threads())  # before a run sets them
# what to_numpy knows of PyTorch, by the names of its ATen operators
OPERATIONS = {
    "add": "{0} + {1}",
    "addcmul": "{0} + {1} * {2}",
    "addmm": "{1} @ {2} + {0}",
    "argmax": "np.argmax({0}, {1})",
    "clamp": "np.minimum(np.maximum({0}, {1}), {2})",
    "div": "{0} / {1}",
    "exp": "np.exp({0})",
    "fmax": "np.fmax({0}, {1})",
    "fmin": "np.fmin({0}, {1})",
    "mul": "{0} * {1}",
    "relu": "np.maximum({0}, 0)",
    "select": "{0}.take({2}, {1})",
    "sub": "{0} - {1}",
    "t": "{0}.T",
    "take": "{0}.take({1})",
    "tanh": "np.tanh({0})",
    "view": "{0}.reshape({1})",
}


def setup_torch(args, large: bool) -> torch.device:
    """Set threads, precision and determinism; return the device.

    For `large` networks auto takes CUDA, if there is any. For them, and for layers of 256 units,
    "medium" precision lets the CPU multiply with oneDNN, on some twice as fast as MKL; it is not
    kept where the error shows that products are in TF32 or bfloat16. (Convolutions of cuDNN take
    TF32 where they can, as is PyTorch's default.)
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        advice = "use --device cpu" if args.resume is None else "the run was begun on one"
        fail(f"--device cuda: PyTorch finds no CUDA device; {advice}")
    auto = "cuda" if large and torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    if args.bf16 and args.evaluate is None:
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            fail("--bf16: this GPU does not compute in bfloat16")
        native = torch.backends.mkldnn.is_available()
        native = native and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if platform.machine() == "x86_64":  # there oneDNN counts what it imitates with AVX-512
            native = native and torch.cpu._is_avx512_bf16_supported()
        if device.type == "cpu" and not native:
            print("--bf16: this processor has no bfloat16, which makes it far slower")
    args.num_threads = args.num_threads or (MOST_THREADS if large else 1)
    # Adam's averages of a dead unit decay below 1e-38, where arithmetic is far slower. Set before
    # PyTorch's threads begin, which inherit it
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.num_threads)
    home = os.path.dirname(os.path.realpath(np.__file__))
    for library in ThreadpoolController().lib_controllers:
        if library.filepath.startswith(home):  # NumPy's. Acting is for one thread: several would
            library.set_num_threads(1)  # wait where cores are busy, and round differently
    deterministic = device.type == "cuda" and args.torch_deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # an earlier run may differ
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel for each tensor
    if large and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**30)  # glibc gives memory back too readily: page faults cost a quarter
        libc.mallopt(-3, 2**25)  # of an update (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)
    # the compiler's advice to take it, and PyTorch 2.9's on how to set it
    warnings.filterwarnings("ignore", "TensorFloat32|Please use the new API settings")
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    wide = large or max(args.hidden_sizes, default=0) >= 256
    torch.set_float32_matmul_precision("medium" if wide else "highest")
    if (x @ x - x.double() @ x.double()).abs().max() > 1e-4:
        torch.set_float32_matmul_precision("highest")
    return device


def compile_function(function: Callable, args, device: torch.device) -> Callable:
    """Compile a plain function into one graph, unless with --no-compile or without a compiler.

    Guards check only a call's inputs, so what changes during a run must be an input; kernels are
    called from C++. Both together take a third off a small update.
    """
    # options chosen by timing: a resumed run might choose differently
    timed = {"shape_padding": False, "dynamic_scale_rblock": False}
    options = {"cpp_wrapper": True} if device.type == "cpu" else timed
    if args.compile:
        try:
            x = torch.zeros(2, device=device)
            torch.compile(lambda x: x + 1, fullgraph=True, options=options)(x)
        except Exception as error:  # its type depends on the version; it is not about `function`
            args.compile = False
            why = str(error).partition("\n")[0] or repr(error)
            print(f"running eagerly (no compiler? apt install g++ python3-dev): {why:.200}")
    if not args.compile:
        return function
    inputs = {"", *inspect.signature(function).parameters}  # "" is PyTorch's own state
    named = re.compile(r"\w*")  # of x, or of batch[0]
    options["guard_filter_fn"] = lambda guards: [named.match(x.name)[0] in inputs for x in guards]
    # compiled code is cached by code object: without the other guards, a second run in this process
    # would take the first one's, so each has a copy
    code, rest = function.__code__.replace(), (None, function.__defaults__, function.__closure__)
    function = FunctionType(code, function.__globals__, *rest)

    @cache
    def compiled() -> Callable:  # its first call takes seconds, in SAC and DQN long after the start
        with suppress(OSError):  # that nobody reads it, the run will notice
            tqdm.write(f"compiling {function.__name__}")
            sys.stdout.flush()
        return torch.compile(function, fullgraph=True, dynamic=False, options=options)

    return lambda *inputs: compiled()(*inputs)


class _NoNumbers(TorchDispatchMode):
    """Refuses what takes a number from a tensor: traced, it would stay what it is now.

    That is item(), float(), `if`; what tolist() and numpy() take is not seen.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in operator.tags:
            raise ValueError("a number taken from a tensor")
        return operator(*args, **kwargs or {})


@torch.random.fork_rng(devices=())  # tracing must not consume random numbers
def to_numpy(function: Callable, args, *examples: torch.Tensor) -> Callable:
    """Return `function`, of tensors shaped as `examples`, as one that returns NumPy arrays.

    On a few rows PyTorch takes several times as long as the arithmetic; NumPy's calls are cheaper.
    On the CPU `function` is therefore traced and written down in NumPy; weights keep sharing their
    memory. Elsewhere, with --no-compile or convolutions, and where that cannot be done or does not
    give the same for `examples`, `function` itself is called. Zeros as `examples` hide mistakes.
    """

    def untraced(*tensors: torch.Tensor) -> list[np.ndarray]:
        return [output.cpu().numpy() for output in function(*tensors)]

    if not args.compile or any(x.device.type != "cpu" for x in examples):
        return untraced
    names, inputs, lines = {"np": np, "inf": np.inf}, [], []
    try:
        with _NoNumbers():
            graph = make_fx(lambda *x: function(*x))(*examples)
        if any("convolution" in str(node.target) for node in graph.graph.nodes):
            return untraced  # NumPy has no equal
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                inputs.append(node.name)
                lines.append(f"{node.name} = {node.name}.numpy()")
            elif node.op == "get_attr":
                names[node.name] = getattr(graph, node.target).detach().numpy()
            elif node.op == "call_function":
                operation = OPERATIONS[node.target._schema.name.removeprefix("aten::")]
                assert not node.kwargs and len(node.args) == operation.count("{")
                lines.append(f"{node.name} = {operation.format(*node.args)}")
            else:
                lines.append(f"return {node.args[0]}")
        exec(f"def traced({', '.join(inputs)}):\n " + "\n ".join(lines), names)
        got, expected = names["traced"](*examples), untraced(*examples)
        # a resumed run must decide as it did at first: above rounding, below PPO's first means
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    except Exception as error:  # whatever the network does that cannot be traced
        print(f"acting in PyTorch, which is slower than in NumPy: {error!r:.60}")
        return untraced
    return names["traced"]
