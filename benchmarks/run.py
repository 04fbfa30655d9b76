"""Run all benchmarks one after the other, each in a process of its own; write results.json and README.md here.

python -m benchmarks.run             all of them, about an hour on two cores
python -m benchmarks.run saving      some of them; the others' figures stay as they are
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.pages import ROOT, fill_pages, name_marker

HERE = Path(__file__).parent
NAMES = ["training", "levers", "generation", "preparation", "startup", "saving", "forecast", "growth",
         "busy"]  # fmt: skip
LIBRARIES = ["torch", "transformers", "tokenizers", "datasets", "accelerate", "tiktoken"]


def describe_machine() -> dict:
    """Return processor, cores, memory and versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"model name\s*:\s*(.+)", info)
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    flags = sorted({"amx_bf16", "avx512_bf16", "avx2"} & set(info.split()))
    return {
        "processor": model.group(1) if model else platform.processor(),
        "cores": os.cpu_count(),
        "with": flags,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **versions},
    }


def describe_commit(*paths: str) -> str:
    """Return the commit that runs, marked if files of these paths differ from it."""
    asked = ["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", *paths]
    commit, changes = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout for words in asked
    )
    return (commit.strip() or "unknown") + "-dirty" * bool(changes)


def describe(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def describe_share(value: float | None, sign: str = "%", digits: int = 1) -> str:
    """Return a share of a GPU's peak in percent; a dash where the peak is not known."""
    return "-" if value is None else f"{100 * value:.{digits}f}{sign}"


def is_met(value: float, wanted: str) -> bool:
    """Return whether a value is as wanted: '>= 2', '< 0.3', '0.8 to 1.2' or 'none'."""
    bounds = [float(number) for number in re.findall(r"[\d.]+", wanted)]
    if wanted.startswith(">"):
        return value >= bounds[0]
    if wanted.startswith("<"):
        return value < bounds[0] or ("=" in wanted and value == bounds[0])
    return not bounds or bounds[0] <= value <= bounds[1]


def list_targets(results: dict) -> list[str]:
    """Return the lines of the table of what was wanted and what was reached."""
    lines = ["| measurement | target | result |", "|---|---|---:|"]
    for result in results["benchmarks"].values():
        topic = result["title"].split(",")[0]
        for target in result["targets"]:
            missed = "" if is_met(target["value"], target["wanted"]) else ", missed"
            lines.append(f"| {topic}: {target['what']} | {target['wanted']} | {describe(target['value'])}{missed} |")
    return lines


def render() -> dict[str, str]:
    """Return the stored figures as README and notes show them: the table of targets, medians, and those of the GPU."""
    results, gpu = (json.loads((HERE / name).read_text()) for name in ("results.json", "gpu.json"))
    shown = {"benchmarks": "\n" + "\n".join(list_targets(results)) + "\n"}
    figures = {name: {variant: statistics.median(values) for variant, values in result["values"].items()}
               for name, result in results["benchmarks"].items()}  # fmt: skip
    for name, result in results["benchmarks"].items():
        figures[name] |= {target["what"]: target["value"] for target in result["targets"]}
    figures["gpu_generation"] = gpu["generation"]["tokens_per_second"]
    for name, variants in figures.items():
        shown |= {f"{name}.{name_marker(variant)}": describe(value) for variant, value in variants.items()}
    for variant, share in results["benchmarks"]["levers"]["facts"]["speed, of all means"].items():
        gain = round(1 / share - 1, 2) + 0  # no -0
        shown[f"levers.{name_marker(variant)}.gain"] = f"{gain:.0%}".replace("%", " %")
    for variant, sizes in gpu["training"].items():
        for block_size, of in sizes.items():
            name = f"gpu.{name_marker(variant)}.{block_size}"
            shown |= {name: describe(of["tokens_per_second"]), f"{name}.mfu": describe_share(of["mfu"], " %")}
    product = gpu["peak_flops"] and gpu["measured_flops"] / gpu["peak_flops"]
    return shown | {"gpu.product": describe_share(product, " %", digits=0)}


def list_gpu() -> list[str]:
    """Return the lines of what benchmarks.gpu measured, if it has."""
    if not (HERE / "gpu.json").is_file():
        return []
    gpu = json.loads((HERE / "gpu.json").read_text())
    versions, sampling, said = gpu["machine"]["versions"], gpu["generation"], gpu["forecast"]
    peak = gpu["peak_flops"]
    known = f"MFU is the share of {peak / 1e12:.0f} TFLOPS, the data sheet's dense bf16 rate; a" if peak else "A"
    lines = ["", "## GPU, GPT-2 124M, 65,536 tokens per step, dropout 0.1", "",
             f"`make bench-gpu`, {gpu['device']}; torch {versions['torch']}, transformers {versions['transformers']}. "
             f"{known} single product of 8,192 x 8,192 matrices reaches {gpu['measured_flops'] / 1e12:.0f} TFLOPS "
             "here.", "",
             "| variant | block | tokens/s | TFLOPS | MFU | peak, GB |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for variant, sizes in gpu["training"].items():
        for block_size, of in sizes.items():
            lines.append(f"| {variant} | {block_size} | {of['tokens_per_second']:,.0f} | {of['flops'] / 1e12:.0f} | "
                         f"{describe_share(of['mfu'])} | {of['peak_gb']:.1f} |")  # fmt: skip
    speeds = ", ".join(f"{name} {describe(speed)}" for name, speed in sampling["tokens_per_second"].items())
    lines += ["", f"- Generation, 64 samples of 128 tokens, {sampling['decoding']}, {sampling['device']}, tokens/s: "
                  f"{speeds}"]  # fmt: skip
    lines.append(f"- Forecast of 100 steps from scratch, batch 64: {said['time_forecast']} and "
                 f"{said['memory_forecast_gb']:.2f} GB; measured: {said['time_measured_s']:.0f} s and "
                 f"{said['memory_measured_gb']:.2f} GB")  # fmt: skip
    return lines


def write_page(results: dict) -> str:
    """Put the results into Markdown: targets first, then machine, medians and spread of each benchmark."""
    lines = ["# Benchmarks", "",
             "Written by `make bench`; `results.json` holds all values. Each repeat runs every variant "
             "once, one after the other, so that other load on the machine affects all variants. The ratios are more "
             "reliable than the absolute values.", "",
             "## Targets and results", "", *list_targets(results)]  # fmt: skip
    for name, result in results["benchmarks"].items():
        machine = result["machine"]
        versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
        lines += ["", f"## {result['title']}", "", f"`python -m benchmarks.{name}`", "",
                  f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['with'])}), "
                  f"{machine['memory_gb']} GB, {machine['system']}; {versions}.", "",
                  f"| {result['unit']} | median | min | max | repeats |", "|---|---:|---:|---:|---:|"]  # fmt: skip
        for variant, values in result["values"].items():
            mark = "**" if variant == result["ours"] else ""
            shown = (describe(f(values)) for f in (statistics.median, min, max))
            lines.append(f"| {mark}{variant}{mark} | {' | '.join(shown)} | {len(values)} |")
        facts = {fact: value for fact, value in result["facts"].items() if fact != "table"}
        lines += ["", *(f"- {fact}: {json.dumps(value)}" for fact, value in facts.items())]
        if name == "growth":
            lines += ["", "![time per token by block size, micro-batch size, parameters and text size](growth.png)"]
    return "\n".join([*lines, *list_gpu()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="which; all if none is given")
    parser.add_argument("--quick", action="store_true", help="tiny models; prints, writes nothing")
    args = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {"benchmarks": {}}
    for name in args.names or NAMES:
        print(f"benchmark: {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if args.quick else [])]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(ended.stdout[ended.stdout.index("{\n") :])
        results["benchmarks"][name] = {"machine": describe_machine()} | found
        results["benchmarks"] = {n: results["benchmarks"][n] for n in NAMES if n in results["benchmarks"]}
        if not args.quick:  # what is measured is kept, whatever comes after
            path.write_text(json.dumps(results, indent=2) + "\n")
            (HERE / "README.md").write_text(write_page(results))
            fill_pages(render())
    print(write_page(results))


if __name__ == "__main__":
    main()
