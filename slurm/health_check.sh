#!/bin/bash
# Is this machine fit for a run? Every fault found is printed, one a line, with the machine's name; exit code 1 where
# there is one. It changes nothing, drains nothing and takes seconds. The first step of every job (slurm.health_check).
#
# usage: health_check.sh [--gpus N] [--gpu-memory GIB] [--disk DIR --min-disk GIB] [--epoch SECONDS]
#   --gpus        accelerators that nvidia-smi has to see (0: none are wanted)
#   --gpu-memory  memory that each has to have, in GiB (3% less is let pass: drivers keep some)
#   --disk        directory that has to be writable, with --min-disk GiB free
#   --epoch       the clock of the machine that asks, in seconds since 1970; more than 30 s beside it is a fault
set -u

gpus=0 gpu_memory=0 disk="" min_disk=0 epoch=""
while [ $# -gt 1 ]; do
    case "$1" in
        --gpus) gpus=$2 ;;
        --gpu-memory) gpu_memory=$2 ;;
        --disk) disk=$2 ;;
        --min-disk) min_disk=$2 ;;
        --epoch) epoch=$2 ;;
        *) echo "health_check.sh: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done

node="${SLURMD_NODENAME:-$(hostname)}"
faults=0
fault() {
    echo "r1mega health check: $node: $*" >&2
    faults=$((faults + 1))
}
# $1 < $2, for numbers with fractions
less() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a < b) }'; }

check_gpus() {
    if ! command -v nvidia-smi >/dev/null; then
        fault "nvidia-smi is not there; $gpus GPUs are wanted (driver not installed, or not in the container)"
        return
    fi
    local fields=index,memory.total,memory.used,ecc.errors.uncorrected.volatile.total rows
    if ! rows=$(timeout 60 nvidia-smi --query-gpu="$fields" --format=csv,noheader,nounits 2>&1); then
        fault "nvidia-smi fails or hangs: $(head -1 <<<"$rows")"
        return
    fi
    local seen
    seen=$(grep -c . <<<"$rows")
    [ "$seen" -ge "$gpus" ] || fault "$seen GPUs are visible, $gpus are wanted"
    local index total used ecc
    while IFS=', ' read -r index total used ecc; do
        [ -n "$index" ] || continue
        if less "$total" "$(awk -v g="$gpu_memory" 'BEGIN { print g * 1024 * 0.97 }')"; then
            fault "GPU $index has $total MiB of memory, cluster.gpu_memory_gib=$gpu_memory is wanted"
        fi
        if less 2048 "$used"; then
            fault "GPU $index: $used MiB are in use before the run begins (a process left over?)"
        fi
        case "$ecc" in
            0 | *N/A*) ;;
            *) fault "GPU $index has $ecc uncorrected ECC errors since it was last reset" ;;
        esac
    done <<<"$rows"
}

check_disk() {
    local probe="$disk/.health-check-$node-$$"
    if ! (: >"$probe") 2>/dev/null; then
        fault "$disk cannot be written to"
        return
    fi
    rm -f "$probe"
    local free
    free=$(df --output=avail -k "$disk" | tail -1)
    if less "$free" "$(awk -v g="$min_disk" 'BEGIN { print g * 1048576 }')"; then
        fault "$disk has $((free / 1048576)) GiB free, slurm.min_disk_gib=$min_disk is wanted"
    fi
}

check_clock() {
    local apart=$(($(date +%s) - epoch))
    [ "${apart#-}" -le 30 ] || fault "its clock is $apart s beside that of the job's first machine"
}

[ "$gpus" -eq 0 ] || check_gpus
[ -z "$disk" ] || check_disk
[ -z "$epoch" ] || check_clock
if [ "$faults" -eq 0 ]; then
    echo "r1mega health check: $node: fit (locked memory: $(ulimit -l))"
    exit 0
fi
exit 1
