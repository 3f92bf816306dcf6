# Builds the node's tree, disk image and initramfs files. Sourced, never run.
# shellcheck shell=bash

# Everything that decides what the tree is; its hash is the tree's name.
tree_args() {
  local packages
  packages=$(grep -v '^#' "$LAB_DIR/node.packages" | paste -sd, -)
  printf '%s\n' --variant=apt \
    '--dpkgopt=path-exclude=/usr/share/man/*' \
    '--dpkgopt=path-exclude=/usr/share/doc/*' \
    '--dpkgopt=path-exclude=/usr/share/locale/*' \
    "--include=$packages" trixie
}

tree_dir() {
  printf '%s/tree-%s' "$LAB_CACHE" "$(tree_args | sha256sum | cut -c1-16)"
}

# The image depends on the tree, the ssh key, this file and all that is copied into it.
image_dir() {
  local hash
  hash=$({
    tree_dir
    cat "$SSH_KEY.pub"
    cd "$LAB_DIR" && find lib/build.sh image guest -type f -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum | cut -c1-16)
  printf '%s/image-%s' "$LAB_CACHE" "$hash"
}

build_tree() {
  local tree args
  tree=$(tree_dir)
  need_program mmdebstrap mmdebstrap
  [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] ||
    die "Debian's archive keys are missing: apt-get install debian-archive-keyring"
  rm -rf "$LAB_CACHE"/tree.tmp
  say "building the node's tree (a minute or two; log: $LAB_CACHE/tree.log)"
  mapfile -t args < <(tree_args)
  # INITRD=No: the initramfs files are our own and much smaller.
  INITRD=No mmdebstrap "${args[@]}" "$LAB_CACHE/tree.tmp" >"$LAB_CACHE/tree.log" 2>&1 || {
    tail -n 15 "$LAB_CACHE/tree.log" >&2
    die "mmdebstrap failed; the lines above are the end of $LAB_CACHE/tree.log"
  }
  mkdir -p "$LAB_CACHE/tree.tmp/lab"
  mv "$LAB_CACHE/tree.tmp" "$tree"
}

kernel_version() {
  local versions=("$(tree_dir)"/usr/lib/modules/*)
  [ ${#versions[@]} = 1 ] || die "expected one kernel in the tree, found: ${versions[*]}"
  basename "${versions[0]}"
}

# The uncompressed kernel boots by PVH: no decompression, which costs seconds under emulation.
# Offsets: Documentation/arch/x86/boot.rst (setup_sects, payload_offset, payload_length).
extract_kernel() {
  local bz=$1 out=$2 sects offset length
  sects=$(od -An -tu1 -j $((0x1f1)) -N1 "$bz")
  offset=$(od -An -tu4 -j $((0x248)) -N4 "$bz")
  length=$(od -An -tu4 -j $((0x24c)) -N4 "$bz")
  # The payload's last 4 bytes are the unpacked size, not zstd's.
  offset=$(((sects + 1) * 512 + offset))
  head -c $((offset + length - 4)) "$bz" | tail -c +$((offset + 1)) |
    in_tree zstd -dc >"$out" || die "cannot unpack the kernel $bz (is it not zstd?)"
}

# copy_modules ROOT MODULE... : unpacks modules with all they need to ROOT/modules, in loading order.
copy_modules() {
  local root=$1 kv file n=00
  shift
  kv=$(kernel_version)
  mkdir -p "$root/modules"
  while read -r file; do
    printf -v n '%02d' $((10#$n + 1))
    in_tree xz -dc "$file" >"$root/modules/$n-$(basename "$file" .xz)"
  done < <(for m in "$@"; do in_tree modprobe -S "$kv" --show-depends "$m"; done |
    awk '$1 == "insmod" && !seen[$2]++ { print $2 }')
}

# copy_programs ROOT PROGRAM... : programs of the tree with the libraries they are linked with.
copy_programs() {
  local root=$1 tree file
  shift
  tree=$(tree_dir)
  while read -r file; do
    mkdir -p "$root$(dirname "$file")"
    cp -L "$tree$file" "$root$file"
  done < <({ printf '%s\n' "$@"; in_tree ldd "$@" | grep -o '/[^ :]* (' | cut -d' ' -f1; } | sort -u)
}

# pack_initramfs ROOT OUT : not compressed; unpacking costs more than reading.
pack_initramfs() {
  local root
  root=$(lab_path "$1")
  in_tree sh -c "cd $root && find . | cpio --quiet -o -H newc" >"$2"
}

new_initramfs_root() {
  mkdir -p "$1"/{bin,dev,proc,sys,run,tmp,mnt,root,etc,usr/lib,usr/bin,usr/sbin}
  ln -s usr/lib "$1/lib"
  ln -s usr/sbin "$1/sbin"
  ln -s usr/lib64 "$1/lib64"
  mkdir -p "$1/usr/lib64"
  cp "$(tree_dir)/usr/bin/busybox" "$1/bin/busybox"
}

build_node_initramfs() {
  local root=$1.root
  new_initramfs_root "$root"
  copy_modules "$root" virtio_blk ext4
  install -m 755 "$LAB_DIR/image/initramfs-init" "$root/init"
  pack_initramfs "$root" "$1"
  rm -rf "$root"
}

build_guest_initramfs() {
  local root=$1.root tree rule command
  tree=$(tree_dir)
  new_initramfs_root "$root"
  copy_modules "$root" virtio_scsi sd_mod sr_mod virtio_blk ext4 dm_mod
  copy_programs "$root" /usr/bin/udevadm /usr/lib/udev/scsi_id /usr/lib/udev/ata_id \
    /usr/sbin/qemu-ga /usr/sbin/lvm /usr/sbin/sfdisk /usr/sbin/mkfs.ext4
  ln -s ../bin/udevadm "$root/usr/sbin/udevd"
  mkdir -p "$root/usr/lib/udev/rules.d"
  for rule in 50-udev-default 60-block 60-persistent-storage; do
    cp "$tree/usr/lib/udev/rules.d/$rule.rules" "$root/usr/lib/udev/rules.d/"
  done
  cp "$tree"/etc/{passwd,group,nsswitch.conf} "$root/etc/"
  for command in pvcreate vgcreate lvcreate vgchange lvchange pvs vgs lvs; do
    ln -s lvm "$root/usr/sbin/$command"
  done
  install -D -m 644 "$LAB_DIR/guest/lvm.conf" "$root/etc/lvm/lvm.conf"
  install -m 755 "$LAB_DIR/guest/init" "$root/init"
  pack_initramfs "$root" "$1"
  rm -rf "$root"
}

# The services that no test needs; most are timers of a long-lived machine.
MASKED_UNITS="getty@tty1.service serial-getty@ttyS0.service getty-static.service
  apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service
  fstrim.timer logrotate.timer systemd-tmpfiles-clean.timer mdmonitor.service mdmonitor-oneshot.timer
  mdcheck_start.timer mdcheck_continue.timer libvirt-guests.service systemd-binfmt.service
  proc-sys-fs-binfmt_misc.automount systemd-pstore.service systemd-hwdb-update.service
  systemd-journal-catalog-update.service ldconfig.service systemd-update-done.service
  systemd-firstboot.service systemd-pcrmachine.service dev-hugepages.mount sys-fs-fuse-connections.mount"

# configure_root ROOT : lays our files over a copy of the tree. ROOT's files are hard links into
# the tree, so each one is replaced, never written into.
configure_root() {
  local root=$1 unit
  cp -r --remove-destination "$LAB_DIR/image/root/." "$root/"
  for unit in $MASKED_UNITS; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
  done
  # The system libvirtd starts on demand by its socket (plain hosts), not at boot.
  rm -f "$root"/etc/systemd/system/multi-user.target.wants/{libvirtd,virtlogd}.service
  for unit in lab-net lab-ready; do
    ln -s "../$unit.service" "$root/etc/systemd/system/multi-user.target.wants/"
  done
  install -D -m 600 "$SSH_KEY.pub" "$root/root/.ssh/authorized_keys"
  rm -f "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/*_*
  rm -rf "$root/var/log/journal"
}

build_image() {
  local image tmp root
  image=$(image_dir)
  tmp=$LAB_CACHE/image.tmp root=$LAB_CACHE/image.tmp/root
  rm -rf "$tmp"
  mkdir -p "$tmp"
  extract_kernel "$(tree_dir)/boot/vmlinuz-$(kernel_version)" "$tmp/vmlinux"
  build_node_initramfs "$tmp/node.initrd"
  build_guest_initramfs "$tmp/guest.initrd"
  cp -al "$(tree_dir)" "$root"
  configure_root "$root"
  install -D -m 644 "$tmp/vmlinux" "$root/usr/lib/lunplug-lab/vmlinux"
  install -D -m 644 "$tmp/guest.initrd" "$root/usr/lib/lunplug-lab/guest.initrd"
  truncate -s 12G "$tmp/root.ext4"
  mke2fs -q -t ext4 -d "$root" -N 262144 -L lab-root \
    -E lazy_itable_init=0,lazy_journal_init=0 "$tmp/root.ext4" ||
    die "mke2fs could not make the image; is the disk of $LAB_CACHE full?"
  rm -rf "$root" "$tmp/guest.initrd"
  mv "$tmp" "$image"
}

# Drops what other package lists and older files left, unless a node may be running from it.
prune_cache() {
  local old keep_tree keep_image pidfile
  keep_tree=$(tree_dir) keep_image=$(image_dir)
  for pidfile in "$LAB_CACHE"/run/*/qemu.pid; do
    ! is_qemu "$pidfile" || return 0
  done
  for old in "$LAB_CACHE"/tree-* "$LAB_CACHE"/image-*; do
    [ "$old" = "$keep_tree" ] || [ "$old" = "$keep_image" ] || rm -rf "$old"
  done
}

build_all() {
  need_root
  need_program mke2fs e2fsprogs
  need_program ssh-keygen openssh-client
  [ -e "$SSH_KEY" ] || ssh-keygen -q -t ed25519 -N '' -C lunplug-lab -f "$SSH_KEY"
  if [ ! -d "$(tree_dir)" ]; then
    timed "tree built" build_tree
  fi
  if [ ! -d "$(image_dir)" ]; then
    timed "image built" build_image
    prune_cache
  fi
}
