#!/usr/bin/env bash
# All measurements of docs/evidence.md on one GPU, within a time: benchmarks/evidence/run.sh OUT [SECONDS]
# Run it again with the same OUT to go on. Results: OUT/small/results.json, OUT/medium/results.json.
set -u
out=${1:?give a folder}
seconds=${2:-480}
jobs=${JOBS:-12}
run() { python3 -c 'from andromeda.cli.main import main; main()' "$@"; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out"
[ -e "$out/corpus/manifest.json" ] || run data build python --out "$out/corpus" --vocab 8192 --max-bytes 24000000 --validation 0.03 --workers 8
left() { echo $((seconds - SECONDS)); }
here=benchmarks/evidence
run ablate $here/small.toml data.corpus="$out/corpus" --grid $here/small-grid.toml --amount "${SMALL_TOKENS:-1966080}" \
  --jobs "$jobs" --cost-steps 4 --limit "$(($(left) - ${MEDIUM_SECONDS:-140}))" --lean --out "$out/small"
run ablate $here/medium.toml data.corpus="$out/corpus" --grid $here/medium-grid.toml --amount "${MEDIUM_TOKENS:-2621440}" \
  --jobs 2 --cost-steps 4 --limit "$(($(left) - 25))" --lean --out "$out/medium"
