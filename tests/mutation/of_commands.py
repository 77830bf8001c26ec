"""Mutants of the commands: name, file, text, what takes its place, the tests that must fail, the bug."""

MUTANTS = (
    ("server-open-to-others", "server.py",
     "if not is_loopback(options.host) and options.api_key is None:",
     "if False:",
     "serving/test_server.py::test_wrong_flags", "other machines are let in without a key"),
)  # fmt: skip
