"""check_checkpoint.py beyond the corpus of test_damage.py: all findings at once, what it reads, and the command."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_convert import DEMO

import check_checkpoint
from checkpoint import check_values
from checkpoint.check import check
from checkpoint.manifest import HF_INDEX
from checkpoint.report import CHECKS
from support import damaged_checkpoints as damage
from support import fork_server
from support.damaged_checkpoints import KINDS, change_tensor, edit, good_checkpoint, place, put


def run(*flags: object) -> subprocess.CompletedProcess:
    return fork_server.run([sys.executable, check_checkpoint.__file__, *flags])


def found(folder: Path, quick: bool = False) -> list[str]:
    return [str(finding.problem).replace(f"{folder}/", "") for finding in check(folder, quick).findings]


def test_all_faults_are_told(copy):
    """One of each kind of fault, in nine files of three sorts: none hides another."""
    for name in ("extra expert", "NaN for a scale", "zeroed norm", "NaN in a router's bias",
                 "MTP head of another model", "negative temperature", "template with two BOS", "extra file",
                 "norm in float64"):  # fmt: skip
        KINDS[name].damage(copy)
    file = damage.files(copy)[3]
    file.write_bytes(file.read_bytes()[:-1])
    said = found(copy)
    for text in (
        "truncated: expected", "experts.4.up_proj.weight: the config has no such tensor", "found NaN or infinity at [3], 1",
        "input_layernorm.weight: expected weights, found nothing but zeros", "temperature is -1.0", "found 2",
        "model-00099-of-00099.safetensors: not named by", "expected BF16 192 (or F32, F16), found F64 192",
    ):  # fmt: skip
        assert sum(text in line for line in said) == 1, (text, said)
    assert not any("is missing" in line for line in said), "what an unreadable file may hold is not called missing"


def test_many_of_a_kind_in_order(copy):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                tensor[0, 0] = -1

    for file in damage.files(copy):
        edit(file, spoil)
    report = check(copy)
    scales = sum(name.endswith("_scale_inv") for name in damage.whole(copy))
    assert [finding.check for finding in report.findings] == ["scales"] * scales
    places = [(str(f.problem.file), f.problem.tensor) for f in report.findings]
    assert places == sorted(places) and len(set(places)) == scales
    assert found(copy, quick=True) == []


def test_quick_reads_no_weights(good, monkeypatch):
    monkeypatch.setattr(check_values, "Reader", None)
    report = check(good, quick=True)
    assert report.ok and report.looked.keys() == set(CHECKS) - {"scales", "weights", "copies"}


@pytest.mark.parametrize("window", [1, 1000, 1 << 22])
def test_windows_of_any_size(copy, window, monkeypatch):
    file, name = change_tensor("mlp.gate.weight", put(lambda t: t[2:, 5].fill_(float("nan"))), copy)
    monkeypatch.setattr(check_values, "WINDOW", window)
    monkeypatch.setattr(check_values, "BATCH", 1 << 16)
    assert found(copy) == [f"{file}: {name}: expected finite values, found NaN or infinity at [2, 5], 2 such"]


def test_interrupted(good, monkeypatch):
    """Ctrl-C waits for the tensor in hand, and not for the gigabyte that its thread has taken on."""
    looked: list[str] = []
    stopped = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *args, **options):
            stopped.set()
            super().shutdown(*args, **options)

    def problems(entry, *_):
        looked.append(entry.name)
        if len(looked) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert stopped.wait(30)
        return iter(())

    monkeypatch.setattr(check_values, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(check_values, "weight_problems", problems)
    with pytest.raises(KeyboardInterrupt):
        check(good)
    assert len(looked) == 3


def test_a_hole_in_a_weight(copy, monkeypatch):
    """As a download leaves it that was cut in pieces. Rows of zeros that fill up the vocabulary are none."""
    monkeypatch.setattr(check_values, "CHUNK", 1 << 12)
    change_tensor("lm_head.weight", put(lambda t: t[200:].zero_()), copy)
    for file in damage.files(copy):  # the MTP head repeats it
        edit(file, lambda tensors: [t[200:].zero_() for n, t in tensors.items() if n.endswith("shared_head.head.weight")])
    assert found(copy) == []
    file, name = change_tensor(damage.WEIGHT, put(lambda t: t[64:128].view(torch.uint8).zero_()), copy)
    assert found(copy) == [f"{file}: {name}: expected weights, found 16,384 zeros in a row of 49,152 values"]


def test_a_bias_of_zeros_is_none_of_our_business(copy):
    change_tensor(damage.BIAS, put(torch.zero_), copy)
    assert found(copy) == []


def test_released_scales_that_are_no_powers_of_two(tmp_path):
    """V3.1-Terminus has them in o_proj: a warning."""
    good_checkpoint(tmp_path / "a", "ue8m0")
    file, name = change_tensor(damage.SCALE, put(lambda t: t.fill_(0.003)), tmp_path / "a")
    report = check(tmp_path / "a")
    assert report.ok and [str(f.problem) for f in report.findings] == [
        f"{tmp_path}/a/{file}: {name}: expected powers of two (scale_fmt ue8m0), found 0.003000000026077032 at [0, 0], 4 such"
    ]
    assert list(report.lines())[-1].startswith("warning: ")


def test_a_vocabulary_far_too_small(copy):
    for ending in ("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight"):
        for file in damage.files(copy):
            edit(file, lambda tensors, ending=ending: tensors.update(
                {n: torch.cat([t, t]) for n, t in tensors.items() if n.endswith(ending)}))  # fmt: skip
    damage.configure({"vocab_size": 640}, copy)
    assert found(copy) == ["tokenizer.json: expected about 640 ids, the rows of the embedding, found 261"]


def test_a_rounded_bias_is_a_warning_of_the_report(tmp_path, capsys):
    good_checkpoint(tmp_path / "a", "bf16")
    for file in damage.files(tmp_path / "a"):
        edit(file, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    report = check(tmp_path / "a")
    (finding,) = report.findings
    assert report.ok and "BF16, not float32: they were rounded when they were saved" in str(finding.problem)
    assert "rounded" not in capsys.readouterr().err


def test_base_models_and_missing_modules_are_warnings(copy):
    damage.drop(copy, lambda name: ".layers.2." in name)
    damage.template(lambda _: None, copy)
    report = check(copy)
    assert report.ok and [str(f.problem) for f in report.findings] == [
        f"{copy}: no MTP module, though its config names one",
        f"{copy}: no chat template: a base model, for generate.py --raw",
    ]


def test_links_as_in_the_hugging_face_cache(good, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(good, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert found(snapshot) == []


def test_the_demo(capsys):
    report = check(DEMO)
    assert report.ok and not report.findings
    assert report.subject["tensors"] == len(json.loads((DEMO / HF_INDEX).read_text())["weight_map"])


def test_command_line(good, copy, tmp_path):
    done = run(good, "--quick")
    assert done.returncode == 0 and "✓ tensors" in done.stdout and "– weights            not looked at" in done.stdout
    file, name = KINDS["NaN for a scale"].damage(copy)
    done = run(copy, "--json")
    assert done.returncode == 1 and "checking: 100%" in done.stderr
    told = json.loads(done.stdout)
    assert not told["ok"] and told["findings"] == [{
        "check": "scales", "fault": True, "file": str(copy / file), "tensor": name,
        "expected": "finite, positive scales", "found": "nan at [1, 0]",
        "message": f"{copy / file}: {name}: expected finite, positive scales, found nan at [1, 0]",
    }]  # fmt: skip
    assert {c["check"]: c["ok"] for c in told["checks"]} == dict.fromkeys(CHECKS, True) | {"scales": False}


def test_what_was_not_looked_at_has_no_tick(tmp_path):
    """A BF16 model without an MTP module, a template or a generation config: nothing stands for what is not there."""
    good_checkpoint(tmp_path / "a", "bf16")
    damage.drop(tmp_path / "a", lambda name: ".layers.2." in name)
    damage.configure({"num_nextn_predict_layers": 0}, tmp_path / "a")
    damage.template(lambda _: None, tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").unlink()
    report = check(tmp_path / "a")
    marks = {line[2:21].strip(): (line[0], line[21:]) for line in list(report.lines())[1 : 1 + len(CHECKS)]}
    assert marks["scales"] == ("–", "0 tensors: finite, positive") and marks["generation config"] == ("–", "none")
    assert marks["copies"] == ("–", "0 pairs of equal tensors") and marks["chat template"] == ("!", "1 finding; none")
    assert all(marks[check][0] == "✓" for check in ("config", "files", "tensors", "weights", "tokenizer"))
    assert {c["check"] for c in report.as_json()["checks"] if c["ok"] is None} == {
        "scales", "copies", "chat template", "generation config"
    }  # fmt: skip


def test_wrong_use(tmp_path, monkeypatch, capsys):
    def status(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["check_checkpoint.py", *flags])
        return check_checkpoint.main()

    assert status(str(tmp_path / "nothing")) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/nothing: no such directory\n"
    good_checkpoint(tmp_path / "upstream", "upstream")
    assert status(str(tmp_path / "upstream")) == 2
    assert "has no config.json; name its model with --config" in capsys.readouterr().err
    assert status(str(tmp_path / "upstream"), "--config", str(tmp_path / "upstream.json")) == 0
    out = capsys.readouterr().out.splitlines()
    assert "converted by the V3 repository" in out[0] and out[-1] == "– generation config  none"
    config = json.loads((tmp_path / "upstream.json").read_text())
    (tmp_path / "upstream.json").write_text(json.dumps(config | {"hidden_size": 256}))
    assert status(str(tmp_path / "upstream"), "--config", str(tmp_path / "upstream.json")) == 1


def test_corpus_by_hand(good, tmp_path, capsys):
    assert damage.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KINDS)
    assert damage.main(["truncated by a byte", str(tmp_path / "a"), str(good)]) == 0
    assert damage.main(["rank missing", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.endswith("must be refused by: load, check, verify\n")
    assert "truncated: expected" in found(tmp_path / "a")[0] and "missing" in found(tmp_path / "b")[0]
    assert damage.main(["truncated by a byte", str(tmp_path / "a")]) == damage.main(["x", "y"]) == 2
    assert place(tmp_path / "a", damage.WEIGHT)
