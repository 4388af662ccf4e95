#!/usr/bin/env bash
# testbed.sh: a real, throw-away Slurm (munged, slurmctld, a slurmd a virtual node) on one Linux host.
#
#   testbed.sh up DIR [KEY=VALUE…]   start it: NODES=2 GPUS=4 NET=loopback REQUEUE=5 (seconds before a requeued job starts; Slurm takes less than 5 for 120)
#   testbed.sh down DIR              end its jobs and daemons, remove DIR
#   testbed.sh exec DIR NODE CMD…    a command inside a node, as ssh would run it
#   testbed.sh start DIR NAME        start a daemon again after it was killed: n1, n2, … or ctl
#
# Needs root, and slurm-wlm, munge and, for NET=veth, iproute2. Nodes have a hostname and /etc/hosts of their own; with
# NET=veth a network of their own too. Resources are believed, not enforced: no cgroup. An epilog ends what a job leaves.
set -u
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH
COMMAND=${1:-} DIR=${2:-}
[ -n "$DIR" ] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 2; }
shift 2
NODES=2 GPUS=4 NET=loopback REQUEUE=5
ID=$(printf %s "$DIR" | cksum | cut -d' ' -f1) # what tells one testbed from another on a host
CONF=$DIR/slurm.conf BRIDGE=stb$((ID % 100000))
# Every daemon has this marker in an environment that is bare otherwise, so that nothing else is ever signalled.
MARK=SLURM_TESTBED=$DIR
CLEAN=(env -i "PATH=$PATH" HOME=/root LANG=C.UTF-8 "SLURM_CONF=$CONF" "$MARK")

die() { echo "testbed: $*" >&2; exit 1; }
wait_for() { # SECONDS COMMAND…
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}
names() { seq -f 'n%g' 1 "$NODES"; }
address() { # NAME
    local host=${1#n}
    [ "$host" != ctl ] || host=0
    case $NET in
        loopback) echo "127.$((64 + ID % 128)).$((ID / 128 % 256)).$((10 + host))" ;;
        veth) echo "198.$((18 + ID / 256 % 2)).$((ID % 256)).$((10 + host))" ;;
    esac
}
left() { # pids of the daemons, and of what belongs to a job of theirs
    { grep -lzxF "$MARK" /proc/[0-9]*/environ
        grep -lzxF "SLURM_CONF=$CONF" /proc/[0-9]*/environ | xargs -r grep -lz '^SLURMD_NODENAME='; } 2>/dev/null |
        cut -d/ -f3
}
none_left() { [ -z "$(left)" ]; }
in_node() { # NAME COMMAND…
    local name=$1 net=
    shift
    [ ! -e "$DIR/ns/$name.net" ] || net=--net=$DIR/ns/$name.net
    # shellcheck disable=SC2016,SC2086 # for the inner shell; one word or none
    nsenter --uts="$DIR/ns/$name.uts" $net -- unshare --mount --propagation slave -- \
        sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$DIR/hosts" "$@"
}
make_namespaces() {
    local name net
    if [ "$NET" = veth ]; then
        ip link add "$BRIDGE" type bridge && ip addr add "$(address ctl)/24" dev "$BRIDGE" &&
            ip link set "$BRIDGE" up || return 1
    fi
    for name in ctl $(names); do
        net=
        : >"$DIR/ns/$name.uts"
        if [ "$NET" = veth ] && [ "$name" != ctl ]; then
            : >"$DIR/ns/$name.net"
            net=--net=$DIR/ns/$name.net
        fi
        # shellcheck disable=SC2086
        unshare --uts="$DIR/ns/$name.uts" $net hostname "$name" || return 1
        [ -n "$net" ] || continue
        ip link add "$BRIDGE$name" type veth peer name eth0 netns "$DIR/ns/$name.net" &&
            ip link set "$BRIDGE$name" master "$BRIDGE" up && in_node "$name" ip link set lo up &&
            in_node "$name" ip addr add "$(address "$name")/24" dev eth0 &&
            in_node "$name" ip link set eth0 up || return 1
    done
}
write_files() {
    local name port=$((20000 + ID % 600 * 20)) i=1
    { for name in ctl $(names); do echo "$(address "$name") $name"; done; cat /etc/hosts; } >"$DIR/hosts"
    for ((i = 0; i < GPUS; i++)); do ln -s /dev/null "$DIR/gpu/fake$i"; done
    echo "NodeName=n[1-$NODES] Name=gpu File=$DIR/gpu/fake[0-$((GPUS - 1))]" >"$DIR/gres.conf"
    cat >"$CONF" <<EOC
ClusterName=testbed
SlurmctldHost=ctl($(address ctl))
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=$REQUEUE
SlurmctldPidFile=$DIR/run/ctl.pid
SlurmctldLogFile=$DIR/log/ctl.log
StateSaveLocation=$DIR/ctl
SlurmdPidFile=$DIR/run/%n.pid
SlurmdLogFile=$DIR/log/%n.log
SlurmdSpoolDir=$DIR/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
CommunicationParameters=NoCtldInAddrAny
SlurmdParameters=config_overrides
ReturnToService=1
Epilog=$DIR/epilog
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
JobRequeue=1
KillWait=5
MinJobAge=3600
MessageTimeout=30
TCPTimeout=10
SlurmdTimeout=60
GresTypes=gpu
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOC
    i=0
    for name in $(names); do
        i=$((i + 1))
        echo "NodeName=$name NodeHostname=$name NodeAddr=$(address "$name") Port=$((port + i)) CPUs=16" \
            "RealMemory=64000 Gres=gpu:$GPUS" >>"$CONF"
    done
    cat >"$DIR/epilog" <<'EOC'
#!/bin/sh
for p in /proc/[0-9]*; do
    env=$(tr '\0' '\n' 2>/dev/null <"$p/environ") || continue
    for want in "SLURM_CONF=$SLURM_CONF" "SLURM_JOB_ID=$SLURM_JOB_ID" "SLURMD_NODENAME=$SLURMD_NODENAME"; do
        printf '%s\n' "$env" | grep -qxF "$want" || continue 2
    done
    [ "${p#/proc/}" = $$ ] || kill -KILL "${p#/proc/}" 2>/dev/null
done
exit 0
EOC
    chmod 755 "$DIR/epilog"
}
start() { # NAME
    if [ "$1" = ctl ]; then
        in_node ctl "${CLEAN[@]}" slurmctld -f "$CONF"
    else
        mkdir -p "$DIR/spool/$1"
        in_node "$1" "${CLEAN[@]}" slurmd -N "$1" -f "$CONF"
    fi
    wait_for 20 test -s "$DIR/run/$1.pid"
}
nodes_ready() { [ "$(SLURM_CONF=$CONF sinfo -h -N -o %T | grep -cE '^(idle|mixed|allocated)$')" = "$NODES" ]; }
load() {
    [ -e "$DIR/settings" ] || die "$DIR is not a testbed's"
    # shellcheck disable=SC1091
    . "$DIR/settings"
}

