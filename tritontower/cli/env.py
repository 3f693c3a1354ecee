"""Report versions, devices, the backend of each device, and known problems.

Exit code 1 if a known problem breaks something here.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tritontower import __version__
from tritontower.text_table import text_table

from .options import add_json

EXAMPLE = "tritontower env --json"

SUPPORTED = {
    "torch": ">=2.11,<2.16",
    "triton": ">=3.6,<3.10",
    "transformers": ">=5.17,<5.24",
    "huggingface-hub": ">=1.5,<3",
    "safetensors": ">=0.8,<0.9",
    "pillow": ">=12.3,<14",
    "numpy": ">=1.26,<3",
}
"""Supported releases; the same as the dependencies of the distribution."""

_BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
_VECTOR_FLAGS = ("avx2", "avx512f", "amx_int8", "sve", "asimd")


@dataclass(frozen=True)
class Accelerator:
    """A GPU that torch sees."""

    device: str
    name: str
    memory_bytes: int
    architecture: str
    backend: str


@dataclass(frozen=True)
class Finding:
    """A known problem, or a note if nothing is ``broken``."""

    problem: str
    remedy: str
    broken: bool = True


@dataclass(frozen=True)
class Environment:
    """The content of the report, in plain values, so that tests can describe any machine.

    ``gpu_driver`` is set if the machine has a GPU driver, seen by torch or not; ``variables`` are environment variables that
    change what runs.
    """

    python: str
    system: str
    packages: Mapping[str, str | None]
    import_errors: Mapping[str, str] = field(default_factory=dict)
    accelerators: Sequence[Accelerator] = ()
    gpu_driver: bool = False
    cpu_backend: str = "unknown"
    cpu_cores: int = 1
    cpu_threads: int = 1
    cpu_features: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; returns 1 if something is broken."""
    environment = observe()
    findings = find_problems(environment)
    broken = any(finding.broken for finding in findings)
    if arguments.json:
        report = {
            "tritontower": __version__,
            **asdict(environment),
            "findings": [asdict(finding) for finding in findings],
            "ok": not broken,
        }
        print(json.dumps(report, indent=2))
    else:
        print(describe(environment, findings))
    return 1 if broken else 0


def observe() -> Environment:
    """Inspects this machine; imports torch, triton and torchvision, each of which may fail."""
    packages = {name: _installed(name) for name in (*SUPPORTED, "torchvision")}
    errors = {name: error for name in ("torch", "triton", "torchvision") if (error := _import_error(name))}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=packages,
        import_errors=errors,
        gpu_driver=any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/kfd")),
        cpu_cores=cores,
        cpu_features=_cpu_features(),
        variables={name: value for name in ("TRITON_INTERPRET",) if (value := os.environ.get(name)) is not None},
        **({} if "torch" in errors else _observe_devices()),
    )


def _observe_devices() -> dict[str, Any]:
    import torch

    from tritontower.kernels.runtime.dispatch import backend_for

    accelerators = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found = torch.cuda.get_device_properties(device)
        rocm = str(getattr(found, "gcnArchName", ""))
        architecture = rocm.partition(":")[0] if rocm.startswith("gfx") else f"sm_{found.major}{found.minor}"
        backend = backend_for(torch.empty(0, device=device))
        accelerators.append(Accelerator(str(device), found.name, found.total_memory, architecture, backend))
    cpu = {"cpu_backend": backend_for(torch.empty(0)), "cpu_threads": torch.get_num_threads()}
    return {"accelerators": tuple(accelerators), **cpu}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _import_error(name: str) -> str | None:
    """The error of ``import name`` in one line; ``None`` if it works or is not installed."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        # Only torch is indispensable.
        return "it is not installed" if name == "torch" else None
    try:
        importlib.import_module(name)
    except Exception as error:  # a binary built for another torch raises whatever it meets first
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None


def _cpu_features() -> tuple[str, ...]:
    """Relevant instruction sets that Linux reports; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return tuple(flag for flag in (*_VECTOR_FLAGS, *_BFLOAT16_FLAGS) if flag in flags)


def find_problems(environment: Environment) -> list[Finding]:
    """Returns the known problems of ``environment``, broken ones first."""
    checks = (_check_releases, _check_imports, _check_gpus, _check_interpreter)
    findings = [finding for check in checks for finding in check(environment)]
    return sorted(findings, key=lambda finding: not finding.broken)


