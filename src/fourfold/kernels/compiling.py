"""Compiling the kernels that a model needs before it needs them, all side by side.

Which kernels those are, and for which types and constants each is compiled, only the launches of
the verbs know. So a *walk* does once what serving will do; its launches are noted and not made
(`noted_launches`), so that what they would read need not be there. What was noted is compiled in
other processes, because much of Triton's compiler is Python that holds the interpreter's lock, and
loaded here from Triton's cache on the disk.
"""

# mypy: disable-error-code="misc, no-any-return"
from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextvars import ContextVar
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from fourfold.errors import FourfoldError

MOST_PROCESSES = 16


class Specialization(NamedTuple):
    """One compiled form of one kernel, as Triton's compiler takes it."""

    module: str
    name: str
    key: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def is_cached(self) -> bool:
        """Whether the disk has it compiled."""
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.runtime.cache import get_cache_key, get_cache_manager

        backend = self._backend
        source = self.kernel.ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        options = backend.parse_options(self.options)
        key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
        file = f"{source.name[:150]}.json"
        files = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(file)
        return files is not None and file in files

    def compiled(self) -> Any:
        """Compiles it or loads it from the disk; later launches find it."""
        # What `JITFunction.preload` does; that one takes constants like "int8" for types.
        return self.kernel._do_compile(
            self.key,
            self.signature,
            _driver().get_current_device(),
            self.constants,
            self._backend.parse_options(self.options),
            self.attributes,
            warmup=True,
        )

    @property
    def kernel(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)

    @property
    def _backend(self) -> Any:
        return self.kernel.device_caches[_driver().get_current_device()][3]


_Noted = dict[tuple[str, str, str], Specialization]
_noted: ContextVar[_Noted | None] = ContextVar("noted launches", default=None)


class _Zeros(TorchFunctionMode):
    """Fresh memory is zeros: what kernels would have written there is read as indices."""

    _FRESH = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in self._FRESH else made


def tell_of_late_kernels(tell: Callable[[str], None]) -> None:
    """From now on calls `tell` with the name of each kernel that a launch had to wait for, because
    it was not compiled or loaded before."""
    from triton import knobs

    def compiled(*, fn: Any, is_manual_warmup: bool, **_: object) -> None:
        if not is_manual_warmup:
            tell(fn.name)

    knobs.runtime.jit_post_compile_hook = compiled


@contextlib.contextmanager
def noted_launches() -> Iterator[_Noted]:
    """Launches of this thread are noted, those of other threads are made as always. Forms that were
    compiled already are not noted. Memory that this thread allocates is zeros."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    assert knobs.runtime.jit_cache_hook is None, "one walk at a time"

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        only = warmup or _noted.get() is not None
        return run(self, *args, grid=grid, warmup=only, **options)

    noted: _Noted = {}
    token = _noted.set(noted)
    # Triton has a hook before compiling, but none that keeps a compiled kernel from running.
    JITFunction.run = compile_only
    knobs.runtime.jit_cache_hook = _note
    try:
        with _Zeros():
            yield noted
    finally:
        knobs.runtime.jit_cache_hook = None
        JITFunction.run = run
        _noted.reset(token)


def _note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
    """Triton's hook before it compiles; true keeps it from doing so."""
    noted = _noted.get()
    if noted is None:
        return False
    options = json.loads(compile["specialization_data"])["options"]
    form = Specialization(
        fn.module,
        fn.name,
        compile["key"],
        compile["signature"],
        compile["constants"],
        compile["configs"][0],
        {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()},
    )
    noted[form[:3]] = form
    return True


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a walk needed."""

    kernels: int
    compiled: int
    """Of them, those that were not cached on the disk."""
    walk_s: float
    """Seconds that the walk took."""
    compile_s: float
    """Seconds until everything was compiled and loaded after that."""


class KernelCompiler:
    """Compiles what one walk needs, beside whatever else the process does.

    Make it before the GPU is used where you can: it forks, and a process that has used a GPU had
    better not. Leave it as a context, or the process it forked is waited for when this one ends.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection))
        self._process.start()
        theirs.close()
        self._thread: threading.Thread | None = None
        self._compiled: Compiled | None = None
        self._error: BaseException | None = None

    def start(self, walk: Callable[[], None], device: torch.device) -> None:
        """Does a walk in a thread of its own and compiles what it needs for this GPU. Returns at
        once."""
        self._thread = threading.Thread(
            target=self._work, args=(walk, device), name="compile kernels", daemon=True
        )
        self._thread.start()

    def wait(self) -> Compiled:
        """Waits until all kernels are compiled and loaded; raises what the walk or the compiler
        raised."""
        assert self._thread is not None, "nothing was started"
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._compiled is not None
        return self._compiled

    def close(self) -> None:
        """Ends the other processes."""
        self._connection.close()
        self._process.join()

    def __enter__(self) -> KernelCompiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, walk: Callable[[], None], device: torch.device) -> None:
        try:
            torch.cuda.set_device(device)
            started = time.perf_counter()
            with noted_launches() as noted:
                walk()
            walked = time.perf_counter()
            compiled = self._compile(list(noted.values()))
            seconds = time.perf_counter() - walked
            self._compiled = Compiled(len(noted), compiled, walked - started, seconds)
        except BaseException as error:
            self._error = error

    def _compile(self, forms: Sequence[Specialization]) -> int:
        """Compiles and loads, and tells how many were not cached."""
        cached: list[Specialization] = []
        missing: list[Specialization] = []
        for form in forms:
            (cached if form.is_cached else missing).append(form)
        if missing:
            self._connection.send((_driver().get_current_target(), missing))
        for form in cached:
            _ = form.compiled().run  # which loads it onto the GPU
        for _ in missing:
            try:
                place = self._connection.recv()
            except EOFError:
                raise FourfoldError(
                    "the process that compiles kernels has ended; what it said is above"
                ) from None
            if isinstance(place, BaseException):
                raise place
            _ = missing[place].compiled().run
        return len(missing)


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def _serve(connection: Connection, parents: Connection) -> None:
    """The process from which those that compile are forked: it has one thread and no GPU."""
    parents.close()
    gc.freeze()  # what was forked with us may be a GPU's, which cannot be freed here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in ("triton.compiler", "triton.experimental.gluon"):
        importlib.import_module(module)  # while there is nothing else to do
    try:
        target, forms = connection.recv()
    except EOFError:
        return
    for form in forms:
        _ = form.kernel.cache_key  # what is hashed here need not be in each of them
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, max(1, len(forms)))
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _compile_for, (target,)) as pool:
        places = {pool.submit(_compile_form, form): place for place, form in enumerate(forms)}
        for done in as_completed(places):
            try:
                connection.send(done.exception() or places[done])
            except OSError:  # nobody waits any more
                # Without waiting, the pool's thread and its processes wait for each other.
                pool.shutdown(cancel_futures=True)
                return


def _compile_for(target: Any) -> None:
    """Makes Triton compile for a GPU that this process does not use."""
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Target(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_device(self) -> int:
            return 0

        def get_current_target(self) -> Any:
            return target

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_active_torch_device(self) -> torch.device:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    driver.set_active(Target())


def _compile_form(form: Specialization) -> None:
    """Compiles a kernel, and the C code that launches it, into Triton's cache."""
    from triton.backends.nvidia.driver import CudaLauncher

    kernel = form.compiled()
    CudaLauncher(kernel.src, kernel.metadata)
