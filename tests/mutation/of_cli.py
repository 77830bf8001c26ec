"""Mutants of cli/: name, file, text, what takes its place, the tests that must fail, the bug."""

MUTANTS = (
    ("cli-interrupt-in-an-import", "cli/main.py",
     "    signal.signal(signal.SIGINT, signal.SIG_DFL)\n",
     "",
     "cli/test_generate.py::test_interrupted_while_torch_is_imported", "Ctrl-C is an exception in the middle of an import"),
    ("cli-no-interrupt-after-imports", "cli/main.py",
     "        signal.signal(signal.SIGINT, signal.default_int_handler)\n",
     "        pass\n",
     "cli/test_main.py::test_exit_statuses", "Ctrl-C ends a run with no word to the other ranks"),
    ("cli-flags-never-compared", "cli/main.py",
     'if f.metadata.get("agreed")}',
     'if f.metadata.get("compared")}',
     "cli/test_generate.py::test_one_rank_s_mistake_is_everyone_s", "ranks may be started with other flags"),
    ("device-of-any-spelling", "cli/flags.py",
     'if not re.fullmatch(r"[a-z_]+(:\\d+)?", text):',
     "if False:",
     "project/test_devices.py::test_a_mistyped_device_is_answered_without_torch", "torch is imported to answer a mistyped device"),
    ("plan-gpu-limits-of-a-cpu", "plan.py", "(GPU_BANDWIDTHS if rank.gpu else [])", "GPU_BANDWIDTHS",
     "cli/test_plan.py::test_a_cpu_gets_no_limits_at_a_gpus_bandwidths", "a CPU's decode limits are at GPUs' bandwidths"),
    ("output-error-unsaid", "cli/flags.py", "        raise OutputError(e.strerror or str(e)) from None", "        raise",
     "cli/test_output_errors.py::test_an_answer_to_a_full_device_is_one_line", "a full device shows a traceback"),
)  # fmt: skip
