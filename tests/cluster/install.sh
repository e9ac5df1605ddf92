#!/bin/sh
# Installs what the tests in this folder need and this machine has not: Debian's SLURM, munge, ssh and pdsh.
# Where it cannot, it says so and ends well: the tests then skip and name what they miss.
set -eu

packages=
want() { # PROGRAM PACKAGE
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || packages="$packages $2"
}
want slurmctld slurm-wlm
want munged munge
want sshd openssh-server
want pdsh pdsh
want ip iproute2

[ -n "$packages" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, for want of root or of apt-get:$packages" >&2
    exit 0
fi
# In run level 1 Debian starts no service after its installation: the tests bring up daemons of their own.
export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# shellcheck disable=SC2086
apt-get -qq install --yes --no-install-recommends $packages >/dev/null
