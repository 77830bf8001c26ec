"""Mutants of the commands: name, file, text, what takes its place, the tests that must fail, the bug."""

MUTANTS = (
    ("server-open-to-others", "server.py",
     "if not is_loopback(options.host) and options.api_key is None:",
     "if False:",
     "serving/test_server.py::test_wrong_flags", "other machines are let in without a key"),
    ("plan-without-headers", "plan.py",
     "checkpoint.match(checkpoint.partition_of_files(partition))",
     "checkpoint.on_disk(0, options.tp)",
     "checkpoint/test_catalogue.py::test_refused", "plan takes weights of another shape or dtype than the config's, which do not load"),
    ("plan-cache-of-one-lane", "plan.py",
     '"tokens": rank.lanes * pages * PAGE_SIZE',
     '"tokens": pages * PAGE_SIZE',
     "cli/test_plan.py::test_lanes", "one lane's cache is shown for all"),
    ("plan-files-of-as-many-ranks", "plan.py",
     "checkpoint.match(checkpoint.partition_of_files(partition))",
     "checkpoint.match(partition)",
     "cli/test_plan.py::test_files_for_other_ranks", "a plan refuses converted files that a run takes"),
    ("plan-one-lane-only", "plan.py",
     "first_that_works(divide, world) if options.any_dp else divide(options.dp)",
     "divide(options.dp)",
     "cli/test_plan.py::test_layouts_where_not_every_number_of_lanes_divides", "layouts are refused because one lane does not divide"),
)  # fmt: skip
