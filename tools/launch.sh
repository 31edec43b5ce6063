#!/usr/bin/env bash
# Train on several machines: one process for each accelerator of each machine, all of them one fit.
#
#   tools/launch.sh HOSTS train.py [arguments of train.py]
#
# HOSTS is a file with a line for each machine: its name for ssh and, after a space, how many processes it takes (default: 1). The first is where they meet.
# Each machine needs this folder, at the same path, with the same Python environment. What train.py has to do is in the README: train inside `learn.distrib_ctx()`.
#
# PORT (29500) is where they meet; PYTHON (python) is the interpreter on each machine; REMOTE (ssh -tt) runs a command, its last argument, on a machine, its first.
# If one fails, the others are ended, and the exit status is its own.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
hosts=$1; shift
[ -f "$hosts" ] || { echo "Error: $hosts: expected a file with a machine in each line." >&2; exit 2; }
names=() sizes=()
while read -r name size _; do
  case "$name" in ''|'#'*) continue;; esac
  case "${size:=1}" in *[!0-9]*|0*) echo "Error: $hosts: expected a number of processes behind $name, got $size." >&2; exit 2;; esac
  names+=("$name") sizes+=("$size")
done < "$hosts"
[ ${#names[@]} -gt 0 ] || { echo "Error: $hosts names no machine." >&2; exit 2; }
world=0; for s in "${sizes[@]}"; do world=$((world+s)); done

first=${names[0]#*@} port=${PORT:-29500} base=0 pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for i in "${!names[@]}"; do
  for ((local=0; local<sizes[i]; local++)); do
    vars="MASTER_ADDR=$first MASTER_PORT=$port WORLD_SIZE=$world RANK=$((base+local)) LOCAL_RANK=$local LOCAL_WORLD_SIZE=${sizes[i]}"
    ${REMOTE:-ssh -tt} "${names[i]}" "cd $(printf %q "$PWD") && exec env $vars ${PYTHON:-python} $(printf '%q ' "$@")" </dev/null &
    pids+=($!)
  done
  base=$((base+sizes[i]))
done
for _ in "${pids[@]}"; do wait -n || exit $?; done
