"""The conformance suite: its weights, golden files and runner; ports that pass it, and mistakes that it names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import check_port
import exact_math
import goldens
import hashed_weights
import judge
from families import FAMILIES, KEPT
from mistakes import MISTAKES
from mistakes.names import IN_VERIFY
from support.processes import environment

ROOT = Path(__file__).parents[2]
CONFORMANCE = ROOT / "conformance"
LEVELS = ("default", "avx2", "avx512")
ORIGINAL = ROOT / ".peers" / "DeepSeek-V3"
MASK = (1 << 64) - 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("conformance")


def run(*arguments, **env):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(**env), timeout=600)


def check(checkpoints, *arguments):
    return run(CONFORMANCE / "check_port.py", "--checkpoints", checkpoints, *arguments)


def engine(mode, points=False):
    """This engine as a port, in this process."""
    from adapters.engine import answer

    return lambda family, folder, tokens: answer(folder, tokens, mode, points)


def wrong(name):
    """A port that has a known mistake, as the suite itself would have it: only the report is tested with it."""

    def port(family, folder, tokens):
        found = judge.expected(family, False, name)
        return {point: found[point] for point in ("logits", "mtp.0.logits") if point in found}

    return port


# --- weights -----------------------------------------------------------------------------------------------------------


def splitmix64(name, i):
    """The rule of docs/porting.md in plain integers."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 & MASK
    x = (h + (i + 1) * 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def fields(r, bits):
    return sum(r >> at & (1 << bits) - 1 for at in (0, 16, 32, 48)) - 2 * ((1 << bits) - 1)


def test_weights_are_the_rule(checkpoints):
    """Recomputed in integers from docs/porting.md's page, for elements of every kind of tensor."""
    hashed_weights.write_checkpoint("v3-fp8", checkpoints / "v3-fp8")
    stored = {k: t for file in (checkpoints / "v3-fp8").glob("*.safetensors") for k, t in load_file(file).items()}
    seen = set()
    for name, tensor in stored.items():
        if ".experts." in name and ".experts.3." not in name:
            continue
        flat, width = tensor.flatten(), tensor.shape[-1]
        for i in (0, 1, len(flat) // 2, len(flat) - 1):
            own = name.replace("model.layers.2.embed_tokens", "model.embed_tokens").replace("model.layers.2.shared_head.head", "lm_head")
            r, value = splitmix64(own, i), float(flat[i].double())
            n = fields(r, 6)
            front = 4 if "q_a_proj" in own or ("kv_a_proj" in own and i // width < 128) else 0
            if own.endswith("_scale_inv"):
                shrink = len(f"{stored[own.removesuffix('_scale_inv')].shape[1]:b}") // 2
                rule, wanted = "scale", ((1 << 23) + (r & (1 << 23) - 1)) * 2.0 ** (-30 - shrink)
            elif own.endswith("correction_bias"):
                rule, wanted = "bias", (fields(r, 16) - 65536) / 65536
            elif tensor.dim() == 1:
                rule, wanted = "norm", (128 + (3 * n >> 2)) / 128
            elif own == "model.embed_tokens.weight":
                rule, wanted = "embedding", n / 512
            elif tensor.dtype == torch.float8_e4m3fn:
                bits = max(len(f"{abs(n):b}") - 4, 0)
                rule, wanted = "fp8", 2 * (abs(n) >> bits << bits) * (1 if n > 0 else -1) / 2**front
            else:
                rule, wanted = "matrix", n * 2.0 ** (-5 - len(f"{width:b}") // 2 - front)
            seen.add((rule, tensor.dtype))
            assert value == wanted, (name, i)
    assert len(seen) == 6


def test_the_document_has_the_vectors():
    text = (ROOT / "docs" / "porting.md").read_text()
    for name, row in hashed_weights.vectors().items():
        assert f"`{name}`" in text and row["hash"] in text and row["r"][0] in text and row["r"][1] in text, name


def test_checkpoints_are_what_the_loader_expects(checkpoints):
    """Every family's directory loads as a released one does, and nothing in it is left over."""
    from checkpoint.directory import Checkpoint

    for family in FAMILIES:
        if not (checkpoints / family).exists():
            hashed_weights.write_checkpoint(family, checkpoints / family)
        checkpoint = Checkpoint(checkpoints / family)
        assert checkpoint.args is not None and checkpoint.has_mtp == bool(FAMILIES[family].get("num_nextn_predict_layers"))


# --- golden values -----------------------------------------------------------------------------------------------------


def test_functions_are_exact():
    x = torch.linspace(-60, 60, 20001, dtype=torch.float64)
    assert float((exact_math.ordered_exp(x) / x.exp() - 1).abs().max()) < 4e-16
    x = torch.linspace(0, 2000, 20001, dtype=torch.float64)
    cos, sin = exact_math.ordered_cos_sin(x)
    assert float((cos - x.cos()).abs().max()) < 4e-16 and float((sin - x.sin()).abs().max()) < 4e-16
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).double()
    every = every[every.isfinite()]
    assert torch.equal(exact_math.to_e4m3(every), every.clamp(-448, 448).float().to(torch.float8_e4m3fn).double())


@pytest.mark.parametrize("family", ["v2-lite", pytest.param("v3", marks=pytest.mark.trust)])
def test_golden_files_are_what_is_computed_here(family):
    assert goldens.encoded(family) == goldens.file_of(family).read_bytes()


def test_golden_files_are_small():
    sizes = {family: goldens.file_of(family).stat().st_size for family in FAMILIES}
    assert max(sizes.values()) <= 200_000, sizes


@pytest.mark.trust
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", LEVELS)
def test_golden_files_have_the_same_bytes_everywhere(level, threads):
    """Whatever instruction sets torch uses (a processor without AVX-512 takes its next best), and threads."""
    done = run(CONFORMANCE / "goldens.py", "--check", ATEN_CPU_CAPABILITY=level, OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_golden_file_that_differs_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(goldens, "FOLDER", tmp_path)
    (tmp_path / "v2-lite.safetensors").write_bytes(goldens.encoded("v2-lite")[:-1] + b"?")
    monkeypatch.setattr(sys, "argv", ["goldens.py", "--check", "--family", "v2-lite"])
    assert goldens.main() == 1
    assert "v2-lite.safetensors differs" in capsys.readouterr().out


def test_every_family_decides_clearly():
    """But for the position of v3 that a rounded bias turns, and the one whose draft sees it."""
    for family in FAMILIES:
        unclear = (~judge.clear(family, False)[-KEPT :]).nonzero().flatten().tolist()
        assert unclear == ([12, 13] if family == "v3" else []), family


# --- ports that pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, format, points", [
    ("float32", "float32", True), ("cpu", "bfloat16", True), ("w8a8", "w8a8", True),
    pytest.param("reference", "bfloat16", True, marks=pytest.mark.trust),
    pytest.param("w8a8-bfloat16", "w8a8-bfloat16", True, marks=pytest.mark.trust),
])  # fmt: skip
def test_this_engine_passes(checkpoints, mode, format, points):
    families = list(FAMILIES) if mode == "float32" else ["v3", "v3.1-fp8", "moonlight"]
    report = check_port.check(engine(mode, points), format, families, checkpoints)
    assert all(row.passed for row in report.rows), check_port.text(report)
    assert not points or all(len(row.findings) > 40 for row in report.rows)


def test_this_engine_passes_by_its_command(checkpoints):
    done = check(checkpoints, "--families", "v2-lite", "--command", f"{sys.executable} conformance/adapters/engine.py --points")
    assert done.returncode == 0 and "1 of 1 families pass (float32)" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("families", [
    ("v2", "v3", "glm-4.7-flash"), pytest.param(tuple(FAMILIES), marks=pytest.mark.trust),
], ids=["some", "all"])  # fmt: skip
def test_transformers_pass(checkpoints, families):
    import transformers

    from adapters.transformers_port import answer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report = check_port.check(lambda _, folder, tokens: answer(folder, tokens), "float32", list(families), checkpoints)
    assert all(row.passed for row in report.rows), check_port.text(report)
    assert all(len(row.findings) > 10 for row in report.rows)


@pytest.mark.skipif(not ORIGINAL.exists(), reason="needs the user's copy of deepseek-ai/DeepSeek-V3 in .peers/")
@pytest.mark.parametrize("families, format, named", [
    (("v2-lite", "v2"), "float32", {"yarn-and-mscale-by-context-limit": ("v2",)}),
    pytest.param(tuple(FAMILIES), "float32", {"norm-eps": ("glm-4.7-flash", "moonlight"), "yarn-and-mscale-by-context-limit": ("v2",)},
                 marks=pytest.mark.trust),
    pytest.param(tuple(FAMILIES), "w8a8", {"fp8-ue8m0-parallel-not-reached": ("v3.1-fp8",), "yarn-and-mscale-by-context-limit": ("v2",)},
                 marks=pytest.mark.trust),
], ids=["some", "float32", "w8a8"])  # fmt: skip
def test_the_original_models_deviations(checkpoints, tmp_path, families, format, named):
    """Those that docs/porting.md lists; every other family passes."""
    command = f"{sys.executable} conformance/adapters/original_demo.py {ORIGINAL}"
    wanted = {family for families in named.values() for family in families}
    done = check(checkpoints, "--format", format, "--command", command, "--json", tmp_path / "r.json", "--families", *families)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert {row["name"]: tuple(sorted(row["families"])) for row in report["named"]} == named
    assert {family for family, row in report["families"].items() if row["outcome"] != "pass"} == wanted


# --- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_named_by_logits_alone(checkpoints):
    families = ["v3", "v2-lite"]
    for name in ("routing-group-max", "yarn-no-ramp", "mscale-once", "mtp-concat-order", "norm-rounded-twice"):
        report = check_port.check(wrong(name), "float32", families, checkpoints)
        assert [named.name for named in report.named] == [name], check_port.text(report)
        assert name in check_port.text(report) and MISTAKES[name].says in check_port.text(report)


def test_names_in_verify_are_its_own():
    from verification import mistakes_attention, mistakes_formats, mistakes_moe, mistakes_norms  # noqa: F401  fill the list
    from verification.mistakes import MISTAKES as ITS

    assert IN_VERIFY.keys() <= MISTAKES.keys()
    assert set(IN_VERIFY.values()) <= {mistake.name.partition(":")[0] for mistake in ITS}
    one, other = (check_port.text(check_port.Report("float32", [], [judge.Named(name, ("v3",), 0.0)]))
                  for name in ("yarn-no-ramp", "mtp-concat-order"))  # fmt: skip
    assert "(in verify.py: rope-no-ramp)" in one and "verify.py" not in other


def test_two_mistakes_in_two_families(checkpoints):
    one, other = wrong("mtp-concat-order"), wrong("mscale-not-read")
    report = check_port.check(lambda f, *rest: (one if f == "v3" else other)(f, *rest), "float32", ["v3", "v2-lite"], checkpoints)
    assert {named.name: named.families for named in report.named} == {"mtp-concat-order": ("v3",), "mscale-not-read": ("v2-lite",)}


def test_a_mistake_that_would_show_elsewhere_is_not_named(checkpoints):
    """V3 with the heads of kv_b_proj innermost; V2-Lite right, which such a port would not be."""
    mixed = {"v3": wrong("mla-kv-b-heads"), "v2-lite": wrong("")}
    report = check_port.check(lambda f, *rest: mixed[f](f, *rest), "float32", list(mixed), checkpoints)
    assert not report.named and "v3: no known mistake has these values" in check_port.text(report)


@pytest.mark.parametrize("order", [list, reversed])
def test_one_of_two_that_look_alike_in_the_family_that_fails(checkpoints, monkeypatch, order):
    """V2 has the same values with YaRN left out everywhere and with YaRN by the context limit; V3 tells them apart."""
    monkeypatch.setattr(judge, "MISTAKES", dict(order(MISTAKES.items())))
    for name, wanted in (("yarn-by-context-limit", ["yarn-by-context-limit"]), ("yarn-left-out", ["yarn-left-out"])):
        report = check_port.check(wrong(name), "float32", ["v2", "v3"], checkpoints)
        assert [named.name for named in report.named] == wanted, check_port.text(report)


def test_the_first_wrong_point_is_shown(checkpoints):
    def port(family, folder, tokens):
        found = dict(judge.expected(family, False, "norm-of-latents-left-out"))
        found["layers.0.attn.k_rope"] = torch.cat([found["layers.0.attn.k_rope"][..., i::2] for i in (0, 1)], -1)  # halves
        return found

    report = check_port.check(port, "float32", ["v3"], checkpoints)
    [row] = report.rows
    assert row.first and row.first.point == "layers.0.attn.c_kv"
    assert next(f for f in row.findings if f.point == "layers.0.attn.k_rope").passed


def hidden_by_logits():
    """Activations scaled by 224 instead of 448: e4m3's exponent takes it up, so that only the scales differ."""
    return judge.expected("v3-fp8", True, "fp8-saturation") | {"logits": judge.expected("v3-fp8", True)["logits"]}


def test_scales_show_what_logits_hide():
    wrong = [f.point for f in judge.compare(hidden_by_logits(), judge.expected("v3-fp8", True), "v3-fp8", "w8a8") if not f.passed]
    assert wrong[0] == "layers.0.attn_norm.scale"
    assert all(point.endswith(".scale") for point in wrong if point.startswith("layers.0.attn"))


@pytest.mark.trust
def test_scales_alone_name_a_mistake(checkpoints):
    report = check_port.check(lambda *_: hidden_by_logits(), "w8a8", ["v3-fp8"], checkpoints)
    assert [named.name for named in report.named] == ["fp8-saturation"]


def test_other_experts_at_one_position(checkpoints):
    """The gate's bias in bfloat16 shows at v3's position 12."""
    report = check_port.check(wrong("routing-bias-rounded"), "float32", ["v3"], checkpoints)
    assert [named.name for named in report.named] == ["routing-bias-rounded"]
    assert min(f.position for f in report.rows[0].findings if not f.passed) >= 12


def test_every_mistake_shows_somewhere():
    """In the logits of some family, by more than a port may be off; those that cannot are of positions and layouts."""
    silent = []
    families = ["v2-lite", "v3", "kimi-k2", "glm-4.7-flash", "v3.1-fp8", "v3-fp8", "v2"]
    for name, mistake in MISTAKES.items():
        if name == "rope-positions-in-bfloat16":  # moonlight's, whose prompt is long
            continue
        format = mistake.format or "float32"
        for family in families:
            right, other = (judge.expected(family, judge.is_w8a8(family, format), n) for n in ("", name))
            errors = [float(judge.row_errors(other[p], right[p]).max()) / judge.tolerance(p, format)
                      for p in ("logits", "mtp.0.logits") if p in right]  # fmt: skip
            if max(errors) > 2:
                break
        else:
            silent.append(name)
    assert silent == ["rope-position-from-1", "fp8-saturation"]


# --- commands that are wrong -------------------------------------------------------------------------------------------

WRITES = "python -c 'import sys; open(sys.argv[3], \"w\").write(sys.argv[4])' {{checkpoint}} {{input}} {{output}} '{}'"


@pytest.mark.parametrize("command, says", [
    ("no-such-program-here", "no-such-program-here cannot be started: No such file or directory"),
    ("", "--command is empty"),
    ("python -c 'raise SystemExit(\"weights not found\")'", "the command ended with status 1: weights not found"),
    ("python -c 'pass'", "the command wrote nothing to {output}"),
    (WRITES.format("nothing"), "what the command wrote cannot be read"),
    (WRITES.format("{\"logits\": [[1, 2], [3]]}"), "what the command wrote cannot be read"),
    (WRITES.format("{\"logit\": [[1]]}"), "there is no tensor 'logits' among logit"),
    (WRITES.format("{\"logits\": 1.0}"), "logits has shape (), expected (24, 256) or fewer rows"),
    (WRITES.format("{\"logits\": [[1, 2]]}"), "logits has shape (1, 2), expected (24, 256) or fewer rows"),
    (WRITES.format(json.dumps({"logits": [[float("nan")] * 256]})), "logits is not finite"),
    ("python -c 'import time; time.sleep(60)'", "the command took more than 0.5 s (--timeout)"),
    ("python 'unclosed", "No closing quotation"),
], ids=range(12))  # fmt: skip
def test_a_broken_command_gives_one_line(checkpoints, command, says, monkeypatch, capsys):
    seconds = "0.5" if "sleep" in command else "100"
    command = command.replace("python", sys.executable, 1) if command.startswith("python") else command
    monkeypatch.setattr(sys, "argv", ["check_port.py", "--families", "v2-lite", "--checkpoints", str(checkpoints),
                                      "--timeout", seconds, "--command", command])  # fmt: skip
    assert check_port.main() == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and says in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("flags, says", [
    ([], "the following arguments are required: --command"), (["--command", "x", "--timeout", "soon"], "--timeout"),
    (["--command", "x", "--families", "v9"], "invalid choice: 'v9'"),
])  # fmt: skip
def test_wrong_flags_are_one_line(flags, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_port.py", *flags])
    with pytest.raises(SystemExit) as ended:
        check_port.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and says in err and err.count("\n") == 1


def test_an_answer_that_is_barely_wrong_is_nobodys(checkpoints):
    """Farther than the tolerance from the right values, and as near to those of mistakes that do not show there."""

    def port(family, folder, tokens):
        return {"logits": judge.expected(family, False)["logits"] * (1 + 1.5 * judge.tolerance("logits", "float32"))}

    report = check_port.check(port, "float32", ["v2-lite"], checkpoints)
    assert not report.rows[0].passed and not report.named


def test_a_family_that_a_port_does_not_serve(checkpoints):
    def port(family, folder, tokens):
        if family == "v2-lite":
            raise judge.Unusable("model_type deepseek_v2 is not supported")
        return wrong("")(family, folder, tokens)

    report = check_port.check(port, "float32", ["v3", "v2-lite"], checkpoints)
    assert [row.passed for row in report.rows] == [True, False] and not report.named
    assert "error: model_type deepseek_v2 is not supported" in check_port.text(report)


def test_other_files_than_safetensors(tmp_path):
    import numpy as np

    path = tmp_path / "out"
    values = torch.arange(6.0).reshape(2, 3)
    path.write_text(json.dumps({"logits": values.tolist()}))
    assert torch.equal(check_port.read_answer(path)["logits"], values)
    with path.open("wb") as file:
        np.save(file, values.numpy())
    assert torch.equal(check_port.read_answer(path)["logits"], values)
    save_file({"logits": values}, path)
    assert torch.equal(check_port.read_answer(path)["logits"], values)


# --- this engine with known mistakes in it -----------------------------------------------------------------------------


def suite(tmp_path, *arguments):
    path = tmp_path / "counts.json"
    done = run(ROOT / "tests" / "mutation" / "conformance_suite.py", "--json", path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())["results"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_mutants_of_this_engine_fail_and_are_named(tmp_path):
    found = suite(tmp_path, "--only", "moe-weights-of-others", "norm-wrong-one", "--families", "v2-lite")
    assert found["of"] == found["fail"] == found["named_by_logits"] == found["named_by_points"] == 2


def test_the_committed_counts_are_of_these_mistakes():
    """Nobody changed the list without running the mutants again; enough of them fail and are named."""
    found = json.loads((ROOT / "benchmarks" / "results" / "conformance.json").read_text())["results"]
    assert found["mistakes"] == {m.name: {"says": m.says, "signature": m.signature} for m in MISTAKES.values()}
    assert found["fail"] == found["of"] == len(found["mutants"]) >= 40
    assert min(found["named_by_logits"], found["named_by_points"]) >= 30
    assert {row["is"] for row in found["mutants"].values()} <= {*MISTAKES, "moe-first-dense-layers", "mtp-layer-61"}


@pytest.mark.trust
def test_every_mutant_fails_and_most_are_named(tmp_path):
    found = suite(tmp_path)
    committed = json.loads((ROOT / "benchmarks" / "results" / "conformance.json").read_text())["results"]
    assert found["fail"] == found["of"] == committed["of"] >= 40
    assert min(found["named_by_logits"], found["named_by_points"]) >= 30
    assert found["named_by_logits"] == committed["named_by_logits"]
