# Shared by the lab's host-side scripts. Sourced, never run.
# shellcheck shell=bash disable=SC2034 # the variables are for those who source this

LAB_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAB_CACHE=${LUNPLUG_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lunplug-lab}
LAB_NODE=${LUNPLUG_LAB_NODE:-node}
# All state of one node VM: disk overlay, console log, QMP socket, pid.
RUN=$LAB_CACHE/run/$LAB_NODE
CONSOLE=$RUN/console.log
SSH_KEY=$LAB_CACHE/ssh_key

say() { printf '%s\n' "lab: $*" >&2; }
die() { printf '%s\n' "lab: error: $*" >&2; exit 1; }

need_root() {
  [ "$(id -u)" = 0 ] || die "this needs root (chroot, mounts): run it with sudo"
}

# need_program PROGRAM PACKAGE
need_program() {
  command -v "$1" >/dev/null || die "$1 is missing: apt-get install $2"
}

# timed WHAT CMD... : runs CMD and says how long it took. (No `|| return` here: it would switch
# `set -e` off inside CMD.)
timed() {
  local what=$1 start=$EPOCHREALTIME
  shift
  "$@"
  say "$what: $(seconds_since "$start") s"
}

# seconds_since EPOCHREALTIME -> "12.3"
seconds_since() {
  local ms=$((( ${EPOCHREALTIME/[.,]/} - ${1/[.,]/} ) / 1000))
  printf '%d.%d' $((ms / 1000)) $((ms % 1000 / 100))
}

# with_lock CMD... : one build or start at a time; the lock is not inherited by CMD's children.
with_lock() {
  mkdir -p "$LAB_CACHE"
  exec 9>"$LAB_CACHE/lock"
  flock -w 900 9 || die "another build or start has held $LAB_CACHE/lock for 15 minutes"
  "$@" 9>&-
  exec 9>&-
}

# in_tree CMD... : runs a program of the node's tree, chrooted, with the cache at /lab.
# So nothing but mmdebstrap has to be installed on this machine, and versions cannot clash.
in_tree() {
  local tree
  tree=$(tree_dir)
  [ -d "$tree" ] || die "no node tree yet: run '$LAB_DIR/node build'"
  # shellcheck disable=SC2016 # expanded by the inner shell
  unshare --mount --propagation private bash -euc '
    tree=$1 cache=$2
    shift 2
    mount --rbind /dev "$tree/dev"
    mount -t proc proc "$tree/proc"
    mount --bind "$cache" "$tree/lab"
    exec chroot "$tree" "$@"' in_tree "$tree" "$LAB_CACHE" "$@"
}

# lab_path PATH : where a path of the cache is seen by in_tree.
lab_path() { printf '/lab%s' "${1#"$LAB_CACHE"}"; }
