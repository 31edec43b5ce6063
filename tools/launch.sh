#!/usr/bin/env bash
# Train on several machines: one process for each accelerator of each machine, all of them one fit.
#
#   tools/launch.sh HOSTS train.py [arguments of train.py]
#
# HOSTS is a file with a line for each machine: its name for ssh and, after a space, its number of processes (default: 1).
# The first machine is the master. Each machine needs this folder, at the same path, with the same Python environment.
# train.py has to train inside `learn.distrib_ctx()`: see the README.
#
# PORT (29500) is the port of the master, PYTHON (python) the interpreter on each machine, and REMOTE (ssh -tt) the
# command that runs its last argument on a machine, its first argument.
# If one process fails, the others are ended, and its exit status is returned.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
hosts=$1; shift
[ -f "$hosts" ] || { echo "Error: $hosts: expected a file with one machine on each line." >&2; exit 2; }
names=() sizes=()
while read -r name size _; do
  case "$name" in ''|'#'*) continue;; esac
  case "${size:=1}" in *[!0-9]*|0*) echo "Error: $hosts: expected a number of processes after $name, got $size." >&2; exit 2;; esac
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
