"""The deployment files agree with each other and with the tree. No container engine is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from gns_controller.service.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "run.json").read_text())
SECRETS = {"./secrets/gns-token"}


def test_every_file_that_compose_mounts_exists() -> None:
    for name, service in COMPOSE["services"].items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if not source.startswith("."):
                assert source in COMPOSE["volumes"], f"{name}: {source} is not a declared volume"
            elif source not in SECRETS:
                assert (DEPLOY / source).exists(), f"{name}: {source} does not exist"


def test_every_port_is_published_on_loopback_only() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service["ports"]]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_image_floats() -> None:
    images = [service["image"] for service in COMPOSE["services"].values() if "image" in service]
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in images)


def test_the_controller_will_not_start_without_tokens() -> None:
    environment = COMPOSE["services"]["controller"]["environment"]
    assert environment["GNS_TOKEN_HASHES"].startswith("${GNS_TOKEN_HASHES:?")
    assert "GNS_HOST=0.0.0.0" in DOCKERFILE


def test_every_setting_that_the_image_and_compose_use_is_one_of_ours() -> None:
    names = set(re.findall(r"GNS_[A-Z_]+", DOCKERFILE + (DEPLOY / "compose.yaml").read_text()))
    assert names
    assert {name.removeprefix("GNS_").lower() for name in names} <= set(Settings.model_fields)


def test_everything_the_image_copies_exists_and_reaches_the_build() -> None:
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().split("\n")
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in allowed, f"{source} is kept out of the build by Dockerfile.dockerignore"


def test_the_image_runs_without_root_and_checks_readiness() -> None:
    final = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER (?!root|0)\w+$", final, re.MULTILINE)
    assert "/readyz" in final
    assert "HEALTHCHECK" in final


def test_the_image_is_built_from_the_pinned_versions() -> None:
    assert "--constraint deploy/constraints.txt" in DOCKERFILE
    assert '".[service,postgres]"' in DOCKERFILE


def test_prometheus_reads_the_files_that_compose_gives_it() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {volume.split(":")[1] for volume in COMPOSE["services"]["prometheus"]["volumes"]}
    (job,) = config["scrape_configs"]
    for name in (*config["rule_files"], job["authorization"]["credentials_file"]):
        assert f"/etc/prometheus/{name}" in targets
    service, port = job["static_configs"][0]["targets"][0].split(":")
    assert service in COMPOSE["services"]
    assert f"EXPOSE {port}" in DOCKERFILE


def test_grafana_finds_its_datasource_and_its_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    used = {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    assert used == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "gns.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[1::-1] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert mounts[provider["options"]["path"]] == "./grafana/dashboards"


def test_every_panel_says_what_it_shows() -> None:
    assert all(panel["title"] and panel["description"].endswith(".") for panel in DASHBOARD["panels"])
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    assert {"Noise scale", "Resolution", "Global batch size", "Learning-rate factor", "Loss"} <= titles
