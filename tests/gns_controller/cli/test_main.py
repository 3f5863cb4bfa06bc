from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gns_controller.running_service import Server, registration, report, run_cli


def test_a_token_is_random_and_printed_with_its_hash(tmp_path: Path) -> None:
    made = [json.loads(run_cli("token", "create", "--json", folder=tmp_path)[1]) for _ in range(2)]
    assert made[0]["token"] != made[1]["token"]
    for one in made:
        assert len(one["token"]) >= 43, "256 bits in base64"
        assert one["sha256"] == hashlib.sha256(one["token"].encode()).hexdigest()


def test_runs_are_listed_and_shown_from_a_running_controller(server: Server) -> None:
    server.http.put("/api/v1/runs/run", json=registration())
    server.http.post("/api/v1/runs/run/measurements", json={"measurements": [report(1, noise_scale=1.0)]})
    code, output, _ = run_cli("run", "ls", "--url", server.url, "--json", folder=server.directory)
    assert code == 0
    assert [item["run_id"] for item in json.loads(output)] == ["run"]
    code, output, _ = run_cli("run", "show", "run", "--url", server.url, folder=server.directory)
    assert code == 0
    assert "never shrinks" in output
    code, _, errors = run_cli("run", "show", "nobody", "--url", server.url, folder=server.directory)
    assert (code, errors.count("\n")) == (1, 1)
    assert "not registered" in errors


def test_a_doctor_finds_a_healthy_machine_healthy_and_a_damaged_database_not(server: Server, tmp_path: Path) -> None:
    code, output, _ = run_cli("doctor", "--url", server.url, "--json", folder=server.directory)
    assert code == 0
    assert {finding["name"]: finding["ok"] for finding in json.loads(output)} == {
        "versions": True,
        "policies": True,
        "settings": True,
        "database": True,
        "controller": True,
    }
    (tmp_path / "bad.db").write_bytes(b"no database" * 1000)
    code, output, _ = run_cli("doctor", "--database-url", "sqlite:///bad.db", folder=tmp_path)
    assert code == 1
    assert "WRONG  database: the database file is damaged" in output
    code, output, _ = run_cli("doctor", "--url", "http://127.0.0.1:1", folder=tmp_path)
    assert code == 1
    assert "no controller answers" in output


def test_a_database_is_made_then_found_sound(tmp_path: Path) -> None:
    upgraded = json.loads(run_cli("db", "upgrade", "--json", folder=tmp_path)[1])
    assert upgraded == {"revision_before": None, "revision": "0002"}
    code, output, _ = run_cli("db", "check", "--json", folder=tmp_path)
    assert code == 0
    assert json.loads(output)["revision"] == "0002"


def test_shown_settings_hide_secrets(tmp_path: Path) -> None:
    environment = {"GNS_DATABASE_URL": "postgresql://me:hunter2@db/gns", "GNS_TOKEN_HASHES": "ab" * 32}
    code, output, _ = run_cli("config", "show", "--json", folder=tmp_path, **environment)
    assert code == 0
    assert "hunter2" not in output
    assert "abab" not in output
    assert json.loads(output)["database_url"] == "postgresql://me:***@db/gns"


@pytest.mark.parametrize(
    ("name", "value"), [("GNS_PORT", "99999"), ("GNS_TOKEN_HASHES", "hunter2"), ("GNS_DATABASE_URL", "gns.db")]
)
def test_settings_that_cannot_be_used_are_one_sentence_that_names_them(tmp_path: Path, name: str, value: str) -> None:
    code, _, errors = run_cli("serve", folder=tmp_path, **{name: value})
    assert code == 2
    assert errors.count("\n") == 1
    assert "hunter2" not in errors
    assert name in errors or "database URL" in errors


@pytest.mark.parametrize("missing", ["typer", "fastapi"])
def test_a_missing_dependency_is_the_line_to_type(tmp_path: Path, missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['gns-controller', 'serve', '--port', '0']\n"
    program += "from gns_controller.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "pip install 'gns-controller[service]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\nsys.argv = ['gns-controller', '--help']\nfrom gns_controller.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'fastapi', 'sqlalchemy', 'pydantic', 'httpx', 'uvicorn', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "serve" in done.stdout
