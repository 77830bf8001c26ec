#!/bin/bash
# A command of inference/ on several hosts, by torchrun over ssh:
#
#     deploy/hosts.sh HOSTFILE -- generate.py --ckpt-path /path/to/DeepSeek-V3 --input-file /path/to/prompts.txt
#
# HOSTFILE has a host a line, as ssh takes it, the first one's for rank 0, with the number of ranks if that is not the
# number of GPUs: "node1 slots=8". # begins a comment. The repository and the checkpoint lie at the same paths on all hosts;
# the command runs in inference/. What one ends with ends all, and so does Ctrl-C. Standard input is not passed on.
#
# MASTER_ADDR, MASTER_PORT   where ranks meet (default: the first host's name, 29500)
# ENGINE                     the repository's folder on the hosts (default: where it is here)
# PYTHON                     on the hosts (default: the repository's .venv, else python3)
# NCCL_*, GLOO_*, OMP_*, TORCH_* and CUDA_VISIBLE_DEVICES are handed on; nothing secret is, which `ps` would show.
#
# Exit status: of the first host that fails; 2 wrong use or a host that cannot be reached; 130 after Ctrl-C.

set -u

fail() {
    echo "error: $*" >&2
    exit 2
}

quote() { # for a shell of any kind
    printf "'%s' " "${1//\'/\'\\\'\'}"
}

[ $# -ge 3 ] && [ "$2" = -- ] || fail "usage: deploy/hosts.sh HOSTFILE -- COMMAND FLAGS, such as generate.py --ckpt-path DIR"
hostfile=$1
shift 2
[ -r "$hostfile" ] || fail "$hostfile: no such file, or it cannot be read"
engine=${ENGINE:-$(cd "$(dirname "$0")/.." && pwd)}

hosts=()
slots=()
while read -r host more; do
    [ -n "$host" ] || continue
    case $more in
        '') slots+=(gpu) ;;
        slots=[1-9] | slots=[1-9][0-9]) slots+=("${more#slots=}") ;;
        *) fail "$hostfile: after $host, expected slots=N, found $more" ;;
    esac
    hosts+=("$host")
done < <(sed 's/#.*//; s/[[:space:]]*$//' "$hostfile")
[ ${#hosts[@]} -gt 0 ] || fail "$hostfile: no hosts in it"
address=${MASTER_ADDR:-${hosts[0]##*@}}

folder=$(mktemp -d)
alive=$folder/alive # what the hosts read their standard input from: at its end they stop
mkfifo "$alive"
exec 9<>"$alive"
trap 'exec 9>&-; rm -rf "$folder"' EXIT
reach=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o LogLevel=ERROR)

# Every host is asked before anything starts.
for i in "${!hosts[@]}"; do
    "${reach[@]}" -n "${hosts[i]}" "test -f $(quote "$engine/inference/$1")" 2>"$folder/said.$i" 9>&- &
    asked[i]=$!
done
unreached=0
for i in "${!hosts[@]}"; do
    wait "${asked[i]}"
    case $? in
        0) continue ;;
        255) echo "error: ${hosts[i]} cannot be reached by ssh: $(tail -n 1 "$folder/said.$i")" >&2 ;;
        *) echo "error: ${hosts[i]} has no $engine/inference/$1" >&2 ;;
    esac
    unreached=1
done
[ $unreached = 0 ] || exit 2

handed=$(for name in $(compgen -e | grep -E '^(NCCL_|GLOO_|OMP_|TORCH_|CUDA_VISIBLE_DEVICES$)'); do
    printf 'export %s=%s; ' "$name" "$(quote "${!name}")"
done)
arguments=$(for argument in "$@"; do quote "$argument"; done)

# The remote side, for a shell of any kind. Its standard input ends with this script or the connection.
for i in "${!hosts[@]}"; do
    remote="cd $(quote "$engine/inference") || exit 1; $handed
python=$(quote "${PYTHON:-}"); if [ -z \"\$python\" ]; then python=python3; [ -x ../.venv/bin/python ] && python=../.venv/bin/python; fi
exec 3<&0 </dev/null
\"\$python\" -m torch.distributed.run --nnodes ${#hosts[@]} --nproc-per-node ${slots[i]} --node-rank $i \
--master-addr $(quote "$address") --master-port ${MASTER_PORT:-29500} $arguments 3<&- &
run=\$!
(cat <&3; kill -TERM \$run) >/dev/null 2>&1 &
watch=\$!
wait \$run; status=\$?
kill \$watch 2>/dev/null
exit \$status"
    # a background process of a script ignores Ctrl-C: ssh stays until its host has ended
    "${reach[@]}" "${hosts[i]}" "exec sh -c $(quote "$remote")" <"$alive" 9>&- &
    running[i]=$!
done

end=0
stop() {
    [ "$end" -ne 0 ] || end=$1
    exec 9>&- # every host's standard input
}
trap 'stop 130' INT
trap 'stop 143' TERM
deadline=
while [ ${#running[@]} -gt 0 ]; do
    sleep 0.2
    for i in "${!running[@]}"; do
        kill -0 "${running[i]}" 2>/dev/null && continue
        wait "${running[i]}"
        status=$?
        unset "running[i]"
        deadline=${deadline:-$((SECONDS + 60))} # for the others to end by themselves
        if [ $status -ne 0 ] && [ "$end" -eq 0 ]; then
            [ $status -ne 255 ] || echo "error: the connection to ${hosts[i]} was lost" >&2
            stop $status
        fi
    done
    [ "$end" -eq 0 ] || deadline=${deadline:-$((SECONDS + 60))}
    if [ -n "$deadline" ] && [ $SECONDS -ge "$deadline" ]; then
        stop 1
        [ $SECONDS -lt $((deadline + 30)) ] || { kill -KILL "${running[@]}" 2>/dev/null; break; }
    fi
done
exit "$end"
