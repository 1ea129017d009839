"""Remove the guards one at a time, in a copy of the repository, and check that a test fails each time.

    python tests/mutate.py                 # all of them: some ten minutes
    python tests/mutate.py checkpoints     # only those with this word in them

The next change may lose a guard whose absence no test notices.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    file: str
    old: str  # occurs once in the file
    new: str
    test: str  # name of a test file, and perhaps words for pytest's -k


MUTANTS = [
    # the token dataset and its cache
    Mutant("finetuning/preprocessing/prompts.py", "ids = list(ids_of_words[first])", "ids = ids_of_words[first]", "test_token_dataset batch"),
    Mutant("finetuning/preprocessing/token_dataset.py", 'pc.add(batch["row_number"], summary.rows)', 'batch["row_number"]', "test_token_dataset"),
    Mutant("finetuning/preprocessing/token_dataset.py", "islice(read_files(paths), max_rows)", "read_files(paths)", "test_token_dataset named"),
    Mutant("finetuning/preprocessing/token_dataset.py", "        except RowError as error:\n            fail(str(error))\n", "", "test_token_dataset named"),
    Mutant("finetuning/preprocessing/token_dataset.py", "        except BrokenProcessPool:", "        except ZeroDivisionError:", "test_token_dataset killed"),
    Mutant("finetuning/preprocessing/token_dataset.py", "            check_renamed(data_path, tokenize_chunk.rename, summary.renamed)\n", "", "test_inputs"),
    Mutant("finetuning/preprocessing/token_dataset.py", "if len(waiting) > 2 * workers:", "if False:", "test_token_dataset few"),
    Mutant("finetuning/preprocessing/token_dataset.py", "    Thread(target=end_with_parent, daemon=True).start()\n", "", "test_token_dataset parent"),
    Mutant("finetuning/preprocessing/token_dataset.py", "sha256, max_rows, tokenize_chunk.max_length,", "sha256, tokenize_chunk.max_length,", "test_token_dataset key"),
    Mutant("finetuning/preprocessing/token_dataset.py", "tokenize_chunk.thinking, tokenize_chunk.rename]", "tokenize_chunk.rename]", "test_token_dataset key"),
    Mutant("finetuning/preprocessing/token_dataset.py", "parts += [tokenizer.chat_template, ", "parts += [", "test_token_dataset key"),
    Mutant("finetuning/preprocessing/token_dataset.py", ", tokenizer.backend_tokenizer.to_str()]", "]", "test_token_dataset key"),
    Mutant("finetuning/preprocessing/token_dataset.py", ", Path(inspect.getsourcefile(function))]", "]", "test_token_dataset key"),
    Mutant("finetuning/preprocessing/token_dataset.py", "rows = np.unique(row_numbers)", "rows = row_numbers", "test_token_dataset held"),
    Mutant("finetuning/preprocessing/token_dataset.py", "max(1, round(share * len(rows)))", "round(share * len(rows))", "test_token_dataset held"),
    Mutant("finetuning/preprocessing/token_dataset.py", "np.random.default_rng(seed)", "np.random.default_rng(0)", "test_token_dataset held"),
    Mutant("finetuning/preprocessing/token_cache.py", 'description["checksum"] == checksum(entry / TOKENS)', "(entry / TOKENS).exists()", "test_token_dataset damaged"),
    Mutant("finetuning/preprocessing/token_cache.py", "except (OSError, ValueError, KeyError):", "except OSError:", "test_token_dataset damaged"),
    Mutant("finetuning/preprocessing/token_cache.py", "        os.utime(entry)", "        pass", "test_token_dataset limit"),
    Mutant("finetuning/preprocessing/token_cache.py", "            if entry != keep:\n", "            if True:\n", "test_token_dataset limit"),
    Mutant("finetuning/preprocessing/token_cache.py", "                finally:\n                    shutil.rmtree(scratch, ignore_errors=True)\n", "                finally:\n                    pass\n", "test_token_dataset"),
    Mutant("finetuning/preprocessing/token_cache.py", "        if self.is_maker:\n", "        if True:\n", "test_token_dataset wait"),
    Mutant("finetuning/preprocessing/label_words.py", " or len(self.words) > MOST_COUNTED", "", "test_token_dataset texts"),
    Mutant("finetuning/preprocessing/label_words.py", "self.words is None or other.words is None or", "self.words is None or", "test_token_dataset parts"),
    Mutant("finetuning/preprocessing/data.py", "args.data_path, set(held_out[\"row_number\"])", "args.data_path, None", "test_train_lora held"),
    # the report of a run
    Mutant("finetuning/training/report.py", "if math.isfinite(value) else None", "", "test_report overflows"),
    Mutant("finetuning/training/report.py", "history.setdefault(entry[\"step\"], {\"step\": entry[\"step\"]})", "history.setdefault(len(history), {\"step\": entry[\"step\"]})", "test_report that_of_the_run"),
    Mutant("finetuning/training/report.py", "int(Path(checkpoint).name.split(\"-\")[1]) if checkpoint else 0", "0", "test_report resumed"),
    Mutant("finetuning/cli/console.py", "    except Exception as error:\n", "    except ZeroDivisionError as error:\n", "test_report outlives"),
    Mutant("finetuning/training/report.py", '    if find_spec("matplotlib"):\n', "    if True:\n", "test_report matplotlib"),
    Mutant("finetuning/training/checkpoints.py", "for name in (METRICS, CONFUSION, REPORT, CURVE):", "for name in (METRICS,):", "test_report outlives"),
    Mutant("finetuning/training/loss_curve.py", 'with style.context("default"):', "if True:", "test_report picture"),
    Mutant("finetuning/adapter/model_card.py", "base_model=base if on_hub else None", "base_model=base", "test_report card"),
    Mutant("finetuning/adapter/model_card.py", "    while fence in text:\n", "    while False:\n", "test_report card"),
    Mutant("finetuning/cli/console.py", " if total else \" {unit}, {elapsed} so far\"", "", "test_console lines"),
    Mutant("finetuning/cli/memory.py", ' if unit == "bytes" else (size, unit)', ' if unit == "" else (size, unit)', "test_memory kind"),
    Mutant("finetuning/training/dry_run.py", "        trainer.optimizer.step()\n", "", "test_dry_run states"),
    Mutant("finetuning/cli/commands.py", 'return re.sub(r"(--hub[_-]token)[ =]\\S+", r"\\1 ...", shlex.join(words))', "return shlex.join(words)", "test_report token"),
    Mutant("finetuning/preprocessing/token_view.py", " and end - start < LONGEST_CHARACTER", "", "test_token_view"),
    Mutant("finetuning/preprocessing/token_view.py", "if left_out <= 0 or not sys.stdout.isatty():", "if left_out <= 0:", "test_token_view"),
    Mutant("finetuning/preprocessing/token_view.py", 'if tokenizer.decode(token_ids[end]).startswith("\\ufffd"):', "if True:", "test_token_view"),
    Mutant("finetuning/preprocessing/token_view.py", "end < len(token_ids) and ", "", "test_token_view"),
    Mutant("finetuning/preprocessing/token_view.py", ", file=sys.stderr)", ")", "test_inference exact"),
    Mutant("common.py", "training.should_save and not only_looks:", "training.should_save and not args.data.dry_run:", "test_train_lora rows_can"),
    Mutant("common.py", "    finally:  # also if memory runs out in the evaluation, or the user stops it\n", "    finally:\n        pass\n    if True:\n", "test_report stopped"),
    # the page of the answers, the picture of the scores
    Mutant("finetuning/generation/answer_page.py", "parts = [(name, escape(text)) for", "parts = [(name, text) for", "test_answer_page"),
    Mutant("finetuning/generation/answer_page.py", "{escape(task)}</option>", "{task}</option>", "test_answer_page"),
    Mutant("finetuning/generation/answer_page.py", "return escape(answer), escape(expected)", "return answer, expected", "test_answer_page"),
    Mutant("finetuning/generation/answer_page.py", "hashlib.sha256(SCRIPT.encode())", "hashlib.sha256(STYLE.encode())", "test_answer_page"),
    Mutant("finetuning/generation/answer_page.py", ', errors="replace")', ")", "test_answer_page"),
    Mutant("finetuning/generation/answer_page.py", "autojunk=False", "autojunk=True", "test_answer_page"),
    Mutant("finetuning/generation/confusion_matrix.py", "if any(counts[-1] for counts in matrix):", "if False:", "test_metrics picture"),
    Mutant("finetuning/generation/metrics.py", 'sum(2 if east_asian_width(letter) in "FW" else 1 for letter in cell)', "len(cell)", "test_metrics line_up"),
    Mutant("finetuning/generation/metrics.py", "with attempt(picture.name):", "if True:", "test_metrics picture"),
    # prompts and labels
    Mutant("finetuning/preprocessing/prompts.py", "split_special_tokens=True", "split_special_tokens=False", "test_prompts"),
    Mutant("finetuning/preprocessing/templates.py", "return special_tokens(tokenizer).sub(", "return text or special_tokens(tokenizer).sub(", "test_prompts"),
    Mutant("finetuning/preprocessing/templates.py", 'name = "chat" if tokenizer.eos_token == "<|im_end|>" else "plain"', 'name = "chat"', "test_prompts"),
    Mutant("finetuning/preprocessing/templates.py", "    set_thinking(tokenizer, False)\n", "", "test_prompts"),
    Mutant("finetuning/preprocessing/templates.py", "            enable_thinking=False,", "            enable_thinking=True,", "test_prompts older"),
    Mutant("finetuning/preprocessing/templates.py", "except TemplateError as error:", "except ZeroDivisionError as error:", "test_inference sends"),
    Mutant("finetuning/preprocessing/templates.py", "+ tail[:stop]", "+ tail", "test_prompts"),
    Mutant("finetuning/preprocessing/templates.py", "tokenizer.chat_template, bool(thought))", "tokenizer.chat_template, False)", "test_templates"),
    Mutant("finetuning/preprocessing/templates.py", 'last | {"content": ANSWER}], tokenizer, template).rpartition(ANSWER)', 'last], tokenizer, template).rpartition(last["content"])', "test_templates"),
    Mutant("finetuning/preprocessing/templates.py", "else template + NO_THOUGHT", "else template", "test_templates"),
    Mutant("finetuning/preprocessing/templates.py", ".removeprefix(MODES[True])", "", "test_templates"),
    Mutant("finetuning/preprocessing/templates.py", ".replace(OPENING + CLOSING, \"\")", "", "test_templates"),
    Mutant("finetuning/preprocessing/templates.py", "return words + OPENING + thought + CLOSING", "return words", "test_templates"),
    Mutant("finetuning/preprocessing/prompts.py", "if not prompt.startswith(done):\n            return", "if False:\n            return", "test_prompts"),
    Mutant("finetuning/preprocessing/prompts.py", 'for name in ("content", "reasoning_content")', 'for name in ("content",)', "test_templates"),
    Mutant("finetuning/preprocessing/thoughts.py", 'wanted == "on" or summary.mostly_thoughts()', "True", "test_templates"),
    Mutant("finetuning/preprocessing/schema.py", 'if ("</think>" in answer) != answer.lstrip().startswith("<think>"):', "if False:", "test_schema"),
    Mutant("finetuning/preprocessing/schema.py", "if len(read_answer(\"history\", turn[1], None)) > 1:", "if False:", "test_schema"),
    Mutant("finetuning/preprocessing/rows.py", 'if name not in ("output", "reasoning_content")', 'if name != "output"', "test_templates"),
    Mutant("finetuning/preprocessing/token_dataset.py", "                row = without_thoughts(row)\n", "", "test_templates"),
    Mutant("finetuning/generation/label_scoring.py", "if is_thinking(tokenizer):", "if False:", "test_label_scoring"),
    Mutant("finetuning/preprocessing/label_words.py", "for one, other in look_alikes(words):", "for one, other in ():", "test_label_words"),
    Mutant("finetuning/preprocessing/label_words.py", "        if task in many:", "        if False:", "test_label_words"),
    Mutant("finetuning/generation/metrics.py", "labels = known_labels if set(references) <= set(known_labels) else", "labels =", "test_metrics"),
    Mutant("finetuning/generation/metrics.py", '"all tasks" if "all" in groups else "all"', '"all"', "test_metrics"),
    Mutant("finetuning/adapter/fingerprint.py", "< SAME_MATRIX:", "< -2:", "test_inference matrix"),
    Mutant("finetuning/adapter/whole_class.py", "name.replace(PREFIX + TEXT, PREFIX + WHOLE, 1)", "name", "test_folder"),
    Mutant("finetuning/training/callbacks.py", "if os.getpid() != self.process:", "if False:", "test_interruption workers"),
    Mutant("finetuning/training/checkpoints.py", 'if os.name != "nt":', "if True:", "test_interruption windows"),
    Mutant("finetuning/training/trainer.py", "    args.push_to_hub = False  # see hub.py\n", "", "test_train_lora push"),
    Mutant("finetuning/adapter/hub.py", 'ignore_patterns=["checkpoint-*"]', "ignore_patterns=[]", "test_train_lora push"),
    # rows
    Mutant('finetuning/preprocessing/files.py', 'done = len(codecs.BOM_UTF8) if', 'done = 0 if', 'test_rows'),
    Mutant('finetuning/preprocessing/files.py', 'piece.split("\\n")', 'piece.splitlines()', 'test_rows'),
    Mutant('finetuning/preprocessing/files.py', 'final=piece is None', 'final=False', 'test_files bad_byte'),
    Mutant('finetuning/preprocessing/files.py', 'done - waiting + error.start', 'error.start', 'test_files bad_byte'),
    Mutant('finetuning/preprocessing/files.py', '        if other != file:\n', '        if False:\n', 'test_files twice'),
    Mutant('finetuning/preprocessing/files.py', 'key=natural_order', 'key=str', 'test_files find_files'),
    Mutant('finetuning/preprocessing/files.py', 'not any(part.startswith(".")', 'not any(part.startswith("?")', 'test_files find_files'),
    Mutant('finetuning/preprocessing/files.py', ' or "," not in data_path', ' and "," not in data_path', 'test_files find_files'),
    Mutant('finetuning/preprocessing/files.py', 'zlib.error, ', '', 'test_files_property'),
    Mutant('finetuning/preprocessing/files.py', '        if length > LONGEST:\n', '        if False:\n', 'test_files no_end'),
    Mutant('finetuning/preprocessing/files.py', '    together = hashlib.sha256(b"".join(digest.digest() for digest in digests))', '    together = digests[0]', 'test_files hash'),
    Mutant('finetuning/preprocessing/json_rows.py', 'cut = error.pos > len(text) - 16 or text[error.pos] == \'"\'', 'cut = error.pos >= len(text)', 'test_files_property'),
    Mutant('finetuning/preprocessing/json_rows.py', 'if cut and len(text) - at > LONGEST:', 'if False:', 'test_files no_end'),
    Mutant('finetuning/preprocessing/json_rows.py', '        if place < len(text):\n', '        if False:\n', 'test_files_property'),
    Mutant('finetuning/preprocessing/json_rows.py', '            if text[end : end + 1] not in (",", "]"):\n', '            if False:\n', 'test_files_property'),
    Mutant('finetuning/preprocessing/json_rows.py', 'read_whole(chain([line], lines)) if is_first else None', 'None', 'test_files places'),
    Mutant('finetuning/preprocessing/tables.py', ', strict=True), None, 0', '), None, 0', 'test_schema formats'),
    Mutant('finetuning/preprocessing/tables.py', '            if len(cells) != len(names):\n', '            if False:\n', 'test_schema formats'),
    Mutant('finetuning/preprocessing/tables.py', '    if len(set(names)) < len(names):\n', '    if False:\n', 'test_files values_of_tables'),
    Mutant('finetuning/preprocessing/tables.py', 'page_checksum_verification=True', 'page_checksum_verification=False', 'test_files_property flipped'),
    Mutant('finetuning/preprocessing/tables.py', 'if cell or name not in ABSENT_IF_EMPTY', 'if True', 'test_files values_of_tables'),
    Mutant('finetuning/preprocessing/tables.py', 'without_nulls(row))', 'row)', 'test_files conversations'),
    Mutant('finetuning/preprocessing/schema.py', 'if old in row and new in row and new not in rename:', 'if False:', 'test_files rename_fields'),
    Mutant('finetuning/preprocessing/schema.py', 'if old not in row and new != "input":', 'if False:', 'test_files names'),
    Mutant('finetuning/preprocessing/rows.py', '        if not seen[name]:\n', '        if False:\n', 'test_files names'),
    Mutant("finetuning/preprocessing/schema.py", 'value.encode("utf-8")', "pass", "test_rows"),
    # batches, attention, loss
    Mutant("finetuning/training/collators.py", '            "use_cache": False,\n            **name_rows(rows),\n            **supervised_only(labels),', '            **name_rows(rows),\n            **supervised_only(labels),', "test_collators"),
    Mutant("finetuning/training/collators.py", 'for label in [IGNORE_INDEX, *row["labels"][1:]]', 'for label in row["labels"]', "test_collators"),
    Mutant("finetuning/training/collators.py", "return config.model_type in FULL_ATTENTION_FAMILIES and", "return", "test_collators"),
    Mutant("finetuning/training/attention.py", "states.split(row_lengths, dim=2)", "[states]", "test_losses"),
    Mutant("finetuning/training/losses.py", "/ digits * counted[part]", "/ digits", "test_losses"),
    Mutant("finetuning/training/losses.py", "- of_targets) * counted[part]", "- of_targets)", "test_losses"),
    Mutant("finetuning/training/losses.py", "tokens = max(1, LOGITS_MEMORY // (4 * len(weight)))", "tokens = len(hidden)", "test_losses"),
    Mutant("finetuning/training/trainer.py", "and args.neftune_noise_alpha is None", "", "test_train_lora noise"),
    Mutant("finetuning/training/losses.py", "return args[0][:, :1].detach()", "return args[0].detach()", "test_losses"),
    Mutant("finetuning/training/trainer.py", "compute_loss_func=self.chunked_loss,", "", "test_train_lora stock_trainer"),
    Mutant("finetuning/training/trainer.py", "with attention(self.base_model, self.kernel), plain_inputs:", "with plain_inputs:", "test_train_lora stock_trainer"),
    # attention, precision and devices
    Mutant("finetuning/training/attention.py", "    if not needs_no_mask(config):", "    if False:", "test_attention choice"),
    Mutant("finetuning/training/attention.py", "if capability < (8, 0) or not half_precision:", "if not half_precision:", "test_attention choice"),
    Mutant("finetuning/training/attention.py", "if capability < (8, 0) or not half_precision:", "if capability < (8, 0):", "test_attention choice"),
    Mutant("finetuning/training/attention.py", 'if flattened and has_varlen and not config.attention_dropout else "rows"', 'if flattened and has_varlen else "rows"', "test_attention choice"),
    Mutant("finetuning/training/attention.py", 'if flattened and has_varlen and not config.attention_dropout else "rows"', 'if has_varlen and not config.attention_dropout else "rows"', "test_attention choice"),
    Mutant("finetuning/training/attention.py", 'return {"window_size", "enable_gqa"} <=', 'return True or {"window_size", "enable_gqa"} <=', "test_attention has_varlen"),
    Mutant("finetuning/training/attention.py", " or not torch.backends.cuda.is_flash_attention_available()", "", "test_attention has_varlen"),
    Mutant("finetuning/training/attention.py", "transpose(0, 1).to(value.dtype)", "transpose(0, 1)", "test_attention half_precision"),
    Mutant("finetuning/training/attention.py", "window_size=(-1, 0), ", "", "test_attention train_the_same"),
    Mutant("finetuning/training/attention.py", "    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))\n", "", "test_attention not_shared"),
    Mutant("finetuning/training/attention.py", "and not find_spec(module)", "", "test_attention named"),
    Mutant("finetuning/training/collators.py", "dtype=torch.int32", "dtype=torch.int64", "test_attention train_the_same"),
    Mutant("finetuning/training/collators.py", '"position_ids": torch.arange(length).expand(len(rows), -1).contiguous(),', '"attention_mask": pad("attention_mask", 0),', "test_meta_device reads_nothing"),
    Mutant("finetuning/adapter/soft_prompts.py", "torch.where(virtual.unsqueeze(-1), vectors.to(words.dtype), words)", "words.index_put((virtual,), vectors.to(words.dtype)[virtual])", "test_meta_device reads_nothing"),
    Mutant("finetuning/training/trainer.py", "    if capability and missing:\n", "    if missing:\n", "test_devices slow_path"),
    Mutant("finetuning/training/trainer.py", "    if capability and missing:\n", "    if False:\n", "test_devices slow_path"),
    Mutant("finetuning/training/trainer.py", "active=autocast)", "active=False)", "test_precision training_only"),
    Mutant("finetuning/training/trainer.py", "active=autocast)", "active=True)", "test_precision training_only"),
    Mutant("finetuning/training/losses.py", "GRADIENT_SCALE = 2048.0", "GRADIENT_SCALE = 1.0", "test_precision as_exact"),
    Mutant("finetuning/training/callbacks.py", 'if name == "grad_norm" and args.fp16 and not self.scale_is_small():', "if False:", "test_precision overflows"),
    Mutant("finetuning/training/callbacks.py", 'if name == "grad_norm" and args.fp16 and not self.scale_is_small():', 'if name == "grad_norm" and args.fp16:', "test_precision overflows"),
    Mutant("finetuning/training/callbacks.py", 'if name == "grad_norm" and args.fp16 and not self.scale_is_small():', 'if name == "grad_norm" and not self.scale_is_small():', "test_precision overflows"),
    Mutant("finetuning/training/callbacks.py", 'if name == "grad_norm" and args.fp16 and not self.scale_is_small():', "if args.fp16 and not self.scale_is_small():", "test_precision overflows"),
    Mutant("finetuning/training/flags.py", "is_bf16_supported(including_emulation=False)", "is_bf16_supported()", "test_devices gpus or emulated"),
    Mutant("finetuning/training/flags.py", "if flags.bf16 and on_cuda and not has_bf16:", "if False:", "test_devices emulated"),
    Mutant("finetuning/training/flags.py", "if flags.bf16 and on_cuda and not has_bf16:", "if flags.bf16 and not has_bf16:", "test_devices emulated"),
    Mutant("finetuning/training/flags.py", 'flags.accelerator_config = {"non_blocking": True}', "pass", "test_devices gpus"),
    Mutant("finetuning/training/flags.py", "flags.liger_kernel_config = LIGER_KERNELS", "pass", "test_devices liger"),
    Mutant("finetuning/cli/arguments.py", "        allow_expandable_segments()\n", "", "test_devices expandable"),
    Mutant("finetuning/cli/memory.py", 'if sys.platform != "win32" and not any(', "if not any(", "test_devices expandable"),
    Mutant("finetuning/cli/memory.py", "and not any(name in os.environ for name in names):", ":", "test_devices expandable"),
    Mutant("finetuning/training/flags.py", "if torch.accelerator.is_available() else", "if False else", "test_devices gpus"),
    Mutant("finetuning/training/flags.py", '    if device != "cuda":\n', "    if False:\n", "test_devices mac"),
    Mutant("finetuning/training/flags.py", "if checkpointing and not training_args.gradient_checkpointing:", "if False:", "test_devices would_do_nothing"),
    Mutant("finetuning/training/flags.py", 'if checkpointing.get("offload") and', "if False and", "test_devices would_do_nothing"),
    Mutant("finetuning/training/checkpoints.py", 'if os.name != "nt":', "if True:", "test_devices windows"),
    Mutant("finetuning/benchmarking/kept_bytes.py", "return torch.native_dropout(states, 0.05, True)[0]", "return torch.nn.functional.dropout(states, 0.05)", "test_kept_bytes"),
    Mutant("common.py", "torch.backends.cuda.enable_cudnn_sdp(False)", "pass", "test_devices cudnn"),
    # before training
    Mutant("finetuning/cli/arguments.py", "return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)", "return path", "test_structure any_folder"),
    Mutant("finetuning/training/trainer.py", "parameter.data = parameter.data.float()", "pass", "test_train_lora"),
    Mutant("train_lora.py", "if missing or not names:", "if len(missing) == len(names):", "test_train_lora mistakes"),
    Mutant("train_lora.py", "name.strip() for name", "name for name", "test_train_lora stripped"),
    Mutant("train_lora.py", "if self.lora_alpha < 1:", "if False:", "test_train_lora mistakes"),
    Mutant("common.py", "    set_seed(args.training.seed)\n", "", "test_train_lora two_runs"),
    Mutant("train_prompt_tuning.py", "start = mean + deviation * torch.randn", "start = torch.randn", "test_train_prompt_tuning starts"),
    Mutant("train_prompt_tuning.py", "if count >= positions:", "if False:", "test_train_prompt_tuning mistakes"),
    Mutant("finetuning/training/flags.py", "args.training._n_gpu = 1", "pass", "test_train_lora one_gpu"),
    Mutant("finetuning/training/flags.py", "if training_args.label_smoothing_factor:", "if False:", "test_train_lora mistakes"),
    Mutant("finetuning/training/flags.py", "flags.fp16 = flags.fp16 and on_cuda and not flags.bf16", "pass", "test_train_lora"),
    Mutant("finetuning/training/flags.py", "if flags.load_best_model_at_end:", "if False:", "test_train_lora mistakes"),
    Mutant("finetuning/training/trackers.py", "if name != \"kubeflow\" and not find_spec(module):", "if False:", "test_trackers not_there"),
    Mutant("finetuning/training/trackers.py", "    if names and hub_token:", "    if False:", "test_trackers tokens"),
    Mutant("finetuning/training/trackers.py", "        except ValueError as error:\n", "        except KeyError as error:\n", "test_trackers not_there"),
    Mutant("finetuning/training/trainer.py", "        start_swanlab(self.args)\n", "", "test_trackers swanlab"),
    Mutant("finetuning/training/flags.py", "        reach_trackers(training_args.report_to)\n", "        pass\n", "test_trackers no_key"),
    Mutant("finetuning/training/checkpoints.py", "if allowed or not folder.is_dir()", "if True or not folder.is_dir()", "test_train_lora used_output"),
    Mutant("finetuning/training/checkpoints.py", 'if (folder / "config.json").exists():', "if False:", "test_train_lora model_folder"),
    # during training
    Mutant("finetuning/training/flags.py", "logging_nan_inf_filter=False,", "logging_nan_inf_filter=True,", "test_train_lora not_finite"),
    Mutant("finetuning/training/callbacks.py", "if not math.isfinite(value):", "if False:", "test_train_lora not_finite"),
    Mutant("finetuning/training/callbacks.py", "control.should_log = control.should_log or control.should_save", "pass", "test_train_lora not_finite"),
    Mutant("finetuning/training/callbacks.py", "bad = [forward for forward in self.forwards if not forward[2].isfinite()]", "bad = []", "test_train_lora named"),
    Mutant("finetuning/training/callbacks.py", "control.should_save = control.should_training_stop = True", "control.should_training_stop = True", "test_interruption signals"),
    Mutant("finetuning/training/callbacks.py", "            signal.signal(signal.SIGTERM, signal.SIG_IGN)", "            pass", "test_distributed slower"),
    Mutant("finetuning/training/callbacks.py", "raise KeyboardInterrupt", "pass", "test_interruption second"),
    # out of memory
    Mutant("finetuning/cli/memory.py", "isinstance(error, (torch.OutOfMemoryError, MemoryError)) or ", "", "test_memory kind"),
    Mutant("finetuning/cli/memory.py", "|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", "", "test_memory kind"),
    Mutant("finetuning/cli/memory.py", "out of memory|can(no|')t", "can(no|')t", "test_memory kind"),
    Mutant("finetuning/cli/memory.py", "        if not is_out_of_memory(error):\n", "        if False:\n", "test_memory other_errors"),
    Mutant("finetuning/cli/memory.py", "with suppress(RuntimeError):", "with suppress(ZeroDivisionError):", "test_memory full_gpu"),
    Mutant("finetuning/cli/memory.py", "torch.cuda.max_memory_reserved(device) if", "torch.cuda.max_memory_allocated(device) if", "test_memory works"),
    Mutant("finetuning/cli/memory.py", "return total - free - torch.cuda.memory_reserved(device)", "return total - free", "test_memory works"),
    Mutant("finetuning/cli/memory.py", '    if device.type == "cuda":\n        return torch.cuda.memory_allocated(device)', "    if torch.cuda.is_available():\n        return torch.cuda.memory_allocated(device)", "test_memory works"),
    Mutant("common.py", 'with memory_advice(device, remedies, "while loading the model"), loading_report():', "with loading_report():", "test_out_of_memory loading"),
    Mutant("common.py", 'with memory_advice(device, remedies, "while loading the model"), loading_report():', 'with memory_advice(device, remedies, "while loading the model"):', "test_out_of_memory quantising"),
    Mutant("finetuning/generation/evaluate.py", "with memory_advice(training_args.device, [f\"{command} --batch_size 1\"], place):", "if True:", "test_out_of_memory at_the_end"),
    Mutant("finetuning/adapter/base_model.py", "transformers_logging.disable_default_handler()", "pass", "test_out_of_memory quantising"),
    Mutant("finetuning/adapter/base_model.py", "print(text.getvalue(), end=\"\", file=sys.stderr)", "pass", "test_base_model logs"),
    Mutant("finetuning/adapter/base_model.py", 'return [] if load_in_4bit or getattr(config, "quantization_config", None) else', "return", "test_out_of_memory loading_the_model"),
    Mutant("finetuning/adapter/folder.py", "        if is_out_of_memory(error):\n", "        if False:\n", "test_out_of_memory loading_the_adapter"),
    Mutant("train_lora.py", "with memory_advice(args.training.device, memory_flags(args).values()):", "if True:", "test_out_of_memory making or evaluating"),
    Mutant("train_prompt_tuning.py", "with memory_advice(args.training.device, memory_flags(args).values()):", "if True:", "test_out_of_memory making"),
    Mutant("inference.py", "with memory_advice(model.device, memory_flags(model_args, args, config.max_new_tokens)):", "if True:", "test_out_of_memory answering"),
    Mutant("inference.py", 'with memory_advice(device, [] if model_args.load_in_4bit else ["--load_in_4bit True"], "while loading the adapter"):', "if True:", "test_out_of_memory loading_the_adapter"),
    Mutant("finetuning/generation/flags.py", "and args.instruction is None and not args.interactive", "", "test_out_of_memory answering"),
    Mutant("benchmark.py", "with memory_advice(device, memory_flags(args)):", "if True:", "test_out_of_memory benchmark"),
    # the rehearsal
    Mutant("finetuning/training/rehearsal.py", "advice, torch.random.fork_rng([device] if device.type == \"cuda\" else []):", "advice:", "test_rehearsal stays"),
    Mutant("finetuning/training/rehearsal.py", "            trainer.model.zero_grad()\n", "", "test_rehearsal stays"),
    Mutant("finetuning/training/rehearsal.py", "    trainer.not_finite_guard.forwards.clear()\n", "", "test_rehearsal blamed"),
    Mutant("finetuning/training/rehearsal.py", "nullcontext() if training.auto_find_batch_size else", "", "test_rehearsal smaller_batch"),
    Mutant("finetuning/training/rehearsal.py", "order[-size:]", "order[:size]", "test_rehearsal named"),
    Mutant("finetuning/training/rehearsal.py", "seconds *= lengths.mean() / lengths[rows].mean()", "pass", "test_rehearsal known"),
    Mutant("finetuning/training/rehearsal.py", "seconds=seconds * training.gradient_accumulation_steps", "seconds=seconds", "test_rehearsal known"),
    Mutant("finetuning/training/rehearsal.py", "training.world_size > 1 or ", "", "test_rehearsal none"),
    Mutant("finetuning/training/rehearsal.py", " or training.optim.endswith(IN_BACKWARD)", "", "test_rehearsal none"),
    # the dry run
    Mutant("finetuning/training/dry_run.py", "if fitted and step.peak() <= total - others:", "if fitted and step.peak() <= total:", "test_dry_run others_hold"),
    Mutant("finetuning/training/dry_run.py", "if fitted and step.peak() <= total - others:", "if step.peak() <= total - others:", "test_dry_run runs_out_in"),
    Mutant("finetuning/training/dry_run.py", "self.activations + self.logits + self.kept", "self.activations + self.logits", "test_dry_run others_hold"),
    Mutant("finetuning/training/dry_run.py", "            self.rows = halve(self.rows)\n", "            raise MemoryError(reason)\n", "test_dry_run runs_out_in"),
    Mutant("finetuning/training/dry_run.py", "if count_tokens(self.rows) < FEWEST_TOKENS or", "if", "test_dry_run runs_out_in"),
    Mutant("finetuning/training/dry_run.py", "and m is not head", "", "test_dry_run linear"),
    Mutant("finetuning/training/dry_run.py", "step = measured.scaled(tokens)", "step = measured", "test_dry_run runs_out_in"),
    # checkpoints
    Mutant("finetuning/training/checkpoints.py", "            if name != INFO:\n", "            if True:\n", "test_interruption saving"),
    Mutant("finetuning/training/checkpoints.py", "if args.should_save and folder.exists():", "if False:", "test_interruption replacing"),
    Mutant("finetuning/training/checkpoints.py", "if not is_disk_error(error) or not", "if True or not", "test_interruption full_disk"),
    Mutant("finetuning/training/checkpoints.py", "    shutil.rmtree(folder, ignore_errors=True)\n", "", "test_interruption full_disk"),
    Mutant("finetuning/training/trainer.py", "args.save_total_limit = None", "pass", "test_interruption saving"),
    Mutant("finetuning/training/checkpoints.py", "if broken is None:", "if True:", "test_train_lora broken or part"),
    Mutant("finetuning/training/checkpoints.py", "if old != value:", "if False:", "test_train_lora resuming_something and alpha"),
    Mutant("finetuning/training/checkpoints.py", "if saved_info[name] != info[name]:", "if False:", "test_train_lora resuming_something"),
    Mutant("finetuning/training/checkpoints.py", "if path.exists() and not zipfile.is_zipfile(path):", "if False:", "test_train_lora broken"),
    # the saved adapter
    Mutant("finetuning/adapter/folder.py", "if all(torch.equal(tensor, start[name]) for name, tensor in state.items()):", "if False:", "test_train_lora nothing_trained"),
    Mutant("finetuning/adapter/folder.py", "if saved.keys() != state.keys() or not", "if False and not", "test_train_lora saved_file"),
    Mutant("finetuning/adapter/folder.py", "if not all(tensor.half().isfinite().all() for tensor in state.values()):", "if False:", "test_train_lora million or not_finite"),
    # what people hold
    Mutant("finetuning/adapter/base_model.py", 'return {"quantization_config": FineGrainedFP8Config(dequantize=True)}', 'return {"quantization_config": None}', "test_base_model fp8"),
    Mutant("finetuning/adapter/base_model.py", 'if load_in_4bit and method not in (None, "bitsandbytes"):', "if False:", "test_base_model named"),
    Mutant("finetuning/adapter/base_model.py", "        if names:\n", "        if False:\n", "test_base_model loaded"),
    Mutant("finetuning/adapter/base_model.py", "except SafetensorError:", "except ZeroDivisionError:", "test_base_model loaded"),
    Mutant("finetuning/adapter/base_model.py", "if not any((folder / name).is_file() for name in TOKENIZER_FILES):", "if False:", "test_base_model loaded"),
    Mutant("finetuning/adapter/base_model.py", "if size > block and size % block:", "if False:", "test_base_model tiny"),
    Mutant("finetuning/adapter/base_model.py", "if share < 50:", "if False:", "test_base_model moe"),
    Mutant("common.py", "        model.to(dtype)", "        pass", "test_base_model fp8"),
    Mutant("common.py", "model.name_or_path = str(", "str(", "test_inference another_folder"),
    Mutant("finetuning/adapter/folder.py", "if config.peft_type == PeftType.LORA and (keys.missing_keys or keys.unexpected_keys):", "if False:", "test_folder keys"),
    Mutant("finetuning/adapter/folder.py", "mapping = map_to_text_part(model, config, adapter_path)", "mapping = None", "test_folder whole"),
    Mutant("finetuning/training/checkpoints.py", 'if saved[name] != current.get(name):', "if False:", "test_train_lora resuming_something"),
    Mutant("finetuning/training/checkpoints.py", "tempfile.TemporaryFile(dir=parent).close()", "pass", "test_train_lora tried_first"),
    Mutant("finetuning/preprocessing/schema.py", "        if fields.get(field):\n", "        if False:\n", "test_schema refused"),
    Mutant("finetuning/preprocessing/schema.py", 'if str(row.get(field)).lower() == "false" and row[field] != row.get("output"):', "if False:", "test_schema refused"),
    Mutant("finetuning/preprocessing/schema.py", "if role in TOOL_ROLES:", "if False:", "test_schema refused"),
    Mutant("finetuning/preprocessing/schema.py", 'if kinds - {"text"}:', "if False:", "test_schema refused"),
    Mutant("finetuning/preprocessing/schema.py", "            if row.get(beside):", "            if False:", "test_schema refused"),
    Mutant("finetuning/preprocessing/prompts.py", 'message.get("weight") != 0', "True", "test_schema learnt"),
    Mutant("finetuning/preprocessing/prompts.py", 'for question, answer in row.get("history") or []:', "for question, answer in []:", "test_schema learnt"),
    Mutant("finetuning/preprocessing/rows.py", "    if counts:\n", "    if False:\n", "test_schema counted"),
    Mutant("finetuning/cli/arguments.py", "        print_any_text()\n", "", "test_inference terminals"),
    Mutant("finetuning/generation/chat.py", "except UnicodeError:", "except ZeroDivisionError:", "test_chat bytes"),
    # inference
    Mutant("finetuning/adapter/folder.py", "if not all(tensor.isfinite().all() for tensor in weights.values()):", "if False:", "test_inference nan"),
    Mutant("finetuning/adapter/fingerprint.py", 'if found["sizes"].get(name) != value:', "if False:", "test_inference other_bases"),
    Mutant("finetuning/adapter/fingerprint.py", "if values.shape != other.shape or not torch.allclose", "if False and not torch.allclose", "test_inference other_bases"),
    Mutant("finetuning/adapter/folder.py", 'if quantization(model) != info["quantization"]:', "if False:", "test_inference quantisation"),
    Mutant("finetuning/adapter/folder.py", 'or config.get("megatron_config")', "", "test_inference sends"),
    Mutant("finetuning/adapter/folder.py", "if info and name not in info", "if False", "test_inference sends"),
    Mutant("common.py", "use_safetensors=True,", "", "test_inference sends"),
    Mutant("common.py", "model.generation_config = GenerationConfig()", "pass", "test_generate own_configuration"),
    Mutant("finetuning/generation/generate.py", "eos_token_id=stop_token_ids(tokenizer),", "eos_token_id=stop_token_ids(tokenizer)[:1],", "test_generate both_stop"),
    Mutant("finetuning/generation/generate.py", "        do_sample=do_sample,\n", "", "test_generate own_configuration"),
    Mutant("finetuning/generation/generate.py", "        repetition_penalty=repetition_penalty,\n", "        repetition_penalty=None,\n", "test_generate"),
    Mutant("finetuning/generation/generate.py", "prompt_ignore_length=ignored", "prompt_ignore_length=0", "test_generate single_rows"),
    Mutant("finetuning/generation/generate.py", "prompts = [model.virtual_tokens + ids for ids in prompts]", "pass", "test_soft_prompts batched"),
    Mutant("finetuning/adapter/soft_prompts.py", "embeds = self.embed(input_ids, attention_mask.cumsum(dim=1) - 1)", "embeds = self.embed(input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids))", "test_soft_prompts batched"),
    Mutant("finetuning/generation/label_scoring.py", "scores = of_shared.unsqueeze(1) + ", "scores = ", "test_label_scoring brute_force"),
    Mutant("finetuning/generation/label_scoring.py", "(log_probabilities * real[:, 1:])", "log_probabilities", "test_label_scoring brute_force"),
    Mutant("finetuning/generation/predictions.py", "self.file.truncate(len(whole))", "pass", "test_inference goes_on"),
    Mutant("finetuning/generation/predictions.py", 'if head["settings"].get(name) != value:', "if False:", "test_inference goes_on"),
    Mutant("finetuning/generation/metrics.py", "answer if answer in labels else OTHER", "answer", "test_metrics label_words"),
    # what a run shows
    Mutant("finetuning/training/trainer.py", "    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)", "    pass", "test_progress file"),
    Mutant("finetuning/cli/arguments.py", "        if not sys.stderr.isatty():\n            disable_progress_bar()", "        if False:\n            disable_progress_bar()", "test_progress file"),
    Mutant("finetuning/cli/arguments.py", '        os.environ.pop("MPLBACKEND", None)', "        pass", "test_progress file"),
    Mutant("finetuning/generation/evaluate.py", "generate(model.get_base_model(), tokenizer, prompts", "generate(model, tokenizer, prompts", "test_progress before"),
    Mutant("finetuning/generation/evaluate.py", "    with model.disable_adapter():\n", "    if True:\n", "test_progress before"),
    Mutant("finetuning/preprocessing/token_dataset.py", "sum(map(len, ids)), sum(learnt)", "sum(map(len, ids)), 0", "test_train_lora add_up"),
    Mutant("finetuning/preprocessing/served_template.py", '"assistant", "content": ""}', '"assistant"}', "test_merge_adapter every_prompt"),
    # merged checkpoints
    Mutant("finetuning/adapter/checkpoint_copy.py", "            for name in file.keys():\n", "            for name in [it for it in file.keys() if 'mtp' not in it]:\n", "test_merge_adapter equals_base and whole"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "    write_json(output / \"config.json\", config)", "    pass", "test_merge_adapter never_answered"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "        if saved:\n", "        if False:\n", "test_merge_adapter mistakes"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "    if free < size:\n", "    if False:\n", "test_merge_adapter mistakes"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "if folder.exists() and (not", "if False and (not", "test_merge_adapter mistakes"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "    if unverified.exists():\n", "    if False:\n", "test_merge_adapter otherwise"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "and not all(tensors[key].isfinite().all() for key in new)", "and False", "test_merge_adapter mistakes"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "    except BaseException:  # also Ctrl-C\n        shutil.rmtree(folder)\n        raise", "    finally:\n        pass", "test_merge_adapter mistakes"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "        if not is_disk_error(error):\n            raise\n        fail(", "        if not is_disk_error(error):\n            raise\n        raise RuntimeError(", "test_merge_adapter full_disk"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "        shutil.copymode(output", "        (output", "test_merge_adapter beside"),
    Mutant("finetuning/adapter/checkpoint_copy.py", "if name not in SAMPLING}", "}", "test_merge_adapter beside"),
    Mutant("finetuning/adapter/checkpoint_copy.py", 'if "added_tokens_decoder" in config:', "if False:", "test_merge_adapter beside"),
    Mutant("finetuning/adapter/checkpoint_copy.py", '        if "chat_template" in content:\n', "        if False:\n", "test_merge_adapter beside"),
    Mutant("finetuning/adapter/merging.py", "    if found and export", "    if False and export", "test_merge_adapter mistakes"),
    Mutant("finetuning/adapter/merging.py", "    if not layer.merged:\n", "    if False:\n", "test_merge_adapter equals_base and lora"),
    Mutant("finetuning/adapter/merging.py", "    if is_tied(model) and {HEAD, embedding} & changes.keys():", "    if False:", "test_merge_adapter variants and tied"),
    Mutant("finetuning/adapter/merging.py", " | (answer(old) if tied else {})", "", "test_merge_adapter never_answered"),
    Mutant("finetuning/adapter/merging.py", "= new[len(old) :] = never_answered(old, used).to(new.dtype)", "= prompt", "test_merge_adapter never_answered"),
    Mutant("finetuning/adapter/merging.py", "return -(-(used + count) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE", "return used + count", "test_merge_adapter never_answered"),
    Mutant("finetuning/adapter/merging.py", "    if used + count <= rows:\n", "    if False:\n", "test_merge_adapter spare"),
    Mutant("finetuning/adapter/merging.py", 'if architecture.endswith("ForConditionalGeneration"):', "if False:", "test_merge_adapter exported"),
    Mutant("finetuning/adapter/merging.py", "if any(token.startswith(SOFT_TOKEN) for token in tokenizer.get_vocab()):", "if False:", "test_merge_adapter on_top"),
    Mutant("finetuning/preprocessing/templates.py", "and MERGED_MARK in tokenizer.chat_template:", "and False:", "test_merge_adapter every_prompt"),
    Mutant("finetuning/preprocessing/served_template.py", "+ NO_SOFT_TOKEN + body.removesuffix(\"\\n\") + \"{% endfilter %}\"", "+ body", "test_merge_adapter every_prompt"),
    Mutant("finetuning/preprocessing/served_template.py", "or together != encode_messages(messages, tokenizer)[0] + start:", "or False:", "test_served_template plain"),
    Mutant("finetuning/preprocessing/served_template.py", "    if any(answer[: len(start)] != start for answer in answers):\n        return \"\"\n", "", "test_served_template plain"),
    Mutant("finetuning/preprocessing/served_template.py", "                return None\n    return pieces", "                pass\n    return pieces", "test_served_template beyond"),
    Mutant("finetuning/generation/verification.py", "            and tokens <= handed_over * len(self.differences)\n", "", "test_verification"),
    Mutant("finetuning/generation/verification.py", "self.prompts == self.rows\n            and", "", "test_verification"),
    Mutant("finetuning/generation/verification.py", "            and answers <= math.ceil(handed_over * self.rows)\n", "", "test_verification"),
    Mutant("finetuning/generation/verification.py", "            and all(map(math.isfinite, self.differences))\n", "", "test_verification"),
    Mutant("finetuning/generation/verification.py", "HANDED_OVER if self.experts else 0", "0", "test_verification"),
    Mutant("finetuning/generation/verification.py", "HANDED_OVER if self.experts else 0", "HANDED_OVER", "test_verification"),
    Mutant("merge_adapter.py", "    if not comparison.is_good(dtype):\n", "    if False:\n", "test_merge_adapter otherwise"),
    Mutant("merge_adapter.py", '    if info.get("quantization"):', "    if False:", "test_merge_adapter 4_bits"),
    # several processes
    Mutant("finetuning/training/processes.py", "        yield from [[] for _ in range(len(self) - len(self.batches))]\n", "", "test_distributed each_row"),
    Mutant("finetuning/training/trainer.py", "return share_rows_once(super().get_train_dataloader())", "return super().get_train_dataloader()", "test_distributed equal_one"),
    Mutant("finetuning/training/trainer.py", "eval_dataset = fill_up(eval_dataset, args.eval_batch_size * args.world_size)", "pass", "test_distributed equal_one"),
    Mutant("finetuning/training/trainer.py", "        output.metrics[f\"{metric_key_prefix}_loss\"] = total / count\n", "", "test_distributed equal_one"),
    Mutant("finetuning/training/collators.py", "for row in rows or [BLANK_ROW]]\n        input_ids = torch.tensor", "for row in rows]\n        input_ids = torch.tensor", "test_distributed without_rows"),
    Mutant("finetuning/training/processes.py", "    if engine and use_cpu:\n", "    if False:\n", "test_distributed not_granted"),
    Mutant("finetuning/training/processes.py", 'if engine and "LOCAL_RANK" not in os.environ:', "if False:", "test_distributed launcher"),
    Mutant("finetuning/training/flags.py", "flags.use_cpu = flags.use_cpu or not torch.accelerator.is_available()", "pass", "test_distributed by_default"),
    Mutant("finetuning/training/callbacks.py", "            self.caught = int(caught)\n", "", "test_distributed agree"),
    Mutant("finetuning/cli/console.py", "        time.sleep(PATIENCE)\n", "", "test_distributed speaks"),
    Mutant("finetuning/cli/console.py", "        Path(file).write_text(json.dumps(report), encoding=\"utf-8\")\n", "        pass\n", "test_distributed mistake_is"),
    Mutant("finetuning/training/checkpoints.py", "        if rows != these:\n", "        if False:\n", "test_distributed may_change"),
    Mutant("finetuning/training/checkpoints.py", "    if old != new:\n        fail(\n", "    if False:\n        fail(\n", "test_distributed may_change"),
    Mutant("finetuning/training/processes.py", "    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})\n", "", "test_sharding every_family"),
    Mutant("finetuning/training/processes.py", "    plugin.mixed_precision_policy = MixedPrecisionPolicy()\n", "", "test_sharding every_family"),
    Mutant("finetuning/training/processes.py", '    plugin.set_state_dict_type("SHARDED_STATE_DICT")\n', "", "test_sharding state_dicts"),
    Mutant("finetuning/adapter/base_model.py", "bnb_4bit_quant_storage=dtype if sharded else torch.uint8,", "", "test_sharding storage"),
    Mutant("finetuning/adapter/base_model.py", "2 * parameter.nbytes if in_4bit", "2 * parameter.numel() if in_4bit", "test_sharding share"),
    Mutant("common.py", 'and (quantized or not sharded) else None', 'else None', "test_sharding weights_go"),
    Mutant("finetuning/adapter/sharding.py", "(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)", "tensor", "test_sharding equals_one"),
    Mutant("finetuning/training/losses.py", "self.head.register_forward_pre_hook(keep_hidden, prepend=True)", "self.head.register_forward_pre_hook(keep_hidden)", "test_sharding fully_shard"),
    # the benchmark
    Mutant("finetuning/benchmarking/table.py", "if not difference <= tolerance:", "if difference > 99:", "test_benchmark compared"),
    Mutant("finetuning/benchmarking/table.py", "            count = count or HALF_PRECISION_STEPS\n", "            pass\n", "test_benchmark compared"),
    Mutant("finetuning/benchmarking/table.py", 'if tolerance > LARGEST_DIFFERENCE["float32"]:', "if True:", "test_benchmark compared"),
    Mutant("finetuning/benchmarking/pages.py", "sub(lambda _: f\"\\n{table}\\n\\n\", text)", "sub(f\"\\n{table}\\n\\n\", text)", "test_benchmark report"),
    Mutant("finetuning/benchmarking/pages.py", "!= 1:", "== 3:", "test_benchmark report"),
    Mutant("benchmark.py", "            save_results(args.output_dir, run, results, failures)\n", "        save_results(args.output_dir, run, results, failures)\n", "test_benchmark kept"),
    Mutant("finetuning/benchmarking/child.py", "    if returncode < 0:\n", "    if False:\n", "test_benchmark reason"),
    Mutant("finetuning/benchmarking/child.py", "    if messages:\n", "    if False:\n", "test_benchmark reason"),
    Mutant("finetuning/benchmarking/child.py", "return exceptions[0] if exceptions else", "return lines[-1] if exceptions else", "test_benchmark reason"),
    Mutant("finetuning/benchmarking/shapes.py", "    torch.manual_seed(0)\n", "", "test_benchmark class"),
    Mutant("finetuning/benchmarking/shapes.py", "        files |= dict.fromkeys(weights, file)\n", "        files |= dict.fromkeys(weights, file)\n        globals().setdefault('held', []).append(weights)\n", "test_benchmark need_the_memory"),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Run the mutant's tests in a copy; returns whether they pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(
            REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "outputs", "models", "data", "__pycache__")
        )
        for name in ("models", "data"):
            (copy / name).symlink_to(REPOSITORY / name)
        text = (copy / mutant.file).read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            print(f"  occurs {text.count(mutant.old)} times")
            return True
        (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        name, _, words = mutant.test.partition(" ")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
        command += [str(path) for path in (copy / "tests").rglob(f"{name}.py")] + (["-k", words] if words else [])
        result = subprocess.run(command, cwd=copy, capture_output=True, encoding="utf-8", check=False)
        if result.returncode not in (0, 1):  # no test ran, or the mutant does not parse
            print("  " + result.stdout.strip().splitlines()[-1])
        return result.returncode != 1


def main() -> None:
    mutants = [mutant for mutant in MUTANTS if all(word in " ".join(mutant) for word in sys.argv[1:])]
    survivors = 0
    for number, mutant in enumerate(mutants, 1):
        lives = survives(mutant)
        survivors += lives
        print(
            f"{number:3} {'SURVIVES' if lives else 'killed  '} {mutant.file}: {mutant.old.strip()[:80]!r}", flush=True
        )
    print(f"{len(mutants)} mutants, {survivors} survive")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
