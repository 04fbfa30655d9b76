"""What the soak runs, part by part, and what README's section "Guarantees" says of it."""

import json
import re
import shlex
from collections import namedtuple

from benchmarks.pages import ROOT

STORED = ROOT / "notes/soak.json"
# Name; row of the table in README and what it says there, of the sums of all counts of the parts (maxima of most_...);
# command; pieces, a kind for {} in it or a slice or both; minutes per part on an idle core before it was ever run.
Group = namedtuple("Group", "name row phrase command pieces minutes")
Part = namedtuple("Part", "name group command")
SCRIPTS, COMMANDS = ["prepare", "finetune", "generate"], ["prepare_data", "finetune_generative", "generate_text"]
CRASH, DISK, SIGNALS = (f"tests/test_{name}.py::test_" for name in ("crash", "disk", "signals"))
DAMAGE, IDENTITY, PARALLEL = (f"tests/test_{name}.py::test_" for name in ("damage", "identity", "parallel"))
KINDS = ["prepare", "prepare --overwrite", "finetune", "finetune --overwrite", "finetune stopped", "finetune unsaved",
         "generate", "generate measured", "finetune lora", "finetune from scratch", "prepare corpus"]  # fmt: skip


def slices(count: int) -> list[str]:
    """Name the slices of a long test: 3 -> 1/3, 2/3, 3/3."""
    return [f"{number}/{count}" for number in range(1, count + 1)]


GROUPS = [
    Group("file operations", "kill", "killed before, during and after every file operation: {killed:,} points in "
          "{counts} kinds of run, all identical", CRASH + "a_kill_at_any_file_operation_changes_nothing[{}]", KINDS, 6),
    Group("system calls", "kill", "killed at {killed:,} system calls of the three scripts, all identical",
          CRASH + "a_kill_at_any_system_call_changes_nothing[{}]", SCRIPTS, 15),
    Group("random times", "time", "{trials:,} trials; {killed:,} were killed before they finished, {aimed_at_a_save:,} "
          "aimed at a save: all identical, at most {most_steps_lost} steps lost (the interval)",
          CRASH + "a_kill_at_any_time_loses_at_most_one_interval", slices(2), 8),
    Group("in a row", "time", "one run killed {kills} times in a row, identical",
          CRASH + "a_run_killed_many_times_in_a_row_is_the_run_never_killed", [""], 3),
    Group("corpus at random times", "time", "preparation with two workers killed {kills} times, all identical",
          "tests/data/test_corpus.py::test_killed_at_any_time_it_ends_as_if_undisturbed", [""], 5),
    Group("power cuts", "power", "{states:,} disk states in {counts} kinds of run, all identical",
          CRASH + "a_power_cut_loses_nothing_that_was_saved[{}]", KINDS[:9], 4),
    Group("damage", "damage", "{ways:,} ways to damage a file, {runs:,} runs: found and named, then identical; "
          "{harmless} had no effect, in manifest text without meaning", DAMAGE + "{}",
          ["damaged_checkpoint", "damaged_data", "damaged_model"], 4),
    Group("disk faults", "disk", "{faults:,} faults at all {places:,} places where the scripts write, all identical",
          DISK + "a_disk_that_fails_at_any_place[{}]", COMMANDS, 6),
    Group("failing system calls", "disk", "{failed:,} failing system calls, all identical",
          DISK + "a_system_call_that_fails_inside_a_library[{}]", COMMANDS, 10),
    Group("real disk", "disk", "a real disk of 24 MB, identical",
          "tests/test_disk.py -k 'not any_place and not system_call'", [""], 2),
    Group("killed processes", "processes", "{kills} kills, at saves and while starting: all ended within the 60 s "
          "allowed, each newest checkpoint whole, losses equal to 1e-6",
          PARALLEL + "a_killed_process_ends_all_and_the_same_command_resumes[{}]", ["0", "1"], 5),
    Group("losses of processes", "losses", "equal to {most_loss:.0e} over {most_steps} steps, final weights to "
          "{most_weight:.0e}", PARALLEL + "same_losses_for_any_number_of_processes", [""], 2),
    Group("signals", "signals", "{sent:,} signals at random moments, all identical",
          SIGNALS + "signals_at_random_moments[{}]", SCRIPTS, 8),
    Group("known moments", "signals", "all known moments, a second signal, a whole process group, a library "
          "that fails on the way out: identical",
          "tests/test_signals.py -k '_signal_ or of_its_own'", [""], 3),
    Group("resumed", "resumed", "{runs} runs (40 steps × 0, 1, 2, 4 workers × accumulation 1, 4), all identical",
          IDENTITY + "resumed_equals_straight[{}]", ["0", "1", "2", "4"], 3),
    Group("identity", "resumed", "every flag changed: refused, or identical",
          "tests/test_identity.py -k 'not resumed_equals and not not_finite'", [""], 2),
    Group("not finite", "finite", "{values} NaN or infinite values put into loss, gradient, weights and averages: exit "
          "code 4, none in a file",
          "tests/test_identity.py -k not_finite", [""], 6),
    Group("simultaneous starts", "writer", "{starts} simultaneous starts of 2 to 8 processes: one writer each, "
          "{refused:,} refused with pid and host", SIGNALS + "simultaneous_starts[{}]", SCRIPTS, 6),
    Group("readers", "writer", "{publishes} publishes during {loads} loads: no mixed files",
          SIGNALS + "readers_see_the_old_or_the_new_model", [""], 3),
    Group("killed publishes", "writer", "a publish killed at {pairs:,} pairs of places",
          SIGNALS + "a_writer_killed_inside_a_publish", [""], 10),
    Group("other locks", "writer", "locks of killed processes",
          "tests/test_signals.py -k 'lock_file or while_training or holder or long_run'", [""], 5),
    Group("hostile folders", "code", "{folders} folders opened {opened} times under an audit hook: no code ran",
          DAMAGE + "hostile_models", [""], 2),
    Group("other files", "code", "old, misplaced and linked files",
          "tests/test_damage.py -k 'not hostile and not damaged_'", [""], 3),
    Group("hub", "network", "no DNS, refused, silent, 503, one byte per second, cut off, wrong hash: all end with exit "
          "code 3 ({passed} tests)", "tests/model/test_hub.py", [""], 4),
    *(Group(name, "input", "{examples:,} " + name, f"tests/test_fuzz.py::test_{name.replace(' ', '_')}",
            slices(count), minutes)
      for name, count, minutes in (("books", 4, 10), ("prepared folders", 2, 10), ("checkpoints", 5, 10),
                                   ("models", 4, 8), ("command lines", 1, 5))),
    Group("archives", "input", "{damaged:,} damaged archives",
          "tests/data/test_formats.py::test_damaged_archives_give_a_text_or_one_line", [""], 5),
    Group("mistakes", "tests", "{noticed} of {planted} classic mistakes planted, the test that guards against each "
          "failed", "tests/mutants.py mistakes", [""], 5),
    Group("guards", "tests", "{noticed} of {planted} guards removed, the test of each failed",
          "tests/mutants.py guards", slices(2), 5),
    Group("small changes", "tests", "{detected} of {changes} small changes of the code that writes files detected",
          "tests/mutants.py mutate {}",
          [f"utils/{module}.py {piece}" for module, count in (("storage", 4), ("training/checkpoint", 5),
                                                              ("output_dir", 2)) for piece in slices(count)], 15),
]  # fmt: skip
PYTEST = "-m pytest --full -m 'not gpu' -p no:cacheprovider "


