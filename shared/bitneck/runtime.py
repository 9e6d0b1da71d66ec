"""ONNX Runtime: a file with one input and one output, and a pool that loads equal files once."""

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bitneck.errors import InvalidConfig, ModelFailure

__all__ = ["CPU", "ModulePool", "OnnxModule", "check_providers", "return_freed_memory"]

CPU = ("CPUExecutionProvider",)
"""The execution providers that every build of ONNX Runtime has."""


def check_providers(providers: Sequence[str]) -> None:
    """Refuse execution providers that this build of ONNX Runtime lacks. It would run without them, and slowly.

    Raises:
        InvalidConfig: the message lists those that it has.
    """
    known = ort.get_available_providers()
    for name in providers:
        if name not in known:
            raise InvalidConfig(
                f"ONNX Runtime has no {name[:80]!r} here; it has: {', '.join(known)}. "
                "Install the package that brings it, such as onnxruntime-gpu or onnxruntime-openvino"
            )


class OnnxModule:
    """An ONNX file with one float32 input and one float32 output, batch axis first.

    ``run`` is thread-safe.

    Args:
        path: the file.
        threads: threads inside one operator; 0 lets ONNX Runtime take every core.
        providers: execution providers, the preferred one first.
        first_run_s: seconds that the first run may take; None for no limit. It is ended at the next operator.

    Raises:
        ModelFailure: ONNX Runtime cannot load it, or it has more than one input or output.
    """

    def __init__(
        self, path: Path, *, threads: int = 0, providers: Sequence[str] = CPU, first_run_s: float | None = None
    ) -> None:
        self.name = path.parent.name + "/" + path.name
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # A process has many sessions. Threads that spin while they wait would take the cores from each other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # ONNX Runtime has a format of its own, which nothing here checks.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        # A bundle has many small modules. An arena for each takes as much memory as their weights, and is no faster.
        options.enable_cpu_mem_arena = False
        try:
            self._session = ort.InferenceSession(path, options, providers=list(providers))
        except Exception as exc:  # ONNX Runtime raises a kind of its own for every status
            raise ModelFailure(f"{path}: ONNX Runtime cannot load it ({exc})") from exc
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelFailure(f"{path}: expected one input and one output, got {len(inputs)} and {len(outputs)}")
        self._input = inputs[0].name
        self._outputs = [outputs[0].name]
        self._first_run_s = first_run_s

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the module.

        Args:
            x: (N, ...) float32.

        Returns:
            (N, ...) float32.

        Raises:
            ModelFailure: ONNX Runtime refused the input, or the first run took too long.
        """
        if self._first_run_s is not None:
            return self._run_first(x, self._first_run_s)
        return self._run(x, None)

    def _run_first(self, x: NDArray[np.float32], limit_s: float) -> NDArray[np.float32]:
        """The first run, which is ended when it takes too long."""
        options = ort.RunOptions()
        timer = threading.Timer(limit_s, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            y = self._run(x, options)
        except ModelFailure as exc:
            if not options.terminate:
                raise
            raise ModelFailure(
                f"{self.name}: its first run took longer than {limit_s:g} s and was ended; this machine is too "
                "slow for it, or the file is not what it should be"
            ) from exc
        finally:
            timer.cancel()
        self._first_run_s = None
        return y

    def _run(self, x: NDArray[np.float32], options: ort.RunOptions | None) -> NDArray[np.float32]:
        try:
            (y,) = self._session.run(self._outputs, {self._input: x}, options)
        except Exception as exc:
            raise ModelFailure(f"{self.name}: ONNX Runtime failed on an input of shape {x.shape} ({exc})") from exc
        result: NDArray[np.float32] = y
        return result


class ModulePool:
    """ONNX files by their digest. A file that is in use is not loaded again.

    The pool keeps no module alive: unused modules are freed. Threads may share it.

    Args:
        providers: see `OnnxModule`.
        first_run_s: likewise.
    """

    def __init__(self, providers: Sequence[str] = CPU, first_run_s: float | None = None) -> None:
        self._providers = tuple(providers)
        self._first_run_s = first_run_s
        self._modules: WeakValueDictionary[tuple[str, int], OnnxModule] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._loading: dict[tuple[str, int], threading.Lock] = {}
        self._counts = threading.local()

    def load(self, path: Path, sha256: str, *, threads: int) -> OnnxModule:
        """The module of a file.

        Args:
            path: the file, if it has to be read.
            sha256: its digest.
            threads: see `OnnxModule`.

        Raises:
            ModelFailure: see `OnnxModule`.
        """
        key = sha256, threads
        with self._lock:
            if (module := self._modules.get(key)) is not None:
                return module
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:  # of this file alone: a disk that does not answer holds up nobody who needs another one
            try:
                with self._lock:
                    module = self._modules.get(key)
                if module is None:
                    module = OnnxModule(path, threads=threads, providers=self._providers, first_run_s=self._first_run_s)
                    self._counts.loads = self.loads + 1
                    with self._lock:
                        self._modules[key] = module
            finally:
                with self._lock:
                    self._loading.pop(key, None)
            return module

    @property
    def loads(self) -> int:
        """Files that this thread has read."""
        return int(getattr(self._counts, "loads", 0))


def return_freed_memory() -> None:
    """Give freed memory back to the system. Otherwise glibc keeps it after loading, half as much as the weights."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
