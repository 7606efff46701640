"""All benchmarks by one command, what they found as JSON, and the tables of README.md from that.

    make bench DATA=../shared/data                  # hours on 2 CPU cores that do nothing else
    make bench ONLY="loader step"                   # some of them
    make bench QUICK=1                              # each with tiny sizes, to see that it runs; results are not kept
    python benchmarks/run.py --tables               # only write README.md anew from benchmarks/results/*.json

Scripts run one after the other, each with its number of threads pinned, and each takes its sides in turn. What a
script prints is its tables and, as the last line, one JSON object with its figures; both go to results/NAME.json, with
the machine, how busy it was before, versions, date and command. A script that fails leaves the results of earlier, and
makes this end with 1. Longer ones that are not part of this: ablation.py, soak.py, ridge_ranks.py.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil  # type: ignore[import-untyped]

from benchmarks import peers

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "pillow", "simplejpeg")
BUSY = 20  # per cent of the cores in use by others, above which times mean little


class Script(NamedTuple):
    """A benchmark.

    Attributes:
        name: of its file.
        quick: arguments that let it end within a minute or two.
        threads: of one process; None: as many as there are cores.
        markdown: it prints Markdown; else its text is set as such.
        data: it needs ``--data``.
    """

    name: str
    quick: tuple[str, ...]
    threads: int | None = None
    markdown: bool = True
    data: bool = False


SCRIPTS = [
    Script("loader", ("--samples", "600", "--memory-samples", "3000", "--rounds", "1"), threads=1),
    Script("step", ("--rounds", "1", "--sizes", "micro", "--batches", "8", "--lengths", "--modes", "eager")),
    Script("loss_memory", ("--sizes", "512", "--gathered-from", "512", "--worlds", "1", "2", "--rounds", "1")),
    Script("scale", ("--rounds", "1", "--steps", "3", "--size", "micro"), threads=1),
    Script("learning", ("--seconds", "2", "--seeds", "0", "--rates", "1e-3", "--tasks", "digits"), data=True),
    Script("probe", ("--rows", "2000", "--rounds", "1"), threads=1),
    Script("engine", ("--rounds", "1", "--saves", "1", "--resumes", "1", "--shards", "30"), markdown=False),
    Script("export", ("--presets", "micro"), markdown=False),
]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [name for name in wanted if name in fields.get("flags", "").split()],
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "gpus": gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def gpus() -> list[str]:
    """Name, memory and driver of each."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    asked = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    ran = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603
    return ran.stdout.splitlines() if ran.returncode == 0 else []


def versions() -> dict[str, str]:
    """Of the libraries, and of the peers."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found | peers.status()


def run(script: Script, arguments: Sequence[str], environment: dict[str, Any]) -> dict[str, Any] | None:
    """Its results; None if it failed, of which its own words tell."""
    threads = script.threads or environment["machine"]["cores"]
    command = [f"benchmarks/{script.name}.py", *arguments]
    print(f"\n## {' '.join(command)}, {threads} threads", flush=True)
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    busy, begun = psutil.cpu_percent(interval=3), time.perf_counter()
    lines = []
    with subprocess.Popen(  # noqa: S603 (our own scripts)
        [sys.executable, *command], cwd=HERE.parent, env={**os.environ, **pinned}, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    try:
        figures = json.loads(lines[-1] if lines else "")
    except json.JSONDecodeError:
        figures = None
    if process.returncode or figures is None:
        what = process.returncode or "a last line that is no JSON"
        print(f"{command[0]} failed with {what}: its earlier results stay", flush=True)
        return None
    return {
        "command": " ".join(["python", *command]),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - begun),
        "threads": threads,
        "busy_before": busy,
        **environment,
        "figures": figures,
        "text": "\n".join(lines[:-1]).strip(),
    }


def section(script: Script, results: dict[str, Any]) -> str:
    """What README.md says of it between its markers."""
    host, used = results["machine"], results["versions"]
    hardware = [host["cpu"], f"{host['cores']} cores", *host["instructions"], f"{host['memory_gb']} GB", *host["gpus"]]
    busy = results["busy_before"]
    load = "use of the cores before not noted" if busy is None else f"{busy:.0f} % of the cores in use before"
    if busy is not None and busy > BUSY:
        load += ": the machine was busy, times mean little"
    about = [
        f"`{results['command']}`, {results['date']}, {results['seconds']} s, {results['threads']} threads, {load}.",
        f"{', '.join(hardware)}; Python {host['python']}, "
        + ", ".join(f"{name} {what}" for name, what in used.items())
        + ".",
    ]
    text = results["text"] if script.markdown else f"```text\n{results['text']}\n```"
    return "\n".join([*about, "", text])


def fill(readme: str, found: dict[str, dict[str, Any]]) -> str:
    """README.md with the sections of those scripts that have results; others stay as they are.

    Raises:
        ValueError: a script has no markers in it.
    """
    for script in SCRIPTS:
        if script.name in found:
            begin, end = f"<!-- {script.name}: generated -->", f"<!-- {script.name}: end -->"
            before, opened, rest = readme.partition(begin)
            _, closed, after = rest.partition(end)
            if not opened or not closed:
                raise ValueError(f"README.md: needs the lines {begin} and {end}")
            readme = f"{before}{begin}\n{section(script, found[script.name])}\n{end}{after}"
    return readme


def write_tables(results: Path, readme: Path) -> None:
    """Write README.md anew from the files of results."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    readme.write_text(fill(readme.read_text(), found))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; returns 1 if something failed."""
    parser = argparse.ArgumentParser(description="Run benchmarks and write their tables.")
    names = [script.name for script in SCRIPTS]
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--data", type=Path, help="folder with digits/ and clipart/, for learning")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; results and tables are not kept")
    parser.add_argument("--tables", action="store_true", help="run nothing, only write README.md")
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.only) - set(names)):
        parser.error(f"--only {unknown[0]}: allowed are {', '.join(names)}")
    results, readme = HERE / "results", HERE / "README.md"
    if given.tables:
        write_tables(results, readme)
        return 0
    environment = {"machine": machine(), "versions": versions()}
    print(json.dumps(environment, indent=1))
    failed = []
    with tempfile.TemporaryDirectory() as made:
        if given.quick:
            results, readme = Path(made), Path(shutil.copy(readme, made))
        results.mkdir(exist_ok=True)
        for script in SCRIPTS:
            if given.only and script.name not in given.only:
                continue
            if script.data and given.data is None:
                print(f"\n## {script.name} is left out: it needs DATA=FOLDER", flush=True)
                continue
            arguments = [*(script.quick if given.quick else ()), *(["--data", str(given.data)] if script.data else [])]
            found = run(script, arguments, environment)
            if found is None:
                failed.append(script.name)
            else:
                (results / f"{script.name}.json").write_text(json.dumps(found, indent=1) + "\n")
                write_tables(results, readme)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
