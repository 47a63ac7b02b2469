#!/usr/bin/env bash
# Builds the autograder image: a clone of the project and its environment.
set -euo pipefail
apt-get update -qq && apt-get install -y -qq python3-venv git make
git clone "${REPOSITORY:?set it to the address of your clone}" /autograder/clone
make -C /autograder/clone .venv/dev
