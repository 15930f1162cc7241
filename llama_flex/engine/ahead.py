"""Compile decode steps in a thread, while a stream goes on with uncompiled ones."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import sys
import threading
import time

import torch
from torch import Tensor

from ..cache import Cache
from ..masks.plan import AttentionPlan
from .batch import Batch
from .kinds import Kinds
from .model_runner import ModelRunner

# Seconds for which a thread may keep Python while another waits for it: the compiler does not give it up by itself,
# and a token needs it several times.
_SWITCH_INTERVAL = 0.0005
_compiling = threading.Lock()
# Modules with functions that return holding a lock, and how often to wait for a thread to leave them.
_ACQUIRING, _TRIES = ("logging", "threading", "importlib._bootstrap"), 1000
_UNDISTURBED = 0.05  # seconds of Python that it takes, with much to spare, to see where a thread stands and to end it


class CompileAhead(Batch):
    """The compilation of decode steps in a thread of their own: it runs one, on memory of its own."""

    def __init__(
        self, runner: ModelRunner, plan: AttentionPlan, cache: Cache, kinds: Kinds, adapters: Tensor | None = None
    ) -> None:
        """Begin. cache: of the size that the steps will have. adapters: see `Llama.step`."""
        super().__init__(runner, cache.batch_size)
        self._plan, self._slots, self._kinds = plan, cache.max_length, kinds
        self._adapters = adapters
        self._bytes = sum(kv.k.nbytes + kv.v.nbytes for kv in cache.layers)
        self._kv_dtype = cache.layers[0].kv_dtype
        self._thread = threading.Thread(target=self._compile, name="llama_flex compiles ahead", daemon=True)
        atexit.register(self._abandon)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the compiler."""
        self._thread.join()

    def _abandon(self) -> None:
        """End the compiler: a thread that still runs aborts an interpreter that ends."""
        end_thread(self._thread)

    @torch.no_grad()
    def _compile(self) -> None:
        device = self.model.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with _compiling, torch.cuda.stream(stream):
            interval = sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_INTERVAL)
            try:
                # Whoever runs such a step next meets an error, such as one of the compiler, or has the memory.
                with contextlib.suppress(ValueError, torch.OutOfMemoryError):
                    if stream is None or self._bytes < torch.cuda.mem_get_info(device)[0] // 2:
                        self._step()
            finally:
                sys.setswitchinterval(interval)
                if stream is not None:
                    stream.synchronize()
                atexit.unregister(self._abandon)

    def _step(self) -> None:
        rows = self.batch_slots
        cache = self.model.new_cache(rows, self._slots, kv_dtype=self._kv_dtype)
        self._make_tables(self._kinds)
        buffers = self._new_buffers(rows, {"count": (torch.int32, (rows,))})
        ids, positions, segments = self._newest_tokens(buffers)
        count = buffers.inputs.on_device["count"]
        with cache.appending(1):
            x, _ = self.runner.step(ids, count, positions, segments, self._plan, cache, adapters=self._adapters)
            self._sample(x, buffers, self._kinds, self._adapters)
        if self._kinds.split:
            self._draw(buffers, self._kinds, [], replays=False)


def end_thread(thread: threading.Thread) -> None:
    """End a thread by an exception where it stands in Python, and wait for it.

    It is left to run while it stands in code of `_ACQUIRING`: between acquiring a lock and entering the `try` that
    releases it, an exception would keep the lock, and what torch logs at exit would wait for it for ever.
    """
    ident, exception, left = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit), _TRIES
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_UNDISTURBED)
    try:
        while thread.is_alive():
            time.sleep(_SWITCH_INTERVAL)  # from here on the thread waits for Python for the new interval
            if left and _module_of(thread) in _ACQUIRING:  # a thread that waits there is ended after all
                left -= 1
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, exception)
                thread.join(1)
    finally:
        sys.setswitchinterval(interval)


def _module_of(thread: threading.Thread) -> str | None:
    """Return the module whose code a thread runs. No frame is kept: it would keep what the thread should let go of."""
    frame = sys._current_frames().get(thread.ident or 0)
    return None if frame is None else frame.f_globals.get("__name__")
