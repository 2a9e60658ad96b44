#!/usr/bin/env bash
# The measurements of docs/evidence.md within a time: benchmarks/evidence/run.sh OUT [SECONDS] [SIZE...]
#
# SIZE is tiny (one CPU core), small or medium (a GPU); small and medium without one. OUT gets a few small files: the results and
# the picture of each size, the log, and state.tar.gz, from which another call goes on, on another machine too:
#   benchmarks/evidence/run.sh first 540
#   STATE=first/state.tar.gz benchmarks/evidence/run.sh second 540
# Then: cp second/evidence-*.json benchmarks/results/ && python -m tools.evidence_page benchmarks/results/{evidence,extension}-*.json > docs/evidence.md
#
# Of a call's time each size gets an equal part of what is left when its turn comes. TOKENS_small=3932160 gives a run of that size so many.
set -u
out=${1:?give a folder for the results}
seconds=${2:-480}
shift $(($# < 2 ? $# : 2))
sizes=${*:-small medium}
work=${WORK:-runs/evidence}
here=benchmarks/evidence
declare -A vocab=([tiny]=2048 [small]=8192 [medium]=8192) bytes=([tiny]=12000000 [small]=24000000 [medium]=24000000)
declare -A tokens=([tiny]=81920 [small]=1966080 [medium]=1966080) jobs=([tiny]=1 [small]=8 [medium]=2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
andromeda() { python3 -c 'import sys; sys.argv[0] = "andromeda"; from andromeda.cli.main import main; main()' "$@"; }

keep() { # what a later call needs: how each finished run ended and what it was, and the costs
  (cd "$work" && find . -name outcome.json -printf '%h\n' | sed 's|.*|&/outcome.json\n&/config.toml\n&/manifest.json|' && find . -name costs.json) \
    | tar -czf "$out/state.tar.gz" -C "$work" -T -
  for size in $sizes; do
    [ -e "$work/$size/results.json" ] && cp "$work/$size/results.json" "$out/evidence-$size.json"
    [ -e "$work/$size/plot.png" ] && cp "$work/$size/plot.png" "$out/evidence-$size.png"
  done
  cat "$work"/*/workers.log 2>/dev/null | tail -c 1000000 > "$out/workers.log"
}

mkdir -p "$out" "$work"
out=$(cd "$out" && pwd)
[ -n "${STATE:-}" ] && tar -xzf "$STATE" -C "$work"
set -- $sizes
code=0
while [ $# -gt 0 ]; do
  size=$1
  corpus=$work/corpus-${vocab[$size]}
  [ -e "$corpus/manifest.json" ] || andromeda data build python --out "$corpus" --vocab-size "${vocab[$size]}" --max-bytes "${bytes[$size]}" \
    --validation-fraction 0.03 --workers "$(getconf _NPROCESSORS_ONLN)"
  # A run that is stopped still saves its state, and the table is drawn.
  limit=$(((seconds - SECONDS - 20) / $#))
  amount=TOKENS_$size
  andromeda ablate "$here/$size.toml" data.corpus="$corpus" --grid "$here/$size-grid.toml" --budget-amount "${!amount:-${tokens[$size]}}" \
    --jobs "${JOBS:-${jobs[$size]}}" --timing-steps "${COST_STEPS:-20}" --time-limit "$((limit > 1 ? limit : 1))" --drop-checkpoints --out "$work/$size" || code=$?
  keep
  shift
done
exit "$code"
