"""`make setup` in a small copy of the checkout: an environment is whole or made anew, whatever interrupted it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pip
import pytest

ROOT = Path(__file__).resolve().parent.parent

# A project with nothing to download: its build backend stands beside it and needs the standard library only.
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = """
import zipfile
INFO = "orderflow-0.dist-info/"
def build_editable(place, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{place}/orderflow-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("orderflow.py", "def main(): print('runs')")
        wheel.writestr(INFO + "METADATA", "Metadata-Version: 2.1\\nName: orderflow\\nVersion: 0\\n")
        wheel.writestr(INFO + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(INFO + "entry_points.txt", "[console_scripts]\\norderflow = orderflow:main\\n")
        wheel.writestr(INFO + "RECORD", "")
    return "orderflow-0-py3-none-any.whl"
build_wheel = build_editable
"""

# The real environment without its copy of pip, whose unpacking takes seconds: pip comes from this one by PYTHONPATH.
QUICK_VENV = """
import importlib.util, sys, sysconfig
spec = importlib.util.spec_from_file_location("real_venv", sysconfig.get_path("stdlib") + "/venv/__init__.py")
real_venv = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real_venv)
real_venv.create(sys.argv[1], symlinks=True, with_pip=False)
"""


class Checkout:
    """The small copy."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.venv = place / ".venv"
        self.stamp = self.venv / "orderflow-setup.json"
        (place / "scripts").mkdir(parents=True)
        (place / "requirements").mkdir()
        shutil.copy(ROOT / "scripts" / "setup_venv.py", place / "scripts")
        (place / "pyproject.toml").write_text(PYPROJECT)
        (place / "backend.py").write_text(BACKEND)
        (place / "path").mkdir()
        (place / "path" / "venv.py").write_text(QUICK_VENV)
        (place / "path" / "pip").symlink_to(Path(pip.__file__).parent)
        for name in ("dev", "test"):
            (place / "requirements" / f"{name}.txt").write_text("# nothing\n")

    def start(self, wanted: str = "dev") -> subprocess.Popen[str]:
        """Begins a set-up, in a process group of its own."""
        command = (sys.executable, str(self.place / "scripts" / "setup_venv.py"), wanted)
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(self.place / "path")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def set_up(self, wanted: str = "dev") -> str:
        """A set-up that has to succeed and to leave a program that runs; what it said."""
        with self.start(wanted) as process:
            said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        program = subprocess.run((self.venv / "bin" / "orderflow",), capture_output=True, text=True, timeout=30, check=True)
        assert program.stdout == "runs\n"
        return said

    def leave_a_mark(self) -> Path:
        """A file in the environment that is gone when the environment is made anew."""
        mark = self.venv / "mark"
        mark.touch()
        return mark


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout that is set up; each test leaves it so."""
    checkout = Checkout(tmp_path_factory.mktemp("checkout"))
    assert "Setting up .venv for dev" in checkout.set_up()
    return checkout


def test_a_finished_environment_is_left_alone(finished: Checkout) -> None:
    mark = finished.leave_a_mark()
    assert finished.set_up() == ""
    assert mark.exists()


def test_a_set_up_that_never_finished_is_begun_again(finished: Checkout) -> None:
    finished.stamp.unlink()
    mark = finished.leave_a_mark()
    assert "Setting up" in finished.set_up()
    assert not mark.exists()


@pytest.mark.parametrize("lost", ["bin/python", "bin/orderflow", "bin"])
def test_a_half_deleted_environment_is_made_anew(finished: Checkout, lost: str) -> None:
    mark = finished.leave_a_mark()
    path = finished.venv / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "Setting up" in finished.set_up()
    assert not mark.exists()


def test_a_torn_stamp_is_no_stamp(finished: Checkout) -> None:
    finished.stamp.write_text('{"set": "de')
    assert "Setting up" in finished.set_up()


def test_new_requirements_are_installed_into_what_is_there(finished: Checkout) -> None:
    mark = finished.leave_a_mark()
    (finished.place / "requirements" / "dev.txt").write_text(f"# nothing {mark.stat().st_mtime_ns}\n")
    assert "Setting up" in finished.set_up()
    assert mark.exists()


def test_a_failure_is_said_and_repaired_later(finished: Checkout) -> None:
    requirements = finished.place / "requirements" / "dev.txt"
    before = requirements.read_text()
    requirements.write_text("no-such-package\n")
    with finished.start() as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "set-up failed in:" in said
    assert not finished.stamp.exists()
    requirements.write_text(before)
    assert "Setting up" in finished.set_up()


def test_the_tests_environment_serves_the_program_too(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "checkout")
    checkout.set_up("test")
    assert checkout.set_up("dev") == ""


def test_a_moved_checkout_is_set_up_anew(tmp_path: Path) -> None:
    Checkout(tmp_path / "before").set_up()
    (tmp_path / "before").rename(tmp_path / "after")
    moved = Checkout.__new__(Checkout)
    moved.place, moved.venv = tmp_path / "after", tmp_path / "after" / ".venv"
    assert "Setting up" in moved.set_up()


def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "checkout")
    with checkout.start() as process:
        assert process.stdout is not None
        assert "Setting up" in process.stdout.readline()
        os.killpg(process.pid, signal.SIGKILL)
    assert not checkout.stamp.exists()
    assert "Setting up" in checkout.set_up()


def test_two_at_once_build_it_once(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "checkout")
    both = [checkout.start(), checkout.start()]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("Setting up" in text for text in said) == 1
    assert sum("another set-up is at work" in text for text in said) <= 1
    assert checkout.set_up() == ""
