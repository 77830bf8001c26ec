"""Mutants of parallel/: name, file, text, what takes its place, the tests that must fail, the bug."""

MUTANTS = (
    ("ranks-nan-from-anybody", "parallel/group.py",
     "for i, part in enumerate(self.partial_sums) if not part.isfinite()), MAX_PARTIAL_SUMS)",
     "for i, part in enumerate(self.partial_sums)), MAX_PARTIAL_SUMS)",
     "parallel/test_faults.py::test_nan_in_one_rank", "NaN is not traced to the rank it came from"),
    ("ranks-part-holds-on", "parallel/group.py",
     "            if acquired:\n                self.process.exit_lock.release()\n",
     "",
     "parallel/test_parallel.py::test_interrupted_while_parting_still_leaves_with_a_line", "Ctrl-C at the very end hangs"),
    ("ranks-unordered-sums", "parallel/group.py",
     "if not self.ordered or self.size == 2:",
     "if True:",
     "parallel/test_parallel.py::test_ordered_sums_do_not_depend_on_their_size", "batch-invariant mode: sums over four ranks in the library's order"),
    ("ranks-threads-of-all", "parallel/startup.py",
     "threads = asked or max(1, cores // local_size)",
     "threads = asked or cores",
     "engine/test_engine.py::test_ranks_of_a_host_share_it", "every rank of a host takes a thread for each core"),
)  # fmt: skip
