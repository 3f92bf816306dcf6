# Starts, resets and talks to the node VM. Sourced, never run.
# shellcheck shell=bash

BOOT_DEADLINE=240

node_pid() { cat "$RUN/qemu.pid" 2>/dev/null; }

# is_qemu PIDFILE : true when that process is alive and is a QEMU (a pid is reused sooner or later).
is_qemu() { [ "$(cat "/proc/$(cat "$1" 2>/dev/null)/comm" 2>/dev/null)" = qemu-system-x86 ]; }

node_is_running() { is_qemu "$RUN/qemu.pid"; }

need_running() {
  node_is_running || die "the node '$LAB_NODE' is not up: run '$LAB_DIR/node up'"
}

# qmp JSON... : each command's answer on one line.
qmp() {
  in_tree python3 -c "$(cat "$LAB_DIR/lib/qmp.py")" "$(lab_path "$RUN/qmp.sock")" "$@"
}

hmp() { qmp '{"execute": "human-monitor-command", "arguments": {"command-line": "'"$1"'"}}'; }

# The existence of /dev/kvm proves nothing: boots our kernel on it with a deadline.
# The answer holds until this machine reboots.
prove_kvm() {
  local image=$1 known=$LAB_CACHE/kvm boot_id
  [ -c /dev/kvm ] || return 1
  boot_id=$(cat /proc/sys/kernel/random/boot_id)
  if ! grep -qs "^$boot_id " "$known"; then
    say "trying KVM: booting a kernel with a deadline of 20 s"
    local works=no
    if in_tree timeout -s KILL 20 qemu-system-x86_64 -accel kvm -cpu host -m 512M -nodefaults \
      -no-user-config -display none -no-reboot -serial stdio -kernel "$(lab_path "$image/vmlinux")" \
      -initrd "$(lab_path "$image/node.initrd")" -append 'console=ttyS0 quiet panic=-1 lab.probe' \
      </dev/null 2>&1 | grep LUNPLUG-PROBE-OK >/dev/null; then
      works=yes
    fi
    echo "$boot_id $works" >"$known"
    say "KVM works: $works"
  fi
  grep -q "^$boot_id yes" "$known"
}

start_qemu() {
  local image=$1 accel
  if prove_kvm "$image"; then
    accel=(-accel kvm -cpu host)
  else
    accel=(-accel "tcg,thread=multi" -cpu max)
  fi
  in_tree qemu-system-x86_64 -name "lunplug-lab-$LAB_NODE" -machine pc "${accel[@]}" -smp 2 -m 6G \
    -nodefaults -no-user-config -display none \
    -kernel "$(lab_path "$image/vmlinux")" -initrd "$(lab_path "$image/node.initrd")" \
    -append 'root=/dev/vda console=ttyS0 quiet net.ifnames=0 random.trust_cpu=1 mitigations=off systemd.show_status=0 oops=panic panic=10' \
    -drive "if=none,id=root,file=$(lab_path "$RUN/root.qcow2"),format=qcow2,cache=unsafe" \
    -device virtio-blk-pci,drive=root,serial=lab-root \
    -device virtio-rng-pci \
    -netdev 'user,id=net,hostfwd=tcp:127.0.0.1:0-:22' -device 'virtio-net-pci,netdev=net,romfile=' \
    -chardev "file,id=console,path=$(lab_path "$CONSOLE"),append=on" -serial chardev:console \
    -qmp "unix:$(lab_path "$RUN/qmp.sock"),server=on,wait=off" \
    -pidfile "$(lab_path "$RUN/qemu.pid")" -daemonize ||
    die "QEMU did not start; its message is above"
}

# wait_ready OFFSET : waits for the ready line after OFFSET bytes of the console.
wait_ready() {
  local start=$SECONDS
  until tail -c +$(($1 + 1)) "$CONSOLE" 2>/dev/null | grep LUNPLUG-NODE-READY >/dev/null; do
    node_is_running || boot_failed "QEMU ended while the node was booting"
    [ $((SECONDS - start)) -lt $BOOT_DEADLINE ] ||
      boot_failed "the node did not come up within $BOOT_DEADLINE s"
    sleep 0.2
  done
}

