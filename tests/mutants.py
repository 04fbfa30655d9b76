"""Take each guard out, and change small things all over, to see that a test fails every time.

    python tests/mutants.py guards      every fsync, rename, checksum, lock ... removed, each before the test of it
    python tests/mutants.py mistakes    the wrong lines of benchmarks/mistakes.py, each before the test that guards it
    python tests/mutants.py mutate      small changes in the modules of MUTATED, or in those named

A last word such as 2/8 runs every eighth mutant from the second on. A mutant is a module's source, changed and
given to a forked child in place of the file; the child runs the tests. Nothing on the disk is touched. The control
runs the same tests with nothing changed: a test that fails there says nothing about a mutant, and nothing is counted.
Exit status 1: the control failed, no test failed for a guard, or fewer than 90 % were killed.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path

from counts import FILE, record_count

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["tests/test_storage.py", "tests/test_output_dir.py", "tests/training/test_checkpoint.py",
         "tests/training/test_random_state.py", "tests/training/test_optim.py"]  # fmt: skip
SLOWER = ["tests/training/test_lora.py", "tests/test_finetune_generative.py", "tests/test_damage.py",
          "tests/test_identity.py"]  # fmt: skip
MUTATED = ["utils/storage.py", "utils/output_dir.py", "utils/training/checkpoint.py"]
# Of computing, for the quick tests alone (True) and for more; by the clock, twice as many: what hangs seldom computes.
SECONDS = {True: 90, False: 900}
CONTROL = "nothing changed"
# Module, what is taken out, what stands there instead, the test that fails for it.
GUARDS = [
    ("utils/storage.py", "        os.fsync(descriptor)\n", "        pass\n",
     "test_storage.py::test_sync_reaches_the_disk"),
    ("utils/storage.py", "        sync(partial)\n        os.replace(partial, path)",
     "        os.replace(partial, path)", "test_storage.py::test_a_text_file_is_synced_renamed_and_its_folder_synced"),
    ("utils/storage.py", "        raise\n    sync(path.parent)\n", "        raise\n",
     "test_storage.py::test_a_text_file_is_synced_renamed_and_its_folder_synced"),
    ("utils/storage.py", "        os.replace(partial, path)\n", "        path.write_bytes(partial.read_bytes())\n",
     "test_storage.py::test_a_text_file_is_synced_renamed_and_its_folder_synced"),
    ("utils/storage.py", "        partial.unlink(missing_ok=True)\n        raise", "        raise",
     "test_storage.py::test_a_failed_replacement_leaves_the_old_file_alone"),
    ("utils/storage.py", "allow_nan=False", "allow_nan=True",
     "test_storage.py::test_json_is_readable_exact_and_finite"),
    ("utils/storage.py", "    os.rename(path, old)\n    shutil.rmtree(old)\n", "    shutil.rmtree(path)\n",
     "test_storage.py::test_a_published_folder_takes_the_place_of_the_old_one"),
    ("utils/storage.py", "    if shutil.disk_usage(folder).free < size:\n", "    if False:\n",
     "test_storage.py::test_what_will_not_fit_is_not_begun"),
    ("utils/storage.py", "    require_space(folder, size, what)\n", "",
     "test_storage.py::test_what_will_not_fit_is_not_begun"),
    ("utils/storage.py", "            path.chmod(0o666 & ~mask)", "            pass",
     "test_storage.py::test_modes_follow_the_umask"),
    ("utils/storage.py", "            sync(path)\n        manifest", "            pass\n        manifest",
     "test_storage.py::test_a_folder_is_published_in_one_rename_after_everything_is_synced"),
    ("utils/storage.py", "        os.rename(partial, target)\n        sync(target.parent)\n",
     "        os.rename(partial, target)\n",
     "test_storage.py::test_a_folder_is_published_in_one_rename_after_everything_is_synced"),
    ("utils/storage.py", "        discard(target)\n        os.rename(partial, target)\n",
     "        target.mkdir(exist_ok=True)\n        [os.replace(p, target / p.name) for p in partial.iterdir()]\n",
     "test_storage.py::test_a_folder_is_published_in_one_rename_after_everything_is_synced"),
    ("utils/storage.py", '{"replaces": _described(folder)}', "{}",
     "test_storage.py::test_files_are_published_behind_a_manifest_that_knows_old_and_new"),
    ("utils/storage.py", "        sync(folder)\n        os.replace(partial / MANIFEST",
     "        os.replace(partial / MANIFEST",
     "test_storage.py::test_files_are_published_behind_a_manifest_that_knows_old_and_new"),
    ("utils/storage.py", "        os.replace(partial / MANIFEST, folder / MANIFEST)\n        sync(folder)\n",
     "        os.replace(partial / MANIFEST, folder / MANIFEST)\n",
     "test_storage.py::test_files_are_published_behind_a_manifest_that_knows_old_and_new"),
    ("utils/storage.py", "or (before and verify_files(folder, before) is None)", "",
     "test_storage.py::test_a_reader_believes_the_old_set_while_it_is_replaced"),
    ("utils/storage.py", "folder / PARTIAL, folder / OLD, *", "folder / PARTIAL, *",
     "test_storage.py::test_sweep_removes_leftovers_only"),
    ("utils/storage.py", "        if real != ", "        if None is ",
     "test_storage.py::test_names_that_lead_elsewhere_are_refused"),
    ("utils/storage.py", "        if size != expected:\n", "        if False:\n",
     "test_storage.py::test_damage_is_found"),
    ("utils/storage.py", "        if hash_file(path) != sha256:\n", "        if False:\n",
     "test_storage.py::test_damage_is_found"),
    ("utils/storage.py", "    if manifest.get(\"sha256\", said := _digest(manifest)) != said:\n", "    if False:\n",
     "test_storage.py::test_a_manifest_vouches_for_itself"),
    ("utils/output_dir.py", "            fcntl.lockf(", "            (lambda *_: 0)(",
     "test_output_dir.py::test_the_second_is_told_who_is_first"),
    ("utils/output_dir.py", "if os.path.samestat(os.fstat(descriptor), os.stat(path))", "if True",
     "test_output_dir.py::test_a_file_removed_between_open_and_lock_is_no_lock"),
    ("utils/output_dir.py", "        sync(parent.parent)\n", "",
     "test_output_dir.py::test_folders_are_made_and_synced_and_go_again_when_nothing_was_written"),
    ("utils/output_dir.py", "                path.unlink()\n", "                pass\n",
     "test_output_dir.py::test_a_killed_holder_is_not_in_the_way_even_while_its_child_lives"),
    ("utils/output_dir.py", " | os.O_NOFOLLOW", "", "test_output_dir.py::test_a_link_in_its_place_is_not_followed"),
    ("utils/training/checkpoint.py", "    refuse_not_finite(model, optimizer)\n", "",
     "training/test_checkpoint.py::test_what_is_not_finite_is_never_saved"),
    ("utils/training/checkpoint.py", "    refuse_not_finite(written)\n", "",
     "training/test_checkpoint.py::test_a_best_model_that_is_not_finite_is_never_published"),
    ("utils/training/checkpoint.py", "        reason = verify_folder(folder)\n", "        reason = None\n",
     "training/test_checkpoint.py::test_the_newest_good_one_is_found"),
    ("utils/training/checkpoint.py", "and made > FORMAT", "and False",
     "training/test_checkpoint.py::test_a_newer_format_is_refused_and_not_passed_over"),
    ("utils/training/checkpoint.py", "    if not fits:\n", "    if False:\n",
     "training/test_checkpoint.py::test_a_state_of_another_form_is_not_used"),
    ("utils/training/checkpoint.py", "            if value is None or value.shape != target.shape:\n",
     "            if False:\n", "training/test_checkpoint.py::test_optimizer_of_another_shape_is_refused"),
    ("utils/training/random_state.py", '    torch.set_rng_state(states["cpu"])\n', "",
     "training/test_random_state.py::test_random_state_comes_back"),
    ("utils/training/random_state.py", "set_rng_state(states[device.type], device)", "id(states)",
     "training/test_random_state.py::test_random_state_of_the_runs_own_gpu_comes_back"),
    ("utils/training/forecast.py", "    with keep_random_state(setup.device):\n", "    if True:\n",
     "training/test_forecast.py::test_calibrating_leaves_no_trace"),
    ("utils/training/forecast.py", "mean(passes[WARM_UP_STEPS:])", "mean(passes)",
     "training/test_forecast.py::test_warming_up_is_no_part_of_the_forecast"),
    ("utils/model/layers.py", "    if n_dropped == 2**16:", "    if False:",
     "model/test_layers.py::test_the_highest_rates_drop_all_but_a_few"),
    ("utils/errors.py", '"DataLoader worker (pid"', '"DataLoader worker"',
     "test_errors.py::test_a_defect_in_a_data_worker_keeps_its_traceback"),
    ("utils/evaluation/render.py", "if found := BLOCK_START.match(escaped):", "if found := None:",
     "evaluation/test_report.py::test_a_quotation_is_read_as_the_text_that_it_is"),
    ("utils/evaluation/render.py", "base_model=None if Path(base).is_dir() else base", "base_model=base",
     "evaluation/test_sharing.py::test_the_card_of_a_run_has_metadata_that_the_hub_accepts"),
    ("utils/evaluation/render.py", "if _is_text(known.get(name))", "if known.get(name)",
     "evaluation/test_sharing.py::test_what_a_card_does_not_say_is_left_out"),
    ("utils/training/random_state.py", '        if len(states.get("cpu", [])) != expected:\n', "        if False:\n",
     "training/test_random_state.py::test_random_state_of_another_size_is_refused"),
    ("utils/training/parallel.py", "    if changed:\n", "    if False:\n",
     "test_parallel.py::test_other_flags_or_data_than_those_of_process_0_are_refused"),
    ("utils/training/parallel.py", "    torch.set_autocast_cache_enabled(False)", "    pass",
     "test_parallel.py::test_bf16_gives_the_same_losses_and_keeps_no_whole_weights"),
    ("utils/training/forecast.py", ' // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))', "",
     "test_parallel.py::test_memory_is_counted_for_each_process"),
    ("utils/training/checkpoint.py", "    for old in saved[saved.index(folder) :][keep:]:\n", "    for old in []:\n",
     "training/test_checkpoint.py::test_keeps_the_newest"),
    ("utils/training/checkpoint.py", "    if changed:\n        name, was", "    if False:\n        name, was",
     "training/test_checkpoint.py::test_settings_are_compared_by_name"),
    ("utils/errors.py", "        if not math.isfinite(value):\n", "        if False:\n",
     "training/test_optim.py::test_a_bad_step_and_later_ones_change_nothing"),
    ("utils/model/loading.py", "if not all(map(is_finite, (parameter, *", "if not all(map(id, (parameter, *",
     "training/test_checkpoint.py::test_what_is_not_finite_is_never_saved"),
    ("utils/model/checks.py", "if is_mask(tensor) or (tensor.numel() == 1 and tensor.item() < -1000):", "if True:",
     "model/test_families.py::test_weights_that_the_model_lacks_are_refused"),
    ("utils/model/checks.py", "is_binary and not tensor.triu(1).any() and ", "is_binary and ",
     "model/test_families.py::test_weights_that_the_model_lacks_are_refused"),
    ("utils/model/checks.py", "    if not torch.allclose(", "    if last < 0 and not torch.allclose(",
     "model/test_families.py::test_a_model_that_sees_the_tokens_that_follow_is_refused"),
    ("utils/model/checks.py", "        if torch.equal(before, torch.get_rng_state()):\n", "        if False:\n",
     "model/test_families.py::test_dropout_is_on_above_zero_and_off_at_zero"),
    ("utils/model/checks.py", "    if not is_text:\n", "    if False:\n",
     "model/test_families.py::test_other_kinds_are_refused_with_their_reason"),
    ("utils/model/checks.py", "    if config.is_encoder_decoder:\n", "    if False:\n",
     "model/test_families.py::test_other_kinds_are_refused_with_their_reason"),
    ("utils/data/tokenizer.py", "    if len(start_ids(tokenizer)) > 1:\n", "    if False:\n",
     "test_start_token.py::test_two_start_tokens_are_refused"),
    ("utils/data/tokenizer.py", ", sample, *start_ids(tokenizer)]", ", sample]",
     "test_start_token.py::test_start_tokens_of_tokenizers"),
    ("utils/training/metrics.py", "if row[\"step\"] <= (step if \"train/loss\" in row else evaluated_step)", "",
     "training/test_metrics.py::test_lines_of_work_that_is_done_again_are_dropped"),
    ("utils/training/metrics.py", ", allow_nan=False", "",
     "training/test_metrics.py::test_a_value_that_is_not_finite_is_never_written"),
    ("utils/model/loading.py", "if verified or not (folder / MANIFEST).is_file() else verify_folder(folder)", "",
     "test_damage.py::test_damaged_model"),
    ("utils/data/formats.py", '"--sandbox", ', "",
     "data/test_formats.py::test_nothing_is_fetched_and_nothing_is_written"),
    ("utils/data/formats.py", "total > MAX_BYTES or ", "", "data/test_formats.py::test_refusals"),
    ("utils/data/formats.py", " or len(entries) > MAX_ENTRIES", "", "data/test_formats.py::test_refusals"),
    ("utils/data/formats.py", "file.read(entry.file_size)", "file.read()",
     "data/test_formats.py::test_a_hidden_bomb_is_not_unpacked"),
    ("utils/data/formats.py", " and ENCRYPTED.search(data)", " and False", "data/test_formats.py::test_refusals"),
    ("utils/data/formats.py", ", timeout=SECONDS", "",
     "data/test_formats.py::test_a_converter_that_hangs_or_fails_is_ended"),
    ("utils/data/formats.py", ", *LIMITS]", "]", "data/test_formats.py::test_a_converter_that_hangs_or_fails_is_ended"),
    ("utils/data/formats.py", 'or ".." in re.split(r"[/\\\\]", entry)', "", "data/test_formats.py::test_refusals"),
    ("utils/data/formats.py", "    if any(entry.flag_bits & 1 ", "    if any(False ",
     "data/test_formats.py::test_encrypted_and_oddly_packed_entries_are_refused"),
    ("utils/data/formats.py", "    if any(entry.compress_type not in ", "    if any(entry.compress_type in (99,) and ",
     "data/test_formats.py::test_encrypted_and_oddly_packed_entries_are_refused"),
    ("utils/data/blocks.py", "    problem = verify_folder(folder)\n", "    problem = None\n",
     "data/test_blocks.py::test_a_flipped_bit_is_refused"),
    ("utils/data/page_layout.py", "n_lower > len(edits) / 2 and ", "",
     "data/test_doctor.py::test_what_is_no_fault_is_not_found"),
    ("utils/data/page_layout.py", " and len(edits) * limit > MIN_WRAPPED * len(text)", "",
     "data/test_doctor.py::test_what_is_no_fault_is_not_found"),
    ("utils/data/page_layout.py", " and len(full) > 0.6 * len(fills)", "",
     "data/test_doctor.py::test_what_is_no_fault_is_not_found"),
    ("utils/data/page_layout.py", "max(MIN_DIVISIONS, 0.75 * len(divisions))", "MIN_DIVISIONS",
     "data/test_doctor.py::test_what_is_no_fault_is_not_found"),
    ("utils/data/page_layout.py", "or (named <= len(chain) / 2 and len(amid & chain) <= len(chain) / 5)", "",
     "data/test_doctor.py::test_what_is_no_fault_is_not_found"),
    ("utils/data/page_layout.py", "if k not in headings}", "}",
     "data/test_doctor.py::test_a_chapter_heading_that_looks_like_a_running_head_stays"),
    ("utils/data/doctor.py", " or right - left > MAX_LICENCE", "",
     "data/test_doctor.py::test_books_joined_in_one_file_lose_every_licence"),
    ("utils/data/doctor.py", "        if end - start >= MIN_DUPLICATE:\n", "        if end > start:\n",
     "data/test_doctor.py::test_what_is_no_fault_is_not_found"),
    ("utils/data/text.py", "not text.strip() and cleaned:\n", "False:\n",
     "data/test_doctor.py::test_a_book_that_is_all_licence_is_refused"),
    ("utils/data/corpus.py", "    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, n_read):\n",
     "    if False:\n", "data/test_corpus.py::test_a_file_that_grows_while_it_is_read_is_refused"),
    ("utils/data/corpus.py", "        if sha256 != book.sha256:\n", "        if False:\n",
     "data/test_corpus.py::test_whole_large_books_for_validation_and_for_training"),
    ("utils/data/corpus.py", "            if len(held) > LONGEST_SLICE:\n", "            if False:\n",
     "data/test_corpus.py::test_other_formats_a_text_without_spaces_and_clean_are_refused"),
    ("utils/data/tokenizer.py", "        if asked and not self.exact:", "        if False:",
     "data/test_corpus.py::test_workers_agree_on_a_tokenizer_that_forbids_pieces_late"),
    ("utils/data/workers.py", "            child.kill()\n", "            pass\n",
     "data/test_corpus.py::test_however_the_main_process_ends_its_workers_end_too"),
    ("utils/data/workers.py", "    threading.Thread(target=_end_with_parent, daemon=True).start()\n", "",
     "data/test_corpus.py::test_however_the_main_process_ends_its_workers_end_too"),
    ("utils/data/workers.py", "        if isinstance(error, BrokenProcessPool):\n", "        if False:\n",
     "data/test_corpus.py::test_a_killed_worker_is_one_line_and_leaves_nothing"),
    ("utils/data/workers.py", "        if len(waiting) > ahead:\n", "        if len(waiting) > 1 << 30:\n",
     "data/test_corpus.py::test_items_are_taken_only_a_few_ahead"),
    ("utils/evaluation/loss.py", "        if stopping:\n", "        if False:\n",
     "test_identity.py::test_interrupted_evaluation_is_made_up_for"),
    ("utils/cli.py", "        if signal.getsignal(number) != signal.SIG_IGN:\n", "        if True:\n",
     "test_signals.py::test_an_ignored_signal_stops_nothing"),
    ("utils/cli.py", "        if self.number and self.is_alone:\n            leave(number, frame)\n", "",
     "test_signals.py::test_a_second_signal_leaves_at_once"),
    ("utils/cli.py", "            if _raised:\n                raise Stopped(_raised[0]) from error\n", "",
     "test_signals.py::test_a_signal_that_a_library_makes_another_error_of"),
    ("finetune_generative.py", "                log.sync()\n", "",
     "test_crash.py::test_a_power_cut_loses_nothing_that_was_saved"),
    ("utils/training/optim.py", "        require_finite(f", "        dict(a=f",
     "training/test_optim.py::test_a_bad_step_and_later_ones_change_nothing"),
    ("utils/training/optim.py", "        optimizer.found_inf = ", "        unused = ",
     "training/test_optim.py::test_a_bad_step_and_later_ones_change_nothing"),
    ("utils/training/checkpoint.py", '  require_finite(self.step, **{"validation loss"', '  dict(**{"validation loss"',
     "test_identity.py::test_value_that_is_not_finite_stops_the_run_and_reaches_no_file"),
    ("finetune_generative.py", "    restore_random_state(", "    (lambda *_: 0)(",
     "test_finetune_generative.py::test_stopped_and_continued_equals_never_stopped"),
    ("finetune_generative.py", "    checkpoints.restore_optimizer(model, optimizer, ", "    str(",
     "test_finetune_generative.py::test_stopped_and_continued_equals_never_stopped"),
    ("finetune_generative.py", 'else lock(args.output_dir, "train")', "else nullcontext()",
     "test_finetune_generative.py::test_stopped_and_continued_equals_never_stopped"),
    ("finetune_generative.py", "                        generator=torch.Generator(), ", "                        ",
     "test_finetune_generative.py::test_stopped_and_continued_equals_never_stopped"),
    ("finetune_generative.py", ", worker_init_fn=ignore_signals", "",
     "test_signals.py::test_a_signal_to_the_whole_group_with_workers"),
    ("finetune_generative.py", "        sweep(args.output_dir)\n", "        pass\n",
     "test_crash.py::test_a_kill_at_any_file_operation_changes_nothing"),
    ("finetune_generative.py", "if due and state.evaluated_step != state.step:", "if due and state.step > resumed_at:",
     "test_finetune_generative.py::test_stopped_and_continued_equals_never_stopped"),
    ("prepare_data.py", '    with lock(args.output_dir, "prepare"):\n', "    if True:\n",
     "test_prepare_data.py::test_the_summary_says_what_the_manifest_says"),
    ("prepare_data.py", "        sweep(args.output_dir)\n", "",
     "test_prepare_data.py::test_a_refused_run_removes_nothing"),
    ("utils/evaluation/unseen.py", "    if n_seen > (", "    if 0 > (",
     "evaluation/test_unseen.py::test_another_split_of_the_book_is_refused"),
    ("generate_text.py", '    with lock(args.finetuned_model, "samples"):', "    if True:",
     "test_damage.py::test_links"),
    ("utils/evaluation/style.py", "self.numbers.get(text, len(self.features[0]) + column.groups[i])",
     "len(self.features[0]) + column.groups[i]",
     "evaluation/test_style.py::test_a_copied_window_stays_with_its_original"),
    ("utils/evaluation/style.py", "        size = min(len(c.texts) for c in beside), min(c.n_terms for c in beside)\n",
     "        size = len(column.texts), column.n_terms\n",
     "evaluation/test_style.py::test_columns_are_compared_with_equal_amounts"),
    ("utils/evaluation/columns.py", "    kept = sorted(first.values())\n", "    kept = list(range(len(texts)))\n",
     "evaluation/test_columns.py::test_each_text_is_kept_once"),
    ("utils/evaluation/reader.py", "counts = [total - part for total, part in zip(counts, own, strict=True)]", "pass",
     "evaluation/test_reader.py::test_a_window_of_training_is_not_known_by_its_own_neighborhood"),
    ("utils/evaluation/bootstrap.py", " or np.percentile((base.draws - redrawn) / gap, 2.5) < MIN_OWN_SHARE", "",
     "evaluation/test_bootstrap.py::test_a_gap_in_which_the_author_could_miss_two_thirds_has_no_share"),
    ("utils/evaluation/verdict.py", 'if share["high"] < 1:', "if False:",
     "evaluation/test_verdict.py::test_no_sentence_is_false"),
    ("utils/evaluation/generation.py", "rule(self.texts[row], ", "rule(self.windows[row], ",
     "evaluation/test_generation.py::test_penalties_see_the_whole_text"),
    ("utils/evaluation/generation.py", "            if len(window) >= limit:\n",
     "            if max(map(len, self.windows)) >= limit:\n",
     "evaluation/test_generation.py::test_a_long_text_depends_on_its_prompt_and_seed_alone"),
    ("utils/evaluation/generation.py", "[self.sampling.generators[number] for number in kept]",
     "self.sampling.generators", "evaluation/test_generation.py::test_rows_that_end_leave_the_others_alone"),
    ("utils/evaluation/generation.py",
     "in enumerate(self.rows) if not self.finished[row]]\n        for number, row in writing",
     "in enumerate(self.rows)]\n        for number, row in writing",
     "evaluation/test_generation.py::test_rows_that_end_leave_the_others_alone"),
    ("utils/evaluation/longtext.py", "            os.truncate(self.path, self.n_bytes)\n", "",
     "evaluation/test_longtext.py::test_a_full_disk_keeps_the_sentences_before"),
    ("utils/evaluation/longtext.py", "self.pending[: len(self.pending) - held]", "self.pending",
     "evaluation/test_longtext.py::test_what_may_be_the_start_of_a_string_waits"),
    ("utils/evaluation/longtext.py", '"xb"', '"wb"', "evaluation/test_longtext.py::test_only_a_new_file_is_written"),
    ("utils/evaluation/interactive.py", "& ~termios.ECHO", "",
     "evaluation/test_interactive.py::test_what_is_typed_is_not_shown_while_a_text_is_written"),
    ("utils/model/lora.py", "    torch.manual_seed(seed)\n", "",
     "training/test_lora.py::test_merged_model_equals_base_and_adapter"),
    ("utils/model/lora.py", "        refused = not all(", "        refused = 0 * all(",
     "training/test_lora.py::test_a_model_that_peft_cannot_adapt_is_refused"),
    ("utils/model/lora.py", " = sorted(config.target_modules), True", " = config.target_modules, True",
     "training/test_lora.py::test_merged_model_equals_base_and_adapter"),
    ("utils/model/lora.py", "        if shapes.get(name) != expected.get(name):\n", "        if False:\n",
     "training/test_lora.py::test_an_adapter_that_does_not_fit_is_refused"),
    ("utils/model/lora.py", "(change.T if module.fan_in_fan_out else change)", "change.view(module.weight.shape)",
     "training/test_lora.py::test_merged_model_equals_base_and_adapter"),
    ("utils/model/lora.py", "module.scaling[ADAPTER] * (b @ a)", "b @ a",
     "training/test_lora.py::test_merged_model_equals_base_and_adapter"),
    ("utils/model/loading.py", '    if (folder / "adapter_config.json").is_file():', "    if False:",
     "training/test_lora.py::test_a_pickle_is_never_read"),
    ("utils/training/checkpoint.py", " if p.requires_grad) + OTHER", ") + OTHER",
     "training/test_lora.py::test_a_checkpoint_has_the_adapter_alone"),
    ("utils/training/checkpoint.py", 'partial / "adapter")', 'output_dir / "adapter")',
     "training/test_lora.py::test_killed_while_the_best_model_is_replaced"),
    ("utils/training/setup.py", 'settings["lora_rank"] or None', "None",
     "test_identity.py::test_other_value_of_a_shaping_flag_is_refused"),
    ("finetune_generative.py", 'run_config.json", {"base_sha256": hash_model(folder)})', 'run_config.json", {})',
     "training/test_lora.py::test_resuming_needs_the_same_base"),
    ("utils/evaluation/verdict.py", "supported and not faults and", "supported and",
     "evaluation/test_verdict.py::test_no_sentence_is_false"),
    ("utils/evaluation/verdict.py", " and not own_reader", "", "evaluation/test_verdict.py::test_no_sentence_is_false"),
]  # fmt: skip


class Finder(importlib.abc.MetaPathFinder):
    """Give one module of the project another source."""

    def __init__(self, path, source):
        self.name, self.path, self.source = path.removesuffix(".py").replace("/", "."), str(ROOT / path), source

    def find_spec(self, name, _path=None, _target=None):
        if name != self.name:
            return None
        loader = SourceFileLoader(name, self.path)
        loader.get_code = lambda _: compile(self.source, self.path, "exec")
        return importlib.util.spec_from_loader(name, loader)


def folder_of(pid):
    return Path(tempfile.gettempdir(), f"mutants-{pid}")


def start(path, source, tests):
    """Fork a child that runs tests with a changed module; its exit status is 0 when they pass."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.environ.pop(FILE, None)  # what a mutant counts is of no use
    sys.meta_path.insert(0, Finder(path, source))
    import pytest

    code = pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder_of(os.getpid())}", *tests], [Notes()]
    )
    os._exit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code))  # what did not run has noticed nothing


