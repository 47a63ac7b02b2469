#!/usr/bin/env bash
# Builds the autograder's image: the clone and its environment.
set -euo pipefail
apt-get update -qq && apt-get install -y -qq python3-venv git make
git clone "${REPOSITORY:?the address of the clone}" /autograder/clone
make -C /autograder/clone .venv/dev