def _is_among(release: str | None, supported: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return release is not None and SpecifierSet(supported, prereleases=True).contains(release.partition("+")[0])


def _check_releases(environment: Environment) -> list[Finding]:
    findings = []
    for name, supported in SUPPORTED.items():
        release = environment.packages.get(name)
        if name == "triton" and release is None and not environment.accelerators:
            continue  # the CPU runs the torch reference
        if not _is_among(release, supported):
            problem = "is not installed" if release is None else f"{release} is outside {supported}"
            findings.append(Finding(f"{name} {problem}", f'pip install "{name}{supported}"'))
    return findings


def _check_imports(environment: Environment) -> list[Finding]:
    findings = []
    for name, error in environment.import_errors.items():
        release = environment.packages.get(name)
        if name == "torchvision":
            problem = (
                f"torchvision {release} does not import with torch {environment.packages.get('torch')} ({error}); "
                "transformers prefers it when it is installed, so its image processors fail"
            )
            remedy = "pip uninstall torchvision (it is not needed), or install the build made for this torch"
            findings.append(Finding(problem, remedy))
        elif release is not None:
            findings.append(Finding(f"{name} {release} does not import ({error})", f"reinstall {name}"))
    return findings


def _check_gpus(environment: Environment) -> list[Finding]:
    if environment.gpu_driver and not environment.accelerators:
        torch = environment.packages.get("torch")
        problem = f"this machine has a GPU driver, but torch {torch} sees no GPU: everything runs on the CPU"
        return [Finding(problem, "install a CUDA or ROCm build of torch, or make the device visible to this process")]
    return [
        Finding(
            f"{gpu.name} is {gpu.architecture}; the kernels need sm_80 (Ampere) or newer",
            "use --device cpu, or another GPU",
        )
        for gpu in environment.accelerators
        if gpu.architecture.startswith("sm_") and int(gpu.architecture.removeprefix("sm_")) < 80
    ]


def _check_interpreter(environment: Environment) -> list[Finding]:
    """Checks the interpreter, which runs kernels in numpy, thousands of times slower."""
    interprets = environment.variables.get("TRITON_INTERPRET") == "1"
    findings = []
    if interprets:
        findings.append(
            Finding(
                "TRITON_INTERPRET=1 is set: kernels run in Triton's interpreter, thousands of times slower",
                "unset TRITON_INTERPRET unless you are debugging a kernel",
                broken=bool(environment.accelerators),
            )
        )
    triton, numpy = (environment.packages.get(name) for name in ("triton", "numpy"))
    if _is_among(triton, "<3.7") and _is_among(numpy, ">=2.4.dev0"):
        findings.append(
            Finding(
                f"the interpreter of triton {triton} fails with numpy {numpy}; compiled kernels are not affected",
                'pip install "numpy<2.4" to run kernels in the interpreter',
                broken=interprets,
            )
        )
    return findings


def describe(environment: Environment, findings: Sequence[Finding]) -> str:
    """The report as text."""
    packages = [
        (name, release or "not installed", SUPPORTED.get(name, "not needed"))
        for name, release in environment.packages.items()
    ]
    where: list[Sequence[object]] = [
        (gpu.device, gpu.name, gpu.architecture, f"{gpu.memory_bytes / 2**30:.0f} GiB", _BACKENDS[gpu.backend])
        for gpu in environment.accelerators
    ]
    cores = f"{environment.cpu_cores} cores, {environment.cpu_threads} threads"
    where.append(("cpu", cores, platform.machine(), None, _BACKENDS.get(environment.cpu_backend, "nothing")))
    sections = [
        f"tritontower {__version__} · Python {environment.python} · {environment.system}",
        text_table("", ("package", "installed", "supported"), packages),
        text_table("", ("device", "name", "architecture", "memory", "backend"), where),
        _describe_cpu(environment.cpu_features),
        *(f"{'PROBLEM' if each.broken else 'note'}: {each.problem}\n  → {each.remedy}" for each in findings),
    ]
    return "\n\n".join(sections if findings else [*sections, "No known problems."])


def _describe_cpu(features: Sequence[str]) -> str:
    if not features:
        return "CPU instructions: unknown"
    bfloat16 = [feature for feature in features if feature in _BFLOAT16_FLAGS]
    vectors = [feature for feature in features if feature not in _BFLOAT16_FLAGS]
    by = f"by {', '.join(bfloat16)}" if bfloat16 else "emulated; float32 may be faster"
    return f"CPU instructions: {', '.join(vectors)}; bfloat16 {by}"


_BACKENDS = {
    "triton": "Triton kernels",
    "interpreter": "Triton kernels, interpreted",
    "reference": "torch reference",
}