class Notes:
    """In the child: write down the test that fails."""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            note_of(os.getpid()).write_text(report.nodeid)


def note_of(pid):
    return folder_of(pid).with_suffix(".txt")


def seconds_used(pid):
    """Return the seconds that a process has computed, and those of its children that have ended."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def run_all(mutants, at_once=2):
    """Run (name, path, source, tests) mutants; return by name which test noticed it, None for none.

    The control runs beside them, all their tests in one child. When it fails, SystemExit.
    """
    if not mutants:
        return {}
    path, tests = mutants[0][1], [*dict.fromkeys(test for *_, tests in mutants for test in tests)]
    control = (CONTROL, path, (ROOT / path).read_text(encoding="utf-8"), tests)
    waiting, running, found = [control, *mutants], {}, {}
    patience = SECONDS[all(set(tests) <= set(QUICK) for *_, tests in mutants)]
    while waiting or running:
        while waiting and len(running) < at_once:
            mutant = waiting.pop(0)
            running[start(*mutant[1:])] = mutant[0], time.monotonic()
        pid, status = os.waitpid(-1, os.WNOHANG)
        for late, (_, began) in running.items():
            with suppress(OSError):  # it has just ended
                if seconds_used(late) > patience or time.monotonic() - began > 2 * patience:
                    note_of(late).write_text("it did not end")
                    os.killpg(late, signal.SIGKILL)  # a hang is noticed too
        if not pid:
            time.sleep(0.05)
            continue
        name, _ = running.pop(pid)
        found[name] = None
        if status:
            found[name] = note_of(pid).read_text() if note_of(pid).exists() else "it could not be imported"
            if name == CONTROL:
                for late in running:
                    os.killpg(late, signal.SIGKILL)
                sys.exit(f"{CONTROL}, and yet: {found[name]}")
        else:
            print(f"survived: {name}", flush=True)
        note_of(pid).unlink(missing_ok=True)
        shutil.rmtree(folder_of(pid), ignore_errors=True)
        if len(found) % 50 == 0:
            print(f"... {len(found)} of {len(found) + len(waiting) + len(running)}", flush=True)
    del found[CONTROL]
    return found


def undetected(found):
    return [name for name, test in found.items() if test is None]


SWAPS = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
         ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult}  # fmt: skip


def changes_of(node):
    """Yield (what, function that changes a copy of the node in place, or returns another one)."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "comparison", lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPS:
        yield "operator", lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "no not", lambda n: n.operand
    if isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, ast.Compare):
        yield "condition", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: ast.Constant(not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "constant", lambda n: ast.Constant(n.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield "text", lambda n: ast.Constant(n.value + "X")
    if isinstance(node, ast.Return) and not (node.value is None or ast.unparse(node.value) == "None"):
        yield "return", lambda n: ast.Return(ast.Constant(None))
    if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(node, (ast.Raise, ast.Continue)):
        yield "statement", lambda n: ast.Pass()
    if isinstance(node, ast.Assign):
        yield "assignment", lambda n: ast.Assign(n.targets, ast.Constant(None), lineno=n.lineno)
    if isinstance(node, ast.Call) and node.keywords and node.keywords[-1].arg:
        yield "keyword", lambda n: setattr(n, "keywords", n.keywords[:-1])


def places(tree):
    """Yield (parent, field, index, node) of all code: docstrings and annotations are none."""
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                docstring = isinstance(parent, ast.Expr) and isinstance(node, ast.Constant)
                if isinstance(node, ast.AST) and not docstring:
                    yield parent, field, index, node


def mutate(path):
    """Yield (name, source) of every small change of a module."""
    source = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(source)
    for number, (_, _, _, node) in enumerate(list(places(tree))):
        for kind, (what, _) in enumerate(changes_of(node)):
            copied = copy.deepcopy(tree)
            parent, field, index, mine = list(places(copied))[number]
            other = list(changes_of(mine))[kind][1](mine)
            if isinstance(other, ast.AST):
                if index is None:
                    setattr(parent, field, other)
                else:
                    getattr(parent, field)[index] = other
            line = ast.get_source_segment(source, node).splitlines()[0]
            with_change = ast.unparse(ast.fix_missing_locations(copied))
            yield f"{path}:{node.lineno} {what} {number}: {line[:80]}", with_change


def plant(name, path, right, wrong, test):
    """Return (name, path, source with the wrong lines, [test])."""
    source = (ROOT / path).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{path}: {right!r} stands there {source.count(right)} times"
    changed = source.replace(right, wrong)
    compile(changed, path, "exec")  # what cannot be imported fails every test
    return name, path, changed, [test]


def read_guards():
    return [plant(f"{path}: {guard.strip()}", path, guard, instead, f"tests/{test}")
            for path, guard, instead, test in GUARDS]  # fmt: skip


def read_mistakes():
    """Return the classic mistakes as mutants; read in a child, so that no module is imported."""
    command = [sys.executable, "-c", "import json; from benchmarks.mistakes import MISTAKES; print(json.dumps("
               "[(m.title, m.path, m.right, m.wrong, m.guard) for m in MISTAKES]))"]  # fmt: skip
    return [plant(*mistake) for mistake in json.loads(subprocess.check_output(command))]


def order_tests(path, tests):
    """Return tests, those of the module's own name first: most changes are noticed there."""
    own = sorted((ROOT / "tests").rglob(f"test_{Path(path).stem}.py"))
    return [*dict.fromkeys([*(str(test.relative_to(ROOT)) for test in own), *tests])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["guards", "mistakes", "mutate"])
    parser.add_argument("paths", nargs="*", metavar="module or slice", help="modules to mutate; 2/8: every eighth")
    args = parser.parse_args()
    what, paths = args.what, args.paths
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import datasets  # noqa: F401  what takes seconds to import is imported once, before the forks
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel  # noqa: F401

    torch.set_num_threads(1)
    number, n_slices = map(int, (paths.pop() if paths and re.fullmatch(r"\d+/\d+", paths[-1]) else "1/1").split("/"))
    mine = slice(number - 1, None, n_slices)
    if what != "mutate":
        found = run_all((read_guards if what == "guards" else read_mistakes)()[mine])
        survivors = undetected(found)
        record_count(what, planted=len(found), noticed=len(found) - len(survivors), survivors=survivors)
        return bool(survivors)
    changed = [(name, (path, source)) for path in paths or MUTATED for name, source in mutate(path)]
    mutants = dict(changed[mine])
    survivors = undetected(run_all([(name, *rest, order_tests(rest[0], QUICK)) for name, rest in mutants.items()]))
    print(f"{len(mutants)} mutants, {len(mutants) - len(survivors)} killed by the quick tests; now the slower ones")
    survivors = undetected(run_all([(name, *mutants[name], SLOWER) for name in survivors]))
    killed = len(mutants) - len(survivors)
    record_count("mutants", modules=paths or MUTATED, changes=len(mutants), detected=killed, survivors=survivors)
    return killed < 0.9 * len(mutants)


if __name__ == "__main__":
    sys.exit(main())