boot_failed() {
  say "the console's last lines:"
  tail -n 25 "$CONSOLE" >&2 || true
  die "$1 (whole console: $CONSOLE)"
}

# SSH_ARGS for the running node. The shared connection makes a command cost one round trip.
ssh_args() {
  local control=$RUN/ssh.sock
  SSH_ARGS=(-F /dev/null -i "$SSH_KEY" -p "$(cat "$RUN/ssh.port")" -o BatchMode=yes
    -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR
    -o ConnectTimeout=30 -o ServerAliveInterval=20 -o ServerAliveCountMax=6)
  # A socket's path may have 107 bytes, and ssh appends 17 while it makes one.
  if [ ${#control} -le 90 ]; then
    SSH_ARGS+=(-o ControlMaster=auto -o ControlPath="$control" -o ControlPersist=yes)
  fi
}

node_ssh() {
  local tty=-T
  [ -t 0 ] && [ -t 1 ] && tty=-t
  ssh_args
  # shellcheck disable=SC2029 # the words are meant for the node's shell as they are
  ssh "$tty" "${SSH_ARGS[@]}" root@127.0.0.1 "$@"
}

drop_ssh() {
  [ -e "$RUN/ssh.port" ] || return 0
  ssh_args
  ssh "${SSH_ARGS[@]}" -O exit root@127.0.0.1 2>/dev/null || true
  rm -f "$RUN/ssh.sock"
}

find_ssh_port() {
  hmp 'info usernet' | awk '/HOST_FORWARD/ { print $4; exit }' >"$RUN/ssh.port"
  grep -qx '[0-9]\+' "$RUN/ssh.port" || die "QEMU does not tell the forwarded ssh port"
}

first_login() {
  local start=$SECONDS
  until node_ssh true </dev/null 2>/dev/null; do
    [ $((SECONDS - start)) -lt 60 ] || boot_failed "the node booted, but ssh does not answer"
    sleep 0.5
  done
}

vm_up() {
  local image
  image=$(image_dir)
  if node_is_running; then
    [ -e "$RUN/ssh.port" ] || find_ssh_port
    [ "$(cat "$RUN/image")" = "$image" ] ||
      say "note: the running node has an older image; 'node down', then 'node up' takes the new one"
    first_login
    return
  fi
  rm -rf "$RUN"
  mkdir -p "$RUN"
  : >"$CONSOLE"
  echo "$image" >"$RUN/image"
  in_tree qemu-img create -q -f qcow2 -F raw -b "$(lab_path "$image/root.ext4")" \
    "$(lab_path "$RUN/root.qcow2")"
  start_qemu "$image"
  find_ssh_port
  wait_ready 0
  first_login
}

# The node keeps its disk: what was synced is there afterwards, the rest may not be.
vm_reset() {
  local offset
  need_running
  offset=$(stat -c %s "$CONSOLE")
  drop_ssh
  qmp '{"execute": "system_reset"}' >/dev/null
  wait_ready "$offset"
  first_login
}

# As an operator does it: the node's own shutdown, then a boot.
vm_reboot() {
  local offset
  need_running
  offset=$(stat -c %s "$CONSOLE")
  node_ssh 'systemctl reboot' </dev/null || true
  drop_ssh
  wait_ready "$offset"
  first_login
}

# Under emulation alone: what the kernel tells of its first crash since it was booted, from its beginning. It need not be a
# virtual CPU's thread that crashes, nor one with a guest's stack pointer: whatever task comes next on that processor may.
vm_crashed() {
  need_running
  tr '\0' '\n' <"/proc/$(node_pid)/cmdline" | grep -q '^tcg,' || return 1
  grep -aq 'Kernel panic - not syncing' "$CONSOLE" || return 1
  grep -aE -m1 -A39 'BUG: |Oops: |Kernel panic - not syncing|general protection fault' "$CONSOLE"
}

vm_down() {
  local pid
  drop_ssh
  if node_is_running; then
    pid=$(node_pid)
    kill -9 "$pid"
    while [ -d "/proc/$pid" ]; do sleep 0.05; done
  fi
  rm -rf "$RUN"
}
