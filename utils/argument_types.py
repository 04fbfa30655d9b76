"""Types of command-line flags: each turns a word into a value, or says in one line what was expected."""

import argparse
import codecs
import difflib
import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The hub refuses a model card with another. Source: huggingface.co/docs/hub/repositories-licenses
LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
unknown unlicense wtfpl zlib
""".split()  # noqa: SIM905 - a list of 83 strings is harder to read


def number(
    convert: type[int] | type[float], low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], Any]:
    """Build an argparse type for finite numbers from low to high; above=True refuses low itself, below=True high."""
    kind, pattern = "whole number", r"[+-]?[0-9]{1,30}"
    if convert is float:
        kind, pattern = "number", r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)"
    allowed = f"must be {'above ' if above else ''}{low}"
    if high == math.inf:
        allowed += ("" if above else " or more") + (" and finite" if convert is float else "")
    else:
        allowed += f" {'up ' if above or below else ''}to {'below ' if below else ''}{high}"

    def parse(text: str) -> float:
        if not re.fullmatch(pattern, text):
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            try:  # Python also reads '1_000', ' 5 ' and Arabic digits; a command line should not guess
                convert(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{shown!r} is not a {kind}") from None
            raise argparse.ArgumentTypeError(f"{shown!r} is not a plain number")
        value = convert(text)
        if not low <= value <= high or (above and value == low) or (below and value == high) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{allowed}, not {text}")
        return value

    return parse


def reporter(name: str) -> str:
    """Parse where to write metrics; an optional package must be there before an old run is removed."""
    if name == "tensorboard" and not find_spec(name):
        raise argparse.ArgumentTypeError("tensorboard is not installed; pip install tensorboard")
    return name


def temperature(text: str) -> float:
    """Parse a sampling temperature; 0 stands for greedy decoding."""
    value = number(float, 0)(text)
    if 0 < value < 1e-4:
        raise argparse.ArgumentTypeError(f"{text} is too small; use 0")
    return value


def auto_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Build an argparse type that reads 'auto' as None, and anything else with another type."""
    return lambda text: None if text == "auto" else parse(text)


def plain_text(text: str) -> str:
    """Parse a text that is not empty; the bytes of a command line need not be UTF-8."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise argparse.ArgumentTypeError("must be valid UTF-8")
    return text


def file_path(text: str) -> Path:
    """Parse a path that is not empty: an unset variable of the shell would become the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def model_name(text: str) -> str:
    """Parse a model's name or folder; the slash that a shell's completion adds makes it no other model."""
    return plain_text(text).rstrip("/") or text


def text_encoding(name: str) -> str:
    """Parse the name of a text encoding that Python knows, in lower case: UTF-8 is no other encoding than utf-8."""
    try:
        if codecs.lookup(name)._is_text_encoding:
            return name.lower()
    except (LookupError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"{name!r} is not a text encoding; try utf-8, latin-1 or cp1252")


def names_of(*choices: str) -> Callable[[str], list[str]]:
    """Build an argparse type for a comma-separated list of some choices, or 'all'; the result has their order."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in (*choices, "all")]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0][:60]!r} is unknown; use all, or some of {','.join(choices)}")
        return [name for name in choices if name in names or "all" in names]

    return parse


def device_name(text: str) -> str:
    """Parse the name of a device that a training may run on."""
    kind, colon, number = text.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; use auto, cpu, mps, cuda or cuda:N")
    return text


def language_code(text: str) -> str:
    """Parse an ISO 639 code of a language, in two letters or three."""
    if not re.fullmatch(r"[a-z]{2,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a code of ISO 639; use en, fr, de or the like")
    return text


def license_name(text: str) -> str:
    """Parse the identifier of a license, as the Hugging Face hub lists them."""
    if text not in LICENSES:
        near = difflib.get_close_matches(text.lower(), LICENSES, n=1) or ["apache-2.0, cc0-1.0, mit, other or the like"]
        raise argparse.ArgumentTypeError(f"{text!r} is not on the hub's list of licenses; use {near[0]}")
    return text
