#!/bin/sh
# Makes sure that a Chromium is there for the report's browser tests. Never fails: it says what to do instead.
set -u

for program in chromium google-chrome chromium-browser; do
  if command -v "$program" >/dev/null 2>&1; then
    exit 0
  fi
done

python="${PYTHON:-python}"
as_root=""
if [ "$(id -u)" -ne 0 ]; then
  as_root="sudo -n"
fi

if command -v apt-get >/dev/null 2>&1 && { [ -z "$as_root" ] || $as_root true >/dev/null 2>&1; }; then
  echo "Installing Chromium for the browser tests (apt-get)" >&2
  $as_root apt-get update -q >&2 && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y chromium >&2
elif "$python" -c "import playwright" >/dev/null 2>&1; then
  echo "Installing Chromium for the browser tests (playwright)" >&2
  "$python" -m playwright install chromium >&2
else
  false
fi || echo "No Chromium: install one (a package named chromium, or '$python -m playwright install chromium')
to run the tests marked browser; without it they are skipped." >&2
exit 0
