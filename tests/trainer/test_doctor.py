"""What the doctor says of machines that lack something, and of this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from srft import doctor
from srft.doctor import Finding, check_packages, check_places, check_torch, check_vllm

CPU = {"gpus": "", "cuda": "", "gloo": "True", "nccl": "False"}
GOOD = {
    "torch": "2.13.0+cpu", "transformers": "5.19.0", "datasets": "4.8", "safetensors": "0.7.0", "pydantic": "2.12.3",
    "rich": "14.1.0", "matplotlib": "3.10.1", "math-verify": "0.9.0",
}  # fmt: skip


def of(findings: list[Finding], what: str) -> Finding:
    """The one finding whose subject begins so."""
    (found,) = [each for each in findings if each.what.startswith(what)]
    return found


def test_packages_that_are_missing_or_of_another_time_are_named_with_their_remedy() -> None:
    """None, one too old and one too new; the others are well."""
    installed = GOOD | {"torch": "2.9.1", "math-verify": "0.10.0"}
    del installed["rich"]
    findings = list(check_packages(installed.get))
    assert {each.what for each in findings if each.status != "ok"} == {"torch", "math-verify", "rich"}
    assert of(findings, "torch") == Finding(
        "missing", "torch", "2.9.1", "see PyTorch's installation page (2.11 or newer)"
    )
    assert of(findings, "rich").found == "not installed" and "pip install 'srft[train]'" in of(findings, "rich").remedy
    assert "0.9 or newer, below 0.10" in of(findings, "math-verify").remedy
    assert all(each.status == "ok" for each in check_packages(GOOD.get))


@pytest.mark.parametrize(
    ("torch", "transformers", "clash"),
    [
        ("2.14.0+cu130", "5.17.0", None),
        ("2.14.0", "5.16.1", None),
        ("2.15.0", "5.17.0", "torch 2.15.0 against its ==2.14.0"),
        ("2.14.0", "5.23.0", "transformers 5.23.0 against its >=5.16.1,<5.21,!=5.18.*"),
        ("2.14.0", "5.18.2", "transformers 5.18.2 against"),
        ("2.14.0", "5.16.0", "transformers 5.16.0 against"),
    ],
)
def test_a_vllm_that_does_not_fit_is_told_by_its_own_requirements(
    torch: str, transformers: str, clash: str | None
) -> None:
    """Each condition, with local versions and prefixes; the remedy is an environment of its own."""
    installed = {"vllm": "0.33.0", "torch": torch, "transformers": transformers}
    needs = ["torch==2.14.0", "transformers (>=5.16.1,<5.21,!=5.18.*)", "torch==1.0; sys_platform == 'x'", "ray"]
    (finding,) = check_vllm(installed.get, lambda _: needs)
    assert finding.status == ("ok" if clash is None else "warning")
    if clash:
        assert clash in finding.found and "engine.python" in finding.remedy


def test_torch_is_asked_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is well, a GPU that is not seen a warning, a torch that cannot be imported an end."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert all(each.status == "ok" for each in check_torch(lambda: CPU))
    unseen = list(check_torch(lambda: CPU | {"cuda": "13.0"}))
    assert of(unseen, "GPU").status == "warning" and "driver" in of(unseen, "GPU").remedy
    broken = list(check_torch(lambda: "ImportError: libcudart.so"))
    assert [each.status for each in broken] == ["missing"] and "libcudart" in broken[0].found
    gpus = list(check_torch(lambda: CPU | {"gpus": "NVIDIA H100|NVIDIA H100", "cuda": "13.0"}))
    assert of(gpus, "GPUs").found == "2 x NVIDIA H100, CUDA 13.0" and of(gpus, "NCCL").status == "missing"


def test_a_folder_that_cannot_be_written_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one with little room a warning."""
    assert of(list(check_places(tmp_path / "runs" / "new")), "folder of runs").status in ("ok", "warning")
    monkeypatch.setattr("os.access", lambda *_: False)
    found = of(list(check_places(tmp_path)), "folder of runs")
    assert found.status == "missing" and str(tmp_path) in found.found


def test_the_command_prints_a_line_each_and_leaves_by_what_is_missing() -> None:
    """This machine can train, for these tests do; without torch it says so in one line."""
    done = subprocess.run([sys.executable, "-m", "srft.doctor"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.startswith(("ok ", "warning ")) for line in lines[:-2]) and lines[-1].endswith(", 0 missing.")
    assert any(line.startswith("ok       gloo") for line in lines)


def test_it_needs_nothing_that_may_be_missing() -> None:
    """The standard library alone is imported, so that it can speak on a machine without torch."""
    code = "import sys; from srft import doctor; print([m for m in ('torch', 'pydantic', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_missing_sets_the_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One missing thing is enough; a warning is not."""
    warning, missing = Finding("warning", "a", "b", "c"), Finding("missing", "x", "none", "install x")
    for findings, status in (([warning], 0), ([warning, missing], 1)):
        monkeypatch.setattr(doctor, "_CHECKS", (lambda findings=findings: iter(findings),))
        monkeypatch.setattr("sys.argv", ["srft.doctor"])
        with pytest.raises(SystemExit) as left:
            doctor.main()
        assert left.value.code == status
    assert "missing  x: none  -> install x" in capsys.readouterr().out
