"""Records the kernel launches of Triton's own launch path for an architecture that is not present.

A stand-in driver names the architecture, and uninitialized CPU tensors replace the device's.  Triton binds the arguments,
specializes the kernel on them (integers equal to 1 or divisible by 16, alignment of pointers) and compiles it; nothing is
launched.  Use it in a child process (:mod:`.worker`): the replaced driver stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A compiled launch of a jitted function, with its compile-time arguments and what Triton returned."""

    kernel: str
    constants: Mapping[str, Any]
    compiled: Any


@dataclass
class Recorder:
    """The stand-in driver, and the launches since the last :meth:`start`."""

    architecture: str = ""
    launches: list[Launch] = field(default_factory=list)
    target: Any = None

    def start(self, architecture: str) -> None:
        """Selects the architecture of the following launches and forgets the earlier ones."""
        from triton.backends.compiler import GPUTarget

        is_amd = architecture.startswith("gfx")
        target = ("hip", architecture, 64) if is_amd else ("cuda", int(architecture.removeprefix("sm_")), 32)
        self.architecture, self.target = architecture, GPUTarget(*target)
        self.launches.clear()

    def get_current_target(self) -> Any:
        """Returns the target, as Triton's drivers do."""
        return self.target

    def get_current_device(self) -> int:
        """Returns 0."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Returns the default stream."""
        return 0


def install_recorder() -> Recorder:
    """Replaces Triton's driver and launches for the rest of this process."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from tritontower.kernels.runtime import config as configs
    from tritontower.kernels.runtime import dispatch

    recorder = Recorder()
    driver.set_active(recorder)
    run = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        named = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
        constants = {self.arg_names[index]: named.get(self.arg_names[index]) for index in self.constexprs}
        recorder.launches.append(Launch(self.fn.__name__, constants, compiled))
        return compiled

    JITFunction.run = record
    # setattr, because mypy rejects assignments to functions of a module.
    setattr(configs, "architecture", lambda device: recorder.architecture)  # noqa: B010
    setattr(dispatch, "backend_on", lambda device: "triton")  # noqa: B010
    return recorder
