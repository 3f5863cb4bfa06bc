"""Version, help and shell completion, with everything installed and with the core alone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from gns_controller.__main__ import COMMANDS_BY_EXTRA
from gns_controller.cli.main import app
from tests.gns_controller.running_service import run_cli

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


def run_script(*arguments: str, folder: Path, before: str = "pass", **environment: str) -> tuple[int, str, str]:
    """As the console script runs it: exit code, standard output and standard error."""
    program = f"import os, sys; {before}; sys.argv = {['gns-controller', *arguments]!r}\n"
    program += f"os.environ.update({environment!r})\nfrom gns_controller.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def run_without_typer(*arguments: str, folder: Path) -> tuple[int, str, str]:
    return run_script(*arguments, folder=folder, before="sys.modules['typer'] = None")


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_that_of_the_project_in_both_installs(tmp_path: Path, option: str) -> None:
    expected = (0, f"gns-controller {PROJECT['version']}\n", "")
    assert run_cli(option, folder=tmp_path) == expected
    assert run_without_typer(option, folder=tmp_path) == expected


def test_help_of_the_bare_install_lists_every_command_with_an_extra_that_exists(tmp_path: Path) -> None:
    code, output, errors = run_without_typer("--help", folder=tmp_path)
    assert (code, errors) == (0, "")
    assert {command for commands in COMMANDS_BY_EXTRA.values() for command in commands} == set(
        typer.main.get_command(app).commands  # type: ignore[attr-defined]
    )
    for extra, commands in COMMANDS_BY_EXTRA.items():
        assert extra in PROJECT["optional-dependencies"]
        [line] = [line for line in output.splitlines() if f"pip install 'gns-controller[{extra}]'" in line]
        assert line.endswith(", ".join(commands))


def test_no_arguments_print_the_help_and_are_wrong_usage_in_both_installs(tmp_path: Path) -> None:
    for code, output, errors in (run_cli(folder=tmp_path), run_without_typer(folder=tmp_path)):
        assert code == 2
        assert "Usage:" in output + errors
        assert "serve" in output + errors


def test_a_command_of_the_bare_install_exits_with_the_line_to_type(tmp_path: Path) -> None:
    code, output, errors = run_without_typer("run", "--help", folder=tmp_path)
    assert (code, output) == (5, "")
    assert "pip install 'gns-controller[service]'" in errors


def test_bash_completes_commands_and_their_commands(tmp_path: Path) -> None:
    code, script, _ = run_script(folder=tmp_path, _GNS_CONTROLLER_COMPLETE="source_bash")
    assert code == 0
    assert "complete -o default -F" in script
    for words, position, expected in (("gns-controller ca", "1", "calibrate"), ("gns-controller db u", "2", "upgrade")):
        code, completed, _ = run_script(
            folder=tmp_path, _GNS_CONTROLLER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=position
        )
        assert (code, completed.split()) == (0, [expected])
