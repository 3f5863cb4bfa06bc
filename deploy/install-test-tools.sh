#!/bin/sh
# Chromium and its driver, Prometheus with promtool, PostgreSQL: for the tests that use real ones. Debian and Ubuntu, as
# root. Debian keeps initdb out of PATH, under /usr/lib/postgresql.
set -u
PATH="$PATH:$(echo /usr/lib/postgresql/*/bin | tr ' ' ':')"
missing=""
for pair in chromium:chromium chromedriver:chromium-driver prometheus:prometheus promtool:prometheus initdb:postgresql; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair##*:}"
done
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" -ne 0 ]; then
    echo "not installed, their tests will be reported as not run:$missing"
    exit 0
fi
echo "installing$missing"
apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null \
    || echo "could not install$missing"