def name_parts(group: Group) -> list[Part]:
    """Return the parts of a group with Python's arguments; a piece that ends in 1/3 is a slice."""
    of_pytest, parts = "mutants" not in group.command, []
    for piece in group.pieces:
        kind, number = re.fullmatch(r"(.*?) ?(\d+/\d+)?", piece).groups()
        command = PYTEST * of_pytest + group.command.format(shlex.quote(kind) if kind else "")
        if number:
            command += " --slice " * of_pytest + " " * (not of_pytest) + number
        parts.append(Part(f"{group.name} {piece}".strip(), group, command))
    return parts


PARTS = [part for group in GROUPS for part in name_parts(group)]


def read_stored() -> dict[str, dict]:
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else {}


def render_soak(stored: dict[str, dict]) -> dict[str, str]:
    """Return the measured column of README's guarantees by row, from the content of soak.json."""
    rows: dict[str, list[str]] = {}
    for group in GROUPS:
        parts = [stored.get(part.name) for part in PARTS if part.group is group]
        if failed := sum(part is not None and part["state"] == "failed" for part in parts):
            phrase = f"{group.name}: {failed} of {len(parts)} parts failed"
        elif not all(part and part["state"] == "passed" for part in parts):
            phrase = f"{group.name}: not run in full"
        else:
            phrase = group.phrase.format(**add_up(parts))
        rows.setdefault(f"soak.{group.row}", []).append(phrase)
    return {row: "not run in full" if all(phrase.endswith(": not run in full") for phrase in phrases) else
            "; ".join(phrases) for row, phrases in rows.items()}  # fmt: skip


def add_up(parts: list[dict]) -> dict:
    """Return the sums of all figures of the parts' counts, the maxima of those named most_..."""
    rows = [row for part in parts for row in part["counts"]]
    figures: dict = {
        "counts": len({str(row.get("kind", row)) for row in rows}),
        "passed": sum(part.get("passed", 0) for part in parts),
    }
    for key, value in ((key, value) for row in rows for key, value in row.items()):
        if isinstance(value, int | float):
            figures[key] = max(figures.get(key, 0), value) if key.startswith("most_") else figures.get(key, 0) + value
    return figures