case $COMMAND in
    up)
        [ "$(id -u)" = 0 ] || die "needs root"
        for word in munged slurmctld slurmd sinfo unshare nsenter; do
            command -v "$word" >/dev/null || die "$word is not installed"
        done
        [ ! -e "$DIR" ] || die "$DIR is there already"
        mkdir -p "$DIR"/{run,log,munge,ns,spool,gpu} && mkdir -m 700 "$DIR/ctl" && chmod 755 "$DIR" || exit 1
        printf '%s\n' "$@" >"$DIR/settings"
        load
        write_files
        (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
        "${CLEAN[@]}" munged --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" --pid-file="$DIR/run/munged.pid" \
            --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" || die "munged did not start"
        make_namespaces || die "no namespaces: needs CAP_SYS_ADMIN, and CAP_NET_ADMIN for NET=veth"
        for name in ctl $(names); do start "$name" || die "$name did not start: $(tail -n 5 "$DIR/log/$name.log")"; done
        wait_for 60 nodes_ready || die "not all nodes came up"
        ;;
    down)
        load
        for signal in TERM KILL; do
            mapfile -t pids < <(left)
            [ ${#pids[@]} = 0 ] || kill -"$signal" "${pids[@]}" 2>/dev/null
            wait_for 5 none_left
        done
        for file in "$DIR"/ns/*; do umount "$file" 2>/dev/null; done
        if [ "$NET" = veth ]; then
            for name in $(names); do ip link del "$BRIDGE$name" 2>/dev/null; done
            ip link del "$BRIDGE"
        fi
        rm -rf --one-file-system "$DIR"
        ;;
    exec)
        load
        name=$1
        shift
        SLURM_CONF=$CONF in_node "$name" "$@"
        ;;
    start)
        load
        rm -f "$DIR/run/$1.pid"
        start "$1"
        ;;
    *) die "no such command: $COMMAND" ;;
esac
